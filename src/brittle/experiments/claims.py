"""Claims of a paper as statistics over a table of rows, with intervals over seeds, and what a table says of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from brittle.errors import InputError
from brittle.results import ClaimResult, ClaimVerdict, Statistic

SCALES = ("smoke", "small", "paper")
"""Scales of every experiment, cheapest first."""
LEVEL = 0.95
"""Of all intervals."""
RESAMPLES = 1000
"""Bootstrap samples of the seeds: of few seeds there are not many more that differ."""
FEWEST_SEEDS = 3
"""Below these a bootstrap over seeds has hardly anything to draw from."""


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper, the number that speaks for it, and the threshold that it has to reach.

    Attributes:
        sentence: The claim, in plain words.
        place: Where it stands in its source.
        statistic: From the table of rows to a number with its interval: :func:`over_seeds`, :func:`spearman`,
            :func:`pearson`, or your own.
        at_least: Threshold of a claim that the number is large; set before there are results.
        at_most: Threshold of a claim that it is small; one of the two.
        null: The value that stands for no effect; no threshold may lie on its far side.
        scales: Where the claim can be tested.
        measure: What the statistic is, in words.
        note: What else has to be known of it, as a threshold that was changed, and why.

    Raises:
        InputError: No threshold or two, one on the far side of ``null``, or an unknown scale.
    """

    sentence: str
    place: str
    statistic: Callable[[pd.DataFrame], Statistic]
    at_least: float | None = None
    at_most: float | None = None
    null: float = 0.0
    scales: tuple[str, ...] = ("small", "paper")
    measure: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise InputError(
                f"claim: expected one of at_least and at_most; got {self.at_least} and {self.at_most} "
                f"for {self.sentence!r}"
            )
        if self.direction * (self.threshold - self.null) < 0:
            raise InputError(
                f"claim: expected a threshold on the claim's side of null, {self.null}; got {self.threshold} "
                f"for {self.sentence!r}"
            )
        if unknown := set(self.scales) - set(SCALES):
            raise InputError(f"claim: expected scales among {', '.join(SCALES)}; got {', '.join(sorted(unknown))}")

    @property
    def direction(self) -> int:
        """1 where the claim says that the number is large, -1 where it says that it is small."""
        return 1 if self.at_most is None else -1

    @property
    def threshold(self) -> float:
        """The threshold, of either side."""
        threshold = self.at_least if self.at_most is None else self.at_most
        assert threshold is not None
        return threshold


def judge(claim: Claim, table: pd.DataFrame, scale: str) -> ClaimResult:
    """What a table says of a claim; the rules are those of :class:`brittle.results.ClaimVerdict`.

    Args:
        claim: The claim.
        table: One row a finished job.
        scale: The scale that the table was made at.

    Raises:
        InputError: The table lacks a column that the statistic reads.
    """
    try:
        statistic = claim.statistic(table)
    except KeyError as error:
        raise InputError(
            f"claim: expected columns of the table ({', '.join(map(str, table))}); got {error} for {claim.sentence!r}"
        ) from None
    verdict, reason = _weigh(claim, statistic, scale)
    return ClaimResult(
        claim.sentence,
        claim.place,
        claim.measure,
        "at least" if claim.direction > 0 else "at most",
        claim.threshold,
        claim.null,
        statistic,
        verdict,
        reason,
        claim.note,
    )


def _weigh(claim: Claim, statistic: Statistic, scale: str) -> tuple[ClaimVerdict, str]:
    """The verdict, and why a claim cannot be tested."""
    if scale not in claim.scales:
        return ClaimVerdict.NOT_TESTABLE, f"the claim is about the scale {' or '.join(claim.scales)}"
    if statistic.value is None or statistic.low is None or statistic.high is None:
        return ClaimVerdict.NOT_TESTABLE, statistic.reason or "the statistic has no interval"

    def turn(number: float) -> float:
        """How far a number lies on the claim's side of null."""
        return claim.direction * (number - claim.null)

    low, high = sorted((turn(statistic.low), turn(statistic.high)))
    if high < 0:
        return ClaimVerdict.OPPOSITE, ""
    reproduced = turn(statistic.value) >= turn(claim.threshold) and low > 0
    return (ClaimVerdict.REPRODUCED if reproduced else ClaimVerdict.NOT_REPRODUCED), ""


def over_seeds(
    quantity: Callable[[pd.DataFrame], float], where: Mapping[str, object] | None = None
) -> Callable[[pd.DataFrame], Statistic]:
    """The mean over seeds of a quantity of each seed's rows, with Student's 95 % interval.

    ``mean +- t(0.975, n - 1) s / sqrt(n)`` over the n seeds in the table's column ``seed``.

    Args:
        quantity: From one seed's rows to a number.
        where: Columns and the values that rows must have to count; all rows without it.

    Returns:
        A statistic for :class:`Claim`. It has no value where a seed has none (NaN): leaving seeds out would choose
        among them. It has no interval for one seed.
    """

    def statistic(table: pd.DataFrame) -> Statistic:
        from scipy.stats import t

        groups = [rows for _, rows in chosen_rows(table, where).groupby("seed")]
        values = np.array([quantity(rows) for rows in groups], dtype=float)
        n = len(values)
        if not n or not np.isfinite(values).all():
            return Statistic(None, None, None, n, "a seed has no value" if n else "there are no such rows")
        mean = float(values.mean())
        if n == 1:
            return Statistic(mean, None, None, 1, "one seed gives no interval")
        half = float(t.ppf((1 + LEVEL) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n))
        return Statistic(mean, mean - half, mean + half, n)

    return statistic


def spearman(x: str, y: str, where: Mapping[str, object] | None = None) -> Callable[[pd.DataFrame], Statistic]:
    """Spearman's rank correlation of two columns over all rows, with a 95 % bootstrap interval over seeds.

    Whole seeds are drawn with replacement, as the rows of one seed are not independent; the interval's ends are
    percentiles (Efron & Tibshirani 1993, chapter 13). Of few seeds such intervals are somewhat too short.

    Args:
        x: Column of numbers.
        y: Another.
        where: As :func:`over_seeds`.

    Returns:
        A statistic for :class:`Claim`. It has no value where a column is constant or a number missing, and no interval
        for fewer than three seeds. Infinite numbers count as largest.
    """
    return _correlation(x, y, where, ranked=True)


def pearson(x: str, y: str, where: Mapping[str, object] | None = None) -> Callable[[pd.DataFrame], Statistic]:
    """Pearson's correlation of two columns over all rows; otherwise as :func:`spearman`, but no number is infinite."""
    return _correlation(x, y, where, ranked=False)


def slope(y: str, x: str) -> Callable[[pd.DataFrame], float]:
    """Least-squares slope of column y over column x, for :func:`over_seeds`; NaN where x is constant."""

    def quantity(rows: pd.DataFrame) -> float:
        centred = rows[x] - rows[x].mean()
        spread = float((centred**2).sum())
        return float((centred * rows[y]).sum()) / spread if spread else math.nan

    return quantity


def mean_of(column: str) -> Callable[[pd.DataFrame], float]:
    """Mean of a column over a seed's rows, for :func:`over_seeds`."""
    return lambda rows: float(rows[column].mean())


def change(y: str, x: str) -> Callable[[pd.DataFrame], float]:
    """Mean of column y at the largest x less that at the smallest, for :func:`over_seeds`."""

    def quantity(rows: pd.DataFrame) -> float:
        return float(rows[y][rows[x] == rows[x].max()].mean() - rows[y][rows[x] == rows[x].min()].mean())

    return quantity


def chosen_rows(table: pd.DataFrame, where: Mapping[str, object] | None) -> pd.DataFrame:
    """The rows that have these values in these columns."""
    for column, value in (where or {}).items():
        table = table[table[column] == value]
    return table


def _correlation(
    x: str, y: str, where: Mapping[str, object] | None, *, ranked: bool
) -> Callable[[pd.DataFrame], Statistic]:
    def statistic(table: pd.DataFrame) -> Statistic:
        rows = chosen_rows(table, where)
        seeds = [group[[x, y]].to_numpy(float).T for _, group in rows.groupby("seed")]
        value = correlate(np.hstack(seeds), ranked=ranked) if seeds else math.nan
        if math.isnan(value):
            return Statistic(None, None, None, len(seeds), f"{x} or {y} is constant, infinite or missing")
        if len(seeds) < FEWEST_SEEDS:
            return Statistic(value, None, None, len(seeds), f"an interval over seeds needs {FEWEST_SEEDS} of them")
        draws = np.random.default_rng(0).integers(len(seeds), size=(RESAMPLES, len(seeds)))
        values = [correlate(np.hstack([seeds[i] for i in draw]), ranked=ranked) for draw in draws]
        low, high = np.nanquantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        return Statistic(value, float(low), float(high), len(seeds))

    return statistic


def correlate(pairs: np.ndarray[Any, Any], *, ranked: bool) -> float:
    """Correlation of two rows of numbers ``(2, n)``, of their ranks if ``ranked``; NaN where it is not defined."""
    from scipy.stats import rankdata

    if np.isnan(pairs).any():
        return math.nan
    pairs = rankdata(pairs, axis=1) if ranked else pairs
    if not np.isfinite(pairs).all() or (pairs == pairs[:, :1]).all(1).any():
        return math.nan
    centred = pairs - pairs.mean(1, keepdims=True)
    return float(centred[0] @ centred[1] / np.sqrt((centred**2).sum(1)).prod())
