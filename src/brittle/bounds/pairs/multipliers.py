r"""Diagonal multipliers: what a layer of slope-bounded activations can do to a quadratic form.

One step of LipSDP with diagonal multipliers and no SDP solver (theory page, section "Multipliers"). With ``v = D u``,
D diagonal with entries in [alpha, gamma], every multiplier ``t_h > 0`` gives ``t_h (v_h - alpha u_h)(gamma u_h - v_h)
>= 0``. Adding these to ``v^H P v`` and maximising over v leaves a quadratic form in u alone. All functions take
batches: P is ``(..., h, h)``, C is ``(..., h, n)``, real or complex in double precision, and one multiplier vector
``t`` ``(h,)`` serves the whole batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from brittle.linear.spectrum import ritz

SHIFT = 1e-9
"""Taken off the scaled matrix before it is factored; see :func:`eliminate`."""

LEAST_WEIGHT = 1e-6
"""Smallest norm or weight of a unit, as a share of the largest."""

MULTIPLES = (0.52, 0.56, 0.62, 0.75, 0.87, 1.0)
"""Multiples of the smallest t that dominates P (t is feasible above one half), tried by :func:`closed_form`."""

Slopes = tuple[float, float]


def eliminate(P: Tensor, t: Tensor, slopes: Slopes = (0.0, 1.0)) -> Tensor | None:
    r"""Loewner upper bound: ``v^H P v <= u^H R u`` whenever ``v = D u``, D diagonal with entries in the slopes.

    ``R = (alpha + gamma)^2 T M^-1 T - 2 alpha gamma T`` with ``T = diag(t)`` and ``M = 2T - P``. The factor is that of
    ``(2 - 1e-9) I - S``, ``S = T^(-1/2) P T^(-1/2)``, in place of ``2I - S``: since its inverse lies above that of
    ``2I - S`` by at least ``1e-9 / 4``, far more than the rounding in P, S and the factorisation, R stays an upper
    bound in floating point. The rounding of the inverse's own entries is covered by ``eps h trace`` on its diagonal.

    Args:
        P: ``(..., h, h)``, Hermitian, positive semidefinite.
        t: Multipliers ``(h,)``, positive.
        slopes: ``(alpha, gamma)``, the smallest and the largest entry of D.

    Returns:
        R, ``(..., h, h)``, an upper bound; None if M is not positive definite at every entry of the batch (t is too
        small: never repaired).
    """
    L = factor(P, t)
    if L is None:
        return None
    alpha, gamma = slopes
    R = torch.cholesky_inverse(L)
    trace = R.diagonal(dim1=-2, dim2=-1).real.sum(-1, keepdim=True)
    R.diagonal(dim1=-2, dim2=-1).add_(torch.finfo(t.dtype).eps * len(t) * trace)
    R.mul_((alpha + gamma) ** 2)
    R.diagonal(dim1=-2, dim2=-1).sub_(2 * alpha * gamma)
    root = t.sqrt()
    return R.mul_(root[:, None]).mul_(root)


def directions(b: Tensor, c: Tensor) -> list[Tensor]:
    """Directions in which multipliers are worth trying: ``b/c`` (best in nearly all tests), its root, 1, ``b^2``, b.

    Args:
        b: Inner norms of the units ``(h,)``: the roots of P's diagonal.
        c: Outer norms of the units ``(h,)``: the row norms of C.

    Returns:
        Five vectors ``(h,)`` with largest entry 1 and none below 1e-6; the default first.
    """
    b, c = (raise_to_floor(norms) for norms in (b, c))
    return [raise_to_floor(w) for w in (b / c, (b / c).sqrt(), torch.ones_like(b), b.square(), b)]


def closed_form(P: Tensor, C: Tensor, slopes: Slopes = (0.0, 1.0)) -> Tensor:
    """Multipliers without optimisation that make ``lambda_max(C^H R C)`` small, R from :func:`eliminate`.

    Multiples of the :func:`directions`: first every direction at one multiple, then every multiple of the best one,
    judged by an estimate. The result is no bound: the caller passes it to :func:`eliminate`.

    Args:
        P: ``(..., h, h)``, Hermitian, positive semidefinite, not zero.
        C: What stands before the activation, ``(..., h, n)``, of P's dtype.
        slopes: Of the activation.

    Returns:
        Multipliers ``(h,)``, real; feasible up to rounding.
    """
    b = P.diagonal(dim1=-2, dim2=-1).real.clamp_min(0).reshape(-1, P.shape[-1]).mean(0).sqrt()
    c = C.abs().square().sum(-1).reshape(-1, C.shape[-2]).mean(0).sqrt()
    tops = [w * _scale(P, w) for w in directions(b, c)]
    X = _start(C, 4)
    best, best_value = None, math.inf
    for top in tops:
        value, X = _estimate(P, C, 0.75 * top, slopes, X)
        if value < best_value:
            best, best_value = top, value
    if best is None:  # the estimates of the scales were too low; the largest row sum is never
        return P.abs().sum(-1).amax().real.expand(len(b)).clone()
    t = 0.75 * best
    for multiple in MULTIPLES:
        if multiple != 0.75:
            value, X = _estimate(P, C, multiple * best, slopes, X)
            if value < best_value:
                t, best_value = multiple * best, value
    return t


def improve(P: Tensor, C: Tensor, t: Tensor, steps: int, slopes: Slopes = (0.0, 1.0), rate: float = 0.1) -> Tensor:
    r"""Multipliers optimised by Adam on ``log t``, from a feasible ``t``, for ``lambda_max(C^H R C)``.

    By the envelope theorem the gradient of ``rho = max ||x|| = 1 of u^H R u``, ``u = C x``, is
    ``d rho / d t_h = 2 Re conj(v_h - alpha u_h) (gamma u_h - v_h)`` at the maximiser ``v = (alpha+gamma) M^-1 T u``.
    It is averaged over the top eigenvectors, weighted by a softmax of their eigenvalues, because at the optimum
    several eigenvalues meet. Where t becomes infeasible, the step is taken back and ``log t`` raised by 0.02.

    Args:
        P: ``(..., h, h)``, Hermitian, positive semidefinite.
        C: ``(..., h, n)``, of P's dtype.
        t: Multipliers to start from, ``(h,)``.
        steps: Steps of Adam.
        slopes: Of the activation.
        rate: Adam's step size at the start; it falls to zero along a half cosine.

    Returns:
        The multipliers of the smallest estimate, ``(h,)``: no bound, as for :func:`closed_form`.
    """
    point, best, best_value = t.log(), t, math.inf
    adam = torch.optim.Adam([point], betas=(0.9, 0.99), eps=1e-12)
    X, feasible = _start(C, 12), point.clone()
    for step in range(steps):
        L = factor(P, point.exp())
        if L is None:
            point.copy_(feasible.add_(0.02))
            continue
        values, X = _top(L, C, point.exp(), slopes, X, rounds=2 if step else 12)
        value = float(values.max())
        if not 0 < value < math.inf:
            break
        if value < best_value:
            best, best_value = point.exp(), value
        weights = torch.softmax((values / value - 1).flatten() * (100 + 1000 * step / steps), 0)
        U, V = _answer(L, C, (point / 2).exp()[:, None], slopes, X)
        slope = 2 * ((V - slopes[0] * U).conj() * (slopes[1] * U - V)).real
        gradient = (slope.movedim(-2, 0).flatten(1) * weights).sum(1) / value
        feasible.copy_(point)
        point.grad = gradient
        adam.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        adam.step()
    return best


def adjoint_times(A: Tensor, X: Tensor) -> Tensor:
    """``A^H X``; for few columns in X several times faster than that product as it is written."""
    return (X.mH @ A).mH


def factor(P: Tensor, t: Tensor) -> Tensor | None:
    """Cholesky factor of ``(2 - SHIFT) I - T^(-1/2) P T^(-1/2)``; None unless it is positive definite everywhere."""
    if not bool((t > 0).all()):
        return None
    root = t.rsqrt()
    M = (P * -root).mul_(root[:, None])
    M.diagonal(dim1=-2, dim2=-1).add_(2 - SHIFT)
    L, info = torch.linalg.cholesky_ex(M)
    return None if bool(info.any()) else L


def _estimate(P: Tensor, C: Tensor, t: Tensor, slopes: Slopes, X: Tensor) -> tuple[float, Tensor]:
    """Estimate (from below) of ``lambda_max(C^H R C)`` over the batch, and top vectors; inf if infeasible."""
    L = factor(P, t)
    if L is None:
        return math.inf, X
    values, X = _top(L, C, t, slopes, X, rounds=4)
    return float(values.max()), X


def _top(L: Tensor, C: Tensor, t: Tensor, slopes: Slopes, X: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Estimates of the top eigenvalues ``(..., q)`` and vectors ``(..., n, q)`` of ``C^H R C``."""
    alpha, gamma = slopes
    root = t.sqrt()[:, None]

    def apply(X: Tensor) -> Tensor:
        U, V = _answer(L, C, root, slopes, X)
        return adjoint_times(C, root * ((alpha + gamma) * V - 2 * alpha * gamma * U))

    return ritz(apply, X, rounds)


def _answer(L: Tensor, C: Tensor, root: Tensor, slopes: Slopes, X: Tensor) -> tuple[Tensor, Tensor]:
    """``T^(1/2) u`` for ``u = C x``, and ``T^(1/2) v`` for the v that maximises the form in u."""
    U = root * (C @ X)
    half = torch.linalg.solve_triangular(L, U, upper=False)  # twice this is several times faster than cholesky_solve
    return U, sum(slopes) * torch.linalg.solve_triangular(L.mH, half, upper=True)


def _scale(P: Tensor, w: Tensor) -> Tensor:
    """Estimate of the smallest s with ``s diag(w) >= P``: a Ritz value and one per cent."""
    root = w.rsqrt()[:, None]
    values, _ = ritz(lambda X: root * (P @ (root * X)), _start(P, 4), rounds=6)
    return 1.01 * values.max()


def _start(C: Tensor, p: int) -> Tensor:
    """A random block ``(..., n, p)`` for C ``(..., h, n)``, always the same."""
    generator = torch.Generator().manual_seed(0)
    n = C.shape[-1]
    block = torch.randn(n, min(n, p), generator=generator, dtype=torch.float64).to(C.dtype)
    return block.expand(*C.shape[:-2], *block.shape)


def raise_to_floor(w: Tensor, least: float = LEAST_WEIGHT) -> Tensor:
    """Non-negative numbers over their largest, none below ``least``; ones if all are zero."""
    largest = w.max()
    return (w / largest).clamp_min(least) if largest > 0 else torch.ones_like(w)
