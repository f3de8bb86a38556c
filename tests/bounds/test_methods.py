"""Every argument that bounds a network has a name with an explanation, and no explanation is of a name unused."""

import math

import torch
from torch import nn

from brittle.bounds import chain_bounds, network_bounds
from brittle.results.methods import Argument


def test_every_method_that_is_made_is_explained_and_no_other():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    convs = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3, stride=2), nn.Flatten()).eval()
    bounds = [network_bounds(dense, (2, math.inf)), network_bounds(convs, (2, math.inf), input_shape=(1, 8, 8))]
    made = {name for both in bounds for bound in both.values() for name, _ in bound.arguments}
    assert made == set(Argument)


def test_a_chain_with_a_zero_layer_has_the_names_of_one_without():
    weights = [torch.ones(3, 2), torch.ones(4, 3), torch.ones(2, 4)]
    for p in (2, math.inf):
        for k_fraction in (0.25, None):
            names = [
                [name for name, _ in chain_bounds([*weights[:2], last], p, k_fraction=k_fraction).values]
                for last in (weights[2], torch.zeros(2, 4))
            ]
            assert names[0] == names[1]
            assert set(names[0]) <= set(Argument)
