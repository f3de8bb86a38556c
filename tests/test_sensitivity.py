"""Local Jacobian norms against torch's own Jacobian, and below every certified bound."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from brittle.bounds import lipschitz_upper_bound
from brittle.errors import InputError
from brittle.sensitivity import jacobian_norms
from networks import convnet, few, linear, mlp, seeded, uniform, untidy, untouched

NORMS = [2, math.inf]


def by_torch(model, x, p):
    """``||J||_{p->p}`` of every input's full Jacobian."""
    rows = [torch.autograd.functional.jacobian(lambda one: model(one[None])[0], one).flatten(1) for one in x]
    return torch.stack([torch.linalg.matrix_norm(J, ord=p) for J in rows])


def wide(classes):
    return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, classes))).double()


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("classes", [1, 2, 10])
def test_norms_are_exact_up_to_ten_classes(classes, p):
    x = uniform(0, 9, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(jacobian_norms(wide(classes), x, p), by_torch(wide(classes), x, p), rtol=1e-9, atol=0)


@pytest.mark.parametrize("p", NORMS)
def test_norms_of_trained_networks(p):
    x, _ = few(12, torch.float64)
    for net in (mlp(torch.float64), convnet(torch.float64)):
        torch.testing.assert_close(jacobian_norms(net, x, p), by_torch(net, x, p), rtol=1e-7, atol=0)
    single = jacobian_norms(mlp(), x.float(), p)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), by_torch(mlp(torch.float64), x, p), rtol=1e-4, atol=0)


@pytest.mark.parametrize("p", NORMS)
def test_more_classes_give_a_lower_bound_from_the_ten_largest_logits(p):
    net = wide(12)
    x = uniform(1, 9, 1, 8, 8, dtype=torch.float64)
    found, exact = jacobian_norms(net, x, p), by_torch(net, x, p)
    assert (found <= exact * (1 + 1e-9)).all()
    assert (found >= 0.3 * exact).all()
    for one, value in zip(x, found, strict=True):
        J = torch.autograd.functional.jacobian(lambda a: net(a[None])[0], one).flatten(1)
        top = net(one[None])[0].argsort(descending=True)[:10]
        assert float(value) == pytest.approx(float(torch.linalg.matrix_norm(J[top], ord=p)), rel=1e-9)


@pytest.mark.parametrize("p", NORMS)
def test_local_norms_stay_below_the_certified_bound(p):
    for dtype in (torch.float32, torch.float64):
        for net in (mlp(dtype), convnet(dtype), linear(classes=6, n=64, dtype=dtype)):
            found = jacobian_norms(net, few(30, dtype)[0], p)
            upper = lipschitz_upper_bound(net, p, input_shape=(1, 8, 8)).upper
            assert float(found.max()) <= upper * (1 + 1e-6)
            assert (found > 0).all()


@pytest.mark.parametrize("p", NORMS)
def test_linear_networks_have_their_matrix_norm_everywhere(p):
    net = linear(classes=6, n=64, dtype=torch.float64)
    found = jacobian_norms(net, uniform(2, 5, 64, dtype=torch.float64), p)
    torch.testing.assert_close(found, torch.linalg.matrix_norm(net[1].weight.detach(), ord=p).expand(5))


def test_constant_networks_have_norm_zero():
    for p in NORMS:
        assert jacobian_norms(lambda x: 0 * x.flatten(1)[:, :4], uniform(0, 3, 1, 8, 8), p).tolist() == [0, 0, 0]


def test_models_come_back_as_they_were():
    net = untidy()
    x, _ = few(8)
    with untouched(net), torch.no_grad():
        mixed = jacobian_norms(net, x, 2)
    net.eval()
    assert torch.equal(jacobian_norms(net, x, 2), mixed)
    assert not mixed.requires_grad


def test_other_norms_are_an_error():
    with pytest.raises(InputError, match=r"^p: expected 2 or inf; got 1"):
        jacobian_norms(mlp(), few(2)[0], 1)
