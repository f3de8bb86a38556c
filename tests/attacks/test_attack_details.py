"""Details of attacks, curves and verdicts that theory or documentation promises and a slip of a sign would break."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, nn

from brittle.attacks import apgd, apgd_targeted, fgsm, pgd
from brittle.attacks.auto_pgd import Schedule
from brittle.attacks.region import Region
from brittle.evaluation.curves import minimal_distances, security_curve
from brittle.evaluation.dataset import evaluate
from brittle.evaluation.worst_case import Threat, worst_case
from helpers.networks import generator, linear, uniform

NORMS = [math.inf, 2]


@pytest.mark.parametrize("p", NORMS)
def test_the_runs_towards_the_targets_start_from_points_of_their_own(p):
    """Each draws from (seed, target): on the budget's sphere, elsewhere for every target and sample."""
    net, x = linear(5, 12, torch.float64), uniform(1, 3, 12, low=0.4, high=0.6, dtype=torch.float64)
    seen: list[Tensor] = []

    def watched(z: Tensor) -> Tensor:
        if z.requires_grad:
            seen.append(z.detach().clone())
        return net(z)

    with torch.no_grad():
        y = net(x).argmax(1)
    apgd_targeted(watched, x, y, eps=1e-6, p=p, steps=2, targets=4)
    assert len(seen) == 12  # three passes towards each of four targets; no sample breaks
    starts = torch.stack(seen[::3]) - x
    torch.testing.assert_close(torch.linalg.vector_norm(starts, ord=p, dim=2), torch.full((4, 3), 1e-6).double())
    pairs = torch.cdist(starts.flatten(0, 1), starts.flatten(0, 1)) + torch.eye(12)
    assert float(pairs.min()) > 1e-7


@pytest.mark.parametrize("steps", [30, 100, 446])
def test_the_share_of_rising_steps_at_which_a_step_is_halved_is_met_exactly(steps):
    """With rho = k / n, k of n rising losses are at most rho of them, whatever k / n is in binary."""
    n = int(0.22 * steps)
    for k in range(n + 1):
        assert float(Schedule.of(steps, k / n).rises_needed[n]) == k


@pytest.mark.parametrize("over", [1.5e-6, 4e-6, 1e-4, 1.0])
def test_what_rounding_leaves_over_the_budget_is_brought_within_a_part_in_a_million(over):
    """The tolerance at which verdicts accept an example; points within it keep their bits."""
    x = uniform(0, 8, 3, 32, 32)
    direction = torch.randn(x.shape, generator=generator(1))
    direction = direction.double() / torch.linalg.vector_norm(direction.flatten(1).double(), dim=1)[:, None, None, None]
    region = Region.of(x, 0.5, 2, (-10.0, 10.0))
    near, far = ((x.double() + factor * 0.5 * direction).float() for factor in (1 - 1e-6, 1 + over))
    assert torch.equal(region.tighten(near), near)
    mixed = torch.where((torch.arange(8) < 4)[:, None, None, None], near, far)
    assert torch.equal(region.tighten(mixed)[:4], near[:4])
    length = torch.linalg.vector_norm((region.tighten(far).double() - x.double()).flatten(1), dim=1)
    assert bool((length <= 0.5 * (1 + 1e-6)).all())
    assert bool((length >= 0.5 * (1 - 1e-5)).all())


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 1e-4])
def test_budgets_near_the_rounding_of_the_inputs_are_kept_all_the_same(eps):
    """Inputs near 1 move in steps of 6e-8, by more than a part in a million of these budgets."""
    x = uniform(0, 8, 3072, low=0.5, high=0.99)
    region = Region.of(x, eps, 2, (0.0, 1.0))
    moved = x + 2 * eps * torch.randn(x.shape, generator=generator(1)) / 3072**0.5
    length = torch.linalg.vector_norm(region.tighten(moved).double() - x.double(), dim=1)
    assert bool((length <= eps * (1 + 1e-6)).all())


def test_a_certified_radius_does_not_cover_the_budget_that_equals_it():
    """At its own radius a sample of a linear network lies on the boundary, where the prediction is another class."""
    net = nn.Linear(1, 2, dtype=torch.float64)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        net.bias.copy_(torch.tensor([0.5, -0.5]))
    x, y = torch.tensor([[0.75]], dtype=torch.float64), torch.tensor([1])
    threat = Threat((functools.partial(pgd, random_start=False),), 2)
    worst = worst_case(net, x, y, threat, 0.25)
    assert not bool(worst.robust_correct)
    for at in (0.125, 0.25):
        base = worst_case(net, x, y, threat, at)
        curve = security_curve(net, base, threat, at=at, budgets=[0.125, 0.25], radii=torch.tensor([0.25]))
        assert [rate.hits for rate in curve.robust] == [1, 0]


def test_no_survived_budget_exceeds_the_largest_that_was_tried():
    net, x = linear(5, 12, torch.float64), uniform(1, 6, 12, dtype=torch.float64)
    with torch.no_grad():
        y = net(x).argmax(1)
    threat = Threat((functools.partial(pgd, steps=3),), 2)
    found = minimal_distances(net, x, y, threat, largest=1e-6, radii=torch.full((6,), 2e-6))
    assert torch.equal(found.survived, torch.full((6,), 1e-6, dtype=torch.float64))
    assert bool(found.distance.isinf().all())


@pytest.mark.parametrize("p", NORMS)
def test_inputs_that_rounding_left_outside_of_the_bounds_are_clipped_and_so_are_their_examples(p):
    net, x = linear(5, 12), uniform(1, 6, 12)
    x[:, ::2] = torch.tensor([1 + 2.0**-23, -(2.0**-25)]).repeat(3)
    y = net(x.clamp(0, 1)).argmax(1)
    worst = worst_case(net, x, y, Threat((functools.partial(pgd, steps=3),), p), 0.05)
    for values in (worst.x, worst.x_adv):
        assert bool(((values >= 0) & (values <= 1)).all())
    assert torch.equal(worst.x, x.clamp(0, 1))


def test_a_sample_that_is_broken_has_no_positive_margin_even_where_the_network_falls_over():
    """So that results can be ordered and compared: NaN is neither below 0 nor equal to itself."""

    def falls(x: Tensor) -> Tensor:
        sound = torch.stack([torch.ones(len(x)), torch.zeros(len(x))], 1)
        return torch.where(x[:, :1] > 0.52, math.nan, sound)

    def push(model: object, x: Tensor, y: Tensor, *, eps: float, p: float) -> Tensor:
        return x + eps

    found = evaluate(falls, (torch.full((3, 4), 0.5), torch.zeros(3, dtype=torch.int64)), attack=push, eps=0.1)
    assert found.robust_correct == 0
    assert all(sample.adversarial_margin <= 0 < sample.clean_margin for sample in found.samples or ())
    assert len(found.samples or ()) == 3


def test_an_example_within_a_budget_that_was_survived_before_is_what_counts_on_the_curve():
    """An attack that tries only at large budgets: its example, drawn back, breaks every budget that contains it."""

    def late(model: object, x: Tensor, y: Tensor, *, eps: float, p: float) -> Tensor:
        return x - eps * (torch.as_tensor(eps) > 0.4)

    def above_half(x: Tensor) -> Tensor:
        return torch.cat([0.5 - x, x - 0.5], 1)

    x, y = torch.tensor([[0.62]], dtype=torch.float64), torch.tensor([1])
    threat = Threat((late,))
    worst = worst_case(above_half, x, y, threat, 0.3)
    assert bool(worst.robust_correct)
    curve = security_curve(above_half, worst, threat, at=0.3, budgets=[0.1, 0.2, 0.6])
    assert [rate.hits for rate in curve.robust] == [1, 0, 0, 0]


def test_what_is_wrong_without_attack_is_not_proven_at_budget_zero_either():
    net, x = linear(5, 12), uniform(1, 10, 12)
    with torch.no_grad():
        right = net(x).argmax(1)
    y = torch.where(torch.arange(10) < 4, right, (right + 1) % 5)
    for certify in (True, False):
        found = evaluate(net, (x, y), eps=0.0, certify=certify)
        assert [sample.proven for sample in found.samples or ()] == [True] * 4 + [False] * 6
        assert found.proven == found.clean_correct == found.robust_correct == 4


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("attack", [fgsm, pgd, apgd])
def test_a_coordinate_whose_gradient_is_no_number_spoils_no_other(attack, p):
    """The root's slope at 0 is infinite, and 0 times infinite is NaN; the other coordinates decide."""

    def net(x: Tensor) -> Tensor:
        z = x[:, 1:].mean(1) - 0.5 + 0 * x[:, 0].sqrt()
        return torch.stack([-z, z], 1)

    x = torch.full((3, 5), 0.55)
    x[:, 0] = 0
    options = {} if attack is fgsm else {"random_start": False}
    found = attack(net, x, torch.ones(3, dtype=torch.int64), eps=0.2, p=p, **options)
    assert bool((net(found).argmax(1) == 0).all())
    assert bool((torch.linalg.vector_norm(found - x, ord=p, dim=1) <= 0.2 * (1 + 1e-6)).all())


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("attack", [fgsm, pgd, apgd])
def test_gradients_that_share_memory_are_taken(attack, p):
    """The gradient of a sum is one number that stands for all."""

    def net(x: Tensor) -> Tensor:
        z = x.sum(1) - 2.5
        return torch.stack([-z, z], 1)

    found = attack(net, torch.full((3, 5), 0.55), torch.ones(3, dtype=torch.int64), eps=0.2, p=p)
    assert bool((net(found).argmax(1) == 0).all())
