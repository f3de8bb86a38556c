"""Compressibility: best-k-term errors, spread, ranks."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from brittle.errors import InputError
from brittle.linear.compressibility import (
    RANK_TOLERANCE,
    effective_rank,
    effective_sparsity,
    k_term_error,
    k_term_error_curve,
    keep_rows,
    nuclear_frobenius_ratio,
    nuclear_spectral_ratio,
    row_norms,
    singular_values,
    smallest_k,
    spectral_summary,
    spread,
    stable_rank,
    truncate_spectrum,
)
from helpers.matrices import matrices, quick, vectors

EXPONENTS = [1.0, 1.5, 2.0, math.inf]
exponents = st.sampled_from(EXPONENTS)
NAN = torch.tensor([1.0, math.nan])


def close(actual, expected, rtol=1e-9, atol=1e-12):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=atol, equal_nan=False)


def best_error(v, k, q):
    """Definition 2.1 word for word: the least error over all choices of k entries."""
    d, v = len(v), np.asarray(v)
    errors = [np.linalg.norm(np.delete(v, kept), q) if k < d else 0.0 for kept in itertools.combinations(range(d), k)]
    whole = np.linalg.norm(v, q)
    return min(errors) / whole if whole else 0.0


# --- k-term error -------------------------------------------------------------------------------------------


@quick
@given(vectors(largest=7), exponents)
def test_the_error_is_the_least_over_all_choices_of_entries(v, q):
    for k in range(len(v) + 1):
        close(k_term_error(v, k, q), best_error(v, k, q))


@quick
@given(vectors(), exponents)
def test_the_curve_falls_from_one_to_zero(v, q):
    curve = k_term_error_curve(v, q)
    assert curve.shape == (len(v) + 1,)
    assert curve[0] == float(bool(v.any()))
    assert curve[-1] == 0
    assert (curve.diff() <= 0).all()
    d = len(v)
    ceiling = torch.tensor([((d - k) / d) ** (1 / q) for k in range(d + 1)], dtype=torch.float64)
    assert (curve <= ceiling + 1e-12).all()
    close(torch.stack([k_term_error(v, k, q) for k in range(d + 1)]), curve, rtol=0, atol=0)


@quick
@given(vectors(), exponents, st.floats(1e-30, 1e30), st.randoms(use_true_random=False))
def test_the_error_ignores_scale_order_and_signs(v, q, scale, random):
    order = random.sample(range(len(v)), len(v))
    signs = torch.tensor([random.choice([-1.0, 1.0]) for _ in order], dtype=torch.float64)
    close(k_term_error_curve(scale * signs * v[order], q), k_term_error_curve(v, q))


@pytest.mark.parametrize("q", EXPONENTS)
@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1e300])
def test_extreme_scales_neither_overflow_nor_underflow(q, scale):
    v = torch.tensor([4.0, -2.0, 1.0, 0.0], dtype=torch.float64)
    close(k_term_error_curve(scale * v, q), k_term_error_curve(v, q), rtol=1e-3)


def test_small_tails_keep_their_digits():
    v = torch.tensor([1.0, 1e-12, 2e-12], dtype=torch.float64)
    close(k_term_error(v, 1), 3e-12 / (1 + 3e-12), rtol=1e-14, atol=0)
    close(k_term_error(v, 1, 2), math.sqrt(5) * 1e-12, rtol=1e-12, atol=0)


@pytest.mark.parametrize("q", EXPONENTS)
def test_ties_do_not_matter(q):
    v = torch.tensor([2.0, -2.0, 2.0, 1.0, -1.0], dtype=torch.float64)
    for k in range(6):
        close(k_term_error(v, k, q), best_error(v, k, q))


@quick
@given(vectors(zero=False))
def test_the_head_carries_the_share_that_the_error_leaves(v):
    falling = np.sort(v.abs().numpy())[::-1]
    for k in range(len(v) + 1):
        close(falling[:k].sum(), (1 - k_term_error(v, k)) * falling.sum())


@pytest.mark.parametrize("function", [lambda v: k_term_error_curve(v, 2), lambda v: spread(v, 3), effective_sparsity])
def test_a_batch_is_many_vectors(function):
    V = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    V[1, 2] = 0
    looped = torch.stack([torch.stack([function(v) for v in row]) for row in V])
    close(function(V), looped)


@quick
@given(vectors(), exponents)
def test_single_precision_agrees(v, q):
    single = k_term_error_curve(v.float(), q)
    assert single.dtype == torch.float32
    close(single, k_term_error_curve(v, q), rtol=1e-4, atol=1e-6)


def test_integers_are_numbers():
    assert k_term_error(torch.tensor([3, 0, -1]), 1) == 0.25


# --- smallest k ---------------------------------------------------------------------------------------------


@quick
@given(vectors(), exponents, st.floats(0, 1.2))
def test_smallest_k_reaches_the_target_and_one_less_fails(v, q, target):
    k = int(smallest_k(v, target, q))
    assert k_term_error(v, k, q) <= target
    assert k == 0 or k_term_error(v, k - 1, q) > target


@quick
@given(vectors(), exponents)
def test_smallest_k_inverts_the_error(v, q):
    for k in range(len(v) + 1):
        assert smallest_k(v, float(k_term_error(v, k, q)), q) <= k
    assert smallest_k(v, 0.0, q) == np.count_nonzero(v.numpy())
    assert smallest_k(v, 1.0, q) == 0


def test_smallest_k_takes_batches():
    assert smallest_k(torch.tensor([[3.0, 0.0, -1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]), 0.25).tolist() == [1, 3, 0]


# --- spread -------------------------------------------------------------------------------------------------


@quick
@given(vectors())
def test_spread_is_the_fall_to_the_kth_entry(v):
    falling = np.sort(v.abs().numpy())[::-1]
    betas = torch.stack([spread(v, k) for k in range(1, len(v) + 1)])
    close(betas, 1 - falling / falling[0] if falling[0] else 0 * falling)
    assert betas[0] == 0
    assert ((betas >= 0) & (betas <= 1)).all()
    assert (betas.diff() >= 0).all()
    assert math.isnan(spread(v, 0))


def test_spread_is_one_exactly_beyond_the_non_zeros():
    v = torch.tensor([4.0, 0.0, -1e-9], dtype=torch.float64)
    assert [bool(spread(v, k) == 1) for k in (1, 2, 3)] == [False, False, True]
    assert spread(torch.zeros(3), 2) == 0


# --- gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", EXPONENTS)
@pytest.mark.parametrize("k", [0, 1, 3, 5])
def test_gradients_are_right_away_from_ties(q, k):
    v = torch.tensor([0.7, -2.0, 1.1, -0.3, 0.05], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: k_term_error(v, k, q), v)


@pytest.mark.parametrize("q", EXPONENTS)
@pytest.mark.parametrize("values", [[3.0, 0.0, -1.0, 0.0], [2.0, 0.0, 0.0, 0.0], [0.0] * 4, [1.0, -1.0, 1.0, 1.0]])
def test_gradients_are_finite_everywhere(q, values):
    for k in range(5):
        v = torch.tensor(values, requires_grad=True)
        k_term_error(v, k, q).backward()
        assert torch.isfinite(v.grad).all()


@pytest.mark.parametrize("function", [stable_rank, nuclear_spectral_ratio, nuclear_frobenius_ratio, effective_rank])
def test_ranks_have_the_right_gradients(function):
    W = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(function, W)


def test_spread_and_sparsity_have_the_right_gradients():
    v = torch.tensor([0.7, -2.0, 1.1, -0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: spread(v, 3), v)
    assert torch.autograd.gradcheck(effective_sparsity, v)
    zero = torch.zeros(3, requires_grad=True)
    (spread(zero, 2) + effective_sparsity(zero)).backward()
    assert torch.isfinite(zero.grad).all()


# --- matrices -----------------------------------------------------------------------------------------------


@quick
@given(matrices())
def test_row_norms_and_singular_values_are_numpys(W):
    close(row_norms(W), np.abs(W.numpy()).sum(1))
    sigma = np.linalg.svd(W.numpy(), compute_uv=False)
    close(singular_values(W), sigma, atol=1e-12 * max(1, sigma[0]))


@quick
@given(matrices(largest=8), st.integers(1, 4))
def test_groups_are_the_blocks_of_a_block_diagonal_matrix(W, groups):
    blocks = [np.roll(W.numpy(), shift) + shift for shift in range(groups)]
    sigma = np.linalg.svd(scipy.linalg.block_diag(*blocks), compute_uv=False)
    close(singular_values(torch.from_numpy(np.concatenate(blocks)), groups), sigma, atol=1e-12 * max(1, sigma[0]))


@pytest.mark.parametrize("shape", [(2, 9), (9, 2), (3, 3), (1, 5), (5, 1)])
def test_singular_values_take_batches(shape):
    W = torch.randn(2, 3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    close(singular_values(W), np.linalg.svd(W.numpy(), compute_uv=False))


@quick
@given(matrices())
def test_row_compression_leaves_the_next_row_norm(W):
    nu = np.sort(np.abs(W.numpy()).sum(1))[::-1]
    for k in range(len(nu) + 1):
        kept = keep_rows(W, k)
        unchanged, zero = (kept == W).all(1), (kept == 0).all(1)
        assert (unchanged | zero).all()
        assert int((~zero).sum()) <= k
        close(np.abs((W - kept).numpy()).sum(1).max(), nu[k] if k < len(nu) else 0)


def test_row_ties_keep_the_first():
    W = torch.tensor([[1.0, 1.0], [0.0, -2.0], [3.0, 0.0], [2.0, 0.0]])
    assert keep_rows(W, 2).tolist() == [[1, 1], [0, 0], [3, 0], [0, 0]]


@quick
@given(matrices(zero=False))
def test_spectral_compression_leaves_the_next_singular_value_and_the_nuclear_tail(W):
    sigma = np.linalg.svd(W.numpy(), compute_uv=False)
    for k in {0, 1, len(sigma) // 2, len(sigma)}:
        kept = truncate_spectrum(W, k).numpy()
        assert np.linalg.matrix_rank(kept, tol=1e-9 * sigma[0]) <= k
        rest = W.numpy() - kept
        close(np.linalg.norm(rest, 2), sigma[k] if k < len(sigma) else 0, atol=1e-11 * sigma[0])
        share = np.linalg.norm(rest, "nuc") / sigma.sum()
        close(k_term_error(singular_values(W), k), share, atol=1e-11)


# --- ranks --------------------------------------------------------------------------------------------------


@quick
@given(matrices(zero=False))
def test_ranks_are_ordered(W):
    ranks = [float(rank) for rank in spectral_summary(singular_values(W))]
    assert ranks[0] >= 1 - 1e-9
    assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(ranks))
    assert ranks[-1] == np.linalg.matrix_rank(W.numpy(), tol=RANK_TOLERANCE * np.linalg.norm(W.numpy(), 2))


@quick
@given(matrices(zero=False))
def test_ranks_are_their_definitions(W):
    A = W.numpy()
    frobenius, spectral, nuclear = (np.linalg.norm(A, kind) for kind in ("fro", 2, "nuc"))
    p = np.linalg.svd(A, compute_uv=False) / nuclear
    close(stable_rank(W), (frobenius / spectral) ** 2)
    close(nuclear_spectral_ratio(W), nuclear / spectral)
    close(nuclear_frobenius_ratio(W), (nuclear / frobenius) ** 2)
    close(effective_rank(W), np.prod(np.where(p > 0, p, 1) ** -p))
    close(effective_sparsity(W.flatten()), (np.abs(A).sum() / frobenius) ** 2)
    assert 1 - 1e-9 <= effective_sparsity(W.flatten()) <= np.count_nonzero(A) * (1 + 1e-9)


@quick
@given(matrices(zero=False), st.sampled_from([-3.0, 1e-150, 1e150]))
def test_ranks_ignore_scale(W, scale):
    before, after = (spectral_summary(singular_values(A)) for A in (W, scale * W))
    for rank, same in zip(before, after, strict=True):
        close(same, rank, rtol=1e-8)


@pytest.mark.parametrize(
    ("diagonal", "expected"),
    [
        ([1.0] * 5, 5.0),
        ([7.0, 0.0, 0.0], 1.0),
        ([2.0, 1.0, 1.0], 2 * math.sqrt(2)),
        ([3.0, 1.0], 4 / 3**0.75),
    ],
)
def test_effective_rank_in_closed_form(diagonal, expected):
    W = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    close(effective_rank(W), expected)


@pytest.mark.parametrize(("d", "equal"), [(4, True), (4, False)])
def test_ranks_meet_the_rank_only_for_equal_singular_values(d, equal):
    sigma = torch.full((d,), 2.0, dtype=torch.float64)
    if not equal:
        sigma[-1] = 1.9
    ranks = [float(rank) for rank in spectral_summary(sigma)]
    assert all((rank == pytest.approx(d, abs=1e-9)) is equal for rank in ranks[:-1])


def test_ranks_of_nothing_are_zero():
    assert [float(rank) for rank in spectral_summary(torch.zeros(3))] == [0.0] * 5
    assert effective_sparsity(torch.zeros(3)) == 0


@quick
@given(vectors(zero=False))
def test_error_and_spread_frame_the_nuclear_ratio(v):
    """With S = k - (k-1) beta: S / (1 - error) <= sum / max <= (k - beta) / (1 - error)."""
    ratio = float(v.abs().sum() / v.abs().max())
    for k in range(1, len(v) + 1):
        error, beta = float(k_term_error(v, k)), float(spread(v, k))
        assert (k - (k - 1) * beta) / (1 - error) <= ratio * (1 + 1e-9)
        assert ratio <= (k - beta) / (1 - error) * (1 + 1e-9)


# --- errors -------------------------------------------------------------------------------------------------

ON_VECTORS = {
    "k_term_error": lambda v: k_term_error(v, 0),
    "k_term_error_curve": k_term_error_curve,
    "smallest_k": lambda v: smallest_k(v, 0.5),
    "smallest_k at 0": lambda v: smallest_k(v, 0.0),
    "spread": lambda v: spread(v, 0),
    "effective_sparsity": effective_sparsity,
    "spectral_summary": spectral_summary,
}
ON_MATRICES = {
    "row_norms": row_norms,
    "singular_values": singular_values,
    "groups": lambda W: singular_values(W, groups=2),
    "stable_rank": stable_rank,
    "effective_rank": effective_rank,
    "keep_rows": lambda W: keep_rows(W, 0),
    "truncate_spectrum": lambda W: truncate_spectrum(W, 0),
}


@pytest.mark.parametrize("name", ON_VECTORS)
@pytest.mark.parametrize(
    ("v", "message"),
    [
        (NAN, "finite numbers; got 1 NaN or infinite"),
        (torch.tensor([math.inf, -math.inf, 0]), "finite numbers; got 2 NaN or infinite"),
        (torch.zeros(0), r"none empty; got shape \(0,\)"),
        (torch.tensor(1.0), r"got shape \(\)"),
        (torch.ones(2, dtype=torch.complex64), "real numbers; got torch.complex64"),
    ],
)
def test_vectors_are_checked(name, v, message):
    with pytest.raises(InputError, match=message):
        ON_VECTORS[name](v)


@pytest.mark.parametrize("name", ON_MATRICES)
@pytest.mark.parametrize(
    ("W", "message"),
    [
        (torch.tensor([[math.nan], [1.0]]), "finite numbers; got 1 NaN or infinite"),
        (torch.zeros(2, 0), "none empty"),
        (torch.zeros(0, 2), "none empty"),
        (torch.ones(2), "2 axes"),
        (torch.ones(2, 2, dtype=torch.complex128), "real numbers; got torch.complex128"),
    ],
)
def test_matrices_are_checked(name, W, message):
    with pytest.raises(InputError, match=message):
        ON_MATRICES[name](W)


@pytest.mark.parametrize("k", [-1, 4])
@pytest.mark.parametrize("function", [k_term_error, spread])
def test_k_lies_between_zero_and_the_length(function, k):
    with pytest.raises(InputError, match=f"k: expected an integer from 0 to 3; got {k}"):
        function(torch.ones(3), k)


@pytest.mark.parametrize(("function", "largest"), [(keep_rows, 3), (truncate_spectrum, 2)])
@pytest.mark.parametrize("beyond", [-1, 1])
def test_k_of_a_matrix_is_checked(function, largest, beyond):
    k = -1 if beyond < 0 else largest + 1
    with pytest.raises(InputError, match=f"k: expected an integer from 0 to {largest}; got {k}"):
        function(torch.ones(3, 2), k)


@pytest.mark.parametrize("q", [0.999, 0, -1, -math.inf, math.nan])
def test_q_is_at_least_one(q):
    for function in (lambda: k_term_error(torch.ones(3), 1, q), lambda: smallest_k(torch.ones(3), 0.5, q)):
        with pytest.raises(InputError, match="q: expected an exponent from 1 to inf; got"):
            function()


@pytest.mark.parametrize("error", [-1e-9, -math.inf, math.nan])
def test_the_target_error_is_at_least_zero(error):
    with pytest.raises(InputError, match="error: expected a number of at least 0; got"):
        smallest_k(torch.ones(3), error)


@pytest.mark.parametrize("groups", [0, -1, 3])
def test_groups_divide_the_rows(groups):
    with pytest.raises(InputError, match=f"groups: expected a divisor of the 4 rows; got {groups}"):
        singular_values(torch.ones(4, 2), groups)
