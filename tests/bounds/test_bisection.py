"""Radii by bisection: no attack within them succeeds, and where the theory is exact so are they."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import brittle
from brittle.bounds.relaxation.bisection import proven_radii
from brittle.bounds.relaxation.certify import margin_bounds, read_relaxation
from brittle.bounds.relaxation.margins import Effort
from brittle.errors import InputError
from helpers.matrices import quick
from helpers.networks import few, mlp, seeded, uniform

both = pytest.mark.parametrize("p", [2, math.inf])


def dense(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def predicted(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


@both
@settings(quick, max_examples=8)
@given(seed=st.integers(0, 10**6), rounds=st.integers(0, 2))
def test_no_gradient_attack_succeeds_just_inside_a_proven_radius(p, seed, rounds):
    model, x = seeded(lambda: dense(12, 10, 8, 3), seed), uniform(seed, 6, 12)
    y = predicted(model, x)
    radii = proven_radii(read_relaxation(model, (12,)), x, y, p=p, effort=Effort(rounds, 4))
    for i, radius in enumerate(radii.tolist()):
        if radius > 0:
            x_adv = brittle.apgd(model, x[i : i + 1], y[i : i + 1], eps=0.999999 * radius, p=p, steps=10)
            assert bool(predicted(model, x_adv) == y[i])


@both
def test_every_radius_was_proven_at_that_very_budget(p):
    (x, y), model = few(25), mlp()
    relaxation = read_relaxation(model, x.shape[1:], examples=x)
    radii = proven_radii(relaxation, x, y, p=p)
    assert (radii > 0).double().mean() > 0.5
    margins = margin_bounds(relaxation, x, y, eps=radii, p=p)
    assert (margins[radii > 0] > 0).all()
    assert (radii[predicted(model, x) != y] == 0).all()


@both
def test_budgets_of_their_own_give_what_one_budget_for_all_gives(p):
    (x, y), model = few(12), mlp()
    relaxation = read_relaxation(model, x.shape[1:], examples=x)
    budgets = torch.linspace(0.001, 0.1, 12, dtype=torch.float64)
    together = margin_bounds(relaxation, x, y, eps=budgets, p=p)
    single = [
        margin_bounds(relaxation, x[i : i + 1], y[i : i + 1], eps=float(eps), p=p) for i, eps in enumerate(budgets)
    ]
    torch.testing.assert_close(together, torch.cat(single), rtol=1e-4, atol=1e-4)


def test_linear_networks_have_their_exact_l2_radius_far_beyond_any_usual_budget():
    model, x = seeded(lambda: dense(5, 3)).double(), uniform(0, 30, 5, dtype=torch.float64)
    y = predicted(model, x)
    W, b = model[0].weight.detach(), model[0].bias.detach()
    gaps = (W[y][:, None] - W) @ x[..., None]
    gaps = gaps[..., 0] + b[y][:, None] - b
    exact = (gaps / (W[y][:, None] - W).norm(dim=2)).scatter(1, y[:, None], math.inf).amin(1)
    radii = proven_radii(read_relaxation(model, (5,)), x, y, p=2, precision=0.001)
    within = exact < math.sqrt(5)  # farther is outside the bounds
    assert (radii[within] <= exact[within]).all()
    assert (radii[within] >= 0.998 * exact[within]).all()
    assert (radii[~within] >= 0.998 * math.sqrt(5)).all()
    assert float(radii.max()) > 0.5


@both
def test_a_floor_stands_and_what_is_proven_rises_above_it(p):
    (x, y), model = few(20), mlp()
    relaxation = read_relaxation(model, x.shape[1:], examples=x)
    plain = proven_radii(relaxation, x, y, p=p)
    floor = torch.where(torch.arange(20) % 2 == 0, 0.7 * plain, 3 * plain + 0.01)
    raised = proven_radii(relaxation, x, y, p=p, floor=floor)
    assert (raised >= floor).all()
    right = plain > 0
    assert (raised[right] >= 0.97 * plain[right]).all()
    assert (raised[~right] == floor[~right]).all()


def test_a_finer_search_ends_at_least_nearly_as_far_and_order_does_not_matter():
    (x, y), model = few(10), mlp()
    relaxation = read_relaxation(model, x.shape[1:])
    coarse, fine = (proven_radii(relaxation, x, y, p=math.inf, precision=q) for q in (0.2, 0.005))
    assert (fine >= coarse / 1.001).all()
    assert (fine <= coarse * 1.21).all()
    torch.testing.assert_close(
        proven_radii(relaxation, x.flip(0), y.flip(0), p=math.inf, precision=0.005).flip(0), fine
    )


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"precision": 0.0}, "precision"),
        ({"floor": torch.zeros(3)}, "floor"),
        ({"floor": torch.tensor([0.0, -1.0])}, "floor"),
        ({"floor": torch.tensor([0.0, math.nan])}, "floor"),
        ({"p": 1}, "p"),
    ],
)
def test_bad_arguments_are_named(change, name):
    call = {"x": uniform(0, 2, 5), "y": torch.tensor([0, 1]), "p": 2} | change
    x, y = call.pop("x"), call.pop("y")
    with pytest.raises(InputError, match=rf"\b{name}\b"):
        proven_radii(read_relaxation(dense(5, 3), (5,)), x, y, **call)


@pytest.mark.parametrize(("rounds", "rows"), [(-1, 32), (2, 0)])
def test_an_effort_below_nothing_is_named(rounds, rows):
    with pytest.raises(InputError, match=r"rounds: .*rows: "):
        Effort(rounds, rows)
