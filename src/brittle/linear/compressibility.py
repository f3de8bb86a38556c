r"""How compressible a vector or a matrix is: best-k-term errors, spread, and ranks.

A vector is compressible when few of its entries carry nearly all of its norm. Applied to the l1 norms of a matrix's
rows this is row (neuron, filter) compressibility; applied to its singular values it is spectral compressibility.
The mathematics is on the theory page of the documentation, section "Compressibility"; definitions follow
Barsbey et al., "On the interaction of compressibility and adversarial robustness" (arXiv 2507.17725), Definition 2.1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from brittle.errors import InputError

RANK_TOLERANCE = 1e-10
"""Singular values above this share of the largest count for the numerical rank."""


def k_term_error(v: Tensor, k: int, q: float = 1.0) -> Tensor:
    r"""Relative best-k-term approximation error: the epsilon of (q, k, epsilon)-compressibility.

    ``||v - v_k||_q / ||v||_q``, where ``v_k`` keeps the k entries of v largest in magnitude (Definition 2.1).

    Args:
        v: Vectors ``(..., d)``, real; leading axes are a batch.
        k: Entries kept, from 0 to d.
        q: Exponent of the norm, from 1 to inf.

    Returns:
        Errors ``(...,)`` in [0, 1], without unit; 0 is perfectly compressible. A zero vector has error 0 at every k.

    Raises:
        InputError: ``k`` or ``q`` out of range, or ``v`` empty, complex or not finite.

    >>> k_term_error(torch.tensor([3.0, 0.0, -1.0]), k=1)
    tensor(0.2500)
    """
    v = _real_vectors(v)
    _check_k(k, v.shape[-1])
    return k_term_error_curve(v, q)[..., k]


def k_term_error_curve(v: Tensor, q: float = 1.0) -> Tensor:
    """:func:`k_term_error` for every k at once.

    Args:
        v: Vectors ``(..., d)``, real.
        q: Exponent of the norm, from 1 to inf.

    Returns:
        Errors ``(..., d + 1)`` for k = 0 ... d, non-increasing from 1 to 0 (all 0 for a zero vector). Tails are
        summed from the smallest entry up, so that small errors keep their digits.

    >>> k_term_error_curve(torch.tensor([3.0, 0.0, -1.0]))
    tensor([1.0000, 0.2500, 0.0000, 0.0000])
    """
    if not q >= 1:
        raise InputError(f"q: expected an exponent from 1 to inf; got {q}")
    v = _real_vectors(v)
    rising = v.abs().sort(dim=-1, stable=True).values
    largest = rising[..., -1:]
    rising = rising / torch.where(largest > 0, largest, 1)
    tails = rising if math.isinf(q) else (rising**q).cumsum(-1)
    curve = torch.cat([torch.zeros_like(tails[..., :1]), tails], dim=-1).flip(-1)
    curve = curve / torch.where(largest > 0, curve[..., :1], 1)
    positive = curve > 0  # the root's slope at 0 is infinite; keep gradients finite there
    return curve if math.isinf(q) else torch.where(positive, torch.where(positive, curve, 1) ** (1 / q), 0)


def smallest_k(v: Tensor, error: float, q: float = 1.0) -> Tensor:
    """Fewest entries that reach an error: ``min {k : k_term_error(v, k, q) <= error}``.

    Args:
        v: Vectors ``(..., d)``, real.
        error: Largest admissible k-term error, at least 0; from 1 on the answer is 0, at 0 the number of non-zeros.
        q: Exponent of the norm, from 1 to inf.

    Returns:
        Integers ``(...,)`` in 0 ... d.

    Raises:
        InputError: ``error`` is negative or NaN.

    >>> smallest_k(torch.tensor([3.0, 0.0, -1.0]), error=0.25)
    tensor(1)
    """
    if not error >= 0:
        raise InputError(f"error: expected a number of at least 0; got {error}")
    v = _real_vectors(v)
    return v.count_nonzero(-1) if error == 0 else (k_term_error_curve(v, q) > error).sum(-1)


def spread(v: Tensor, k: int) -> Tensor:
    """Spread of the k dominant entries, ``beta = 1 - |v|_(k) / |v|_(1)`` (Definition 2.1).

    Args:
        v: Vectors ``(..., d)``, real.
        k: From 0 to d; the spread of no entries (k = 0) is NaN.

    Returns:
        Spreads ``(...,)`` in [0, 1]: 0 when the k largest are equal (and for a zero vector), 1 when the k-th is 0.

    >>> spread(torch.tensor([4.0, 1.0, -3.0]), k=2)
    tensor(0.2500)
    """
    v = _real_vectors(v)
    _check_k(k, v.shape[-1])
    if k == 0:
        return torch.full_like(v[..., 0], math.nan)
    falling = v.abs().sort(dim=-1, descending=True, stable=True).values
    largest = falling[..., 0]
    return torch.where(largest > 0, 1 - falling[..., k - 1] / torch.where(largest > 0, largest, 1), 0)


def row_norms(W: Tensor) -> Tensor:
    """The l1 norm of every row: the vector nu whose compressibility is row compressibility.

    Args:
        W: Matrices ``(..., m, n)``; rows are output neurons or filters.

    Returns:
        ``(..., m)``, in units of W, in the rows' order.
    """
    return _real_vectors(W, axes=2).abs().sum(-1)


def singular_values(W: Tensor, groups: int = 1) -> Tensor:
    """Singular values, largest first: the vector sigma whose compressibility is spectral compressibility.

    Args:
        W: Matrices ``(..., m, n)``.
        groups: For the filter matrix of a grouped convolution, whose filters of different groups act on disjoint
            inputs: the singular values are those of the block-diagonal matrix of the ``groups`` row blocks.

    Returns:
        ``(..., groups * min(m / groups, n))``.
    """
    W = _real_vectors(W, axes=2)
    if groups != 1:
        if groups < 1 or W.shape[-2] % groups:
            raise InputError(f"groups: expected a divisor of the {W.shape[-2]} rows; got {groups}")
        blocks = W.unflatten(-2, (groups, -1))
        return singular_values(blocks).flatten(-2).sort(dim=-1, descending=True).values
    if W.shape[-1] > 2 * W.shape[-2]:
        W = torch.linalg.qr(W.mT, mode="r").R  # the triangular factor has the same singular values, and is small
    elif W.shape[-2] > 2 * W.shape[-1]:
        W = torch.linalg.qr(W, mode="r").R
    return torch.linalg.svdvals(W)


class SpectralSummary(NamedTuple):
    """Ranks of one spectrum; ``1 <= stable_rank <= nuclear_spectral <= nuclear_frobenius <= effective <= rank``.

    All are 0 for a zero matrix and unchanged when the matrix is scaled.
    """

    stable_rank: Tensor
    nuclear_spectral_ratio: Tensor
    nuclear_frobenius_ratio: Tensor
    effective_rank: Tensor
    rank: Tensor


def spectral_summary(sigma: Tensor) -> SpectralSummary:
    r"""All ranks of a matrix from its singular values.

    With ``p_i = sigma_i / sum sigma``: stable rank ``sum sigma^2 / sigma_1^2``, nuclear over spectral norm
    ``sum sigma / sigma_1``, squared nuclear over Frobenius norm ``(sum sigma)^2 / sum sigma^2``, effective rank
    ``exp(-sum p_i ln p_i)`` (Roy & Vetterli 2007; the exponential of the entropy, not the entropy), and the number of
    singular values above ``1e-10 sigma_1``.

    Args:
        sigma: Singular values ``(..., p)``, in any order; from :func:`singular_values`.

    Returns:
        Each ``(...,)``.
    """
    sigma = _real_vectors(sigma)
    largest = sigma.amax(-1, keepdim=True)
    sigma = sigma / torch.where(largest > 0, largest, 1)
    total, squares = sigma.sum(-1), sigma.square().sum(-1)
    p = sigma / torch.where(total > 0, total, 1)[..., None]
    entropy = -torch.where(p > 0, p * torch.where(p > 0, p, 1).log(), 0).sum(-1)
    zero = total == 0
    return SpectralSummary(
        stable_rank=squares,
        nuclear_spectral_ratio=total,
        nuclear_frobenius_ratio=total.square() / torch.where(zero, 1, squares),
        effective_rank=torch.where(zero, 0, entropy.exp()),
        rank=(sigma > RANK_TOLERANCE).sum(-1),
    )


def stable_rank(W: Tensor) -> Tensor:
    """``||W||_F^2 / ||W||_2^2`` of matrices ``(..., m, n)``; see :func:`spectral_summary`."""
    return spectral_summary(singular_values(W)).stable_rank


def nuclear_spectral_ratio(W: Tensor) -> Tensor:
    """``||W||_* / ||W||_2`` of matrices ``(..., m, n)``; see :func:`spectral_summary`."""
    return spectral_summary(singular_values(W)).nuclear_spectral_ratio


def nuclear_frobenius_ratio(W: Tensor) -> Tensor:
    """``(||W||_* / ||W||_F)^2`` of matrices ``(..., m, n)``; see :func:`spectral_summary`."""
    return spectral_summary(singular_values(W)).nuclear_frobenius_ratio


def effective_rank(W: Tensor) -> Tensor:
    """Exponential of the entropy of the normalised singular values of ``(..., m, n)`` (Roy & Vetterli 2007).

    >>> effective_rank(torch.eye(5))
    tensor(5.)
    """
    return spectral_summary(singular_values(W)).effective_rank


def effective_sparsity(v: Tensor) -> Tensor:
    """``(||v||_1 / ||v||_2)^2``: between 1 and the number of non-zeros; 0 for a zero vector.

    Args:
        v: Vectors ``(..., d)``; flatten a matrix first.

    >>> effective_sparsity(torch.tensor([2.0, 2.0, 0.0]))
    tensor(2.)
    """
    v = _real_vectors(v)
    largest = v.abs().amax(-1, keepdim=True)
    v = v / torch.where(largest > 0, largest, 1)
    squares = v.square().sum(-1)
    return v.abs().sum(-1).square() / torch.where(squares > 0, squares, 1)


def keep_rows(W: Tensor, k: int) -> Tensor:
    """Row compression: the k rows of largest l1 norm as they are, the others zero (ties keep the first).

    Args:
        W: Matrix ``(m, n)``.
        k: From 0 to m.

    Returns:
        ``(m, n)``, with ``||W - W_k||_inf`` equal to the (k+1)-th largest row norm.
    """
    _check_k(k, W.shape[0])
    largest = row_norms(W).sort(descending=True, stable=True).indices[:k]
    mask = torch.zeros(W.shape[0], 1, dtype=torch.bool, device=W.device).index_fill(0, largest, True)
    return torch.where(mask, W, 0)


def truncate_spectrum(W: Tensor, k: int) -> Tensor:
    """Spectral compression: the best approximation of rank k, ``U_k S_k V_k^T``.

    Args:
        W: Matrix ``(m, n)``.
        k: From 0 to min(m, n).

    Returns:
        ``(m, n)``, with ``||W - W_k||_2`` equal to the (k+1)-th singular value.
    """
    W = _real_vectors(W, axes=2)
    _check_k(k, min(W.shape))
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U[:, :k] * S[:k]) @ Vh[:k]


def _check_k(k: int, d: int) -> None:
    if not 0 <= k <= d:
        raise InputError(f"k: expected an integer from 0 to {d}; got {k}")


def _real_vectors(v: Tensor, axes: int = 1) -> Tensor:
    """``v`` as floating numbers (integers become float64), after checking its axes and its finiteness."""
    if v.ndim < axes or 0 in v.shape[-axes:]:
        raise InputError(f"v: expected at least {axes} axes, none empty; got shape {tuple(v.shape)}")
    if v.is_complex():
        raise InputError(f"v: expected real numbers; got {v.dtype}")
    v = v if v.is_floating_point() else v.double()
    if not torch.isfinite(v).all():
        raise InputError(f"v: expected finite numbers; got {int((~torch.isfinite(v)).sum())} NaN or infinite")
    return v
