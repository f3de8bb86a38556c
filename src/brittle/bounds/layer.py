r"""Theorem 3.1: what compressibility says about a layer's operator norm, at a fixed Frobenius norm.

With k rows (p = inf) or singular values (p = 2) kept, k-term error eps and spread beta, the norm is bounded from both
sides by a *structure factor* times the *scale* ``||W||_F``. The forms for m x n matrices, their proofs and the
correction of the printed constants are on the theory page, section "Theorem 3.1".
"""

from __future__ import annotations

import math

from torch import Tensor

from brittle.errors import InputError
from brittle.linear.compressibility import k_term_error, row_norms, singular_values, spread
from brittle.results import LayerBound


def entries_kept(share: float, d: int) -> int:
    """How many of d entries a share from 0 to 1 keeps: rounded up, at least one."""
    return max(1, math.ceil(share * d - 1e-9))  # the margin undoes the rounding of 0.07 * 100 = 7.000000000000001


def largest_entry_factors(k: int, error: float, beta: float, d: int) -> tuple[float, float]:
    r"""Lemma V2: ``L ||x||_2 <= max |x_i| <= U ||x||_2`` for a vector of d entries.

    ``U = [1 + (k-1)(1-beta)^2 + t_U]^(-1/2)`` with ``t_U = (error S / (1-error))^2 / (d-k)``,
    ``S = k - (k-1) beta``; ``L = [(k-1) + (1-beta)^2 + t_L]^(-1/2)`` with
    ``t_L = min{(1-beta)(k-beta) error / (1-error), (1-beta)^2 (d-k)}``.

    Args:
        k: Entries kept, from 1 to d.
        error: k-term error with q = 1.
        beta: Spread at k.
        d: Length of the vector.

    Returns:
        ``(L, U)``, a lower and an upper factor in [0, 1].
    """
    S = k - (k - 1) * beta
    tail_low = (error * S / (1 - error)) ** 2 / (d - k) if k < d else 0.0
    tail_high = min((1 - beta) * (k - beta) * error / (1 - error), (1 - beta) ** 2 * (d - k))
    upper = (1 + (k - 1) * (1 - beta) ** 2 + tail_low) ** -0.5
    lower = ((k - 1) + (1 - beta) ** 2 + tail_high) ** -0.5
    return min(lower, 1.0), upper


def row_ratio_upper(k: int, error: float, n: int) -> float:
    """Lemma Row, upper: ``||w||_1 / ||w||_2 <= sqrt(k (1-error^2)) + sqrt(n-k) error``; sqrt n for k = 0."""
    return math.sqrt(k * (1 - error**2)) + math.sqrt(n - k) * error if k else math.sqrt(n)


def row_ratio_lower(k: int, error: float) -> float:
    """Lemma Row, lower: ``||w||_1 / ||w||_2 >= sqrt(1-error^2) + error^2 sqrt(k / (1-error^2))``, at least 1."""
    return math.sqrt(1 - error**2) + error**2 * math.sqrt(k / (1 - error**2)) if k else 1.0


def layer_bound(W: Tensor, p: float, k: int, *, k_row: int | None = None, groups: int = 1) -> LayerBound:
    """Theorem 3.1 for one matrix, in all its forms.

    ``scale * lower <= ||W||_p <= scale * sharp <= scale * linear <= scale * paper``.

    Args:
        W: Matrix ``(m, n)``; for a convolution its filter matrix (the bound is then one on the filter matrix's
            norm, which for p = inf is never below the operator norm).
        p: inf (row compressibility, l_inf norm) or 2 (spectral compressibility, spectral norm).
        k: Rows or singular values kept; at 0 the paper's form is infinite and the others are the trivial ones.
        k_row: Entries kept within each row (p = inf); the same share of the columns as k of the rows by default.
        groups: Groups of a convolution's filters (p = 2): the spectrum is the union of the groups' spectra.

    Returns:
        Structure factors (lower, sharp, linear, paper), scale and exact norm, kept apart.

    Raises:
        InputError: ``p``, ``k`` or ``k_row`` out of range, or ``W`` not a finite matrix.
    """
    if W.ndim != 2:
        raise InputError(f"W: expected a matrix; got shape {tuple(W.shape)}")
    if W.numel() == 0 or W.is_complex():
        raise InputError(f"W: expected real entries, none empty; got shape {tuple(W.shape)} of {W.dtype}")
    W = W.detach().double()
    if p == 2:
        return spectral_bound(singular_values(W, groups), k)
    if p != math.inf:
        raise InputError(f"p: expected 2 or inf; got {p}")
    m, n = W.shape
    if not 0 <= k <= m:
        raise InputError(f"k: expected an integer from 0 to {m}; got {k}")
    k_row = -(-n * k // m) if k_row is None else k_row
    return row_bound(row_norms(W), k_term_error(W, k_row, q=2), k, k_row, n=n, scale=float(W.norm()))


def spectral_bound(sigma: Tensor, k: int) -> LayerBound:
    """Theorem 3.1 (b) from singular values ``(p,)``, largest first, in float64."""
    d = len(sigma)
    error, beta = float(k_term_error(sigma, k)), float(spread(sigma, k)) if k else 0.0
    norm, scale = float(sigma[0]), float(sigma.norm())
    if not norm:
        return _zero_bound(2.0, k, None)
    if not k:
        return LayerBound(2.0, 0, error, 0.0, None, None, scale, norm, d**-0.5, 1.0, 1.0, math.inf)
    lower, sharp = largest_entry_factors(k, error, beta, d)
    S = k - (k - 1) * beta
    linear = (1 - error) / S / math.sqrt((1 - error) ** 2 / k + (error**2 / (d - k) if k < d else 0))
    paper = _paper((1 - error) * math.sqrt(d) / k, beta)
    return LayerBound(2.0, k, error, beta, None, None, scale, norm, lower, sharp, linear, paper)


def row_bound(nu: Tensor, row_errors: Tensor, k: int, k_row: int, *, n: int, scale: float) -> LayerBound:
    """Theorem 3.1 (a) from row l1 norms ``(m,)`` and within-row errors at ``k_row`` ``(m,)``, in float64.

    Args:
        nu: Row l1 norms, in the rows' order.
        row_errors: k-term errors (q = 2) of the rows with ``k_row`` entries kept, in the same order.
        k: Rows kept.
        k_row: Entries kept within each row.
        n: Columns.
        scale: The Frobenius norm.
    """
    m = len(nu)
    error, beta = float(k_term_error(nu, k)), float(spread(nu, k)) if k else 0.0
    row_errors = row_errors[nu > 0]
    norm = float(nu.max())
    if not norm:
        return _zero_bound(math.inf, k, k_row)
    row_error, row_error_min = float(row_errors.max()), float(row_errors.min())
    flat = row_ratio_upper(k_row, row_error, n)
    if not k:
        factors = (m**-0.5, flat, flat, math.inf)
        return LayerBound(math.inf, 0, error, 0.0, k_row, row_error, scale, norm, *factors)
    low, high = largest_entry_factors(k, error, beta, m)
    lower = row_ratio_lower(k_row, row_error_min) * low
    linear = (1 - error) / (k - (k - 1) * beta) * math.sqrt(m) * flat
    paper = _paper((1 - error) * (math.sqrt(m * k_row) + math.sqrt(m * n) * row_error) / k, beta)
    if not k_row:
        paper = max(paper, linear)
    return LayerBound(math.inf, k, error, beta, k_row, row_error, scale, norm, lower, flat * high, linear, paper)


def _paper(numerator: float, beta: float) -> float:
    return numerator / (1 - beta) if beta < 1 else math.inf


def _zero_bound(p: float, k: int, k_row: int | None) -> LayerBound:
    row_error = None if k_row is None else 0.0
    return LayerBound(p, k, 0.0, 0.0, k_row, row_error, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
