"""Images interpolated: what networks keep of the distance to the nearest image of another class, and what is predicted.

N training images, each a class of its own or with its digit. The least-norm linear interpolant keeps exactly phi of
half the distance (theory page, "Feature compression"); networks with hidden layers are trained to the same scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn
from torch.nn.functional import one_hot

from brittle.data.load import Data, load_data
from brittle.experiments.claims import Claim, change, chosen_rows, over_seeds, spearman
from brittle.experiments.experiment import Axes, Experiment
from brittle.experiments.plots import draw_means, evenly, look
from brittle.experiments.point_networks import (
    attacked_radii,
    chain,
    cosines,
    interpolate,
    margin_gradients,
    nearest_partners,
)
from brittle.linear.compressibility import RANK_TOLERANCE
from brittle.linear.minimum_distance import (
    interpolant_cosine,
    nearest_centre_radius,
    nearest_neighbour_radius,
    nearest_of_another_class,
)
from brittle.models.forward import logits_of
from brittle.reporting.drawing import legend
from brittle.results import Statistic

OWN, DIGIT = "own", "digit"
"""What the scores tell: every image a class of its own, or the class that it has."""
FORMULA = 5
"""Pairs at which the linear interpolant is compared with the formula: each takes a decomposition."""


def run(
    *,
    data: str,
    n: int,
    classes: str,
    hidden: int,
    seed: int,
    width: int,
    steps: int,
    points: int,
    data_root: str | None = None,
) -> dict[str, Any]:
    """Interpolate N training images, by the least-norm linear map or by a network, and attack what comes of it.

    Args:
        data: The data set.
        n: Number of images, drawn by the seed.
        classes: :data:`OWN` or :data:`DIGIT`.
        hidden: Hidden layers with ReLU; 0 for the linear interpolant.
        seed: Of images, weights and attacks.
        width: Neurons of a hidden layer.
        steps: Of the optimiser, at least.
        points: Images at which radii are measured, at most; as many test images.
        data_root: Folder of the data sets.

    Returns:
        Medians over the images, each paired with the nearest of another class: ``phi``, ``|cos|`` between the gradient
        of the pair's margin and its direction, of the linear interpolant; ``cosine``, the same of the network;
        ``kept``, the attacked radius (any other class; an upper bound) over half the distance of the pair;
        ``linear_kept``, the same of the linear interpolant, exact. ``formula``, for own classes the largest difference
        of the linear interpolant's ``|cos|`` from phi by projection. ``residual``, the largest distance of a margin
        from 1, and ``residual_linear``, that of the linear map's scores from their targets. With digits also the
        medians over test images that the network gets right: ``test_radius``, attacked; ``test_neighbour``, the
        certified radius of the 1-nearest-neighbour rule; ``test_centre``, the exact one of the nearest class mean.
    """
    root = None if data_root is None else Path(data_root)
    drawn = load_data(data, root=root, split="train", limit=n, seed=seed)
    x, digits = drawn.inputs.flatten(1), drawn.labels
    labels = torch.arange(len(x)) if classes == OWN else digits
    targets = one_hot(labels, len(x) if classes == OWN else drawn.classes)
    W = torch.linalg.pinv(x.double(), rtol=RANK_TOLERANCE) @ targets.double()
    if hidden:
        start = chain((x.shape[1], *[width] * hidden, targets.shape[1]), relu=True, seed=seed)
        network = interpolate(start, x, targets.float(), steps=steps, seed=seed)
    else:
        network = nn.Linear(x.shape[1], targets.shape[1], bias=False)
        network.weight.data = W.mT.float()
    chosen = torch.arange(len(x))[:points]
    row = {
        "residual_linear": float((x.double() @ W - targets).abs().max()),
        **_at_images(network, W, x, labels, chosen, seed),
    }
    if classes == OWN:
        row["formula"] = _against_formula(W, x.double(), chosen[:FORMULA])
    else:
        row |= _at_test_images(network, drawn, load_data(data, root=root, limit=points, seed=seed), seed)
    return row


def _at_images(network: nn.Module, W: Tensor, x: Tensor, labels: Tensor, chosen: Tensor, seed: int) -> dict[str, float]:
    """What network and linear interpolant keep of the distance to the nearest image of another class."""
    points, y = x.double(), labels[chosen]
    nearest, apart = nearest_of_another_class(x[chosen], y, x, labels)
    way = points[chosen] - points[nearest]
    margins, gradients = margin_gradients(network, x[chosen], y, labels[nearest])
    largest = float(apart.max())
    partners = nearest_partners(x, labels, W.shape[1])
    radii = attacked_radii(network, x[chosen], y, partners, largest=largest, seed=seed)
    linear_gradients = (W[:, y] - W[:, labels[nearest]]).mT
    return {
        "phi": float(cosines(linear_gradients, way).median()),
        "cosine": float(cosines(gradients, way).median()),
        "kept": float((radii / (apart / 2)).median()),
        "linear_kept": float((_linear_radii(W, points[chosen], y) / (apart / 2)).median()),
        "residual": float((margins - 1).abs().max()),
    }


def _linear_radii(W: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Exact distances from points ``(B, d)`` to the nearest boundary of their class under scores ``x W``."""
    scores = x @ W
    margins = scores.gather(1, y[:, None]) - scores
    slopes = torch.stack([(W[:, [c]] - W).norm(dim=0) for c in y])
    return (margins / slopes).nan_to_num(nan=math.inf).amin(1).clamp_min(0)


def _against_formula(W: Tensor, x: Tensor, chosen: Tensor) -> float:
    """Largest difference between ``|cos|`` of the linear map's gradient and phi by projection, at pairs in a row."""
    differences = []
    for i in chosen.tolist():
        j = (i + 1) % len(x)
        way = (x[i] - x[j])[None]
        differences.append(float(cosines((W[:, i] - W[:, j])[None], way)) - float(interpolant_cosine(x, i, j)))
    return max(map(abs, differences))


def _at_test_images(network: nn.Module, drawn: Data, test: Data, seed: int) -> dict[str, float]:
    """Radii at test images that the network gets right: its own, and those of two rules that look at distances."""
    x, points = test.inputs.flatten(1), drawn.inputs.flatten(1)
    right = logits_of(network, x, test.labels).argmax(1) == test.labels
    x, y = x[right], test.labels[right]
    if not len(x):
        return dict.fromkeys(("test_radius", "test_neighbour", "test_centre"), math.nan)
    present = drawn.labels.unique()
    means = torch.stack([points[drawn.labels == label].double().mean(0) for label in present])
    largest = float(torch.cdist(points, points).max())
    partners = nearest_partners(points, drawn.labels, drawn.classes)
    return {
        "test_radius": float(attacked_radii(network, x, y, partners, largest=largest, seed=seed).median()),
        "test_neighbour": float(nearest_neighbour_radius(x, points, drawn.labels).median()),
        "test_centre": float(nearest_centre_radius(x, means).median()),
    }


def draw(table: pd.DataFrame) -> Figure:
    """phi, |cos theta| and the attacked radius over N; the latter two against each other and against phi."""
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    figure.set_label("Interpolated images: predicted and found")
    over_n, against, radii = figure.subplots(1, 3)
    own = table[table.classes == OWN]
    places, ticks = evenly(table, "n")
    networks = own.assign(place=places)
    draw_means(over_n, networks[networks.hidden == 0], "place", "phi", series=0)
    depths = sorted(networks.hidden[networks.hidden > 0].unique())
    for series, hidden in enumerate(depths, 1):
        rows = networks[networks.hidden == hidden]
        draw_means(over_n, rows, "place", "cosine", series=series)
        against.plot(rows.phi, rows.cosine, linestyle="none", alpha=0.7, **look(series))
        radii.plot(rows.cosine, rows.kept, linestyle="none", alpha=0.7, **look(series))
    over_n.set_xticks(range(len(ticks)), ticks)
    over_n.set(title="|cos| over the number of images", xlabel="Images, N", ylabel="|cos| to the nearest image")
    against.set(title="Found against predicted", xlabel="φ, from the images", ylabel="|cos θ|, from the network")
    radii.set(title="Attacked radius", xlabel="|cos θ|", ylabel="over half the distance")
    for axis in (against, radii):
        axis.axline((0, 0), slope=1, linewidth=0.6, color="grey")
    for axis in (over_n, against, radii):
        axis.grid(visible=True)
        axis.set_ylim(bottom=0)
    names = ["φ, linear interpolant", *(f"{hidden} hidden layer{'s' if hidden > 1 else ''}" for hidden in depths)]
    legend(figure, [Line2D([], [], **look(series)) for series in range(len(names))], names)
    return figure


def networks_with(classes: str, quantity: Callable[[pd.DataFrame], float]) -> Callable[[pd.DataFrame], Statistic]:
    """A quantity of the networks with hidden layers, over seeds."""
    return lambda table: over_seeds(quantity)(chosen_rows(table[table.hidden > 0], {"classes": classes}))


def correlation(x: str, y: str) -> Callable[[pd.DataFrame], Statistic]:
    """Spearman's correlation over all networks with hidden layers and classes of their own."""
    return lambda table: spearman(x, y, {"classes": OWN})(table[table.hidden > 0])


LINEAR = {"hidden": 0, "classes": OWN}
FIGURE = "arXiv 2406.16200, Figure 2 and its tables"
CLAIMS = (
    Claim(
        "The linear interpolant decides along the predicted share of what separates two images.",
        "theory page; arXiv 2406.16200, Theorem 1",
        over_seeds(lambda rows: float(rows.formula.max()), LINEAR),
        at_most=1e-6,
        null=1e-4,
        measure="Largest difference between its |cos| and φ by projection, over pairs and N",
    ),
    Claim(
        "Attacks find the radius of the linear interpolant.",
        "a check of the attack",
        over_seeds(lambda rows: float((rows.kept / rows.linear_kept).max()), LINEAR),
        at_most=1.05,
        null=1.5,
        measure="Median attacked radius over the exact one, the largest over N",
    ),
    Claim(
        "The more images are interpolated, the less the linear interpolant keeps.",
        FIGURE,
        over_seeds(change("phi", "n"), LINEAR),
        at_most=-0.3,
        measure="Median φ at the largest number of images less that at the smallest",
    ),
    Claim(
        "Networks with hidden layers keep less as well.",
        FIGURE,
        networks_with(OWN, change("cosine", "n")),
        at_most=-0.2,
        measure="Median |cos θ| at the largest number of images less that at the smallest, mean over depths",
    ),
    Claim(
        "φ matches what networks with hidden layers keep.",
        FIGURE,
        networks_with(OWN, lambda rows: float((rows.cosine - rows.phi).abs().mean())),
        at_most=0.1,
        null=0.2,
        measure="Mean of |median |cos θ| − median φ| over N and depths",
    ),
    Claim(
        "φ orders what networks with hidden layers keep.",
        FIGURE,
        correlation("phi", "cosine"),
        at_least=0.8,
        measure="Spearman's ρ of median φ and median |cos θ| over N, depths and seeds",
    ),
    Claim(
        "What networks keep of the direction orders what they keep of the radius.",
        FIGURE,
        correlation("cosine", "kept"),
        at_least=0.8,
        measure="Spearman's ρ of median |cos θ| and median attacked radius over half the distance",
    ),
    Claim(
        "Networks are less robust than the minimum-distance rule between images.",
        "arXiv 2406.16200, abstract",
        networks_with(OWN, lambda rows: float(rows.kept.mean())),
        at_most=0.9,
        null=1.0,
        measure="Median attacked radius over half the distance to the nearest image, mean over N and depths",
    ),
    Claim(
        "At test images networks are less robust than the nearest-neighbour rule is proven to be.",
        "arXiv 2406.16200, abstract",
        networks_with(DIGIT, lambda rows: float((rows.test_radius / rows.test_neighbour).median())),
        at_most=0.9,
        null=1.0,
        measure="Median attacked radius over the rule's median certified radius, at test images that the network gets "
        "right, median over N and depths",
    ),
)


def _grids(common: Axes, own: tuple[int, ...], digit: tuple[int, ...]) -> list[Axes]:
    """Images with classes of their own at some depths, and with their digits at others."""
    return [{**common, "classes": OWN, "hidden": own}, {**common, "classes": DIGIT, "hidden": digit}]


EXPERIMENT = Experiment(
    name="feature_mnist",
    title="Images interpolated: predicted and found",
    source="Gao et al., arXiv 2406.16200, Figure 2 and the tables on MNIST",
    run=run,
    figure=draw,
    grids={
        "smoke": _grids(
            {"data": "digits", "n": (10, 20), "seed": 0, "width": 30, "steps": 100, "points": 2}, (0, 1), (1,)
        ),
        "small": _grids(
            {
                "data": "mnist",
                "n": (10, 50, 100, 200, 400, 700),
                "seed": (0, 1, 2),
                "width": 400,
                "steps": 3000,
                "points": 30,
            },
            (0, 1, 2, 3),
            (0, 2),
        ),
        "paper": _grids(
            {
                "data": "mnist",
                "n": (10, 50, 100, 200, 400, 700),
                "seed": tuple(range(10)),
                "width": 3000,
                "steps": 30_000,
                "points": 200,
            },
            (0, 1, 2, 3),
            (0, 1, 2, 3),
        ),
    },
    claims=CLAIMS,
    seconds={"smoke": 1},
    about=(
        "N training images, drawn by the seed, are interpolated: the score of an image is 1 for its class and 0 for "
        "all others, the class being the image itself, or its digit. Each image is paired with the nearest of another "
        "class. φ is the |cos| of the angle between the gradient of the pair's margin and the way from one to the "
        "other for the least-norm linear map; θ is that angle for a network with hidden layers of 400, ReLU and no "
        "biases, trained until its differences of scores are the same, by distillation from the nearest-image rule.",
        "Attacks are APGD in ℓ₂, on the cross-entropy and towards each of nine classes, without bounds of the inputs; "
        "they give upper bounds of radii. The "
        "nearest-neighbour rule keeps its answer at a training image up to half the distance; at test images its "
        "radius is a lower bound.",
    ),
)
