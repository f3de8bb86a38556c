"""The spectral form of Figure 8: adversarially trained networks of which singular directions are cut, and attacked.

A baseline, and networks whose spectra a nuclear norm penalty made compressible; each is cut by one ratio for all
layers, by one threshold on all singular values, and by one k-term error.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from brittle.experiments.claims import Claim, over_seeds
from brittle.experiments.conv_networks import filter_structure, train_convolutional
from brittle.experiments.dense_networks import robustness_of, splits
from brittle.experiments.experiment import Experiment
from brittle.experiments.fig8 import (
    KINDS,
    MEASURED,
    accuracies,
    draw_ladders,
    gap,
    ladder,
    of_kind,
    pruning_claims,
)
from brittle.experiments.leaderboard import EPS, under_attack

METHODS = ("layerwise", "global", "k_term")
"""How much goes where."""


def run(
    *,
    data: str,
    stem: str,
    width: int,
    alpha: float,
    seed: int,
    training: int | None,
    samples: int,
    epochs: int,
    pgd: int,
    steps: int,
    data_root: str | None = None,
) -> dict[str, Any]:
    """Train one ResNet18 under attack, cut its ranks along the ladder in every way, and attack all networks.

    Args:
        data: The data set.
        stem: One of :data:`brittle.experiments.conv_networks.STEMS`.
        width: Channels of the first stage.
        alpha: Strength of the nuclear norm penalty.
        seed: Of weights, batches and attacks.
        training: Training samples; None for all.
        samples: Test samples that are attacked.
        epochs: Passes over the training samples.
        pgd: Steps of the attack in training; 1 is a step of 1.25 eps.
        steps: Of each of the two attacks along the ladder.
        data_root: Folder of the data sets.

    Returns:
        The columns of :func:`brittle.experiments.fig8.run`, by ranks in place of filters; shares are of the parameters.
    """
    learnt, test = splits(data, data_root, training=training, samples=samples)
    recipe = under_attack(epochs, pgd, seed, penalties={"nuclear_norm": alpha})
    network = train_convolutional(learnt, recipe, width=width, rank=0, stem=stem)
    row: dict[str, Any] = {**filter_structure(network), **robustness_of(network, test, {"linf": (math.inf, EPS)}, seed)}
    row["robust_whole"] = accuracies(network, test, steps, seed)[1]
    for method in METHODS:
        row |= ladder(network, learnt, test, method, steps=steps, seed=seed, remove="ranks")
    return row


def draw(table: pd.DataFrame) -> Figure:
    """Robust accuracy over the share of parameters removed."""
    return draw_ladders(table, METHODS, "parameters")


def more_compressible(rows: pd.DataFrame) -> float:
    """Of one seed's rows: k-term error of the spectrum under the penalty less that without."""
    baseline, compressible = (of_kind(rows, kind).spectral_error.mean() for kind in KINDS[:2])
    return float(compressible - baseline)


APPENDIX = "appendix, the spectral form of Figure 8"
CLAIMS = (
    Claim(
        "The penalty makes the spectrum more compressible.",
        APPENDIX,
        over_seeds(more_compressible),
        at_most=-0.1,
        measure="1-norm k-term error at a tenth, mean over all convolutions but the first, penalty less none",
    ),
    *(
        claim
        for what in MEASURED
        for claim in pruning_claims(what, left=APPENDIX, right=APPENDIX, counted="parameters")
    ),
    Claim(
        "Of the baseline as well, one k-term error for all layers retains more robust accuracy than one ratio.",
        "ours",
        over_seeds(gap("robust", ("baseline", "k_term"), ("baseline", "layerwise"))),
        at_least=0.02,
        measure="k-term less layerwise, baseline networks, mean along the ladder, without repair",
    ),
)
EXPERIMENT = Experiment(
    name="fig8_spectral",
    title="Adversarially trained networks of which ranks are cut",
    source="arXiv 2507.17725, Figure 8, in its spectral form (appendix)",
    run=run,
    figure=draw,
    grids={
        "smoke": {
            "data": "digits", "stem": "3x3", "width": 4, "training": 40, "samples": 4, "epochs": 1, "pgd": 1,
            "steps": 1, "alpha": 0.001, "seed": 0,
        },
        "small": {
            "data": "cifar10", "stem": "7x7", "width": 16, "training": 10_000, "samples": 300, "epochs": 15, "pgd": 1,
            "steps": 20, "alpha": (0.0, 0.003), "seed": (0, 1, 2),
        },
        "paper": {
            "data": "cifar10", "stem": "7x7", "width": 64, "training": None, "samples": 10_000, "epochs": 200,
            "pgd": 10, "steps": 100, "alpha": (0.0, 0.001), "seed": tuple(range(5)),
        },
    },
    claims=CLAIMS,
    seconds={"small": 250},
    about=(
        "ResNet18 trained on attacked samples alone (stochastic gradient descent, cosine, crops and flips; at small by "
        "a single step from a random start), without a penalty and under one on the nuclear norm of every matrix of "
        "filters but the first.",
        "A convolution of which singular directions go becomes one into fewer channels and a 1 x 1 convolution; shares "
        "are of all parameters. Refitted: layers are fitted to the whole network on 512 training samples, without "
        "labels.",
        "Robust accuracy in ℓ∞ 8/255: APGD on the cross-entropy, then on the DLR loss. A network that has collapsed "
        "into one class still has the share of that class, about a tenth of ten.",
    ),
)  # fmt: skip
