"""A model is lent and given back, whatever its forward does to its buffers and whoever calls."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch import Tensor, nn

from brittle.auditing import audit
from brittle.bounds import network_bounds
from brittle.bounds.relaxation.certify import margin_bounds, read_relaxation
from brittle.errors import InputError
from brittle.evaluation import Threat, evaluate
from brittle.models.borrow import frozen, unwrapped
from brittle.models.layers import read_layers
from brittle.models.normalize import normalised
from brittle.models.trace import NoRule, trace
from brittle.training import train
from helpers.networks import convnet, few, seeded, untouched
from helpers.trainings import FULL, small, some, weights

SHAPE = (1, 8, 8)
QUICK = Threat("fast", steps=2)


@functools.cache
def plainly_audited():
    return audited(convnet())


def audited(net: nn.Module, convert=lambda tensor: tensor):
    """An audit of a few samples, in one norm, without the checks that take seconds."""
    x, y = few(12)[:2]
    return audit(net, (convert(x), convert(y)), QUICK, p=2, honesty=False)


# --- what a forward may do to buffers ----------------------------------------------------------------------------


class Keeping(nn.Module):
    """A network whose forward changes its buffers in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.head = way, nn.Linear(4, 3)
        self.register_buffer("seen", torch.ones(2, 3).t())
        self.register_buffer("empty", None)
        self.child = nn.Module()
        self.child.register_buffer("inner", torch.arange(3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.way == "values":
                self.seen.add_(1)
            elif self.way == "resized":
                self.seen.resize_(7, 5).fill_(2.0)
            elif self.way == "replaced":
                self.seen = torch.zeros(9)
                self.empty = torch.zeros(1)
            elif self.way == "added":
                self.child.register_buffer(f"more{len(self.child._buffers)}", x.clone(), persistent=False)
            elif self.way == "removed":
                self.child._buffers.pop("inner", None)
            elif self.way == "data":
                self.child.inner.data = torch.zeros(5, dtype=torch.int64)
        return self.head(x)


@pytest.mark.parametrize("way", ["values", "resized", "replaced", "added", "removed", "data"])
def test_buffers_are_given_back_bit_equal(way):
    net = seeded(lambda: Keeping(way))
    own = {name: (id(buffer), buffer.stride()) for name, buffer in net.named_buffers()}
    with untouched(net), frozen(net):
        for _ in range(2):
            net(torch.zeros(2, 4))
    assert {name: (id(buffer), buffer.stride()) for name, buffer in net.named_buffers()} == own
    assert net.child._non_persistent_buffers_set == set()
    with untouched(net):
        evaluate(net, (torch.zeros(3, 4), torch.tensor([0, 1, 2])), QUICK, eps=0.1)


def test_an_audit_inside_inference_mode_is_the_same():
    net, _ = convnet(), plainly_audited()
    with untouched(net), torch.inference_mode():
        inside = audited(net, torch.clone)
        assert torch.is_inference_mode_enabled()
    assert (inside.norms, inside.layers) == (plainly_audited().norms, plainly_audited().layers)


def test_samples_made_under_inference_mode_are_attacked():
    with torch.inference_mode():
        x, y = (tensor.clone() for tensor in few(12)[:2])
    result, expected = (evaluate(convnet(), data, QUICK, eps=0.1) for data in ((x, y), few(12)[:2]))
    assert result.robust_accuracy == expected.robust_accuracy


def test_weights_made_under_inference_mode_are_refused_with_the_remedy():
    with torch.inference_mode():
        net = copy.deepcopy(convnet())
    for call in (lambda: network_bounds(net, (2,)), lambda: evaluate(net, few(4)[:2], QUICK, eps=0.1)):
        with pytest.raises(InputError, match=r"made under torch.inference_mode; pass copy.deepcopy\(model\)"):
            call()
    evaluate(copy.deepcopy(net), few(4)[:2], QUICK, eps=0.1)


# --- wrappers ----------------------------------------------------------------------------------------------------

WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "torch.compile": torch.compile,
    "both": lambda net: torch.compile(nn.DataParallel(net)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_networks_are_audited_as_the_network_inside(name):
    net, expected = convnet(), plainly_audited()
    wrapped = WRAPPERS[name](net)
    assert unwrapped(wrapped) is net
    with untouched(wrapped):
        got = audited(wrapped)
    assert (got.model, got.norms, got.layers) == (expected.model, expected.norms, expected.layers)
    assert [view.name for view in read_layers(wrapped).views] == [view.name for view in read_layers(net).views]


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_networks_and_parts_have_bounds_and_certificates(name):
    net, (x, y) = convnet(), few(6)[:2]
    expected = network_bounds(net, (2, math.inf), input_shape=SHAPE)
    for wrapped in (WRAPPERS[name](net), nn.Sequential(nn.Identity(), WRAPPERS[name](net))):
        bounds = network_bounds(wrapped, (2, math.inf), input_shape=SHAPE)
        assert {p: bound.upper for p, bound in bounds.items()} == {p: bound.upper for p, bound in expected.items()}
        if name == "DataParallel":  # what is compiled would be compiled
            got, own = (
                margin_bounds(read_relaxation(model, SHAPE), x, y, eps=0.01, p=math.inf) for model in (wrapped, net)
            )
            assert torch.equal(got, own)


def test_a_wrapper_with_hooks_stays_on():
    wrapped = nn.DataParallel(convnet())
    wrapped.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert unwrapped(wrapped) is wrapped
    with pytest.raises(NoRule, match="DataParallel: forward hooks"):
        trace(wrapped.eval(), SHAPE)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    "make", [torch.jit.script, lambda net: torch.jit.trace(net, few(2)[0])], ids=["script", "trace"]
)
def test_torchscript_is_attacked_and_its_bounds_say_that_the_original_is_gone(make):
    net, (x, y) = convnet(), few(12)[:2]
    scripted = make(net)
    with untouched(scripted):
        result, expected = (evaluate(model, (x, y), QUICK, eps=0.1) for model in (scripted, net))
    assert result.robust_accuracy == expected.robust_accuracy
    for model in (scripted, nn.Sequential(nn.Identity(), scripted)):
        bound = network_bounds(model, (2,), input_shape=SHAPE)[2]
        assert bound.unavailable.endswith("keeps nothing of the module that it was made from; pass that module instead")


# --- the user's default type ---------------------------------------------------------------------------------------


@pytest.fixture
def networks():
    """Made in single precision; then double is the default."""
    made = convnet(), small(), some()
    torch.set_default_dtype(torch.float64)
    yield made
    torch.set_default_dtype(torch.float32)


def test_networks_of_single_precision_are_audited_and_trained_alike_where_double_is_the_default(networks):
    net, learner, samples = networks
    doubled, trained = audited(net), train(learner, samples, FULL)
    assert torch.get_default_dtype() == torch.float64
    assert {parameter.dtype for parameter in (*net.parameters(), *trained.model.parameters())} == {torch.float32}
    normed = normalised(net, [0.5], [0.25])
    assert evaluate(normed, few(4)[:2], QUICK, eps=0.1).n == 4
    torch.set_default_dtype(torch.float32)
    assert (doubled.norms, doubled.layers) == (audited(convnet()).norms, audited(convnet()).layers)
    assert weights(trained) == weights(train(learner, samples, FULL))


# --- absurd networks ---------------------------------------------------------------------------------------------


def test_networks_that_python_cannot_visit_are_refused_in_a_sentence():
    deep: nn.Module = nn.Linear(4, 3)
    for _ in range(2000):
        deep = nn.Sequential(deep)
    data = (torch.zeros(3, 4), torch.tensor([0, 1, 2]))
    for call in (lambda: network_bounds(deep, (2,)), lambda: evaluate(deep, data, QUICK, eps=0.1), lambda: audit(deep)):
        with pytest.raises(
            InputError, match="model: expected modules that Python can visit; got too many in one another"
        ):
            call()


def test_a_network_nested_deeper_than_its_forward_can_go_is_refused():
    deep: nn.Module = nn.Linear(4, 3)
    for _ in range(280):
        deep = nn.Sequential(deep)
    with pytest.raises(InputError, match="model"):
        evaluate(deep, (torch.zeros(3, 4), torch.tensor([0, 1, 2])), QUICK, eps=0.1)


@pytest.mark.parametrize(("scale", "p"), [(1e30, 2), (1e-30, math.inf)])
def test_weights_of_any_size_end_in_numbers_or_in_a_sentence(scale, p):
    """Products and squares of them leave the range of float32, and of float64."""
    x, y = few(12)[:2]
    for depth in (1, 5):
        net = (
            convnet()
            if depth == 1
            else seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10), *[nn.Linear(10, 10), nn.ReLU()] * 5))
        )
        for dtype, factor in ((torch.float32, scale), (torch.float64, scale**8)):
            big = copy.deepcopy(net).to(dtype)
            with torch.no_grad():
                big[0 if depth == 1 else 1].weight.mul_(factor)
            for bound in network_bounds(big, (2, math.inf), input_shape=SHAPE).values():
                assert bound.unavailable or bound.upper >= 0
            result = audit(big, (x.to(dtype), y), QUICK, p=p, honesty=False)
            assert all(norm.evaluation.n == 12 for norm in result.norms)
