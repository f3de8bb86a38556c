"""What is done to a smaller network so that it computes well again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from brittle.delivery.mending import FINAL, affordable, mended
from brittle.delivery.planning import Plan
from brittle.models.checkpoints import fill, read_state
from brittle.progress import Progress
from brittle.results.wording import budget, norm_name
from brittle.storage.codec import to_json
from brittle.storage.digest import digest
from brittle.training import Interventions, Moment, Recipe, train
from brittle.training.loop import WEIGHTS


def repaired(plan: Plan) -> nn.Module:
    """The smaller network, fitted to the uncompressed one on the samples seen, as far as was asked."""
    return mended(plan.removed.network, plan.original, plan.parts.seen[0], plan.removed.rows, plan.asked)


def fine_tuned(network: nn.Module, plan: Plan, folder: Path | None, progress: Progress) -> nn.Module:
    """A network trained as was asked; with ``distill`` the uncompressed one is its teacher.

    Args:
        network: The smaller network.
        plan: Where it comes from.
        folder: Keeps the state of the training and then its weights: the same call goes on, or is done at once. None
            keeps nothing.
        progress: Told the epochs.

    Returns:
        The trained network, in evaluation mode; single weights that were removed stay zero.

    Raises:
        InputError: As :func:`brittle.training.train`.
    """
    recipe = plan.asked.fine_tune
    if recipe is None:
        return network
    samples = plan.parts.training.inputs, plan.parts.training.labels
    teacher = plan.original if recipe.distill else None
    if folder is not None:
        tensors = {"network": network.state_dict(), "samples": samples, "teacher": teacher and teacher.state_dict()}
        folder /= hashlib.sha256((digest(tensors) + to_json(recipe)).encode()).hexdigest()[:16]
        if (folder / WEIGHTS).is_file():
            fill(network, read_state(folder / WEIGHTS))
            return network

    def report(moment: Moment) -> None:
        progress("fine-tuning", moment.epoch if moment.row else moment.epoch - 1, recipe.epochs)

    constraints = [hold_zeros] if plan.asked.remove == "weights" else []
    own = Interventions(teacher=teacher, constraints=constraints)
    return train(network, samples, recipe, interventions=own, folder=folder, callback=report).model


def hold_zeros(model: nn.Module) -> Callable[[], None]:
    """A constraint: weights (of two axes or more) that are zero now are set to zero whenever it is called."""
    zeros = [(p, p.detach() == 0) for p in model.parameters() if p.ndim > 1]

    def hold() -> None:
        with torch.no_grad():
            for parameter, zero in zeros:
                parameter.masked_fill_(zero, 0)

    return hold


def steps_of(plan: Plan) -> tuple[str, ...]:
    """What was done after the removal, in words."""
    asked, x = plan.asked, plan.parts.seen[0]
    count, fitted = len(x), len(affordable(plan.original, x, FINAL))
    batch_norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in plan.removed.network.modules())
    fits = asked.refit and asked.remove != "weights"
    steps = {
        f"layers fitted to the outputs of the uncompressed network on {fitted} samples": fits,
        f"statistics of batch norms measured again on {count} samples": asked.recalibrate and batch_norms and not fits,
    }
    tuning = [] if asked.fine_tune is None else [_tuning(asked.fine_tune)]
    return (*(step for step, done in steps.items() if done), *tuning)


def _tuning(recipe: Recipe) -> str:
    """A training in words."""
    parts = [f"fine-tuned for {recipe.epochs} epoch{'' if recipe.epochs == 1 else 's'}"]
    if recipe.adversary is not None:
        kind = ", one perturbation for all samples" if recipe.adversary.universal else ""
        parts.append(f"adversarially ({norm_name(recipe.adversary.p)} {budget(recipe.adversary.eps)}{kind})")
    if recipe.distill:
        parts.append(f"{100 * recipe.distill:g} % of the loss from the uncompressed network")
    parts += [f"with {name} {strength:g}" for name, strength in recipe.penalties.items()]
    return ", ".join(parts)
