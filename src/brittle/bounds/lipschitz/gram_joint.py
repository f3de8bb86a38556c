"""Joint Gram matrices of all live results, and what an operation makes of them.

A result is live while something still reads it. Both ends of a shortcut are carried together, so that a sum knows how
they hang together. On a torus there is one joint matrix a frequency, all in one tensor. Theory page, section
"Multipliers".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from brittle.bounds.graph.rules import Concat, Conv, Multiple, Op, Scale, Sum
from brittle.bounds.lipschitz.gram_diagonal import Stuck, largest
from brittle.bounds.lipschitz.torus import spills
from brittle.bounds.pairs.multipliers import Slopes
from brittle.linear.conv_symbol import frequencies, symbol
from brittle.linear.spectrum import ROUNDING, UNIT_ROUNDOFF

Rows = Callable[[Tensor], Tensor]
"""A linear map of all live results together: from their rows ``(F, n, m)`` to its own, ``(F, k, m)``."""


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

    def largest(self) -> float:
        """Upper bound of every ``||J||^2``."""
        return largest(self.P)


def spread(x: int, t: Tensor, grid: tuple[int, ...]) -> Joint:
    """One result with ``J J^H <= diag(t)`` as a joint matrix of its own."""
    P = torch.diag(t).to(torch.complex128 if grid else torch.float64)
    return Joint(P.expand(frequencies(grid), -1, -1), {x: (0, len(t))}, grid)


def side_by_side(convs: Mapping[int, Conv], t: Tensor, grid: tuple[int, ...]) -> Joint:
    """All convolutions, by their numbers, of one stride that read a result with ``J J^H <= diag(t)``."""
    A = torch.cat([symbol(conv.K, conv.geometry, grid) for conv in convs.values()], 1)
    P = (A * t.repeat_interleave(A.shape[2] // len(t))) @ A.mH
    place = _places({number: len(conv.K) for number, conv in convs.items()})
    return Joint(P, place, grid, frozenset(number for number, conv in convs.items() if spills(conv)))


def combination(state: Joint, op: Op) -> Rows:
    """Sums, concatenations and diagonal matrices.

    Raises:
        Stuck: The operation is none of these.
    """
    rows, rule = [state.rows(source) for source in op.inputs], op.rule
    if isinstance(rule, Sum):
        signed = list(zip(rows, rule.signs, strict=True))
        return lambda R: reduce(torch.add, [R[:, r] if s > 0 else -R[:, r] for r, s in signed])
    if isinstance(rule, Concat):
        return lambda R: torch.cat([R[:, r] for r in rows], 1)
    if isinstance(rule, Multiple):
        return lambda R: rule.factor * R[:, rows[0]]
    if isinstance(rule, Scale) and len(rule.factors) == state.place[op.inputs[0]][1]:
        return lambda R: rule.factors[:, None] * R[:, rows[0]]
    raise Stuck


def cancelled(state: Joint, op: Op, A: Tensor | None = None) -> Tensor:
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


def extended(
    state: Joint, number: int, rows: Rows, kept: Sequence[int], *, spilt: bool, lost: Tensor | None = None
) -> Joint:
    """The joint matrix with a linear map of what is live, behind the results that are kept.

    Args:
        state: What is live.
        number: The linear map's.
        rows: The linear map.
        kept: Live results that are read later.
        spilt: Whether the new result may be nonzero outside the image.
        lost: Added to its diagonal, one number a frequency: what rounding may hide.
    """
    cross = rows(state.P)
    own = rows(cross.mH)
    if lost is not None:
        own = own + torch.eye(own.shape[-1], dtype=torch.float64) * lost[:, None, None]
    place = _places({x: state.place[x][1] for x in kept} | {number: own.shape[-1]})
    if kept:
        index = _index(state, kept)
        cross = cross[:, :, index]
        own = torch.cat([torch.cat([_selected(state.P, index), cross.mH], 2), torch.cat([cross, own], 2)], 1)
    return Joint(own, place, state.grid, (state.spilt | {number} if spilt else state.spilt) & place.keys())


def eliminated(state: Joint, x: int, number: int, slopes: Slopes, t: Tensor, L: Tensor, kept: Sequence[int]) -> Joint:
    """The joint matrix with an activation of x, before the results that are kept.

    The largest value over all slopes, by one Schur complement.

    Args:
        state: What is live.
        x: The live result that the activation reads.
        number: The activation's.
        slopes: Smallest and largest slope.
        t: Its multipliers, ``(n,)``.
        L: Their factor (:func:`brittle.bounds.pairs.multipliers.factor`) for the block of x.
        kept: Live results that are read later.
    """
    low, high = slopes
    n, root = len(t), t.sqrt().to(L.dtype)
    # X: L^-1 of [ (low + high) T^1/2 for z, T^-1/2 P_xo for the others ]
    right = [torch.diag((low + high) * root).expand(len(L), n, n)]
    right += [state.block(x, y) / root[:, None] for y in kept]
    X = torch.linalg.solve_triangular(L, torch.cat(right, 2), upper=False)
    P = X.mH @ X
    if low:
        P[:, :n, :n] -= 2 * low * high * torch.diag(root**2)
    if kept:
        P = P + F.pad(_selected(state.P, _index(state, kept)), (n, 0, n, 0))
    place = {**_places({y: state.place[y][1] for y in kept}, n), number: (0, n)}
    return Joint(P, place, state.grid, state.spilt & place.keys())


def _places(heights: Mapping[int, int], start: int = 0) -> dict[int, tuple[int, int]]:
    """First row and number of rows of results one below the other."""
    ends = accumulate(heights.values(), initial=start)
    return {x: (first, height) for first, (x, height) in zip(ends, heights.items(), strict=False)}


def _index(state: Joint, some: Sequence[int]) -> Tensor:
    """The rows of some live results."""
    return torch.cat([torch.arange(state.place[x][0], sum(state.place[x])) for x in some])


def _selected(P: Tensor, index: Tensor) -> Tensor:
    """Rows and columns of a batch of matrices, without a copy where they are consecutive."""
    if bool((index.diff() == 1).all()):
        rows = slice(int(index[0]), int(index[-1]) + 1)
        return P[:, rows, rows]
    return P[:, index][:, :, index]
