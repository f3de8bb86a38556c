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
    number_of = {layer.name: place for place, layer in enumerate(layers, 1)}
    count = "{:,}".format
    columns = [
        _column("Layer", "Layer", "name", "Layer", attrgetter("name"), str),
        _column("Layer", "No.", "number", "No.", lambda layer: number_of[layer.name], str),
        _column("Layer", "Type", "kind", "Type", attrgetter("kind"), str),
        _column("Layer", "Rows", "rows", "Shape", lambda layer: layer.shape[0], count),
        _column("Layer", "Columns", "columns", "Shape", lambda layer: layer.shape[1], count),
        _column("Layer", "Parameters", "parameters", "Parameters", attrgetter("parameters"), count),
    ]
    for group, field, term in PROFILES:
        for place, fraction in enumerate(FRACTIONS):
            percent = f"{100 * fraction:.0f}"
            value = partial(_entry, field=field, place=place)
            columns.append(
                _column(group, f"{percent}\N{NO-BREAK SPACE}%", f"{field}_{percent}pct", term, value, share_text)
            )
    columns += [_column("Ranks", head, field, head, attrgetter(field), _rank_text) for head, field in RANKS.items()]
    columns += _norm_columns(sorted({norm.p for layer in layers for norm in layer.operator_norms}, reverse=True))
    for p in sorted({bound.p for layer in layers for bound in layer.bounds}, reverse=True):
        group = f"Theorem 3.1, {norm_name(p)}, {100 * THEOREM_FRACTION:g} % kept"
        for head, side, key, term, of_bound in THEOREM:
            of_layer = partial(_of_theorem, p=p, value=of_bound)
            columns.append(_column(group, head, key.format(p=f"{p:g}"), term, of_layer, partial(number, side=side)))
    return columns


def share_text(value: float | None) -> str:
    """A number in [0, 1] with three decimals; ``0`` and ``1`` are printed only when exactly true.

    >>> share_text(0.0), share_text(0.0001), share_text(0.25), share_text(0.9999), share_text(1.0)
    ('0', '<0.001', '0.250', '>0.999', '1')
    """
    if value is None or value in (0, 1):
        return "–" if value is None else f"{value:g}"
    text = f"{value:.3f}"
    return {"0.000": "<0.001", "1.000": ">0.999"}.get(text, text)


def _rank_text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.1f}" if value < 1e4 else f"{value:.0f}"


def _column(
    group: str, head: str, key: str, term: str, value: Callable[[LayerResult], Any], show: Callable[[Any], str]
) -> Column:
    """A column whose text follows from its value alone."""
    return Column(group, head, key, term, value, lambda layer: show(value(layer)))


def _entry(layer: LayerResult, field: str, place: int) -> float:
    return float(getattr(layer, field)[place])


def _of_theorem(layer: LayerResult, p: float, value: Callable[[LayerBound], Cell]) -> Cell:
    """What a bound of Theorem 3.1 says; None where the layer has none in this norm."""
    return value(layer.bound(p, THEOREM_FRACTION)) if any(bound.p == p for bound in layer.bounds) else None


def _norm_columns(measured: Sequence[float]) -> Iterator[Column]:
    """Norms of the matrix, its concentration, and the operator norms that were ``measured``."""
    group = "Norms"
    yield _column(group, "‖W‖F", "frobenius", "Frobenius norm ‖W‖F", attrgetter("frobenius"), number)
    yield _column(group, "‖W‖∞", "filter_norm_inf", "Matrix norm", attrgetter("filter_norm_inf"), number)
    yield _column(group, "‖W‖₂", "filter_norm_2", "Matrix norm", attrgetter("filter_norm_2"), number)
    for p in (math.inf, 2.0):
        head, key = f"{norm_name(p)} concen\N{SOFT HYPHEN}tration", f"concentration_{p:g}"
        yield _column(group, head, key, "Concentration", methodcaller("concentration", p), number)
    for p in measured:
        for side in ("lower", "upper", "method"):
            head, key = f"{norm_name(p)} operator, {side}", f"operator_norm_{p:g}_{side}"
            value, text = partial(_operator_value, p=p, side=side), partial(_operator_text, p=p, side=side)
            yield Column(group, head, key, "Operator norm", value, text)


def _operator_value(layer: LayerResult, p: float, side: str) -> Cell:
    norm = layer.operator_norm(p)
    if norm is None or side != "method":
        return None if norm is None else float(getattr(norm, side))
    return (
        f"{OperatorMethod.EXACT} ({norm.method})" if norm.exact and norm.method != OperatorMethod.EXACT else norm.method
    )


def _operator_text(layer: LayerResult, p: float, side: str) -> str:
    """A bound is rounded to its side; a norm that is known exactly, to the nearest."""
    norm, value = layer.operator_norm(p), _operator_value(layer, p, side)
    return value if isinstance(value, str) else number(value, "nearest" if norm is None or norm.exact else side)
