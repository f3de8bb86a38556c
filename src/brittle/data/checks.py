"""Labelled inputs checked at the door, once for every public function."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from brittle.errors import InputError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types that inputs may have: of the smaller ones torch cannot even tell the largest value."""


def check_dense(tensor: Tensor, name: str) -> None:
    """Raise unless a tensor has its values in memory, each in its place.

    Raises:
        InputError: It is nested, sparse, or has no values (device meta).
    """
    kinds = {"nested": tensor.is_nested, "sparse": tensor.layout != torch.strided, "without values": tensor.is_meta}
    if kind := next((kind for kind, present in kinds.items() if present), None):
        raise InputError(f"{name}: expected a dense tensor; got one that is {kind}")


def check_batch(x: Tensor, y: Tensor, *, bounds: tuple[float, float] = (0.0, 1.0), classes: int | None = None) -> None:
    """Raise unless ``x`` and ``y`` are labelled inputs within the bounds.

    Args:
        x: Inputs ``(N, ...)``, floating, finite, within ``bounds`` up to 1e-6.
        y: Labels ``(N,)``, integer, from 0 and, where ``classes`` is given, below it.
        bounds: Lowest and highest value an input may have.
        classes: Number of classes, or None to leave the labels open above.

    Raises:
        InputError: One of these does not hold; the message says which.
    """
    if not -math.inf < bounds[0] < bounds[1] < math.inf:
        raise InputError(f"bounds: expected (low, high) with low < high, both finite; got {bounds}")
    for name, tensor in (("x", x), ("y", y)):
        if isinstance(tensor, Tensor):
            check_dense(tensor, name)
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        scaled = "; divide bytes by 255" if isinstance(x, Tensor) and x.dtype == torch.uint8 else ""
        raise InputError(f"x: expected a floating tensor (N, ...); got {_kind(x)}{scaled}")
    if not isinstance(y, Tensor) or y.dtype == torch.bool or y.is_floating_point() or y.is_complex():
        raise InputError(f"y: expected an integer tensor (N,); got {_kind(y)}")
    if x.ndim == 0 or y.ndim != 1 or len(x) != len(y):
        shapes = f"x {tuple(x.shape)} and y {tuple(y.shape)}"
        raise InputError(f"x, y: expected shapes (N, ...) and (N,) with one N; got {shapes}")
    if x.numel() == 0:
        raise InputError(f"x: expected at least one example; got shape {tuple(x.shape)}")
    x = x.detach()
    low, high = (float(v) for v in x.aminmax())  # NaN where there is one: a pass over large data is dear
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = int((~torch.isfinite(x)).sum())
        raise InputError(f"x: expected finite numbers; got {bad} NaN or infinite ones of {x.numel()}")
    if low < bounds[0] - 1e-6 or high > bounds[1] + 1e-6:
        raise InputError(
            f"x: expected values in [{bounds[0]:g}, {bounds[1]:g}], with any normalisation inside the model; "
            f"got values from {low:g} to {high:g}"
        )
    least, most = (int(v) for v in y.to(torch.int64).aminmax())
    if least < 0 or (classes is not None and most >= classes):
        upper = "" if classes is None else f" and below the number of classes, {classes}"
        raise InputError(f"y: expected labels of at least 0{upper}; got labels from {least} to {most}")


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
