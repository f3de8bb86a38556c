"""Figures of an audit: each function draws one from the :class:`~brittle.results.Audit` alone, and needs no model.

A function returns None when the audit lacks what the figure shows. Global matplotlib state is neither read nor
left changed, so the same audit gives the same figure whatever the caller's style.
"""

from __future__ import annotations

import hashlib
import html
import io
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from brittle.results import (
    FRACTIONS,
    Audit,
    LayerResponse,
    LipschitzResult,
    NormBounds,
    Rate,
    SecurityCurve,
)

INK = "#010203"
"""Colour of text and axes; :func:`svg` turns it into the colour of the surrounding page."""
SERIES = ("#1f7fc4", "#d55e00", "#009e73", "#c2659a")
"""Colours of the data (after Okabe and Ito): told apart by the colour-blind, 3 : 1 or better on white and on black."""

_PLACE = {2: 0, math.inf: 1, 1: 2}  # of a norm in SERIES
_LIFT = {2: -0.16, math.inf: 0.16, 1: 0.0}  # of its marks from the middle of a layer's row
_WIDTH = 8.6  # inches, and 72 points an inch: 826 CSS pixels
_MANY = 8  # layers that can be told apart by colour and dash
_MOST_LABELS = 80  # names down the side of a figure
_SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_STYLE: dict[str, Any] = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.linewidth", "grid.linewidth"), 0.6),
    **dict.fromkeys(("axes.spines.right", "axes.spines.top", "legend.frameon"), False),
    **dict.fromkeys(("legend.fontsize", "xtick.labelsize", "ytick.labelsize"), 8.5),
    **dict.fromkeys(("axes.labelsize", "axes.titlesize", "font.size"), 9),
    **{"axes.facecolor": "none", "axes.titlelocation": "left", "axes.titlepad": 9},
    **{"grid.alpha": 0.14, "grid.color": INK, "svg.fonttype": "none", "svg.hashsalt": "brittle"},
    **{"figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.06},
}
_styled = style.context(("default", _STYLE))
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_ROUNDING = {"lower": ROUND_FLOOR, "upper": ROUND_CEILING, "nearest": ROUND_HALF_EVEN}


def number(value: float | None, side: str = "nearest") -> str:
    """Three significant digits, or all digits of the integer part when it has up to five.

    A bound is rounded to its own ``side`` (``lower`` down, ``upper`` up), so that the printed number is still one.

    >>> number(0.12345), number(0.12345, "upper"), number(43210.9), number(-1.5e17), number(math.inf), number(None)
    ('0.123', '0.124', '43211', '-1.50 × 10¹⁷', '∞', '–')
    """
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if not value:
        return "0"
    digits = 5 if 1e4 <= abs(value) < 1e5 else 4 if 1e3 <= abs(value) < 1e4 else 3
    rounded = Context(prec=digits, rounding=_ROUNDING[side]).create_decimal_from_float(value)
    if 1e-3 <= abs(rounded) < 1e5:
        return f"{rounded:.{max(0, digits - 1 - rounded.adjusted())}f}"
    mantissa, _, exponent = f"{rounded:.2e}".partition("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def norm_name(p: float) -> str:
    """The norm as it is written: ``ℓ₁``, ``ℓ₂`` or ``ℓ∞``."""
    return {1: "ℓ₁", 2: "ℓ₂", math.inf: "ℓ∞"}.get(p, f"ℓ{p:g}")


def budget(eps: float) -> str:
    """A perturbation's size, as a fraction of 255 when it is a whole number of those steps below one.

    >>> budget(8 / 255), budget(0.5), budget(1.0)
    ('8/255', '0.5', '1')
    """
    steps = round(255 * eps)
    return f"{steps}/255" if 0 < steps < 255 and abs(255 * eps - steps) < 1e-4 else f"{eps:.3g}"


@_styled
def security_curve(audit: Audit) -> Figure | None:
    """Robust accuracy over the budget with 95 % intervals, one panel a norm; None without an attack."""
    curves = [curve for curve in audit.curves if any(rate.n for rate in curve.robust)]
    if not curves:
        return None
    figure, axes = _panels("Robust accuracy against the size of the perturbation", len(curves), 3.2)
    for axis, curve in zip(axes, curves, strict=True):
        _draw_curve(axis, audit, curve)
    axes[0].set_ylabel("Accuracy under attack, %")
    return figure


@_styled
def layer_norms(audit: Audit) -> Figure | None:
    """Concentration factors and the operator norms' ranges, layer by layer; None without layers."""
    names = [layer.name for layer in audit.layers]
    if not names:
        return None
    figure, (left, right) = _layer_panels("Concentration and operator norm of each layer", names, 2)
    _remark(left, [y for y, layer in enumerate(audit.layers) if layer.degenerate], "all weights are zero")
    left.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    for p in (2.0, math.inf):
        rows = [y + _LIFT[p] for y in range(len(names))]
        left.plot([layer.concentration(p) for layer in audit.layers], rows, **_marker(p))
    norms = [(y, norm) for y, layer in enumerate(audit.layers) for norm in layer.operator_norms if norm.p != 1]
    for y, norm in norms:
        _draw_range(right, norm, y + _LIFT[norm.p])
    _log_scale(left, [1, *(layer.concentration(p) for layer in audit.layers for p in (2, math.inf))])
    _log_scale(right, [side for _, norm in norms for side in (norm.lower, norm.upper)])
    left.set_title("Concentration factor (1: flat matrix)")
    right.set_title("Operator norm: bar from lower to upper bound")
    _legend(figure, [_key(2.0), _key(math.inf)], ["ℓ₂ (spectral)", "ℓ∞ (largest row)"])
    return figure


@_styled
def spectra(audit: Audit) -> Figure | None:
    """Singular values and row norms over their largest, sorted; None when no layer has two of them.

    Up to eight layers are named; of more, the two steepest and the two flattest are, and the rest are thin lines.
    """
    layers = [layer for layer in audit.layers if not layer.degenerate and len(layer.singular_values) > 1]
    if not layers:
        return None
    figure, axes = _panels("Profiles of singular values and row norms", 2, 4.0)
    parts = {"singular_values": "Singular values", "row_norms": "Row ℓ₁ norms"}
    for axis, (part, title) in zip(axes, parts.items(), strict=True):
        profiles = {layer.name: np.asarray(getattr(layer, part)) for layer in layers}
        _draw_profiles(axis, {name: values / values[0] for name, values in profiles.items()})
        axis.set_title(f"{title}, relative to the largest")
        axis.set(xlim=(-2, 102), ylim=(-0.02, 1.04), xlabel="Position in the sorted list, %")
        axis.grid(visible=True)
    return figure


@_styled
def compressibility(audit: Audit) -> Figure | None:
    """Row and spectral k-term errors at each of the fractions kept, layer by layer; None without layers."""
    names = [layer.name for layer in audit.layers]
    if not names:
        return None
    figure, axes = _layer_panels("Compressibility of each layer", names, 2)
    _remark(axes[0], [y for y, layer in enumerate(audit.layers) if layer.degenerate], "all weights are zero")
    missing = (math.nan,) * len(FRACTIONS)
    parts = {"row_error": "Rows kept", "spectral_error": "Singular values kept"}
    for axis, (part, title) in zip(axes, parts.items(), strict=True):
        errors = np.array([missing if layer.degenerate else getattr(layer, part) for layer in audit.layers])
        axis.hlines(range(len(names)), errors.min(axis=1), errors.max(axis=1), color=INK, alpha=0.3, linewidth=0.8)
        for column, fraction in enumerate(FRACTIONS):
            axis.axvline(1 - fraction, color=SERIES[column], linewidth=0.8, linestyle=(0, (1, 2)))
            axis.plot(errors[:, column], range(len(names)), **_look(column))
        axis.set(xlim=(-0.03, 1.03), title=f"{title}: k-term error")
    marks = [Line2D([], [], **_look(column)) for column in range(len(FRACTIONS))]
    flat = Line2D([], [], color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
    labels = [f"{100 * fraction:g} % kept" for fraction in FRACTIONS]
    _legend(figure, [*marks, flat], [*labels, "if all were equal"])
    return figure


@_styled
def sensitivity(audit: Audit) -> Figure | None:
    """Largest local gain found on data and certified global bound, by norm; None when there is neither."""
    results = audit.lipschitz
    values = [value for result in results for value in (result.lower, result.median_lower, result.upper)]
    if not any(value is not None and _drawable(value) for value in values):
        return None
    figure, (axis,) = _panels("Sensitivity of the logits to the input", 1, 1.25 + 0.55 * len(results))
    for y, result in enumerate(results):
        _draw_sensitivity(axis, y, result)
    _label_rows(axis, [norm_name(result.p) for result in results])
    _log_scale(axis, [value for value in values if value is not None], room=3.0)
    axis.set_xlabel("Change of the logits per change of the input, log scale")
    names = ["median over the samples", "largest found on data (lower bound)", "certified (upper bound)"]
    _legend(figure, [Line2D([], [], **look) for look in _SIDES.values()], names)
    return figure


@_styled
def directions(audit: Audit) -> Figure | None:
    """Where the attack's perturbation goes at each layer, and how it grows; None without responses."""
    responses = [response for response in audit.responses if response.k]
    if not responses:
        return None
    names = list(dict.fromkeys(response.layer for response in responses))
    columns = sorted({0, min(len(response.k) for response in responses) - 1})
    figure, axes = _layer_panels("Adversarial perturbations in the layers", names, len(columns) + 1)
    rows = [(names.index(response.layer) + _LIFT[response.p], response) for response in responses]
    for axis, column in zip(axes, columns, strict=False):
        _draw_energy(axis, rows, column)
    growth = [(y, r.p, r.amplification) for y, r in rows if r.amplification is not None]
    for y, p, value in growth:
        axes[-1].plot([value], [y], **_marker(p))
    _log_scale(axes[-1], [value for _, _, value in growth])
    axes[-1].set_title("Relative change of the output")
    norms = sorted({response.p for response in responses})
    isotropic = Line2D([], [], **{**_hollow(2.0), "markeredgecolor": INK})
    _legend(figure, [*map(_key, norms), isotropic], [*(f"{norm_name(p)} attack" for p in norms), "isotropic"])
    return figure


@_styled
def universal(audit: Audit) -> Figure | None:
    """Predictions changed by one universal and by a random perturbation; None when none was fitted."""
    results = [result for result in audit.universal if result.fooled.n and result.random_fooled.n]
    if not results:
        return None
    figure, (axis,) = _panels("Universal against random perturbation", 1, 1.2 + 0.55 * len(results))
    for y, result in enumerate(results):
        for series, lift, rate in ((1, -0.14, result.fooled), (0, 0.14, result.random_fooled)):
            value, low, high = _percent(rate)
            sides = [[value - low], [high - value]]
            axis.errorbar([value], [y + lift], xerr=sides, elinewidth=1.4, capsize=2.5, **_look(series))
            axis.annotate(rate.percent, (high, y + lift), (6, 0), textcoords="offset points", va="center", fontsize=8)
    _label_rows(axis, [f"{norm_name(result.p)}, eps {budget(result.eps)}" for result in results])
    axis.set(xlim=(-2, 104), xlabel="Predictions changed on held-out samples, %, with 95 % interval")
    _legend(figure, [Line2D([], [], **_look(series)) for series in (1, 0)], ["universal", "random, of equal size"])
    return figure


@_styled
def svg(figure: Figure) -> str:
    """The figure as one ``<svg>`` element to place in a page: no prolog, no date, no fixed text colour.

    Text and axes take the colour of the page; all ids begin with a hash of the content, so that figures can share one.
    """
    title = html.escape(str(figure.get_label()))
    stream = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the page's own font will have it
        figure.savefig(stream, format="svg", facecolor="none", metadata=nothing)
    content = stream.getvalue().partition("<svg")[2].partition(">")[2]
    content = re.sub(r"<!--.*?-->|<style.*?</style>", "", content, flags=re.DOTALL)
    prefix = f"f{hashlib.sha256((title + content).encode()).hexdigest()[:8]}-"
    content = re.sub(r"<[^>]*>", lambda tag: _inline(tag[0], prefix), content)
    box = "0 0 " + " ".join(f"{72 * side:g}" for side in figure.get_size_inches())
    look = f"font-family: {_SANS}; stroke-linejoin: round; stroke-linecap: butt"
    root = f'xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{title}" viewBox="{box}" style="{look}"'
    return f"<svg {root}><title>{title}</title>{content.strip()}\n"


def _inline(tag: str, prefix: str) -> str:
    tag = re.sub(r"(?<=\s)id=\"", f'id="{prefix}', tag)
    tag = tag.replace('xlink:href="#', f'href="#{prefix}').replace("url(#", f"url(#{prefix}")
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag).replace(INK, "currentColor")
    hundredths = r"(\.\d\d)\d+"
    return re.sub(r'(?<=\sd=")[^"]*', lambda path: " ".join(re.sub(hundredths, r"\1", path[0]).split()), tag)


def _panels(title: str, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    figure.set_label(title)
    return figure, list(figure.subplots(1, columns, squeeze=False, sharey=True)[0])


def _layer_panels(title: str, names: Sequence[str], columns: int) -> tuple[Figure, list[Axes]]:
    """Panels with one row a layer, in the order of the model, names down the left side."""
    rows = min(len(names), _MOST_LABELS)
    figure, axes = _panels(title, columns, 1.15 + max(2, rows) * (0.27 if rows <= 20 else 0.165))
    _label_rows(axes[0], names)
    for axis in axes[1:]:
        axis.tick_params(left=False, labelleft=False)
    for axis in axes:
        axis.grid(visible=True)
        axis.tick_params(labeltop=rows > 20)
    return figure, axes


def _label_rows(axis: Axes, names: Sequence[str]) -> None:
    step = math.ceil(len(names) / _MOST_LABELS)
    labels = [_short(name) for name in names[::step]]
    axis.set_yticks(range(0, len(names), step), labels, parse_math=False, fontsize=8 if len(names) > 20 else 8.5)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.spines.left.set_visible(False)
    axis.tick_params(axis="y", length=0)


def _short(name: str, most: int = 34) -> str:
    """A name that fits beside a figure: printable, and without its middle when it is long."""
    name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return name if len(name) <= most else f"{name[: most // 2 - 4]}…{name[-(most // 2 + 3) :]}"


def _drawable(value: float) -> bool:
    return 1e-290 < value < 1e290


def _log_scale(axis: Axes, values: Iterable[float], room: float = 1.15) -> None:
    """A logarithmic x axis around ``values``, at most six ticks, at powers of ten or at 1, 2 and 5 of each."""
    usable = [value for value in values if _drawable(value)] or [1.0]
    low, high = min(usable), max(usable)
    steps = (1, 2, 5) if high / low < 40 else (1,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [step * 10.0**exponent for exponent in exponents for step in steps]
    first, last = max(m for m in marks if m <= low * 1.001), min(m for m in marks if m >= high * 0.999)
    marks = [mark for mark in marks if first <= mark <= last]
    marks = marks[:: math.ceil(len(marks) / 6)]
    axis.set_xscale("log")
    axis.set_xticks(marks, [_tick(mark) for mark in marks])
    axis.minorticks_off()
    axis.set_xlim(min(first, low / room), max(last, high * room))


def _tick(value: float) -> str:
    if 0.999e-3 < value < 1e4:
        return f"{value:g}"
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    power = f"10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    return power if mantissa == "1" else f"{mantissa} × {power}"


def _legend(parent: Figure | Axes, handles: Sequence[Line2D], names: Sequence[str]) -> None:
    """A legend above a figure or below a panel; names are set last, so ``_x`` and ``$x$`` stay as they are."""
    above: dict[str, Any] = {"loc": "outside upper left", "ncols": len(names)}
    below: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (-0.02, -0.19)}
    legend = parent.legend(handles, ["x"] * len(names), **(above if isinstance(parent, Figure) else below))
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)


def _remark(axis: Axes, rows: Iterable[float], text: str, *, left: bool = False) -> None:
    for y in rows:
        place: dict[str, Any] = {"ha": "left" if left else "right", "va": "center", "fontstyle": "italic", "alpha": 0.8}
        axis.text(0.01 if left else 0.99, y, text, transform=axis.get_yaxis_transform(), fontsize=8, **place)


def _look(series: int) -> dict[str, Any]:
    colour, shape = SERIES[series], "os^D"[series]
    return {"marker": shape, "markersize": 4.3, "markeredgewidth": 0, "linestyle": "none", "color": colour}


def _marker(p: float) -> dict[str, Any]:
    return _look(_PLACE[p])


def _hollow(p: float) -> dict[str, Any]:
    return {**_marker(p), "markerfacecolor": "none", "markeredgecolor": SERIES[_PLACE[p]], "markeredgewidth": 0.9}


def _key(p: float) -> Line2D:
    return Line2D([], [], **_marker(p))


def _draw_range(axis: Axes, norm: NormBounds, y: float) -> None:
    if norm.exact:
        axis.plot([norm.upper], [y], **_marker(norm.p))
    else:
        sides = np.clip([norm.lower, norm.upper], 1e-290, 1e290)
        axis.plot(sides, [y, y], color=SERIES[_PLACE[norm.p]], linewidth=2.6, marker="|", ms=5, solid_capstyle="butt")


def _draw_energy(axis: Axes, rows: Sequence[tuple[float, LayerResponse]], column: int) -> None:
    ks = sorted({response.k[column] for _, response in rows})
    axis.set_title("Energy in the top " + (f"{ks[0]}" if len(ks) == 1 else f"{ks[0]}–{ks[-1]}"))
    for y, response in rows:
        share, chance = response.energy[column], response.isotropic[column]
        axis.plot([chance, share], [y, y], color=INK, alpha=0.35, linewidth=0.8)
        axis.plot([chance], [y], **_hollow(response.p))
        axis.plot([share], [y], **_marker(response.p))
    _log_scale(axis, [share for _, r in rows for share in (r.energy[column], r.isotropic[column])])


def _draw_curve(axis: Axes, audit: Audit, curve: SecurityCurve) -> None:
    colour = SERIES[_PLACE[curve.p]]
    points = {eps: rate for eps, rate in zip(curve.eps, curve.robust, strict=True) if rate.n}
    clean = audit.clean_accuracy
    if clean is not None and clean.n:
        points = {0.0: clean} | points
    eps, (value, lower, upper) = list(points), zip(*map(_percent, points.values()), strict=True)
    axis.fill_between(eps, lower, upper, color=colour, alpha=0.2, linewidth=0)
    axis.plot(eps, value, color=colour, marker="o", markersize=3.6, linewidth=1.5)
    if clean is not None and clean.n:
        axis.plot([0], [_percent(clean)[0]], marker="D", markersize=6, color=INK, linestyle="none", clip_on=False)
        axis.annotate(f"clean {clean.percent}", (0, _percent(clean)[0]), (8, 4), textcoords="offset points")
    for evaluation in audit.evaluations:
        if evaluation.p == curve.p and evaluation.n:
            at, (found, low, high) = evaluation.eps, _percent(evaluation.robust_accuracy)
            axis.axvline(at, color=INK, linewidth=0.8, linestyle=(0, (3, 3)), alpha=0.7)
            axis.errorbar([at], [found], yerr=[[found - low], [high - found]], fmt="s", color=INK, ms=4, capsize=2.5)
            axis.text(at, 1.03, budget(at), transform=axis.get_xaxis_transform(), ha="center", fontsize=8)
    axis.set(ylim=(0, 105), xlabel=f"Budget eps in {norm_name(curve.p)}, input units")
    axis.set_xlim(-0.02 * max(eps), 1.04 * max(eps) or 1)
    axis.set_title(f"{norm_name(curve.p)} attacks", pad=18)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.grid(visible=True, axis="y")


def _percent(rate: Rate) -> tuple[float, float, float]:
    low, high = rate.interval or (0.0, 1.0)
    return 100 * (rate.value or 0.0), 100 * low, 100 * high


_SIDES: dict[str, dict[str, Any]] = {
    "median": {**_hollow(2.0), "markersize": 5},
    "lower": {**_marker(2.0), "markersize": 6.5},
    "upper": {**_look(1), "markersize": 6.5, "marker": "v"},
}


def _draw_sensitivity(axis: Axes, y: float, result: LipschitzResult) -> None:
    sides = {"median": result.median_lower, "lower": result.lower, "upper": result.upper}
    found = {side: value for side, value in sides.items() if value is not None and _drawable(value)}
    if len(found) > 1:
        axis.plot([min(found.values()), max(found.values())], [y, y], color=INK, alpha=0.35, linewidth=1)
    for side, value in found.items():
        axis.plot([value], [y], **_SIDES[side])
        if side != "median":
            axis.annotate(number(value, side), (value, y), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    missing = {"found on data": "lower" not in found, "certified": "upper" not in found}
    if any(missing.values()):
        names = " and ".join(name for name, gone in missing.items() if gone)
        _remark(axis, [y], f"{names}: not available", left=not missing["certified"])


def _draw_profiles(axis: Axes, profiles: dict[str, np.ndarray[Any, Any]]) -> None:
    """One line a profile; when there are many, only the extremes are coloured and named."""

    def line(name: str, **look: Any) -> Line2D:
        return axis.plot(np.linspace(0, 100, len(profiles[name])), profiles[name], **look)[0]

    notes = dict.fromkeys(profiles, "")
    if len(profiles) > _MANY:
        names = sorted(profiles, key=lambda name: float(profiles[name].mean()))
        notes = dict.fromkeys(names[:2], "steepest: ") | dict.fromkeys(names[-2:], "flattest: ")
    for name in [name for name in profiles if name not in notes]:
        line(name, color=INK, alpha=0.2, linewidth=0.7)
    looks = [(colour, dash) for dash in ("-", (0, (3, 1))) for colour in SERIES]
    lines = [line(n, color=c, linestyle=dash, linewidth=1.6) for n, (c, dash) in zip(notes, looks, strict=False)]
    _legend(axis, lines, [note + _short(name) for name, note in notes.items()])
