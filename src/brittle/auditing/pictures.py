"""What of an audit can be looked at: samples under attack, directions and universal perturbations, as small arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from brittle.attacks.losses import margins
from brittle.evaluation.curves import draw_back
from brittle.evaluation.execution import Execution
from brittle.evaluation.worst_case import WorstCase, unchecked_logits
from brittle.models.layers import LayerView
from brittle.models.network import Network
from brittle.results import FragileSample, Pictures

FRAGILE = 10
"""Samples that are listed as the most fragile, at most."""
SHOWN = 3
"""Samples that are shown under every attack, at most."""
DIRECTIONS = 8
"""Leading directions that are shown, at most."""
LARGEST_SIDE = 512
"""Pixels of a side up to which an image is shown."""


@dataclass(frozen=True)
class Sketches:
    """What one norm adds to the pictures: some samples under its attack, and its best universal perturbation."""

    p: float
    worst: WorstCase
    universal: Tensor | None


def is_image(shape: Sequence[int]) -> bool:
    """Whether inputs are images ``(C, H, W)``: of one channel or three, and of a size that a page can show."""
    return len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) > 2 and max(shape[1:]) <= LARGEST_SIDE


def sample_sketches(worst: WorstCase, p: float, universal: Tensor | None) -> Sketches | None:
    """Some samples under attack, of classes that differ where there are such; None where inputs are no images.

    Shown are the first that the attack broke; where it broke fewer, the first right ones that it did not break follow.

    Args:
        worst: Samples under attack.
        p: The attack's norm.
        universal: The universal perturbation that fools most, shaped like one input; None for none.
    """
    if not is_image(tuple(worst.x.shape[1:])):
        return None
    broken = (worst.clean_correct & ~worst.robust_correct).nonzero()[:, 0].tolist()
    of_class: dict[int, int] = {}
    for row in broken:
        of_class.setdefault(int(worst.y[row]), row)
    unbroken = worst.robust_correct.nonzero()[:SHOWN, 0].tolist()
    chosen = [*dict.fromkeys([*of_class.values(), *broken, *unbroken])][:SHOWN]
    rows = torch.tensor(chosen, dtype=torch.long)
    tensors: dict[str, Any] = {
        name: t[rows.to(t.device)].cpu() for name, t in vars(worst).items() if isinstance(t, Tensor)
    }
    kept = replace(worst, **tensors)
    return Sketches(p, kept, None if universal is None else universal.detach().cpu())


def direction_sketches(
    views: Sequence[LayerView], directions: Mapping[str, Tensor], shape: Sequence[int]
) -> tuple[str, Tensor, Tensor] | None:
    """Name of the first layer, its leading right singular vectors as images ``(K, C, h, w)``, and their gains ``(K,)``.

    None where the first layer reads no image: a dense one as many numbers as the image has, or a convolution that
    reads its channels.

    Args:
        views: The layers.
        directions: Right singular vectors ``(n, K)`` by layer.
        shape: Of one input.
    """
    if not views or not is_image(shape) or views[0].name not in directions:
        return None
    first = views[0]
    V = directions[first.name][:, :DIRECTIONS].cpu()
    if first.geometry is None and V.shape[0] == math.prod(shape):
        patch = tuple(shape)
    elif first.geometry is not None and first.weight.ndim == 4 and first.weight.shape[1] == shape[0]:
        patch = tuple(first.weight.shape[1:])
    else:
        return None
    if not V.shape[1] or V.shape[0] != math.prod(patch):
        return None
    gains = (first.matrix.double().cpu() @ V).norm(dim=0)
    return first.name, V.mT.reshape(-1, *patch), gains


def join_pictures(
    by_norm: Sequence[Sketches | None],
    first_layer: tuple[str, Tensor, Tensor] | None,
    bounds: tuple[float, float],
) -> Pictures | None:
    """The pictures of an audit; None where inputs are no images."""
    norms = [sketches for sketches in by_norm if sketches is not None]
    if not norms:
        return None
    worst = WorstCase.joined([sketches.worst for sketches in norms])
    layer, directions, gains = first_layer or ("", worst.x[:0], torch.zeros(0))
    universal = [(sketches.p, sketches.universal) for sketches in norms if sketches.universal is not None]
    moved = torch.stack([u for _, u in universal]) if universal else worst.x[:0]
    by_sample = [sketches.p for sketches in norms for _ in range(len(sketches.worst.y))]
    return Pictures(
        bounds=torch.tensor(bounds, dtype=torch.float64).numpy(),
        norms=torch.tensor(by_sample, dtype=torch.float64).numpy(),
        index=worst.ids.long().numpy(),
        label=worst.y.numpy(),
        clean_prediction=worst.clean_logits.argmax(1).numpy(),
        adversarial_prediction=worst.adversarial_logits.argmax(1).numpy(),
        x=worst.x.float().numpy(),
        x_adv=worst.x_adv.float().numpy(),
        layer=layer,
        directions=directions.float().numpy(),
        gains=gains.double().numpy(),
        universal=moved.float().numpy(),
        universal_norms=torch.tensor([p for p, _ in universal], dtype=torch.float64).numpy(),
    )


def most_fragile(network: Network, worst: WorstCase, p: float, execution: Execution) -> tuple[FragileSample, ...]:
    """The samples, right without attack, that the shortest perturbations found change: shortest first.

    Every example found is drawn back towards its sample as far as the prediction stays wrong. Samples that none was
    found for follow by their margin under attack, the smallest first.

    Args:
        network: Judges.
        worst: Samples under attack.
        p: Norm of the distances.
        execution: Samples at once.
    """
    broken = worst.clean_correct & ~worst.robust_correct
    examples, distance = draw_back(network, worst, broken, p, execution)
    clean, under_attack = margins(worst.clean_logits, worst.y), margins(worst.adversarial_logits, worst.y)
    nearest = distance.argsort(stable=True)[:FRAGILE]
    rows = broken.nonzero()[:, 0][nearest]
    found = unchecked_logits(network.model, examples[nearest], execution.batch_size).argmax(1) if len(rows) else rows
    listed = [
        FragileSample(int(worst.ids[row]), int(worst.y[row]), int(taken), float(clean[row]), float(distance[place]))
        for row, taken, place in zip(rows.tolist(), found, nearest.tolist(), strict=True)
    ]
    left = worst.robust_correct.nonzero()[:, 0]
    left = left[under_attack[left].argsort(stable=True)][: FRAGILE - len(listed)]
    listed += [
        FragileSample(int(worst.ids[row]), int(worst.y[row]), int(worst.y[row]), float(clean[row]), None)
        for row in left.tolist()
    ]
    return tuple(listed)
