"""What compressibility does to the robustness of networks for images: the claims of several figures, and their form.

Rows are compressible under a penalty (column ``alpha``), the spectrum under factors of low rank (column ``rank``, 0
where there are none). Of every budget ``NAME`` in :data:`BUDGETS` a table has ``robust_NAME`` and ``kept_NAME``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes as Panel
from matplotlib.figure import Figure

from brittle.experiments.claims import Claim, change, over_seeds, spearman
from brittle.experiments.experiment import Axes, Scalar
from brittle.experiments.plots import draw_means
from brittle.results import Statistic

BUDGETS = ("linf", "linf_other", "l2", "l2_other")
"""Names of the budgets: that of the paper in either norm, and another beside it."""


@dataclass(frozen=True)
class Effect:
    """One kind of compressibility.

    Attributes:
        column: The setting that makes networks compressible.
        words: The property that grows.
        what: What becomes compressible.
        error: Column of its k-term error.
        norm: In which the paper attacks such networks first.
        axis: What the setting is, for the figure.
        contrast: Which networks are compared.
        layers: Whose k-term errors are averaged.
    """

    column: str
    words: str
    what: str
    error: str
    norm: str
    axis: str
    contrast: str
    layers: str = "all convolutions but the first"

    @property
    def other_norm(self) -> str:
        """The norm of the appendix."""
        return "l2" if self.norm == "linf" else "linf"


ROWS = Effect(
    "alpha",
    "row compressibility",
    "filters",
    "row_error",
    "linf",
    "Strength α of the group lasso",
    "the strongest penalty less none",
)
SPECTRUM = Effect(
    "rank",
    "spectral compressibility",
    "the spectrum",
    "spectral_error",
    "l2",
    "Rank of the filters' matrices",
    "the lowest rank less full rank",
)


def penalties_and_ranks(
    common: Mapping[str, Scalar], seeds: int, alphas: Sequence[float], ranks: Sequence[int]
) -> tuple[Axes, Axes]:
    """The grids of both effects: no penalty and penalties at full rank, then ranks without a penalty.

    Args:
        common: Settings of all networks.
        seeds: How many.
        alphas: Strengths above 0.
        ranks: Of the factors.
    """
    every = {**common, "seed": tuple(range(seeds))}
    return {**every, "alpha": (0.0, *alphas), "rank": 0}, {**every, "alpha": 0.0, "rank": tuple(ranks)}


def with_ends(
    common: Mapping[str, Scalar], other: Mapping[str, Scalar], seeds: int, alphas: Sequence[float], ranks: Sequence[int]
) -> tuple[Axes, ...]:
    """The grids of :func:`penalties_and_ranks`, and of other networks neither intervention and the strongest of each.

    Args:
        common: Settings of all networks.
        other: What the other networks have in their place.
        seeds: How many.
        alphas: Strengths above 0.
        ranks: Of the factors.
    """
    rows, spectrum = penalties_and_ranks(common, seeds, alphas, ranks)
    ends = {**rows, **other, "alpha": (0.0, max(alphas))}, {**spectrum, **other, "rank": min(ranks)}
    return rows, spectrum, *ends


Rows = Callable[[pd.DataFrame, Effect], pd.DataFrame]
"""The networks of a table that show an effect, by :func:`strengthened`."""


def strengthened(table: pd.DataFrame, effect: Effect) -> pd.DataFrame:
    """The networks without the other intervention, with a column ``strength`` that grows with compressibility."""
    if effect.column == "alpha":
        return table[table["rank"] == 0].assign(strength=lambda rows: rows.alpha)
    return table[table.alpha == 0].assign(strength=lambda rows: rows["rank"].map(lambda r: 1 / r if r else 0.0))


def ends(column: str, choose: Rows, effect: Effect) -> Callable[[pd.DataFrame], Statistic]:
    """Mean over seeds of a column for the most compressible networks less that for those without intervention."""
    statistic = over_seeds(change(column, "strength"))
    return lambda table: statistic(choose(table, effect))


def effect_claims(effect: Effect, choose: Rows, place: str, words: Mapping[str, str]) -> tuple[Claim, ...]:
    """The claims about one kind of compressibility.

    Args:
        effect: Which.
        choose: The networks that are judged.
        place: The figure.
        words: How the budgets are written, by their names.
    """
    norm, across = effect.norm, effect.other_norm
    return (
        Claim(
            f"The intervention makes {effect.what} more compressible.",
            place,
            ends(effect.error, choose, effect),
            at_most=-0.1,
            measure=f"1-norm k-term error at a tenth, mean over {effect.layers}, {effect.contrast}",
        ),
        Claim(
            f"Adversarial robustness falls as {effect.words} grows.",
            place,
            ends(f"robust_{norm}", choose, effect),
            at_most=-0.05,
            measure=f"Accuracy under {words[norm]}, {effect.contrast}",
        ),
        Claim(
            f"It falls with {effect.words} also relative to the accuracy without attack.",
            place,
            ends(f"kept_{norm}", choose, effect),
            at_most=-0.1,
            measure=f"Robust over clean accuracy at {words[norm]}, {effect.contrast}",
        ),
        Claim(
            f"It falls step by step as {effect.words} grows.",
            place,
            lambda table: spearman("strength", f"kept_{norm}")(choose(table, effect)),
            at_most=-0.7,
            measure=f"Spearman's ρ of the strength and robust over clean accuracy at {words[norm]}, over all networks",
        ),
        Claim(
            f"With {effect.words}, robustness falls in the other norm as well.",
            "appendix, cross-norm results",
            ends(f"kept_{across}", choose, effect),
            at_most=-0.1,
            measure=f"Robust over clean accuracy at {words[across]}, {effect.contrast}",
        ),
        Claim(
            f"With {effect.words}, results under another budget are alike.",
            "appendix, other budgets",
            ends(f"kept_{norm}_other", choose, effect),
            at_most=-0.05,
            measure=f"Robust over clean accuracy at {words[norm + '_other']}, {effect.contrast}",
        ),
    )


def crosscheck_claim(choose: Callable[[pd.DataFrame], pd.DataFrame], words: str) -> Claim:
    """That a second opinion on the attack finds little more (:func:`brittle.experiments.conv_networks.crosscheck`).

    Args:
        choose: The networks that are judged; those that have the column count.
        words: How the budget is written.
    """

    def beyond(rows: pd.DataFrame) -> float:
        judged = choose(rows)
        if "standard_linf" not in judged:  # of the networks without intervention none is done, or none is asked for
            return math.nan
        return float((judged.robust_linf - judged.standard_linf).mean())

    return Claim(
        "Robust accuracies are no artefact of the attack: a stronger one finds hardly more.",
        "ours",
        over_seeds(beyond),
        at_most=0.02,
        null=0.05,
        measure=f"Accuracy under {words} by APGD on two losses less that by the preset standard (targeted APGD, "
        "Square), networks without intervention",
    )


def draw_effects(
    title: str,
    table: pd.DataFrame,
    effects: tuple[Effect, ...],
    choose: Rows,
    words: Mapping[str, str],
    beside: Mapping[str, Rows] | None = None,
) -> Figure:
    """A line of panels an effect: accuracies, the robust share in both norms, and compressibility.

    Args:
        title: For those who cannot see the figure.
        table: All rows.
        effects: The kinds of compressibility, from the top.
        choose: The networks that are shown.
        words: How the budgets are written, by their names.
        beside: Further networks of which the robust share in the effect's own norm is shown, by what they are called.
    """
    figure = Figure(figsize=(8.6, 0.5 + 2.8 * len(effects)), layout="constrained")
    figure.set_label(title)
    for line, effect in zip(figure.subplots(len(effects), 3, squeeze=False), effects, strict=True):
        rows, norm, across = choose(table, effect), effect.norm, effect.other_norm
        ticks = rows.drop_duplicates("strength").sort_values("strength")
        places = {strength: place for place, strength in enumerate(ticks.strength)}

        def show(
            axis: Panel, shown: pd.DataFrame, columns: Mapping[str, str], places: dict[float, int] = places
        ) -> None:
            """Columns over the strength, by what they are called, after what the panel shows already."""
            shown = shown.assign(place=shown.strength.map(places))
            for series, (name, column) in enumerate(columns.items(), len(axis.lines)):
                draw_means(axis, shown, "place", column, series=series)
                axis.lines[-1].set_label(name)

        accuracies = {"clean": "clean_accuracy"} | {words[name]: f"robust_{name}" for name in (norm, f"{norm}_other")}
        show(line[0], rows, accuracies)
        show(line[1], rows, {words[name]: f"kept_{name}" for name in (norm, across)})
        for name, others in (beside or {}).items():
            if len(more := others(table, effect)):
                show(line[1], more, {name: f"kept_{norm}"})
        show(line[2], rows, {"": effect.error})
        line[0].set_ylabel(f"{effect.words.capitalize()}\n(n = {rows.seed.nunique()} seeds)", fontsize=8)
        for axis, heading in zip(
            line, ("Accuracy", "Robust over clean accuracy", "k-term error at a tenth"), strict=True
        ):
            written = [f"{value:g}" for value in ticks[effect.column]]
            axis.set_xticks(
                range(len(written)), ["full" if (effect.column, w) == ("rank", "0") else w for w in written]
            )
            axis.set(title=heading, xlabel=effect.axis, ylim=(0, 1.03))
            axis.grid(visible=True)
        for axis in line[:2]:
            axis.legend(fontsize=7, loc="upper right")
    return figure
