"""A page that puts several audited networks side by side, in one picture, one table and plain words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from brittle.reporting.drawing import INK, SERIES, label_rows, legend, panels, styled, svg
from brittle.reporting.page import environment
from brittle.results import Audit, Evaluation, Rate
from brittle.results.methods import Argument
from brittle.results.wording import budget, norm_name, number
from brittle.storage.files import replacing, write_text

SIGNIFICANT = 0.05
"""Level of the paired (McNemar) test between a network's robust verdicts and the first network's."""


@dataclass(frozen=True)
class ComparedNetwork:
    """One of the networks, with the audit that it has with data.

    Attributes:
        name: What it is called.
        audit: Its audit.
        spectral_head: Share of the singular values' sum in their largest tenth, mean over the hidden layers.
        row_head: Share of the row l1 norms' sum in the largest tenth of the rows, likewise.
        p_values: For each norm, the two-sided exact McNemar p-value against the first network's robust verdicts.
    """

    name: str
    audit: Audit
    spectral_head: float
    row_head: float
    p_values: dict[float, float]

    @property
    def clean(self) -> Rate:
        """Accuracy without attack."""
        return self.evaluations[0].clean_accuracy

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """The evaluations at the standard budgets, one a norm."""
        return tuple(norm.evaluation for norm in self.audit.norms if norm.evaluation)

    def robust(self, p: float) -> Rate:
        """Robust accuracy at the standard budget of the norm p."""
        return next(evaluation.robust_accuracy for evaluation in self.evaluations if evaluation.p == p)

    def points_above(self, other: ComparedNetwork, p: float) -> float:
        """Robust accuracy minus that of another network, in percentage points."""
        return 100 * ((self.robust(p).value or 0) - (other.robust(p).value or 0))

    def product(self, p: float) -> float:
        """Product of operator norms: the upper bound of the Lipschitz constant that Theorem 3.1 speaks of."""
        product = self.audit.norm(p).lipschitz.product
        return self.upper(p) if product is None else product

    def upper(self, p: float) -> float:
        """Certified upper bound of the network's Lipschitz constant, the least of all arguments."""
        return self.audit.norm(p).lipschitz.upper or math.inf

    def lower(self, p: float) -> float:
        """Largest sensitivity found, on data and by ascent: a lower bound of the same constant."""
        return self.audit.norm(p).lipschitz.lower or 0.0

    def beside(self, first: ComparedNetwork) -> str:
        """How its structure, its robust accuracies and its sensitivity differ from those of the first, in a sentence.

        Of the two structures, the one that differs more from the first network's.
        """
        share, before, what = max(
            (self.spectral_head, first.spectral_head, "singular values"),
            (self.row_head, first.row_head, "rows"),
            key=lambda head: head[0] / head[1],
        )
        robust = []
        for p, p_value in self.p_values.items():
            change = self.points_above(first, p)
            clear = ("more fragile" if change < 0 else "more robust") if p_value < SIGNIFICANT else None
            points = f"{change:+.1f} points".replace("-", "\N{MINUS SIGN}")
            robust.append(f"{clear or 'not clearly different'} in {norm_name(p)} ({self.robust(p).percent}, {points})")

        def times(side: Callable[[ComparedNetwork, float], float]) -> str:
            ratios = {p: side(self, p) / side(first, p) for p in self.p_values}
            return " and ".join(f"{number(ratio)} ({norm_name(p)})" for p, ratio in ratios.items())

        return (
            f"{self.name}: the largest tenth of its {what} holds {100 * share:.0f} % of their sum instead of"
            f" {100 * before:.0f} %; {' and '.join(robust)}; products of norms {times(ComparedNetwork.product)} times"
            f" those of the {first.name} one, certified bounds {times(ComparedNetwork.upper)} times, largest"
            f" sensitivity found {times(ComparedNetwork.lower)} times."
        )

    @property
    def folder(self) -> str:
        """Where its own audit lies, relative to the page."""
        return self.name.replace(" ", "-")


@dataclass(frozen=True)
class Comparison:
    """Networks side by side; the first is the one that the others are compared with."""

    networks: tuple[ComparedNetwork, ...]

    @property
    def lines(self) -> tuple[str, ...]:
        """What they show, in plain words: one line on all of them, then one on each."""
        first, *others = self.networks
        clean = [100 * (network.clean.value or 0) for network in self.networks]
        fragile = [
            network
            for network in others
            if any(value < SIGNIFICANT and network.points_above(first, p) < 0 for p, value in network.p_values.items())
        ]
        robust = " and ".join(
            f"{e.robust_accuracy.percent} within {norm_name(e.p)} {budget(e.eps)}" for e in first.evaluations
        )
        return (
            f"{len(others)} compressible networks with the {first.name} one's Frobenius norms have clean accuracies of"
            f" {min(clean):.1f} to {max(clean):.1f} %; {len(fragile)} of them {'is' if len(fragile) == 1 else 'are'}"
            " clearly more fragile.",
            f"{first.name}: {first.clean.percent} right without attack, {robust} under the worst attack.",
            *(network.beside(first) for network in others),
        )


def write_comparison(comparison: Comparison, out: Path) -> None:
    """Write ``report.html`` (one self-contained page) and ``story.png`` into a folder, each whole or not at all.

    Args:
        comparison: What to show.
        out: Folder; the audits' own reports are expected in the networks' folders beside the page.
    """
    picture = draw_comparison(comparison)
    text = (
        environment()
        .get_template("comparison.html.j2")
        .render(
            comparison=comparison,
            figure=Markup(svg(picture)),
            p_value=lambda value: "< 0.001" if value < 0.001 else f"{value:.3f}",
            significant=SIGNIFICANT,
        )
    )
    with replacing(out / "story.png") as beside:
        # Drawn anew: the layout of a figure that was drawn once starts from where its parts are, and ends elsewhere.
        draw_comparison(comparison).savefig(beside, dpi=200, facecolor="white", format="png")
    write_text(out / "report.html", text)


@styled
def draw_comparison(comparison: Comparison) -> Figure:
    """All networks in one picture: accuracy, compressibility, the norm that moved, network by network."""
    networks = comparison.networks
    figure, axes = panels("Compressible networks of equal scale beside a dense one", 3, 3.6)
    label_rows(axes[0], [network.name for network in networks])
    for axis in axes:
        axis.grid(visible=True)
        axis.tick_params(left=False, labelleft=axis is axes[0])
    _draw_accuracies(axes[0], networks)
    _draw_structure(axes[1], networks)
    _draw_sensitivities(axes[2], networks)
    return figure


NORM_ROWS = ((1, -0.14), (0, 0.14))
"""Of the first and the second norm: place in :data:`SERIES`, and lift of the marks from the middle of the row."""


def _draw_accuracies(axis: Axes, networks: Sequence[ComparedNetwork]) -> None:
    norms = [evaluation.p for evaluation in networks[0].evaluations]
    for y, network in enumerate(networks):
        rates = [(network.clean, 2, 0.0)]
        rates += [(network.robust(p), series, lift) for p, (series, lift) in zip(norms, NORM_ROWS, strict=False)]
        for rate, series, lift in rates:
            value, (low, high) = 100 * (rate.value or 0), (100 * side for side in rate.interval or (0, 1))
            axis.plot([low, high], [y + lift, y + lift], color=SERIES[series], linewidth=1, alpha=0.7)
            axis.plot([value], [y + lift], **_dot(series))
    robust = [network.robust(p) for network in networks for p in norms]
    least = min(100 * rate.interval[0] for rate in robust if rate.interval)
    axis.set(xlim=(10 * math.floor(least / 10), 102), xlabel="Accuracy, %, with 95 % interval")
    axis.set_title("Clean and robust accuracy")
    words = ["without attack", *(f"under {norm_name(p)} attack" for p in norms)]
    legend(axis, [Line2D([], [], **_dot(series)) for series in (2, 1, 0)], words)


def _draw_structure(axis: Axes, networks: Sequence[ComparedNetwork]) -> None:
    for y, network in enumerate(networks):
        heads = [100 * network.spectral_head, 100 * network.row_head]
        axis.plot(heads, [y, y], color=INK, alpha=0.25, linewidth=0.8)
        for value, series in zip(heads, (2, 3), strict=True):
            axis.plot([value], [y], **_dot(series))
    axis.set(xlim=(0, 104), xlabel="Share of their sum in the largest tenth, %")
    axis.set_title("Compressibility")
    legend(axis, [Line2D([], [], **_dot(series)) for series in (2, 3)], ["singular values", "rows"])


def _draw_sensitivities(axis: Axes, networks: Sequence[ComparedNetwork]) -> None:
    first, largest = networks[0], 1.0
    norms = [evaluation.p for evaluation in first.evaluations]
    hollow: dict[str, Any] = {"markerfacecolor": "none"}
    bar: dict[str, Any] = {"marker": "|", "markersize": 8, "markeredgewidth": 2}
    axis.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    for y, network in enumerate(networks):
        for p, (series, lift) in zip(norms, NORM_ROWS, strict=False):
            sides = [getattr(network, side)(p) / getattr(first, side)(p) for side in ("lower", "upper", "product")]
            axis.plot([min(sides), max(sides)], [y + lift] * 2, color=SERIES[series], alpha=0.45, linewidth=0.8)
            for value, look in zip(sides, (hollow, {}, bar), strict=True):
                axis.plot([value], [y + lift], **_dot(series) | look)
            largest = max(largest, *sides)
    axis.set(xlim=(0, 1.06 * largest), xlabel=f"Times that of the {first.name} network")
    axis.set_title("Sensitivity")
    marks = [Line2D([], [], **_dot(series)) for series in (1, 0)]
    marks += [Line2D([], [], **_dot(0) | {"color": INK} | look) for look in (hollow, bar)]
    words = [*(f"certified {norm_name(p)} bound" for p in norms), "hollow: largest found", f"bar: {Argument.PRODUCT}"]
    legend(axis, marks, words)


def _dot(series: int) -> dict[str, Any]:
    return {"color": SERIES[series], "marker": "osD^"[series], "markersize": 5.5, "linestyle": "none"}
