"""What the walk of :mod:`brittle.bounds.lipschitz.gram_walk` carries, and what operations make of it.

A result is live while something still reads it. On a torus, and for vectors, all live results have one joint Gram
matrix (a frequency), so that the correlation of what meets in a sum is kept. Elsewhere all that is kept of the only
live result is one weight a channel. Theory page, section "Multipliers".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce, singledispatch
from itertools import accumulate

import torch
import torch.nn.functional as F
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
    Softmax,
    Sum,
    TransposedConv,
    no_rule,
)
from brittle.bounds.lipschitz.gram_multipliers import Stuck, largest_eigenvalue
from brittle.bounds.lipschitz.torus import spills
from brittle.bounds.pairs.multipliers import Slopes
from brittle.linear.conv_symbol import frequencies, symbol
from brittle.linear.spectrum import ROUNDING, UNIT_ROUNDOFF

Rows = Callable[[Tensor], Tensor]
"""A linear map of all live results together: from their rows ``(F, n, m)`` to its own, ``(F, k, m)``."""


@dataclass(frozen=True, eq=False)
class Diagonal:
    """One live result with ``J J^H <= diag(t)``.

    Attributes:
        alone: The result: the number of its operation.
        t: Weights ``(C,)``, one a channel (axis 1), for all its positions.
    """

    alone: int
    t: Tensor

    def largest(self) -> float:
        """The largest weight: upper bound of every ``||J||^2``."""
        return float(self.t.detach().max())


@dataclass(frozen=True, eq=False)
class Joint:
    """All live results, ``J J^H <= P`` for their Jacobians one below the other.

    Attributes:
        P: Joint Gram matrix ``(F, n, n)``, one a frequency; F = 1 off the torus.
        place: First row and number of rows of every live result.
        grid: Points of the torus per axis; empty off the torus.
        spilt: Live results that may be nonzero on the torus outside the image.
    """

    P: Tensor
    place: dict[int, tuple[int, int]]
    grid: tuple[int, ...]
    spilt: frozenset[int] = frozenset()

    @property
    def alone(self) -> int | None:
        """The only live result; None when there are several."""
        return next(iter(self.place)) if len(self.place) == 1 else None

    def rows(self, x: int) -> slice:
        """Where a live result stands."""
        start, length = self.place[x]
        return slice(start, start + length)

    def block(self, a: int, b: int) -> Tensor:
        """Rows of one live result, columns of another."""
        return self.P[:, self.rows(a), self.rows(b)]

    def height(self, some: Sequence[int]) -> int:
        """Rows of some live results together."""
        return sum(self.place[x][1] for x in some)

    def index(self, some: Sequence[int]) -> Tensor:
        """The rows of some live results."""
        return torch.cat([torch.arange(self.place[x][0], sum(self.place[x])) for x in some])

    def among(self, some: Sequence[int]) -> Tensor:
        """Rows and columns of some live results, without a copy where they are consecutive."""
        index = self.index(some)
        if bool((index.diff() == 1).all()):
            rows = slice(int(index[0]), int(index[-1]) + 1)
            return self.P[:, rows, rows]
        return self.P[:, index][:, :, index]

    def largest(self) -> float:
        """Upper bound of every ``||J||^2``."""
        return largest_eigenvalue(self.P)


# --- a diagonal ----------------------------------------


@singledispatch
def weights_after(rule: object, op: Op, t: Tensor, before: tuple[int, ...]) -> Tensor:
    """The weights after an operation that keeps channels apart, or else one weight for all: upper bounds.

    Args:
        rule: The operation's rule.
        op: The operation; its shape must be known.
        t: Weights of what it reads, ``(C,)``.
        before: Shape of what it reads, with a batch of one.

    Returns:
        ``(C',)``, one weight a channel of the result.

    Raises:
        Stuck: A linear map, sum or concatenation of several: it is done on a joint matrix, or not at all.
        NoRule: The rule is unknown.
    """
    raise no_rule(op, "weights")


@weights_after.register
def _(rule: Input | Dense | Conv | TransposedConv | Sum, op: Op, t: Tensor, before: tuple[int, ...]) -> Tensor:
    raise Stuck


@weights_after.register
def _(rule: Concat, op: Op, t: Tensor, before: tuple[int, ...]) -> Tensor:
    if len(op.inputs) > 1 or rule.axis != 1:
        raise Stuck
    return rule.join([t], 0)  # channels that are constant weigh nothing


@weights_after.register
def _(rule: Slope, op: Op, t: Tensor, before: tuple[int, ...]) -> Tensor:
    return t * rule.steepest**2


@weights_after.register
def _(rule: Scale, op: Op, t: Tensor, before: tuple[int, ...]) -> Tensor:
    return t * rule.factors**2


@weights_after.register
def _(rule: Multiple, op: Op, t: Tensor, before: tuple[int, ...]) -> Tensor:
    return t * rule.factor**2


@weights_after.register
def _(rule: MaxPool, op: Op, t: Tensor, before: tuple[int, ...]) -> Tensor:
    return t * rule.overlap


@weights_after.register
def _(rule: Average, op: Op, t: Tensor, before: tuple[int, ...]) -> Tensor:
    if rule.norm is None:
        raise Stuck
    return t * rule.norm**2 if rule.axes else _one_weight(op, t, rule.norm)


@weights_after.register
def _(rule: Rearrange, op: Op, t: Tensor, before: tuple[int, ...]) -> Tensor:
    if rule.run is None or not rule.flattens or len(op.shape or ()) != 2:
        return _one_weight(op, t, 1.0)
    return rule.run(t.view(1, -1, *[1] * (len(before) - 2)).expand(before))[0]


@weights_after.register
def _(rule: Softmax, op: Op, t: Tensor, before: tuple[int, ...]) -> Tensor:
    return _one_weight(op, t, 0.5)


def _one_weight(op: Op, t: Tensor, constant: float) -> Tensor:
    """The same weight for all channels of the result of an operation that may mix what it reads."""
    assert op.shape is not None
    return (t.max() * constant**2).expand(op.shape[1])


def joint_of_diagonal(x: int, t: Tensor, grid: tuple[int, ...]) -> Joint:
    """One result with ``J J^H <= diag(t)`` as a joint matrix of its own."""
    P = torch.diag(t).to(torch.complex128 if grid else torch.float64)
    return Joint(P.expand(frequencies(grid), -1, -1), {x: (0, len(t))}, grid)


def convolve_diagonal(convs: Mapping[int, Conv], t: Tensor, grid: tuple[int, ...]) -> Joint:
    """All convolutions, by their numbers, of one stride that read a result with ``J J^H <= diag(t)``."""
    A = torch.cat([symbol(conv.K, conv.geometry, grid) for conv in convs.values()], 1)
    P = (A * t.repeat_interleave(A.shape[2] // len(t))) @ A.mH
    place = _stack({number: len(conv.K) for number, conv in convs.items()})
    return Joint(P, place, grid, frozenset(number for number, conv in convs.items() if spills(conv)))


# --- a joint matrix ----------------------------------------


@singledispatch
def rows_after(rule: object, op: Op, state: Joint) -> Rows:
    """Sums, concatenations and diagonal matrices as linear maps of all that is live.

    Raises:
        Stuck: The operation is none of these.
        NoRule: The rule is unknown.
    """
    raise no_rule(op, "linear map")


@rows_after.register
def _(
    rule: Input | Dense | Conv | TransposedConv | Slope | MaxPool | Average | Rearrange | Softmax, op: Op, state: Joint
) -> Rows:
    raise Stuck


@rows_after.register
def _(rule: Sum, op: Op, state: Joint) -> Rows:
    signed = [(state.rows(source), sign) for source, sign in zip(op.inputs, rule.signs, strict=True)]
    return lambda R: reduce(torch.add, [R[:, rows] if sign > 0 else -R[:, rows] for rows, sign in signed])


@rows_after.register
def _(rule: Concat, op: Op, state: Joint) -> Rows:
    return lambda R: rule.join([R[:, state.rows(source)] for source in op.inputs], 1)


@rows_after.register
def _(rule: Multiple, op: Op, state: Joint) -> Rows:
    return lambda R: rule.factor * R[:, state.rows(op.inputs[0])]


@rows_after.register
def _(rule: Scale, op: Op, state: Joint) -> Rows:
    if len(rule.factors) != state.place[op.inputs[0]][1]:
        raise Stuck
    return lambda R: rule.factors[:, None] * R[:, state.rows(op.inputs[0])]


def lost_by_cancellation(state: Joint, op: Op, A: Tensor | None = None) -> Tensor:
    """What rounding may hide, for every frequency ``(F,)``, where large terms of a linear map cancel.

    Entries of ``A P A^H`` are off by at most ``2 n u ||A||_F^2 tr P``, u the unit roundoff and n the columns.

    Args:
        state: What is live.
        op: A sum, or the operation with the matrix A.
        A: One matrix a frequency, or one for all, ``(F or 1, m, n)``; None for a sum.
    """
    roots = [state.block(x, x).diagonal(dim1=1, dim2=2).real.sum(1).clamp_min(0).sqrt() for x in op.inputs]
    if A is None:
        return ROUNDING * reduce(torch.add, roots).square()
    frobenius = A.abs().square().sum((1, 2))
    return 4 * UNIT_ROUNDOFF * (A.shape[-1] + 1) * frobenius * roots[0].square()


def append_rows(
    state: Joint, number: int, rows: Rows, later: Sequence[int], *, spilt: bool, lost: Tensor | None = None
) -> Joint:
    """The joint matrix with a linear map of what is live, behind the results that are read later.

    Args:
        state: What is live.
        number: The linear map's.
        rows: The linear map.
        later: Live results that are read later; the others are dropped.
        spilt: Whether the new result may be nonzero outside the image.
        lost: Added to its diagonal, one number a frequency: what rounding may hide.
    """
    cross = rows(state.P)
    block = rows(cross.mH)
    if lost is not None:
        block = block + torch.eye(block.shape[-1], dtype=torch.float64) * lost[:, None, None]
    place = _stack({x: state.place[x][1] for x in later} | {number: block.shape[-1]})
    P = block
    if later:
        cross = cross[:, :, state.index(later)]
        P = torch.cat([torch.cat([state.among(later), cross.mH], 2), torch.cat([cross, block], 2)], 1)
    return Joint(P, place, state.grid, (state.spilt | {number} if spilt else state.spilt) & place.keys())


def eliminate_activation(
    state: Joint, x: int, number: int, slopes: Slopes, t: Tensor, L: Tensor, later: Sequence[int]
) -> Joint:
    """The joint matrix with an activation of x, before the results that are read later.

    The largest value over all slopes, by one Schur complement.

    Args:
        state: What is live.
        x: The live result that the activation reads.
        number: The activation's.
        slopes: Smallest and largest slope.
        t: Its multipliers, ``(n,)``.
        L: Their factor (:func:`brittle.bounds.pairs.multipliers.factor`) for the block of x.
        later: Live results that are read later; the others are dropped.
    """
    low, high = slopes
    n, root = len(t), t.sqrt().to(L.dtype)
    # X: L^-1 of [ (low + high) T^1/2 for z, T^-1/2 P_xo for the others ]
    right = [torch.diag((low + high) * root).expand(len(L), n, n)]
    right += [state.block(x, y) / root[:, None] for y in later]
    X = torch.linalg.solve_triangular(L, torch.cat(right, 2), upper=False)
    P = X.mH @ X
    if low:
        P[:, :n, :n] -= 2 * low * high * torch.diag(root**2)
    if later:
        P = P + F.pad(state.among(later), (n, 0, n, 0))
    place = {**_stack({y: state.place[y][1] for y in later}, n), number: (0, n)}
    return Joint(P, place, state.grid, state.spilt & place.keys())


def _stack(heights: Mapping[int, int], start: int = 0) -> dict[int, tuple[int, int]]:
    """First row and number of rows of results one below the other."""
    ends = accumulate(heights.values(), initial=start)
    return {x: (row, height) for row, (x, height) in zip(ends, heights.items(), strict=False)}
