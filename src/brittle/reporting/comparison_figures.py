"""The pictures of networks side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from brittle.reporting.comparison_words import times
from brittle.reporting.drawing import (
    INK,
    NORM_LIFT,
    NORM_SERIES,
    SERIES,
    drawable,
    label_rows,
    layer_panels,
    legend,
    log_scale,
    panels,
    short,
    styled,
)
from brittle.results import ComparedNetwork, Comparison, LayerResult, Rate
from brittle.results.methods import Argument
from brittle.results.wording import norm_name

ROOMY = 6
"""Most networks of a picture of the usual height."""
FAR = 20
"""From which ratio on a scale is logarithmic."""


@styled
def draw_comparison(comparison: Comparison, *, narrow: bool = False) -> Figure | None:
    """All networks in one picture: accuracy, compressibility, sensitivity, network by network; what was measured of it.

    None where nothing was.
    """
    networks = comparison.networks
    drawn = {
        _draw_accuracies: comparison.first.clean is not None,
        _draw_structure: any(network.spectral_head is not None for network in networks),
        _draw_sensitivities: any(_sides(comparison, network, p) for network in networks for p in comparison.norms),
    }
    chosen = [draw for draw, measured in drawn.items() if measured]
    if not chosen:
        return None
    figure, axes = panels(comparison.title, len(chosen), 3.6 + 0.25 * max(0, len(networks) - ROOMY), narrow=narrow)
    label_rows(axes[0], [network.name for network in networks])
    axes[0].set_yticks(range(len(networks)), list(map(_with_size, networks)), parse_math=False)
    for draw, axis in zip(chosen, axes, strict=True):
        axis.grid(visible=True)
        axis.tick_params(left=False, labelleft=narrow or axis is axes[0])
        draw(axis, comparison)
    return figure


def _with_size(network: ComparedNetwork) -> str:
    """A network's name with the number of its parameters below."""
    return f"{short(network.name, 26)}\n{network.audit.parameters:,} parameters"


@styled
def draw_curves(comparison: Comparison, *, narrow: bool = False) -> Figure | None:
    """Accuracy under attack over the budget, one panel a norm and one line a network; None without attacks."""
    norms = [norm.p for norm in comparison.first.audit.norms if norm.curve and norm.curve.n]
    if not norms:
        return None
    figure, axes = panels("Accuracy under attack against the size of the perturbation", len(norms), 3.2, narrow=narrow)
    for axis, p in zip(axes, norms, strict=True):
        largest = 0.0
        for number, network in enumerate(comparison.networks):
            norm = network.audit.norm(p)
            if norm.curve is None or network.clean is None:
                continue
            rates = [(0.0, network.clean), *zip(norm.curve.eps, norm.curve.robust, strict=True)]
            at, values = zip(*((eps, 100 * (rate.value or 0)) for eps, rate in rates), strict=True)
            axis.plot(at, values, **_look(number) | {"linestyle": "-", "linewidth": 1.4, "markersize": 4})
            largest = max(largest, *at)
        axis.axvline(comparison.first.audit.norm(p).eps or 0, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axis.set(ylim=(0, 105), xlabel=f"Budget eps in {norm_name(p)}, input units", title=f"{norm_name(p)} attacks")
        axis.set_xlim(-0.02 * largest, 1.04 * largest or 1)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.grid(visible=True, axis="y")
    axes[0].set_ylabel("Accuracy under attack, %")
    _name_networks(figure, comparison.networks)
    return figure


@styled
def draw_layers(comparison: Comparison, *, narrow: bool = False) -> Figure | None:
    """Norms and compressibility of every layer over those of the first network's; None without layers to compare."""
    rows = [row for row in comparison.layers if row.layers[0] is not None and any(row.layers[1:])]
    if not rows:
        return None
    figure, axes = layer_panels(
        "Layers beside those of the first network", [row.name for row in rows], len(LAYER_PANELS), narrow=narrow
    )
    for axis, (title, value) in zip(axes, LAYER_PANELS.items(), strict=True):
        axis.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        ratios = []
        for y, row in enumerate(rows):
            first, *others = row.layers
            assert first is not None
            for number, layer in enumerate(others, 1):
                ratio = None if layer is None else times(value(layer), value(first))
                if ratio is None or not drawable(ratio):
                    continue
                lift = 0.5 * ((number - 0.5) / len(others) - 0.5)
                axis.plot([ratio], [y + lift], **_look(number) | {"markersize": 4.5})
                ratios.append(ratio)
        _ratio_scale(axis, ratios)
        axis.set_title(title)
        axis.set_xlabel(f"Times that of {comparison.first.name}", parse_math=False)
    _name_networks(figure, comparison.networks, start=1)
    return figure


def _spectral_head(layer: LayerResult) -> float:
    return 1 - layer.spectral_error[1]


def _norm(p: float) -> Any:
    def value(layer: LayerResult) -> float | None:
        norm = layer.operator_norm(p)
        return norm.upper if norm else None

    return value


LAYER_PANELS: dict[str, Any] = {
    "ℓ∞ operator norm": _norm(math.inf),
    "ℓ₂ operator norm": _norm(2.0),
    "Top tenth, singular values": _spectral_head,
}
"""What the layers' figure shows of each layer, as a ratio: title and value. Norms are upper bounds where not exact."""


def _look(number: int) -> dict[str, Any]:
    """The mark of a network by its place: colours and shapes in turn, then with the inside left open."""
    colour, hollow = SERIES[number % len(SERIES)], number // len(SERIES) % 2
    inside = {"markerfacecolor": "none"} if hollow else {}
    return {"color": colour, "marker": "osD^"[number % 4], "markersize": 5.5, "linestyle": "none", **inside}


def _name_networks(figure: Figure, networks: Sequence[ComparedNetwork], start: int = 0) -> None:
    """A legend with every network's mark."""
    named = list(enumerate(networks))[start:]
    marks = [Line2D([], [], **_look(number)) for number, _ in named]
    legend(figure, marks, [short(network.name) for _, network in named])


def _draw_accuracies(axis: Axes, comparison: Comparison) -> None:
    norms, shown = [e.p for e in comparison.first.evaluations], list[Rate]()
    for y, network in enumerate(comparison.networks):
        rates = [(network.clean, 2, 0.0)]
        rates += [(network.robust(p), NORM_SERIES[p], NORM_LIFT[p]) for p in norms]
        for rate, series, lift in rates:
            if rate is None or rate.interval is None:
                continue
            value, (low, high) = 100 * (rate.value or 0), (100 * side for side in rate.interval)
            axis.plot([low, high], [y + lift, y + lift], color=SERIES[series], linewidth=1, alpha=0.7)
            axis.plot([value], [y + lift], **_dot(series))
            shown.append(rate)
    least = min((100 * rate.interval[0] for rate in shown if rate.interval), default=0)
    axis.set(xlim=(10 * math.floor(least / 10) - 1, 102), xlabel="Accuracy, %, with 95 % interval")
    axis.set_title("Clean and robust accuracy")
    words = ["without attack", *(f"under {norm_name(p)} attack" for p in norms)]
    legend(axis, [Line2D([], [], **_dot(series)) for series in (2, *(NORM_SERIES[p] for p in norms))], words)


def _draw_structure(axis: Axes, comparison: Comparison) -> None:
    for y, network in enumerate(comparison.networks):
        if network.spectral_head is None or network.row_head is None:
            continue
        heads = [100 * network.spectral_head, 100 * network.row_head]
        axis.plot(heads, [y, y], color=INK, alpha=0.25, linewidth=0.8)
        for value, series in zip(heads, (2, 3), strict=True):
            axis.plot([value], [y], **_dot(series))
    axis.set(xlim=(0, 104), xlabel="Share of their sum in the largest tenth, %")
    axis.set_title("Compressibility")
    legend(axis, [Line2D([], [], **_dot(series)) for series in (2, 3)], ["singular values", "rows"])


HOLLOW: dict[str, Any] = {"markerfacecolor": "none"}
BAR: dict[str, Any] = {"marker": "|", "markersize": 8, "markeredgewidth": 2}
SIDES = {"lower": HOLLOW, "upper": {}, "product": BAR}
"""Sides of a network's sensitivity, and how their marks differ from the norm's own."""


def _sides(comparison: Comparison, network: ComparedNetwork, p: float) -> dict[str, float]:
    """The sides of a network's sensitivity over those of the first network, as far as both have them."""
    found = {side: times(getattr(network, side)(p), getattr(comparison.first, side)(p)) for side in SIDES}
    return {side: ratio for side, ratio in found.items() if ratio is not None and drawable(ratio)}


def _draw_sensitivities(axis: Axes, comparison: Comparison) -> None:
    shown = [1.0]
    axis.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    for y, network in enumerate(comparison.networks):
        for p in comparison.norms:
            series, lift = NORM_SERIES[p], NORM_LIFT[p]
            ratios = _sides(comparison, network, p)
            if ratios:
                ends = [min(ratios.values()), max(ratios.values())]
                axis.plot(ends, [y + lift] * 2, color=SERIES[series], alpha=0.45, linewidth=0.8)
            for side, ratio in ratios.items():
                axis.plot([ratio], [y + lift], **_dot(series) | SIDES[side])
                shown.append(ratio)
    _ratio_scale(axis, shown)
    axis.set_xlabel(f"Times that of {comparison.first.name}", parse_math=False)
    axis.set_title("Sensitivity")
    marks = [Line2D([], [], **_dot(NORM_SERIES[p])) for p in comparison.norms]
    marks += [Line2D([], [], **_dot(0) | {"color": INK} | look) for look in (HOLLOW, BAR)]
    words = [f"certified {norm_name(p)} bound" for p in comparison.norms]
    legend(axis, marks, [*words, "hollow: largest found", f"bar: {Argument.PRODUCT}"])


def _ratio_scale(axis: Axes, ratios: Sequence[float]) -> None:
    """From 0 on; logarithmic where ratios are far apart."""
    if ratios and max(ratios) > FAR * min(ratios):
        log_scale(axis, [*ratios, 1.0])
    else:
        axis.set_xlim(0, 1.06 * max([*ratios, 1.0]))


def _dot(series: int) -> dict[str, Any]:
    return {"color": SERIES[series], "marker": "osD^"[series], "markersize": 5.5, "linestyle": "none"}
