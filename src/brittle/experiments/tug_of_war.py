"""The tug-of-war of the standard group lasso: compressibility grows while the scale falls, epoch by epoch.

No norm is held. Every network is measured at several epochs of one training, under the standard group lasso, which
lowers the scale, and under the scale-invariant one, which does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from brittle.experiments.claims import Claim, change, chosen_rows, over_seeds
from brittle.experiments.dense_networks import (
    ON_MNIST,
    loss_gap,
    robustness_of,
    scale_of,
    splits,
    structure_of,
)
from brittle.experiments.experiment import Axes, Experiment
from brittle.experiments.plots import draw_means, look
from brittle.experiments.training_time import train_along
from brittle.models.build import build_model
from brittle.reporting.drawing import legend
from brittle.results import Statistic
from brittle.training.recipe import Recipe

STANDARD, INVARIANT = "group_lasso", "scale_invariant_group_lasso"
PLAIN = {"penalty": STANDARD, "alpha": 0.0}
"""The network without a penalty."""
NORM = "linf"
BUDGET = {NORM: (math.inf, 0.03)}
WORDS = "ℓ∞ 0.03"
"""Of the attack: the norm that the paper pairs with rows, at a budget where networks without penalty keep most."""
ALONG = ("epoch", "row_error", "spectral_error", "scale", "structure_inf", "structure_2", "norm_inf", "norm_2")
MEASURED = (*ALONG, "clean_accuracy", f"robust_{NORM}", f"kept_{NORM}", "loss_gap")
"""Columns that hold a list, one number an epoch of :func:`brittle.experiments.training_time.measured_epochs`."""


def run(
    *,
    data: str,
    penalty: str,
    alpha: float,
    seed: int,
    width: int,
    training: int | None,
    samples: int,
    epochs: int,
    data_root: str | None = None,
) -> dict[str, Any]:
    """Train one network, and measure it at several epochs on the way.

    Args:
        data: The data set.
        penalty: :data:`STANDARD` or :data:`INVARIANT`.
        alpha: Strength of the penalty; 0 for none.
        seed: Of weights, batches and attacks.
        width: Neurons of a hidden layer.
        training: Training samples; None for all.
        samples: Test samples that are attacked.
        epochs: Passes over the training samples.
        data_root: Folder of the data sets.

    Returns:
        Lists of :data:`MEASURED`, one number a measured epoch, and ``flags``.
    """
    learnt, test = splits(data, data_root, training=training, samples=samples)
    recipe = Recipe(
        epochs=epochs, penalties={penalty: alpha} if alpha else {}, validation=0.0, measure_every=0, seed=seed
    )
    rows = []
    size = {"in_features": learnt.inputs[0].numel(), "width": width, "depth": 3, "classes": learnt.classes}
    start = build_model("fcn", size, seed=seed)
    for epoch, network in train_along(start, learnt, recipe).items():
        robust = robustness_of(network, test, BUDGET, seed)
        gap = loss_gap(network, test, *BUDGET[NORM], seed)
        rows.append({"epoch": epoch, **structure_of(network), **scale_of(network), **robust, "loss_gap": gap})
    flags = [f"{row['flags']} after epoch {row['epoch']}" for row in rows if row["flags"]]
    return {**{name: [row[name] for row in rows] for name in MEASURED}, "flags": "; ".join(flags)}


def by_epoch(table: pd.DataFrame) -> pd.DataFrame:
    """One row an epoch; ``log_`` columns are decimal logarithms."""
    rows = table.explode(list(MEASURED), ignore_index=True)
    rows = rows.astype(dict.fromkeys(MEASURED, float))
    return rows.assign(**{f"log_{name}": np.log10(rows[name]) for name in ("scale", "structure_inf", "norm_inf")})


def draw(table: pd.DataFrame) -> Figure:
    """Compressibility, scale, norms at one scale, their product, robustness and the gap in loss, over epochs."""
    rows = by_epoch(table)
    figure = Figure(figsize=(8.6, 5.8), layout="constrained")
    figure.set_label("Standard and scale-invariant group lasso over training time")
    panels = figure.subplots(2, 3, squeeze=False).ravel()
    shown = {
        "row_error": "k-term error of rows",
        "scale": "Scale: Frobenius norms, product",
        "structure_inf": "Structure: ℓ∞ norms / scale",
        "norm_inf": "ℓ∞ operator norms, product",
        f"kept_{NORM}": f"Robust over clean, {WORDS}",
        "loss_gap": f"Gap in loss, {WORDS}, nats",
    }
    lines = _networks(rows)
    for axis, (column, title) in zip(panels, shown.items(), strict=True):
        for series, where in enumerate(lines.values()):
            draw_means(axis, chosen_rows(rows, where), "epoch", column, series=series)
        axis.set_xscale("log", base=2)
        epochs = sorted(rows.epoch.unique())
        axis.set_xticks(epochs, [f"{epoch:g}" for epoch in epochs])
        axis.minorticks_off()
        axis.set(title=title, xlabel=f"Epochs (n = {table.seed.nunique()} seeds)")
        axis.grid(visible=True)
        if column in ("scale", "structure_inf", "norm_inf"):
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
    legend(figure, [Line2D([], [], **look(series)) for series in range(len(lines))], list(lines))
    return figure


def _networks(rows: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """No penalty, the mildest and the strongest standard one, and the strongest scale-invariant one, in words."""
    strengths = {name: sorted(set(rows.alpha[rows.penalty == name]) - {0.0}) for name in (STANDARD, INVARIANT)}
    networks = {"no penalty": dict(PLAIN)}
    for alpha in dict.fromkeys((strengths[STANDARD][0], strengths[STANDARD][-1])):
        networks[f"group lasso, α = {alpha:g}"] = {"penalty": STANDARD, "alpha": alpha}
    alpha = strengths[INVARIANT][-1]
    return networks | {f"scale-invariant, α = {alpha:g}": {"penalty": INVARIANT, "alpha": alpha}}


Pick = Callable[[Sequence[float]], float]
"""Which of the strengths above 0, or of the epochs."""


def against_none(
    column: str, epoch: Pick, penalty: str = STANDARD, alpha: Pick = max
) -> Callable[[pd.DataFrame], Statistic]:
    """A column under a penalty less that without, after the first (``min``) or last (``max``) epoch, over seeds."""

    def statistic(table: pd.DataFrame) -> Statistic:
        rows = by_epoch(table)
        rows = rows[rows.epoch == epoch(list(rows.epoch))]
        own = rows[(rows.penalty == penalty) & (rows.alpha > 0)]
        if own.empty:
            return Statistic(None, None, None, 0, f"there is no network under {penalty}")
        chosen = own[own.alpha == alpha(list(own.alpha))]
        return over_seeds(change(column, "alpha"))(pd.concat([chosen, chosen_rows(rows, PLAIN)]))

    return statistic


def over_time(column: str) -> Callable[[pd.DataFrame], Statistic]:
    """A column after the last epoch less that after the first, under the strongest standard penalty, over seeds."""

    def statistic(table: pd.DataFrame) -> Statistic:
        rows = by_epoch(table)
        rows = rows[rows.penalty == STANDARD]
        return over_seeds(change(column, "epoch"))(rows[rows.alpha == rows.alpha.max()])

    return statistic


def turned(table: pd.DataFrame) -> Statistic:
    """How much the robust share under the strongest standard penalty loses over training against that without it."""
    rows = by_epoch(table)
    rows = rows[rows.penalty == STANDARD]

    def quantity(seed: pd.DataFrame) -> float:
        ends = (seed[seed.alpha == alpha] for alpha in (seed.alpha.max(), 0.0))
        strong, plain = (change(f"kept_{NORM}", "epoch")(end) for end in ends)
        return strong - plain

    return over_seeds(quantity)(rows)


PLACE = "section 4.1, second footnote, of the appendix"
KEPT = f"Robust over clean accuracy at {WORDS}"
CLAIMS = (
    Claim(
        "Under the standard group lasso rows become more compressible as training goes on.",
        PLACE,
        over_time("row_error"),
        at_most=-0.1,
        measure="1-norm k-term error of rows at a tenth, last measured epoch less first, strongest penalty",
    ),
    Claim(
        "Meanwhile the scale of the parameters falls.",
        PLACE,
        over_time("log_scale"),
        at_most=-0.1,
        measure="log₁₀ of the product of Frobenius norms, last measured epoch less first, strongest penalty",
    ),
    Claim(
        "The scale ends below that of a network without a penalty.",
        PLACE,
        against_none("log_scale", max),
        at_most=-0.3,
        measure="log₁₀ of the product of Frobenius norms after the last epoch, strongest penalty less none",
    ),
    Claim(
        "Compressibility pulls the other way: norms at one scale grow.",
        PLACE,
        against_none("log_structure_inf", max),
        at_least=0.1,
        measure="log₁₀ of the product of ℓ∞ norms over that of Frobenius norms after the last epoch, "
        "strongest penalty less none",
    ),
    Claim(
        "At first the scale wins: norms are smaller than without a penalty.",
        PLACE,
        against_none("log_norm_inf", min),
        at_most=-0.05,
        measure="log₁₀ of the product of ℓ∞ norms after the first epoch, strongest penalty less none",
    ),
    Claim(
        "At first the penalty makes the network more robust.",
        "our reading of the footnote",
        against_none(f"kept_{NORM}", min),
        at_least=0.01,
        measure=f"{KEPT} after the first epoch, strongest penalty less none",
    ),
    Claim(
        "Compressibility eventually wins: the network ends less robust.",
        PLACE,
        against_none(f"kept_{NORM}", max),
        at_most=-0.05,
        measure=f"{KEPT} after the last epoch, strongest penalty less none",
    ),
    Claim(
        "Over training, robustness falls behind that of a network without a penalty.",
        PLACE,
        turned,
        at_most=-0.05,
        measure=f"{KEPT}, last measured epoch less first, strongest penalty less none",
    ),
    Claim(
        "A mild penalty, under which the scale wins, makes networks more robust.",
        "our reading of the footnote",
        against_none(f"kept_{NORM}", max, alpha=min),
        at_least=0.01,
        measure=f"{KEPT} after the last epoch, mildest penalty less none",
    ),
    Claim(
        "The gap in loss, which feels the scale, is smaller under the penalty at first.",
        "section 2, of the robustness gap; our reading of the footnote",
        against_none("loss_gap", min),
        at_most=-0.02,
        measure=f"Mean loss under {WORDS} less that without, nats, first epoch, strongest less none",
    ),
    Claim(
        "The scale-invariant group lasso leaves the scale alone.",
        "section 4.1",
        against_none("log_scale", max, INVARIANT),
        at_least=-0.1,
        null=-0.3,
        measure="log₁₀ of the product of Frobenius norms after the last epoch, strongest penalty less none; "
        "null is a factor of two",
    ),
    Claim(
        "Without the tug-of-war compressibility harms: under the scale-invariant group lasso robustness falls.",
        "section 4.1",
        against_none(f"kept_{NORM}", max, INVARIANT),
        at_most=-0.05,
        measure=f"{KEPT} after the last epoch, strongest scale-invariant penalty less none",
    ),
)


def _grids(
    scale: str, epochs: int, seeds: int, standard: tuple[float, ...], invariant: tuple[float, ...]
) -> list[Axes]:
    """No penalty and the standard one in its strengths, then the scale-invariant one in its own."""
    common = {**ON_MNIST[scale], "epochs": epochs, "seed": tuple(range(seeds))}
    penalties = {STANDARD: (0.0, *standard), INVARIANT: invariant}
    return [{**common, "penalty": penalty, "alpha": values} for penalty, values in penalties.items()]


EXPERIMENT = Experiment(
    name="tug_of_war",
    title="The tug-of-war of the standard group lasso over training time",
    source="arXiv 2507.17725, section 4.1, second footnote (its appendix)",
    run=run,
    figure=draw,
    grids={
        "smoke": _grids("smoke", 4, 1, (0.001, 0.01), (0.03,)),
        "small": _grids("small", 16, 5, (0.001, 0.003, 0.01), (0.01, 0.03)),
        "paper": _grids("paper", 64, 10, (0.0003, 0.001, 0.003, 0.01, 0.03), (0.003, 0.01, 0.03, 0.1)),
    },
    seconds={"smoke": 5, "small": 35},
    claims=CLAIMS,
    about=(
        "Networks 784-400-400-10 on MNIST with ReLU and no biases, trained by AdamW; no norm is held. The standard "
        "group lasso is the sum of rows' ℓ₂ norms, the scale-invariant one divides it by the Frobenius norm. Each "
        "network is measured at several epochs of one training. Scale is the product of the hidden matrices' "
        "Frobenius norms, structure the product of their ℓ∞ operator norms over it.",
        "A network without biases predicts the same when a matrix is multiplied by a number: its robust accuracy feels "
        "the scale only by what training makes of it, and the gap in loss feels it at once. Robust accuracy is the "
        "worst of APGD with 100 steps on the cross-entropy and 100 on the DLR loss; the gap is that of 40 steps on the "
        "loss, a lower estimate. Intervals are 95 % over seeds.",
    ),
)
