"""What attacks maximise: functions of logits ``(N, classes)`` and labels ``(N,)``, one value a sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from brittle.errors import InputError
from brittle.models.forward import check_logits

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits ``(N, classes)`` and labels ``(N,)`` to one loss a sample ``(N,)``; attacks maximise it."""


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of every sample, ``(N,)``."""
    return F.cross_entropy(logits, y, reduction="none")


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    r"""Difference of logits ratio, ``-(s_y - max_{j != y} s_j) / (s_(1) - s_(3))`` (Croce & Hein 2020, eq. 6).

    Unlike cross-entropy it does not change when the logits are scaled or shifted.

    Args:
        logits: ``(N, classes)`` with at least 3 classes; ``s_(i)`` is the i-th largest.
        y: Labels ``(N,)``.

    Returns:
        ``(N,)``; positive exactly where another logit exceeds the label's.

    Raises:
        InputError: Fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise InputError(f"loss: dlr needs at least 3 classes; got {logits.shape[1]}")
    ordered = logits.topk(3, dim=1).values
    own = logits.gather(1, y[:, None])[:, 0]
    other = torch.where(ordered[:, 0] == own, ordered[:, 1], ordered[:, 0])
    return -(own - other) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    r"""Targeted difference of logits ratio, ``-(s_y - s_t) / (s_(1) - (s_(3) + s_(4)) / 2)`` (Croce & Hein 2020).

    Args:
        logits: ``(N, classes)`` with at least 4 classes; ``s_(i)`` is the i-th largest.
        y: Labels ``(N,)``.
        target: The class to move to, ``(N,)``.

    Returns:
        ``(N,)``; positive exactly where the target's logit exceeds the label's.

    Raises:
        InputError: Fewer than four classes.
    """
    if logits.shape[1] < 4:
        raise InputError(f"loss: targeted dlr needs at least 4 classes; got {logits.shape[1]}")
    ordered = logits.topk(4, dim=1).values
    own, aimed = (logits.gather(1, labels[:, None])[:, 0] for labels in (y, target))
    return -(own - aimed) / (ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2 + 1e-12)


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """``s_y - max_{j != y} s_j`` of every sample, ``(N,)`` in logit units; with one class, ``s_y``."""
    own = logits.gather(1, y[:, None])[:, 0]
    if logits.shape[1] == 1:
        return own
    return own - logits.scatter(1, y[:, None], -torch.inf).amax(1)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "dlr": dlr}


def named_loss(loss: str | Loss) -> Loss:
    """The loss of that name; a function is returned as it is.

    Raises:
        InputError: There is none of that name.
    """
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise InputError(f"loss: expected one of {', '.join(LOSSES)} or a function; got {loss!r}")
    return LOSSES[loss]


def loss_and_gradient(
    model: Callable[[Tensor], Tensor], loss: Loss, x: Tensor, y: Tensor, *, check: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass: per-sample loss ``(N,)``, whether the prediction is wrong ``(N,)``, the loss's gradient in x.

    Args:
        model: Inputs ``(N, ...)`` to logits ``(N, classes)``.
        loss: Maximised by the caller.
        x: Inputs.
        y: Labels ``(N,)``.
        check: Samples whose logits are to be checked with :func:`check_logits` ``(N,)``, bool; none by default.

    Raises:
        InputError: The logits are no logits of these labels, or do not depend on the input differentiably.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = model(x)
        if check is not None and bool(check.any()):
            _check_rows(logits, x, y, check.to(x.device))
        values = loss(logits, y)
        gradient = torch.autograd.grad(values.sum(), x, allow_unused=True)[0] if values.requires_grad else None
        if gradient is None:
            raise InputError("model: expected logits that depend on the input through differentiable operations")
    if gradient.stride() != x.stride():  # expanded, or in another order of memory: callers write into it
        gradient = torch.empty_like(x).copy_(gradient)
    gradient.nan_to_num_(0.0, 0.0, 0.0)  # one NaN would spoil the whole step of a sample: that coordinate stays
    return values.detach().to(x.dtype), logits.detach().argmax(1) != y, gradient


def _check_rows(logits: object, x: Tensor, y: Tensor, rows: Tensor) -> None:
    """Check the logits of some samples; quickly where those of all are good."""
    try:
        check_logits(logits, x, y)
    except InputError:
        if not isinstance(logits, Tensor) or len(logits) != len(x):
            raise
        check_logits(logits.detach()[rows], x[rows], y[rows])
