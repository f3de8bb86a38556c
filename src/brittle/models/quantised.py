"""Weights stored quantised, read in real numbers: torch.ao's packed modules, and tensor types such as torchao's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from brittle.errors import InputError
from brittle.linear.conv_geometry import ConvGeometry, has_hooks
from brittle.storage.digest import tensors_in

TORCH_AO = ("torch.ao.nn.quantized.", "torch.ao.nn.quantizable.")
"""Where torch defines its quantised modules. They are told by this path, since that part of torch is to move: what is
not there to import cannot be the type of a module either."""


def torch_ao_classes(module: nn.Module) -> set[str]:
    """Names of the classes of torch.ao that a module is of, such as ``Linear`` for a packed dense layer."""
    return {base.__name__ for base in type(module).__mro__ if base.__module__.startswith(TORCH_AO)}


def is_fused(module: nn.Module) -> bool:
    """Whether a module of torch.ao computes more than its kind does: subclasses elsewhere add activations."""
    return bool(torch_ao_classes(module)) and not type(module).__module__.startswith(TORCH_AO)


def has_own_arithmetic(tensor: object) -> bool:
    """Whether a tensor is of a quantised type of its own, which most operations refuse and the others round."""
    return isinstance(tensor, Tensor) and type(tensor).dequantize is not Tensor.dequantize


def real_numbers(tensor: Tensor) -> Tensor:
    """A tensor's values in a floating type that all operations know: quantised ones and bytes are converted."""
    if tensor.is_quantized or has_own_arithmetic(tensor):
        return tensor.dequantize()
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def check_finite(weights: Iterable[tuple[str, Tensor]], where: str = "model") -> None:
    """Raise InputError with the name of the first floating tensor that holds NaN or infinite numbers."""
    for name, tensor in weights:
        if tensor.is_floating_point() and (bad := int((~torch.isfinite(real_numbers(tensor))).sum())):
            what = f"{bad} NaN or infinite ones of {tensor.numel()} in {name!r}"
            raise InputError(f"{where}: expected finite weights; got {what}")


def stored_weight(module: nn.Module) -> tuple[Any, bool]:
    """A module's ``weight`` in real numbers, scales included, and whether it is stored quantised."""
    weight: Any = getattr(module, "weight", None)  # subclasses that pack their weight may have removed it
    if torch_ao_classes(module):
        return real_numbers(weight()), True  # packed for the CPU's instructions; the method unpacks it
    return (weight.dequantize(), True) if has_own_arithmetic(weight) else (weight, False)


def count_parameters(model: nn.Module) -> int:
    """Numbers stored as parameters, or packed as the weights of quantised modules."""
    state = model.state_dict()
    packed = {name: value for name, value in state.items() if not isinstance(value, Tensor) or value.is_quantized}
    stored = (*model.parameters(), *(tensor for _, tensor in tensors_in(packed)))
    return sum(tensor.numel() for tensor in stored)


def packed_geometry(module: Any) -> ConvGeometry | None:
    """How a packed convolution of torch.ao walks over its input; None where hooks may change what it computes."""
    if has_hooks(module):
        return None
    padding = tuple((width, width) for width in module.padding)
    return ConvGeometry(tuple(module.stride), padding, tuple(module.dilation), module.groups, module.padding_mode)


def packed_state(module: nn.Module) -> list[str]:
    """Names of what a module without parameters and submodules may keep a matrix in: packed weights, tensors."""
    held = {**vars(module), **module._buffers}
    return [
        name
        for name, value in held.items()
        if type(value) is torch.ScriptObject or (isinstance(value, Tensor) and value.ndim > 1)
    ]
