"""Compressibility that emerges from stochastic gradient descent: large steps on small batches, and no penalty.

Networks are trained by plain gradient descent until they fit the same share of the training samples. Claims are asked
of those alone whose test accuracies lie within a narrow band, so that accuracy explains no difference.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import nn

from brittle.data.load import Data
from brittle.experiments.claims import Claim, correlate, spearman
from brittle.experiments.dense_networks import (
    MNIST_BUDGETS,
    MNIST_WORDS,
    ON_MNIST,
    robustness_of,
    scale_of,
    splits,
    structure_of,
)
from brittle.experiments.experiment import Axes, Experiment
from brittle.experiments.plots import look
from brittle.models.borrow import device_of
from brittle.models.build import build_model
from brittle.models.forward import logits_of
from brittle.reporting.drawing import legend, log_scale
from brittle.results import Statistic
from brittle.training.loop import train
from brittle.training.recipe import Recipe

FITTED = 0.995
"""Share of the training samples, as they were seen in an epoch, at which training ends."""
BAND = 0.01
"""Networks count as equally accurate within this of each other: half of it to both sides of the median."""


def run(
    *,
    data: str,
    lr: float,
    batch: int,
    seed: int,
    width: int,
    training: int | None,
    samples: int,
    epochs: int,
    data_root: str | None = None,
) -> dict[str, Any]:
    """Train one network by plain gradient descent until it fits, and attack it in both norms.

    Args:
        data: The data set.
        lr: Learning rate, constant.
        batch: Samples a step.
        seed: Of weights, batches and attacks.
        width: Neurons of a hidden layer.
        training: Training samples; None for all.
        samples: Test samples that are attacked.
        epochs: Passes over the training samples, at most.
        data_root: Folder of the data sets.

    Returns:
        What :mod:`brittle.experiments.dense_networks` measures, and how training went (:func:`fit_network`).
    """
    learnt, whole = splits(data, data_root, training=training, samples=sys.maxsize)
    size = {"in_features": learnt.inputs[0].numel(), "width": width, "depth": 3, "classes": learnt.classes}
    start = build_model("fcn", size, seed=seed)
    network, fit = fit_network(start, learnt, whole, lr=lr, batch=batch, epochs=epochs, seed=seed)
    return {
        **fit,
        **structure_of(network),
        **scale_of(network),
        **robustness_of(network, whole.take(samples), MNIST_BUDGETS, seed),
    }


def fit_network(
    network: nn.Module, learnt: Data, test: Data, *, lr: float, batch: int, epochs: int, seed: int
) -> tuple[nn.Module, dict[str, float]]:
    """Train by plain gradient descent until :data:`FITTED` of the samples are right, as they were seen in an epoch.

    Plain gradient descent remembers nothing but the weights, so that one epoch after another is one training.

    Args:
        network: Where training begins; left as it is.
        learnt: Training samples.
        test: All test samples.
        lr: Learning rate, constant.
        batch: Samples a step.
        epochs: At most.
        seed: Of the batches.

    Returns:
        The network, in evaluation mode, and columns: ``ratio``, the learning rate over the batch size; ``passes``, the
        epochs that it took; ``fitted``, the share of the training samples that was right in the last; and
        ``test_accuracy``.
    """
    recipe = Recipe(
        epochs=1,
        batch_size=batch,
        optimizer="sgd",
        lr=lr,
        momentum=0.0,
        weight_decay=0.0,
        validation=0.0,
        measure_every=0,
    )
    devices = "cuda" if torch.cuda.is_available() else "cpu"
    passes, fitted = 0, 0.0
    while fitted < FITTED and passes < epochs:
        order = dataclasses.replace(recipe, seed=1000 * seed + passes)
        training = train(network, learnt, order, devices=devices)
        network, fitted = training.model.eval(), training.epochs[-1].accuracy
        passes += 1
    device = device_of(network)
    right = logits_of(network, test.inputs.to(device), test.labels.to(device)).argmax(1).cpu() == test.labels
    accuracy = float(right.double().mean())
    return network, {"ratio": lr / batch, "passes": passes, "fitted": fitted, "test_accuracy": accuracy}


def alike(table: pd.DataFrame, band: float = BAND) -> pd.DataFrame:
    """The networks that fit, and whose test accuracies are within a band of each other around their median."""
    fitting = table[table.fitted >= FITTED]
    return fitting[(fitting.test_accuracy - fitting.test_accuracy.median()).abs() <= band / 2]


def draw(table: pd.DataFrame, words: Mapping[str, str] = MNIST_WORDS, band: float = BAND) -> Figure:
    """Compressibility, structure and robustness over the learning rate by the batch size; one point a network.

    Args:
        table: One row a network.
        words: How the budgets are written, by the norms' names.
        band: Within which test accuracies count as equal.
    """
    rows = alike(table, band)
    figure = Figure(figsize=(8.6, 5.8), layout="constrained")
    figure.set_label("Emergent compressibility and robustness over learning rate by batch size")
    shown = {
        "row_error": "k-term error of rows",
        "spectral_error": "k-term error of the spectrum",
        "structure_inf": "ℓ∞ norms at one scale",
        "test_accuracy": "Test accuracy",
        "kept_linf": f"Robust over clean, {words['linf']}",
        "kept_l2": f"Robust over clean, {words['l2']}",
    }
    batches = sorted(table.batch.unique())
    left = table.drop(rows.index)
    for axis, (column, title) in zip(figure.subplots(2, 3, squeeze=False).ravel(), shown.items(), strict=True):
        axis.plot(1000 * left.ratio, left[column], linestyle="none", marker="x", markersize=4, color="grey", alpha=0.6)
        for series, batch in enumerate(batches):
            points = rows[rows.batch == batch]
            axis.plot(1000 * points.ratio, points[column], linestyle="none", alpha=0.75, **look(series))
        rho = correlate(rows[["ratio", column]].to_numpy(float).T, ranked=True)
        log_scale(axis, 1000 * table.ratio)
        axis.set(title=f"{title}\nρ = {rho:.2f}, n = {len(rows)} networks", xlabel="1000 × learning rate / batch size")
        axis.grid(visible=True)
    handles = [Line2D([], [], linestyle="none", **look(series)) for series in range(len(batches))]
    handles.append(Line2D([], [], linestyle="none", marker="x", markersize=4, color="grey"))
    legend(figure, handles, [*(f"batches of {batch}" for batch in batches), "outside of the band of test accuracy"])
    return figure


ABSTRACT = "abstract; of the appendix, emergent compressibility"


def emergent_claims(words: Mapping[str, str], band: float, structure: str) -> tuple[Claim, ...]:
    """The claims, over the networks of equal accuracy.

    Args:
        words: How the budgets are written, by the norms' names.
        band: Within which test accuracies count as equal.
        structure: What a norm at one scale is, with a place for the norm's name.
    """
    within = f"over networks of test accuracies within {100 * band:g} point{'s' if band > 0.01 else ''} of each other"
    ratio = "Spearman's ρ of learning rate over batch size and"

    def correlation(x: str, y: str) -> Callable[[pd.DataFrame], Statistic]:
        statistic = spearman(x, y)
        return lambda table: statistic(alike(table, band))

    return (
        *(
            Claim(
                f"A larger learning rate over batch size makes {what} more compressible, at equal accuracy.",
                ABSTRACT,
                correlation("ratio", error),
                at_most=-0.5,
                measure=f"{ratio} the 1-norm k-term error of {what} at a tenth, {within}",
            )
            for what, error in (("rows", "row_error"), ("the spectrum", "spectral_error"))
        ),
        *(
            Claim(
                f"It raises {norm} norms at one scale.",
                "section 3, Theorem 3.1",
                correlation("ratio", column),
                at_least=0.5,
                measure=f"{ratio} {structure.format(norm)}, {within}",
            )
            for norm, column in (("ℓ∞", "structure_inf"), ("ℓ₂", "structure_2"))
        ),
        *(
            Claim(
                f"It makes networks less robust at equal accuracy, {budget}.",
                ABSTRACT,
                correlation("ratio", f"kept_{norm}"),
                at_most=-0.5,
                measure=f"{ratio} robust over clean accuracy, {within}",
            )
            for norm, budget in words.items()
        ),
        *(
            Claim(
                f"Networks whose {what} became compressible without a penalty are less robust, {words[norm]}.",
                ABSTRACT,
                correlation(error, f"kept_{norm}"),
                at_least=0.5,
                measure=f"Spearman's ρ of the 1-norm k-term error and robust over clean accuracy, {within}",
            )
            for what, error, norm in (("rows", "row_error", "linf"), ("spectrum", "spectral_error", "l2"))
        ),
    )


CLAIMS = emergent_claims(MNIST_WORDS, BAND, "the product of {} operator norms over that of Frobenius norms")


def _grid(scale: str, epochs: int, seeds: int, rates: tuple[float, ...], batches: tuple[int, ...]) -> Axes:
    return {**ON_MNIST[scale], "epochs": epochs, "lr": rates, "batch": batches, "seed": tuple(range(seeds))}


EXPERIMENT = Experiment(
    name="emergent",
    title="Compressibility that emerges from gradient descent",
    source="arXiv 2507.17725, abstract and section 4.1 (its appendix)",
    run=run,
    figure=draw,
    grids={
        "smoke": _grid("smoke", 30, 1, (0.1, 0.3), (16,)),
        # Fewer samples than the other experiments: small rates on large batches need many epochs of many.
        "small": {**_grid("small", 120, 5, (0.1, 0.2, 0.4), (16, 32, 64)), "training": 10_000},
        "paper": _grid("paper", 300, 10, (0.01, 0.03, 0.1, 0.3), (8, 16, 32, 64, 128, 256)),
    },
    seconds={"smoke": 5, "small": 22},
    claims=CLAIMS,
    about=(
        "Networks 784-400-400-10 on MNIST with ReLU and no biases, trained by plain stochastic gradient descent "
        "without momentum, weight decay or penalty, until "
        f"{100 * FITTED:g} % of the training samples are right as they are seen in an epoch. Claims and correlations "
        f"are over the networks whose test accuracies (all test samples) lie within {100 * BAND:g} point of each "
        "other, around the median; n is told in the figure.",
        "k-term errors are those of the rows' ℓ₁ norms and of the singular values when a tenth of them is kept, means "
        "over hidden layers; 0 is most compressible. Norms at one scale are products of operator norms over those of "
        "Frobenius norms. Robust accuracy is the worst of APGD with 100 steps on the cross-entropy and 100 on the DLR "
        "loss. Intervals are 95 % over seeds.",
    ),
)
