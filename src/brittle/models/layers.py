"""The layer view: every weight matrix of a network, by name, and the name of everything that has none.

Nothing is guessed from names of classes: a module is read when its type says what its weight means.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from brittle.errors import InputError
from brittle.linear.conv_geometry import ConvGeometry, conv_geometry, is_stock
from brittle.models.borrow import frozen
from brittle.results import NotMeasured

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_NORMALISATIONS = (
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.instancenorm._InstanceNorm,
)
_UNREAD: list[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str]] = [
    (_NORMALISATIONS, "scale and shift of a normalisation: no matrix"),
    ((nn.Embedding, nn.EmbeddingBag), "look-up table: not a linear map of the input"),
    (nn.modules.conv._ConvTransposeNd, "transposed convolution: no rule to read its operator"),
    (nn.RNNBase, "recurrent: its matrices are applied an unknown number of times"),
    ((nn.Bilinear,), "bilinear: not a linear map of the input"),
    ((nn.PReLU,), "slope of an activation: no matrix"),
]


@dataclass(frozen=True)
class LayerView:
    """One weight matrix of a network.

    Attributes:
        name: Qualified name; parts of one parameter are told apart by a suffix (``attn.in_proj.q``).
        kind: Type, with what makes the matrix special.
        module: The module that reads the layer's input (of a low-rank pair, the first).
        output: The module that yields the layer's output (of a low-rank pair, the second); None when the layer is
            only a part of a fused module's output.
        weight: Detached weight, ``(m, n)`` or ``(out, in / groups, *kernel)``; a pair's product.
        groups: Groups of a convolution.
        geometry: How a convolution walks over its input; None for dense layers, and for convolutions whose
            ``forward`` is not understood.
        parameters: Weight entries stored.
    """

    name: str
    kind: str
    module: nn.Module
    output: nn.Module | None
    weight: Tensor
    groups: int = 1
    geometry: ConvGeometry | None = None
    parameters: int = 0

    @property
    def matrix(self) -> Tensor:
        """``(m, n)``: rows are output neurons or filters, in the weight's type."""
        return self.weight.flatten(1)

    @property
    def convolution(self) -> bool:
        """Whether the matrix is a filter matrix and not the operator itself."""
        return self.weight.ndim > 2


class Layers(NamedTuple):
    """What :func:`read_layers` returns."""

    views: list[LayerView]
    unread: list[NotMeasured]


def read_layers(model: nn.Module) -> Layers:
    """Every layer with its matrix, and every module or parameter that cannot be read, with the reason.

    Read are Linear, Conv1d, Conv2d and Conv3d (with groups), subclasses and parametrised ones included; two such
    modules that follow each other in a ``Sequential`` through a bottleneck (a low-rank pair: Linear to Linear, or a
    convolution to a 1 x 1 convolution), as the product that they compute; the fused query, key and value weights of
    ``nn.MultiheadAttention`` and of attention modules that hold a ``qkv`` Linear beside ``num_heads``, as three.

    Args:
        model: Any module; only read.

    Returns:
        ``views`` and ``unread``, in the order of ``model.named_modules()``; shared modules appear once.

    Raises:
        InputError: A weight holds NaN or infinite numbers.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    with frozen(model):  # in training mode, reading a parametrised weight may change its buffers
        return _read_layers(model)


def _read_layers(model: nn.Module) -> Layers:
    layers, seen = Layers([], []), set[nn.Module]()
    for module in model.modules():
        if isinstance(module, ParametrizationList):
            seen |= set(module.modules())
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    pairs = low_rank_pairs(model)
    for name, module in model.named_modules():
        if module in seen:
            continue
        if (second := pairs.get(module)) is not None:
            seen.add(second)
            layers.views.append(_pair_view(name, module, second))
        elif isinstance(module, nn.Linear | Conv) and (reason := _unreadable(module)) is None:
            layers.views.extend(_module_views(name, module, parents.get(module)))
        elif isinstance(module, nn.MultiheadAttention):
            layers.views.extend(_attention_views(name, module))
            kind = type(module).__name__
            if module.bias_k is not None:
                layers.unread.append(NotMeasured(name or kind, "bias_k, bias_v: tokens added to the sequence"))
        elif (reason := _reason(module)) is not None:
            layers.unread.append(NotMeasured(name or type(module).__name__, reason))
    for view in layers.views:
        if not torch.isfinite(view.weight).all():
            raise InputError(f"model: expected finite weights; got NaN or infinite ones in layer {view.name!r}")
    return layers


def _unreadable(module: nn.Module) -> str | None:
    weight = module.weight
    if not isinstance(weight, Tensor):
        return f"weight is a {type(weight).__name__}, not a tensor"
    if weight.is_meta or isinstance(weight, nn.UninitializedParameter):
        return "weight is not initialised"
    if weight.is_complex() or not weight.is_floating_point() or weight.numel() == 0:
        return f"weight of type {weight.dtype} and shape {tuple(weight.shape)}: expected real numbers"
    return None


def _reason(module: nn.Module) -> str | None:
    """Why a module that owns parameters has no matrix; None when it owns none."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    if not names:
        return None
    if isinstance(module, nn.Linear | Conv):
        return _unreadable(module)
    for types, reason in _UNREAD:
        if isinstance(module, types):
            return reason
    return f"{type(module).__name__}: no rule to read {', '.join(names)}"


def _module_views(name: str, module: nn.Linear | Conv, parent: nn.Module | None) -> Iterator[LayerView]:
    weight = module.weight.detach()
    kind = next(c.__name__ for c in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, c))
    view = LayerView(name or kind, kind, module, module, weight, parameters=weight.numel())
    if isinstance(module, nn.Linear):
        fused = getattr(parent, "qkv", None) is module and hasattr(parent, "num_heads")
        yield from _thirds(view) if fused and len(weight) % 3 == 0 else [view]
        return
    if module.groups > 1:
        kind += " (depthwise)" if module.groups == module.in_channels else f" ({module.groups} groups)"
    yield dataclasses.replace(view, kind=kind, groups=module.groups, geometry=conv_geometry(module))


def _thirds(view: LayerView) -> Iterator[LayerView]:
    for part, weight in zip("qkv", view.weight.chunk(3), strict=True):
        kind = f"{view.kind} (part of fused qkv)"
        yield LayerView(f"{view.name}.{part}", kind, view.module, None, weight, parameters=weight.numel())


def _attention_views(name: str, module: nn.MultiheadAttention) -> Iterator[LayerView]:
    prefix = f"{name}." if name else ""
    if module.in_proj_weight is not None:
        weight = module.in_proj_weight.detach()
        yield from _thirds(LayerView(f"{prefix}in_proj", "MultiheadAttention", module, None, weight))
        return
    for part in "qkv":
        weight = getattr(module, f"{part}_proj_weight").detach()
        kind = "MultiheadAttention"
        yield LayerView(f"{prefix}{part}_proj", kind, module, None, weight, parameters=weight.numel())


def low_rank_pairs(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """First to second module of every bottleneck of two linear maps in a row within a plain ``Sequential``."""
    pairs: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if type(module) is nn.Sequential:
            for first, second in zip(module, list(module)[1:], strict=False):
                if first not in pairs.values() and _is_pair(first, second):
                    pairs[first] = second
    return pairs


def _is_pair(first: nn.Module, second: nn.Module) -> bool:
    if not (is_stock(first, nn.Linear) and is_stock(second, nn.Linear)):
        if not (is_stock(first, nn.Conv2d) and is_stock(second, nn.Conv2d)):
            return False
        assert isinstance(first, nn.Conv2d)
        assert isinstance(second, nn.Conv2d)
        padded = any(width for pair in ConvGeometry.of(second).padding for width in pair)
        if second.kernel_size != (1, 1) or second.stride != (1, 1) or padded or first.groups * second.groups != 1:
            return False
    if _unreadable(first) or _unreadable(second):
        return False
    A, B = first.weight, second.weight
    assert isinstance(A, Tensor)
    assert isinstance(B, Tensor)
    return A.shape[0] == B.shape[1] and A.shape[0] < min(B.shape[0], A[0].numel())


def _pair_view(name: str, first: nn.Module, second: nn.Module) -> LayerView:
    A, B = first.weight, second.weight
    assert isinstance(A, Tensor)
    assert isinstance(B, Tensor)
    A, B = A.detach(), B.detach()
    product = (B.flatten(1).double() @ A.flatten(1).double()).view(B.shape[0], *A.shape[1:])
    kind = f"{'Linear' if A.ndim == 2 else 'Conv2d'} (low-rank pair, rank {A.shape[0]})"
    geometry = None if A.ndim == 2 else conv_geometry(first)
    return LayerView(name, kind, first, second, product, 1, geometry, A.numel() + B.numel())
