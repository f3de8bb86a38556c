"""Training against one perturbation for all inputs, against one a sample, and without attack: spread and fooling.

The notes on the paper's final version say that training against universal perturbations lowers the top-k spread. The
spread is the part of a layer's structure that makes its largest rows stand out, and with them the direction that a
universal perturbation goes along.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import nn

from brittle.experiments.claims import Claim, over_seeds
from brittle.experiments.dense_networks import (
    PAPER,
    SHARE,
    SMOKE,
    fooling_of,
    initial_norm,
    splits,
    structure_of,
    train_dense,
)
from brittle.experiments.experiment import Axes, Experiment, Scalar
from brittle.experiments.plots import draw_means, evenly, look
from brittle.linear.compressibility import row_norms, spread
from brittle.models.layers import read_layers
from brittle.reporting.drawing import legend, panels
from brittle.results import Statistic
from brittle.training.recipe import Adversary, Recipe

STEPS = 5
"""Of the PGD that trains against single samples."""
TRAININGS = {
    "none": "without attack",
    "sample": "against one for each sample",
    "universal": "against one for all",
}
"""Kinds of training, in words."""


def run(
    *,
    data: str,
    attacked: str,
    alpha: float,
    eps: float,
    seed: int,
    width: int,
    hidden: int,
    training: int | None,
    samples: int,
    epochs: int,
    patience: int | None,
    data_root: str | None = None,
) -> dict[str, Any]:
    """Train one network, measure its hidden matrices, and attack it sample by sample and with one perturbation for all.

    Args:
        data: The data set.
        attacked: What it trains against, of :data:`TRAININGS`; half of every batch is attacked.
        alpha: Strength of the group lasso.
        eps: l_inf budget of that attack, and the larger one of those measured; the other is half of it.
        seed: Of weights, batches and attacks.
        width: Neurons of a hidden layer.
        hidden: Hidden layers.
        training: Training samples; None for all.
        samples: Test samples that are attacked; half of them fit the universal perturbation, the others judge it.
        epochs: Passes over the training samples, at most.
        patience: Epochs without a better validation accuracy that end training; None for no end.
        data_root: Folder of the data sets.

    Returns:
        Structure, and fooling at and over both budgets (:mod:`brittle.experiments.dense_networks`); ``spread``, of the
        rows' l_1 norms at a tenth of them, mean over hidden layers, and ``first_spread``, that of the first.
    """
    learnt, test = splits(data, data_root, training=training, samples=samples)
    adversaries = {"none": None, "sample": Adversary(eps, steps=STEPS), "universal": Adversary(eps, universal=True)}
    recipe = Recipe(
        epochs=epochs,
        patience=patience,
        penalties={"group_lasso": alpha} if alpha else {},
        constraints={"frobenius": initial_norm(width)},
        adversary=adversaries[attacked],
        measure_every=0,
        seed=seed,
    )
    network = train_dense(learnt, recipe, width=width, hidden=hidden, rank=width)
    spreads = spreads_of(network)
    budgets = {"half": (math.inf, eps / 2), "whole": (math.inf, eps)}
    return {
        **structure_of(network),
        "spread": sum(spreads) / len(spreads),
        "first_spread": spreads[0],
        **fooling_of(network, test, budgets, seed),
    }


def spreads_of(network: nn.Module) -> list[float]:
    """Of every hidden matrix, ``1 - nu_(k) / nu_(1)`` of the rows' l_1 norms at a tenth of them (Definition 2.1).

    It is 1 where fewer rows than that are left.
    """
    rows = [row_norms(view.matrix.detach().double().cpu()) for view in read_layers(network).views[:-1]]
    return [float(spread(norms, max(1, len(norms) // SHARE))) for norms in rows]


MEASURED = (
    ("spread", "Top-k spread β of rows"),
    ("row_error", "k-term error of rows"),
    ("universal_fooled", "Fooled by one for all"),
    ("sample_fooled", "Fooled each by its own"),
)


def draw(table: pd.DataFrame) -> Figure:
    """What is measured over the strength of the group lasso, a line a kind of training."""
    figure, axes = panels("Does training against universal perturbations lower the spread?", len(MEASURED), 3.8)
    place, written = evenly(table, "alpha")
    table = table.assign(place=place)
    for axis, (column, words) in zip(axes, MEASURED, strict=True):
        for series, attacked in enumerate(TRAININGS):
            draw_means(axis, table[table.attacked == attacked], "place", column, series=series)
        axis.set_xticks(range(len(written)), list(written))
        axis.set(title=words, xlabel="Group lasso, α", ylim=(0, 1.03))
        axis.grid(visible=True)
    axes[0].set_ylabel(f"Of hidden layers, k a tenth of the rows\nn = {table.seed.nunique()} seeds, 95 % intervals")
    axes[2].set_ylabel(f"Share of right samples,\nmean over ℓ∞ {table.eps.max() / 2:g} and {table.eps.max():g}")
    handles = [Line2D([], [], **look(series)) for series in range(len(TRAININGS))]
    legend(figure, handles, [f"trained {words}" for words in TRAININGS.values()])
    return figure


Quantity = Callable[[pd.DataFrame], float]


def effect(column: str, attacked: str = "universal") -> Quantity:
    """Mean of a column over networks trained under an attack less that over those trained without."""

    def quantity(rows: pd.DataFrame) -> float:
        return float(rows[column][rows.attacked == attacked].mean() - rows[column][rows.attacked == "none"].mean())

    return quantity


def compressible(quantity: Quantity) -> Callable[[pd.DataFrame], Statistic]:
    """A quantity of the networks under the strongest group lasso, over seeds."""
    statistic = over_seeds(quantity)
    return lambda table: statistic(table[table.alpha == table.alpha.max()])


def beyond_robustness(rows: pd.DataFrame) -> float:
    """Change of the spread under universal training beyond what training sample by sample has at the same gain.

    ``c_u - c_s g_u / g_s``, c the change of the spread and g the fall of the share that is fooled sample by sample,
    each against training without attack; NaN where training sample by sample gains nothing.
    """
    gains = {attacked: -effect("sample_fooled", attacked)(rows) for attacked in ("universal", "sample")}
    if gains["sample"] <= 0:
        return math.nan
    return effect("spread")(rows) - effect("spread", "sample")(rows) * gains["universal"] / gains["sample"]


PLACE = "final version, on universal perturbations"
SPREAD = "Spread of the rows' norms at a tenth of them, mean over hidden layers"
CONTRAST = "trained against universal perturbations less trained without attack"
CLAIMS = (
    Claim(
        "Training against universal perturbations lowers the top-k spread.",
        PLACE,
        over_seeds(effect("spread"), {"alpha": 0.0}),
        at_most=-0.05,
        measure=f"{SPREAD}, no group lasso, {CONTRAST}",
    ),
    Claim(
        "It lowers the top-k spread of networks with compressible rows.",
        PLACE,
        compressible(effect("spread")),
        at_most=-0.05,
        measure=f"{SPREAD}, the strongest group lasso, {CONTRAST}",
    ),
    Claim(
        "It lowers the spread more than training sample by sample does, for what either gains in robustness.",
        f"{PLACE}, made comparable",
        over_seeds(beyond_robustness),
        at_most=-0.02,
        measure="Change of the spread less that of training sample by sample times the ratio of the falls in the share "
        "fooled sample by sample, means over strengths",
    ),
    Claim(
        "It makes networks less vulnerable to universal perturbations.",
        PLACE,
        over_seeds(effect("universal_fooled"), {"alpha": 0.0}),
        at_most=-0.05,
        measure=f"Share of right samples that one perturbation fools, no group lasso, {CONTRAST}",
    ),
    Claim(
        "It makes networks with compressible rows less vulnerable to universal perturbations.",
        PLACE,
        compressible(effect("universal_fooled")),
        at_most=-0.1,
        measure=f"Share of right samples that one perturbation fools, the strongest group lasso, {CONTRAST}",
    ),
)


def _grid(common: dict[str, Scalar], seeds: int, alphas: tuple[float, ...], eps: float) -> Axes:
    return {**common, "seed": tuple(range(seeds)), "alpha": (0.0, *alphas), "attacked": tuple(TRAININGS), "eps": eps}


SMALL: dict[str, Scalar] = {
    "data": "mnist", "width": 400, "hidden": 2, "training": 20_000, "samples": 300, "epochs": 5, "patience": None,
}  # fmt: skip
EXPERIMENT = Experiment(
    name="universal_training",
    title="Training against universal perturbations",
    source="arXiv 2507.17725, final version (ICLR 2026)",
    run=run,
    figure=draw,
    grids={
        "smoke": _grid({**SMOKE, "samples": 40}, 1, (0.03,), 0.1),
        "small": _grid(SMALL, 5, (0.003, 0.01), 0.1),
        "paper": _grid(PAPER, 5, (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1), 8 / 255),
    },
    seconds={"smoke": 3, "small": 20},
    claims=CLAIMS,
    about=(
        "Fully connected networks with ReLU and no biases, hidden matrices at the Frobenius norm of their start after "
        "each step, with and without a group lasso. Half of every batch is attacked in training: not at all, each "
        "sample by PGD, or all by one perturbation that is kept from batch to batch (Shafahi et al. 2020).",
        "All are then attacked at the training's budget and at half of it: sample by sample by the worst of APGD with "
        "100 steps on the cross-entropy and 100 on the DLR loss, and by the better of a universal perturbation fitted "
        "on half of the test samples and one read from the first layer's weights, both judged on the other half. "
        "Shares are of the samples that are right without attack.",
        "The spread β is one less the ratio of the k-th largest row to the largest; it is 1 where fewer than k rows "
        "are left. The sources give no settings for this sentence; these are our own.",
    ),
)
