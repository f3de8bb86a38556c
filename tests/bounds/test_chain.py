"""Theorem 3.2 for a chain of dense layers: every bound holds, and they are ordered."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from brittle.bounds import layer_bound
from brittle.bounds.chain import best_disjoint_pairs, chain_bounds, coordinate_bounds
from brittle.bounds.pairs.inf import row_bounds
from brittle.errors import InputError
from helpers.matrices import KINDS, matrix, quick

SLACK = 1 + 1e-8
both = pytest.mark.parametrize("p", [2, math.inf])
some = quick.__class__(quick, max_examples=15)


def chains(longest=4, widest=6, shortest=1, kinds=tuple(set(KINDS) - {"row", "column", "zero"})):
    """Weights of a random chain, drawn by kinds, widths and seed; some may happen to be zero."""

    def build(widths, kinds, seed):
        return [
            matrix(kind, m, n, seed + l)
            for l, (kind, (n, m)) in enumerate(zip(kinds, itertools.pairwise(widths), strict=True))
        ]

    return st.integers(shortest, longest).flatmap(
        lambda L: st.builds(
            build,
            st.lists(st.integers(1, widest), min_size=L + 1, max_size=L + 1),
            st.lists(st.sampled_from(sorted(kinds)), min_size=L, max_size=L),
            st.integers(0, 2**31),
        )
    )


def norm(A, p):
    return float(np.linalg.norm(np.asarray(A), p))


def product_of_norms(weights, p):
    return math.prod(norm(W, p) for W in weights)


def worst_pattern(weights, p, rng, tries=200):
    """Largest norm of the Jacobian over patterns: all of them where there are few, otherwise some."""
    widths = [len(W) for W in weights[:-1]]
    h = sum(widths)
    patterns = itertools.product([0.0, 1.0], repeat=h) if 2**h <= tries else rng.integers(0, 2, (tries, h))
    largest = 0.0
    for pattern in patterns:
        J, used = weights[0].numpy(), 0
        for W, width in zip(weights[1:], widths, strict=True):
            J = W.numpy() @ (np.asarray(pattern[used : used + width], dtype=float)[:, None] * J)
            used += width
        largest = max(largest, norm(J, p))
    return largest


def bounds(weights, p, **options):
    return dict(chain_bounds(weights, p, **options).values)


# --- S_opt --------------------------------------------------------------------------------------------------


def total(pairs, logs):
    return sum(logs[pair] for pair in pairs)


@quick
@given(st.lists(st.one_of(st.floats(-50, 0), st.sampled_from([0.0, -1.0, -2.0, -math.inf])), max_size=11))
def test_the_best_pairs_are_disjoint_and_found(logs):
    chosen = best_disjoint_pairs(logs)
    assert all(b - a >= 2 for a, b in itertools.pairwise(chosen))
    assert all(logs[pair] < 0 for pair in chosen)
    subsets = (s for r in range(len(logs) + 1) for s in itertools.combinations(range(len(logs)), r))
    disjoint = (s for s in subsets if all(b - a >= 2 for a, b in itertools.pairwise(s)))
    assert total(chosen, logs) == pytest.approx(min(total(s, logs) for s in disjoint), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        ([], ()),
        ([0.0], ()),
        ([-1.0], (0,)),
        ([-1.0, -1.0], (0,)),
        ([-1.0, -2.0, -1.0], (1,)),
        ([-2.0, -3.0, -2.0], (0, 2)),
        ([-1.0, -math.inf, -1.0], (1,)),
        ([0.0, 0.0, -1.0, 0.0], (2,)),
        ([0.5, -0.1, 0.5], (1,)),
    ],
)
def test_ties_use_fewer_pairs(logs, expected):
    assert best_disjoint_pairs(logs) == expected


def test_long_chains_are_no_effort():
    logs = [-1.0 - (l % 3) for l in range(20_000)]
    assert len(best_disjoint_pairs(logs)) >= 6_666


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_impossible_alignments_are_refused(bad):
    with pytest.raises(InputError, match="log_alignment: expected numbers below inf"):
        best_disjoint_pairs([-1.0, bad])


# --- every bound holds --------------------------------------------------------------------------------------


@both
@some
@given(weights=chains(), seed=st.integers(0, 999))
def test_no_pattern_exceeds_any_bound(p, weights, seed):
    worst = worst_pattern(weights, p, np.random.default_rng(seed))
    for name, value in bounds(weights, p).items():
        assert worst <= value * (1 + 1e-12), name


@both
@pytest.mark.parametrize("widths", [(3, 8, 8, 4), (6, 20, 5, 12, 3), (4, 16, 16, 16, 16, 2), (10, 30)])
def test_no_jacobian_exceeds_any_bound(p, widths):
    """Networks with biases, ReLU after every layer but the last, at many inputs; both norms joined at the end."""
    generator = torch.Generator().manual_seed(len(widths))

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = [draw(m, n) for n, m in itertools.pairwise(widths)]
    biases = [draw(m) for m in widths[1:]]

    def network(x):
        for l, (W, b) in enumerate(zip(weights, biases, strict=True)):
            x = W @ (x.relu() if l else x) + b
        return x

    jacobians = torch.func.vmap(torch.func.jacrev(network))(draw(300, widths[0]))
    steepest = float(torch.linalg.matrix_norm(jacobians, p).max())
    for name, value in chain_bounds(weights, p, steps=3).values:
        assert steepest <= value, name
    rows = jacobians.abs().sum(-1).amax(0)
    assert (rows <= coordinate_bounds(weights)).all()


def test_all_pairs_would_be_unsound_in_l_inf():
    """True norm 1; the all-pairs product is 1 / M."""
    M = 5.0
    weights = [torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.0], [0.0, M]]), torch.tensor([[1.0, 0.0]])]
    assert worst_pattern(weights, math.inf, None) == 1
    found = chain_bounds(weights, math.inf)
    assert product_of_norms(weights, math.inf) * math.prod(found.alignments) == pytest.approx(1 / M)
    assert all(value >= 1 for _, value in found.values)
    assert found.best == pytest.approx(1)
    assert len(found.pairs) == 1


@some
@given(weights=chains(shortest=2))
def test_the_pairs_used_are_the_best_ones(weights):
    found = chain_bounds(weights, math.inf)
    values = dict(found.values)
    with_pairs = values["product of norms"] * math.prod(found.alignments[pair] for pair in found.pairs)
    assert values["exact norms, disjoint pairs"] == pytest.approx(with_pairs, rel=1e-9)
    assert all(b - a >= 2 for a, b in itertools.pairwise(found.pairs))


# --- their order --------------------------------------------------------------------------------------------


@some
@given(weights=chains())
def test_order_in_l_inf(weights):
    value = bounds(weights, math.inf)
    falling = ("paper form", "sharp form", "exact norms, disjoint pairs", "segments", "weighted segments")
    assert all(value[a] * SLACK >= value[b] for a, b in itertools.pairwise(falling))
    falling = ("product of norms", "chain", "path", "weighted segments")
    assert all(value[a] * SLACK >= value[b] for a, b in itertools.pairwise(falling))
    assert value["product of norms"] * SLACK >= value["exact norms, disjoint pairs"]
    assert value["path"] * SLACK >= value["segments"]
    assert value["product of norms"] == pytest.approx(product_of_norms(weights, math.inf), rel=1e-9)


@some
@given(weights=chains())
def test_the_chain_beats_the_theorem_with_simple_alignments(weights):
    """With ``A_inf`` bounded by ``|W_2| |W_1| 1``, every choice of disjoint pairs is above the chain."""
    sizes = [W.abs().numpy() for W in weights]
    norms = [float(S.sum(1).max()) for S in sizes]
    pair = [float((S2 @ S1).sum(1).max()) for S1, S2 in itertools.pairwise(sizes)]
    logs = [
        math.log(x / (a * b)) if x else -math.inf
        for x, (a, b) in zip(pair, itertools.pairwise(norms), strict=True)
        if a * b
    ]
    assume(all(norms))
    simple = math.prod(norms) * math.exp(total(best_disjoint_pairs(logs), logs))
    assert bounds(weights, math.inf)["chain"] <= simple * SLACK


@some
@given(weights=chains())
def test_order_in_l2(weights):
    value = bounds(weights, 2)
    falling = ("product of norms", "exact norms, all pairs", "ends", "exponents")
    assert all(value[a] * SLACK >= value[b] for a, b in itertools.pairwise(falling))
    assert value["paper form"] * SLACK >= value["sharp form"] >= value["exact norms, all pairs"] / SLACK
    assert value["path"] <= value["product of norms"] * SLACK
    assert value["product of norms"] == pytest.approx(product_of_norms(weights, 2), rel=1e-9)
    fewer = bounds(weights, 2, exponents=False)
    assert set(value) - set(fewer) == {"ends", "exponents"}
    assert fewer["exact norms, all pairs"] >= value["exact norms, all pairs"] / SLACK


def exact_alignments(weights):
    """``A_2^(s,t)`` of every pair by its definition, over all patterns and all s, t."""
    halves = []
    for W in weights:
        U, sigma, Vh = np.linalg.svd(W.numpy(), full_matrices=False)
        kept = sigma > 1e-12 * sigma[0]
        share = {s: (sigma[kept] / sigma[0]) ** s for s in (0, 0.5, 1)}
        halves.append({s: (U[:, kept] * x, x[:, None] * Vh[kept]) for s, x in share.items()})
    return [
        {
            (s, t): max(norm(second[t][1] * np.array(d) @ first[s][0], 2) for d in itertools.product([0, 1], repeat=h))
            for s, t in itertools.product((0, 0.5, 1), repeat=2)
        }
        for (first, second), h in zip(itertools.pairwise(halves), map(len, weights), strict=False)
    ]


@quick.__class__(quick, max_examples=15)
@given(weights=chains(shortest=2, widest=4))
def test_the_bounds_in_l2_are_theorem_3_2_with_certified_alignments(weights):
    """With exact alignments they are a little lower, in the same order, and still hold."""
    if not all(W.any() for W in weights):
        return
    found = chain_bounds(weights, 2)
    values, exact, L = dict(found.values), exact_alignments(weights), len(weights)
    assert all(up >= row[0.5, 0.5] / SLACK for up, row in zip(found.alignments, exact, strict=True))

    def product(shares):
        return math.prod(row[s, 1 - t] for row, (s, t) in zip(exact, itertools.pairwise(shares), strict=True))

    every = product_of_norms(weights, 2) * math.prod(row[0.5, 0.5] for row in exact)
    ends = product_of_norms(weights, 2) * product([1, *[0.5] * (L - 2), 0])
    shares = itertools.product((0, 0.5, 1), repeat=L - 2)
    best = product_of_norms(weights, 2) * min(product([1, *middle, 0]) for middle in shares)
    assert worst_pattern(weights, 2, np.random.default_rng(0)) <= best * SLACK
    assert best <= ends * SLACK <= every * SLACK**2
    for name, true in (("exact norms, all pairs", every), ("ends", ends), ("exponents", best)):
        assert true / SLACK <= values[name] <= true * 1.5**L


@some
@given(weights=chains(shortest=3, longest=4, kinds=("heavy tails", "power-law rows")))
def test_radii_carry_over_to_the_next_segment(weights):
    """The radii by hand, with the rows of every segment weighted by the radii of its inputs."""
    W = [layer.numpy() for layer in weights]
    radii = [np.ones(W[0].shape[1]), np.abs(W[0]).sum(1)]
    for j in range(2, len(W) + 1):
        ends = [
            np.abs(W[j - 1]) @ radii[j - 1],
            row_bounds(weights[j - 1], weights[j - 2] * torch.from_numpy(radii[j - 2])),
        ]
        for i in range(j - 1):
            product, plain = W[i], np.abs(W[i])
            for layer in W[i + 1 : j]:
                product, plain = layer @ product, np.abs(layer) @ plain
            ends.append((np.abs(product) + plain) @ radii[i] / 2)
        radii.append(np.min(ends, axis=0))
    assert (coordinate_bounds(weights).numpy() <= radii[-1] * (1 + 1e-6)).all()


@some
@given(weights=chains(shortest=2, longest=2))
def test_for_two_layers_the_ends_are_the_pair_itself(weights):
    value = bounds(weights, 2)
    assert value["ends"] == value["exponents"]
    half = (norm(weights[1] @ weights[0], 2) + product_of_norms(weights, 2)) / 2
    assert value["ends"] <= half * SLACK


@both
@some
@given(weights=chains(shortest=2), k_fraction=st.floats(0.01, 1))
def test_the_forms_are_products_of_theorem_3_1(p, weights, k_fraction):
    found = chain_bounds(weights, p, k_fraction=k_fraction)
    values = dict(found.values)
    layers = [layer_bound(W, p, math.ceil(k_fraction * (min(W.shape) if p == 2 else len(W)) - 1e-9)) for W in weights]
    assume(all(layer.norm and layer.spread < 1 - 1e-6 for layer in layers))
    theorem = values["exact norms, all pairs" if p == 2 else "exact norms, disjoint pairs"]
    for form in ("paper", "sharp"):
        looser = math.prod(layer.scale * getattr(layer, form) / layer.norm for layer in layers)
        assert values[f"{form} form"] == pytest.approx(theorem * looser, rel=1e-6)


@both
@some
@given(weights=chains(shortest=1, longest=1))
def test_one_layer_is_its_norm(p, weights):
    found = chain_bounds(weights, p, k_fraction=None)
    assert all(value == pytest.approx(norm(weights[0], p), rel=1e-9) for _, value in found.values)
    assert (found.alignments, found.pairs) == ((), ())


# --- invariances and edges ----------------------------------------------------------------------------------


@both
@some
@given(weights=chains(shortest=2), scale=st.sampled_from([1e-150, 1e-3, 0.7, 1e5, 1e120]), data=st.data())
def test_scales_come_out_and_move_between_neighbours(p, weights, scale, data):
    l = data.draw(st.integers(0, len(weights) - 2))
    before = bounds(weights, p, k_fraction=None)
    scaled = [W * scale if k == l else W for k, W in enumerate(weights)]
    moved = [W * scale if k == l else W / scale if k == l + 1 else W for k, W in enumerate(weights)]
    assert bounds(scaled, p, k_fraction=None) == pytest.approx({n: v * scale for n, v in before.items()}, rel=1e-6)
    assert bounds(moved, p, k_fraction=None) == pytest.approx(before, rel=1e-6)


@both
def test_extreme_scales_stay_bounds(p):
    W = matrix("gaussian", 4, 4, 0)
    large, small = bounds([W * 1e200, W * 1e200], p), bounds([W * 1e-200, W * 1e-200], p)
    assert all(value == math.inf for value in large.values())
    assert all(0 < value < 1e-300 for value in small.values())
    level = bounds([W * 1e200, W * 1e-200, W * 1e300, W * 1e-300], p)
    assert level == pytest.approx(bounds([W] * 4, p), rel=1e-6)


@some
@given(weights=chains(shortest=1))
def test_without_negative_weights_the_path_is_exact(weights):
    weights = [W.abs() for W in weights]
    value = bounds(weights, math.inf)
    exact = norm(torch.linalg.multi_dot(weights[::-1]) if len(weights) > 1 else weights[0], math.inf)
    for name in ("chain", "path", "segments", "weighted segments"):
        assert value[name] == pytest.approx(exact, rel=1e-9)


@both
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_zero_layer_stops_everything(p, place):
    weights = [matrix("gaussian", 3, 4, 0), matrix("gaussian", 5, 3, 1), matrix("gaussian", 2, 5, 2)]
    names = list(bounds(weights, p))
    weights[place] = torch.zeros_like(weights[place])
    found = chain_bounds(weights, p)
    assert list(dict(found.values)) == names
    assert all(value == 0 for _, value in found.values)
    assert found.alignments == (1, 1)
    assert not coordinate_bounds(weights).any()


@both
def test_layers_that_never_meet(p):
    """The second layer reads only what the first never writes: alignment 0, though no layer is zero."""
    W1, W2 = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    found = chain_bounds([W1, W2, torch.ones(1, 1)], p)
    assert found.best <= 1e-9
    if p == math.inf:
        assert dict(found.values)["exact norms, disjoint pairs"] == dict(found.values)["paper form"] == 0
        assert found.pairs == (0,)
        infinite = chain_bounds([W1, W2, torch.ones(1, 1)], p, k_fraction=1.0)  # Theorem 3.1 with a spread of 1
        assert dict(infinite.values)["paper form"] == 0


def test_margins_of_a_head():
    """Bounds of s_i - s_j: never above the sum of both, nor above the path bound of that one row."""
    weights = [matrix("gaussian", 12, 5, 0), matrix("gaussian", 8, 12, 1)]
    head = matrix("gaussian", 4, 8, 2)
    margins = torch.stack([head[i] - head[j] for i, j in itertools.permutations(range(4), 2)])
    together, alone = coordinate_bounds([*weights, margins]), coordinate_bounds([*weights, head])
    sums = torch.stack([alone[i] + alone[j] for i, j in itertools.permutations(range(4), 2)])
    assert together.shape == (12,)
    assert (together <= sums * SLACK).all()
    for row, value in zip(margins, together, strict=True):
        assert float(value) <= bounds([*weights, row[None]], math.inf)["path"] * SLACK
    assert not coordinate_bounds([*weights, torch.zeros(3, 8)]).any()


def test_zero_rows_among_others():
    weights = [matrix("gaussian", 6, 5, 0), torch.cat([matrix("gaussian", 2, 6, 1), torch.zeros(1, 6)])]
    assert coordinate_bounds(weights)[2] == 0


@both
def test_single_precision_agrees_and_weights_are_only_read(p):
    weights = [matrix("gaussian", 7, 5, 0), matrix("power-law rows", 4, 7, 1)]
    leaves = [W.float().requires_grad_() for W in weights]
    assert bounds(leaves, p) == pytest.approx(bounds(weights, p), rel=1e-4)
    assert all(W.dtype == torch.float32 and W.grad is None for W in leaves)


# --- arguments ----------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "weights: expected a sequence of one matrix or more"),
        (torch.eye(2), "weights: expected a sequence"),
        ([torch.eye(2), torch.ones(2, 3)], r"weights\[0\]: expected 3 rows, as the next layer has columns; got 2"),
        ([torch.eye(2), torch.ones(2)], r"weights\[1\]: expected a real matrix, not empty; got \(2,\)"),
        ([torch.eye(2), 3.0], r"weights\[1\]: expected a real matrix, not empty; got float"),
        ([torch.ones(0, 2)], r"weights\[0\]: expected a real matrix, not empty; got \(0, 2\)"),
        ([torch.tensor([[math.nan, math.inf]])], r"weights\[0\]: expected finite numbers; got 2 NaN or infinite"),
        ([torch.ones(2, 2, dtype=torch.complex64)], "real"),
    ],
)
def test_weights_are_checked(p, weights, message):
    with pytest.raises(InputError, match=message):
        chain_bounds(weights, p)


@pytest.mark.parametrize("p", [1, 3, math.nan])
def test_p_is_checked(p):
    with pytest.raises(InputError, match="p: expected 2 or inf"):
        chain_bounds([torch.eye(2)], p)


@both
@pytest.mark.parametrize("k_fraction", [0, -0.1, 1.1, math.nan])
def test_k_fraction_is_checked(p, k_fraction):
    with pytest.raises(InputError, match="k_fraction: expected a share above 0 and up to 1"):
        chain_bounds([torch.eye(2)], p, k_fraction=k_fraction)


@both
def test_steps_are_checked(p):
    with pytest.raises(InputError, match="steps: expected a number of at least 0; got -1"):
        chain_bounds([torch.eye(2)], p, steps=-1)
