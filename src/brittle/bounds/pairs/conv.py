r"""Alignment of two consecutive convolutions, as linear maps on images: ``N_p = max_D ||A2 D A1||_p``.

D is diagonal with entries in [0, 1], one for every pixel and channel between the two convolutions. The filter matrices
of two convolutions do not compose (``in`` columns times the taps of one against ``out`` rows of the other), so their
alignment says nothing; only the operators A1 and A2 do. Zeros padded to the image in the middle are a pattern D, which
is why bounds without a border hold for images with one. Theory page, section "Alignment between consecutive layers";
the alignment is that of Barsbey et al. 2025, Theorem 3.2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brittle.bounds.pairs import inf as pair_inf
from brittle.bounds.pairs.matrices import Alignment
from brittle.bounds.pairs.multipliers import closed_form, eliminate, improve
from brittle.errors import InputError
from brittle.linear.conv_geometry import CONVOLUTIONS, ConvGeometry, conv_geometry
from brittle.linear.conv_symbol import symbol
from brittle.linear.convolution import apply, bounds_of
from brittle.linear.norms import check_attack_norm
from brittle.linear.spectrum import ROUNDING

_TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_PATCH = 4_000_000
"""Entries up to which the first convolution on one patch is written as a matrix: some seconds."""
_CHUNK = 2**24
"""Entries of the composed filters that are kept in memory at once."""
_WIDEST = 2e7
"""Entries of one batch of symbols that are kept in memory, of which there are several: 320 MB."""
_AFFORDABLE = 2e10
"""Multiplications up to which one decomposition of all symbols is worth its time: some ten seconds on two cores."""

_SLACKS = (1.0, 1.02, 1.1, 1.3, 2.0)
"""Factors by which multipliers chosen at some frequencies are raised until they are feasible at all of them."""


class _Pair(NamedTuple):
    """Both kernels with largest magnitude 1, what they were divided by, and the images before, between and after."""

    K2: Tensor
    geometry2: ConvGeometry
    K1: Tensor
    geometry1: ConvGeometry
    scale: float
    size: tuple[int, ...]
    middle: tuple[int, ...]
    last: tuple[int, ...]


def conv_pair_upper(
    K2: Tensor,
    geometry2: ConvGeometry,
    K1: Tensor,
    geometry1: ConvGeometry,
    p: float,
    size: Sequence[int],
    *,
    steps: int = 0,
) -> dict[str, float]:
    r"""Certified upper bounds of ``N_p = max_D ||A2 D A1||_p``, by name; the least of them is the one to use.

    Always "product", of the two norms' upper bounds. For p = inf

    - "entry": the largest entry of ``conv_|K2|(conv_|K1|(1))`` on this very image, borders included;
    - "half entry": half of ``||P_o||_1 + ||Q_o||_1`` for the worst filter o, with ``P = K2 * K1`` the composed kernel
      and ``Q = |K2| * |K1|``. It is the bound of one output position on the infinite plane. For all strides,
      dilations and groups the others are its shifts, with patterns that are zero outside of the image. It ignores
      the border, so that on an image smaller than the composed kernel "entry" may be better;
    - "spectral": half of ``||P_o||_1 + tau sqrt(sum_h c_h^2 r_h) sqrt(n)`` for that position, with c the filter o, n
      the inputs on its patch and on the image, and tau at least ``||diag(r)^(-1/2) A1||_2`` on the patch for two
      choices of r; where the patch is small also :func:`brittle.bounds.pairs.inf.row_bounds`, with better ones.

    For p = 2, on a torus that holds either image with its padding, with the matrices ``K2(w), K1(w)`` at frequency w

    - "half": ``(max ||K2(w) K1(w)|| + max ||K2(w)|| max ||K1(w)||) / 2``;
    - "multipliers": ``max lambda_max(C^H T M^-1 T C)^(1/2)``, ``C = K1(w)``, ``M = 2T - K2(w)^H K2(w) > 0`` at every
      frequency, T one multiplier a channel (and stride class of the second convolution), in closed form;
    - "optimised multipliers": after ``steps`` steps.

    Strides enter by polyphase: the torus counts the steps of both. Where that is too large, a strided second
    convolution is taken as rows of the unstrided one, and where this is too large there is no torus bound.

    Args:
        K2: Kernel of the second convolution ``(out, in / groups, *kernel)``.
        geometry2: How it walks.
        K1: Kernel of the first.
        geometry1: How it walks.
        p: 2 or inf.
        size: Spatial size of the first convolution's input.
        steps: Steps of optimisation of the multipliers (p = 2).

    Returns:
        Upper bounds in units of K2 times K1.

    Raises:
        InputError: Padding other than zeros, kernels that do not chain or are not finite, another p, or a size that
            does not hold both kernels.

    >>> kernel, geometry = torch.tensor([[[1.0, -1.0]]]), ConvGeometry((1,), ((0, 0),), (1,), 1)
    >>> round(conv_pair_upper(kernel.abs(), geometry, kernel, geometry, torch.inf, (9,))["half entry"], 6)
    3.0
    """
    p = check_attack_norm(p)
    pair = _pair(K2, geometry2, K1, geometry1, size)
    norms = [bounds_of(K, g, p, n, search=False) for K, g, n in _layers(pair)]
    bounds = _uppers(pair, p, steps, norms[0].upper * norms[1].upper)
    return {name: pair.scale * bound for name, bound in bounds.items()}


def conv_alignment(second: nn.Module, first: nn.Module, p: float, size: Sequence[int], *, steps: int = 0) -> Alignment:
    r"""The alignment ``N_p / (||A2||_p ||A1||_p)`` of ``x -> A2 phi(A1 x + b)``, slopes of phi in [0, 1].

    The operators' norms are exact for p = inf and lie between two bounds for p = 2. So ``upper`` is the least of
    :func:`conv_pair_upper` over the *lower* bounds of the norms, at most 1; ``lower`` is what a pattern attains over
    their *upper* bounds; and ``scale`` is the product of the upper bounds. Times it, both bound ``N_p``, but
    :func:`conv_pair_upper` bounds it better from above. Filter matrices do not compose: this is no alignment of them.

    Args:
        second: ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` after the activation.
        first: The one before it.
        p: 2 or inf.
        size: Spatial size of the first convolution's input.
        steps: Steps of optimisation of the multipliers (p = 2).

    Returns:
        Lower estimate and certified upper bound; never the exact value. A zero operator has alignment 1.

    Raises:
        InputError: As :func:`conv_pair_upper`, or a module that is no convolution with a forward that is understood.
    """
    p = check_attack_norm(p)
    (K2, geometry2), (K1, geometry1) = _module(second, "second"), _module(first, "first")
    pair = _pair(K2, geometry2, K1, geometry1, size)
    norms = [bounds_of(K, g, p, n) for K, g, n in _layers(pair)]
    product = norms[0].upper * norms[1].upper
    if not product:
        return Alignment(p, 0.0, 1.0, 1.0, None, "zero matrix")
    uppers = _uppers(pair, p, steps, product)
    rounding = _rounding(pair)
    least = min(uppers.values())
    argument = next(name for name, bound in uppers.items() if bound <= least * rounding)
    known = norms[0].lower * norms[1].lower
    upper = min(1.0, least / known * rounding) if known else 1.0
    lower = min(upper, _attained(pair, p) / product)
    return Alignment(p, pair.scale * product, lower, upper, None, argument)


def _uppers(pair: _Pair, p: float, steps: int, product: float) -> dict[str, float]:
    """All bounds of the pair of kernels of magnitude 1, the simplest first."""
    bounds = {"product": product}
    if not product:
        return bounds
    bounds |= _torus_bounds(pair, steps) if p == 2 else _row_bounds(pair)
    return {name: bound * (1 if name == "product" else _rounding(pair)) for name, bound in bounds.items()}


# --- l_inf --------------------------------------------------------------------------------------------------


def _row_bounds(pair: _Pair) -> dict[str, float]:
    taps = _plane(pair, slice(0, 1))[0]
    patch = _onto_patch(pair, torch.zeros(1, *taps.shape, dtype=torch.float64))[0]
    lengths = pair.K1.abs().flatten(1).sum(1)
    weights = _weights(pair, patch.shape[1:])
    inputs = _inputs(pair) * math.prod(min(n, seen) for n, seen in zip(pair.size, patch.shape[1:], strict=True))
    halves = spectral = 0.0
    step = max(1, _CHUNK // max(patch.numel(), taps.numel()))
    for start in range(0, len(pair.K2), step):
        rows = _plane(pair, slice(start, start + step))
        composed = _onto_patch(pair, rows).abs().flatten(1).sum(1)
        magnitudes = rows.abs().flatten(2).sum(2) @ lengths
        squares = rows.square().flatten(2).sum(2)
        free = torch.stack([magnitudes, *(tau * (inputs * (squares @ r)).sqrt() for r, tau in weights)]).amin(0)
        halves = max(halves, float((composed + magnitudes).max()) / 2)
        spectral = max(spectral, float((composed + free).max()) / 2)
    if taps.numel() * max(patch.numel(), len(pair.K2)) <= _PATCH:
        W1 = _onto_patch(pair, torch.eye(taps.numel(), dtype=torch.float64).view(-1, *taps.shape)).flatten(1)
        W2 = _plane(pair, slice(None)).flatten(1)
        used = W2.any(0)  # the taps of all filters: a dilated kernel has zeros between them
        spectral = min(spectral, float(pair_inf.row_bounds(W2[:, used], W1[used]).max()))
    return {"entry": float(_magnitudes(pair).max()), "half entry": halves, "spectral": spectral}


def _weights(pair: _Pair, patch: Sequence[int]) -> list[tuple[Tensor, float]]:
    """Weights r a middle channel, and an upper bound of ``||diag(r)^(-1/2) A1||_2`` for A1 on a patch."""
    geometry = replace(pair.geometry1, padding=tuple((0, 0) for _ in patch))
    energy = pair.K1.square().flatten(1).sum(1)
    found = []
    for r in (torch.ones_like(energy), (energy / energy.max()).clamp_min(1e-4)):
        K = pair.K1 * r.rsqrt().view(-1, *[1] * (pair.K1.ndim - 1))
        found.append((r, bounds_of(K, geometry, 2, patch, search=False).upper))
    return found


def _magnitudes(pair: _Pair) -> Tensor:
    """``|A2| |A1| 1``, ``(out, *last)``."""
    ones = torch.ones(1, _inputs(pair), *pair.size, dtype=torch.float64)
    return apply(pair.K2.abs(), pair.geometry2, apply(pair.K1.abs(), pair.geometry1, ones))[0]


def _plane(pair: _Pair, filters: slice) -> Tensor:
    """Filters of the second convolution over all channels, with zeros between dilated taps: one output position."""
    K2, geometry = pair.K2, pair.geometry2
    index, width = torch.arange(len(K2))[filters], K2.shape[1]
    group = index // (len(K2) // geometry.groups)
    spans = [span + 1 for span in geometry.spans(K2.shape[2:])]
    full = torch.zeros(len(index), width * geometry.groups, *spans, dtype=torch.float64)
    spread = full
    for axis, d in enumerate(geometry.dilation):
        spread = spread.movedim(axis + 2, 0)[::d].movedim(0, axis + 2)
    channels = group[:, None] * width + torch.arange(width)
    spread[torch.arange(len(index))[:, None], channels] = K2[filters]
    return full


def _onto_patch(pair: _Pair, rows: Tensor) -> Tensor:
    """``rows @ A1`` on the infinite plane: rows ``(N, middle channels, ...)`` to what they see of the input."""
    g = pair.geometry1
    transposed = _TRANSPOSED[len(pair.size)]
    return transposed(rows, pair.K1, stride=g.stride, dilation=g.dilation, groups=g.groups)


# --- l_2 ----------------------------------------------------------------------------------------------------


def _torus_bounds(pair: _Pair, steps: int) -> dict[str, float]:
    coarse = pair.geometry2.stride
    for step in dict.fromkeys((coarse, tuple(1 for _ in coarse))):
        if _affordable(pair, step):
            return _symbol_bounds(*_symbols(pair, step), steps)
    return {}


def _grid(pair: _Pair, step: Sequence[int]) -> list[int]:
    """Steps of the torus: it holds both images with the wider of their paddings, and every output position."""
    g2, g1 = pair.geometry2, pair.geometry1
    axes = zip(pair.size, pair.middle, pair.last, g1.padding, g2.padding, g1.stride, g2.stride, step, strict=True)
    return [
        -(-max(-(-(n + max(pad1)) // s1), middle + max(pad2), (last - 1) * s2 + 1) // s)
        for n, middle, last, pad1, pad2, s1, s2, s in axes
    ]


def _affordable(pair: _Pair, step: Sequence[int]) -> bool:
    grid, coarse = _grid(pair, step), math.prod(step)
    frequencies = math.prod(grid[:-1]) * (grid[-1] // 2 + 1)
    inner = len(pair.K1) * coarse
    outer = _inputs(pair) * coarse * math.prod(pair.geometry1.stride)
    entries = frequencies * inner * max(inner, outer, len(pair.K2))
    return entries <= _WIDEST and entries * inner <= _AFFORDABLE


def _symbols(pair: _Pair, step: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``K2(w)`` ``(F, out, h * phases)`` and ``K1(w)`` ``(F, h * phases, ...)``; phases of the middle image by step.

    Position ``step * q + r`` of the middle image reads what a stride of ``step * stride`` reads with the padding
    lessened by ``stride * r``. Rows and columns that meet nothing are left out.
    """
    g2, g1, grid = pair.geometry2, pair.geometry1, _grid(pair, step)
    second = symbol(pair.K2, replace(g2, stride=tuple(step)), grid)
    strides = tuple(s * t for s, t in zip(step, g1.stride, strict=True))
    firsts = []
    for phase in itertools.product(*(range(s) for s in step)):
        shifts = [r * s for r, s in zip(phase, g1.stride, strict=True)]
        pads = tuple((before - d, after + d) for (before, after), d in zip(g1.padding, shifts, strict=True))
        firsts.append(symbol(pair.K1, replace(g1, stride=strides, padding=pads), grid))
    first = torch.stack(firsts, 2).flatten(1, 2)
    alive = second.any(0).any(0) & first.any(0).any(1)
    return second[:, :, alive], first[:, alive]


def _symbol_bounds(B: Tensor, C: Tensor, steps: int) -> dict[str, float]:
    """Of ``B(w) D C(w)`` where D mixes the frequencies. Multipliers are chosen at those of largest norms."""
    if not B.shape[2]:
        return {"half": 0.0}
    second, first, composed = _norms(B), _norms(C), _norms(B @ C)
    bounds = {"half": float(composed.max() + second.max() * first.max()) / 2}
    P = B.mH @ B
    heavy = [(second * first + composed, 12), (second, 4), (first, 4)]
    chosen = torch.cat([norms.topk(min(most, len(P))).indices for norms, most in heavy]).unique()
    t = closed_form(P[chosen], C[chosen])
    for slack in _SLACKS:
        if (bound := _multiplier(P, C, t * slack)) < math.inf:
            bounds["multipliers"] = bound
            if steps:
                bounds["optimised multipliers"] = _multiplier(P, C, improve(P, C, t * slack, steps))
            break
    return {name: bound for name, bound in bounds.items() if bound < math.inf}


def _multiplier(P: Tensor, C: Tensor, t: Tensor) -> float:
    """The bound of these multipliers; inf where they are not feasible."""
    R = eliminate(P, t)
    if R is None:
        return math.inf
    if C.shape[2] > C.shape[1]:  # the same eigenvalues on the smaller side
        G, info = torch.linalg.cholesky_ex(R)
        return math.inf if bool(info.any()) else float(_norms(G.mH @ C).max())
    form = C.mH @ (R @ C)
    top = float(torch.linalg.eigvalsh((form + form.mH) / 2)[:, -1].max())
    return math.sqrt(max(top, 0.0)) if math.isfinite(top) else math.inf


def _norms(A: Tensor) -> Tensor:
    """Spectral norms ``(F,)`` of ``(F, m, n)``, from the smaller Gram matrices."""
    gram = A.mH @ A if A.shape[2] <= A.shape[1] else A @ A.mH
    return torch.linalg.eigvalsh(gram)[:, -1].clamp_min(0).sqrt()


# --- a pattern ----------------------------------------------------------------------------------------------


def _attained(pair: _Pair, p: float, *, seed: int = 0) -> float:
    """Lower bound of ``N_p``: input and pattern in turns, in float32, and what the last pattern attains in float64.

    For p = 2 the form is ``||A2 D A1 x||^2 / 2`` and x follows its slope, a power step; for p = inf it is one output
    entry, of a filter with large magnitudes, and x has the signs of its slope. D is 1 where its slope is positive.
    """
    generator = torch.Generator().manual_seed(seed)
    starts, rounds = (4, 30) if p == 2 else (2, 16)  # of every entry
    entries = _leading_entries(pair, 4).repeat_interleave(starts) if p != 2 else None
    batch, axes = starts if entries is None else len(entries), [1] * (len(pair.size) + 1)
    x = torch.randn(batch, _inputs(pair), *pair.size, generator=generator)
    d = torch.randint(2, (batch, len(pair.K1), *pair.middle), generator=generator).float()
    d[::starts] = 1
    single = pair._replace(K2=pair.K2.float(), K1=pair.K1.float())
    for turn in range(rounds):
        _, slope_x, slope_d = _slopes(single, d, x, entries)
        if p == 2 and (turn % 3 != 2 or turn > rounds - 6):
            x = slope_x / slope_x.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, *axes)
        elif p != 2 and turn % 2 == 0:
            x = torch.where(slope_x < 0, -1.0, 1.0)
        else:
            d = (slope_d > 0).float()
    x = x.double()
    y, slope_x, _ = _slopes(pair, d.double(), x, entries)
    if entries is not None:
        return float(slope_x.abs().flatten(1).sum(1).max())
    return float((y.norm(dim=1) / x.detach().flatten(1).norm(dim=1).clamp_min(1e-30)).max())


def _leading_entries(pair: _Pair, most: int) -> Tensor:
    """Where the filters of largest magnitudes have theirs, in the flattened output."""
    best, place = _magnitudes(pair).flatten(1).max(1)
    filters = best.topk(min(most, len(best))).indices
    return filters * math.prod(pair.last) + place[filters]


def _slopes(pair: _Pair, d: Tensor, x: Tensor, entries: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """``A2 D A1 x`` ``(N, ...)``, and the slopes in x and D of these entries, or of half the squared norms."""
    with torch.enable_grad():
        x, d = x.detach().requires_grad_(), d.detach().requires_grad_()
        y = apply(pair.K2, pair.geometry2, d * apply(pair.K1, pair.geometry1, x)).flatten(1)
        form = y.square() / 2 if entries is None else y.gather(1, entries[:, None])
        slope_x, slope_d = torch.autograd.grad(form.sum(), (x, d))
    return y.detach(), slope_x, slope_d


# --- checks -------------------------------------------------------------------------------------------------


def _layers(pair: _Pair) -> list[tuple[Tensor, ConvGeometry, tuple[int, ...]]]:
    return [(pair.K2, pair.geometry2, pair.middle), (pair.K1, pair.geometry1, pair.size)]


def _inputs(pair: _Pair) -> int:
    return pair.K1.shape[1] * pair.geometry1.groups


def _rounding(pair: _Pair) -> float:
    return 1 + ROUNDING * max(pair.K2.shape[0], pair.K2[0].numel(), pair.K1.shape[0], pair.K1[0].numel())


def _module(module: nn.Module, name: str) -> tuple[Tensor, ConvGeometry]:
    geometry = conv_geometry(module) if isinstance(module, CONVOLUTIONS) else None
    if geometry is None:
        raise InputError(f"{name}: expected a convolution whose forward is understood; got {type(module).__name__}")
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight, geometry


def _pair(K2: Tensor, geometry2: ConvGeometry, K1: Tensor, geometry1: ConvGeometry, size: Sequence[int]) -> _Pair:
    axes = K1.ndim - 2 if isinstance(K1, Tensor) else 0
    (K2, scale2), (K1, scale1) = _kernel(K2, geometry2, axes, "2"), _kernel(K1, geometry1, axes, "1")
    geometry2, geometry1 = replace(geometry2, mode="zeros"), replace(geometry1, mode="zeros")  # or no padding
    read = K2.shape[1] * geometry2.groups
    if len(K1) != read:
        raise InputError(f"K1: expected {read} output channels, as the second convolution reads; got {len(K1)}")
    size = tuple(size)
    if len(size) != axes or any(n < 1 for n in size):
        raise InputError(f"size: expected {axes} positive numbers, one an axis; got {size}")
    middle = _walked(K1, geometry1, size)
    last = _walked(K2, geometry2, middle)
    if min(*middle, *last) < 1:
        raise InputError(f"size: expected an input that both kernels fit on; got {size}, and then {middle}")
    return _Pair(K2, geometry2, K1, geometry1, scale2 * scale1, size, middle, last)


def _kernel(K: Tensor, geometry: ConvGeometry, axes: int, number: str) -> tuple[Tensor, float]:
    """The kernel in float64 over its largest magnitude, and this."""
    if not isinstance(K, Tensor) or K.is_complex() or K.numel() == 0 or K.ndim != axes + 2 or axes not in _TRANSPOSED:
        got = tuple(K.shape) if isinstance(K, Tensor) else type(K).__name__
        raise InputError(f"K{number}: expected a real kernel (out, in / groups, *kernel), axes as in K1; got {got}")
    if not bool(torch.isfinite(K).all()):
        raise InputError(f"K{number}: expected finite numbers; got {int((~torch.isfinite(K)).sum())} NaN or infinite")
    if geometry.mode != "zeros" and any(width for pad in geometry.padding for width in pad):
        raise InputError(f"geometry{number}: expected zero padding; got {geometry.mode}")
    if {len(geometry.stride), len(geometry.padding), len(geometry.dilation)} != {axes} or len(K) % geometry.groups:
        raise InputError(f"geometry{number}: expected {axes} axes, groups that divide {len(K)} filters; got {geometry}")
    K = K.detach().double().cpu()
    largest = float(K.abs().max())
    return K / (largest or 1.0), largest


def _walked(K: Tensor, geometry: ConvGeometry, size: Sequence[int]) -> tuple[int, ...]:
    """Size of the image after a convolution."""
    axes = zip(size, geometry.padding, geometry.spans(K.shape[2:]), geometry.stride, strict=True)
    return tuple((n + sum(pad) - span - 1) // s + 1 for n, pad, span, s in axes)
