"""A compression as a whole: what was asked is met, the user's network stays, and no evaluated sample is looked at."""

import copy
import dataclasses
import functools
import math

import pytest
import torch
from torch import nn

from brittle.attacks import apgd
from brittle.data.load import Data, load_data
from brittle.delivery import Compression, compress, plan_removal
from brittle.delivery.compressing import finish, headline_attacks
from brittle.delivery.samples import split_samples
from brittle.errors import InputError
from brittle.evaluation import Execution, Threat
from brittle.models.macs import network_size
from brittle.reporting.compression import compression_lines
from brittle.results import Latency
from brittle.training import Recipe
from helpers.networks import convnet, mlp, untidy, untouched

TEST, TRAIN = load_data("digits", limit=60), load_data("digits", split="train", limit=300)
QUICK = Threat([functools.partial(apgd, steps=3)])
PLAIN = Execution(certify=False)


def asked(**options):
    return Compression(**{"calibration": 64, **options})


def nonzeros(model):
    return sum(int((p != 0).sum()) for p in model.parameters())


def equal(one, other):
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


# What was asked


@pytest.mark.parametrize("allocate", ["k_term", "global", "layerwise", "random"])
@pytest.mark.parametrize(
    ("remove", "target"), [("filters", "parameters"), ("filters", "macs"), ("ranks", "parameters")]
)
def test_the_share_that_went_is_the_share_that_was_asked_for_and_is_true(remove, target, allocate):
    net = mlp()
    plan = plan_removal(net, TEST, asked(ratio=0.5, remove=remove, target=target, allocate=allocate), training=TRAIN)
    before, after = (getattr(network_size(model, TEST.inputs[:1]), target) for model in (net, plan.removed.network))
    assert plan.removed.share == pytest.approx(1 - after / before, abs=1e-12)
    if remove == "filters":
        assert abs(plan.removed.share - 0.5) < 0.01
    assert any(f"{100 * plan.removed.share:.1f} %" in warning for warning in plan.warnings) == (
        abs(plan.removed.share - 0.5) > 0.01
    )


def test_the_planner_meets_the_ratio_names_its_candidate_and_repeats_itself():
    plans = [plan_removal(mlp(), TEST, asked(ratio=0.5), training=TRAIN) for _ in range(2)]
    assert abs(plans[0].removed.share - 0.5) < 0.01
    assert plans[0].removed.candidate in ("influence", "k_term", "layerwise", "magnitude")
    assert equal(*(plan.removed.network for plan in plans))
    by_score = plan_removal(mlp(), TEST, asked(ratio=0.5, score="row_l1"), training=TRAIN)
    assert (by_score.asked.allocation, by_score.removed.candidate) == ("k_term", None)


@pytest.mark.parametrize(
    ("judged", "candidate", "score"),
    [
        ((2, 1, 0, 0), "influence", "influence"),
        ((0, 1, 0, 0), "k_term", "row_l2"),
        ((0, 0, 0, 1), "magnitude", "energy"),
    ],
)
def test_the_recipe_says_what_ranked_the_units_of_the_candidate_that_won(monkeypatch, judged, candidate, score):
    turn = iter(judged)
    monkeypatch.setattr("brittle.delivery.filters.judge_of", lambda *_: lambda network: next(turn))
    _, recipe = finish(plan_removal(mlp(), TEST, asked(ratio=0.5), training=TRAIN))
    assert (recipe.candidate, recipe.asked.score) == (candidate, score)
    said = compression_lines(recipe)[1]
    assert f"of whose candidates it took {candidate}. What goes first: the least by {score} (" in said


def test_where_judging_is_cheap_there_are_more_candidates(monkeypatch):
    told = set()

    def tell(stage, _, total):
        if stage == "judge plans":
            told.add(total)

    for cheap in (1e11, 0.0):
        monkeypatch.setattr("brittle.delivery.filters.CHEAP", cheap)
        plan_removal(mlp(), TEST, asked(ratio=0.5, calibration=128), training=TRAIN, progress=tell)
    assert told == {4 + 2 * 4, 4}


def test_single_weights_go_by_the_share_that_was_asked_for():
    net = mlp()
    plan = plan_removal(net, TEST, asked(ratio=0.8, remove="weights"), training=TRAIN)
    gone = 1 - nonzeros(plan.removed.network) / sum(p.numel() for p in net.parameters())
    assert gone == pytest.approx(0.8, abs=0.01)
    assert plan.removed.share == pytest.approx(gone, abs=1e-3)


def test_what_cannot_go_is_refused_with_what_can():
    with pytest.raises(InputError, match=r"^ratio: expected at most 0\.\d+ of the macs.*; got 0.99$") as refusal:
        plan_removal(convnet(), TEST, asked(ratio=0.99, target="macs", floor=0.5), training=TRAIN)
    reachable = float(str(refusal.value).split("at most ")[1].split()[0])
    plan = plan_removal(convnet(), TEST, asked(ratio=reachable, target="macs", floor=0.5), training=TRAIN)
    assert plan.removed.share == pytest.approx(reachable, abs=0.01)
    assert all(cut.after >= math.ceil(0.5 * cut.before) for cut in plan.removed.cuts)


def test_a_layer_that_is_about_to_collapse_is_named():
    net = copy.deepcopy(mlp())
    with torch.no_grad():
        net[3].weight[1:].mul_(1e-3)  # one strong neuron and 23 weak ones, which go first
    plan = plan_removal(net, TEST, asked(ratio=0.4, allocate="global", floor=0.0), training=TRAIN)
    named = [warning for warning in plan.warnings if "about to collapse" in warning]
    assert [warning.split(" keeps")[0] for warning in named] == ["layer 3"]
    kept = {cut.name: cut.after for cut in plan.removed.cuts}
    assert kept["3"] <= 2 < kept["1"]
    whole = plan_removal(net, TEST, asked(ratio=0.2, allocate="global", keep=("1",)), training=TRAIN)
    assert [cut.name for cut in whole.removed.cuts] == ["3"]
    assert "1" in whole.removed.whole


def test_a_latency_is_met_by_measuring(monkeypatch):
    def latency(models, x_shape, **options):  # a machine whose time is 30 % overhead and else proportional to MACs
        macs = [network_size(model, TEST.inputs[:1]).macs for model in models.values()]
        return [Latency("", 64, 0.3 * macs[0] + 0.7 * m, 0.3 * macs[0] + 0.7 * m, 1, "cpu", 1) for m in macs]

    monkeypatch.setattr("brittle.delivery.planning.latency", latency)
    net = mlp()
    plan = plan_removal(net, TEST, asked(ratio=0.4, target="latency"), training=TRAIN)
    saved = 0.7 * (
        1 - network_size(plan.removed.network, TEST.inputs[:1]).macs / network_size(net, TEST.inputs[:1]).macs
    )
    assert plan.removed.share == pytest.approx(saved)
    assert abs(saved - 0.4) <= 0.02
    with pytest.raises(InputError, match="ratio: expected a share of the latency that this machine can save"):
        plan_removal(net, TEST, asked(ratio=0.9, target="latency"), training=TRAIN)


def test_a_latency_that_is_met_by_chance_is_timed_again(monkeypatch):
    net, told = mlp(), iter([0.6])

    def latency(models, x_shape, **options):  # the first time it says what is asked for, whatever the network
        macs = [network_size(model, TEST.inputs[:1]).macs for model in models.values()]
        share = next(told, 0.3 + 0.7 * macs[1] / macs[0])
        return [Latency("", 64, time, time, 1, "cpu", 1) for time in (1.0, share)]

    monkeypatch.setattr("brittle.delivery.planning.latency", latency)
    plan = plan_removal(net, TEST, asked(ratio=0.4, target="latency", allocate="layerwise"), training=TRAIN)
    left = network_size(plan.removed.network, TEST.inputs[:1]).macs / network_size(net, TEST.inputs[:1]).macs
    assert abs(0.7 * (1 - left) - 0.4) <= 0.02


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 0.0}, {"ratio": 1.0}, {"floor": 1.0}, {"target": "bytes"}, {"remove": "heads"}, {"allocate": "best"},
        {"score": "l3"}, {"score": "row_l2", "remove": "ranks"}, {"target": "macs", "remove": "weights"},
        {"target": "filters", "remove": "ranks"}, {"target": "filters", "remove": "weights"},
        {"allocate": "planner", "remove": "ranks"}, {"score": "row_l1", "allocate": "planner"},
        {"round_to": 0}, {"keep": "0"}, {"calibration": 1},
    ],
)  # fmt: skip
def test_a_request_that_makes_no_sense_is_refused_by_its_name(options):
    with pytest.raises(InputError, match=f"^{next(iter(options))}: expected"):
        Compression(**options)


# Whose samples


def joined(one, other):
    inputs, labels = torch.cat([one.inputs, other.inputs]), torch.cat([one.labels, other.labels])
    return dataclasses.replace(one, inputs=inputs, labels=labels)


@pytest.mark.parametrize("training", [None, TEST, TRAIN, joined(TEST, TRAIN)], ids=["none", "same", "other", "both"])
def test_no_sample_that_is_looked_at_is_evaluated(training):
    def rows(x):
        return {row.numpy().tobytes() for row in x}

    parts = split_samples(TEST, training, 64, seed=3)
    evaluated = rows(parts.evaluated.inputs)
    assert not evaluated & rows(parts.training.inputs)
    assert rows(parts.seen[0]) <= rows(parts.training.inputs)
    assert evaluated <= rows(TEST.inputs)
    others = training is not None and training is not TEST
    assert len(parts.evaluated.labels) == (len(TEST.labels) if others else len(TEST.labels) // 2)


def test_too_few_samples_are_refused():
    three = Data("three", TEST.inputs[:3], TEST.labels[:3], 10, {})
    with pytest.raises(InputError, match="data: expected at least 4 samples"):
        split_samples(three, None, 64, 0)


# The whole way


@pytest.fixture(scope="module")
def compressed():
    net = untidy()
    with untouched(net):
        return net, compress(
            net, TEST, asked(ratio=0.4, target="macs"), QUICK, training=TRAIN, p=math.inf, execution=PLAIN
        )


def test_the_comparison_is_of_the_network_before_and_after_on_the_same_samples(compressed):
    _, result = compressed
    before, after = result.comparison.networks
    assert (before.name, after.name) == ("uncompressed", "compressed")
    assert before.audit.signature.data == after.audit.signature.data
    recipe = result.recipe
    assert (recipe.before, recipe.after) == (before.size, after.size)
    assert recipe.after == network_size(result.network, TEST.inputs[:1])
    assert recipe.share == pytest.approx(1 - recipe.after.macs / recipe.before.macs)
    with torch.no_grad():
        right = int((result.network(TEST.inputs).argmax(1) == TEST.labels).sum())
    assert (after.clean.hits, after.clean.n) == (right, len(TEST.labels))
    assert recipe.seconds.keys() == {"planning", "repair"}
    (step,) = recipe.repair  # fitted layers keep their batch norms' statistics
    assert step.startswith("layers fitted")
    assert result.comparison.compression == recipe


def test_the_same_seed_gives_the_same_network(compressed):
    net, result = compressed
    again, _ = finish(plan_removal(net, TEST, asked(ratio=0.4, target="macs"), training=TRAIN))
    assert equal(again, result.network)


def test_without_repair_the_network_is_what_the_plan_removed():
    plan = plan_removal(convnet(), TEST, asked(ratio=0.4, refit=False, recalibrate=False), training=TRAIN)
    network, recipe = finish(plan)
    assert equal(network, plan.removed.network)
    assert recipe.repair == ()


def test_fine_tuning_goes_on_where_it_stopped_and_is_done_once(tmp_path, monkeypatch):
    recipe = Recipe(epochs=2, batch_size=64, measure_every=0, distill=0.5)
    plan = plan_removal(mlp(), TEST, asked(ratio=0.5, fine_tune=recipe), training=TRAIN)
    expected, written = finish(plan)
    assert not equal(expected, finish(dataclasses.replace(plan, asked=asked(ratio=0.5)))[0])
    assert "fine-tuned for 2 epochs" in written.repair[-1]
    assert "fine-tuning" in written.seconds

    class Stopped(Exception):
        pass

    def stop(stage, done, total):
        if stage == "fine-tuning" and done == 1:
            raise Stopped

    with pytest.raises(Stopped):
        finish(plan, Execution(resume=tmp_path, progress=stop))
    assert equal(finish(plan, Execution(resume=tmp_path))[0], expected)
    monkeypatch.setattr("brittle.delivery.repair.train", lambda *_, **__: pytest.fail("it was done already"))
    assert equal(finish(plan, Execution(resume=tmp_path))[0], expected)


def test_weights_that_were_removed_stay_zero_in_training():
    recipe = Recipe(epochs=1, batch_size=64, measure_every=0)
    plan = plan_removal(mlp(), TEST, asked(ratio=0.7, remove="weights", fine_tune=recipe), training=TRAIN)
    network, written = finish(plan)
    for before, after in zip(plan.removed.network.parameters(), network.parameters(), strict=True):
        if before.ndim > 1:
            assert not after[before == 0].any()
            assert not torch.equal(before, after)
    weights = [p for p in network.parameters() if p.ndim > 1]
    share = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert written.zeros == pytest.approx(share)


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_networks_of_few_classes_are_attacked_by_what_they_admit(classes):
    net = nn.Sequential(mlp(), nn.Linear(10, classes)).eval()
    for attack in headline_attacks(classes, steps=2):
        found = attack(net, TEST.inputs[:4], TEST.labels[:4] % classes, eps=0.1, p=math.inf)
        assert float((found - TEST.inputs[:4]).abs().max()) <= 0.1 + 1e-6
