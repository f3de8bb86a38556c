"""The walk along the decision: it uses predictions alone, keeps budgets, and comes near the exact distance."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brittle.attacks.decision_search import boundary_walk
from brittle.errors import InputError
from brittle.models.forward import Counted
from helpers.networks import Logistic, convnet, distance, few, mlp, right, uniform, untidy, untouched

INF = math.inf
BUDGETS = {INF: 0.15, 2.0: 1.0}


def labels_alone(net: nn.Module):
    """The network's predictions as one-hot vectors: nothing else is left of its logits."""

    def ask(x: Tensor) -> Tensor:
        logits = net(x)
        return F.one_hot(logits.argmax(1), logits.shape[1]).to(logits)

    return ask


@pytest.mark.parametrize("p", BUDGETS)
def test_predictions_are_all_that_it_uses(p):
    x, y = few(40)
    found = [boundary_walk(net, x, y, eps=BUDGETS[p], p=p, candidates=x) for net in (mlp(), labels_alone(mlp()))]
    assert torch.equal(*found)
    before, after = right(mlp(), x, y), right(mlp(), found[0], y)
    assert int((before & ~after).sum()) > 20
    assert (distance(found[0], x, p) <= BUDGETS[p] * (1 + 1e-6)).all()
    assert bool(((found[0] >= 0) & (found[0] <= 1)).all())
    assert torch.equal(found[0][after], x[after])


@pytest.mark.parametrize("p", BUDGETS)
def test_of_a_linear_classifier_it_finds_what_is_clearly_within_the_budget_and_nothing_beyond(p):
    net = Logistic(12, torch.float64)
    x = uniform(3, 80, 12, low=0.4, high=0.6, dtype=torch.float64)
    z = (x @ net.theta + net.bias).detach()
    y, exact = (z > 0).long(), z.abs() / (net.theta.abs().sum() if p == INF else net.theta.norm()).detach()
    eps = float(exact.median())
    broken = ~right(net, boundary_walk(net, x, y, eps=eps, p=p, candidates=x, rounds=20), y)
    assert not bool((broken & (exact > eps * (1 + 1e-6))).any())
    assert bool(broken[exact < eps / 1.5].all())


@pytest.mark.parametrize("p", BUDGETS)
def test_neither_batch_nor_order_changes_what_is_found(p):
    x, y = few(30)
    ids, order = torch.arange(30), torch.arange(29, -1, -1)
    whole = boundary_walk(mlp(), x, y, eps=BUDGETS[p], p=p, candidates=x, ids=ids)
    small = boundary_walk(mlp(), x, y, eps=BUDGETS[p], p=p, candidates=x, ids=ids, batch_size=7)
    turned = boundary_walk(mlp(), x[order], y[order], eps=BUDGETS[p], p=p, candidates=x, ids=ids[order])
    budgets = torch.full((30,), BUDGETS[p])
    alone = boundary_walk(mlp(), x[:9], y[:9], eps=budgets[:9], p=p, candidates=x, ids=ids[:9])
    verdicts = right(mlp(), whole, y)
    assert torch.equal(right(mlp(), small, y), verdicts)
    assert torch.equal(right(mlp(), turned, y[order]), verdicts[order])
    assert torch.equal(right(mlp(), alone, y[:9]), verdicts[:9])


def test_noise_is_a_start_where_there_are_no_candidates():
    x, y = few(30)
    broken = ~right(mlp(), boundary_walk(mlp(), x, y, eps=0.2), y)
    assert int(broken.sum()) > 10


def test_a_constant_network_is_left_in_peace():
    x, y = few(10)
    net = Counted(lambda x: torch.ones(len(x), 1) * torch.arange(10.0).flip(0))
    zeros = torch.zeros_like(y)
    assert torch.equal(boundary_walk(net, x, zeros, eps=0.3, candidates=x), x)
    assert net.forwards <= 60


@pytest.mark.parametrize("p", BUDGETS)
def test_a_survivor_costs_what_is_said(p):
    x, y = few(20)
    x, y = (part[right(mlp(), x, y)] for part in (x, y))
    net = Counted(mlp())
    boundary_walk(net, x, y, eps=1e-4, p=p, candidates=x, rounds=3, probes=10)
    assert net.forwards <= len(x) * (3 * (10 + 6 + 4 + 1) + 4 * 7 + 2)


def test_the_model_comes_back_untouched():
    x, y = few(8)
    net = untidy()
    with untouched(net):
        boundary_walk(net, x, y, eps=0.1, candidates=x, rounds=1)
    flat = boundary_walk(lambda z: convnet()(z.view(-1, 1, 8, 8)), x.flatten(1), y, eps=0.1, rounds=1)
    assert flat.shape == (8, 64)


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"probes": 0}, {"batch_size": 0}, {"eps": -1.0}, {"p": 1.0}])
def test_arguments_out_of_range_are_named(wrong):
    x, y = few(4)
    with pytest.raises(InputError, match=next(iter(wrong))):
        boundary_walk(mlp(), x, y, **({"eps": 0.1} | wrong))
