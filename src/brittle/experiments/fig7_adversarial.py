"""Figure 7, left: the effects of compressibility under adversarial training.

ResNet18 with half of every batch attacked, annealed steps, crops and flips. The paper shows rows under l_inf and
leaves the spectrum to its appendix; here the spectrum is trained and attacked under l_2.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from brittle.experiments.claims import Claim, over_seeds
from brittle.experiments.conv_effect import (
    ROWS,
    SPECTRUM,
    Effect,
    crosscheck_claim,
    draw_effects,
    effect_claims,
    strengthened,
)
from brittle.experiments.conv_networks import (
    PAPER,
    SMALL,
    SMOKE,
    conv_recipe,
    crosscheck,
    filter_structure,
    train_convolutional,
)
from brittle.experiments.dense_networks import robustness_of, splits
from brittle.experiments.experiment import Axes, Experiment, Scalar

BUDGETS = {
    "linf": (math.inf, 8 / 255), "linf_other": (math.inf, 4 / 255), "l2": (2.0, 0.5), "l2_other": (2.0, 0.25),
    "plain": (math.inf, 1 / 255),
}  # fmt: skip
"""Norm and budget of the attacks: the paper's, half of these, and ``plain``, at which networks that were not trained
under attack are judged (:mod:`brittle.experiments.fig5_conv`)."""
WORDS = {"linf": "ℓ∞ 8/255", "linf_other": "ℓ∞ 4/255", "l2": "ℓ₂ 0.5", "l2_other": "ℓ₂ 0.25", "plain": "ℓ∞ 1/255"}


def run(
    *,
    data: str,
    stem: str,
    alpha: float,
    rank: int,
    pgd: int,
    norm: str,
    seed: int,
    width: int,
    training: int | None,
    samples: int,
    epochs: int,
    patience: int | None,
    data_root: str | None = None,
) -> dict[str, Any]:
    """Train one network under attack, and attack it in both norms.

    Args:
        data: The data set.
        stem: ``7x7``, torchvision's, or ``3x3``.
        alpha: Strength of the scale-invariant group lasso.
        rank: Of every convolution but the first, by factors; 0 for none.
        pgd: Steps of the attack in training, 0 for none (:func:`brittle.experiments.conv_networks.conv_recipe`).
        norm: Of that attack, ``linf`` at 8/255 or ``l2`` at 0.5.
        seed: Of weights, batches and attacks.
        width: Channels of the first stage.
        training: Training samples; None for all.
        samples: Test samples that are attacked.
        epochs: Passes over the training samples, at most.
        patience: Epochs without a better validation accuracy that end training; None for no end.
        data_root: Folder of the data sets.

    Returns:
        Structure of the filters (:func:`brittle.experiments.conv_networks.filter_structure`) and robust accuracy at
        every one of :data:`BUDGETS` (:func:`brittle.experiments.dense_networks.robustness_of`).
    """
    learnt, test = splits(data, data_root, training=training, samples=samples)
    recipe = conv_recipe(epochs=epochs, patience=patience, alpha=alpha, annealed=True, pgd=pgd, norm=norm, seed=seed)
    network = train_convolutional(learnt, recipe, width=width, rank=rank, stem=stem)
    row = {**filter_structure(network), **robustness_of(network, test, BUDGETS, seed)}
    return row if alpha or rank else {**row, **crosscheck(network, test, BUDGETS["linf"], seed)}


def under_attack(table: pd.DataFrame, effect: Effect) -> pd.DataFrame:
    """The networks trained under an attack of the effect's own norm, by as many steps as all strengths are."""
    attacked = table[(table.pgd > 0) & (table.norm == effect.norm)]
    return strengthened(attacked[attacked.pgd == attacked.pgd.min()], effect)


def under_stronger_attack(table: pd.DataFrame, effect: Effect) -> pd.DataFrame:
    """The few that an attack of more steps trained, to check the others; none where all were trained so."""
    attacked = table[(table.pgd > 0) & (table.norm == effect.norm)]
    return strengthened(attacked[attacked.pgd > attacked.pgd.min()], effect)


def without_attack(table: pd.DataFrame, effect: Effect) -> pd.DataFrame:
    """The networks that saw no attack in training."""
    return strengthened(table[table.pgd == 0], effect)


def fall(rows: pd.DataFrame, column: str) -> float:
    """Share of a column's mean that is lost from no penalty to the strongest; NaN where it is 0 without."""
    start, end = (float(rows[column][rows.strength == at].mean()) for at in (0, rows.strength.max()))
    return 1 - end / start if start else math.nan


def remaining(rows: pd.DataFrame) -> float:
    """Of one seed's rows: the relative fall under adversarial training less half of that without it."""
    attacked, plain = under_attack(rows, ROWS), without_attack(rows, ROWS)
    return fall(attacked, "kept_linf") - fall(plain, "kept_plain") / 2


def gained(rows: pd.DataFrame) -> float:
    """Of one seed's rows: robust accuracy at half of the budget that training under attack adds, without penalty."""
    attacked, plain = (choose(rows, ROWS) for choose in (under_attack, without_attack))
    before, after = (float(chosen.robust_linf_other[chosen.strength == 0].mean()) for chosen in (plain, attacked))
    return after - before


def draw(table: pd.DataFrame) -> Figure:
    """For rows and for the spectrum: accuracies, the robust share in both norms, compressibility."""
    title = "ResNet18 under adversarial training"
    beside = {"trained on stronger attacks": under_stronger_attack}
    return draw_effects(title, table, (ROWS, SPECTRUM), under_attack, WORDS, beside)


FIGURE = "section 4.1, Figure 7 left"
CLAIMS = (
    *effect_claims(ROWS, under_attack, FIGURE, WORDS),
    *effect_claims(SPECTRUM, under_attack, "appendix, the spectral form of Figure 7 left", WORDS),
    Claim(
        "Adversarial training increases adversarial robustness overall.",
        FIGURE,
        over_seeds(gained),
        at_least=0.1,
        measure=f"Accuracy under {WORDS['linf_other']} without penalty: trained under attack less trained without",
    ),
    Claim(
        "The relative effect of compressibility remains as it is.",
        FIGURE,
        over_seeds(remaining),
        at_least=0.0,
        measure=f"Share of robust over clean accuracy that the strongest penalty takes at {WORDS['linf']} under "
        f"adversarial training, less half of the share that it takes at {WORDS['plain']} without",
    ),
    crosscheck_claim(lambda rows: under_attack(rows, ROWS), WORDS["linf"]),
)


def _grids(
    common: dict[str, Scalar], seeds: int, alphas: tuple[float, ...], ranks: tuple[int, ...], pgd: int
) -> tuple[Axes, ...]:
    """Penalties under l_inf, ranks under l_2; the ends without attack; where ``pgd`` is below 10, the ends by 10."""
    every = {**common, "seed": tuple(range(seeds))}
    rows, ends = {**every, "rank": 0, "norm": "linf"}, (0.0, max(alphas))
    grids: tuple[Axes, ...] = (
        {**rows, "alpha": (0.0, *alphas), "pgd": pgd},
        {**every, "alpha": 0.0, "rank": (0, *ranks), "norm": "l2", "pgd": pgd},
        {**rows, "alpha": ends, "pgd": 0},
    )
    return grids if pgd == 10 else (*grids, {**rows, "alpha": ends, "pgd": 10, "seed": 0})


EXPERIMENT = Experiment(
    name="fig7_adversarial",
    title="ResNet18 under adversarial training",
    source="arXiv 2507.17725, Figure 7 (left)",
    run=run,
    figure=draw,
    grids={
        "smoke": (
            {**SMOKE, "seed": 0, "alpha": 0.1, "rank": 0, "norm": "linf", "pgd": 1},
            {**SMOKE, "seed": 0, "alpha": 0.0, "rank": 1, "norm": "l2", "pgd": 1},
        ),
        "small": _grids(SMALL, 3, (0.1, 0.5, 2.0), (4, 8, 16), 1),
        "paper": _grids(PAPER, 5, (0.001, 0.01, 0.03, 0.1, 0.5), (4, 8, 16, 32, 64, 128), 10),
    },
    seconds={"smoke": 5, "small": 200},
    claims=CLAIMS,
    about=(
        "ResNet18 with torchvision's stem, trained by AdamW with weight decay, a cosine schedule, crops and flips; "
        "half of every batch is attacked, at ℓ∞ 8/255 where rows become compressible, at ℓ₂ 0.5 where the spectrum "
        "does. Where networks are trained by a single step from a random start, a few that ten steps trained are shown "
        "beside them. Compressibility grows to the right. Intervals are 95 % over seeds.",
        "Robust accuracy is the worst of APGD with 100 steps on the cross-entropy and 100 on the DLR loss. k-term "
        "errors are those of the filters' ℓ₁ norms and of the singular values of the matrices of filters when a tenth "
        "of them is kept; 0 is most compressible.",
    ),
)
