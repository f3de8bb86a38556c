"""The page of a result, and its figures as files, whatever it is of."""

from __future__ import annotations

import functools
from pathlib import Path

from matplotlib import style
from matplotlib.figure import Figure

from brittle.reporting.comparison import FIGURES as COMPARISON_FIGURES
from brittle.reporting.comparison import comparison_html
from brittle.reporting.drawing import styled
from brittle.reporting.frontiers import draw_frontier, frontier_html
from brittle.reporting.page import FIGURES, report_html
from brittle.results import Audit, Comparison, Frontier
from brittle.results.wording import all_printable
from brittle.storage.files import replacing

UNDATED = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}
"""By format, what would make the files of one result differ from time to time."""


@functools.singledispatch
def result_html(result: object) -> str:
    """The page that an audit, a comparison or a frontier has.

    Raises:
        TypeError: The result is of another kind.
    """
    raise TypeError(f"{type(result).__name__} has no page")


@result_html.register
def _(result: Audit) -> str:
    return report_html(result)


@result_html.register
def _(result: Comparison) -> str:
    return comparison_html(result)


@result_html.register
def _(result: Frontier) -> str:
    return frontier_html(result)


@functools.singledispatch
def drawn_figures(result: object) -> dict[str, Figure | None]:
    """The figures of an audit, a comparison or a frontier by their names; None for one that it has nothing to show in.

    Raises:
        TypeError: The result is of another kind.
    """
    raise TypeError(f"{type(result).__name__} has no figures")


@drawn_figures.register
def _(result: Audit) -> dict[str, Figure | None]:
    return {name: draw(result) for name, draw in FIGURES.items()}


@drawn_figures.register
def _(result: Comparison) -> dict[str, Figure | None]:
    return {name: draw(result) for name, draw in COMPARISON_FIGURES.items()}


@drawn_figures.register
def _(result: Frontier) -> dict[str, Figure | None]:
    return {"frontier": draw_frontier(result)}


@styled
def write_figures(result: Audit | Comparison | Frontier, folder: Path, kind: str) -> list[Path]:
    """Write every figure as a file of its own, on white; the same result gives the same files.

    Args:
        result: What to show.
        folder: For ``NAME.KIND``; made if missing.
        kind: ``"svg"``, ``"pdf"`` or ``"png"`` (200 dots an inch).

    Returns:
        The files.
    """
    written = []
    with style.context({"pdf.fonttype": 42}):  # as text, which journals ask for
        for name, figure in drawn_figures(all_printable(result)).items():
            if figure is not None:
                path = folder / f"{name.replace('_', '-')}.{kind}"
                with replacing(path) as beside:
                    figure.savefig(beside, format=kind, facecolor="white", dpi=200, metadata=UNDATED[kind])
                written.append(path)
    return written
