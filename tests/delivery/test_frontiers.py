"""A frontier: every network is the one that a compression of its own would make, measured on the same samples."""

import dataclasses
import functools
import math

import pytest
import torch

from brittle.attacks import apgd
from brittle.data.load import load_data
from brittle.delivery import Compression, Ladder, plan_removal, walk_of
from brittle.delivery.compressing import finish
from brittle.errors import InputError
from brittle.evaluation import Execution, Threat, evaluate
from brittle.results import Frontier
from helpers.networks import mlp, untouched

TEST, TRAIN = load_data("digits", limit=80), load_data("digits", split="train", limit=200)
ASKED = Compression(calibration=64)
QUICK = Threat([functools.partial(apgd, steps=4)])
LADDER = Ladder((0.3, 0.6, 0.99), ("k_term", "random"), min_robust=0.2)


def walk(ladder=LADDER, asked=ASKED, net=None):
    options = {"training": TRAIN, "p": math.inf, "eps": 0.05, "execution": Execution(certify=False)}
    return walk_of(net or mlp(), TEST, dataclasses.replace(ladder, compression=asked), QUICK, **options)


@pytest.fixture(scope="module")
def frontiers():
    net = mlp()
    with untouched(net):
        return [*walk(net=net).frontiers(name="net")]


@pytest.fixture(scope="module")
def frontier(frontiers):
    return frontiers[-1]


def test_the_table_grows_by_one_network_at_a_time(frontiers, frontier):
    made = [(row.allocate, row.ratio) for row in frontier.rows]
    assert made == [(name, ratio) for ratio in LADDER.ratios for name in LADDER.allocations]
    for number, earlier in enumerate(frontiers, 1):
        assert earlier.rows == frontier.rows[:number]


def test_every_network_is_the_one_of_a_compression_of_its_own(frontier):
    row = frontier.rows[2]
    plan = plan_removal(mlp(), TEST, dataclasses.replace(ASKED, ratio=row.ratio, allocate=row.allocate), training=TRAIN)
    network, recipe = finish(plan)
    assert (row.share, row.size) == (recipe.share, recipe.after)
    own = evaluate(network, TEST, QUICK, eps=0.05, honesty=False, execution=Execution(certify=False))
    assert (own.clean_correct, own.robust_correct) == (row.clean.hits, row.robust(math.inf).hits)
    made, _ = walk().make(row)
    assert all(torch.equal(p, q) for p, q in zip(made.parameters(), network.parameters(), strict=True))


def test_networks_are_paired_with_the_uncompressed_one(frontier):
    for row in frontier.rows[:4]:
        for kind, p, rate in (("clean", None, row.clean), ("robust", math.inf, row.robust(math.inf))):
            before = frontier.base.clean if p is None else frontier.base.robust(p)
            test = row.test(kind, p)
            assert rate.hits - before.hits == len(test.won) - len(test.lost)


def test_a_ratio_that_cannot_be_met_is_a_row_without_numbers_that_says_why(frontier):
    for row in frontier.rows[4:]:
        assert (row.share, row.size, row.norms) == (None, None, ())
        assert row.warnings[0].startswith("ratio: expected at most")


def test_the_smallest_network_is_above_the_floor_and_no_smaller_one_is(frontier):
    above = [row for row in frontier.rows if row.norms and row.robust(math.inf).value >= 0.2]
    assert above
    assert frontier.smallest.ratio == max(row.ratio for row in above)
    best = [row.robust(math.inf).value for row in above if row.ratio == frontier.smallest.ratio]
    assert frontier.smallest.robust(math.inf).value == max(best)
    for floor in (None, 1.0):
        assert dataclasses.replace(frontier, min_robust=floor).smallest is None


def test_allocations_are_summed_up_over_the_ratios_that_all_reach(frontier):
    for name in LADDER.allocations:
        rates = [row.robust(math.inf).value for row in frontier.rows[:4] if row.allocate == name]
        assert frontier.area(name, math.inf) == pytest.approx(sum(rates) / 2)


def test_what_an_earlier_walk_found_is_not_found_again(frontiers, frontier, monkeypatch):
    monkeypatch.setattr("brittle.delivery.frontiers.finish", lambda *_: pytest.fail("it was made before"))
    again = [*walk().frontiers(frontier, "net")]
    assert again[-1] == frontier
    with pytest.raises(pytest.fail.Exception):
        list(walk().frontiers(frontiers[0], "net"))


@pytest.mark.parametrize("change", [{"seed": 1}, {"refit": False}, {"target": "macs"}, {"floor": 0.1}])
def test_an_earlier_frontier_of_other_settings_is_refused(frontier, change):
    with pytest.raises(InputError, match="expected an earlier part of the same frontier"):
        next(walk(asked=dataclasses.replace(ASKED, **change)).frontiers(frontier, "net"))


def test_a_frontier_is_read_as_it_was_written(frontier, tmp_path):
    frontier.save(tmp_path / "frontier.json")
    assert Frontier.load(tmp_path / "frontier.json") == frontier
    text = frontier.to_json().replace('"min_robust": 0.2', '"min_robust": 2')
    with pytest.raises(InputError, match="expected a floor from 0 to 1"):
        Frontier.from_json(text)


def test_the_table_has_a_row_for_each_network(frontier):
    table = frontier.to_frame()
    assert [*table["allocate"]] == ["none", *(row.allocate for row in frontier.rows)]
    for row, (_, line) in zip((frontier.base, *frontier.rows[:4]), table.iterrows(), strict=False):
        assert (line["clean"], line["robust_inf"]) == (row.clean.value, row.robust(math.inf).value)
        assert line["robust_inf_low"] <= line["robust_inf"] <= line["robust_inf_high"]
        assert line["parameters"] == row.size.parameters


@pytest.mark.parametrize("options", [{"ratios": ()}, {"ratios": (0.5, 0.4)}, {"ratios": (0.5, 1.0)},
                                     {"allocations": ("best",)}, {"min_robust": 1.5}])  # fmt: skip
def test_a_ladder_that_makes_no_sense_is_refused(options):
    with pytest.raises(InputError, match=f"^{next(iter(options))}: expected"):
        Ladder(**{"ratios": (0.5,), **options})
