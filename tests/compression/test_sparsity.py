"""Single weights set to zero: the asked share exactly, the smallest ones, and the user's network untouched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import brittle
from brittle.compression import ALLOCATIONS, cut, factorised, keep_best, weight_costs, weight_scores, with_zeros
from brittle.errors import InputError
from brittle.linear import k_term_error
from helpers.networks import convnet, few, mlp, seeded, untidy, untouched
from helpers.thresholds import best_threshold


def resnet() -> nn.Module:
    return seeded(lambda: brittle.build_model("resnet18-cifar", {"width": 8})).eval()


def sparse(model: nn.Module, ratio: float, allocation: str) -> nn.Module:
    scores = weight_scores(model)
    costs = weight_costs(model, scores)
    found = cut(ALLOCATIONS[allocation](scores), costs.without, (1 - ratio) * costs.total())
    return with_zeros(model, keep_best(scores, found.counts))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("ratio", [0.3, 0.9])
def test_the_share_of_zeros_is_met_and_what_stays_is_as_it_was(allocation, ratio):
    net = resnet()
    small = sparse(net, ratio, allocation)
    total = sum(p.numel() for p in net.parameters())
    zeros = sum(int((weight == 0).sum()) for weight in weights(small).values())
    assert zeros / total == pytest.approx(ratio, abs=0.001)
    for name, weight in weights(small).items():
        dense = weights(net)[name]
        assert torch.equal(weight, torch.where(weight != 0, dense, 0))
        assert float(dense[weight == 0].abs().max()) <= float(weight[weight != 0].abs().min())
    others = {
        name: tensor for name, tensor in net.state_dict().items() if name.removesuffix(".weight") not in weights(net)
    }
    assert all(torch.equal(small.state_dict()[name], tensor) for name, tensor in others.items())


def test_global_has_one_threshold_and_layerwise_one_share():
    net = resnet()
    small = weights(sparse(net, 0.8, "global"))
    smallest = min(float(w[w != 0].abs().min()) for w in small.values())
    assert smallest >= max(float(weights(net)[name][w == 0].abs().max()) for name, w in small.items())
    counts = [(int((w == 0).sum()), w.numel()) for w in weights(sparse(net, 0.8, "layerwise")).values()]
    share = sum(zeros for zeros, _ in counts) / sum(entries for _, entries in counts)
    assert all(abs(zeros - share * entries) <= 1 for zeros, entries in counts)


def test_k_term_has_one_error_for_all_layers():
    """No layer's error is above the one threshold, and one more weight taken from any would be."""
    net = resnet()
    small = weights(sparse(net, 0.7, "k_term"))
    errors, next_errors = [], []
    for name, weight in small.items():
        magnitudes, k = weights(net)[name].double().flatten(), int((weight != 0).sum())
        errors.append(float(k_term_error(magnitudes, k)))
        next_errors.append(float(k_term_error(magnitudes, k - 1)))
    assert max(errors) <= min(next_errors)


@pytest.mark.parametrize("q", [1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_k_term_is_the_best_of_all_thresholds(seed, q):
    net = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), seed).double()
    scores = weight_scores(net)
    costs = weight_costs(net, scores)
    assert costs.total() == 3 * 4 + 4 + 4 * 2 + 2
    for share in (0.8, 0.5):
        budget = share * costs.total()
        found = cut(ALLOCATIONS["k_term"](scores, q), costs.without, budget, in_order=True)
        assert found.counts == best_threshold(scores, budget, costs.total, q)


def test_all_convolutions_and_linear_layers_are_chosen_and_shared_weights_once():
    assert list(weight_scores(convnet())) == ["0", "4", "8"]
    assert list(weight_scores(factorised(mlp(), {"1": 3}))) == ["1.0", "1.1", "3", "5"]
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    assert list(weight_scores(net)) == ["0"]
    assert int((with_zeros(net, {"0": torch.arange(5)})[2].weight == 0).sum()) == 11
    assert list(weight_scores(convnet(), layers=["8"])) == ["8"]


def test_the_users_model_and_all_global_state_stay():
    for net in (untidy(), mlp()):
        with untouched(net):
            small = sparse(net, 0.5, "k_term")
        assert [m.training for m in small.modules()] == [m.training for m in net.modules()]
    assert small(few(3)[0]).shape == (3, 10)


def test_bad_input_is_refused():
    net = mlp()
    with pytest.raises(InputError, match="got none in ReLU"):
        weight_scores(nn.ReLU())
    with pytest.raises(InputError, match="computes its own"):
        weight_scores(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))))
    with pytest.raises(InputError, match="a ReLU"):
        weight_scores(net, layers=["2"])
    with pytest.raises(InputError, match="layers with a weight; got '2'"):
        with_zeros(net, {"2": torch.arange(2)})
    with pytest.raises(InputError, match="layers with a weight; got 'no'"):
        with_zeros(net, {"no": torch.arange(2)})
    with pytest.raises(InputError, match="indices below 240 for layer '5'"):
        with_zeros(net, {"5": torch.tensor([0, 240])})
    broken = seeded(lambda: nn.Sequential(nn.Linear(3, 3)))
    with torch.no_grad():
        broken[0].weight[0, 0] = torch.inf
    with pytest.raises(InputError, match="finite weights; got others in layer '0'"):
        weight_scores(broken)
    scores = weight_scores(net)
    costs = weight_costs(net, scores)
    with pytest.raises(InputError, match="ratio"):  # the biases stay
        cut(ALLOCATIONS["global"](scores), costs.without, 0.001 * costs.total())
