r"""What every tensor of a network can become when the input moves within its budget: intervals around clean values.

Differences of layers are bounded by ``A m +- (|A| r + rounding)``; activations by their values at the ends. Proofs:
theory page, section "Relaxations".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import singledispatch

import torch
from torch import Tensor

from brittle.bounds.graph.rules import (
    Average,
    Concat,
    Conv,
    Dense,
    Input,
    MaxPool,
    Multiple,
    Op,
    Rearrange,
    Scale,
    Slope,
    Sum,
    TransposedConv,
    no_rule,
)
from brittle.bounds.relaxation.linear_maps import Map, unit_roundoff
from brittle.linear.norms import per_sample

Interval = tuple[Tensor, Tensor]
"""Lower and upper ends."""


@dataclass(frozen=True, eq=False)
class Network:
    """Operations in the order of execution, with the maps of the linear ones by number."""

    ops: tuple[Op, ...]
    maps: dict[int, Map]

    def shape(self, number: int) -> tuple[int, ...]:
        """Shape of one sample's result."""
        shape = self.ops[number].shape
        assert shape is not None
        return shape[1:]

    def size(self, number: int) -> int:
        """Entries of one sample's result."""
        return math.prod(self.shape(number))

    def rounds(self, number: int) -> bool:
        """Whether an operation computes anything, in place of passing its input on or elsewhere."""
        linear = self.maps.get(number)
        return not isinstance(self.ops[number].rule, Input | Concat) if linear is None else linear.terms > 0

    def slopes(self) -> list[int]:
        """Numbers of the activations."""
        return [number for number, op in enumerate(self.ops) if isinstance(op.rule, Slope)]

    def low(self, number: int) -> float:
        """Slope of an activation below zero; it is 1 above."""
        rule = self.ops[number].rule
        assert isinstance(rule, Slope)
        return rule.low


@singledispatch
def is_curved(rule: object, op: Op) -> bool:
    """Whether an operation is relaxed between lines, because it is neither linear nor a sum or concatenation.

    Raises:
        NoRule: It has no linear relaxation.
    """
    raise no_rule(op, "linear relaxation")


@is_curved.register
def _(rule: Slope | MaxPool, op: Op) -> bool:
    return True


@is_curved.register
def _(
    rule: Input | Dense | Conv | TransposedConv | Scale | Average | Rearrange | Multiple | Sum | Concat, op: Op
) -> bool:
    return False


@dataclass(frozen=True, eq=False)
class Ball:
    """All differences from the clean inputs that an attacker may choose.

    Attributes:
        mid: Middle of every coordinate's range ``(N, ...)``.
        rad: Half of it.
        length: Largest l_2 norms ``(N,)``; None in l_inf. With them ``mid`` is zero.
    """

    mid: Tensor
    rad: Tensor
    length: Tensor | None

    @staticmethod
    def around(x: Tensor, eps: float | Tensor, p: float, bounds: tuple[float, float]) -> Ball:
        """The l_p ball, for p = inf cut to the bounds, widened by what the attacks' own check lets pass.

        Args:
            x: Clean inputs ``(N, ...)``.
            eps: Budget, one for all or one for each sample ``(N,)``.
            p: 2 or inf.
            bounds: Smallest and largest admissible input value.
        """
        slack = 2.0**-22 * max(abs(bounds[0]), abs(bounds[1]))
        length = (torch.as_tensor(eps).to(x) * (1 + 2e-6) + slack).expand(len(x))
        rad = per_sample(length, x).expand_as(x)
        if p == 2:
            return Ball(torch.zeros_like(x), rad, length)
        low, high = torch.maximum(bounds[0] - slack - x, -rad), torch.minimum(bounds[1] + slack - x, rad)
        return Ball((low + high) / 2, (high - low) / 2 * (1 + 4 * unit_roundoff(x.dtype)), None)

    def least(self, g: Tensor) -> Tensor:
        """The difference ``(N, ...)`` of least ``<g, d>``."""
        if self.length is None:
            return self.mid - self.rad * g.sign()
        return -per_sample(self.length / g.flatten(1).norm(dim=1).clamp_min(torch.finfo(g.dtype).tiny), g) * g

    def at(self, rows: Tensor) -> Ball:
        """The balls of some samples."""
        return Ball(self.mid[rows], self.rad[rows], None if self.length is None else self.length[rows])


@dataclass(frozen=True, eq=False)
class Reach:
    """A batch of samples with everything known about them.

    Attributes:
        ball: Differences of the inputs.
        inputs: For every activation and max pooling the clean value of its input ``(N, ...)``, by number.
        ranges: Lower and upper ends of the same.
        errors: Rounding of every entry of an operation's result, between any two points of the ball, by number of the
            operations that round.
        final: Middle and half-width of the differences that the last operation reads.
    """

    ball: Ball
    inputs: dict[int, Tensor]
    ranges: dict[int, Interval]
    errors: dict[int, Tensor]
    final: Interval

    def flat(self, number: int) -> Interval:
        """The range of an activation's input, ``(N, n)`` each."""
        low, high = self.ranges[number]
        return low.flatten(1), high.flatten(1)

    def put(self, rows: Tensor, some: Reach) -> None:
        """Write what is known of some samples over what was known of them; ``final`` stays."""
        for number, ends in self.ranges.items():
            for end, tighter in zip(ends, some.ranges[number], strict=True):
                end[rows] = tighter
        for number, error in self.errors.items():
            error[rows] = some.errors[number]

    def at(self, rows: Tensor) -> Reach:
        """Some of the samples."""
        ranges = {k: (low[rows], high[rows]) for k, (low, high) in self.ranges.items()}
        inputs, errors = ({k: v[rows] for k, v in d.items()} for d in (self.inputs, self.errors))
        final = (self.final[0][rows], self.final[1][rows])
        return Reach(self.ball.at(rows), inputs, ranges, errors, final)


def activation(z: Tensor, low: float) -> Tensor:
    """``max(z, low z)`` for a slope from 0 to 1."""
    return z.clamp_min(0) if low == 0 else torch.maximum(z, low * z)


@dataclass(frozen=True, eq=False)
class Propagation:
    """Intervals on their way through the network, filled operation by operation, by number.

    Attributes:
        network: The operations.
        values: Clean results of all operations, ``(N, ...)``.
        ball: Differences of the inputs.
        tighter: Ranges of the inputs of activations and max pooling that are known from elsewhere.
        inputs: As in :class:`Reach`.
        ranges: As in :class:`Reach`.
        errors: As in :class:`Reach`.
        moved: Middle and half-width of the differences of every result.
        lengths: Upper bounds of the differences' l_2 norms ``(N,)``, where they are known.
    """

    network: Network
    values: Mapping[int, Tensor]
    ball: Ball
    tighter: Mapping[int, Interval]
    inputs: dict[int, Tensor] = field(default_factory=dict)
    ranges: dict[int, Interval] = field(default_factory=dict)
    errors: dict[int, Tensor] = field(default_factory=dict)
    moved: dict[int, Interval] = field(default_factory=dict)
    lengths: dict[int, Tensor] = field(default_factory=dict)


def intervals(
    network: Network, values: Mapping[int, Tensor], ball: Ball, tighter: Mapping[int, Interval] | None = None
) -> Reach:
    """Pass the ball through the network; ranges that are known from elsewhere are intersected.

    Args:
        network: The operations.
        values: Clean results of all operations, by number.
        ball: Differences of the inputs.
        tighter: Ranges of the inputs of activations and max pooling, by number.

    Raises:
        NoRule: An operation has no linear relaxation.
    """
    state = Propagation(network, values, ball, tighter or {})
    for number, op in enumerate(network.ops):
        pass_on(op.rule, op, number, state)
    final = state.moved[network.ops[-1].inputs[0]]
    return Reach(ball, state.inputs, state.ranges, state.errors, final)


@singledispatch
def pass_on(rule: object, op: Op, number: int, state: Propagation) -> None:
    """Pass the intervals through one operation.

    Raises:
        NoRule: It has no linear relaxation.
    """
    raise no_rule(op, "linear relaxation")


@pass_on.register
def _(rule: Input, op: Op, number: int, state: Propagation) -> None:
    ball = state.ball
    state.moved[number] = (ball.mid, ball.rad)
    if ball.length is not None:
        state.lengths[number] = ball.length


@pass_on.register
def _(rule: Slope | MaxPool, op: Op, number: int, state: Propagation) -> None:
    source = op.inputs[0]
    z, (mid, rad) = state.values[source], state.moved[source]
    low, high = z + (mid - rad), z + (mid + rad)
    if number in state.tighter:
        bottom, top = state.tighter[number]
        low, high = torch.maximum(low, bottom), torch.minimum(high, top)
    state.inputs[number], state.ranges[number] = z, (low, high)
    bottom, top = (
        (activation(end, rule.low) if isinstance(rule, Slope) else rule.run(end)) - state.values[number]
        for end in (low, high)
    )
    size = torch.maximum(low.abs(), high.abs())
    error = 32 * unit_roundoff(z.dtype) * (size if isinstance(rule, Slope) else rule.run(size))
    state.errors[number] = error
    state.moved[number] = ((bottom + top) / 2, (top - bottom).clamp_min(0) / 2 + error)
    if isinstance(rule, Slope) and source in state.lengths:  # no difference grows; in max pooling windows overlap
        state.lengths[number] = state.lengths[source]


@pass_on.register
def _(
    rule: Dense | Conv | TransposedConv | Scale | Average | Rearrange | Multiple,
    op: Op,
    number: int,
    state: Propagation,
) -> None:
    """A linear map; its rounding holds between any two points.

    An entry rounds by at most ``rounding`` times the magnitudes of its summands, at either point; twice the same of
    the differences covers the arithmetic of the bound itself, and a fiftieth more that of the magnitudes.
    """
    linear, source = state.network.maps[number], op.inputs[0]
    value, (mid, rad), length = state.values[source], state.moved[source], state.lengths.get(source)
    if not linear.terms:  # only the places change
        if length is not None:
            state.lengths[number] = length
        state.moved[number] = (linear.forward(mid), linear.magnitude(rad))
        return
    middle, radius = linear.forward(mid), linear.magnitude(rad)
    if length is not None and linear.lengths is not None:
        # Differences as long as that lie around zero, not around the middle: behind an activation these are two places.
        most = per_sample(length, radius) * linear.lengths
        low, high = torch.maximum(middle - radius, -most), torch.minimum(middle + radius, most)
        middle, radius = (low + high) / 2, (high - low) / 2
    elif length is not None and middle.shape == mid.shape:  # a diagonal
        state.lengths[number] = length * linear.row_sum
    whole = 2 * linear.magnitude(value.abs() + 2 * mid.abs()) + 4 * radius + 2 * linear.offset
    state.errors[number] = error = 1.02 * linear.rounding * whole
    state.moved[number] = (middle, radius + error)


@pass_on.register
def _(rule: Sum, op: Op, number: int, state: Propagation) -> None:
    parts, values = [state.moved[n] for n in op.inputs], [state.values[n] for n in op.inputs]
    mid = torch.stack([sign * m for sign, (m, _) in zip(rule.signs, parts, strict=True)]).sum(0)
    rad = torch.stack([r for _, r in parts]).sum(0)
    sizes = torch.stack([v.abs() + m.abs() + r for v, (m, r) in zip(values, parts, strict=True)]).sum(0)
    state.errors[number] = error = 8 * len(parts) * unit_roundoff(rad.dtype) * sizes
    state.moved[number] = (mid, rad + error)


@pass_on.register
def _(rule: Concat, op: Op, number: int, state: Propagation) -> None:
    mids, rads = zip(*(state.moved[n] for n in op.inputs), strict=True)
    state.moved[number] = (rule.join(mids, rule.axis), rule.join(rads, rule.axis))
