"""Consecutive layers of a network, and what two of them compute together when nothing stands between them.

What penalties of pairs read; theory page, "Interventions".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv_transpose2d

from brittle.errors import InputError
from brittle.models.selection import Chosen, chosen_layers, matrix

MIXES = (nn.GLU, nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax)
"""Activations of torch that do not act on every number by itself."""


def composable(model: nn.Module, layers: Sequence[str] | None, *, kernels: bool) -> list[tuple[Chosen, Chosen]]:
    """Every two chosen layers that follow one another in a Sequential and whose product is defined.

    Args:
        model: Any module.
        layers: Names, as :func:`brittle.models.selection.chosen_layers` takes them.
        kernels: Whether the second may be a convolution larger than 1 x 1.

    Raises:
        InputError: There are none.
    """
    chosen = chosen_layers(model, layers)
    pairs = [
        (first, second)
        for first, between, second in _consecutive(model, chosen)
        if _is_defined(first, second) and (_is_pointwise(second) or (kernels and all(map(_keeps_positions, between))))
    ]
    if not pairs:
        names = ", ".join(layer.name for layer in chosen)
        raise InputError(f"layers: expected two consecutive layers of one Sequential that compose; got {names}")
    return pairs


def compose(first: Chosen, second: Chosen) -> Tensor:
    """The product of two layers, or their composed kernel, as a matrix ``(out, ...)`` in float32 at least."""
    W1, W2 = in_single(matrix(first)), in_single(matrix(second))
    inner, outer = first.modules[0], second.modules[0]
    with torch.autocast(W1.device.type, enabled=False):
        if _is_pointwise(second):
            return W2 @ W1
        assert isinstance(inner, nn.Conv2d)
        assert isinstance(outer, nn.Conv2d)
        kernels = W1.unflatten(1, (-1, *inner.kernel_size)), W2.unflatten(1, (-1, *outer.kernel_size))
        return composed_kernel(*kernels, inner.stride, inner.dilation, outer.dilation).flatten(1)


def composed_kernel(
    first: Tensor,
    second: Tensor,
    stride: tuple[int, ...] = (1, 1),
    dilation: tuple[int, ...] = (1, 1),
    second_dilation: tuple[int, ...] = (1, 1),
) -> Tensor:
    """The kernel of two convolutions, one behind the other: ``K[o, i, t] = sum second[o, c, u] first[c, i, v]``.

    The sum is over channels c and over all taps u and v with ``t = stride * second_dilation * u + dilation * v``. Where
    no padding is read, the two compute together what a convolution with K does, at the product of their strides.

    Args:
        first: ``(c, i, k1, k1')``.
        second: ``(o, c, k2, k2')``.
        stride: Of the first convolution.
        dilation: Of the first convolution.
        second_dilation: Of the second.

    Returns:
        ``(o, i, k, k')`` with ``k = stride * second_dilation * (k2 - 1) + dilation * (k1 - 1) + 1``.
    """
    steps = [a * b for a, b in zip(stride, second_dilation, strict=True)]
    return conv_transpose2d(second, first, stride=steps, dilation=dilation)


def in_single(W: Tensor) -> Tensor:
    """In float32 at least."""
    return W.to(torch.promote_types(W.dtype, torch.float32))


def _consecutive(model: nn.Module, chosen: Sequence[Chosen]) -> Iterator[tuple[Chosen, list[nn.Module], Chosen]]:
    """Every two chosen layers that follow one another in a Sequential, and the modules between them."""
    owner = {module: layer for layer in chosen for module in layer.modules}
    nested = {part for module in model.modules() if type(module) is nn.Sequential for part in module}
    for module in model.modules():
        if type(module) is not nn.Sequential or module in nested:
            continue
        last: Chosen | None = None
        between: list[nn.Module] = []
        for part in _flatten(module):
            layer = owner.get(part)
            if layer is None and not any(True for _ in part.parameters()):
                between.append(part)
                continue
            if last is not None and layer is not None and layer is not last:
                yield last, between, layer
            # A layer with parameters that was not chosen leaves None: nothing is consecutive across it.
            last, between = layer, []


def _flatten(sequence: nn.Sequential) -> Iterator[nn.Module]:
    for part in sequence:
        if type(part) is nn.Sequential:
            yield from _flatten(part)
        else:
            yield part


def _is_defined(first: Chosen, second: Chosen) -> bool:
    """Whether two layers are of one kind and group, and one has as many inputs as the other outputs."""
    last, following = first.modules[-1], second.modules[0]
    if isinstance(last, nn.Linear) and isinstance(following, nn.Linear):
        return last.out_features == following.in_features
    if isinstance(last, nn.Conv2d) and isinstance(following, nn.Conv2d):
        ungrouped = getattr(first.modules[0], "groups", 1) == following.groups == 1
        return ungrouped and last.out_channels == following.in_channels
    return False


def _is_pointwise(layer: Chosen) -> bool:
    module = layer.modules[0]
    return not isinstance(module, nn.Conv2d) or module.kernel_size == (1, 1)


def _keeps_positions(module: nn.Module) -> bool:
    """Whether a module without parameters acts on every number by itself."""
    elementwise = type(module).__module__ == nn.ReLU.__module__ or isinstance(module, nn.Identity | nn.Dropout)
    return elementwise and not isinstance(module, MIXES)
