"""What a network achieves on the samples that were held out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brittle.models.borrow import frozen
from brittle.random_streams import generator
from brittle.training.adversarial import add_shared, perturb
from brittle.training.recipe import Recipe
from brittle.training.streams import VALIDATION_KEYS


def validate(
    model: nn.Module, samples: tuple[Tensor, Tensor], recipe: Recipe, shared: Tensor | None = None
) -> tuple[float, float, float | None]:
    """Loss and accuracy, and accuracy under the training attack.

    Args:
        model: The network; evaluated in evaluation mode and left bit-equal.
        samples: Inputs ``(N, ...)`` and labels ``(N,)``, on the model's device.
        recipe: Batch size, adversary and seed; an attack on single samples starts at the same points in every epoch.
        shared: The perturbation ``(1, ...)`` of a universal adversary as it stands; None without one.

    Returns:
        Mean cross-entropy in nats, the share that is right, and the share that is right and stays right under the
        attack; the last is None without an adversary.
    """
    (x, y), adversary = samples, recipe.adversary
    keys = torch.randint(2**62, (len(y),), generator=generator(recipe.seed, VALIDATION_KEYS)).to(y.device)
    loss, right, robust = 0.0, 0, 0
    with frozen(model):
        for rows in torch.arange(len(y), device=y.device).split(max(256, recipe.batch_size)):
            with torch.no_grad():
                logits = model(x[rows])
                loss += float(F.cross_entropy(logits, y[rows], reduction="sum"))
            correct = logits.argmax(1) == y[rows]
            right += int(correct.sum())
            if adversary is not None:
                if shared is None:
                    attacked = perturb(model, x[rows], y[rows], adversary, keys[rows])
                else:
                    attacked = add_shared(x[rows], shared, adversary)
                with torch.no_grad():
                    robust += int((correct & (model(attacked).argmax(1) == y[rows])).sum())
    return loss / len(y), right / len(y), None if adversary is None else robust / len(y)
