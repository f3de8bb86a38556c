"""What the loss loses with a unit: first-order influence on given inputs, clean or attacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from brittle.compression.groups import ChannelGroup
from brittle.models.borrow import frozen

Loss = Callable[[Tensor, Tensor], Tensor]
"""From logits ``(N, classes)`` and labels ``(N,)`` to a loss a sample ``(N,)``."""


def unit_gradients(
    model: nn.Module, groups: Sequence[ChannelGroup], x: Tensor, y: Tensor, loss: Loss, *, batch_size: int = 128
) -> dict[str, Tensor]:
    r"""Derivative of every sample's loss in the presence of every unit.

    A unit that is present to the degree ``m`` is read as ``m`` times itself by everything that reads it, so that m = 0
    is its removal. At m = 1 the derivative is ``sum a * dl/da`` over all entries ``a`` of the unit and all its readers
    (Molchanov et al. 2019); to first order the loss changes by minus that when the unit goes.

    Args:
        model: Left as it is; in evaluation mode inside.
        groups: Groups of units.
        x: Inputs ``(N, ...)``.
        y: Labels ``(N,)``.
        loss: A loss a sample.
        batch_size: Samples at once.

    Returns:
        ``(N, units)`` by group, on the CPU, in double precision.
    """
    readers = {side.module: model.get_submodule(side.module) for g in groups for side in g.sides if not side.out}
    read = dict[str, list[Tensor]]()

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            a = inputs[0].view_as(inputs[0])  # a tensor of this reader's own: others may read the same one
            read.setdefault(name, []).append(a)
            return (a, *inputs[1:])

        return hook

    found = {group.name: list[Tensor]() for group in groups}
    handles = [module.register_forward_pre_hook(keep(name)) for name, module in readers.items()]
    try:
        with frozen(model), torch.enable_grad():
            for part in torch.arange(len(x)).split(batch_size):
                read.clear()
                total = loss(model(x[part].detach().requires_grad_()), y[part]).sum()
                inputs = [a for calls in read.values() for a in calls]
                gradients = iter(torch.autograd.grad(total, inputs, allow_unused=True))
                by_channel = {
                    name: sum(_by_channel(readers[name], a, next(gradients)) for a in calls)
                    for name, calls in read.items()
                }
                for group in groups:
                    sides = [side for side in group.sides if not side.out and side.module in by_channel]
                    parts = [by_channel[side.module][:, side.channels].sum(2) for side in sides]  # type: ignore[index]
                    found[group.name].append(torch.stack(parts).sum(0))
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def _by_channel(module: nn.Module, a: Tensor, gradient: Tensor | None) -> Tensor:
    """``(N, channels)``: the product of values and gradients, summed over all places."""
    if gradient is None:
        gradient = torch.zeros_like(a)
    product = a.detach() * gradient
    axis = product.ndim - 1 if isinstance(module, nn.Linear) else 1
    summed = product.movedim(axis, 1).flatten(2).sum(2) if product.ndim > 2 else product
    return summed.double().cpu()
