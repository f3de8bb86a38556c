"""A recipe's names turned into what the loop calls: penalties, constraints, the optimiser."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from brittle.errors import InputError
from brittle.training.interventions.constraints import CONSTRAINTS
from brittle.training.interventions.nuclear import RefreshedNuclearNorm
from brittle.training.interventions.penalties import PENALTIES
from brittle.training.recipe import Recipe

Penalty = Callable[[nn.Module], Tensor]
"""From a model to a scalar that is added to the loss."""


def named_penalties(recipe: Recipe) -> list[tuple[Penalty, float]]:
    """The recipe's penalties with their strengths."""
    found: list[tuple[Penalty, float]] = []
    for name, strength in recipe.penalties.items():
        if name == "nuclear_norm" and recipe.refresh > 1:
            found.append((RefreshedNuclearNorm(recipe.refresh, layers=recipe.layers), strength))
        else:
            found.append((partial(PENALTIES[name], layers=recipe.layers), strength))
    return found


def named_constraint(name: str, value: float | None, model: nn.Module, recipe: Recipe) -> Callable[[], object]:
    """One of the recipe's constraints, bound to a model."""
    every = {"every": recipe.refresh} if name in ("row_shrinkage", "singular_shrinkage") else {}
    return CONSTRAINTS[name](model, value, layers=recipe.layers, **every)


def optimizer_of(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser of all parameters that require gradients.

    Raises:
        InputError: There are none.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise InputError("model: expected parameters to train; got none that require gradients")
    fused = all(parameter.is_floating_point() for parameter in parameters)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=fused
        )
    return torch.optim.AdamW(parameters, recipe.lr, weight_decay=recipe.weight_decay, fused=fused)
