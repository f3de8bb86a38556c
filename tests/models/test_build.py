"""The networks and how they are found by name."""

from __future__ import annotations

import itertools
import socket
import sys

import pytest
import torch
from torch import nn

from brittle.errors import InputError, MissingExtra
from brittle.models.architectures.resnet import CifarResNet, WideBottleneck, wide_resnet101_2
from brittle.models.architectures.vgg import vgg16
from brittle.models.architectures.vit import vit
from brittle.models.build import ARCHITECTURES, INFERENCES, build_model, fcn, resnet18_cifar
from brittle.models.layers import read_layers
from brittle.models.normalize import Normalize

numbers = itertools.count()
TINY: dict[str, dict[str, object]] = {
    "fcn": {"in_features": 192, "width": 16},
    "resnet18-cifar": {"width": 4},
    "wide-resnet101-2": {"width": 4},
    "vgg16": {"width": 4},
    "vit": {"image_size": 8, "patch_size": 4, "width": 8, "depth": 2, "heads": 2},
}
"""Arguments of the smallest useful network of each kind; all take (N, 3, 8, 8)."""


def counted(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def scrambled(model: nn.Module) -> nn.Module:
    """The model in float64 and evaluation mode, with no parameter or statistic left at a default."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.double().state_dict().items():
            noise = torch.rand(tensor.shape, generator=g, dtype=torch.float64)
            if tensor.ndim > 1:
                tensor.copy_((noise - 0.5) * 4 / tensor[0].numel() ** 0.5)
            elif tensor.ndim == 1:
                tensor.copy_(noise - 0.5 if name.endswith(("bias", "mean")) else noise + 0.5)
    return model.eval()


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


# --- wide-resnet101-2 ---------------------------------------------------------------------------------------


def test_wide_resnet_has_torchvisions_names_and_shapes_but_for_the_stem():
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        theirs, ours = shapes(torchvision.models.wide_resnet101_2()), shapes(wide_resnet101_2(classes=1000))
        count = counted(wide_resnet101_2(classes=1000))
    assert theirs.pop("conv1.weight") == (64, 3, 7, 7)
    assert ours.pop("conv1.weight") == (64, 3, 3, 3)
    assert ours == theirs
    assert count + 64 * 3 * (7 * 7 - 3 * 3) == 126_886_696  # the published figure, with a stem of 7 x 7


def test_wide_resnet_agrees_with_torchvisions_after_the_stem():
    resnet = pytest.importorskip("torchvision.models.resnet")
    theirs = resnet.ResNet(resnet.Bottleneck, [1, 2, 1, 1], num_classes=10, width_per_group=128)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    ours = CifarResNet(WideBottleneck, (1, 2, 1, 1), 10, 64, 3).eval()
    theirs.eval().load_state_dict(ours.state_dict())
    x = torch.rand(2, 3, 13, 16)
    torch.testing.assert_close(ours(x), theirs(x))


def test_wide_resnet_has_the_stages_of_resnet_101():
    model = wide_resnet101_2(classes=5, width=2, in_channels=1).eval()
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    assert [len(stage) for stage in stages] == [3, 4, 23, 3]
    assert [tuple(stage[-1].conv2.weight.shape) for stage in stages] == [(c, c, 3, 3) for c in (4, 8, 16, 32)]
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules()) == 34
    weights = sum(isinstance(m, nn.Conv2d | nn.Linear) for name, m in model.named_modules() if "downsample" not in name)
    assert weights == 101


# --- vgg16 --------------------------------------------------------------------------------------------------


def test_vgg_has_torchvisions_features():
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        theirs, ours = torchvision.models.vgg16_bn(), vgg16(classes=1000)
        assert shapes(ours.features) == shapes(theirs.features)
        assert counted(theirs) == 138_365_992  # published; all beyond the features is in its three linear layers
        heads = counted(theirs.classifier), counted(ours.classifier)
        assert heads == (25088 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 1000 + 1000, 512 * 1000 + 1000)
        assert counted(theirs) - counted(ours) == heads[0] - heads[1]
        assert counted(vgg16()) == 14_728_266  # the usual figure for CIFAR-10, 14.7 M


@pytest.mark.parametrize("size", [(32, 32), (64, 32)])
def test_vgg_computes_torchvisions_features(size):
    models = pytest.importorskip("torchvision.models.vgg")
    layers = [c if c == "M" else c // 16 for c in models.cfgs["D"]]
    theirs, ours = models.make_layers(layers, batch_norm=True).double().eval(), scrambled(vgg16(width=4))
    theirs.load_state_dict(ours.features.state_dict())
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(ours.features(x), theirs(x))
    torch.testing.assert_close(ours(x), ours.classifier(theirs(x).mean((2, 3))))


def test_vgg_starts_as_torchvisions():
    state = build_model("vgg16", {"width": 16}).state_dict()
    assert state["features.24.weight"].std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert not state["features.24.bias"].any()


# --- vit ----------------------------------------------------------------------------------------------------

FORMS = [
    {"image_size": 8, "patch_size": 4, "width": 12, "depth": 1, "heads": 1, "mlp_ratio": 2},
    {"image_size": 9, "patch_size": 3, "width": 8, "depth": 3, "heads": 4, "mlp_ratio": 1.5, "in_channels": 1},
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("class_token", [False, True])
def test_vit_agrees_with_timms(form, class_token):
    theirs = pytest.importorskip("timm.models.vision_transformer").VisionTransformer(
        img_size=form["image_size"], patch_size=form["patch_size"], embed_dim=form["width"], depth=form["depth"],
        num_heads=form["heads"], mlp_ratio=form["mlp_ratio"], in_chans=form.get("in_channels", 3), num_classes=7,
        class_token=class_token, global_pool="token" if class_token else "avg", fc_norm=False,
    )  # fmt: skip
    ours = scrambled(vit(**form, classes=7, class_token=class_token))
    theirs.double().eval().load_state_dict(ours.state_dict())
    x = torch.rand(5, *ours.patch_embed.shape, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_vit_agrees_with_torchs_transformer_layers(form):
    ours = scrambled(vit(**form))
    p, width = form["patch_size"], form["width"]
    x = torch.rand(5, *ours.patch_embed.shape, dtype=torch.float64)
    patches = nn.functional.unfold(x, p, stride=p).mT  # (N, T, C p p)
    tokens = patches @ ours.patch_embed.proj.weight.flatten(1).mT + ours.patch_embed.proj.bias + ours.pos_embed
    for block in ours.blocks:
        layer = nn.TransformerEncoderLayer(
            width, form["heads"], len(block.mlp.fc1.weight), 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
        ).double()
        state = block.state_dict()
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            layer.get_parameter(name).data = state[name]
        for theirs, mine in (
            ("self_attn.in_proj_", "attn.qkv."), ("self_attn.out_proj.", "attn.proj."),
            ("linear1.", "mlp.fc1."), ("linear2.", "mlp.fc2."),
        ):  # fmt: skip
            for part in ("weight", "bias"):
                layer.get_parameter(theirs + part).data = state[mine + part]
        tokens = layer(tokens)
    tokens = nn.functional.layer_norm(tokens, (width,), ours.norm.weight, ours.norm.bias, 1e-6)
    torch.testing.assert_close(ours(x), ours.head(tokens.mean(1)), rtol=1e-9, atol=1e-9)


def test_vit_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = vit(224, 16, 192, 12, 3, classes=1000, class_token=True)
    assert counted(model) == 5_717_416  # DeiT-Ti (Touvron et al. 2021): 5.7 M


def test_vit_layers_can_all_be_read():
    layers = read_layers(vit(**TINY["vit"]))
    block = ["attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "attn.proj", "mlp.fc1", "mlp.fc2"]
    names = [f"blocks.{i}.{name}" for i in range(2) for name in block]
    assert [view.name for view in layers.views] == ["patch_embed.proj", *names, "head"]
    unruly = [unread for unread in layers.unread if "normalisation" not in unread.reason]
    assert [unread.reason for unread in unruly] == ["VisionTransformer: no rule to read pos_embed"]


def test_vit_without_positions_does_not_know_the_order_of_its_patches():
    model = scrambled(vit(**TINY["vit"]))
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    moved = x.roll((4, 4), (2, 3))
    assert not torch.allclose(model(x), model(moved))
    with torch.no_grad():
        model.pos_embed.zero_()
    torch.testing.assert_close(model(x), model(moved))


@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (2, 1, 8, 8), (2, 3, 16, 4), (3, 8, 8)])
def test_vit_refuses_other_images(shape):
    with pytest.raises(InputError, match=r"x: expected \(N, 3, 8, 8\) for this network"):
        vit(**TINY["vit"])(torch.rand(shape))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 9, "patch_size": 4}, "image_size: expected a multiple of patch_size, 4; got 9"),
        ({"width": 10, "heads": 3}, "width: expected a multiple of heads, 3; got 10"),
        *[({"mlp_ratio": r}, "mlp_ratio: expected a number") for r in (0, -1, 0.001, float("nan"), float("inf"), "4")],
    ],
)
def test_vit_arguments_are_checked(arguments, message):
    with pytest.raises(InputError, match=message):
        build_model("vit", arguments)


# --- all our own networks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["resnet18-cifar", "wide-resnet101-2", "vgg16"])
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (28, 28), (33, 20), (64, 64)])
@pytest.mark.parametrize(("classes", "in_channels"), [(10, 3), (2, 1)])
def test_convolutional_networks_take_images_of_any_size(arch, size, classes, in_channels):
    model = build_model(arch, {"width": 2, "classes": classes, "in_channels": in_channels}).eval()
    assert model(torch.rand(2, in_channels, *size)).shape == (2, classes)


@pytest.mark.parametrize(("image_size", "patch_size"), [(8, 2), (28, 7), (32, 4), (32, 32)])
@pytest.mark.parametrize("class_token", [False, True])
def test_vit_takes_images_of_its_size(image_size, patch_size, class_token):
    model = vit(image_size, patch_size, 8, 1, 2, classes=3, in_channels=2, class_token=class_token)
    assert model(torch.rand(4, 2, image_size, image_size)).shape == (4, 3)


@pytest.mark.parametrize("arch", ["wide-resnet101-2", "vgg16"])
def test_convolutional_networks_can_be_traced(arch):
    model = build_model(arch, TINY[arch]).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradients_reach_every_parameter(arch):
    model = build_model(arch, TINY[arch]).double().eval()  # in training mode, a bias before a batch norm gets none
    x = torch.rand(8, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    nn.functional.cross_entropy(model(x), torch.arange(8)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        *[("vgg16", name) for name in ("classes", "width", "in_channels")],
        *[("wide-resnet101-2", name) for name in ("classes", "width", "in_channels")],
        *[("vit", n) for n in ("image_size", "patch_size", "width", "depth", "heads", "classes", "in_channels")],
        *[("fcn", name) for name in ("in_features", "width", "depth", "classes")],
        *[("resnet18-cifar", name) for name in ("classes", "width", "in_channels")],
    ],
)
@pytest.mark.parametrize("value", [0, -1, 2.0, "3", True, None])
def test_sizes_must_be_positive_integers(arch, name, value):
    with pytest.raises(InputError, match=f"{name}: expected a positive integer; got {value!r}"):
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


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize(("classes", "in_channels"), [(10, 3), (2, 1)])
@pytest.mark.parametrize("arch", ["vgg16", "wide-resnet101-2"])
def test_convolutional_arguments_follow_from_the_state(arch, width, classes, in_channels):
    model = build_model(arch, {"classes": classes, "width": width, "in_channels": in_channels})
    assert str(build_model(arch, state=model.state_dict())) == str(model)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("class_token", [False, True])
def test_vit_arguments_but_the_heads_follow_from_the_state(form, class_token):
    model = vit(**form, class_token=class_token).eval()
    built = build_model("vit", {"heads": form["heads"]}, model.state_dict()).eval()
    assert str(built) == str(model)
    built.load_state_dict(model.state_dict())
    x = torch.rand(2, *model.patch_embed.shape)
    assert torch.equal(built(x), model(x))


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
        ("fcn", {"1.weight": torch.ones(2, 3), "2.weight": torch.ones(2, 2)}, "state: expected one of fcn"),
        ("resnet18-cifar", fcn(depth=4).state_dict(), r"conv1\.weight .* got .*, \.\.\.$"),
        ("wide-resnet101-2", {}, "state: expected one of wide-resnet101-2 with a kernel conv1"),
        ("vgg16", resnet18_cifar(width=1).state_dict(), r"kernel features\.0\.weight and a matrix classifier\.weight"),
        ("vit", vgg16(width=1).state_dict(), r"state: expected one of vit with patch_embed\.proj\.weight, pos_embed"),
        ("resnet18-cifar", {"conv1.weight": torch.ones(2, 3), "fc.weight": torch.ones(2, 2)}, "state: expected one of"),
    ],
)
def test_a_state_of_another_network_is_refused(arch, state, message):
    with pytest.raises(InputError, match=message):
        build_model(arch, state=state)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_seed_decides_and_the_globals_stay(arch):
    torch.manual_seed(123)
    before, dtype = torch.get_rng_state(), torch.get_default_dtype()
    a, b, c = (build_model(arch, TINY[arch], seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_default_dtype() == dtype
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)
    torch.manual_seed(5)
    assert torch.equal(a[next(iter(a))], build_model(arch, TINY[arch]).state_dict()[next(iter(a))])


def test_the_table_names_what_can_be_built():
    assert set(TINY) == set(ARCHITECTURES) == set(INFERENCES)
    for arch in ARCHITECTURES:
        assert build_model(arch, TINY[arch])(torch.rand(2, 3, 8, 8)).shape == (2, 10)


# --- build_model: unknown names and bad arguments -----------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (
            "fnc",
            r"one of fcn, .*, torchvision:NAME, timm:NAME, hf:FOLDER or module:function; got 'fnc'; did you mean fcn",
        ),
        ("resnet18_cifar", r"did you mean resnet18-cifar\?"),
        ("zzzz", "got 'zzzz'$"),
        ("", "got ''"),
        ("torchvision:", "arch: expected one of"),
        (":build", "arch: expected one of"),
    ],
)
def test_unknown_architecture(arch, message):
    with pytest.raises(InputError, match=message):
        build_model(arch)


@pytest.mark.parametrize(("arch", "name"), [("fcn", "depth"), ("vit", "depth"), ("fcn", "width"), ("vgg16", "classes")])
def test_absurd_sizes_are_refused_before_anything_is_built(arch, name):
    with pytest.raises(InputError, match=f"{arch}: expected {name} of at most"):
        build_model(arch, {name: 10**8})


def test_unknown_argument_is_named():
    with pytest.raises(
        InputError, match=r"fcn: expected arguments that it can be built with; got .*'widht'.*TypeError"
    ):
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
def test_swin_of_timm_learns_small_images():
    pytest.importorskip("timm")
    size = {"img_size": 32, "patch_size": 2, "window_size": 4, "num_classes": 10}  # as build_model documents
    small = {"embed_dim": 8, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 2, 4), "drop_path_rate": 0.0}
    model = build_model("timm:swin_tiny_patch4_window7_224", {**size, **small})
    assert [m.shift_size for m in model.layers[0].blocks] == [(0, 0), (2, 2)]  # the windows do move
    learns(model, 32)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_our_own_networks_learn(arch):
    learns(build_model(arch, TINY[arch]), 8)


def learns(model: nn.Module, size: int) -> None:
    """Thirty steps on one small batch halve the loss, and every parameter has moved."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(16, 3, size, size, generator=g), torch.arange(16) % 10
    before = [p.detach().clone() for p in model.parameters()]
    optimiser, losses = torch.optim.Adam(model.parameters(), 0.01), []
    for _ in range(30):
        losses.append(nn.functional.cross_entropy(model(x), y))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < losses[0] / 2
    assert not any(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (
            "torchvision:resnet81",
            r"expected a classification model of torchvision; got 'resnet81'; did you mean resnet18",
        ),
        ("torchvision:fasterrcnn_resnet50_fpn", "expected a classification model"),
        ("timm:resnt18", r"expected a model of timm; got 'resnt18'; did you mean .*resnet18"),
        ("timm:hf-hub:timm/resnet18.a1_in1k", "expected a model of timm; got 'hf-hub:"),
        ("timm:local-dir:weights", "expected a model of timm; got 'local-dir:"),
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
    with pytest.raises(InputError, match=f"{arch}: expected no weights.*got {name}"):
        build_model(arch, {name: "DEFAULT"})


@pytest.mark.parametrize("arch", ["torchvision:squeezenet1_1", "timm:resnet10t"])
def test_zoo_arguments_are_checked(arch):
    pytest.importorskip(arch.partition(":")[0])
    with pytest.raises(InputError, match=f"{arch}: expected arguments that it can be built with; got .*'num_clases'"):
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


def test_networks_that_a_function_keeps_are_copied(module):
    name = module("import torch\nKEPT = torch.nn.Linear(2, 2)\ndef make():\n    return KEPT\n")
    first, second = build_model(f"{name}:make"), build_model(f"{name}:make")
    with torch.no_grad():
        first.weight.zero_()
    assert second.weight.abs().min() > 0
    assert sys.modules[name].KEPT.weight.abs().min() > 0


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
        ("def make(:\n", r"that can be imported; got SyntaxError"),
        (
            "import no_such_package\n",
            "that can be imported; got ModuleNotFoundError: No module named 'no_such_package'",
        ),
        ("raise SystemExit(3)\n", "that can be imported; got SystemExit: 3"),
        ("1 / 0\n", "that can be imported; got ZeroDivisionError"),
        ("def mak(): pass\n", r"got 'make', which it does not have; did you mean mak\?"),
        ("make = 3\n", "got 'make', which it does not have$"),
        ("def make(x): pass\n", r"can be built with; got \{\}: TypeError: make\(\) missing"),
        ("def make(): raise ValueError('one\\ntwo')\n", "ValueError: one two$"),
        ("def make(): return 3\n", "expected an nn.Module; got int"),
        ("import torch\ndef make(): return torch.nn.ReLU\n", "expected an nn.Module; got type"),
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
    with pytest.raises(
        InputError, match="arch: expected a module no_such_module that can be imported; got ModuleNotFoundError"
    ):
        build_model("no_such_module:f")
