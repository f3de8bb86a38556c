"""What a notebook shows of a result: a short card, and the figures of its page by their names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup, escape
from matplotlib.figure import Figure

from brittle.errors import InputError
from brittle.reporting.comparison import FIGURES as COMPARISON_FIGURES
from brittle.reporting.comparison_words import headline
from brittle.reporting.page import FIGURES
from brittle.reporting.verdict import short_findings
from brittle.results import Audit, Comparison, Evaluation
from brittle.results.wording import all_printable, budget, norm_name, number


@functools.singledispatch
def card_html(result: object) -> str:
    """A result in short: a sentence, and a small table.

    Raises:
        TypeError: The result is of a kind that has no card.
    """
    raise TypeError(f"{type(result).__name__} has no card")


@card_html.register
def _(result: Audit) -> str:
    audit = all_printable(result)
    found = Markup("").join(Markup("<li>{}</li>").format(text) for text in short_findings(audit))
    head = Markup("<p><strong>{}</strong>: {}</p><ul>{}</ul>").format(audit.model, audit.verdict.headline, found)
    return str(head + _table(RATES, [_rates(norm.evaluation) for norm in audit.norms if norm.evaluation]))


@card_html.register
def _(result: Evaluation) -> str:
    evaluation = all_printable(result)
    return str(_table(RATES, [_rates(evaluation)]))


@card_html.register
def _(result: Comparison) -> str:
    comparison = all_printable(result)
    budgets = [(e.p, e.eps) for e in comparison.first.evaluations]
    heads = ["Network", "Parameters", *(["Clean accuracy"] if budgets else [])]
    heads += [f"Robust accuracy, {norm_name(p)} {budget(eps)}" for p, eps in budgets]
    rows = []
    for network in comparison.networks:
        robust = [network.robust(p) for p, _ in budgets]
        rates = [network.clean, *robust] if budgets else []
        rows.append([network.name, f"{network.audit.parameters:,}", *(rate.percent if rate else "–" for rate in rates)])
    return str(Markup("<p><strong>{}</strong></p>").format(headline(comparison)) + _table(heads, rows))


RATES = ("Budget", "Samples", "Clean accuracy", "Robust accuracy (at most)", "Median margin")


def _rates(e: Evaluation) -> list[str]:
    clean, robust = e.clean_accuracy.percent, e.robust_accuracy.percent
    return [f"{norm_name(e.p)} {budget(e.eps)}", f"{e.n:,}", clean, robust, number(e.median_margin)]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    if not rows:
        return Markup("")

    def line(cells: Sequence[str], tag: str) -> Markup:
        return Markup("<tr>{}</tr>").format(
            Markup("").join(Markup(f"<{tag}>{{}}</{tag}>").format(escape(cell)) for cell in cells)
        )

    body = Markup("").join(line(row, "td") for row in rows)
    return Markup("<table><thead>{}</thead><tbody>{}</tbody></table>").format(line(heads, "th"), body)


def named_figure(result: Audit | Comparison, name: str | None, *, narrow: bool = False) -> Figure:
    """A figure of the page of an audit or a comparison.

    Args:
        result: What is drawn.
        name: Which figure; None for the first that there is.
        narrow: Whether panels stand one below the other.

    Raises:
        InputError: There is no figure of that name, or nothing that it could show was measured.
    """
    draws: Mapping[str, Callable[..., Figure | None]] = FIGURES if isinstance(result, Audit) else COMPARISON_FIGURES
    if name is not None and name not in draws:
        raise InputError(f"name: expected one of {', '.join(draws)}; got {name!r}")
    shown = all_printable(result)
    for tried in draws if name is None else [name]:
        figure = draws[tried](shown, narrow=narrow)
        if figure is not None:
            return figure
    raise InputError(f"name: expected a figure of what was measured; got {name or 'none that there is'}")
