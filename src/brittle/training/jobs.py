"""What is to be trained, checked as a whole before anything runs or is written."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brittle.data.checks import check_batch
from brittle.data.load import Data
from brittle.errors import InputError
from brittle.models.borrow import device_of, frozen
from brittle.models.forward import logits_of
from brittle.models.selection import chosen_layers
from brittle.random_streams import generator
from brittle.storage.digest import digest
from brittle.training.interventions.assembly import Interventions, bind_constraints, bind_penalties
from brittle.training.recipe import Adversary, Recipe
from brittle.training.snapshots import read_snapshot
from brittle.training.streams import VALIDATION_SPLIT

Samples = tuple[Tensor, Tensor]
"""Inputs ``(N, ...)`` and labels ``(N,)``."""


@dataclass(frozen=True, eq=False)
class Job:
    """All that a process needs to train.

    Attributes:
        model: Where training starts; a copy.
        samples: What it trains on.
        validation: What selects the weights; None for nothing.
        recipe: How to train.
        interventions: The user's own.
        folder: Where history, weights and state go; None for nowhere.
        identity: Digests of model, data and teacher, and the recipe; a state of another one is refused. Empty without
            a folder.
    """

    model: nn.Module
    samples: Samples
    validation: Samples | None
    recipe: Recipe
    interventions: Interventions
    folder: Path | None
    identity: dict[str, Any]


def make_job(
    model: nn.Module,
    data: Data | Samples,
    recipe: Recipe,
    *,
    validation: Data | Samples | None = None,
    interventions: Interventions | None = None,
    folder: str | Path | None = None,
    overwrite: bool = False,
) -> Job:
    """Check everything that can be checked beforehand; arguments and errors as :func:`brittle.training.train`.

    Args:
        model: As there.
        data: As there.
        recipe: As there.
        validation: As there.
        interventions: As there.
        folder: As there; only read.
        overwrite: Whether a state in the folder is of no account.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    samples = _read_samples(data, "data")
    held_out = None if validation is None else _read_samples(validation, "validation")
    if (recipe.crop or recipe.flip) and samples[0].ndim != 4:
        raise InputError(f"crop, flip: expected images (N, C, H, W); got inputs of shape {tuple(samples[0].shape)}")
    if recipe.layers is not None:
        chosen_layers(model, recipe.layers)
    bind_penalties(model, recipe, Interventions())
    bind_constraints(model, recipe, Interventions())
    interventions = interventions or Interventions()
    _check_teacher(interventions.teacher, recipe, samples, classes=_run_model(model, samples).shape[1])
    if held_out is not None:
        _run_model(model, held_out)
    elif recipe.validation > 0:
        samples, held_out = split_validation(samples, recipe)
    where = None if folder is None else Path(folder)
    job = Job(copy.deepcopy(model), samples, held_out, recipe, interventions, where, {})
    if where is None:
        return job
    job = dataclasses.replace(job, identity=_identify(job))
    if not overwrite:
        _check_state(job.identity, where)
    return job


def _read_samples(data: Data | Samples, name: str) -> Samples:
    inputs, labels = (data.inputs, data.labels) if isinstance(data, Data) else data
    try:
        check_batch(inputs, labels)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return inputs, labels.long()


def split_validation(samples: Samples, recipe: Recipe) -> tuple[Samples, Samples]:
    """The samples to train on and the recipe's share to validate on, drawn by its seed; both in the order they had.

    Raises:
        InputError: One of the two would be empty.
    """
    inputs, labels = samples
    order = torch.randperm(len(labels), generator=generator(recipe.seed, VALIDATION_SPLIT)).to(labels.device)
    count = round(recipe.validation * len(labels))
    if not 0 < count < len(labels):
        raise InputError(
            f"validation: expected a share that leaves samples on both sides; got {recipe.validation} of {len(labels)}"
        )
    drawn, rest = order[:count].sort().values, order[count:].sort().values
    return (inputs[rest], labels[rest]), (inputs[drawn], labels[drawn])


def _run_model(model: nn.Module, samples: Samples) -> Tensor:
    """Logits of the samples with the smallest and the largest label: these two show labels out of range."""
    (inputs, labels), device = samples, device_of(model)
    ends = [int(labels.argmin()), int(labels.argmax())]
    with frozen(model):
        return logits_of(model, inputs[ends].to(device), labels[ends].to(device))


def _check_teacher(teacher: nn.Module | None, recipe: Recipe, samples: Samples, *, classes: int) -> None:
    """Raise unless there is a teacher exactly where the recipe wants one, with the network's inputs and classes."""
    if (teacher is None) != (recipe.distill == 0):
        there = "no teacher" if teacher is None else f"a {type(teacher).__name__}"
        raise InputError(f"teacher: expected a network exactly where distill is above 0; got {there}, {recipe.distill}")
    if teacher is None:
        return
    if not isinstance(teacher, nn.Module):
        raise InputError(f"teacher: expected a torch.nn.Module; got {type(teacher).__name__}")
    try:
        taught = _run_model(teacher, samples).shape[1]
    except InputError as error:
        raise InputError(f"teacher: {error}") from None
    if taught != classes:
        raise InputError(f"teacher: expected {classes} logits, as the network has; got {taught}")


def _identify(job: Job) -> dict[str, Any]:
    """What a state must be of to go on from it."""
    # The names go into the digest: others would refuse the states of earlier versions.
    tensors = {"inputs": job.samples[0], "labels": job.samples[1]}
    if job.validation is not None:
        tensors |= {"held inputs": job.validation[0], "held labels": job.validation[1]}
    teacher = job.interventions.teacher
    return {
        "model": _digest_network(job.model),
        "data": digest(tensors),
        "recipe": _plain(job.recipe),
        **({} if teacher is None else {"teacher": _digest_network(teacher)}),
    }


def _digest_network(model: nn.Module) -> str:
    """Of weights and kinds of modules: networks of equal weights may differ in what has none, such as activations."""
    structure = ";".join(f"{name}:{type(module).__qualname__}" for name, module in model.named_modules())
    return digest(model.state_dict()) + hashlib.sha256(structure.encode()).hexdigest()


def _plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as it will be read back from JSON: tuples as lists, and no infinity."""
    plain = dataclasses.asdict(recipe)
    if (adversary := recipe.adversary) is not None:
        plain["adversary"] |= {"p": str(adversary.p), "steps": adversary.count}
    read: dict[str, Any] = json.loads(json.dumps(plain))
    return read


def _check_state(identity: dict[str, Any], folder: Path) -> None:
    """Raise where the folder holds the state of another training."""
    snapshot = read_snapshot(folder)
    if snapshot is None:
        return
    there = snapshot[1].get("identity")
    if isinstance(there, dict) and isinstance(there.get("recipe"), dict):
        # Attributes newer than the state have their defaults.
        recipe = _plain(Recipe()) | there["recipe"]
        if isinstance(recipe["adversary"], dict):
            recipe["adversary"] = _plain(Recipe(adversary=Adversary(1.0)))["adversary"] | recipe["adversary"]
        there = there | {"recipe": recipe}
    for name, value in identity.items():
        if not isinstance(there, dict) or there.get(name) != value:
            raise InputError(
                f"folder: expected the state of the same training, another folder, or --overwrite; got {folder}, of a "
                f"training with another {name}"
            )
