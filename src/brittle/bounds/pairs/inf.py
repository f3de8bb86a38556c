r"""Two matrices around an activation in the l_inf norm: ``N_inf(B, C) = max_D ||B D C||_inf``.

With ``D = middle I + radius T``, T diagonal in [-1, 1], the row b of B contributes at most
``middle ||b C||_1 + radius max_T ||b T C||_1``. B and C are two weights W2, W1, as in Barsbey et al. 2025, Theorem 3.2.
Formulas and proofs: theory page, section "Alignment between consecutive layers".
"""

from __future__ import annotations

import heapq
import itertools
import math

import torch
from torch import Tensor

from brittle.bounds.pairs.matrices import RELU, SEARCH_TOLERANCE, Pair, pair_of
from brittle.bounds.pairs.multipliers import Slopes, raise_to_floor
from brittle.errors import InputError
from brittle.linear.compressibility import keep_rows, row_norms
from brittle.linear.norms import operator_norm
from brittle.linear.spectrum import largest_singular_value, raised

DESCENT_RATE = 0.05
"""Adam's step size on the logarithms of the weights of units and inputs."""

LEAST_WEIGHT = 1e-4
"""Smallest weight of a unit or an input, as a share of the largest."""

MOST_ENUMERATED = 17
"""Length up to which all sign vectors are tried; longer ones are searched."""

FOUND = 1 + SEARCH_TOLERANCE
"""Factor within which a search counts the maximum as found."""


def upper(B: Tensor, C: Tensor, *, slopes: Slopes = RELU, refine: int = 8) -> dict[str, float]:
    """Every upper bound of ``N_inf(B, C)`` by name; the least of them is the one to use.

    "half", of norms; "entry" and "half entry", of magnitudes; "spectral", the largest of :func:`row_bounds`.

    Args:
        B: ``(m, h)``.
        C: ``(h, n)``.
        slopes: ``(alpha, gamma)``.
        refine: Most rounds of refinement of "spectral".

    Returns:
        Certified upper bounds in units of B times C.

    Raises:
        InputError: As for :func:`row_bounds`.

    >>> bounds = upper(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [-1.0]]))
    >>> {name: round(bound, 6) for name, bound in bounds.items()}
    {'half': 1.0, 'entry': 2.0, 'half entry': 1.0, 'spectral': 1.0}
    """
    pair = pair_of(B, C, slopes).used()
    if not pair.B.numel():
        return dict.fromkeys(("half", "entry", "half entry", "spectral"), 0.0)
    norms = [float(operator_norm(W, math.inf)) for W in (pair.B, pair.C, pair.B @ pair.C)]
    bounds = {
        "half": pair.middle * norms[2] + pair.radius * norms[0] * norms[1],
        "entry": (pair.middle + pair.radius) * float(pair.magnitudes.max()),
        "half entry": float(_half_entry_bounds(pair).max()),
        "spectral": float(_row_bounds(pair, refine).max()),
    }
    side = max(*B.shape, *C.shape)
    return {name: pair.scale * raised(bound, side) for name, bound in bounds.items()}


def row_bounds(B: Tensor, C: Tensor, *, slopes: Slopes = RELU, scale: Tensor | None = None, refine: int = 8) -> Tensor:
    r"""Certified upper bound of ``max_D ||(B D C)_i||_1`` for every row i; the largest bounds ``N_inf``.

    ``middle ||b C||_1 + radius min(|b| |C| 1, tau sqrt(sum_h b_h^2 r_h) sqrt(sum_j q_j))`` for the row b of B, with
    ``tau = ||diag(r)^(-1/2) C diag(q)^(-1/2)||_2`` for positive weights r of the units and q of the inputs; the least
    over several (r, q). Each round of refinement descends on (r, q), the first for all leading rows together and the
    next ones for the single row that leads, and then takes the new tau exactly.

    Args:
        B: ``(m, h)``.
        C: ``(h, n)``.
        slopes: ``(alpha, gamma)``.
        scale: ``(n,)``, weights of at least 0 of C's columns: the bound is that of ``B D C diag(scale)``.
        refine: Most rounds of refinement; 0 for none.

    Returns:
        ``(m,)`` in float64, in units of B times C; never above ``max(|alpha|, |gamma|) |B| |C| scale``.

    Raises:
        InputError: As for :func:`~brittle.bounds.pairs.matrices.pair_of`, or ``scale`` or ``refine`` out of range.

    >>> row_bounds(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [-1.0]]))
    tensor([1.], dtype=torch.float64)
    """
    if refine < 0:
        raise InputError(f"refine: expected at least 0 rounds; got {refine}")
    pair = pair_of(B, C, slopes)
    if scale is not None:
        n = pair.C.shape[1]
        if scale.shape != (n,) or not bool((torch.isfinite(scale) & (scale >= 0)).all()):
            raise InputError(f"scale: expected {n} finite weights of at least 0; got {scale}")
        C = pair.C * scale.detach().cpu().double()
        largest = float(C.abs().max()) or 1.0
        pair = pair._replace(C=C / largest, scale=pair.scale * largest)
    return pair.scale * _row_bounds(pair.used(), refine)


def lower(B: Tensor, C: Tensor, *, slopes: Slopes = RELU, starts: int = 4, rows: int = 8, seed: int = 0) -> float:
    """Lower bound of ``N_inf``, and in practice a close estimate: the best pattern that alternation finds.

    For fixed input signs s the best slopes of a row b are ``gamma where b_h (C s)_h > 0, else alpha``; for fixed
    slopes the best signs are those of the row of ``B D C``. Neither step lowers the row's norm. It bounds the maximum
    over all patterns from below, not the network's Lipschitz constant: a pattern may be one that no input reaches.

    Args:
        B: ``(m, h)``.
        C: ``(h, n)``.
        slopes: ``(alpha, gamma)``.
        starts: Start vectors per row: the signs of ``B C``, and random ones.
        rows: Rows tried, those of largest upper bound.
        seed: Of the start vectors' own generator.

    Returns:
        A number in units of B times C, attained by a pattern with entries in ``{alpha, gamma}``.

    Raises:
        InputError: As for :func:`row_bounds`; ``starts`` or ``rows`` below 1.
    """
    for name, value in (("starts", starts), ("rows", rows)):
        if value < 1:
            raise InputError(f"{name}: expected at least 1; got {value}")
    pair = pair_of(B, C, slopes).used()
    bounds = _half_entry_bounds(pair)
    if not pair.radius or not bounds.any():
        return pair.scale * float(bounds.max())
    b = pair.B[bounds.topk(min(rows, len(bounds))).indices][:, None]
    C, generator = pair.C, torch.Generator().manual_seed(seed)
    s = torch.randn(len(b), starts, C.shape[1], dtype=C.dtype, generator=generator)
    s[:, :1] = b @ C
    best = -math.inf
    for _ in range(100):
        s = torch.where(s < 0, -1.0, 1.0).to(C)
        d = pair.middle + pair.radius * torch.where(b * (s @ C.mT) > 0, 1.0, -1.0).to(C)
        s = (d * b) @ C
        total = float(s.abs().sum(-1).sum())
        if total <= best * FOUND:
            break
        best = total
    return pair.scale * float(s.abs().sum(-1).max())


def exact(B: Tensor, C: Tensor, *, slopes: Slopes = RELU, most_nodes: int = 200_000) -> float | None:
    """``N_inf`` itself, to a relative 1e-9: enumeration for up to 16 units or inputs, else branch and bound.

    Rows are visited by decreasing upper bound, and skipped once that is no larger than the best pattern so far.

    Args:
        B: ``(m, h)``.
        C: ``(h, n)``.
        slopes: ``(alpha, gamma)``.
        most_nodes: Nodes of branch and bound for all rows together; enumeration does not count.

    Returns:
        A number in units of B times C, or None when ``most_nodes`` is used up.

    Raises:
        InputError: As for :func:`row_bounds`.

    >>> exact(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [-1.0]]))
    1.0
    """
    pair = pair_of(B, C, slopes).used()
    bounds = _row_bounds(pair, refine=4 if min(pair.C.shape) > MOST_ENUMERATED else 0)
    # A close lower bound first: rows whose upper bound does not exceed it need no search at all.
    best = lower(pair.B, pair.C, slopes=slopes, starts=8, rows=16) if pair.B.numel() else 0.0
    nodes = 0
    for i in bounds.argsort(descending=True).tolist():
        if float(bounds[i]) <= best * FOUND:
            break
        signed = _as_sign_problem(pair, i)
        if len(signed) <= MOST_ENUMERATED:
            best = max(best, _enumerate(signed))
            continue
        best, used = _branch_and_bound(signed, best, most_nodes - nodes)
        nodes += used
        if nodes > most_nodes:
            return None
    return pair.scale * best


def upper_of_compressed(W2: Tensor, W1: Tensor, k2: int, k1: int) -> tuple[float, float]:
    r"""Upper bounds of the alignment ``A_inf`` (ReLU slopes) from the rows of largest l1 norm and a remainder.

    With ``nu`` the row norms, ``a = nu1_(k1+1) / nu1_(1)``, ``b = nu2_(k2+1) / nu2_(1)`` (0 when nothing is cut) and
    ``A_kk`` the certified bound of the kept rows: ``min(1, A_kk + a + b + ab)``, which is the paper's form corrected
    and clipped, and the sharper ``min(1, max(A_kk + a, b))``, as kept and cut rows of W2 are different rows.

    Args:
        W2: Weight after the activation, ``(m, h)``.
        W1: Weight before it, ``(h, n)``.
        k2: Rows of W2 kept, from 0 to m.
        k1: Rows of W1 kept, from 0 to h.

    Returns:
        (plain, sharper), without unit; both 1 when a matrix is zero, by convention.

    Raises:
        InputError: As for :func:`row_bounds`; ``k2`` or ``k1`` out of range.
    """
    W2, W1, *_ = pair_of(W2, W1)
    shares, heads, norms = [], [], []
    for name, W, k in (("k2", W2, k2), ("k1", W1, k1)):
        if not 0 <= k <= len(W):
            raise InputError(f"{name}: expected an integer from 0 to {len(W)}; got {k}")
        nu = row_norms(W).sort(descending=True).values
        shares.append(float(nu[k] / nu[0]) if k < len(nu) and W.any() else 0.0)
        heads.append(keep_rows(W, k))
        norms.append(float(nu[0]))
    if not (W2.any() and W1.any()):
        return 1.0, 1.0
    b, a = shares
    A = float(row_bounds(*heads).max()) / math.prod(norms)
    return min(1.0, A + a + b + a * b), min(1.0, max(A + a, b))


# --- upper bounds, in units of the pair's own matrices ------------------------------------------------------


def _half_entry_bounds(pair: Pair) -> Tensor:
    """Rows' bounds from the product and the magnitudes, without spectral norms."""
    magnitudes = pair.magnitudes
    bounds = pair.middle * (pair.B @ pair.C).abs().sum(1) + pair.radius * magnitudes
    return torch.minimum(bounds, (pair.middle + pair.radius) * magnitudes)


def _row_bounds(pair: Pair, refine: int) -> Tensor:
    """Rows' bounds with the least of several spectral terms, refined where they are largest."""
    B, C, middle, radius = pair.B, pair.C, pair.middle, pair.radius
    magnitudes = pair.magnitudes
    if not radius or not magnitudes.any():
        return _half_entry_bounds(pair)
    linear, squares, candidates = middle * (B @ C).abs().sum(1), B.square(), _weightings(C)
    terms = [_spectral_terms(squares, C, r, q) for r, q in candidates]
    free = torch.stack([magnitudes, *terms]).amin(0)
    r, q = candidates[min(range(len(terms)), key=lambda k: float((linear + radius * terms[k]).max()))]
    block, alone = None, set[int]()
    for turn in range(refine):
        bounds = linear + radius * free
        leader = int(bounds.argmax())
        if leader in alone:
            break
        rows = torch.tensor([leader])
        if turn:
            alone.add(leader)
        else:
            rows = (bounds > 0.8 * bounds[leader]).nonzero()[:, 0]  # any of these may lead once the first are lowered
        r, q, block = _descend(squares[rows], C, linear[rows] / radius, free[rows], (r, q), block)
        free = torch.minimum(free, _spectral_terms(squares, C, r, q))
    return torch.minimum(linear + radius * free, (middle + radius) * magnitudes)


def _weightings(C: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Weights r of the units and q of the inputs that are worth trying on any matrix."""
    rows, columns = C.norm(dim=1), C.norm(dim=0)
    units, inputs = torch.ones_like(rows), torch.ones_like(columns)
    pairs = [(units, inputs), (rows.square(), inputs), (units, columns.square()), (rows, columns)]
    return [(raise_to_floor(r, LEAST_WEIGHT), raise_to_floor(q, LEAST_WEIGHT)) for r, q in pairs]


def _spectral_terms(squares: Tensor, C: Tensor, r: Tensor, q: Tensor) -> Tensor:
    """Upper bounds ``tau sqrt(sum_h b_h^2 r_h) sqrt(sum_j q_j)`` of ``max_T ||b T C||_1`` for rows b."""
    tau = largest_singular_value(C * r.rsqrt()[:, None] * q.rsqrt())[1]
    return tau * (squares @ r).sqrt() * q.sum().sqrt()


def _descend(
    squares: Tensor,
    C: Tensor,
    linear: Tensor,
    known: Tensor,
    weights: tuple[Tensor, Tensor],
    block: Tensor | None,
    steps: int = 30,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights that lower the given rows' spectral terms: Adam on ``log r, log q`` (an estimate, certified later).

    The leading singular vectors, of which the slope of ``log tau`` is made, follow by subspace iteration in
    ``block`` ``(n, 16)``, handed on to the next call; several of them, as the largest values draw level on the way.
    """
    h, n = C.shape
    if block is None:
        start = torch.Generator().manual_seed(0)
        block = torch.randn(n, min(16, h, n), generator=start, dtype=torch.float32)
    single = C.float()
    x = torch.cat([raise_to_floor(w, LEAST_WEIGHT).log() for w in weights])
    adam = torch.optim.Adam([x], lr=DESCENT_RATE)
    for step in range(steps):
        r, q = x[:h].exp(), x[h:].exp()
        left, right = r.rsqrt()[:, None].float(), q.rsqrt()[:, None].float()
        for _ in range(1 if step else 4):
            Q = torch.linalg.qr(block).Q
            image = left * (single @ (right * Q))
            block = right * (single.mT @ (left * image))
        U, s, Vh = torch.linalg.svd(image, full_matrices=False)
        top = (s.double() / s[0]) ** 16  # singular values within some percent of the largest share its slope
        top = top / top.sum()
        unit, entry = U.double().square() @ top, (Q @ Vh.mT).double().square() @ top
        sums = squares @ r
        term = s[0] * (sums * q.sum()).sqrt()
        leads = linear + torch.minimum(term, known)
        # A smooth maximum over the rows, of the logarithms; the spectral part of a row is term / (linear + term).
        share = (100 * (leads / leads.max())).softmax(0) * term / (linear + term)
        slope_r = r * (squares.mT @ (share / sums)) - share.sum() * unit
        slope_q = share.sum() * (q / q.sum() - entry)
        x.grad = torch.cat([slope_r, slope_q]).nan_to_num(0.0)
        adam.step()
    return x[:h].exp(), x[h:].exp(), block


# --- exact values -------------------------------------------------------------------------------------------


def _as_sign_problem(pair: Pair, i: int) -> Tensor:
    """A ``(p, q)`` with p <= q such that row i's maximum is that of ``||x^T A||_1`` over sign vectors x.

    ``max_t ||middle 1^T R + radius t^T R||_1`` for ``R = diag(b) C`` is that of ``||x^T A||_1`` for A = radius R with
    the row ``middle 1^T R`` added, as x and -x have the same norm. A may be transposed: both are ``max_x,s x^T A s``.
    """
    R = pair.B[i][:, None] * pair.C
    A = torch.cat([pair.middle * R.sum(0)[None], pair.radius * R])
    A = A[A.any(1)][:, A.any(0)]
    return A if A.shape[0] <= A.shape[1] else A.mT.contiguous()


def _enumerate(A: Tensor) -> float:
    """Exact ``max ||x^T A||_1`` over sign vectors x, the first sign being + by symmetry."""
    p, q = A.shape
    total, step, best = 2 ** (p - 1), max(1, 2**21 // max(p, q)), 0.0
    for start in range(0, total, step):
        codes = torch.arange(start, min(start + step, total))[:, None]
        signs = 1.0 - 2.0 * ((codes >> torch.arange(p - 1)) & 1)
        best = max(best, float((A[0] + signs.to(A) @ A[1:]).abs().sum(1).max()))
    return best


def _branch_and_bound(A: Tensor, best: float, most_nodes: int) -> tuple[float, int]:
    """``max(best, max ||x^T A||_1)`` and the nodes used: exact unless they are more than ``most_nodes``.

    A node is a sign vector with zeros where undecided; the undecided rows add at most the smaller of their magnitudes
    and ``tau sqrt(sum r) sqrt(sum q)``.
    """
    A = A[A.abs().sum(1).argsort(descending=True)]
    p = len(A)
    undecided = torch.zeros(p, dtype=A.dtype)
    for k in range(1, p):
        rest, one = A[k:], A.new_ones(1, p - k)
        terms = [_spectral_terms(one, rest, r, q)[0] for r, q in _weightings(rest)]
        undecided[k - 1] = torch.stack([rest.abs().sum(), *terms]).min()
    root = torch.zeros(p, dtype=torch.int8)
    root[0] = 1
    count = itertools.count()
    heap = [(-math.inf, next(count), 1, root)]
    nodes = 0
    while heap and -heap[0][0] > best * FOUND and nodes <= most_nodes:
        popped = [heapq.heappop(heap) for _ in range(min(64, len(heap)))]
        depths = torch.tensor([node[2] for node in popped]).repeat_interleave(2)
        signs = torch.stack([node[3] for node in popped]).repeat_interleave(2, 0)
        signs[torch.arange(len(signs)), depths] = torch.tensor([1, -1], dtype=torch.int8).repeat(len(popped))
        bounds = (signs.to(A) @ A).abs().sum(1) + undecided[depths]
        nodes += len(signs)
        leaf = depths == p - 1
        best = max([best, *bounds[leaf].tolist()])
        for j in ((bounds > best * FOUND) & ~leaf).nonzero()[:, 0].tolist():
            heapq.heappush(heap, (-float(bounds[j]), next(count), int(depths[j]) + 1, signs[j]))
    return best, nodes
