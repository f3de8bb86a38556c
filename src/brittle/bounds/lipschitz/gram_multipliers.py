"""Diagonal matrices and Gram matrices: which multipliers an activation gets, and which diagonal lies above a matrix.

Multipliers are closed forms, judged by what reads the activation's result. What is chosen here is no bound by itself:
any positive diagonal with ``2T - P > 0`` gives one. Theory page, section "Multipliers".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from brittle.bounds.graph.rules import Conv, Dense
from brittle.bounds.pairs.multipliers import MULTIPLES, Slopes, directions, factor, raise_to_floor
from brittle.linear.conv_symbol import symbol
from brittle.linear.spectrum import power_iteration

Reader = Dense | Conv | None
"""A linear operation that reads a result, convolutions with zero padding; None for any other reading."""


class Stuck(Exception):
    """Raised where the walk cannot go on; the segment then counts with its product of norms."""


def choose_multipliers(
    Q: Tensor, readers: Sequence[Reader], grid: Sequence[int], slopes: Slopes
) -> tuple[Tensor, Tensor]:
    """Multipliers by the best of a few closed forms, judged at the heaviest frequencies, and their factor.

    Args:
        Q: Gram matrices of what the activation reads, ``(F, n, n)``.
        readers: What reads the activation's result, once for every reading.
        grid: Points of the torus per axis; empty off the torus.
        slopes: Of the activation.

    Returns:
        The diagonal of T, ``(n,)``, and the Cholesky factor of :func:`brittle.bounds.pairs.multipliers.factor`.

    Raises:
        Stuck: None of them is feasible.
    """
    Q = Q.detach()
    energy = Q.diagonal(dim1=-2, dim2=-1).real
    forms = directions(energy.mean(0).clamp_min(0).sqrt(), outer_norms(readers, Q.shape[-1]))
    heavy = energy.sum(1).topk(min(len(Q), 3)).indices
    few = Q[heavy]
    maps: list[Tensor | None] = []
    for reader in readers:
        if isinstance(reader, Dense):
            maps.append(reader.W.double())
        elif reader is None or not grid or max(reader.geometry.stride) > 1:
            maps.append(None)  # no linear operation on this torus
        else:
            maps.append(symbol(reader.K, reader.geometry, grid)[heavy])
    scale = [max(estimate_eigenvalue(few, w) * 1.0001, 1e-200) for w in forms]

    def value(key: int, multiple: float) -> float:
        t = forms[key] * scale[key] * multiple
        L = factor(few, t)
        return math.inf if L is None else _response(L, t, maps, slopes)

    values = [value(key, 0.75) for key in range(len(forms))]
    best = min(range(len(forms)), key=values.__getitem__)
    responses = {0.75: values[best]} | {multiple: value(best, multiple) for multiple in MULTIPLES}
    for multiple in sorted((m for m in responses if math.isfinite(responses[m])), key=responses.__getitem__):
        for slack in (1.0, 1.02, 1.1):
            t = forms[best] * scale[best] * multiple * slack
            if (L := factor(Q, t)) is not None:
                return t, L
    raise Stuck


def uniform_multipliers(Q: Tensor) -> tuple[Tensor, Tensor]:
    """One multiplier for all units, the norm of what they read ``(F, n, n)``, and its factor.

    The choice of ECLipsE-Fast (Xu & Sivaranjani 2024). With t the largest eigenvalue of Q, any eigenvalue q becomes
    ``t^2 / (2t - q)``: the largest stays, and no other comes closer to it than half as far.

    Raises:
        Stuck: Q is zero or not finite.
    """
    t = torch.full((Q.shape[-1],), largest_eigenvalue(Q), dtype=torch.float64)
    L = factor(Q.detach(), t) if bool(t.isfinite().all()) else None
    if L is None:
        raise Stuck
    return t, L


def outer_norms(readers: Sequence[Reader], n: int) -> Tensor:
    """Column norms ``(n,)`` of all readers of a result of n channels together; 1 for any reading that is not linear."""
    total = torch.zeros(n, dtype=torch.float64)
    for reader in readers:
        columns = torch.ones(n, dtype=torch.float64)
        if isinstance(reader, Dense):
            columns = reader.W.double().square().sum(0)
        elif reader is not None:
            squares = reader.K.double().square().flatten(2).sum(2)
            columns = squares.unflatten(0, (reader.geometry.groups, -1)).sum(1).flatten()
        total += columns if len(columns) == n else 1.0
    return total.sqrt() if float(total.max()) > 0 else torch.ones(n, dtype=torch.float64)


def dominating_diagonal(P: Tensor, outer: Tensor) -> Tensor:
    """A diagonal matrix above P at every frequency, of a few kinds the one with the least ``sum t_c outer_c^2``.

    Args:
        P: ``(F, n, n)``.
        outer: Norms of the columns of what reads the result, ``(n,)``.

    Returns:
        Its entries ``(n,)``, with P's gradient.

    Raises:
        Stuck: P is not finite.
    """
    energy = P.diagonal(dim1=-2, dim2=-1).real.mean(0)
    best, least = torch.ones_like(energy), math.inf
    for w in (torch.ones_like(energy), raise_to_floor(energy).sqrt(), raise_to_floor(energy)):
        t = w * largest_eigenvalue(P, w)
        size = float((t.detach() * outer**2).sum())
        if size < least * 0.999:
            best, least = t, size
    if not math.isfinite(least):
        raise Stuck
    return best if not P.requires_grad else best * _relative_slope(P, best)


def _relative_slope(P: Tensor, t: Tensor) -> Tensor:
    """One, with the gradient of the logarithm of the largest eigenvalue of ``diag(t)^-1/2 P diag(t)^-1/2``."""
    with torch.no_grad():
        root = t.rsqrt().to(P.dtype)[:, None]
        values, vectors = power_iteration(lambda v: root * (P @ (root * v)), first_vectors(P), 20)
        place = int(values.argmax())
        v = root * vectors[place]
    value = ((v.mH @ P[place] @ v) / (v.mH @ (t.to(P.dtype)[:, None] * v))).real[0, 0]
    return value / value.detach() if float(value.detach()) > 0 else torch.ones_like(value)


def largest_eigenvalue(P: Tensor, w: Tensor | None = None) -> float:
    """Upper bound, within some percent, of the largest eigenvalue of ``W^-1/2 P W^-1/2`` over the batch.

    Certified by a Cholesky factorisation; infinite where none succeeds.
    """
    P = P.detach()
    w = torch.ones(P.shape[-1], dtype=torch.float64) if w is None else w.detach()
    traces = (P.diagonal(dim1=-2, dim2=-1).real / w).sum(1)
    guess = estimate_eigenvalue(P[traces.topk(min(len(P), 4)).indices], w)
    if not guess:
        return 0.0 if not P.any() else math.inf
    for doubling in range(20):
        guess *= 1 + 0.003 * 2**doubling
        if factor(2 * P, w * guess) is not None:  # 2 guess W - 2 P > 0
            return guess
    return math.inf


def estimate_eigenvalue(Q: Tensor, w: Tensor, iterations: int = 20) -> float:
    """Estimate, from below, of the largest eigenvalue of ``W^-1/2 Q W^-1/2`` over the batch, by power iteration."""
    root = w.rsqrt().to(Q.dtype)[:, None]
    return float(power_iteration(lambda v: root * (Q @ (root * v)), first_vectors(Q), iterations)[0].max())


def first_vectors(like: Tensor) -> Tensor:
    """Where power iterations on matrices ``(F, n, n)`` start: random, always the same, ``(F, n, 1)``."""
    v = torch.randn(like.shape[-1], 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return v.to(like.dtype).expand(len(like), -1, -1)


def _response(L: Tensor, t: Tensor, maps: Sequence[Tensor | None], slopes: Slopes) -> float:
    """Estimate of the largest eigenvalue of ``sum_A A R A^H`` over the batch, R the eliminated matrix."""
    low, high = slopes
    root = t.sqrt().to(L.dtype)[:, None]

    def respond(v: Tensor) -> Tensor:
        g = torch.zeros_like(v)
        for A in maps or [None]:
            g = g + (v if A is None else A.mH.to(L.dtype) @ (A.to(L.dtype) @ v))
        return (low + high) ** 2 * root * torch.cholesky_solve(root * g, L) - 2 * low * high * root**2 * g

    return float(power_iteration(respond, first_vectors(L), 12)[0].max())
