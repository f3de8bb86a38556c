"""Networks without gradients are audited: a copy's examples, and queries, are judged by the network."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import brittle
from brittle.errors import InputError
from brittle.evaluation import Threat, evaluate
from brittle.evaluation.execution import Execution
from brittle.evaluation.worst_case import worst_case
from brittle.results import Audit
from helpers.networks import few, mlp, right, untouched
from helpers.quantised import dynamic, static_digits

pytestmark = pytest.mark.filterwarnings("ignore")  # torch announces where its quantisation is to move
QUICK = Threat("fast", steps=10)


class Gone(nn.Module):
    """A network that hides its gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.net(x)


def names(audit: Audit) -> set[str]:
    return {item.name for item in audit.not_measured}


def test_an_int8_network_is_audited_with_the_numbers_of_its_float_network(tmp_path):
    (x, y), net = few(40)[:2], static_digits()
    with untouched(net):
        audit = brittle.audit(net, (x, y), QUICK, p=2, eps=0.3)
    evaluation, exact = audit.norm(2).evaluation, evaluate(mlp(), (x, y), Threat("fast", p=2), eps=0.3)
    assert abs(evaluation.robust_correct - exact.robust_correct) <= 4
    assert evaluation.robust_correct < evaluation.clean_correct
    assert [name.split("(")[0] for name in evaluation.attacks] == ["apgd", "apgd", "square"]
    unmeasured = {"gradients of the network", "local gradient norms", "universal perturbations", "feature compression"}
    assert unmeasured <= names(audit)
    assert len(audit.layers) == len(audit.norm(2).responses) == 3
    assert audit.norm(2).lipschitz.lower is None
    assert not any(flag.raised for flag in audit.flags)
    audit.save(tmp_path / "audit.json")
    assert Audit.load(tmp_path / "audit.json") == audit


def test_every_example_is_judged_by_the_network_itself():
    (x, y), net = few(40)[:2], dynamic(mlp(), dtype=torch.float16)
    threat = Threat(partial(brittle.apgd, steps=10))
    worst = worst_case(net, x, y, threat, 0.1)
    robust = worst.adversarial_logits.argmax(1) == y
    assert torch.equal(robust, right(net, worst.x_adv, y))
    assert int(robust.sum()) < int(worst.clean_correct.sum())
    assert worst.backwards > 0


def test_a_network_without_a_twin_is_attacked_by_queries_and_says_so():
    x, y = few(30)[:2]
    audit = brittle.audit(Gone(), (x, y), QUICK, p=math.inf, eps=0.1)
    evaluation = audit.norm(math.inf).evaluation
    assert evaluation.robust_correct < evaluation.clean_correct
    assert [name.split("(")[0] for name in evaluation.attacks] == ["square"]
    assert {"apgd(loss='ce', steps=10)", "local gradient norms"} <= names(audit)
    assert [flag.name for flag in audit.flags if flag.raised] == ["attacked by queries alone"]
    assert any("attacked by queries alone" in finding for finding in audit.verdict.findings)


def test_plain_functions_without_gradients_are_evaluated():
    (x, y), inner = few(20)[:2], mlp()
    result = evaluate(lambda x: inner(x).detach(), (x, y), Threat("fast"), eps=0.1, execution=Execution(certify=False))
    assert result.n == 20
    assert result.robust_correct < result.clean_correct


def test_a_gradient_attack_that_was_asked_for_by_itself_is_refused_where_there_is_no_twin():
    with pytest.raises(InputError):
        evaluate(Gone(), few(4)[:2], Threat(partial(brittle.apgd, steps=2)), eps=0.1)
