"""A compressed network kept: its folder, the comparison with its page, and exports, each whole or absent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from brittle.compression import save_compressed
from brittle.compression.export import export_onnx, export_program
from brittle.compression.folders import MODEL, RECIPE
from brittle.compression.groups import TOLERANCE
from brittle.compression.leaderboard import export_masked
from brittle.compression.rebuild import check_rebuilt, ranks_and_sizes
from brittle.compression.removal import logit_gap
from brittle.delivery.compressing import Compressed, recipe_of
from brittle.delivery.frontiers import Walk
from brittle.delivery.planning import Plan
from brittle.delivery.removed import CHECKED
from brittle.errors import InputError
from brittle.models.borrow import device_of
from brittle.reporting.comparison import comparison_html
from brittle.reporting.frontiers import frontier_html
from brittle.results import Comparison, CompressionRecipe, Frontier
from brittle.storage.files import remove_files, replacing, write_text

FRONTIER, TABLE, PARQUET = "frontier.json", "frontier.csv", "frontier.parquet"
"""Files of a frontier: everything, and the table of all networks in two forms."""
COMPARISON, REPORT, SAMPLES = "comparison.json", "report.html", "samples.parquet"
"""Files of a compression beside the network's own."""


@dataclass(frozen=True)
class Origin:
    """Where a network comes from, so that the smaller one can be built again.

    Attributes:
        arch: As :func:`brittle.build_model` takes it.
        arguments: Of the architecture, all that it needs.
        mean: Per channel, of the ``Normalize`` before it; () for none.
        std: Likewise.
        data: What it was judged on, as :func:`brittle.load_data` takes it; None for data in memory.
        data_root: Where they lay; None for none.
        image_size: ``(height, width)`` of the images of a folder; None for none.
        start: Its file or folder.
    """

    arch: str
    arguments: dict[str, object]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    data: str | None = None
    data_root: str | None = None
    image_size: tuple[int, int] | None = None
    start: str | None = None


def with_origin(recipe: CompressionRecipe, origin: Origin) -> CompressionRecipe:
    """A recipe that says where the network came from."""
    return replace(recipe, **vars(origin))


def check_kept(plan: Plan, origin: Origin) -> None:
    """Raise where the planned network could not be built again from its folder: before hours are spent on it.

    Raises:
        InputError: As :func:`brittle.compression.save_compressed`.
    """
    recipe = with_origin(recipe_of(plan, plan.removed.network), origin)
    ranks, sizes = ranks_and_sizes(plan.removed.network, recipe)
    check_rebuilt(plan.removed.network, replace(recipe, ranks=ranks, sizes=sizes))


def check_formats(formats: Sequence[str], plan: Plan) -> None:
    """Raise where a form is unknown, or one that the planned network does not have.

    Raises:
        InputError: The form's name, and what is expected.
    """
    for name in formats:
        if name not in FORMATS:
            raise InputError(f"format: expected some of {', '.join(FORMATS)}; got {name!r}")
        if name == "apb" and plan.removed.masked is None:
            raise InputError(f"format: expected filters or weights to be removed for apb; got {plan.asked.remove}")


def _as_program(compressed: Compressed, folder: Path) -> None:
    export_program(compressed.network, compressed.plan.parts.seen[0][:CHECKED], folder / "model.pt2")


def _as_onnx(compressed: Compressed, folder: Path) -> None:
    export_onnx(compressed.network, compressed.plan.parts.seen[0][:CHECKED], folder / "model.onnx")


def _as_masked(compressed: Compressed, folder: Path) -> None:
    mask, x = compressed.plan.removed.masked, compressed.plan.parts.seen[0][:CHECKED]
    assert mask is not None
    whole = mask(compressed.network)
    if (gap := logit_gap(whole, compressed.network, x.to(device_of(compressed.network)))) > TOLERANCE:
        raise InputError(f"format: expected a masked network that computes the same; got logits {gap:.2g} apart")
    export_masked(whole, folder / "masked.pt")


FORMATS: Mapping[str, Callable[[Compressed, Path], None]] = {
    "run": lambda *_: None,
    "pt2": _as_program,
    "onnx": _as_onnx,
    "apb": _as_masked,
}
"""Forms of a compressed network; its folder can be opened again (``run``) whatever else is written."""


def write_compressed(compressed: Compressed, origin: Origin, folder: Path, formats: Sequence[str] = ()) -> Comparison:
    """Write network, recipe, comparison and report into a folder; the recipe takes its place last.

    Args:
        compressed: What was made.
        origin: Where the network came from.
        folder: Made if missing.
        formats: Further forms of the network, of :data:`FORMATS`.

    Returns:
        The comparison as it was written.

    Raises:
        InputError: As :func:`brittle.compression.save_compressed`, or a form that the network does not have.
        OSError: Writing failed.
    """
    recipe = with_origin(compressed.recipe, origin)
    comparison = replace(compressed.comparison, compression=recipe)
    remove_files(folder, [FRONTIER, TABLE, PARQUET])  # of a frontier in the same folder
    for name in formats:
        FORMATS[name](compressed, folder)
    with replacing(folder / SAMPLES) as beside:
        comparison.samples_frame().to_parquet(beside, index=False)
    write_text(folder / REPORT, comparison_html(comparison))
    write_text(folder / COMPARISON, comparison.to_json())
    save_compressed(folder, compressed.network, recipe)
    return comparison


def write_frontier(frontier: Frontier, folder: Path) -> None:
    """Write the table, the report and everything as JSON, which takes its place last."""
    table = frontier.to_frame()
    write_text(folder / TABLE, table.to_csv(index=False))
    with replacing(folder / PARQUET) as beside:
        table.to_parquet(beside, index=False)
    write_text(folder / REPORT, frontier_html(frontier))
    write_text(folder / FRONTIER, frontier.to_json())


def keep_frontier(walk: Walk, origin: Origin, folder: Path, name: str) -> Frontier:
    """Find a frontier row by row into a folder; what an interrupted one left there is gone on from.

    The table grows row by row. The smallest network above the floor, where there is one, is kept in the folder as
    :func:`write_compressed` would.

    Args:
        walk: To be gone.
        origin: Where the network came from.
        folder: Made if missing.
        name: What to call the network.

    Raises:
        InputError: As :meth:`Walk.frontiers`.
    """
    state = folder / "parts" / FRONTIER
    before = Frontier.load(state) if state.is_file() else None
    for frontier in walk.frontiers(before, name):
        write_text(state, frontier.to_json())
        write_text(folder / TABLE, frontier.to_frame().to_csv(index=False))
    remove_files(folder, [RECIPE, MODEL, COMPARISON, SAMPLES])  # of another compression in the same folder
    if frontier.smallest is not None:
        network, recipe = walk.make(frontier.smallest)
        save_compressed(folder, network, with_origin(recipe, origin))
    write_frontier(frontier, folder)
    return frontier
