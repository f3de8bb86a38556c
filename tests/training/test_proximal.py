"""Proximal steps: minimisers of their own objective, by independent solvers, and the same as gradient flow allows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from brittle.errors import InputError
from brittle.training import Recipe, factorised, train
from brittle.training.interventions.constraints import CONSTRAINTS
from brittle.training.interventions.proximal import Shrinkage, shrink_rows, shrink_singular_values
from helpers.matrices import quick
from helpers.networks import few

SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 7))


def matrix(shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def row_objective(V, W, amount):
    return 0.5 * (V - W).square().sum() + amount * V.norm(dim=1).sum()


def singular_objective(V, W, amount):
    return 0.5 * (V - W).square().sum() + amount * torch.linalg.svdvals(V).sum()


PROX = {"rows": (shrink_rows, row_objective), "singular": (shrink_singular_values, singular_objective)}


@quick
@given(SHAPES, st.integers(0, 99), st.floats(0, 3), st.sampled_from(sorted(PROX)))
def test_nothing_near_or_far_has_a_smaller_objective(shape, seed, amount, kind):
    prox, objective = PROX[kind]
    W = matrix(shape, seed)
    V = prox(W, amount)
    least = float(objective(V, W, amount))
    for other in range(5):
        direction = matrix(shape, 1000 + other)
        for length in (1e-3, 0.1, 1.0):
            assert least <= float(objective(V + length * direction, W, amount)) + 1e-9
    assert least <= float(objective(W, W, amount)) + 1e-9
    assert least <= float(objective(torch.zeros_like(W), W, amount)) + 1e-9


@quick
@given(SHAPES, st.integers(0, 99), st.floats(0, 3))
def test_singular_values_are_soft_thresholded(shape, seed, amount):
    W = matrix(shape, seed)
    expected = np.maximum(np.linalg.svd(W.numpy(), compute_uv=False) - amount, 0)
    found = np.linalg.svd(shrink_singular_values(W, amount).numpy(), compute_uv=False)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@quick
@given(SHAPES, st.integers(0, 99), st.floats(0, 3))
def test_row_norms_are_soft_thresholded_and_directions_kept(shape, seed, amount):
    W = matrix(shape, seed)
    V = shrink_rows(W, amount)
    torch.testing.assert_close(V.norm(dim=1), (W.norm(dim=1) - amount).clamp_min(0), atol=1e-12, rtol=0)
    torch.testing.assert_close((V * W).sum(1), V.norm(dim=1) * W.norm(dim=1), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", sorted(PROX))
def test_zero_amount_zero_matrix_and_single_precision(kind):
    prox, _ = PROX[kind]
    W = matrix((6, 4), 0, torch.float32)
    torch.testing.assert_close(prox(W, 0.0), W, atol=1e-6, rtol=0)
    assert not prox(torch.zeros(3, 5), 0.5).any()
    assert prox(W, 0.1).dtype == torch.float32
    assert not prox(W, 1e3).any()


def test_gradient_descent_with_it_finds_the_lasso_solution():
    """Denoising by proximal gradient descent ends where the closed form is."""
    W = matrix((5, 3), 3)
    V = torch.zeros_like(W)
    for _ in range(200):
        V = shrink_singular_values(V - 0.3 * (V - W), 0.3 * 0.7)
    torch.testing.assert_close(V, shrink_singular_values(W, 0.7), atol=1e-6, rtol=0)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 10))


@pytest.mark.parametrize("name", ["row_shrinkage", "singular_shrinkage"])
def test_every_n_calls_it_shrinks_n_times_the_amount(name):
    with torch.random.fork_rng():
        model = net()
    before = [p.detach().clone() for p in model.parameters()]
    apply = CONSTRAINTS[name](model, 0.01, every=3)
    prox = shrink_rows if name == "row_shrinkage" else shrink_singular_values
    apply()
    apply()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    apply()
    torch.testing.assert_close(model[1].weight.detach(), prox(before[0], 0.03))
    torch.testing.assert_close(model[3].weight.detach(), prox(before[2], 0.03))
    assert torch.equal(model[5].weight, before[4])  # the head is not chosen
    assert torch.equal(model[1].bias, before[1])


@pytest.mark.parametrize(("name", "amount"), [("row_shrinkage", 0.02), ("singular_shrinkage", 0.014)])
def test_training_with_it_makes_exact_zeros(name, amount):
    x, y = few(200)
    with torch.random.fork_rng():
        model = net()
    recipe = Recipe(epochs=4, batch_size=20, validation=0.0, measure_every=0, constraints={name: amount}, refresh=5)
    trained = train(model, (x, y), recipe).model
    W = trained[1].weight.detach()
    if name == "row_shrinkage":
        assert 0 < int((W == 0).all(1).sum()) <= 12
    else:
        sigma = torch.linalg.svdvals(W.double())
        assert 0 < int((sigma < 1e-6 * sigma[0]).sum()) < 12


def test_convolutions_are_shrunk_as_filter_matrices():
    with torch.random.fork_rng():
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3))
    before = model[1].weight.detach().clone()
    Shrinkage(model, 0.05, singular=True)()
    expected = shrink_singular_values(before.flatten(1), 0.05).view_as(before)
    torch.testing.assert_close(model[1].weight.detach(), expected)


def test_a_state_goes_on_counting():
    with torch.random.fork_rng():
        model = net()
    first = Shrinkage(model, 0.1, singular=False, every=3)
    first()
    first()
    second = Shrinkage(model, 0.1, singular=False, every=3)
    second.load_state_dict(first.state_dict())
    before = model[1].weight.detach().clone()
    second()
    assert not torch.equal(before, model[1].weight)
    with pytest.raises(InputError, match="state"):
        second.load_state_dict({})


def test_pairs_are_left_and_wrong_arguments_refused():
    with torch.random.fork_rng():
        model = net()
    small = factorised(model, 3)
    with pytest.raises(InputError, match="layers"):
        Shrinkage(small, 0.1, singular=True)
    for amount in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="amount"):
            Shrinkage(model, amount, singular=True)
    for every in (0, -1, 1.5, True):
        with pytest.raises(InputError, match="every"):
            Shrinkage(model, 0.1, singular=True, every=every)
