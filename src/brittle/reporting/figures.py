"""Figures of an audit: each function draws one from the :class:`~brittle.results.Audit` alone, and needs no model.

A function returns None when the audit lacks what the figure shows. Global matplotlib state is neither read nor
left changed, so the same audit gives the same figure whatever the caller's style.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from brittle.reporting.drawing import (
    INK,
    NORM_LIFT,
    NORM_SERIES,
    SERIES,
    drawable,
    hollow_look,
    label_rows,
    layer_panels,
    legend,
    log_scale,
    norm_look,
    panels,
    remark,
    series_look,
    short,
    styled,
)
from brittle.results import (
    FRACTIONS,
    Audit,
    CertifiedCurve,
    Evaluation,
    LipschitzResult,
    NormResult,
    Rate,
    SecurityCurve,
)
from brittle.results.methods import Argument, UniversalKind
from brittle.results.wording import budget, norm_name, number

NAMED_PROFILES = 8
"""Most layers that colour and dash can tell apart; of more, only the extremes are named."""
BROKEN, PROVEN = SERIES[1], SERIES[2]
"""Colours of what attacks broke and of what is certified."""
SENSITIVITY_LOOKS: dict[str, dict[str, Any]] = {
    "median": {**hollow_look(2.0), "markersize": 5},
    "lower": {**norm_look(2.0), "markersize": 6.5},
    "upper": {**series_look(1), "markersize": 6.5, "marker": "v"},
    "product": {**series_look(1), "markersize": 6.5, "marker": "v", "markerfacecolor": "none", "markeredgewidth": 0.9},
}
"""Marks of a norm's row by side, in the order of the legend."""


@styled
def draw_security_curve(audit: Audit, *, narrow: bool = False) -> Figure | None:
    """Robust accuracy over the budget with 95 % intervals, one panel a norm; None without an attack."""
    curves = [(norm.curve, norm.evaluation) for norm in audit.norms if norm.curve and norm.curve.n]
    if not curves:
        return None
    figure, axes = panels("Robust accuracy against the size of the perturbation", len(curves), 3.2, narrow=narrow)
    for axis, (curve, evaluation) in zip(axes, curves, strict=True):
        _draw_curve(axis, curve, evaluation, audit.clean_accuracy)
    axes[0].set_ylabel("Accuracy under attack, %")
    return figure


@styled
def draw_certificate(audit: Audit, *, narrow: bool = False) -> Figure | None:
    """Certified and attacked accuracy, between which the true one lies, one panel a norm; None without certificates."""
    counted = [
        (norm, norm.certified if norm.certified and norm.certified.n else None)
        for norm in audit.norms
        if any(curve and curve.n for curve in (norm.curve, norm.certified))
    ]
    if not any(proven for _, proven in counted):
        return None
    figure, axes = panels("Accuracy under attack, between proof and attack", len(counted), 3.5, narrow=narrow)
    for axis, (norm, proven) in zip(axes, counted, strict=True):
        _draw_gap(axis, norm, proven, audit.clean_accuracy)
        axis.set_xlabel(f"Budget eps in {norm_name(norm.p)}, input units, log scale")
        axis.set_title(norm_name(norm.p), pad=18)
    axes[0].set_ylabel("Accuracy under attack, %")
    lines = [Line2D([], [], color=PROVEN), Line2D([], [], color=BROKEN, marker="o", markersize=3.6)]
    legend(figure, lines, ["certified: proven right below", "attacked: broken, or wrong to begin with, above"])
    return figure


@styled
def draw_layer_norms(audit: Audit, *, narrow: bool = False) -> Figure | None:
    """Concentration factors and the operator norms' ranges, layer by layer; None without layers."""
    names = [layer.name for layer in audit.layers]
    if not names:
        return None
    figure, (left, right) = layer_panels("Concentration and operator norm of each layer", names, 2, narrow=narrow)
    remark(left, [y for y, layer in enumerate(audit.layers) if layer.degenerate], "all weights are zero")
    left.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    for p in (2.0, math.inf):
        rows = [y + NORM_LIFT[p] for y in range(len(names))]
        left.plot([layer.concentration(p) for layer in audit.layers], rows, **norm_look(p))
    norms = [(y, norm) for y, layer in enumerate(audit.layers) for norm in layer.operator_norms if norm.p != 1]
    for y, norm in norms:
        if norm.exact:
            right.plot([norm.upper], [y + NORM_LIFT[norm.p]], **norm_look(norm.p))
        else:
            sides, bar = np.clip([norm.lower, norm.upper], 1e-290, 1e290), SERIES[NORM_SERIES[norm.p]]
            right.plot(sides, [y + NORM_LIFT[norm.p]] * 2, color=bar, lw=2.6, marker="|", ms=5, solid_capstyle="butt")
    log_scale(left, [1, *(layer.concentration(p) for layer in audit.layers for p in (2, math.inf))])
    log_scale(right, [side for _, norm in norms for side in (norm.lower, norm.upper)])
    left.set_title("Concentration factor (1: flat matrix)")
    right.set_title("Operator norm: bar from lower to upper bound")
    legend(figure, [Line2D([], [], **norm_look(p)) for p in (2.0, math.inf)], ["ℓ₂ (spectral)", "ℓ∞ (largest row)"])
    return figure


@styled
def draw_spectra(audit: Audit, *, narrow: bool = False) -> Figure | None:
    """Singular values and row norms over their largest, sorted; None when no layer has two of them.

    Up to eight layers are named; of more, the two steepest and the two flattest are, and the rest are thin lines.
    """
    layers = [layer for layer in audit.layers if not layer.degenerate and len(layer.singular_values) > 1]
    if not layers:
        return None
    figure, axes = panels("Profiles of singular values and row norms", 2, 4.0, narrow=narrow)
    parts = {"singular_values": "Singular values", "row_norms": "Row ℓ₁ norms"}
    for axis, (part, title) in zip(axes, parts.items(), strict=True):
        profiles = {layer.name: np.asarray(getattr(layer, part)) for layer in layers}
        _draw_profiles(axis, {name: values / values[0] for name, values in profiles.items()})
        axis.set_title(f"{title}, relative to the largest")
        axis.set(xlim=(-2, 102), ylim=(-0.02, 1.04), xlabel="Position in the sorted list, %")
        axis.grid(visible=True)
    return figure


@styled
def draw_compressibility(audit: Audit, *, narrow: bool = False) -> Figure | None:
    """Row and spectral k-term errors at each of the fractions kept, layer by layer; None without layers."""
    names = [layer.name for layer in audit.layers]
    if not names:
        return None
    figure, axes = layer_panels("Compressibility of each layer", names, 2, narrow=narrow)
    remark(axes[0], [y for y, layer in enumerate(audit.layers) if layer.degenerate], "all weights are zero")
    missing = (math.nan,) * len(FRACTIONS)
    parts = {"row_error": "Rows kept", "spectral_error": "Singular values kept"}
    for axis, (part, title) in zip(axes, parts.items(), strict=True):
        errors = np.array([missing if layer.degenerate else getattr(layer, part) for layer in audit.layers])
        axis.hlines(range(len(names)), errors.min(axis=1), errors.max(axis=1), color=INK, alpha=0.3, linewidth=0.8)
        for column, fraction in enumerate(FRACTIONS):
            axis.axvline(1 - fraction, color=SERIES[column], linewidth=0.8, linestyle=(0, (1, 2)))
            axis.plot(errors[:, column], range(len(names)), **series_look(column))
        axis.set(xlim=(-0.03, 1.03), title=f"{title}: k-term error")
    marks = [Line2D([], [], **series_look(column)) for column in range(len(FRACTIONS))]
    flat = Line2D([], [], color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
    labels = [f"{100 * fraction:g} % kept" for fraction in FRACTIONS]
    legend(figure, [*marks, flat], [*labels, "if all were equal"])
    return figure


@styled
def draw_sensitivity(audit: Audit, *, narrow: bool = False) -> Figure | None:
    """Largest gain found and certified global bound, by norm; None when no norm has both, or the median beside one."""
    rows = [_sides(norm.lipschitz) for norm in audit.norms]
    if not any(len(sides) > 1 for sides in rows):
        return None  # one number a norm stands better in the table
    figure, (axis,) = panels("Sensitivity of the logits to the input", 1, 1.25 + 0.55 * len(rows), narrow=narrow)
    for y, sides in enumerate(rows):
        _draw_sensitivity(axis, y, sides)
    label_rows(axis, [norm_name(norm.p) for norm in audit.norms])
    log_scale(axis, [value for sides in rows for value in sides.values()], room=3.0)
    axis.set_xlabel("Change of the logits per change of the input, log scale")
    names = ["median over the samples", "largest found (lower bound)", "certified (upper bound)"]
    names += [Argument.PRODUCT] * any("product" in sides for sides in rows)
    legend(figure, [Line2D([], [], **look) for look in list(SENSITIVITY_LOOKS.values())[: len(names)]], names)
    return figure


@styled
def draw_directions(audit: Audit, *, narrow: bool = False) -> Figure | None:
    """Where the attack's perturbation goes at each layer, and how it grows; None without responses."""
    responses = [response for norm in audit.norms for response in norm.responses if response.k]
    if not responses:
        return None
    names = list(dict.fromkeys(response.layer for response in responses))
    columns = sorted({0, min(len(response.k) for response in responses) - 1})
    figure, axes = layer_panels("Adversarial perturbations in the layers", names, len(columns) + 1, narrow=narrow)
    rows = [(names.index(response.layer) + NORM_LIFT[response.p], response) for response in responses]
    random = {(r.layer, r.p): r.energy for norm in audit.norms for r in norm.random_responses if r.energy}
    aimless = [random.get((r.layer, r.p), r.isotropic) for r in responses]  # files of older versions lack random ones
    for axis, column in zip(axes, columns, strict=False):
        ks = sorted({response.k[column] for _, response in rows})
        axis.set_title("Energy in the top " + (f"{ks[0]}" if len(ks) == 1 else f"{ks[0]}–{ks[-1]}"))
        for (y, response), shares in zip(rows, aimless, strict=True):
            share, chance = response.energy[column], shares[column]
            axis.plot([chance, share], [y, y], color=INK, alpha=0.35, linewidth=0.8)
            axis.plot([chance], [y], **hollow_look(response.p))
            axis.plot([share], [y], **norm_look(response.p))
        log_scale(axis, [shares[column] for shares in (*aimless, *(r.energy for r in responses))])
    growth = [(y, r.p, r.amplification) for y, r in rows if r.amplification is not None]
    for y, p, value in growth:
        axes[-1].plot([value], [y], **norm_look(p))
    log_scale(axes[-1], [value for _, _, value in growth])
    axes[-1].set_title("Relative change of the output")
    norms = sorted({response.p for response in responses})
    keys = [Line2D([], [], **norm_look(p)) for p in norms]
    hollow = Line2D([], [], **{**hollow_look(2.0), "markeredgecolor": INK})
    without_aim = "random, of equal size" if random else "isotropic"
    legend(figure, [*keys, hollow], [*(f"{norm_name(p)} attack" for p in norms), without_aim])
    return figure


@styled
def draw_features(audit: Audit, *, narrow: bool = False) -> Figure | None:
    """How much of what separates the classes each layer's representation shows; None where no layer was measured."""
    features = audit.features.followed if audit.features else None
    layers = [layer for layer in features.layers if layer.cosine is not None] if features else []
    if features is None or not layers or features.cosine is None:
        return None
    figure, (axis,) = layer_panels(
        "What separates the classes, layer by layer",
        ["input", *(layer.layer for layer in layers), "decision"],
        1,
        narrow=narrow,
    )
    cosines = [100.0, *(100 * layer.cosine for layer in layers if layer.cosine is not None), 100 * features.cosine]
    axis.plot(cosines, range(len(cosines)), color=SERIES[0], alpha=0.35, linewidth=0.9)
    axis.plot(cosines, range(len(cosines)), **series_look(0))
    names = ["by the nearer output"]
    for part, series, name in (("kept", 1, "not lost"), ("strong", 2, "in the strong directions")):
        marks = [(100 * share, y) for y, entry in enumerate(layers, 1) if (share := getattr(entry, part)) is not None]
        if marks:
            axis.plot(*zip(*marks, strict=True), **series_look(series))
            names.append(name)
    axis.axvline(100 * features.chance, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    axis.set(xlim=(-2, 103), xlabel="Share of the way from a sample to the nearest one of another class, %")
    dotted = Line2D([], [], color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
    legend(
        figure, [*(Line2D([], [], **series_look(i)) for i in range(len(names))), dotted], [*names, "random direction"]
    )
    return figure


@styled
def draw_feature_pairs(audit: Audit, *, narrow: bool = False) -> Figure | None:
    """Attacked radii against the shares that the network decides by, one mark a pair; None with fewer than two."""
    pairs = audit.features.pairs if audit.features else ()
    marks = [(pair.cosine, pair.ratio) for pair in pairs if pair.cosine is not None and pair.ratio is not None]
    if len(marks) < 2:
        return None
    figure, (axis,) = panels("Attacked radius against the share that the network decides by", 1, 3.2, narrow=narrow)
    axis.plot([0, 100], [0, 100], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axis.plot([100 * cosine for cosine, _ in marks], [100 * ratio for _, ratio in marks], **series_look(0), alpha=0.7)
    right, top = (106 * (max(column) or 1.0) for column in zip(*marks, strict=True))
    axis.set(xlim=(0, right), ylim=(0, top))
    axis.set(xlabel="Share that the network decides by, %", ylabel="Attacked radius over\nminimum-distance radius, %")
    axis.grid(visible=True)
    line = Line2D([], [], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    names = ["one pair of samples", "linear, with equal margins at both samples"]
    legend(figure, [Line2D([], [], **series_look(0)), line], names)
    return figure


@styled
def draw_universal(audit: Audit, *, narrow: bool = False) -> Figure | None:
    """Predictions changed by universal and by random perturbations, by budget; None when none was judged."""
    results = [result for norm in audit.norms for result in norm.universal if result.fooled.n]
    if not results:
        return None
    budgets = list(dict.fromkeys((result.p, result.eps) for result in results))
    # Series, and lift from the middle of the budget's row.
    kinds: dict[str, tuple[int, float]] = {UniversalKind.FITTED: (1, -0.24), UniversalKind.DATA_FREE: (2, 0.0)}
    figure, (axis,) = panels("Universal against random perturbations", 1, 1.2 + 0.8 * len(budgets), narrow=narrow)
    for y, place in enumerate(budgets):
        same_budget = [result for result in results if (result.p, result.eps) == place]
        marks = [(*kinds[result.kind], _percent(result.fooled), result.fooled.percent) for result in same_budget]
        mean, (least, most) = same_budget[0].random_mean, same_budget[0].random_range
        marks += [(0, 0.24, (_percent(mean)[0], _percent(least)[0], _percent(most)[0]), mean.percent)]
        for series, lift, (value, low, high), text in marks:
            sides, look = [[value - low], [high - value]], series_look(series)
            axis.errorbar([value], [y + lift], xerr=sides, elinewidth=1.4, capsize=2.5, **look)
            axis.annotate(text, (high, y + lift), (6, 0), textcoords="offset points", va="center", fontsize=8)
    label_rows(axis, [f"{norm_name(p)}, eps {budget(eps)}" for p, eps in budgets])
    axis.set(xlim=(-2, 104), xlabel="Predictions changed on held-out samples, %")
    shown = {kind: series for kind, (series, _) in kinds.items() if any(result.kind == kind for result in results)}
    shown["random, of equal size"] = 0
    legend(figure, [Line2D([], [], **series_look(series)) for series in shown.values()], list(shown))
    return figure


def _draw_curve(axis: Axes, curve: SecurityCurve, evaluation: Evaluation | None, clean: Rate | None) -> None:
    """Robust accuracy over the budget with its interval, from the accuracy without attack on."""
    colour = SERIES[NORM_SERIES[curve.p]]
    rates = [*([(0.0, clean)] if clean is not None else []), *zip(curve.eps, curve.robust, strict=True)]
    eps, counted = zip(*((eps, rate) for eps, rate in rates if rate.n), strict=True)
    value, lower, upper = zip(*map(_percent, counted), strict=True)
    axis.fill_between(eps, lower, upper, color=colour, alpha=0.2, linewidth=0)
    axis.plot(eps, value, color=colour, marker="o", markersize=3.6, linewidth=1.5)
    _mark_clean(axis, 0, clean)
    if evaluation is not None and evaluation.n:
        robust, low, high = _percent(evaluation.robust_accuracy)
        sides = [[robust - low], [high - robust]]
        axis.errorbar([evaluation.eps], [robust], yerr=sides, fmt="s", color=INK, ms=4, capsize=2.5)
        _mark_standard(axis, evaluation.eps)
    axis.set(ylim=(0, 105), xlabel=f"Budget eps in {norm_name(curve.p)}, input units")
    axis.set_xlim(-0.02 * max(eps), 1.04 * max(eps) or 1)
    axis.set_title(f"{norm_name(curve.p)} attacks", pad=18)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.grid(visible=True, axis="y")


def _draw_gap(axis: Axes, norm: NormResult, proven: CertifiedCurve | None, clean: Rate | None) -> None:
    """The region between what is certified, from below, and what attacks broke, from above."""
    broken, evaluation = norm.curve, norm.evaluation
    low, high = _budget_range(proven, broken)
    rates = {low: clean} if clean is not None else {}
    rates |= dict(zip(broken.eps, broken.robust, strict=True)) if broken else {}
    attacked = {eps: _percent(rate)[0] for eps, rate in rates.items() if rate.n}
    if attacked:
        # Between two budgets each accuracy keeps the value of that end which makes it a bound: what was broken by the
        # smaller budget stays broken, what is proven at the larger one is proven here.
        at, values = list(attacked), list(attacked.values())
        axis.fill_between([*at, high], [*values, values[-1]], 100, step="post", color=BROKEN, alpha=0.2, linewidth=0)
        axis.plot(at, values, drawstyle="steps-post", color=BROKEN, marker="o", markersize=3.6, linewidth=1.5)
    if proven is None:
        remark(axis, [5], f"no certificate in {norm_name(norm.p)}", left=True)
    else:
        at = [low, *(eps for eps in proven.eps if low < eps < high), high]
        values = [_percent(proven.at(eps))[0] for eps in at]
        axis.fill_between(at, 0, values, step="pre", color=PROVEN, alpha=0.2, linewidth=0)
        axis.plot(at, values, drawstyle="steps-pre", color=PROVEN, linewidth=1.5)
    log_scale(axis, [low, high])
    axis.set(ylim=(0, 105), xlim=(low, high * (high / low) ** 0.02))
    axis.grid(visible=True, axis="y")
    _name_open_region(axis, attacked, proven, evaluation)
    _mark_clean(axis, low, clean)
    if evaluation is not None and evaluation.n:
        ends = [evaluation.robust_accuracy, *([proven.at(evaluation.eps)] if proven else [])]
        axis.plot([evaluation.eps] * len(ends), [_percent(rate)[0] for rate in ends], "s", color=INK, ms=4)
        _mark_standard(axis, evaluation.eps)


def _mark_clean(axis: Axes, at: float, clean: Rate | None) -> None:
    if clean is not None and clean.n:
        axis.plot([at], [_percent(clean)[0]], marker="D", markersize=6, color=INK, linestyle="none", clip_on=False)
        axis.annotate(f"clean {clean.percent}", (at, _percent(clean)[0]), (8, 4), textcoords="offset points")


def _mark_standard(axis: Axes, eps: float) -> None:
    axis.axvline(eps, color=INK, linewidth=0.8, linestyle=(0, (3, 3)), alpha=0.7)
    axis.text(eps, 1.03, budget(eps), transform=axis.get_xaxis_transform(), ha="center", fontsize=8)


def _budget_range(proven: CertifiedCurve | None, broken: SecurityCurve | None) -> tuple[float, float]:
    """Budgets to show: from below the first at which a certificate runs out, to the largest that was attacked."""
    rates = zip(pairwise(proven.certified), proven.eps[1:], strict=True) if proven else ()
    falls = [eps for (before, after), eps in rates if after.hits < before.hits and drawable(eps)]
    attacked = [eps for eps in (broken.eps if broken else ()) if drawable(eps)]
    high = max(attacked or falls, default=1.0)
    return 0.8 * min([eps for eps in (*falls[:1], *attacked) if eps <= high], default=high), high


def _name_open_region(
    axis: Axes, attacked: dict[float, float], proven: CertifiedCurve | None, evaluation: Evaluation | None
) -> None:
    """Write "not known" where the two accuracies leave most room, beside the standard budget's line, if anywhere."""
    left, right = map(math.log, axis.get_xlim())
    line = math.log(evaluation.eps) if evaluation is not None and evaluation.n else -math.inf
    steps, half = np.linspace(left, right, 101), 12  # the words are as wide as 25 of these steps
    tops = [min([robust for eps, robust in attacked.items() if eps <= math.exp(x)], default=100) for x in steps]
    floors = [100 * (proven.at(math.exp(x)).value or 0) if proven else 0.0 for x in steps]
    room, place = 12.0, None  # percent: less than that is too low for a line of text
    for middle in range(half + 2, len(steps) - half):
        window = slice(middle - half, middle + half + 1)
        low, high = max(floors[window]), min(tops[window])
        crossed = steps[window][0] <= line <= steps[window][-1]
        if not crossed and high - low > room:
            room, place = high - low, (math.exp(steps[middle]), (low + high) / 2)
    if place is not None:
        axis.text(*place, "not known", ha="center", va="center", fontstyle="italic", alpha=0.8)


def _percent(rate: Rate) -> tuple[float, float, float]:
    """The rate and the ends of its 95 % interval, in percent; 0 to 100 % for a rate of nothing."""
    low, high = rate.interval or (0.0, 1.0)
    return 100 * (rate.value or 0.0), 100 * low, 100 * high


def _sides(result: LipschitzResult) -> dict[str, float]:
    """What a logarithmic axis can show of a norm's sensitivity, in the order of the legend."""
    sides = {"median": result.median_lower, "lower": result.lower, "upper": result.upper}
    if result.product is not None and result.upper is not None and result.product > result.upper:
        sides["product"] = result.product  # another argument gave less
    return {side: value for side, value in sides.items() if value is not None and drawable(value)}


def _draw_sensitivity(axis: Axes, y: int, sides: dict[str, float]) -> None:
    """One norm's row: median, largest found and certified, each number on the outer side of its mark."""
    ends = [value for side, value in sides.items() if side != "product"]
    if len(ends) > 1:
        axis.plot([min(ends), max(ends)], [y, y], color=INK, alpha=0.35, linewidth=1)
    for side in sorted(sides, key=["product", "median", "lower", "upper"].index):  # what comes later covers the others
        value = sides[side]
        axis.plot([value], [y], **SENSITIVITY_LOOKS[side])
        if side in ("lower", "upper"):
            away, end = (-3, "right") if side == "lower" else (3, "left")
            axis.annotate(number(value, side), (value, y), (away, 7), textcoords="offset points", ha=end, fontsize=8)
    missing = {"largest found": "lower" not in sides, "certified": "upper" not in sides}
    if any(missing.values()):
        names = " and ".join(name for name, gone in missing.items() if gone)
        remark(axis, [y + 0.3], f"{names}: not available", left=not missing["certified"])


def _draw_profiles(axis: Axes, profiles: dict[str, np.ndarray[Any, Any]]) -> None:
    """One line a profile; when there are many, only the extremes are coloured and named."""

    def line(name: str, **look: Any) -> Line2D:
        return axis.plot(np.linspace(0, 100, len(profiles[name])), profiles[name], **look)[0]

    notes = dict.fromkeys(profiles, "")
    if len(profiles) > NAMED_PROFILES:
        names = sorted(profiles, key=lambda name: float(profiles[name].mean()))
        notes = dict.fromkeys(names[:2], "steepest: ") | dict.fromkeys(names[-2:], "flattest: ")
    for name in [name for name in profiles if name not in notes]:
        line(name, color=INK, alpha=0.2, linewidth=0.7)
    looks = [(colour, dash) for dash in ("-", (0, (3, 1))) for colour in SERIES]
    lines = [line(n, color=c, linestyle=dash, linewidth=1.6) for n, (c, dash) in zip(notes, looks, strict=False)]
    legend(axis, lines, [note + short(name) for name, note in notes.items()])
