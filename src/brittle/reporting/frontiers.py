"""The page of a frontier: what robustness is left at every size, allocation by allocation."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from brittle.reporting.compression import ALLOCATED, TARGETS, UNITS, in_words
from brittle.reporting.drawing import INK, SERIES, legend, panels, styled
from brittle.reporting.page import drawings, environment
from brittle.results import Frontier, FrontierRow
from brittle.results.wording import all_printable, budget, norm_name

LOOKS = ((SERIES[0], "o"), (SERIES[1], "s"), (SERIES[2], "D"), (SERIES[3], "^"), (INK, "x"))
"""Colour and mark of the allocations, in their order."""


def frontier_html(frontier: Frontier) -> str:
    """The frontier as one HTML page without references to anything outside it; the same one gives the same text."""
    frontier = all_printable(frontier)
    return (
        environment()
        .get_template("frontier.html.j2")
        .render(
            frontier=frontier,
            lines=frontier_lines(frontier),
            figure=drawings({"frontier": draw_frontier}, frontier)["frontier"],
            removed=UNITS[frontier.asked.remove],
            allocations=[in_words(name, ALLOCATED) for name in frontier.allocations],
            target=TARGETS[frontier.asked.target],
        )
    )


def frontier_lines(frontier: Frontier) -> tuple[str, ...]:
    """What the frontier shows, in plain words: the smallest network above the floor, then the allocations."""
    base = frontier.base
    lines = [_headline(frontier), f"Uncompressed: {_accuracies(base)}."]
    for p in frontier.norms:
        areas = {name: area for name in frontier.allocations if (area := frontier.area(name, p)) is not None}
        if len(areas) > 1:
            ranked = sorted(areas, key=lambda name: -areas[name])
            said = ", ".join(f"{name} {100 * areas[name]:.1f} %" for name in ranked)
            lines.append(f"Mean robust accuracy in {norm_name(p)} over the ratios that all allocations reach: {said}.")
    if unmet := [f"{row.allocate} at {row.ratio:g}" for row in frontier.rows if not row.norms]:
        lines.append(f"Not measured, as so much cannot go: {', '.join(unmet)}.")
    return tuple(lines)


def _headline(frontier: Frontier) -> str:
    """The smallest network above the floor; without a floor, what was made."""
    smallest, target = frontier.smallest, TARGETS[frontier.asked.target]
    if frontier.min_robust is None:
        made = sum(bool(row.norms) for row in frontier.rows)
        removed = UNITS[frontier.asked.remove]
        return f"{made} networks by {len(frontier.allocations)} allocations of the {removed} that were removed."
    floor = f"{100 * frontier.min_robust:g} % robust accuracy"
    if smallest is None:
        return f"No compressed network keeps {floor}."
    return (
        f"The smallest network that keeps {floor} has {100 * (1 - (smallest.share or 0)):.1f} % of the {target} "
        f"(allocated by {smallest.allocate}): {_accuracies(smallest)}."
    )


def _accuracies(row: FrontierRow) -> str:
    robust = " and ".join(
        f"{e.robust_accuracy.percent} within {norm_name(e.p)} {budget(e.eps)}" for e in row.evaluations
    )
    return f"{row.clean.percent if row.clean else 'unknown'} right without attack, {robust} under the worst attack"


@styled
def draw_frontier(frontier: Frontier, *, narrow: bool = False) -> Figure:
    """Accuracy over what is left of the target, without attack and in every norm, one line an allocation."""
    figure, axes = panels("Accuracy against size", 1 + len(frontier.norms), 3.4, narrow=narrow)
    titles = ["Without attack", *(f"Under {norm_name(e.p)} {budget(e.eps)}" for e in frontier.base.evaluations)]
    for axis, p, title in zip(axes, (None, *frontier.norms), titles, strict=True):
        for name, look in zip(frontier.allocations, LOOKS, strict=False):
            rows = [frontier.base, *(row for row in frontier.rows if row.allocate == name)]
            _draw_line(axis, sorted((point for row in rows if (point := _point(row, p))), key=lambda at: at[0]), look)
        if p is not None and frontier.min_robust is not None:
            axis.axhline(100 * frontier.min_robust, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        if frontier.smallest is not None and (point := _point(frontier.smallest, p)):
            axis.plot(*point[:2], color=INK, marker="o", markersize=11, markerfacecolor="none")
        axis.set(title=title, xlabel=f"{TARGETS[frontier.asked.target].capitalize()} left, %", ylim=(0, 103))
        axis.set_xlim(103, -1)
        axis.grid(visible=True)
    axes[0].set_ylabel("Accuracy, %")
    handles = [
        Line2D([], [], color=colour, marker=mark, markersize=4.5, linewidth=1.3)
        for _, (colour, mark) in zip(frontier.allocations, LOOKS, strict=False)
    ]
    legend(figure, handles, frontier.allocations[: len(LOOKS)])
    return figure


Point = tuple[float, float, float, float]
"""What is left of the target, accuracy, and the ends of its 95 % interval, in percent."""


def _point(row: FrontierRow, p: float | None) -> Point | None:
    """A network in a panel; None where it was not measured."""
    rate = row.clean if p is None else row.robust(p)
    if rate is None or rate.value is None or rate.interval is None:
        return None
    return 100 * (1 - (row.share or 0.0)), 100 * rate.value, 100 * rate.interval[0], 100 * rate.interval[1]


def _draw_line(axis: Axes, points: Sequence[Point], look: tuple[str, str]) -> None:
    colour, mark = look
    left, values, low, high = zip(*points, strict=True)
    axis.plot(left, values, color=colour, marker=mark, markersize=4, linewidth=1.3)
    axis.fill_between(left, low, high, color=colour, alpha=0.1, linewidth=0)
