"""What one layer's weights tell: a row of the layer table, and the sizes of images that convolutions read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from brittle.bounds.layer import entries_kept, row_bound, spectral_bound
from brittle.linear.compressibility import (
    effective_sparsity,
    k_term_error_curve,
    row_norms,
    singular_values,
    spectral_summary,
    spread,
)
from brittle.linear.convolution import bounds_of
from brittle.linear.norms import thin
from brittle.models.activations import watch_calls
from brittle.models.borrow import frozen, zero_like
from brittle.models.forward import output_of
from brittle.models.layers import LayerView
from brittle.results import FRACTIONS, PROFILE_POINTS, LayerResult, NormBounds
from brittle.results.methods import OperatorMethod


def measure_layer(view: LayerView, norms: Sequence[float], input_size: tuple[int, ...] | None = None) -> LayerResult:
    """Everything about one layer that its weights tell.

    Args:
        view: The layer.
        norms: Exponents of the operator norms wanted: 2, inf.
        input_size: Spatial size of a convolution's input; without it, norms hold for every large enough size.

    Returns:
        Compressibility, ranks, norms with their sides, and Theorem 3.1, computed in float64 on the CPU.
    """
    W = view.matrix.double().cpu()
    nu, sigma = row_norms(W), singular_values(W, view.groups)
    ranks = spectral_summary(sigma)
    k_rows, k_columns, k_spectrum = ([entries_kept(share, d) for share in FRACTIONS] for d in (*W.shape, len(sigma)))
    heads = W.view(view.heads, -1).norm(dim=1) if view.heads else W.new_empty(0)
    k_heads = [entries_kept(share, view.heads) for share in FRACTIONS] if view.heads else []
    n, frobenius, row_curve = W.shape[1], float(W.norm()), k_term_error_curve(W, q=2)
    return LayerResult(
        name=view.name,
        kind=view.kind,
        shape=(W.shape[0], n),
        parameters=view.parameters,
        row_error=tuple(k_term_error_curve(nu)[k_rows].tolist()),
        spectral_error=tuple(k_term_error_curve(sigma)[k_spectrum].tolist()),
        row_spread=tuple(float(spread(nu, k)) for k in k_rows),
        spectral_spread=tuple(float(spread(sigma, k)) for k in k_spectrum),
        row_norms=_profile(nu),
        singular_values=_profile(sigma),
        spectrum=len(sigma),
        rank=int(ranks.rank),
        stable_rank=float(ranks.stable_rank),
        nuclear_spectral_ratio=float(ranks.nuclear_spectral_ratio),
        nuclear_frobenius_ratio=float(ranks.nuclear_frobenius_ratio),
        effective_rank=float(ranks.effective_rank),
        effective_sparsity=float(effective_sparsity(W.flatten())),
        frobenius=frobenius,
        filter_norm_inf=float(nu.max()),
        filter_norm_2=float(sigma[0]),
        operator_norms=tuple(_operator_norms(view, norms, input_size, nu, sigma)),
        bounds=(
            *(
                row_bound(nu, row_curve[:, k_row], k, k_row, n=n, scale=frobenius)
                for k, k_row in zip(k_rows, k_columns, strict=True)
            ),
            *(spectral_bound(sigma, k) for k in k_spectrum),
        ),
        input_size=input_size if view.convolution else None,
        degenerate=not bool(W.any()),
        head_norms=tuple(heads.tolist()),
        head_error=tuple(k_term_error_curve(heads)[k_heads].tolist()) if view.heads else (),
    )


def input_sizes(
    model: nn.Module, views: Sequence[LayerView], shape: Sequence[int], *, argument: str = "input_shape"
) -> dict[str, tuple[int, ...]]:
    """Spatial size of every convolution's input, from one forward pass on zeros.

    Args:
        model: The network; left bit-equal.
        views: Its layers.
        shape: Shape of one input without the batch axis.
        argument: What the caller calls the origin of that shape, for the error.

    Returns:
        Sizes by layer name, for the convolutions that ran.

    Raises:
        InputError: The model cannot run on that shape.
    """
    shapes: dict[nn.Module, torch.Size] = {}

    def note(module: nn.Module, read: Tensor | None, _: Tensor | None) -> None:
        if read is not None:
            shapes.setdefault(module, read.shape)

    convolutions = [view for view in views if view.convolution]
    with frozen(model), torch.no_grad(), watch_calls((view.module for view in convolutions), note):
        output_of(model, zero_like(model).new_zeros(1, *shape), argument)
    return {
        view.name: tuple(shapes[view.module][2 - view.weight.ndim :]) for view in convolutions if view.module in shapes
    }


def _operator_norms(
    view: LayerView, norms: Sequence[float], size: tuple[int, ...] | None, nu: Tensor, sigma: Tensor
) -> list[NormBounds]:
    if not view.convolution:
        exact = {2.0: float(sigma[0]), math.inf: float(nu.max())}
        return [NormBounds(p, exact[p], exact[p], OperatorMethod.EXACT) for p in norms]
    if view.geometry is None:
        return []
    every = (bounds_of(view.weight, view.geometry, p, size) for p in norms)
    return [bounds for bounds in every if math.isfinite(bounds.upper)]


def _profile(v: Tensor) -> tuple[float, ...]:
    """The vector, largest first, thinned evenly to at most PROFILE_POINTS entries (both ends kept)."""
    return tuple(thin(v.sort(descending=True).values, PROFILE_POINTS).tolist())
