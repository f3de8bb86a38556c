"""What an operation of a network can be: a dozen rules, each with what a bound has to know of it.

An analysis of networks is a :func:`functools.singledispatch` function with one registration per rule. What it has no
registration for raises :class:`~brittle.models.trace.NoRule` (:func:`no_rule`), so that a new rule counts as nothing
in no analysis that has not been told of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor

from brittle.linear.conv_geometry import ConvGeometry
from brittle.models.trace import NoRule

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Input:
    """The network's input."""


@dataclass(frozen=True, eq=False)
class Dense:
    """``W x`` on the last axis; W ``(out, in)``."""

    W: Tensor


@dataclass(frozen=True, eq=False)
class Conv:
    """A convolution; K ``(out, in / groups, *kernel)``."""

    K: Tensor
    geometry: ConvGeometry


@dataclass(frozen=True, eq=False)
class TransposedConv:
    """The transpose of a convolution: K ``(in, out / groups, *kernel)``, and how that convolution walks."""

    K: Tensor
    geometry: ConvGeometry


@dataclass(frozen=True, eq=False)
class Scale:
    """A diagonal matrix with one factor ``(C,)`` a channel (axis 1), of either sign."""

    factors: Tensor


@dataclass(frozen=True, eq=False)
class Slope:
    """An elementwise function whose difference quotients lie in ``[low, high]``.

    Attributes:
        low: Smallest slope.
        high: Largest slope.
        kinked: Whether it is ``max(z, low z)`` with ``low`` from 0 to 1: then it has linear relaxations.
    """

    low: float
    high: float
    kinked: bool = False

    @property
    def steepest(self) -> float:
        """The function's Lipschitz constant, up to outward rounding."""
        return max(abs(self.low), abs(self.high))


@dataclass(frozen=True, eq=False)
class MaxPool:
    """Max pooling over ``axes`` spatial axes; ``overlap`` windows share one point (counted without borders)."""

    run: Run
    overlap: int
    axes: int


@dataclass(frozen=True, eq=False)
class Average:
    """A linear map with non-negative entries whose rows sum to at most 1.

    Attributes:
        run: The map itself, on tensors of a batch of one.
        norm: Upper bound of its l_2 norm; None where it is not known.
        why: What is missing when it is not known.
        stencil: Kernel size, stride and padding when it is a convolution with equal weights.
        everything: Whether it averages over all positions.
        axes: Spatial axes of the pooling; 0 for a mean over other axes, which may mix channels.
    """

    run: Run
    norm: float | None
    why: str = ""
    stencil: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None
    everything: bool = False
    axes: int = 0


@dataclass(frozen=True, eq=False)
class Rearrange:
    """Entries of the input in other places, none of them twice; the others are left out, and zeros may be added.

    Attributes:
        run: The map itself; None where it is not understood.
        flattens: Whether all entries keep their order.
        conv: The same as a convolution, where it is one.
    """

    run: Run | None
    flattens: bool = False
    conv: Conv | None = None


@dataclass(frozen=True, eq=False)
class Sum:
    """Inputs with the given signs, added."""

    signs: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Concat:
    """Inputs side by side, perhaps with constants between them.

    Attributes:
        axis: Along which they lie.
        gaps: Lengths of the constants before every input and behind the last; empty where there are none.
    """

    axis: int
    gaps: tuple[int, ...] = ()

    def join(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        """The inputs' differences side by side along an axis; those of constants are zero."""
        if not self.gaps:
            return torch.cat(list(parts), axis)
        pieces: list[Tensor] = []
        for gap, part in zip(self.gaps, [*parts, parts[-1]], strict=True):
            shape = list(part.shape)
            shape[axis] = gap
            pieces += [part.new_zeros(shape), part]
        return torch.cat(pieces[:-1], axis)

    def parts(self, joined: Tensor, axis: int, lengths: Sequence[int]) -> list[Tensor]:
        """What belongs to every input, of these lengths along an axis, and not to the constants."""
        gaps = self.gaps or (0,) * (len(lengths) + 1)
        ends = [gaps[0], *(size for pair in zip(lengths, gaps[1:], strict=True) for size in pair)]
        return list(joined.split(ends, axis)[1::2])


@dataclass(frozen=True, eq=False)
class Multiple:
    """``factor * x``."""

    factor: float


@dataclass(frozen=True, eq=False)
class Softmax:
    """Lipschitz constant 1/2 in l_2 and in l_inf."""


Rule = (
    Input | Dense | Conv | TransposedConv | Scale | Slope | MaxPool | Average | Rearrange | Sum | Concat | Multiple
    | Softmax
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Op:
    """One operation.

    Attributes:
        name: The module's qualified name, or the function's with the module it stands in.
        rule: What it computes.
        inputs: Numbers of the operations it reads.
        shape: Shape of its result with a batch of one; None when the input's shape is not known.
        node: Name of the node of the graph that yields its result.
    """

    name: str
    rule: Rule
    inputs: tuple[int, ...]
    shape: tuple[int, ...] | None
    node: str = ""


def no_rule(op: Op, quantity: str) -> NoRule:
    """The error of an analysis that has not been told of a rule: "0.attention: no slopes for Attention"."""
    return NoRule(f"{op.name}: no {quantity} for {type(op.rule).__name__}")


def users(ops: Sequence[Op]) -> list[list[int]]:
    """For every operation the numbers of those that read it, once for every reading."""
    read_by: list[list[int]] = [[] for _ in ops]
    for number, op in enumerate(ops):
        for source in op.inputs:
            read_by[source].append(number)
    return read_by


@singledispatch
def spatial_axes(rule: object, op: Op) -> int:
    """How many spatial axes the images have that an operation works on; 0 for one on tensors of any shape.

    Raises:
        NoRule: The rule is unknown.
    """
    raise no_rule(op, "number of spatial axes")


@spatial_axes.register
def _(rule: Conv | TransposedConv, op: Op) -> int:
    return rule.K.ndim - 2


@spatial_axes.register
def _(rule: MaxPool | Average, op: Op) -> int:
    return rule.axes


@spatial_axes.register
def _(rule: Input | Dense | Scale | Slope | Rearrange | Sum | Concat | Multiple | Softmax, op: Op) -> int:
    return 0
