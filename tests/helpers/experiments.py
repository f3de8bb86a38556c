"""Experiments that take no time, with claims whose truth is known."""

from __future__ import annotations

from matplotlib.figure import Figure

from brittle.experiments import Claim, Experiment, over_seeds, slope, spearman

RISING = Claim(
    "The effect rises.", "section 1", over_seeds(slope("effect", "x")), at_least=1.5, scales=("smoke", "small"),
    measure="slope",
)  # fmt: skip
FALLING = Claim("The effect falls.", "section 2", spearman("x", "effect"), at_most=-0.5, scales=("smoke",))
PAPER = Claim("The effect is large.", "section 3", over_seeds(slope("effect", "x")), at_least=1.0, scales=("paper",))


def run(*, x: int, seed: int, broken: int = -1) -> dict[str, object]:
    """A line of slope 2 with a disturbance of its own for every seed; fails at one x."""
    if x == broken:
        raise ValueError(f"{x} is broken")
    return {"effect": 2.0 * x + 0.1 * (seed * x % 3), "word": f"x{x}", "parts": [x, seed]}


def figure(table) -> Figure:
    """One axis with one mark a row."""
    drawn = Figure()
    drawn.subplots().plot(table["x"], table["effect"], "o")
    return drawn


def lines(name: str = "lines", claims=(RISING, FALLING, PAPER), **grids) -> Experiment:
    """An experiment of ``run``."""
    grids = grids or {"smoke": {"x": (1, 2, 3, 4), "seed": (0, 1, 2)}}
    return Experiment(name, "Lines", "nowhere, Figure 1", run, figure, grids, claims, about=("Nothing is trained.",))
