"""The nuclear norm against numpy's decomposition, its duality with the spectral norm, and factors that grow old."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from brittle.errors import InputError
from brittle.training.interventions.nuclear import RANK_TOLERANCE, RefreshedNuclearNorm, nuclear_norm_of, polar_factor
from brittle.training.interventions.penalties import nuclear_norm
from helpers.matrices import matrices, quick
from helpers.networks import generator, mlp, seeded, untouched


def with_spectrum(sigma, m, n, seed=0):
    """A matrix ``(m, n)`` in float64 with these singular values, and its singular vectors."""
    rng = np.random.default_rng(seed)
    U, _ = np.linalg.qr(rng.standard_normal((m, len(sigma))))
    V, _ = np.linalg.qr(rng.standard_normal((n, len(sigma))))
    return U * sigma @ V.T, U, V


def gradient(W):
    W = W.detach().requires_grad_()
    nuclear_norm_of(W).backward()
    return W.grad


@quick
@given(matrices())
def test_value_is_the_sum_of_singular_values(W):
    exact = np.linalg.norm(W.numpy(), "nuc")
    assert float(nuclear_norm_of(W)) == pytest.approx(exact, rel=1e-12, abs=1e-300)
    # Left out are at most min(m, n) singular values of RANK_TOLERANCE each, besides rounding.
    assert float(nuclear_norm_of(W.float())) == pytest.approx(exact, rel=24 * RANK_TOLERANCE + 1e-6, abs=1e-30)


@quick
@given(matrices())
def test_gradient_is_a_partial_isometry_of_the_numerical_rank_dual_to_the_matrix(W):
    P = gradient(W).numpy()
    rank = np.linalg.matrix_rank(W.numpy())
    singular = np.linalg.svd(P, compute_uv=False)
    np.testing.assert_allclose(singular, np.arange(len(singular)) < rank, atol=1e-9)
    assert float((P * W.numpy()).sum()) == pytest.approx(float(nuclear_norm_of(W)), rel=1e-9, abs=1e-300)


@quick
@given(matrices(), st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 1.0, 30.0]))
def test_gradient_is_a_subgradient_at_kinks_too(W, seed, size):
    D = size * torch.randn(W.shape, generator=generator(seed), dtype=W.dtype)
    for V in (W + D, W - D, D, 0 * W):
        other, here = np.linalg.norm(V.numpy(), "nuc"), np.linalg.norm(W.numpy(), "nuc")
        assert other >= here + float((gradient(W) * (V - W)).sum()) - 1e-9 * (1 + here + other)


@quick
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))
def test_gradient_agrees_with_finite_differences_at_full_rank(m, n, seed):
    W, _, _ = with_spectrum(np.linspace(1, 2, min(m, n)), m, n, seed)
    W, D = torch.from_numpy(W), torch.randn(m, n, generator=generator(seed), dtype=torch.float64)
    h = 1e-5
    slope = (nuclear_norm_of(W + h * D) - nuclear_norm_of(W - h * D)) / (2 * h)
    assert float((gradient(W) * D).sum()) == pytest.approx(float(slope), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("shape", [(40, 40), (40, 90), (90, 40)])
@pytest.mark.parametrize("smallest", [1e-3, 1e-5, 1e-7])
def test_single_precision_keeps_small_singular_values(shape, smallest):
    W, _, _ = with_spectrum(np.logspace(0, np.log10(smallest), 40), *shape)
    W = torch.from_numpy(W).float()
    U, sigma, Vh = np.linalg.svd(W.double().numpy(), full_matrices=False)  # of the matrix as it is stored
    value, P = polar_factor(W)
    assert float(value) == pytest.approx(sigma.sum(), rel=2e-6)
    assert np.linalg.norm(P.double().numpy(), 2) <= 1.001
    kept = sigma > 2e-6 * sigma[0]
    np.testing.assert_allclose(np.diag(U.T @ P.double().numpy() @ Vh.T)[kept], 1, atol=1e-3)
    assert kept.sum() >= 32


@pytest.mark.parametrize("shape", [(30, 30), (20, 70), (70, 20)])
def test_rounding_of_a_low_rank_product_is_not_rank(shape):
    A, B = (torch.randn(a, b, generator=generator(a)) for a, b in ((shape[0], 6), (6, shape[1])))
    _, P = polar_factor(A @ B)
    assert float(P.square().sum()) == pytest.approx(6, rel=1e-5)


@quick
@given(matrices(), st.sampled_from([1e-3, 7.0]))
def test_transposing_and_scaling(W, c):
    for V, tolerance in ((W, 1e-9), (W.float(), 2e-3)):
        value, P = polar_factor(V)
        flipped, Pt = polar_factor(V.mT.contiguous())
        scaled, Pc = polar_factor(c * V)
        assert float(flipped) == pytest.approx(float(value), rel=1e-5)
        assert float(scaled) == pytest.approx(c * float(value), rel=1e-4)
        if float(torch.linalg.cond(W, 2)) < 1e4:  # else a singular value may be on the edge of the numerical rank
            torch.testing.assert_close(Pt, P.mT, rtol=0, atol=tolerance)
            torch.testing.assert_close(Pc, P, rtol=0, atol=tolerance)


def test_half_types_are_taken_in_single_precision():
    W = torch.randn(6, 9, generator=generator(0)).bfloat16().requires_grad_()
    value = nuclear_norm_of(W)
    value.backward()
    assert value.dtype == torch.float32
    assert W.grad.dtype == torch.bfloat16
    assert value.item() == pytest.approx(float(nuclear_norm_of(W.detach().double())), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named(dtype, bad):
    W = torch.ones(3, 4, dtype=dtype)
    W[1, 2] = bad
    with pytest.raises(InputError, match="W: expected finite numbers"):
        nuclear_norm_of(W)


# Refreshed


def moved(net, seed, size=0.02):
    """One seeded step of the weights, in place."""
    with torch.no_grad():
        for place, parameter in enumerate(net.parameters()):
            parameter += size * torch.randn(parameter.shape, generator=generator(seed + place), dtype=parameter.dtype)


def grads(net, value):
    net.zero_grad(set_to_none=True)
    value.backward()
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_refreshed_at_every_call_is_exact(dtype):
    net, penalty = mlp(dtype), RefreshedNuclearNorm(1)
    net = copy.deepcopy(net)
    for seed in range(3):
        moved(net, seed)
        ours, exact = grads(net, penalty(net)), grads(net, nuclear_norm(net))
        assert penalty(net).item() == pytest.approx(nuclear_norm(net).item(), rel=1e-5)
        assert ours.keys() == exact.keys() == {"1.weight", "3.weight"}
        for name in ours:
            torch.testing.assert_close(ours[name], exact[name])


def test_gradient_in_between_is_the_old_factor():
    net, penalty = copy.deepcopy(mlp(torch.float64)), RefreshedNuclearNorm(4)
    for call in range(9):
        if call % 4 == 0:
            factors = {name: polar_factor(net.get_parameter(name))[1] for name in ("1.weight", "3.weight")}
        found = grads(net, penalty(net))
        for name, P in factors.items():
            torch.testing.assert_close(found[name], P.detach(), rtol=0, atol=1e-12)
        moved(net, 10 * call)


def test_refreshed_value_never_exceeds_the_norm():
    net, penalty = copy.deepcopy(mlp(torch.float64)), RefreshedNuclearNorm(3)
    for call in range(7):
        value, exact = penalty(net).item(), nuclear_norm(net).item()
        assert value <= exact * (1 + 1e-12)
        assert (value == pytest.approx(exact, rel=1e-12)) == (call % 3 == 0)
        moved(net, call)


def test_drift_is_what_an_independent_decomposition_finds():
    net, penalty = copy.deepcopy(mlp(torch.float64)), RefreshedNuclearNorm(2)
    weights = [net[1].weight, net[3].weight]

    def polar(W):
        U, _, Vh = np.linalg.svd(W.detach().numpy(), full_matrices=False)
        return U @ Vh

    penalty(net)
    assert penalty.drift is None
    old = [polar(W) for W in weights]
    moved(net, 0)
    penalty(net)
    assert penalty.drift is None
    moved(net, 5)
    penalty(net)
    new = [polar(W) for W in weights]
    error = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(old, new, strict=True)))
    size = np.sqrt(sum(np.sum(b**2) for b in new))
    exact = sum(np.linalg.norm(W.detach().numpy(), "nuc") for W in weights)
    bound = sum(float((a * W.detach().numpy()).sum()) for a, W in zip(old, weights, strict=True))
    assert penalty.drift.gradient == pytest.approx(error / size, rel=1e-8)
    assert penalty.drift.value == pytest.approx((exact - bound) / exact, rel=1e-6)
    assert penalty.drift.steps == 2
    assert penalty.drift.gradient > 0.01


def test_drift_without_change_is_zero_and_finite_for_zero_matrices():
    net = nn.Sequential(nn.Linear(4, 3, bias=False))
    for weight in (torch.zeros(3, 4), torch.ones(3, 4)):
        with torch.no_grad():
            net[0].weight.copy_(weight)
        penalty = RefreshedNuclearNorm(1, layers=["0"])
        values = [penalty(net).item() for _ in range(2)]
        assert values == pytest.approx([nuclear_norm(net, layers=["0"]).item()] * 2)
        assert (penalty.drift.gradient, penalty.drift.value) == pytest.approx((0, 0), abs=1e-6)


def test_resumed_from_its_state_it_goes_on_bit_for_bit():
    def run(net, penalty, calls):
        out = []
        for call in calls:
            value = penalty(net)
            out.append((value.item(), penalty.drift, grads(net, value)))
            moved(net, call)
        return out

    net, penalty = copy.deepcopy(mlp()), RefreshedNuclearNorm(3)
    run(net, penalty, range(5))
    state = {name: tensor.clone() for name, tensor in penalty.state_dict().items()}
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    resumed, net_again = RefreshedNuclearNorm(3), copy.deepcopy(net)
    resumed.load_state_dict(state)
    assert resumed.drift == penalty.drift is not None
    for a, b in zip(run(net, penalty, range(5, 12)), run(net_again, resumed, range(5, 12)), strict=True):
        assert a[:2] == b[:2]
        assert all(torch.equal(a[2][name], b[2][name]) for name in a[2])
    fresh = RefreshedNuclearNorm(3)
    fresh.load_state_dict(RefreshedNuclearNorm(3).state_dict())
    assert fresh.drift is None
    assert float(fresh(net)) == pytest.approx(float(nuclear_norm(net)), rel=1e-5)


def test_low_rank_pairs_are_taken_as_their_product():
    net = seeded(lambda: nn.Sequential(nn.Linear(9, 2, bias=False), nn.Linear(2, 7, bias=False), nn.Linear(7, 3)))
    net = net.double()
    penalty, exact = RefreshedNuclearNorm(5), nuclear_norm(net)
    product = (net[1].weight @ net[0].weight).detach().numpy()
    assert float(penalty(net)) == pytest.approx(np.linalg.norm(product, "nuc"), rel=1e-12)
    first, second = grads(net, penalty(net)), grads(net, exact)
    assert first.keys() == second.keys() == {"0.weight", "1.weight"}
    for name in first:
        torch.testing.assert_close(first[name], second[name])


def test_layers_change_the_outcome_and_the_model_stays_as_it_was():
    net = mlp()
    with untouched(net):
        one, both = RefreshedNuclearNorm(2, layers=["3"]), RefreshedNuclearNorm(2)
        assert float(one(net).detach()) < float(both(net).detach())
        one(net), one(net)


@pytest.mark.parametrize("refresh", [0, -1, 1.5])
def test_refresh_is_a_positive_integer(refresh):
    with pytest.raises(InputError, match="refresh: expected a positive number of calls"):
        RefreshedNuclearNorm(refresh)


def test_another_model_or_a_foreign_state_is_refused():
    penalty = RefreshedNuclearNorm(3)
    penalty(mlp())
    with pytest.raises(InputError, match="model: expected the layers of the calls before; '0'"):
        penalty(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)))
    with pytest.raises(InputError, match="state: expected calls"):
        penalty.load_state_dict({"factor.1": torch.ones(2, 2)})
    with pytest.raises(InputError, match="state: expected calls"):
        penalty.load_state_dict({"calls": torch.tensor(1), "weights": torch.ones(2)})


def test_the_drift_says_how_many_calls_the_old_factors_served():
    penalty, model = RefreshedNuclearNorm(3, layers=["0"]), nn.Sequential(nn.Linear(4, 4))
    told = []
    for _ in range(10):
        penalty(model)
        told.append(None if penalty.drift is None else penalty.drift.steps)
    assert told == [None] * 3 + [3] * 7
