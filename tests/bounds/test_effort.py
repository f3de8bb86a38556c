"""What certificates gain from more effort: as much as CROWN proves, and never less than with less."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import brittle
from brittle.bounds.relaxation.certify import clean_values, margin_bounds, read_relaxation
from brittle.bounds.relaxation.flattened import dense_chain, flattened_ends
from brittle.bounds.relaxation.grouped import targets
from brittle.bounds.relaxation.interval import Ball, intervals
from brittle.bounds.relaxation.margins import CROWN, Effort
from brittle.errors import InputError
from helpers.dense_crown import crown_margins, unrolled
from helpers.matrices import quick
from helpers.networks import few, mlp, seeded, uniform

both = pytest.mark.parametrize("p", [2, math.inf])
SHAPE = (1, 6, 6)


class Block(nn.Module):
    """Two convolutions with batch norm, and a shortcut around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.c2, self.n2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.n2(self.c2(F.relu(self.n1(self.c1(x))))))


NETWORKS = {
    "dense": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(36, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(),
        nn.Linear(16, 4),
    ),
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(54, 12), nn.ReLU(), nn.Linear(12, 4),
    ),
    "residual": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3, 2, 1), nn.ReLU(), Block(3), Block(3), nn.Flatten(), nn.Linear(27, 4)
    ),
}  # fmt: skip


def samples(name: str, seed: int, n: int = 12) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A random network with large margins for its own labels, on random images."""
    model = seeded(NETWORKS[name], seed).eval()
    x = uniform(seed, n, *SHAPE)
    with torch.no_grad():
        return model, x, model(x).argmax(1)


@both
@pytest.mark.parametrize("name", NETWORKS)
def test_what_an_independent_crown_proves_is_proven(name, p):
    """Up to a hundredth of the logits' scale: intervals may tighten a range, after which CROWN chooses another line."""
    proven = disputed = 0
    for seed in range(4):
        model, x, y = samples(name, seed)
        with torch.no_grad():
            scale = float(model(x).std())
        steps, exact = unrolled(model, SHAPE), model.double()
        relaxation = read_relaxation(exact, SHAPE)
        for eps in (0.01, 0.05, 0.1, 0.3):
            eps = eps if p == math.inf else 4 * eps
            theirs = crown_margins(steps, x, y, eps, p)
            ours = margin_bounds(relaxation, x.double(), y, eps=eps, p=p, effort=CROWN)
            assert (theirs[ours <= 0] <= 0.01 * scale).all()
            proven, disputed = proven + int((theirs > 0).sum()), disputed + int((theirs <= 0).sum())
    assert proven > 20
    assert disputed > 20


@both
@pytest.mark.parametrize("name", NETWORKS)
@settings(quick, max_examples=4)
@given(seed=st.integers(0, 10**6), eps=st.sampled_from([0.02, 0.06]))
def test_more_effort_never_loosens_a_bound_and_no_attack_goes_below_any(name, p, seed, eps):
    model, x, y = samples(name, seed, 5)
    eps = eps * (5 if p == 2 else 1)
    relaxation = read_relaxation(model, SHAPE)
    efforts = (Effort(0), Effort(1, 3), Effort(2, 3, 2), Effort(1, 999, 4))
    bounds = [margin_bounds(relaxation, x, y, eps=eps, p=p, effort=effort) for effort in efforts]
    for less, more in ((0, 1), (1, 2), (0, 3)):
        assert (bounds[more] >= bounds[less] - 1e-4).all()
    x_adv = brittle.pgd(model, x, y, eps=eps, p=p, steps=8, loss="dlr")
    for point in (x, x_adv):
        with torch.no_grad():
            logits = model(point)
        least = logits.gather(1, y[:, None])[:, 0] - logits.scatter(1, y[:, None], -math.inf).amax(1)
        assert all(bool((bound <= least).all()) for bound in bounds)


@both
def test_slopes_that_are_learnt_prove_more(p):
    (x, y), model = few(60), mlp()
    relaxation = read_relaxation(model, x.shape[1:])
    eps = 0.04 if p == math.inf else 0.4
    fixed, learnt = (margin_bounds(relaxation, x, y, eps=eps, p=p, effort=Effort(1, 999, steps)) for steps in (0, 10))
    assert (learnt >= fixed - 1e-5).all()
    assert float((learnt - fixed).max()) > 0


def test_a_sample_that_the_network_mistakes_within_the_budget_is_given_up_and_no_other():
    """So the costly rounds are spared it: its bound stays that of the first one, and is not positive."""
    (x, y), model = few(40), mlp()
    relaxation = read_relaxation(model, x.shape[1:], examples=x)
    huge = margin_bounds(relaxation, x, y, eps=0.9, p=math.inf, effort=CROWN)
    assert (huge <= 0).all()
    first = margin_bounds(relaxation, x, y, eps=0.9, p=math.inf, effort=Effort(0))
    assert float((huge == first).double().mean()) > 0.9


def test_negative_steps_are_named():
    with pytest.raises(InputError, match="slope_steps"):
        Effort(slope_steps=-1)


@settings(parent=quick, max_examples=8)
@given(seed=st.integers(0, 999), eps=st.floats(0.001, 0.2), p=st.sampled_from([2, math.inf]))
def test_flattened_ends_hold_every_difference_and_the_margins_every_margin(seed, eps, p):
    """The definition, at the points of the ball to which every unit's gradient leads."""
    model, x, y = samples("dense", seed, n=4)
    relaxation = read_relaxation(model, SHAPE)
    network, ball = relaxation.network, Ball.around(x, eps, p, (0.0, 1.0))
    reach = intervals(network, clean_values(relaxation, x), ball)
    bound = margin_bounds(relaxation, x, y, eps=eps, p=p, effort=Effort(2, 999, flattened=True))
    for target in targets(network):
        before = network.ops[target].inputs[0]
        units = torch.arange(network.size(before)).expand(len(x), -1)
        low, high = flattened_ends(network, reach, target, units)
        for unit in range(network.size(before)):
            at = x.clone().requires_grad_()
            (g,) = torch.autograd.grad(clean_values(relaxation, at)[before][:, unit].sum(), at)
            step = g.sign() if p == math.inf else F.normalize(g.flatten(1)).view_as(g)
            for point in (x + eps * step, x - eps * step):
                point = point.clamp(0, 1) if p == math.inf else point
                moved = clean_values(relaxation, point)[before].detach() - reach.inputs[target]
                assert (low <= moved).all()
                assert (moved <= high).all()
                logits = model(point).detach()
                gap = logits.gather(1, y[:, None]) - logits
                assert (bound <= gap.scatter(1, y[:, None], math.inf).amin(1)).all()


def test_flattened_bounds_of_a_sample_do_not_depend_on_the_others():
    model, x, y = samples("dense", 3, n=9)
    relaxation = read_relaxation(model.double(), SHAPE)
    x, effort = x.double(), Effort(2, 999, flattened=True)
    together = margin_bounds(relaxation, x, y, eps=0.05, p=math.inf, effort=effort)
    alone = [
        margin_bounds(relaxation, x[i : i + 1], y[i : i + 1], eps=0.05, p=math.inf, effort=effort) for i in range(9)
    ]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-9, atol=1e-11)


def test_flat_lines_prove_nearly_as_much_as_crown():
    model, (x, y) = mlp(), few(80)
    relaxation = read_relaxation(model, x.shape[1:])
    cheap, flattened, crown = (
        (margin_bounds(relaxation, x, y, eps=0.03, p=math.inf, effort=effort) > 0).sum()
        for effort in (Effort(0), Effort(1, 999, flattened=True), CROWN)
    )
    assert flattened - cheap >= 0.7 * (crown - cheap) > 0


def test_only_dense_layers_with_relu_between_them_are_a_dense_chain():
    deep = read_relaxation(samples("dense", 0)[0], SHAPE).network
    first, *gaining = deep.slopes()
    assert targets(deep) == gaining
    assert [dense_chain(deep, target) for target in gaining] == [[first], [gaining[0], first]]
    for between in (nn.LeakyReLU(0.1), nn.Sequential(nn.BatchNorm1d(5), nn.ReLU())):
        other = nn.Sequential(nn.Linear(6, 5), between, nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
        network = read_relaxation(other, (6,)).network
        assert not any(dense_chain(network, target) for target in targets(network))
    residual = read_relaxation(samples("residual", 0)[0], SHAPE).network
    assert not any(dense_chain(residual, target) for target in targets(residual))
