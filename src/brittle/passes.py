"""Putting samples through a network: in batches that fit, checked, and counted."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.attacks.losses import check_logits
from brittle.attacks.packing import out_of_memory
from brittle.errors import InputError
from brittle.frozen import Model

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
    width, parts, start = batch_size or len(x), [], 0
    while start < len(x):
        part = slice(start, start + width)
        logits = _logits(model, x[part], y[part], alone=width == 1)
        if logits is None:
            width = (min(width, len(x) - start) + 1) // 2
            logger.warning("out of memory: going on with %d samples at once", width)
            continue
        parts.append(logits)
        start += width
    return torch.cat(parts)


def _logits(model: Model, x: Tensor, y: Tensor, alone: bool) -> Tensor | None:
    """Logits of one batch; None when they did not fit into memory and fewer samples may."""
    try:
        with torch.no_grad():
            logits = model(x)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if not out_of_memory(error):
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            message = f"data: the model cannot run on inputs of shape {tuple(x.shape[1:])}: {reason}"
            raise InputError(message) from error
        if alone or len(x) == 1:
            raise
    else:
        check_logits(logits, x, y)
        assert isinstance(logits, Tensor)
        return logits.detach()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


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
