r"""What every tensor of a network can become when the input moves within its budget: intervals around clean values.

Differences of layers are bounded by ``A m +- (|A| r + rounding)``; activations by their values at the ends. Proofs:
theory page, section "Relaxations".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.bounds.graph.rules import Concat, Input, MaxPool, Op, Slope, Sum
from brittle.bounds.relaxation.linear_maps import Map, unit_roundoff

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

    def slopes(self) -> list[int]:
        """Numbers of the activations."""
        return [number for number, op in enumerate(self.ops) if isinstance(op.rule, Slope)]

    def low(self, number: int) -> float:
        """Slope of an activation below zero; it is 1 above."""
        rule = self.ops[number].rule
        assert isinstance(rule, Slope)
        return rule.low


@dataclass(frozen=True, eq=False)
class Ball:
    """All differences from the clean inputs that an attacker may choose.

    Attributes:
        mid: Middle of every coordinate's range ``(N, ...)``.
        rad: Half of it.
        length: Largest l_2 norm; None in l_inf. With it ``mid`` is zero.
    """

    mid: Tensor
    rad: Tensor
    length: float | None

    @staticmethod
    def around(x: Tensor, eps: float, p: float, bounds: tuple[float, float]) -> Ball:
        """The l_p ball, for p = inf cut to the bounds, widened by what the attacks' own check lets pass."""
        slack = 2.0**-22 * max(abs(bounds[0]), abs(bounds[1]))
        eps = eps * (1 + 2e-6) + slack
        if p == 2:
            return Ball(torch.zeros_like(x), torch.full_like(x, eps), eps)
        low, high = (bounds[0] - slack - x).clamp_min(-eps), (bounds[1] + slack - x).clamp_max(eps)
        return Ball((low + high) / 2, (high - low) / 2 * (1 + 4 * unit_roundoff(x.dtype)), None)

    def at(self, rows: Tensor) -> Ball:
        """The balls of some samples."""
        return Ball(self.mid[rows], self.rad[rows], self.length)


@dataclass(frozen=True, eq=False)
class Reach:
    """A batch of samples with everything known about them.

    Attributes:
        ball: Differences of the inputs.
        inputs: For every activation and max pooling the clean value of its input ``(N, ...)``, by number.
        ranges: Lower and upper ends of the same.
        errors: Rounding of one entry of an operation's result, between any two points of the ball, ``(N,)``.
        final: Middle and half-width of the differences that the last operation reads.
    """

    ball: Ball
    inputs: dict[int, Tensor]
    ranges: dict[int, Interval]
    errors: dict[int, Tensor]
    final: Interval

    def at(self, rows: Tensor) -> Reach:
        """Some of the samples."""
        ranges = {k: (low[rows], high[rows]) for k, (low, high) in self.ranges.items()}
        inputs, errors = ({k: v[rows] for k, v in d.items()} for d in (self.inputs, self.errors))
        final = (self.final[0][rows], self.final[1][rows])
        return Reach(self.ball.at(rows), inputs, ranges, errors, final)


def activation(z: Tensor, low: float) -> Tensor:
    """``max(z, low z)`` for a slope from 0 to 1."""
    return z.clamp_min(0) if low == 0 else torch.maximum(z, low * z)


def intervals(
    network: Network, values: dict[int, Tensor], ball: Ball, known: Mapping[int, Interval] | None = None
) -> Reach:
    """Pass the ball through the network; ranges ``known`` from elsewhere are intersected."""
    inputs: dict[int, Tensor] = {}
    ranges: dict[int, Interval] = {}
    errors: dict[int, Tensor] = {}
    moved: dict[int, Interval] = {}
    longest: dict[int, Tensor] = {}
    for number, op in enumerate(network.ops):
        rule, sources = op.rule, op.inputs
        if isinstance(rule, Input):
            moved[number] = (ball.mid, ball.rad)
            if ball.length is not None:
                longest[number] = ball.rad.new_full((len(ball.rad),), ball.length)
        elif isinstance(rule, Slope | MaxPool):
            source, z = sources[0], values[sources[0]]
            mid, rad = moved[source]
            low, high = z + (mid - rad), z + (mid + rad)
            if known is not None and number in known:
                low, high = torch.maximum(low, known[number][0]), torch.minimum(high, known[number][1])
            inputs[number], ranges[number] = z, (low, high)
            size = torch.maximum(low.abs(), high.abs()).flatten(1).amax(1)
            errors[number] = 32 * unit_roundoff(z.dtype) * size
            ends = [_applied(rule, end) - values[number] for end in (low, high)]
            moved[number] = _halves(ends[0], ends[1], errors[number])
            if isinstance(rule, Slope) and source in longest:
                longest[number] = longest[source]
        elif number in network.maps:
            moved[number], errors[number] = _mapped(network, number, values[sources[0]], moved, longest)
        else:
            moved[number], errors[number] = _combined(rule, [moved[s] for s in sources], [values[s] for s in sources])
    return Reach(ball, inputs, ranges, errors, moved[network.ops[-1].inputs[0]])


def _applied(rule: Slope | MaxPool, z: Tensor) -> Tensor:
    return activation(z, rule.low) if isinstance(rule, Slope) else rule.run(z)


def _halves(low: Tensor, high: Tensor, error: Tensor) -> Interval:
    wide = error.view(-1, *[1] * (low.ndim - 1))
    return (low + high) / 2, (high - low).clamp_min(0) / 2 + wide


def _mapped(
    network: Network,
    number: int,
    value: Tensor,
    moved: dict[int, Interval],
    longest: dict[int, Tensor],
) -> tuple[Interval, Tensor]:
    """Range of the differences after a linear map, and its rounding between two points.

    An entry rounds by at most ``rounding`` times the magnitudes of its summands, at either point; twice the same of
    the differences covers the arithmetic of the bound itself.
    """
    own, source = network.maps[number], network.ops[number].inputs[0]
    mid, rad = moved[source]
    if not own.terms:  # only the places change
        if source in longest:
            longest[number] = longest[source]
        return (own.forward(mid), own.magnitude(rad)), value.new_zeros(len(value))
    difference = mid.abs() + rad
    whole, part = _summands(own, value.abs() + difference), _summands(own, difference)
    error = own.rounding * (2 * (whole + own.offset) + 2 * part)
    low_mid, low_rad = own.forward(mid), own.magnitude(rad)
    if source in longest:
        if own.lengths is not None:
            low_rad = torch.minimum(low_rad, longest[source].view(-1, *[1] * (low_rad.ndim - 1)) * own.lengths)
        elif low_mid.shape == mid.shape:  # a diagonal
            longest[number] = longest[source] * own.row_sum
    return (low_mid, low_rad + error.view(-1, *[1] * (low_rad.ndim - 1))), error


def _summands(own: Map, size: Tensor) -> Tensor:
    """Upper bound of every entry of ``|A| size``, ``(N,)``, by Hoelder's inequality."""
    flat = size.flatten(1)
    largest = own.row_sum * flat.amax(1)
    if own.lengths is None:
        return largest
    return torch.minimum(largest, own.lengths.max() * torch.linalg.vector_norm(flat, dim=1) * (1 + 1e-3))


def _combined(rule: object, parts: list[Interval], values: list[Tensor]) -> tuple[Interval, Tensor]:
    """Sums and concatenations."""
    mids, rads = [mid for mid, _ in parts], [rad for _, rad in parts]
    if isinstance(rule, Concat):
        return (torch.cat(mids, rule.axis), torch.cat(rads, rule.axis)), values[0].new_zeros(len(values[0]))
    assert isinstance(rule, Sum)
    mid = torch.stack([sign * m for sign, m in zip(rule.signs, mids, strict=True)]).sum(0)
    rad = torch.stack(rads).sum(0)
    sizes = [(v.abs() + m.abs() + r).flatten(1).amax(1) for v, m, r in zip(values, mids, rads, strict=True)]
    error = 8 * len(parts) * unit_roundoff(rad.dtype) * torch.stack(sizes).sum(0)
    return (mid, rad + error.view(-1, *[1] * (rad.ndim - 1))), error
