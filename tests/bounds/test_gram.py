"""The multiplier recursion in l_2: above every Jacobian under every pattern of slopes, in the Loewner order."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from brittle.bounds.graph.read import read_graph
from brittle.bounds.graph.rules import Conv, Dense, Op, Slope
from brittle.bounds.lipschitz.gram import GramBound, descend, gram_bound
from brittle.bounds.lipschitz.network import network_bounds
from brittle.bounds.lipschitz.product import own_factors, product_bound
from brittle.bounds.lipschitz.torus import mean_over_image
from brittle.linear.conv_geometry import ConvGeometry
from brittle.linear.conv_symbol import symbol
from brittle.models.trace import NoRule
from helpers.patterned import (
    FAMILIES,
    Apply,
    Patterned,
    jacobian_at,
    margins_of,
    network,
    norm_of,
    randomise,
    search,
    window_maxima,
)

SLACK = 1 + 1e-8
NORMS = (2, math.inf)


def recursion(model: nn.Module, shape: tuple[int, ...], **options: Any) -> tuple[GramBound, tuple[Op, ...]]:
    ops = read_graph(model, shape)
    return gram_bound(ops, own_factors(ops, 2), **options), ops


def excess(gram: Tensor, J: Tensor) -> float:
    """Largest eigenvalue of ``J J^T - gram`` in units of gram's; at most 0 for a bound."""
    if gram.shape[0] != J.shape[0]:
        gram = gram[0, 0] * torch.eye(len(J), dtype=torch.float64)
    return float(torch.linalg.eigvalsh(J @ J.mT - gram)[-1] / gram.diagonal().max().clamp_min(1e-300))


def climb(net: Patterned, gram: Tensor, sweeps: int = 4) -> list[Tensor]:
    """Patterns that raise the largest ``u^T J J^T u / u^T gram u``: towards a violation of the Loewner order."""
    found = [net.jacobian()]
    if gram.shape[0] != found[0].shape[0]:
        gram = gram[0, 0] * torch.eye(len(found[0]), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp_min(1e-12 * float(values[-1])).rsqrt()
    for _ in range(sweeps):
        J = found[-1]
        y = torch.linalg.eigh(root.mT @ J @ J.mT @ root).eigenvectors[:, -1]
        u = root @ y
        v = J.mT @ u
        net.ascend(u, v)
        found.append(net.jacobian())
    return found


def jacobians(model: nn.Module, shape: tuple[int, ...], seed: int) -> list[Tensor]:
    """At random inputs and under random slopes."""
    generator = torch.Generator().manual_seed(seed)
    found = [
        jacobian_at(model, scale * torch.randn(shape, dtype=torch.float64, generator=generator))
        for scale in (0.1, 1.0, 9.0)
    ]
    net = Patterned(model, shape, seed)
    for how in ("corners", "corners", "inside", "high", "low"):
        net.redraw(how)
        found.append(net.jacobian())
    return found


def tightened(bound: GramBound, ops: Sequence[Op], factors: Sequence[float], steps: int) -> GramBound:
    """The least l_2 bound met on the way down."""
    return min([bound, *descend(bound, ops, factors, steps)], key=lambda bound: bound.upper)


SEEDS = range(11)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_jacobian_lies_below_the_gram_matrix(family: str) -> None:
    """Real inputs, random slopes, and patterns that climb towards a violation."""
    for seed in SEEDS:
        model, shape = network(family, seed)
        with suppress(NoRule):  # a sum of tensors of different shapes
            check_below(model, shape, seed)


def check_below(model: nn.Module, shape: tuple[int, ...], seed: int) -> None:
    bound, _ = recursion(model, shape, uniform=seed % 2 > 0)
    net = Patterned(model, shape, seed)
    for J in jacobians(model, shape, seed) + climb(net, bound.gram) + search(net, 2, 4):
        assert norm_of(J, 2)[0] <= bound.upper * SLACK, seed
        if len(bound.gram) in (1, len(J)):
            assert excess(bound.gram, J) <= 1e-8, seed


@pytest.mark.parametrize("family", FAMILIES)
def test_all_arguments_and_margins_hold_under_every_pattern(family: str) -> None:
    """Both norms; every pair of outputs, with patterns that climb towards a violation of its margin."""
    bounded = 0
    for seed in range(100, 106):
        model, shape = network(family, seed)
        bounds = network_bounds(model, NORMS, input_shape=shape)
        net = Patterned(model, shape, seed)
        for p, bound in bounds.items():
            if bound.upper is None:
                continue
            bounded += len(bound.arguments) > 0
            net.redraw("corners")
            found = jacobians(model, shape, seed) + search(net, p, 4)
            if bound.margins is not None and len(bound.margins) > 1:
                pairs = [(i, j) for i in range(len(bound.margins)) for j in range(i)]
                found += [J for pair in pairs[:4] for J in search(net, p, 3, pair)]
            for J in found:
                for name, value in bound.arguments:
                    assert norm_of(J, p)[0] <= value * SLACK, (family, seed, p, name)
                if bound.margins is not None:
                    assert (margins_of(J, p) <= bound.margins * SLACK + 1e-12).all(), (family, seed, p)
    assert bounded >= 6  # of twelve


def test_the_climb_reaches_the_exact_norm_of_small_networks() -> None:
    """The search above finds what enumeration finds, so that it would have found a violation."""
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        W = [torch.randn(a, b, dtype=torch.float64, generator=generator) for a, b in ((4, 3), (3, 4), (2, 3))]
        model = nn.Sequential(*[m for w in W for m in (nn.Linear(w.shape[1], w.shape[0], bias=False), nn.ReLU())][:-1])
        for layer, w in zip(model[::2], W, strict=True):
            layer.weight = nn.Parameter(w)
        bits = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 7)
        exact = max(float(torch.linalg.matrix_norm(W[2] * d[4:] @ (W[1] * d[:4]) @ W[0], 2)) for d in bits)
        net, best = Patterned(model.double(), (3,), seed), 0.0
        for _ in range(12):
            net.redraw("corners")
            best = max(best, norm_of(search(net, 2, 6)[-1], 2)[0])
        assert best == pytest.approx(exact, rel=1e-6)
        assert exact <= recursion(model, (3,))[0].upper * SLACK


# --- networks at the edges of the torus ---------------------------------------------------------------------


def shifted(model: nn.Module, *shape: int) -> float:
    """Largest norm found over the bound, with weights as they are."""
    model = model.double().eval()
    bound, _ = recursion(model, shape)
    net, best = Patterned(model, shape, 0), 0.0
    for how in ("high", "corners", "corners"):
        net.redraw(how)
        best = max(best, *(norm_of(J, 2)[0] for J in search(net, 2, 6)))
    return best / bound.upper


def test_zeros_around_an_image_are_put_back_before_they_are_padded() -> None:
    """A 1x1 convolution with padding after a 3x3 one: outside its image the 3x3 one is nonzero on the torus."""
    K = torch.randn(1, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = {"a": nn.Conv2d(1, 1, 3, padding=1, bias=False), "b": nn.Conv2d(1, 1, 3, padding=2, bias=False)}
    parts["rim"] = nn.Conv2d(1, 1, 1, padding=1, bias=False)
    model = Apply(lambda s, x: s.rim(s.a(x)) + s.b(x), **parts)
    for name, kernel in (("a", K), ("b", -K), ("rim", torch.ones(1, 1, 1, 1))):
        parts[name].weight = nn.Parameter(kernel.double())
    assert 0.1 < shifted(model, 1, 4, 4) <= SLACK


def test_zeros_around_an_image_are_a_pattern_of_a_steep_activation_too() -> None:
    """On the torus of 3 points the first filter leaves only the mean and the second removes it; at the border not."""
    layers = nn.Conv1d(1, 1, 3, padding=1, bias=False), nn.Conv1d(1, 1, 3, padding=1, bias=False)
    for layer, kernel in zip(layers, ([1.0, 1.0, 1.0], [1.0, -1.0, 0.0]), strict=True):
        layer.weight.data = torch.tensor(kernel).view(1, 1, 3)
    model = nn.Sequential(layers[0], nn.LeakyReLU(0.999), layers[1]).double().eval()
    bound, _ = recursion(model, (1, 2))
    assert 1.4 < norm_of(jacobian_at(model, torch.ones(1, 2, dtype=torch.float64)), 2)[0] <= bound.upper * SLACK


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_a_torus_without_room_for_the_padding_would_cancel_opposite_taps(stride: int) -> None:
    """Taps at -2 and +2 of opposite signs on 4 points: one and the same on a torus of 4, never in the image."""
    left, right = (nn.Conv1d(1, 1, 5, stride, 2, bias=False) for _ in range(2))
    left.weight.data = torch.tensor([1.0, 0, 0, 0, 0]).view(1, 1, 5)
    right.weight.data = torch.tensor([0, 0, 0, 0, -1.0]).view(1, 1, 5)
    model = Apply(lambda s, x: s.left(x) + s.right(x), left=left, right=right).double()
    bound, _ = recursion(model, (1, 4))
    assert 0.9 < norm_of(jacobian_at(model, torch.ones(1, 4, dtype=torch.float64)), 2)[0] <= bound.upper * SLACK


SHORTCUTS = [(n, 1, 0) for n in (4, 5, 6, 7)] + [(n, 3, 1) for n in (4, 5)] + [(n, 5, 2) for n in (4, 5)]
SHORTCUTS += [(n, 2, 0) for n in (4, 6)] + [(n, 2, 1) for n in (5, 7)]


@pytest.mark.parametrize(("n", "kernel", "padding"), SHORTCUTS)
def test_a_strided_convolution_and_its_shortcut_keep_their_relative_shift(n: int, kernel: int, padding: int) -> None:
    """Joint phases: a shift of one branch against the other would bound another operator."""
    main, short = (nn.Conv2d(1, 1, k, 2, pad, bias=False) for k, pad in ((3, 1), (kernel, padding)))
    generator = torch.Generator().manual_seed(n)
    for sign in (1, -1):
        for conv in (main, short):
            conv.weight.data = torch.randn(conv.weight.shape, generator=generator)
        model = Apply(lambda s, x, sign=sign: s.main(x) + sign * s.short(x), main=main, short=short)
        assert 0.3 < shifted(model, 1, n, n) <= SLACK
        blended = Apply(lambda s, x: s.act(s.main(x)) + s.short(x), main=main, short=short, act=nn.ReLU())
        assert shifted(blended, 1, n, n) <= SLACK


EDGES = {
    "two strides": lambda: nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 3, 2, 1), nn.Flatten()),
    "stride without reach": lambda: nn.Sequential(nn.Conv2d(1, 2, 1, 3), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.Flatten()),
    "wide padding": lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=5), nn.ReLU(), nn.Conv2d(2, 1, 3, padding=4)),
    "kernel as large as the image": lambda: nn.Sequential(nn.Conv2d(1, 2, 5, padding=2), nn.ReLU(), nn.Conv2d(2, 2, 5)),
    "dilation": lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=3, dilation=3), nn.ReLU(), nn.Conv2d(2, 1, 2)),
    "even same": lambda: nn.Sequential(nn.Conv2d(1, 2, 2, padding="same"), nn.ReLU(), nn.Conv2d(2, 1, 2)),
    "one axis strided": lambda: nn.Sequential(nn.Conv2d(1, 2, (3, 2), (1, 2), (1, 0)), nn.ReLU(), nn.Conv2d(2, 1, 2)),
    "one pixel": lambda: nn.Sequential(nn.Conv2d(1, 3, 5), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1), nn.Flatten()),
    "linear tail": lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1), nn.ReLU()),
    "overlapping max pool": lambda: nn.Sequential(nn.MaxPool2d(3, 1), nn.Flatten()),
    "max pool after a convolution": lambda: nn.Sequential(nn.Conv2d(1, 1, 1), nn.MaxPool2d(2, 1), nn.Flatten()),
    "lifted slopes": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(2, 2, 3, padding=1), nn.LeakyReLU(0.1)
    ),
}


@pytest.mark.parametrize("name", EDGES)
def test_borders_and_strides(name: str) -> None:
    for seed in range(3):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = EDGES[name]()
        assert 0.02 < shifted(model, 1, 5, 5) <= SLACK


def test_a_global_mean_weighs_the_frequencies_by_the_image() -> None:
    """``1^T P 1 / pixels`` against the explicit circular matrix."""
    generator = torch.Generator().manual_seed(0)
    for grid, size in [
        ((4,), (3,)),
        ((5,), (5,)),
        ((4, 6), (3, 4)),
        ((5, 3), (2, 3)),
        ((3, 1), (3, 1)),
        ((2, 3, 4),) * 2,
    ]:
        K = torch.randn(2, 3, *[min(2, n) for n in grid], generator=generator, dtype=torch.float64)
        axes = len(grid)
        A = symbol(K, ConvGeometry((1,) * axes, ((0, 0),) * axes, (1,) * axes, 1), grid)
        # the circular operator on the grid, entry by entry: P = C C^T
        eye = torch.eye(3 * math.prod(grid), dtype=torch.float64).view(-1, 3, *grid)
        wrapped = F.pad(eye, [w for k in reversed(K.shape[2:]) for w in (0, k - 1)], mode="circular")
        C = (None, F.conv1d, F.conv2d, F.conv3d)[axes](wrapped, K).flatten(1).mT  # type: ignore[misc]
        ones = torch.zeros(2, 2, *grid, dtype=torch.float64)
        for c in range(2):
            ones[(c, c, *[slice(0, n) for n in size])] = 1.0
        rows = ones.flatten(1) @ C
        expected = rows @ rows.mT / math.prod(size)
        assert torch.allclose(mean_over_image(A @ A.mH, grid, size), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_symbols_are_the_circular_convolution(stride: int, padding: int, groups: int) -> None:
    """Singular values of all frequencies together are those of the circular matrix; on a joint grid, shifts too."""
    generator = torch.Generator().manual_seed(stride + 10 * padding)
    K = torch.randn(2, 2 // groups, 3, generator=generator, dtype=torch.float64)
    points = 4
    n = stride * points
    geometry = ConvGeometry((stride,), ((padding, padding),), (1,), groups)
    C = torch.zeros(2, points, 2, n, dtype=torch.float64)
    for o in range(2):
        for c in range(2 // groups):
            for q in range(points):
                for u in range(3):
                    source = c + (o if groups == 2 else 0)
                    C[o, q, source, (stride * q + u - padding) % n] += K[o, c, u]
    A = symbol(K, geometry, (points,))
    half = [torch.linalg.svdvals(a) for a in A]
    values = torch.cat([half[0], half[1], half[1], half[2]]).sort().values
    assert torch.allclose(values, torch.linalg.svdvals(C.view(2 * points, -1)).sort().values, atol=1e-10)
    # phases: the Fourier transform of the circular matrix's rows, block by block
    w = torch.exp(2j * math.pi * torch.arange(points, dtype=torch.float64) / points)
    polyphase = C.view(2, points, 2, points, stride)
    at_one = (polyphase[:, 0].to(torch.complex128) * w[:, None]).sum(2)
    assert torch.allclose(A[1], at_one.flatten(1), atol=1e-10)


# --- the multipliers ----------------------------------------------------------------------------------------


def chain(seed: int, *widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(*layers[:-1]).double()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def test_one_scalar_multiplier_a_layer_is_never_above_the_product_of_norms() -> None:
    for seed in range(8):
        model = chain(seed, 4, 6, 5, 3)
        ops = read_graph(model, (4,))
        factors = own_factors(ops, 2)
        scalars = {
            number: torch.full(
                (op.shape[1],), product_bound(ops, factors, 2, end=number) ** 2 * (1 + 1e-8), dtype=torch.float64
            )
            for number, op in enumerate(ops)
            if isinstance(op.rule, Slope) and op.shape is not None
        }
        bound = gram_bound(ops, factors, multipliers=scalars)
        assert bound.upper <= product_bound(ops, factors, 2) * (1 + 1e-7)
        assert gram_bound(ops, factors).upper <= product_bound(ops, factors, 2) * (1 + 1e-7)


def test_any_feasible_multipliers_give_a_bound_and_others_fall_back() -> None:
    for seed in range(6):
        model = chain(seed, 3, 5, 4, 2)
        bound, ops = recursion(model, (3,))
        net = Patterned(model, (3,), seed)
        generator = torch.Generator().manual_seed(seed)
        found = search(net, 2, 6)
        for spread in (0.1, 0.5, 2.0, 8.0):
            moved = {
                k: t * torch.exp(spread * torch.randn(len(t), generator=generator, dtype=torch.float64))
                for k, t in bound.multipliers.items()
            }
            other = gram_bound(ops, own_factors(ops, 2), multipliers=moved)
            found += climb(net, other.gram)
            assert max(excess(other.gram, J) for J in found) <= 1e-8
        tiny = {k: t * 1e-6 for k, t in bound.multipliers.items()}
        fallen = gram_bound(ops, own_factors(ops, 2), multipliers=tiny)
        assert fallen.upper >= product_bound(ops, own_factors(ops, 2), 2) * (1 - 1e-9)


@pytest.mark.parametrize("family", ["dense", "residual", "dense net"])
def test_optimised_multipliers_are_never_worse_and_still_a_bound(family: str) -> None:
    for seed in range(6):
        model, shape = network(family, seed)
        ops = read_graph(model, shape)
        factors = own_factors(ops, 2)
        before = gram_bound(ops, factors)
        after = tightened(before, ops, factors, 25)
        assert after.upper <= before.upper * (1 + 1e-12)
        net = Patterned(model, shape, seed)
        for J in climb(net, after.gram) + search(net, 2, 4) + jacobians(model, shape, seed):
            assert norm_of(J, 2)[0] <= after.upper * SLACK, (family, seed)
            if len(after.gram) in (1, len(J)):
                assert excess(after.gram, J) <= 1e-8, (family, seed)


@pytest.mark.parametrize("margins", [False, True])
def test_what_is_learnt_for_l_inf_is_a_bound_at_every_step(margins: bool) -> None:
    """Multipliers and the input's weights together: every bound on the way, in both norms and for every pair."""
    for seed in range(3):
        model = chain(seed, 4, 6, 5, 3)
        ops = read_graph(model, (4,))
        factors = own_factors(ops, 2)
        net = Patterned(model, (4,), seed)
        found = jacobians(model, (4,), seed) + [J for p in NORMS for J in search(net, p, 4)]
        first = gram_bound(ops, factors, start=torch.ones(4, dtype=torch.float64))
        steps = list(descend(first, ops, factors, 12, p=math.inf, margins=margins))
        assert len({float(bound.start.sum()) for bound in steps if bound.start is not None}) > 10
        for bound in steps:
            for p in NORMS:
                assert max(norm_of(J, p)[0] for J in found) <= bound.constant(p) * SLACK
                assert all(bool((margins_of(J, p) <= bound.differences(p) * SLACK).all()) for J in found)


def test_more_steps_are_never_worse() -> None:
    """Constants and single margins, in both norms: the first steps are the same whatever their number."""
    for model, shape in ((chain(0, 5, 8, 8, 4), (5,)), network("residual", 1)):
        before = network_bounds(model, NORMS, input_shape=shape)
        for steps in (3, 9):
            after = network_bounds(model, NORMS, input_shape=shape, steps=steps)
            for p in NORMS:
                assert after[p].upper <= before[p].upper, (shape, p, steps)
                assert before[p].margins is None or bool((after[p].margins <= before[p].margins).all())
            before = after


@pytest.mark.parametrize("seed", range(3))
def test_slopes_pass_through_what_is_relaxed_to_a_diagonal(seed: int) -> None:
    """Of the logarithm of the bound in those of the multipliers before a stride, against differences."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        convs = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 2, 2)
        layers = [layer for conv in convs for layer in (conv, nn.ReLU())]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 3)).double().eval()
    bound, ops = recursion(model, (2, 6, 6))
    logs = {key: t.log().requires_grad_() for key, t in bound.multipliers.items()}
    first = min(logs)
    factors = own_factors(ops, 2)

    def value(moved: dict[int, Tensor]) -> Tensor:
        gram = gram_bound(ops, factors, multipliers={key: t.exp() for key, t in moved.items()}).gram
        return torch.linalg.eigvalsh(gram)[-1].log()

    (slope,) = torch.autograd.grad(value(logs), logs[first])
    assert float(slope.abs().max()) > 1e-3
    with torch.no_grad():
        for unit in range(3):
            step = torch.zeros_like(slope).index_fill(0, torch.tensor([unit]), 1e-3)
            up, down = (value({**logs, first: logs[first] + sign * step}) for sign in (1, -1))
            assert float(slope[unit]) == pytest.approx(float(up - down) / 2e-3, abs=0.1)


def test_weights_of_the_input_are_learnt() -> None:
    """Far more than the multipliers gain alone: an input that hardly counts costs hardly anything."""
    model = chain(3, 6, 8, 3)
    model[0].weight.data[:, 2:] *= 1e-3
    ops = read_graph(model, (6,))
    factors, ones = own_factors(ops, 2), torch.ones(6, dtype=torch.float64)
    first = gram_bound(ops, factors, start=ones)
    learnt = min(bound.constant(math.inf) for bound in descend(first, ops, factors, 60, p=math.inf))
    fixed = min(bound.constant(math.inf) for bound in descend(gram_bound(ops, factors), ops, factors, 60, p=math.inf))
    assert learnt < 0.75 * fixed


def test_the_gram_matrix_with_input_weights() -> None:
    """``J diag(start) J^T``."""
    for seed in range(6):
        model = chain(seed, 4, 5, 3)
        start = torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) ** 4 + 1e-3
        bound, _ = recursion(model, (4,), start=start)
        net = Patterned(model, (4,), seed)
        for J in search(net, 2, 4) + jacobians(model, (4,), seed):
            assert excess(bound.gram, J * start.sqrt()) <= 1e-8


# --- scales (invariant 25), folding (28) --------------------------------------------------------------------


def test_moving_a_scale_between_layers_leaves_every_bound_unchanged() -> None:
    for seed in range(5):
        model, moved = chain(seed, 4, 6, 5, 3), chain(seed, 4, 6, 5, 3)
        scale = 7.3
        moved[0].weight.data *= scale
        moved[2].weight.data /= scale
        for p in NORMS:
            ours, theirs = (network_bounds(m, (p,), input_shape=(4,))[p] for m in (model, moved))
            for (name, value), (_, other) in zip(ours.arguments, theirs.arguments, strict=True):
                assert other == pytest.approx(value, rel=1e-6), name
            assert torch.allclose(ours.margins, theirs.margins, rtol=1e-6)  # type: ignore[arg-type]
        bound, _ = recursion(model, (4,))
        first = min(bound.multipliers)
        transported = {k: t * (scale**2 if k == first else 1.0) for k, t in bound.multipliers.items()}
        there = read_graph(moved, (4,))
        again = gram_bound(there, own_factors(there, 2), multipliers=transported)
        assert torch.allclose(again.gram, bound.gram, rtol=1e-8)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("family", ["dense", "bottlenecks"])
def test_scaling_one_layer_of_a_chain_scales_every_argument(family: str, p: float) -> None:
    layers = [nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    model = chain(0, 4, 5, 3) if family == "dense" else nn.Sequential(*layers, nn.Linear(8, 2)).double().eval()
    shape = (4,) if family == "dense" else (1, 4, 4)
    before = network_bounds(model, (p,), input_shape=shape)[p]
    for layer in [m for m in model if hasattr(m, "weight")]:
        layer.weight.data *= 3.7
        after = network_bounds(model, (p,), input_shape=shape)[p]
        layer.weight.data /= 3.7
        for (name, value), (_, other) in zip(before.arguments, after.arguments, strict=True):
            assert other == pytest.approx(3.7 * value, rel=1e-5), name


def test_a_batch_norm_folds_into_the_same_gram_matrix() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3, 2, 1), nn.BatchNorm2d(2),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3),
    )  # fmt: skip
    model = randomise(model, random.Random(1))
    folded = nn.Sequential(
        nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1]), nn.ReLU(),
        nn.utils.fusion.fuse_conv_bn_eval(model[3], model[4]), *model[5:],
    ).eval()  # fmt: skip
    ours, theirs = (recursion(m, (2, 5, 5))[0].gram for m in (model, folded))
    assert torch.allclose(ours, theirs, rtol=1e-8)


def test_the_graph_of_a_chain_is_what_it_computes() -> None:
    """The operations themselves, run as they stand, give the network without its constants."""
    model, shape = chain(0, 4, 5, 3), (4,)
    ops = read_graph(model, shape)
    matrices = [op.rule.W.double() for op in ops if isinstance(op.rule, Dense)]
    net = Patterned(model, shape, 0)
    net.redraw("high")
    assert torch.allclose(matrices[1] @ matrices[0], net.jacobian(), atol=1e-12)
    assert not any(isinstance(op.rule, Conv) for op in ops)


# --- rounding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e2, 1e5, 1e9])
def test_branches_that_cancel_do_not_lose_the_bound_to_rounding(size: float) -> None:
    """``(size W + E) x - size W x``: the joint matrix holds ``size^2``, the result ``E E^T``."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        W, E = (torch.randn(1 + seed % 3, 3, dtype=torch.float64, generator=generator) for _ in range(2))
        a, b = (nn.Linear(3, len(W), bias=False).double() for _ in range(2))
        a.weight.data, b.weight.data = size * W + E, size * W
        bound, _ = recursion(Apply(lambda s, x: s.a(x) - s.b(x), a=a, b=b), (3,))
        assert bound.upper >= norm_of((a.weight - b.weight).detach(), 2)[0] * (1 - 1e-9)


# --- the tester itself --------------------------------------------------------------------------------------


class Watched(fx.Interpreter):
    """Keeps every value."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.__dict__.setdefault("values", {})[n.name] = value
        return value


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pattern_at_an_input_gives_its_jacobian(family: str) -> None:
    """With the slopes that hold at an input, the patterned network is the Jacobian there."""
    for seed in range(8):
        model, shape = network(family, seed)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(shape, dtype=torch.float64, generator=generator)
        net, real = Patterned(model, shape, seed), Watched(fx.symbolic_trace(model))
        real.run(x[None])
        for node in real.module.graph.nodes:
            if node.name not in net.masks:
                continue
            module, read = net.fetch_attr(str(node.target)), real.values[node.args[0].name].detach()
            if node.name in net.limits:
                (net.masks[node.name],) = torch.autograd.functional.jvp(module, read, torch.ones_like(read))[1:]
            else:
                net.masks[node.name] = window_maxima(module, read)
        assert torch.allclose(net.jacobian(), jacobian_at(model, x), atol=1e-9), (family, seed)
