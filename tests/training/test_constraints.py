"""What is done to the weights after a step: the promised property, the nearest point, and live parameters."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from brittle.compression.factorise import factorised
from brittle.errors import InputError
from brittle.models.selection import chosen_layers, matrix
from brittle.training.interventions.constraints import (
    CONSTRAINTS,
    condition_cap,
    frobenius_normalisation,
    nearest_floor,
    newton_schulz,
    orthonormal_factors,
    spectral_cap,
)
from helpers.matrices import matrices, quick, vectors
from helpers.networks import convnet, few, generator, mlp, seeded

seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 20)


def filled(module: nn.Module, weight: Tensor) -> nn.Module:
    """The module, bias-free, with this weight."""
    module.to(weight.dtype)
    with torch.no_grad():
        module.weight.copy_(weight)
    return module


def dense(W: Tensor) -> nn.Module:
    return nn.Sequential(filled(nn.Linear(W.shape[1], W.shape[0], bias=False), W))


def pair_of(A: Tensor, B: Tensor) -> nn.Module:
    """A network of one pair, ``B A``."""
    r = len(A)
    modules = filled(nn.Linear(A.shape[1], r, bias=False), A), filled(nn.Linear(r, len(B), bias=False), B)
    return nn.Sequential(nn.Sequential(*modules))


@st.composite
def pairs(draw: st.DrawFn, zero: bool = False) -> nn.Module:
    """Pairs of rank 1 to 8 with factors of any kind and scale."""
    r = draw(st.integers(1, 8))
    m, n = r + draw(st.integers(1, 8)), r + draw(st.integers(1, 8))
    source = generator(draw(seeds))
    A = torch.randn(r, n, dtype=torch.float64, generator=source) * draw(st.sampled_from([1e-2, 1.0, 30.0]))
    B = torch.randn(m, r, dtype=torch.float64, generator=source) * draw(st.sampled_from([1e-2, 1.0, 30.0]))
    kind = draw(st.sampled_from(["plain", "balanced", "deficient", "steep"] + ["zero"] * zero))
    if kind == "deficient":
        A[-1] = A[0]
    if kind == "steep":
        A *= 10.0 ** -torch.arange(r)[:, None]
    if kind == "zero":
        B = torch.zeros_like(B)
    if kind == "balanced":
        U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
        A, B = S[:r].sqrt()[:, None] * Vh[:r], U[:, :r] * S[:r].sqrt()
    return pair_of(A, B)


def whole(net: nn.Module) -> Tensor:
    """The matrix of the only layer of such a network."""
    with torch.no_grad():
        return matrix(*chosen_layers(net, ["0"])).clone()


def factors(net: nn.Module) -> tuple[Tensor, Tensor]:
    return net[0][0].weight.detach().clone(), net[0][1].weight.detach().clone()


def sigmas(W: Tensor) -> Tensor:
    return torch.linalg.svdvals(W)


def bits(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def assert_same_bits(net: nn.Module, before: dict[str, Tensor]) -> None:
    assert [name for name, value in net.state_dict().items() if not torch.equal(value, before[name])] == []


# --- Frobenius normalisation ---------------------------------------------------------------------------------


@quick
@given(matrices(zero=False), st.floats(1e-3, 1e3))
def test_normalising_sets_the_norm_and_keeps_the_direction(W, c):
    net = dense(W)
    apply = frobenius_normalisation(net, c, layers=["0"])
    apply()
    new = whole(net)
    assert float(new.norm()) == pytest.approx(c, rel=1e-13)
    torch.testing.assert_close(new / c, W / W.norm(), atol=1e-14, rtol=0)
    apply()
    torch.testing.assert_close(whole(net), new, atol=0, rtol=1e-14)


@quick
@given(pairs(), st.floats(1e-3, 1e3))
def test_normalising_a_pair_sets_the_products_norm_and_shares_the_change(net, c):
    (A, B), W = factors(net), whole(net)
    frobenius_normalisation(net, c, layers=["0"])()
    new = whole(net)
    assert float(new.norm()) == pytest.approx(c, rel=1e-10)
    torch.testing.assert_close(new / c, W / W.norm(), atol=1e-10, rtol=0)
    ratios = [(now / before).flatten() for now, before in zip(factors(net), (A, B), strict=True)]
    torch.testing.assert_close(ratios[0].mean(), ratios[1].mean(), rtol=1e-12, atol=0)
    assert max(float(ratio.std() / ratio.mean()) for ratio in ratios) < 1e-12


@pytest.mark.parametrize("rows", [1, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_norm_is_right_in_the_weights_own_type(dtype, rows):
    net = dense((torch.rand(rows, 1700, generator=generator(0)) * 0.01).to(dtype))  # a plain float32 sum: 2e-4 off
    frobenius_normalisation(net, 3.0, layers=["0"])()
    error = abs(float(whole(net).double().norm()) / 3 - 1)
    assert error < {torch.float32: 2e-7, torch.float64: 1e-7, torch.bfloat16: 3e-4}[dtype]


def test_without_a_constant_the_norms_stay_through_training():
    for net in (convnet(), factorised(convnet(), 3)):
        apply = frobenius_normalisation(net)
        chosen = chosen_layers(net)
        before = [float(matrix(layer).detach().norm()) for layer in chosen]
        x, y = few()
        optimiser = torch.optim.AdamW(net.parameters(), lr=0.05)
        moved = 0.0
        for _ in range(3):
            optimiser.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimiser.step()
            moved = max(moved, abs(float(matrix(chosen[0]).detach().norm()) / before[0] - 1))
            apply()
        assert moved > 0.01  # steps change the norm; normalising puts it back
        assert [float(matrix(layer).detach().norm()) for layer in chosen] == pytest.approx(before, rel=1e-5)


def test_zero_stays_zero():
    nets = [dense(torch.zeros(4, 3)), pair_of(torch.ones(2, 5), torch.zeros(4, 2))]
    for k in (0.1, 0.3, 0.7, 1.0):  # factors that are not zero, with a product that is, up to rounding
        a, b = torch.tensor([[0.3, -0.7, 0.1]]).double(), torch.full((5, 1), 0.9).double()
        nets.append(pair_of(torch.cat([a, -k * a]), torch.cat([k * b, b], 1)))
    for net in nets:
        before = bits(net)
        frobenius_normalisation(net, 2.0, layers=["0"])()
        spectral_cap(net, 1.0, layers=["0"])()
        assert_same_bits(net, before)
        with pytest.raises(InputError, match=r"norm 0\.0 of layer '0"):
            frobenius_normalisation(net, layers=["0"])


# --- spectral-norm cap -----------------------------------------------------------------------------------------


@quick
@given(matrices(), st.floats(0.05, 20))
def test_capping_is_the_clipping_of_singular_values(W, cap):
    net = dense(W)
    spectral_cap(net, cap, layers=["0"])()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    slack = 1e-9 * max(1.0, float(S[0]))
    torch.testing.assert_close(whole(net), (U * S.clamp_max(cap)) @ Vh, atol=slack, rtol=0)


@quick
@given(matrices(), st.floats(0.01, 0.99), st.sampled_from([torch.float32, torch.float64]))
def test_after_capping_the_norm_is_within_the_stated_tolerance(W, share, dtype):
    W = W.to(dtype)
    cap = max(float(sigmas(W.double())[0]) * share, 1e-3)
    net = dense(W)
    spectral_cap(net, cap, layers=["0"])()
    # the Gram matrix is of the original's scale: a cap far below the norm costs digits, all in float64
    allowed = 1 + 4 * torch.finfo(dtype).eps * math.sqrt(sum(W.shape)) + 1e-13 / share
    assert float(sigmas(whole(net).double())[0]) <= cap * allowed
    once = bits(net)
    spectral_cap(net, cap, layers=["0"])()
    if dtype == torch.float32:
        assert_same_bits(net, once)
    torch.testing.assert_close(whole(net), once["0.weight"], rtol=0, atol=1e-12 * cap)


@quick
@given(matrices(12, zero=False), seeds)
def test_no_matrix_within_the_ball_is_nearer(W, seed):
    cap = 0.6 * float(sigmas(W)[0])
    net = dense(W)
    spectral_cap(net, cap, layers=["0"])()
    P = whole(net)
    source = generator(seed)
    for scale in (1e-3, 0.1, 1.0):
        Z = P + scale * cap * torch.randn(*W.shape, dtype=W.dtype, generator=source)
        Z = Z * (cap / sigmas(Z)[0]).clamp_max(1)
        assert float((W - P).norm()) <= float((W - Z).norm()) * (1 + 1e-12)
        assert float(((W - P) * (Z - P)).sum()) <= 1e-9 * cap * float(W.norm())  # obtuse: a convex set's projection


@quick
@given(pairs(zero=True), st.floats(0.05, 0.95))
def test_capping_a_pair_clips_its_product(net, share):
    (A, B), W = factors(net), whole(net)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    cap = max(share * float(S[0]), 1e-6)
    spectral_cap(net, cap, layers=["0"])()
    slack = 1e-12 * float(A.norm() * B.norm())
    torch.testing.assert_close(whole(net), (U * S.clamp_max(cap)) @ Vh, atol=slack, rtol=0)
    assert all(
        float(new.norm()) <= float(old.norm()) * (1 + 1e-12) for new, old in zip(factors(net), (A, B), strict=True)
    )


def test_what_is_below_the_cap_keeps_its_bits():
    # a Frobenius norm above the cap, and rows and columns too: only the decomposition can tell
    W = torch.linalg.qr(torch.randn(40, 30, generator=generator(0)))[0]
    pair = pair_of(W.T[:7] * 0.99, W[:, :7])
    for net in (dense(W), dense(W.T), pair, copy.deepcopy(pair).double()):
        assert float(torch.linalg.matrix_norm(whole(net), 1)) > 1.5
        before = bits(net)
        spectral_cap(net, 1.0, layers=["0"])()
        assert_same_bits(net, before)
        spectral_cap(net, 0.9, layers=["0"])()
        assert float(sigmas(whole(net))[0]) == pytest.approx(0.9, rel=1e-5)
        if next(net.parameters()).dtype == torch.float32:  # capped, up to rounding: left alone
            before = bits(net)
            spectral_cap(net, 0.9, layers=["0"])()
            assert_same_bits(net, before)


# --- orthonormal factors -------------------------------------------------------------------------------------------


@quick
@given(pairs(zero=True), st.integers(1, 6))
def test_singular_values_follow_newton_schulz_and_the_product_stays(net, steps):
    (A, B), W = factors(net), whole(net)
    orthonormal_factors(net, steps, layers=["0"])()
    bound = float((A @ A.T).abs().sum(1).max())
    want = sigmas(A) / (math.sqrt(bound) if bound > 2 else 1)
    for _ in range(steps):
        want = want * (3 - want**2) / 2
    new, _ = factors(net)
    torch.testing.assert_close(sigmas(new), want.sort(descending=True).values, atol=1e-10, rtol=0)
    torch.testing.assert_close(whole(net), W, atol=1e-12 * float(A.norm() * B.norm()), rtol=0)


@quick
@given(pairs(), st.sampled_from([torch.float32, torch.float64]))
def test_enough_steps_give_orthonormal_rows_in_the_same_row_space(net, dtype):
    net.to(dtype)
    A, _ = factors(net)
    S, Vh = torch.linalg.svd(A.double(), full_matrices=False)[1:]
    if float(S[-1] / S[0]) < 1e-3:  # not of full rank: those directions stay short
        return
    W = whole(net)
    for _ in range(15):
        orthonormal_factors(net, layers=["0"])()
    new, B = factors(net)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(new @ new.T, torch.eye(len(A), dtype=dtype), atol=30 * eps, rtol=0)
    torch.testing.assert_close(new.double() @ Vh.T @ Vh, new.double(), atol=1e4 * eps, rtol=0)
    torch.testing.assert_close(whole(net), W, atol=100 * eps * float(B.norm()), rtol=0)
    before = new.clone()
    orthonormal_factors(net, layers=["0"])()
    torch.testing.assert_close(factors(net)[0], before, atol=4 * eps, rtol=0)


@quick
@given(st.integers(1, 6), st.integers(0, 6), seeds, st.floats(0, 0.5))
def test_the_distance_from_orthonormal_falls_as_stated(r, more, seed, spread):
    A = torch.linalg.qr(torch.randn(r + more, r, dtype=torch.float64, generator=generator(seed)))[0].T
    A = (1 + spread * (2 * torch.rand(r, 1, dtype=torch.float64, generator=generator(seed + 1)) - 1)).sqrt() * A
    E = float(torch.linalg.matrix_norm(A @ A.T - torch.eye(r), 2))
    new = newton_schulz(A @ A.T, 1) @ A
    assert float(torch.linalg.matrix_norm(new @ new.T - torch.eye(r), 2)) <= (3 * E**2 + E**3) / 4 + 1e-14


# --- condition number -----------------------------------------------------------------------------------------------


def changed(sigma: np.ndarray, s: np.ndarray, limit: float) -> np.ndarray:
    """The sum of squared changes at every floor s."""
    return ((np.clip(sigma, s[:, None], limit * s[:, None]) - sigma) ** 2).sum(1)


@quick
@given(vectors(12, zero=False).map(torch.abs), st.one_of(st.just(1.0), st.floats(1.5, 8), st.floats(1, 100)))
def test_the_floor_is_the_best_of_a_fine_grid(sigma, limit):
    best = nearest_floor(sigma, limit)
    values = sigma.numpy()
    top = values.max()
    grid = np.concatenate([np.linspace(0, top, 20001), float(best) * (1 + np.linspace(-1e-3, 1e-3, 21))])
    least = changed(values, np.array([float(best)]), limit)[0]
    assert 0 <= float(best) <= top * (1 + 1e-12)
    assert least <= changed(values, grid, limit).min() + 1e-12 * top**2
    pull = (best - sigma).clamp_min(0).sum() - limit * (sigma - limit * best).clamp_min(0).sum()  # half the derivative
    assert abs(float(pull)) <= 1e-12 * limit**2 * top


@quick
@given(pairs(), st.one_of(st.just(1.0), st.floats(1.05, 50)))
def test_the_condition_number_is_met_and_nothing_nearer_has_it(net, limit):
    (A, B), W = factors(net), whole(net)
    r = len(A)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    condition_cap(net, limit, layers=["0"])()
    P = whole(net)
    after = sigmas(P)
    noise = 1e-11 * float(A.norm() * B.norm() / W.norm())
    assert float(after[0]) <= limit * float(after[r - 1]) * (1 + limit * noise)
    assert float(after[r:].max()) <= noise * float(after[0])  # the rank is still r
    s = nearest_floor(S[:r], limit)
    distance = float((S[:r].clamp(s, limit * s) - S[:r]).norm()) if S[0] > limit * S[r - 1] else 0.0
    assert float((P - W).norm()) == pytest.approx(distance, abs=noise * float(W.norm()))
    source = generator(r)
    for scale in (1e-3, 0.1, 1.0):  # other matrices of rank r with that condition number
        Q = torch.linalg.qr(U[:, :r] + scale * torch.randn(U.shape[0], r, dtype=W.dtype, generator=source))[0]
        R = torch.linalg.qr(Vh[:r].T + scale * torch.randn(Vh.shape[1], r, dtype=W.dtype, generator=source))[0]
        signs = (Q * U[:, :r]).sum(0).sign(), (R * Vh[:r].T).sum(0).sign()
        floor = float(s) * (1 + scale * float(torch.randn(1, generator=source).clamp(-0.9, 0.9)))
        values = S[:r].clamp(floor, limit * floor) if floor > 0 else S[:r]
        Z = (Q * signs[0] * values) @ (R * signs[1]).T
        assert distance <= float((Z - W).norm()) + noise * float(W.norm())


@quick
@given(pairs(), st.floats(1.05, 50))
def test_conditioning_twice_is_conditioning_once(net, limit):
    condition_cap(net, limit, layers=["0"])()
    W, (A, B) = whole(net), factors(net)
    condition_cap(net, limit, layers=["0"])()
    torch.testing.assert_close(whole(net), W, rtol=0, atol=1e-12 * float(A.norm() * B.norm()))


def test_a_pair_within_the_limit_and_a_product_of_zeros_keep_their_bits():
    source = generator(0)
    A, B = torch.randn(4, 9, generator=source), torch.randn(7, 4, generator=source)
    number = float(sigmas(B @ A)[0] / sigmas(B @ A)[3])
    for net, limit in ((pair_of(A, B), number * 1.01), (pair_of(A, 0 * B), 2.0)):
        before = bits(net)
        condition_cap(net, limit, layers=["0"])()
        assert_same_bits(net, before)


def test_a_small_change_of_the_condition_number_is_a_small_change_of_both_factors():
    source = generator(1)
    A, B = torch.randn(4, 9, generator=source), torch.randn(7, 4, generator=source)
    net = pair_of(A, B)
    S = sigmas(B @ A)[:4]
    condition_cap(net, 0.99 * float(S[0] / S[3]), layers=["0"])()
    for new, old in zip(factors(net), (A, B), strict=True):
        assert 0 < float((new - old).norm() / old.norm()) < 0.01  # no jump to other, equivalent factors


def test_condition_and_orthonormality_hold_together():
    net = factorised(mlp(torch.float64), 8)
    x, y = few(dtype=torch.float64)
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.02)
    both = [CONSTRAINTS["condition_cap"](net, 3.0), CONSTRAINTS["orthonormal"](net, 8)]
    for _ in range(5):
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
        for apply in both:
            apply()
    for layer in chosen_layers(net):
        A = layer.modules[0].weight.detach()
        torch.testing.assert_close(A @ A.T, torch.eye(8, dtype=A.dtype), atol=1e-3, rtol=0)
        S = sigmas(matrix(layer).detach())[:8]
        assert float(S[0] / S[7]) <= 3 * (1 + 1e-10)


# --- all of them -----------------------------------------------------------------------------------------------------

VALUES = {"frobenius": 1.5, "spectral_cap": 0.4, "orthonormal": 2, "condition_cap": 1.0}


@pytest.mark.parametrize("name", VALUES)
def test_parameters_and_optimiser_state_keep_their_identity_and_only_chosen_weights_move(name):
    net = factorised(convnet(), 3) if name in ("orthonormal", "condition_cap") else convnet()
    x, y = few()
    optimiser = torch.optim.AdamW(net.parameters())
    F.cross_entropy(net(x), y).backward()
    optimiser.step()
    apply = CONSTRAINTS[name](net, VALUES[name])
    before, where = bits(net), {key: (id(p), p.data_ptr()) for key, p in net.named_parameters()}
    grads = {key: p.grad.clone() for key, p in net.named_parameters()}
    state = copy.deepcopy(optimiser.state_dict())
    apply()
    assert {key: (id(p), p.data_ptr()) for key, p in net.named_parameters()} == where
    assert all(torch.equal(p.grad, grads[key]) and p.requires_grad for key, p in net.named_parameters())
    torch.testing.assert_close(optimiser.state_dict(), state, rtol=0, atol=0)
    moved = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    weights = {id(module.weight) for layer in chosen_layers(net) for module in layer.modules}
    assert moved == {key for key, p in net.named_parameters() if id(p) in weights}


@pytest.mark.parametrize("name", VALUES)
def test_constraints_are_reproducible_and_act_on_the_weights_of_the_moment(name):
    def run() -> dict[str, Tensor]:
        net = factorised(convnet(), 3)
        apply = CONSTRAINTS[name](net, VALUES[name], layers=["4"])
        net.load_state_dict({key: 2 * value for key, value in net.state_dict().items()})
        apply()
        return bits(net)

    once, again = run(), run()
    assert all(torch.equal(once[key], again[key]) for key in once)
    net = factorised(convnet(), 3)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
    CONSTRAINTS[name](net, VALUES[name], layers=["4"])()
    assert torch.equal(once["4.0.weight"], net[4][0].weight)
    assert torch.equal(once["4.1.weight"], net[4][1].weight)


@pytest.mark.parametrize("name", VALUES)
def test_convolution_weights_in_any_memory_order_are_their_filter_matrix(name):
    plain = factorised(convnet(), 3)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    for net in (plain, last):
        CONSTRAINTS[name](net, VALUES[name], layers=["4"])()
    assert last[4][0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(dict(last.state_dict()), dict(plain.state_dict()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["frobenius", "spectral_cap"])
def test_weights_that_are_not_finite_raise_nothing(name):
    for net in (
        dense(torch.full((3, 4), math.nan)),
        dense(torch.full((3, 4), math.inf)),
        pair_of(torch.full((2, 5), math.inf), torch.ones(4, 2)),
    ):
        CONSTRAINTS[name](net, 1.0, layers=["0"])()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("frobenius", 0.0, "constant"),
        ("frobenius", math.inf, "constant"),
        ("spectral_cap", -1.0, "cap"),
        ("spectral_cap", math.nan, "cap"),
        ("spectral_cap", None, "cap"),
        ("condition_cap", 0.5, "limit"),
        ("condition_cap", math.nan, "limit"),
        ("orthonormal", 0, "steps"),
        ("orthonormal", 1.5, "steps"),
        ("orthonormal", True, "steps"),
    ],
)
def test_bad_values_are_refused_by_the_factory(name, value, message):
    with pytest.raises(InputError, match=message):
        CONSTRAINTS[name](factorised(mlp(), 3), value)


def test_layers_that_a_constraint_cannot_act_on_are_refused():
    for name in ("orthonormal", "condition_cap"):
        with pytest.raises(InputError, match="expected low-rank pairs"):
            CONSTRAINTS[name](mlp(), 2)
        with pytest.raises(InputError, match=r"expected low-rank pairs.*got 3"):
            CONSTRAINTS[name](factorised(mlp(), {"1": 3}), 2, layers=["1", "3"])
        CONSTRAINTS[name](factorised(mlp(), {"1": 3}), 2)()  # the layer that is no pair is left
    net = seeded(lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5)), nn.Linear(5, 2)))
    for name in ("frobenius", "spectral_cap"):
        with pytest.raises(InputError, match="computed"):
            CONSTRAINTS[name](net, 1.0)()


@pytest.mark.parametrize("square", [1.0, 2.1, 2.9, 3.5, 100.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_orthogonal_rows_of_one_length_are_orthonormal_after_one_step(square, steps):
    """The largest row sum of the Gram matrix is that length's square then: from 2 on, A is divided by exactly it."""
    gram = square * torch.eye(4, dtype=torch.float64)
    T = newton_schulz(gram, steps)
    torch.testing.assert_close(T @ gram @ T.mT, torch.eye(4, dtype=torch.float64))


def diagonal(values: list[float]) -> nn.Sequential:
    """A layer of these singular values; the values themselves are exact in single precision."""
    model = nn.Sequential(nn.Linear(len(values), len(values), bias=False), nn.ReLU(), nn.Linear(len(values), 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(values).diag())
    return model


@pytest.mark.parametrize("units", [2, 8, 30, 100, 1000])
def test_what_is_above_the_cap_by_more_than_the_stated_rounding_is_capped(units):
    """``t = 4 sqrt(m + n)`` units of rounding, here 16 of them in a matrix of 8 rows and columns."""
    unit = torch.finfo(torch.float32).eps
    model = diagonal([1 + units * unit, 1.0, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125])
    before = model[0].weight.detach().clone()
    spectral_cap(model, 1.0)()
    assert float(torch.linalg.matrix_norm(model[0].weight.detach().double(), 2)) <= 1 + 16 * unit
    assert torch.equal(model[0].weight, before) == (units <= 16)


@pytest.mark.parametrize(("units", "stays"), [(0, True), (2, True), (12, True), (60, False), (1000, False)])
def test_pairs_within_the_stated_rounding_of_the_condition_number_keep_their_bits(units, stays):
    """``1 + 4 sqrt(m + n)`` units of rounding, again 16 and one."""
    unit = torch.finfo(torch.float32).eps
    model = factorised(diagonal([1.0] * 8), 2)
    with torch.no_grad():
        model[0][0].weight.copy_(torch.eye(2, 8))
        model[0][1].weight.zero_()
        model[0][1].weight[0, 0], model[0][1].weight[1, 1] = 4 * (1 + units * unit), 1.0
    before = [parameter.detach().clone() for parameter in model.parameters()]
    condition_cap(model, 4.0)()
    assert all(map(torch.equal, before, model.parameters())) == stays
