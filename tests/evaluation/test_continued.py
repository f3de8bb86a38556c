"""Once queries break what gradients left, the evaluation goes on with queries, and its numbers agree."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from brittle.auditing import audit
from brittle.evaluation.continued import go_on_with_queries
from brittle.evaluation.execution import Execution
from brittle.evaluation.honesty import checks, honesty_flags
from brittle.evaluation.run import Case, Chunk, Plan, run_parts
from brittle.evaluation.threat import Threat, for_classes
from brittle.evaluation.worst_case import WorstCase
from brittle.models.borrow import frozen
from brittle.models.network import make_ready
from helpers.networks import few, mlp

EPS = 0.1


@pytest.fixture(autouse=True)
def _few_queries(monkeypatch):
    """Enough for networks this small."""
    for name, value in {"QUERIES": 100, "MORE_QUERIES": 100, "WALK": 1}.items():
        monkeypatch.setattr(checks, name, value)


class Hidden(nn.Module):
    """A fragile network that hands out another one's gradients: zero, since its own input is cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.detach()) + 0 * x.flatten(1).sum(1, keepdim=True)


def attacked(net):
    """Case, parts, examples and flags of a network under ``fast`` with few steps."""
    x, y = few(20)
    threat = for_classes(Threat("fast", steps=4), 10)[0]
    case = Case(threat, EPS, curve=(2 * EPS,))
    chunks = [Chunk(start, x[start : start + 10], y[start : start + 10], 20) for start in (0, 10)]
    network = make_ready(net, x, threat.bounds)
    plan = Plan((case,), Execution(certify=False), 20)
    outcomes = [outcome for (outcome,) in run_parts(network, plan, chunks[0], iter(chunks))]
    worst = WorstCase.joined([outcome.worst for outcome in outcomes])
    parts = [outcome.part for outcome in outcomes]
    return network, case, parts, worst, honesty_flags(network, worst, threat, EPS)[0]


def test_a_raised_flag_sends_queries_to_all_survivors():
    with frozen(net := Hidden().eval()):
        network, case, parts, worst, flags = attacked(net)
        assert any(flag.raised and flag.name == "queries against gradients" for flag in flags)
        later_case, later, examples = go_on_with_queries(network, case, parts, worst, flags)
    assert worst.robust_correct.sum() == worst.clean_correct.sum() > 15
    assert examples.robust_correct.sum() < 0.7 * worst.robust_correct.sum()
    assert (worst.robust_correct | ~examples.robust_correct).all()
    assert [part.first for part in later] == [part.first for part in parts] == [0, 10]
    names = later_case.threat.names
    broken = [sample for part in later for sample in part.samples if sample.attack is not None]
    assert len(broken) == int((worst.robust_correct & ~examples.robust_correct).sum())
    assert {sample.attack for sample in broken} <= set(names[len(case.threat.battery) :])
    for part in later:
        right = [sample for sample in part.samples if sample.clean_prediction == sample.label]
        robust = sum(sample.attack is None for sample in right)
        assert part.misled == len(right)  # gradients had broken none of them
        assert part.survivors[0] == robust >= part.survivors[1]  # the curve at the budget is the same number
        assert part.forwards > 500


def test_without_a_raised_flag_of_that_norm_nothing_changes():
    with frozen(net := mlp()):
        network, case, parts, worst, flags = attacked(net)
        same_case, same_parts, same = go_on_with_queries(network, case, parts, worst, flags)
        assert same_case is case
        assert same is worst
        assert same_parts == parts
    other = [flag.__class__(flag.name, True, flag.finding, flag.meaning, 2.0) for flag in flags]
    assert go_on_with_queries(network, case, parts, worst, other)[2] is worst


def test_an_audit_goes_on_and_says_so():
    result = audit(Hidden(), few(12), Threat("fast", steps=3), p=math.inf, eps={math.inf: EPS})
    (norm,) = result.norms
    assert any(name.startswith("square(") for name in norm.evaluation.attacks)
    assert norm.evaluation.misled > 10
    assert "attacked further, since gradients mislead" in norm.evaluation.summary
    assert norm.evaluation.robust_correct < norm.evaluation.clean_correct
    assert norm.curve.robust[norm.curve.eps.index(norm.eps)] == norm.evaluation.robust_accuracy
