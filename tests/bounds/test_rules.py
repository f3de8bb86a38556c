"""Every analysis of networks knows every rule, or says that it does not: what is unknown never counts as a number."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brittle.bounds import graph, lipschitz, relaxation
from brittle.bounds.graph import tables
from brittle.bounds.graph.fold import fold
from brittle.bounds.graph.rules import (
    Average,
    Concat,
    Conv,
    Dense,
    Input,
    MaxPool,
    Multiple,
    Op,
    Rearrange,
    Rule,
    Scale,
    Slope,
    Softmax,
    Sum,
    TransposedConv,
    spatial_axes,
)  # fmt: skip
from brittle.bounds.lipschitz.gram import gram_bound
from brittle.bounds.lipschitz.gram_multipliers import Stuck
from brittle.bounds.lipschitz.gram_states import joint_of_diagonal, rows_after, weights_after
from brittle.bounds.lipschitz.network import network_bounds
from brittle.bounds.lipschitz.paths import carry, radii, steepest_jacobian
from brittle.bounds.lipschitz.product import constant_after, own_factor, own_factors, product_bound
from brittle.bounds.lipschitz.torus import as_convolution, convolutions, is_local
from brittle.bounds.relaxation.certify import read_relaxation
from brittle.bounds.relaxation.crown import pull_back, pull_through
from brittle.bounds.relaxation.grouped import targets
from brittle.bounds.relaxation.interval import Ball, Network, Propagation, intervals, is_curved, pass_on
from brittle.bounds.relaxation.linear_maps import as_map
from brittle.bounds.relaxation.windows import Window, window_before
from brittle.linear.conv_geometry import ConvGeometry
from brittle.models.trace import NoRule
from helpers.networks import generator, seeded

IMAGE, VECTOR = (1, 2, 4, 4), (1, 4)
LIKE = torch.zeros((), dtype=torch.float64)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Unheard:
    """A rule that no analysis has been told of."""


@dataclass(frozen=True)
class Case:
    """A rule, what it reads and yields, the module or function that computes it, and that function itself."""

    rule: object
    before: tuple[int, ...]
    after: tuple[int, ...]
    called: object = None
    function: Callable[..., Tensor] | None = None
    reads: int = 1


def linear(out: int, *before: int) -> nn.Linear:
    layer = nn.Linear(*before, out).double()
    layer.weight.data, layer.bias.data = normal(1, out, *before), normal(2, out)
    return layer


DENSE = linear(3, 4)
CONV = nn.Conv2d(2, 3, 3, padding=1).double()
CONV.weight.data = normal(3, 3, 2, 3, 3)
NORM = nn.BatchNorm2d(2).double().eval()
NORM.weight.data = torch.tensor([-2.0, 0.5], dtype=torch.float64)
POOL, MEAN, SOFT = nn.MaxPool2d(2, 1), nn.AvgPool2d(2), nn.Softmax(1)
BACK = nn.ConvTranspose2d(2, 4, 3, 2, 1, output_padding=1, groups=2).double()
BACK.weight.data = normal(4, 2, 2, 3, 3)
BACK_GEOMETRY = ConvGeometry((2, 2), ((1, 1), (1, 1)), (1, 1), 2)
THIRD = Conv(torch.eye(2, dtype=torch.float64)[1:].view(1, 2, 1, 1), ConvGeometry((3, 3), ((0, 0),) * 2, (1, 1), 1))
UPSAMPLED = nn.Upsample(scale_factor=2, mode="bilinear")
SCALE = NORM.weight.detach() * (NORM.running_var.double() + NORM.eps).rsqrt()

CASES = [
    Case(Input(), IMAGE, IMAGE, reads=0),
    Case(Dense(DENSE.weight.detach()), VECTOR, (1, 3), DENSE, DENSE),
    Case(Conv(CONV.weight.detach(), ConvGeometry.of(CONV)), IMAGE, (1, 3, 4, 4), CONV, CONV),
    Case(TransposedConv(BACK.weight.detach(), BACK_GEOMETRY), IMAGE, (1, 4, 8, 8), BACK, BACK),
    Case(Scale(SCALE), IMAGE, IMAGE, NORM, NORM),
    Case(Slope(0.0, 1.0, kinked=True), IMAGE, IMAGE, nn.ReLU(), torch.relu),
    Case(Slope(-0.13, 1.13), IMAGE, IMAGE, nn.GELU(), nn.GELU()),
    Case(MaxPool(POOL, 4, 2), IMAGE, (1, 2, 3, 3), POOL, POOL),
    Case(Average(MEAN, 0.5, stencil=((2, 2), (2, 2), (0, 0)), axes=2), IMAGE, (1, 2, 2, 2), MEAN, MEAN),
    Case(Average(lambda d: d.mean(1), 2**-0.5), IMAGE, (1, 4, 4), torch.mean, lambda x: x.mean(1)),
    Case(Average(MEAN, None, "unknown", axes=2), IMAGE, (1, 2, 2, 2), MEAN, MEAN),
    Case(Rearrange(nn.Flatten(), flattens=True), IMAGE, (1, 32), nn.Flatten(), nn.Flatten()),
    Case(Rearrange(lambda d: d.transpose(1, 2)), IMAGE, (1, 4, 2, 4), "transpose", lambda x: x.transpose(1, 2)),
    Case(Rearrange(None), IMAGE, (1, 32), "reshape"),
    Case(
        Rearrange(lambda d: d[:, 1:, ::3, ::3], conv=THIRD), IMAGE, (1, 1, 2, 2), "slice", lambda x: x[:, 1:, ::3, ::3]
    ),
    Case(Rearrange(lambda d: F.pad(d, (1, -1))), IMAGE, IMAGE, F.pad, lambda x: F.pad(x, (1, -1), value=7.0)),
    Case(Average(UPSAMPLED, 2.0, axes=2), IMAGE, (1, 2, 8, 8), UPSAMPLED, UPSAMPLED),
    Case(Sum((1, -1)), IMAGE, IMAGE, torch.sub, torch.sub, reads=2),
    Case(Concat(1), IMAGE, (1, 4, 4, 4), torch.cat, lambda x, y: torch.cat([x, y], 1), reads=2),
    Case(Concat(-1), IMAGE, (1, 2, 4, 8), torch.cat, lambda x, y: torch.cat([x, y], -1), reads=2),
    Case(Concat(1, (1, 2)), IMAGE, (1, 5, 4, 4), F.pad, lambda x: F.pad(x, (0, 0, 0, 0, 1, 2), value=3.0)),
    Case(
        Concat(1, (0, 3, 0)),
        IMAGE,
        (1, 7, 4, 4),
        torch.cat,
        lambda x, y: torch.cat([x, x.new_ones(1, 3, 4, 4), y], 1),
        reads=2,
    ),
    Case(Multiple(-0.5), IMAGE, IMAGE, torch.mul, lambda x: -0.5 * x),
    Case(Softmax(), VECTOR, VECTOR, SOFT, SOFT),
]
UNHEARD = [Case(Unheard(), IMAGE, IMAGE, torch.sin, reads=n) for n in (1, 2)] + [Case(Unheard(), VECTOR, VECTOR)]
name_of = lambda case: f"{type(case.rule).__name__}-{'x'.join(map(str, case.after))}-{case.reads}"  # noqa: E731


def network_of(case: Case) -> list[Op]:
    """The input and the operation, which reads it as often as it must."""
    if not case.reads:
        return [Op("here", case.rule, (), case.after, "here")]
    here = Op("here", case.rule, (0,) * case.reads, case.after, "here")
    return [Op("input", Input(), (), case.before, "input"), here]


def relaxed(case: Case) -> tuple[Network, Propagation]:
    """The network with its maps, and intervals up to the operation, around clean values where they can be computed."""
    ops, linear = network_of(case), None
    if not isinstance(case.rule, Unheard):  # whatever follows must refuse that one itself
        linear = as_map(case.rule, ops[-1], case.before, case.called, LIKE)
    network = Network(tuple(ops), {} if linear is None else {len(ops) - 1: linear})
    values = {0: normal(0, *case.before)}
    values[len(ops) - 1] = normal(1, *case.after) if case.function is None else case.function(*[values[0]] * case.reads)
    ball = Ball.around(values[0], 0.1, 2, (0.0, 1.0))
    state = Propagation(network, values, ball, {})
    if case.reads:
        pass_on(ops[0].rule, ops[0], 0, state)
    return network, state


# --- every analysis of one operation -------------------------------------------------------------------------------


def pull(case: Case) -> object:
    network, _ = relaxed(case)
    op, g = network.ops[-1], normal(5, 1, 3, *case.after[1:])
    return pull_through(op.rule, op, len(network.ops) - 1, g, network, lambda number, g: g)


def propagate(case: Case) -> object:
    network, state = relaxed(case)
    pass_on(network.ops[-1].rule, network.ops[-1], len(network.ops) - 1, state)
    return state.moved[len(network.ops) - 1]


def constant(case: Case, p: float) -> float:
    op = network_of(case)[-1]
    factor = own_factor(case.rule, op, case.before, p)
    return constant_after(case.rule, op, factor, [1.0] * case.reads, [case.before] * case.reads, p)


def rows(case: Case) -> object:
    state = joint_of_diagonal(0, torch.ones(case.before[1], dtype=torch.float64), case.before[2:])
    return rows_after(case.rule, network_of(case)[-1], state)


def radius(case: Case) -> Tensor:
    return carry(case.rule, network_of(case)[-1], [torch.ones(case.before, dtype=torch.float64)] * case.reads, True)


def value(case: Case) -> Tensor:
    return carry(case.rule, network_of(case)[-1], [normal(7, *case.before)] * case.reads, False)


def weights(case: Case) -> Tensor:
    ones = torch.ones(case.before[1], dtype=torch.float64)
    return weights_after(case.rule, network_of(case)[-1], ones, case.before)


ANALYSES: dict[str, tuple[object, Callable[[Case], object]]] = {
    "spatial axes": (spatial_axes, lambda case: spatial_axes(case.rule, network_of(case)[-1])),
    "own factor, 2": (own_factor, lambda case: own_factor(case.rule, network_of(case)[-1], case.before, 2)),
    "own factor, inf": (own_factor, lambda case: own_factor(case.rule, network_of(case)[-1], case.before, math.inf)),
    "constant, 2": (constant_after, lambda case: constant(case, 2)),
    "constant, inf": (constant_after, lambda case: constant(case, math.inf)),
    "constant alone": (
        constant_after,
        lambda case: constant_after(
            case.rule, network_of(case)[-1], 1.0, [1.0] * case.reads, [case.before] * case.reads, math.inf
        ),
    ),
    "radius": (carry, radius),
    "value": (carry, value),
    "convolution": (as_convolution, lambda case: as_convolution(case.rule, network_of(case)[-1], case.before)),
    "every position alike": (is_local, lambda case: is_local(case.rule, network_of(case)[-1])),
    "weights": (weights_after, weights),
    "rows": (rows_after, rows),
    "linear map": (as_map, lambda case: as_map(case.rule, network_of(case)[-1], case.before, case.called, LIKE)),
    "curved": (is_curved, lambda case: is_curved(case.rule, network_of(case)[-1])),
    "interval": (pass_on, propagate),
    "coefficients": (pull_through, pull),
    "window": (
        window_before,
        lambda case: window_before(case.rule, network_of(case)[-1], Window((1, 1), (0, 0), (2, 2))),
    ),
}


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("analysis", ANALYSES)
def test_every_analysis_knows_every_rule_or_says_that_it_does_not(analysis, case):
    try:
        answer = ANALYSES[analysis][1](case)
    except NoRule as error:
        answer = None
        assert str(error).startswith("here: ")  # noqa: PT017 - a value would do as well
    except Stuck:  # the walk of Gram matrices goes on with the product of norms
        answer = None
        assert analysis in ("weights", "rows")
    if isinstance(answer, Tensor | float):
        assert torch.as_tensor(answer).isfinite().all()


@pytest.mark.parametrize("case", UNHEARD, ids=name_of)
@pytest.mark.parametrize("analysis", ANALYSES)
def test_no_analysis_has_a_number_for_a_rule_it_was_not_told_of(analysis, case):
    with pytest.raises(NoRule, match=r"^here: no [\w ]+ for Unheard$"):
        ANALYSES[analysis][1](case)


def test_all_rules_and_all_analyses_are_tested_here():
    assert {type(case.rule) for case in CASES} == set(get_args(Rule))
    dispatched = set()
    for package in (graph, lipschitz, relaxation):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            members = vars(importlib.import_module(module.name)).values()
            dispatched |= {f for f in members if hasattr(f, "registry") and hasattr(f, "dispatch")}
    assert dispatched == {function for function, _ in ANALYSES.values()}


# --- every analysis of a whole network --------------------------------------------------------------------------


def unheard_network() -> list[Op]:
    """A dense layer, an operation that nobody knows, and a dense layer."""
    W = torch.eye(4, dtype=torch.float64)
    rules = [Input(), Dense(W), Unheard(), Dense(W)]
    return [Op(f"{n}", rule, (n - 1,) if n else (), VECTOR, f"{n}") for n, rule in enumerate(rules)]


def relaxed_unheard() -> tuple[Network, dict[int, Tensor], Ball]:
    ops = unheard_network()
    maps = {n: as_map(ops[n].rule, ops[n], VECTOR, linear(4, 4), LIKE) for n in (1, 3)}
    values = {n: normal(n, *VECTOR) for n in range(4)}
    return Network(tuple(ops), maps), values, Ball.around(values[0], 0.1, math.inf, (0.0, 1.0))


WHOLE: dict[str, Callable[[], object]] = {
    "own factors": lambda: own_factors(unheard_network(), 2),
    "product": lambda: product_bound(unheard_network(), [1.0] * 4, math.inf),
    "radii": lambda: radii(unheard_network()),
    "paths": lambda: steepest_jacobian(unheard_network()),
    "convolutions": lambda: convolutions(unheard_network()),
    "multipliers": lambda: gram_bound(unheard_network(), [1.0] * 4),
    "intervals": lambda: intervals(*relaxed_unheard()),
    "relaxation": lambda: list(pull_back(relaxed_unheard()[0], 3, normal(0, 1, 2, 4), lambda number, g: g)),
    "targets": lambda: targets(relaxed_unheard()[0]),
}


@pytest.mark.parametrize("analysis", WHOLE)
def test_no_bound_of_a_network_leaves_out_an_operation(analysis):
    with pytest.raises(NoRule, match=r"^2: no [\w ]+ for Unheard$"):
        WHOLE[analysis]()


def test_folding_leaves_an_unknown_operation_where_it_is():
    assert [type(op.rule) for op in fold(unheard_network())] == [Input, Dense, Unheard, Dense]


def test_a_network_that_is_read_with_an_unknown_rule_has_no_bound(monkeypatch):
    monkeypatch.setitem(tables.MODULES, nn.ReLU, lambda name, module, shape: Unheard())
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))).eval()
    for shape in (None, (4,)):
        for bound in network_bounds(net, (2, math.inf), input_shape=shape).values():
            assert bound.upper is None
            assert bound.unavailable.startswith("1: no ")
    with pytest.raises(NoRule, match="1: no"):
        read_relaxation(net, (4,))


class Pooling(nn.MaxPool2d):
    """A pooling under a name of its own."""


def test_a_subclass_that_changes_nothing_has_the_rule_of_its_kind():
    bounds = [
        network_bounds(nn.Sequential(pool, nn.Flatten()), (2, math.inf), input_shape=(1, 5, 5))
        for pool in (nn.MaxPool2d(3, 2), Pooling(3, 2))
    ]
    assert bounds[0][2].upper == bounds[1][2].upper == pytest.approx(2)
    assert bounds[0][math.inf].upper == bounds[1][math.inf].upper


# --- the numbers are those of the operation's own Jacobian ----------------------------------------------------------

UNARY = [case for case in CASES if case.function is not None and case.reads == 1]


def jacobian(case: Case, seed: int) -> Tensor:
    """``(outputs, inputs)`` at a random input."""
    J = torch.autograd.functional.jacobian(case.function, normal(seed, *case.before))
    return J.reshape(math.prod(case.after), math.prod(case.before))


@pytest.mark.parametrize("case", UNARY, ids=name_of)
def test_factors_radii_and_weights_are_not_below_a_jacobian(case):
    op = network_of(case)[-1]
    for seed in range(5):
        J = jacobian(case, seed)
        for p, norm in ((2, torch.linalg.matrix_norm(J, 2)), (math.inf, J.abs().sum(1).max())):
            try:
                assert own_factor(case.rule, op, case.before, p) >= float(norm) * (1 - 1e-12)
            except NoRule:
                assert isinstance(case.rule, Average)
                assert case.rule.norm is None
        assert (radius(case).flatten() >= J.abs().sum(1) * (1 - 1e-12)).all()
        try:
            t = weights(case)
        except Stuck:
            continue
        above = torch.diag(t.view(1, -1, *[1] * (len(case.after) - 2)).expand(case.after).flatten())
        assert float(torch.linalg.eigvalsh(above - J @ J.mT)[0]) >= -1e-12 * float(t.max())


@pytest.mark.parametrize(
    "case", [c for c in UNARY if not isinstance(c.rule, Slope | MaxPool | Softmax | Concat)], ids=name_of
)
def test_linear_maps_are_their_operation(case):
    linear, J = relaxed(case)[0].maps[1], jacobian(case, 0)
    d, g = normal(11, *case.before), normal(12, *case.after)
    torch.testing.assert_close(linear.forward(d).flatten(), J @ d.flatten(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(linear.transpose(g).flatten(), J.mT @ g.flatten(), rtol=1e-12, atol=1e-12)
    assert (linear.magnitude(d.abs()).flatten() >= J.abs() @ d.abs().flatten() - 1e-12).all()
    assert linear.row_sum >= float(J.abs().sum(1).max()) * (1 - 1e-12)
    if linear.lengths is not None:
        lengths = linear.lengths.expand(case.after).flatten()
        assert (lengths >= J.norm(dim=1) * (1 - 1e-12)).all()


@pytest.mark.parametrize("case", [c for c in UNARY if not isinstance(c.rule, Softmax)], ids=name_of)
def test_intervals_hold_for_every_difference_in_the_ball(case):
    try:
        mid, rad = propagate(case)
    except NoRule:
        return
    _, state = relaxed(case)
    x = state.values[0]
    for seed in range(20):
        step = normal(20 + seed, *case.before)
        step = step * (0.1 / torch.linalg.vector_norm(step))
        difference = case.function(x + step) - case.function(x)
        assert ((difference - mid).abs() <= rad * (1 + 1e-9) + 1e-12).all()
