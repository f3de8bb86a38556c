"""What figures of experiments have in common: means over seeds with their intervals, and how strengths are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from brittle.experiments.claims import over_seeds
from brittle.reporting.drawing import SERIES

MARKS = "os^D"


def draw_means(axis: Axes, table: pd.DataFrame, x: str, y: str, *, series: int = 0) -> None:
    """A line through the means over seeds at every x, with 95 % intervals over seeds.

    Args:
        axis: Where.
        table: Rows with these columns and ``seed``.
        x: Column along the axis.
        y: Column of numbers.
        series: Number of colour and mark.
    """
    places, means, lows, highs = [], [], [], []
    for place, rows in table.groupby(x):
        mean = over_seeds(lambda seed: float(seed[y].mean()))(rows)
        if mean.value is not None:
            places.append(float(str(place)))
            means.append(mean.value)
            lows.append(mean.value if mean.low is None else mean.low)
            highs.append(mean.value if mean.high is None else mean.high)
    axis.plot(places, means, linewidth=1.2, **look(series))
    axis.vlines(places, lows, highs, color=SERIES[series], linewidth=1.2)


def look(series: int) -> dict[str, Any]:
    """Colour and mark of a series, as arguments of ``plot``."""
    return {"color": SERIES[series], "marker": MARKS[series], "markersize": 4, "markeredgewidth": 0}


def evenly(table: pd.DataFrame, column: str) -> tuple[pd.Series[int], Sequence[str]]:
    """Places 0, 1, 2, ... of a column's values in rising order, and the values as they are written.

    For axes whose values, as 0, 0.005 and 0.05, no scale spreads well.
    """
    values = sorted(value for value in table[column].unique() if not math.isnan(value))
    return table[column].map({value: place for place, value in enumerate(values)}), [f"{v:g}" for v in values]
