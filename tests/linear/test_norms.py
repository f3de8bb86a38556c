"""Norms of vectors and dense matrices, and projections."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from brittle.errors import InputError
from brittle.linear.norms import (
    check_attack_norm,
    dual_exponent,
    lp_norm,
    operator_norm,
    per_sample,
    project_ball,
    thin,
)
from helpers.matrices import matrices, quick
from helpers.networks import generator

NORMS = [1.0, 2.0, math.inf]


def samples(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


# --- dense operators ----------------------------------------------------------------------------------------


@quick
@given(matrices())
def test_operator_norms_are_numpys(W):
    for p in NORMS:
        assert float(operator_norm(W, p)) == pytest.approx(np.linalg.norm(W.numpy(), p), rel=1e-11, abs=1e-13)


@quick
@given(matrices(zero=False), st.integers(0, 99))
def test_no_vector_is_stretched_more(W, seed):
    x = samples(seed, 20, W.shape[1])
    for p in NORMS:
        assert (lp_norm(x @ W.T, p) <= float(operator_norm(W, p)) * lp_norm(x, p) * (1 + 1e-12)).all()


@quick
@given(matrices(zero=False))
def test_norms_frame_each_other(W):
    m, n = W.shape
    one, two, top = (float(operator_norm(W, p)) for p in NORMS)
    frobenius, slack = float(W.norm()), 1 + 1e-12
    assert top / math.sqrt(n) <= two * slack
    assert two <= math.sqrt(m) * top * slack
    assert two**2 <= one * top * slack
    assert frobenius / math.sqrt(min(m, n)) <= two * slack
    assert two <= frobenius * slack


@pytest.mark.parametrize("p", NORMS)
def test_operator_norm_takes_batches(p):
    W = samples(0, 2, 3, 4, 5)
    expected = [[np.linalg.norm(M, p) for M in row] for row in W.numpy()]
    np.testing.assert_allclose(operator_norm(W, p), expected, rtol=1e-12)


# --- exponents ----------------------------------------------------------------------------------------------


@given(st.one_of(st.floats(1.001, 1e6), st.sampled_from([1.0, 2.0, math.inf])))
@quick
def test_the_dual_of_the_dual_is_the_exponent(p):
    dual = dual_exponent(p)
    assert 1 / p + 1 / dual == pytest.approx(1)
    assert dual_exponent(dual) == pytest.approx(p, rel=1e-6)


@pytest.mark.parametrize(("p", "dual"), [(1, math.inf), (2, 2), (math.inf, 1), (3, 1.5)])
def test_dual_exponents(p, dual):
    assert dual_exponent(p) == dual


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, math.inf])
def test_vector_norms_are_numpys(p):
    x = samples(3, 4, 2, 3)
    np.testing.assert_allclose(lp_norm(x, p), [np.linalg.norm(row.ravel(), p) for row in x.numpy()], rtol=1e-12)


def test_per_sample_values_broadcast_over_samples():
    x = torch.ones(3, 2, 2)
    assert (per_sample(torch.arange(3), x) * x)[:, 1, 0].tolist() == [0, 1, 2]


# --- projections --------------------------------------------------------------------------------------------

projected = pytest.mark.parametrize("p", [2, math.inf])


@projected
@pytest.mark.parametrize("radius", [0.0, 1e-3, 0.7, 1.5, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_projection_lies_in_the_ball_and_stays(p, radius, dtype):
    x = samples(4, 50, 2, 3).to(dtype) * torch.logspace(-3, 3, 50).view(-1, 1, 1).to(dtype)
    x[7] = 0
    once = project_ball(x, radius, p)
    assert once.dtype == dtype
    assert once.shape == x.shape
    assert (lp_norm(once, p) <= radius * (1 + 4 * torch.finfo(dtype).eps)).all()
    torch.testing.assert_close(project_ball(once, radius, p), once)
    inside = lp_norm(x, p) <= radius
    assert torch.equal(once[inside], x[inside])


@projected
@pytest.mark.parametrize("radius", [0.3, 1.5])
def test_no_other_point_of_the_ball_is_nearer(p, radius):
    x = 2 * samples(5, 1, 6)
    nearest = project_ball(x, radius, p)
    for points in (2 * samples(6, 5000, 6), nearest + 0.05 * samples(7, 5000, 6)):
        inside = points.numpy() * np.minimum(1, radius / np.linalg.norm(points.numpy(), p, axis=1, keepdims=True))
        assert np.linalg.norm(x.numpy() - inside, axis=1).min() >= float((x - nearest).norm()) * (1 - 1e-12)


@projected
@pytest.mark.parametrize("radius", [0.5, 2.0])
def test_projections_in_closed_form(p, radius):
    x = samples(8, 20, 5)
    A = x.numpy()
    length = np.linalg.norm(A, axis=1, keepdims=True)
    expected = np.sign(A) * np.minimum(abs(A), radius) if p != 2 else A * np.where(length > radius, radius / length, 1)
    np.testing.assert_allclose(project_ball(x, radius, p), expected, rtol=1e-14)


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.5, 0, -1, math.nan])
def test_exponents_start_at_one(p):
    with pytest.raises(InputError, match="p: expected an exponent from 1 to inf; got"):
        dual_exponent(p)


@pytest.mark.parametrize("p", [0, 3, -math.inf, math.nan])
def test_operator_norms_exist_for_three_exponents(p):
    with pytest.raises(InputError, match="p: expected 1, 2 or inf; got"):
        operator_norm(torch.ones(2, 2), p)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_operator_norm_refuses_what_is_not_finite(p, bad):
    with pytest.raises(InputError, match="finite"):
        operator_norm(torch.tensor([[1.0, bad]]), p)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("shape", [(2, 0), (0, 2), (3,)])
def test_operator_norm_needs_a_matrix(p, shape):
    with pytest.raises(InputError, match="2 axes"):
        operator_norm(torch.ones(*shape), p)


@pytest.mark.parametrize("p", [1, 3, 0, math.nan, -math.inf])
def test_attacks_know_two_norms(p):
    with pytest.raises(InputError, match="p: expected 2 or inf; got"):
        check_attack_norm(p)
    with pytest.raises(InputError, match="p: expected 2 or inf; got"):
        project_ball(torch.ones(1, 2), 1.0, p)


# --- thinning ---------------------------------------------------------------------------------------------------


@given(n=st.integers(0, 300), most=st.integers(2, 80))
@quick
def test_thinned_rows_are_spread_evenly_between_both_ends(n, most):
    rows = thin(torch.arange(2 * n).view(n, 2), most)
    assert rows.shape == (min(n, most), 2)
    assert torch.equal(rows[:, 1], rows[:, 0] + 1)
    if n:
        assert (int(rows[0, 0]), int(rows[-1, 0])) == (0, 2 * (n - 1))
        gaps = rows[:, 0].diff() // 2
        assert bool((gaps > 0).all())
        assert not len(gaps) or int(gaps.max() - gaps.min()) <= 1


def test_of_a_single_row_it_is_the_first():
    assert thin(torch.arange(5), 1).tolist() == [0]
