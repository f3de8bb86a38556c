"""The columns of a report's layer table: what stands above each, what it holds and how that is printed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, methodcaller
from typing import Any

from brittle.results import FRACTIONS, LayerBound, LayerResult
from brittle.results.methods import OperatorMethod
from brittle.results.wording import norm_name, number

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

    @staticmethod
    def of(
        group: str, head: str, key: str, term: str, value: Callable[[LayerResult], Any], show: Callable[[Any], str]
    ) -> Column:
        """A column whose text follows from its value alone."""
        return Column(group, head, key, term, value, lambda layer: show(value(layer)))


VISIBLE_GROUPS = ("Layer", "Row k-term error", "Spectral k-term error", "Norms")
"""Groups of columns that are visible at first."""
PROFILES = (
    ("Row k-term error", "row_error", "k-term error"),
    ("Spectral k-term error", "spectral_error", "k-term error"),
    ("Row spread", "row_spread", "Spread"),
    ("Spectral spread", "spectral_spread", "Spread"),
)
"""What is shown at each of the fractions kept: group, field of a layer, term."""
RANKS = {
    "Rank": "rank",
    "Stable rank": "stable_rank",
    "Effective rank": "effective_rank",
    "‖W‖∗ / ‖W‖₂": "nuclear_spectral_ratio",
    "(‖W‖∗ / ‖W‖F)²": "nuclear_frobenius_ratio",
    "Effective sparsity": "effective_sparsity",
}
"""Fields of a layer by their head, which is their term as well."""
NORMS = (
    Column.of("Norms", "‖W‖F", "frobenius", "Frobenius norm ‖W‖F", attrgetter("frobenius"), number),
    Column.of("Norms", "‖W‖∞", "filter_norm_inf", "Matrix norm", attrgetter("filter_norm_inf"), number),
    Column.of("Norms", "‖W‖₂", "filter_norm_2", "Matrix norm", attrgetter("filter_norm_2"), number),
    *(
        Column.of(
            "Norms",
            f"{norm_name(p)} concen\N{SOFT HYPHEN}tration",
            f"concentration_{p:g}",
            "Concentration",
            methodcaller("concentration", p),
            number,
        )
        for p in (math.inf, 2.0)
    ),
)
"""Norms of a layer's matrix and its concentration; those of its operator follow."""
THEOREM_FRACTION = 0.10
"""Fraction kept at which the layer table states Theorem 3.1; the embedded data hold all of them."""
THEOREM: tuple[tuple[str, str, str, str, Callable[[LayerBound], Cell]], ...] = (
    ("scale ‖W‖F", "nearest", "scale_{p}", "Frobenius norm ‖W‖F", attrgetter("scale")),
    ("factor, lower", "lower", "structure_{p}_lower_10pct", "Structure factor", attrgetter("lower")),
    (
        "factor, exact",
        "nearest",
        "structure_{p}_exact",
        "Structure factor",
        lambda b: b.norm / b.scale if b.scale else None,
    ),
    ("factor, upper (sharp)", "upper", "structure_{p}_sharp_10pct", "Structure factor", attrgetter("sharp")),
    ("factor, upper (linear)", "upper", "structure_{p}_linear_10pct", "Structure factor", attrgetter("linear")),
    ("factor, upper (paper)", "upper", "structure_{p}_paper_10pct", "Structure factor", attrgetter("paper")),
    ("norm, lower bound", "lower", "bound_{p}_lower_10pct", "Theorem 3.1", lambda b: b.lower * b.scale),
    ("norm, exact", "nearest", "bound_{p}_exact", "Theorem 3.1", attrgetter("norm")),
    ("norm, upper bound (sharp)", "upper", "bound_{p}_sharp_10pct", "Theorem 3.1", lambda b: b.sharp * b.scale),
)
"""Columns of Theorem 3.1 in a norm: head, side to which it is rounded, key, term, value."""


def layer_columns(layers: Sequence[LayerResult]) -> list[Column]:
    """All columns of the table of some layers, in their order."""

    def share(layer: LayerResult, field: str, place: int) -> float:
        return float(getattr(layer, field)[place])

    number_of = {layer.name: place for place, layer in enumerate(layers, 1)}
    count = "{:,}".format
    columns = [
        Column.of("Layer", "Layer", "name", "Layer", attrgetter("name"), str),
        Column.of("Layer", "No.", "number", "No.", lambda layer: number_of[layer.name], str),
        Column.of("Layer", "Type", "kind", "Type", attrgetter("kind"), str),
        Column.of("Layer", "Rows", "rows", "Shape", lambda layer: layer.shape[0], count),
        Column.of("Layer", "Columns", "columns", "Shape", lambda layer: layer.shape[1], count),
        Column.of("Layer", "Parameters", "parameters", "Parameters", attrgetter("parameters"), count),
    ]
    for group, field, term in PROFILES:
        for place, fraction in enumerate(FRACTIONS):
            head, key = f"{100 * fraction:.0f}\N{NO-BREAK SPACE}%", f"{field}_{100 * fraction:.0f}pct"
            columns.append(Column.of(group, head, key, term, partial(share, field=field, place=place), share_text))
    if any(layer.head_norms for layer in layers):
        columns += head_columns()
    columns += [Column.of("Ranks", head, field, head, attrgetter(field), rank_text) for head, field in RANKS.items()]
    columns += NORMS
    for p in sorted({norm.p for layer in layers for norm in layer.operator_norms}, reverse=True):
        columns += operator_columns(p)
    for p in sorted({bound.p for layer in layers for bound in layer.bounds}, reverse=True):
        columns += theorem_columns(p)
    return columns


def head_columns() -> Iterator[Column]:
    """Of layers whose rows belong to attention heads: their number, and the k-term error of their norms."""

    def error(layer: LayerResult, place: int) -> float | None:
        return layer.head_error[place] if layer.head_error else None

    yield Column.of("Heads", "Heads", "heads", "Heads", lambda layer: len(layer.head_norms) or None, count_text)
    for place, fraction in enumerate(FRACTIONS):
        head, key = f"{100 * fraction:.0f}\N{NO-BREAK SPACE}%", f"head_error_{100 * fraction:.0f}pct"
        yield Column.of("Heads", head, key, "k-term error", partial(error, place=place), share_text)


def operator_columns(p: float) -> Iterator[Column]:
    """The bounds of the operator norm in the norm ``p``, each rounded to its side where they differ."""
    name, key = f"{norm_name(p)} operator", f"operator_norm_{p:g}"

    def value(layer: LayerResult, side: str) -> float | None:
        norm = layer.operator_norm(p)
        return None if norm is None else float(getattr(norm, side))

    def text(layer: LayerResult, side: str) -> str:
        norm = layer.operator_norm(p)
        return number(value(layer, side), "nearest" if norm is None or norm.exact else side)

    def method(layer: LayerResult) -> str | None:
        norm, exact = layer.operator_norm(p), OperatorMethod.EXACT
        if norm is None:
            return None
        return f"{exact} ({norm.method})" if norm.exact and norm.method != exact else norm.method

    for side in ("lower", "upper"):
        of_layer, as_text = partial(value, side=side), partial(text, side=side)
        yield Column("Norms", f"{name}, {side}", f"{key}_{side}", "Operator norm", of_layer, as_text)
    yield Column.of(
        "Norms", f"{name}, method", f"{key}_method", "Operator norm", method, lambda m: "–" if m is None else m
    )


def theorem_columns(p: float) -> Iterator[Column]:
    """Theorem 3.1 in the norm ``p``, empty for layers without bounds in it."""
    group = f"Theorem 3.1, {norm_name(p)}, {100 * THEOREM_FRACTION:g} % kept"

    def value(layer: LayerResult, of_bound: Callable[[LayerBound], Cell]) -> Cell:
        return of_bound(layer.bound(p, THEOREM_FRACTION)) if any(bound.p == p for bound in layer.bounds) else None

    for head, side, key, term, of_bound in THEOREM:
        of_layer = partial(value, of_bound=of_bound)
        yield Column.of(group, head, key.format(p=f"{p:g}"), term, of_layer, partial(number, side=side))


def share_text(value: float | None) -> str:
    """A number in [0, 1] with three decimals; ``0`` and ``1`` are printed only when exactly true.

    >>> share_text(0.0), share_text(0.0001), share_text(0.25), share_text(0.9999), share_text(1.0)
    ('0', '<0.001', '0.250', '>0.999', '1')
    """
    if value is None or value in (0, 1):
        return "–" if value is None else f"{value:g}"
    text = f"{value:.3f}"
    return {"0.000": "<0.001", "1.000": ">0.999"}.get(text, text)


def count_text(value: int | None) -> str:
    """A whole number; a dash for none."""
    return "–" if value is None else f"{value:,}"


def rank_text(value: float) -> str:
    """A whole number as it is, others with one decimal, or none from 10,000 on."""
    return str(value) if isinstance(value, int) else f"{value:.1f}" if value < 1e4 else f"{value:.0f}"
