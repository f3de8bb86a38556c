"""Universal perturbations: closed forms of the data-free candidates, honest judging, and the borrowed model."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import brittle
from brittle.errors import InputError
from brittle.evaluation.universal_check import data_free_perturbations, judge_universal
from brittle.linear.norms import operator_norm
from brittle.models.normalize import Normalize
from brittle.results import Rate, UniversalResult
from helpers import networks
from helpers.matrices import matrices, quick
from helpers.networks import Logistic, convnet, few, linear, mlp, seeded, uniform, untidy, untouched

NORMS = (math.inf, 2.0)
DTYPES = (torch.float32, torch.float64)


def dense(W, bias=None):
    """A linear classifier with these weights."""
    net = nn.Linear(W.shape[1], W.shape[0], dtype=W.dtype)
    with torch.no_grad():
        net.weight.copy_(W)
        net.bias.copy_(torch.zeros(len(W)) if bias is None else bias)
    return net


def operator(net, shape):
    """The matrix of an affine network, column by column, from its outputs alone."""
    n = math.prod(shape)
    like = next(net.parameters())
    with torch.no_grad():
        at, zero = (net(x.to(like).view(-1, *shape)) for x in (torch.eye(n), torch.zeros(1, n)))
    return (at - zero).flatten(1).T.double()


def size(u, p):
    """In float64, in numpy."""
    return np.linalg.norm(u.double().flatten().numpy(), ord=p)


def same_directions(a, b, rtol=1e-5):
    """Whether two answers hold the same perturbations, whichever sign comes first."""
    a, b = (torch.stack([c.u for c in candidates]) for candidates in (a, b))
    return any(torch.allclose(a, other, rtol=rtol, atol=rtol * float(a.abs().max())) for other in (b, b.flip(0)))


# --- dense layers: exact ------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", NORMS)
@quick
@given(W=matrices(zero=False), eps=st.floats(1e-3, 10), single=st.booleans())
def test_no_perturbation_moves_a_dense_layer_further(p, W, eps, single):
    W = W.float() if single else W
    plus, minus = data_free_perturbations(dense(W), W.shape[1:], eps=eps, p=p)
    assert torch.equal(plus.u, -minus.u)
    assert plus.exact
    assert minus.exact
    assert plus.u.dtype == W.dtype
    assert plus.u.shape == W.shape[1:]
    reached = size(W.double() @ plus.u.double(), p)
    sigma = np.linalg.svd(W.double().numpy(), compute_uv=False)[0]
    norm = float(W.double().abs().sum(1).max()) if p != 2 else sigma
    assert reached == pytest.approx(eps * norm, rel=1e-5 if single else 1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", NORMS)
def test_two_classes_have_the_optimal_universal_direction_up_to_its_sign(p, dtype):
    theta = Logistic(dtype=dtype).theta.detach()
    net = dense(torch.stack([-theta / 2, theta / 2]), torch.tensor([0.5, -0.5]) * theta.sum())
    candidates = data_free_perturbations(net, (12,), eps=0.3, p=p)
    x = uniform(3, 40, 12, low=0.4, high=0.6, dtype=dtype)
    for label in (0, 1):
        y = torch.full((40,), label)
        best = brittle.universal_perturbation(net, [(x, y)], eps=0.3, p=p)
        assert any(torch.allclose(candidate.u, best, atol=1e-4) for candidate in candidates)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", NORMS)
def test_input_normalisation_is_folded(p, dtype):
    mean, std = [0.4, 0.5, 0.3], [0.01, 0.5, 2.0]
    W = uniform(5, 6, 12, low=-1.0, dtype=dtype)
    scale = torch.tensor(std, dtype=dtype).repeat_interleave(4)
    W[0] *= scale * 3  # large after folding only in appearance: the other rows weigh the first channel more
    normalised = nn.Sequential(Normalize(mean, std), nn.Flatten(), dense(W)).to(dtype)
    folded = nn.Sequential(nn.Flatten(), dense(W / scale))
    first, second = (data_free_perturbations(net, (3, 2, 2), eps=0.1, p=p) for net in (normalised, folded))
    assert same_directions(first, second)
    assert not same_directions(
        first, data_free_perturbations(nn.Sequential(nn.Flatten(), dense(W)), (3, 2, 2), eps=0.1, p=p)
    )
    A = operator(normalised, (3, 2, 2))
    gain = size(A @ first[0].u.double().flatten(), p) / size(first[0].u, p)
    assert gain == pytest.approx(float(operator_norm(A, p)), rel=1e-4)


@pytest.mark.parametrize("p", NORMS)
def test_whatever_is_affine_before_the_layer_counts(p):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 5, dtype=torch.float64)

        def forward(self, x):
            return self.head(torch.nn.functional.avg_pool2d(2 * x - 1, 4).flatten(1))

    net = seeded(Scaled)
    A = operator(net, (1, 8, 8))
    (candidate, _) = data_free_perturbations(net, (1, 8, 8), eps=0.5, p=p)
    assert candidate.exact
    assert size(A @ candidate.u.flatten(), p) == pytest.approx(0.5 * float(operator_norm(A, p)))


@pytest.mark.parametrize("p", NORMS)
def test_low_rank_pairs_are_one_layer(p):
    pair = seeded(lambda: nn.Sequential(nn.Linear(20, 3, bias=False), nn.Linear(3, 15)))
    product = (pair[1].weight @ pair[0].weight).detach()
    net = nn.Sequential(*pair, nn.ReLU(), nn.Linear(15, 4))
    candidates = data_free_perturbations(net, (20,), eps=1.0, p=p)
    assert same_directions(candidates, data_free_perturbations(dense(product), (20,), eps=1.0, p=p))
    assert all("“0”" in candidate.name for candidate in candidates)


def test_names_say_sign_row_and_layer():
    W = torch.tensor([[1.0, 1.0], [-2.0, 3.0]])
    plus, minus = data_free_perturbations(nn.Sequential(nn.Flatten(), dense(W)), (2,), eps=1.0)
    assert (plus.name, minus.name) == ("+ sign of row 1 of “1”", "− sign of row 1 of “1”")
    assert plus.u.tolist() == [-1.0, 1.0]
    plus, _ = data_free_perturbations(dense(W), (2,), eps=1.0, p=2)
    assert plus.name == "+ first right singular vector of “Linear”"


# --- other layers: an estimate and a heuristic --------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(2, 5, 3, padding=1),
        lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2, bias=False),
        lambda: nn.Conv2d(2, 6, 2, stride=2),
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
    ],
)
def test_the_direction_of_a_convolution_has_nearly_its_largest_gain(make, dtype):
    net = seeded(make).to(dtype)
    A = operator(net, (2, 6, 6))
    sigma = float(operator_norm(A, 2))
    found = {}
    for steps in (1, 50, 400):
        plus, minus = data_free_perturbations(net, (2, 6, 6), eps=0.7, p=2, steps=steps)
        assert torch.equal(plus.u, -minus.u)
        assert not plus.exact
        assert "(estimate)" in plus.name
        assert size(plus.u, 2) == pytest.approx(0.7, rel=1e-6)
        found[steps] = size(A @ plus.u.double().flatten(), 2) / 0.7
        assert found[steps] <= sigma * (1 + 1e-6)
    assert found[1] <= found[50] * (1 + 1e-6) <= found[400] * (1 + 2e-6)
    assert found[50] > 0.98 * sigma
    assert found[400] > 0.999 * sigma


def test_the_leading_direction_of_a_circular_blur_is_constant():
    net = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular", bias=False, dtype=torch.float64)
    nn.init.constant_(net.weight, 1.0)
    net.weight.data[0, 0, 1, 1] = 3.0
    (candidate, _) = data_free_perturbations(net, (1, 6, 6), eps=1.2, p=2)
    torch.testing.assert_close(candidate.u.abs(), torch.full((1, 6, 6), 0.2, dtype=torch.float64))
    (candidate, other) = data_free_perturbations(net, (1, 6, 6), eps=0.1)
    assert torch.equal(candidate.u.abs(), torch.full((1, 6, 6), 0.1, dtype=torch.float64))
    assert len(candidate.u.unique()) == 1
    assert not candidate.exact
    assert "(heuristic)" in other.name


@pytest.mark.parametrize("p", NORMS)
def test_normalisation_is_folded_into_convolutions(p):
    conv = seeded(lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")).double()
    std = torch.tensor([0.1, 2.0], dtype=torch.float64)
    folded = copy.deepcopy(conv)
    folded.weight.data /= std[None, :, None, None]
    normalised = nn.Sequential(Normalize([0.3, 0.5], std.tolist()), conv).double()
    first, second = (data_free_perturbations(net, (2, 5, 5), eps=0.1, p=p) for net in (normalised, folded))
    assert same_directions(first, second, rtol=1e-5)
    if p == 2:
        assert not same_directions(first, data_free_perturbations(conv, (2, 5, 5), eps=0.1, p=p), rtol=1e-5)


class Attentive(nn.Module):
    """The queries, keys and values of the rows of an image, from one fused layer."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.qkv, self.head = 2, nn.Linear(8, 24), nn.Linear(64, 10)

    def forward(self, x):
        """Rows are tokens."""
        q, k, v = self.qkv(x[:, 0]).chunk(3, dim=-1)
        return self.head(((q @ k.mT).softmax(-1) @ v).flatten(1))


@pytest.mark.parametrize("p", NORMS)
def test_layers_on_tokens_act_on_the_whole_input(p):
    net = seeded(Attentive)
    (candidate, _) = data_free_perturbations(net, (1, 8, 8), eps=0.2, p=p)
    assert candidate.u.shape == (1, 8, 8)
    assert "“qkv”" in candidate.name
    assert not candidate.exact
    if p == 2:
        sigma = float(operator_norm(net.qkv.weight.detach(), 2))
        assert size((candidate.u[0] @ net.qkv.weight.T).detach(), 2) == pytest.approx(0.2 * sigma, rel=0.01)


# --- where the weights suggest nothing ----------------------------------------------------------------------


class Constant(nn.Module):
    """A layer on a constant comes first, then one on the input."""

    def __init__(self):
        super().__init__()
        self.prompt, self.body = nn.Linear(3, 4), nn.Linear(6, 4)

    def forward(self, x):
        """Both are added."""
        return self.prompt(torch.ones(len(x), 3)) + self.body(x)


def test_a_layer_on_constants_is_passed_over():
    assert "“body”" in data_free_perturbations(seeded(Constant), (6,), eps=0.1)[0].name


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize(
    "model",
    [
        Logistic(6),  # its only parameters are not in a layer
        dense(torch.zeros(3, 6)),
        nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten()),
        nn.Sequential(nn.Sigmoid(), nn.Linear(6, 3)),
        nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3)),
        nn.Sequential(nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)),
        torch.sigmoid,
    ],
)
def test_no_candidates_without_an_affine_first_layer(model, p):
    shape = (6,)
    if isinstance(model, nn.Sequential) and isinstance(model[0], nn.Conv1d):
        nn.init.zeros_(model[0].weight)
        shape = (1, 6)
    assert data_free_perturbations(model, shape, eps=0.1, p=p) == ()


def test_what_comes_first_has_to_be_affine_within_the_bounds_only():
    net = nn.Sequential(nn.ReLU(), nn.Hardtanh(0, 1), linear(n=6)[1])
    assert same_directions(*(data_free_perturbations(m, (6,), eps=0.1) for m in (net, net[2])))
    assert data_free_perturbations(net, (6,), eps=0.1, bounds=(-1.0, 1.0)) == ()


# --- budgets ------------------------------------------------------------------------------------------------


@quick
@given(
    p=st.sampled_from(NORMS),
    eps=st.one_of(st.just(0.0), st.floats(1e-6, 1e3)),
    dtype=st.sampled_from(DTYPES),
    make=st.sampled_from([mlp, convnet, linear]),
)
def test_budgets_are_kept(p, eps, dtype, make):
    net = make(dtype=dtype)
    shape = (12,) if make is linear else (1, 8, 8)
    for candidate in data_free_perturbations(net, shape, eps=eps, p=p, steps=3):
        assert candidate.u.dtype == dtype
        assert size(candidate.u, p) <= eps * (1 + 1e-6)
        assert size(candidate.u, p) >= eps * (1 - 1e-6)


@pytest.mark.parametrize("p", NORMS)
def test_inputs_stay_within_the_bounds(p):
    seen = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = copy.deepcopy(mlp())

        def forward(self, x):
            seen.append(torch.stack([*x.detach().aminmax()]))
            return self.body(x)

    x, y = few(30)
    judge_universal(Watched(), (x / 2 + 0.25, y), p=p, eps=3.0, bounds=(0.25, 0.75))
    low, high = torch.stack(seen).T
    assert float(low.min()) == 0.25
    assert float(high.max()) == 0.75


# --- judging ------------------------------------------------------------------------------------------------


def halves(n, seed):
    """The split, and the generator that has drawn it."""
    generator = networks.generator(seed)
    order = torch.randperm(n, generator=generator)
    return order[: n // 2], order[n // 2 :], generator


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", NORMS)
def test_results_are_recounted_by_hand(p, dtype):
    x, y = networks.digits(dtype=dtype)
    eps, net = {math.inf: 0.3, 2.0: 2.0}[p], mlp(dtype)
    fitted, free = judge_universal(net, (x, y), p=p, eps=eps, seed=3, draws=3)
    fit, held, generator = halves(len(x), 3)

    def right(rows, u):
        with torch.no_grad():
            return net((x[rows] + u).clamp(0, 1)).argmax(1) == y[rows]

    def counted(u):
        return Rate(int((clean & ~right(held, u)).sum()), int(clean.sum()))

    clean = right(held, 0)
    u = brittle.universal_perturbation(net, [(x[i], y[i]) for i in fit.split(64)], eps=eps, p=p)
    candidates = data_free_perturbations(net, (1, 8, 8), eps=eps, p=p)
    best = min(candidates, key=lambda candidate: int(right(fit, candidate.u).sum()))
    noise = [torch.randn((1, 1, 8, 8), generator=generator).to(dtype) for _ in range(3)]
    draws = tuple(counted(eps * (v.sign() if p == math.inf else v / v.norm())) for v in noise)
    assert fitted == UniversalResult(
        p, eps, "fitted", "projected ascent", 180, counted(u), draws, Rate(int(right(held, u).sum()), 180)
    )
    assert free == UniversalResult(
        p, eps, "data-free", best.name, 180, counted(best.u), draws, Rate(int(right(held, best.u).sum()), 180)
    )
    assert fitted.fooled.hits > fitted.random_range[1].hits


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("label", [0, 1])
def test_sign_and_fit_come_from_the_fitting_half_alone(p, label):
    W, eps = uniform(1, 1, 16, low=0.2), {math.inf: 0.15, 2.0: 0.6}[p]
    net = dense(torch.cat([-W, W]), torch.tensor([0.5, -0.5]) * W.sum())
    _, held, _ = halves(200, 7)
    y = torch.full((200,), label)
    y[held] = 1 - label
    x = uniform(2, 200, 16, low=0.35, high=0.45) + 0.2 * y[:, None]  # all are right, and within reach
    one = judge_universal(net, (x, y), p=p, eps=eps, seed=7)
    mirrored = judge_universal(net, (1 - x, 1 - y), p=p, eps=eps, seed=7)
    y[held], x[held] = label, uniform(3, 100, 16, low=0.35, high=0.45) + 0.2 * label
    other = judge_universal(net, (x, y), p=p, eps=eps, seed=7)
    for a, b, c in zip(one, other, mirrored, strict=True):
        assert a.direction == b.direction  # the held-out samples have no say in it
        assert a.fooled == c.fooled == Rate(0, 100)  # what fools one class helps the other
        assert b.fooled == Rate(100, 100)
    assert {one[1].direction[0], mirrored[1].direction[0]} == {"+", "−"}


@pytest.mark.parametrize("p", NORMS)
def test_the_control_is_random_perturbations_of_full_size(p):
    """Nearly orthogonal to a direction in high dimension, they hardly move what the data-free one moves fully."""
    v, y = uniform(4, 400, low=-1.0), torch.arange(60) % 3 // 2
    net = dense(torch.stack([-v, v]), torch.tensor([0.5, -0.5]) * v.sum())
    x = 0.5 + (0.02 * y[:, None] - 0.01) * v.sign()
    fitted, free = judge_universal(net, (x, y), p=p, eps={math.inf: 0.02, 2.0: 0.4}[p], draws=20, seed=1)
    _, held, _ = halves(60, 1)
    assert free.fooled == Rate(int((y[held] == 0).sum()), 30)  # all of the class that most samples have
    assert fitted.random_fooled == free.random_fooled == (Rate(0, 30),) * 20


def test_mean_and_range_of_the_random_draws():
    draws = tuple(Rate(hits, 40) for hits in (3, 1, 8, 0, 3))
    result = UniversalResult(2.0, 0.5, "fitted", "", 40, Rate(20, 40), draws, Rate(20, 50))
    assert result.random_mean.value == pytest.approx(np.mean([r.value for r in draws]))
    assert result.random_range == (Rate(0, 40), Rate(8, 40))


def test_a_single_sample_is_not_judged():
    x, y = few(1)
    assert judge_universal(mlp(), (x, y), p=2, eps=0.1) == []
    assert len(judge_universal(mlp(), few(2), p=2, eps=0.1)) == 2


def test_a_network_without_layers_is_judged_by_the_fitted_one():
    x, y = uniform(0, 30, 12), torch.arange(30) % 2
    assert [result.kind for result in judge_universal(Logistic(), (x, y), p=2, eps=0.3)] == ["fitted"]
    callable_ = functools.partial(torch.nn.functional.linear, weight=uniform(1, 2, 12))
    assert [result.kind for result in judge_universal(callable_, (x, y), p=2, eps=0.3)] == ["fitted"]


# --- the borrowed model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", NORMS)
def test_models_and_random_state_are_left_as_they_were(p):
    net = untidy()
    with untouched(net):
        candidates = data_free_perturbations(net, (1, 8, 8), eps=0.1, p=p)
        results = judge_universal(net, few(30), p=p, eps=0.1)
        with pytest.raises(InputError):
            data_free_perturbations(net, (3, 5), eps=0.1, p=p)
    assert not any(candidate.u.requires_grad for candidate in candidates)
    with torch.no_grad(), untouched(net):
        assert same_directions(candidates, data_free_perturbations(net, (1, 8, 8), eps=0.1, p=p), rtol=1e-9)
    assert judge_universal(net.eval(), few(30), p=p, eps=0.1) == results


@pytest.mark.parametrize("p", NORMS)
def test_seeds_determine_everything(p):
    first = judge_universal(convnet(), few(40), p=p, eps=0.3, seed=5)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert judge_universal(convnet(), few(40), p=p, eps=0.3, seed=5) == first
    a, b, c = (data_free_perturbations(convnet(), (1, 8, 8), eps=0.3, p=2, seed=s, steps=1)[0].u for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_layers_whose_output_is_written_over_are_read_before():
    net = seeded(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(72, 3)))
    (candidate, _) = data_free_perturbations(net, (1, 8, 8), eps=1.0, p=2, steps=400)
    A = operator(net[0], (1, 8, 8))
    assert size(A @ candidate.u.double().flatten(), 2) == pytest.approx(float(operator_norm(A, 2)), rel=1e-3)


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -0.1}, "^eps"),
        ({"eps": math.nan}, "^eps"),
        ({"p": 1}, "^p: expected 2 or inf"),
        ({"steps": 0}, "^steps"),
        ({"bounds": (1.0, 0.0)}, "^bounds"),
        ({"bounds": (0.0, math.inf)}, "^bounds"),
        ({"shape": (1, 0, 8)}, "^shape: expected positive whole numbers"),
        ({"shape": (1, 8.0, 8)}, "^shape"),
        ({"shape": (1, 9, 9)}, r"^shape: the model cannot run on inputs of shape \(1, 9, 9\)"),
    ],
)
def test_bad_arguments_of_candidates(options, message):
    with pytest.raises(InputError, match=message):
        data_free_perturbations(mlp(), **({"shape": (1, 8, 8), "eps": 0.1} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -0.1}, "^eps"),
        ({"p": 3}, "^p"),
        ({"draws": 0}, "^draws"),
        ({"bounds": (0.0, 0.5)}, "^x"),
        ({"samples": (few(4)[0] * math.nan, few(4)[1])}, "^x"),
        ({"samples": (few(4)[0], few(4)[1] + 10)}, "^y"),
        ({"samples": (few(4)[0], few(4)[1].float())}, "^y"),
    ],
)
def test_bad_arguments_of_judging(options, message):
    with pytest.raises(InputError, match=message):
        judge_universal(mlp(), **({"samples": few(4), "p": 2, "eps": 0.1} | options))


def test_results_are_frozen():
    (result, _) = judge_universal(mlp(), few(4), p=2, eps=0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.eps = 0.2
