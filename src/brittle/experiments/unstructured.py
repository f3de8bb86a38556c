"""Unstructured against structured compressibility: single weights, rows and spectra at one k-term error.

Every hidden matrix is held at one Frobenius norm after each step, under a penalty of its single weights (l_1) or of
its rows (group lasso), or as a product of low-rank factors, so that networks differ in what is compressible.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes as Panel
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from brittle.experiments.claims import Claim, over_seeds, spearman
from brittle.experiments.dense_networks import (
    MNIST_BUDGETS,
    MNIST_WORDS,
    ON_MNIST,
    SHARE,
    robustness_of,
    splits,
    structure_of,
    train_dense,
)
from brittle.experiments.experiment import Axes, Experiment
from brittle.experiments.plots import draw_means, look
from brittle.linear.compressibility import k_term_error
from brittle.models.layers import read_layers
from brittle.reporting.drawing import legend, log_scale
from brittle.results import Statistic
from brittle.training.recipe import Recipe

FROBENIUS = 10.0
"""Norm at which every hidden matrix is held."""
KINDS = {
    "l1": ("single weights", "weight_error"),
    "group_lasso": ("rows", "row_error"),
    "rank": ("spectrum", "spectral_error"),
}
"""What each intervention makes compressible, and the k-term error that tells it."""
METHODS = {"l1": "ℓ₁ penalty", "group_lasso": "group lasso", "rank": "low rank"}
"""Interventions in words."""
MATCHED = 0.2
"""The k-term error at which kinds are compared: the largest tenth holds 80 % of the sum."""


def run(
    *,
    data: str,
    intervention: str,
    strength: float,
    seed: int,
    width: int,
    training: int | None,
    samples: int,
    epochs: int,
    data_root: str | None = None,
) -> dict[str, Any]:
    """Train one network and attack it in both norms.

    Args:
        data: The data set.
        intervention: One of :data:`KINDS`, or "none".
        strength: Of the penalty, or the rank of both hidden matrices.
        seed: Of weights, batches and attacks.
        width: Neurons of a hidden layer.
        training: Training samples; None for all.
        samples: Test samples that are attacked.
        epochs: Passes over the training samples.
        data_root: Folder of the data sets.

    Returns:
        What :mod:`brittle.experiments.dense_networks` measures, and ``weight_error``: the k-term error in the 1-norm
        of a hidden matrix's entries at a tenth of them, the mean over layers.
    """
    learnt, test = splits(data, data_root, training=training, samples=samples)
    recipe = Recipe(
        epochs=epochs,
        penalties={} if intervention in ("none", "rank") else {intervention: float(strength)},
        constraints={"frobenius": FROBENIUS},
        measure_every=0,
        seed=seed,
    )
    rank = int(strength) if intervention == "rank" else width
    network = train_dense(learnt, recipe, width=width, hidden=2, rank=rank)
    entries = [view.matrix.detach().double().flatten() for view in read_layers(network).views[:-1]]
    errors = [float(k_term_error(v, len(v) // SHARE)) for v in entries]
    return {
        "weight_error": sum(errors) / len(errors),
        **structure_of(network),
        **robustness_of(network, test, MNIST_BUDGETS, seed),
    }


def at_matched_error(rows: pd.DataFrame, intervention: str, column: str) -> float:
    """A column where an intervention's own k-term error is :data:`MATCHED`, by lines between one seed's networks.

    Args:
        rows: Networks of one seed; that without any is an end of the path of every intervention.
        intervention: One of :data:`KINDS`.
        column: Column of numbers.

    Returns:
        NaN where no two networks have the error between them.
    """
    error = KINDS[intervention][1]
    path = rows[rows.intervention.isin(("none", intervention))].sort_values(error)
    return float(np.interp(MATCHED, path[error], path[column], left=np.nan, right=np.nan))


def draw(table: pd.DataFrame) -> Figure:
    """Robust over clean accuracy in both norms, over what is compressible, and over the product of norms."""
    figure = Figure(figsize=(8.6, 6.2), layout="constrained")
    figure.set_label("Robustness over unstructured and structured compressibility")
    panels = figure.subplots(2, 2, squeeze=False, sharey="row")
    for line, (norm, words), product in zip(panels, MNIST_WORDS.items(), ("norm_inf", "norm_2"), strict=True):
        for series, (kind, (_, error)) in enumerate(KINDS.items()):
            rows = table[table.intervention.isin(("none", kind))]
            _draw_path(line[0], rows, error, f"kept_{norm}", series)
            own = table[table.intervention == kind]
            line[1].plot(own[product], own[f"kept_{norm}"], linestyle="none", alpha=0.75, **look(series))
        plain = table[table.intervention == "none"]
        line[1].plot(plain[product], plain[f"kept_{norm}"], linestyle="none", alpha=0.75, **look(3))
        log_scale(line[1], table[product])
        line[0].axvline(MATCHED, linewidth=0.8, linestyle=":", color="grey")
        line[0].invert_xaxis()
        line[0].set_ylabel(f"Robust over clean accuracy, {words}")
        line[0].set_title(f"At one Frobenius norm, n = {table.seed.nunique()} seeds")
        line[0].set_xlabel("k-term error of what is compressible, a tenth kept")
        line[1].set_title("The same networks over their norms")
        line[1].set_xlabel(f"Product of {words.split()[0]} operator norms of hidden matrices")
        for axis in line:
            axis.grid(visible=True)
            axis.set_ylim(0, 1.03)
    names = [f"{words} ({METHODS[kind]})" for kind, (words, _) in KINDS.items()]
    legend(figure, [Line2D([], [], linestyle="none", **look(series)) for series in range(4)], [*names, "neither"])
    return figure


def _draw_path(axis: Panel, rows: pd.DataFrame, error: str, column: str, series: int) -> None:
    """Means over seeds at every strength, at the mean k-term error of that strength."""
    placed = rows.assign(place=rows.groupby("strength")[error].transform("mean"))
    draw_means(axis, placed, "place", column, series=series)


def contrast(column: str, one: str, other: str, *, ratio: bool = False) -> Callable[[pd.DataFrame], Statistic]:
    """A column at the matched error of one intervention less that of another, over seeds; of log10 if ``ratio``."""

    def quantity(rows: pd.DataFrame) -> float:
        first, second = (at_matched_error(rows, name, column) for name in (one, other))
        return float(np.log10(first / second)) if ratio else first - second

    return over_seeds(quantity)


def _costs(other: str, norm: str) -> Claim:
    """That compressible weights cost less robustness than what ``other`` makes compressible."""
    what = KINDS[other][0]
    return Claim(
        f"At one k-term error compressible structure ({what}) costs more robustness than compressible weights, "
        f"{MNIST_WORDS[norm]}.",
        "section 4.1, of the appendix",
        contrast(f"kept_{norm}", "l1", other),
        at_least=0.05,
        measure=f"Robust over clean accuracy at k-term error {MATCHED:g}, single weights less {what}",
    )


def _strongest(rows: pd.DataFrame, intervention: str) -> float:
    """An intervention's own k-term error at its strongest, the lowest rank or largest penalty, less that without."""
    error = KINDS[intervention][1]
    own = rows[rows.intervention == intervention]
    end = own.strength.min() if intervention == "rank" else own.strength.max()
    return float(own[error][own.strength == end].mean() - rows[error][rows.intervention == "none"].mean())


CLAIMS = (
    *(
        Claim(
            f"{METHODS[kind].capitalize()} makes its own kind of parts ({what}) compressible.",
            "section 2, Definition 2.1",
            over_seeds(functools.partial(_strongest, intervention=kind)),
            at_most=-0.2,
            measure=f"1-norm k-term error of {what} at a tenth, mean over hidden layers, strongest less none",
        )
        for kind, (what, _) in KINDS.items()
    ),
    *(_costs(other, norm) for norm in MNIST_WORDS for other in ("group_lasso", "rank")),
    Claim(
        "At one k-term error and scale, compressible rows make larger ℓ∞ norms than compressible weights.",
        "Theorem 3.1 (a), where sparse rows lower the bound",
        contrast("norm_inf", "group_lasso", "l1", ratio=True),
        at_least=0.1,
        measure="log₁₀ of the product of ℓ∞ operator norms, rows less single weights",
    ),
    Claim(
        "At one k-term error and scale, a compressible spectrum makes larger ℓ₂ norms than compressible weights.",
        "Theorem 3.1 (b)",
        contrast("norm_2", "rank", "l1", ratio=True),
        at_least=0.1,
        measure="log₁₀ of the product of ℓ₂ operator norms, spectrum less single weights",
    ),
    *(
        Claim(
            f"Whatever is compressible, larger {words.split()[0]} norms go with less robustness.",
            "section 3, Theorem 3.1",
            spearman(product, f"kept_{norm}"),
            at_most=-0.7,
            measure=f"Spearman's ρ of the product of norms and robust over clean accuracy at {words}, all networks",
        )
        for (norm, words), product in zip(MNIST_WORDS.items(), ("norm_inf", "norm_2"), strict=True)
    ),
)


def _grids(scale: str, epochs: int, seeds: int, **strengths: tuple[float, ...]) -> list[Axes]:
    """No intervention, then each in its strengths."""
    common = {**ON_MNIST[scale], "epochs": epochs, "seed": tuple(range(seeds))}
    every = {"none": (0.0,), **strengths}
    return [{**common, "intervention": kind, "strength": values} for kind, values in every.items()]


EXPERIMENT = Experiment(
    name="unstructured",
    title="Unstructured against structured compressibility",
    source="arXiv 2507.17725, section 4.1 (its appendix)",
    run=run,
    figure=draw,
    grids={
        "smoke": _grids("smoke", 4, 1, l1=(0.001,), group_lasso=(0.03,), rank=(4,)),
        "small": _grids(
            "small", 8, 5, l1=(0.00003, 0.0001, 0.0003), group_lasso=(0.001, 0.003, 0.01), rank=(240, 160, 80, 20)
        ),
        "paper": _grids(
            "paper",
            50,
            10,
            l1=(0.00001, 0.00003, 0.0001, 0.0003, 0.001),
            group_lasso=(0.0003, 0.001, 0.003, 0.01, 0.03),
            rank=(320, 240, 200, 160, 120, 80, 40, 20),
        ),
    },
    seconds={"smoke": 5, "small": 17},
    claims=CLAIMS,
    about=(
        "Networks 784-400-400-10 on MNIST with ReLU and no biases. Every hidden matrix is held at Frobenius norm "
        f"{FROBENIUS:g} after each step of AdamW, under a penalty of its single weights or of its rows, or as a "
        "product of two factors with a small inner size. Each kind is told by its own k-term error: what is left of "
        "the sum of magnitudes, of rows' ℓ₁ norms or of singular values when the largest tenth is kept; 0 is most "
        f"compressible. Kinds are compared where that error is {MATCHED:g} (dotted), by lines between the networks of "
        "one seed.",
        "Robust accuracy is the worst of APGD with 100 steps on the cross-entropy and 100 on the DLR loss. Intervals "
        "are 95 % over seeds.",
    ),
)
