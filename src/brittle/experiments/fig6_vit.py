"""Figure 6, left, with its spectral form: what compressibility does to the robustness of vision transformers.

A ViT on CIFAR-10 under a group lasso that no scale changes, and as products of factors of low rank. A Swin transformer,
which the paper names beside it, has the two ends.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from brittle.compression.factorise import factorised
from brittle.data.load import Data, statistics_of
from brittle.experiments.claims import Claim
from brittle.experiments.conv_effect import (
    ROWS,
    SPECTRUM,
    Effect,
    crosscheck_claim,
    draw_effects,
    effect_claims,
    ends,
    strengthened,
    with_ends,
)
from brittle.experiments.conv_networks import conv_recipe, crosscheck, matrix_structure
from brittle.experiments.dense_networks import robustness_of, splits
from brittle.experiments.experiment import Experiment, Scalar
from brittle.experiments.fig5_conv import BUDGETS, WORDS
from brittle.models.build import build_model
from brittle.models.normalize import normalised
from brittle.training.loop import train

LAYERS = "all Linear layers but the head"
"""Whose matrices become compressible."""
NEURONS = dataclasses.replace(ROWS, what="neurons", layers=LAYERS)
DIRECTIONS = dataclasses.replace(SPECTRUM, axis="Rank of the matrices", layers=LAYERS)


def run(
    *,
    data: str,
    arch: str,
    patch: int,
    width: int,
    depth: int,
    alpha: float,
    rank: int,
    seed: int,
    training: int | None,
    samples: int,
    epochs: int,
    patience: int | None,
    data_root: str | None = None,
) -> dict[str, Any]:
    """Train one transformer and attack it in both norms.

    Args:
        data: The data set.
        arch: ``vit``, ours, or ``swin``, timm's.
        patch: Pixels of a side of a patch.
        width: Numbers in a token; of a Swin transformer in its first stage, 32 for every head.
        depth: Blocks; of a Swin transformer of each of two stages.
        alpha: Strength of the scale-invariant group lasso.
        rank: Of every Linear layer but the head, by factors; 0 for none.
        seed: Of weights, batches and attacks.
        training: Training samples; None for all.
        samples: Test samples that are attacked.
        epochs: Passes over the training samples, at most.
        patience: Epochs without a better validation accuracy that end training; None for no end.
        data_root: Folder of the data sets.

    Returns:
        Structure of the matrices (:func:`brittle.experiments.conv_networks.matrix_structure`) and robust accuracy at
        every budget of :mod:`brittle.experiments.fig5_conv`
        (:func:`brittle.experiments.dense_networks.robustness_of`); without intervention a second opinion
        (:func:`brittle.experiments.conv_networks.crosscheck`).
    """
    learnt, test = splits(data, data_root, training=training, samples=samples)
    network = transformer(learnt, arch=arch, patch=patch, width=width, depth=depth, rank=rank, seed=seed)
    recipe = conv_recipe(epochs=epochs, patience=patience, annealed=True, alpha=alpha, seed=seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = train(network, learnt, recipe, devices=device).model.eval()
    row = {**matrix_structure(network), **robustness_of(network, test, BUDGETS, seed)}
    return row if alpha or rank else {**row, **crosscheck(network, test, BUDGETS["linf"], seed)}


def transformer(data: Data, *, arch: str, patch: int, width: int, depth: int, rank: int, seed: int) -> nn.Module:
    """A transformer for the images of a data set, behind their normalisation.

    Args:
        data: Training samples, for their shape, classes and statistics.
        arch: As :func:`run`; so are the other sizes.
        patch: Pixels.
        width: Numbers in a token.
        depth: Blocks.
        rank: Of every Linear layer but the head; layers with no larger side stay whole. 0 leaves all whole.
        seed: Of the weights.

    Raises:
        MissingExtra: timm is needed and not installed.
    """
    channels, size = data.inputs.shape[1], data.inputs.shape[-1]
    if arch == "swin":
        heads = max(1, width // 32)
        arguments: dict[str, object] = {
            "img_size": size, "patch_size": patch, "in_chans": channels, "num_classes": data.classes,
            "embed_dim": width, "depths": (depth, depth), "num_heads": (heads, 2 * heads), "window_size": 4,
        }  # fmt: skip
        network = build_model("timm:swin_tiny_patch4_window7_224", arguments, seed=seed)
    else:
        arguments = {
            "image_size": size, "patch_size": patch, "in_channels": channels, "classes": data.classes, "width": width,
            "depth": depth, "heads": max(1, width // 32),
        }  # fmt: skip
        network = build_model(arch, arguments, seed=seed)
    if rank:
        network = factorised(network, rank, initial="random", seed=seed)
    return normalised(network, *statistics_of(data))


def of_vit(table: pd.DataFrame, effect: Effect) -> pd.DataFrame:
    """The networks that are judged first."""
    return strengthened(table[table.arch == "vit"], effect)


def of_swin(table: pd.DataFrame, effect: Effect) -> pd.DataFrame:
    """The Swin transformers."""
    return strengthened(table[table.arch == "swin"], effect)


def draw(table: pd.DataFrame) -> Figure:
    """For rows and for the spectrum: accuracies, robust shares, compressibility."""
    title = "Vision transformers under a scale-invariant group lasso and of low rank"
    return draw_effects(title, table, (NEURONS, DIRECTIONS), of_vit, WORDS, {"Swin": of_swin})


FIGURE = "section 4.1, Figure 6 left"
CLAIMS = (
    *effect_claims(NEURONS, of_vit, FIGURE, WORDS),
    *effect_claims(DIRECTIONS, of_vit, "appendix, the spectral form of Figure 6 left", WORDS),
    *(
        Claim(
            f"Swin: relative to the accuracy without attack, robustness falls as {effect.words} grows.",
            "section 4, which names the network",
            ends(f"kept_{effect.norm}", of_swin, effect),
            at_most=-0.1,
            measure=f"Robust over clean accuracy at {WORDS[effect.norm]}, {effect.contrast}",
        )
        for effect in (NEURONS, DIRECTIONS)
    ),
    crosscheck_claim(lambda rows: of_vit(rows, NEURONS), WORDS["linf"]),
)


TINY: dict[str, Scalar] = {
    "data": "digits", "training": 128, "samples": 4, "epochs": 1, "patience": None, "seed": 0, "patch": 4,
    "depth": 1, "arch": "vit", "width": 32,
}  # fmt: skip
EXPERIMENT = Experiment(
    name="fig6_vit",
    title="Vision transformers under a scale-invariant group lasso and of low rank",
    source="arXiv 2507.17725, Figure 6 (left)",
    run=run,
    figure=draw,
    grids={
        "smoke": (
            {**TINY, "alpha": 0.1, "rank": 0},
            {**TINY, "alpha": 0.0, "rank": 2},
        ),
        "small": with_ends(
            {
                "arch": "vit", "data": "cifar10", "patch": 8, "width": 96, "depth": 4, "training": 10_000,
                "samples": 300, "epochs": 15, "patience": None,
            },
            {"arch": "swin", "patch": 4, "width": 32, "depth": 1}, 3, (0.02, 0.1, 0.5), (4, 8, 16),
        ),
        "paper": with_ends(
            {
                "arch": "vit", "data": "cifar10", "patch": 4, "width": 192, "depth": 6, "training": None,
                "samples": 10_000, "epochs": 200, "patience": 14,
            },
            {"arch": "swin", "patch": 2, "width": 96, "depth": 2}, 5, (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.5),
            (4, 8, 16, 32, 64),
        ),
    },
    claims=CLAIMS,
    about=(
        "A vision transformer trained by AdamW with weight decay, along a cosine with crops and flips, the weights of "
        "best validation accuracy kept: under a group lasso that no scale changes, summed over layers, on every Linear "
        "layer but the head (queries, keys and values are one), or with each of these as a product of two factors. "
        "Swin: timm's, of two stages. Compressibility grows to the right. Intervals are 95 % over seeds.",
        "Robust accuracy is the worst of APGD with 100 steps on the cross-entropy and 100 on the DLR loss; attention "
        "is easily overestimated, so networks without intervention are attacked by targeted APGD and Square as well. "
        "k-term errors are those of the rows' ℓ₁ norms and of the singular values when a tenth of them is kept; 0 is "
        "most compressible.",
    ),
)  # fmt: skip
