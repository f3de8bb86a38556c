"""Low-rank pairs: the best approximation, the same operator, and the way back."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from brittle.compression.factorise import factorised, merged, rank_map, with_pairs
from brittle.errors import InputError
from brittle.models.layers import read_layers
from helpers.matrices import matrices, quick
from helpers.networks import convnet, few, generator, mlp, seeded, uniform, untidy, untouched


def dense(W: Tensor) -> nn.Module:
    """A network of one bias-free layer."""
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype)
    with torch.no_grad():
        layer.weight.copy_(W)
    return nn.Sequential(layer)


def product(pair: nn.Module) -> Tensor:
    return pair[1].weight.detach().flatten(1) @ pair[0].weight.detach().flatten(1)


def truncated(W: Tensor, r: int) -> Tensor:
    """The sum of the first r singular triplets."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vh[:r]


# --- the pair of a matrix -----------------------------------------------------------------------------------


@quick
@given(matrices().filter(lambda W: min(W.shape) > 1), st.integers(1, 30))
def test_the_error_is_the_tail_of_the_spectrum(W, r):
    r = min(r, min(W.shape) - 1)
    pair = factorised(dense(W), r, layers=["0"])[0]
    sigma = torch.linalg.svdvals(W)
    error = W - product(pair)
    slack = 1e-12 * float(sigma[0])
    assert float(error.norm()) == pytest.approx(float(sigma[r:].norm()), abs=slack)
    assert float(torch.linalg.matrix_norm(error, 2)) == pytest.approx(float(sigma[r]), abs=slack)


@quick
@given(matrices(zero=False).filter(lambda W: min(W.shape) > 1), st.integers(1, 30))
def test_the_two_factors_are_balanced(W, r):
    r = min(r, min(W.shape) - 1)
    first, second = factorised(dense(W), r, layers=["0"])[0]
    sigma = torch.linalg.svdvals(W)[:r].diag()
    for gram in (first.weight @ first.weight.T, second.weight.T @ second.weight):
        torch.testing.assert_close(gram.detach(), sigma, atol=1e-12 * float(sigma[0, 0]), rtol=0)


@quick
@given(matrices(zero=False).filter(lambda W: min(W.shape) > 1), st.integers(1, 30), st.integers(0, 99))
def test_random_factors_have_the_layers_norm_and_the_full_rank(W, r, seed):
    r = min(r, min(W.shape) - 1)
    first, second = factorised(dense(W), r, layers=["0"], initial="random", seed=seed)[0]
    P = (second.weight @ first.weight).detach()
    assert float(P.norm()) == pytest.approx(float(W.norm()), rel=1e-12)
    assert int(torch.linalg.matrix_rank(P)) == r
    # Gaussian with variance 1/n and 1/m before a common scale, so their norms agree on average
    assert 0.2 < float(first.weight.detach().norm() / second.weight.detach().norm()) < 5


def test_random_factors_come_from_the_seed_alone():
    def weights(seed: int) -> list[Tensor]:
        torch.manual_seed(seed + 100)  # the global state has no say
        return list(factorised(mlp(), 5, initial="random", seed=seed).state_dict().values())

    with torch.random.fork_rng():
        same, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(a, b) for a, b in zip(same, again, strict=True))
    assert not torch.equal(same[0], other[0])


def test_random_factors_keep_the_size_of_the_output():
    W = torch.randn(200, 300, generator=generator(0), dtype=torch.float64) / 300**0.5
    x = torch.randn(500, 300, generator=generator(1), dtype=torch.float64)
    pair = factorised(dense(W), 40, layers=["0"], initial="random")
    assert float(pair(x).detach().var()) == pytest.approx(float((x @ W.T).var()), rel=0.05)


# --- the pair of a convolution --------------------------------------------------------------------------------

GEOMETRIES = [
    {},
    {"padding": 1},
    {"padding": (2, 0), "stride": (2, 1)},
    {"dilation": 2, "padding": 2, "stride": 2},
    {"dilation": (1, 3), "padding": "same"},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": 2, "padding_mode": "reflect", "stride": 3},
    {"padding": 1, "padding_mode": "replicate", "bias": False},
]


@pytest.mark.parametrize("kernel", [3, (1, 3), 1])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_factorised_convolution_is_the_convolution_with_the_truncated_kernel(geometry, kernel):
    conv = seeded(lambda: nn.Conv2d(4, 6, kernel, **geometry)).double()
    pair = factorised(nn.Sequential(conv), 3, layers=["0"])
    want = copy.deepcopy(conv)
    with torch.no_grad():
        want.weight.copy_(truncated(conv.weight.flatten(1), 3).view_as(conv.weight))
    x = torch.randn(3, 4, 9, 11, dtype=torch.float64, generator=generator(0))
    torch.testing.assert_close(pair(x), want(x), atol=1e-12, rtol=0)
    assert not torch.allclose(pair(x), conv(x), atol=1e-3)  # the kernel was cut
    assert [layer.kernel_size for layer in pair[0]] == [conv.kernel_size, (1, 1)]
    torch.testing.assert_close(merged(pair)(x), want(x), atol=1e-12, rtol=0)


# --- whole networks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("initial", ["svd", "random"])
def test_the_users_model_and_all_global_state_stay(initial):
    for net in (untidy(), mlp()):
        with untouched(net):
            pairs = factorised(net, 3, initial=initial)
        with untouched(pairs):
            merged(pairs)
            rank_map(pairs)
            with_pairs(pairs, rank_map(pairs))


def test_pairs_stand_at_their_layers_names_and_audit_reads_them_as_one():
    net = factorised(convnet(), {"4": 3, "8": 7})
    assert rank_map(net) == {"4": 3, "8": 7}
    assert set(net.state_dict()) == {
        *(key for key in convnet().state_dict() if key[0] not in "48"),
        *("4.0.weight", "4.1.weight", "4.1.bias", "8.0.weight", "8.1.weight", "8.1.bias"),
    }
    views = {view.name: view for view in read_layers(net).views}
    assert list(views) == ["0", "4.0", "8.0"]
    for name, rank, original in (("4", 3, convnet()[4]), ("8", 7, convnet()[8])):
        view = views[f"{name}.0"]
        assert f"rank {rank}" in view.kind
        assert (view.module, view.output) == tuple(net.get_submodule(name))
        assert int(torch.linalg.matrix_rank(view.matrix)) == rank
        want = truncated(original.weight.detach().double().flatten(1), rank)
        torch.testing.assert_close(view.matrix, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("make", [convnet, mlp])
def test_merging_is_the_way_back(make):
    net = make()
    pairs = factorised(net, 4)
    whole = merged(pairs)
    assert rank_map(pairs)
    assert rank_map(whole) == {}
    assert [(key, value.shape) for key, value in whole.state_dict().items()] == [
        (key, value.shape) for key, value in net.state_dict().items()
    ]
    assert [repr(module) for module in whole.modules()] == [repr(module) for module in net.modules()]
    x, _ = few()
    torch.testing.assert_close(whole(x), pairs(x), atol=1e-5, rtol=0)


def test_a_layer_of_low_rank_comes_back_whole():
    net = mlp(torch.float64)
    net = copy.deepcopy(net)
    with torch.no_grad():
        for layer in (net[1], net[3]):
            layer.weight.copy_(truncated(layer.weight, 5))
    x, _ = few(dtype=torch.float64)
    back = merged(factorised(net, 5))
    torch.testing.assert_close(back.state_dict(), net.state_dict(), atol=1e-12, rtol=0)
    torch.testing.assert_close(factorised(net, 5)(x), net(x), atol=1e-11, rtol=0)


@pytest.mark.parametrize("make", [convnet, mlp, lambda: factorised(mlp(), {"3": 2})])
def test_a_state_dict_and_the_ranks_are_enough_to_rebuild(make):
    net = make()
    trained = factorised(net, 3)
    ranks = rank_map(trained)
    rebuilt = with_pairs(net, ranks)
    assert rank_map(rebuilt) == ranks
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.01)
    rebuilt.load_state_dict(trained.state_dict())  # strict
    x, _ = few()
    assert torch.equal(rebuilt(x), trained(x))
    assert with_pairs(net, {}) is not net
    assert rank_map(with_pairs(net, {})) == rank_map(net)


def test_pairs_train_and_both_factors_get_gradients():
    net = factorised(convnet(), 3)
    x, y = few()
    F.cross_entropy(net(x), y).backward()
    assert all(bool(net[4][i].weight.grad.any()) for i in (0, 1))


def test_modes_types_and_frozen_weights_are_kept():
    net = factorised(untidy().double(), {"4": 2, "8": 3})
    assert [p.dtype for p in net.parameters()] == [torch.float64] * len(list(net.parameters()))
    assert [p.requires_grad for p in net[4].parameters()] == [False, False, True]  # the bias was trainable
    assert net[4].training
    assert net[4][0].training
    assert not merged(net)[4].weight.requires_grad
    assert merged(net)[4].training
    asleep = factorised(convnet(), 3)
    assert not any(module.training for net in (asleep, merged(asleep)) for module in net.modules())
    assert all(p.grad is None for p in net.parameters())


def test_a_module_in_two_places_is_replaced_in_both():
    shared = seeded(lambda: nn.Linear(6, 6))
    net = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(6, 3))
    pairs = factorised(net, 2)
    assert pairs[0] is pairs[2]
    assert rank_map(pairs) == {"0": 2}
    back = merged(pairs)
    assert back[0] is back[2]
    assert isinstance(back[0], nn.Linear)


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True)])
def test_a_models_own_bottleneck_merges_with_its_biases(biases):
    first, second = biases

    def dense_pair() -> nn.Module:
        return nn.Sequential(nn.Linear(9, 2, bias=first), nn.Linear(2, 7, bias=second))

    def conv_pair() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 2, 3, stride=2, padding=1, bias=first), nn.Conv2d(2, 5, 1, bias=second))

    for make, shape in ((dense_pair, (4, 9)), (conv_pair, (4, 3, 8, 8))):
        net = seeded(make).double()
        x = uniform(0, *shape, low=-1, dtype=torch.float64)
        whole = merged(net)
        assert isinstance(whole, nn.Linear | nn.Conv2d)
        torch.testing.assert_close(whole(x), net(x), atol=1e-12, rtol=0)
        with pytest.raises(InputError, match="not yet low-rank pairs"):
            factorised(nn.Sequential(net), 1, layers=["0"])


# --- ranks -------------------------------------------------------------------------------------------------------


def test_ranks_by_number_share_and_name():
    net = mlp()  # 64 - 32 - 24 - 10
    assert rank_map(factorised(net, 7)) == {"1": 7, "3": 7}
    assert rank_map(factorised(net, 0.25)) == {"1": 8, "3": 6}
    assert rank_map(factorised(net, 0.001)) == {"1": 1, "3": 1}
    assert rank_map(factorised(net, {"5": 2, "1": 31})) == {"1": 31, "5": 2}
    assert rank_map(factorised(net, 9, layers=["5"])) == {"5": 9}
    assert rank_map(factorised(net, 24)) == {"1": 24}  # no saving in the layer of 24 rows: left
    assert rank_map(factorised(factorised(net, {"1": 4}), 7)) == {"1": 4, "3": 7}  # pairs are left


@pytest.mark.parametrize(
    ("rank", "options", "message"),
    [
        (0, {}, "positive integer"),
        (-3, {}, "positive integer"),
        (True, {}, "positive integer"),
        (1.0, {}, "share between 0 and 1"),
        (float("nan"), {}, "share between 0 and 1"),
        ("3", {}, "positive integer"),
        ({"1": 2.5}, {}, "positive integer"),
        (24, {"layers": ["3"]}, "less than 24"),
        ({"3": 24}, {}, "less than 24"),
        ({"2": 3}, {}, "ReLU"),
        ({"9": 3}, {}, "names of the model's modules"),
        ({"1": 3}, {"layers": ["1"]}, "got both"),
        (3, {"initial": "he"}, "'svd' or 'random'"),
    ],
)
def test_bad_ranks_are_refused(rank, options, message):
    net = mlp()
    with untouched(net), pytest.raises(InputError, match=message):
        factorised(net, rank, **options)


class Own(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _hooked() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 6))
    net[0].register_forward_hook(lambda module, args, output: -output)
    return net


def _tied() -> nn.Module:
    net = nn.Sequential(nn.Embedding(6, 6), nn.Linear(6, 6))
    net[1].weight = net[0].weight
    return net


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), "0", "2 groups"),
        (lambda: nn.Sequential(nn.Conv1d(4, 8, 3)), "0", "Conv1d"),
        (lambda: nn.Sequential(Own(6, 6)), "0", "is a Own"),
        (_hooked, "0", "hooks"),
        (_tied, "1", "shares its weight"),
        (lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))), "0", "Parametrized"),
        (lambda: nn.MultiheadAttention(6, 2), "out_proj", "NonDynamically"),
        (lambda: nn.TransformerEncoderLayer(6, 2, 8), "linear1", "reads its weight"),
    ],
)
def test_what_a_pair_cannot_replace_is_refused(make, name, message):
    net = seeded(make)
    with untouched(net), pytest.raises(InputError, match=message):
        factorised(net, 2, layers=[name])


@pytest.mark.parametrize(("share", "rank"), [(0.04, 1), (0.34, 3), (0.36, 4), (0.96, None)])
def test_a_share_of_the_smaller_side_is_rounded_to_the_nearest_rank(share, rank):
    """A layer that would keep its full rank is left as it is."""
    model = nn.Sequential(nn.Linear(10, 13), nn.ReLU(), nn.Linear(13, 3))
    assert rank_map(factorised(model, share)) == ({} if rank is None else {"0": rank})


@pytest.mark.parametrize(
    "hook",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_a_layer_with_a_hook_of_any_kind_is_not_replaced(hook):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    getattr(model[0], hook)(lambda *_: None)
    with pytest.raises(InputError, match="hooks"):
        factorised(model, 2)


def test_a_pair_of_another_rank_is_not_taken_for_the_one_that_was_asked_for():
    """A state dict of that rank would not fit; the network's own pair of the right rank stays."""
    model = factorised(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), 2)
    assert rank_map(with_pairs(model, {"0": 2})) == {"0": 2}
    with pytest.raises(InputError, match="low-rank pairs"):
        with_pairs(model, {"0": 3})
