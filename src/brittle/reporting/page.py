"""An audit as one HTML file that holds everything it needs: text, figures, the layer table and the data itself."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter, methodcaller
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from brittle.reporting import figures
from brittle.reporting.drawing import svg
from brittle.results import (
    FRACTIONS,
    Audit,
    LayerBound,
    LayerResult,
    NormBounds,
    Setting,
)
from brittle.results.wording import budget, norm_name, number
from brittle.storage.files import write_text

BOUND_FRACTION = 0.10
"""Fraction kept at which the layer table states Theorem 3.1; the embedded data hold all of them."""

Cell = float | int | str | None


@dataclass(frozen=True)
class Column:
    """One column of the layer table.

    Attributes:
        group: Columns of one group are shown and hidden together.
        head: What stands above the column.
        key: Its name in the CSV, as in :meth:`brittle.results.Audit.to_frame` where that has it.
        term: The glossary's entry that explains it.
        value: What a layer has in it; None for nothing.
        text: The same as it is printed.
    """

    group: str
    head: str
    key: str
    term: str
    value: Callable[[LayerResult], Cell]
    text: Callable[[LayerResult], str]


def report_html(audit: Audit) -> str:
    """The report: one HTML page without references to anything outside it; the same audit gives the same text."""
    drawn = {name: draw(audit) for name, draw in FIGURES.items()}
    columns = list(_columns(audit))
    flags = [*audit.flags, *(flag for norm in audit.norms for flag in norm.flags)]
    reasons: dict[str, list[str]] = {}
    for item in audit.not_measured:
        reasons.setdefault(item.reason, []).append(item.name)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            audit=audit,
            figure={name: Markup(svg(figure)) for name, figure in drawn.items() if figure is not None},
            columns=columns,
            flags=flags,
            checks={
                name: [flag for flag in flags if flag.name == name] for name in dict.fromkeys(f.name for f in flags)
            },
            groups=list(dict.fromkeys(column.group for column in columns)),
            shown=SHOWN,
            reasons=reasons,
            glossary=_glossary(audit, columns),
            data=Markup(_json_in_html(audit.to_json())),
        )
    )


def write_report(audit: Audit, path: str | Path) -> None:
    """Write :func:`report_html` to ``path`` as UTF-8, whole or not at all."""
    write_text(Path(path), report_html(audit))


def environment() -> Environment:
    """Templates of the pages, escaping by default, with the filters that write numbers, norms and budgets."""
    loader = PackageLoader("brittle.reporting")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "budget": budget, "count": _count, "duration": _duration, "norm": norm_name, "number": number,
        "raw": _raw, "setting": _setting, "sha256": _sha256, "tie": _tie,
    }  # fmt: skip
    return environment


def _json_in_html(text: str) -> str:
    """JSON that cannot close the ``<script>`` it stands in; it parses to the same document."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _sha256(script: Markup) -> str:
    """What the page's content security policy calls its own script."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _tie(text: str) -> str:
    """Keep a percent sign on the line of its number."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _count(value: int) -> str:
    return f"{value:,}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _setting(value: Setting) -> str:
    if isinstance(value, tuple):
        return ", ".join(_setting(entry) for entry in value) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return value if isinstance(value, str) else "∞" if value == math.inf else f"{value:.6g}"


def _raw(value: Cell) -> str:
    """The exact value for sorting and for the CSV; JavaScript's spelling of infinity."""
    if value is None:
        return ""
    return "Infinity" if value == math.inf else str(value)


def _share(value: float | None) -> str:
    """A number in [0, 1] with three decimals; ``0`` and ``1`` are printed only when exactly true.

    >>> _share(0.0), _share(0.0001), _share(0.25), _share(0.9999), _share(1.0)
    ('0', '<0.001', '0.250', '>0.999', '1')
    """
    if value is None or value in (0, 1):
        return "–" if value is None else f"{value:g}"
    text = f"{value:.3f}"
    return {"0.000": "<0.001", "1.000": ">0.999"}.get(text, text)


def _lower(value: float | None) -> str:
    return number(value, "lower")


def _upper(value: float | None) -> str:
    return number(value, "upper")


def _column(
    group: str, head: str, key: str, term: str, value: Callable[[LayerResult], Cell], show: Callable[[Any], str]
) -> Column:
    return Column(group, head, key, term, value, lambda layer: show(value(layer)))


def _columns(audit: Audit) -> Iterator[Column]:
    places = {layer.name: place for place, layer in enumerate(audit.layers, 1)}
    yield _column("Layer", "Layer", "name", "Layer", lambda layer: layer.name, str)
    yield _column("Layer", "No.", "number", "No.", lambda layer: places[layer.name], str)
    yield _column("Layer", "Type", "kind", "Type", lambda layer: layer.kind, str)
    yield _column("Layer", "Rows", "rows", "Shape", lambda layer: layer.shape[0], _count)
    yield _column("Layer", "Columns", "columns", "Shape", lambda layer: layer.shape[1], _count)
    yield _column("Layer", "Parameters", "parameters", "Parameters", lambda layer: layer.parameters, _count)
    for group, field, term in PROFILES:
        for place, fraction in enumerate(FRACTIONS):
            percent = f"{100 * fraction:.0f}"
            head, key = f"{percent}\N{NO-BREAK SPACE}%", f"{field}_{percent}pct"
            yield _column(group, head, key, term, _entry(field, place), _share)
    for head, field in RANKS.items():
        yield _column("Ranks", head, field, head, attrgetter(field), _rank)
    yield from _norm_columns(audit)
    for p in sorted({bound.p for layer in audit.layers for bound in layer.bounds}, reverse=True):
        yield from _theorem_columns(p)


def _entry(field: str, place: int) -> Callable[[LayerResult], Cell]:
    return lambda layer: getattr(layer, field)[place]


def _rank(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.1f}" if value < 1e4 else f"{value:.0f}"


def _norm_columns(audit: Audit) -> Iterator[Column]:
    group = "Norms"
    yield _column(group, "‖W‖F", "frobenius", "Frobenius norm ‖W‖F", lambda layer: layer.frobenius, number)
    yield _column(group, "‖W‖∞", "filter_norm_inf", "Matrix norm", lambda layer: layer.filter_norm_inf, number)
    yield _column(group, "‖W‖₂", "filter_norm_2", "Matrix norm", lambda layer: layer.filter_norm_2, number)
    for p in (math.inf, 2.0):
        head, key = f"{norm_name(p)} concen\N{SOFT HYPHEN}tration", f"concentration_{p:g}"
        yield _column(group, head, key, "Concentration", methodcaller("concentration", p), number)
    for p in sorted({norm.p for layer in audit.layers for norm in layer.operator_norms}, reverse=True):
        for side in ("lower", "upper", "method"):
            key, head = f"operator_norm_{p:g}_{side}", f"{norm_name(p)} operator, {side}"
            yield Column(group, head, key, "Operator norm", *_operator_norm(p, side))


def _operator_norm(p: float, side: str) -> tuple[Callable[[LayerResult], Cell], Callable[[LayerResult], str]]:
    def find(layer: LayerResult) -> NormBounds | None:
        return next((norm for norm in layer.operator_norms if norm.p == p), None)

    def value(layer: LayerResult) -> Cell:
        norm = find(layer)
        return None if norm is None else _method(norm) if side == "method" else float(getattr(norm, side))

    def text(layer: LayerResult) -> str:
        norm, found = find(layer), value(layer)
        return found if isinstance(found, str) else number(found, side if norm and not norm.exact else "nearest")

    return value, text


def _method(norm: NormBounds) -> str:
    return norm.method if not norm.exact else "exact" if norm.method == "exact" else f"exact ({norm.method})"


def _theorem_columns(p: float) -> Iterator[Column]:
    group = f"Theorem 3.1, {norm_name(p)}, {100 * BOUND_FRACTION:g} % kept"
    for head, key, term, value, show in THEOREM:
        yield _column(group, head, key.format(p=f"{p:g}"), term, _of_bound(p, value), show)


def _exact_factor(bound: LayerBound) -> Cell:
    return bound.norm / bound.scale if bound.scale else None


def _of_bound(p: float, value: Callable[[LayerBound], Cell]) -> Callable[[LayerResult], Cell]:
    def of_layer(layer: LayerResult) -> Cell:
        return value(layer.bound(p, BOUND_FRACTION)) if any(bound.p == p for bound in layer.bounds) else None

    return of_layer


def _glossary(audit: Audit, columns: list[Column]) -> dict[str, str]:
    """The terms that this report uses, in their order of appearance."""
    used = [column.term for column in columns] if audit.layers else []
    used = [
        *(ATTACK_TERMS if any(norm.evaluation for norm in audit.norms) else ()),
        *(CERTIFIED_TERMS if any(norm.certified for norm in audit.norms) else ()),
        *used,
    ]
    used += ["Sensitivity (Lipschitz constant)"] if audit.norms else []
    tried = {name for norm in audit.norms for name, _ in norm.lipschitz.arguments}
    used += [name for name in ARGUMENTS if name in tried]
    responses = any(norm.responses for norm in audit.norms)
    used += ["Isotropic share", "Relative change of the output"] if responses else []
    used += ["Universal perturbation"] if any(norm.universal for norm in audit.norms) else []
    return {term: GLOSSARY[term] for term in dict.fromkeys(used) if term in GLOSSARY}


FIGURES = {
    "security_curve": figures.security_curve,
    "certificate": figures.certificate,
    "layer_norms": figures.layer_norms,
    "spectra": figures.spectra,
    "compressibility": figures.compressibility,
    "sensitivity": figures.sensitivity,
    "directions": figures.directions,
    "universal": figures.universal,
}
SHOWN = ("Layer", "Row k-term error", "Spectral k-term error", "Norms")
"""Groups of columns that are visible at first."""
PROFILES = (
    ("Row k-term error", "row_error", "k-term error"),
    ("Spectral k-term error", "spectral_error", "k-term error"),
    ("Row spread", "row_spread", "Spread"),
    ("Spectral spread", "spectral_spread", "Spread"),
)
RANKS = {
    "Rank": "rank",
    "Stable rank": "stable_rank",
    "Effective rank": "effective_rank",
    "‖W‖∗ / ‖W‖₂": "nuclear_spectral_ratio",
    "(‖W‖∗ / ‖W‖F)²": "nuclear_frobenius_ratio",
    "Effective sparsity": "effective_sparsity",
}
THEOREM: tuple[tuple[str, str, str, Callable[[LayerBound], Cell], Callable[[Any], str]], ...] = (
    ("scale ‖W‖F", "scale_{p}", "Frobenius norm ‖W‖F", attrgetter("scale"), number),
    ("factor, lower", "structure_{p}_lower_10pct", "Structure factor", attrgetter("lower"), _lower),
    ("factor, exact", "structure_{p}_exact", "Structure factor", _exact_factor, number),
    ("factor, upper (sharp)", "structure_{p}_sharp_10pct", "Structure factor", attrgetter("sharp"), _upper),
    ("factor, upper (linear)", "structure_{p}_linear_10pct", "Structure factor", attrgetter("linear"), _upper),
    ("factor, upper (paper)", "structure_{p}_paper_10pct", "Structure factor", attrgetter("paper"), _upper),
    ("norm, lower bound", "bound_{p}_lower_10pct", "Theorem 3.1", lambda b: b.lower * b.scale, _lower),
    ("norm, exact", "bound_{p}_exact", "Theorem 3.1", attrgetter("norm"), number),
    ("norm, upper bound (sharp)", "bound_{p}_sharp_10pct", "Theorem 3.1", lambda b: b.sharp * b.scale, _upper),
)
ATTACK_TERMS = ("Clean accuracy", "Robust accuracy", "Budget eps", "95 % interval", "Fooling rate", "Masked gradients")
CERTIFIED_TERMS = ("Certified accuracy", "Certified radius")
ARGUMENTS = {
    "product of norms": "The layers' operator norms, multiplied along the network. It ignores how layers fit together.",
    "multipliers": (
        "Gram matrices passed through the network from one end to the other, with weights that use that an"
        " activation's slopes lie in an interval."
    ),
    "chain": "Largest entry of |W_L| ⋯ |W₁| 1: the magnitudes of the weights, multiplied from layer to layer.",
    "path": "Norm of (|W_L ⋯ W₁| + |W_L| ⋯ |W₁|) / 2: halfway between the chain and the network made linear.",
    "cross norm": "The least bound in the other norm, times the root of the number of inputs (ℓ∞) or of logits (ℓ₂).",
    "paper form": "Theorem 3.2 with every layer's norm bounded by Theorem 3.1 in the paper's form.",
    "sharp form": "Theorem 3.2 with every layer's norm bounded by Theorem 3.1 in the sharp form.",
    "exact norms, disjoint pairs": (
        "Theorem 3.2 with exact norms (ℓ∞): their product, times the alignments of the best pairs of neighbouring"
        " layers that share none."
    ),
    "exact norms, all pairs": (
        "Theorem 3.2 with exact norms (ℓ₂): their product, times the alignments of all pairs of neighbouring layers."
    ),
    "ends": "The same with the whole spectra of the first and the last layer put into their one alignment.",
    "exponents": "The same with every layer's spectrum shared out best between its two neighbours.",
    "segments": "The network cut into contiguous segments in the best way, and the bounds of the segments multiplied.",
    "weighted segments": "The segments bound, with every coordinate's movement followed by itself.",
}
GLOSSARY = {
    "Clean accuracy": "Share of the samples that the model classifies correctly without attack.",
    "Robust accuracy": (
        "Share of the samples that stay correct under every attack that was run. An upper estimate of the true"
        " value: an attack may miss an adversarial example, but each one counted was checked again."
    ),
    "Budget eps": "Largest size of the perturbation in the stated norm, in input units.",
    "95 % interval": "Wilson's interval for the underlying probability, samples taken as independent draws.",
    "Fooling rate": "Share of the samples right without attack whose predicted class changes under attack.",
    "Masked gradients": (
        "Gradients that are zero, random or misleading, so that attacks which follow them fail although adversarial"
        " examples are near: the network looks more robust than it is."
    ),
    "Certified accuracy": (
        "Share of the samples that are right without attack and whose certified radius exceeds the budget. A lower"
        " bound of the true robust accuracy, whatever the attack."
    ),
    "Certified radius": (
        "Distance, in input units, within which no perturbation can change the prediction: the margin over the"
        " certified bound on how fast the margin can move."
    ),
    "Layer": "Qualified name of the module in the model.",
    "No.": "Position of the layer in the order in which the model lists its modules.",
    "Type": "Type of the module, with what makes its matrix special.",
    "Shape": "Rows are output neurons or filters; columns are the inputs that each of them weighs.",
    "Parameters": "Weight entries stored.",
    "k-term error": (
        "What is lost, as a share of the ℓ₁ norm, when only the largest 5, 10, 25 or 50 % are kept: of the rows' ℓ₁"
        " norms (row) or of the singular values (spectral). 0: perfectly compressible; 1 − fraction: all are equal."
    ),
    "Spread": "1 − (k-th largest / largest) among the entries kept. 0: all kept are equal; 1: some kept are zero.",
    "Rank": "Singular values above 10⁻¹⁰ of the largest.",
    "Stable rank": "‖W‖F² / ‖W‖₂²: between 1 and the rank, small when few directions dominate.",
    "Effective rank": "Exponential of the entropy of the normalised singular values (Roy and Vetterli, 2007).",
    "‖W‖∗ / ‖W‖₂": "Sum of the singular values over the largest: between 1 and the rank.",
    "(‖W‖∗ / ‖W‖F)²": "Squared ratio of the nuclear and the Frobenius norm: between 1 and the rank.",
    "Effective sparsity": "(Σ|Wᵢⱼ| / ‖W‖F)²: between 1 and the number of non-zero entries.",
    "Frobenius norm ‖W‖F": "Root of the sum of squared entries; the scale of the matrix.",
    "Matrix norm": (
        "‖W‖∞ is the largest row ℓ₁ norm and ‖W‖₂ the largest singular value, both exact. For a convolution they are"
        " norms of the filter matrix, not of the operator on images."
    ),
    "Concentration": (
        "How many times the matrix norm exceeds that of a flat matrix of the same shape and Frobenius norm: equal"
        " singular values for ℓ₂ (at least 1), entries of equal magnitude for ℓ∞ (below 1 where rows are sparse and"
        " equally large)."
    ),
    "Operator norm": (
        "Largest factor by which the layer can magnify an input in the stated norm, for convolutions on images of the"
        " size seen. Certified from below (lower) and above (upper); where the two coincide, it is exact."
    ),
    "Structure factor": (
        "The part of the bounds of Theorem 3.1 that depends on compressibility alone and not on the scale:"
        " lower ≤ exact ≤ sharp ≤ linear ≤ paper. The paper's form is ∞ when an entry kept is zero."
    ),
    "Theorem 3.1": "Structure factor × scale: certified bounds on the matrix norm, beside its exact value.",
    "Sensitivity (Lipschitz constant)": (
        "Largest change of the logits per change of the input, in the stated norm. The true value lies between the"
        " largest found and the least certified bound."
    ),
    **ARGUMENTS,
    "Isotropic share": "Energy that a perturbation without preferred direction would have in as many directions.",
    "Relative change of the output": "Median of ‖z_adv − z‖₂ / ‖z‖₂ at the layer's output.",
    "Universal perturbation": (
        "One perturbation for all inputs. Fitted: by ascent on one half of the data. Data-free: the direction that"
        " moves the first layer's output most, read from its weights, or an estimate of it where the layer is not"
        " dense; only its sign is chosen on that half. All are judged on the other half, beside random ones of equal"
        " size. A larger share of changed predictions may exist: each is an estimate from below of the worst."
    ),
}
