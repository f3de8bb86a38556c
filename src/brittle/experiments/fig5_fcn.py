"""Figure 5, top: fully connected networks under a group lasso and of low rank, attacked in both norms.

Every hidden matrix is held at the Frobenius norm of its start after each step, so that networks differ in structure
alone. The paper shows rows under l_inf and the spectrum under l_2, and the other two pairs in its appendix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from brittle.experiments.claims import Claim, change, over_seeds, spearman
from brittle.experiments.dense_networks import (
    PAPER,
    SMALL,
    SMOKE,
    initial_norm,
    robustness_of,
    splits,
    structure_of,
    train_dense,
)
from brittle.experiments.experiment import Axes, Experiment, Scalar
from brittle.experiments.plots import draw_means, evenly, look
from brittle.reporting.drawing import legend
from brittle.results import Statistic
from brittle.training.recipe import Recipe

BUDGETS = {
    "linf": (math.inf, 2 / 255), "linf_large": (math.inf, 4 / 255), "l2": (2.0, 0.125), "l2_large": (2.0, 0.25),
}  # fmt: skip
"""Norm and budget of the attacks: the paper's, a quarter of 8/255 and 0.5, and twice those."""


def run(
    *,
    data: str,
    alpha: float,
    rank: int,
    seed: int,
    width: int,
    hidden: int,
    training: int | None,
    samples: int,
    epochs: int,
    patience: int | None,
    data_root: str | None = None,
) -> dict[str, Any]:
    """Train one network and attack it in both norms.

    Args:
        data: The data set.
        alpha: Strength of the group lasso.
        rank: Of every hidden matrix, by factors; the width is full.
        seed: Of weights, batches and attacks.
        width: Neurons of a hidden layer.
        hidden: Hidden layers.
        training: Training samples; None for all.
        samples: Test samples that are attacked.
        epochs: Passes over the training samples, at most.
        patience: Epochs without a better validation accuracy that end training; None for no end.
        data_root: Folder of the data sets.

    Returns:
        What :mod:`brittle.experiments.dense_networks` measures: structure of the hidden matrices, and robust accuracy
        at every one of :data:`BUDGETS`.
    """
    learnt, test = splits(data, data_root, training=training, samples=samples)
    recipe = Recipe(
        epochs=epochs,
        patience=patience,
        penalties={"group_lasso": alpha} if alpha else {},
        constraints={"frobenius": initial_norm(width)},
        measure_every=0,
        seed=seed,
    )
    network = train_dense(learnt, recipe, width=width, hidden=hidden, rank=rank)
    return {**structure_of(network), **robustness_of(network, test, BUDGETS, seed)}


def penalised(table: pd.DataFrame) -> pd.DataFrame:
    """The networks of full rank, which differ in the penalty; ``strength`` grows with compressibility."""
    return table[table["rank"] >= table.width].assign(strength=lambda rows: rows.alpha)


def of_low_rank(table: pd.DataFrame) -> pd.DataFrame:
    """The networks without penalty, which differ in rank; ``strength`` grows with compressibility."""
    return table[table.alpha == 0].assign(strength=lambda rows: -rows["rank"])


Rows = Callable[[pd.DataFrame], pd.DataFrame]
LINES = (("row compressibility", penalised, "linf"), ("spectral compressibility", of_low_rank, "l2"))
"""What is compressible, its networks, and the norm that the paper attacks them in first."""


def draw(table: pd.DataFrame) -> Figure:
    """For rows and for the spectrum: accuracies, the robust share in both norms, and compressibility."""
    figure = Figure(figsize=(8.6, 5.8), layout="constrained")
    figure.set_label("Fully connected networks under a group lasso and of low rank")
    axes = figure.subplots(2, 3, squeeze=False)
    for line, (words, choose, norm) in zip(axes, LINES, strict=True):
        rows = choose(table)
        column = "alpha" if choose is penalised else "rank"
        place, written = evenly(rows, column)
        # Compressibility grows to the right, so that ranks fall.
        place = place if choose is penalised else len(written) - 1 - place
        ticks = list(written) if choose is penalised else list(written)[::-1]
        rows = rows.assign(place=place)
        for series, measured in enumerate(("clean_accuracy", f"robust_{norm}", f"robust_{norm}_large")):
            draw_means(line[0], rows, "place", measured, series=series)
        for series, measured in ((1, f"kept_{norm}"), (3, f"kept_{_other(norm)}")):
            draw_means(line[1], rows, "place", measured, series=series)
        error = "row_error" if choose is penalised else "spectral_error"
        draw_means(line[2], rows, "place", error)
        line[0].set_ylabel(f"{words.capitalize()}\n(n = {rows.seed.nunique()} seeds)")
        line[0].set_title(f"Accuracy, clean and under {WORDS[norm]}")
        line[1].set_title("Robust over clean, both norms")
        line[2].set_title("k-term error at a tenth")
        for axis in line:
            axis.set_xticks(range(len(ticks)), ticks)
            axis.set_xlabel("Strength α of the group lasso" if choose is penalised else "Rank of hidden matrices")
            axis.grid(visible=True)
            axis.set_ylim(bottom=0)
        for axis in line[1:]:
            axis.set_ylim(0, 1.03)
        line[1].legend(line[1].lines, [WORDS[norm], WORDS[_other(norm)]], fontsize=7)
    names = ("clean", "under the paper's budget", "under twice the budget")
    legend(figure, [Line2D([], [], **look(series)) for series in range(3)], names)
    return figure


WORDS = {"linf": "ℓ∞ 2/255", "l2": "ℓ₂ 0.125"}


def _other(norm: str) -> str:
    """The norm of the appendix."""
    return "l2" if norm == "linf" else "linf"


def ends(choose: Rows, column: str) -> Callable[[pd.DataFrame], Statistic]:
    """Mean over seeds of a column for the most compressible networks less that for the baseline."""
    statistic = over_seeds(change(column, "strength"))
    return lambda table: statistic(choose(table))


def mildest(table: pd.DataFrame) -> Statistic:
    """Robust share in l_2 of the largest rank below full less that of full rank, over seeds."""
    ranks = sorted(table["rank"].unique())[-2:]
    rows = of_low_rank(table)
    return over_seeds(change("kept_l2", "strength"))(rows[rows["rank"].isin(ranks)])


def _claims(words: str, choose: Rows, norm: str) -> tuple[Claim, ...]:
    """The claims about rows or about the spectrum; ``norm`` is the one that the paper shows first."""
    error, what = ("row_error", "rows") if choose is penalised else ("spectral_error", "the spectrum")
    contrast = "the strongest penalty less none" if choose is penalised else "the lowest rank less full rank"
    top, appendix = "section 4.1, Figure 5 top", "appendix, cross-norm results"
    return (
        Claim(
            f"The intervention makes {what} more compressible.",
            top,
            ends(choose, error),
            at_most=-0.1,
            measure=f"1-norm k-term error at a tenth, mean over hidden layers, {contrast}",
        ),
        Claim(
            f"Adversarial robustness falls as {words} grows.",
            top,
            ends(choose, f"robust_{norm}"),
            at_most=-0.05,
            measure=f"Accuracy under {WORDS[norm]}, {contrast}",
        ),
        Claim(
            f"It falls with {words} also relative to the accuracy without attack.",
            top,
            ends(choose, f"kept_{norm}"),
            at_most=-0.1,
            measure=f"Robust over clean accuracy at {WORDS[norm]}, {contrast}",
        ),
        Claim(
            f"It falls step by step as {words} grows.",
            top,
            lambda table: spearman("strength", f"kept_{norm}")(choose(table)),
            at_most=-0.7,
            measure=f"Spearman's ρ of the strength and robust over clean accuracy at {WORDS[norm]}, over seeds",
        ),
        Claim(
            f"With {words}, robustness falls in the other norm as well.",
            appendix,
            ends(choose, f"kept_{_other(norm)}"),
            at_most=-0.1,
            measure=f"Robust over clean accuracy at {WORDS[_other(norm)]}, {contrast}",
        ),
        Claim(
            f"With {words}, results under another budget are alike.",
            "appendix, other budgets",
            ends(choose, f"kept_{norm}_large"),
            at_most=-0.1,
            measure=f"Robust over clean accuracy at twice the budget, {contrast}",
        ),
    )


CLAIMS = (
    *(claim for line in LINES for claim in _claims(*line)),
    Claim(
        "The two operator norms move together under compressibility.",
        "section 3 and its appendix",
        spearman("norm_inf", "norm_2"),
        at_least=0.7,
        measure="Spearman's ρ of the products of both operator norms over hidden layers, over all networks",
    ),
    Claim(
        "Slight spectral compressibility slightly raises robustness.",
        "a review, of Figures 5 and 6",
        mildest,
        at_least=0.005,
        measure=f"Robust over clean accuracy at {WORDS['l2']}, the largest rank below full less full rank",
    ),
)


def _grids(
    common: dict[str, Scalar], seeds: int, alphas: tuple[float, ...], ranks: tuple[int, ...]
) -> tuple[Axes, ...]:
    """Penalties at full rank, then ranks without a penalty: the network with neither is in the first."""
    every = {**common, "seed": tuple(range(seeds))}
    return {**every, "alpha": (0.0, *alphas), "rank": common["width"]}, {**every, "alpha": 0.0, "rank": ranks}


EXPERIMENT = Experiment(
    name="fig5_fcn",
    title="Fully connected networks under a group lasso and of low rank",
    source="arXiv 2507.17725, Figure 5 (top)",
    run=run,
    figure=draw,
    grids={
        "smoke": _grids(SMOKE, 1, (0.03,), (4,)),
        "small": _grids(SMALL, 3, (0.003, 0.01, 0.03), (8, 16, 32, 64, 256)),
        "paper": _grids(
            PAPER, 5, (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1), (10, 15, 20, 40, 64, 100, 256, 1024)
        ),
    },
    seconds={"smoke": 5, "small": 140},
    claims=CLAIMS,
    about=(
        "Fully connected networks with ReLU and no biases. Every hidden matrix is held at the Frobenius norm of its "
        "start after each step of AdamW, under a group lasso of growing strength, or as a product of two factors with "
        "a small inner size. Compressibility grows to the right. Intervals are 95 % over seeds.",
        "Robust accuracy is the worst of APGD with 100 steps on the cross-entropy and 100 on the DLR loss, at the "
        "paper's budgets for networks that were not trained under attack, and at twice these. k-term errors are those "
        "of the rows' ℓ₁ norms and of the singular values when a tenth of them is kept; 0 is most compressible.",
    ),
)
