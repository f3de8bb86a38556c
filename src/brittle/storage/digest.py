"""Fingerprints of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


def digest(tensors: Mapping[str, object]) -> str:
    """SHA-256 over names, types, shapes and bytes, as 64 hexadecimal digits.

    Args:
        tensors: Tensors by name. Those in tuples and in packed weights, which quantised modules have in their state,
            count as well; whatever holds none does not.
    """
    result = hashlib.sha256()
    for name, tensor in tensors_in(tensors):
        result.update(describe(name, tensor, tuple(tensor.shape)))
        result.update(bytes_of(tensor))
    return result.hexdigest()


def describe(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> bytes:
    """What a fingerprint says of a tensor before its bytes; the shape may be that of many such tensors as one."""
    return f"{name} {tensor.dtype} {shape}".encode()


def bytes_of(tensor: Tensor) -> bytes:
    """The tensor's values in the order of its axes."""
    values = tensor.dequantize() if tensor.is_quantized else tensor  # bytes alone would leave out the scale
    return values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def tensors_in(value: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a state, with its name; tuples, packed weights and tensors made of others are opened."""
    if isinstance(value, Tensor):
        if not hasattr(value, "__tensor_flatten__"):
            yield name, value
            return
        value = {part: getattr(value, part) for part in value.__tensor_flatten__()[0]}  # made of tensors, as torchao's
    elif type(value) is torch.ScriptObject and hasattr(value, "__getstate__"):
        value = value.__getstate__()
    if isinstance(value, tuple | list):
        value = {str(place): part for place, part in enumerate(value)}
    for part, content in value.items() if isinstance(value, Mapping) else ():
        yield from tensors_in(content, f"{name}.{part}" if name else str(part))
