"""The networks and how they are found by name."""

from __future__ import annotations

import itertools
import socket
import sys

import pytest
import torch
from torch import nn

from brittle.errors import InputError, MissingExtra
from brittle.models import ARCHITECTURES, Normalize, build_model, fcn, resnet18_cifar

numbers = itertools.count()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write source to a fresh module in the current directory and return its name."""

    def write(source: str) -> str:
        name = f"users_network_{next(numbers)}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    monkeypatch.chdir(tmp_path)
    return write


# --- Normalize ----------------------------------------------------------------------------------------------

MEAN, STD = [0.1, 0.5, 0.9], [0.5, 0.25, 2.0]


@pytest.mark.parametrize("rest", [(), (7,), (4, 5), (2, 3, 4)])
def test_normalize_is_the_formula(rest):
    x = torch.rand(2, 3, *rest)
    y = Normalize(MEAN, STD)(x)
    for c in range(3):
        torch.testing.assert_close(y[:, c], (x[:, c] - MEAN[c]) / STD[c])
    assert y.is_contiguous()


def test_normalize_buffers_travel_with_the_state_and_can_be_traced():
    layer = Normalize(MEAN, STD)
    assert {key: tuple(t.shape) for key, t in layer.state_dict().items()} == {"mean": (3,), "std": (3,)}
    assert not list(layer.parameters())
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(torch.fx.symbolic_trace(layer)(x), layer(x))


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_normalize_refuses_other_channels(channels):
    with pytest.raises(RuntimeError):
        Normalize(MEAN, STD)(torch.rand(2, channels, 4, 4))


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ([], []),
        ([0.5], [0.5, 0.5]),
        ([0.5], [0.0]),
        ([0.5], [-1.0]),
        ([0.5], [float("inf")]),
        ([0.5], [float("nan")]),
        ([float("nan")], [1.0]),
    ],
)
def test_normalize_checks_its_numbers(mean, std):
    with pytest.raises(InputError, match="mean"):
        Normalize(mean, std)


# --- fcn ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_fcn_is_a_plain_sequence(depth, bias):
    model = fcn(12, 7, depth, 3, bias)
    kinds = [type(layer) for layer in model]
    assert kinds == [nn.Flatten, *[nn.Linear, nn.ReLU] * (depth - 1), nn.Linear]
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    sizes = [12, *[7] * (depth - 1), 3]
    assert [tuple(layer.weight.shape) for layer in linear] == [(b, a) for a, b in itertools.pairwise(sizes)]
    assert all((layer.bias is not None) is bias for layer in linear)
    assert model(torch.rand(2, 3, 2, 2)).shape == (2, 3)


def test_fcn_defaults_are_those_documented():
    assert [tuple(p.shape) for p in fcn().parameters()] == [(400, 784), (400, 400), (10, 400)]


# --- resnet18-cifar -----------------------------------------------------------------------------------------


def test_resnet_has_torchvisions_names_and_shapes_but_for_the_stem():
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        theirs = {k: tuple(v.shape) for k, v in torchvision.models.resnet18(num_classes=10).state_dict().items()}
        ours = {k: tuple(v.shape) for k, v in resnet18_cifar().state_dict().items()}
    assert theirs.pop("conv1.weight") == (64, 3, 7, 7)
    assert ours.pop("conv1.weight") == (64, 3, 3, 3)
    assert ours == theirs


def test_resnet_agrees_with_torchvisions_after_the_stem():
    torchvision = pytest.importorskip("torchvision")
    theirs, ours = torchvision.models.resnet18(num_classes=10).eval(), resnet18_cifar().eval()
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(ours(x), theirs(x))


def test_resnet_counts_and_shapes():
    assert sum(p.numel() for p in resnet18_cifar().parameters()) == 11_173_962  # the usual figure for CIFAR-10
    model = resnet18_cifar(classes=5, width=4, in_channels=1).eval()
    seen = {}
    for name in ("layer1", "layer2", "layer3", "layer4"):
        getattr(model, name).register_forward_hook(lambda m, i, o, name=name: seen.update({name: tuple(o.shape[1:])}))
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 5)
    assert seen == {"layer1": (4, 32, 32), "layer2": (8, 16, 16), "layer3": (16, 8, 8), "layer4": (32, 4, 4)}


def test_resnet_starts_from_kaimings_fan_out():
    weight = build_model("resnet18-cifar", {"width": 16}).state_dict()["layer4.0.conv1.weight"]  # 64 to 128 channels
    assert weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)


def test_resnet_can_be_traced():
    model = resnet18_cifar(width=4).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        *[("fcn", name) for name in ("in_features", "width", "depth", "classes")],
        *[("resnet18-cifar", name) for name in ("classes", "width", "in_channels")],
    ],
)
@pytest.mark.parametrize("value", [0, -1, 2.0, "3", True, None])
def test_sizes_must_be_positive_integers(arch, name, value):
    with pytest.raises(InputError, match=f"{name} must be a positive integer; got {value!r}"):
        build_model(arch, {name: value})


# --- build_model: our own networks --------------------------------------------------------------------------


@pytest.mark.parametrize("in_features", [6, 20])
@pytest.mark.parametrize("width", [1, 9])
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_fcn_arguments_follow_from_the_state(in_features, width, depth, bias):
    model = fcn(in_features, width, depth, 3, bias)
    built = build_model("fcn", state=model.state_dict())
    assert str(built) == str(model)


@pytest.mark.parametrize("width", [1, 4, 10])
@pytest.mark.parametrize(("classes", "in_channels"), [(10, 3), (2, 1)])
def test_resnet_arguments_follow_from_the_state(width, classes, in_channels):
    model = resnet18_cifar(classes, width, in_channels)
    built = build_model("resnet18-cifar", state=model.state_dict())
    assert str(built) == str(model)


def test_given_arguments_win_over_the_state():
    built = build_model("fcn", {"classes": 8}, fcn(6, 5, 2, 3).state_dict())
    assert [tuple(p.shape) for p in built.parameters()] == [(5, 6), (8, 5)]


def test_a_long_fcn_is_read_in_the_order_of_its_layers():
    model = fcn(6, 5, 7, 3)  # 13.weight sorts before 3.weight as text
    shuffled = dict(sorted(model.state_dict().items()))
    assert str(build_model("fcn", state=shuffled)) == str(model)


@pytest.mark.parametrize(
    ("arch", "state", "message"),
    [
        ("fcn", {}, r"1\.weight, 3\.weight, \.\.\.; got nothing"),
        ("fcn", {"fc.weight": torch.ones(2, 3)}, r"got fc\.weight \(2, 3\)$"),
        ("fcn", {"1.weight": torch.ones(2, 3, 1, 1)}, r"got 1\.weight \(2, 3, 1, 1\)"),
        ("fcn", {"1.weight": torch.ones(2, 3), "2.weight": torch.ones(2, 2)}, "state is not one of fcn"),
        ("resnet18-cifar", fcn(depth=4).state_dict(), r"conv1\.weight .* got .*, \.\.\.$"),
        ("resnet18-cifar", {"conv1.weight": torch.ones(2, 3), "fc.weight": torch.ones(2, 2)}, "state is not one of"),
    ],
)
def test_a_state_of_another_network_is_refused(arch, state, message):
    with pytest.raises(InputError, match=message):
        build_model(arch, state=state)


@pytest.mark.parametrize("arch", ["fcn", "resnet18-cifar"])
def test_the_seed_decides_and_the_globals_stay(arch):
    torch.manual_seed(123)
    before, dtype = torch.get_rng_state(), torch.get_default_dtype()
    a, b, c = (build_model(arch, {"width": 4}, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_default_dtype() == dtype
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)
    torch.manual_seed(5)
    assert torch.equal(a[next(iter(a))], build_model(arch, {"width": 4}).state_dict()[next(iter(a))])


def test_the_table_names_what_can_be_built():
    for arch in ARCHITECTURES:
        assert isinstance(build_model(arch, {"width": 2}), nn.Module)


# --- build_model: unknown names and bad arguments -----------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (
            "fnc",
            r"one of fcn, resnet18-cifar, torchvision:NAME, timm:NAME or module:function; got 'fnc'; did you mean fcn",
        ),
        ("resnet18_cifar", r"did you mean resnet18-cifar\?"),
        ("zzzz", "got 'zzzz'$"),
        ("", "got ''"),
        ("torchvision:", "arch must be one of"),
        (":build", "arch must be one of"),
    ],
)
def test_unknown_architecture(arch, message):
    with pytest.raises(InputError, match=message):
        build_model(arch)


def test_unknown_argument_is_named():
    with pytest.raises(InputError, match=r"fcn cannot be built with the arguments .*'widht'.*TypeError"):
        build_model("fcn", {"widht": 3})


# --- build_model: torchvision and timm ----------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the network was used")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("arch", ["torchvision:squeezenet1_1", "timm:mobilenetv3_small_050", "timm:resnet10t.c3_in1k"])
def test_zoo_models_are_built_from_the_seed(arch):
    pytest.importorskip(arch.partition(":")[0])
    before = torch.get_rng_state()
    a, b = (build_model(arch, {"num_classes": 3}) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert a.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("torchvision:resnet81", r"torchvision has no classification model 'resnet81'; did you mean resnet18"),
        ("torchvision:fasterrcnn_resnet50_fpn", "no classification model"),
        ("timm:resnt18", r"timm has no model 'resnt18'; did you mean .*resnet18"),
        ("timm:hf-hub:timm/resnet18.a1_in1k", "timm has no model 'hf-hub:"),
        ("timm:local-dir:weights", "timm has no model 'local-dir:"),
    ],
)
def test_unknown_zoo_models(arch, message):
    pytest.importorskip(arch.partition(":")[0])
    with pytest.raises(InputError, match=message):
        build_model(arch)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("arch", ["torchvision:resnet18", "timm:resnet18"])
@pytest.mark.parametrize("name", ["weights", "pretrained", "weights_backbone", "pretrained_cfg", "checkpoint_path"])
def test_zoo_weights_are_refused(arch, name):
    with pytest.raises(InputError, match=f"{arch} is built without weights.*remove {name}"):
        build_model(arch, {name: "DEFAULT"})


@pytest.mark.parametrize("arch", ["torchvision:squeezenet1_1", "timm:resnet10t"])
def test_zoo_arguments_are_checked(arch):
    pytest.importorskip(arch.partition(":")[0])
    with pytest.raises(InputError, match=f"{arch} cannot be built with the arguments .*'num_clases'"):
        build_model(arch, {"num_clases": 3})


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_missing_zoo_says_what_to_install(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"{package}:resnet18 needs the package {package}; .*'brittle\[vision\]'"):
        build_model(f"{package}:resnet18")


# --- build_model: module:function ---------------------------------------------------------------------------


def test_a_users_function_is_called_with_its_arguments(module):
    name = module("import torch\ndef make(n, k=2):\n    return torch.nn.Linear(n, k)\n")
    path = list(sys.path)
    assert str(build_model(f"{name}:make", {"n": 5})) == str(nn.Linear(5, 2))
    assert sys.path == path
    a, b, c = (build_model(f"{name}:make", {"n": 5, "k": 3}, seed=s).weight for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_class_in_a_package_will_do():
    assert isinstance(build_model("torch.nn:Linear", {"in_features": 2, "out_features": 3}), nn.Linear)


def test_the_current_directory_comes_first_and_only_during_the_import(module):
    name = module("import sys\nimport torch\nPATH = list(sys.path)\ndef make():\n    return torch.nn.ReLU()\n")
    path = list(sys.path)
    build_model(f"{name}:make")
    assert sys.modules[name].PATH[1:] == path
    assert sys.modules[name].__file__ == f"{sys.modules[name].PATH[0]}/{name}.py"
    assert sys.path == path


def test_a_users_module_cannot_change_the_globals(module):
    source = "torch.manual_seed(7)\ntorch.set_default_dtype(torch.float64)\n"
    body = "import torch\n" + source + "def make():\n    torch.rand(3)\n"
    body += "".join(f"    {line}\n" for line in source.splitlines()) + "    return torch.nn.ReLU()\n"
    torch.manual_seed(123)
    before = torch.get_rng_state()
    build_model(f"{module(body)}:make")
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(InputError, match="RuntimeError: no"):
        build_model(f"{module(body.replace('return torch.nn.ReLU()', 'raise RuntimeError(' + repr('no') + ')'))}:make")
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def make(:\n", r"importing it failed: SyntaxError"),
        ("import no_such_package\n", "importing it failed: ModuleNotFoundError: No module named 'no_such_package'"),
        ("raise SystemExit(3)\n", "importing it failed: SystemExit: 3"),
        ("1 / 0\n", "importing it failed: ZeroDivisionError"),
        ("def mak(): pass\n", r"has no function 'make'; did you mean mak\?"),
        ("make = 3\n", "has no function 'make'$"),
        ("def make(x): pass\n", r"cannot be built with the arguments \{\}: TypeError: make\(\) missing"),
        ("def make(): raise ValueError('one\\ntwo')\n", "ValueError: one two$"),
        ("def make(): return 3\n", "must return an nn.Module; got int"),
        ("import torch\ndef make(): return torch.nn.ReLU\n", "must return an nn.Module; got type"),
    ],
)
def test_a_users_mistakes_are_named(module, source, message):
    name, path = module(source), list(sys.path)
    with pytest.raises(InputError, match=message) as caught:
        build_model(f"{name}:make")
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sys.path == path


def test_a_missing_module():
    with pytest.raises(InputError, match="arch no_such_module:f: importing it failed: ModuleNotFoundError"):
        build_model("no_such_module:f")
