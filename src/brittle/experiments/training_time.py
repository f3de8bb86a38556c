"""One network at several moments of its training, for experiments over training time."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from brittle.data.load import Data
from brittle.training.history import Moment
from brittle.training.interventions.assembly import Interventions
from brittle.training.loop import train
from brittle.training.recipe import Recipe


def measured_epochs(epochs: int) -> list[int]:
    """Powers of two below the last epoch, and the last."""
    return sorted({*(2**i for i in range(epochs.bit_length()) if 2**i < epochs), epochs})


def train_along(network: nn.Module, data: Data, recipe: Recipe) -> dict[int, nn.Module]:
    """Copies of one network as it is trained, by epoch: those of :func:`measured_epochs`, in evaluation mode."""
    trained: list[nn.Module] = []
    copies: dict[int, nn.Module] = {}

    def remember(model: nn.Module) -> Callable[[], None]:
        """A constraint that changes nothing: it is given the network that is being trained."""
        trained.append(model)
        return lambda: None

    def keep(moment: Moment) -> None:
        if moment.row is not None and moment.epoch in measured_epochs(recipe.epochs):
            copies[moment.epoch] = copy.deepcopy(trained[0]).eval()

    train(
        network,
        data,
        recipe,
        interventions=Interventions(constraints=[remember]),
        devices="cuda" if torch.cuda.is_available() else "cpu",
        callback=keep,
    )
    return copies
