"""Flags at every door: ``evaluate`` and ``brittle attack`` say when their number must not be trusted."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from torch import nn

import brittle
from brittle.attacks import apgd
from brittle.evaluation import attack
from brittle.evaluation.execution import Execution
from brittle.evaluation.honesty import doors
from brittle.evaluation.threat import Threat
from brittle.results import AttackResult, Evaluation, Flag
from helpers.deceivers import Deceiver
from helpers.networks import few, mlp, seeded, untidy, untouched

ATTACKS = tuple(functools.partial(apgd, loss=loss, steps=10) for loss in ("ce", "dlr"))


@functools.cache
def deceiver() -> nn.Module:
    other = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))).eval()
    return Deceiver("one-hot and 0.001 of another network", mlp(), other)


def raised(evaluation: Evaluation) -> set[str]:
    return {flag.name for flag in evaluation.flags if flag.raised}


def test_evaluate_flags_a_deceiver_and_no_honest_network():
    data = few(40)
    honest = brittle.evaluate(mlp(), data, Threat(ATTACKS), eps=0.1)
    assert raised(honest) == set()
    assert len(honest.flags) >= 8
    caught = brittle.evaluate(deceiver(), data, Threat(ATTACKS), eps=0.15)
    assert {"answers that jump", "queries against gradients"} <= raised(caught)
    alone = brittle.evaluate(deceiver(), data, Threat(ATTACKS), eps=0.15, honesty=False)
    assert alone.robust_correct > 25  # without a word it would be called robust
    assert caught.robust_correct < alone.robust_correct - 10  # and the queries that saw it go on
    assert any(line.startswith("Do not trust the robust accuracy (queries") for line in caught.doubts)


def test_checks_change_no_number_and_can_be_left_out():
    data = few(30)
    with_checks, without = (
        brittle.evaluate(mlp(), data, Threat(ATTACKS), eps=0.1, honesty=honesty) for honesty in (True, False)
    )
    assert without.flags == ()
    assert dataclasses.replace(with_checks, flags=()) == without


def test_flags_do_not_depend_on_how_the_work_is_carried_out(tmp_path):
    x, y = few(16)
    threat = Threat(ATTACKS)
    whole = brittle.evaluate(mlp(), (x, y), threat, eps=0.05)
    streamed = brittle.evaluate(mlp(), [(x[:9], y[:9]), (x[9:], y[9:])], threat, eps=0.05)
    kept = Execution(batch_size=8, resume=tmp_path)
    brittle.evaluate(mlp(), (x, y), threat, eps=0.05, execution=kept)
    again = brittle.evaluate(mlp(), (x, y), threat, eps=0.05, execution=kept)
    for other in (streamed, again):
        assert [(flag.name, flag.raised) for flag in other.flags] == [(flag.name, flag.raised) for flag in whole.flags]


def test_the_checks_look_at_the_first_samples_alone(monkeypatch):
    monkeypatch.setattr(doors, "CHECKED", 10)
    x, y = few(40)
    for execution in (Execution(), Execution(batch_size=3)):
        flags = brittle.evaluate(mlp(), (x, y), Threat(ATTACKS), eps=0.05, execution=execution).flags
        (zero,) = [flag for flag in flags if flag.name == "zero gradients"]
        assert " of 10 samples" in zero.finding or " of 9 samples" in zero.finding


def test_attack_flags_every_norm_for_itself_and_the_model_in_each():
    result = attack(deceiver(), few(40), Threat(ATTACKS), eps={math.inf: 0.15, 2.0: 1e-4})
    inf, two = result.evaluations
    assert "queries against gradients" in raised(inf)
    assert raised(two) == {"answers that jump"}  # of the model; within next to nothing nothing is wrong
    assert {flag.p for flag in inf.flags} == {None, math.inf}
    assert {flag.p for flag in two.flags} == {None, 2.0}
    assert not any(item.name.startswith("flat") for item in result.not_measured)
    assert AttackResult.from_json(result.to_json()) == result


def test_a_doubt_gives_way_to_a_proof_and_few_samples_are_said():
    flag = Flag("noise", True, "Found 3.", "why")
    e = Evaluation(("apgd",), math.inf, 0.1, (0.0, 1.0), 1, 0, {}, 200, 150, 140, 0, 0.1, flags=(flag,))
    assert e.doubts == ("Do not trust the robust accuracy (noise). Found 3.",)
    for proven, sentences in ((137, 1), (138, 0), (140, 0)):
        assert len(dataclasses.replace(e, proven=proven).doubts) == sentences
    assert dataclasses.replace(e, flags=()).doubts == ()
    few_right = dataclasses.replace(e, clean_correct=99, robust_correct=99, proven=99)
    assert few_right.doubts == ("Only 99 samples are right without attack: too few for a verdict (100).",)


@pytest.mark.parametrize("make", [untidy, deceiver])
def test_the_model_comes_back_untouched(make):
    net = make()
    with untouched(net):
        brittle.evaluate(net, few(12), Threat(ATTACKS), eps=0.05)


def test_a_network_that_shows_no_gradient_is_evaluated_by_queries():
    """Gradient checks are left out then; the others are made."""

    class Hidden(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return mlp()(x.detach())

    def nothing(model, x, y, *, eps, p):
        return x

    caught = brittle.evaluate(Hidden(), few(40), Threat((nothing,)), eps=0.15, execution=Execution(certify=False))
    assert "queries against gradients" in raised(caught)
