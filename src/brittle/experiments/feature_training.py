"""How much of the way to another class networks decide by: along a training, layer by layer, and under attack.

What reviews of Gao et al. (arXiv 2406.16200) ask: where in a network the direction between classes is lost, when in
training, and whether adversarial training keeps more of it (theory page, "Feature compression").
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from brittle.evaluation import Execution, Threat
from brittle.evaluation.features import feature_compression
from brittle.experiments.claims import Claim, change, chosen_rows, over_seeds
from brittle.experiments.dense_networks import ON_MNIST, splits
from brittle.experiments.experiment import Axes, Experiment
from brittle.experiments.plots import draw_means, look
from brittle.experiments.training_time import train_along
from brittle.models.build import build_model
from brittle.reporting.drawing import legend
from brittle.results import Statistic
from brittle.training.recipe import Adversary, Recipe

EPS = 1.5
"""Of adversarial training in l_2: half the distance to the nearest image of another class is about 3 on MNIST."""
ATTACKED = 16
"""Pairs that are attacked and followed through the layers."""
ALONG = ("epoch", "cosine", "ratio", "first_layer", "last_hidden")
"""Columns that hold a list, one number an epoch of :func:`brittle.experiments.training_time.measured_epochs`."""


def run(
    *,
    data: str,
    adversarial: bool,
    seed: int,
    width: int,
    training: int | None,
    samples: int,
    epochs: int,
    data_root: str | None = None,
) -> dict[str, Any]:
    """Train one network, with or without attacks, and measure it at several epochs on the way.

    Args:
        data: The data set.
        adversarial: Whether every training sample is attacked, in l_2 at :data:`EPS`, by 5 steps.
        seed: Of weights, batches and attacks.
        width: Neurons of each of two hidden layers.
        training: Training samples; None for all.
        samples: Test samples, among which partners are looked for.
        epochs: Passes over the training samples.
        data_root: Folder of the data sets.

    Returns:
        Lists of :data:`ALONG`, medians over test samples that are right: ``cosine``, ``|cos|`` between the gradient of
        the margin and the way to the nearest sample of another class; ``ratio``, the attacked radius (an upper bound)
        over half that distance; ``first_layer`` and ``last_hidden``, ``|cos|`` of the rule that takes the nearer of the
        two in that layer's representation (:func:`brittle.feature_compression`).
    """
    learnt, test = splits(data, data_root, training=training, samples=samples)
    adversary = Adversary(EPS, 2.0, steps=5, ratio=1.0) if adversarial else None
    recipe = Recipe(epochs=epochs, adversary=adversary, validation=0.0, measure_every=0, seed=seed)
    rows = []
    size = {"in_features": learnt.inputs[0].numel(), "width": width, "depth": 3, "classes": learnt.classes}
    for epoch, network in train_along(build_model("fcn", size, seed=seed), learnt, recipe).items():
        threat, execution = Threat("fast", p=2, seed=seed), Execution(certify=False)
        told = feature_compression(network, test, threat, pairs=samples, attacked=ATTACKED, execution=execution)
        layers = [layer.cosine or 0.0 for layer in told.layers]
        rows.append(
            {
                "epoch": epoch,
                "cosine": median([pair.cosine or 0.0 for pair in told.pairs]),
                "ratio": median([pair.ratio for pair in told.pairs if pair.ratio is not None]),
                "first_layer": layers[0],
                "last_hidden": layers[-2],
            }
        )
    return {name: [row[name] for row in rows] for name in ALONG}


def by_epoch(table: pd.DataFrame) -> pd.DataFrame:
    """One row an epoch."""
    return table.explode(list(ALONG), ignore_index=True).astype(dict.fromkeys(ALONG, float))


def draw(table: pd.DataFrame) -> Figure:
    """|cos|, the attacked radius over half the distance, and |cos| of the last hidden layer, over epochs."""
    rows = by_epoch(table)
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    figure.set_label("What networks decide by, over training")
    shown = {
        "cosine": "|cos θ| of the network",
        "ratio": "Radius over half the distance",
        "last_hidden": "|cos| in the last hidden layer",
    }
    for axis, (column, title) in zip(figure.subplots(1, 3), shown.items(), strict=True):
        for series, attacked in enumerate((False, True)):
            draw_means(axis, rows[rows.adversarial == attacked], "epoch", column, series=series)
        axis.set_xscale("log", base=2)
        axis.set(title=title, xlabel=f"Epochs (n = {table.seed.nunique()} seeds)")
        axis.set_ylim(bottom=0)
        axis.grid(visible=True)
    handles = [Line2D([], [], **look(series)) for series in range(2)]
    legend(figure, handles, ["trained without attack", f"trained under attack, ℓ₂ {EPS:g}"])
    return figure


def by_attacks(column: str) -> Callable[[pd.DataFrame], Statistic]:
    """A column after the last epoch: adversarially trained networks less those without attack, over seeds."""

    def statistic(table: pd.DataFrame) -> Statistic:
        rows = by_epoch(table)
        rows = rows[rows.epoch == rows.epoch.max()]
        return over_seeds(change(column, "attacked"))(rows.assign(attacked=rows.adversarial.astype(float)))

    return statistic


def without_attack(quantity: Callable[[pd.DataFrame], float]) -> Callable[[pd.DataFrame], Statistic]:
    """A quantity of the networks that saw no attack, one row an epoch, over seeds."""
    return lambda table: over_seeds(quantity)(by_epoch(chosen_rows(table, {"adversarial": False})))


def lost_inside(rows: pd.DataFrame) -> float:
    """|cos| in the last hidden layer less that in the first, after the last epoch."""
    last = rows[rows.epoch == rows.epoch.max()]
    return float((last.last_hidden - last.first_layer).mean())


PLACE = "reviews of arXiv 2406.16200"
CLAIMS = (
    Claim(
        "Adversarial training keeps more of the direction between classes.",
        PLACE,
        by_attacks("cosine"),
        at_least=0.05,
        measure="Median |cos θ| after the last epoch, trained under attack less trained without",
    ),
    Claim(
        "It keeps more of the minimum-distance rule's radius.",
        PLACE,
        by_attacks("ratio"),
        at_least=0.05,
        measure="Median attacked radius over half the distance after the last epoch, under attack less without",
    ),
    Claim(
        "Features are compressed as training goes on.",
        PLACE,
        without_attack(change("cosine", "epoch")),
        at_most=-0.02,
        measure="Median |cos θ| after the last epoch less that after the first, trained without attack",
    ),
    Claim(
        "They are compressed layer by layer.",
        PLACE,
        without_attack(lost_inside),
        at_most=-0.02,
        measure="|cos| in the last hidden layer less that in the first, after the last epoch, trained without attack",
    ),
)


def _grid(scale: str, epochs: int, seeds: int) -> Axes:
    return {**ON_MNIST[scale], "epochs": epochs, "adversarial": (False, True), "seed": tuple(range(seeds))}


EXPERIMENT = Experiment(
    name="feature_training",
    title="What networks decide by, over training and under attack",
    source="reviews of Gao et al., arXiv 2406.16200",
    run=run,
    figure=draw,
    grids={"smoke": _grid("smoke", 2, 1), "small": _grid("small", 16, 5), "paper": _grid("paper", 64, 10)},
    claims=CLAIMS,
    seconds={"smoke": 2},
    about=(
        "Networks 784-400-400-10 on MNIST with ReLU and no biases, trained by AdamW without attack, or with all "
        f"samples attacked in ℓ₂ {EPS:g} by 5 steps, and measured at several epochs of one training. Every test sample "
        "that is right is paired with the nearest one of another class; θ is the angle between the gradient of the "
        "margin and the way to it. The attack is the preset fast in ℓ₂, an upper bound of the radius.",
    ),
)
