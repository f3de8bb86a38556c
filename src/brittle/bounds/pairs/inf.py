r"""Two consecutive layers in the l_inf norm: ``N_inf(W2, W1) = max_D ||W2 D W1||_inf`` over the activation patterns D.

D is diagonal with entries in ``[alpha, gamma]``, the slopes of the activation between the layers (ReLU: 0 and 1). The
alignment is ``A_inf = N_inf / (||W2||_inf ||W1||_inf)``, in [0, 1]. With ``D = mid I + half T``, T diagonal in [-1, 1],
row i of W2 = c contributes at most ``|mid| ||c W1||_1 + half max_T ||c T W1||_1``. The proofs are on the theory page,
section "Alignment between consecutive layers"; the alignment is that of Barsbey et al. 2025, Theorem 3.2.
"""

from __future__ import annotations

import heapq
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from brittle.errors import InputError
from brittle.linear.compressibility import keep_rows, row_norms
from brittle.linear.spectrum import largest_singular_value

RELU = (0.0, 1.0)
RATE = 0.05  # of the descent on the logarithms of the weights
FLOOR = 1e-4  # smallest weight of a unit or an input, relative to the largest
ENUMERATED = 17  # sign vectors up to this length are enumerated, longer ones searched
SAME = 1 + 1e-9  # a search stops within this factor of the maximum


class _Pair(NamedTuple):
    """Both matrices with largest magnitude 1 and without idle units, what they were divided by, and the slopes."""

    W2: Tensor
    W1: Tensor
    size: float
    mid: float
    half: float


def entry_bounds(W2: Tensor, W1: Tensor) -> Tensor:
    """Upper bound of every row of ``W2 D W1`` for slopes in [-1, 1], from magnitudes alone: ``|W2| |W1| 1``.

    Args:
        W2: Second matrix ``(m, h)``.
        W1: First matrix ``(h, n)``.

    Returns:
        ``(m,)``, in units of ``W2 W1``; exact for ReLU slopes when no entry of either matrix is negative.

    Raises:
        InputError: The matrices do not chain, or are empty, complex or not finite.
    """
    pair = _pair(W2, W1)
    return pair.size * _magnitudes(pair)


def half_entry_bounds(W2: Tensor, W1: Tensor) -> Tensor:
    """Upper bound of every row of ``W2 D W1`` for ReLU slopes: half of ``|W2 W1| 1 + |W2| |W1| 1``.

    Args:
        W2: Second matrix ``(m, h)``.
        W1: First matrix ``(h, n)``.

    Returns:
        ``(m,)``, in units of ``W2 W1``; never above :func:`entry_bounds`.

    Raises:
        InputError: As :func:`entry_bounds`.
    """
    pair = _pair(W2, W1)
    return pair.size * _cheap_bounds(pair)


def row_bounds(
    W2: Tensor,
    W1: Tensor,
    *,
    slopes: tuple[float, float] = RELU,
    scale: Tensor | None = None,
    refine: int = 8,
) -> Tensor:
    r"""Certified upper bound of ``max_D ||(W2 D W1)_i||_1`` for every row i; the largest bounds ``N_inf``.

    ``|mid| ||c W1||_1 + half min(|c| |W1| 1, tau sqrt(sum_h c_h^2 r_h) sqrt(sum_j q_j))`` for the row c of W2, with
    ``tau = ||diag(r)^(-1/2) W1 diag(q)^(-1/2)||_2`` for positive weights r of the units and q of the inputs; the least
    over several (r, q). Each round of refinement descends on (r, q), the first for all leading rows together and the
    next ones for the single row that leads, and then takes the new tau exactly.

    Args:
        W2: Second matrix ``(m, h)``.
        W1: First matrix ``(h, n)``.
        slopes: Least and largest slope (alpha, gamma) of the activation between them.
        scale: ``(n,)``, weights of at least 0 of W1's columns: the bound is that of ``W2 D W1 diag(scale)``.
        refine: Most rounds of refinement; 0 for none.

    Returns:
        ``(m,)`` in float64, in units of ``W2 W1``; never above ``max(|alpha|, |gamma|) |W2| |W1| scale``.

    Raises:
        InputError: The matrices do not chain, or are empty, complex or not finite; ``slopes``, ``scale`` or
            ``refine`` out of range.

    >>> row_bounds(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [-1.0]]))
    tensor([1.], dtype=torch.float64)
    """
    pair = _pair(W2, W1, slopes, scale)
    if refine < 0:
        raise InputError(f"refine: expected at least 0 rounds; got {refine}")
    return pair.size * _row_bounds(pair, refine)


def lower(
    W2: Tensor,
    W1: Tensor,
    *,
    slopes: tuple[float, float] = RELU,
    starts: int = 4,
    rows: int = 8,
    seed: int = 0,
) -> float:
    """Lower bound of ``N_inf``, and in practice a close estimate: the best pattern that alternation finds.

    For fixed input signs s the best slopes of a row c are ``gamma where c_h (W1 s)_h > 0, else alpha``; for fixed
    slopes the best signs are those of the row of ``W2 D W1``. Neither step lowers the row's norm. It bounds the maximum
    over all patterns from below, not the network's Lipschitz constant: a pattern may be one that no input reaches.

    Args:
        W2: Second matrix ``(m, h)``.
        W1: First matrix ``(h, n)``.
        slopes: Least and largest slope of the activation.
        starts: Start vectors per row: the signs of ``W2 W1``, and random ones.
        rows: Rows tried, those of largest upper bound.
        seed: Of the start vectors' own generator.

    Returns:
        A number in units of ``W2 W1``, attained by a pattern with entries in ``{alpha, gamma}``.

    Raises:
        InputError: As :func:`row_bounds`; ``starts`` or ``rows`` below 1.
    """
    pair = _pair(W2, W1, slopes)
    for name, value in (("starts", starts), ("rows", rows)):
        if value < 1:
            raise InputError(f"{name}: expected at least 1; got {value}")
    return pair.size * _lower(pair, starts, rows, seed)


def exact(
    W2: Tensor,
    W1: Tensor,
    *,
    slopes: tuple[float, float] = RELU,
    most_nodes: int = 200_000,
) -> float | None:
    """``N_inf`` itself, to a relative 1e-9: enumeration for up to 16 units or inputs, else branch and bound.

    Rows are visited by decreasing upper bound, and skipped once that is no larger than the best pattern so far.

    Args:
        W2: Second matrix ``(m, h)``.
        W1: First matrix ``(h, n)``.
        slopes: Least and largest slope of the activation.
        most_nodes: Nodes of branch and bound for all rows together; enumeration does not count.

    Returns:
        A number in units of ``W2 W1``, or None when ``most_nodes`` is used up.

    Raises:
        InputError: As :func:`row_bounds`.

    >>> exact(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [-1.0]]))
    1.0
    """
    pair = _pair(W2, W1, slopes)
    searched = min(pair.W1.shape) > ENUMERATED
    upper, best = _row_bounds(pair, refine=4 if searched else 0), _lower(pair, starts=8, rows=16, seed=0)
    nodes = 0
    for i in upper.argsort(descending=True).tolist():
        if float(upper[i]) <= best * SAME:
            break
        signed = _as_sign_problem(pair, i)
        if len(signed) <= ENUMERATED:
            best = max(best, _enumerate(signed))
            continue
        best, used = _branch_and_bound(signed, best, most_nodes - nodes)
        nodes += used
        if nodes > most_nodes:
            return None
    return pair.size * best


def compressed(W2: Tensor, W1: Tensor, k2: int, k1: int) -> tuple[float, float]:
    r"""Upper bounds of the alignment ``A_inf`` (ReLU slopes) from the rows of largest l1 norm and a remainder.

    With ``nu`` the row norms, ``a = nu1_(k1+1) / nu1_(1)``, ``b = nu2_(k2+1) / nu2_(1)`` (0 when nothing is cut) and
    ``A_kk`` the certified bound of the kept rows: ``min(1, A_kk + a + b + ab)``, which is the paper's form corrected
    and clipped, and the sharper ``min(1, max(A_kk + a, b))``, as kept and cut rows of W2 are different rows.

    Args:
        W2: Second matrix ``(m, h)``.
        W1: First matrix ``(h, n)``.
        k2: Rows of W2 kept, from 0 to m.
        k1: Rows of W1 kept, from 0 to h.

    Returns:
        (plain, sharper), without unit; both 1 when a matrix is zero, by convention.

    Raises:
        InputError: As :func:`row_bounds`; ``k2`` or ``k1`` out of range.
    """
    _pair(W2, W1)
    cuts, kept, sizes = [], [], []
    for name, W, k in (("k2", W2, k2), ("k1", W1, k1)):
        if not 0 <= k <= len(W):
            raise InputError(f"{name}: expected an integer from 0 to {len(W)}; got {k}")
        W = W.detach().cpu().double()
        largest = float(W.abs().max())
        W = W / (largest or 1.0)
        nu = row_norms(W).sort(descending=True).values
        if not largest:
            return 1.0, 1.0
        cuts.append(float(nu[k] / nu[0]) if k < len(nu) else 0.0)
        kept.append(keep_rows(W, k))
        sizes.append(float(nu[0]))
    b, a = cuts
    A = float(row_bounds(*kept).max()) / math.prod(sizes)
    return min(1.0, A + a + b + a * b), min(1.0, max(A + a, b))


# --- upper bounds -------------------------------------------------------------------------------------------


def _row_bounds(pair: _Pair, refine: int) -> Tensor:
    """Rows' upper bounds, in units of the pair's own matrices."""
    W2, W1, _, mid, half = pair
    free = _magnitudes(pair)
    if not half or not free.any():
        return _cheap_bounds(pair)
    linear = mid * (W2 @ W1).abs().sum(1)
    squares = W2.square()
    candidates = _weightings(W1)
    terms = [_spectral_term(squares, W1, r, q) for r, q in candidates]
    free = torch.stack([free, *terms]).amin(0)
    r, q = min(zip(terms, candidates, strict=True), key=lambda pair: float((linear + half * pair[0]).max()))[1]
    block, alone = None, set[int]()
    for turn in range(refine):
        bounds = linear + half * free
        leader = int(bounds.argmax())
        if leader in alone:
            break
        rows = torch.tensor([leader])
        if turn:
            alone.add(leader)
        else:
            rows = (bounds > 0.8 * bounds[leader]).nonzero()[:, 0]
        r, q, block = _descend(squares[rows], W1, linear[rows] / half, free[rows], r, q, block)
        free = torch.minimum(free, _spectral_term(squares, W1, r, q))
    return torch.minimum(linear + half * free, (mid + half) * _magnitudes(pair))


def _magnitudes(pair: _Pair) -> Tensor:
    return pair.W2.abs() @ pair.W1.abs().sum(1)


def _cheap_bounds(pair: _Pair) -> Tensor:
    """Rows' bounds from the product and the magnitudes, without spectral norms."""
    magnitudes = _magnitudes(pair)
    bounds = pair.mid * (pair.W2 @ pair.W1).abs().sum(1) + pair.half * magnitudes
    return torch.minimum(bounds, (pair.mid + pair.half) * magnitudes)


def _weightings(W1: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Weights r of the units and q of the inputs that are worth trying on any matrix."""
    rows, columns = W1.norm(dim=1), W1.norm(dim=0)
    pairs = [
        (torch.ones_like(rows), torch.ones_like(columns)),
        (rows.square(), torch.ones_like(columns)),
        (torch.ones_like(rows), columns.square()),
        (rows, columns),
    ]
    return [(_floored(r), _floored(q)) for r, q in pairs]


def _floored(weights: Tensor) -> Tensor:
    return (weights / weights.max()).clamp_min(FLOOR)


def _spectral_norm(M: Tensor) -> Tensor:
    return largest_singular_value(M)[1]


def _spectral_term(squares: Tensor, W1: Tensor, r: Tensor, q: Tensor) -> Tensor:
    """Rows' upper bounds ``tau sqrt(sum_h c_h^2 r_h) sqrt(sum_j q_j)`` of ``max_T ||c T W1||_1``."""
    tau = _spectral_norm(W1 * r.rsqrt()[:, None] * q.rsqrt())
    return tau * (squares @ r).sqrt() * q.sum().sqrt()


def _descend(
    squares: Tensor,
    W1: Tensor,
    linear: Tensor,
    known: Tensor,
    r: Tensor,
    q: Tensor,
    block: Tensor | None,
    steps: int = 30,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights that lower the given rows' spectral terms: Adam on ``log r, log q`` (an estimate, certified later).

    The leading singular vectors, of which the slope of ``log tau`` is made, follow by subspace iteration in
    ``block`` ``(n, 16)``, handed on to the next call; several of them, as the largest values draw level on the way.
    """
    h, n = W1.shape
    if block is None:
        block = torch.randn(n, min(16, h, n), generator=torch.Generator().manual_seed(0))
    single = W1.float()
    x = torch.cat([_floored(r).log(), _floored(q).log()])
    adam = torch.optim.Adam([x], lr=RATE)
    for step in range(steps):
        r, q = x[:h].exp(), x[h:].exp()
        left, right = r.rsqrt()[:, None].float(), q.rsqrt()[:, None].float()
        for _ in range(1 if step else 4):
            Q = torch.linalg.qr(block).Q
            image = left * (single @ (right * Q))
            block = right * (single.mT @ (left * image))
        U, s, Vh = torch.linalg.svd(image, full_matrices=False)
        top = (s.double() / s[0]) ** 16
        top = top / top.sum()
        unit, entry = U.double().square() @ top, (Q @ Vh.mT).double().square() @ top
        sums = squares @ r
        term = s[0] * (sums * q.sum()).sqrt()
        leads = linear + torch.minimum(term, known)
        share = (100 * (leads / leads.max())).softmax(0) * term / (linear + term)
        slope_r = r * (squares.mT @ (share / sums)) - share.sum() * unit
        slope_q = share.sum() * (q / q.sum() - entry)
        x.grad = torch.cat([slope_r, slope_q]).nan_to_num(0.0)
        adam.step()
    return x[:h].exp(), x[h:].exp(), block


# --- lower bounds and exact values --------------------------------------------------------------------------


def _lower(pair: _Pair, starts: int, rows: int, seed: int) -> float:
    W2, W1, _, mid, half = pair
    bounds = _cheap_bounds(pair)
    if not half or not bounds.any():
        return float(bounds.max())
    c = W2[bounds.topk(min(rows, len(bounds))).indices][:, None]
    generator = torch.Generator().manual_seed(seed)
    s = torch.randn(len(c), starts, W1.shape[1], dtype=W1.dtype, generator=generator)
    s[:, :1] = c @ W1
    best = -math.inf
    for _ in range(100):
        s = torch.where(s < 0, -1.0, 1.0).to(W1)
        d = mid + half * torch.where(c * (s @ W1.mT) > 0, 1.0, -1.0)
        s = (d * c) @ W1
        value = float(s.abs().sum(-1).sum())
        if value <= best * SAME:
            break
        best = value
    return float(s.abs().sum(-1).max())


def _as_sign_problem(pair: _Pair, i: int) -> Tensor:
    """B ``(p, q)`` with p <= q such that row i's maximum is that of ``||x^T B||_1`` over sign vectors x.

    ``max_t ||mid 1^T A + half t^T A||_1`` for ``A = diag(c) W1`` is that of ``||x^T B||_1`` for B = half A with the
    row ``mid 1^T A`` added, as x and -x have the same norm; and B may be transposed, as ``max_x,s x^T B s`` shows.
    """
    A = pair.W2[i][:, None] * pair.W1
    B = torch.cat([pair.mid * A.sum(0)[None], pair.half * A])
    B = B[B.any(1)][:, B.any(0)]
    return B if B.shape[0] <= B.shape[1] else B.mT.contiguous()


def _enumerate(B: Tensor) -> float:
    """Exact ``max ||x^T B||_1`` over sign vectors x, the first sign being + by symmetry."""
    p, q = B.shape
    total, step, best = 2 ** (p - 1), max(1, 2**21 // max(p, q)), 0.0
    for start in range(0, total, step):
        codes = torch.arange(start, min(start + step, total))[:, None]
        signs = 1.0 - 2.0 * ((codes >> torch.arange(p - 1)) & 1)
        best = max(best, float((B[0] + signs.to(B) @ B[1:]).abs().sum(1).max()))
    return best


def _branch_and_bound(B: Tensor, best: float, most_nodes: int) -> tuple[float, int]:
    """``max(best, max ||x^T B||_1)`` and the nodes used: exact unless they are more than ``most_nodes``.

    A node is a sign vector with zeros where undecided; the undecided rows add at most the smaller of their magnitudes
    and ``tau sqrt(sum r) sqrt(sum q)``.
    """
    B = B[B.abs().sum(1).argsort(descending=True)]
    p = len(B)
    tails = torch.tensor([_tail(B[k:]) for k in range(1, p)] + [0.0], dtype=B.dtype)
    root = torch.zeros(p, dtype=torch.int8)
    root[0] = 1
    count = itertools.count()
    heap = [(-math.inf, next(count), 1, root)]
    nodes = 0
    while heap and -heap[0][0] > best * SAME and nodes <= most_nodes:
        popped = [heapq.heappop(heap) for _ in range(min(64, len(heap)))]
        depths = torch.tensor([node[2] for node in popped]).repeat_interleave(2)
        signs = torch.stack([node[3] for node in popped]).repeat_interleave(2, 0)
        signs[torch.arange(len(signs)), depths] = torch.tensor([1, -1], dtype=torch.int8).repeat(len(popped))
        bounds = (signs.to(B) @ B).abs().sum(1) + tails[depths]
        nodes += len(signs)
        leaf = depths == p - 1
        best = max([best, *bounds[leaf].tolist()])
        for j in ((bounds > best * SAME) & ~leaf).nonzero()[:, 0].tolist():
            heapq.heappush(heap, (-float(bounds[j]), next(count), int(depths[j]) + 1, signs[j]))
    return best, nodes


def _tail(B: Tensor) -> float:
    """Upper bound of ``max ||x^T B||_1`` over sign vectors x."""
    best = float(B.abs().sum())
    for r, q in _weightings(B) if best else []:
        tau = _spectral_norm(B * r.rsqrt()[:, None] * q.rsqrt())
        best = min(best, float(tau * (r.sum() * q.sum()).sqrt()))
    return best


# --- input --------------------------------------------------------------------------------------------------


def _pair(W2: Tensor, W1: Tensor, slopes: tuple[float, float] = RELU, scale: Tensor | None = None) -> _Pair:
    for name, W in (("W2", W2), ("W1", W1)):
        if W.ndim != 2 or W.numel() == 0 or W.is_complex():
            raise InputError(f"{name}: expected a real matrix, not empty; got shape {tuple(W.shape)} of {W.dtype}")
        if not torch.isfinite(W).all():
            raise InputError(f"{name}: expected finite numbers; got NaN or infinite ones")
    if W2.shape[1] != W1.shape[0]:
        raise InputError(f"W1: expected {W2.shape[1]} rows, one for each column of W2; got shape {tuple(W1.shape)}")
    alpha, gamma = slopes
    if not (math.isfinite(alpha) and math.isfinite(gamma) and alpha <= gamma):
        raise InputError(f"slopes: expected two finite numbers, the smaller first; got {slopes}")
    W2, W1 = W2.detach().cpu().double(), W1.detach().cpu().double()
    if scale is not None:
        if scale.shape != W1.shape[1:] or not bool((torch.isfinite(scale) & (scale >= 0)).all()):
            raise InputError(f"scale: expected {W1.shape[1]} finite weights of at least 0; got {scale}")
        W1 = W1 * scale.detach().cpu().double()
    sizes = [float(W.abs().max()) or 1.0 for W in (W2, W1)]
    W2, W1 = W2 / sizes[0], W1 / sizes[1]
    used = W2.any(0) & W1.any(1)
    W2, W1 = W2[:, used], W1[used][:, W1[used].any(0)]
    return _Pair(W2, W1, sizes[0] * sizes[1], abs(alpha + gamma) / 2, (gamma - alpha) / 2)
