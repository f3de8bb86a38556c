"""The region that a budget allows: what rounding leaves outside of it is brought back."""

import pytest
import torch

from brittle.attacks.region import Region
from helpers.networks import generator, uniform


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
