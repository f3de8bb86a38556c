"""Certified Lipschitz bounds of whole networks: never below a local Jacobian norm, or refused."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from brittle.bounds import lipschitz_upper_bound, network_bounds
from brittle.errors import InputError
from brittle.models.build import fcn, resnet18_cifar
from brittle.models.normalize import Normalize
from helpers.networks import narrow_resnet18

SLACK = 1 + 1e-9
both = pytest.mark.parametrize("p", [2, math.inf])


class Apply(nn.Module):
    """A module whose forward is ``function(self, x)``, for short tests."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def prepared(model, seed=0):
    """In float64 and evaluation mode, with random weights, biases and running statistics."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not name.endswith(("std", "mean")):
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) / max(1, tensor[0].numel()) ** 0.5)
        if name.endswith("running_var"):
            tensor.data.copy_(0.1 + torch.rand(tensor.shape, generator=generator))
    return model.double().eval()


def jacobian(model, x):
    """Outputs by inputs, for one sample without its batch axis."""
    J = torch.autograd.functional.jacobian(lambda x: model(x[None])[0], x)
    return J.reshape(-1, x.numel()).numpy()


def points(shape, count=6):
    generator = torch.Generator().manual_seed(7)
    scales = torch.logspace(-2, 1, count)
    return [scale * torch.randn(shape, dtype=torch.float64, generator=generator) for scale in scales]


def largest_local_norm(model, shape, p, count=6):
    return max(float(np.linalg.norm(jacobian(model, x), p)) for x in points(shape, count))


def upper(model, p, **options):
    bound = lipschitz_upper_bound(model, p, **options)
    assert bound.unavailable is None, bound.unavailable
    assert bound.p == p
    return bound.upper


def product(model, p, **options):
    """The plainest of the arguments: norms multiplied."""
    return dict(lipschitz_upper_bound(model, p, **options).arguments)["product of norms"]


# --- networks with a bound ----------------------------------------------------------------------------------

IMAGE = (3, 8, 8)


def head(channels, pixels=1):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * pixels, 4))


def cnn(*layers, out, pixels=1):
    return nn.Sequential(*layers, head(out, pixels))


def residual():
    parts = {"a": nn.Conv2d(3, 3, 3, padding=1), "bn": nn.BatchNorm2d(3), "b": nn.Conv2d(3, 3, 3, padding=1)}
    return Apply(lambda s, x: F.relu(x + s.b(torch.relu(s.bn(s.a(x))))), **parts)


def two(function, first=3, second=3):
    """A module of two dense layers a and b."""
    return Apply(function, a=nn.Linear(4, first), b=nn.Linear(4, second))


def with_constant(function, rows, entries):
    return Apply(function, a=nn.Linear(4, rows), b=nn.Parameter(torch.ones(entries)))


def changed_in_place(s, x):
    y = s.b(x)
    return y.add_(s.a(x)) + y


def in_place(s, x):
    out = s.a(x)
    out += s.b(x)
    return out


def option_a():
    """Two blocks whose second one halves the image and doubles the channels, by zeros, in its shortcut."""
    parts = {"stem": nn.Conv2d(3, 4, 3, padding=1), "a": nn.Conv2d(4, 8, 3, 2, 1), "b": nn.Conv2d(8, 8, 3, padding=1)}

    def forward(s, x):
        x = F.relu(s.stem(x))
        return F.relu(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2), "constant", 0) + s.b(F.relu(s.a(x)))).mean((2, 3))

    return Apply(forward, **parts)


def shuffled():
    """The unit of ShuffleNetV2: one half of the channels beside a convolution of the other, shuffled."""

    def forward(s, x):
        first, second = x.chunk(2, dim=1)
        x = torch.cat((first, s.a(second)), dim=1)
        n, c, h, w = x.size()
        return torch.transpose(x.view(n, 2, c // 2, h, w), 1, 2).contiguous().view(n, c, h, w).split([1, 3], 1)[1]

    return Apply(forward, a=nn.Conv2d(2, 2, 3, padding=1))


def transposed(layer):
    return nn.Sequential(nn.BatchNorm2d(3), layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU())


def pool(kind, *arguments, **options):
    return cnn(nn.Conv2d(3, 4, 3), nn.ReLU(), kind(*arguments, **options), nn.AdaptiveAvgPool2d(2), out=4, pixels=4)


NETWORKS = {
    "fcn": (lambda: fcn(12, 9, 4, 5, bias=True), (3, 2, 2)),
    "one layer": (lambda: nn.Linear(5, 3), (5,)),
    "low-rank pair": (lambda: nn.Sequential(nn.Linear(9, 2), nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)), (9,)),
    "dense batch norm": (lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)), (6,)),
    "batch norm first": (lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5)), (6,)),
    "tokens": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), (3, 4)),
    "bare activation": (lambda: nn.GELU(), (6,)),
    "normalised": (lambda: nn.Sequential(Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.25]), nn.Conv2d(3, 4, 3)), IMAGE),
    "conv bn": (lambda: cnn(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 6), out=2), IMAGE),
    "conv bn affine=False": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=False)), IMAGE),
    "bn after relu": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.BatchNorm2d(5)), IMAGE),
    "strides": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, 2, 1)), IMAGE),
    "groups": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Hardswish(), nn.Conv2d(6, 4, 1)), IMAGE),
    "dilation": (lambda: nn.Sequential(nn.Conv2d(3, 2, 3, dilation=2, padding="same"), nn.Tanh()), IMAGE),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3, 2, 1), nn.BatchNorm1d(3), nn.Conv1d(3, 2, 2)), (2, 9)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.ReLU(), nn.MaxPool3d(2)), (1, 3, 3, 3)),
    "max pool": (lambda: pool(nn.MaxPool2d, 2), IMAGE),
    "overlapping max pool": (lambda: pool(nn.MaxPool2d, 3, 2, 1), IMAGE),
    "dense max pool": (lambda: pool(nn.MaxPool2d, 3, 1), IMAGE),
    "dilated max pool": (lambda: pool(nn.MaxPool2d, 2, 2, dilation=2, ceil_mode=True), IMAGE),
    "avg pool": (lambda: pool(nn.AvgPool2d, 2), IMAGE),
    "overlapping avg pool": (lambda: pool(nn.AvgPool2d, 3, 2, 1), IMAGE),
    "sparse avg pool": (lambda: pool(nn.AvgPool2d, 2, 3), IMAGE),
    "avg pool of one axis": (lambda: nn.AvgPool1d(3, 2), (2, 9)),
    "uneven adaptive pool": (lambda: nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d((5, 3))), IMAGE),
    "adaptive pool that repeats": (lambda: nn.AdaptiveAvgPool2d((12, None)), IMAGE),
    "adaptive pool of one axis": (lambda: nn.AdaptiveAvgPool1d(4), (2, 9)),
    "residual": (residual, IMAGE),
    "sum with itself": (lambda: Apply(lambda s, x: s.a(x) + s.a(x), a=nn.Linear(4, 3)), (4,)),
    "in-place sum": (lambda: two(in_place), (4,)),
    "difference": (lambda: two(lambda s, x: s.a(x) - s.b(x)), (4,)),
    "sum with a constant": (lambda: with_constant(lambda s, x: 1 + (s.a(x) + s.b), 3, 3), (4,)),
    "concatenation": (lambda: two(lambda s, x: torch.cat([s.a(x), s.b(x)], 1), 3, 2), (4,)),
    "concatenation with itself": (lambda: Apply(lambda s, x: torch.cat([x, x], 1)), (4,)),
    "thrice the same": (lambda: Apply(lambda s, x: torch.cat([s.a(x), x, x], dim=1), a=nn.Linear(4, 4)), (4,)),
    "scaled": (lambda: Apply(lambda s, x: -3 * s.a(x) / 2, a=nn.Linear(4, 3)), (4,)),
    "view": (lambda: Apply(lambda s, x: s.a(x.view(x.size(0), -1)), a=nn.Linear(12, 3)), (3, 2, 2)),
    "torch.flatten": (lambda: Apply(lambda s, x: s.a(torch.flatten(x, 1)), a=nn.Linear(12, 3)), (3, 2, 2)),
    "permute": (lambda: Apply(lambda s, x: s.a(x.permute(0, 2, 3, 1)), a=nn.Linear(3, 5)), (3, 2, 2)),
    "shared": (lambda: Apply(lambda s, x: s.a(torch.relu(s.a(x))), a=nn.Linear(4, 4)), (4,)),
    "broadcast sum of images": (lambda: Apply(lambda s, x: x + s.a(x), a=nn.AdaptiveAvgPool2d(1)), (1, 4, 4)),
    "broadcast sum of vectors": (lambda: two(lambda s, x: s.a(x) + s.b(x), 9, 1), (4,)),
    "broadcast constant": (lambda: with_constant(lambda s, x: s.a(x) + s.b, 1, 9), (4,)),
    "tokens with batch norm": (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(3)), (3, 4)),
    "square tokens with batch norm": (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), (4, 4)),
    "every second pixel": (lambda: Apply(lambda s, x: s.a(x[:, :, ::2, 1::2]), a=nn.Conv2d(3, 4, 3)), IMAGE),
    "every second pixel beside": (lambda: option_a(), IMAGE),
    "some channels": (lambda: Apply(lambda s, x: s.a(x[:, 1:3]) - s.a(x[:, [2, 0]]), a=nn.Conv2d(2, 4, 3)), IMAGE),
    "one pixel": (lambda: Apply(lambda s, x: s.a(x[..., 1, -1]), a=nn.Linear(3, 4)), IMAGE),
    "half of a known size": (lambda: Apply(lambda s, x: s.a(x[:, :, : x.shape[2] // 2]), a=nn.Conv2d(3, 2, 3)), IMAGE),
    "parts side by side": (lambda: shuffled(), (4, 6, 6)),
    "zero padding of one axis": (lambda: Apply(lambda s, x: s.a(F.pad(x, (2, 1))), a=nn.Conv2d(3, 4, 3)), IMAGE),
    "padding by constants": (lambda: cnn(nn.ConstantPad2d((1, -1, 2, 0), 7.0), nn.Conv2d(3, 4, (10, 8)), out=4), IMAGE),
    "channels of zeros": (lambda: Apply(lambda s, x: s.a(F.pad(x, (0, 0, 0, 0, 1, 2))), a=nn.Conv2d(6, 4, 3)), IMAGE),
    "reflected": (lambda: cnn(nn.ReflectionPad2d(2), nn.Conv2d(3, 4, 12), out=4), IMAGE),
    "repeated at the border": (lambda: cnn(nn.ReplicationPad2d((3, 0, 1, 1)), nn.AvgPool2d(5), out=3, pixels=4), IMAGE),
    "circular by function": (
        lambda: Apply(lambda s, x: s.a(F.pad(x, (1, 1, 0, 2), "circular")), a=nn.Conv2d(3, 2, 3)), IMAGE,
    ),
    "with a constant beside": (
        lambda: Apply(lambda s, x: s.a(torch.cat([s.b, x, x.new_ones(1, 2)], 1)), a=nn.Linear(7, 3),
                      b=nn.Parameter(torch.ones(1, 1))), (4,),
    ),
    "with zeros beside": (
        lambda: Apply(lambda s, x: s.a(torch.cat([x, torch.zeros_like(x), 2 * x], 1)), a=nn.Conv2d(9, 2, 3)), IMAGE,
    ),
    "with nothing of itself": (
        lambda: Apply(lambda s, x: s.a(torch.cat([x, x.mul(0)], 1)), a=nn.Conv2d(6, 2, 3)), IMAGE,
    ),
    "transposed convolution": (lambda: transposed(nn.ConvTranspose2d(3, 4, 3, 2, 1, output_padding=1)), IMAGE),
    "grouped transposed convolution": (lambda: transposed(nn.ConvTranspose2d(3, 6, 3, 1, 1, groups=3)), IMAGE),
    "dilated transposed convolution": (
        lambda: transposed(nn.ConvTranspose2d(3, 4, 2, 1, dilation=3, output_padding=2)), IMAGE,
    ),
    "transposed convolution of one axis": (lambda: nn.Sequential(nn.ConvTranspose1d(2, 3, 4, 3, 2), nn.ReLU()), (2, 7)),
    "upsampled": (lambda: cnn(nn.Upsample(scale_factor=2), nn.Conv2d(3, 4, 9), nn.AdaptiveAvgPool2d(1), out=4), IMAGE),
    "upsampled to corners": (
        lambda: cnn(nn.Upsample((5, 11), mode="bilinear", align_corners=True), nn.Conv2d(3, 4, 5), out=4, pixels=7),
        IMAGE,
    ),
    "upsampled by half": (
        lambda: Apply(lambda s, x: s.a(F.interpolate(x, scale_factor=1.7, mode="bilinear")), a=nn.Conv2d(3, 4, 3)),
        IMAGE,
    ),
    "resized to another": (
        lambda: Apply(lambda s, x: x + F.interpolate(s.a(x), x.shape[-2:]), a=nn.Conv2d(3, 3, 3, 2)), IMAGE,
    ),
    "shuffled pixels": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.PixelShuffle(2), nn.Conv2d(1, 2, 3)), IMAGE),
    "pooled by its size": (
        lambda: Apply(lambda s, x: s.a(F.avg_pool2d(x, x.size(3)).view(x.size(0), -1)), a=nn.Linear(3, 4)), IMAGE,
    ),
    "clamped": (lambda: Apply(lambda s, x: s.a(x.clamp(0, 1)) + torch.clamp(x, min=0.5), a=nn.Linear(4, 4)), (4,)),
    "sum changed in place": (lambda: two(changed_in_place), (4,)),
}  # fmt: skip
ACTIVATIONS = {
    "ReLU": nn.ReLU(), "ReLU6": nn.ReLU6(), "LeakyReLU": nn.LeakyReLU(0.2), "steep LeakyReLU": nn.LeakyReLU(-3.0),
    "ELU": nn.ELU(), "steep ELU": nn.ELU(2.5), "PReLU": nn.PReLU(init=2.0), "Tanh": nn.Tanh(), "Sigmoid": nn.Sigmoid(),
    "Hardsigmoid": nn.Hardsigmoid(), "Hardtanh": nn.Hardtanh(), "Softplus": nn.Softplus(beta=3), "GELU": nn.GELU(),
    "GELU of tanh": nn.GELU("tanh"), "SiLU": nn.SiLU(), "Mish": nn.Mish(), "Hardswish": nn.Hardswish(),
    "Softmax": nn.Softmax(1), "F.relu": Apply(lambda s, x: F.relu(x)), "torch.tanh": Apply(lambda s, x: torch.tanh(x)),
    "SELU": nn.SELU(), "CELU": nn.CELU(), "wide CELU": nn.CELU(2.5), "F.celu": Apply(lambda s, x: F.celu(x, 0.3)),
    "F.elu": Apply(lambda s, x: F.elu(x, 2.0)), "F.leaky_relu": Apply(lambda s, x: F.leaky_relu(x, -2.0)),
    "F.selu": Apply(lambda s, x: F.selu(x)), "F.softplus": Apply(lambda s, x: F.softplus(x, 3)),
    "F.softmax": Apply(lambda s, x: F.softmax(x, dim=1)), "abs": Apply(lambda s, x: -x.abs()),
    "x.sigmoid": Apply(lambda s, x: x.sigmoid()), "F.relu6": Apply(lambda s, x: F.relu6(x)),
}  # fmt: skip


@both
@pytest.mark.parametrize("known", [True, False], ids=["with shape", "without shape"])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_local_norm_exceeds_the_bound(name, known, p):
    """Either a bound that holds, or none: never a crash."""
    build, shape = NETWORKS[name]
    model = prepared(build())
    bound = lipschitz_upper_bound(model, p, input_shape=shape if known else None)
    assert (bound.upper is None) != (bound.unavailable is None)
    if bound.upper is not None:
        assert largest_local_norm(model, shape, p) <= bound.upper * SLACK


CERTAIN = [name for name in NETWORKS if not name.startswith(("broadcast", "tokens with", "square", "sum changed"))]


@both
@pytest.mark.parametrize("name", CERTAIN)
def test_networks_of_known_parts_have_a_bound(name, p):
    build, shape = NETWORKS[name]
    assert 0 < upper(prepared(build()), p, input_shape=shape) < math.inf


@both
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_no_steeper_than_their_factor(name, p):
    shape, activation = (3,), ACTIVATIONS[name].double()
    bound = upper(nn.Sequential(activation), p, input_shape=shape)
    steepest = 0.0
    for value in torch.linspace(-6, 6, 241, dtype=torch.float64):
        x = torch.tensor([float(value), 0.3, -0.2], dtype=torch.float64)
        steepest = max(steepest, float(np.linalg.norm(jacobian(activation, x), p)))
    assert steepest <= bound * (1 + 1e-6)  # torch's own slopes are rounded
    assert bound <= 1.2 * steepest


@pytest.mark.parametrize(("p", "known"), [(2, True), (math.inf, True), (math.inf, False)])
def test_the_cifar_resnet_has_a_bound(p, known):
    """In l_inf even for unknown sizes: there a term that is broadcast counts once."""
    model = prepared(resnet18_cifar(width=4))
    bound = upper(model, p, input_shape=(3, 16, 16) if known else None)
    assert largest_local_norm(model, (3, 16, 16), p, count=2) <= bound


def test_torchvisions_resnet_has_bounds_far_below_the_product():
    pytest.importorskip("torchvision")
    model = narrow_resnet18(classes=3).eval()
    bounds = network_bounds(model, (2, math.inf), input_shape=(3, 32, 32))
    for p, bound in bounds.items():
        assert largest_local_norm(model.double(), (3, 32, 32), p, count=1) <= bound.upper
        assert bound.upper < 0.1 * dict(bound.arguments)["product of norms"]


# --- how tight ----------------------------------------------------------------------------------------------


@both
def test_a_dense_chain_is_the_product_of_norms(p):
    model = prepared(fcn(7, 6, 4, 3))
    norms = [np.linalg.norm(layer.weight.detach().numpy(), p) for layer in model if isinstance(layer, nn.Linear)]
    assert product(model, p) == pytest.approx(math.prod(norms), rel=1e-9)


@both
def test_dense_layers_in_a_row_are_multiplied_out(p):
    model = prepared(nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 6), nn.Linear(6, 2)))
    product = model[2].weight @ model[1].weight @ model[0].weight
    assert upper(model, p) == pytest.approx(np.linalg.norm(product.detach().numpy(), p), rel=1e-9)


@both
def test_sums_add_and_concatenations_combine(p):
    a, b = prepared(nn.Linear(4, 3), 1), prepared(nn.Linear(4, 3), 2)
    one, two = (np.linalg.norm(layer.weight.detach().numpy(), p) for layer in (a, b))
    both_ways = max(one, two) if p == math.inf else math.hypot(one, two)
    added, joined = lambda s, x: s.a(x) + s.b(x), lambda s, x: torch.cat([s.a(x), s.b(x)], 1)
    assert product(Apply(added, a=a, b=b), p, input_shape=(4,)) == pytest.approx(one + two)
    assert product(Apply(joined, a=a, b=b), p) == pytest.approx(both_ways)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(2, 3, 3, 2, 1, output_padding=1),
        nn.ConvTranspose2d(4, 6, 2, 2, groups=2),
        nn.ConvTranspose1d(2, 2, 3, 1, 1, dilation=2),
    ],
)
def test_a_transposed_convolution_has_the_norms_of_its_matrix(layer):
    layer, shape = prepared(layer), (layer.in_channels, 7, 6)[: layer.weight.ndim - 1]
    J = jacobian(layer, torch.zeros(shape, dtype=torch.float64))
    assert upper(layer, math.inf, input_shape=shape) == pytest.approx(np.linalg.norm(J, math.inf), rel=1e-9)
    assert upper(layer, math.inf) >= np.linalg.norm(J, math.inf) * (1 - 1e-12)
    for known in (shape, None):
        assert 1 - 1e-12 <= upper(layer, 2, input_shape=known) / np.linalg.norm(J, 2) <= 1.25


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Upsample(scale_factor=3), 3.0),
        (nn.Upsample(scale_factor=2, mode="bilinear"), 2.0),
        (nn.Upsample(size=(2, 2)), 1.0),
        (nn.ReflectionPad2d(1), 2.0),
        (nn.ReplicationPad2d((2, 0, 0, 0)), math.sqrt(3)),
        (nn.PixelShuffle(2), 1.0),
    ],
)
def test_resizing_and_padding_by_pixels_count_as_often_as_they_repeat(layer, expected):
    assert upper(nn.Sequential(layer), 2, input_shape=(4, 6, 6)) == pytest.approx(expected, rel=1e-9)
    assert upper(nn.Sequential(layer), math.inf, input_shape=(4, 6, 6)) == pytest.approx(1, rel=1e-9)


def test_a_shortcut_of_slices_and_zeros_is_bounded_as_the_convolution_that_it_is():
    """Every second pixel, and channels of zeros on both sides, are one tap of a strided convolution."""
    model = prepared(option_a())
    short = nn.Conv2d(4, 8, 1, 2, bias=False).double()
    short.weight.data = F.pad(torch.eye(4, dtype=torch.float64), (0, 0, 2, 2))[..., None, None]

    def forward(s, x):
        x = F.relu(s.stem(x))
        return F.relu(s.short(x) + s.b(F.relu(s.a(x)))).mean((2, 3))

    other = Apply(forward, stem=model.stem, a=model.a, b=model.b, short=short)
    for p, bound in network_bounds(model, (2, math.inf), input_shape=IMAGE).items():
        expected = lipschitz_upper_bound(other, p, input_shape=IMAGE)
        for name in ("product of norms", "multipliers" if p == 2 else "chain"):
            assert dict(bound.arguments)[name] == pytest.approx(dict(expected.arguments)[name], rel=1e-6)


@both
@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize(("name", "layer"), [("fcn", "3.weight"), ("conv bn", "0.weight"), ("strides", "2.weight")])
def test_scaling_a_layer_scales_the_bound(name, layer, scale, p):
    build, shape = NETWORKS[name]
    model = prepared(build())
    before = upper(model, p, input_shape=shape)
    model.get_parameter(layer).data.mul_(scale)
    assert upper(model, p, input_shape=shape) == pytest.approx(scale * before, rel=1e-5)


@both
@pytest.mark.parametrize("known", [True, False])
def test_a_batch_norm_is_folded(known, p):
    conv, norm = prepared(nn.Conv2d(3, 5, 3, padding=1)), prepared(nn.BatchNorm2d(5), 1)
    folded = nn.utils.fusion.fuse_conv_bn_eval(conv, norm)
    options = {"input_shape": IMAGE if known else None}
    bound = upper(nn.Sequential(conv, norm), p, **options)
    assert bound == pytest.approx(upper(nn.Sequential(folded), p, **options), rel=1e-6)
    assert bound < 0.99 * upper(nn.Sequential(conv), p, **options) * upper(nn.Sequential(norm), p)


@both
def test_a_dense_batch_norm_is_folded(p):
    linear, norm = prepared(nn.Linear(6, 5)), prepared(nn.BatchNorm1d(5), 1)
    folded = nn.utils.fusion.fuse_linear_bn_eval(linear, norm)
    assert upper(nn.Sequential(linear, norm), p, input_shape=(6,)) == pytest.approx(upper(folded, p), rel=1e-9)


def test_a_batch_norm_is_not_folded_into_a_layer_that_is_used_twice():
    conv, norm = prepared(nn.Conv2d(3, 3, 1)), prepared(nn.BatchNorm2d(3), 1)
    model = Apply(lambda s, x: s.norm(y := s.conv(x)) + y, conv=conv, norm=norm)
    expected = product(conv, 2) * (1 + product(norm, 2))
    assert product(model, 2, input_shape=(3, 4, 4)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        (nn.MaxPool2d(2), 1.0),
        (nn.MaxPool2d(3, 2), 2.0),
        (nn.MaxPool2d(3, 1), 3.0),
        (nn.MaxPool2d((3, 2), (1, 2)), math.sqrt(3)),
        (nn.AvgPool2d(2), 0.5),
        (nn.AvgPool2d(3, 2), 2 / 3),
        (nn.AdaptiveAvgPool2d(1), 1 / 8),
        (nn.AdaptiveAvgPool2d(4), 1 / 2),
        (nn.AdaptiveAvgPool2d(8), 1.0),
    ],
)
def test_pooling_factors_in_closed_form(pool, expected):
    assert product(nn.Sequential(pool), 2, input_shape=(2, 8, 8)) == pytest.approx(expected, rel=1e-9)
    assert product(nn.Sequential(pool), math.inf, input_shape=(2, 8, 8)) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(2, 2, 1), (3, 2, 1), (3, 1, 1), (2, 2, 2), (3, 2, 3), (2, 4, 2)]
)
def test_a_pixel_that_wins_all_its_windows_attains_the_max_pool_factor(kernel, stride, dilation):
    pool = nn.MaxPool1d(kernel, stride, dilation=dilation)
    peaks = torch.eye(20, dtype=torch.float64)
    attained = max(float(np.linalg.norm(jacobian(pool, x[None]), 2)) for x in peaks)
    assert upper(nn.Sequential(pool), 2) == pytest.approx(attained)


def test_normalisation_counts_in_input_units():
    model = nn.Sequential(Normalize([0.5, 0.5], [0.25, 0.1]), nn.Flatten(), nn.Identity())
    for p in (2, math.inf):
        assert upper(model, p) == pytest.approx(10, rel=1e-6)


@both
def test_a_known_size_is_never_worse(p):
    for name in ("conv bn", "strides", "groups", "dilation", "conv1d", "max pool", "residual"):
        build, shape = NETWORKS[name]
        model = prepared(build())
        loose = lipschitz_upper_bound(model, p).upper
        assert loose is None or upper(model, p, input_shape=shape) <= loose * SLACK


def test_factors_multiply_to_the_bound_of_a_chain():
    bound = lipschitz_upper_bound(prepared(fcn(7, 6, 3, 3)), 2)
    assert [name for name, _ in bound.factors] == ["1", "3", "5"]
    assert math.prod(factor for _, factor in bound.factors) == pytest.approx(dict(bound.arguments)["product of norms"])


# --- networks without a bound -------------------------------------------------------------------------------


def branching(s, x):
    return s.a(x) if x.sum() > 0 else x


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return torch.sort(x).values


class Doubled(nn.BatchNorm1d):
    """A batch norm that does more than its kind."""

    def forward(self, x):
        return 2 * super().forward(x)


def computed(module):
    """A module whose weight is a parametrisation: torch makes a class of its own for it."""
    return parametrize.register_parametrization(module, "weight", nn.Identity()).eval()


def sequence(last, *, train=False):
    return nn.Sequential(nn.Linear(4, 4), last).train(train)


REFUSED = {
    "batch norm in training": (sequence(nn.BatchNorm1d(4), train=True), "1"),
    "batch norm of the batch": (sequence(nn.BatchNorm1d(4, track_running_stats=False)), "1"),
    "conv batch norm in training": (nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1)), "1"),
    "dropout in training": (sequence(nn.Dropout(0.5), train=True), "1"),
    "spatial dropout in training": (sequence(nn.Dropout2d(0.5), train=True), "1"),
    "layer norm": (sequence(nn.LayerNorm(4)), "1"),
    "group norm": (sequence(nn.GroupNorm(2, 4)), "1"),
    "instance norm": (nn.Sequential(nn.Conv1d(1, 2, 3), nn.InstanceNorm1d(2)).eval(), "1"),
    "normalised embedding": (sequence(nn.CosineSimilarity()), "1"),
    "attention": (Apply(lambda s, x: s.heads(x, x, x)[0], heads=nn.MultiheadAttention(4, 2)).eval(), "heads"),
    "recurrent": (Apply(lambda s, x: s.memory(x)[0], memory=nn.LSTM(4, 4)).eval(), "memory"),
    "bilinear": (Apply(lambda s, x: s.pairs(x, x), pairs=nn.Bilinear(4, 4, 4)).eval(), "pairs"),
    "slice of the batch": (Apply(lambda s, x: x[:2]).eval(), "getitem"),
    "one sample": (Apply(lambda s, x: x[0]).eval(), "getitem"),
    "samples behind a new axis": (Apply(lambda s, x: x[None]).eval(), "getitem"),
    "entries taken twice": (Apply(lambda s, x: x[:, [0, 0, 1]]).eval(), "getitem"),
    "a mask": (Apply(lambda s, x: x[x > 0]).eval(), ""),
    "entries chosen by the input": (Apply(lambda s, x: x[:, x.argmax().item() :]).eval(), ""),
    "parts of the batch": (Apply(lambda s, x: x.chunk(2)[0]).eval(), ""),
    "all parts together": (Apply(lambda s, x: torch.cat(x.chunk(2, 1), 1)).eval(), ""),
    "parts that make a longer list": (Apply(lambda s, x: (x.chunk(2, 1) + x.chunk(2, 1))[3]).eval(), ""),
    "padding of the batch": (Apply(lambda s, x: F.pad(x, (0, 0, 1, 1))).eval(), "pad"),
    "cubic resizing": (nn.Sequential(nn.Upsample(scale_factor=2, mode="bicubic")).eval(), "0"),
    "smoothed resizing": (
        Apply(lambda s, x: F.interpolate(x, 3, mode="bilinear", antialias=True)).eval(),
        "interpolate",
    ),
    "clamp between tensors": (Apply(lambda s, x: x.clamp(max=x.flip(1))).eval(), ""),
    "CELU that grows": (nn.Sequential(nn.CELU(-1.0)).eval(), "0"),
    "noise": (Apply(lambda s, x: torch.cat([x, torch.rand_like(x)], 1)).eval(), "rand_like"),
    "max pooling with indices": (nn.Sequential(nn.MaxPool2d(2, return_indices=True)).eval(), "0"),
    "pooling with another divisor": (nn.Sequential(nn.AvgPool2d(2, divisor_override=1)).eval(), "0"),
    "unequal windows": (nn.Sequential(nn.AvgPool2d(3, 2, 1, count_include_pad=False)).eval(), "0"),
    "product of tensors": (Apply(lambda s, x: s.a(x) * x, a=nn.Linear(4, 4)).eval(), "mul"),
    "gate": (Apply(lambda s, x: x.mul(torch.sigmoid(x))).eval(), "mul"),
    "square": (Apply(lambda s, x: x**2).eval(), "pow"),
    "quotient": (Apply(lambda s, x: 1 / x).eval(), "truediv"),
    "rounded quotient": (Apply(lambda s, x: x.div(2, rounding_mode="floor")).eval(), "div"),
    "quotient by zero": (Apply(lambda s, x: s.a(x) / 0, a=nn.Linear(4, 4)).eval(), "truediv"),
    "sum with a factor": (Apply(lambda s, x: torch.add(x, x, alpha=5)).eval(), "add"),
    "matrix product": (Apply(lambda s, x: x @ s.w, w=nn.Parameter(torch.ones(4, 4))).eval(), "matmul"),
    "repetition": (Apply(lambda s, x: x.repeat(1, 9)).eval(), "repeat"),
    "expansion": (Apply(lambda s, x: x[:, None].expand(-1, 9, -1)).eval(), ""),
    "unknown function": (Apply(lambda s, x: torch.exp(x)).eval(), "exp"),
    "own forward with a computed weight": (sequence(computed(Doubled(4))), "1"),
    "unknown module": (Apply(lambda s, x: s.odd(x), odd=Unknown()).eval(), "odd"),
    "branching": (Apply(branching, a=nn.Linear(4, 4)).eval(), "Apply"),
    "several outputs": (Apply(lambda s, x: (x, x)).eval(), "forward"),
    "reflect without size": (nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")).eval(), "0"),
    "a size as a number": (Apply(lambda s, x: x + x.size(1)).eval(), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_named(name):
    model, culprit = REFUSED[name]
    bound = lipschitz_upper_bound(model, 2)
    assert bound.upper is None
    assert bound.factors == ()
    assert bound.unavailable.startswith(culprit)
    assert "\n" not in bound.unavailable
    assert len(bound.unavailable) > len(culprit) + 10


def test_vision_transformers_have_no_bound():
    torchvision = pytest.importorskip("torchvision")
    sizes = {"image_size": 32, "patch_size": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 16}
    model = torchvision.models.VisionTransformer(**sizes).eval()
    for shape in (None, (3, 32, 32)):
        bound = lipschitz_upper_bound(model, 2, input_shape=shape)
        assert bound.upper is None
        assert bound.unavailable


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(2 * x)


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 5 * weight, bias)


class Steep(nn.ReLU):
    def forward(self, x):
        return 7 * super().forward(x)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Doubled(4, 4), (4,)),
        (DoubledConv(1, 2, 3), (1, 5, 5)),
        (Standardised(1, 2, 3), (1, 5, 5)),
        (Steep(), (4,)),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (4,)),
        (nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 2, 3)), (1, 5, 5)),
    ],
)
@both
def test_what_a_subclass_computes_is_bounded_or_refused(layer, shape, p):
    model = nn.Sequential(layer.double().eval())
    bound = lipschitz_upper_bound(model, p, input_shape=shape)
    assert bound.upper is None or largest_local_norm(model, shape, p) <= bound.upper * SLACK


def test_a_hook_that_changes_an_output_is_seen_or_refused():
    layer = nn.Linear(3, 3).double()
    layer.register_forward_hook(lambda module, inputs, output: 10 * output)
    bound = lipschitz_upper_bound(nn.Sequential(layer), 2)
    assert bound.upper is None or largest_local_norm(layer, (3,), 2) <= bound.upper * SLACK


# --- the model and the arguments ----------------------------------------------------------------------------


def snapshot(model):
    modules = {name: (module.training, type(module)) for name, module in model.named_modules()}
    gradients = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    return copy.deepcopy(model.state_dict()), modules, gradients


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [None, (3, 8, 8)])
def test_the_model_is_only_read(training, shape):
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 2))
    model = nn.Sequential(*layers, normed).train(training)
    model[3].eval()
    model[0].weight.requires_grad_(False)
    state, modules, gradients = snapshot(model)
    random_state = torch.get_rng_state()
    first = lipschitz_upper_bound(model, 2, input_shape=shape)
    after, modules_after, gradients_after = snapshot(model)
    assert all(torch.equal(state[key], after[key]) for key in state)
    assert (modules, gradients) == (modules_after, gradients_after)
    assert torch.equal(random_state, torch.get_rng_state())
    assert lipschitz_upper_bound(model, 2, input_shape=shape) == first


def test_reading_a_weight_in_training_leaves_its_power_iteration_alone():
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5))).train()
    state = copy.deepcopy(model.state_dict())
    lipschitz_upper_bound(model, 2)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("p", [1, 3, 0, math.nan, -math.inf])
def test_p_is_checked(p):
    with pytest.raises(InputError, match="p: expected 2 or inf; got"):
        lipschitz_upper_bound(nn.Linear(2, 2), p)


@pytest.mark.parametrize("shape", [(5,), (3, 2)])
def test_the_shape_is_checked(shape):
    message = r"input_shape: the model cannot run on shape \(" + ", ".join(map(str, shape))
    with pytest.raises(InputError, match=message):
        lipschitz_upper_bound(nn.Linear(4, 2), 2, input_shape=shape)


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(2, 2), nn.Conv2d(1, 1, 2), nn.BatchNorm1d(2), nn.PReLU()],
    ids=["Linear", "Conv2d", "BatchNorm1d", "PReLU"],
)
def test_weights_that_are_not_finite_are_refused(layer):
    broken = copy.deepcopy(layer).eval()
    broken.weight.data.flatten()[0] = math.nan
    with pytest.raises(InputError, match="finite"):
        lipschitz_upper_bound(nn.Sequential(broken), 2)
