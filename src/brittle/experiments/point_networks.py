"""What experiments on points of R^d share: networks on them, how these come to interpolate, and how far points are.

Points of any size are moved into the unit box, where training and attacks expect inputs; the network's first layer
moves them back. So radii in the box times :attr:`Box.unit` are radii between points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from brittle.attacks import apgd
from brittle.attacks.losses import Loss
from brittle.evaluation import Execution, Threat, minimal_distances
from brittle.models.borrow import frozen
from brittle.models.normalize import normalised
from brittle.training.interventions.assembly import Interventions
from brittle.training.loop import train
from brittle.training.recipe import Recipe

ROOM = (-4.0, 5.0)
"""Bounds of the attacks: in theory there are none, and no point within twice the box's reach is beyond these."""
TEMPERATURE = 4.0
"""Of the distance from the targets: their differences of at most 2 are small against it, which makes it nearly
quadratic."""

PARTNERS = 9
"""Other classes that attacks go towards, at most."""
STEPS = 50
"""Of the attack towards each class."""
BATCH = 128
"""Points a step, at most."""
STEPS_AN_EPOCH = 50
"""At least: a pass over few points costs more than its steps."""


@dataclass(frozen=True, eq=False)
class Box:
    """Points of R^d in the unit box.

    Attributes:
        inputs: ``(N, d)``, float32 in [0, 1].
        unit: Length in R^d of a length of 1 in the box.
    """

    inputs: Tensor
    unit: float

    @classmethod
    def of(cls, points: Tensor, reach: float | None = None) -> Box:
        """The points ``(N, d)`` over twice their largest entry (or ``reach``), the origin at the box's middle."""
        unit = 2 * (float(points.abs().max()) if reach is None else reach)
        return cls((points / unit + 0.5).clamp(0, 1).float(), unit)

    def behind(self, network: nn.Module) -> nn.Module:
        """A network on points of R^d as one on the box."""
        d = self.inputs.shape[1]
        return normalised(network, [0.5] * d, [1 / self.unit] * d)


def chain(sizes: Sequence[int], *, relu: bool, seed: int) -> nn.Sequential:
    """Dense layers without biases of these sizes, from input to logits, with or without ReLU between them."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out, bias=False), *([nn.ReLU()] if relu else [])]
    return nn.Sequential(*(layers[:-1] if relu else layers))


def train_to_targets(
    network: nn.Module, samples: tuple[Tensor, Tensor], teacher: nn.Module, recipe: Recipe
) -> nn.Module:
    """Train until differences of logits are those of ``teacher`` at every sample: an interpolant of its values.

    The distance is that of distillation at temperature :data:`TEMPERATURE`, ``T^2 KL(softmax(t / T) ||
    softmax(s / T))``, which is 0 where, and only where, all differences of logits are equal; for differences small
    against T it is the squared error of the logits less their mean, over twice the classes.

    Args:
        network: Where training starts.
        samples: Inputs in the unit box and labels.
        teacher: From the same inputs to as many logits.
        recipe: How; without ``distill``.
    """
    settings = {**vars(recipe), "distill": 1.0, "temperature": TEMPERATURE}
    return train(network, samples, Recipe(**settings), interventions=Interventions(teacher=teacher)).model


class NearestTarget(nn.Module):
    """The minimum-distance rule: answers with the target of the nearest point.

    Attributes:
        points: ``(N, d)``.
        targets: Logits of every point ``(N, classes)``.
    """

    points: Tensor
    targets: Tensor

    def __init__(self, points: Tensor, targets: Tensor) -> None:
        super().__init__()
        self.register_buffer("points", points)
        self.register_buffer("targets", targets)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, d)`` to ``(B, classes)``."""
        return self.targets[torch.cdist(x, self.points).argmin(1)]


def interpolate(network: nn.Module, points: Tensor, targets: Tensor, *, steps: int, seed: int) -> nn.Module:
    """Train until differences of logits at every point are those of its targets, taught by :class:`NearestTarget`.

    Args:
        network: Where training starts.
        points: Inputs in the unit box ``(N, d)``.
        targets: Logits ``(N, classes)``.
        steps: Of AdamW without weight decay, cosine schedule, of at most :data:`BATCH` points each.
        seed: Of their order.
    """
    batch = min(BATCH, len(points))
    repeats = math.ceil(STEPS_AN_EPOCH * batch / len(points))
    recipe = Recipe(
        epochs=math.ceil(steps * batch / (repeats * len(points))),
        batch_size=batch,
        schedule="cosine",
        weight_decay=0.0,
        validation=0.0,
        measure_every=0,
        seed=seed,
    )
    samples = points.repeat(repeats, 1), targets.argmax(1).repeat(repeats)
    return train_to_targets(network, samples, NearestTarget(points, targets), recipe)


def margin_gradients(network: nn.Module, x: Tensor, ours: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The margins ``f = s_ours - s_other`` at inputs ``(N, ...)``, and their gradients ``(N, d)``, in float64.

    Args:
        network: From inputs to logits; left bit-equal.
        x: Inputs.
        ours: Class of the first logit, ``(N,)``.
        other: That of the second, ``(N,)``.
    """
    with frozen(network), torch.enable_grad():
        inputs = x.detach().clone().requires_grad_()
        logits = network(inputs)
        margins = (logits.gather(1, ours[:, None]) - logits.gather(1, other[:, None]))[:, 0]
        (gradients,) = torch.autograd.grad(margins.sum(), inputs)
    return margins.detach().double(), gradients.flatten(1).double()


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """``|cos|`` of the angles between the rows of two matrices ``(N, d)``; NaN where one is zero."""
    return (a * b).sum(1).abs() / (a.norm(dim=1) * b.norm(dim=1))


def attacked_radii(network: nn.Module, x: Tensor, y: Tensor, partners: Tensor, *, largest: float, seed: int) -> Tensor:
    """Length of the least l_2 perturbation that was found for every input ``(N,)``: upper bounds of the radii.

    By bisection over budgets, without bounds of the box in the way; the network itself confirms every change of class.
    0 where an input is wrong without attack, infinite where none was found.

    The attacks are APGD on the cross-entropy, then towards one class after the other by the margin to it alone.
    Interpolants have margins of 1 to all classes at once, and what raises the cross-entropy there is not a step towards
    the class whose boundary is nearest.

    Args:
        network: From inputs to logits.
        x: Inputs ``(N, ...)``.
        y: Labels ``(N,)``.
        partners: Classes that each class is attacked towards, ``(classes, m)``.
        largest: Largest budget that is tried.
        seed: Of the attacks.
    """
    losses: list[str | Loss] = ["ce", *(partial(_margin_towards, partner=column) for column in partners.unbind(1))]
    threat = Threat([partial(apgd, loss=loss, steps=STEPS) for loss in losses], p=2, bounds=ROOM, seed=seed)
    execution = Execution(certify=False)
    return minimal_distances(network, x, y, threat, largest=largest, execution=execution).distance


def _margin_towards(logits: Tensor, y: Tensor, partner: Tensor) -> Tensor:
    return (logits.gather(1, partner[y][:, None]) - logits.gather(1, y[:, None]))[:, 0]


def nearest_partners(points: Tensor, labels: Tensor, classes: int) -> Tensor:
    """For every class the classes of the nearest points of others, ``(classes, m)``: :data:`PARTNERS` of them or all.

    Args:
        points: ``(N, d)``.
        labels: Their classes ``(N,)``.
        classes: Number of classes; of those without points the partners are arbitrary.
    """
    apart = torch.cdist(points.double(), points.double())
    between = torch.full((classes, classes), math.inf, dtype=torch.float64)
    places = (labels[:, None] * classes + labels).flatten()
    between = between.flatten().scatter_reduce(0, places, apart.flatten(), "amin").view(classes, classes)
    between.fill_diagonal_(math.inf)
    return between.argsort(1)[:, : min(PARTNERS, classes - 1)]
