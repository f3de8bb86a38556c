"""A network made ready once for everything that is done with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from brittle.errors import InputError
from brittle.models.borrow import Model, device_of, frozen, unwrapped
from brittle.models.fast_copy import copy_for_attacks
from brittle.models.trace import NoRule, Trace, trace
from brittle.models.twin import differentiable_twin, has_gradients

SAMPLES = 8
"""Samples on which copies are compared with the network."""


@dataclass(frozen=True)
class Network:
    """A borrowed network and what was made of it once.

    Attributes:
        model: The network itself, in evaluation mode and without parameter gradients: every verdict is its own.
        fast: A copy on which passes cost less, for attacks to search on; the network itself where there is none. Of a
            network without gradients the copy in real numbers
            (:func:`brittle.models.twin.differentiable_twin`).
        traced: Its trace, from which bounds and certificates are read; the reason where there is none.
        gradients: Whether the network itself can be differentiated.
    """

    model: Model
    fast: Model
    traced: Trace | NoRule | None = None
    gradients: bool = True

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return device_of(self.model)


def make_ready(
    model: Model,
    x: Tensor,
    bounds: tuple[float, float],
    *,
    compiled: bool = False,
    traced: Trace | NoRule | None = None,
) -> Network:
    """The network with its trace and its fast copy.

    The caller borrows it before (:func:`brittle.models.borrow.frozen`) and keeps it for as long as the result is used:
    the trace shares the network's tensors, and the copy was compared with it in evaluation mode.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``; of ``DataParallel`` and ``torch.compile`` the
            network inside is taken.
        x: Inputs ``(N, ...)``; a few of them serve to compare the copy with the network.
        bounds: Smallest and largest admissible input value; inputs are clipped to them.
        compiled: Whether the copy is compiled.
        traced: The network's trace where there is one already, or the error that tracing raised.

    Returns:
        A network whose ``fast`` is ``model`` itself where a copy gains nothing or answers differently, and whose
        ``traced`` is None for a plain callable, and for a module that cannot run on such inputs.
    """
    model = unwrapped(model)
    if traced is None and isinstance(model, nn.Module):
        traced = trace_or_reason(model, tuple(x.shape[1:]))
    x = x[:SAMPLES].to(device_of(model)).clamp(*bounds)
    if not has_gradients(model, x):
        return Network(model, differentiable_twin(model, x) or model, traced, gradients=False)
    return Network(model, copy_for_attacks(model, x, compiled=compiled, traced=traced), traced)


def trace_or_reason(model: nn.Module, input_shape: tuple[int, ...] | None) -> Trace | NoRule | None:
    """The network's trace, or why it cannot be traced; None where it cannot run on such inputs at all."""
    try:
        return trace(model, input_shape)
    except NoRule as reason:
        return reason
    except InputError:  # whoever puts the samples through the network will say it better
        return None


@contextmanager
def borrowed(model: Model | Network, x: Tensor, bounds: tuple[float, float] = (0.0, 1.0)) -> Iterator[Network]:
    """The network made ready inside the block, and as it was after it; one that is ready already is handed on.

    Args:
        model: Network from ``(N, ...)`` to logits; or one made ready, which somebody else has borrowed.
        x: Inputs ``(N, ...)``, as :func:`make_ready`.
        bounds: Smallest and largest admissible input value.
    """
    if isinstance(model, Network):
        yield model
        return
    with frozen(model):
        yield make_ready(model, x, bounds)
