"""Norms of vectors and dense matrices, and projections onto balls.

Each function's name or docstring says whether it is exact, an upper or a lower bound. Convolutions as operators on
images are in :mod:`brittle.linear.convolution`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from brittle.errors import InputError
from brittle.linear.compressibility import row_norms, singular_values


def dual_exponent(p: float) -> float:
    """The exponent ``p*`` with ``1/p + 1/p* = 1``: 1 and inf are dual, 2 is its own.

    >>> dual_exponent(1), dual_exponent(2), dual_exponent(math.inf)
    (inf, 2.0, 1.0)
    """
    if not p >= 1:
        raise InputError(f"p: expected an exponent from 1 to inf; got {p}")
    if p == 1:
        return math.inf
    return 1.0 if math.isinf(p) else p / (p - 1)


def lp_norm(x: Tensor, p: float) -> Tensor:
    """The lp norm of every sample.

    Args:
        x: ``(N, ...)``; all but the first axis are one vector.
        p: From 1 to inf.

    Returns:
        ``(N,)``, in units of x.
    """
    return torch.linalg.vector_norm(x.flatten(1), ord=p, dim=1)


def distances(a: Tensor, b: Tensor, p: float) -> Tensor:
    """``||a - b||_p`` of every sample: differences in single precision or better, norms in float64.

    Args:
        a: ``(N, ...)``.
        b: Likewise.
        p: From 1 to inf.

    Returns:
        ``(N,)`` in float64, in units of the inputs; exact to half a unit in the last place of every difference.
    """
    if a.dtype not in (torch.float32, torch.float64):
        a, b = a.float(), b.float()
    return torch.linalg.vector_norm((a - b).flatten(1), ord=p, dim=1, dtype=torch.float64)


def project_ball(x: Tensor, radius: float, p: float) -> Tensor:
    """The nearest point (in l2) to every sample within the lp ball around zero.

    Args:
        x: ``(N, ...)``.
        radius: At least 0, in units of x.
        p: 2 or inf.

    Returns:
        ``(N, ...)``, with norm at most ``radius`` up to rounding.
    """
    if math.isinf(check_attack_norm(p)):
        return x.clamp(-radius, radius)
    length = per_sample(lp_norm(x, 2), x)
    return x * (radius / length.clamp_min(max(radius, torch.finfo(x.dtype).tiny)))


def check_attack_norm(p: float) -> float:
    """``p`` itself if it is 2 or inf.

    Raises:
        InputError: It is not.
    """
    if p not in (2, math.inf):
        raise InputError(f"p: expected 2 or inf; got {p}")
    return float(p)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """``(N,)`` reshaped to broadcast over the samples of ``like`` ``(N, ...)``."""
    return values.view(-1, *[1] * (like.ndim - 1))


def thin(values: Tensor, most: int) -> Tensor:
    """At most ``most`` of the rows, spread evenly over all, in their order; first and last included.

    Args:
        values: ``(N, ...)``.
        most: At least 1; of a single row it is the first.

    Returns:
        ``(min(N, most), ...)``.
    """
    if len(values) <= most:
        return values
    return values[torch.linspace(0, len(values) - 1, most, device=values.device).round().long()]


def operator_norm(W: Tensor, p: float) -> Tensor:
    """Exact operator norm ``max ||Wx||_p / ||x||_p`` of dense matrices.

    p = inf: largest row sum of magnitudes; p = 1: largest column sum; p = 2: largest singular value. A
    convolution's kernel is not its operator; see :func:`brittle.linear.convolution.operator_norm_bounds`.

    Args:
        W: ``(..., m, n)``, real and finite.
        p: 1, 2 or inf.

    Returns:
        ``(...,)``, in units of W; exact up to rounding.

    Raises:
        InputError: ``p`` is another number, or ``W`` is empty or not finite.

    >>> operator_norm(torch.tensor([[3.0, -4.0], [0.0, 1.0]]), math.inf)
    tensor(7.)
    """
    if W.ndim < 2:
        raise InputError(f"W: expected at least 2 axes (..., m, n); got shape {tuple(W.shape)}")
    if p == 2:
        return singular_values(W)[..., 0]
    if p not in (1, math.inf):
        raise InputError(f"p: expected 1, 2 or inf; got {p}")
    return row_norms(W if math.isinf(p) else W.mT).amax(-1)
