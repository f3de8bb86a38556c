"""What a compression took out of a network: a figure of what each layer keeps, and plain words."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from brittle.reporting.drawing import INK, SERIES, layer_panels, styled
from brittle.results import CompressionRecipe
from brittle.results.wording import duration

UNITS = {"filters": "filters and neurons", "ranks": "ranks", "weights": "single weights"}
"""What is removed, in words."""
KEPT = {
    "filters": "Filters and neurons that every group of layers keeps, of those it had. A group is named after its "
    "first layer; layers that are tied to one another, as by a residual sum, keep the same.",
    "ranks": "Ranks that every layer keeps, of those it had; one that keeps fewer is now two layers.",
    "weights": "Single weights that every layer keeps, of those it had.",
}
"""What the figure of the units shows."""
ALLOCATED = {
    "planner": "as much as robust accuracy can spare",
    "k_term": "every layer loses the same share of its scores: one k-term error for all",
    "global": "one threshold on all scores",
    "layerwise": "the same share everywhere",
    "random": "whatever falls to a layer, a control",
}
"""How much goes where, in words."""
RANKED = {
    "influence": "its influence on clean and attacked loss",
    "energy": "its share of its layers' energy",
    "row_l2": "the ℓ₂ norm of its weights",
    "row_l1": "the ℓ₁ norm of its weights",
    "batch_norm_scale": "the scale of its batch norm",
    "outputs": "the size of the layer's outputs along it",
    "singular_values": "its singular value",
    "magnitude": "its magnitude",
}
"""What ranks the units of a layer, in words; a function of the user's has its name alone."""
TARGETS = {
    "parameters": "parameters",
    "macs": "multiply-accumulates",
    "latency": "time of a pass over 64 samples",
    "filters": "filters and neurons",
}
"""What a ratio is a share of, in words."""


def compression_lines(recipe: CompressionRecipe) -> tuple[str, ...]:
    """What was asked, what was removed, how it was repaired, and what should be known of it: a sentence each."""
    asked, share = recipe.asked, recipe.asked.ratio if recipe.share is None else recipe.share
    cut = sum(group.after < group.before for group in recipe.groups)
    seconds = [f"{name} took {duration(time)}" for name, time in recipe.seconds.items()]
    candidate = f", of whose candidates it took {recipe.candidate}" if recipe.candidate else ""
    drawn = (asked.allocate, asked.remove) == ("random", "filters")
    first = "drawn at random" if drawn else f"the least by {in_words(asked.score, RANKED)}"
    lines = [
        f"{100 * share:.1f} % of the {TARGETS[asked.target]} went (asked for: {100 * asked.ratio:g} %): "
        f"{UNITS[asked.remove]} of {cut} of {len(recipe.groups)} {'groups of ' * (asked.remove == 'filters')}layers.",
        f"How much goes where: {in_words(asked.allocate, ALLOCATED)}{candidate}. What goes first: {first}.",
        *([f"Afterwards: {', '.join(recipe.repair)}."] if recipe.repair else []),
        *([f"{', '.join(seconds).capitalize()}."] if seconds else []),
        *(f"Warning: {warning}." for warning in recipe.warnings),
    ]
    return tuple(lines)


def in_words(name: str, words: Mapping[str, str]) -> str:
    """A name with what it means, where that is known."""
    return f"{name} ({words[name]})" if name in words else name


@styled
def draw_kept(recipe: CompressionRecipe, *, narrow: bool = False) -> Figure | None:
    """How many of its units every group of layers keeps; None where there are no groups."""
    groups = recipe.groups
    if not groups:
        return None
    figure, (axis,) = layer_panels("What each layer keeps", [group.name for group in groups], 1, narrow=narrow)
    rows = range(len(groups))
    kept = [100 * group.after / group.before for group in groups]
    axis.barh(rows, 100, height=0.62, color=INK, alpha=0.1)
    axis.barh(rows, kept, height=0.62, color=SERIES[0])
    if len(groups) <= 40:
        for y, group in enumerate(groups):
            axis.text(101, y, f"{group.after:,} of {group.before:,}", va="center", fontsize=8)
    axis.set(xlim=(0, 116), xlabel=f"{UNITS[recipe.asked.remove].capitalize()} kept, %")
    axis.set_xticks(range(0, 101, 20))
    return figure
