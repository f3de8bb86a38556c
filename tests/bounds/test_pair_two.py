"""The l2 constant of two layers around an activation, and the multipliers that bound it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from brittle.bounds.pairs import two as pair_two
from brittle.bounds.pairs.multipliers import LEAST_WEIGHT, closed_form, directions, eliminate, improve
from brittle.bounds.pairs.two import (
    branch_and_bound,
    exact,
    factors,
    lower,
    upper,
    upper_of_compressed,
)
from brittle.errors import InputError
from brittle.linear.spectrum import ritz
from helpers.matrices import KINDS, matrix, quick

SLACK = 1 + 1e-7
POWERS = (0, 0.5, 1)
SLOPES = [(0.0, 1.0), (0.1, 1.0), (-0.13, 1.13), (-0.5, 1.5), (0.0, 0.25), (-1.0, 1.0), (0.4, 0.4), (-2.0, -0.5)]


def pair(kind2, kind1, m, h, n, seed):
    """Two matrices that fit; kinds of a single row or column have fewer inner units."""
    B, C = matrix(kind2, m, h, seed), matrix(kind1, h, n, seed + 1)
    h = min(B.shape[1], len(C))
    return B[:, :h], C[:h]


def pairs(h=7, side=7):
    kind, size = st.sampled_from(list(KINDS)), st.integers(1, side)
    return st.builds(pair, kind, kind, size, st.integers(1, h), size, st.integers(0, 2**32 - 2))


def spectral(A):
    return np.linalg.svd(A, compute_uv=False)[..., 0]


def brute_force(B, C, slopes=(0.0, 1.0)):
    B, C = B.numpy(), C.numpy()
    h = B.shape[1]
    best = 0.0
    for start in range(0, 2**h, 4096):
        bits = np.arange(start, min(start + 4096, 2**h))[:, None] >> np.arange(h) & 1
        best = max(best, spectral((B * np.array(slopes)[bits][:, None]) @ C).max())
    return float(best)


def product(B, C):
    return float(spectral(B.numpy()) * spectral(C.numpy()))


def least(*pair, **options):
    return min(upper(*pair, **options).values())


def half_bound(B, C, slopes=(0.0, 1.0), w=None):
    """The formula itself, in numpy, with the units weighted by w."""
    w = np.ones(B.shape[1]) if w is None else w.numpy()
    B, C = B.numpy(), C.numpy()
    product = spectral(B / np.sqrt(w)) * spectral(np.sqrt(w)[:, None] * C)
    return float(abs(sum(slopes)) / 2 * spectral(B @ C) + (slopes[1] - slopes[0]) / 2 * product)


def multiplier_bound(B, C, t, slopes=(0.0, 1.0)):
    """What the elimination with these multipliers bounds; inf where they are not feasible."""
    R = eliminate(B.mT @ B, t, slopes)
    if R is None:
        return math.inf
    form = (C.mT @ R @ C).numpy()
    return float(np.sqrt(max(np.linalg.eigvalsh((form + form.T) / 2)[-1], 0) * (1 + 1e-12 * max(C.shape))))


def feasible(P, seed, surplus):
    """Random multipliers, scaled so that they dominate half of P by the given share."""
    t = torch.from_numpy(10 ** np.random.default_rng(seed).uniform(-2, 2, P.shape[-1]))
    S = t.rsqrt()[:, None] * P * t.rsqrt()
    return t * max(float(torch.linalg.eigvalsh(S).amax()) / 2 * (1 + surplus), 1e-9)


# --- lower, exact, upper ------------------------------------------------------------------------------------


@quick
@given(pairs())
def test_the_bounds_sandwich_the_exact_value(matrices):
    B, C = matrices
    value = exact(B, C)
    assert value == pytest.approx(brute_force(B, C), rel=1e-9)
    assert lower(B, C) <= value * SLACK
    assert all(value <= bound * (1 + 1e-12) for bound in upper(B, C, steps=5).values())
    assert least(B, C) <= half_bound(B, C) * SLACK <= product(B, C) * SLACK**2
    assert least(B, C, steps=5) <= least(B, C)


@pytest.mark.parametrize("slopes", SLOPES)
@given(matrices=pairs(h=5, side=5), seed=st.integers(0, 99))
@quick
def test_the_bounds_hold_for_general_slopes(slopes, matrices, seed):
    B, C = matrices
    value = brute_force(B, C, slopes)
    assert exact(B, C, slopes=slopes) == pytest.approx(value, rel=1e-9)
    assert lower(B, C, slopes=slopes, starts=2) <= value * SLACK
    bounds = upper(B, C, slopes=slopes, steps=3)
    assert value <= min(bounds.values()) * (1 + 1e-12)
    assert bounds["half"] <= max(abs(s) for s in slopes) * product(B, C) * SLACK
    w = torch.from_numpy(np.random.default_rng(seed).uniform(0.1, 10, B.shape[1]))
    assert value <= half_bound(B, C, slopes, w) * (1 + 1e-9)
    assert value <= multiplier_bound(B, C, feasible(B.mT @ B, seed, 0.3), slopes) * (1 + 1e-12)


@quick
@given(pairs(), st.integers(0, 999))
def test_patterns_between_the_vertices_never_exceed_the_exact_value(matrices, seed):
    B, C = matrices
    d = np.random.default_rng(seed).uniform(0, 1, (50, 1, B.shape[1]))
    assert spectral((B.numpy() * d) @ C.numpy()).max() <= exact(B, C) * SLACK


@quick
@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 8), st.integers(1, 6))
def test_a_pair_of_rank_one_is_exact_by_entries(seed, m, h, n):
    B = matrix("column", m, 1, seed) @ matrix("row", 1, h, seed + 1)
    C = matrix("column", h, 1, seed + 2) @ matrix("row", 1, n, seed + 3)
    bound = upper(B, C).get("entry", 0.0)  # no unit may be alive
    assert bound == pytest.approx(brute_force(B, C), rel=1e-9)


@quick
@given(pairs(h=9), st.sampled_from(SLOPES))
def test_branch_and_bound_agrees_with_enumeration(matrices, slopes):
    B, C = matrices
    assert branch_and_bound(B, C, slopes=slopes) == pytest.approx(brute_force(B, C, slopes), rel=1e-6)


@pytest.mark.parametrize("kind", ["gaussian", "ties", "power-law rows"])
def test_beyond_enumeration_the_exact_value_is_searched(kind):
    B, C = pair(kind, kind, 4, 16, 5, 0)
    assert exact(B, C) == pytest.approx(brute_force(B, C), rel=1e-6)


def test_the_search_gives_up_after_its_nodes():
    B, C = pair("gaussian", "gaussian", 30, 80, 30, 0)
    assert exact(B, C, most_nodes=200) is None
    assert branch_and_bound(B, C, most_nodes=200) is None


def test_the_lower_bound_is_usually_attained():
    ratios = []
    for seed in range(30):
        B, C = pair("gaussian", "gaussian", 6, 10, 6, seed)
        ratios.append(lower(B, C) / exact(B, C))
    assert np.median(ratios) > 0.999
    assert min(ratios) > 0.9


# --- multipliers --------------------------------------------------------------------------------------------


@quick
@given(pairs(), st.integers(0, 999), st.sampled_from([1e-6, 1e-3, 0.3, 3.0]))
def test_every_feasible_multiplier_bounds_and_no_other_does(matrices, seed, surplus):
    B, C = matrices
    P = B.mT @ B
    t = feasible(P, seed, surplus)
    assert brute_force(B, C) <= multiplier_bound(B, C, t) * (1 + 1e-12)
    if B.any() and C.any():
        assert math.isinf(multiplier_bound(B, C, t / (1 + surplus) * 0.999))


@quick
@given(pairs())
def test_equal_multipliers_give_at_most_the_product(matrices):
    B, C = matrices
    assume(B.any())
    t = torch.full((B.shape[1],), float(spectral(B.numpy())) ** 2, dtype=torch.float64)
    assert multiplier_bound(B, C, t) <= product(B, C) * SLACK


@quick
@given(pairs(), st.integers(0, 999))
def test_multipliers_are_never_worse_than_the_scaled_half_bound(matrices, seed):
    B, C = matrices
    assume(B.any() and C.any())
    w = torch.from_numpy(10 ** np.random.default_rng(seed).uniform(-1, 1, B.shape[1]))
    w = w * float(torch.linalg.matrix_norm(B * w.rsqrt(), 2)) ** 2
    share = float(torch.linalg.matrix_norm(B @ C, 2) / torch.linalg.matrix_norm(w.sqrt()[:, None] * C, 2))
    t = (1 + min(1.0, share)) / 2 * w
    assume(share > 1e-6)  # at a share of 0 the multipliers are on the border
    assert multiplier_bound(B, C, t) <= half_bound(B, C, w=w) * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("slopes", SLOPES)
@pytest.mark.parametrize("surplus", [1e-7, 1e-3, 1.0])
def test_the_elimination_is_a_loewner_bound_for_batches(dtype, slopes, surplus):
    generator = torch.Generator().manual_seed(0)
    for h in (1, 3, 8, 40):
        A = torch.randn(2, 3, h, max(1, h // 2), generator=generator, dtype=dtype)
        P = A @ A.mH
        t = feasible(P, h, surplus)
        R = eliminate(P, t, slopes)
        assert R is not None
        assert R.shape == P.shape
        assert torch.allclose(R, R.mH, rtol=1e-12)
        for _ in range(10):
            d = slopes[0] + (slopes[1] - slopes[0]) * torch.rand(h, generator=generator, dtype=torch.float64).round()
            assert torch.linalg.eigvalsh(R - d[:, None] * P * d).min() >= 0
        assert eliminate(P, t / (1 + surplus) * 0.999, slopes) is None


def test_one_infeasible_entry_spoils_the_batch():
    P = torch.stack([torch.eye(3), 3 * torch.eye(3)]).double()
    ones = torch.ones(3, dtype=torch.float64)
    assert eliminate(P, ones) is None
    assert eliminate(P[:1], ones) is not None
    R = eliminate(P, 2 * ones)
    assert R is not None
    assert torch.allclose(R, torch.diag_embed(torch.tensor([[4 / 3] * 3, [4.0] * 3], dtype=torch.float64)), rtol=1e-8)


def test_directions():
    b, c = torch.tensor([2.0, 4.0, 0.0]).double(), torch.tensor([1.0, 0.5, 1.0]).double()
    expected = [
        [0.25, 1, LEAST_WEIGHT],
        [0.5, 1, math.sqrt(LEAST_WEIGHT / 2)],
        [1, 1, 1],
        [0.25, 1, LEAST_WEIGHT],
        [0.5, 1, LEAST_WEIGHT],
    ]
    for w, values in zip(directions(b, c), expected, strict=True):
        assert w.tolist() == pytest.approx(values, rel=1)
        assert w[:2].tolist() == pytest.approx(values[:2])
    assert all(torch.equal(w, torch.ones(2)) for w in directions(torch.zeros(2), torch.zeros(2)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_closed_form_serves_batches_and_is_improved(dtype):
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(4, 20, 12, generator=generator, dtype=dtype) * torch.arange(1.0, 13)
    C = torch.randn(4, 12, 30, generator=generator, dtype=dtype)
    P = A.mH @ A

    def objective(t):
        R = eliminate(P, t)
        assert R is not None
        return float(torch.linalg.eigvalsh(C.mH @ R @ C).max())

    t = closed_form(P, C)
    assert t.shape == (12,)
    assert t.dtype == torch.float64
    bare = float((torch.linalg.matrix_norm(A, 2) * torch.linalg.matrix_norm(C, 2)).max()) ** 2
    assert objective(improve(P, C, t, 40)) < objective(t) * 0.98 < bare


def test_the_slope_of_the_objective_is_the_one_that_is_descended():
    """One step of the smallest size must lower the objective at first order as finite differences say it can."""
    B, C = pair("gaussian", "gaussian", 8, 6, 7, 3)
    P = B.mT @ B
    t = closed_form(P, C, (-0.2, 1.0))

    def objective(log_t):
        R = eliminate(P, log_t.exp(), (-0.2, 1.0))
        assert R is not None
        return float(torch.linalg.eigvalsh(C.mT @ R @ C)[-1].log())

    slopes = []
    for e in torch.eye(6, dtype=torch.float64) * 1e-5:
        slopes.append((objective(t.log() + e) - objective(t.log() - e)) / 2e-5)
    moved = improve(P, C, t, 2, (-0.2, 1.0), rate=1e-4).log() - t.log()
    assert torch.equal(moved.sign(), -torch.tensor(slopes).sign())


@quick
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 8), st.integers(0, 99))
def test_ritz_values_never_exceed_the_eigenvalues(n, p, rounds, seed):
    A = matrix("rank deficient", n, n, seed)
    A = A @ A.mT
    values, vectors = ritz(lambda X: A @ X, matrix("gaussian", n, min(n, p), seed), rounds)
    true = torch.linalg.eigvalsh(A).flip(-1)[: len(values)]
    assert (values <= true + 1e-9 * true[0]).all()
    assert torch.allclose(vectors.mT @ vectors, torch.eye(len(values)).double(), atol=1e-9)
    if n <= p * rounds:
        assert torch.allclose(values, true, atol=1e-9 * float(true[0]))


# --- alignments ---------------------------------------------------------------------------------------------


@quick
@given(pairs(h=6, side=6), st.sampled_from([-3.0, 1e-6, 1e8]))
def test_alignments_lie_in_order_and_ignore_scale(matrices, scale):
    W2, W1 = matrices
    if not (W2.any() and W1.any()):
        return
    A = {(s, t): exact(*factors(W2, W1, s, t)) for s in POWERS for t in POWERS}
    assert all(-1e-12 <= value <= SLACK for value in A.values())
    assert A[1, 1] <= A[0.5, 0.5] * SLACK <= A[0, 0] * SLACK**2
    assert A[1, 1] == pytest.approx(brute_force(W2, W1) / product(W2, W1), abs=1e-9)
    for s, t in A:
        assert all(A[other, t] <= A[s, t] * SLACK for other in POWERS if other >= s)
        assert all(A[s, other] <= A[s, t] * SLACK for other in POWERS if other >= t)
        B, C = factors(W2, W1, s, t)
        assert spectral(B.numpy()) == pytest.approx(1)
        assert spectral(C.numpy()) == pytest.approx(1)
        assert A[s, t] <= least(B, C) * (1 + 1e-12) <= SLACK
    assert exact(*factors(scale * W2, W1, 0.5, 1)) == pytest.approx(A[0.5, 1], rel=1e-6, abs=1e-9)
    assert least(scale * W2, W1) == pytest.approx(abs(scale) * least(W2, W1), rel=1e-6)


def test_factors_are_the_powers_of_the_singular_values():
    W2, W1 = pair("gaussian", "rank deficient", 5, 6, 7, 0)
    for s in POWERS:
        for t in POWERS:
            B, C = factors(W2, W1, s, t)
            for A, W, power in ((B, W2, t), (C, W1, s)):
                sigma = np.linalg.svd(W.numpy(), compute_uv=False)
                sigma = sigma[sigma > 1e-12 * sigma[0]]
                values = np.linalg.svd(A.numpy(), compute_uv=False)[: len(sigma)]
                assert values == pytest.approx((sigma / sigma[0]) ** power)
    projector = factors(W2, W1, 0, 0)[1]
    assert torch.allclose(projector @ projector.mT @ W1, W1)


@quick
@given(pairs(h=6, side=6))
def test_compressed_forms_bound_the_alignment(matrices):
    W2, W1 = matrices
    if not (W2.any() and W1.any()):
        assert upper_of_compressed(W2, W1, 1, 1) == (1, 1)
        return
    value = exact(*factors(W2, W1, 0.5, 0.5))
    most2, most1 = min(W2.shape), min(W1.shape)
    for k2 in range(most2 + 1):
        for k1 in {0, 1, most1 // 2, most1}:
            remainder, block = upper_of_compressed(W2, W1, k2, k1)
            assert value * (1 - 1e-9) <= block <= remainder * SLACK
            assert remainder <= 1
    full = upper_of_compressed(W2, W1, most2, most1)
    assert full[0] == pytest.approx(min(1, least(*factors(W2, W1, 0.5, 0.5))), rel=1e-5)
    assert full[1] == pytest.approx(full[0])


def test_the_remainder_is_that_of_the_first_singular_value_cut():
    W2 = torch.diag(torch.tensor([4.0, 1.0, 0.25]))
    W1 = torch.diag(torch.tensor([9.0, 1.0, 0.01])).flip(0)  # the largest do not meet: A_kk is 0
    a, b = 1 / 3, 1 / 2
    remainder, block = upper_of_compressed(W2, W1, 1, 1)
    assert remainder == pytest.approx(a + b + a * b)
    assert block == pytest.approx(float(np.linalg.norm([[0, a], [b, a * b]], 2)))
    assert upper_of_compressed(W2, W1, 3, 3)[0] == pytest.approx(exact(*factors(W2, W1, 0.5, 0.5)), rel=1e-3)


# --- sizes and edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "closed", "gap"), [("gaussian", 0.92, 1.05), ("power-law rows", 0.6, 1.05)])
def test_wide_layers_come_close_to_their_lower_bound(kind, closed, gap):
    W2, W1 = matrix(kind, 200, 200, 0), matrix(kind, 200, 200, 1)
    bounds = upper(W2, W1, steps=100)
    assert set(bounds) == {"half", "entry", "scaled half", "multipliers", "optimised multipliers"}
    assert bounds["multipliers"] < closed * bounds["half"]
    assert bounds["optimised multipliers"] < 0.99 * bounds["multipliers"]
    assert lower(W2, W1) <= min(bounds.values()) < gap * lower(W2, W1)


def test_large_layers_get_the_bounds_that_pay():
    W2, W1 = matrix("gaussian", 20, 600, 0), matrix("gaussian", 600, 700, 1)
    bounds = upper(W2, W1)
    assert set(bounds) == {"half", "multipliers"}
    assert lower(W2, W1, starts=1) < bounds["multipliers"] < bounds["half"]


def test_sides_above_the_inner_width_change_nothing():
    B, C = pair("gaussian", "gaussian", 40, 5, 60, 0)
    assert exact(B, C) == pytest.approx(brute_force(B, C), rel=1e-9)
    assert upper(B, C)["half"] == pytest.approx(half_bound(B, C), rel=1e-9)


def test_units_without_a_partner_are_dropped():
    B, C = pair("gaussian", "gaussian", 4, 6, 5, 0)
    B[:, 1], C[3] = 0, 0
    alive = [0, 2, 4, 5]
    assert upper(B, C) == pytest.approx(upper(B[:, alive], C[alive]), rel=1e-9)
    assert exact(B, C) == pytest.approx(brute_force(B, C), rel=1e-9)
    B[:, alive] = 0
    assert (least(B, C), lower(B, C), exact(B, C)) == (0, 0, 0)


@pytest.mark.parametrize("slopes", SLOPES)
def test_one_unit_is_the_product(slopes):
    B, C = pair("gaussian", "gaussian", 3, 1, 4, 0)
    value = max(abs(s) for s in slopes) * product(B, C)
    bounds = upper(B, C, slopes=slopes, steps=10)
    for found in (exact(B, C, slopes=slopes), lower(B, C, slopes=slopes), min(bounds.values())):
        assert found == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("zero", ["B", "C", "both"])
def test_zero_matrices_have_bounds_of_zero(zero):
    B, C = pair("gaussian", "gaussian", 3, 4, 5, 0)
    B, C = B * (zero == "C"), C * (zero == "B")
    assert set(upper(B, C, steps=3).values()) == {0}
    assert (lower(B, C), exact(B, C)) == (0, 0)
    assert branch_and_bound(B, C) == 0
    assert upper_of_compressed(B, C, 1, 1) == (1, 1)


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_extreme_scales_keep_their_digits(scale):
    B, C = pair("gaussian", "gaussian", 5, 6, 4, 0)
    assert upper(scale * B, C / scale, steps=3) == pytest.approx(upper(B, C, steps=3), rel=1e-6)


def test_single_precision_is_raised_to_double_and_only_read():
    B, C = pair("gaussian", "gaussian", 5, 6, 4, 0)
    single = B.float().requires_grad_()
    assert all(isinstance(bound, float) for bound in upper(single, C.float(), steps=2).values())
    assert upper(single, C) == pytest.approx(upper(B, C), rel=1e-5)
    assert torch.equal(single, B.float())


FUNCTIONS = [upper, exact, branch_and_bound, lower]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("B", "C", "message"),
    [
        (torch.ones(3), torch.ones(3, 2), r"B: expected a real matrix, not empty; got \(3,\)"),
        (torch.ones(0, 3), torch.ones(3, 2), "B: expected a real matrix, not empty"),
        (torch.ones(2, 3), torch.ones(3, 2) * 1j, "C: expected a real matrix"),
        (torch.ones(2, 3), torch.full((3, 2), math.nan), "C: expected finite numbers"),
        (torch.full((2, 3), math.inf), torch.ones(3, 2), "B: expected finite numbers"),
        (torch.ones(2, 3), torch.ones(4, 2), r"C: expected 3 rows, as the next layer has columns; got 4"),
    ],
)
def test_the_matrices_are_checked(function, B, C, message):
    with pytest.raises(InputError, match=message):
        function(B, C)


@pytest.mark.parametrize("slopes", [(1.0, 0.0), (0.0, math.inf), (math.nan, 1.0)])
def test_the_slopes_are_checked(slopes):
    with pytest.raises(InputError, match="slopes: expected"):
        upper(torch.ones(2, 3), torch.ones(3, 2), slopes=slopes)


def test_powers_and_ranks_are_checked():
    W2, W1 = torch.ones(2, 3), torch.ones(3, 2)
    with pytest.raises(InputError, match=r"s: expected 0, 0.5 or 1; got 0.3"):
        factors(W2, W1, 0.3, 1)
    with pytest.raises(InputError, match=r"t: expected 0, 0.5 or 1; got 2"):
        factors(W2, W1, 1, 2)
    with pytest.raises(InputError, match="W1: expected a matrix that is not zero"):
        factors(W2, 0 * W1, 1, 1)
    with pytest.raises(InputError, match="k2: expected an integer from 0 to 2; got 3"):
        upper_of_compressed(W2, W1, 3, 1)
    with pytest.raises(InputError, match="k1: expected an integer from 0 to 2; got -1"):
        upper_of_compressed(W2, W1, 1, -1)


def test_infeasible_multipliers_are_never_repaired(monkeypatch):
    monkeypatch.setattr(pair_two, "closed_form", lambda P, C, slopes: torch.full((P.shape[-1],), 1e-9).double())
    bounds = upper(*pair("gaussian", "gaussian", 4, 5, 6, 0))
    assert math.isinf(bounds["multipliers"])
    assert math.isfinite(min(bounds.values()))
