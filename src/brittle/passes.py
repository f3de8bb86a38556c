"""Putting samples through a network: in batches that fit, checked, and counted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.attacks.losses import check_logits
from brittle.attacks.packing import in_parts, out_of_memory
from brittle.errors import InputError
from brittle.frozen import Model


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
    return in_parts(lambda x, y: _logits(model, x, y), batch_size, x, y)


def _logits(model: Model, x: Tensor, y: Tensor) -> Tensor:
    try:
        with torch.no_grad():
            logits = model(x)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if out_of_memory(error):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        message = f"data: the model cannot run on inputs of shape {tuple(x.shape[1:])}: {reason}"
        raise InputError(message) from error
    check_logits(logits, x, y)
    assert isinstance(logits, Tensor)
    return logits.detach()


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
