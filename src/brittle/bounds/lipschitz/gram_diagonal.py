"""Diagonal matrices above a Gram matrix: how large one must be, and what an operation makes of its weights.

Where the recursion of :mod:`brittle.bounds.lipschitz.gram` leaves a torus, all that it keeps is one weight a channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.bounds.graph.rules import Average, MaxPool, Multiple, Op, Rearrange, Scale, Slope, Softmax
from brittle.bounds.pairs.multipliers import factor, floored
from brittle.linear.spectrum import power_iteration


class Stuck(Exception):
    """Raised where the recursion cannot go on; the segment then counts with its product of norms."""


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
        return float(self.t.max())


def weights_after(op: Op, t: Tensor, before: tuple[int, ...] | None) -> Tensor:
    """The weights after an operation that keeps channels apart, or else one weight for all: upper bounds.

    Args:
        op: The operation.
        t: Weights of what it reads, ``(C,)``.
        before: Shape of what it reads, with a batch of one.

    Raises:
        Stuck: The operation has no such rule.
    """
    rule, after = op.rule, op.shape
    assert before is not None
    assert after is not None
    if isinstance(rule, Slope):
        return t * rule.steepest**2
    if isinstance(rule, Scale):
        return t * rule.factors**2
    if isinstance(rule, Multiple):
        return t * rule.factor**2
    if isinstance(rule, MaxPool):
        return t * rule.overlap
    if isinstance(rule, Average) and rule.norm is not None and rule.axes:
        return t * rule.norm**2
    if isinstance(rule, Rearrange) and rule.run is not None and len(after) == 2 and rule.flattens:
        return rule.run(t.view(1, -1, *[1] * (len(before) - 2)).expand(before))[0]
    if isinstance(rule, Rearrange | Softmax | Average):
        own = rule.norm if isinstance(rule, Average) else 0.5 if isinstance(rule, Softmax) else 1.0
        if own is None:
            raise Stuck
        return torch.full((after[1],), float(t.detach().max()) * own**2, dtype=torch.float64)
    raise Stuck


def above(P: Tensor, outer: Tensor) -> Tensor:
    """A diagonal matrix above P at every frequency, of a few kinds the one with the least ``sum t_c outer_c^2``.

    Args:
        P: ``(F, n, n)``.
        outer: Norms of the columns of what reads the result, ``(n,)``.

    Returns:
        Its entries ``(n,)``; no gradient flows through them.

    Raises:
        Stuck: P is not finite.
    """
    P = P.detach()
    energy = P.diagonal(dim1=-2, dim2=-1).real.mean(0)
    best, least = torch.ones_like(energy), math.inf
    for w in (torch.ones_like(energy), floored(energy).sqrt(), floored(energy)):
        t = w * largest(P, w)
        size = float((t * outer**2).sum())
        if size < least * 0.999:
            best, least = t, size
    if not math.isfinite(least):
        raise Stuck
    return best


def largest(P: Tensor, w: Tensor | None = None) -> float:
    """Upper bound, within some percent, of the largest eigenvalue of ``W^-1/2 P W^-1/2`` over the batch.

    Certified by a Cholesky factorisation; infinite where none succeeds.
    """
    P = P.detach()
    w = torch.ones(P.shape[-1], dtype=torch.float64) if w is None else w
    traces = (P.diagonal(dim1=-2, dim2=-1).real / w).sum(1)
    guess = estimate(P[traces.topk(min(len(P), 4)).indices], w)
    if not guess:
        return 0.0 if not P.any() else math.inf
    for doubling in range(20):
        guess *= 1 + 0.003 * 2**doubling
        if factor(2 * P, w * guess) is not None:  # 2 guess W - 2 P > 0
            return guess
    return math.inf


def estimate(Q: Tensor, w: Tensor, iterations: int = 20) -> float:
    """Estimate, from below, of the largest eigenvalue of ``W^-1/2 Q W^-1/2`` over the batch, by power iteration."""
    root = w.rsqrt().to(Q.dtype)[:, None]
    return float(power_iteration(lambda v: root * (Q @ (root * v)), first_vectors(Q), iterations)[0].max())


def first_vectors(like: Tensor) -> Tensor:
    """Where power iterations on matrices ``(F, n, n)`` start: random, always the same, ``(F, n, 1)``."""
    v = torch.randn(like.shape[-1], 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return v.to(like.dtype).expand(len(like), -1, -1)
