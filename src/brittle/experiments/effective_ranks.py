"""Effective rank and sparsity of weights over training time, with and without adversarial training.

Langenberg et al. (arXiv 1901.10371) find that adversarial training promotes low rank and sparsity at once. Their
definitions are not known here, so every one of the theory page's section "Ranks" is followed; settings are ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from brittle.experiments.claims import Claim, over_seeds
from brittle.experiments.dense_networks import robustness_of, splits
from brittle.experiments.experiment import Axes, Experiment, Scalar
from brittle.experiments.low_rank_networks import RANKS, build_network, rank_shares, share_right
from brittle.experiments.plots import draw_means, look
from brittle.experiments.training_time import train_along
from brittle.reporting.drawing import legend
from brittle.results import Statistic
from brittle.training.recipe import Adversary, Recipe

STEPS = 5
"""Of the PGD in training, which attacks every sample of a batch."""
TESTED = 5_000
"""Most test samples for the accuracy, by which networks are called alike."""
ALIKE = 0.01
"""Difference of two test accuracies up to which they count as equal."""
MEASURED = ("epoch", "test_accuracy", *RANKS)
"""Columns that hold a list, one number a measured epoch."""
NETWORKS = {"fcn": "fully connected, MNIST", "conv": "convolutional, CIFAR-10"}
"""Architectures, each on its data, in words."""


def run(
    *,
    data: str,
    arch: str,
    adversarial: bool,
    eps: float,
    seed: int,
    width: int,
    training: int | None,
    samples: int,
    epochs: int,
    data_root: str | None = None,
) -> dict[str, Any]:
    """Train one network, and measure its weights at several epochs on the way.

    Args:
        data: The data set.
        arch: One of :data:`brittle.experiments.low_rank_networks.ARCHITECTURES`.
        adversarial: Whether every sample is attacked in training.
        eps: Budget in l_inf of that attack, and of the one that measures robustness.
        seed: Of weights, batches and attacks.
        width: Neurons of a hidden layer, or filters of the first convolution.
        training: Training samples; None for all.
        samples: Test samples that are attacked after the last epoch.
        epochs: Passes over the training samples.
        data_root: Folder of the data sets.

    Returns:
        Lists of :data:`MEASURED`, one number an epoch of :func:`brittle.experiments.training_time.measured_epochs`:
        ranks over the smaller side of a matrix and sparsity over its entries, means over all layers but the head. Of
        the last epoch ``clean_accuracy``, ``robust_linf``, ``kept_linf`` and ``flags``.
    """
    learnt, test = splits(data, data_root, training=training, samples=TESTED)
    recipe = Recipe(
        epochs=epochs,
        adversary=Adversary(eps, steps=STEPS, ratio=1.0) if adversarial else None,
        schedule="cosine",
        validation=0.0,
        measure_every=0,
        seed=seed,
    )
    network = build_network(arch, learnt, width=width, seed=seed)
    rows = []
    for epoch, copy in train_along(network, learnt, recipe).items():
        network = copy
        rows.append({"epoch": epoch, "test_accuracy": share_right(network, test), **rank_shares(network)})
    attacked = test.take(samples, seed=0)
    return {
        **{name: [row[name] for row in rows] for name in MEASURED},
        **robustness_of(network, attacked, {"linf": (math.inf, eps)}, seed),
    }


def by_epoch(table: pd.DataFrame) -> pd.DataFrame:
    """One row an epoch."""
    return table.explode(list(MEASURED), ignore_index=True).astype(dict.fromkeys(MEASURED, float))


def relative(column: str, arch: str, first: bool = False) -> Callable[[pd.DataFrame], Statistic]:
    """A column of adversarially trained networks over that of the others of their seed, less 1, after the last epoch.

    Args:
        column: One of :data:`RANKS`.
        arch: Whose networks.
        first: After the first epoch instead.
    """

    def quantity(rows: pd.DataFrame) -> float:
        rows = by_epoch(rows)
        rows = rows[rows.epoch == (rows.epoch.min() if first else rows.epoch.max())]
        attacked = rows.adversarial.astype(bool)
        return float(rows[column][attacked].mean() / rows[column][~attacked].mean() - 1)

    return over_seeds(quantity, {"arch": arch})


def alike(rows: pd.DataFrame) -> tuple[int, int] | None:
    """The latest two measured epochs, one of either training of a seed, whose test accuracies are equal.

    Args:
        rows: A seed's rows of :func:`by_epoch`, of one architecture.

    Returns:
        Labels of a row without and of one with adversarial training, the latest by the sum of the logarithms of their
        epochs; None where no accuracies are within :data:`ALIKE`.
    """
    attacked = rows.adversarial.astype(bool)
    pairs = [
        (rows.epoch[i] * rows.epoch[j], i, j)
        for i, j in itertools.product(rows.index[~attacked], rows.index[attacked])
        if abs(rows.test_accuracy[i] - rows.test_accuracy[j]) <= ALIKE
    ]
    return max(pairs)[1:] if pairs else None


def relative_at_equal_accuracy(column: str, arch: str) -> Callable[[pd.DataFrame], Statistic]:
    """As :func:`relative`, at the epochs of :func:`alike`; no value where a seed has none."""

    def quantity(rows: pd.DataFrame) -> float:
        rows = by_epoch(rows)
        pair = alike(rows)
        return float(rows[column][pair[1]] / rows[column][pair[0]] - 1) if pair else math.nan

    return over_seeds(quantity, {"arch": arch})


WORDS = {
    "effective_rank": "effective rank (entropy)",
    "nuclear_frobenius_ratio": "(nuclear / Frobenius)²",
    "nuclear_spectral_ratio": "nuclear / spectral",
    "stable_rank": "stable rank",
    "effective_sparsity": "effective sparsity",
}
"""Names of :data:`RANKS` on the figure."""


def draw(table: pd.DataFrame) -> Figure:
    """Every rank and the accuracy over epochs, a line an arch of either training, a row of panels an architecture."""
    rows = by_epoch(table)
    present = [arch for arch in NETWORKS if arch in set(rows.arch)]
    figure = Figure(figsize=(8.6, 0.8 + 2.3 * len(present)), layout="constrained")
    figure.set_label("Effective rank and sparsity over training time")
    grid = figure.subplots(len(present), len(WORDS) + 1, squeeze=False)
    for line, arch in zip(grid, present, strict=True):
        own = rows[rows.arch == arch]
        epochs = sorted(own.epoch.unique())
        for axis, column in zip(line, (*WORDS, "test_accuracy"), strict=True):
            for series, attacked in enumerate((False, True)):
                draw_means(axis, own[own.adversarial.astype(bool) == attacked], "epoch", column, series=series)
            axis.set_xscale("log", base=2)
            axis.set_xticks(epochs, [f"{epoch:g}" for epoch in epochs])
            axis.minorticks_off()
            axis.tick_params(labelsize=7)
            axis.set_title(WORDS.get(column, "test accuracy"), fontsize=8)
            axis.set_xlabel("epoch", fontsize=8)
            axis.set_ylim(bottom=0)
            axis.grid(visible=True)
        line[0].set_ylabel(f"{NETWORKS[arch]}\nn = {own.seed.nunique()} seeds, 95 %", fontsize=8)
    names = ("trained without attack", "adversarial training")
    legend(figure, [Line2D([], [], **look(series)) for series in range(2)], list(names))
    return figure


def _claims(arch: str) -> tuple[Claim, ...]:
    """The claims about one architecture."""
    network = NETWORKS[arch]
    contrast = "of adversarially trained networks over that of the others of the same seed, less 1"
    return (
        *(
            Claim(
                f"Adversarial training lowers the {WORDS[name]} of the weights: {network}.",
                "arXiv 1901.10371, abstract",
                relative(name, arch),
                at_most=-0.05,
                measure=f"{WORDS[name].capitalize()}, mean over layers but the head, after the last epoch, {contrast}",
            )
            for name in WORDS
        ),
        *(
            Claim(
                f"It lowers the {WORDS[name]} at equal accuracy as well: {network}.",
                "beyond the paper, as accuracies differ",
                relative_at_equal_accuracy(name, arch),
                at_most=-0.05,
                measure=f"{WORDS[name].capitalize()}, mean over layers but the head, at the latest measured epochs "
                f"whose test accuracies differ by at most {100 * ALIKE:g} point, {contrast}",
            )
            for name in ("effective_rank", "effective_sparsity")
        ),
    )


def _grids(seeds: dict[str, int], **networks: dict[str, Scalar]) -> list[Axes]:
    """One grid an architecture."""
    return [
        {**common, "arch": arch, "adversarial": (False, True), "seed": tuple(range(seeds[arch]))}
        for arch, common in networks.items()
    ]


EXPERIMENT = Experiment(
    name="effective_ranks",
    title="Adversarial training lowers effective rank and sparsity",
    source="arXiv 1901.10371 (Langenberg et al. 2019), first finding",
    run=run,
    figure=draw,
    grids={
        "smoke": _grids(
            {"fcn": 1, "conv": 1},
            fcn={"data": "digits", "eps": 0.05, "width": 16, "training": 600, "samples": 30, "epochs": 3},
            conv={"data": "digits", "eps": 0.05, "width": 4, "training": 600, "samples": 30, "epochs": 3},
        ),
        "small": _grids(
            {"fcn": 5, "conv": 3},
            fcn={"data": "mnist", "eps": 0.1, "width": 400, "training": 20_000, "samples": 300, "epochs": 16},
            conv={"data": "cifar10", "eps": 4 / 255, "width": 32, "training": 20_000, "samples": 300, "epochs": 12},
        ),
        "paper": _grids(
            {"fcn": 10, "conv": 5},
            fcn={"data": "mnist", "eps": 0.1, "width": 400, "training": None, "samples": 10_000, "epochs": 100},
            conv={"data": "cifar10", "eps": 8 / 255, "width": 64, "training": None, "samples": 10_000, "epochs": 200},
        ),
    },
    claims=(*_claims("fcn"), *_claims("conv")),
    seconds={"smoke": 1, "small": 120},
    about=(
        "A network of two hidden layers on MNIST and one of three strided convolutions on CIFAR-10, with ReLU, no "
        "biases and no penalty, by AdamW and a cosine schedule. Either is trained without attack, or with every sample "
        f"attacked by PGD ({STEPS} steps, ℓ∞), from the same weights in the same order.",
        "Ranks are shares of a matrix's smaller side, sparsity of its number of entries, so that 1 is neither low rank "
        "nor sparse. A convolution counts by the matrix of its filters. The paper does not say which definition of "
        "effective rank it takes (to our knowledge), so all stand here; they differ in how much small singular values "
        "count, most in the entropy's, least in the stable rank.",
        "Networks of one accuracy are compared too, at the latest epochs at which both trainings have it. The less "
        "accurate training is then further on than the other, so that what training time does to ranks is in that "
        "comparison.",
    ),
)
