"""What is to be trained, checked as a whole before anything runs or is written."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
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
from brittle.training.interventions.assembly import Penalty, named_constraint
from brittle.training.interventions.constraints import CONSTRAINTS
from brittle.training.interventions.penalties import PENALTIES
from brittle.training.recipe import Recipe
from brittle.training.snapshots import read_snapshot

Constraint = Callable[[nn.Module], Callable[[], object]]
"""From a model to what is done to its weights after every step."""
VALIDATION_SEED = 3
"""Stream of random numbers that picks the validation samples."""


@dataclass(frozen=True, eq=False)
class Job:
    """All that a process needs to train.

    Attributes:
        model: Where training starts; a copy.
        inputs: Training inputs ``(N, ...)``.
        labels: Their labels ``(N,)``.
        held: Validation inputs and labels; None for none.
        recipe: How to train.
        penalties: Further penalties with their strengths.
        constraints: Further constraints.
        folder: Where history, weights and state go; None for nowhere.
        identity: Digests of model, data and recipe; a state of another one is refused. Empty without a folder.
    """

    model: nn.Module
    inputs: Tensor
    labels: Tensor
    held: tuple[Tensor, Tensor] | None
    recipe: Recipe
    penalties: Sequence[tuple[Penalty, float]]
    constraints: Sequence[Constraint]
    folder: Path | None
    identity: dict[str, Any]


def prepared(
    model: nn.Module,
    data: Data | tuple[Tensor, Tensor],
    recipe: Recipe | None = None,
    *,
    validation: Data | tuple[Tensor, Tensor] | None = None,
    penalties: Sequence[tuple[Penalty, float]] = (),
    constraints: Sequence[Constraint] = (),
    folder: str | Path | None = None,
    anew: bool = False,
) -> Job:
    """Check everything that can be checked beforehand; arguments and errors as :func:`brittle.training.train`.

    Args:
        model: As there.
        data: As there.
        recipe: As there.
        validation: As there.
        penalties: As there.
        constraints: As there.
        folder: As there; only read.
        anew: Whether a state in the folder is of no account.
    """
    recipe, folder = recipe or Recipe(), None if folder is None else Path(folder)
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    inputs, labels = _samples(data, "data")
    held = None if validation is None else _samples(validation, "validation")
    own = _split(inputs, labels, recipe) if held is None and recipe.validation > 0 else (inputs, labels, held)
    if (recipe.crop or recipe.flip) and inputs.ndim != 4:
        raise InputError(f"crop, flip: expected images (N, C, H, W); got inputs of shape {tuple(inputs.shape)}")
    for given, known in ((recipe.penalties, PENALTIES), (recipe.constraints, CONSTRAINTS)):
        if unknown := sorted(set(given) - set(known)):
            raise InputError(f"recipe: expected names among {', '.join(known)}; got {', '.join(unknown)}")
    if recipe.layers is not None or recipe.penalties:
        chosen_layers(model, recipe.layers)
    for name, value in recipe.constraints.items():
        named_constraint(name, value, model, recipe)
    for x, y in ((inputs, labels), *(() if held is None else (held,))):
        _check_model(model, x, y)
    job = Job(copy.deepcopy(model), *own, recipe, tuple(penalties), tuple(constraints), folder, {})
    if folder is None:
        return job
    job = dataclasses.replace(job, identity=_identity(job))
    if not anew:
        _check_state(job, folder)
    return job


def _samples(data: Data | tuple[Tensor, Tensor], name: str) -> tuple[Tensor, Tensor]:
    inputs, labels = (data.inputs, data.labels) if isinstance(data, Data) else data
    try:
        check_batch(inputs, labels)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return inputs, labels.long()


def _split(inputs: Tensor, labels: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    order = torch.randperm(len(labels), generator=generator(recipe.seed, VALIDATION_SEED)).to(labels.device)
    n = round(recipe.validation * len(labels))
    if not 0 < n < len(labels):
        raise InputError(f"validation: a share of {recipe.validation} of {len(labels)} samples is {n}")
    kept, held = order[n:].sort().values, order[:n].sort().values
    return inputs[kept], labels[kept], (inputs[held], labels[held])


def _check_model(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Run the model on the samples with the smallest and the largest label."""
    device, ends = device_of(model), [int(y.argmin()), int(y.argmax())]
    with frozen(model):
        logits_of(model, x[ends].to(device), y[ends].to(device))


def _identity(job: Job) -> dict[str, Any]:
    """What a state must be of to go on from it."""
    structure = ";".join(f"{name}:{type(module).__qualname__}" for name, module in job.model.named_modules())
    held = {} if job.held is None else {"held inputs": job.held[0], "held labels": job.held[1]}
    return {
        "model": digest(job.model.state_dict()) + hashlib.sha256(structure.encode()).hexdigest(),
        "data": digest({"inputs": job.inputs, "labels": job.labels, **held}),
        "recipe": _plain(job.recipe),
    }


def _plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON gives it back."""
    plain = dataclasses.asdict(recipe)
    plain["milestones"] = list(recipe.milestones)
    plain["layers"] = None if recipe.layers is None else list(recipe.layers)
    if recipe.adversary is not None:
        plain["adversary"]["p"] = str(recipe.adversary.p)
    return plain


def _check_state(job: Job, folder: Path) -> None:
    """Raise where the folder holds the state of another training."""
    found = read_snapshot(folder)
    kept = {} if found is None else found[1].get("identity")
    for name, value in job.identity.items() if found is not None else ():
        if not isinstance(kept, dict) or kept.get(name) != value:
            raise InputError(
                f"folder: {folder} holds the state of a training with another {name}; expected the same, another "
                "folder, or --overwrite"
            )
