"""Two consecutive layers in the l_inf norm, against brute force over activation patterns."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brittle.bounds.pairs import inf as pair_inf
from brittle.bounds.pairs.inf import exact, lower, row_bounds, upper, upper_of_compressed
from brittle.bounds.pairs.matrices import pair_of
from brittle.errors import InputError
from helpers.matrices import KINDS, matrix, quick

SLACK = 1 + 1e-9
RELU = (0.0, 1.0)
SLOPES = [RELU, (-0.13, 1.13), (0.2, 1.0), (-1.0, 1.0), (-0.5, 1.5), (-1.0, 0.25), (0.7, 0.7), (-2.0, -1.0)]
few = settings(quick, max_examples=25)
slopes_drawn = st.sampled_from(SLOPES)


@st.composite
def pairs(draw, largest=7, fewest=1, zero=True):
    """W2 and W1 of every kind, in shapes that chain."""
    m, h, n = (draw(st.integers(fewest, largest)) for _ in range(3))
    kind2, kind1 = (draw(st.sampled_from([kind for kind in KINDS if zero or kind != "zero"])) for _ in range(2))
    m, h, n = 1 if kind2 == "row" else m, 1 if kind2 == "column" or kind1 == "row" else h, 1 if kind1 == "column" else n
    seeds = [draw(st.integers(0, 2**32 - 1)) for _ in range(2)]
    return matrix(kind2, m, h, seeds[0]), matrix(kind1, h, n, seeds[1])


def brute_rows(W2, W1, slopes=RELU):
    """Every row's maximum over the vertices of the cube of slopes, one vertex at a time."""
    A, B = W2.numpy(), W1.numpy()
    return np.max([np.abs((A * d) @ B).sum(1) for d in itertools.product(slopes, repeat=len(B))], axis=0)


def norms(W2, W1):
    return float(W2.abs().sum(1).max() * W1.abs().sum(1).max())


def magnitudes(W2, W1):
    """Rows of ``|W2| |W1| 1``: what no slopes in [-1, 1] exceed."""
    return (W2.abs() @ W1.abs().sum(1)).numpy()


def tiny(W2, W1):
    """What rounding may add to any sum."""
    return 1e-12 * norms(W2, W1)


# --- the order of the bounds --------------------------------------------------------------------------------


@quick
@given(pair=pairs(), slopes=slopes_drawn)
def test_lower_is_below_exact_is_below_every_upper_bound(pair, slopes):
    rows = brute_rows(*pair, slopes)
    value = exact(*pair, slopes=slopes)
    assert value == pytest.approx(rows.max(), rel=1e-9)
    assert lower(*pair, slopes=slopes) <= rows.max() * SLACK
    largest = max(abs(slope) for slope in slopes)
    for refine in (0, 2):
        bounds = row_bounds(*pair, slopes=slopes, refine=refine).numpy()
        assert (bounds * SLACK + tiny(*pair) >= rows).all()
        assert (bounds <= largest * magnitudes(*pair) * SLACK).all()
    for bound in upper(*pair, slopes=slopes, refine=2).values():
        assert rows.max() <= bound * (1 + 1e-12)


@quick
@given(pairs())
def test_the_cheap_bounds_are_ordered(pair):
    bounds, rows = upper(*pair, refine=0), row_bounds(*pair, refine=0).numpy()
    assert rows.max() == pytest.approx(bounds["spectral"], rel=1e-9)
    assert bounds["spectral"] <= bounds["half entry"] * SLACK
    assert bounds["half entry"] <= min(bounds["half"], bounds["entry"]) * SLACK
    assert max(bounds["half"], bounds["entry"]) <= norms(*pair) * SLACK
    assert (rows <= magnitudes(*pair) * SLACK).all()


@quick
@given(pair=pairs(), seed=st.integers(0, 99), slopes=slopes_drawn)
def test_no_slope_inside_the_cube_exceeds_the_vertices(pair, seed, slopes):
    W2, W1 = (W.numpy() for W in pair)
    value = exact(*pair, slopes=slopes)
    for d in np.random.default_rng(seed).uniform(*slopes, (20, len(W1))):
        assert np.abs((W2 * d) @ W1).sum(1).max() <= value * SLACK


@few
@given(pair=pairs(), slopes=slopes_drawn)
def test_without_negative_weights_nothing_cancels(pair, slopes):
    W2, W1 = (W.abs() for W in pair)
    largest = max(abs(slope) for slope in slopes)
    product = float((W2 @ W1).sum(1).max())
    bounds = upper(W2, W1)
    values = [exact(W2, W1), bounds["entry"], bounds["half entry"], float(row_bounds(W2, W1).max()), lower(W2, W1)]
    assert values == pytest.approx([product] * 5, rel=1e-9)
    assert exact(W2, W1, slopes=slopes) == pytest.approx(largest * product, rel=1e-9)


@few
@given(pair=pairs(zero=False), c=st.sampled_from([-3.0, 1e-12, 1e200, -1e-200]))
def test_the_alignment_is_a_share_that_ignores_scale(pair, c):
    W2, W1 = pair
    if not (W2.any() and W1.any()):
        return
    for share in (exact, lower, lambda *pair: float(row_bounds(*pair, refine=1).max())):
        value = share(W2, W1) / norms(W2, W1)
        assert 0 <= value <= SLACK
        assert share(c * W2, W1) / abs(c) / norms(W2, W1) == pytest.approx(value, rel=1e-6)
        assert share(W2, c * W1) / abs(c) / norms(W2, W1) == pytest.approx(value, rel=1e-6)


# --- exact values -------------------------------------------------------------------------------------------


@quick
@given(pair=pairs(largest=9, fewest=3), slopes=slopes_drawn)
def test_branch_and_bound_is_enumeration(pair, slopes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_inf, "MOST_ENUMERATED", 0)
        searched = exact(*pair, slopes=slopes)
    assert searched == pytest.approx(exact(*pair, slopes=slopes), rel=1e-6)


@pytest.mark.parametrize("slopes", [RELU, (-0.13, 1.13), (-1.0, 1.0)])
@pytest.mark.parametrize(("h", "n"), [(12, 12), (12, 30), (30, 11)])
@pytest.mark.parametrize("kind", ["gaussian", "heavy tails", "signs"])
def test_the_search_alone_finds_the_maximum(kind, h, n, slopes):
    """No help from the lower bound, and no row left out."""
    W2, W1 = matrix(kind, 2, h, 0), matrix(kind, h, n, 1)
    pair = pair_of(W2, W1, slopes).used()
    for i in range(2):
        signed = pair_inf._as_sign_problem(pair, i)
        assert len(signed) == min(h + (slopes != (-1.0, 1.0)), n)
        value, nodes = pair_inf._branch_and_bound(signed, 0.0, 200_000)
        assert value == pytest.approx(pair_inf._enumerate(signed), rel=1e-6)
        assert nodes < 2 ** len(signed)


def test_the_sign_problem_of_a_row_has_its_maximum():
    W2, W1 = matrix("gaussian", 3, 6, 2), matrix("heavy tails", 6, 5, 3)
    for slopes in SLOPES[:6]:
        pair = pair_of(W2, W1, slopes).used()
        values = [pair.scale * pair_inf._enumerate(pair_inf._as_sign_problem(pair, i)) for i in range(3)]
        assert values == pytest.approx(list(brute_rows(W2, W1, slopes)), rel=1e-12)


def test_a_pair_beyond_enumeration_is_searched():
    W2, W1 = matrix("gaussian", 3, 20, 0), matrix("gaussian", 20, 24, 1)
    value = exact(W2, W1)
    assert lower(W2, W1) <= value * SLACK
    assert value <= float(row_bounds(W2, W1).max())
    assert value == pytest.approx(20 * exact(W2 / 4, W1 / 5), rel=1e-6)
    assert exact(W2, W1, most_nodes=10) is None


def test_idle_units_are_not_searched():
    W2, W1 = torch.zeros(2, 60, dtype=torch.float64), matrix("gaussian", 60, 40, 0)
    W2[:, 7:15] = matrix("gaussian", 2, 8, 1)
    assert exact(W2, W1, most_nodes=0) == pytest.approx(brute_rows(W2[:, 7:15], W1[7:15]).max(), rel=1e-9)


def test_wide_non_negative_weights_need_no_search():
    W2, W1 = matrix("gaussian", 5, 50, 0).abs(), matrix("gaussian", 50, 60, 1).abs()
    assert exact(W2, W1, most_nodes=0) == pytest.approx(float((W2 @ W1).sum(1).max()), rel=1e-9)


# --- the lower bound ----------------------------------------------------------------------------------------


def test_the_lower_bound_is_seeded_and_leaves_the_global_generator_alone():
    W2, W1 = matrix("gaussian", 30, 40, 0), matrix("gaussian", 40, 30, 1)
    state = torch.get_rng_state()
    values = [lower(W2, W1, seed=seed) for seed in (0, 0, 1, 2)]
    row_bounds(W2, W1)
    assert torch.equal(torch.get_rng_state(), state)
    assert values[0] == values[1]
    assert len(set(values)) > 1


def test_the_lower_bound_is_usually_the_maximum():
    ratios = []
    for seed in range(20):
        pair = matrix("gaussian", 4, 8, seed), matrix("gaussian", 8, 8, seed + 100)
        ratios.append(lower(*pair) / brute_rows(*pair).max())
    assert np.median(ratios) > 1 - 1e-9
    assert min(ratios) > 0.9


@pytest.mark.parametrize("argument", ["starts", "rows"])
def test_the_lower_bound_needs_a_start_and_a_row(argument):
    with pytest.raises(InputError, match=f"{argument}: expected at least 1; got 0"):
        lower(torch.ones(2, 2), torch.ones(2, 2), **{argument: 0})


# --- wide layers --------------------------------------------------------------------------------------------


def test_the_spectral_bound_makes_wide_layers_non_trivial():
    W2, W1 = matrix("gaussian", 256, 256, 0), matrix("gaussian", 256, 256, 1)
    size = norms(W2, W1)
    plain, refined = (float(row_bounds(W2, W1, refine=refine).max()) / size for refine in (0, 8))
    bounds = upper(W2, W1, refine=0)
    assert bounds["entry"] / size > 0.85
    assert bounds["half entry"] / size > 0.45
    assert plain < 0.135
    assert refined < 0.98 * plain
    assert 0.08 < lower(W2, W1) / size < refined


def test_refinement_never_hurts():
    for kind in ("gaussian", "heavy tails", "power-law rows", "rank deficient"):
        pair = matrix(kind, 40, 30, 0), matrix(kind, 30, 50, 1)
        bounds = [row_bounds(*pair, refine=refine) for refine in (0, 1, 4)]
        assert all((b <= a * SLACK).all() for a, b in itertools.pairwise(bounds))


def test_the_leading_row_is_refined():
    W2, W1 = matrix("heavy tails", 1, 40, 0), matrix("heavy tails", 40, 40, 1)
    plain, refined = (float(row_bounds(W2, W1, refine=refine)) for refine in (0, 8))
    assert lower(W2, W1) <= refined < 0.95 * plain


# --- weights of the inputs ----------------------------------------------------------------------------------


@quick
@given(pair=pairs(), slopes=slopes_drawn, seed=st.integers(0, 99))
def test_scale_weighs_the_columns(pair, slopes, seed):
    W2, W1 = pair
    scale = torch.from_numpy(np.random.default_rng(seed).uniform(-0.5, 2, W1.shape[1])).clamp_min(0)
    bounds = row_bounds(W2, W1, slopes=slopes, scale=scale, refine=0)
    assert bounds.numpy() == pytest.approx(row_bounds(W2, W1 * scale, slopes=slopes, refine=0).numpy(), rel=1e-12)
    assert (bounds.numpy() * SLACK + tiny(W2, W1 * scale) >= brute_rows(W2, W1 * scale, slopes)).all()


@pytest.mark.parametrize(
    "scale", [torch.ones(2), torch.ones(3, 1), torch.tensor([1, -1, 1]), torch.tensor([1, math.nan, 1])]
)
def test_scale_is_checked(scale):
    with pytest.raises(InputError, match="scale: expected 3 finite weights of at least 0; got"):
        row_bounds(torch.ones(2, 4), torch.ones(4, 3), scale=scale)


# --- compressed matrices ------------------------------------------------------------------------------------


@few
@given(pairs(largest=6))
def test_the_compressed_forms_bound_the_alignment(pair):
    W2, W1 = pair
    m, h = W2.shape
    if not (W2.any() and W1.any()):
        assert upper_of_compressed(W2, W1, 0, 0) == upper_of_compressed(W2, W1, m, h) == (1, 1)
        return
    alignment = brute_rows(W2, W1).max() / norms(W2, W1)
    for k2, k1 in {(0, 0), (m, 0), (0, h), (1, 1), (m // 2, h // 2), (m, h - 1)}:
        plain, sharp = upper_of_compressed(W2, W1, k2, k1)
        assert alignment <= sharp * SLACK
        assert sharp <= plain * SLACK <= SLACK**2
    whole = min(1.0, float(row_bounds(W2, W1).max()) / norms(W2, W1))  # nothing is cut, nothing is added
    assert upper_of_compressed(W2, W1, m, h) == pytest.approx((whole, whole), rel=1e-9)


def test_the_remainder_falls_to_nothing():
    W2, W1 = matrix("power-law rows", 8, 8, 0), matrix("power-law rows", 8, 8, 1)
    nu2, nu1 = (np.append(np.sort(W.abs().sum(1).numpy())[::-1], 0) for W in (W2, W1))
    remainders = []
    for k in range(9):
        a, b = nu1[k] / nu1[0], nu2[k] / nu2[0]
        kept = [torch.where((W.abs().sum(1) > nu[k])[:, None], W, 0) for W, nu in ((W2, nu2), (W1, nu1))]
        A = float(row_bounds(*kept).max()) / norms(W2, W1)
        plain, sharp = min(1, A + a + b + a * b), min(1, max(A + a, b))
        assert upper_of_compressed(W2, W1, k, k) == pytest.approx((plain, sharp), rel=1e-9)
        remainders.append(a + b + a * b)
    assert remainders == sorted(remainders, reverse=True)
    assert (remainders[0], remainders[-1]) == (3, 0)


@pytest.mark.parametrize(("ks", "message"), [((4, 1), "k2: .* 0 to 3; got 4"), ((1, -1), "k1: .* 0 to 2; got -1")])
def test_the_kept_rows_are_checked(ks, message):
    with pytest.raises(InputError, match=message):
        upper_of_compressed(torch.ones(3, 2), torch.ones(2, 4), *ks)


# --- edges --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [("zero", "gaussian"), ("gaussian", "zero"), ("zero", "zero")])
def test_zero_matrices_have_zero_bounds(first, second):
    W2, W1 = matrix(second, 3, 4, 0), matrix(first, 4, 5, 1)
    assert set(upper(W2, W1).values()) == {0}
    for bounds in (row_bounds(W2, W1), row_bounds(W2, W1, refine=0)):
        assert torch.equal(bounds, torch.zeros(3, dtype=torch.float64))
    assert (exact(W2, W1), lower(W2, W1), upper_of_compressed(W2, W1, 1, 1)) == (0, 0, (1, 1))


def test_disjoint_units_give_zero():
    W2, W1 = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0], [2.0, -1.0]])
    assert (exact(W2, W1), lower(W2, W1), float(row_bounds(W2, W1))) == (0, 0, 0)
    assert upper_of_compressed(W2, W1, 1, 2) == (0, 0)


def test_a_zero_row_has_a_zero_bound():
    W2 = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    assert row_bounds(W2, torch.ones(2, 3)).tolist() == pytest.approx([0, 3])


def test_single_precision_and_gradients_are_accepted():
    W2, W1 = matrix("gaussian", 4, 5, 0), matrix("gaussian", 5, 6, 1)
    learned = W2.float().requires_grad_(), W1.float().requires_grad_()
    bounds = row_bounds(*learned)
    assert bounds.dtype == torch.float64
    assert not bounds.requires_grad
    assert bounds.numpy() == pytest.approx(row_bounds(W2, W1).numpy(), rel=1e-4)
    assert exact(*learned) == pytest.approx(exact(W2, W1), rel=1e-6)
    assert upper_of_compressed(*learned, 4, 5) == pytest.approx(upper_of_compressed(W2, W1, 4, 5), rel=1e-4)


BAD = [
    (torch.ones(3), torch.ones(3, 2), r"B: expected a real matrix, not empty; got \(3,\)"),
    (torch.ones(2, 3), torch.ones(0, 2), r"C: .*got \(0, 2\)"),
    (torch.ones(2, 3), torch.ones(3, 2, dtype=torch.complex64), "C: expected a real matrix"),
    (torch.ones(2, 3), torch.ones(2, 3), "C: expected 3 rows, as the next layer has columns; got 2"),
    (torch.tensor([[math.nan]]), torch.ones(1, 1), "B: expected finite numbers"),
    (torch.ones(1, 1), torch.tensor([[math.inf]]), "C: expected finite numbers"),
]


@pytest.mark.parametrize("function", [upper, row_bounds, exact, lower, upper_of_compressed])
@pytest.mark.parametrize(("W2", "W1", "message"), BAD)
def test_the_matrices_are_checked(function, W2, W1, message):
    extra = (1, 1) if function is upper_of_compressed else ()
    with pytest.raises(InputError, match=message):
        function(W2, W1, *extra)


@pytest.mark.parametrize("function", [upper, row_bounds, exact, lower])
@pytest.mark.parametrize("slopes", [(1.0, 0.0), (0.0, math.inf), (math.nan, 1.0)])
def test_the_slopes_are_checked(function, slopes):
    with pytest.raises(InputError, match=r"slopes: expected \(alpha, gamma\) with alpha <= gamma, both finite; got"):
        function(torch.ones(2, 2), torch.ones(2, 2), slopes=slopes)


def test_the_rounds_are_checked():
    with pytest.raises(InputError, match="refine: expected at least 0 rounds; got -1"):
        row_bounds(torch.ones(2, 2), torch.ones(2, 2), refine=-1)
