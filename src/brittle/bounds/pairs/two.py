r"""The l2 constant of two layers around an activation: ``N_2(B, C) = max_D ||B D C||_2``.

D is diagonal with entries in the activation's slopes [alpha, gamma]; the maximum is at a vertex ``{alpha, gamma}^h``
(theory page, section "Alignment between consecutive layers"). B is ``(m, h)`` and C ``(h, n)``: two weights W2, W1, or
what :func:`factors` makes of them, for the alignments ``A_2^(s,t)`` of Barsbey et al. 2025, Theorem 3.2. Computation
is in float64 on the CPU. Every function says whether it is exact, an upper or a lower bound; the numbers are in units
of B times C.
"""

from __future__ import annotations

import functools
import heapq
import math

import numpy as np
import torch
from torch import Tensor

from brittle.bounds.pairs.multipliers import Slopes, adjoint_times, closed_form, directions, eliminate, improve
from brittle.errors import InputError
from brittle.linear.spectrum import ROUNDING, largest_singular_value, ritz

RELU: Slopes = (0.0, 1.0)
SMALL = 512
"""Largest size at which the bounds that rarely win are computed too."""

WIDE = 500
"""Size from which the lower bound's search is content with a gain below 1e-4."""

ENUMERATED = 14
"""Most inner units for which all ``2^h`` patterns are tried."""

SUPPORT = 1e-12
"""Singular values above this share of the largest are kept by :func:`factors`."""


def half_bound(B: Tensor, C: Tensor, slopes: Slopes = RELU) -> float:
    r"""Upper bound ``|(alpha+gamma)/2| ||B C|| + (gamma-alpha)/2 ||B|| ||C||``.

    For slopes [0, 1] this is half of ``||BC|| + ||B|| ||C||``. Never above
    ``max(|alpha|, |gamma|) ||B|| ||C||``, up to rounding.

    Args:
        B: ``(m, h)``.
        C: ``(h, n)``.
        slopes: ``(alpha, gamma)``.

    Raises:
        InputError: Shapes that do not fit, entries that are not finite, or alpha above gamma.
    """
    B, C, scale = _prepared(B, C, slopes)
    return scale * _half(B, C, slopes)


def entry_bound(B: Tensor, C: Tensor) -> float:
    """Upper bound ``|| (|BC| + |B||C|) / 2 ||`` for slopes [0, 1]; exact for a pair of rank one.

    Good only where the spectrum decays; it may exceed the product of the norms. It depends on the basis: see
    :func:`uppers` for the second basis that is tried.

    Args:
        B: ``(m, h)``.
        C: ``(h, n)``.

    Raises:
        InputError: As for :func:`half_bound`.
    """
    B, C, scale = _prepared(B, C, RELU)
    return scale * _raised((B @ C).abs() + B.abs() @ C.abs()) / 2


def scaled_half_bound(B: Tensor, C: Tensor, w: Tensor, slopes: Slopes = RELU) -> float:
    r"""Upper bound: :func:`half_bound` with ``||B w^(-1/2)|| ||w^(1/2) C||`` in place of ``||B|| ||C||``.

    Args:
        B: ``(m, h)``.
        C: ``(h, n)``.
        w: Weights of the inner units ``(h,)``, positive.
        slopes: ``(alpha, gamma)``.

    Raises:
        InputError: As for :func:`half_bound`, or ``w`` not positive.
    """
    B, C, scale = _prepared(B, C, slopes)
    return scale * _scaled_half(B, C, _positive(w, "w", B.shape[1]), slopes)


def multiplier_bound(B: Tensor, C: Tensor, t: Tensor, slopes: Slopes = RELU) -> float:
    r"""Upper bound ``lambda_max(C^T R C)^(1/2)`` with R from :func:`brittle.bounds.pairs.multipliers.eliminate`.

    For slopes [0, 1], ``R = T M^-1 T`` with ``M = 2T - B^T B``. With the best t it is the tightest of the bounds.

    Args:
        B: ``(m, h)``.
        C: ``(h, n)``.
        t: Multipliers ``(h,)``, positive, in units of B squared.
        slopes: ``(alpha, gamma)``.

    Returns:
        The bound; inf where M is not positive definite, since then there is none for this t.

    Raises:
        InputError: As for :func:`half_bound`, or ``t`` not positive.
    """
    scaled, C, scale = _prepared(B, C, slopes)
    t = _positive(t, "t", B.shape[1])
    largest = float(B.detach().abs().max())
    return scale * _multiplier(_gram(scaled), C, t / largest / largest, slopes) if scale else 0.0


def upper(B: Tensor, C: Tensor, *, slopes: Slopes = RELU, steps: int = 0) -> float:
    """Upper bound of ``N_2(B, C)``: the least of :func:`uppers`.

    Args:
        B: ``(m, h)``.
        C: ``(h, n)``.
        slopes: ``(alpha, gamma)``.
        steps: Steps in which the multipliers are optimised; 0 takes the closed form.

    Raises:
        InputError: As for :func:`half_bound`.
    """
    return min(uppers(B, C, slopes=slopes, steps=steps).values())


def uppers(B: Tensor, C: Tensor, *, slopes: Slopes = RELU, steps: int = 0) -> dict[str, float]:
    """Every upper bound of ``N_2(B, C)`` that is worth its time, by name.

    "half"; "multipliers" in closed form; with ``steps`` "optimised multipliers"; where no side exceeds 512 also
    "scaled half" and, for slopes [0, 1], "entry" (the lesser of B and C as they are and in their singular vectors).

    Args:
        B: ``(m, h)``.
        C: ``(h, n)``.
        slopes: ``(alpha, gamma)``.
        steps: Steps in which the multipliers are optimised.

    Returns:
        Upper bounds, each finite or inf.

    Raises:
        InputError: As for :func:`half_bound`.
    """
    B, C, scale = _prepared(B, C, slopes)
    B, C = _without_dead_units(B, C)
    if not B.shape[1]:
        return {"half": 0.0}
    bounds = {}
    if max(*B.shape, *C.shape) <= SMALL:
        if slopes == RELU:
            bounds["entry"] = min(entry_bound(B, C), entry_bound(*_singular_bases(B, C)))
        w = directions(torch.linalg.vector_norm(B, dim=0), torch.linalg.vector_norm(C, dim=1))[0]
        bounds["scaled half"] = _scaled_half(B, C, w, slopes)
    B, C = _without_tall_sides(B, C)
    bounds["half"] = _half(B, C, slopes)
    P = _gram(B)
    t = closed_form(P, C, slopes)
    bounds["multipliers"] = _multiplier(P, C, t, slopes)
    if steps:
        bounds["optimised multipliers"] = _multiplier(P, C, improve(P, C, t, steps, slopes), slopes)
    return {name: scale * bound for name, bound in bounds.items()}


def exact(B: Tensor, C: Tensor, *, slopes: Slopes = RELU, most_nodes: int = 50_000) -> float | None:
    """Exact ``N_2(B, C)``: all patterns for up to 14 inner units, else :func:`branch_and_bound`.

    Args:
        B: ``(m, h)``.
        C: ``(h, n)``.
        slopes: ``(alpha, gamma)``.
        most_nodes: Nodes after which branch and bound gives up; about ``2^(0.75 h)`` are needed.

    Returns:
        The maximum up to a relative 1e-9, or None where it was not reached.

    Raises:
        InputError: As for :func:`half_bound`.
    """
    B, C, scale = _prepared(B, C, slopes)
    B, C = _without_tall_sides(*_without_dead_units(B, C))
    h = B.shape[1]
    if not h:
        return 0.0
    if h > ENUMERATED:
        found = branch_and_bound(B, C, slopes=slopes, most_nodes=most_nodes)
        return None if found is None else scale * found
    levels = torch.tensor(slopes, dtype=torch.float64)
    patterns = torch.arange(2**h)[:, None] >> torch.arange(h) & 1
    return scale * max(float(_norm((B * levels[part][:, None]) @ C).max()) for part in patterns.split(2048))


def branch_and_bound(B: Tensor, C: Tensor, *, slopes: Slopes = RELU, most_nodes: int = 50_000) -> float | None:
    r"""Exact ``N_2(B, C)`` by deciding the inner units one by one, those of largest ``||b_h|| ||c_h||`` first.

    A node's bound is ``||B D C|| + (gamma-alpha)/2 rho``, where free units have the middle slope in D and rho is the
    least ``||B_f w^(-1/2)|| ||w^(1/2) C_f||`` over a few w. Nodes are visited in the order of their bounds.

    Args:
        B: ``(m, h)``.
        C: ``(h, n)``.
        slopes: ``(alpha, gamma)``.
        most_nodes: Nodes after which to give up.

    Returns:
        The maximum up to a relative 1e-9, or None where ``most_nodes`` was used up.

    Raises:
        InputError: As for :func:`half_bound`.
    """
    B, C, scale = _prepared(B, C, slopes)
    order = (torch.linalg.vector_norm(B, dim=0) * torch.linalg.vector_norm(C, dim=1)).argsort(descending=True)
    B, C = B[:, order], C[order]
    h = len(order)
    radius = (slopes[1] - slopes[0]) / 2
    rest = [radius * _least_scaled_product(B[:, k:], C[k:]) for k in range(h)] + [0.0]
    levels = torch.tensor([*slopes, sum(slopes) / 2], dtype=torch.float64)  # the third is a free unit's
    best = lower(B, C, slopes=slopes)
    heap = [(-math.inf, b"")]
    nodes = 0
    while heap and -heap[0][0] > best * (1 + 1e-9):
        if nodes >= most_nodes:
            return None
        popped = [heapq.heappop(heap)[1] for _ in range(min(64, len(heap)))]
        children = [prefix + unit for prefix in popped for unit in (b"\0", b"\1")]
        codes = np.frombuffer(b"".join(child.ljust(h, b"\2") for child in children), dtype=np.uint8).reshape(-1, h)
        values = _norm((B * levels[torch.from_numpy(codes.astype(np.int64))][:, None]) @ C).tolist()
        nodes += len(children)
        for child, value in zip(children, values, strict=True):
            if len(child) == h:
                best = max(best, value)
            elif value + rest[len(child)] > best * (1 + 1e-9):
                heapq.heappush(heap, (-(value + rest[len(child)]), child))
    return scale * best


def lower(B: Tensor, C: Tensor, *, slopes: Slopes = RELU, starts: int = 4, seed: int = 0) -> float:
    """Lower bound of ``N_2(B, C)`` by alternating maximisation over the pattern and its top singular pair.

    Lower for the maximum over all patterns, some of which no input may reach: no lower bound of a network's constant.

    Args:
        B: ``(m, h)``.
        C: ``(h, n)``.
        slopes: ``(alpha, gamma)``.
        starts: Patterns to start from: gamma everywhere, then random ones.
        seed: Of the random patterns.

    Returns:
        ``||B D C x||`` of a unit vector x and a pattern D.

    Raises:
        InputError: As for :func:`half_bound`.
    """
    B, C, scale = _prepared(B, C, slopes)
    B, C = _without_tall_sides(*_without_dead_units(B, C))
    h = B.shape[1]
    if not h:
        return 0.0
    generator = torch.Generator().manual_seed(seed)
    levels = torch.tensor(slopes, dtype=torch.float64)
    patterns = [torch.ones(h, dtype=torch.int64)]
    patterns += [torch.randint(2, (h,), generator=generator) for _ in range(starts - 1)]
    block = torch.randn(C.shape[1], min(C.shape[1], 4), generator=generator, dtype=torch.float64)
    return scale * max(_climb(B, C, levels[pattern], block, slopes) for pattern in patterns)


def factors(W2: Tensor, W1: Tensor, s: float, t: float) -> tuple[Tensor, Tensor]:
    r"""The pair whose constant is the alignment ``A_2^(s,t) = N_2(Sigma2^t V2^T, U1 Sigma1^s)``, Sigma over sigma_1.

    A power 0 is the identity on the singular values above ``1e-12 sigma_1``; a power 1 gives the matrix itself over
    sigma_1, which has the same constant and needs no singular vectors.

    Args:
        W2: Weight after the activation, ``(m, h)``, not zero.
        W1: Weight before it, ``(h, n)``, not zero.
        s: W1's power: 0, 1/2 or 1; s = t = 1/2 is the alignment of Barsbey et al. 2025, Theorem 3.2.
        t: W2's power.

    Returns:
        ``(B, C)`` of spectral norm 1, ``(., h)`` and ``(h, .)``.

    Raises:
        InputError: As for :func:`half_bound`, another power, or a zero matrix (its alignment is 1 by convention).
    """
    W2, W1, _ = _prepared(W2, W1, RELU)
    for name, W, power in (("W2", W2, t), ("W1", W1, s)):
        if not W.any():
            raise InputError(f"{name}: expected a matrix that is not zero; got zeros of shape {tuple(W.shape)}")
        if power not in (0, 0.5, 1):
            raise InputError(f"{'t' if name == 'W2' else 's'}: expected 0, 0.5 or 1; got {power}")
    return _left_power(W2.mT, t).mT, _left_power(W1, s)


def compressed(W2: Tensor, W1: Tensor, k2: int, k1: int) -> tuple[float, float]:
    r"""Upper bounds of the alignment ``A_2^(1/2,1/2)`` from the k largest singular values, and what was cut.

    ``A_kk`` is :func:`upper` of the kept parts, ``a = (sigma_{k1+1} / sigma_1)^(1/2)`` of W1, b likewise of W2. The
    first bound is ``min{1, A_kk + R_2}`` with ``R_2 = a + b + ab`` (the corrected remainder of Barsbey et al. 2025,
    Theorem 3.2), the second the sharper ``min{1, || [[A_kk, a], [b, ab]] ||}``.

    Args:
        W2: Weight after the activation, ``(m, h)``.
        W1: Weight before it, ``(h, n)``.
        k2: Singular values of W2 kept, from 0 to ``min(m, h)``.
        k1: Singular values of W1 kept, from 0 to ``min(h, n)``.

    Returns:
        ``(with the remainder, of the block form)``, both in [0, 1]; 1 where a weight is zero.

    Raises:
        InputError: As for :func:`half_bound`, or ``k2`` or ``k1`` out of range.
    """
    W2, W1, _ = _prepared(W2, W1, RELU)
    for name, k, W in (("k2", k2, W2), ("k1", k1, W1)):
        if not 0 <= k <= min(W.shape):
            raise InputError(f"{name}: expected an integer from 0 to {min(W.shape)}; got {k}")
    if not (W2.any() and W1.any()):
        return 1.0, 1.0
    (V2, b), (U1, a) = _head(W2.mT, k2), _head(W1, k1)
    kept = min(1.0, upper(V2.mT, U1)) if k1 and k2 else 0.0
    blocks = torch.tensor([[kept, a], [b, a * b]], dtype=torch.float64)
    return min(1.0, kept + a + b + a * b), min(1.0, _raised(blocks))


# --- one bound each, of prepared matrices -------------------------------------------------------------------


def _half(B: Tensor, C: Tensor, slopes: Slopes) -> float:
    return _around_middle(B, C, _raised(B) * _raised(C), slopes)


def _scaled_half(B: Tensor, C: Tensor, w: Tensor, slopes: Slopes) -> float:
    return _around_middle(B, C, _raised(B * w.rsqrt()) * _raised(w.sqrt()[:, None] * C), slopes)


def _around_middle(B: Tensor, C: Tensor, product: float, slopes: Slopes) -> float:
    """The middle slope everywhere, and ``product`` for what D may deviate from it."""
    middle, radius = abs(sum(slopes)) / 2, (slopes[1] - slopes[0]) / 2
    return (middle * _raised(B @ C) if middle else 0.0) + radius * product


def _multiplier(P: Tensor, C: Tensor, t: Tensor, slopes: Slopes) -> float:
    R = eliminate(P, t, slopes)
    if R is None:
        return math.inf
    alpha, gamma = slopes
    form = C.mT @ (R @ C)
    if not bool(torch.isfinite(form).all()):
        return math.inf
    top = float(torch.linalg.eigvalsh((form + form.mT) / 2)[-1].clamp_min(0))
    subtracted = max(0.0, 2 * alpha * gamma) * float((t.sqrt()[:, None] * C).square().sum())
    return math.sqrt(top + ROUNDING * max(C.shape) * (top + subtracted))


def _least_scaled_product(B: Tensor, C: Tensor) -> float:
    """The least ``||B w^(-1/2)|| ||w^(1/2) C||`` over the directions w, among them 1."""
    weights = directions(torch.linalg.vector_norm(B, dim=0), torch.linalg.vector_norm(C, dim=1))
    return min(_raised(B * w.rsqrt()) * _raised(w.sqrt()[:, None] * C) for w in weights)


def _climb(B: Tensor, C: Tensor, d: Tensor, X: Tensor, slopes: Slopes) -> float:
    """Alternate the top singular vector of BDC and the pattern that is best for it, until nothing rises."""
    alpha, gamma = slopes
    gain, rounds = (1e-4, 3) if max(*B.shape, *C.shape) >= WIDE else (1e-10, 6)
    best = 0.0
    for _ in range(100):
        X = ritz(functools.partial(_squared, B, C, d), X, rounds)[1]
        u = C @ (X[:, 0] / X[:, 0].norm())
        y = B @ (d * u)
        value = float(y.norm())
        done = value <= best * (1 + gain)
        best = max(best, value)
        if done:
            break
        d = torch.where((B.mT @ y) * u > 0, gamma, alpha).double()
    return best


def _squared(B: Tensor, C: Tensor, d: Tensor, X: Tensor) -> Tensor:
    """``(B D C)^T (B D C) X``."""
    d = d[:, None]
    return adjoint_times(C, d * adjoint_times(B, B @ (d * (C @ X))))


# --- norms and shapes ---------------------------------------------------------------------------------------


def _gram(B: Tensor) -> Tensor:
    return B.mT @ B


def _norm(A: Tensor) -> Tensor:
    return largest_singular_value(A)[0]


def _raised(A: Tensor) -> float:
    """Upper bound of one spectral norm: the computed one, raised by more than its rounding."""
    return float(largest_singular_value(A)[1])


def _prepared(B: Tensor, C: Tensor, slopes: Slopes) -> tuple[Tensor, Tensor, float]:
    """Checked, in float64, each over its largest entry; and the factor that this takes off."""
    for name, W in (("B", B), ("C", C)):
        if W.ndim != 2 or W.numel() == 0 or W.is_complex():
            raise InputError(f"{name}: expected a real matrix, not empty; got shape {tuple(W.shape)} of {W.dtype}")
        if not bool(torch.isfinite(W).all()):
            raise InputError(f"{name}: expected finite entries; got NaN or infinite ones")
    if B.shape[1] != C.shape[0]:
        raise InputError(f"C: expected as many rows as B has columns, {B.shape[1]}; got shape {tuple(C.shape)}")
    if not -math.inf < slopes[0] <= slopes[1] < math.inf:
        raise InputError(f"slopes: expected (alpha, gamma) with alpha <= gamma, both finite; got {slopes}")
    b, c = (float(W.detach().abs().max()) for W in (B, C))
    B, C = (W.detach().double().cpu().contiguous() for W in (B, C))
    return B / (b or 1), C / (c or 1), b * c


def _positive(w: Tensor, name: str, h: int) -> Tensor:
    w = w.detach().double().cpu()
    if w.shape != (h,) or not bool((torch.isfinite(w) & (w > 0)).all()):
        raise InputError(
            f"{name}: expected {h} positive, finite numbers; got {w.tolist()[:8]} of shape {tuple(w.shape)}"
        )
    return w


def _without_dead_units(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Inner units with a zero column in B or a zero row in C contribute nothing."""
    alive = B.any(0) & C.any(1)
    return (B, C) if bool(alive.all()) else (B[:, alive], C[alive])


def _without_tall_sides(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """The triangular factor of a side that exceeds the inner width has the same products' norms, and is small."""
    m, h = B.shape
    B = torch.linalg.qr(B, mode="r").R.contiguous() if m > h else B
    return B, torch.linalg.qr(C.mT, mode="r").R.mT.contiguous() if C.shape[1] > h else C


def _singular_bases(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """``U_B^T B`` and ``C V_C``: the same pair in the bases of their outer singular vectors."""
    return torch.linalg.svd(B, full_matrices=False).U.mT @ B, C @ torch.linalg.svd(C, full_matrices=False).Vh.mT


def _left_power(W: Tensor, power: float) -> Tensor:
    """``U Sigma^power`` of W, Sigma over sigma_1, on the retained support."""
    if power == 1:
        return W / _norm(W)
    U, sigma, _ = torch.linalg.svd(W, full_matrices=False)
    rank = int((sigma > SUPPORT * sigma[0]).sum())
    return U[:, :rank] * (sigma[:rank] / sigma[0]) ** power


def _head(W: Tensor, k: int) -> tuple[Tensor, float]:
    """``U Sigma^(1/2)`` of the k largest singular values over sigma_1, and the root of the next one."""
    U, sigma, _ = torch.linalg.svd(W, full_matrices=False)
    roots = (sigma / sigma[0]).sqrt()
    cut = float(roots[k]) * (1 + ROUNDING * max(W.shape)) if k < len(roots) else 0.0
    return U[:, :k] * roots[:k], min(1.0, cut)
