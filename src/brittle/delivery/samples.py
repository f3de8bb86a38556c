"""Which samples a compression may look at, so that none of them is evaluated."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from brittle.data import Data
from brittle.data.checks import check_batch
from brittle.errors import InputError
from brittle.progress import Progress, silent
from brittle.random_streams import generator

Samples = tuple[Tensor, Tensor]
"""Inputs ``(N, ...)`` and labels ``(N,)``."""


@dataclass(frozen=True, eq=False)
class Basis:
    """What a choice rests on.

    Attributes:
        x: Inputs ``(N, ...)`` to look at, on the network's device.
        y: Labels ``(N,)``.
        p: Norm of the attacker's budget.
        eps: The budget.
        progress: Told how far it is.
    """

    x: Tensor
    y: Tensor
    p: float
    eps: float
    progress: Progress = silent


SPLIT = 0x5A
"""Name of the random stream that draws the samples to look at."""


@dataclass(frozen=True, eq=False)
class Parts:
    """Samples by what they serve for.

    Attributes:
        evaluated: To judge networks by.
        training: To train on; none of them is evaluated.
        seen: What planning and repair look at, some of those to train on.
    """

    evaluated: Data
    training: Data
    seen: Samples


def split_samples(data: Data, training: Data | None, count: int, seed: int) -> Parts:
    """What is evaluated, what may be trained on, and what planning and repair look at.

    Args:
        data: Samples to evaluate on.
        training: Samples to look at and to train on; those that are evaluated are left out. None: a part of the data,
            at most half of them, which then is not evaluated.
        count: Samples to look at, if there are so many.
        seed: Picks them.

    Raises:
        InputError: There are too few samples, or they are no inputs in [0, 1] with labels.
    """
    for name, given in (("data", data), ("training", training)):
        if given is not None:
            try:
                check_batch(given.inputs, given.labels)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
    if training is not None:
        training = _without(training, data)
    if training is None or len(training.labels) < 2:
        count = min(count, len(data.labels) // 2)
        if count < 2:
            raise InputError(f"data: expected at least 4 samples, half of them to plan with; got {len(data.labels)}")
        order = torch.randperm(len(data.labels), generator=generator(seed, SPLIT))
        seen, data = _taken(data, order[:count].sort().values), _taken(data, order[count:].sort().values)
        return Parts(data, seen, (seen.inputs, seen.labels))
    seen = training.take(count, seed)
    return Parts(data, training, (seen.inputs, seen.labels))


def _taken(data: Data, places: Tensor) -> Data:
    return replace(data, inputs=data.inputs[places], labels=data.labels[places])


def _without(training: Data, data: Data) -> Data:
    """The training samples that are not among the data: a set without splits gives the same samples for both."""
    if training.inputs.shape[1:] != data.inputs.shape[1:]:
        raise InputError(
            f"training: expected inputs of shape {tuple(data.inputs.shape[1:])}, as the data; "
            f"got {tuple(training.inputs.shape[1:])}"
        )
    evaluated = {x.numpy().tobytes() for x in data.inputs.cpu()}
    new = [i for i, x in enumerate(training.inputs.cpu()) if x.numpy().tobytes() not in evaluated]
    return training if len(new) == len(training.labels) else _taken(training, torch.tensor(new, dtype=torch.long))
