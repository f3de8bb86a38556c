"""One trace of a network serves its bounds, its certificates and its copies, and is refused for another network."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

from brittle.bounds.lipschitz.network import network_bounds
from brittle.bounds.relaxation.certify import margin_bounds, read_relaxation
from brittle.errors import InputError
from brittle.models.borrow import frozen
from brittle.models.fast_copy import copy_for_attacks
from brittle.models.trace import NoRule, trace
from helpers.networks import convnet, few, seeded, untouched

SHAPE = (1, 8, 8)
NORMS = (2, math.inf)


class Counting(nn.Module):
    """Counts how often it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.times = convnet(), 0

    def forward(self, x: Tensor) -> Tensor:
        """Pass on."""
        if isinstance(x, fx.Proxy):
            self.times += 1
        return self.inner(x)


class Untraceable(nn.Module):
    """Its operations depend on its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = convnet()

    def forward(self, x: Tensor) -> Tensor:
        """Pass on."""
        return self.inner(x if bool((x >= -1).all()) else -x)


class Unlearned(nn.Module):
    """One of its branches passes no gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.direct = convnet(), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """One of two branches is hidden from gradients."""
        with torch.no_grad():
            hidden = self.first(x)
        return hidden + self.direct(x.flatten(1))


def traced_in_evaluation_mode(net, shape=SHAPE):
    with frozen(net):
        try:
            return trace(net, shape)
        except NoRule as error:
            return error


def test_one_trace_serves_all_who_read_the_network():
    net, (x, y) = Counting().eval(), few(6)
    expected = network_bounds(net, NORMS, input_shape=SHAPE)
    margins = margin_bounds(read_relaxation(net, SHAPE), x, y, eps=0.02, p=2)
    copied = copy_for_attacks(net, x)
    before = net.times
    traced = traced_in_evaluation_mode(net)
    with untouched(net):
        bounds = network_bounds(net, NORMS, input_shape=SHAPE, traced=traced)
        relaxation = read_relaxation(net, SHAPE, traced=traced)
        again = copy_for_attacks(net, x, traced=traced)
    assert net.times == before + 1
    assert bounds == expected
    for p in NORMS:
        assert torch.equal(bounds[p].margins, expected[p].margins)
    assert torch.equal(margin_bounds(relaxation, x, y, eps=0.02, p=2), margins)
    assert torch.equal(again(x), copied(x))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in again.modules())


def test_a_trace_brings_its_shape():
    net = convnet()
    assert network_bounds(net, NORMS, traced=traced_in_evaluation_mode(net)) == network_bounds(
        net, NORMS, input_shape=SHAPE
    )


def test_traces_may_be_made_where_gradients_are_off():
    net, (x, _) = convnet(), few(6)
    with torch.no_grad(), frozen(net):
        traced = trace(net, SHAPE)
    assert traced.gradients
    assert isinstance(copy_for_attacks(net, x, traced=traced), fx.GraphModule)


def test_copies_of_traces_share_no_memory_with_the_network():
    net, (x, _) = convnet(), few(6)
    traced = traced_in_evaluation_mode(net)
    copied = copy_for_attacks(net, x, traced=traced)
    assert isinstance(copied, fx.GraphModule)
    logits = copied(x)
    with torch.no_grad():
        for tensor in [*net.parameters(), *net.buffers()]:
            tensor.zero_()
    assert torch.equal(copied(x), logits)
    assert any(isinstance(module, nn.BatchNorm2d) for module in traced.graph.modules())  # the trace is only read


def test_graphs_without_the_networks_gradients_are_no_copies():
    net, (x, _) = seeded(Unlearned).eval(), few(6)
    traced = traced_in_evaluation_mode(net)
    assert not traced.gradients
    copied = copy_for_attacks(net, x, traced=traced)
    assert not isinstance(copied, fx.GraphModule)
    assert network_bounds(net, (2,), input_shape=SHAPE, traced=traced)[2].upper is not None  # of the values


def test_weights_that_are_computed_are_computed_once_in_copies_of_traced_networks():
    net, (x, _) = convnet(), few(6)
    parametrizations.weight_norm(net[0])
    copied = copy_for_attacks(net, x, traced=traced_in_evaluation_mode(net))
    assert isinstance(copied, fx.GraphModule)
    assert not any(hasattr(module, "parametrizations") for module in copied.modules())
    torch.testing.assert_close(copied(x), net(x), rtol=1e-4, atol=1e-4)


def test_the_error_of_tracing_is_handed_down_as_well():
    net, (x, _) = seeded(Untraceable).eval(), few(6)
    error = traced_in_evaluation_mode(net)
    assert isinstance(error, NoRule)
    bounds = network_bounds(net, NORMS, input_shape=SHAPE, traced=error)
    assert bounds == network_bounds(net, NORMS, input_shape=SHAPE)
    assert bounds[2].unavailable == str(error)
    with pytest.raises(NoRule, match="cannot be traced"):
        read_relaxation(net, SHAPE, traced=error)
    assert not isinstance(copy_for_attacks(net, x, traced=error), fx.GraphModule)


def test_traces_of_another_network_or_shape_are_refused():
    net = convnet()
    other = traced_in_evaluation_mode(convnet())
    with pytest.raises(InputError, match="traced: expected the trace of this"):
        network_bounds(net, NORMS, input_shape=SHAPE, traced=other)
    with pytest.raises(InputError, match="traced: expected the trace of this"):
        read_relaxation(net, SHAPE, traced=other)
    with pytest.raises(InputError, match="traced: expected a trace of inputs"):
        network_bounds(net, NORMS, input_shape=(1, 6, 6), traced=traced_in_evaluation_mode(net))
