"""Ranks cut down: the best directions, exact costs, and a pair that computes what its product does."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import brittle
from brittle.compression import ALLOCATIONS, cut, rank_costs, singular_directions, truncate
from brittle.compression.factorise import factorised, merged, rank_map, with_pairs
from brittle.compression.truncation import RIDGE
from brittle.errors import InputError
from brittle.linear.compressibility import truncate_spectrum
from brittle.models.macs import layer_macs
from helpers.matrices import matrices, quick
from helpers.networks import convnet, few, generator, mlp, seeded, untidy, untouched
from helpers.thresholds import best_threshold

few_times = settings(quick, max_examples=30)


def dense(W: Tensor) -> nn.Module:
    """A network of one layer, which has a bias."""
    layer = seeded(lambda: nn.Linear(W.shape[1], W.shape[0], dtype=W.dtype))
    with torch.no_grad():
        layer.weight.copy_(W)
    return nn.Sequential(layer)


def resnet() -> nn.Module:
    return seeded(lambda: brittle.build_model("resnet18-cifar", {"width": 8})).eval()


def orthogonal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=generator(seed), dtype=torch.float64)).Q


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# --- directions ---------------------------------------------------------------------------------------------------


def test_scores_are_the_singular_values_of_all_layers_but_the_head_and_the_first_convolution():
    net = resnet()
    spectra = singular_directions(net)
    names = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d)][1:]
    assert list(spectra.layers) == names
    assert spectra.whole == {}
    for name, scores in spectra.scores().items():
        W = net.get_submodule(name).weight.detach().flatten(1).double()
        torch.testing.assert_close(scores, torch.linalg.svdvals(W), atol=1e-12, rtol=1e-10)


@few_times
@given(matrices(largest=30).filter(lambda W: min(W.shape) > 2), st.integers(1, 30))
def test_what_is_lost_is_the_tail_of_the_spectrum_in_both_norms(W, r):
    r = min(r, (W.numel() - 1) // sum(W.shape))
    net, x = dense(W), torch.randn(3, W.shape[1], generator=generator(0), dtype=torch.float64)
    small = truncate(net, singular_directions(net, layers=["0"]), {"0": r}, x)
    sigma = torch.linalg.svdvals(W)
    error = W - merged(small)[0].weight.detach()
    slack = 1e-12 * float(sigma[0])
    assert rank_map(small) == {"0": r}
    assert float(error.norm()) == pytest.approx(float(sigma[r:].norm()), abs=slack)
    assert float(torch.linalg.matrix_norm(error, 2)) == pytest.approx(float(sigma[r]), abs=slack)
    torch.testing.assert_close(small[0][1].bias, net[0].bias)


@few_times
@given(matrices(zero=False), st.integers(0, 99))
def test_scores_do_not_change_when_the_outputs_or_the_inputs_are_rotated(W, seed):
    m, n = W.shape
    Q, P = orthogonal(m, seed), orthogonal(n, seed + 1)
    x = torch.randn(7, n, generator=generator(seed), dtype=torch.float64)

    def scores(W: Tensor, inputs: Tensor | None) -> Tensor:
        return singular_directions(dense(W), layers=["0"], inputs=inputs).layers["0"].scores

    slack = {"atol": 1e-7 * float(W.norm() * x.norm()), "rtol": 0}  # roots of eigenvalues
    torch.testing.assert_close(scores(Q @ W @ P, None), scores(W, None), **slack)
    torch.testing.assert_close(scores(Q @ W @ P, x @ P), scores(W, x), **slack)


@few_times
@given(matrices(zero=False), st.integers(0, 99))
def test_inputs_that_are_alike_in_all_directions_give_the_singular_values(W, seed):
    n = W.shape[1]
    white = orthogonal(n, seed) * n**0.5
    found = singular_directions(dense(W), layers=["0"], inputs=white).layers["0"]
    torch.testing.assert_close(
        found.scores / (1 + RIDGE) ** 0.5, torch.linalg.svdvals(W), atol=1e-6 * float(W.norm()), rtol=0
    )
    silent = singular_directions(dense(W), layers=["0"], inputs=torch.zeros(2, n, dtype=torch.float64)).layers["0"]
    torch.testing.assert_close(silent.scores, torch.linalg.svdvals(W), atol=1e-6 * float(W.norm()), rtol=0)


@few_times
@given(matrices(zero=False).filter(lambda W: min(W.shape) > 2), st.integers(1, 30), st.integers(0, 99))
def test_with_inputs_what_is_lost_is_the_tail_of_the_scores(W, r, seed):
    """Mean square error of the outputs and d times that of the weights are together what the scores left out say."""
    r = min(r, (W.numel() - 1) // sum(W.shape))
    x = torch.randn(9, W.shape[1], generator=generator(seed), dtype=torch.float64) ** 3
    net = dense(W)
    spectra = singular_directions(net, layers=["0"], inputs=x)
    E = W - merged(truncate(net, spectra, {"0": r}, x))[0].weight.detach()
    ridge = RIDGE * (x @ W.T).square().sum() / len(x) / W.square().sum()
    lost = (x @ E.T).square().sum() / len(x) + ridge * E.square().sum()
    whole = spectra.layers["0"].scores.square().sum()
    assert float(lost) == pytest.approx(float(spectra.layers["0"].scores[r:].square().sum()), abs=1e-10 * float(whole))


class Tap(nn.Module):
    """A layer that keeps what comes in; only for measurements."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.got = layer, []

    def forward(self, x: Tensor) -> Tensor:
        """As the layer's."""
        self.got.append(x)
        return self.layer(x)


@pytest.mark.parametrize("make", [convnet, mlp])
def test_with_inputs_no_layer_loses_more_of_its_output_than_with_singular_vectors(make):
    net, (x, _) = copy.deepcopy(make()).double().eval(), few(dtype=torch.float64)
    plain, aware = singular_directions(net), singular_directions(net, inputs=x)
    gains = []
    for name, directions in plain.layers.items():
        layer = net.get_submodule(name)
        tapped = copy.deepcopy(net)
        tapped[int(name)] = tap = Tap(layer)
        tapped(x)
        W = layer.weight.detach().flatten(1)
        for r in range(1, len(directions.scores)):
            if r * sum(W.shape) >= W.numel():
                break
            errors = []
            for spectra in (plain, aware):
                pair = truncate(net, spectra, {name: r}, x).get_submodule(name)
                errors.append(float((pair(tap.got[0]) - layer(tap.got[0])).detach().norm()))
            assert errors[1] <= errors[0] * (1 + 1e-9)
            gains.append(errors[0] / errors[1])
    assert max(gains) > 1.2  # and not because both are the same


# --- networks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [convnet, mlp, resnet])
def test_a_truncated_network_computes_what_truncated_matrices_do(make):
    net = make().eval()
    x = torch.rand(4, *((3, 16, 16) if make is resnet else (1, 8, 8)), generator=generator(0))
    spectra = singular_directions(net)
    ranks = {name: max(1, len(d.scores) // 4) for name, d in spectra.layers.items()}
    small, reference = truncate(net, spectra, ranks, x), copy.deepcopy(net)
    assert rank_map(small) == ranks
    rebuilt = with_pairs(net, ranks)
    rebuilt.load_state_dict(small.state_dict())
    assert torch.equal(rebuilt(x), small(x))
    with torch.no_grad():
        for name, r in ranks.items():
            weight = reference.get_submodule(name).weight
            weight.copy_(truncate_spectrum(weight.flatten(1).double(), r).view_as(weight))
        torch.testing.assert_close(small(x), reference(x), rtol=0, atol=1e-4 * float(reference(x).abs().max()))
        assert not torch.allclose(small(x), net(x), atol=1e-3)


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_costs_are_those_of_the_truncated_network(seed, inputs):
    net, x = resnet(), torch.rand(4, 3, 16, 16, generator=generator(seed))
    spectra = singular_directions(net, inputs=x if inputs else None)
    ranks = {
        name: int(torch.randint(1, len(d.scores) + 1, (), generator=generator(seed + i)))
        for i, (name, d) in enumerate(spectra.layers.items())
    }
    small = truncate(net, spectra, ranks, x)
    assert 0 < len(rank_map(small)) < len(ranks)  # some did not pay
    for name in ranks.keys() - rank_map(small).keys():
        assert torch.equal(small.get_submodule(name).weight, net.get_submodule(name).weight)
    costs = rank_costs(net, spectra, x, "parameters")
    assert costs.total() == parameters(net)
    assert costs.total(ranks) == pytest.approx(parameters(small), abs=1e-6)
    macs = rank_costs(net, spectra, x, "macs")
    assert macs.total() == pytest.approx(sum(layer_macs(net, x).values()), abs=1e-6)
    assert macs.total(ranks) == pytest.approx(sum(layer_macs(small, x).values()), abs=1e-3)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("target", ["parameters", "macs"])
def test_the_asked_ratio_is_met(allocation, target):
    net, x = resnet(), torch.rand(2, 3, 16, 16, generator=generator(0))
    spectra = singular_directions(net)
    costs = rank_costs(net, spectra, x, target)
    for ratio in (0.2, 0.7):
        found = cut(ALLOCATIONS[allocation](spectra.scores()), costs.without, (1 - ratio) * costs.total())
        small = truncate(net, spectra, found.counts, x)
        left = parameters(small) if target == "parameters" else sum(layer_macs(small, x).values())
        assert left == pytest.approx(found.cost, abs=1e-3)
        assert left / costs.total() == pytest.approx(1 - ratio, abs=0.01)


@pytest.mark.parametrize("q", [1.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_k_term_is_the_best_of_all_thresholds(seed, q):
    """Also where layers of little rank lost do not get cheaper by it."""
    sizes = (9, 6), (6, 12), (12, 4), (4, 3)
    net = seeded(lambda: nn.Sequential(*(layer for n, m in sizes for layer in (nn.Linear(n, m), nn.ReLU()))), seed)
    spectra = singular_directions(net)
    costs = rank_costs(net, spectra, torch.rand(1, 9), "parameters")
    for share in (0.9, 0.75, 0.6):
        budget = share * costs.total()
        found = cut(ALLOCATIONS["k_term"](spectra.scores(), q), costs.without, budget, in_order=True)
        assert found.cost == costs.total(best_threshold(spectra.scores(), budget, costs.total, q))


def test_the_users_model_and_all_global_state_stay():
    x, _ = few(8)
    for net in (untidy(), mlp()):
        with untouched(net):
            spectra = singular_directions(net, inputs=x)
            rank_costs(net, spectra, x, "macs")
            small = truncate(net, spectra, dict.fromkeys(spectra.layers, 1), x)
        assert not any(module.training for module in small.modules())
        with untouched(net), pytest.raises(InputError, match="can run on"):
            singular_directions(net, inputs=torch.zeros(2, 5))


class Reader(nn.Module):
    """A forward that reads a layer's weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 9), nn.Linear(9, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 6)`` to ``(N, 3)``."""
        inside = torch.relu(self.first(x))
        return self.head(torch.relu(F.linear(inside, self.second.weight)))


def test_a_layer_that_a_pair_does_not_stand_in_for_is_named():
    net, x = seeded(Reader), torch.rand(3, 6, generator=generator(0))
    spectra = singular_directions(net)
    with untouched(net), pytest.raises(InputError, match="layer 'second' does not"):
        truncate(net, spectra, {"first": 2, "second": 2}, x)
    assert rank_map(truncate(net, spectra, {"first": 2}, x)) == {"first": 2}


def test_layers_that_no_pair_can_replace_are_left_out_and_named():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(128, 3)
    )
    spectra = singular_directions(net)
    assert list(spectra.layers) == ["2"]
    assert spectra.whole == {"1": "has 2 groups"}
    with pytest.raises(InputError, match="'1' has 2 groups"):
        singular_directions(net, layers=["1", "2"])
    with pytest.raises(InputError, match="got none"):
        singular_directions(net[:2])
    paired = factorised(mlp(), {"1": 4})
    assert singular_directions(paired).whole == {"1.0": "is a low-rank pair already"}
    with pytest.raises(InputError, match="pair already"):
        singular_directions(paired, layers=["1"])


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"0": 2}, "expected names of '1', '3'; got '0'"),
        ({"1": 0}, "1 to 32 for layer '1'; got 0"),
        ({"1": 33}, "got 33"),
        ({"1": True}, "got True"),
        ({"1": 2.0}, "got 2.0"),
    ],
)
def test_bad_ranks_are_refused(ranks, message):
    with pytest.raises(InputError, match=message):
        truncate(mlp(), singular_directions(mlp()), ranks, few(2)[0])


def test_what_is_not_finite_is_refused():
    net, (x, _) = copy.deepcopy(mlp()), few(4)
    with pytest.raises(InputError, match="inputs: expected finite"):
        singular_directions(net, inputs=x / 0)
    with pytest.raises(InputError, match="at least one sample"):
        singular_directions(net, inputs=x[:0])
    with pytest.raises(InputError, match="target"):
        rank_costs(net, singular_directions(net), x, "latency")
    with torch.no_grad():
        net[3].weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="finite weights; got others in layer '3'"):
        singular_directions(net)
