"""Certificates of single samples: never above what a search finds, exact where the theory says so."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import brittle
from brittle.bounds.relaxation.certify import margin_bounds, read_relaxation
from brittle.bounds.relaxation.margins import CROWN, Effort
from brittle.errors import InputError
from brittle.models.build import resnet18_cifar
from brittle.models.normalize import Normalize
from brittle.models.trace import NoRule
from helpers.matrices import quick
from helpers.networks import few, generator, mlp, seeded, uniform, untidy, untouched
from helpers.patterned import Apply

both = pytest.mark.parametrize("p", [2, math.inf])
sparing = settings(quick, max_examples=15)


class Residual(nn.Module):
    """Two branches added, one subtracted, a constant added, two parts side by side, and a rectifier in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm, self.short = nn.BatchNorm2d(4), nn.Conv2d(2, 4, 1)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(8 * 4, 3)
        self.shift = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.conv1(x))
        h = self.relu(self.norm(self.conv2(h)) + self.short(x))
        h = torch.cat([h - 0.5 * F.relu(self.conv2(h)), h + self.shift], 1)
        return self.head(F.avg_pool2d(h, 3, 2).flatten(1))


def _images(*layers: nn.Module) -> nn.Sequential:
    """Layers for two channels of 6 x 6, and a head."""
    body = nn.Sequential(*layers, nn.Flatten())
    with torch.no_grad():
        width = body.eval()(torch.zeros(1, 2, 6, 6)).shape[1]
    return nn.Sequential(*body, nn.Linear(width, 3))


def _dense(*widths: int, activation=nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1])


def _batch_norm(net: nn.Module) -> nn.Module:
    """Statistics and factors of both signs, as training leaves them."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low in ((module.running_mean, -1), (module.running_var, 0.3), (module.weight, -1.5)):
                tensor.data.uniform_(low, 1.5)
            module.bias.data.normal_()
    return net


class OptionA(nn.Module):
    """A block whose shortcut takes every second pixel and adds channels of zeros, and one with a constant beside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 8, 3, 2, 1)
        self.b, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(7 * 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        h = F.relu(self.b(F.relu(self.a(h))) + F.pad(h[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        first, second = h[:, 1:6].chunk(2, 1)
        h = torch.cat([first, torch.ones_like(h[:, :2]), second], 1)
        return self.head(h.mean(2).view(x.size(0), -1))


KINDS = {
    "linear": lambda: _dense(72, 3),
    "one hidden layer": lambda: _dense(72, 12, 3),
    "three hidden layers": lambda: _dense(72, 14, 12, 10, 3),
    "leaky": lambda: _dense(72, 12, 10, 3, activation=lambda: nn.LeakyReLU(0.2)),
    "factors": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(72, 4), nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3), nn.Linear(3, 9), nn.ReLU(),
        nn.Linear(9, 3),
    ),
    "batch norm": lambda: nn.Sequential(
        Normalize([0.4, 0.6], [0.3, 0.2]), nn.Flatten(), nn.Linear(72, 12), nn.BatchNorm1d(12), nn.ReLU(),
        nn.Linear(12, 9), nn.ReLU(), nn.BatchNorm1d(9), nn.Linear(9, 3),
    ),
    "convolutions": lambda: _images(
        Normalize([0.4, 0.6], [0.3, 0.2]), nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Dropout(0.5), nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU(),
    ),
    "groups": lambda: _images(
        nn.Conv2d(2, 4, 3, padding="same", groups=2), nn.ReLU(), nn.Conv2d(4, 4, 2, stride=2, dilation=2, groups=4),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1),
    ),
    "uneven padding": lambda: _images(nn.ZeroPad2d((1, 0, 2, 0)), nn.Conv2d(2, 3, (3, 2), padding=(0, 1)), nn.ReLU()),
    "max pooling": lambda: _images(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2)),
    "max pooling that overlaps": lambda: _images(
        nn.MaxPool2d(3, 2, padding=1), nn.Conv2d(2, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Conv2d(4, 3, 1), nn.ReLU()
    ),
    "average pooling": lambda: _images(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AvgPool2d(2, 1), nn.Conv2d(4, 3, 2), nn.ReLU()
    ),
    "residual": Residual,
    "slices and zeros": OptionA,
    "transposed": lambda: _images(
        nn.ConvTranspose2d(2, 4, 3, 2, 1, output_padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 2, groups=2), nn.ReLU(), nn.Conv2d(2, 3, 5, 3),
    ),
    "resized": lambda: _images(
        nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(2, 3, 3), nn.ReLU(), nn.ReflectionPad2d(1),
        nn.Conv2d(3, 2, 3, 2), nn.ReLU(), nn.Upsample((3, 4)),
    ),
}  # fmt: skip


def net(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random network of a kind on inputs ``(2, 6, 6)``."""
    return seeded(lambda: _batch_norm(KINDS[kind]()), seed).to(dtype).eval()


def inputs(seed: int, n: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Some values lie on the bounds."""
    return uniform(seed, n, 2, 6, 6, low=-0.2, high=1.2, dtype=dtype).clamp(0, 1)


def labels_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


def least_likely(model: nn.Module, x: Tensor) -> Tensor:
    """With these labels no margin is certain, so that none is left at the bound by intervals."""
    with torch.no_grad():
        return model(x).argmin(1)


def margins(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """``min_{j != y} s_y - s_j``."""
    with torch.no_grad():
        logits = model(x)
    own = logits.gather(1, y[:, None])[:, 0]
    return own - logits.scatter(1, y[:, None], -math.inf).amax(1)


def step(seed: int, x: Tensor, eps: float, p: float) -> Tensor:
    """A random step of full length: a corner of the cube, or a point of the sphere."""
    d = torch.randn(x.shape, generator=generator(seed), dtype=torch.float64)
    d = d.sign() if p == math.inf else d / d.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return (x.double() + eps * d).clamp(0, 1).to(x)


def attacked(model: nn.Module, x: Tensor, y: Tensor, eps: float, p: float) -> list[Tensor]:
    """Points of the balls: corners, points inside, and what a search against the margin finds."""
    found = [step(seed, x, eps * share, p) for seed in range(6) for share in (1.0, 0.4)]
    found += [brittle.pgd(model, x, y, eps=eps, p=p, steps=6, loss=loss) for loss in ("ce", "dlr")]
    return [x, *found]


# --- soundness ----------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("kind", KINDS)
@settings(quick, max_examples=2)
@given(seed=st.integers(0, 10**6), eps=st.sampled_from([0.0, 0.003, 0.03, 0.2]), rounds=st.integers(0, 2))
def test_no_point_of_the_ball_lies_below_the_bound(kind, p, seed, eps, rounds):
    model, x = net(kind, seed), inputs(seed)
    y = labels_of(model, x)
    y[0] = (y[0] + 1) % 3  # a wrong sample has a negative margin, and its bound holds too
    eps = eps * (4 if p == 2 else 1)
    for examples in (None, inputs(seed + 1, 30)):
        relaxation = read_relaxation(model, (2, 6, 6), examples=examples, groups=4)
        bound = margin_bounds(relaxation, x, y, eps=eps, p=p, effort=Effort(rounds, 5))
        assert bound.shape == (5,)
        assert bound.isfinite().all()
        least = torch.stack([margins(model, point, y) for point in attacked(model, x, y, eps, p)]).amin(0)
        assert (bound <= least).all()


NARROW = {
    "one unit": lambda: _dense(2, 1, 2),
    "two layers": lambda: _dense(2, 2, 2, 2),
    "three layers": lambda: _dense(2, 3, 2, 2, 2),
    "leaky": lambda: _dense(2, 2, 2, 2, activation=lambda: nn.LeakyReLU(0.3)),
    "max pooling": lambda: nn.Sequential(
        _dense(2, 4), nn.Unflatten(1, (1, 4)), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(2, 2)
    ),
    "max pooling that overlaps": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2)), nn.MaxPool1d(2, 1, padding=1), nn.Flatten(), nn.Linear(3, 2), nn.ReLU(),
        nn.Linear(2, 2),
    ),
    "difference": lambda: nn.Sequential(Difference(), nn.Linear(2, 2)),
}  # fmt: skip


class Difference(nn.Module):
    """A rectified branch taken from a linear one, and a rectifier after it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.one(x) - F.relu(self.two(x)))


@both
@pytest.mark.parametrize("kind", NARROW)
@settings(quick, max_examples=6)
@given(seed=st.integers(0, 10**6), eps=st.sampled_from([0.1, 0.4, 0.8]))
def test_no_point_of_a_fine_grid_lies_below_the_bound(kind, p, seed, eps):
    """In the plane a grid finds nearly the least margin, and narrow networks leave the bound little room."""
    model = seeded(NARROW[kind], seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.mul_(3)
    x = uniform(seed, 12, 2)
    ticks = torch.linspace(-1, 1, 25)
    d = eps * torch.cartesian_prod(ticks, ticks)
    if p == 2:
        d = d * (1 / (d.norm(dim=1, keepdim=True) / eps).clamp_min(1))
    points = x + d[:, None]
    points = points.clamp(0, 1) if p == math.inf else points
    for label in (0, 1):
        y = torch.full((12,), label)
        least = margins(model, points.flatten(0, 1), y.repeat(len(d))).view(-1, 12).amin(0)
        for examples in (None, x.flip(1)):
            relaxation = read_relaxation(model, (2,), examples=examples, groups=2)
            for rounds in (0, 2):
                bound = margin_bounds(relaxation, x, y, eps=eps, p=p, effort=Effort(rounds, 2))
                assert (bound <= least).all()


@both
def test_trained_networks_hold_against_apgd(p):
    (x, y), model = few(40), mlp()
    relaxation = read_relaxation(model, x.shape[1:], examples=x)
    shares = []
    for eps in (0.01, 0.03, 0.06):
        eps = eps * (4 if p == 2 else 1)
        bound = margin_bounds(relaxation, x, y, eps=eps, p=p)
        x_adv = brittle.apgd(model, x, y, eps=eps, p=p, steps=10)
        assert (bound <= margins(model, x_adv, y)).all()
        shares.append(float((bound > 0).float().mean()))
    assert shares[0] > 0.5  # it certifies at all


def test_a_box_of_its_own():
    model, x, y = net("three hidden layers", 3), inputs(3) * 2 - 1, torch.tensor([0, 1, 2, 0, 1])
    relaxation = read_relaxation(model, (2, 6, 6))
    bound = margin_bounds(relaxation, x, y, eps=0.4, p=math.inf, bounds=(-1.0, 1.0))
    for seed in range(50):
        d = 0.4 * torch.randn(x.shape, generator=generator(seed)).sign()
        assert (bound <= margins(model, (x + d).clamp(-1, 1), y)).all()
    wider = margin_bounds(relaxation, x, y, eps=0.4, p=math.inf, bounds=(-9.0, 9.0))
    assert (wider < bound).all()


def test_everything_that_evaluation_accepts_is_covered():
    """A linear network at the worst point, moved as far beyond budget and bounds as single precision may."""
    model, x = net("linear", dtype=torch.float64), inputs(1, dtype=torch.float64)
    y = labels_of(model, x)
    W = model[1].weight.detach()
    bound = margin_bounds(read_relaxation(model, (2, 6, 6)), x, y, eps=0.1, p=math.inf)
    slack = 2.0**-23
    for j in range(3):
        direction = (W[j] - W[y]).sign().view_as(x)
        point = (x + direction * (0.1 * (1 + 1e-6) + slack)).clamp(-slack, 1 + slack)
        assert (bound <= margins(model, point, y) + 1e9 * (y == j)).all()


# --- exactness ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [5.0, 20.0, 100.0])
def test_an_activation_of_the_input_does_not_shift_the_ball(eps):
    """Sixteen units at 1, and their sum over 4: within l_2 4 all go to 0, where the bias of 0.5 alone is left."""
    net = nn.Sequential(nn.ReLU(), nn.Linear(16, 1), nn.ReLU(), nn.Linear(1, 2)).double().eval()
    with torch.no_grad():
        net[1].weight.fill_(0.25)
        net[1].bias.zero_()
        net[3].weight.copy_(torch.tensor([[1.0], [0.0]]))
        net[3].bias.copy_(torch.tensor([0.5, 0.0]))
    x, y = torch.ones(1, 16, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    for effort in (Effort(0, 1), CROWN):
        bound = float(margin_bounds(read_relaxation(net, (16,)), x, y, eps=eps, p=2, effort=effort))
        assert bound <= 0.5
        assert bound >= 4.5 - 1.0001 * eps  # as for the sum without activations, whose row has length 1


@both
@pytest.mark.parametrize("eps", [0.0, 0.05, 0.7])
def test_linear_networks_are_exact(p, eps):
    model = nn.Sequential(Normalize([0.4, 0.6], [0.3, 0.2]), nn.Flatten(), nn.Linear(72, 4), nn.Linear(4, 5))
    model = seeded(lambda: copy.deepcopy(model)).double().eval()
    x = inputs(0, 20, torch.float64)
    with torch.no_grad():
        origin = model(torch.zeros(1, 2, 6, 6).double())
        A = (model(torch.eye(72).double().view(72, 2, 6, 6)) - origin).mT  # (5, 72)
    relaxation, logits = read_relaxation(model, (2, 6, 6)), model(x).detach()
    for y in (least_likely(model, x), labels_of(model, x)):
        rows = A[y][:, None] - A
        if p == 2:
            fall = eps * rows.norm(dim=2)
        else:
            low, high = (-x.flatten(1)).clamp_min(-eps), (1 - x.flatten(1)).clamp_max(eps)
            fall = -torch.minimum(rows * low[:, None], rows * high[:, None]).sum(2)
        exact = (logits.gather(1, y[:, None]) - logits - fall).scatter(1, y[:, None], math.inf).amin(1)
        bound = margin_bounds(relaxation, x, y, eps=eps, p=p)
        assert (bound <= exact).all()
        near = (bound - exact).abs() <= 1e-4 * (1 + eps)
        assert (near | ((bound > 0) & (exact > 0))).all()
        assert eps == 0 or bool(near[bound < 0].any())


@both
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "overlaps" not in kind])
def test_exact_while_every_unit_stays_on_its_side(kind, p):
    """Within a cell the network is linear: the margin falls by eps times the dual norm of its gradient."""
    model, x = net(kind, 5, torch.float64), inputs(5, 8, torch.float64) * 0.98 + 0.01
    y, eps = least_likely(model, x), 2e-5
    x.requires_grad_(True)
    logits = model(x)
    gaps = logits.gather(1, y[:, None]) - logits
    exact = []
    for j in range(3):
        (g,) = torch.autograd.grad(gaps[:, j].sum(), x, retain_graph=True)
        g = g.flatten(1)
        exact.append(gaps[:, j] - eps * (g.norm(dim=1) if p == 2 else g.abs().sum(1)))
    expected = torch.stack(exact, 1).scatter(1, y[:, None], math.inf).amin(1).detach()
    bound = margin_bounds(read_relaxation(model, (2, 6, 6)), x.detach(), y, eps=eps, p=p)
    moved = (margins(model, x, y) - expected).abs()
    assert ((bound - expected).abs() <= 0.1 * moved).double().mean() >= 0.7  # the others are near a kink
    assert (bound <= expected + 1e-6).all()


def planar(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """One hidden layer on the plane."""
    model = seeded(lambda: nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 3)), seed).double().eval()
    x = uniform(seed, 1, 2, dtype=torch.float64)
    return model, x, labels_of(model, x)


@sparing
@given(seed=st.integers(0, 10**6), eps=st.sampled_from([0.05, 0.2, 0.6]))
def test_between_intervals_and_the_exact_minimum(seed, eps):
    """A piecewise linear function on a rectangle is least where two kinks, or a kink and an edge, or two edges meet."""
    model, x, y = planar(seed)
    low, high = (x[0] - eps).clamp_min(0), (x[0] + eps).clamp_max(1)
    W, b = model[0].weight.detach(), model[0].bias.detach()
    lines = torch.cat([W, torch.eye(2).double(), torch.eye(2).double()])
    levels = torch.cat([-b, low, high])
    i, j = torch.triu_indices(len(lines), len(lines), 1)
    pairs = torch.stack([lines[i], lines[j]], 1)
    regular = torch.linalg.det(pairs).abs() > 1e-9
    corners = torch.linalg.solve(pairs[regular], torch.stack([levels[i], levels[j]], 1)[regular])
    corners = corners[((corners >= low - 1e-12) & (corners <= high + 1e-12)).all(1)].clamp(0, 1)
    exact = float(margins(model, corners, y.expand(len(corners))).min())
    mid, rad = (low + high) / 2, (high - low) / 2
    z, r = W @ mid + b, W.abs() @ rad
    bottom, top = (z - r).relu(), (z + r).relu()
    C = model[2].weight.detach()
    rows, shift = C[y[0]] - C, model[2].bias.detach()[y[0]] - model[2].bias.detach()
    plain = rows.clamp_min(0) @ bottom + rows.clamp_max(0) @ top + shift
    plain[y[0]] = math.inf
    bound = float(margin_bounds(read_relaxation(model, (2,)), x, y, eps=eps, p=math.inf, effort=Effort(0)))
    assert bound <= exact
    assert bound >= float(plain.min()) - 1e-5


def test_relaxation_beats_intervals_and_rounds_help():
    (x, y), model = few(100), mlp()
    plain = read_relaxation(model, x.shape[1:])
    grouped = read_relaxation(model, x.shape[1:], examples=x, groups=16)
    certified = [
        float((margin_bounds(relaxation, x, y, eps=0.04, p=math.inf, effort=Effort(rounds, 4)) > 0).float().mean())
        for relaxation, rounds in ((plain, 0), (grouped, 0), (grouped, 1), (grouped, 6))
    ]
    assert certified == sorted(certified)
    assert certified[0] < certified[-1]


# --- what a bound depends on --------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("kind", ["three hidden layers", "convolutions", "max pooling", "residual"])
def test_a_sample_does_not_depend_on_the_others(kind, p):
    model, x = net(kind, 2, torch.float64), inputs(2, 9, torch.float64)
    y = labels_of(model, x)
    relaxation = read_relaxation(model, (2, 6, 6), examples=inputs(3, 20, torch.float64), groups=3)
    options = {"eps": 0.02 if p == math.inf else 0.15, "p": p, "effort": Effort(rows=3)}
    together = margin_bounds(relaxation, x, y, **options)
    alone = torch.cat([margin_bounds(relaxation, x[i : i + 1], y[i : i + 1], **options) for i in range(9)])
    order = torch.randperm(9, generator=generator(0))
    torch.testing.assert_close(alone, together, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(
        margin_bounds(relaxation, x[order], y[order], **options), together[order], rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("kind", ["three hidden layers", "residual"])
def test_biases_move_the_bound(kind):
    model, x = net(kind, 1, torch.float64), inputs(1, dtype=torch.float64)
    y = torch.zeros(5, dtype=torch.long)
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    head.bias.data[0] -= 30.0  # no margin is certain
    before = margin_bounds(read_relaxation(model, (2, 6, 6)), x, y, eps=0.01, p=math.inf, effort=Effort(0))
    head.bias.data[0] -= 3.0
    after = margin_bounds(read_relaxation(model, (2, 6, 6)), x, y, eps=0.01, p=math.inf, effort=Effort(0))
    torch.testing.assert_close(after, before - 3, rtol=0, atol=1e-9)


@both
def test_the_bound_falls_with_the_budget_on_linear_networks_and_is_the_margin_at_zero(p):
    model, x = net("linear", 1, torch.float64), inputs(1, dtype=torch.float64)
    y, relaxation = labels_of(model, x), read_relaxation(model, (2, 6, 6))
    curve = torch.stack([margin_bounds(relaxation, x, y, eps=eps, p=p) for eps in (0, 0.01, 0.1, 0.3, 1.0)])
    assert (curve[1:] <= curve[:-1]).all()
    for kind in KINDS:
        model = net(kind, 4, torch.float64)
        y = labels_of(model, x)
        bound = margin_bounds(read_relaxation(model, (2, 6, 6)), x, y, eps=0.0, p=p)
        torch.testing.assert_close(bound, margins(model, x, y), rtol=0, atol=1e-3)


def test_batch_norm_as_the_layer_it_folds_into():
    model = net("batch norm", 3, torch.float64)
    folded = copy.deepcopy(model)
    folded[2] = nn.utils.fusion.fuse_linear_bn_eval(folded[2], folded[3])
    folded[3] = nn.Identity()
    x = inputs(3, dtype=torch.float64)
    y = labels_of(model, x)
    first, second = (margin_bounds(read_relaxation(m, (2, 6, 6)), x, y, eps=0.02, p=math.inf) for m in (model, folded))
    torch.testing.assert_close(first, second, rtol=1e-7, atol=1e-7)


# --- rounding -----------------------------------------------------------------------------------------------


@sparing
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(["three hidden layers", "convolutions", "residual"]))
def test_single_precision_is_near_double_precision(seed, kind):
    model, x = net(kind, seed), inputs(seed)
    y = labels_of(model, x)
    exact = copy.deepcopy(model).double()
    single, double = (
        margin_bounds(read_relaxation(m, (2, 6, 6)), x.to(dtype), y, eps=0.01, p=math.inf, effort=Effort(0))
        for m, dtype in ((model, torch.float32), (exact, torch.float64))
    )
    assert single.dtype == torch.float32
    assert double.dtype == torch.float64
    scale = 1 + double.abs()
    assert ((single - double).abs() <= 1e-2 * scale).all()
    assert (single <= margins(exact, x.double(), y)).all()


class Cancelling(nn.Module):
    """Constants of 10,000 that come and go: single precision loses what they cover, in every order another part."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        large = 1e4 * torch.rand(12) + 1
        self.first, self.second, self.last = nn.Linear(3, 12), nn.Linear(12, 12), nn.Linear(12, 2)
        self.norm = nn.BatchNorm1d(12) if kind == "batch norm" else nn.Identity()
        (self.norm if kind == "batch norm" else self.first).bias.data = large
        self.second.bias.data = -self.second.weight.data @ large
        self.early = nn.ReLU() if kind in ("active", "batch norm") else nn.Identity()
        self.late = nn.ReLU() if kind == "near the kinks" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.late(self.second(self.early(self.norm(self.first(x))))))


def reordered(model: Cancelling, seed: int) -> Cancelling:
    """The same function with the first hidden units in another order."""
    order, other = torch.randperm(12, generator=generator(seed)), copy.deepcopy(model)
    for tensor in (other.first.weight, other.first.bias, *other.norm.parameters(), *other.norm.buffers()):
        tensor.data = tensor.data[order] if tensor.ndim else tensor.data
    other.second.weight.data = other.second.weight.data[:, order]
    return other


@pytest.mark.parametrize("kind", ["linear", "active", "batch norm", "near the kinks"])
@settings(quick, max_examples=8)
@given(seed=st.integers(0, 10**6))
def test_cancellation_is_allowed_for(kind, seed):
    """In double precision and in other orders: no margin that is computed lies below the bound."""
    model = seeded(lambda: Cancelling(kind), seed).eval()
    x, exact, other = uniform(seed, 20, 3), copy.deepcopy(model).double(), reordered(model, seed)
    relaxation = read_relaxation(model, (3,), examples=x)
    for label in (0, 1):
        y = torch.full((20,), label)
        bound, double = margin_bounds(relaxation, x, y, eps=0.0, p=math.inf), margins(exact, x.double(), y)
        assert (bound <= double).all()
        assert (bound <= margins(other, x, y)).all()
        assert float((double - margins(model, x, y)).abs().max()) > 1e-6  # it does round


# --- the network is only read -------------------------------------------------------------------------------


def test_a_borrowed_model_comes_back_as_it_was():
    model = untidy()
    x, y = few(6)
    with untouched(model):
        relaxation = read_relaxation(model, x.shape[1:], examples=x)
        first = margin_bounds(relaxation, x, y, eps=0.01, p=math.inf)
    relaxation = read_relaxation(copy.deepcopy(model).eval(), x.shape[1:], examples=x)
    second = margin_bounds(relaxation, x, y, eps=0.01, p=math.inf)
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_modes_do_not_matter(context):
    model, x = net("average pooling"), inputs(0)
    y = labels_of(model, x)
    expected = margin_bounds(read_relaxation(model, (2, 6, 6)), x, y, eps=0.01, p=2)
    with context():
        bound = margin_bounds(read_relaxation(model, (2, 6, 6)), x, y, eps=0.01, p=2)
    assert not bound.requires_grad
    torch.testing.assert_close(bound, expected, rtol=0, atol=0)


def test_overflow_certifies_nothing():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    model[0].weight.data.fill_(1e30)
    model[2].weight.data[0], model[2].weight.data[1] = 1e30, -1e30
    bound = margin_bounds(read_relaxation(model, (4,)), torch.ones(3, 4), torch.zeros(3).long(), eps=0.1, p=2)
    assert (bound == -math.inf).all()


# --- what is refused ----------------------------------------------------------------------------------------


class Mixing(nn.Module):
    """Swaps the batch axis with one of size one, which a batch of one does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.transpose(0, 1).mean(1))


REFUSED = {
    "LayerNorm": (lambda: nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3)), (6,)),
    "GELU": (lambda: nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 3)), (6,)),
    "Tanh": (lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), (6,)),
    "Softmax": (lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Softmax(1)), (6,)),
    "a steep LeakyReLU": (lambda: nn.Sequential(nn.Linear(6, 4), nn.LeakyReLU(1.5), nn.Linear(4, 3)), (6,)),
    "attention": (lambda: nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8), nn.Linear(6, 3)), (6,)),
    "circular": (lambda: _images(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.ReLU()), (2, 6, 6)),
    "samples mixed": (Mixing, (1, 6)),
    "half precision": (lambda: _dense(72, 300, 3).bfloat16(), (2, 6, 6)),
    "no operation": (nn.Identity, (6,)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_relaxation_is_refused(what):
    make, shape = REFUSED[what]
    with pytest.raises(NoRule):
        read_relaxation(seeded(make).eval(), shape)


def test_linear_networks_have_no_slopes_to_learn():
    model, x = net("linear"), inputs(0)
    relaxation = read_relaxation(model, x[0].shape)
    y = labels_of(model, x)
    once, learnt = (
        margin_bounds(relaxation, x, y, eps=30.0, p=2, effort=Effort(slope_steps=steps)) for steps in (0, 3)
    )
    assert torch.equal(once, learnt)


def test_sums_that_broadcast_are_refused():
    """One pixel added to every pixel, from either side: backwards its coefficients would have to be added up."""
    parts = {"mean": nn.AdaptiveAvgPool2d(1), "head": nn.Sequential(nn.Flatten(), nn.Linear(9, 2))}
    for form in (lambda s, x: s.head(x + s.mean(x)), lambda s, x: s.head(s.mean(x) - x)):
        with pytest.raises(NoRule, match="a sum of results of different shapes"):
            read_relaxation(Apply(form, **parts).eval(), (1, 3, 3))


def test_refusals_name_the_module():
    with pytest.raises(NoRule, match=r"1: .*LayerNorm"):
        read_relaxation(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), (4,))
    with pytest.raises(NoRule, match=r"1: .*Tanh"):
        read_relaxation(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), (4,))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"eps": -0.1}, "eps"),
        ({"eps": math.nan}, "eps"),
        ({"p": 1}, "p"),
        ({"bounds": (1.0, 0.0)}, "bounds"),
        ({"eps": torch.tensor([0.1])}, "eps"),
        ({"eps": torch.tensor([0.1, -0.1])}, "eps"),
        ({"x": torch.rand(2, 71)}, "x"),
        ({"x": torch.full((2, 2, 6, 6), 2.0)}, "x"),
        ({"y": torch.tensor([0, 3])}, "y"),
        ({"y": torch.tensor([0])}, "y"),
    ],
)
def test_bad_arguments_are_named(change, name):
    call = {"x": inputs(0, 2), "y": torch.tensor([0, 1]), "eps": 0.1, "p": math.inf} | change
    x, y = call.pop("x"), call.pop("y")
    with pytest.raises(InputError, match=rf"\b{name}\b"):
        margin_bounds(read_relaxation(net("linear"), (2, 6, 6)), x, y, **call)


@pytest.mark.parametrize(
    ("arguments", "options", "name"),
    [
        ((lambda x: x, (4,)), {}, "model"),
        ((nn.Sequential(nn.Linear(4, 2)), (5,)), {}, "input_shape"),
        ((nn.Sequential(nn.Linear(4, 1)), (4,)), {}, "model"),
        ((nn.Conv2d(1, 2, 1), (1, 3, 3)), {}, "model"),
        ((nn.Sequential(nn.Linear(4, 2)), (4,)), {"groups": 0}, "groups"),
        ((nn.Sequential(nn.Linear(4, 2)), (4,)), {"examples": torch.rand(3, 5)}, "examples"),
    ],
)
def test_bad_networks_are_named(arguments, options, name):
    with pytest.raises(InputError, match=rf"\b{name}\b"):
        read_relaxation(*arguments, **options)


def test_weights_that_are_not_finite_are_named():
    model = nn.Sequential(nn.Linear(4, 2))
    model[0].weight.data[0, 0] = math.nan
    with pytest.raises(InputError, match=r"0\.weight"):
        read_relaxation(model, (4,))


def test_deep_residual_networks_are_read():
    model = seeded(lambda: resnet18_cifar(3, 2)).eval()
    x = uniform(0, 2, 3, 8, 8)
    y = labels_of(model, x)
    bound = margin_bounds(read_relaxation(model, (3, 8, 8)), x, y, eps=1e-4, p=math.inf, effort=Effort(0))
    assert (bound <= margins(model, x, y)).all()


@both
@pytest.mark.parametrize("between", [nn.Identity, nn.Dropout, nn.Flatten])
@pytest.mark.parametrize("activation", [nn.ReLU, lambda inplace: nn.LeakyReLU(0.3, inplace=inplace)])
def test_activations_in_place_leave_the_clean_values_behind_a_view(between, activation, p):
    """What only passes its input on lies in the same memory, which the activation then overwrites."""
    net = seeded(lambda: nn.Sequential(nn.Linear(6, 40), between(), activation(inplace=True), nn.Linear(40, 3)))
    apart = nn.Sequential(net[0], activation(inplace=False), net[3])
    net, apart, x = net.double().eval(), apart.double().eval(), uniform(0, 5, 6, dtype=torch.float64)
    y = apart(x).argmax(1)
    margins = [margin_bounds(read_relaxation(n, (6,)), x, y, eps=0.1, p=p) for n in (net, apart)]
    torch.testing.assert_close(*margins, rtol=1e-12, atol=0)
