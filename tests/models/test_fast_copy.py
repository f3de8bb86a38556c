"""The private copy: the network's logits and gradients on inputs it has not seen, and the network untouched."""

from __future__ import annotations

import copy
import functools
import itertools
import shutil
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from brittle.evaluation.accuracy import evaluate
from brittle.evaluation.execution import Execution
from brittle.models.fast_copy import copy_for_attacks
from helpers import networks
from helpers.matrices import quick
from helpers.networks import convnet, few, mlp, seeded, uniform, untidy, untouched

NORMS = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
SHAPE = (3, 8, 8)


# --- what is compared -----------------------------------------------------------------------------------------


def with_statistics(net: nn.Module, seed: int = 5) -> nn.Module:
    """Running statistics, scales and shifts as training might leave them, of both signs and different sizes."""
    source = networks.generator(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=source).to(like)

    for module in net.modules():
        if isinstance(module, NORMS):
            with torch.no_grad():
                if module.running_var is not None:
                    module.running_mean.copy_(normal(module.running_mean))
                    module.running_var.copy_(2 * normal(module.running_var).square() + 0.05)
                if module.affine:
                    module.weight.copy_(normal(module.weight))
                    module.bias.copy_(normal(module.bias))
    return net


def built(make, dtype=torch.float64) -> nn.Module:
    """A seeded network with statistics, in evaluation mode."""
    return with_statistics(seeded(make).to(dtype)).eval()


def response(net, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the input gradient of a combination of them that no symmetry cancels."""
    x = x.clone().requires_grad_()
    logits = net(x)
    weights = torch.arange(1, logits.shape[1] + 1).to(logits) ** 1.5
    (gradient,) = torch.autograd.grad((weights * logits).sum(), x)
    return logits.detach(), gradient


def assert_same(copied, net, shape=SHAPE, dtype=torch.float64, tolerance=None, scale=1.0) -> None:
    """The same logits and gradients on new inputs, alone and in batches; the gradients do not vanish."""
    tolerance = tolerance or (1e-9 if dtype == torch.float64 else 1e-4)
    for n in (1, 3, 9):
        x = scale * uniform(100 + n, n, *shape, dtype=dtype)
        for found, wanted in zip(response(copied, x), response(net, x), strict=True):
            assert found.shape == wanted.shape
            assert float((found - wanted).norm()) <= tolerance * float(wanted.norm())
            assert wanted.any()


def norms_run(net: nn.Module) -> int:
    """Batch norms that a pass goes through."""
    if isinstance(net, torch.fx.GraphModule):
        called = [net.get_submodule(str(node.target)) for node in net.graph.nodes if node.op == "call_module"]
        return sum(isinstance(module, NORMS) for module in called)
    return sum(isinstance(module, NORMS) for module in net.modules())


@contextmanager
def left_alone(net):
    """As `untouched`, and memory layouts, classes and attributes are what they were as well."""

    def shape_of(net):
        if not isinstance(net, nn.Module):
            return None
        # Python itself keeps __slotnames__ in every class whose objects are copied.
        kinds = [(type(m), sorted(vars(m)), sorted({*dir(type(m))} - {"__slotnames__"})) for m in net.modules()]
        return kinds, [(name, t.stride(), t.data_ptr()) for name, t in [*net.named_parameters(), *net.named_buffers()]]

    before = shape_of(net)
    with untouched(net):
        yield
    assert shape_of(net) == before


def copied_from(net, shape=SHAPE, dtype=torch.float64, n=6):
    """The private copy; the network is left alone."""
    with left_alone(net):
        return copy_for_attacks(net, uniform(0, n, *shape, dtype=dtype))


# --- networks whose copy must be the same, and folded where that is possible ---------------------------------------


class Made(nn.Module):
    """Modules by name and a function of them."""

    def __init__(self, rule, **modules) -> None:
        super().__init__()
        self.rule = rule
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        """What the rule says."""
        return self.rule(self, x)


class OwnNorm(nn.BatchNorm2d):
    """A batch norm that does more."""

    def forward(self, x: Tensor) -> Tensor:
        """Twice the normalised."""
        return 2 * super().forward(x)


class OwnConv(nn.Conv2d):
    """A convolution that does more."""

    def forward(self, x: Tensor) -> Tensor:
        """Of the squares."""
        return super().forward(x * x)


def head(channels: int) -> list[nn.Module]:
    return [nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 5)]


def chain(conv: nn.Module, norm: nn.Module, channels: int = 6) -> nn.Sequential:
    return nn.Sequential(conv, norm, *head(channels))


def conv(outputs=6, **options) -> nn.Conv2d:
    return nn.Conv2d(3, outputs, 3, **options)


def pooled(rule, **modules) -> Made:
    """The rule's map ``(N, 6, h, w)``, pooled, and a linear layer."""
    return Made(lambda net, x: net.head(rule(net, x)), head=nn.Sequential(*head(6)), **modules)


def stem() -> nn.Module:
    """A pair that can be folded, whatever comes after it."""
    return nn.Sequential(conv(3), nn.BatchNorm2d(3))


def hooked(which: str, kind: str, rule) -> nn.Module:
    net = nn.Sequential(nn.Sequential(conv(), nn.BatchNorm2d(6)), *head(6))
    getattr(net.get_submodule(which), kind)(rule)
    return net


def tied() -> nn.Module:
    net = nn.Sequential(
        conv(3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), conv(3, padding=1), nn.BatchNorm2d(3), *head(3)
    )
    net[3].weight = net[0].weight
    return net


def branching(net: Made, x: Tensor) -> Tensor:
    z = net.norm(net.conv(x))
    return z if bool(x.mean() > 0.5) else 2 * z


def halved_in_batches(net: Made, x: Tensor) -> Tensor:
    z = net.norm(net.conv(x))
    return z if len(x) == 1 else z / 2


def halved_in_batches_by_shape(net: Made, x: Tensor) -> Tensor:
    z = net.norm(net.conv(x))
    return z if x.shape[0] == 1 else z / 2


class Rounded(torch.autograd.Function):
    """Rounds to tenths; the gradient passes straight through."""

    @staticmethod
    def forward(ctx, x):
        """Rounded."""
        return (10 * x).round() / 10

    @staticmethod
    def backward(ctx, g):
        """As it came."""
        return g


def gated(net: Made, x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = x.mean((1, 2, 3), keepdim=True)
    return gate * net.norm(net.conv(x))


def pair() -> dict[str, nn.Module]:
    return {"conv": conv(), "norm": nn.BatchNorm2d(6)}


NETWORKS = {
    # name: (how to make it, how many batch norms a pass of the copy still goes through)
    "conv": (lambda: chain(conv(), nn.BatchNorm2d(6)), 0),
    "conv without bias": (lambda: chain(conv(bias=False), nn.BatchNorm2d(6)), 0),
    "norm not affine": (lambda: chain(conv(), nn.BatchNorm2d(6, affine=False)), 0),
    "norm with eps": (lambda: chain(conv(), nn.BatchNorm2d(6, eps=0.3)), 0),
    "depthwise": (lambda: chain(conv(groups=3), nn.BatchNorm2d(6)), 0),
    "strided": (lambda: chain(conv(stride=2, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6)), 0),
    "in place": (lambda: nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU(inplace=True), *head(6)), 0),
    "dropout": (lambda: nn.Sequential(conv(), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.Dropout2d(0.5), *head(6)), 0),
    "linear": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 5)),
        0,
    ),
    "conv 1-d": (
        lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 2, 5), nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(120, 5)),
        0,
    ),
    "conv 3-d": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.ReLU(), nn.Flatten(), nn.Linear(196, 5)
        ),
        0,
    ),
    "transposed": (lambda: chain(nn.ConvTranspose2d(3, 6, 3, stride=2), nn.BatchNorm2d(6)), 1),
    "norm over rows of a linear layer": (
        lambda: Made(
            lambda net, x: net.head(net.norm(net.linear(x.flatten(2))).flatten(1)),
            linear=nn.Linear(64, 3),
            norm=nn.BatchNorm1d(3),
            head=nn.Linear(9, 5),
        ),
        1,
    ),
    "norm first": (lambda: nn.Sequential(nn.BatchNorm2d(3), conv(), *head(6)), 1),
    "norm after an activation": (lambda: nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(6), *head(6)), 1),
    "two readers": (
        lambda: pooled(lambda net, x: (lambda z: net.norm(z) + z)(net.conv(net.stem(x))), stem=stem(), **pair()),
        1,
    ),
    "written in place": (lambda: pooled(lambda net, x: (lambda z: z.add_(1))(net.norm(net.conv(x))), **pair()), 0),
    "conv twice": (
        lambda: pooled(
            lambda net, x: net.norm(net.conv(net.stem(x))) + net.other(net.conv(x[..., 2:, 2:])),
            stem=stem(),
            other=nn.BatchNorm2d(6),
            **pair(),
        ),
        2,
    ),
    "conv under two names": (
        lambda: (lambda c: pooled(lambda net, x: net.norm(net.a(x)) + net.b(x * x), a=c, b=c, norm=nn.BatchNorm2d(6)))(
            conv()
        ),
        1,
    ),
    "norm twice": (
        lambda: pooled(lambda net, x: net.norm(net.conv(x)) + net.norm(net.other(x)), other=conv(), **pair()),
        0,
    ),
    "weight read beside": (
        lambda: pooled(lambda net, x: net.norm(net.conv(x)) + F.conv2d(x, net.conv.weight), **pair()),
        1,
    ),
    "tied weights": (tied, 0),
    "batch statistics": (lambda: chain(conv(), nn.BatchNorm2d(6, track_running_stats=False)), 1),
    "norm with its own forward": (lambda: chain(conv(), OwnNorm(6)), 1),
    "conv with its own forward": (lambda: chain(OwnConv(3, 6, 3), nn.BatchNorm2d(6)), 1),
    "hook on the conv": (lambda: hooked("0.0", "register_forward_hook", lambda m, i, o: 1.5 * o), 1),
    "hook before the norm": (lambda: hooked("0.1", "register_forward_pre_hook", lambda m, i: (1.5 * i[0],)), 1),
    "hook on a block": (lambda: hooked("0", "register_forward_hook", lambda m, i, o: 1.5 * o), None),
    "hook on the root": (lambda: hooked("", "register_forward_hook", lambda m, i, o: 1.5 * o), 1),
    "gradients hooked on the conv": (
        lambda: hooked("0.0", "register_full_backward_hook", lambda m, i, o: (1.5 * i[0],)),
        None,
    ),
    "gradients hooked on the norm": (
        lambda: hooked("0.1", "register_full_backward_hook", lambda m, i, o: (1.5 * i[0],)),
        None,
    ),
    "gradients hooked on a block": (
        lambda: hooked("0", "register_full_backward_hook", lambda m, i, o: (1.5 * i[0],)),
        None,
    ),
    "weight norm, old": (
        lambda: chain(torch.nn.utils.weight_norm(conv()), nn.BatchNorm2d(6)),
        1,
    ),
    "control flow": (lambda: pooled(branching, **pair()), 1),
    "another function in batches": (lambda: pooled(halved_in_batches, **pair()), 1),
    "another function in batches, by shape": (lambda: pooled(halved_in_batches_by_shape, **pair()), 1),
    "shape read": (lambda: pooled(lambda net, x: net.norm(net.conv(x)).reshape(x.shape[0], 6, 6, 6), **pair()), 0),
    "no_grad inside": (lambda: pooled(gated, **pair()), 1),
    "detach inside": (
        lambda: pooled(lambda net, x: x.detach().mean((1, 2, 3), keepdim=True) * net.norm(net.conv(x)), **pair()),
        0,
    ),
    "own gradient": (lambda: pooled(lambda net, x: net.norm(net.conv(Rounded.apply(x))), **pair()), 1),
    "viewed": (
        lambda: Made(
            lambda net, x: net.head(torch.relu(net.norm(net.conv(x))).view(x.size(0), -1)),
            head=nn.Linear(216, 5),
            **pair(),
        ),
        0,
    ),
    "viewed from another type": (
        lambda: pooled(lambda net, x: net.norm(net.conv(x.view(torch.int64).view(dtype=torch.float64) + x)), **pair()),
        0,
    ),
    "two outputs a row": (
        lambda: pooled(lambda net, x: net.norm(net.conv(x)).chunk(2, 1)[0].repeat(1, 2, 1, 1), **pair()),
        0,
    ),
}


def test_networks_with_nothing_to_gain_are_not_copied():
    net = mlp()
    assert copy_for_attacks(net, few(4)[0]) is net


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated", "ignore:For backward hooks to be called")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_copies_answer_as_their_networks_on_new_inputs(name, training):
    make, left = NETWORKS[name]
    net = built(make).train(training)
    copied = copied_from(net)
    assert copied is not net
    assert not copied.training
    net.eval()
    assert_same(copied, net)
    assert left is None or norms_run(copied) == left
    assert not any(parameter.requires_grad for parameter in copied.parameters())


@pytest.mark.parametrize(
    ("name", "norms", "dtype"),
    [("resnet18", 20, torch.float32), ("resnet18", 20, torch.float64), ("mobilenet_v2", 52, torch.float32)],
)
def test_residual_networks_are_folded_entirely(name, norms, dtype):
    net = built(lambda: torchvision.models.get_model(name, num_classes=10), dtype)
    assert norms_run(net) == norms
    copied = copied_from(net, (3, 32, 32), dtype)
    assert norms_run(copied) == 0
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert_same(copied, net, (3, 32, 32), dtype)
    convs = [module for module in copied.modules() if isinstance(module, nn.Conv2d)]
    assert all(module.weight.is_contiguous(memory_format=torch.channels_last) for module in convs)


@quick
@given(
    dims=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    mode=st.sampled_from(["zeros", "replicate", "circular"]),
    bias=st.booleans(),
    affine=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-3, 0.5]),
    seed=st.integers(0, 999),
)
def test_any_convolution_with_its_norm(dims, groups, kernel, stride, padding, dilation, mode, bias, affine, eps, seed):
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1], (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    shape = (4, 6, 5, 5)[: dims + 1]

    def make():
        layer = kinds[0](4, 8, kernel, stride, padding, dilation=dilation, groups=groups, bias=bias, padding_mode=mode)
        body = nn.Sequential(layer, kinds[1](8, eps=eps, affine=affine), nn.Tanh(), nn.Flatten())
        size = body.eval()(torch.zeros(1, *shape)).shape[1]
        return nn.Sequential(body, nn.Linear(size, 4))

    net = with_statistics(seeded(make, seed).double(), seed).eval()
    copied = copied_from(net, shape)
    assert norms_run(copied) == 0
    assert_same(copied, net, shape)


def test_extreme_statistics_are_folded_or_left_alone_but_never_wrong():
    for mean, variance in ((0.0, 0.0), (0.0, 1e-12), (1e4, 1e-6), (-1e6, 1e8), (3.0, 1e12)):
        for dtype in (torch.float32, torch.float64):
            net = built(lambda: chain(conv(), nn.BatchNorm2d(6)), dtype)
            net[1].running_mean.fill_(mean)
            net[1].running_var.fill_(variance)
            copied = copied_from(net, dtype=dtype)
            for n in (1, 3, 9):
                x = uniform(n, n, *SHAPE, dtype=dtype)
                exact = response(copy.deepcopy(net).double(), x.double())
                for found, wanted, own in zip(response(copied, x), exact, response(net, x), strict=True):
                    ours, theirs = (float((value.double() - wanted).norm()) for value in (found, own))
                    assert ours <= 10 * theirs + 1e-4 * float(wanted.norm())


# --- weights that are computed ------------------------------------------------------------------------------------


class Doubled(nn.Module):
    """A parametrisation: twice the parameter."""

    def forward(self, weight: Tensor) -> Tensor:
        """Twice."""
        return 2 * weight


def parametrised(kind: str) -> nn.Module:
    net = chain(conv(), nn.BatchNorm2d(6))
    if kind == "own":
        parametrize.register_parametrization(net[0], "weight", Doubled())
        parametrize.register_parametrization(net[5], "bias", Doubled())
    elif kind == "weight norm":
        parametrizations.weight_norm(net[0])
    elif kind == "spectral norm":
        parametrizations.spectral_norm(net[0])
    else:
        parametrizations.orthogonal(net[5])
    return net


COMPUTED = ["own", "weight norm", "spectral norm", "orthogonal"]


@pytest.mark.parametrize("kind", COMPUTED)
def test_copies_compute_parametrised_weights_once(kind):
    net = built(lambda: parametrised(kind))
    x = uniform(1, 2, *SHAPE, dtype=torch.float64)
    before = net(x)
    copied = copy_for_attacks(net, uniform(0, 6, *SHAPE, dtype=torch.float64))
    assert torch.equal(net(x), before)
    assert copied is not net
    assert_same(copied, net)
    assert norms_run(copied) == 0
    assert not any(parametrize.is_parametrized(module) for module in copied.modules())
    again = built(lambda: parametrised(kind)).train()
    with left_alone(again):
        copy_for_attacks(again, x)


def test_parametrised_networks_can_be_evaluated():
    net = seeded(lambda: nn.Sequential(nn.Flatten(), parametrizations.weight_norm(nn.Linear(64, 10)))).eval()
    data = few(10)
    with untouched(net):
        assert evaluate(net, data, eps=0.1, execution=Execution(certify=False)).n == 10


# --- what must be left alone ---------------------------------------------------------------------------------------


def test_plain_callables_come_back():
    x = few(4)[0]

    def model(x):
        return mlp()(x)

    for net in (model, functools.partial(model), mlp().forward):
        assert copy_for_attacks(net, x) is net


NOISE = itertools.cycle((0.2, 0.9, 0.4))
"""Never the same twice in a row: two draws that happen to be alike could not be told from none."""


class Noisy(nn.Module):
    """Noise that torch or Python draws."""

    def __init__(self, size: float, rule) -> None:
        super().__init__()
        self.inner, self.size, self.rule = convnet(), size, rule

    def forward(self, x: Tensor) -> Tensor:
        """The logits, disturbed."""
        return self.inner(x) * (1 + self.size * self.rule())


def test_always_dropping_networks_are_left_alone():
    net = nn.Sequential(convnet(), nn.Flatten())
    net.forward = lambda x: F.dropout(convnet()(x), 0.5, training=True)
    assert copy_for_attacks(net, few(6)[0]) is net


@pytest.mark.parametrize("size", [0.3, 1e-4])
@pytest.mark.parametrize("rule", [lambda: torch.randn(10), lambda: next(NOISE)], ids=["torch", "python"])
def test_randomised_networks_are_left_alone(rule, size):
    net = Noisy(size, rule)
    assert copy_for_attacks(net, few(6)[0]) is net


class Stubborn(nn.Module):
    """Cannot be copied."""

    def __init__(self, how) -> None:
        super().__init__()
        self.inner, self.how = convnet(), how

    def forward(self, x: Tensor) -> Tensor:
        """Pass on."""
        return self.inner(x)

    def __deepcopy__(self, memo):
        """Refuse, one way or the other."""
        return self.how(self)


def refuse(net):
    raise TypeError("no copies")


def test_networks_that_cannot_be_copied_are_left_alone():
    net = Stubborn(refuse)
    with left_alone(net):
        assert copy_for_attacks(net, few(6)[0]) is net
    holding = convnet()
    holding.extra = holding[0].weight * 2  # no leaf of the graph: cannot be deep-copied
    with left_alone(holding):
        assert copy_for_attacks(holding, few(6)[0]) is holding


def test_networks_that_copy_to_themselves_are_left_alone():
    net = Stubborn(lambda net: net)
    x = few(6)[0]
    with left_alone(net):
        copy_for_attacks(net, x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is")
def test_script_modules_do_not_crash():
    net = torch.jit.script(built(lambda: chain(conv(), nn.BatchNorm2d(6))))
    copied = copy_for_attacks(net, uniform(0, 6, *SHAPE, dtype=torch.float64))
    assert_same(copied, net)


class Returning(nn.Module):
    """Returns something made of the logits."""

    def __init__(self, rule) -> None:
        super().__init__()
        self.inner, self.rule = convnet(), rule

    def forward(self, x: Tensor):
        """Whatever the rule makes."""
        return self.rule(self.inner(x))


@pytest.mark.parametrize(
    "rule",
    [
        lambda z: (z, z),
        lambda z: [z],
        lambda z: {"logits": z},
        lambda z: None,
        lambda z: z.detach(),
        lambda z: z.argmax(1),
        lambda z: z * float("nan"),
        lambda z: z.nope,
    ],
    ids=["tuple", "list", "dict", "nothing", "detached", "classes", "nan", "failing"],
)
def test_networks_that_return_no_differentiable_logits_come_back(rule):
    net = Returning(rule)
    with left_alone(net):
        assert copy_for_attacks(net, few(6)[0]) is net


def test_a_copy_that_fails_leaves_nothing_on_the_terminal(capfd):
    """Graphs of torch.fx print a traceback beside every error: that the copy may fail is nobody's concern."""
    copied = copied_from(
        built(lambda: Made(lambda net, x: net.norm(net.conv(x)).view(-1, 216), **pair()), torch.float32),
        dtype=torch.float32,
    )
    assert isinstance(copied, torch.fx.GraphModule)
    with pytest.raises(RuntimeError, match="shape"):
        copied(torch.zeros(2, 3, 9, 13))
    assert capfd.readouterr() == ("", "")


def test_inputs_of_the_wrong_shape_do_no_harm():
    net = convnet()
    with left_alone(net):
        assert copy_for_attacks(net, torch.zeros(3, 2, 8, 8)) is net
    with left_alone(net):
        assert copy_for_attacks(net, few(1)[0]) is not net  # one probe is enough


# --- gradients that differ only where the probes do not look -------------------------------------------------------


class Clipped(torch.autograd.Function):
    """Clips at 0.9; the gradient passes straight through, as quantised networks have it."""

    @staticmethod
    def forward(ctx, x):
        """Clipped."""
        return x.clamp(max=0.9)

    @staticmethod
    def backward(ctx, g):
        """As it came."""
        return g


def late_gate(net: Made, x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = F.relu(x.amax((1, 2, 3), keepdim=True) - 0.9)
    return (1 + 9 * gate) * net.norm(net.conv(x))


@pytest.mark.parametrize(
    "rule", [late_gate, lambda net, x: net.norm(net.conv(Clipped.apply(x)))], ids=["no_grad", "own gradient"]
)
def test_gradients_are_the_networks_where_no_probe_was(rule):
    net = built(lambda: pooled(rule, **pair()))
    copied = copy_for_attacks(net, 0.8 * uniform(0, 6, *SHAPE, dtype=torch.float64))
    assert_same(copied, net)


# --- the user's network --------------------------------------------------------------------------------------------


def test_untidy_networks_are_left_as_they_are():
    net = untidy()
    with left_alone(net):
        copied = copy_for_attacks(net, few(6)[0])
    assert norms_run(copied) == 0
    assert_same(copied, net.eval(), (1, 8, 8), torch.float32)


def test_layouts_are_kept():
    net = convnet().to(memory_format=torch.channels_last)
    strides = [parameter.stride() for parameter in net.parameters()]
    with left_alone(net):
        copy_for_attacks(net, few(6)[0])
    assert [parameter.stride() for parameter in net.parameters()] == strides


@pytest.mark.parametrize("name", ["conv", "control flow", "norm with its own forward"])
def test_copies_share_no_memory_with_the_network(name):
    net = built(NETWORKS[name][0])
    copied = copied_from(net)
    x = uniform(3, 4, *SHAPE, dtype=torch.float64)
    before = copied(x)
    with torch.no_grad():
        for tensor in [*net.parameters(), *net.buffers()]:
            tensor.zero_()
    assert torch.equal(copied(x), before)


def test_inputs_are_not_changed():
    x = few(6)[0].clone()
    before = x.clone()
    net = nn.Sequential(nn.ReLU(inplace=True), convnet())
    copy_for_attacks(net, x)
    assert torch.equal(x, before)
    assert x.grad is None
    assert not x.requires_grad


def test_networks_with_two_and_three_dimensional_convolutions_are_folded():
    net = built(
        lambda: nn.Sequential(
            conv(4),
            nn.BatchNorm2d(4),
            nn.Unflatten(1, (1, 4)),
            nn.Conv3d(1, 2, 2),
            nn.BatchNorm3d(2),
            nn.Flatten(),
            nn.Linear(150, 5),
        )
    )
    copied = copied_from(net)
    assert_same(copied, net)
    assert copied is not net
    assert norms_run(copied) == 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_copies_are_the_network_at_any_batch_size():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    net[2].running_mean.normal_()
    copied = copy_for_attacks(net, torch.rand(4, 1, 3, 4), compiled=True)
    assert copied is not net
    assert type(copied).__name__ == "OptimizedModule"
    for n in (1, 3, 7):
        x = torch.rand(n, 1, 3, 4)
        torch.testing.assert_close(copied(x), net(x), rtol=1e-4, atol=1e-5)
