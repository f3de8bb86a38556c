"""Removing channels: the compact network is the masked one, costs are exact, and the user's network is untouched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import brittle
from brittle.compression.allocation import ALLOCATIONS, cut, global_threshold, k_term, keep_best, layerwise
from brittle.compression.cost import channel_costs
from brittle.compression.groups import channel_groups, mask_units, remove_units, unit_scores
from brittle.compression.scores import SCORES, RandomScores, row_l1, row_l2
from brittle.errors import InputError
from brittle.models.macs import layer_macs
from helpers.branching import branching
from helpers.thresholds import best_threshold

SEEDS = range(12)


def random_kept(groups, seed):
    """A random part of every group's units, at least one."""
    draw = torch.Generator().manual_seed(seed)
    kept = {}
    for group in groups.groups:
        count = int(torch.randint(1, group.units + 1, (), generator=draw))
        kept[group.name] = torch.randperm(group.units, generator=draw)[:count].sort().values
    return kept


@pytest.mark.parametrize("seed", SEEDS)
def test_compact_equals_masked_on_random_networks(seed):
    model, x = branching(seed), torch.rand(5, 3, 8, 8)
    groups = channel_groups(model, x)
    kept = random_kept(groups, seed)
    small, zeros = remove_units(model, groups, kept, x), mask_units(model, groups, kept)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(small(x), zeros(x), rtol=1e-4, atol=1e-5)
        assert not torch.equal(zeros(x), model(x))


class Attending(nn.Module):
    """Transposed convolutions of odd geometry, of which the borders are cut off, then attention and a perceptron."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.down, self.wide = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ConvTranspose2d(6, 6, 3, groups=6)
        self.mixed, self.up = nn.ConvTranspose2d(6, 8, 2, padding=1), nn.ConvTranspose2d(8, 4, 3, 2, 2, 1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.inner, self.outer, self.head = nn.Linear(4, 9), nn.Linear(9, 4), nn.Linear(4, 5)

    def forward(self, x):
        """``(N, 3, H, W)`` to ``(N, 5)``."""
        x = torch.sigmoid(self.mixed(torch.sigmoid(self.wide(torch.relu(self.down(x))))))
        tokens = self.up(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head((tokens + self.outer(torch.relu(self.inner(tokens)))).mean(1))


@pytest.mark.parametrize("make", [branching, lambda seed: Attending(seed).eval()], ids=["branching", "attending"])
@pytest.mark.parametrize("seed", SEEDS)
def test_costs_are_those_of_the_compact_network(seed, make):
    model, x = make(seed), torch.rand(2, 3, 8, 8)
    groups = channel_groups(model, x)
    kept = random_kept(groups, seed)
    counts = {name: len(units) for name, units in kept.items()}
    small = remove_units(model, groups, kept, x)
    parameters = channel_costs(model, groups.groups, x, "parameters")
    assert parameters.total() == sum(p.numel() for p in model.parameters())
    assert parameters.total(counts) == pytest.approx(sum(p.numel() for p in small.parameters()), abs=1e-6)
    macs = channel_costs(model, groups.groups, x, "macs")
    assert macs.total() == sum(layer_macs(model, x).values())
    assert macs.total(counts) == pytest.approx(sum(layer_macs(small, x).values()), abs=1e-6)
    filters = channel_costs(model, groups.groups, x, "filters")
    for network, units in ((model, None), (small, counts)):
        rows = [getattr(m, "out_channels", getattr(m, "out_features", 0)) for m in network.modules()]
        assert filters.total(units) == sum(rows)


def test_macs_of_a_known_network():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 5)).eval()
    groups = channel_groups(model, torch.rand(1, 3, 8, 8))
    costs = channel_costs(model, groups.groups, torch.rand(1, 3, 8, 8), "macs")
    assert costs.total() == 64 * 4 * 27 + 256 * 5
    assert costs.total({"0": 1}) == (64 * 4 * 27 + 256 * 5) / 4


@pytest.mark.parametrize("seed", SEEDS[:4])
def test_what_a_unit_saves_is_the_derivative_of_the_cost(seed):
    model, x = branching(seed), torch.rand(2, 3, 8, 8)
    costs = channel_costs(model, channel_groups(model, x).groups, x, "macs")
    removed = costs.units / 3
    for i, saved in enumerate(costs.of_one(removed)):
        step = (torch.arange(len(removed)) == i).double().numpy() * 1e-4
        slope = (costs.without(removed - step) - costs.without(removed + step)) / 2e-4
        assert saved == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("target", ["parameters", "macs", "filters"])
def test_the_asked_ratio_is_met(allocation, target):
    model, x = brittle.build_model("resnet18-cifar", {"width": 8}).eval(), torch.rand(2, 3, 16, 16)
    groups = channel_groups(model, x)
    costs = channel_costs(model, groups.groups, x, target)
    scores = unit_scores(model, groups, row_l1)
    for ratio in (0.3, 0.8):
        found = cut(ALLOCATIONS[allocation](scores), costs.without, (1 - ratio) * costs.total())
        assert found.cost == pytest.approx(costs.total(found.counts))
        assert found.cost / costs.total() == pytest.approx(1 - ratio, abs=0.01)
        assert min(found.counts.values()) >= 1


def test_scores_permute_with_neurons():
    draw = torch.Generator().manual_seed(0)
    for score in (row_l1, row_l2):
        weight, order = torch.randn(6, 3, 2, 2, generator=draw), torch.randperm(6, generator=draw)
        assert torch.equal(score(weight)[order], score(weight[order]))
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    other, order = copy.deepcopy(model), torch.randperm(6, generator=draw)
    with torch.no_grad():
        other[0].weight.copy_(model[0].weight[order])
        other[0].bias.copy_(model[0].bias[order])
        other[2].weight.copy_(model[2].weight[:, order])
    x = torch.rand(3, 4)
    groups = channel_groups(model, x)
    kept = keep_best(unit_scores(model, groups, row_l2), {"0": 3})["0"]
    permuted = keep_best(unit_scores(other, groups, row_l2), {"0": 3})["0"]
    assert sorted(order[permuted].tolist()) == kept.tolist()


def test_the_model_is_left_as_it_is():
    model = branching(3).train()
    model[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seed = torch.get_rng_state()
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    groups = channel_groups(model, x)
    remove_units(model, groups, random_kept(groups, 0), x)
    channel_costs(model, groups.groups, x, "macs")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not model[0].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), seed)


class Counting(nn.Module):
    """A forward that counts on its own sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        """``(N, 6)`` to ``(N, 3)``."""
        inside = torch.relu(self.first(x)).view(len(x), 2, 4)  # fails with fewer
        return self.head(torch.relu(self.second(inside.flatten(1))))


def test_layers_that_cannot_lose_channels_stay_whole_and_are_named():
    groups = channel_groups(Counting().eval(), torch.rand(2, 6))
    assert [group.name for group in groups.groups] == ["second"]
    assert set(groups.whole) == {"first", "head"}
    assert "output" in groups.whole["head"]
    grouped = [nn.Conv2d(3, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2, groups=2), nn.ReLU(), nn.Flatten()]
    whole = channel_groups(nn.Sequential(*grouped, nn.Linear(36, 3), nn.Linear(3, 2)), torch.rand(2, 3, 2, 2)).whole
    assert "2 is a transposed convolution of 2 groups" in whole["0"]
    assert "2" in whole
    normalised = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    assert "LayerNorm" in channel_groups(normalised.eval(), torch.rand(2, 4)).whole["0"]
    with pytest.raises(InputError, match="keep"):
        channel_groups(normalised, torch.rand(2, 4), keep=["9"])
    with pytest.raises(InputError, match="where none can"):
        channel_groups(nn.Sequential(nn.Linear(4, 2)).eval(), torch.rand(2, 4))
    assert (
        "2"
        in channel_groups(nn.Sequential(*normalised, nn.ReLU(), nn.Linear(2, 2)), torch.rand(2, 4), keep=["2"]).whole
    )


def test_a_kept_layer_that_cannot_lose_channels_is_named_when_they_are_removed():
    model, x = Counting().eval(), torch.rand(2, 6)
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    group = channel_groups(plain, x).groups[0]
    from brittle.compression.groups import ChannelGroup, ChannelGroups
    from brittle.compression.removal import Side

    sides = tuple(
        Side(name, side.out, side.channels) for name, side in zip(("first", "second"), group.sides, strict=True)
    )
    forced = ChannelGroups((ChannelGroup("first", 8, sides, ("first",), ()),), {})
    with pytest.raises(InputError, match="'first'"):
        remove_units(model, forced, {"first": torch.arange(4)}, x)


@pytest.mark.parametrize("q", [1.0, 2.0])
@pytest.mark.parametrize("seed", range(8))
def test_k_term_is_the_best_of_all_thresholds(seed, q):
    draw = torch.Generator().manual_seed(seed)
    scores = {n: torch.rand(m, generator=draw, dtype=torch.float64) ** 3 for n, m in (("a", 5), ("b", 3), ("c", 8))}
    weights = {"a": 7.0, "b": 20.0, "c": 3.0}

    def cost(counts):
        return sum(weights[name] * k for name, k in counts.items())

    whole = cost({"a": 5, "b": 3, "c": 8})
    for share in (0.9, 0.6, 0.35):
        found = cut(
            k_term(scores, q),
            lambda gone: whole - sum(w * g for w, g in zip(weights.values(), gone, strict=True)),
            share * whole,
            in_order=True,
        )
        assert found.counts == best_threshold(scores, share * whole, cost, q)


def test_layerwise_takes_the_same_share_and_global_one_threshold():
    scores = {"a": torch.arange(1.0, 9.0), "b": torch.arange(101.0, 105.0)}

    def left(gone):
        return 12.0 - gone.sum()

    assert cut(layerwise(scores), left, 6.0).counts == {"a": 4, "b": 2}
    assert cut(global_threshold(scores), left, 6.0).counts == {"a": 2, "b": 4}
    assert cut(global_threshold(scores), left, 8.0, round_to=4).counts == {"a": 4, "b": 4}
    small = cut(global_threshold(scores), left, 5.0, floor=1)
    assert small.counts == {"a": 1, "b": 4}
    assert small.collapsing == ("a",)
    with pytest.raises(InputError, match="ratio"):
        cut(layerwise(scores), left, 1.0, floor=2)
    with pytest.raises(InputError, match="ratio"):
        cut(layerwise(scores), left, 13.0)


def test_scores_of_batch_norms_and_of_anyones_function():
    model, x = brittle.build_model("resnet18-cifar", {"width": 4}).eval(), torch.rand(2, 3, 8, 8)
    groups = channel_groups(model, x)
    score, of = SCORES["batch_norm_scale"]
    with torch.no_grad():
        model.layer1[0].bn1.weight.copy_(torch.tensor([0.1, -3.0, 0.5, 0.0]))
    scales = unit_scores(model, groups, score, of=of)["layer1.0.conv1"]
    assert scales.tolist() == pytest.approx([0.1, 3.0, 0.5, 0.0])
    random = unit_scores(model, groups, RandomScores(1))
    assert all(torch.equal(random[n], s) for n, s in unit_scores(model, groups, RandomScores(1)).items())
    with pytest.raises(InputError, match="score"):
        unit_scores(model, groups, lambda weight: weight.sum())
    with pytest.raises(InputError, match="score"):
        unit_scores(model, groups, lambda weight: weight.flatten(1).sum(1) / 0)
