"""``brittle export``: what was found, in the forms of papers and hubs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from brittle.cli.completion import completing
from brittle.cli.messages import say
from brittle.cli.options import option
from brittle.errors import InputError

if TYPE_CHECKING:
    from brittle.results import Audit

TABLE_FORMATS = ("latex", "markdown")
FIGURE_FORMATS = ("svg", "pdf", "png")

export = typer.Typer(help="Write a saved result as a model card, as tables or as figures; needs no network.")
SavedAudit = Annotated[Path, typer.Argument(metavar="AUDIT.json", help="An audit.json, or the folder that holds one.")]


@export.command("card")
def card(
    result: SavedAudit,
    data: Annotated[
        str | None,
        option("Output", metavar="NAME", help="What hubs call the data: then they list the accuracies."),
    ] = None,
    out: Annotated[Path, option("Output", "-o", "--out", help="Where to write the card.")] = Path("README.md"),
) -> None:
    """Write a model card in Markdown, for Hugging Face's hub or a README.

    Example: brittle export card brittle-audit -o README.md
    """
    from brittle.reporting.card import model_card
    from brittle.storage.files import write_text

    if out.exists():
        raise InputError(f"out: expected a file that is not there yet; got {out}")
    write_text(out, model_card(_audit(result), data=data))
    say(f"Card: {out}")


@export.command("table")
def table(
    result: SavedAudit,
    form: Annotated[
        str, option("Output", "--format", autocompletion=completing(*TABLE_FORMATS), help="latex or markdown.")
    ] = "markdown",
) -> None:
    """Print the tables of accuracies and of layers; LaTeX needs the package booktabs.

    Example: brittle export table brittle-audit --format latex > tables.tex
    """
    _check_format(form, TABLE_FORMATS)
    from brittle.reporting.tables import accuracies, latex_table, layers, markdown_table

    audit = _audit(result)
    tables = [made for made in (accuracies(audit), layers(audit)) if made is not None and made.rows]
    print("\n".join(map({"latex": latex_table, "markdown": markdown_table}[form], tables)), end="")


@export.command("figures")
def figures(
    result: Annotated[
        Path,
        typer.Argument(
            metavar="RESULT", help="An audit.json, comparison.json or frontier.json, or the folder that holds one."
        ),
    ],
    form: Annotated[
        str, option("Output", "--format", autocompletion=completing(*FIGURE_FORMATS), help="svg, pdf or png.")
    ] = "svg",
    out: Annotated[Path, option("Output", "-o", "--out", help="Folder for the figures.")] = Path("brittle-figures"),
) -> None:
    """Write every figure of the report as a file of its own.

    Example: brittle export figures brittle-audit --format pdf -o figures
    """
    _check_format(form, FIGURE_FORMATS)
    from brittle.reporting.redrawing import write_figures
    from brittle.results.reading import read_result

    say(*(f"Figure: {path}" for path in write_figures(read_result(result), out, form)))


def _check_format(form: str, known: tuple[str, ...]) -> None:
    if form not in known:
        raise InputError(f"format: expected {' or '.join(known)}; got {form!r}")


def _audit(result: Path) -> Audit:
    """A saved audit, or that of a folder."""
    from brittle.results import Audit
    from brittle.results.reading import read_result

    found = read_result(result)
    if not isinstance(found, Audit):
        raise InputError(f"result: expected an audit; got a {type(found).__name__.lower()} in {result}")
    return found
