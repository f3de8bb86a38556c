"""Penalties that lower rank or sparsity, and how often networks are fooled: in which networks most, and how far.

Langenberg et al. (arXiv 1901.10371) find that the nuclear norm, combined with sparsity, makes networks more robust,
convolutional ones most of all, and still less than adversarial training does. Their settings are not known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from brittle.experiments.claims import Claim, chosen_rows, over_seeds
from brittle.experiments.dense_networks import splits
from brittle.experiments.experiment import Axes, Experiment, Scalar
from brittle.experiments.low_rank_networks import (
    AFFORDED,
    afforded,
    build_network,
    fooling_ratios,
    rank_shares,
    weight_names,
)
from brittle.experiments.plots import look
from brittle.reporting.drawing import INK, legend, panels
from brittle.results import Statistic
from brittle.training.loop import train
from brittle.training.recipe import Adversary, Recipe

STEPS = 5
"""Of the PGD in adversarial training, which attacks every sample of a batch."""
PENALTIES: dict[str, dict[str, float]] = {
    "nuclear_norm": {"nuclear_norm": 1.0},
    "l1": {"l1": 1.0},
    "nuclear_norm_and_l1": {"nuclear_norm": 1.0, "l1": 0.03},
    "joint_l1": {"joint_l1": 1.0},
}
"""Penalties by the name of their intervention, each with what its strength is multiplied by."""
WORDS = {
    "nuclear_norm": "nuclear norm",
    "l1": "ℓ₁",
    "nuclear_norm_and_l1": "nuclear norm and ℓ₁",
    "joint_l1": "joint, ℓ₁ of W₂ W₁",
    "adversarial": "adversarial training",
}
"""Interventions in words."""
NETWORKS = {
    ("fcn", "mnist"): "fully connected, MNIST",
    ("conv", "mnist"): "convolutional, MNIST",
    ("conv", "cifar10"): "convolutional, CIFAR-10",
}
"""Architectures and their data, in words."""


def run(
    *,
    data: str,
    arch: str,
    intervention: str,
    strength: float,
    eps: float,
    seed: int,
    width: int,
    training: int | None,
    samples: int,
    epochs: int,
    data_root: str | None = None,
) -> dict[str, Any]:
    """Train one network under one intervention on all of its weights, and try to fool it.

    Args:
        data: The data set.
        arch: One of :data:`brittle.experiments.low_rank_networks.ARCHITECTURES`.
        intervention: ``none``, one of :data:`PENALTIES`, or ``adversarial``.
        strength: Of the penalty; of adversarial training the budget, in l_inf.
        eps: Budget in l_inf at which networks are attacked, and at half of it.
        seed: Of weights, batches and attacks.
        width: Neurons of a hidden layer, or filters of the first convolution.
        training: Training samples; None for all.
        samples: Test samples that are attacked.
        epochs: Passes over the training samples.
        data_root: Folder of the data sets.

    Returns:
        ``validation``, the accuracy on a tenth of the training samples, held out, without attack; the fooling ratios of
        :func:`brittle.experiments.low_rank_networks.fooling_ratios` at ``half`` and at ``full``, and ranks.
    """
    learnt, test = splits(data, data_root, training=training, samples=samples)
    network = build_network(arch, learnt, width=width, seed=seed)
    recipe = Recipe(
        epochs=epochs,
        penalties={name: factor * strength for name, factor in PENALTIES.get(intervention, {}).items()},
        layers=weight_names(network),
        schedule="cosine",  # a reused gradient leaves noise of the size of a step in the small singular values
        refresh=10 if arch == "fcn" else 1,  # of the nuclear norm's gradient; small matrices need no reuse
        adversary=Adversary(strength, steps=STEPS, ratio=1.0) if intervention == "adversarial" else None,
        select="last",
        measure_every=0,
        seed=seed,
    )
    trained = train(network, learnt, recipe, devices="cuda" if torch.cuda.is_available() else "cpu")
    budgets = {"half": (math.inf, eps / 2), "full": (math.inf, eps)}
    return {
        "validation": trained.epochs[-1].validation_accuracy,
        **fooling_ratios(trained.model.eval(), test, budgets, seed),
        **rank_shares(trained.model),
    }


Pick = Callable[[pd.DataFrame], Statistic]


def chosen(table: pd.DataFrame, network: tuple[str, str] | None = None) -> pd.DataFrame:
    """Networks without intervention, and of every other the strongest that is afforded; all, or those of one kind."""
    rows = afforded(table, ("arch", "data"))
    return rows if network is None else chosen_rows(rows, {"arch": network[0], "data": network[1]})


def fooled(rows: pd.DataFrame, intervention: str, column: str = "fooled") -> float:
    """Mean of a column over the networks under one intervention; NaN where there are none."""
    return float(rows[column][rows.intervention == intervention].mean())


def lowered(intervention: str, network: tuple[str, str], column: str = "fooled") -> Pick:
    """The fooling ratio of networks under an intervention less that of those without, over seeds."""
    change = over_seeds(lambda rows: fooled(rows, intervention, column) - fooled(rows, "none", column))
    return lambda table: change(chosen(table, network))


def most_in_convolutions(intervention: str) -> Pick:
    """Share of the fooling ratio that an intervention takes, of convolutional less of fully connected networks.

    On MNIST, over the seeds that both have.
    """

    def quantity(rows: pd.DataFrame) -> float:
        by_arch = (rows[rows.arch == arch] for arch in ("conv", "fcn"))
        conv, fcn = (1 - fooled(own, intervention) / fooled(own, "none") for own in by_arch)
        return conv - fcn

    def statistic(table: pd.DataFrame) -> Statistic:
        rows = chosen_rows(chosen(table), {"data": "mnist"})
        return over_seeds(quantity)(rows.groupby("seed").filter(lambda seed: seed.arch.nunique() == 2))

    return statistic


def behind_adversarial(network: tuple[str, str]) -> Pick:
    """The least fooling ratio of a seed's penalised networks less that of its adversarially trained one."""

    def quantity(rows: pd.DataFrame) -> float:
        penalised = rows[rows.intervention.isin(PENALTIES)]
        return float(penalised.fooled.min()) - fooled(rows, "adversarial")

    return lambda table: over_seeds(quantity)(chosen(table, network))


RING: dict[str, Any] = {"marker": "o", "markersize": 10, "markerfacecolor": "none", "markeredgewidth": 1}


def _look(name: str) -> dict[str, Any]:
    """Colour and mark of an intervention, or of none: penalties in colours, adversarial training and none in ink."""
    if name in PENALTIES:
        return look(list(PENALTIES).index(name))
    return {
        "color": INK,
        "marker": "X" if name == "adversarial" else "*",
        "markersize": 6 if name == "adversarial" else 9,
    }


def draw(table: pd.DataFrame) -> Figure:
    """Fooling ratio over validation accuracy, a line an intervention through its strengths, a panel a kind of network.

    Left of the dashed line an intervention costs more than :data:`AFFORDED`; the strongest right of it has a ring.
    """
    pairs = sorted(set(zip(table.arch, table.data, strict=True)))
    present = [network for network in NETWORKS if network in pairs] or pairs  # the smallest scale has other data
    figure, axes = panels("Fooling ratio under penalties on rank and sparsity", len(present), 4.0)
    best = chosen(table)
    for axis, network in zip(axes, present, strict=True):
        where = {"arch": network[0], "data": network[1]}
        rows = chosen_rows(table, where)
        plain = rows[rows.intervention == "none"]
        start = plain[["validation", "fooled"]].mean()
        for name in WORDS:
            means = rows[rows.intervention == name].groupby("strength")[["validation", "fooled"]].mean()
            axis.plot(
                [start.validation, *means.validation], [start.fooled, *means.fooled], linewidth=1.2, **_look(name)
            )
            ring = chosen_rows(best, {**where, "intervention": name})[["validation", "fooled"]].mean()
            axis.plot(ring.validation, ring.fooled, **_look(name) | RING)
        axis.plot(start.validation, start.fooled, **_look("none"))
        axis.axvline(start.validation - AFFORDED, linewidth=0.8, linestyle="--", color=INK)
        axis.set_title(f"{NETWORKS.get(network, ', '.join(network))}\nn = {rows.seed.nunique()} seeds, means")
        axis.set(xlabel="Accuracy without attack (validation)", ylim=(0, 1.02))
        axis.grid(visible=True)
    axes[0].set_ylabel("Fooling ratio over all inputs,\nmean over both budgets")
    handles = [Line2D([], [], **_look(name)) for name in ("none", *WORDS)]
    legend(figure, handles, ["no intervention", *WORDS.values()])
    return figure


PLACE = "arXiv 1901.10371, abstract"
RATIO = "Fooling ratio (predictions that change under attack), mean over both budgets"
CHOICE = "at the largest strength that costs at most 2 points of validation accuracy"


def _claims(network: tuple[str, str]) -> tuple[Claim, ...]:
    """The claims about one kind of network."""
    words = NETWORKS[network]
    return (
        *(
            Claim(
                f"A penalty ({WORDS[name]}) lowers the fooling ratio: {words}.",
                PLACE,
                lowered(name, network),
                at_most=-0.05,
                measure=f"{RATIO}, over all inputs, {CHOICE}, less that without a penalty",
            )
            for name in PENALTIES
        ),
        Claim(
            f"The nuclear norm does so over inputs that are right without attack as well: {words}.",
            PLACE,
            lowered("nuclear_norm", network, "fooled_right"),
            at_most=-0.05,
            measure=f"{RATIO}, over inputs that are right without attack, {CHOICE}, less that without a penalty",
        ),
        Claim(
            f"Penalties stay behind adversarial training: {words}.",
            PLACE,
            behind_adversarial(network),
            at_least=0.05,
            measure=f"{RATIO}, over all inputs, the least of a seed's penalties less that of adversarial training, all "
            f"{CHOICE}",
        ),
    )


CLAIMS = (
    *(claim for network in NETWORKS for claim in _claims(network)),
    *(
        Claim(
            f"A penalty ({WORDS[name]}) helps convolutional networks most.",
            PLACE,
            most_in_convolutions(name),
            at_least=0.05,
            measure=f"Share of the fooling ratio that the penalty takes, {CHOICE}: convolutional less fully connected "
            "networks, MNIST, same budgets",
        )
        for name in ("nuclear_norm", "nuclear_norm_and_l1")
    ),
)


def _grids(
    common: Mapping[str, Scalar], seeds: int, penalties: Mapping[str, tuple[float, ...]], budgets: tuple[float, ...]
) -> list[Axes]:
    """No intervention, every penalty in its strengths, and adversarial training at several budgets."""
    every = {**common, "seed": tuple(range(seeds))}
    interventions = {"none": (0.0,), **penalties, "adversarial": budgets}
    return [{**every, "intervention": name, "strength": values} for name, values in interventions.items()]


STRENGTHS: dict[str, dict[str, tuple[float, ...]]] = {
    "fcn": {
        "nuclear_norm": (0.001, 0.003, 0.01),
        "l1": (3e-5, 1e-4, 3e-4),
        "nuclear_norm_and_l1": (0.001, 0.003, 0.01),
        "joint_l1": (3e-5, 1e-4, 3e-4),
    },
    "conv": {
        "nuclear_norm": (0.003, 0.01, 0.03),
        "l1": (1e-4, 3e-4, 1e-3),
        "nuclear_norm_and_l1": (0.003, 0.01, 0.03),
        "joint_l1": (3e-5, 1e-4, 3e-4),
    },
}
"""By architecture, three each: the mildest cost up to a point in trainings of one seed."""

SMOKE: dict[str, Scalar] = {"data": "digits", "eps": 0.05, "training": None, "samples": 30, "epochs": 3}
SMALL: dict[str, Scalar] = {"training": 10_000, "samples": 200, "epochs": 8}
PAPER: dict[str, Scalar] = {"training": None, "samples": 10_000, "epochs": 100}
MNIST: dict[str, Scalar] = {"data": "mnist", "eps": 0.1}
CIFAR: dict[str, Scalar] = {"data": "cifar10", "eps": 2 / 255}

ATTACKED = (0.05, 0.1)
"""Budgets of adversarial training on MNIST."""

EXPERIMENT = Experiment(
    name="low_rank_fooling",
    title="Penalties on rank and sparsity lower the fooling ratio",
    source="arXiv 1901.10371 (Langenberg et al. 2019), second finding",
    run=run,
    figure=draw,
    grids={
        "smoke": [
            *_grids({**SMOKE, "arch": "fcn", "width": 16}, 1, {"joint_l1": (0.001,)}, (0.05,)),
            *_grids({**SMOKE, "arch": "conv", "width": 4}, 1, {"nuclear_norm_and_l1": (0.003,)}, (0.05,)),
        ],
        "small": [
            *_grids({**MNIST, **SMALL, "arch": "fcn", "width": 400}, 5, STRENGTHS["fcn"], ATTACKED),
            *_grids({**MNIST, **SMALL, "arch": "conv", "width": 16}, 3, STRENGTHS["conv"], ATTACKED),
            *_grids({**CIFAR, **SMALL, "arch": "conv", "width": 32}, 3, STRENGTHS["conv"], (1 / 255, 2 / 255)),
        ],
        "paper": [
            *_grids({**MNIST, **PAPER, "arch": "fcn", "width": 400}, 10, STRENGTHS["fcn"], ATTACKED),
            *_grids({**MNIST, **PAPER, "arch": "conv", "width": 32}, 5, STRENGTHS["conv"], ATTACKED),
            *_grids({**CIFAR, **PAPER, "arch": "conv", "width": 64}, 5, STRENGTHS["conv"], (1 / 255, 2 / 255)),
        ],
    },
    claims=CLAIMS,
    seconds={"smoke": 2, "small": 27},
    about=(
        "Networks with ReLU and no biases: two hidden layers on MNIST, or three strided convolutions behind the data's "
        "normalisation on MNIST and CIFAR-10. Every weight matrix is under the penalty, first layer and head included; "
        "a convolution counts by the matrix of its filters. AdamW and a cosine schedule; the last epoch's weights "
        "count. The joint penalty is the sum of magnitudes of the products of consecutive matrices, of convolutions of "
        "their composed kernels. Adversarial training attacks every sample by PGD.",
        "The fooling ratio is the share of inputs whose predicted label an attack changes, over all inputs or over "
        "those that are right without attack: the worst of APGD in ℓ∞ with 100 steps on the cross-entropy and 100 on "
        "the DLR loss, away from the network's own prediction. It is a lower estimate.",
        "Of every intervention, adversarial training included, the largest strength of its grid is judged whose "
        "accuracy on held out training samples, mean over seeds, lies at most 2 points below that of networks without. "
        "Test samples choose nothing.",
    ),
)
