"""Putting samples through a network: in batches that fit, checked, and counted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from brittle.errors import InputError, first_line
from brittle.models.borrow import Model

logger = logging.getLogger(__name__)


def logits_of(model: Model, x: Tensor, y: Tensor, batch_size: int | None = None) -> Tensor:
    """Logits ``(N, classes)`` without gradient, checked against the labels.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``.
        x: Inputs ``(N, ...)``.
        y: Labels ``(N,)``.
        batch_size: Most samples at once (all by default); halved when memory runs out.

    Raises:
        InputError: The model fails on this input, or its output is not a finite tensor that covers the labels.
    """

    def checked_logits(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            logits = output_of(model, x)
        check_logits(logits, x, y)
        assert isinstance(logits, Tensor)
        return logits.detach()

    return in_parts(checked_logits, batch_size, x, y)


def output_of(model: Model, x: Tensor, argument: str = "data") -> object:
    """What the model yields for ``x``.

    Raises:
        InputError: The model cannot run on inputs of this shape or type; the message names the ``argument``. Running
            out of memory stays the error that it is.
    """
    try:
        return model(x)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if out_of_memory(error):
            raise
        message = f"{argument}: the model cannot run on inputs of shape {tuple(x.shape[1:])}: {first_line(error)}"
        raise InputError(message) from error


@dataclass
class Counted:
    """A network that counts the samples put through it.

    Attributes:
        model: The network.
        forwards: Samples put through without gradient.
        backwards: Samples put through with a gradient in the input.
    """

    model: Model
    forwards: int = 0
    backwards: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        """The network's output; ``x`` is counted."""
        logits = self.model(x)
        if torch.is_grad_enabled() and x.requires_grad:
            self.backwards += len(x)
        else:
            self.forwards += len(x)
        return logits


def check_logits(logits: object, x: Tensor, y: Tensor) -> None:
    """Raise InputError unless ``logits`` is a finite ``(N, classes)`` tensor that covers the labels."""
    if not isinstance(logits, Tensor):
        kind = type(logits).__name__
        got = f"{kind} of {', '.join(map(str, logits))}" if isinstance(logits, Mapping) else kind
        raise InputError(f"model: expected a tensor of logits (N, classes), alone or in the answer; got {got}")
    if logits.ndim != 2 or len(logits) != len(x):
        raise InputError(f"model: expected logits of shape ({len(x)}, classes); got {tuple(logits.shape)}")
    if not torch.isfinite(logits.detach()).all():
        bad = int((~torch.isfinite(logits).all(1)).sum())
        raise InputError(f"model: expected finite logits; got NaN or infinite ones for {bad} of {len(x)} samples")
    if len(y) and (int(y.min()) < 0 or int(y.max()) >= logits.shape[1]):
        labels = f"{int(y.min())} to {int(y.max())}"
        raise InputError(f"y: expected labels from 0 to {logits.shape[1] - 1}, the model's classes; got {labels}")


def in_parts(work: Callable[..., Tensor], width: int | None, *tensors: Tensor) -> Tensor:
    """``work`` on at most ``width`` rows of the tensors at once (all by default), halved when memory runs out.

    Args:
        work: From as many tensors to one with equal rows; changes nothing.
        width: Most rows at once, at least 1.
        tensors: With equal first axes, at least one row.
    """
    total, parts, start = len(tensors[0]), list[Tensor](), 0
    width = widest(width, total)
    while start < total:
        rows = slice(start, start + width)
        part = fitting(lambda rows=rows: work(*(tensor[rows] for tensor in tensors)), width)  # type: ignore[misc]
        if part is None:
            width = (min(width, total - start) + 1) // 2
            logger.warning("out of memory: going on with %d samples at once", width)
            continue
        parts.append(part)
        start += width
    return torch.cat(parts)


def fitting(work: Callable[[], Any], samples: int) -> Any:
    """What ``work`` returns; None when it did not fit into memory and fewer samples may."""
    try:
        return work()
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not out_of_memory(error) or samples == 1:
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def widest(width: int | None, total: int) -> int:
    """Samples at once: ``width``, or all of them when it is None."""
    return max(1, total if width is None else min(width, total))
