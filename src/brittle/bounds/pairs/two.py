r"""Two matrices around an activation in the l2 norm: ``N_2(B, C) = max_D ||B D C||_2``.

The maximum is at a vertex ``D in {alpha, gamma}^h``. B and C are two weights W2, W1, or what :func:`factors` makes of
them, for the alignments ``A_2^(s,t)`` of Barsbey et al. 2025, Theorem 3.2. Computation is in float64 on the CPU.
Formulas and proofs: theory page, section "Alignment between consecutive layers".
"""

from __future__ import annotations

import heapq
import math

import numpy as np
import torch
from torch import Tensor

from brittle.bounds.pairs.matrices import RELU, SEARCH_TOLERANCE, Pair, pair_of
from brittle.bounds.pairs.multipliers import Slopes, adjoint_times, closed_form, directions, eliminate, improve
from brittle.errors import InputError
from brittle.linear.spectrum import ROUNDING, largest_singular_value, raised, ritz

RARE_BOUNDS_UP_TO = 512
"""Longest side at which the bounds that are rarely the least are computed too."""

COARSE_SEARCH_FROM = 500
"""Longest side from which the search for a pattern is content with a gain below 1e-4."""

MOST_ENUMERATED = 14
"""Most units for which all ``2^h`` patterns are tried."""

SUPPORT = 1e-12
"""Singular values above this share of the largest are kept where a spectrum is raised to the power 0."""


def upper(B: Tensor, C: Tensor, *, slopes: Slopes = RELU, steps: int = 0) -> dict[str, float]:
    """Every upper bound of ``N_2(B, C)`` that is worth its time, by name; the least of them is the one to use.

    "half"; "multipliers" in closed form; with ``steps`` "optimised multipliers"; where no side exceeds 512 also
    "scaled half" and, for slopes [0, 1], "entry" (the lesser of B and C as they are and in their singular vectors).

    Args:
        B: ``(m, h)``.
        C: ``(h, n)``.
        slopes: ``(alpha, gamma)``.
        steps: Steps in which the multipliers are optimised; 0 takes the closed form.

    Returns:
        Certified upper bounds in units of B times C, each finite or inf.

    Raises:
        InputError: As for :func:`~brittle.bounds.pairs.matrices.pair_of`.
    """
    pair = pair_of(B, C, slopes).alive()
    B, C = pair.B, pair.C
    if not B.shape[1]:
        return {"half": 0.0}
    bounds = {}
    if max(*B.shape, *C.shape) <= RARE_BOUNDS_UP_TO:
        if slopes == RELU:
            U, V = torch.linalg.svd(B, full_matrices=False).U, torch.linalg.svd(C, full_matrices=False).Vh.mT
            bases = ((B, C), (U.mT @ B, C @ V))
            bounds["entry"] = min(_norm((B @ C).abs() + B.abs() @ C.abs()) / 2 for B, C in bases)
        w = directions(torch.linalg.vector_norm(B, dim=0), torch.linalg.vector_norm(C, dim=1))[0]
        bounds["scaled half"] = _half_bound(pair, _scaled_product(B, C, w))
    pair = pair.without_tall_sides()
    B, C = pair.B, pair.C
    bounds["half"] = _half_bound(pair, _norm(B) * _norm(C))
    P = B.mT @ B
    t = closed_form(P, C, slopes)
    bounds["multipliers"] = _multiplier_bound(P, C, t, slopes)
    if steps:
        bounds["optimised multipliers"] = _multiplier_bound(P, C, improve(P, C, t, steps, slopes), slopes)
    return {name: pair.scale * bound for name, bound in bounds.items()}


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
        InputError: As for :func:`~brittle.bounds.pairs.matrices.pair_of`.
    """
    pair = pair_of(B, C, slopes).alive().without_tall_sides()
    n, h = pair.C.shape[1], len(pair.C)
    if not h:
        return 0.0
    generator = torch.Generator().manual_seed(seed)
    levels = torch.tensor(slopes, dtype=torch.float64)
    patterns = [torch.ones(h, dtype=torch.int64)]
    patterns += [torch.randint(2, (h,), generator=generator) for _ in range(starts - 1)]
    block = torch.randn(n, min(n, 4), generator=generator, dtype=torch.float64)
    return pair.scale * max(_climb(pair, levels[pattern], block) for pattern in patterns)


def exact(B: Tensor, C: Tensor, *, slopes: Slopes = RELU, most_nodes: int = 50_000) -> float | None:
    """Exact ``N_2(B, C)``: all patterns for up to 14 units, else :func:`branch_and_bound`.

    Args:
        B: ``(m, h)``.
        C: ``(h, n)``.
        slopes: ``(alpha, gamma)``.
        most_nodes: Nodes after which branch and bound gives up; about ``2^(0.75 h)`` are needed.

    Returns:
        The maximum up to a relative 1e-9, or None where it was not reached.

    Raises:
        InputError: As for :func:`~brittle.bounds.pairs.matrices.pair_of`.
    """
    pair = pair_of(B, C, slopes).alive().without_tall_sides()
    B, C, h = pair.B, pair.C, len(pair.C)
    if not h:
        return 0.0
    if h > MOST_ENUMERATED:
        maximum = branch_and_bound(B, C, slopes=slopes, most_nodes=most_nodes)
        return None if maximum is None else pair.scale * maximum
    levels = torch.tensor(slopes, dtype=torch.float64)
    patterns = torch.arange(2**h)[:, None] >> torch.arange(h) & 1
    norms = [largest_singular_value((B * levels[part][:, None]) @ C)[0].max() for part in patterns.split(2048)]
    return pair.scale * float(max(norms))


def branch_and_bound(B: Tensor, C: Tensor, *, slopes: Slopes = RELU, most_nodes: int = 50_000) -> float | None:
    r"""Exact ``N_2(B, C)`` by deciding the units one by one, those of largest ``||b_h|| ||c_h||`` first.

    A node's bound is ``||B D C|| + radius rho``, where free units have the middle slope in D and rho is the least
    ``||B_f w^(-1/2)|| ||w^(1/2) C_f||`` over a few w. Nodes are visited in the order of their bounds.

    Args:
        B: ``(m, h)``.
        C: ``(h, n)``.
        slopes: ``(alpha, gamma)``.
        most_nodes: Nodes after which to give up.

    Returns:
        The maximum up to a relative 1e-9, or None where ``most_nodes`` was used up.

    Raises:
        InputError: As for :func:`~brittle.bounds.pairs.matrices.pair_of`.
    """
    pair = pair_of(B, C, slopes)
    B, C = pair.B, pair.C
    b, c = torch.linalg.vector_norm(B, dim=0), torch.linalg.vector_norm(C, dim=1)
    order = (b * c).argsort(descending=True)
    B, C, b, c, h = B[:, order], C[order], b[order], c[order], len(order)
    # What the units from k on can add to a node that has decided those before; the same for all nodes of one depth.
    undecided = [
        pair.radius * min(_scaled_product(B[:, k:], C[k:], w) for w in directions(b[k:], c[k:])) for k in range(h)
    ]
    undecided.append(0.0)
    levels = torch.tensor([*slopes, sum(slopes) / 2], dtype=torch.float64)  # the third is a free unit's
    best = lower(B, C, slopes=slopes)
    heap = [(-math.inf, b"")]
    nodes = 0
    while heap and -heap[0][0] > best * (1 + SEARCH_TOLERANCE):
        if nodes >= most_nodes:
            return None
        popped = [heapq.heappop(heap)[1] for _ in range(min(64, len(heap)))]
        children = [prefix + unit for prefix in popped for unit in (b"\0", b"\1")]
        codes = np.frombuffer(b"".join(child.ljust(h, b"\2") for child in children), dtype=np.uint8).reshape(-1, h)
        patterns = levels[torch.from_numpy(codes.astype(np.int64))]
        norms = largest_singular_value((B * patterns[:, None]) @ C)[0].tolist()
        nodes += len(children)
        for child, norm in zip(children, norms, strict=True):
            bound = norm + undecided[len(child)]
            if len(child) == h:
                best = max(best, norm)
            elif bound > best * (1 + SEARCH_TOLERANCE):
                heapq.heappush(heap, (-bound, child))
    return pair.scale * best


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
        InputError: As for :func:`~brittle.bounds.pairs.matrices.pair_of`, another power, or a zero matrix (its
            alignment is 1 by convention).
    """
    W2, W1, *_ = pair_of(W2, W1)
    for name, W, power in (("W2", W2, t), ("W1", W1, s)):
        if not W.any():
            raise InputError(f"{name}: expected a matrix that is not zero; got zeros of shape {tuple(W.shape)}")
        if power not in (0, 0.5, 1):
            raise InputError(f"{'t' if name == 'W2' else 's'}: expected 0, 0.5 or 1; got {power}")
    return _left_power(W2.mT, t).mT, _left_power(W1, s)


def upper_of_compressed(W2: Tensor, W1: Tensor, k2: int, k1: int) -> tuple[float, float]:
    r"""Upper bounds of the alignment ``A_2^(1/2,1/2)`` from the k largest singular values, and what was cut.

    ``A_kk`` is the least of :func:`upper` of the kept parts, ``a = (sigma_{k1+1} / sigma_1)^(1/2)`` of W1, b likewise
    of W2. The first bound is ``min{1, A_kk + R_2}`` with ``R_2 = a + b + ab`` (the corrected remainder of Barsbey et
    al. 2025, Theorem 3.2), the second the sharper ``min{1, || [[A_kk, a], [b, ab]] ||}``.

    Args:
        W2: Weight after the activation, ``(m, h)``.
        W1: Weight before it, ``(h, n)``.
        k2: Singular values of W2 kept, from 0 to ``min(m, h)``.
        k1: Singular values of W1 kept, from 0 to ``min(h, n)``.

    Returns:
        ``(with the remainder, of the block form)``, both in [0, 1]; 1 where a weight is zero.

    Raises:
        InputError: As for :func:`~brittle.bounds.pairs.matrices.pair_of`, or ``k2`` or ``k1`` out of range.
    """
    W2, W1, *_ = pair_of(W2, W1)
    for name, k, W in (("k2", k2, W2), ("k1", k1, W1)):
        if not 0 <= k <= min(W.shape):
            raise InputError(f"{name}: expected an integer from 0 to {min(W.shape)}; got {k}")
    if not (W2.any() and W1.any()):
        return 1.0, 1.0
    heads, cut = [], []
    for W, k in ((W2.mT, k2), (W1, k1)):  # U Sigma^(1/2) of the k largest, and the root of the next one
        U, sigma, _ = torch.linalg.svd(W, full_matrices=False)
        roots = (sigma / sigma[0]).sqrt()
        heads.append(U[:, :k] * roots[:k])
        cut.append(min(1.0, raised(float(roots[k]), max(W.shape))) if k < len(roots) else 0.0)
    b, a = cut
    kept = min(1.0, *upper(heads[0].mT, heads[1]).values()) if k1 and k2 else 0.0
    blocks = torch.tensor([[kept, a], [b, a * b]], dtype=torch.float64)
    return min(1.0, kept + a + b + a * b), min(1.0, _norm(blocks))


# --- parts of the bounds ------------------------------------------------------------------------------------


def _norm(A: Tensor) -> float:
    """Certified upper bound of one spectral norm."""
    return float(largest_singular_value(A)[1])


def _half_bound(pair: Pair, product: float) -> float:
    """The middle slope everywhere, and ``product`` for what D may deviate from it."""
    return (pair.middle * _norm(pair.B @ pair.C) if pair.middle else 0.0) + pair.radius * product


def _scaled_product(B: Tensor, C: Tensor, w: Tensor) -> float:
    """``||B w^(-1/2)|| ||w^(1/2) C||``, for which T in ``D = middle + radius T`` commutes with w."""
    return _norm(B * w.rsqrt()) * _norm(w.sqrt()[:, None] * C)


def _multiplier_bound(P: Tensor, C: Tensor, t: Tensor, slopes: Slopes) -> float:
    """``lambda_max(C^T R C)^(1/2)`` with R from :func:`eliminate`; inf where t is not feasible."""
    R = eliminate(P, t, slopes)
    if R is None:
        return math.inf
    alpha, gamma = slopes
    form = C.mT @ (R @ C)
    if not bool(torch.isfinite(form).all()):
        return math.inf
    top = float(torch.linalg.eigvalsh((form + form.mT) / 2)[-1].clamp_min(0))
    # R is a difference for slopes of one sign, and digits cancel in it: what is subtracted counts into the margin too.
    subtracted = max(0.0, 2 * alpha * gamma) * float((t.sqrt()[:, None] * C).square().sum())
    return math.sqrt(top + ROUNDING * max(C.shape) * (top + subtracted))


def _climb(pair: Pair, d: Tensor, X: Tensor) -> float:
    """Alternate the top singular vector of BDC and the pattern that is best for it, until nothing rises."""
    B, C, levels = pair.B, pair.C, torch.tensor(pair.slopes, dtype=torch.float64)
    gain, rounds = (1e-4, 3) if max(*B.shape, *C.shape) >= COARSE_SEARCH_FROM else (1e-10, 6)

    def square(X: Tensor) -> Tensor:
        """``(B D C)^T (B D C) X`` for the pattern of the moment."""
        return adjoint_times(C, d[:, None] * adjoint_times(B, B @ (d[:, None] * (C @ X))))

    best = 0.0
    for _ in range(100):
        X = ritz(square, X, rounds)[1]
        u = C @ (X[:, 0] / X[:, 0].norm())
        y = B @ (d * u)
        value = float(y.norm())
        if value <= best * (1 + gain):
            return max(best, value)
        best = value
        # y^T B D C x is a sum over units of d_h (B^T y)_h u_h: each takes the slope that serves its sign.
        d = levels[((B.mT @ y) * u > 0).long()]
    return best


def _left_power(W: Tensor, power: float) -> Tensor:
    """``U Sigma^power`` of W, Sigma over sigma_1, on the retained support."""
    if power == 1:
        return W / largest_singular_value(W)[0]
    U, sigma, _ = torch.linalg.svd(W, full_matrices=False)
    rank = int((sigma > SUPPORT * sigma[0]).sum())
    return U[:, :rank] * (sigma[:rank] / sigma[0]) ** power
