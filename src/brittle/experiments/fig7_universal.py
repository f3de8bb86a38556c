"""Figure 7, centre: universal perturbations under growing row compressibility, and under growing Frobenius norm.

Both make single samples fragile; the paper says that only the first makes one perturbation fool many inputs. What
tells the two apart is universal fooling relative to fooling sample by sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pandas as pd
from matplotlib.axes import Axes as Panel
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from brittle.experiments.claims import Claim, change, over_seeds
from brittle.experiments.dense_networks import (
    PAPER,
    SMALL,
    SMOKE,
    fooling_of,
    initial_norm,
    splits,
    structure_of,
    train_dense,
)
from brittle.experiments.experiment import Axes, Experiment, Scalar
from brittle.experiments.plots import draw_means, evenly, look
from brittle.reporting.drawing import legend, panels
from brittle.results import Statistic
from brittle.training.recipe import Recipe

BUDGETS = {f"{n}/255": (math.inf, n / 255) for n in (1, 2, 4, 8)}
"""Of the l_inf attacks: the paper's is 2/255 for networks that were not trained under attack, 8/255 for those that
were. One network's samples fall at one budget, another's at another: shares are averaged over all four."""
PAPERS = "2/255"


def run(
    *,
    data: str,
    alpha: float,
    scale: float,
    seed: int,
    width: int,
    hidden: int,
    training: int | None,
    samples: int,
    epochs: int,
    patience: int | None,
    data_root: str | None = None,
) -> dict[str, Any]:
    """Train one network, attack it sample by sample, and with one perturbation for all.

    Args:
        data: The data set.
        alpha: Strength of the group lasso.
        scale: Frobenius norm of every hidden matrix, in units of what it is at the start of training.
        seed: Of weights, batches and attacks.
        width: Neurons of a hidden layer.
        hidden: Hidden layers.
        training: Training samples; None for all.
        samples: Test samples that are attacked; half of them fit the universal perturbation, the others judge it.
        epochs: Passes over the training samples, at most.
        patience: Epochs without a better validation accuracy that end training; None for no end.
        data_root: Folder of the data sets.

    Returns:
        Structure, and fooling at and over :data:`BUDGETS` (:mod:`brittle.experiments.dense_networks`).
    """
    learnt, test = splits(data, data_root, training=training, samples=samples)
    recipe = Recipe(
        epochs=epochs,
        patience=patience,
        penalties={"group_lasso": alpha} if alpha else {},
        constraints={"frobenius": scale * initial_norm(width)},
        measure_every=0,
        seed=seed,
    )
    network = train_dense(learnt, recipe, width=width, hidden=hidden, rank=width)
    return {**structure_of(network), **fooling_of(network, test, BUDGETS, seed)}


COMPRESSED: dict[str, Scalar] = {"scale": 1.0}
"""Rows that differ in the penalty alone."""
SCALED: dict[str, Scalar] = {"alpha": 0.0}
"""Rows that differ in the Frobenius norm alone."""
SERIES = (("alpha", COMPRESSED, "row compressibility grows"), ("scale", SCALED, "Frobenius norm grows"))
FOOLED = (
    ("sample_fooled", "each sample its own perturbation"),
    ("universal_fooled", "one for all samples"),
    ("random_fooled", "random signs"),
)


def draw(table: pd.DataFrame) -> Figure:
    """Shares of samples fooled over the penalty and over the norm, and one against the other."""
    figure, axes = panels("Universal perturbations under compressibility and under scale", 3, 3.8)
    for axis, (column, where, title), label in zip(
        axes, SERIES, ("Strength α of the group lasso", "Frobenius norm over that at the start"), strict=False
    ):
        rows = _where(table, where)
        place, written = evenly(rows, column)
        rows = rows.assign(place=place)
        for series, (measured, _) in enumerate(FOOLED):
            draw_means(axis, rows, "place", measured, series=series)
        axis.set_xticks(range(len(written)), list(written))
        axis.set(title=f"{title.capitalize()}\nn = {rows.seed.nunique()} seeds, 95 % intervals", xlabel=label)
    _draw_against(axes[2], table)
    axes[0].set(ylabel="Share of right samples fooled,\nmean over ℓ∞ 1, 2, 4 and 8/255", ylim=(0, 1.02))
    for axis in axes:
        axis.grid(visible=True)
    handles = [Line2D([], [], **look(series)) for series in range(len(FOOLED))]
    legend(figure, handles, [words for _, words in FOOLED])
    return figure


def _draw_against(axis: Panel, table: pd.DataFrame) -> None:
    """Universal over single fooling, a point a network; equal fragility stands on one vertical."""
    for (_, where, words), hollow in zip(SERIES, (False, True), strict=True):
        rows = _where(table, where)
        fill: dict[str, Any] = {"markerfacecolor": "none", "markeredgewidth": 0.9} if hollow else {}
        style = {**look(1), "marker": "D" if hollow else "s", "linestyle": "none", "label": words, **fill}
        axis.plot(rows.sample_fooled, rows.universal_fooled - rows.random_fooled, **style)
    axis.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle=":")
    axis.set(
        title="One perturbation, beyond random,\nagainst one a sample", xlabel="Fooled each by its own", xlim=(0, 1)
    )
    axis.legend(loc="upper left", fontsize=7)


def _where(table: pd.DataFrame, where: dict[str, Scalar]) -> pd.DataFrame:
    (column, value), *_ = where.items()
    return table[table[column] == value]


def excess(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with a column ``excess``: the share that one perturbation fools less that of random ones."""
    return rows.assign(excess=rows.universal_fooled - rows.random_fooled)


def growth(column: str, x: str, where: dict[str, Scalar]) -> Callable[[pd.DataFrame], Statistic]:
    """Change of a column from the smallest to the largest x, over seeds."""
    statistic = over_seeds(change(column, x), where)
    return lambda table: statistic(excess(table))


def apart(table: pd.DataFrame) -> Statistic:
    """How much more ``relative`` grows with the penalty than with the norm, over seeds."""

    def quantity(rows: pd.DataFrame) -> float:
        by_rows, by_scale = (change("relative", x)(_where(rows, where)) for x, where, _ in SERIES)
        return by_rows - by_scale

    return over_seeds(quantity)(table)


PLACE = "section 4.1, Figure 7"
ENDS = "the strongest penalty less none"
NORMS = "the largest norm less that at the start"
CLAIMS = (
    Claim(
        "At a fixed Frobenius norm the group lasso makes rows more compressible.",
        "section 4.1",
        growth("row_error", "alpha", COMPRESSED),
        at_most=-0.1,
        measure=f"1-norm k-term error of the rows' norms at a tenth of them, mean over hidden layers, {ENDS}",
    ),
    Claim(
        "Increasing row compressibility decreases standard adversarial robustness.",
        f"{PLACE} centre left",
        growth(f"kept_{PAPERS}", "alpha", COMPRESSED),
        at_most=-0.1,
        measure=f"Robust over clean accuracy at ℓ∞ {PAPERS}, {ENDS}",
    ),
    Claim(
        "Increasing the Frobenius norm decreases standard adversarial robustness.",
        f"{PLACE} centre right",
        growth(f"kept_{PAPERS}", "scale", SCALED),
        at_most=-0.1,
        measure=f"Robust over clean accuracy at ℓ∞ {PAPERS}, {NORMS}",
    ),
    Claim(
        "Increasing row compressibility creates vulnerability to universal perturbations.",
        f"{PLACE} centre left",
        growth("excess", "alpha", COMPRESSED),
        at_least=0.1,
        measure=f"Share of right samples that one perturbation fools beyond random ones, mean over budgets, {ENDS}",
    ),
    Claim(
        "Increasing the Frobenius norm creates vulnerability without leading to universal perturbations.",
        f"{PLACE} centre right",
        growth("excess", "scale", SCALED),
        at_most=0.05,
        null=0.1,
        measure=f"The same, {NORMS}; below what is asked of compressibility",
    ),
    Claim(
        "Compressibility makes perturbations universal beyond making samples fragile; scale does not.",
        f"{PLACE} centre, the two claims told apart",
        apart,
        at_least=0.1,
        measure="Universal fooling beyond random over fooling sample by sample: its growth with the penalty less its "
        "growth with the norm",
    ),
)


def _grids(
    common: dict[str, Scalar], seeds: int, alphas: tuple[float, ...], scales: tuple[float, ...]
) -> tuple[Axes, ...]:
    """Penalties at the norm of the start, then norms without a penalty: the network with neither is in the first."""
    every = {**common, "seed": tuple(range(seeds))}
    return {**every, "alpha": (0.0, *alphas), "scale": 1.0}, {**every, "alpha": 0.0, "scale": scales}


EXPERIMENT = Experiment(
    name="fig7_universal",
    title="Universal perturbations under compressibility and under scale",
    source="arXiv 2507.17725, Figure 7 (centre)",
    run=run,
    figure=draw,
    grids={
        "smoke": _grids(SMOKE, 1, (0.03,), (4.0,)),
        "small": _grids({**SMALL, "samples": 1000}, 3, (0.003, 0.01, 0.03), (2.0, 4.0, 8.0)),
        "paper": _grids(PAPER, 5, (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1), (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)),
    },
    seconds={"smoke": 5, "small": 160},
    claims=CLAIMS,
    about=(
        "Fully connected networks with ReLU and no biases. Every hidden matrix is held at one Frobenius norm after "
        "each step of AdamW: at that of its start under a group lasso of growing strength, or at a growing multiple of "
        "it without a penalty. The paper gives neither strengths nor norms; those of a replication are used.",
        "Each sample's own perturbation is the worst of APGD with 100 steps on the cross-entropy and 100 on the DLR "
        "loss. The one for all is fitted by FGSM-like ascent on half of the test samples, or read from the weights of "
        "the first layer, whichever fools more of the other half; the control are random signs of the same size. All "
        "shares are of the samples that are right without attack.",
        "Such networks are homogeneous: multiplying a trained matrix by a number changes no prediction. A larger norm "
        "acts through training alone.",
    ),
)
