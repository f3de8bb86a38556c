"""An audit as one HTML file that holds everything it needs: text, figures, the layer table and the data itself."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from brittle.reporting import figures
from brittle.reporting.advice import advice
from brittle.reporting.columns import VISIBLE_GROUPS, layer_columns
from brittle.reporting.drawing import svg
from brittle.reporting.glossary import glossary_of
from brittle.reporting.pictures import attacked_rows, direction_pictures, universal_pictures
from brittle.reporting.verdict import doubts, short_findings
from brittle.reporting.weighing import CONCENTRATED, uses
from brittle.results import Audit, FeatureCompression, Setting
from brittle.results.wording import all_printable, budget, duration, norm_name, number, share
from brittle.storage.files import write_text

FIGURES = {
    "security_curve": figures.draw_security_curve,
    "certificate": figures.draw_certificate,
    "layer_norms": figures.draw_layer_norms,
    "spectra": figures.draw_spectra,
    "compressibility": figures.draw_compressibility,
    "sensitivity": figures.draw_sensitivity,
    "directions": figures.draw_directions,
    "features": figures.draw_features,
    "feature_pairs": figures.draw_feature_pairs,
    "universal": figures.draw_universal,
}
"""What draws each figure, by the name that the page's template has for it."""
BEST_BOUNDS = 3
"""Bounds of the sensitivity, the least first, that are visible at once."""
WORST_CLASSES = 20
"""Classes at most that have a row, those of the lowest robust accuracy."""
CLASS_PAIRS = 5
"""Pairs of classes at most that have a row of their own."""


def report_html(audit: Audit) -> str:
    """The report: one HTML page without references to anything outside it; the same audit gives the same text."""
    # JSON that cannot close the <script> it stands in; it parses to the same document.
    data = audit.to_json().replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    audit = all_printable(audit)
    columns = layer_columns(audit.layers)
    flags = [*audit.flags, *(flag for norm in audit.norms for flag in norm.flags)]
    in_doubt = doubts(audit.norms, audit.flags)
    checks = dict.fromkeys(flag.name for flag in flags)
    reasons = dict.fromkeys(item.reason for item in audit.not_measured)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            audit=audit,
            figure=drawings(FIGURES, audit),
            short=short_findings(audit),
            advice=advice(audit),
            attacked_rows=attacked_rows(audit),
            direction_pictures=direction_pictures(audit),
            universal_pictures=universal_pictures(audit),
            best_bounds=BEST_BOUNDS,
            worst_classes=WORST_CLASSES,
            columns=columns,
            flags=flags,
            deciding=next(
                (norm for norm in audit.norms if norm.evaluation and norm.p == audit.verdict.decided_by), None
            ),
            weighed={norm.p: found for norm in audit.norms if (found := uses(norm, audit.layers))},
            concentrated=CONCENTRATED,
            raised=[flag for flag in flags if flag.raised],
            doubted=[p for p, raised in in_doubt.items() if raised],
            checks={name: [flag for flag in flags if flag.name == name] for name in checks},
            class_pairs=_class_pairs(audit.features) if audit.features else [],
            groups=list(dict.fromkeys(column.group for column in columns)),
            shown=VISIBLE_GROUPS,
            reasons={why: [item.name for item in audit.not_measured if item.reason == why] for why in reasons},
            glossary=glossary_of(audit, [column.term for column in columns]),
            data=Markup(data),
        )
    )


def drawings(draws: Mapping[str, Callable[..., Figure | None]], result: object) -> dict[str, dict[str, Markup]]:
    """Every figure of a page as SVG, by name: ``wide``, and ``narrow`` for a phone; without those that there are not.

    Args:
        draws: What draws each figure, by name.
        result: What is drawn.
    """
    drawn: dict[str, dict[str, Markup]] = {}
    for name, draw in draws.items():
        figures = {width: draw(result, narrow=width == "narrow") for width in ("wide", "narrow")}
        shown = {width: Markup(svg(figure)) for width, figure in figures.items() if figure is not None}
        if shown:
            drawn[name] = shown
    return drawn


def write_report(audit: Audit, path: str | Path) -> None:
    """Write :func:`report_html` to ``path`` as UTF-8, whole or not at all."""
    write_text(Path(path), report_html(audit))


def environment() -> Environment:
    """Templates of the pages, escaping by default, with the filters that write numbers, norms and budgets."""
    environment = Environment(
        loader=PackageLoader("brittle.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "budget": budget,
        "count": "{:,}".format,
        "duration": duration,
        "p_value": lambda value: "< 0.001" if value < 0.001 else f"{value:.3f}",
        "norm": norm_name,
        "number": number,
        # The exact value for sorting and for the CSV, with JavaScript's spelling of infinity.
        "raw": lambda cell: "" if cell is None else "Infinity" if cell == math.inf else str(cell),
        "setting": _setting,
        "share": share,
        # What the page's content security policy calls its own script.
        "sha256": lambda script: base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        # Keeps a percent sign on the line of its number.
        "tie": lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%"),
    }
    return environment


def _class_pairs(features: FeatureCompression) -> list[tuple[str, FeatureCompression]]:
    """All pairs of samples, then those of the classes that are neighbours most often."""
    frequent = list(features.by_classes.items())[:CLASS_PAIRS]
    return [("all", features), *((f"{one} and {other}", part) for (one, other), part in frequent)]


def _setting(value: Setting) -> str:
    if isinstance(value, tuple):
        return ", ".join(_setting(entry) for entry in value) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return value if isinstance(value, str) else "∞" if value == math.inf else f"{value:.6g}"
