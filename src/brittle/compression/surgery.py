"""Module surgery: layers of a copied model are replaced by others that stand at their names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from brittle.errors import InputError
from brittle.models.selection import Chosen

Map = nn.Linear | nn.Conv2d


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put new modules in the places of old ones, in all of them where a module is used several times.

    Args:
        model: Changed in place.
        new: New modules by the old ones.

    Returns:
        The model, or what replaces the model itself.
    """
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # named_children leaves out the second name of a shared module
            if child is not None and child in new:
                parent._modules[name] = new[child]
    return new.get(model, model)


def replaceable_module(model: nn.Module, layer: Chosen) -> Map:
    """The module of a layer that another may replace without changing more than the layer.

    Raises:
        InputError: The layer has groups, hooks, a parametrised or a shared weight, is of a subclass, or belongs to a
            torch module that reads its weight itself.
    """
    module = layer.modules[0]
    reason = obstacle(model, module)
    if reason is not None or not isinstance(module, Map):
        raise InputError(f"layers: expected layers that a low-rank pair can replace; layer {layer.name!r} {reason}")
    return module


def obstacle(model: nn.Module, module: nn.Module) -> str | None:
    """Why a module cannot be replaced without changing more than it, in words that follow its name; None if it can."""
    if type(module) not in (nn.Linear, nn.Conv2d):  # a subclass, as a parametrised module is, computes something else
        return f"is a {type(module).__name__}, not a plain Linear or Conv2d"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"has {module.groups} groups"
    if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)):
        return "has hooks"
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    for other in model.modules():
        if other is not module and any(p is module.weight for p in other.parameters(recurse=False)):
            return "shares its weight with another module"
        # Torch's own modules, as nn.MultiheadAttention, read the weights of their parts and do not call these.
        reads = type(other).__module__.startswith("torch.nn.") and not isinstance(other, containers)
        if reads and any(child is module for child in other.children()):
            return f"is part of a {type(other).__name__}, which reads its weight"
    return None


def map_like(module: Map, matrix: Tensor) -> Map:
    """A map of the module's inputs, kernel and geometry, without bias.

    Args:
        module: What it is like, also in type, device, and whether its weight is trained.
        matrix: ``(m, n)``: a row for each of its outputs, n as the module's.
    """
    options = {"bias": False, "device": module.weight.device, "dtype": module.weight.dtype}
    new: nn.Module
    if isinstance(module, nn.Linear):
        new = skip_init(nn.Linear, module.in_features, len(matrix), **options)
    else:
        new = skip_init(
            nn.Conv2d, module.in_channels, len(matrix), module.kernel_size, stride=module.stride,
            padding=module.padding, dilation=module.dilation, padding_mode=module.padding_mode, **options,
        )  # fmt: skip
    return _fill(new, matrix, module)


def pointwise_map(module: Map, matrix: Tensor) -> Map:
    """A map ``(m, n)`` of n channels without bias: a Linear, or a 1 x 1 convolution where the module is one.

    Args:
        module: What it is like, also in type, device, and whether its weight is trained.
        matrix: ``(m, n)``.
    """
    options = {"bias": False, "device": module.weight.device, "dtype": module.weight.dtype}
    outputs, inputs = matrix.shape
    new: nn.Module
    if isinstance(module, nn.Linear):
        new = skip_init(nn.Linear, inputs, outputs, **options)
    else:
        new = skip_init(nn.Conv2d, inputs, outputs, 1, **options)
    return _fill(new, matrix, module)


def make_pair(module: Map, A: Tensor, B: Tensor) -> nn.Sequential:
    """Two maps in a row in place of one, with its bias.

    Args:
        module: What they replace; the second takes its bias along.
        A: ``(r, n)``, of the first, which has the module's kernel and geometry.
        B: ``(m, r)``, of the second, pointwise one.
    """
    first, second = map_like(module, A), pointwise_map(module, B)
    second.bias = module.bias
    return nn.Sequential(first, second).train(module.training)


def _fill(new: nn.Module, matrix: Tensor, module: Map) -> Map:
    assert isinstance(new, Map)
    with torch.no_grad():
        new.weight.copy_(matrix.view(new.weight.shape))
    new.weight.requires_grad_(module.weight.requires_grad)
    return new
