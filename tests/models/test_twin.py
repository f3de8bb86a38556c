"""Copies in real numbers of networks without gradients: they answer as the network does, and have gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.ao.nn import quantized

from brittle.models.borrow import frozen
from brittle.models.network import borrowed
from brittle.models.twin import differentiable_twin, has_gradients
from helpers.networks import few, mlp, seeded, uniform, untouched
from helpers.quantised import dynamic, static, static_digits

pytestmark = pytest.mark.filterwarnings("ignore")  # torch announces where its quantisation is to move


class Residual(nn.Module):
    """Sums, products, parts side by side and activations that keep a scale of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = quantization.QuantStub(), quantization.DeQuantStub()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.other, self.bent, self.hard = nn.Conv2d(4, 4, 1), nn.LeakyReLU(0.1), nn.Hardswish()
        self.sum, self.join = nn.quantized.FloatFunctional(), nn.quantized.FloatFunctional()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bent(self.norm(self.conv(self.enter(x))))
        h = self.sum.add_relu(h, self.hard(self.other(h)))
        return self.leave(self.head(self.join.cat([h, h], 1).mean((2, 3))))


def residual() -> nn.Module:
    net = seeded(Residual).eval()
    quantization.fuse_modules(net, [["conv", "norm"]], inplace=True)
    return static(net, uniform(0, 32, 2, 6, 6))


NETWORKS = {
    "static": (static_digits, (1, 8, 8), 1e-6),
    "residual": (residual, (2, 6, 6), 0.05),
    "dynamic": (lambda: dynamic(mlp()), (1, 8, 8), 0.05),
    "dynamic in half precision": (lambda: dynamic(mlp(), dtype=torch.float16), (1, 8, 8), 1e-5),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_twin_answers_as_its_network_and_has_gradients(name):
    make, shape, within = NETWORKS[name]
    net, x = make(), uniform(1, 64, *shape)
    with untouched(net), frozen(net):
        assert not has_gradients(net, x)
        twin = differentiable_twin(net, x)
    with torch.no_grad():
        expected, answer = net(x), twin(x)
    assert float((answer - expected).norm()) <= within * float(expected.norm())
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(twin(x).square().sum(), x)
    assert float(gradient.norm()) > 0
    assert not any(parameter.requires_grad for parameter in twin.parameters())


def test_gradients_of_a_twin_are_those_of_the_network_before_it_was_quantised():
    """Up to the rounding of weights and results: cosines of the gradients of the largest logit."""
    x = few(32)[0].clone().requires_grad_()
    (expected,), (gradient,) = (
        torch.autograd.grad(net(x).amax(1).sum(), x)
        for net in (mlp(), differentiable_twin(static_digits(), x.detach()))
    )
    assert float(torch.cosine_similarity(gradient.flatten(1), expected.flatten(1)).median()) > 0.9


def test_what_has_no_counterpart_has_no_twin():
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = quantized.Quantize(0.1, 0, torch.quint8)
            self.act = quantized.Sigmoid(1 / 256, 0)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.enter(x)).dequantize()

    class Detached(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach()

    x = torch.rand(3, 4)
    for net in (Reading(), Detached(), lambda x: x.detach()):
        assert not has_gradients(net, x)
        assert differentiable_twin(net, x) is None
        with borrowed(net, x) as network:
            assert not network.gradients
            assert network.fast is network.model is net


def test_networks_with_gradients_and_broken_ones_are_left_to_others():
    x = few(4)[0]
    for net in (mlp(), lambda x: x.flatten(1) * 2, nn.Linear(3, 2)):
        assert has_gradients(net, x)
    with borrowed(mlp(), x) as network:
        assert network.gradients
