"""The planner: influences are derivatives, units without influence go first, and the judge decides."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from brittle.compression.allocation import cut, keep_best, layerwise
from brittle.compression.cost import channel_costs
from brittle.compression.groups import ChannelGroups, channel_groups, mask_units, unit_energies
from brittle.compression.importance import unit_gradients
from brittle.compression.planner import (
    Calibration,
    Candidate,
    candidates,
    cross_entropy,
    influences,
    per_cost,
    plan,
)
from helpers.branching import branching


def scaled(model, group, unit, factor):
    """A copy in which everything that reads a unit reads ``factor`` times it."""
    copied = copy.deepcopy(model)
    for side in group.sides:
        if not side.out:
            module, channels = copied.get_submodule(side.module), side.channels[unit]
            with torch.no_grad():
                if isinstance(module, nn.ConvTranspose2d):
                    module.weight[channels] *= factor
                elif isinstance(module, nn.Conv2d) and module.groups > 1:
                    module.weight[:, (channels % (module.in_channels // module.groups)).unique()] *= factor
                else:
                    module.weight[:, channels] *= factor
    return copied


@pytest.mark.parametrize("seed", range(6))
def test_the_derivative_in_the_presence_of_a_unit(seed):
    model = branching(seed).double()
    x, y = torch.rand(4, 3, 8, 8, dtype=torch.float64), torch.arange(4)
    groups = channel_groups(model, x).groups
    found = unit_gradients(model, groups, x, y, cross_entropy, batch_size=3)
    h = 1e-6
    with torch.no_grad():
        for group in groups:
            for unit in {0, group.units - 1}:
                up, down = (cross_entropy(scaled(model, group, unit, 1 + s)(x), y) for s in (h, -h))
                torch.testing.assert_close(found[group.name][:, unit], (up - down) / (2 * h), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_energies_are_the_group_magnitudes_of_torch_pruning(seed):
    import torch_pruning

    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)
    ).eval()  # fmt: skip
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(10 * seed + number))
    x = torch.rand(2, 3, 8, 8)
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    graph = torch_pruning.DependencyGraph().build_dependency(model, x)
    energies = unit_energies(model, channel_groups(model, x))
    for name, energy in energies.items():
        layer = model.get_submodule(name)
        group = graph.get_pruning_group(layer, torch_pruning.prune_conv_out_channels, list(range(layer.out_channels)))
        torch.testing.assert_close(energy, importance(group).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("seed", range(4))
def test_energies_permute_with_the_units_and_know_no_scale(seed):
    model, x = branching(seed), torch.rand(2, 3, 8, 8)
    groups = channel_groups(model, x)
    larger = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in larger.parameters():
            parameter.mul_(3)
    turned = [replace(g, sides=tuple(replace(s, channels=s.channels.flip(0)) for s in g.sides)) for g in groups.groups]
    first = unit_energies(model, groups)
    for name, energy in unit_energies(larger, ChannelGroups(tuple(turned), groups.whole)).items():
        torch.testing.assert_close(energy, first[name].flip(0))
        assert energy.min() >= 0
        torch.testing.assert_close(energy.mean(), torch.tensor(1.0, dtype=energy.dtype))


def test_removal_of_a_unit_is_its_presence_at_zero():
    model, x = branching(1).double(), torch.rand(4, 3, 8, 8, dtype=torch.float64)
    groups = channel_groups(model, x)
    with torch.no_grad():
        for group in groups.groups:
            rest = mask_units(model, groups, {group.name: torch.arange(1, group.units)})
            torch.testing.assert_close(rest(x), scaled(model, group, 0, 0.0)(x))


def trained():
    """A network on two classes that needs two of its eight units, and samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        model[2].weight[:, 2:] = 0
        model[0].weight[:2] = model[0].weight[:2].abs()  # at work on every sample
    x = torch.rand(64, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = model(x).argmax(1)
    return model, x, y


def test_units_without_influence_go_first():
    model, x, y = trained()
    groups = channel_groups(model, x)
    (found,) = influences(model, groups, Calibration(x, y, x))
    assert bool((found["0"][2:] == 0).all())
    assert bool((found["0"][:2] > 0).all())
    costs = channel_costs(model, groups.groups, x, "parameters")
    budget = costs.total({"0": 2})
    kept = cut(per_cost(found, costs), costs.without, budget)
    assert keep_best(found, kept.counts)["0"].tolist() == [0, 1]
    with torch.no_grad():
        small = mask_units(model, groups, keep_best(found, kept.counts))
        assert float(cross_entropy(small(x), y).mean()) == pytest.approx(float(cross_entropy(model(x), y).mean()))


def test_a_plan_meets_its_budget_and_is_the_judges_choice():
    model, x = branching(4), torch.rand(32, 3, 8, 8)
    with torch.no_grad():
        y = model(x).argmax(1)
    groups = channel_groups(model, x)
    costs = channel_costs(model, groups.groups, x, "macs")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    choices, seen = candidates(model, groups, costs, Calibration(x, y, x)), []

    def judge(kept):
        """Accuracy on what the whole network says."""
        with torch.no_grad():
            seen.append(float((mask_units(model, groups, kept)(x).argmax(1) == y).double().mean()))
        return seen[-1]

    for share in (0.7, 0.5):
        seen.clear()
        found = plan(choices, costs.without, share * costs.total(), judge)
        assert found.cut.cost == pytest.approx(share * costs.total(), abs=0.1 * costs.total())
        assert found.cut.cost == pytest.approx(costs.total({n: len(k) for n, k in found.kept.items()}))
        assert found.judged[found.candidate] == max(found.judged.values()) == max(seen)
        assert found.score == choices[found.candidate].score
        assert judge(found.kept) == found.judged[found.candidate]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_influences_on_parts_are_those_of_the_parts_alone():
    model, x = branching(2), torch.rand(12, 3, 8, 8)
    y, attacked = torch.arange(12) % 5, torch.rand(12, 3, 8, 8)
    groups = channel_groups(model, x)
    whole, *parts = influences(model, groups, Calibration(x, y, attacked), parts=3)
    for number, part in enumerate(parts):
        (own,) = influences(model, groups, Calibration(x[number::3], y[number::3], attacked[number::3]))
        for name, scores in part.items():
            torch.testing.assert_close(scores, own[name], rtol=1e-4, atol=1e-12)
    for name, scores in whole.items():
        torch.testing.assert_close(scores, torch.stack([part[name] for part in parts]).mean(0))


def test_candidates_that_keep_the_same_units_are_judged_once_and_the_first_wins():
    scores, asked = {"a": torch.arange(6.0), "b": torch.arange(4.0)}, []
    same = Candidate("influence", scores, layerwise(scores))
    other = Candidate("row_l2", {"a": torch.arange(6.0).flip(0), "b": scores["b"]}, layerwise(scores))
    choices = {"one": same, "two": same, "three": other}
    found = plan(choices, lambda gone: 10.0 - gone.sum(), 5.0, lambda kept: asked.append(kept) or 0.5)
    assert (len(asked), found.candidate, [*found.judged]) == (2, "one", ["one", "two", "three"])
