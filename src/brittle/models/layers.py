"""The layer view: every weight matrix of a network, by name, and the name of everything that has none.

Nothing is guessed from names of classes: a module is read when its type says what its weight means.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from brittle.errors import InputError
from brittle.linear.conv_geometry import ConvGeometry, conv_geometry, is_stock
from brittle.models.borrow import frozen, unwrapped
from brittle.models.checkpoints import check_tensors
from brittle.models.quantised import (
    check_finite,
    is_fused,
    packed_geometry,
    packed_state,
    stored_weight,
    torch_ao_classes,
)
from brittle.results import NotMeasured

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
KINDS: dict[str, type[nn.Module]] = {
    "Linear": nn.Linear,
    "Conv1d": nn.Conv1d,
    "Conv2d": nn.Conv2d,
    "Conv3d": nn.Conv3d,
}
"""What holds a matrix, torch.ao's quantised modules by the same names."""
NO_MATRIX: list[tuple[tuple[type[nn.Module], ...], set[str], str]] = [
    (
        (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
        set(),
        "scale and shift of a normalisation: no matrix",
    ),
    ((nn.Embedding, nn.EmbeddingBag), {"Embedding"}, "look-up table: not a linear map of the input"),
    (
        (nn.modules.conv._ConvTransposeNd,),
        {"_ConvTransposeNd"},
        "transposed convolution: no rule to read its operator",
    ),
    (
        (nn.RNNBase, nn.RNNCellBase),
        {"RNNBase", "RNNCellBase"},
        "recurrent: its matrices are applied an unknown number of times",
    ),
    ((nn.Bilinear,), set(), "bilinear: not a linear map of the input"),
    ((nn.PReLU,), {"PReLU"}, "slope of an activation: no matrix"),
]
"""Types that hold numbers but no matrix, the names of torch.ao's quantised ones, and the reason."""
BY_HEAD = {"q", "k", "v", "q_proj", "k_proj", "v_proj", "query", "key", "value"}
"""What attention modules call the Linear layers whose rows belong to heads."""
HEADS = ("num_heads", "num_attention_heads")
"""And the number of these."""
PACKED = {*KINDS, *(name for _, names, _ in NO_MATRIX for name in names)}
"""torch.ao's modules whose submodules are how the weights are packed, and no layers."""


@dataclass(frozen=True)
class LayerView:
    """One weight matrix of a network.

    Attributes:
        name: Qualified name; parts of one parameter are told apart by a suffix (``attn.in_proj.q``).
        kind: Type, with what makes the matrix special.
        module: The module that reads the layer's input (of a low-rank pair, the first).
        output: The module that yields the layer's output (of a low-rank pair, the second); None when the layer is
            only a part of a fused module's output, or an activation is fused into the module.
        weight: Detached weight, ``(m, n)`` or ``(out, in / groups, *kernel)``; a pair's product; of a quantised layer
            the numbers that it stands for, dequantised.
        groups: Groups of a convolution.
        geometry: How a convolution walks over its input; None for dense layers, and for convolutions whose
            ``forward`` is not understood.
        parameters: Weight entries stored.
        heads: Attention heads that the rows belong to, as many to each and in their order; 0 where rows belong to none.
    """

    name: str
    kind: str
    module: nn.Module
    output: nn.Module | None
    weight: Tensor
    groups: int = 1
    geometry: ConvGeometry | None = None
    parameters: int = 0
    heads: int = 0

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
    ``nn.MultiheadAttention`` and of attention modules that hold a ``qkv`` Linear beside ``num_heads``, as three. Where
    an attention module says how many heads it has, the views of its queries, keys and values say it too.
    Quantised Linear and convolutions (``torch.ao``, torchao) are read by the numbers that their weights stand for;
    what such a layer computes is that matrix with rounded inputs or outputs.

    Args:
        model: Any module; only read.

    Returns:
        ``views`` and ``unread``, in the order of ``model.named_modules()``; shared modules appear once. Of modules
        without parameters and submodules, packed weights and tables in buffers or attributes are ``unread``.

    Raises:
        InputError: A weight holds NaN or infinite numbers.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    with frozen(model):  # in training mode, reading a parametrised weight may change its buffers
        return _read_layers(unwrapped(model))


def read_state_layers(state: Mapping[str, Tensor]) -> Layers:
    """The layers of weights by name, as far as shapes tell them: a ``weight`` ``(m, n)`` is dense, one of four axes
    ``(out, in / groups, *kernel)`` that of a convolution, whose stride, padding and groups are not known.

    A look-up table has the shape of a dense layer; only those whose names say ``embed`` are left out.

    Args:
        state: Weights by name; only read.

    Returns:
        As :func:`read_layers`, views without modules that could be run.

    Raises:
        InputError: It holds something other than dense tensors, or a weight holds NaN or infinite numbers.
    """
    check_tensors(state, "model")
    owners: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        owner, _, last = name.rpartition(".")
        owners.setdefault(owner, {})[last] = tensor
    layers = Layers([], [])
    for owner, own in owners.items():
        weight = own.get("weight")
        reason = _no_layer(owner, weight)
        if reason is None and weight is not None:
            kind = f"{'Linear' if weight.ndim == 2 else 'Conv2d'} (by its shape)"
            weight = weight.detach()
            layers.views.append(LayerView(owner or kind, kind, nn.Module(), None, weight, parameters=weight.numel()))
        else:
            names = ", ".join(own)
            layers.unread.append(NotMeasured(owner or names, reason or f"no rule to read {names} by their shapes"))
    check_finite((view.name, view.weight) for view in layers.views)
    return layers


def _no_layer(owner: str, weight: Tensor | None) -> str | None:
    """Why a weight is no layer's by its shape; None where it is one, and where there is no weight."""
    if weight is None:
        return None
    if (reason := _unreadable(weight)) is not None:
        return reason
    if weight.ndim == 2 and "embed" in owner.rpartition(".")[2].lower():
        return "look-up table by its name: not a linear map of the input"
    return None if weight.ndim in (2, 4) else f"weight of shape {tuple(weight.shape)}: no matrix by its shape"


def _read_layers(model: nn.Module) -> Layers:
    layers, parts = Layers([], []), set[nn.Module]()
    for module in model.modules():
        if isinstance(module, ParametrizationList):
            parts |= set(module.modules())
        elif torch_ao_classes(module) & PACKED:
            parts |= set(module.modules()) - {module}
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    pairs = low_rank_pairs(model)
    for name, module in model.named_modules():
        if module in parts:
            continue
        if (second := pairs.get(module)) is not None:
            parts.add(second)
            layers.views.append(_pair_view(name, module, second))
        elif isinstance(module, nn.MultiheadAttention) and not torch_ao_classes(module):
            layers.views.extend(_attention_views(name, module))
            if module.bias_k is not None:
                tokens = "bias_k, bias_v: tokens added to the sequence"
                layers.unread.append(NotMeasured(name or type(module).__name__, tokens))
        elif (kind := _kind(module)) is not None:
            weight, quantised = stored_weight(module)  # once: a parametrised weight is computed anew each time
            if (reason := _unreadable(weight)) is not None:
                layers.unread.append(NotMeasured(name or kind, reason))
                continue
            notes = ["quantised"] if quantised else []
            layers.views.extend(_module_views(name or kind, kind, module, weight.detach(), notes, parents.get(module)))
        elif (reason := _no_matrix(module)) is not None:
            layers.unread.append(NotMeasured(name or type(module).__name__, reason))
    if isinstance(model, torch.jit.ScriptModule) and not layers.views and not layers.unread:
        reason = "TorchScript without parameters: its weights, if it has any, are constants of its code"
        layers.unread.append(NotMeasured(type(model).__name__, reason))
    check_finite((view.name, view.weight) for view in layers.views)
    return layers


def _kind(module: nn.Module) -> str | None:
    """Which of the kinds that hold a matrix a module is of."""
    quantised = torch_ao_classes(module)
    return next((name for name, kind in KINDS.items() if isinstance(module, kind) or name in quantised), None)


def _unreadable(weight: object) -> str | None:
    if not isinstance(weight, Tensor):
        return f"weight is a {type(weight).__name__}, not a tensor"
    if weight.is_meta or isinstance(weight, nn.UninitializedParameter):
        return "weight is not initialised"
    if weight.is_complex() or not weight.is_floating_point() or weight.numel() == 0:
        return f"weight of type {weight.dtype} and shape {tuple(weight.shape)}: expected real numbers"
    return None


def _no_matrix(module: nn.Module) -> str | None:
    """Why a module that stores numbers has no matrix; None when it stores none."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    for types, quantised, reason in NO_MATRIX:
        if (names and isinstance(module, types)) or quantised & torch_ao_classes(module):
            return reason
    if not names and next(module.children(), None) is None:
        names = packed_state(module)
    return f"{type(module).__name__}: no rule to read {', '.join(names)}" if names else None


def _module_views(
    name: str, kind: str, module: nn.Module, weight: Tensor, notes: list[str], parent: nn.Module | None
) -> Iterator[LayerView]:
    """Views of a module's own weight: three of a fused query, key and value, else one."""
    dense, conv = kind == "Linear", cast(Any, module)
    fused = dense and getattr(parent, "qkv", None) is module and hasattr(parent, "num_heads") and len(weight) % 3 == 0
    heads = _heads(module, parent, len(weight) // 3 if fused else len(weight)) if dense else 0
    if fused:
        notes = ["part of fused qkv", *notes]
    elif not dense and conv.groups > 1:
        notes = ["depthwise" if conv.groups == conv.in_channels else f"{conv.groups} groups", *notes]
    noted = f"{kind} ({', '.join(notes)})" if notes else kind
    output = None if is_fused(module) else module
    if fused:
        for part, third in zip("qkv", weight.chunk(3), strict=True):
            yield LayerView(f"{name}.{part}", noted, module, None, third, parameters=third.numel(), heads=heads)
    elif dense:
        yield LayerView(name, noted, module, output, weight, parameters=weight.numel(), heads=heads)
    else:
        geometry = packed_geometry(module) if torch_ao_classes(module) else conv_geometry(module)
        yield LayerView(name, noted, module, output, weight, conv.groups, geometry, weight.numel())


def _heads(module: nn.Module, parent: nn.Module | None, rows: int) -> int:
    """How many heads the rows of a Linear belong to; 0 for none that the module around it tells of."""
    if parent is None or not any(getattr(parent, name, None) is module for name in ("qkv", *BY_HEAD)):
        return 0
    heads = head_count(parent)
    return heads if heads and rows % heads == 0 else 0


def head_count(module: nn.Module) -> int:
    """How many attention heads a module says that it has; 0 for none."""
    heads = next((getattr(module, name) for name in HEADS if hasattr(module, name)), 0)
    return heads if type(heads) is int and heads > 0 else 0


def _attention_views(name: str, module: nn.MultiheadAttention) -> Iterator[LayerView]:
    """Views of the query, key and value maps, which are one parameter where all read inputs of one width."""
    prefix, kind = f"{name}." if name else "", "MultiheadAttention"
    if (fused := module.in_proj_weight) is not None:
        names, kind, weights = [f"in_proj.{part}" for part in "qkv"], f"{kind} (part of fused qkv)", fused.chunk(3)
    else:
        names = [f"{part}_proj" for part in "qkv"]
        weights = tuple(getattr(module, f"{part}_weight") for part in names)
    for part, weight in zip(names, weights, strict=True):
        heads = module.num_heads if len(weight) % module.num_heads == 0 else 0
        yield LayerView(f"{prefix}{part}", kind, module, None, weight.detach(), parameters=weight.numel(), heads=heads)


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
    A, B = stored_weight(first)[0], stored_weight(second)[0]
    if _unreadable(A) or _unreadable(B):
        return False
    return bool(A.shape[0] == B.shape[1] and A.shape[0] < min(B.shape[0], A[0].numel()))


def _pair_view(name: str, first: nn.Module, second: nn.Module) -> LayerView:
    A, B = (stored_weight(module)[0].detach() for module in (first, second))
    product = (B.flatten(1).double() @ A.flatten(1).double()).view(B.shape[0], *A.shape[1:])
    kind = f"{'Linear' if A.ndim == 2 else 'Conv2d'} (low-rank pair, rank {A.shape[0]})"
    geometry = None if A.ndim == 2 else conv_geometry(first)
    return LayerView(name, kind, first, second, product, 1, geometry, A.numel() + B.numel())
