"""Statistics of batch norms measured again: when channels went, what reaches a norm is not what it was trained on."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from brittle.errors import InputError
from brittle.models.borrow import device_of, frozen
from brittle.models.forward import output_of


def recalibrated(model: nn.Module, inputs: Tensor, *, batch_size: int = 512) -> nn.Module:
    """A copy of a network whose batch norms have the mean and variance of what these inputs bring them; no labels.

    One pass. A norm normalises by the batch that is passing, as in training, so that what reaches the next one is
    already right; dropout is off. Its new statistics are the mean and the population variance of every channel over
    all inputs and positions, pooled over the batches in double precision (Chan, Golub & LeVeque 1983). With all
    inputs in one batch this is a fixed point: in evaluation mode each norm then receives exactly these statistics.
    In several batches, norms behind another norm see its batch's statistics in place of the pooled ones.

    Args:
        model: The network; left bit-equal.
        inputs: ``(N, ...)``, of the kind that the network will meet.
        batch_size: Inputs at once, at least; the batches are of one size, up to one input.

    Returns:
        The copy: all but ``running_mean`` and ``running_var`` is as in the model, bit for bit. Batch norms without
        running statistics, or that no input reaches, are left alone, and so is every other kind of norm.

    Raises:
        InputError: The model cannot run on the inputs, or statistics are not finite.
    """
    if len(inputs) == 0 or batch_size < 1:
        raise InputError(f"inputs, batch_size: expected at least 1; got {len(inputs)} and {batch_size}")
    renewed = copy.deepcopy(model)
    named = [(name, module) for name, module in renewed.named_modules() if _has_statistics(module)]
    statistics = {name: _Statistics() for name, _ in named}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: statistics[name].add(args[0]))
        for name, module in named
    ]
    try:
        with frozen(renewed), torch.no_grad():  # which also puts the buffers back that training mode moves
            for _, module in named:
                module.train()
            for part in inputs.tensor_split(max(1, len(inputs) // batch_size)):
                output_of(renewed, part.to(device_of(renewed)), "inputs")
    finally:
        for hook in hooks:
            hook.remove()
    for name, module in named:
        statistics[name].write(module, name)
    return renewed


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and isinstance(module.running_mean, Tensor)


@dataclass
class _Statistics:
    """Mean and summed squared deviations ``(C,)`` of the values that have reached a norm, in double precision."""

    count: int = 0
    mean: Tensor | float = 0.0
    deviations: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        """Take in a batch ``(N, C, ...)``."""
        values = x.detach().transpose(0, 1).flatten(1).double()
        count = values.shape[1]
        variance, mean = torch.var_mean(values, 1, correction=0)
        total, step = self.count + count, mean - self.mean
        self.mean = self.mean + step * (count / total)
        self.deviations = self.deviations + variance * count + step.square() * (self.count * count / total)
        self.count = total

    def write(self, norm: nn.Module, name: str) -> None:
        """Make these the norm's statistics, if anything has reached it."""
        if self.count == 0:
            return
        new = {"running_mean": self.mean, "running_var": self.deviations / self.count}
        for buffer, value in new.items():
            if not bool(torch.isfinite(torch.as_tensor(value)).all()):
                raise InputError(f"inputs: expected finite values at every batch norm; got others at {name!r}")
            norm.get_buffer(buffer).copy_(torch.as_tensor(value))
