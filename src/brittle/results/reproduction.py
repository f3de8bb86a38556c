"""What became of an experiment's claims: statistics with their intervals, verdicts, and how a table compares."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from brittle.results.documents import Saved

REPRODUCTION_SCHEMA_VERSION = 1
"""Of a reproduction's JSON."""


class ClaimVerdict(StrEnum):
    """What a table says of a claim."""

    REPRODUCED = "reproduced"
    """The statistic passes the threshold, and its interval lies wholly on the claim's side of the null value."""
    NOT_REPRODUCED = "not reproduced"
    """Anything between the other two."""
    OPPOSITE = "opposite"
    """The interval lies wholly on the other side of the null value."""
    NOT_TESTABLE = "not testable at this scale"
    """The claim is not about this scale, or the statistic has no value or no interval; the reason is given."""


@dataclass(frozen=True)
class Statistic:
    """A number over a table with its 95 % interval over seeds.

    Attributes:
        value: The number; None where it cannot be computed.
        low: Lower end of the interval; None without one.
        high: Upper end; likewise.
        n: Seeds that it rests on.
        reason: Why there is no value or no interval.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    reason: str = ""


@dataclass(frozen=True)
class ClaimResult:
    """A claim, what was measured, and the verdict.

    Attributes:
        sentence: The claim.
        place: Where it stands in its source.
        measure: What the statistic is, in words.
        side: ``at least`` or ``at most``.
        threshold: What the statistic has to reach, set before there were results.
        null: The value that stands for no effect.
        statistic: The number found.
        verdict: What it says of the claim.
        reason: Why the claim cannot be tested here; empty where it can.
        note: What else has to be known of it, as a threshold that was changed, and why.
    """

    sentence: str
    place: str
    measure: str
    side: str
    threshold: float
    null: float
    statistic: Statistic
    verdict: ClaimVerdict
    reason: str = ""
    note: str = ""


@dataclass(frozen=True)
class ColumnCheck:
    """One column of a new table against the stored one, over the settings that both have.

    Attributes:
        column: Its name.
        points: Settings, seeds apart, that both tables have.
        correlation: Spearman's correlation of the two tables' means over seeds; None for fewer than three settings, or
            where a column does not vary.
        overlap: Share of the settings whose 95 % intervals over seeds overlap; None where a table has one seed each.
        turned: Axes of the grid along which the column rises in one table and falls in the other.
        agrees: Whether the correlation is at least 0.5, at least half of the intervals overlap, and nothing turned,
            each as far as it is there.
    """

    column: str
    points: int
    correlation: float | None
    overlap: float | None
    turned: tuple[str, ...]
    agrees: bool


@dataclass(frozen=True)
class ExperimentResult:
    """One experiment at one scale.

    Attributes:
        name: What it is called.
        title: What it shows, in a line.
        source: Paper and figure.
        about: What was done, in plain sentences.
        scale: ``smoke``, ``small`` or ``paper``.
        command: What makes the table again.
        jobs: Jobs of the grid.
        rows: Rows of the table: jobs that are done.
        claims: One a claim, in the experiment's order.
        failed: Settings and error of the jobs that failed.
        doubts: How many rows have a flag, flag by flag: checks of whether robust accuracies can be trusted.
        checks: One a measured column, against the stored table; empty without a check.
    """

    name: str
    title: str
    source: str
    about: tuple[str, ...]
    scale: str
    command: str
    jobs: int
    rows: int
    claims: tuple[ClaimResult, ...]
    failed: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    checks: tuple[ColumnCheck, ...] = ()


@dataclass(frozen=True)
class Reproduction(Saved):
    """Experiments with their claims: what ``brittle reproduce`` and ``brittle sweep`` write beside their page.

    Attributes:
        experiments: In the order in which they were asked for.
        versions: Package name to version.
        schema_version: Of the JSON.
    """

    experiments: tuple[ExperimentResult, ...]
    versions: dict[str, str] = field(default_factory=dict)
    schema_version: int = REPRODUCTION_SCHEMA_VERSION
