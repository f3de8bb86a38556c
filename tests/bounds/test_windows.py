"""Coefficients carried back on windows are those on whole images."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brittle.bounds.relaxation import windows
from brittle.bounds.relaxation.certify import clean_values, read_relaxation
from brittle.bounds.relaxation.crown import unit_ends
from brittle.bounds.relaxation.grouped import targets
from brittle.bounds.relaxation.interval import Ball, intervals
from brittle.bounds.relaxation.windows import windows_to
from helpers.networks import seeded, uniform


class Residual(nn.Module):
    """A path of two convolutions minus one of a single tap, whose windows differ."""

    def __init__(self, before: int, after: int, stride: int, kernel: int = 3) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after)
        self.c2, self.c3 = nn.Conv2d(after, after, kernel, padding=kernel // 2), nn.Conv2d(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.c3(x) - self.c2(F.relu(self.n1(self.c1(x)))))


class SideBySide(nn.Module):
    """Channels of two convolutions with different kernels."""

    def __init__(self, before: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(before, 3, 3, padding=1), nn.Conv2d(before, 2, 5, padding=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(torch.cat([self.a(x), self.b(x)], 1), 0.1)


def _network(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(4))


NETWORKS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "strides": (
        lambda: _network(
            nn.Conv2d(2, 4, 4, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 4, 2, 1), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU()
        ),
        (2, 24, 21),
    ),
    "dilation and groups": (
        lambda: _network(
            nn.Conv2d(2, 4, 3, 1, 2, dilation=2), nn.ReLU(), nn.Conv2d(4, 6, (2, 3), (1, 2), (1, 0), groups=2),
            nn.LeakyReLU(0.1), nn.Conv2d(6, 6, 3, padding=1, groups=3), nn.ReLU(),
        ),
        (2, 15, 17),
    ),
    "residual": (
        lambda: _network(nn.Conv2d(1, 3, 3, 2, 1), nn.ReLU(), Residual(3, 3, 1, 5), Residual(3, 4, 2)), (1, 22, 24),
    ),
    "side by side": (
        lambda: _network(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), SideBySide(3), SideBySide(5)),
        (1, 14, 12),
    ),
    "max pooling": (
        lambda: _network(
            nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 4, 2), nn.ReLU(),
        ),
        (1, 24, 23),
    ),
    "average pooling": (
        lambda: _network(
            nn.Conv2d(4, 3, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(),
            nn.AvgPool2d(3, 2, 1), nn.Conv2d(4, 4, 2), nn.ReLU(),
        ),
        (4, 24, 23),
    ),
    "one axis": (
        lambda: _network(nn.Conv1d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv1d(3, 4, 3, 2, padding=2), nn.ReLU()), (2, 40)
    ),
    "three axes": (
        lambda: _network(nn.Conv3d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv3d(3, 2, 3, 2), nn.ReLU()), (1, 8, 8, 9)
    ),
}  # fmt: skip


def trained_like(name: str) -> tuple[nn.Sequential, Tensor]:
    """A random network with statistics of its own in every batch norm, and inputs."""
    make, shape = NETWORKS[name]

    def built() -> nn.Sequential:
        model = make().double()
        model(torch.rand(2, *shape).double())
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean = torch.randn(m.num_features).double() / 10
                m.running_var = torch.rand(m.num_features).double() + 0.5
        return model

    return seeded(built, 0).eval(), uniform(1, 3, *shape).double()


@pytest.mark.parametrize("p", [2, math.inf])
@pytest.mark.parametrize("name", NETWORKS)
def test_windows_give_the_bounds_of_whole_images(name, p, monkeypatch):
    """At every border, too: entries are drawn from all places, several of one place among them."""
    model, x = trained_like(name)
    network = read_relaxation(model, x.shape[1:])
    network, values = network.network, clean_values(network, x)
    reach = intervals(network, values, Ball.around(x, 0.02 if p == math.inf else 0.2, p, (0.0, 1.0)))
    by_windows = 0
    for target in targets(network):
        start = network.ops[target].inputs[0]
        by_windows += any(windows_to(network, start).values())
        generator = torch.Generator().manual_seed(target)
        units = torch.stack([torch.randperm(network.size(start), generator=generator)[:60] for _ in x])
        with torch.no_grad(), monkeypatch.context() as patch:
            cut = unit_ends(network, reach, start, units)
            patch.setattr(windows, "MOST_READ", 0.0)
            assert not any(windows_to(network, start).values())
            whole = unit_ends(network, reach, start, units)
        for end, other in zip(cut, whole, strict=True):
            assert torch.allclose(end, other, rtol=0, atol=1e-10)
        assert float((whole[1] - whole[0]).mean()) > 1e-4
    assert by_windows


@pytest.mark.parametrize("name", NETWORKS)
def test_no_entry_depends_on_anything_out_of_its_window(name):
    """Gradients of single entries vanish elsewhere."""
    model, x = trained_like(name)
    relaxation = read_relaxation(model, x.shape[1:])
    network, x = relaxation.network, x[:1].requires_grad_()
    values = clean_values(relaxation, x)
    for target in targets(network):
        start = network.ops[target].inputs[0]
        window = windows_to(network, start).get(0)
        if window is None:
            continue
        _, *image = network.shape(start)
        for place in (tuple(0 for _ in image), tuple(n // 2 for n in image), tuple(n - 1 for n in image)):
            (g,) = torch.autograd.grad(values[start][(0, slice(None), *place)].square().sum(), x, retain_graph=True)
            inside = torch.zeros_like(g)
            corner = [i * a + b for i, a, b in zip(place, window.scale, window.start, strict=True)]
            cut = (slice(max(0, c), max(0, c + n)) for c, n in zip(corner, window.size, strict=True))
            inside[(..., *cut)] = 1
            assert float(g.abs().sum()) > 0
            assert torch.equal(g * inside, g)


@pytest.mark.parametrize("name", NETWORKS)
def test_no_sample_has_no_coefficients(name):
    """Efforts end with as few samples as are left in doubt, which may be none."""
    model, x = trained_like(name)
    network = read_relaxation(model, x.shape[1:]).network
    for number, linear in network.maps.items():
        before = linear.transpose(x.new_zeros(0, *network.shape(number)))
        assert before.shape == (0, *network.shape(network.ops[number].inputs[0]))
