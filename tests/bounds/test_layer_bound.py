"""Theorem 3.1 at one layer."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from brittle.bounds import layer_bound
from brittle.bounds.layer import largest_entry_factors, row_ratio_lower, row_ratio_upper
from brittle.errors import InputError
from brittle.linear.compressibility import k_term_error, spread
from helpers.matrices import matrices, matrix, quick, vectors

SLACK = 1 + 1e-8
FACTORS = ("lower", "sharp", "linear", "paper")
both = pytest.mark.parametrize("p", [2, math.inf])


def length(W, p):
    """Rows or singular values: the number of entries of the vector whose compressibility is meant."""
    return len(W) if p == math.inf else min(W.shape)


def all_k(W, p):
    return range(length(W, p) + 1)


def exact(W, p):
    return float(np.linalg.norm(W.numpy(), p))


def factors(bound):
    return [getattr(bound, name) for name in FACTORS]


def diagonal(*entries):
    return torch.diag(torch.tensor(entries, dtype=torch.float64))


# --- the theorem --------------------------------------------------------------------------------------------


@both
@quick
@given(W=matrices(zero=False))
def test_every_form_holds_and_they_are_ordered(p, W):
    norm, scale = exact(W, p), float(W.norm())
    for k in all_k(W, p):
        bound = layer_bound(W, p, k)
        assert bound.scale == pytest.approx(scale, rel=1e-12)
        assert bound.norm == pytest.approx(norm, rel=1e-11)
        assert scale * bound.lower <= norm * SLACK
        assert norm <= scale * bound.sharp * SLACK
        assert bound.sharp <= bound.linear * SLACK
        assert bound.linear <= bound.paper * SLACK
        assert p == math.inf or bound.sharp <= SLACK


@quick
@given(W=matrices(zero=False, largest=12), k_row=st.integers(0, 12), k=st.integers(0, 12))
def test_every_form_holds_for_every_k_row(W, k_row, k):
    bound = layer_bound(W, math.inf, min(k, len(W)), k_row=min(k_row, W.shape[1]))
    values = [bound.lower, exact(W, math.inf) / float(W.norm()), bound.sharp, bound.linear, bound.paper]
    assert all(a <= b * SLACK for a, b in itertools.pairwise(values))


@both
@quick
@given(W=matrices(zero=False))
def test_the_forms_are_the_formulas(p, W):
    """The table of the theory page, written out again in numpy from its own ingredients."""
    A = W.numpy()
    (m, n), d = A.shape, length(W, p)
    x = np.sort(np.abs(A).sum(1) if p == math.inf else np.linalg.svd(A, compute_uv=False))[::-1]
    for k in range(1, d + 1):
        bound = layer_bound(W, p, k)
        e, b = x[k:].sum() / x.sum(), 1 - x[k - 1] / x[0]
        S = 1 + (k - 1) * (1 - b)
        tail = min((1 - b) * (k - b) * e / (1 - e), (1 - b) ** 2 * (d - k))
        spare = max(d - k, 1)  # the tail is empty at k = d, and e is 0
        lower = 1 / math.sqrt(k - 1 + (1 - b) ** 2 + tail)
        sharp = 1 / math.sqrt(1 + (k - 1) * (1 - b) ** 2 + (e * S / (1 - e)) ** 2 / spare)
        linear = (1 - e) / S / math.sqrt((1 - e) ** 2 / k + e**2 / spare)
        paper = (1 - e) / (1 - b) * math.sqrt(d) / k if b < 1 else math.inf
        if p == math.inf:
            k_row = bound.k_row
            assert k_row == math.ceil(n * k / m - 1e-12)
            rows = np.sort(np.abs(A[np.abs(A).sum(1) > 0]), axis=1)[:, ::-1]
            errors = np.linalg.norm(rows[:, k_row:], axis=1) / np.linalg.norm(rows, axis=1)
            up, low = errors.max(), errors.min()
            assert bound.row_k_term_error == pytest.approx(up, abs=1e-12)
            flat = math.sqrt(k_row * (1 - up**2)) + math.sqrt(n - k_row) * up
            lower *= math.sqrt(1 - low**2) + low**2 * math.sqrt(k_row / (1 - low**2))
            sharp, linear = sharp * flat, (1 - e) / S * math.sqrt(m) * flat
            paper = (1 - e) / (1 - b) * (math.sqrt(m * k_row) + math.sqrt(m * n) * up) / k if b < 1 else math.inf
        assert (bound.k_term_error, bound.spread) == pytest.approx((e, b), abs=1e-9)
        if 1 - b > 1e-9:  # beyond, rounding in the spread decides
            assert factors(bound) == pytest.approx([lower, sharp, linear, paper], rel=1e-6)


@both
@quick
@given(W=matrices(zero=False))
def test_the_lower_bound_is_at_least_its_simple_form(p, W):
    for k in list(all_k(W, p))[1:]:
        bound = layer_bound(W, p, k)
        assert bound.lower * SLACK >= math.sqrt((1 - bound.k_term_error) / (k - bound.spread))


# --- the lemmas ---------------------------------------------------------------------------------------------


@quick
@given(vectors(zero=False))
def test_the_largest_entry_lies_between_its_bounds(v):
    x = v.abs()
    top, total, euclid, d = float(x.max()), float(x.sum()), float(x.norm()), len(x)
    for k in range(1, d + 1):
        error, beta = float(k_term_error(x, k)), float(spread(x, k))
        low, high = (1 - error) * total / (k - beta), (1 - error) * total / (k - (k - 1) * beta)
        assert low <= top * SLACK
        assert top <= high * SLACK
        if k == 1 or beta == 0:
            assert low == pytest.approx(high, rel=1e-12)
            assert top == pytest.approx(high, rel=1e-9)
        L, U = largest_entry_factors(k, error, beta, d)
        assert L * euclid <= top * SLACK
        assert top <= U * euclid * SLACK


@quick
@given(vectors(zero=False))
def test_the_ratio_of_a_rows_norms_lies_between_its_bounds(v):
    ratio, n = float(v.abs().sum() / v.norm()), len(v)
    for k in range(n + 1):
        error = float(k_term_error(v, k, 2))
        assert row_ratio_lower(k, error) >= 1 / SLACK
        assert row_ratio_lower(k, error) <= ratio * SLACK
        assert ratio <= row_ratio_upper(k, error, n) * SLACK
        assert row_ratio_upper(k, error, n) <= min(math.sqrt(n), math.sqrt(k) + math.sqrt(n) * error) * SLACK


@quick
@given(st.integers(2, 24), st.integers(1, 23), st.floats(0, 0.95), st.floats(0, 0.95), st.data())
def test_the_factors_rise_with_compressibility_and_spread(d, k, error, beta, data):
    """For the error up to (d - k) / d times what the spread leaves, the range in which vectors exist."""
    k = min(k, d - 1)
    beta = 0.0 if k == 1 else beta
    feasible = (d - k) * (1 - beta) / (k - beta + (d - k) * (1 - beta))
    error *= feasible
    L, U = largest_entry_factors(k, error, beta, d)
    L2, U2 = largest_entry_factors(k, error * data.draw(st.floats(0, 1)), beta, d)
    assert L2 * SLACK >= L
    assert U2 * SLACK >= U
    if k > 1:
        L3, U3 = largest_entry_factors(k, error, beta + (1 - beta) * data.draw(st.floats(0, 0.99)), d)
        assert L3 * SLACK >= L
        assert U3 * SLACK >= U


# --- invariances --------------------------------------------------------------------------------------------


@both
@quick
@given(W=matrices(zero=False), scale=st.sampled_from([-1.0, 1e-6, 3.0, 1e8]))
def test_factors_ignore_scale(p, W, scale):
    for k in all_k(W, p):
        one, other = layer_bound(W, p, k), layer_bound(scale * W, p, k)
        if one.spread < 1 - 1e-6:  # beyond, rounding in the spread decides
            assert factors(other) == pytest.approx(factors(one), rel=1e-6)
        assert (other.norm, other.scale) == pytest.approx((abs(scale) * one.norm, abs(scale) * one.scale), rel=1e-11)


@quick
@given(W=matrices(zero=False), seed=st.integers(0, 999))
def test_row_factors_ignore_permutations_and_signs(W, seed):
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], W.shape)
    other = torch.from_numpy((signs * W.numpy())[rng.permutation(len(W))][:, rng.permutation(W.shape[1])])
    for k in all_k(W, math.inf):
        one, two = dataclasses.asdict(layer_bound(W, math.inf, k)), dataclasses.asdict(layer_bound(other, math.inf, k))
        if one["spread"] < 1 - 1e-6:
            assert two == pytest.approx(one, rel=1e-8, abs=1e-12)


@quick
@given(seed=st.integers(0, 999), m=st.integers(1, 12), n=st.integers(1, 12))
def test_spectral_factors_ignore_rotations(seed, m, n):
    W = matrix("gaussian", m, n, seed)
    U, V = (scipy.stats.ortho_group.rvs(d, random_state=seed) if d > 1 else np.eye(1) for d in (m, n))
    for k in all_k(W, 2):
        one, other = layer_bound(W, 2, k), layer_bound(torch.from_numpy(U @ W.numpy() @ V), 2, k)
        assert factors(other) == pytest.approx(factors(one), rel=1e-7)


@both
def test_single_precision_agrees(p):
    W = matrix("power-law rows", 8, 6, 0)
    for k in all_k(W, p):
        assert factors(layer_bound(W.float(), p, k)) == pytest.approx(factors(layer_bound(W, p, k)), rel=1e-4)


# --- tightness ----------------------------------------------------------------------------------------------


def flat_tail(k, d, beta, tail):
    return [1.0, *[1 - beta] * (k - 1), *[tail] * (d - k)]


def full_head(k, d, beta, full):
    return [*[1.0] * (k - 1), 1 - beta if k > 1 else 1.0, *[1 - beta] * full, *[0.0] * (d - k - full)]


@pytest.mark.parametrize("k", [1, 2, 4, 6])
@pytest.mark.parametrize(("beta", "tail"), [(0.0, 0.5), (0.4, 0.1), (0.4, 0.6), (0.9, 0.0)])
def test_the_sharp_spectral_form_is_attained(k, beta, tail):
    bound = layer_bound(diagonal(*flat_tail(k, 6, beta, tail)), 2, k)
    assert bound.scale * bound.sharp == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("full", [0, 1])
def test_the_lower_spectral_form_is_attained(k, beta, full):
    bound = layer_bound(diagonal(*full_head(k, 6, beta, full)), 2, k)
    assert bound.scale * bound.lower == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_sharp_row_form_is_attained_by_flat_rows(k):
    nu = torch.tensor(flat_tail(k, 4, 0.3, 0.2), dtype=torch.float64)
    W = nu[:, None] * torch.ones(1, 5, dtype=torch.float64)
    for k_row in range(6):
        bound = layer_bound(W, math.inf, k, k_row=k_row)
        assert bound.scale * bound.sharp == pytest.approx(5, rel=1e-12)


@pytest.mark.parametrize("k", [2, 3])
def test_the_lower_row_form_is_attained_by_rows_of_one_entry(k):
    bound = layer_bound(diagonal(*full_head(k, 5, 0.3, 1)), math.inf, k, k_row=1)
    assert bound.scale * bound.lower == pytest.approx(1, rel=1e-12)


@both
def test_at_k_1_the_error_gives_the_norm(p):
    W = matrix("gaussian", 5, 7, 3)
    x = np.abs(W.numpy()).sum(1) if p == math.inf else np.linalg.svd(W.numpy(), compute_uv=False)
    assert (1 - layer_bound(W, p, 1).k_term_error) * x.sum() == pytest.approx(x.max(), rel=1e-12)


# --- edges --------------------------------------------------------------------------------------------------


@both
def test_nothing_kept_leaves_the_trivial_bounds(p):
    W = matrix("gaussian", 4, 9, 0)
    bound = layer_bound(W, p, 0)
    trivial = 3 if p == math.inf else 1
    assert (bound.k_term_error, bound.paper) == (1, math.inf)
    assert (bound.sharp, bound.linear) == pytest.approx((trivial, trivial))
    assert bound.scale * bound.lower <= exact(W, p)
    assert bound.lower > 0


@both
@pytest.mark.parametrize("k", [3, 4])
def test_beyond_the_non_zeros_only_the_paper_form_is_infinite(p, k):
    bound = layer_bound(diagonal(5.0, 2.0, 0.0, 0.0), p, k, k_row=1 if p == math.inf else None)
    assert (bound.spread, bound.k_term_error, bound.paper) == (1, 0, math.inf)
    assert math.isfinite(bound.linear)
    assert bound.scale * bound.lower <= 5 <= bound.scale * bound.sharp


@both
@pytest.mark.parametrize("k", [0, 1, 3])
def test_a_zero_matrix_has_zero_bounds(p, k):
    bound = layer_bound(torch.zeros(3, 4), p, k)
    assert (bound.norm, bound.scale) == (0, 0)
    assert all(bound.scale * (factor if math.isfinite(factor) else 0) == 0 for factor in factors(bound))
    assert not any(math.isnan(factor) for factor in factors(bound))


def test_zero_rows_are_entries_of_the_vector_but_have_no_profile():
    W = torch.tensor([[3.0, 1.0], [0.0, 0.0], [3.0, 1.0]], dtype=torch.float64)
    bound = layer_bound(W, math.inf, 1, k_row=1)
    assert bound.k_term_error == pytest.approx(0.5)
    assert bound.row_k_term_error == pytest.approx(1 / math.sqrt(10))
    without = layer_bound(W[[0, 2]], math.inf, 1, k_row=1)
    assert bound.row_k_term_error == without.row_k_term_error
    assert bound.norm == without.norm


def test_the_sharp_form_is_finite_where_the_paper_exceeds_the_trivial_one():
    W = matrix("gaussian", 12, 12, 0)
    bounds = [layer_bound(W, 2, k) for k in range(1, 13)]
    assert any(bound.paper > 1 for bound in bounds)
    assert all(bound.sharp <= 1 for bound in bounds)


@pytest.mark.parametrize("h", ["rows", "columns"])
def test_the_printed_form_with_a_single_side_is_violated(h):
    """Equation 4 is printed for h x h; with h = m or h = n it is no bound on rectangular matrices."""
    if h == "rows":
        W = torch.ones(1, 9, dtype=torch.float64)  # one flat row: norm 9 against a scale of 3
    else:
        W = torch.eye(9, 1, dtype=torch.float64) + torch.ones(9, 1, dtype=torch.float64) * 0.999
    m, n = W.shape
    bound = layer_bound(W, math.inf, 1, k_row=1)
    side = m if h == "rows" else n
    head = math.sqrt(side) * (1 + math.sqrt(side) * bound.row_k_term_error)
    printed = (1 - bound.k_term_error) / (1 - bound.spread) * head
    assert bound.scale * printed < bound.norm * 0.99
    assert bound.norm <= bound.scale * bound.paper * SLACK


# --- arguments ----------------------------------------------------------------------------------------------


def test_k_row_changes_the_row_forms():
    W = matrix("gaussian", 6, 8, 1)
    bounds = [layer_bound(W, math.inf, 2, k_row=k_row) for k_row in range(9)]
    assert [bound.k_row for bound in bounds] == list(range(9))
    assert len({bound.paper for bound in bounds[1:]}) == 8
    errors = [bound.row_k_term_error for bound in bounds]
    assert errors == sorted(errors, reverse=True)
    assert (errors[0], errors[-1]) == (1, 0)


@pytest.mark.parametrize(("k", "expected"), [(1, 2), (2, 4), (3, 6), (5, 10), (0, 0)])
def test_k_row_is_the_same_share_by_default(k, expected):
    assert layer_bound(matrix("gaussian", 5, 10, 0), math.inf, k).k_row == expected
    assert layer_bound(matrix("gaussian", 5, 7, 0), math.inf, k).k_row == math.ceil(7 * k / 5)


def test_spectral_bounds_have_no_rows():
    bound = layer_bound(matrix("gaussian", 5, 10, 0), 2, 2)
    assert (bound.p, bound.k, bound.k_row, bound.row_k_term_error) == (2, 2, None, None)


@quick
@given(W=matrices(zero=False, largest=8), groups=st.integers(1, 3))
def test_groups_are_the_blocks_of_a_block_diagonal_matrix(W, groups):
    blocks = [(shift + 1) * W.numpy() for shift in range(groups)]
    whole = torch.from_numpy(scipy.linalg.block_diag(*blocks))
    stacked = torch.from_numpy(np.concatenate(blocks))
    for k in range(groups * min(W.shape) + 1):
        grouped, dense = layer_bound(stacked, 2, k, groups=groups), layer_bound(whole, 2, k)
        assert (grouped.norm, grouped.scale) == pytest.approx((dense.norm, dense.scale), rel=1e-10)
        if dense.spread < 1 - 1e-6:
            assert factors(grouped) == pytest.approx(factors(dense), rel=1e-7)


def test_the_matrix_is_only_read():
    W = matrix("gaussian", 4, 4, 0).requires_grad_()
    before = W.detach().clone()
    assert isinstance(layer_bound(W, 2, 1).sharp, float)
    assert torch.equal(W, before)


@both
@pytest.mark.parametrize("k", [-1, 4])
def test_k_is_checked(p, k):
    with pytest.raises(InputError, match=f"k: expected an integer from 0 to 3; got {k}"):
        layer_bound(torch.ones(3, 5), p, k)


@pytest.mark.parametrize("k_row", [-1, 6])
def test_k_row_is_checked(k_row):
    with pytest.raises(InputError, match=f"from 0 to 5; got {k_row}"):
        layer_bound(torch.ones(3, 5), math.inf, 1, k_row=k_row)


@pytest.mark.parametrize("p", [1, 3, 0, math.nan, -math.inf])
def test_p_is_checked(p):
    with pytest.raises(InputError, match="p: expected 2 or inf; got"):
        layer_bound(torch.ones(3, 5), p, 1)


@both
@pytest.mark.parametrize(
    ("W", "message"),
    [
        (torch.ones(3), r"W: expected a matrix; got shape \(3,\)"),
        (torch.ones(3, 2, 1, 1), r"W: expected a matrix; got shape \(3, 2, 1, 1\)"),
        (torch.ones(0, 2), "none empty"),
        (torch.tensor([[math.nan]]), "finite"),
        (torch.ones(2, 2, dtype=torch.complex64), "real"),
    ],
)
def test_the_matrix_is_checked(p, W, message):
    with pytest.raises(InputError, match=message):
        layer_bound(W, p, 0)
