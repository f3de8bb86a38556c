r"""Two consecutive convolutions in l_2, as linear maps on images: ``N_2 = max_D ||A2 D A1||_2``.

D is diagonal with entries in [0, 1], one for every pixel and channel between the two convolutions. The filter matrices
of two convolutions do not compose (``in`` columns times the taps of one against ``out`` rows of the other); only the
operators A1 and A2 do. Zeros padded to the image in the middle are a pattern D, which is why a bound on a torus holds
for images with a border. Theory page, section "Pairs of convolutions".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from brittle.bounds.pairs.multipliers import closed_form, eliminate, improve
from brittle.errors import InputError
from brittle.linear.conv_geometry import ConvGeometry
from brittle.linear.conv_symbol import frequencies, symbol
from brittle.linear.convolution import bounds_of
from brittle.linear.spectrum import largest_singular_value, raised

MOST_ENTRIES = 2e7
"""Entries of one batch of symbols that are kept in memory, of which there are several: 320 MB."""
MOST_MULTIPLICATIONS = 3e9
"""Multiplications up to which one decomposition of all symbols is worth its time: some ten seconds for all of them."""
SLACKS = (1.0, 1.02, 1.1, 1.3, 2.0)
"""Factors by which multipliers chosen at some frequencies are raised until they are feasible at all of them."""


class ConvPair(NamedTuple):
    """Both kernels over their largest magnitudes, how they walk, and the images before, between and after."""

    K2: Tensor
    geometry2: ConvGeometry
    K1: Tensor
    geometry1: ConvGeometry
    size: tuple[int, ...]
    middle: tuple[int, ...]
    last: tuple[int, ...]

    @classmethod
    def of(
        cls, K2: Tensor, geometry2: ConvGeometry, K1: Tensor, geometry1: ConvGeometry, size: Sequence[int]
    ) -> tuple[ConvPair, float]:
        """The pair after checks, and the product of what both kernels were divided by."""
        axes = K1.ndim - 2 if isinstance(K1, Tensor) else 0
        (K2, scale2), (K1, scale1) = _kernel(K2, geometry2, axes, "2"), _kernel(K1, geometry1, axes, "1")
        geometry2, geometry1 = replace(geometry2, mode="zeros"), replace(geometry1, mode="zeros")  # or no padding
        read = K2.shape[1] * geometry2.groups
        if len(K1) != read:
            raise InputError(f"K1: expected {read} output channels, as the second convolution reads; got {len(K1)}")
        size = tuple(size)
        if len(size) != axes or any(n < 1 for n in size):
            raise InputError(f"size: expected {axes} positive numbers, one an axis; got {size}")
        middle = geometry1.size_after(K1.shape[2:], size)
        last = geometry2.size_after(K2.shape[2:], middle)
        if min(*middle, *last) < 1:
            raise InputError(f"size: expected an input that both kernels fit on; got {size}, and then {middle}")
        return cls(K2, geometry2, K1, geometry1, size, middle, last), scale2 * scale1

    def torus(self, phases: Sequence[int]) -> list[int]:
        """Points of the torus: it holds both images with the wider of their paddings, and every output position."""
        g2, g1 = self.geometry2, self.geometry1
        axes = zip(self.size, self.middle, self.last, g1.padding, g2.padding, g1.stride, g2.stride, phases, strict=True)
        return [
            -(-max(-(-(n + max(pad1)) // s1), middle + max(pad2), (last - 1) * s2 + 1) // s)
            for n, middle, last, pad1, pad2, s1, s2, s in axes
        ]

    def symbols(self, phases: Sequence[int], grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """``K2(w)`` ``(F, out, h * phases)`` and ``K1(w)`` ``(F, h * phases, ...)``, by phases of the middle image.

        Position ``phases * q + r`` of the middle image reads what a stride of ``phases * stride`` reads with the
        padding lessened by ``stride * r``. Rows and columns that meet nothing are left out.
        """
        g1 = self.geometry1
        second = symbol(self.K2, replace(self.geometry2, stride=tuple(phases)), grid)
        strides = tuple(s * t for s, t in zip(phases, g1.stride, strict=True))
        firsts = []
        for phase in itertools.product(*(range(s) for s in phases)):
            shifts = [r * s for r, s in zip(phase, g1.stride, strict=True)]
            pads = tuple((before - d, after + d) for (before, after), d in zip(g1.padding, shifts, strict=True))
            firsts.append(symbol(self.K1, replace(g1, stride=strides, padding=pads), grid))
        first = torch.stack(firsts, 2).flatten(1, 2)
        alive = second.any(0).any(0) & first.any(0).any(1)
        return second[:, :, alive], first[:, alive]


def upper(
    K2: Tensor,
    geometry2: ConvGeometry,
    K1: Tensor,
    geometry1: ConvGeometry,
    size: Sequence[int],
    *,
    product: float | None = None,
    steps: int = 0,
    most: float = MOST_MULTIPLICATIONS,
) -> dict[str, float]:
    r"""Certified upper bounds of ``max_D ||A2 D A1||_2`` by name; the least of them is the one to use.

    Always "product", of the two norms' upper bounds. On a torus that holds either image with its padding, with the
    matrices ``K2(w), K1(w)`` at frequency w, where that is affordable,

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
        size: Spatial size of the first convolution's input.
        product: Upper bound of ``||A2||_2 ||A1||_2`` where it is known already.
        steps: Steps of optimisation of the multipliers.
        most: Multiplications of one decomposition of all symbols above which a torus counts as too large.

    Returns:
        Upper bounds in units of K2 times K1.

    Raises:
        InputError: Padding other than zeros, kernels that do not chain or are not finite, or a size that does not
            hold both kernels.

    >>> kernel, geometry = torch.tensor([[[1.0, -1.0]]]), ConvGeometry((1,), ((0, 0),), (1,), 1)
    >>> bounds = upper(kernel.abs(), geometry, kernel, geometry, (9,))
    >>> round(bounds["product"], 2), round(bounds["half"], 2)
    (3.94, 2.95)
    """
    pair, scale = ConvPair.of(K2, geometry2, K1, geometry1, size)
    if product is None:
        layers = [(pair.K2, pair.geometry2, pair.middle), (pair.K1, pair.geometry1, pair.size)]
        product = scale * math.prod(bounds_of(K, g, 2, n, search=False).upper for K, g, n in layers)
    side = max(max(len(K), K[0].numel()) for K in (pair.K2, pair.K1))
    torus = _torus_bounds(pair, steps, most) if product else {}
    return {"product": product} | {name: scale * raised(bound, side) for name, bound in torus.items()}


def _torus_bounds(pair: ConvPair, steps: int, most: float) -> dict[str, float]:
    """The bounds on the coarsest torus that is affordable: phases of the second convolution's stride, or none."""
    stride = pair.geometry2.stride
    for phases in dict.fromkeys((stride, tuple(1 for _ in stride))):
        grid = pair.torus(phases)
        inner = len(pair.K1) * math.prod(phases)
        outer = pair.K1.shape[1] * pair.geometry1.groups * math.prod((*phases, *pair.geometry1.stride))
        entries = float(frequencies(grid)) * inner * max(inner, outer, len(pair.K2))
        if entries <= MOST_ENTRIES and entries * inner <= most:
            return _symbol_bounds(*pair.symbols(phases, grid), steps)
    return {}


def _symbol_bounds(B: Tensor, C: Tensor, steps: int) -> dict[str, float]:
    """Of ``B(w) D C(w)`` where D mixes the frequencies. Multipliers are chosen at those of largest norms."""
    if not B.shape[2]:
        return {"half": 0.0}
    second, first, composed = (largest_singular_value(A)[0] for A in (B, C, B @ C))
    bounds = {"half": float(composed.max() + second.max() * first.max()) / 2}
    P = B.mH @ B
    # Multipliers must serve all frequencies but are made by few: those where one of the norms is largest.
    heavy = [(second * first + composed, 12), (second, 4), (first, 4)]
    chosen = torch.cat([norms.topk(min(most, len(P))).indices for norms, most in heavy]).unique()
    t = closed_form(P[chosen], C[chosen])
    for slack in SLACKS:
        if (bound := _multiplier_bound(P, C, t * slack)) < math.inf:
            bounds["multipliers"] = bound
            if steps:
                bounds["optimised multipliers"] = _multiplier_bound(P, C, improve(P, C, t * slack, steps))
            break
    return {name: bound for name, bound in bounds.items() if bound < math.inf}


def _multiplier_bound(P: Tensor, C: Tensor, t: Tensor) -> float:
    """The bound of these multipliers; inf where they are not feasible."""
    R = eliminate(P, t)
    if R is None:
        return math.inf
    G, info = torch.linalg.cholesky_ex(R)  # C^H R C has the eigenvalues of the Gram matrices of G^H C
    return math.inf if bool(info.any()) else float(largest_singular_value(G.mH @ C)[0].max())


def _kernel(K: Tensor, geometry: ConvGeometry, axes: int, number: str) -> tuple[Tensor, float]:
    """The kernel in float64 over its largest magnitude, and this."""
    if not isinstance(K, Tensor) or K.is_complex() or K.numel() == 0 or K.ndim != axes + 2 or axes not in (1, 2, 3):
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
