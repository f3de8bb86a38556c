"""The tables of an audit for papers and model cards: accuracies and layers, in Markdown and in LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from brittle.results import FRACTIONS, Audit, LayerResult, Rate
from brittle.results.wording import budget, norm_name, number, printable, share

TENTH = FRACTIONS.index(0.10)
"""Place of the largest tenth of a layer's values among its k-term errors."""
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#&~])")
LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "ℓ₁": r"$\ell_1$", "ℓ₂": r"$\ell_2$", "ℓ∞": r"$\ell_\infty$", "∞": r"$\infty$", "×": r"$\times$", "–": "--",
    "\N{NO-BREAK SPACE}": "~", " %": r"~\%", "“": "``", "”": "''",
}  # fmt: skip
"""What stands in LaTeX for signs that act there, and for those that its fonts lack."""
POWERS = "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"


@dataclass(frozen=True)
class Table:
    """Texts in rows and columns.

    Attributes:
        caption: What is shown, in a sentence.
        head: Names of the columns; the first holds names, the others numbers.
        rows: Texts, as many a row as there are columns.
    """

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def accuracies(audit: Audit) -> Table | None:
    """Clean, robust and certified accuracy, one row a norm; None without an attack."""
    measured = [(norm, norm.evaluation) for norm in audit.norms if norm.evaluation]
    if not measured:
        return None
    rows = [
        (
            norm_name(found.p),
            budget(found.eps),
            f"{found.n:,}",
            _rate(found.clean_accuracy),
            _rate(found.robust_accuracy),
            "–" if norm.proven is None else norm.proven.percent,
        )
        for norm, found in measured
    ]
    head = ("Norm", "Budget", "Samples", "Clean accuracy", "Robust accuracy", "Certified accuracy")
    attacks = ", ".join(dict.fromkeys(name for _, found in measured for name in found.attacks))
    return Table(
        f"Accuracies of {audit.model}, with 95 % intervals. Robust accuracy is an upper estimate, by {attacks}; "
        "budgets in input units.",
        head,
        tuple(rows),
    )


def layers(audit: Audit) -> Table:
    """Compressibility and operator norms, one row a layer."""
    head = (
        "Layer", "Shape", "Parameters", "ℓ₂ norm", "ℓ∞ norm", "Row error (10 %)", "Spectral error (10 %)",
        "Stable rank", "Rank",
    )  # fmt: skip
    caption = (
        f"Layers of {audit.model}. The norms are operator norms; the errors are relative k-term errors of row norms "
        "and singular values with the largest tenth kept."
    )
    return Table(caption, head, tuple(map(_layer, audit.layers)))


def _layer(layer: LayerResult) -> tuple[str, ...]:
    rows, columns = layer.shape
    return (
        layer.name,
        f"{rows} × {columns}",
        f"{layer.parameters:,}",
        _norm(layer, 2.0),
        _norm(layer, math.inf),
        share(layer.row_error[TENTH]),
        share(layer.spectral_error[TENTH]),
        number(layer.stable_rank),
        f"{layer.rank:,}",
    )


def _norm(layer: LayerResult, p: float) -> str:
    """An operator norm, or the bounds that it lies between."""
    norm = layer.operator_norm(p)
    if norm is None:
        return "–"
    return number(norm.upper) if norm.exact else f"{number(norm.lower, 'lower')} to {number(norm.upper, 'upper')}"


def _rate(rate: Rate) -> str:
    """A share with its interval."""
    if rate.interval is None:
        return rate.percent
    low, high = rate.interval
    return f"{rate.percent} ({100 * low:.1f} to {100 * high:.1f})"


def in_markdown(text: str) -> str:
    r"""A text in which nothing acts in Markdown or HTML.

    >>> in_markdown("fc_1 <b> | #2")
    'fc\\_1 \\<b\\> \\| \\#2'
    """
    return MARKDOWN.sub(r"\\\1", printable(text))


def in_latex(text: str) -> str:
    r"""A text in which nothing acts in LaTeX, and every sign has a font.

    >>> in_latex("ℓ∞ norm of fc_1: 3.21 × 10¹⁷, 5 %")
    '$\\ell_\\infty$ norm of fc\\_1: 3.21 $\\times$ $10^{17}$, 5~\\%'
    """
    powers = re.compile(f"(?<!\\d)10([{POWERS}]+)")
    signs = re.compile("|".join(map(re.escape, sorted(LATEX, key=len, reverse=True))))
    plain = str.maketrans(POWERS, "-0123456789")
    parts = powers.split(printable(text))  # text and exponents by turns
    return "".join(
        f"$10^{{{part.translate(plain)}}}$" if place % 2 else signs.sub(lambda sign: LATEX[sign[0]], part)
        for place, part in enumerate(parts)
    )


def markdown_table(table: Table) -> str:
    """The table in Markdown, numbers to the right; without its caption."""
    rule = ("---", *["---:"] * (len(table.head) - 1))
    rows = [list(map(in_markdown, row)) for row in table.rows]
    lines: Iterable[Iterable[str]] = (map(in_markdown, table.head), rule, *rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def latex_table(table: Table) -> str:
    """The table in LaTeX, with its caption; it needs the package booktabs."""
    frame = pd.DataFrame([list(map(in_latex, row)) for row in table.rows], columns=list(map(in_latex, table.head)))
    columns = "l" + "r" * (len(table.head) - 1)
    return frame.to_latex(
        index=False, escape=False, caption=in_latex(table.caption), column_format=columns, position="t"
    )
