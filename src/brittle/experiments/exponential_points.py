"""Exponentially many points: every corner z of a cube, seen as x = A z, its class the sign of the last coordinate.

One row of the inverse of A classifies all 2^d points, and reads a single direction of d: its radius is O(1), while half
the distance between classes grows with d (theory page, "Feature compression"). Linear networks are compared with the
published table, networks with ReLU with the optimal radius.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn

from brittle.experiments.claims import Claim, change, chosen_rows, mean_of, over_seeds, pearson, slope
from brittle.experiments.experiment import Axes, Experiment, Scalar
from brittle.experiments.plots import draw_means, look
from brittle.experiments.point_networks import (
    Box,
    attacked_radii,
    chain,
    cosines,
    margin_gradients,
    train_to_targets,
)
from brittle.random_streams import generator
from brittle.reporting.drawing import legend, log_scale
from brittle.results import Statistic
from brittle.training.loop import train
from brittle.training.recipe import Recipe

TARGETS, LABELS = "targets", "labels"
"""What is trained: the values -1 and 1 of the class at every point, or the cross-entropy of the labels."""
TRIED = 10_000
"""Points on which the accuracy is measured where there are too many for all."""
NEIGHBOURS = 500
"""Random points of the other class to which the distance of a sample of points is told."""
MATRIX, CORNERS, TESTED, OTHERS = range(4)
"""Streams of random numbers of one seed: the matrix, the points to train on, those to measure at, and neighbours."""
PUBLISHED_RUNS = 18
"""Valid runs behind the published means."""
PUBLISHED = {"phi": 0.3280, "cosine_1": 0.3645}
"""Their means at d = 12 (arXiv 2406.16200); their mean absolute difference is 0.0367, |cos theta_2| about 0.99."""


def run(
    *, network: str, loss: str, d: int, width: int, steps: int, batch: int, points: int, seed: int
) -> dict[str, Any]:
    """Train one network on the corners of a cube under one matrix, and measure how it tells the classes apart.

    Args:
        network: ``linear``: one hidden layer without activation, on all 2^d points, again and again; ``relu``: two
            hidden layers, on as many random points as all steps take, each seen once (as good as).
        loss: :data:`TARGETS` or :data:`LABELS`.
        d: Dimension.
        width: Neurons of a hidden layer.
        steps: Of the optimiser, at least.
        batch: Points a step.
        points: Random points at which radii are measured.
        seed: Of matrix, points, weights and attacks.

    Returns:
        ``phi``, ``|R_dd| / ||a_d||``: of the classifier that reads off z_d exactly, ``|cos|`` between its gradient and
        the direction ``a_d`` that changes z_d alone. Means over the points: ``cosine_1``, the same of the network;
        ``cosine_2``, ``|cos|`` between its gradient and the last row of the inverse. ``difference``, ``|cosine_1 -
        phi|``; ``accuracy``, and ``valid``, whether it is 1. Medians over points that are right, in units of A z:
        ``radius``, the distance to the network's decision boundary (exact for linear networks, an upper bound for
        others); ``optimal``, exactly half the distance to the nearest point of the other class; ``sampled``, the same
        among :data:`NEIGHBOURS` random ones. ``exact_linear``, ``|R_dd|``: the radius of the exact linear classifier.
    """
    A = torch.randn(d, d, generator=generator(seed, MATRIX), dtype=torch.float64)
    linear = network == "linear"
    z = corners(d) if linear else signs(steps * batch, d, generator(seed, CORNERS))
    box = boxed(A, z)
    sizes = (d, width, 2) if linear else (d, width, width, 2)
    recipe = Recipe(
        epochs=math.ceil(steps * batch / len(z)),
        batch_size=batch,
        weight_decay=0.0,
        validation=0.0,
        measure_every=0,
        seed=seed,
    )
    start, samples = box.behind(chain(sizes, relu=not linear, seed=seed)), (box.inputs, (z[:, -1] > 0).long())
    if loss == TARGETS:
        trained = train_to_targets(start, samples, box.behind(_reads_last(A)), recipe)
    else:
        trained = train(start, samples, recipe).model
    tested = signs(max(TRIED, points), d, generator(seed, TESTED))
    everywhere = z if linear else tested
    with torch.no_grad():
        right = trained(boxed(A, everywhere).inputs).argmax(1) == (everywhere[:, -1] > 0)
    accuracy = float(right.double().mean())
    return {"accuracy": accuracy, "valid": accuracy == 1, **_measure(trained, A, tested[:points], linear, seed)}


def _measure(trained: nn.Module, A: Tensor, z: Tensor, linear: bool, seed: int) -> dict[str, float]:
    """The columns of :func:`run` that are told at single points."""
    box, label, last = boxed(A, z), (z[:, -1] > 0).long(), A[:, -1]
    margins, gradients = margin_gradients(trained, box.inputs, label, 1 - label)
    inverse = torch.linalg.inv(A)[-1]
    phi = 1 / float(inverse.norm() * last.norm())  # |R_dd| = 1 / ||last row of the inverse||
    right = margins > 0
    if linear:
        radii = margins / gradients.norm(dim=1) * box.unit
    else:
        largest = 2 * float(last.norm()) / box.unit  # there lies a point of the other class
        partners = torch.tensor([[1], [0]])
        radii = attacked_radii(trained, box.inputs, label, partners, largest=largest, seed=seed) * box.unit
    cosine = float(cosines(gradients, last.expand_as(gradients)).mean())
    return {
        "phi": phi,
        "cosine_1": cosine,
        "cosine_2": float(cosines(gradients, inverse.expand_as(gradients)).mean()),
        "difference": abs(cosine - phi),
        "radius": _median(radii[right]),
        "optimal": _median(half_distances(A, z)[right]),
        "sampled": _median(sampled_half_distances(A, z, seed)[right]),
        "exact_linear": phi * float(last.norm()),
    }


def _median(values: Tensor) -> float:
    return float(values.median()) if len(values) else math.nan


def corners(d: int) -> Tensor:
    """All corners of the cube ``{-1, 1}^d``, ``(2^d, d)``."""
    return 2 * (torch.arange(2**d)[:, None] >> torch.arange(d) & 1).double() - 1


def signs(n: int, d: int, draws: torch.Generator) -> Tensor:
    """Random corners, ``(n, d)``, in float32: there may be millions."""
    return 2 * torch.randint(2, (n, d), generator=draws).float() - 1


def boxed(A: Tensor, z: Tensor) -> Box:
    """The points A z, the box reaching as far as any corner does."""
    return Box.of(z @ A.T.to(z.dtype), reach=float(A.abs().sum(1).max()))


def _reads_last(A: Tensor) -> nn.Module:
    """The linear classifier with logits -z_d and z_d at A z: the last row of the inverse."""
    network = nn.Linear(len(A), 2, bias=False)
    row = torch.linalg.inv(A)[-1].float()
    network.weight.data = torch.stack([-row, row])
    return network


def half_distances(A: Tensor, z: Tensor) -> Tensor:
    """Exactly half the distance from points A z to the nearest A z' whose last coordinate is another, ``(P,)``.

    ``z - z' = 2 e`` with e_i either 0 or z_i, and e_d = z_d; so it is the least ``||A e||`` over 2^(d-1) choices. With
    ``A = Q R`` the last entries of ``R e`` are known as soon as the last entries of e are, and their length only grows:
    a choice longer than ``||a_d||``, the length of changing z_d alone, is given up (Fincke & Pohst 1985).

    Args:
        A: ``(d, d)``.
        z: Corners ``(P, d)``.
    """
    R = torch.linalg.qr(A.double(), mode="r").R
    d, z = len(R), z.double()
    owner = torch.arange(len(z))
    partial = z[:, -1:] * R[:, -1]
    for i in reversed(range(d - 1)):
        taken = partial + z[owner, i, None] * R[:, i]
        partial, owner = torch.cat([partial, taken]), torch.cat([owner, owner])
        kept = partial[:, i:].norm(dim=1) <= A[:, -1].norm() * (1 + 1e-12)
        partial, owner = partial[kept], owner[kept]
    lengths = torch.full((len(z),), math.inf, dtype=torch.float64)
    return lengths.scatter_reduce(0, owner, partial.norm(dim=1), "amin")


def sampled_half_distances(A: Tensor, z: Tensor, seed: int) -> Tensor:
    """Half the distance from points A z to the nearest of :data:`NEIGHBOURS` random points of the other class."""
    others = signs(NEIGHBOURS, len(A), generator(seed, OTHERS)).double()
    lengths = []
    for last in (-1, 1):  # the same points in both classes
        others[:, -1] = last
        lengths.append(torch.cdist(z.double() @ A.T, others @ A.T).amin(1) / 2)
    return torch.where(z[:, -1] > 0, lengths[0], lengths[1])


def draw(table: pd.DataFrame) -> Figure:
    """|cos theta_1| beside phi over d; one against the other; radii of ReLU networks beside optimal ones over d."""
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    figure.set_label("Exponentially many points: directions kept, and radii")
    over_d, against, radii = figure.subplots(1, 3)
    linear = table[(table.network == "linear") & table.valid]
    by_loss = {TARGETS: "trained on −1 and 1", LABELS: "trained on labels"}
    draw_means(over_d, chosen_rows(linear, {"loss": TARGETS}), "d", "phi", series=1)
    for series, loss in ((0, TARGETS), (2, LABELS)):
        rows = chosen_rows(linear, {"loss": loss})
        draw_means(over_d, rows, "d", "cosine_1", series=series)
        against.plot(rows.phi, rows.cosine_1, linestyle="none", alpha=0.6, **look(series))
    over_d.set(title="Linear networks", xlabel="Dimension d", ylabel="|cos| to what separates classes")
    against.axline((0, 0), slope=1, linewidth=0.6, color="grey")
    against.set(title="One mark a run", xlabel="φ, from the data", ylabel="|cos θ₁|, from the network")
    relu = table[table.network == "relu"]
    for series, name in enumerate(RADII):
        draw_means(radii, relu, "d", name, series=series)
    radii.set(title="ReLU networks", xlabel="Dimension d", ylabel="Radius")
    radii.set_yscale("log")
    if len(relu):
        log_scale(radii, relu.d)
    for axis in (over_d, against, radii):
        axis.grid(visible=True)
    over_d.set_ylim(bottom=0)
    lines = {0: by_loss[TARGETS], 1: "φ", 2: by_loss[LABELS]}
    handles = [Line2D([], [], **look(series)) for series in lines]
    legend(figure, handles, list(lines.values()))
    bottom, top = radii.get_ylim()
    radii.set_ylim(bottom, 4 * top)  # room for the legend above the lines, on a scale of logarithms
    handles = [Line2D([], [], **look(series)) for series in range(len(RADII))]
    radii.legend(handles, list(RADII.values()), fontsize=7, loc="upper left")
    return figure


RADII = {"radius": "attacked", "optimal": "half distance, all points", "sampled": "half distance, 500 points"}
"""Columns of radii of ReLU networks, in words."""
VALID: dict[str, Scalar] = {"network": "linear", "loss": TARGETS, "valid": True}
RELU: dict[str, Scalar] = {"network": "relu"}


def apart_from_paper(column: str) -> Callable[[pd.DataFrame], Statistic]:
    """How many standard errors the mean over valid runs at d = 12 lies from the published one.

    The standard error is that of a difference of two means, ours and one of :data:`PUBLISHED_RUNS` runs, of which the
    spread is not published and taken to be ours. The interval is 1.96 to both sides.
    """

    def statistic(table: pd.DataFrame) -> Statistic:
        values = chosen_rows(table, VALID | {"d": 12})[column].to_numpy(float)
        n = len(values)
        if n < PUBLISHED_RUNS:
            return Statistic(None, None, None, n, f"fewer than {PUBLISHED_RUNS} valid runs at d = 12")
        error = values.std(ddof=1) * math.sqrt(1 / n + 1 / PUBLISHED_RUNS)
        apart = abs(float(values.mean()) - PUBLISHED[column]) / float(error)
        return Statistic(apart, max(0.0, apart - 1.96), apart + 1.96, n)

    return statistic


def growth(column: str, less: str | None = None) -> Callable[[pd.DataFrame], Statistic]:
    """Slope of the logarithm of a column (over that of another) over log d, of the ReLU networks of a seed."""

    def quantity(rows: pd.DataFrame) -> float:
        ratio = rows[column] / (1.0 if less is None else rows[less])
        return slope("y", "x")(pd.DataFrame({"y": np.log(ratio), "x": np.log(rows.d)}))

    return over_seeds(quantity, RELU)


def kept_by_labels(table: pd.DataFrame) -> Statistic:
    """``cosine_1`` of networks trained on labels less that of networks on targets, where both are valid."""
    rows = chosen_rows(table, {"network": "linear", "valid": True})
    rows = rows.assign(on_labels=(rows.loss == LABELS).astype(float))
    both = rows.groupby(["seed", "d"]).filter(lambda pair: len(pair) == 2)
    return over_seeds(change("cosine_1", "on_labels"))(both)


PLACE = "arXiv 2406.16200, the table of linear networks at d = 12"
THEOREM = "arXiv 2406.16200, Theorem 5"
CLAIMS = (
    *(
        Claim(
            f"The published mean of {words} is met ({PUBLISHED[column]}, {PUBLISHED_RUNS} valid runs).",
            PLACE,
            apart_from_paper(column),
            at_most=2.0,
            null=4.0,
            measure="Difference of the means over valid runs at d = 12, in standard errors",
        )
        for column, words in {"cosine_1": "|cos θ₁|", "phi": "φ"}.items()
    ),
    Claim(
        "What is left of the direction between classes is predicted by the data alone (the paper: 0.0367).",
        PLACE,
        over_seeds(mean_of("difference"), VALID | {"d": 12}),
        at_most=0.04,
        null=0.1,
        measure="Mean of ||cos θ₁| − φ| over valid runs at d = 12",
    ),
    Claim(
        "The network reads along the last row of the inverse (the paper: about 0.99).",
        PLACE,
        over_seeds(mean_of("cosine_2"), VALID | {"d": 12}),
        at_least=0.99,
        null=0.9,
        measure="Mean of |cos θ₂| over valid runs at d = 12",
    ),
    Claim(
        "The prediction holds in all dimensions.",
        "arXiv 2406.16200, the curves over d = 7 to 17",
        over_seeds(mean_of("difference"), VALID),
        at_most=0.05,
        null=0.1,
        measure="Mean of ||cos θ₁| − φ| over valid runs and d",
    ),
    Claim(
        "Run by run the prediction follows what the network keeps.",
        "arXiv 2406.16200, Figure 2",
        pearson("phi", "cosine_1", VALID),
        at_least=0.95,
        measure="Pearson's correlation of φ and |cos θ₁| over valid runs and d",
    ),
    Claim(
        "Training on labels keeps more of the direction than interpolating values of the classes.",
        "beyond the paper",
        kept_by_labels,
        at_least=0.05,
        measure="|cos θ₁| of networks trained on the cross-entropy less that on −1 and 1, where both are valid",
    ),
    Claim(
        "Optimal radii grow with the dimension.",
        THEOREM,
        growth("optimal"),
        at_least=0.4,
        measure="Slope over log d of the log of half the distance to the nearest point of the other class, of all 2^d",
    ),
    Claim(
        "Radii of networks with ReLU do not grow with the dimension.",
        THEOREM,
        growth("radius"),
        at_most=0.2,
        null=0.5,
        measure="Slope over log d of the log of the attacked radius; null is √d",
    ),
    Claim(
        "Networks with ReLU fall behind the optimal radius as the dimension grows.",
        THEOREM,
        growth("radius", "optimal"),
        at_most=-0.3,
        measure="Slope over log d of the log of the attacked radius over half the distance to the nearest point of all",
    ),
    Claim(
        "They fall behind the distances between random points, which grow as d.",
        "theory page, of codebooks",
        growth("radius", "sampled"),
        at_most=-0.5,
        measure=f"The same over half the distance to the nearest of {NEIGHBOURS} random points of the other class",
    ),
)


def _grids(linear: Axes, labels_at: tuple[int, ...], relu: Axes, common: Axes) -> list[Axes]:
    """Linear networks on targets, at some dimensions also on labels, and networks with ReLU."""
    on_labels = {**linear, "d": labels_at}
    return [
        {**common, "network": "linear", "loss": TARGETS, **linear},
        {**common, "network": "linear", "loss": LABELS, **on_labels},
        {**common, "network": "relu", "loss": LABELS, **relu},
    ]


EXPERIMENT = Experiment(
    name="exponential_points",
    title="Exponentially many points: radii of O(1) against optimal ones",
    source="Gao et al., arXiv 2406.16200, Theorem 5 and its table",
    run=run,
    figure=draw,
    grids={
        "smoke": _grids(
            {"d": (4, 6), "width": 30, "steps": 100},
            (6,),
            {"d": (4, 6), "width": 16, "steps": 60},
            {"batch": 64, "points": 6, "seed": 0},
        ),
        "small": _grids(
            {"d": (7, 9, 11, 12, 13, 15, 17), "width": 3000, "steps": 1000, "batch": 128, "seed": tuple(range(24))},
            (12,),
            {"d": (10, 14, 20, 30), "width": 256, "steps": 6000, "batch": 256, "seed": tuple(range(10))},
            {"points": 50},
        ),
        "paper": _grids(
            {"d": tuple(range(7, 18)), "width": 3000, "steps": 10_000, "batch": 128, "seed": tuple(range(50))},
            (12,),
            {"d": (10, 14, 20, 30, 40), "width": 1000, "steps": 50_000, "batch": 256, "seed": tuple(range(20))},
            {"points": 200},
        ),
    },
    claims=CLAIMS,
    seconds={"smoke": 1, "small": 7},
    about=(
        "Points x = A z, z in {−1, 1}^d, A a Gaussian matrix, the class z_d. Linear networks have one hidden layer "
        "without activation and see all 2^d points; they are trained until differences of their logits are −2 and 2 "
        "(by distillation from the exact classifier), or on the cross-entropy of the labels. A run is valid if all "
        "points are right. θ₁ is the angle between the network's gradient and the direction that changes z_d alone, θ₂ "
        "the one between the gradient and the last row of A⁻¹, φ is |cos| of the angle between the two directions.",
        "Networks with two hidden layers and ReLU see random points, none twice where there are many, and are attacked "
        "by APGD in ℓ₂, an upper bound of their radius. Half the distance to the nearest of all 2^(d − 1) "
        "points of the other class is exact, by a search that gives up what is already longer.",
        "The paper gives neither loss nor optimiser. Of its runs those alone count that have training accuracy 1, and "
        "which these are depends on both.",
    ),
)
