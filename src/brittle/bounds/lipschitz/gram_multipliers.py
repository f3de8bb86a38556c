"""Which multipliers an activation inside a network gets: closed forms, judged by what reads its result.

What is chosen here is no bound by itself: any positive diagonal with ``2T - P > 0`` gives one. Theory page, section
"Multipliers".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from brittle.bounds.graph.rules import Conv, Dense
from brittle.bounds.lipschitz.gram_diagonal import Stuck, estimate, first_vectors
from brittle.bounds.pairs.multipliers import MULTIPLES, Slopes, directions, factor
from brittle.linear.conv_symbol import symbol
from brittle.linear.spectrum import power_iteration

Reader = Dense | Conv | None
"""A linear operation that reads a result, convolutions with zero padding; None for any other reading."""


def chosen_multipliers(
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
    maps = [_matrix(reader, grid, heavy) for reader in readers]
    scale = [max(estimate(few, w) * 1.0001, 1e-200) for w in forms]

    def value(key: int, multiple: float) -> float:
        t = forms[key] * scale[key] * multiple
        L = factor(few, t)
        return math.inf if L is None else _response(L, t, maps, slopes)

    values = [value(key, 0.75) for key in range(len(forms))]
    best = min(range(len(forms)), key=values.__getitem__)
    tried = {0.75: values[best]} | {multiple: value(best, multiple) for multiple in MULTIPLES}
    for multiple in sorted((m for m in tried if math.isfinite(tried[m])), key=tried.__getitem__):
        for slack in (1.0, 1.02, 1.1):
            t = forms[best] * scale[best] * multiple * slack
            if (L := factor(Q, t)) is not None:
                return t, L
    raise Stuck


def outer_norms(readers: Sequence[Reader], n: int) -> Tensor:
    """Column norms ``(n,)`` of all readers of a result of n channels together; 1 for any reading that is not linear."""
    total = torch.zeros(n, dtype=torch.float64)
    for reader in readers:
        columns = _column_squares(reader)
        total += columns if columns is not None and len(columns) == n else torch.ones(n, dtype=torch.float64)
    return total.sqrt() if float(total.max()) > 0 else torch.ones(n, dtype=torch.float64)


def _column_squares(reader: Reader) -> Tensor | None:
    """Squared column norms, one a channel."""
    if reader is None:
        return None
    if isinstance(reader, Dense):
        return reader.W.double().square().sum(0)
    squares = reader.K.double().square().flatten(2).sum(2)
    return squares.unflatten(0, (reader.geometry.groups, -1)).sum(1).flatten()


def _matrix(reader: Reader, grid: Sequence[int], heavy: Tensor) -> Tensor | None:
    """The matrix of a reader at some frequencies; None for one that is no linear operation on this torus."""
    if isinstance(reader, Dense):
        return reader.W.double()
    if reader is None or not grid or max(reader.geometry.stride) > 1:
        return None
    return symbol(reader.K, reader.geometry, grid)[heavy]


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
