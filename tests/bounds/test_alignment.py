"""Alignment of two consecutive layers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from brittle.bounds.pairs.dense import alignment, compressed_alignment
from brittle.errors import InputError
from helpers.matrices import KINDS, matrix, quick

SLACK = 1 + 1e-8
both = pytest.mark.parametrize("p", [2, math.inf])
some = quick.__class__(quick, max_examples=25)


def pairs(widest=7, kinds=tuple(set(KINDS) - {"row", "column", "zero"})):
    """Two matrices that compose, neither of them zero."""
    side, kind = st.integers(1, widest), st.sampled_from(sorted(kinds))

    def build(m, h, n, kind2, kind1, seed):
        return matrix(kind2, m, h, seed), matrix(kind1, h, n, seed + 1)

    drawn = st.builds(build, side, side, side, kind, kind, st.integers(0, 2**31))
    return drawn.filter(lambda pair: bool(pair[0].any() and pair[1].any()))


def norm(A, p):
    return float(np.linalg.norm(np.asarray(A), p))


def enumerated(W2, W1, p):
    """The alignment by its definition, over all patterns."""
    A, B = W2.numpy(), W1.numpy()
    patterns = itertools.product([0.0, 1.0], repeat=len(B))
    return max(norm(A * np.asarray(d) @ B, p) for d in patterns) / (norm(A, p) * norm(B, p))


@both
@some
@given(pair=pairs())
def test_the_definition_lies_between_the_bounds(p, pair):
    true, found = enumerated(*pair, p), alignment(*pair, p)
    assert found.p == p
    assert found.scale == pytest.approx(norm(pair[0], p) * norm(pair[1], p), rel=1e-9)
    assert found.lower <= true * SLACK
    assert true <= found.upper * (1 + 1e-12) or found.upper == 1
    assert 0 <= found.lower <= found.upper <= 1
    assert found.exact is None


@both
@some
@given(pair=pairs())
def test_exact_is_the_definition(p, pair):
    found = alignment(*pair, p, exact=True)
    assert found.exact == pytest.approx(enumerated(*pair, p), rel=1e-7, abs=1e-12)
    assert found.lower <= found.exact * SLACK
    assert found.exact <= found.upper <= max(found.exact * (1 + 1e-7), 1e-12)
    assert found.argument == "exact"


@both
@some
@given(pair=pairs())
def test_never_above_half_of_product_and_composition(p, pair):
    W2, W1 = pair
    assert alignment(W2, W1, p).upper <= (norm(W2 @ W1, p) / (norm(W2, p) * norm(W1, p)) + 1) / 2 * SLACK


@both
@some
@given(pair=pairs(), scale=st.sampled_from([-1.0, 1e-160, 3.0, 1e150]))
def test_scale_does_not_matter(p, pair, scale):
    one, other = alignment(*pair, p), alignment(pair[0] * scale, pair[1], p)
    assert (other.upper, other.lower) == pytest.approx((one.upper, one.lower), rel=1e-6, abs=1e-12)
    assert other.scale == pytest.approx(one.scale * abs(scale), rel=1e-9)


@both
@some
@given(pair=pairs())
def test_more_steps_do_no_harm(p, pair):
    assert alignment(*pair, p, steps=5).upper <= alignment(*pair, p).upper * SLACK


@some
@given(pair=pairs())
def test_without_negative_weights_the_composition_decides(pair):
    W2, W1 = (W.abs() for W in pair)
    true = norm(W2 @ W1, math.inf) / (norm(W2, math.inf) * norm(W1, math.inf))
    found = alignment(W2, W1, math.inf, exact=True)
    assert (found.lower, found.exact, found.upper) == pytest.approx((true, true, true), rel=1e-7, abs=1e-12)


@both
def test_identities_are_aligned(p):
    found = alignment(torch.eye(4), torch.eye(4), p, exact=True)
    assert (found.lower, found.exact, found.upper) == pytest.approx((1, 1, 1))
    assert alignment(torch.eye(4), torch.eye(4), p).argument == "product"
    assert alignment(torch.ones(1, 2), torch.tensor([[1.0], [-1.0]]), math.inf).argument == "half"


@both
def test_layers_that_never_meet_are_not(p):
    found = alignment(torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0], [0.0]]), p)
    assert found.lower == 0
    assert found.upper == pytest.approx(0, abs=1e-9)


def test_opposite_signs_are_half_aligned_in_l_inf():
    found = alignment(torch.ones(1, 2), torch.tensor([[1.0], [-1.0]]), math.inf, exact=True)
    assert (found.lower, found.exact, found.upper) == pytest.approx((0.5, 0.5, 0.5))


@both
@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("exact", [False, True])
def test_zero_matrices_are_aligned_by_convention(p, zero, exact):
    pair = [torch.ones(2, 3), torch.ones(3, 4)]
    pair[zero] = torch.zeros_like(pair[zero])
    found = alignment(*pair, p, exact=exact)
    assert (found.scale, found.lower, found.upper, found.argument) == (0, 1, 1, "zero matrix")
    assert found.exact == (1 if exact else None)


@both
def test_out_of_reach_is_none(p):
    W2, W1 = matrix("gaussian", 40, 60, 0), matrix("gaussian", 60, 50, 1)
    assert alignment(W2, W1, p).exact is None


@both
def test_single_precision_agrees(p):
    W2, W1 = matrix("gaussian", 5, 9, 0), matrix("gaussian", 9, 4, 1)
    assert alignment(W2.float(), W1.float(), p).upper == pytest.approx(alignment(W2, W1, p).upper, rel=1e-4)


@both
@some
@given(pair=pairs(), data=st.data())
def test_compressed_forms_hold(p, pair, data):
    W2, W1 = pair
    if p == 2:  # the alignment of the theorem shares each spectrum between both sides
        roots = [np.linalg.svd(W.numpy(), full_matrices=False) for W in pair]
        true = enumerated(
            torch.from_numpy(np.sqrt(roots[0][1])[:, None] * roots[0][2]),
            torch.from_numpy(roots[1][0] * np.sqrt(roots[1][1])),
            2,
        )
    else:
        true = enumerated(W2, W1, p)
    k2, k1 = (data.draw(st.integers(0, min(W.shape) if p == 2 else len(W))) for W in pair)
    plain, sharper = compressed_alignment(W2, W1, p, k2, k1)
    assert true <= sharper * SLACK
    assert sharper <= plain * SLACK
    assert plain <= 1


@both
def test_nothing_cut_leaves_no_remainder(p):
    W2, W1 = matrix("gaussian", 5, 6, 0), matrix("gaussian", 6, 7, 1)
    plain, sharper = compressed_alignment(W2, W1, p, 5, 6)
    assert plain == pytest.approx(sharper)
    assert sharper >= alignment(W2, W1, p, exact=True).exact / SLACK
    assert p == 2 or sharper == pytest.approx(alignment(W2, W1, p).upper, rel=1e-6)


@both
@pytest.mark.parametrize(
    ("W2", "W1", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 3), "W1: expected 3 rows, as the next layer has columns; got 2"),
        (torch.ones(3), torch.ones(3, 3), r"W2: expected a real matrix, not empty; got \(3,\)"),
        (torch.ones(3, 3), torch.full((3, 3), math.nan), "W1: expected finite numbers; got 9 NaN or infinite"),
    ],
)
def test_matrices_are_checked(p, W2, W1, message):
    with pytest.raises(InputError, match=message):
        alignment(W2, W1, p)


def test_p_is_checked():
    with pytest.raises(InputError, match="p: expected 2 or inf; got 1"):
        alignment(torch.eye(2), torch.eye(2), 1)
