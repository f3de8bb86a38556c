"""Strided convolutions bounded together with the one before, inside whole networks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from brittle.bounds import network_bounds
from brittle.bounds.lipschitz import conv_pairs
from brittle.bounds.pairs import conv as pair_conv
from brittle.bounds.pairs import two as pair_two
from brittle.linear.conv_geometry import ConvGeometry
from brittle.linear.convolution import operator_norm_bounds
from brittle.results.methods import Argument


def conv(channels, out, stride=1, seed=0, **kwargs):
    torch.manual_seed(seed + channels + 10 * out)
    return nn.Conv2d(channels, out, 3, stride=stride, padding=1, **kwargs).double().requires_grad_(False)


def arguments(model, shape=(2, 8, 8), p=2):
    return dict(network_bounds(model.eval(), (p,), input_shape=shape)[p].arguments)


def share(second, first, size):
    """What the pair's bound is of the product of the two norms."""
    bounds = pair_conv.upper(second.weight, ConvGeometry.of(second), first.weight, ConvGeometry.of(first), size)
    after = ConvGeometry.of(first).size_after(first.weight.shape[2:], size)
    norms = operator_norm_bounds(first, 2, size).upper, operator_norm_bounds(second, 2, after).upper
    return min(bounds.values()) / math.prod(norms)


@pytest.mark.parametrize("seed", range(3))
def test_no_jacobian_exceeds_the_bound(seed):
    model = nn.Sequential(
        conv(2, 4, seed=seed), nn.ReLU(), conv(4, 6, 2, seed), nn.LeakyReLU(0.2), conv(6, 6, 2, seed), nn.ReLU(),
        nn.Flatten(), nn.Linear(24, 3).double(),
    )  # fmt: skip
    values = arguments(model)
    x = torch.randn(16, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    largest = 0.0
    for sample in x:
        J = torch.autograd.functional.jacobian(lambda v: model(v[None])[0], sample)
        largest = max(largest, np.linalg.norm(J.flatten(1).detach().numpy(), 2))
    assert largest <= values[Argument.CONV_PAIRS] < values[Argument.PRODUCT]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (conv(2, 4), nn.AvgPool2d(2)),
        (conv(2, 4), nn.AvgPool2d(3, 2, padding=1)),
        (conv(2, 4, 2), conv(4, 4, 2, groups=4)),
        (conv(2, 4, dilation=2), conv(4, 2, (1, 3))),
    ],
    ids=["average pooling", "padded pooling", "depthwise", "dilation"],
)
def test_no_pattern_exceeds_a_pair(first, second):
    """Patterns that a search finds on the explicit matrices."""
    x = torch.zeros(2, 6, 6, dtype=torch.float64)
    A1 = torch.autograd.functional.jacobian(lambda v: first(v[None])[0], x).reshape(-1, x.numel())
    middle = first(x[None])[0]
    A2 = torch.autograd.functional.jacobian(lambda v: second(v[None])[0], middle).reshape(-1, middle.numel())
    values = arguments(nn.Sequential(first, nn.ReLU(), second), (2, 6, 6))
    largest = pair_two.lower(A2, A1)
    assert largest <= values[Argument.CONV_PAIRS] <= values[Argument.PRODUCT] * (1 + 1e-9)
    assert values[Argument.CONV_PAIRS] < 2 * largest


def test_pairs_that_take_long_beside_the_recursion_are_left_out(monkeypatch):
    model = nn.Sequential(conv(2, 4), nn.ReLU(), conv(4, 6, 2))
    assert Argument.CONV_PAIRS in arguments(model)
    for name in ("PAIRS_SHARE", "LEAST_MULTIPLICATIONS"):
        monkeypatch.setattr(conv_pairs, name, 0.0)
    assert Argument.CONV_PAIRS not in arguments(model)


def test_a_pair_alone_is_its_bound_times_the_rest():
    first, second = conv(2, 4), conv(4, 6, 2)
    values = arguments(nn.Sequential(first, nn.ReLU(), second))
    assert values[Argument.CONV_PAIRS] == pytest.approx(
        values[Argument.PRODUCT] * share(second, first, (8, 8)), rel=1e-9
    )


def test_no_convolution_is_used_in_two_pairs():
    layers = [conv(2, 4), conv(4, 4, 2, seed=1), conv(4, 4, 2, seed=2), conv(4, 2, 2, seed=3)]
    values = arguments(nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())]))
    sizes = [(8, 8), (8, 8), (4, 4)]
    shares = [share(layers[k + 1], layers[k], size) for k, size in enumerate(sizes)]
    best = min(shares[0] * shares[2], shares[1])
    assert values[Argument.CONV_PAIRS] == pytest.approx(values[Argument.PRODUCT] * best, rel=1e-9)


def test_the_better_bound_reaches_the_other_norm():
    model = nn.Sequential(conv(2, 8), nn.ReLU(), conv(8, 8, 2), nn.Flatten())
    two, sup = arguments(model), arguments(model, p=math.inf)
    assert sup[Argument.CROSS_NORM] == pytest.approx(
        math.sqrt(128) * min(two[Argument.CONV_PAIRS], two[Argument.MULTIPLIERS]), rel=1e-9
    )


class Shared(nn.Module):
    """The activation between the convolutions is read twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.other = conv(2, 4), conv(4, 4, 2), conv(4, 4, 2, seed=5)

    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.second(h) + self.other(h)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(conv(2, 4), nn.ReLU(), conv(4, 4)),
        nn.Sequential(conv(2, 4), nn.SiLU(), conv(4, 4, 2)),
        nn.Sequential(conv(2, 4), nn.MaxPool2d(2), conv(4, 4, 2)),
        nn.Sequential(conv(2, 4, padding_mode="circular"), nn.ReLU(), conv(4, 4, 2)),
        Shared(),
    ],
    ids=["stride 1", "negative slopes", "pooling between", "circular padding", "read twice"],
)
def test_other_neighbours_are_no_pair(model):
    assert Argument.CONV_PAIRS not in arguments(model)


def test_a_zero_convolution_makes_no_pair():
    first = conv(2, 4)
    first.weight.zero_()
    values = arguments(nn.Sequential(first, nn.ReLU(), conv(4, 4, 2)))
    assert values[Argument.PRODUCT] == 0
    assert Argument.CONV_PAIRS not in values
