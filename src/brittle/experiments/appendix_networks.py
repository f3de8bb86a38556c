"""The appendix's networks and data sets: Figure 5, bottom, with one thing changed at a time.

Another architecture (VGG16, WideResNet-101-2), another data set (CIFAR-100, SVHN), or the group lasso that scales can
evade. All else is as in :mod:`brittle.experiments.fig5_conv`; columns of the table name what was changed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pandas as pd
from matplotlib.axes import Axes as Panel
from matplotlib.figure import Figure

from brittle.experiments.claims import Claim, chosen_rows
from brittle.experiments.conv_effect import (
    ROWS,
    SPECTRUM,
    Effect,
    Rows,
    ends,
    penalties_and_ranks,
    strengthened,
)
from brittle.experiments.conv_networks import PAPER, SMALL, SMOKE, conv_recipe, filter_structure, train_convolutional
from brittle.experiments.dense_networks import robustness_of, splits
from brittle.experiments.experiment import Axes, Experiment, Scalar
from brittle.experiments.fig5_conv import BUDGETS, WORDS
from brittle.experiments.plots import draw_means, evenly

FIGURE_5: dict[str, Scalar] = {"arch": "resnet18-cifar", "stem": "7x7", "penalty": "scale_invariant_group_lasso"}
"""What the variants change, as the main paper has it; its data are CIFAR-10."""
VARIANTS: dict[str, dict[str, Scalar]] = {
    "VGG16": {"arch": "vgg16", "stem": "3x3"},
    "WideResNet-101-2": {"arch": "wide-resnet101-2"},
    "CIFAR-100": {"data": "cifar100"},
    "SVHN": {"data": "svhn"},
    "Standard group lasso": {"penalty": "group_lasso"},
}
"""What is changed, by what it is called. VGG16 has no large stem."""


def run(
    *,
    data: str,
    arch: str,
    stem: str,
    penalty: str,
    alpha: float,
    rank: int,
    seed: int,
    width: int,
    training: int | None,
    samples: int,
    epochs: int,
    patience: int | None,
    annealed: bool,
    data_root: str | None = None,
) -> dict[str, Any]:
    """Train one network and attack it in both norms.

    Args:
        data: The data set.
        arch: As :func:`brittle.experiments.conv_networks.build_convolutional`.
        stem: ``7x7``, torchvision's, or ``3x3``.
        penalty: ``scale_invariant_group_lasso`` or ``group_lasso``.
        alpha: Its strength.
        rank: Of every convolution but the first, by factors; 0 for none.
        seed: Of weights, batches and attacks.
        width: Channels of the first stage.
        training: Training samples; None for all.
        samples: Test samples that are attacked.
        epochs: Passes over the training samples, at most.
        patience: Epochs without a better validation accuracy that end training; None for no end.
        annealed: Whether steps fall along a cosine, with crops and flips.
        data_root: Folder of the data sets.

    Returns:
        Structure of the filters (:func:`brittle.experiments.conv_networks.filter_structure`), and robust accuracy
        (:func:`brittle.experiments.dense_networks.robustness_of`) at the budget of either norm by which Figure 5 is
        judged.
    """
    learnt, test = splits(data, data_root, training=training, samples=samples)
    recipe = conv_recipe(epochs=epochs, patience=patience, annealed=annealed, seed=seed)
    recipe = dataclasses.replace(recipe, penalties={penalty: alpha} if alpha else {})
    network = train_convolutional(learnt, recipe, width=width, rank=rank, stem=stem, arch=arch)
    budgets = {norm: BUDGETS[norm] for norm in ("linf", "l2")}
    return {**filter_structure(network), **robustness_of(network, test, budgets, seed)}


def networks_of(variant: str) -> Rows:
    """The networks of one of :data:`VARIANTS` that show an effect."""
    return lambda table, effect: strengthened(chosen_rows(table, VARIANTS[variant]), effect)


def effects_of(variant: str) -> tuple[Effect, ...]:
    """What a variant is asked about: another penalty makes nothing but rows compressible."""
    return (ROWS,) if "penalty" in VARIANTS[variant] else (ROWS, SPECTRUM)


def draw(table: pd.DataFrame) -> Figure:
    """A line of panels a variant, rows to the left and the spectrum to the right."""
    present = [variant for variant, changed in VARIANTS.items() if len(chosen_rows(table, changed))]
    figure = Figure(figsize=(8.6, 0.5 + 2.3 * len(present)), layout="constrained")
    figure.set_label("Robustness and compressibility of the appendix's networks")
    for line, variant in zip(figure.subplots(len(present), 2, squeeze=False), present, strict=True):
        for axis in line[len(effects_of(variant)) :]:
            axis.set_visible(False)
        for axis, effect in zip(line, effects_of(variant), strict=False):
            draw_effect(axis, networks_of(variant)(table, effect), effect)
            axis.set_title(f"{variant}: {effect.words}")
    return figure


def draw_effect(axis: Panel, rows: pd.DataFrame, effect: Effect) -> None:
    """Accuracy without attack, the share of it that is robust, and the k-term error, over the strength."""
    places, _ = evenly(rows, "strength")
    written = rows.sort_values("strength")[effect.column].unique()
    columns = {
        "accuracy without attack": "clean_accuracy",
        f"robust over it, {WORDS[effect.norm]}": f"kept_{effect.norm}",
        "k-term error at a tenth": effect.error,
    }
    for series, (name, column) in enumerate(columns.items()):
        draw_means(axis, rows.assign(place=places), "place", column, series=series)
        axis.lines[-1].set_label(name)
    axis.set_xticks(range(len(written)), ["full" if effect is SPECTRUM and not v else f"{v:g}" for v in written])
    axis.set(xlabel=effect.axis, ylim=(0, 1.03))
    axis.grid(visible=True)
    axis.legend(fontsize=6)


PLACE = "appendix, further networks and data sets"
CLAIMS = tuple(
    claim
    for variant in VARIANTS
    for effect in effects_of(variant)
    for scales in [("paper",) if variant == "SVHN" else ("small", "paper")]
    for claim in (
        Claim(
            f"{variant}: the intervention makes {effect.what} more compressible.",
            PLACE,
            ends(effect.error, networks_of(variant), effect),
            at_most=-0.1,
            scales=scales,
            measure=f"1-norm k-term error at a tenth, mean over all convolutions but the first, {effect.contrast}",
        ),
        Claim(
            f"{variant}: relative to the accuracy without attack, robustness falls as {effect.words} grows.",
            PLACE,
            ends(f"kept_{effect.norm}", networks_of(variant), effect),
            at_most=-0.1,
            scales=scales,
            measure=f"Robust over clean accuracy at {WORDS[effect.norm]}, {effect.contrast}",
        ),
    )
)


def _grids(
    variant: str,
    common: dict[str, Scalar],
    seeds: int,
    alphas: tuple[float, ...],
    ranks: tuple[int, ...],
    **changed: Scalar,
) -> tuple[Axes, ...]:
    """Penalties of a variant, with the network that has none, then the ranks that it is asked about."""
    every = {**FIGURE_5, **common, **VARIANTS[variant], **changed}
    return penalties_and_ranks(every, seeds, alphas, ranks)[: len(effects_of(variant))]


TINY: dict[str, Scalar] = {**SMOKE, "annealed": True, "seed": 0}
REDUCED: dict[str, Scalar] = {**SMALL, "annealed": True}
EXPERIMENT = Experiment(
    name="appendix_networks",
    title="Other networks, data sets and penalties under row and spectral compressibility",
    source="arXiv 2507.17725, appendix (section 4.1 names what is in it)",
    run=run,
    figure=draw,
    grids={
        "smoke": (
            {**FIGURE_5, **TINY, **VARIANTS["VGG16"], "alpha": 0.0, "rank": 2},
            {**FIGURE_5, **TINY, **VARIANTS["Standard group lasso"], "alpha": 0.1, "rank": 0},
        ),
        "small": (
            *_grids("VGG16", REDUCED, 3, (2.0,), (4,), width=8),
            *_grids("WideResNet-101-2", REDUCED, 3, (2.0,), (4,), width=4, epochs=10),
            *_grids("CIFAR-100", REDUCED, 3, (2.0,), (4,), training=20_000),
            *_grids("Standard group lasso", REDUCED, 3, (0.3,), ()),
        ),
        "paper": tuple(
            axes
            for variant in VARIANTS
            for axes in _grids(
                variant, {**PAPER, "annealed": False}, 5,
                (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.5), (4, 8, 16, 32, 64, 128),
            )
        ),
    },
    claims=CLAIMS,
    seconds={"smoke": 3, "small": 110},
    about=(
        "Figure 5, bottom, with one thing changed at a time: the architecture, the data set, or the group lasso, whose "
        "standard form a smaller scale of all weights satisfies. Otherwise ResNet18 with torchvision's stem on "
        "CIFAR-10 under a group lasso that no scale changes, by AdamW with weight decay, at small along a cosine with "
        "crops and flips; VGG16 has a 3 x 3 stem. Compressibility grows to the right. Intervals are 95 % over seeds.",
        "Robust accuracy is the worst of APGD with 100 steps on the cross-entropy and 100 on the DLR loss. k-term "
        "errors are those of the filters' ℓ₁ norms and of the singular values of the matrices of filters when a tenth "
        "of them is kept; 0 is most compressible.",
    ),
)  # fmt: skip
