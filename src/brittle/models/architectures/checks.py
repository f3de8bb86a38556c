"""What the builders check, and how they refuse weights of another network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from torch import Tensor

from brittle.errors import InputError


def check_sizes(**sizes: object) -> None:
    """Raise InputError unless every argument is a positive integer."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InputError(f"{name}: expected a positive integer; got {size!r}")


def refuse(state: Mapping[str, Tensor], arch: str, expected: str) -> NoReturn:
    """Raise the InputError for a ``state`` that is not one of ``arch``."""
    shapes = [f"{key} {tuple(tensor.shape)}" for key, tensor in list(state.items())[:3]]
    got = f"got {', '.join(shapes) or 'nothing'}{', ...' if len(state) > 3 else ''}"
    raise InputError(f"state: expected one of {arch} with {expected}; {got}")


def kernel_and_head(state: Mapping[str, Tensor], arch: str, kernel: str, head: str) -> tuple[Tensor, Tensor]:
    """The first convolution's kernel ``(C, in, k, k)`` and the head's matrix ``(classes, D)``, by their names.

    Raises:
        InputError: One is missing or has other axes.
    """
    first, last = state.get(kernel), state.get(head)
    if first is None or last is None or first.ndim != 4 or last.ndim != 2:
        refuse(state, arch, f"a kernel {kernel} and a matrix {head}")
    return first, last
