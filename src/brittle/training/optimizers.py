"""Optimisers and schedules of the learning rate, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch


class Optimizer(Protocol):
    """A row of :data:`OPTIMIZERS`."""

    def __call__(
        self, parameters: list[torch.nn.Parameter], *, lr: float, momentum: float, weight_decay: float, fused: bool
    ) -> torch.optim.Optimizer:
        """An optimiser of the parameters."""


def adamw(
    parameters: list[torch.nn.Parameter], *, lr: float, momentum: float, weight_decay: float, fused: bool
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019): decoupled weight decay; it has moments of its own and no momentum."""
    return torch.optim.AdamW(parameters, lr, weight_decay=weight_decay, fused=fused)


def sgd(
    parameters: list[torch.nn.Parameter], *, lr: float, momentum: float, weight_decay: float, fused: bool
) -> torch.optim.Optimizer:
    """Stochastic gradient descent with heavy-ball momentum (not Nesterov's), weight decay in the gradient."""
    return torch.optim.SGD(parameters, lr, momentum=momentum, weight_decay=weight_decay, fused=fused)


OPTIMIZERS: dict[str, Optimizer] = {"adamw": adamw, "sgd": sgd}
"""Every optimiser by its name in a recipe."""

Schedule = Callable[[int, int, Sequence[float], float], float]
"""``(step, steps, milestones, decay)``, the step from 0, to the factor of the learning rate."""


def constant(step: int, steps: int, milestones: Sequence[float], decay: float) -> float:
    """1 in every step."""
    return 1.0


def cosine(step: int, steps: int, milestones: Sequence[float], decay: float) -> float:
    """``(1 + cos(pi step / steps)) / 2``: from 1 to 0 over all steps."""
    return (1 + math.cos(math.pi * step / steps)) / 2


def at_milestones(step: int, steps: int, milestones: Sequence[float], decay: float) -> float:
    """``decay`` to the power of the milestones passed, each a share of all steps."""
    return decay ** sum(step >= share * steps for share in milestones)


SCHEDULES: dict[str, Schedule] = {"constant": constant, "cosine": cosine, "step": at_milestones}
"""Every schedule by its name in a recipe."""
