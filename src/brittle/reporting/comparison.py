"""A page that puts several audited networks side by side, in pictures, tables and plain words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from brittle.reporting.columns import Column, layer_columns
from brittle.reporting.comparison_figures import draw_comparison, draw_curves, draw_layers
from brittle.reporting.comparison_words import comparison_lines, direction, points, times
from brittle.reporting.compression import KEPT, compression_lines, draw_kept
from brittle.reporting.glossary import GLOSSARY
from brittle.reporting.page import drawings, environment
from brittle.results import ComparedNetwork, Comparison, LayerResult
from brittle.results.comparison import SIGNIFICANT
from brittle.results.wording import all_printable
from brittle.storage.files import replacing, write_text

FIGURES = {"networks": draw_comparison, "curves": draw_curves, "layers": draw_layers}
"""What draws each figure, by the name that the page's template has for it."""
MOST_LISTED = 60
"""Numbers of samples that the page lists of those that a network loses or wins; the JSON has all."""
FAR_MOVED = 1.25
"""Ratio to the first network's value, or its inverse, from which on the layer table sets it in bold."""


@dataclass(frozen=True)
class Cell:
    """One number of the layer table.

    Attributes:
        text: As it is printed.
        times: Ratio to the first network's; None where there is none to be told.
    """

    text: str
    times: float | None = None

    @property
    def moved(self) -> bool:
        """Whether it is far from the first network's."""
        return self.times is not None and not 1 / FAR_MOVED < self.times < FAR_MOVED


def comparison_html(comparison: Comparison, links: Mapping[str, str] | None = None) -> str:
    """The comparison as one HTML page without references to anything outside it; the same one gives the same text.

    Args:
        comparison: What to show.
        links: Pages of the networks' own audits, by the networks' names.
    """
    links = {all_printable(name): link for name, link in (links or {}).items()}
    comparison = all_printable(comparison)
    columns = compared_columns(comparison)
    recipe = comparison.compression
    figures = drawings(FIGURES, comparison)
    if recipe is not None:
        figures |= drawings({"kept": draw_kept}, recipe)
    shown = draw_comparison(comparison)
    return (
        environment()
        .get_template("comparison.html.j2")
        .render(
            comparison=comparison,
            lines=comparison_lines(comparison),
            links=links,
            figure=figures,
            margins=any(network.median_margin is not None for network in comparison.networks),
            compression_lines=() if recipe is None else compression_lines(recipe),
            kept_caption="" if recipe is None else KEPT[recipe.asked.remove],
            panels=[] if shown is None else [axis.get_title("left") for axis in shown.axes],
            columns=columns,
            layer_rows=list(layer_cells(comparison, columns)),
            glossary=GLOSSARY,
            most_listed=MOST_LISTED,
            significant=SIGNIFICANT,
            direction=direction,
            points=points,
            times=times,
        )
    )


def write_comparison(comparison: Comparison, out: Path, links: Mapping[str, str] | None = None) -> None:
    """Write ``report.html`` (one self-contained page) and ``story.png`` into a folder, each whole or not at all.

    Args:
        comparison: What to show.
        out: The folder.
        links: As :func:`comparison_html`, relative to the folder.
    """
    page, picture = comparison_html(comparison, links), draw_comparison(comparison)
    if picture is not None:
        with replacing(out / "story.png") as beside:
            picture.savefig(beside, dpi=200, facecolor="white", format="png")
    write_text(out / "report.html", page)


COMPARED = {
    "kind": False,
    "rows": False,
    "columns": False,
    "parameters": True,
    "frobenius": True,
    "filter_norm_inf": True,
    "filter_norm_2": True,
    "operator_norm_inf_upper": True,
    "operator_norm_2_upper": True,
    "row_error_10pct": False,
    "spectral_error_10pct": False,
    "row_spread_10pct": False,
    "spectral_spread_10pct": False,
    "rank": True,
    "stable_rank": True,
}
"""Columns of the layer table by their keys in :func:`~brittle.reporting.columns.layer_columns`, and whether the ratio
to the first network's value stands below."""


def compared_columns(comparison: Comparison) -> list[Column]:
    """The columns of the layer table, but for those of the attacks."""
    layers = [layer for row in comparison.layers for layer in row.layers if layer is not None]
    columns = {column.key: column for column in layer_columns(layers)}
    return [columns[key] for key in COMPARED if key in columns]


def layer_cells(
    comparison: Comparison, columns: Sequence[Column]
) -> Iterator[tuple[str, list[tuple[str, list[Cell]]]]]:
    """The layer table: by layer, the networks that have it with a cell a column, and one for each norm's attack."""
    for row in comparison.layers:
        rows = []
        for network, layer in zip(comparison.networks, row.layers, strict=True):
            if layer is not None:
                first = None if network is comparison.first else row.layers[0]
                cells = [_cell(column, layer, first) for column in columns]
                rows.append((network.name, cells + [_energy(network, layer.name, p) for p in comparison.norms]))
        yield row.name, rows


def _cell(column: Column, layer: LayerResult, first: LayerResult | None) -> Cell:
    value, before = column.value(layer), None if first is None else column.value(first)
    if not COMPARED[column.key] or not isinstance(value, int | float) or not isinstance(before, int | float):
        return Cell(column.text(layer))
    return Cell(column.text(layer), times(value, before))


def _energy(network: ComparedNetwork, layer: str, p: float) -> Cell:
    """Where the attack's perturbation goes: share of its energy in the leading directions, the most looked at."""
    response = next((r for r in network.audit.norm(p).responses if r.layer == layer and r.energy), None)
    if response is None:
        return Cell("–")
    share, chance, k = response.energy[-1], response.isotropic[-1], response.k[-1]
    error = f" ± {200 * response.energy_error[-1]:.0f}" if response.energy_error else ""
    return Cell(f"{100 * share:.0f}{error} % in {k} (chance {100 * chance:.0f} %)")
