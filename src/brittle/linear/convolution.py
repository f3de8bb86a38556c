r"""Operator norms of convolutions: the true linear map on images, not the reshaped kernel.

A kernel ``K`` of shape ``(out, in / groups, *kernel)`` has a *filter matrix* ``R`` with one filter a row, whose norms
describe compressibility, and an *operator* ``A`` on images, whose norms bound sensitivity. They differ:
``sigma_1(R) <= ||A||_2 <= sqrt(mu) sigma_1(R)`` with mu the largest number of patches that share a pixel.
Formulas and proofs are on the theory page, section "Operator norms". Everything works for 1, 2 and 3 spatial axes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brittle.errors import InputError
from brittle.linear.compressibility import singular_values
from brittle.linear.conv_geometry import CONVOLUTIONS, ConvGeometry, conv_geometry
from brittle.linear.conv_symbol import largest_symbol_norm
from brittle.linear.spectrum import ROUNDING, power_iteration, raised
from brittle.results import NormBounds
from brittle.results.methods import OperatorMethod

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
AFFORDABLE = 2e10
"""Multiplications up to which the exact torus, or a finer grid, is worth its time: some ten seconds on two cores."""


def filter_matrix(K: Tensor) -> Tensor:
    """One filter a row: ``(out, (in / groups) * prod(kernel))``. Its norms are not the operator's."""
    return K.flatten(1)


def apply(K: Tensor, geometry: ConvGeometry, x: Tensor) -> Tensor:
    """The convolution without bias, ``(N, in, *size)`` to ``(N, out, *size_out)``."""
    widths = [width for pair in reversed(geometry.padding) for width in pair]
    mode = "constant" if geometry.mode == "zeros" else geometry.mode
    x = F.pad(x, widths, mode=mode) if any(widths) else x
    conv = _CONV[K.ndim - 2]
    return conv(x, K, stride=geometry.stride, dilation=geometry.dilation, groups=geometry.groups)


def apply_transposed(K: Tensor, geometry: ConvGeometry, y: Tensor, size: Sequence[int]) -> Tensor:
    """The transposed convolution without bias: ``A^T y``, ``(N, out, *)`` to ``(N, in, *size)``.

    Args:
        K: Kernel of the convolution A, ``(out, in / groups, *kernel)``.
        geometry: How A walks, padded with zeros. Where A would yield more positions than y has, they count as zero.
        y: What is read.
        size: Spatial size of the result.
    """
    transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[K.ndim - 3]
    whole = transposed(y, K, None, geometry.stride, 0, 0, geometry.groups, geometry.dilation)
    axes = list(zip(whole.shape[2:], size, geometry.padding, strict=True))
    return F.pad(whole, [width for full, n, (before, _) in reversed(axes) for width in (-before, n + before - full)])


def _adjoint(K: Tensor, geometry: ConvGeometry, x: Tensor, y: Tensor | None = None) -> Tensor:
    """``A^T y`` for inputs of x's shape (y: ones when left out)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out = apply(K, geometry, x)
        return torch.autograd.grad(out, x, torch.ones_like(out) if y is None else y)[0]


def has_interior(K: Tensor, geometry: ConvGeometry, size: Sequence[int]) -> bool:
    """Whether some output position sees no padding: then the filter matrix's norms are lower bounds, any mode."""
    axes = zip(geometry.spans(K.shape[2:]), geometry.stride, geometry.padding, size, strict=True)
    return all(-(-before // step) * step - before + span < n for span, step, (before, _), n in axes)


def patch_overlap(K: Tensor, geometry: ConvGeometry, size: Sequence[int] | None) -> float:
    """mu, the largest number of patches that contain one pixel: ``||A||_2 <= sqrt(mu) sigma_1(R)``.

    Exact for a known ``size``; otherwise the count for zero padding, which no image exceeds (nor one with plain
    circular padding at stride 1).
    """
    if size is not None:
        one = torch.ones(1, 1, *K.shape[2:], dtype=torch.float64)
        plain = ConvGeometry(geometry.stride, geometry.padding, geometry.dilation, 1, geometry.mode)
        return float(_adjoint(one, plain, torch.ones(1, 1, *size, dtype=torch.float64)).max())
    axes = zip(K.shape[2:], geometry.stride, geometry.dilation, strict=True)
    return float(math.prod(-(-k * math.gcd(s, d) // s) for k, s, d in axes))


def norm_inf(K: Tensor, geometry: ConvGeometry, size: Sequence[int] | None = None) -> NormBounds:
    """The l_inf operator norm: the largest entry of ``conv_|K|(1)``.

    Exact for zero padding, and for every padding when some output position sees no padding (then it is the largest
    filter l1 norm); otherwise an upper bound beside the norm of the row that attains it. Without ``size`` the input
    is taken to be large enough for such a position.

    Args:
        K: Kernel ``(out, in / groups, *kernel)``.
        geometry: How it walks.
        size: Spatial size of the input.
    """
    K = K.detach().double().cpu()
    if size is None or has_interior(K, geometry, size):
        norm = float(filter_matrix(K).abs().sum(1).max())
        return NormBounds(math.inf, norm, norm, OperatorMethod.INTERIOR_FILTER)
    x = torch.ones(1, K.shape[1] * geometry.groups, *size, dtype=torch.float64)
    sums = apply(K.abs(), geometry, x)
    upper = float(sums.max())
    if geometry.mode == "zeros":
        return NormBounds(math.inf, upper, upper, OperatorMethod.EXACT)
    row = torch.zeros_like(sums).view(-1).index_fill(0, sums.argmax(), 1).view_as(sums)
    lower = float(_adjoint(K, geometry, x, row).abs().sum())
    return NormBounds(math.inf, min(lower, upper), upper, OperatorMethod.ABSOLUTE_KERNEL)


def norm_1(K: Tensor, geometry: ConvGeometry, size: Sequence[int] | None = None) -> NormBounds:
    """The l_1 operator norm: the largest entry of the transposed convolution of ``|K|`` with ones.

    Exact for zero padding; otherwise an upper bound beside a lower bound of 0. Without ``size`` some pixel may be met
    by every tap of its stride class (upper), and every pixel of an inner patch is met by one tap (lower); padding
    that repeats pixels has then no upper bound, apart from plain circular padding at stride 1.
    """
    K = K.detach().double().cpu()
    if size is None:
        lower = max(float(part.abs().sum(0).max()) for part in K.chunk(geometry.groups))
        upper = max(float(taps.abs().sum((0, *range(2, K.ndim))).max()) for taps in _stride_classes(K, geometry))
        bounded = geometry.size_free(K.shape[2:])
        return NormBounds(
            1.0,
            lower,
            upper if bounded else math.inf,
            OperatorMethod.STRIDE_CLASSES if bounded else OperatorMethod.NOT_BOUNDED,
        )
    x = torch.ones(1, K.shape[1] * geometry.groups, *size, dtype=torch.float64)
    upper = float(_adjoint(K.abs(), geometry, x).max())
    if geometry.mode == "zeros":
        return NormBounds(1.0, upper, upper, OperatorMethod.EXACT)
    return NormBounds(1.0, 0.0, upper, OperatorMethod.ABSOLUTE_KERNEL)


def _stride_classes(K: Tensor, geometry: ConvGeometry) -> list[Tensor]:
    """Per group of output channels, the taps that can meet one and the same pixel: offsets equal modulo stride."""
    axes = []
    for k, step, d in zip(K.shape[2:], geometry.stride, geometry.dilation, strict=True):
        offsets = [u * d % step for u in range(k)]
        axes.append([[u for u in range(k) if offsets[u] == r] for r in sorted(set(offsets))])
    classes = []
    for choice in itertools.product(*axes):
        taps = K
        for axis, kept in enumerate(choice):
            taps = taps.index_select(axis + 2, torch.tensor(kept))
        classes += list(taps.chunk(geometry.groups, 0))
    return classes


def torus_bound(K: Tensor, geometry: ConvGeometry, size: Sequence[int], *, polyphase: bool = False) -> float:
    """Upper bound of the l_2 operator norm: the convolution embedded in a circular one.

    Zero padding: every row of ``A`` is a row of the circular convolution on ``n + pad`` points, whose norm is the
    largest singular value of the symbol over the frequency grid. With ``polyphase`` the input is split into its
    stride classes first, which is tighter for strides above 1. Exact for circular padding at stride 1.

    Raises:
        InputError: The padding mode is neither zeros nor circular, or circular and wider than the kernel needs.
    """
    K = K.detach().double().cpu()
    if not geometry.embeds(K.shape[2:]):
        raise InputError(f"geometry: expected zero or plain circular padding; got {geometry.mode}")
    grid, walk = geometry.torus(size, polyphase=polyphase)
    if geometry.mode == "circular" and any(n % s for n, s in zip(size, walk.stride, strict=True)):
        raise InputError(
            f"size: expected multiples of the stride {walk.stride} for circular padding; got {tuple(size)}"
        )
    return _raised(largest_symbol_norm(K, walk, grid), K)


def coarse_grid_bound(K: Tensor, geometry: ConvGeometry, *, oversampling: int = 4) -> float:
    """Upper bound of the l_2 operator norm for images of any size.

    ``||symbol(w) v||^2`` is a trigonometric polynomial of degree D per axis, so its supremum is at most its maximum
    over N > 2 D equispaced points, over ``cos(pi D / N)`` for each axis (M. Riesz; Ehlich & Zeller 1964). N is
    ``oversampling`` times D; for two axes 4 loses at most 41 %, 8 at most 8 %.

    Raises:
        InputError: As for :func:`torus_bound`.
    """
    K = K.detach().double().cpu()
    if oversampling < 3:
        raise InputError(f"oversampling: expected at least 3; got {oversampling}")
    if not geometry.size_free(K.shape[2:]):
        raise InputError(f"geometry: expected zero or plain circular padding; got {geometry.mode}")
    grid = geometry.coarse_grid(K.shape[2:], oversampling)
    slack = math.prod(math.cos(math.pi / oversampling) for n in grid if n > 1)
    return _raised(largest_symbol_norm(K, geometry, grid) / math.sqrt(slack), K)


def _raised(norm: float, K: Tensor) -> float:
    return raised(norm, max(K.shape[0], K[0].numel()))


def norm_2_lower(
    K: Tensor, geometry: ConvGeometry, size: Sequence[int], *, iterations: int = 30, seed: int = 0
) -> float:
    """Lower bound of the l_2 operator norm by power iteration with the convolution and its adjoint.

    The iterations run in float32; the value is ``||A v|| / ||v||`` in float64 of the vector they end at.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(1, K.shape[1] * geometry.groups, *size, generator=generator, dtype=torch.float32)
    single = K.detach().float().cpu()
    _, v = power_iteration(lambda v: _adjoint(single, geometry, v, apply(single, geometry, v)), start, iterations)
    v = v.double()
    return float(apply(K.detach().double().cpu(), geometry, v).norm() / v.norm())


def norm_2(K: Tensor, geometry: ConvGeometry, size: Sequence[int] | None = None, *, search: bool = True) -> NormBounds:
    """Certified bounds on the l_2 operator norm: the least of the upper bounds, the larger of two lower ones.

    Upper: ``sqrt(mu) sigma_1(R)`` (filter matrix), ``sqrt(||A||_1 ||A||_inf)`` (schur), and :func:`torus_bound` (for
    strides above 1 also its polyphase form) or, without ``size`` and where the torus would take too long,
    :func:`coarse_grid_bound`, which no torus exceeds. Lower: power iteration, and ``sigma_1(R)`` when some output
    position sees no padding. Kernels of one tap without padding modes are exact: ``sigma_1(R)``.

    Args:
        K: Kernel ``(out, in / groups, *kernel)``.
        geometry: How it walks.
        size: Spatial size of the input; without it, bounds that hold for every size on which some output
            position sees no padding.
        search: Whether to look for a larger lower bound by power iteration.
    """
    K = K.detach().double().cpu()
    sigma = float(singular_values(filter_matrix(K), geometry.groups)[0])
    pads = any(width for pair in geometry.padding for width in pair)
    interior = size is None or has_interior(K, geometry, size)
    if math.prod(K.shape[2:]) == 1 and interior and (geometry.mode == "zeros" or not pads):
        return NormBounds(2.0, sigma, sigma, OperatorMethod.EXACT)
    lower = sigma * (1 - ROUNDING * max(filter_matrix(K).shape)) if interior else 0.0
    if size is not None and search:
        lower = max(lower, norm_2_lower(K, geometry, size))
    uppers = _norm_2_uppers(K, geometry, size, sigma)
    method = min(uppers, key=uppers.__getitem__)
    return NormBounds(2.0, min(lower, uppers[method]), uppers[method], method)


def _norm_2_uppers(K: Tensor, geometry: ConvGeometry, size: Sequence[int] | None, sigma: float) -> dict[str, float]:
    uppers: dict[str, float] = {}
    size_free = geometry.size_free(K.shape[2:])
    if size is not None or size_free:
        uppers[OperatorMethod.FILTER_MATRIX] = _raised(math.sqrt(patch_overlap(K, geometry, size)) * sigma, K)
        schur = norm_1(K, geometry, size).upper * norm_inf(K, geometry, size).upper
        uppers[OperatorMethod.SCHUR] = _raised(math.sqrt(schur), K)
    if size is not None and geometry.embeds(K.shape[2:]):
        strided = max(geometry.stride) > 1 and geometry.mode == "zeros"
        for method in (OperatorMethod.TORUS, OperatorMethod.POLYPHASE) if strided else (OperatorMethod.TORUS,):
            grid, walk = geometry.torus(size, polyphase=method == OperatorMethod.POLYPHASE)
            if _symbol_cost(K, grid, walk.stride) <= AFFORDABLE or not size_free:
                uppers[method] = torus_bound(K, geometry, size, polyphase=method == OperatorMethod.POLYPHASE)
    if size_free and not {OperatorMethod.TORUS, OperatorMethod.POLYPHASE} & uppers.keys():
        cheap = _symbol_cost(K, geometry.coarse_grid(K.shape[2:], 8), geometry.stride) <= AFFORDABLE / 2
        uppers[OperatorMethod.COARSE_GRID] = coarse_grid_bound(K, geometry, oversampling=8 if cheap else 4)
    return uppers or {OperatorMethod.NOT_BOUNDED: math.inf}


def _symbol_cost(K: Tensor, grid: Sequence[int], stride: Sequence[int]) -> float:
    """Multiplications, up to a constant, of the decompositions on a grid."""
    side = min(K.shape[0], K.shape[1] * math.prod(stride))
    return math.prod(grid) / 2 * side**3


def operator_norm_bounds(module: nn.Module, p: float, size: Sequence[int] | None = None) -> NormBounds:
    """Bounds on the operator norm of a convolution module as a linear map on images.

    Args:
        module: ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``.
        p: 1, 2 or inf.
        size: Spatial size of its input; None: bounds for every size on which some output position sees no padding.

    Returns:
        Lower and upper bound with the method that attained the upper one; equal where the norm is exact.

    Raises:
        InputError: Another module or p, or an input smaller than the kernel.
    """
    geometry = conv_geometry(module) if isinstance(module, CONVOLUTIONS) else ConvGeometry.of(module)
    if geometry is None:
        raise InputError(f"module: expected a forward that is understood; {type(module).__name__} has one of its own")
    K = module.weight
    assert isinstance(K, Tensor)
    return bounds_of(K, geometry, p, size)


def bounds_of(
    K: Tensor, geometry: ConvGeometry, p: float, size: Sequence[int] | None, *, search: bool = True
) -> NormBounds:
    """:func:`operator_norm_bounds` from a kernel and its geometry; ``search`` as in :func:`norm_2`."""
    if p not in (1, 2, math.inf):
        raise InputError(f"p: expected 1, 2 or inf; got {p}")
    if not torch.isfinite(K).all():
        raise InputError("weight: expected finite numbers; got NaN or infinite ones")
    if size is not None:
        geometry.check_size(K.shape[2:], size)
    if p == 2:
        return norm_2(K, geometry, size, search=search)
    return norm_1(K, geometry, size) if p == 1 else norm_inf(K, geometry, size)
