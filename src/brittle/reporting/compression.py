"""What a compression took out of a network: a figure of what each layer keeps, and plain words."""

from __future__ import annotations

from matplotlib.figure import Figure

from brittle.reporting.drawing import INK, SERIES, layer_panels, styled
from brittle.results import CompressionRecipe

UNITS = {"filters": "filters and neurons", "ranks": "ranks", "weights": "single weights"}
"""What is removed, in words."""
TARGETS = {"parameters": "parameters", "macs": "multiply-accumulates", "latency": "time of a pass over 64 samples"}
"""What a ratio is a share of, in words."""


def compression_lines(recipe: CompressionRecipe) -> tuple[str, ...]:
    """What was asked, what was removed, how it was repaired, and what should be known of it: a sentence each."""
    asked, share = recipe.asked, recipe.asked.ratio if recipe.share is None else recipe.share
    cut = sum(group.after < group.before for group in recipe.groups)
    seconds = [f"{name} took {_duration(time)}" for name, time in recipe.seconds.items()]
    planned = f"{asked.allocate} (its candidate {recipe.candidate})" if recipe.candidate else asked.allocate
    lines = [
        f"{100 * share:.1f} % of the {TARGETS[asked.target]} went (asked for: {100 * asked.ratio:g} %): "
        f"{UNITS[asked.remove]} of {cut} of {len(recipe.groups)} groups of layers, "
        f"allocated by {planned}, ranked by {asked.score}.",
        *([f"Afterwards: {', '.join(recipe.repair)}."] if recipe.repair else []),
        *([f"{', '.join(seconds).capitalize()}."] if seconds else []),
        *(f"Warning: {warning}." for warning in recipe.warnings),
    ]
    return tuple(lines)


@styled
def draw_kept(recipe: CompressionRecipe) -> Figure | None:
    """How many of its units every group of layers keeps; None where there are no groups."""
    groups = recipe.groups
    if not groups:
        return None
    figure, (axis,) = layer_panels("What each layer keeps", [group.name for group in groups], 1)
    rows = range(len(groups))
    kept = [100 * group.after / group.before for group in groups]
    axis.barh(rows, 100, height=0.62, color=INK, alpha=0.1)
    axis.barh(rows, kept, height=0.62, color=SERIES[0])
    if len(groups) <= 40:
        for y, group in enumerate(groups):
            axis.text(101, y, f"{group.after:,} of {group.before:,}", va="center", fontsize=8)
    axis.set(xlim=(0, 116), xlabel="Units kept, %")
    axis.set_xticks(range(0, 101, 20))
    return figure


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"
