"""The tables that the package keeps: complete, and what the page of verdicts says is what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from brittle.experiments import judge, named_experiments
from brittle.experiments.stored import STORED, read_table

PAGE = Path(__file__).parents[2] / "docs" / "reproduction.md"
KEPT = [experiment for experiment in named_experiments(["all"]) if (STORED / f"{experiment.name}.parquet").is_file()]


def told(name, result):
    """The line of the page, up to its last column, the cause."""
    statistic = result.statistic
    number = result.reason
    if statistic.value is not None:
        number = f"{statistic.value:.2f} ({statistic.low:.2f} to {statistic.high:.2f})".replace("-", "−")
    threshold = f"{result.side} {result.threshold:g}".replace("-", "−")
    return f"| `{name}` | {result.sentence} {result.measure} | {number} | {threshold} | {result.verdict} |"


@pytest.mark.parametrize("experiment", KEPT, ids=lambda experiment: experiment.name)
def test_a_stored_table_is_whole_and_its_verdicts_are_those_of_the_page(experiment):
    table, made = read_table(STORED / f"{experiment.name}.parquet")
    assert (made.experiment, made.scale, made.failed) == (experiment.name, "small", ())
    assert len(table) == made.jobs == len(experiment.settings("small"))
    lines = PAGE.read_text("utf-8")
    right = [told(experiment.name, judge(claim, table, "small")) for claim in experiment.claims]
    missing = [line for line in right if line not in lines]
    assert not missing, "docs/reproduction.md lacks\n" + "\n".join(missing)
    assert experiment.figure(table).axes


def test_stored_tables_stay_below_two_megabytes():
    assert sum(path.stat().st_size for path in STORED.glob("*.parquet")) < 2_000_000
