"""One layer measured, against numpy."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from brittle.bounds import layer_bound
from brittle.bounds.layer import entries_kept
from brittle.bounds.layer_table import input_sizes, measure_layer
from brittle.errors import InputError
from brittle.models.build import resnet18_cifar
from brittle.models.layers import read_layers
from brittle.results import FRACTIONS, PROFILE_POINTS
from helpers.matrices import KINDS, matrix

NORMS = (2.0, math.inf)


def linear(W):
    layer = nn.Linear(W.shape[1], W.shape[0], dtype=W.dtype)
    layer.weight.data = W.clone()
    return layer


def view_of(layer):
    (view,) = read_layers(nn.Sequential(layer)).views
    return view


def kept(d):
    return [entries_kept(share, d) for share in FRACTIONS]


def tail(x, k):
    return np.sort(x)[: len(x) - k].sum() / x.sum() if x.any() else 0.0


def fall(x, k):
    falling = np.sort(x)[::-1]
    return 1 - falling[k - 1] / falling[0] if falling[0] else 0.0


@pytest.mark.parametrize("fraction", range(len(FRACTIONS)))
def test_kept_rounds_up_and_keeps_one(fraction):
    for d in range(1, 200):
        exact = (5, 10, 25, 50)[fraction] * d  # in hundredths, as integers
        assert kept(d)[fraction] == max(1, -(-exact // 100))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "zero"])
@pytest.mark.parametrize(("m", "n"), [(7, 12), (12, 7), (1, 5), (5, 1), (20, 20)])
def test_a_dense_layer_is_what_numpy_says(kind, m, n):
    W = matrix(kind, m, n, 5)
    if not W.any():
        pytest.skip("all rows were drawn zero")
    A, result = W.numpy(), measure_layer(view_of(linear(W)), NORMS)
    nu, sigma = np.abs(A).sum(1), np.linalg.svd(A, compute_uv=False)
    frobenius, p = np.sqrt((A**2).sum()), sigma / sigma.sum()
    expected = {
        "row_error": [tail(nu, k) for k in kept(len(nu))],
        "spectral_error": [tail(sigma, k) for k in kept(len(sigma))],
        "row_spread": [fall(nu, k) for k in kept(len(nu))],
        "spectral_spread": [fall(sigma, k) for k in kept(len(sigma))],
        "row_norms": np.sort(nu)[::-1],
        "singular_values": sigma,
        "stable_rank": (sigma**2).sum() / sigma[0] ** 2,
        "nuclear_spectral_ratio": sigma.sum() / sigma[0],
        "nuclear_frobenius_ratio": sigma.sum() ** 2 / (sigma**2).sum(),
        "effective_rank": np.exp(-(p[p > 0] * np.log(p[p > 0])).sum()),
        "effective_sparsity": (np.abs(A).sum() / frobenius) ** 2,
        "frobenius": frobenius,
        "filter_norm_inf": nu.max(),
        "filter_norm_2": sigma[0],
        "rank": (sigma > 1e-10 * sigma[0]).sum(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(result, name), value, rtol=1e-8, atol=1e-10 * sigma[0], err_msg=name)
    assert (result.name, result.shape, result.parameters) == ("0", tuple(A.shape), A.size)
    assert (result.input_size, result.degenerate) == (None, False)
    assert result.operator_norm(2).exact
    assert result.operator_norm(2).upper == pytest.approx(sigma[0])
    assert result.operator_norm(math.inf).upper == pytest.approx(nu.max())
    assert result.concentration(2) == pytest.approx(sigma[0] * math.sqrt(len(sigma)) / frobenius)
    assert result.concentration(math.inf) == pytest.approx(nu.max() * math.sqrt(len(A) / A.shape[1]) / frobenius)


@pytest.mark.parametrize("p", NORMS)
def test_bounds_stand_at_every_fraction(p):
    W = matrix("gaussian", 30, 50, 0)
    result = measure_layer(view_of(linear(W)), NORMS)
    for position, fraction in enumerate(FRACTIONS):
        k = kept(30)[position]
        k_row = {"k_row": kept(50)[position]} if p == math.inf else {}
        assert dataclasses.asdict(result.bound(p, fraction)) == pytest.approx(
            dataclasses.asdict(layer_bound(W, p, k, **k_row))
        )


def test_a_flat_matrix_is_not_concentrated():
    for p in NORMS:
        signs = measure_layer(view_of(linear(matrix("signs", 6, 9, 0))), NORMS)
        assert measure_layer(view_of(linear(torch.eye(6))), NORMS).concentration(2) == pytest.approx(1)
        assert signs.concentration(p) >= 1 - 1e-12
    assert signs.concentration(math.inf) == pytest.approx(1)


def test_a_zero_layer_is_marked():
    result = measure_layer(view_of(linear(torch.zeros(3, 4))), NORMS)
    assert result.degenerate
    assert (result.rank, result.effective_rank, result.frobenius, result.concentration(2)) == (0, 0, 0, 0)
    assert result.row_error == result.spectral_error == (0,) * len(FRACTIONS)
    assert all(bound.lower == bound.upper == 0 for bound in result.operator_norms)


@pytest.mark.parametrize("size", [None, (6, 5)])
def test_a_grouped_convolution_is_its_blocks(size):
    layer = nn.Conv2d(4, 6, 3, padding=1, groups=2, dtype=torch.float64)
    result = measure_layer(view_of(layer), NORMS, size)
    blocks = layer.weight.detach().numpy().reshape(2, 3, 18)
    sigma = np.sort(np.linalg.svd(blocks, compute_uv=False).ravel())[::-1]
    np.testing.assert_allclose(result.singular_values, sigma, rtol=1e-10)
    assert (result.rank, result.shape, result.input_size) == (6, (6, 18), size)
    assert result.bound(2, 0.5).k == 3
    x = torch.eye(4 * 30, dtype=torch.float64).view(-1, 4, 6, 5)
    with torch.no_grad():
        A = (layer(x) - layer(torch.zeros_like(x))).flatten(1).T.numpy()
    for p in NORMS:
        bounds = result.operator_norm(p)
        assert bounds.lower <= np.linalg.norm(A, p) * (1 + 1e-9)
        assert np.linalg.norm(A, p) <= bounds.upper * (1 + 1e-9)


def test_only_the_norms_asked_for_are_reported():
    view = view_of(nn.Conv2d(1, 1, 3))
    assert [bounds.p for bounds in measure_layer(view, (math.inf,)).operator_norms] == [math.inf]
    assert measure_layer(view, ()).operator_norms == ()


def test_an_unknown_operator_is_left_out():
    class Own(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    reflected = nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect")
    assert measure_layer(view_of(Own(1, 2, 3)), NORMS).operator_norms == ()
    assert [bounds.p for bounds in measure_layer(view_of(reflected), NORMS).operator_norms] == [math.inf]
    assert len(measure_layer(view_of(reflected), NORMS, (5, 5)).operator_norms) == 2


@pytest.mark.parametrize("rows", [PROFILE_POINTS - 1, PROFILE_POINTS, PROFILE_POINTS + 1, 1000])
def test_profiles_are_thinned_with_both_ends(rows):
    W = matrix("gaussian", rows, 2, 0)
    nu = np.sort(np.abs(W.numpy()).sum(1))[::-1]
    profile = measure_layer(view_of(linear(W)), NORMS).row_norms
    assert len(profile) == min(rows, PROFILE_POINTS)
    assert (profile[0], profile[-1]) == pytest.approx((nu[0], nu[-1]))
    assert list(profile) == sorted(profile, reverse=True)
    assert np.isin(np.round(profile, 9), np.round(nu, 9)).all()


def test_single_precision_weights_are_measured_in_double():
    W = matrix("gaussian", 6, 8, 0).float()
    assert measure_layer(view_of(linear(W)), NORMS) == measure_layer(view_of(linear(W.double())), NORMS)


# --- sizes --------------------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_forward_pass():
    model = resnet18_cifar(width=2)
    views = read_layers(model).views
    sizes = input_sizes(model, views, (3, 32, 32))
    assert set(sizes) == {view.name for view in views if view.convolution}
    assert (sizes["conv1"], sizes["layer2.0.conv1"], sizes["layer2.0.conv2"]) == ((32, 32), (32, 32), (16, 16))


@pytest.mark.parametrize(("conv", "shape"), [(nn.Conv1d(2, 1, 2), (2, 7)), (nn.Conv3d(1, 1, 2), (1, 2, 3, 4))])
def test_sizes_of_other_axes(conv, shape):
    model = nn.Sequential(conv, nn.ReLU())
    assert input_sizes(model, read_layers(model).views, shape) == {"0": shape[1:]}


def test_convolutions_that_do_not_run_have_no_size():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3)

        def forward(self, x):
            return self.used(x)

    model = Half()
    assert input_sizes(model, read_layers(model).views, (1, 5, 5)) == {"used": (5, 5)}


@pytest.mark.parametrize("shape", [(3, 9, 9), (1, 9, 9)])
def test_the_model_comes_back_as_it_was(shape):
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten()).train()
    model[2].eval()
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    views = read_layers(model).views
    if shape[0] == 3:
        input_sizes(model, views, shape)
    else:
        with pytest.raises(InputError, match=r"input_shape: the model cannot run on inputs of shape \(1, 9, 9\)"):
            input_sizes(model, views, shape)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert [module.training for module in model] == [True, True, False, True]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model)
    assert torch.equal(random_state, torch.get_rng_state())
