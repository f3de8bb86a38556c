"""When low rank helps robustness and when it hurts: penalties and factors, with free scale and with the scale held.

Langenberg et al. (arXiv 1901.10371) find that low-rank weights make networks more robust, Barsbey et al. (arXiv
2507.17725) that they make them fragile. Both can be true: ``||W||_2 = ||W||_F / sqrt(stable rank)``, so that low rank
raises the norm at one scale, while a plain penalty lowers the scale as well (theory page, "Ranks"). As every layer of a
network without biases may be multiplied by a number, what counts is neither, but the margin over the bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes as Panel
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn

from brittle.bounds.lipschitz.network import lipschitz_upper_bound
from brittle.bounds.radius import certified_radii
from brittle.compression.factorise import factorised
from brittle.data.load import Data
from brittle.experiments.claims import Claim, correlate, over_seeds, spearman
from brittle.experiments.dense_networks import (
    ON_MNIST,
    initial_norm,
    robustness_of,
    splits,
)
from brittle.experiments.experiment import Axes, Experiment, Scalar
from brittle.experiments.low_rank_networks import afforded, build_network
from brittle.experiments.plots import look
from brittle.linear.compressibility import singular_values
from brittle.models.borrow import device_of, frozen
from brittle.models.layers import read_layers
from brittle.reporting.drawing import INK, label_rows, legend, log_scale
from brittle.results import Statistic
from brittle.training.loop import train
from brittle.training.recipe import Recipe

RANK, LIMIT = 14, 1.2
"""Of hidden matrices, by factors, which leaves 6 % of their weights at width 400; and the largest condition number, one
that binds: a limit of 2 moved the stable rank from 6.3 to 6.8 in a first training."""
P = 2.0
"""Norm of the attacks and of the bound: the one that singular values speak of."""
BUDGETS = {"l2_05": (P, 0.5), "l2_1": (P, 1.0), "l2_15": (P, 1.5)}
"""The share that is robust is the mean over these: one budget alone tells boundaries on either side of it apart."""
WORDS = "ℓ₂ 0.5, 1 and 1.5"
SCALES = {"free": "free scale", "held": "scale held"}
"""Whether hidden matrices keep the Frobenius norm of their start, in words."""


def run(
    *,
    data: str,
    intervention: str,
    strength: float,
    condition: float,
    scale: str,
    seed: int,
    width: int,
    training: int | None,
    samples: int,
    epochs: int,
    data_root: str | None = None,
) -> dict[str, Any]:
    """Train one network with two hidden layers, attack it, and measure scale, concentration, margin and bound.

    Args:
        data: The data set.
        intervention: ``none``, ``nuclear_norm``, or ``rank``.
        strength: Of the penalty on the hidden matrices, or the rank of both, by factors.
        condition: Largest condition number of the factors' products, held after every step; 0 for no limit.
        scale: ``held``: hidden matrices keep the Frobenius norm of their start; ``free``: nothing is held.
        seed: Of weights, batches and attacks.
        width: Neurons of a hidden layer.
        training: Training samples; None for all.
        samples: Test samples that are attacked.
        epochs: Passes over the training samples.
        data_root: Folder of the data sets.

    Returns:
        ``validation``, the accuracy on a tenth of the training samples, held out; accuracies with and without attack
        (:func:`brittle.experiments.dense_networks.robustness_of`) and ``kept``, the mean of the shares that stay right
        over :data:`BUDGETS`; and :func:`causes_of`.
    """
    learnt, test = splits(data, data_root, training=training, samples=samples)
    network = build_network("fcn", learnt, width=width, seed=seed)
    if intervention == "rank":
        network = factorised(network, int(strength), initial="random", seed=seed)
    constraints: dict[str, float | None] = {"condition_cap": condition} if condition else {}
    if scale == "held":
        constraints["frobenius"] = initial_norm(width)  # after the other, which may change it
    recipe = Recipe(
        epochs=epochs,
        penalties={"nuclear_norm": strength} if intervention == "nuclear_norm" else {},
        constraints=constraints,
        schedule="cosine",  # a reused gradient leaves noise of the size of a step in the small singular values
        refresh=10,  # of the nuclear norm's gradient
        select="last",
        measure_every=0,
        seed=seed,
    )
    trained = train(network, learnt, recipe, devices="cuda" if torch.cuda.is_available() else "cpu")
    network = trained.model.eval()
    robust = robustness_of(network, test, BUDGETS, seed)
    return {
        "validation": trained.epochs[-1].validation_accuracy,
        **robust,
        "kept": fmean(float(str(robust[f"kept_{name}"])) for name in BUDGETS),
        **causes_of(network, test),
    }


def causes_of(network: nn.Module, test: Data) -> dict[str, float]:
    """What makes a network robust or fragile in l_2, from its hidden matrices to its margins.

    Returns:
        ``frobenius`` and ``spectral``, the products of both norms over the hidden matrices, and ``concentration``, the
        second over the first: ``prod 1 / sqrt(stable rank)``, which no scale changes. ``stable_rank``, the geometric
        mean. ``bound``, the least certified upper bound of the l_2 Lipschitz constant of the logits. Medians over test
        samples: ``margin``, the label's logit less the largest other; ``certified``, the certified radius, least margin
        over the bound of that difference (a lower bound of the distance to the boundary; 0 where the prediction is
        wrong); ``slope``, the norm of the margin's gradient; ``linear``, the margin over it, an estimate of that
        distance that bounds it on no side.
    """
    sigmas = [singular_values(view.matrix.detach().double().cpu()) for view in read_layers(network).views[:-1]]
    frobenius, spectral = math.prod(float(s.norm()) for s in sigmas), math.prod(float(s[0]) for s in sigmas)
    bound = lipschitz_upper_bound(network, P)
    assert bound.upper is not None  # dense layers and ReLU
    assert bound.margins is not None
    logits, margins, slopes = margins_and_slopes(network, test)
    return {
        "frobenius": frobenius,
        "spectral": spectral,
        "concentration": spectral / frobenius,
        "stable_rank": (frobenius / spectral) ** (2 / len(sigmas)),
        "bound": bound.upper,
        "margin": float(margins.median()),
        "certified": float(certified_radii(logits, test.labels, bound.margins).median()),
        "slope": float(slopes.median()),
        "linear": float((margins / slopes.clamp_min(1e-30)).median()),
    }


def margins_and_slopes(network: nn.Module, test: Data) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``(N, K)``, the label's less the largest other ``(N,)``, and the norms of its gradients ``(N,)``; CPU."""
    device = device_of(network)
    with frozen(network), torch.enable_grad():
        x, y = test.inputs.to(device).requires_grad_(), test.labels.to(device)[:, None]
        logits = network(x)
        others = logits.scatter(1, y, -math.inf)
        margins = (logits.gather(1, y) - others.amax(1, keepdim=True)).squeeze(1)
        (gradients,) = torch.autograd.grad(margins.sum(), x)
    return logits.detach().cpu(), margins.detach().cpu(), gradients.flatten(1).norm(dim=1).cpu()


ARMS = {
    "none": "no intervention",
    "nuclear_norm": "nuclear norm penalty",
    "rank": "low-rank factors",
    "conditioned": "low rank, condition capped",
}
"""What is done to the hidden matrices, in words; each at free scale and with the scale held."""


def judged(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that claims are about, with their ``arm``: of the penalty the strongest afforded at its scale."""
    penalised = afforded(table[table.intervention != "rank"], ["scale"])
    rows = pd.concat([penalised, table[table.intervention == "rank"]])
    return rows.assign(arm=rows.intervention.where(rows.condition == 0, "conditioned"))


Pick = Callable[[pd.DataFrame], Statistic]
KEPT = "kept"


def change(column: str, arm: str, scale: str, *, against: str = "none", logarithmic: bool = False) -> Pick:
    """Mean of a column over the networks of an arm less that over those of another at the same scale, over seeds.

    Args:
        column: Of the table.
        arm: One of :data:`ARMS`.
        scale: One of :data:`SCALES`.
        against: The other arm.
        logarithmic: Of decimal logarithms instead.
    """

    def quantity(rows: pd.DataFrame) -> float:
        with np.errstate(divide="ignore"):  # the logarithm of 0 leaves a seed without a value, which is told
            values = np.log10(rows[column]) if logarithmic else rows[column]
        return float(values[rows.arm == arm].mean() - values[rows.arm == against].mean())

    return lambda table: over_seeds(quantity, {"scale": scale})(judged(table))


def given_back(scale: str) -> Pick:
    """Share of what low rank takes of the robust share that control of the condition gives back, over seeds."""

    def quantity(rows: pd.DataFrame) -> float:
        none, rank, conditioned = (float(rows[KEPT][rows.arm == arm].mean()) for arm in ("none", "rank", "conditioned"))
        return (conditioned - rank) / (none - rank) if none > rank else math.nan

    return lambda table: over_seeds(quantity, {"scale": scale})(judged(table))


def told_beyond_the_norm(rows: pd.DataFrame) -> float:
    """Spearman's ρ of certified radius and robust share, less the size of that of the product of spectral norms."""
    pairs = (rows[[name, KEPT]].to_numpy(float).T for name in ("certified", "spectral"))
    certified, spectral = (correlate(pair, ranked=True) for pair in pairs)
    return certified - abs(spectral)


CAUSES = {
    "frobenius": "Scale,\n‖W‖F",
    "concentration": "Concentration,\n‖W‖₂ / ‖W‖F",
    "spectral": "Norm,\n‖W‖₂",
    "margin": "Margin",
    "certified": "Margin / bound",
}
"""What a change of robustness is made of, from cause to effect, in words."""


def draw(table: pd.DataFrame) -> Figure:
    """Robustness over rank, norm, and margin over bound; below, factor by factor, what every arm changes."""
    figure = Figure(figsize=(8.6, 7.0), layout="constrained")
    figure.set_label("When low rank helps robustness and when it hurts")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.0, 1.15))[:, 0]
    shown = {
        "stable_rank": "Stable rank of hidden matrices",
        "spectral": "Product of spectral norms",
        "certified": "Margin / bound: certified radius",
    }
    every = table.assign(arm=table.intervention.where(table.condition == 0, "conditioned"))
    axes = above.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axis, (column, words) in zip(axes, shown.items(), strict=True):
        for arm, scale in _arms():
            rows = every[(every.arm == arm) & (every.scale == scale)]
            axis.plot(rows[column], rows[KEPT], linestyle="none", alpha=0.8, **_look(arm, scale))
        log_scale(axis, every[column])
        rho = correlate(every[[column, KEPT]].to_numpy(float).T, ranked=True)
        axis.set_title(f"{words}\nρ {rho:.2f} over all {len(every)}")
        axis.set_ylim(0, 1.02)
        axis.grid(visible=True)
    axes[0].set_ylabel(f"Robust over clean accuracy,\n{WORDS}")
    axes = below.subplots(1, len(CAUSES) + 1, squeeze=False, sharey=True)[0]
    for axis, column in zip(axes, (*CAUSES, KEPT), strict=True):
        _draw_changes(axis, judged(table), column)
    label_rows(axes[0], [f"{ARMS[arm]}, {scale}" for arm, scale in _arms()])
    for axis in axes[1:]:
        axis.tick_params(left=False, labelleft=False)
    handles = [Line2D([], [], linestyle="none", **_look(arm, "free")) for arm in ARMS]
    handles += [Line2D([], [], linestyle="none", **_look("none", scale)) for scale in SCALES]
    legend(figure, handles, [*ARMS.values(), "filled: free scale", "hollow: scale held"])
    return figure


TICKS = (0.001, 0.01, 0.1, 0.3, 1, 3, 10, 100)
"""Of the panels of factors, where they reach."""


def _arms() -> list[tuple[str, str]]:
    return [(arm, scale) for scale in SCALES for arm in ARMS]


def _look(arm: str, scale: str) -> dict[str, Any]:
    """An arm's colour and mark, hollow where the scale is held."""
    style = look(list(ARMS).index(arm))
    return style | {"markeredgewidth": 1, **({"markerfacecolor": "none"} if scale == "held" else {})}


def _draw_changes(axis: Panel, rows: pd.DataFrame, column: str) -> None:
    """Every arm's seeds and mean: of a cause as a multiple of no intervention at free scale, or the robust share."""
    reference = 1.0
    if column in CAUSES:
        reference = float(rows[column][(rows.arm == "none") & (rows.scale == "free")].mean())
    for place, (arm, scale) in enumerate(_arms()):
        values = rows[column][(rows.arm == arm) & (rows.scale == scale)] / reference
        axis.plot(values, [place] * len(values), linestyle="none", alpha=0.3, **_look(arm, scale))
        axis.plot(values.mean(), place, linestyle="none", **_look(arm, scale) | {"markersize": 7})
    if column in CAUSES:
        low, high = rows[column].min() / reference, rows[column].max() / reference
        ticks = [tick for tick in TICKS if low / 2 < tick < 2 * high]
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.axvline(1, linewidth=0.8, linestyle="--", color=INK)
    else:
        axis.set(xlim=(0, 1), xticks=(0, 0.5, 1))
    axis.set_title(CAUSES.get(column, "Robust /\nclean accuracy"), fontsize=8)
    axis.set_xlabel("times none, free" if column in CAUSES else WORDS, fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(visible=True, axis="x")


LANGENBERG, BARSBEY, OURS = "arXiv 1901.10371, abstract", "arXiv 2507.17725, section 4.1", "the reconciliation, ours"
SHARE = f"Robust over clean accuracy, mean over {WORDS}"
CHOICE = "the penalty at the largest strength that costs at most 2 points of validation accuracy"
CLAIMS = (
    Claim(
        "At free scale a nuclear norm penalty makes networks more robust.",
        LANGENBERG,
        change(KEPT, "nuclear_norm", "free"),
        at_least=0.02,
        measure=f"{SHARE}, {CHOICE}, less that without",
    ),
    Claim(
        "With the scale held the same penalty makes them less robust.",
        BARSBEY,
        change(KEPT, "nuclear_norm", "held"),
        at_most=-0.05,
        measure=f"{SHARE}, {CHOICE}, less that without, both at the Frobenius norm of the start",
    ),
    *(
        Claim(
            f"Low rank by factors makes networks less robust: {words}.",
            BARSBEY if scale == "held" else f"{OURS}: factors alone pull at no scale",
            change(KEPT, "rank", scale),
            at_most=-0.05,
            measure=f"{SHARE}, with factors less that without",
        )
        for scale, words in SCALES.items()
    ),
    *(
        Claim(
            f"The penalty concentrates the spectrum: {words}.",
            "both papers",
            change("concentration", "nuclear_norm", scale, logarithmic=True),
            at_least=0.1,
            measure=f"log₁₀ of the product of spectral over Frobenius norms, {CHOICE}, less that without",
        )
        for scale, words in SCALES.items()
    ),
    Claim(
        "At free scale norms fall all the same, as the scale falls further.",
        f"{OURS}; theory page, Ranks",
        change("spectral", "nuclear_norm", "free", logarithmic=True),
        at_most=-0.1,
        measure=f"log₁₀ of the product of spectral norms, {CHOICE}, less that without",
    ),
    Claim(
        "With the scale held norms rise.",
        f"{OURS}; theory page, Ranks",
        change("spectral", "nuclear_norm", "held", logarithmic=True),
        at_least=0.1,
        measure=f"log₁₀ of the product of spectral norms, {CHOICE}, less that without",
    ),
    Claim(
        "At free scale the margin grows relative to the bound.",
        OURS,
        change("certified", "nuclear_norm", "free", logarithmic=True),
        at_least=0.05,
        measure=f"log₁₀ of the median certified ℓ₂ radius, {CHOICE}, less that without",
    ),
    Claim(
        "With the scale held the margin falls relative to the bound.",
        OURS,
        change("certified", "nuclear_norm", "held", logarithmic=True),
        at_most=-0.05,
        measure=f"log₁₀ of the median certified ℓ₂ radius, {CHOICE}, less that without",
    ),
    Claim(
        "The margin over the bound tells robust networks from fragile ones, whatever was done to them.",
        OURS,
        spearman("certified", KEPT),
        at_least=0.7,
        measure="Spearman's ρ of median certified ℓ₂ radius and robust over clean accuracy, all networks",
    ),
    Claim(
        "It tells them better than norms do.",
        OURS,
        over_seeds(told_beyond_the_norm),
        at_least=0.1,
        measure="That ρ less the size of the one of the product of spectral norms, mean over seeds",
    ),
    *(
        Claim(
            f"Control of the condition number makes low-rank networks more robust: {words}.",
            "arXiv 2505.08022 (RobustDLRT), here by a cap",
            change(KEPT, "conditioned", scale, against="rank"),
            at_least=0.05,
            measure=f"{SHARE}, factors whose products have condition numbers of at most {LIMIT:g}, less factors alone",
        )
        for scale, words in SCALES.items()
    ),
    *(
        Claim(
            f"It gives back what low rank takes: {words}.",
            "arXiv 2505.08022 (RobustDLRT), at 94 % compression",
            given_back(scale),
            at_least=0.5,
            measure="Share of the fall of the robust over clean accuracy under low rank that comes back (1: all)",
        )
        for scale, words in SCALES.items()
    ),
)


def _grids(
    common: dict[str, Scalar], seeds: int, rank: int, free: tuple[float, ...], held: tuple[float, ...]
) -> list[Axes]:
    """At either scale no intervention, the penalty in its strengths, and factors with and without a limit."""
    every = {**common, "seed": tuple(range(seeds)), "condition": 0.0}
    return [
        {**every, "intervention": "none", "strength": 0.0, "scale": tuple(SCALES)},
        {**every, "intervention": "nuclear_norm", "strength": free, "scale": "free"},
        {**every, "intervention": "nuclear_norm", "strength": held, "scale": "held"},
        {**every, "intervention": "rank", "strength": rank, "scale": tuple(SCALES), "condition": (0.0, LIMIT)},
    ]


EXPERIMENT = Experiment(
    name="reconciliation",
    title="When low rank helps robustness and when it hurts",
    source="arXiv 1901.10371 against arXiv 2507.17725",
    run=run,
    figure=draw,
    grids={
        "smoke": _grids({**ON_MNIST["smoke"], "epochs": 4}, 1, 4, (0.003,), (0.03,)),
        "small": _grids({**ON_MNIST["small"], "epochs": 8}, 5, RANK, (0.001, 0.003, 0.01), (0.01, 0.03, 0.1)),
        "paper": _grids(
            {**ON_MNIST["paper"], "epochs": 50},
            10,
            RANK,
            (0.0003, 0.001, 0.003, 0.01, 0.03),
            (0.003, 0.01, 0.03, 0.1, 0.2),
        ),
    },
    claims=CLAIMS,
    seconds={"smoke": 1, "small": 20},
    about=(
        "Networks 784-400-400-10 with ReLU and no biases, by AdamW and a cosine schedule. Both hidden matrices are "
        f"under a nuclear norm penalty, or are products of factors of rank {RANK} (6 % of their weights are left), "
        f"with or without a cap of {LIMIT:g} on the condition number of every product. Each is trained at free scale, "
        "and with hidden matrices at the Frobenius norm of their start after every step. The penalty has other "
        "strengths at either scale, as one strength does less to larger matrices.",
        "Multiplying a layer by a number changes no prediction, so that logits and norms compare through the margin "
        "over the bound alone: the certified radius, from the least upper bound of the Lipschitz constant of every "
        "difference of two logits that the package proves. Robust accuracy is that of APGD with 100 steps on the "
        "cross-entropy and 100 on the DLR loss.",
        "Above, the figure shows robustness over the stable rank, over the norm, and over the margin over the bound, a "
        "mark a network. Below, it reads from left to right: scale times concentration is the norm, margin over bound "
        "the certified radius, each as a multiple of networks without intervention at free scale. Of the penalty the "
        "strongest strength is judged that costs at most 2 points of accuracy on held out training samples.",
    ),
)
