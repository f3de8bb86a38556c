"""The demo's page: several networks side by side, in one picture, one table and plain words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
from brittle.results.methods import PRODUCT
from brittle.results.wording import budget, norm_name, number
from brittle.storage.files import replacing, write_text

SIGNIFICANT = 0.05
"""Level of the paired (McNemar) test between a network's robust verdicts and the first network's."""


@dataclass(frozen=True)
class Chapter:
    """One network of the story.

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

    def evaluation(self, p: float) -> Evaluation:
        """The evaluation at the standard budget of the norm p."""
        return next(evaluation for evaluation in self.evaluations if evaluation.p == p)

    def robust(self, p: float) -> Rate:
        """Robust accuracy at the standard budget of the norm p."""
        return self.evaluation(p).robust_accuracy

    def product(self, p: float) -> float:
        """Product of operator norms: the upper bound of the Lipschitz constant that Theorem 3.1 speaks of."""
        return dict(self.audit.norm(p).lipschitz.arguments).get(PRODUCT, self.upper(p))

    def upper(self, p: float) -> float:
        """Certified upper bound of the network's Lipschitz constant, the least of all arguments."""
        return self.audit.norm(p).lipschitz.upper or math.inf

    def lower(self, p: float) -> float:
        """Largest sensitivity found, on data and by ascent: a lower bound of the same constant."""
        return self.audit.norm(p).lipschitz.lower or 0.0

    @property
    def folder(self) -> str:
        """Where its own audit lies, relative to the story."""
        return self.name.replace(" ", "-")


@dataclass(frozen=True)
class Story:
    """The networks, the one they are compared with first."""

    chapters: tuple[Chapter, ...]

    @property
    def lines(self) -> tuple[str, ...]:
        """What they show, in plain words: one line on all of them, then one on each."""
        return tuple(_lines(self.chapters))


def write_story(story: Story, out: Path) -> None:
    """Write ``report.html`` (one self-contained page) and ``story.png`` into a folder, each whole or not at all.

    Args:
        story: What to tell.
        out: Folder; the audits' own reports are expected in the chapters' folders beside the page.
    """
    picture = story_figure(story)
    template = environment().get_template("story.html.j2")
    text = template.render(story=story, figure=Markup(svg(picture)), p_values=_p_value, significant=SIGNIFICANT)
    with replacing(out / "story.png") as beside:
        story_figure(story).savefig(beside, dpi=200, facecolor="white", format="png")
    write_text(out / "report.html", text)


@styled
def story_figure(story: Story) -> Figure:
    """The whole story in one picture: accuracy, compressibility, the norm that moved, network by network."""
    chapters = story.chapters
    figure, (left, middle, right) = panels("Compressible networks of equal scale beside a dense one", 3, 3.6)
    label_rows(left, [chapter.name for chapter in chapters])
    for axis in (left, middle, right):
        axis.grid(visible=True)
        axis.tick_params(left=False, labelleft=axis is left)
    norms = [evaluation.p for evaluation in chapters[0].evaluations]
    _draw_accuracies(left, chapters, norms)
    _draw_pairs(middle, [[100 * c.spectral_head, 100 * c.row_head] for c in chapters], (2, 3))
    middle.set(xlim=(0, 104), xlabel="Share of their sum in the largest tenth, %")
    middle.set_title("Compressibility")
    right.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    _draw_sensitivities(right, chapters, norms)
    right.set_title("Sensitivity")
    _keys(figure, left, middle, right, norms)
    return figure


def _draw_accuracies(axis: Axes, chapters: Sequence[Chapter], norms: Sequence[float]) -> None:
    for y, chapter in enumerate(chapters):
        rates = [(chapter.clean, 2, 0.0)]
        rates += [
            (chapter.robust(p), place, lift) for p, place, lift in zip(norms, (1, 0), (-0.14, 0.14), strict=False)
        ]
        for rate, place, lift in rates:
            value, (low, high) = 100 * (rate.value or 0), (100 * side for side in rate.interval or (0, 1))
            axis.plot([low, high], [y + lift, y + lift], color=SERIES[place], linewidth=1, alpha=0.7)
            axis.plot([value], [y + lift], **_dot(place))
    least = min(100 * rate.interval[0] for c in chapters for p in norms if (rate := c.robust(p)).interval)
    axis.set(xlim=(10 * math.floor(least / 10), 102), xlabel="Accuracy, %, with 95 % interval")
    axis.set_title("Clean and robust accuracy")


def _draw_sensitivities(axis: Axes, chapters: Sequence[Chapter], norms: Sequence[float]) -> None:
    first, largest = chapters[0], 1.0
    for y, chapter in enumerate(chapters):
        for p, place, lift in zip(norms, (1, 0), (-0.14, 0.14), strict=False):
            sides = [getattr(chapter, side)(p) / getattr(first, side)(p) for side in ("lower", "upper", "product")]
            axis.plot([min(sides), max(sides)], [y + lift] * 2, color=SERIES[place], alpha=0.45, linewidth=0.8)
            for value, look in zip(sides, ({"markerfacecolor": "none"}, {}, _PRODUCT), strict=True):
                axis.plot([value], [y + lift], **_dot(place) | look)
            largest = max(largest, *sides)
    axis.set(xlim=(0, 1.06 * largest), xlabel=f"Times that of the {first.name} network")


def _draw_pairs(axis: Axes, rows: Sequence[Sequence[float]], places: Sequence[int]) -> None:
    for y, values in enumerate(rows):
        axis.plot(values, [y, y], color=INK, alpha=0.25, linewidth=0.8)
        for value, place in zip(values, places, strict=True):
            axis.plot([value], [y], **_dot(place))


def _dot(place: int) -> dict[str, Any]:
    return {"color": SERIES[place], "marker": ("o", "s", "D", "^")[place], "markersize": 5.5, "linestyle": "none"}


_PRODUCT: dict[str, Any] = {"marker": "|", "markersize": 8, "markeredgewidth": 2}


def _keys(figure: Figure, left: Axes, middle: Axes, right: Axes, norms: Sequence[float]) -> None:
    robust = [f"under {norm_name(p)} attack" for p in norms]
    for axis, places, words in (
        (left, (2, 1, 0), ["without attack", *robust]),
        (middle, (2, 3), ["singular values", "rows"]),
    ):
        legend(axis, [Line2D([], [], **_dot(place)) for place in places], words)
    filled = [Line2D([], [], **_dot(place)) for place in (1, 0)]
    others = [Line2D([], [], **_dot(0) | {"color": INK} | look) for look in ({"markerfacecolor": "none"}, _PRODUCT)]
    words = [*(f"certified {norm_name(p)} bound" for p in norms), "hollow: largest found", f"bar: {PRODUCT}"]
    legend(right, [*filled, *others], words)


def _lines(chapters: Sequence[Chapter]) -> Iterator[str]:
    first = chapters[0]
    clean = [100 * (c.clean.value or 0) for c in chapters]
    others = chapters[1:]
    clear = [c for c in others if any(q < SIGNIFICANT and _change(c, first, p) < 0 for p, q in c.p_values.items())]
    yield (
        f"{len(others)} compressible networks with the {first.name} one's Frobenius norms have clean accuracies of"
        f" {min(clean):.1f} to {max(clean):.1f} %; {len(clear)} of them {'is' if len(clear) == 1 else 'are'}"
        " clearly more fragile."
    )
    robust = " and ".join(
        f"{e.robust_accuracy.percent} within {norm_name(e.p)} {budget(e.eps)}" for e in first.evaluations
    )
    yield f"{first.name}: {first.clean.percent} right without attack, {robust} under the worst attack."
    for chapter in chapters[1:]:
        parts = (_structure(chapter, first), _fragility(chapter, first), _sensitivity(chapter, first))
        yield f"{chapter.name}: {'; '.join(parts)}."


def _structure(chapter: Chapter, first: Chapter) -> str:
    """Whichever of its two structures differs most from the first network's."""
    spectral = (
        chapter.spectral_head / first.spectral_head,
        "singular values",
        chapter.spectral_head,
        first.spectral_head,
    )
    row = (chapter.row_head / first.row_head, "rows", chapter.row_head, first.row_head)
    _, what, share, before = max(spectral, row)
    return f"the largest tenth of its {what} holds {100 * share:.0f} % of their sum instead of {100 * before:.0f} %"


def _fragility(chapter: Chapter, first: Chapter) -> str:
    parts = []
    for p, p_value in chapter.p_values.items():
        change = _change(chapter, first, p)
        words = ("more fragile" if change < 0 else "more robust") if p_value < SIGNIFICANT else "not clearly different"
        points = f"{change:+.1f} points".replace("-", "\N{MINUS SIGN}")
        parts.append(f"{words} in {norm_name(p)} ({chapter.robust(p).percent}, {points})")
    return " and ".join(parts)


def _change(chapter: Chapter, first: Chapter, p: float) -> float:
    """Robust accuracy against the first network's, in points."""
    return 100 * ((chapter.robust(p).value or 0) - (first.robust(p).value or 0))


def _sensitivity(chapter: Chapter, first: Chapter) -> str:
    def times(side: str) -> str:
        ratios = [getattr(chapter, side)(p) / getattr(first, side)(p) for p in chapter.p_values]
        return " and ".join(f"{number(r)} ({norm_name(p)})" for r, p in zip(ratios, chapter.p_values, strict=True))

    return (
        f"products of norms {times('product')} times those of the {first.name} one, certified bounds {times('upper')}"
        f" times, largest sensitivity found {times('lower')} times"
    )


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
