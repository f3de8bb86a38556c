"""Compressibility that emerges in a convolutional network: that of :mod:`brittle.experiments.emergent` in ResNet18."""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

from brittle.experiments.conv_networks import build_convolutional, filter_structure
from brittle.experiments.dense_networks import robustness_of, splits
from brittle.experiments.emergent import FITTED, draw, emergent_claims, fit_network
from brittle.experiments.experiment import Axes, Experiment, Scalar

BAND = 0.04
"""Networks count as equally accurate within this of each other: half of it to both sides of the median."""
BUDGETS = {"linf": (math.inf, 0.5 / 255), "l2": (2.0, 0.0625)}
"""Norm and budget of the attacks, half of those of :mod:`brittle.experiments.fig5_conv`: a first network (rate 0.4,
batches of 32, 40 epochs of 5,000 images) kept 73 and 77 % of its accuracy."""
WORDS = {"linf": "ℓ∞ 0.5/255", "l2": "ℓ₂ 0.0625"}


def run(
    *,
    data: str,
    stem: str,
    lr: float,
    batch: int,
    seed: int,
    width: int,
    training: int | None,
    samples: int,
    epochs: int,
    data_root: str | None = None,
) -> dict[str, Any]:
    """Train one ResNet18 by plain gradient descent until it fits, and attack it in both norms.

    Args:
        data: The data set.
        stem: ``7x7``, torchvision's, or ``3x3``.
        lr: Learning rate, constant.
        batch: Samples a step.
        seed: Of weights, batches and attacks.
        width: Channels of the first stage.
        training: Training samples; None for all.
        samples: Test samples that are attacked.
        epochs: Passes over the training samples, at most.
        data_root: Folder of the data sets.

    Returns:
        Structure of the filters (:func:`brittle.experiments.conv_networks.filter_structure`) and robust accuracy
        (:func:`brittle.experiments.dense_networks.robustness_of`), and how training went
        (:func:`brittle.experiments.emergent.fit_network`).
    """
    learnt, whole = splits(data, data_root, training=training, samples=sys.maxsize)
    start = build_convolutional(learnt, width=width, rank=0, seed=seed, stem=stem)
    network, fit = fit_network(start, learnt, whole, lr=lr, batch=batch, epochs=epochs, seed=seed)
    return {
        **fit,
        **filter_structure(network),
        **robustness_of(network, whole.take(samples), BUDGETS, seed),
    }


CLAIMS = emergent_claims(WORDS, BAND, "the mean over layers of {} operator norms over Frobenius norms")


def _grid(seeds: int, rates: tuple[float, ...], batches: tuple[int, ...], **common: Scalar) -> Axes:
    return {**common, "stem": "7x7", "lr": rates, "batch": batches, "seed": tuple(range(seeds))}


EXPERIMENT = Experiment(
    name="emergent_conv",
    title="Compressibility that emerges from gradient descent in a convolutional network",
    source="arXiv 2507.17725, abstract and section 4.1 (its appendix)",
    run=run,
    figure=functools.partial(draw, words=WORDS, band=BAND),
    grids={
        "smoke": _grid(1, (0.1,), (16,), data="digits", width=4, training=64, samples=10, epochs=2),
        "small": _grid(
            3, (0.1, 0.2, 0.4), (32, 64, 128), data="cifar10", width=16, training=4_000, samples=500, epochs=100
        ),
        "paper": _grid(
            5, (0.01, 0.03, 0.1, 0.3), (16, 32, 64, 128, 256),
            data="cifar10", width=64, training=None, samples=10_000, epochs=300,
        ),
    },
    claims=CLAIMS,
    seconds={"smoke": 1, "small": 200},
    about=(
        "ResNet18 with torchvision's stem on CIFAR-10, trained by plain stochastic gradient descent without momentum, "
        f"weight decay, penalty or augmentation, until {100 * FITTED:g} % of the training samples are right as they "
        "are seen in an epoch. Claims and correlations are over the networks whose test accuracies (all test samples) "
        f"lie within {100 * BAND:g} points of each other, around the median; n is told in the figure.",
        "k-term errors are those of the filters' ℓ₁ norms and of the singular values of the matrices of filters when a "
        "tenth of them is kept; 0 is most compressible. Norms at one scale are operator norms over Frobenius norms. "
        "All are means over the convolutions but the first, and none feels what batch normalisation undoes, a "
        "multiple of all filters. Robust accuracy is the worst of APGD with 100 steps on the cross-entropy and 100 on "
        "the DLR loss. Intervals are 95 % over seeds.",
    ),
)  # fmt: skip
