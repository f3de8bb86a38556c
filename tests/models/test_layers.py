"""The layer view: matrices by name, and what cannot be read by name."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from brittle.errors import InputError
from brittle.linear.convolution import ConvGeometry, apply, bounds_of, norm_inf
from brittle.models.build import fcn, resnet18_cifar
from brittle.models.layers import conv_geometry, is_stock, read_layers


def names(model):
    return [view.name for view in read_layers(model).views]


def only(model):
    (view,) = read_layers(model).views
    return view


def linear_part(view, x):
    """What the layer adds for an input x beyond its bias, computed from the view alone."""
    if view.convolution:
        return apply(view.weight.double(), view.geometry, x)
    return x @ view.weight.double().T


def record(model, views, x):
    """Inputs of every view's module and outputs of its output module, for one forward pass."""
    found = {}

    def note(module, key, which):
        def hook(module, inputs, output):
            found[key] = (inputs[0] if which == "in" else output).clone()

        return module.register_forward_hook(hook)

    hooks = [note(view.module, (view.name, "in"), "in") for view in views]
    hooks += [note(view.output, (view.name, "out"), "out") for view in views]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def assert_views_compute_what_the_layers_compute(model, shape):
    model = copy.deepcopy(model).double().eval()
    views = [view for view in read_layers(model).views if view.output is not None]
    assert views
    one, two = (record(model, views, torch.randn(2, *shape, dtype=torch.float64)) for _ in range(2))
    for view in views:
        change = one[view.name, "in"] - two[view.name, "in"]
        expected = one[view.name, "out"] - two[view.name, "out"]
        torch.testing.assert_close(linear_part(view, change), expected, rtol=1e-9, atol=1e-9, msg=view.name)


# --- single layers ------------------------------------------------------------------------------------------

SINGLE = {
    "linear": (nn.Linear(5, 3), (5,), "Linear", (3, 5), 15),
    "conv1d": (nn.Conv1d(2, 4, 3, 2, 1), (2, 9), "Conv1d", (4, 6), 24),
    "conv2d": (nn.Conv2d(2, 4, (3, 2), dilation=2), (2, 9, 9), "Conv2d", (4, 12), 48),
    "conv3d": (nn.Conv3d(1, 2, 2, padding=1), (1, 4, 4, 4), "Conv3d", (2, 8), 16),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5), "Conv2d (2 groups)", (6, 18), 108),
    "depthwise": (nn.Conv2d(3, 6, 3, groups=3), (3, 5, 5), "Conv2d (depthwise)", (6, 9), 54),
    "same": (nn.Conv2d(1, 2, 4, padding="same"), (1, 5, 6), "Conv2d", (2, 16), 32),
    "circular": (nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), (1, 5, 6), "Conv2d", (2, 9), 18),
    "no bias": (nn.Linear(5, 3, bias=False), (5,), "Linear", (3, 5), 15),
}


@pytest.mark.parametrize("name", SINGLE)
def test_single_layers(name):
    layer, shape, kind, matrix, count = SINGLE[name]
    view = only(nn.Sequential(nn.Identity(), layer))
    assert (view.name, view.kind, tuple(view.matrix.shape), view.parameters) == ("1", kind, matrix, count)
    assert view.module is view.output is layer
    assert view.groups == getattr(layer, "groups", 1)
    assert view.convolution == (layer.weight.ndim > 2)
    assert torch.equal(view.matrix, layer.weight.reshape(matrix))
    assert not view.weight.requires_grad
    assert_views_compute_what_the_layers_compute(nn.Sequential(layer), shape)
    assert only(layer).name


def test_names_follow_the_model():
    assert names(fcn(4, 3, 3, 2)) == ["1", "3", "5"]
    found = names(resnet18_cifar(width=2))
    assert found == [
        name for name, m in resnet18_cifar(width=2).named_modules() if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    assert "layer2.0.downsample.0" in found
    assert_views_compute_what_the_layers_compute(resnet18_cifar(width=2), (3, 8, 8))


def test_a_shared_module_appears_once():
    layer = nn.Linear(3, 3)
    assert names(nn.Sequential(layer, nn.ReLU(), layer, nn.Sequential(nn.ReLU(), layer))) == ["0"]


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(weight):
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), nn.Conv1d(1, 1, 2)))
    model[1][1].weight.data[0, 0, 1] = weight
    with pytest.raises(InputError, match=r"finite weights; got 1 NaN or infinite ones of 2 in '1\.1'"):
        read_layers(model)


# --- low-rank pairs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_pair_is_its_product(bias):
    model = nn.Sequential(nn.Linear(9, 2, bias), nn.Linear(2, 8, bias), nn.ReLU(), nn.Linear(8, 3))
    pair, head = read_layers(model).views
    assert (pair.name, pair.kind, pair.parameters) == ("0", "Linear (low-rank pair, rank 2)", 2 * 9 + 8 * 2)
    assert (pair.module, pair.output, head.name) == (model[0], model[1], "3")
    expected = model[1].weight.detach().double() @ model[0].weight.detach().double()
    torch.testing.assert_close(pair.matrix.double(), expected)
    assert_views_compute_what_the_layers_compute(model, (9,))


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), (1, 2, 2)])
def test_a_conv_pair_is_its_product(mode, stride, padding, dilation):
    first = nn.Conv2d(3, 2, 3, stride, padding, dilation, padding_mode=mode)
    model = nn.Sequential(first, nn.Conv2d(2, 5, 1))
    view = only(model)
    assert (view.kind, view.parameters) == ("Conv2d (low-rank pair, rank 2)", 2 * 27 + 10)
    assert tuple(view.weight.shape) == (5, 3, 3, 3)
    assert view.geometry == ConvGeometry.of(first)
    assert_views_compute_what_the_layers_compute(model, (3, 7, 7))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (nn.Linear(9, 8), nn.Linear(8, 8)),  # no bottleneck
        (nn.Conv2d(3, 2, 3), nn.Conv2d(2, 5, 3)),  # the second has more than one tap
        (nn.Conv2d(3, 2, 3), nn.Conv2d(2, 5, 1, stride=2)),
        (nn.Conv2d(3, 2, 3), nn.Conv2d(2, 5, 1, padding=1)),
        (nn.Conv2d(4, 2, 3, groups=2), nn.Conv2d(2, 5, 1)),
        (nn.Conv2d(3, 2, 3), nn.Conv2d(2, 6, 1, groups=2)),
    ],
)
def test_what_is_no_pair_is_two_layers(first, second):
    assert names(nn.Sequential(first, second)) == ["0", "1"]


def test_pairs_need_a_plain_sequence_without_anything_between():
    class Mine(nn.Sequential):
        def forward(self, x):
            return self[1](torch.relu(self[0](x)))

    assert names(Mine(nn.Linear(9, 2), nn.Linear(2, 8))) == ["0", "1"]
    assert names(nn.Sequential(nn.Linear(9, 2), nn.ReLU(), nn.Linear(2, 8))) == ["0", "2"]
    assert names(nn.Sequential(nn.Linear(9, 2), nn.Linear(2, 8), nn.Linear(8, 2), nn.Linear(2, 9))) == ["0", "2"]


# --- attention ----------------------------------------------------------------------------------------------


def test_multihead_attention_is_split():
    layer = nn.MultiheadAttention(4, 2)
    views = {view.name: view for view in read_layers(nn.ModuleDict({"attn": layer})).views}
    assert list(views) == ["attn.in_proj.q", "attn.in_proj.k", "attn.in_proj.v", "attn.out_proj"]
    stacked = torch.cat([views[f"attn.in_proj.{part}"].matrix for part in "qkv"])
    assert torch.equal(stacked, layer.in_proj_weight)
    assert torch.equal(views["attn.out_proj"].matrix, layer.out_proj.weight)
    assert [view.parameters for view in views.values()] == [16] * 4
    assert names(layer)[:3] == ["in_proj.q", "in_proj.k", "in_proj.v"]


def test_multihead_attention_with_separate_projections():
    layer = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
    views = read_layers(layer).views
    assert [(view.name, tuple(view.matrix.shape)) for view in views] == [
        ("q_proj", (4, 4)), ("k_proj", (4, 3)), ("v_proj", (4, 5)), ("out_proj", (4, 4)),
    ]  # fmt: skip


def test_extra_keys_of_attention_are_named():
    unread = read_layers(nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2, add_bias_kv=True)})).unread
    assert any("bias_k" in entry.reason for entry in unread)


def assert_qkv_is_split(model, name):
    fused = model.get_submodule(name)
    views = {view.name: view for view in read_layers(model).views}
    parts = [views.pop(f"{name}.{part}") for part in "qkv"]
    assert name not in views
    assert torch.equal(torch.cat([part.matrix for part in parts]), fused.weight)
    assert all(part.output is None and part.module is fused and "qkv" in part.kind for part in parts)


def test_timms_vision_transformer_is_split():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    assert_qkv_is_split(model, "blocks.0.attn.qkv")
    assert_views_compute_what_the_layers_compute(model, (3, 32, 32))
    assert any("cls_token" in entry.reason for entry in read_layers(model).unread)


def test_torchvisions_transformers_are_split():
    models = pytest.importorskip("torchvision").models
    swin = models.SwinTransformer([4, 4], 8, depths=[2], num_heads=[2], window_size=[2, 2])
    name = next(name for name, _ in swin.named_modules() if name.endswith("qkv"))
    assert_qkv_is_split(swin, name)
    vit = models.VisionTransformer(32, 16, 1, 2, 8, 16)
    assert sum(".in_proj." in name for name in names(vit)) == 3


def test_timms_swin_is_split():
    timm = pytest.importorskip("timm")
    options = {"img_size": 56, "depths": (1,), "num_heads": (2,), "embed_dim": 8}
    model = timm.create_model("swin_tiny_patch4_window7_224", **options)
    name = next(name for name, _ in model.named_modules() if name.endswith("qkv"))
    assert_qkv_is_split(model, name)


def test_a_layer_called_qkv_without_heads_is_one_matrix():
    model = nn.ModuleDict({"qkv": nn.Linear(4, 12)})
    assert names(model) == ["qkv"]


# --- parametrisations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.orthogonal])
@pytest.mark.parametrize(("layer", "shape"), [(nn.Linear(4, 3), (4,)), (nn.Conv2d(2, 3, 2), (2, 4, 4))])
def test_parametrised_layers_are_read_as_what_they_compute(wrap, layer, shape):
    model = nn.Sequential(wrap(copy.deepcopy(layer)))
    view = only(model)
    torch.testing.assert_close(view.weight, model[0].weight.detach())
    assert view.kind == type(layer).__name__
    assert_views_compute_what_the_layers_compute(model, shape)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_what_a_parametrised_layer_is_made_of_is_not_unread(wrap):
    assert read_layers(nn.Sequential(wrap(nn.Linear(4, 3)))).unread == []


def test_reading_changes_nothing():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3)), nn.BatchNorm1d(3)).train()
    state = copy.deepcopy(model.state_dict())
    read_layers(model)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert model.training


# --- what has no matrix -------------------------------------------------------------------------------------


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.zeros(2))
        self.inner = nn.Linear(2, 2)


UNREAD = {
    "transposed": (nn.ConvTranspose2d(2, 2, 3), "transposed convolution"),
    "table": (nn.Embedding(4, 3), "look-up table"),
    "bags": (nn.EmbeddingBag(4, 3), "look-up table"),
    "memory": (nn.LSTM(3, 4), "recurrent"),
    "gated memory": (nn.GRU(3, 4), "recurrent"),
    "pairs": (nn.Bilinear(2, 2, 2), "bilinear"),
    "slope": (nn.PReLU(), "activation"),
    "batch norm": (nn.BatchNorm2d(3), "normalisation"),
    "layer norm": (nn.LayerNorm(3), "normalisation"),
    "group norm": (nn.GroupNorm(1, 3), "normalisation"),
    "lazy": (nn.LazyLinear(3), "not initialised"),
    "integers": (nn.Linear(2, 2, dtype=torch.complex64), "complex64"),
    "custom": (Custom(), "Custom: no rule to read scale, shift"),
    "meta": (nn.Linear(2, 2, device="meta"), "not initialised"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_cannot_be_read_is_named_with_the_reason(name):
    module, reason = UNREAD[name]
    views, unread = read_layers(nn.ModuleDict({name: module}))
    assert [entry.name for entry in unread] == [name]
    assert reason in unread[0].reason
    assert [view.name for view in views] == [f"{name}.inner" for _ in range(isinstance(module, Custom))]


def test_modules_without_parameters_are_not_listed():
    assert read_layers(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm1d(3, affine=False))) == ([], [])


# --- convolutions with a forward of their own ---------------------------------------------------------------


class PadsAndCalls(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 2, 3)))


class PadsByModule(nn.Conv2d):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.pad = nn.ZeroPad2d((0, 1, 2, 3))

    def forward(self, x):
        return F.conv2d(self.pad(x), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class CallsByKeyword(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, weight=self.weight, bias=self.bias, stride=self.stride, groups=self.groups)


class PadsOneAxis(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (2, 1)), self.weight, self.bias, 2)


@pytest.mark.parametrize("kind", [PadsAndCalls, PadsByModule, CallsByKeyword, PadsOneAxis])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding": 1}, {"dilation": 2}])
def test_static_zero_padding_is_understood(kind, options):
    module = kind(2, 4, (3, 2), bias=False, dtype=torch.float64, **options)
    view = only(nn.Sequential(module))
    size = (5, 6)
    inputs = torch.eye(2 * math.prod(size), dtype=torch.float64).view(-1, 2, *size)
    with torch.no_grad():
        A = module(inputs).flatten(1).T.numpy()
    for p in (1, 2, math.inf):
        bounds = bounds_of(view.weight, view.geometry, p, size)
        assert bounds.lower <= np.linalg.norm(A, p) * (1 + 1e-9)
        assert np.linalg.norm(A, p) <= bounds.upper * (1 + 1e-9)
    assert norm_inf(view.weight, view.geometry, size).upper == pytest.approx(np.linalg.norm(A, math.inf))
    assert_views_compute_what_the_layers_compute(nn.Sequential(module), (2, *size))


def test_efficientnets_static_padding_is_understood():
    utils = pytest.importorskip("efficientnet_lite_pytorch.utils")
    for stride in (1, 2):
        module = utils.Conv2dStaticSamePadding(2, 4, 3, stride=stride, image_size=7)
        assert only(nn.Sequential(module)).geometry is not None
        assert_views_compute_what_the_layers_compute(nn.Sequential(module), (2, 7, 7))


def own(forward):
    """A Conv2d whose forward is this function."""
    return type("Own", (nn.Conv2d,), {"forward": forward})


def stock(module, x):
    return nn.Conv2d.forward(module, x)


OTHERS = {
    "scaled input": own(lambda s, x: stock(s, 2 * x)),
    "scaled output": own(lambda s, x: 2 * stock(s, x)),
    "activation": own(lambda s, x: stock(s, x).relu()),
    "scaled weight": own(lambda s, x: F.conv2d(x, 2 * s.weight)),
    "standardised weight": own(lambda s, x: F.conv2d(x, s.weight / s.weight.norm())),
    "residual": own(lambda s, x: x[..., 2:, 2:] + stock(s, x)),
    "twice": own(lambda s, x: stock(s, stock(s, x))),
    "padded with ones": own(lambda s, x: stock(s, F.pad(x, (1, 1, 1, 1), value=1.0))),
    "reflected": own(lambda s, x: stock(s, F.pad(x, (1, 1, 1, 1), mode="reflect"))),
    "positional mode": own(lambda s, x: stock(s, F.pad(x, (1, 1, 1, 1), "reflect"))),
    "cropped": own(lambda s, x: stock(s, F.pad(x, (-1, 0, 0, 0)))),
    "padded after": own(lambda s, x: F.pad(stock(s, x), (1, 1, 1, 1))),
    "padded channels": own(lambda s, x: stock(s, F.pad(x[:, :1], (0, 0, 0, 0, 0, 1)))),
    "padded by size": own(lambda s, x: stock(s, F.pad(x, (0, x.shape[-1] % 2)))),
    "branching": own(lambda s, x: stock(s, x) if x.sum() > 0 else stock(s, -x)),
    "another weight": own(lambda s, x: F.conv2d(x, s.bias)),
    "same": own(lambda s, x: F.conv2d(x, s.weight, padding="same")),
    "hook of its own": type("Own", (nn.Conv2d,), {"_conv_forward": lambda s, x, w, b: F.conv2d(x, 5 * w, b)}),
    "pads channels only": own(lambda s, x: F.conv2d(F.pad(x, (0, 0, 0, 0, 1, 0)), s.weight)),
    "dead convolution": own(lambda s, x: (stock(s, x), x)[1]),
    "padding not used": own(lambda s, x: (F.pad(x, (1, 1)), stock(s, x))[1]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_forward_has_no_geometry(name):
    module = OTHERS[name](2, 2, 3)
    assert conv_geometry(module) is None
    assert only(nn.Sequential(module)).geometry is None


def test_circular_padding_of_a_subclass_is_not_taken_for_zeros():
    module = own(lambda s, x: stock(s, F.pad(x, (1, 1, 1, 1))))(1, 1, 3, padding=1, padding_mode="circular")
    assert conv_geometry(module) is None


def test_timms_dynamic_padding_has_no_geometry():
    layers = pytest.importorskip("timm.layers")
    assert conv_geometry(layers.Conv2dSame(2, 2, 3, stride=2)) is None


def test_stock_means_the_kinds_own_forward():
    class Plain(nn.Linear):
        pass

    class Other(nn.Linear):
        def forward(self, x):
            return -super().forward(x)

    assert is_stock(nn.Linear(2, 2), nn.Linear)
    assert is_stock(Plain(2, 2), nn.Linear)
    assert not is_stock(Other(2, 2), nn.Linear)
    assert not is_stock(nn.ReLU(), nn.Linear)
