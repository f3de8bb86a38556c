"""Absolute weights and paths in l_inf, and the factors of single modules: against explicit matrices and differences."""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor, nn

from brittle.bounds import lipschitz_upper_bound
from brittle.bounds.graph.read import read_graph
from brittle.bounds.graph.rules import Dense, Slope
from brittle.bounds.lipschitz.network import network_bounds
from brittle.bounds.lipschitz.paths import radii, steepest_jacobian
from brittle.models.normalize import Normalize
from brittle.models.trace import NoRule
from helpers.patterned import FAMILIES, Patterned, jacobian_at, network, norm_of, search

INF = math.inf
SLACK = 1 + 1e-9


def dense(seed: int, *widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), activation()]
    model = nn.Sequential(*layers[:-1]).double().eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def matrices(model: nn.Module) -> list[Tensor]:
    return [layer.weight.detach() for layer in model.modules() if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize("seed", range(6))
def test_radii_of_a_chain_are_products_of_absolute_matrices(seed: int) -> None:
    model = dense(seed, 4, 6, 3, 2)
    ops = read_graph(model, (4,))
    expected = torch.ones(4, dtype=torch.float64)
    for op, found in zip(ops, radii(ops), strict=True):
        if isinstance(op.rule, Dense):
            expected = op.rule.W.double().abs() @ expected
        assert torch.allclose(found[0], expected, rtol=1e-8)
        assert (found[0] >= expected).all()


def test_radii_of_steep_and_flat_activations() -> None:
    W = torch.tensor([[2.0, -3.0]], dtype=torch.float64)
    for activation, slope in (
        (nn.LeakyReLU(-3.0), 3.0),
        (nn.Sigmoid(), 0.25),
        (nn.Hardswish(), 1.5),
        (nn.ELU(2.0), 2.0),
    ):
        model = nn.Sequential(nn.Linear(2, 1), activation).double()
        model[0].weight.data = W
        assert float(radii(read_graph(model, (2,)))[-1]) == pytest.approx(5 * slope)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_entry_moves_further_than_its_radius(family: str) -> None:
    """Differences over random pairs of inputs and along the corners of cubes; rows of patterned Jacobians."""
    for seed in range(25):
        model, shape = network(family, seed)
        ops = read_graph(model, shape)
        try:
            reach = radii(ops)[-1].flatten()
        except NoRule:
            continue
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(64, *shape, generator=generator, dtype=torch.float64) * 3
        length = torch.logspace(-3, 1, 64, dtype=torch.float64).view(-1, *[1] * len(shape))
        step = length * torch.randn(x.shape, generator=generator, dtype=torch.float64).sign()
        with torch.no_grad():
            moved = ((model(x + step) - model(x)).flatten(1).abs() / length.flatten()[:, None]).amax(0)
        assert (moved <= reach * (1 + 1e-8) + 1e-10).all(), (family, seed)
        net = Patterned(model, shape, seed)
        for J in search(net, INF, 4):
            assert (J.abs().sum(1) <= reach * SLACK).all(), (family, seed)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("widths", [(3, 5, 2), (3, 4, 4, 2), (2, 3, 3, 3, 1)])
def test_the_path_bound_is_above_every_pattern(seed: int, widths: tuple[int, ...]) -> None:
    """All ``2^h`` patterns; for one hidden layer and a single path a row the bound is attained."""
    model = dense(seed, *widths)
    W = matrices(model)
    exact = torch.zeros(widths[-1], dtype=torch.float64)
    gaps = torch.zeros(widths[-1], widths[-1], dtype=torch.float64)
    hidden = widths[1:-1]
    for bits in product((0.0, 1.0), repeat=sum(hidden)):
        J, start = W[0], 0
        for layer, h in zip(W[1:], hidden, strict=True):
            J = (layer * torch.tensor(bits[start : start + h], dtype=torch.float64)) @ J
            start += h
        exact = torch.maximum(exact, J.abs().sum(1))
        gaps = torch.maximum(gaps, (J[:, None] - J).abs().sum(2))
    bound = lipschitz_upper_bound(model, INF, input_shape=(widths[0],))
    for name, value in bound.arguments:
        assert float(exact.max()) <= value * SLACK, name
    arguments = dict(bound.arguments)
    assert arguments["path"] <= arguments["chain"] * (1 + 1e-8) <= arguments["product of norms"] * (1 + 1e-7)
    assert bound.margins is not None
    assert (gaps <= bound.margins * SLACK).all()
    assert bound.upper is not None
    assert bound.upper <= 6 * float(exact.max())


def test_the_path_bound_of_single_paths_is_exact() -> None:
    """Diagonal layers: every entry is one path, switched on or off."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 3, bias=False)).double()
    model[0].weight.data = torch.diag(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    model[2].weight.data = torch.diag(torch.tensor([-4.0, 5.0, 1.0], dtype=torch.float64))
    assert dict(lipschitz_upper_bound(model, INF).arguments)["path"] == pytest.approx(10)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_without_activations_are_the_steepest_pattern(family: str) -> None:
    for seed in range(12):
        model, shape = network(family, seed)
        ops = read_graph(model, shape)
        if any(isinstance(op.rule, Slope) and op.rule.high != 1 for op in ops):
            continue
        try:
            rows = steepest_jacobian(ops)
        except NoRule:
            continue
        net = Patterned(model, shape, seed)
        net.redraw("high")
        assert torch.allclose(rows, net.jacobian(), rtol=1e-9, atol=1e-9), (family, seed)


# --- every module's own factor, by differences --------------------------------------------------------------

MODULES = {
    "dense": (nn.Linear(4, 3), (4,)),
    "convolution": (nn.Conv2d(2, 3, 3, padding=1), (2, 4, 4)),
    "strided convolution": (nn.Conv2d(2, 3, 3, 2, 1), (2, 5, 4)),
    "batch norm": (nn.BatchNorm2d(2), (2, 3, 3)),
    "max pool": (nn.MaxPool2d(2), (2, 4, 4)),
    "overlapping max pool": (nn.MaxPool2d(3, 1, 1), (1, 4, 4)),
    "dilated max pool": (nn.MaxPool1d(3, 2, dilation=3), (1, 12)),
    "max pool in 3-D": (nn.MaxPool3d(2, 1), (1, 3, 3, 3)),
    "average pool": (nn.AvgPool2d(2), (2, 4, 4)),
    "overlapping average pool": (nn.AvgPool2d(3, 2, 1), (1, 5, 5)),
    "ragged average pool": (nn.AvgPool1d(3, 2, ceil_mode=True), (1, 6)),
    "global mean": (nn.AdaptiveAvgPool2d(1), (2, 3, 4)),
    "uneven mean": (nn.AdaptiveAvgPool2d((3, 2)), (1, 4, 5)),
    "dropout": (nn.Dropout(0.5), (4,)),
    "flattening": (nn.Flatten(), (2, 2, 2)),
    "normalisation": (nn.Sequential(Normalize([0.4, 0.6], [0.2, 0.4])), (2, 3, 3)),
    "softmax": (nn.Softmax(1), (4,)),
    "GELU": (nn.GELU(), (4,)),
    "GELU of tanh": (nn.GELU("tanh"), (4,)),
    "SiLU": (nn.SiLU(), (4,)),
    "Mish": (nn.Mish(), (4,)),
    "Softsign": (nn.Softsign(), (4,)),
    "LogSigmoid": (nn.LogSigmoid(), (4,)),
    "Hardswish": (nn.Hardswish(), (4,)),
    "Softplus": (nn.Softplus(3.0), (4,)),
    "inverted ELU": (nn.ELU(-1.5), (4,)),
}


@pytest.mark.parametrize("p", [2, INF])
@pytest.mark.parametrize("name", MODULES)
def test_no_difference_quotient_is_above_a_modules_bound(name: str, p: float) -> None:
    module, shape = MODULES[name]
    module = module.double().eval()
    bound = lipschitz_upper_bound(module, p, input_shape=shape)
    if bound.upper is None:
        assert name == "ragged average pool"
        assert p == 2
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, *shape, generator=generator, dtype=torch.float64) * 2
    kinds = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    kinds[1] = kinds[1].sign()
    kinds[2] = torch.where(kinds[2] > 1.2, kinds[2], 0.0) + 1e-3
    found = 0.0
    for step in kinds:
        for length in (1e-4, 0.1, 3.0):
            with torch.no_grad():
                change = (module(x + length * step) - module(x)).flatten(1)
            ratio = change.norm(p, dim=1) / (length * step.flatten(1)).norm(p, dim=1)
            found = max(found, float(ratio.max()))
    assert found <= bound.upper * (1 + 1e-6)  # differences of 1e-7 are rounded
    assert found >= 0.2 * bound.upper


# --- what the arguments need of the graph -------------------------------------------------------------------


@pytest.mark.parametrize("p", [2, INF])
def test_no_local_norm_at_an_input_is_above_any_argument(p: float) -> None:
    """Invariant 22 over all families at real inputs."""
    bounded = set()
    for family, seed in product(FAMILIES, range(300, 308)):
        model, shape = network(family, seed)
        bound = network_bounds(model, (p,), input_shape=shape)[p]
        if bound.upper is None:
            continue
        bounded.add(family)
        generator = torch.Generator().manual_seed(seed)
        for scale in (0.1, 1.0, 5.0):
            J = jacobian_at(model, scale * torch.randn(shape, generator=generator, dtype=torch.float64))
            for name, value in bound.arguments:
                assert norm_of(J, p)[0] <= value * SLACK, (family, seed, name)
    assert bounded == set(FAMILIES)
