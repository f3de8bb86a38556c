"""Statistics with their intervals over seeds, and the verdicts that follow from them."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from brittle.errors import InputError
from brittle.experiments import Claim, change, judge, over_seeds, pearson, slope, spearman
from brittle.results import ClaimVerdict, Statistic


@pytest.fixture
def table():
    rng = np.random.default_rng(1)
    rows = [{"x": x, "seed": seed, "kind": kind} for x in (1, 2, 4, 8) for seed in range(5) for kind in "ab"]
    table = pd.DataFrame(rows)
    return table.assign(y=0.5 * table.x + rng.normal(size=len(table)), z=rng.integers(3, size=len(table)))


def claim(statistic, **threshold):
    return Claim("It holds.", "section 1", lambda table: statistic, **threshold)


# --- statistics ---------------------------------------------------------------------------------------------


def test_the_interval_over_seeds_is_students(table):
    found = over_seeds(lambda rows: rows.y.mean(), {"kind": "a"})(table)
    means = table[table.kind == "a"].groupby("seed").y.mean()
    expected = scipy.stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert found.n == 5
    assert (found.value, found.low, found.high) == pytest.approx((means.mean(), expected.low, expected.high))


@pytest.mark.parametrize("column", ["y", "z"])
@pytest.mark.parametrize(
    ("ours", "theirs"), [(spearman, scipy.stats.spearmanr), (pearson, scipy.stats.pearsonr)], ids=["ranks", "numbers"]
)
def test_correlations_are_those_of_scipy_with_and_without_ties(ours, theirs, column, table):
    found = ours("x", column)(table)
    assert found.value == pytest.approx(theirs(table.x, table[column]).statistic)
    assert found.low <= found.value <= found.high


def test_the_bootstrap_draws_whole_seeds(table):
    """Of three seeds all 27 draws can be listed; the interval's ends are quantiles of what they give."""
    table = table[table.seed < 3]
    seeds = [table[table.seed == seed] for seed in range(3)]
    draws = [pd.concat([seeds[i] for i in draw]) for draw in itertools.product(range(3), repeat=3)]
    exact = [scipy.stats.spearmanr(draw.x, draw.y).statistic for draw in draws]
    found = spearman("x", "y")(table)
    low, high = (np.quantile(exact, share, method="closest_observation") for share in (0.02, 0.05))
    assert min(exact) - 1e-12 <= found.low <= max(low, high) + 1e-12
    assert np.quantile(exact, 0.95) - 1e-12 <= found.high <= max(exact) + 1e-12
    assert min(abs(value - found.low) for value in exact) < 1e-9


def test_equal_seeds_leave_no_doubt():
    table = pd.DataFrame([{"x": x, "y": 3 * x, "seed": seed} for x in range(4) for seed in range(3)])
    for statistic in (spearman("x", "y"), pearson("x", "y"), over_seeds(slope("y", "x"))):
        found = statistic(table)
        value = 3.0 if found.value > 2 else 1.0
        assert (found.value, found.low, found.high) == pytest.approx((value, value, value))


def test_infinite_bounds_rank_highest_and_have_no_pearson_correlation():
    table = pd.DataFrame([{"x": x, "y": x if x < 3 else math.inf, "seed": seed} for x in range(4) for seed in range(3)])
    assert spearman("x", "y")(table).value == pytest.approx(1)
    assert pearson("x", "y")(table).value is None


def test_slope_and_change_are_exact_on_lines(table):
    line = table.assign(y=3.0 - 2.0 * table.x)
    assert slope("y", "x")(line) == pytest.approx(-2)
    assert change("y", "x")(line) == pytest.approx(-2 * 7)
    assert math.isnan(slope("y", "x")(line.assign(x=1)))


@pytest.mark.parametrize(
    "statistic", [spearman("x", "y"), pearson("x", "y"), over_seeds(slope("y", "x"))], ids=["spearman", "pearson", "t"]
)
def test_a_seed_without_a_value_leaves_none(statistic, table):
    missing = table.assign(y=table.y.where(table.seed != 2))
    if statistic(missing).value is not None:  # pandas leaves missing numbers out of means and sums
        missing = missing.assign(x=missing.x.where(missing.seed != 2, 1))
    found = statistic(missing)
    assert found.value is None
    assert found.reason


def test_few_seeds_have_no_interval(table):
    one, two = table[table.seed < 1], table[table.seed < 2]
    assert over_seeds(slope("y", "x"))(one).low is None
    assert spearman("x", "y")(two).low is None
    assert spearman("x", "y", {"kind": "c"})(two).value is None


# --- verdicts -----------------------------------------------------------------------------------------------


VERDICTS = [
    (Statistic(0.9, 0.8, 1.0, 5), ClaimVerdict.REPRODUCED),
    (Statistic(0.5, 0.5, 0.5, 5), ClaimVerdict.REPRODUCED),
    (Statistic(0.4, 0.3, 0.5, 5), ClaimVerdict.NOT_REPRODUCED),
    (Statistic(0.9, -0.1, 1.9, 5), ClaimVerdict.NOT_REPRODUCED),
    (Statistic(-0.2, -0.5, 0.1, 5), ClaimVerdict.NOT_REPRODUCED),
    (Statistic(-0.2, -0.3, -0.1, 5), ClaimVerdict.OPPOSITE),
    (Statistic(None, None, None, 0, "nothing"), ClaimVerdict.NOT_TESTABLE),
    (Statistic(0.9, None, None, 1, "one seed"), ClaimVerdict.NOT_TESTABLE),
]


@pytest.mark.parametrize(("statistic", "verdict"), VERDICTS)
@pytest.mark.parametrize("null", [0.0, 1.0, -3.0])
def test_verdicts_follow_the_rules_on_both_sides_and_from_any_null(statistic, verdict, null, table):
    def moved(number, sign):
        return None if number is None else null + sign * number

    def turned(sign):
        ends = sorted(moved(end, sign) for end in (statistic.low, statistic.high) if end is not None) or (None, None)
        return Statistic(moved(statistic.value, sign), *ends, statistic.n, statistic.reason)

    assert judge(claim(turned(1), at_least=null + 0.5, null=null), table, "small").verdict == verdict
    result = judge(claim(turned(-1), at_most=null - 0.5, null=null), table, "small")
    assert result.verdict == verdict
    assert bool(result.reason) == (verdict == ClaimVerdict.NOT_TESTABLE)


def test_a_claim_is_judged_at_its_scales_alone(table):
    sure = claim(Statistic(0.9, 0.8, 1.0, 5), at_least=0.5, scales=("paper",))
    assert judge(sure, table, "paper").verdict == ClaimVerdict.REPRODUCED
    assert judge(sure, table, "small").verdict == ClaimVerdict.NOT_TESTABLE
    assert judge(sure, table, "small").statistic.value == 0.9


@pytest.mark.parametrize(
    ("threshold", "part"),
    [
        ({}, "one of at_least and at_most"),
        ({"at_least": 1.0, "at_most": 2.0}, "one of at_least and at_most"),
        ({"at_least": -1.0}, "side of null"),
        ({"at_most": 0.5, "null": 0.2}, "side of null"),
        ({"at_least": 1.0, "scales": ("large",)}, "scales among"),
    ],
)
def test_claims_that_cannot_be_judged_are_refused(threshold, part):
    with pytest.raises(InputError, match=part):
        claim(None, **threshold)


def test_a_column_that_is_not_there_is_named(table):
    wrong = Claim("It rises.", "section 1", over_seeds(slope("bound", "x")), at_least=0.0)
    with pytest.raises(InputError, match=r"columns of the table \(x, seed.*'bound'"):
        judge(wrong, table, "small")
