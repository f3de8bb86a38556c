"""Directions of largest gain, where a perturbation's energy goes, and how it grows, all counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from brittle.attacks import pgd
from brittle.auditing.directions import (
    energy_read,
    energy_shares,
    first_order_distances,
    layer_responses,
    leading_directions,
    other_class,
)
from brittle.bounds import lipschitz_upper_bound
from brittle.linear.spectrum import top_right_singular_vectors
from brittle.models.layers import read_layers
from helpers.networks import convnet, few, generator, mlp, seeded, uniform, untidy, untouched


def gaussian(seed, *shape):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def view_of(module):
    return read_layers(nn.Sequential(module)).views[0]


# --- energy -------------------------------------------------------------------------------------------------

DENSE = {"flat": (6,), "sequence": (4, 6), "grid": (2, 3, 6)}


@pytest.mark.parametrize("shape", DENSE)
@pytest.mark.parametrize("rows", [3, 6, 9])
def test_energy_of_dense_layers(rows, shape):
    layer = seeded(lambda: nn.Linear(6, rows)).double()
    view = view_of(layer)
    V = top_right_singular_vectors(view.matrix, min(rows, 6))
    _, _, Vt = np.linalg.svd(layer.weight.detach().numpy(), full_matrices=False)
    a = gaussian(0, 7, *DENSE[shape])
    shares = energy_shares(V, view, a)
    vectors = a.reshape(7, -1, 6).numpy()
    by_hand = ((vectors @ Vt.T) ** 2).sum(1).cumsum(1) / (vectors**2).sum((1, 2))[:, None]
    np.testing.assert_allclose(shares.numpy(), by_hand, rtol=1e-7)
    assert (shares.diff(dim=1) >= -1e-12).all()
    assert (shares <= 1 + 1e-12).all()
    if rows >= 6:
        torch.testing.assert_close(shares[:, -1], torch.ones(7, dtype=torch.float64))
    first = torch.tensor(Vt[0]).expand(2, *DENSE[shape]) * 3
    torch.testing.assert_close(energy_shares(V, view, first), torch.ones(2, V.shape[1], dtype=torch.float64))
    assert energy_shares(V, view, 0 * a).isnan().all()


CONVOLUTIONS = {
    "plain": ({"kernel_size": 3}, (7, 6)),
    "padded": ({"kernel_size": 3, "padding": 1}, (5, 5)),
    "strided": ({"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)}, (7, 6)),
    "dilated": ({"kernel_size": 3, "padding": 2, "dilation": 2}, (6, 7)),
    "pointwise": ({"kernel_size": 1}, (4, 4)),
}


def patches_of(x, layer):
    """All patches that the filters see, ``(N, patches, in * kh * kw)``, by explicit loops."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    n, c, h, w = x.shape
    padded = np.zeros((n, c, h + 2 * ph, w + 2 * pw))
    padded[:, :, ph : ph + h, pw : pw + w] = x
    found = []
    for top in range(0, h + 2 * ph - dh * (kh - 1), sh):
        for left in range(0, w + 2 * pw - dw * (kw - 1), sw):
            taps = [padded[:, :, top + dh * i, left + dw * j] for i in range(kh) for j in range(kw)]
            found.append(np.stack(taps, axis=2).reshape(n, -1))
    return np.stack(found, axis=1)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_energy_of_convolutions_is_that_of_all_patches(kind):
    options, size = CONVOLUTIONS[kind]
    layer = seeded(lambda: nn.Conv2d(2, 5, **options)).double()
    view = view_of(layer)
    k = min(view.matrix.shape)
    V = top_right_singular_vectors(view.matrix, k)
    a = gaussian(1, 4, 2, *size)
    patches = patches_of(a.numpy(), layer)
    _, _, Vt = np.linalg.svd(layer.weight.detach().flatten(1).numpy(), full_matrices=False)
    by_hand = ((patches @ Vt.T) ** 2).sum(1).cumsum(1) / (patches**2).sum((1, 2))[:, None]
    np.testing.assert_allclose(energy_shares(V, view, a).numpy(), by_hand, rtol=1e-7)
    whole = torch.linalg.qr(gaussian(2, view.matrix.shape[1], view.matrix.shape[1])).Q
    torch.testing.assert_close(energy_shares(whole, view, a)[:, -1], torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("circular", [False, True])
def test_energy_of_convolutions_in_one_and_three_dimensions(circular):
    mode = "circular" if circular else "zeros"
    for conv, size in ((nn.Conv1d, (9,)), (nn.Conv3d, (3, 4, 3))):
        layer = seeded(lambda conv=conv: conv(2, 4, 3, padding=1, padding_mode=mode, bias=False)).double()
        view = view_of(layer)
        V = top_right_singular_vectors(view.matrix, min(view.matrix.shape))
        a = gaussian(3, 3, 2, *size)
        shares = energy_shares(V, view, a)
        # With all directions of the row space, sum_i sigma_i^2 (E_i - E_{i-1}) is the output's share of energy.
        sigma = torch.linalg.svdvals(view.matrix.double())[: V.shape[1]]
        parts = torch.diff(shares, dim=1, prepend=torch.zeros(3, 1, dtype=torch.float64))
        ratio = (parts * sigma**2).sum(1)
        taps = conv(2, 1, 3, padding=1, padding_mode=mode, bias=False).double()
        nn.init.ones_(taps.weight)
        with torch.no_grad():
            torch.testing.assert_close(ratio, layer(a).square().flatten(1).sum(1) / taps(a**2).flatten(1).sum(1))


@pytest.mark.parametrize(("m", "n", "k"), [(20, 30, 5), (30, 20, 5), (16, 16, 1)])
def test_noise_without_direction_has_k_of_n_parts(m, n, k):
    view = view_of(seeded(lambda: nn.Linear(n, m)))
    V = top_right_singular_vectors(view.matrix, k)
    shares = energy_shares(V, view, gaussian(4, 4000, n))[:, -1]
    error = 4 * math.sqrt(2 * k * (n - k) / (n * n * (n + 2)) / 4000)
    assert abs(float(shares.mean()) - k / n) < error


# --- responses of a network ---------------------------------------------------------------------------------


class Two(nn.Module):
    """Two linear layers whose matrices are known."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(2, 2)
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
            self.a.bias.zero_()
            self.b.weight.copy_(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
            self.b.bias.zero_()

    def forward(self, x):
        """Apply both with a ReLU between them."""
        return self.b(self.a(x).relu())


def test_responses_counted_by_hand():
    net = Two()
    x = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 5.0], [2.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    delta = torch.tensor([[0.1, 0.0, 0.0], [0.0, 0.3, 0.4], [0.0, 0.0, 0.0], [0.2, 0.0, 0.0]])
    (a, b), silent = layer_responses(net, read_layers(net).views, x, x + delta, p=math.inf)
    assert silent == []
    assert (a.layer, b.layer) == ("a", "b")
    assert (a.p, b.p) == (math.inf, math.inf)
    # At a: clean (3, 1), (3, 0), -, (0, 0); changes 0.3, 0.3, -, 0.6; the third is unchanged, the fourth has norm 0.
    assert (a.n, a.excluded) == (2, 2)
    assert a.amplification == pytest.approx(np.sort([0.3 / 10**0.5, 0.1])[0], rel=1e-4)
    assert a.gain == pytest.approx(min(0.3 / 0.1, 0.3 / 0.5), rel=1e-4)
    assert a.k == (1,)
    assert a.energy == pytest.approx(((1 + 0 + 1) / 3,), rel=1e-4)
    assert a.isotropic == pytest.approx((1 / 3,))
    # At b: inputs change by (0.3, 0), (0, 0.3), (0.6, 0); its leading direction is the second.
    assert (b.n, b.excluded) == (2, 2)
    assert b.gain == pytest.approx(min(0.3 / 0.1, 0.6 / 0.5), rel=1e-4)
    assert b.amplification == pytest.approx(min(0.3 / (4 + 9) ** 0.5, 0.6 / 3), rel=1e-4)
    assert b.energy == pytest.approx((1 / 3,), abs=1e-4)
    assert b.isotropic == pytest.approx((0.5,))


def test_the_median_is_over_samples_and_not_over_batches():
    net = mlp(torch.float64)
    x, y = few(50, torch.float64)
    x_adv = pgd(net, x, y, eps=0.1, steps=5)
    views = read_layers(net).views
    whole, _ = layer_responses(net, views, x, x_adv, p=2)
    parts, _ = layer_responses(net, views, x, x_adv, p=2, batch_size=7)
    with torch.no_grad():
        for layer, response, part in zip((1, 3, 5), whole, parts, strict=True):
            clean, moved = net[: layer + 1](x), net[: layer + 1](x_adv)
            change = (moved - clean).norm(dim=1).numpy()
            amplification = np.sort(change / clean.norm(dim=1).numpy())
            gain = np.sort(change / (x_adv - x).flatten(1).norm(dim=1).numpy())
            assert amplification[24] <= response.amplification * (1 + 1e-9)
            assert response.amplification <= amplification[25] * (1 + 1e-9)
            assert gain[24] <= response.gain * (1 + 1e-9)
            assert response.gain <= gain[25] * (1 + 1e-9)
            assert part.gain == pytest.approx(response.gain)
            assert part.energy == pytest.approx(response.energy)
            assert (part.n, part.excluded) == (response.n, response.excluded) == (50, 0)
            assert response.isotropic == tuple(k / net[layer].in_features for k in response.k)


@pytest.mark.parametrize("make", [mlp, convnet])
def test_gains_stay_below_the_certified_bound_up_to_the_layer(make):
    net = make()
    x, y = few(40)
    x_adv = pgd(net, x, y, eps=0.1, steps=5)
    responses, silent = layer_responses(net, read_layers(net).views, x, x_adv, p=math.inf)
    assert silent == []
    for response in responses:
        prefix = net[: int(response.layer) + 1]
        assert response.gain <= lipschitz_upper_bound(prefix, 2, input_shape=(1, 8, 8)).upper
        assert response.gain > 0
        assert response.k[0] == 1
        assert list(response.energy) == sorted(response.energy)
        assert response.energy[-1] <= 1 + 1e-6


def test_the_attack_prefers_the_directions_of_largest_gain():
    x, y = few(100)
    x_adv = pgd(mlp(), x, y, eps=0.3, p=2)
    first = layer_responses(mlp(), read_layers(mlp()).views, x, x_adv, p=2)[0][0]
    noise = x + 0.3 * torch.nn.functional.normalize(gaussian(5, 100, 64).float()).view(100, 1, 8, 8)
    aimless = layer_responses(mlp(), read_layers(mlp()).views, x, noise, p=2)[0][0]
    i = len(first.k) - 2
    assert first.energy[i] > 1.5 * first.isotropic[i]
    assert aimless.energy[i] == pytest.approx(aimless.isotropic[i], rel=0.3)


class Idle(nn.Module):
    """Holds a layer that never runs, and one whose weight is used without the module."""

    def __init__(self):
        super().__init__()
        self.used, self.idle, self.borrowed = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        """Skip ``idle``; use the weight of ``borrowed`` as a function."""
        return torch.nn.functional.linear(self.used(x), self.borrowed.weight)


def test_layers_that_never_run_are_named():
    net = seeded(Idle)
    x = uniform(0, 5, 4)
    responses, silent = layer_responses(net, read_layers(net).views, x, x + 0.1, p=2)
    assert [r.layer for r in responses] == ["used"]
    assert silent == ["idle", "borrowed"]


class Branches(nn.Module):
    """A second branch that changes the first one's input in place, afterwards."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        """Use the stem's output twice, the second time rectified in place."""
        h = self.stem(x) - 0.3
        return self.a(h) + self.b(torch.relu_(h))


def test_what_follows_in_place_does_not_change_what_a_layer_saw():
    net = seeded(Branches)
    x, delta = uniform(0, 40, 4), 0.1 * gaussian(0, 40, 4).float()
    responses, _ = layer_responses(net, read_layers(net).views, x, x + delta, p=2)
    response = next(r for r in responses if r.layer == "a")
    view = view_of(net.a)
    with torch.no_grad():
        change = net.stem(x + delta) - net.stem(x)
    shares = energy_shares(top_right_singular_vectors(net.a.weight.detach(), 2), view, change)
    assert response.energy[0] == pytest.approx(float(shares[:, 0].double().mean()), rel=1e-4)


def test_activations_in_place_do_not_change_what_a_layer_returned():
    x, y = few(20)
    x_adv = pgd(mlp(), x, y, eps=0.1, steps=3)
    net = nn.Sequential(*(nn.ReLU(inplace=True) if isinstance(m, nn.ReLU) else m for m in mlp()))
    plain, rewritten = (layer_responses(n, read_layers(n).views, x, x_adv, p=2)[0] for n in (mlp(), net))
    assert rewritten == plain


def test_nothing_changed_anywhere():
    x, _ = few(6)
    responses, silent = layer_responses(mlp(), read_layers(mlp()).views, x, x.clone(), p=2)
    for response in responses:
        assert (response.n, response.excluded, response.gain, response.amplification) == (0, 6, None, None)
    assert [r.layer for r in responses] + silent == ["1", "3", "5"]


def test_models_come_back_as_they_were_without_hooks():
    net = untidy()
    x, _ = few(6)
    views = read_layers(net).views
    with untouched(net):
        layer_responses(net, views, x, (x + 0.1).clamp(0, 1), p=2)
    with untouched(net), pytest.raises(RuntimeError):
        layer_responses(net, views, x[..., :3], (x + 0.1)[..., :3], p=2)


def test_without_samples_the_model_is_not_run():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    net.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    (response,), silent = layer_responses(
        net, read_layers(net).views, torch.rand(0, 1, 2, 2), torch.rand(0, 1, 2, 2), p=2
    )
    assert (response.n, response.excluded, silent) == (0, 0, [])


# --- how much a layer enlarges, and how far it is to the boundary ---------------------------------------------


def test_a_layers_step_is_the_geometric_mean_of_its_own_gains():
    net, x = mlp(torch.float64), few(30, torch.float64)[0]
    x_adv = x + 0.05 * gaussian(3, *x.shape)
    responses, _ = layer_responses(net, read_layers(net).views, x, x_adv, p=2, batch_size=7)
    change = (x_adv - x).flatten(1)
    with torch.no_grad():
        gains = (change @ net[1].weight.T).norm(dim=1) / change.norm(dim=1)
    assert responses[0].step == pytest.approx(float(gains.log().mean().exp()))
    assert responses[0].step_error == pytest.approx(float(gains.log().std() / math.sqrt(30)))
    shares = energy_shares(leading_directions(read_layers(net).views)["1"], read_layers(net).views[0], change)
    of_first = shares[:, responses[0].k[0] - 1]
    assert responses[0].energy_error[0] == pytest.approx(float(of_first.std() / math.sqrt(30)))


@pytest.mark.parametrize("make", [mlp, convnet, untidy])
def test_a_step_never_exceeds_the_norm_of_the_layers_matrix(make):
    """For convolutions too: the patches, each as often as it is read, are what the filter matrix is multiplied with."""
    net, x = make(), few(20)[0]
    views = read_layers(net).views
    responses, _ = layer_responses(net, views, x, (x + 0.1).clamp(0, 1), p=math.inf)
    assert len(responses) == len(views)
    for response in responses:
        view = next(view for view in views if view.name == response.layer)
        sigma = float(torch.linalg.matrix_norm(view.matrix.double(), ord=2))
        assert response.step is None or 0 < response.step <= sigma * (1 + 1e-5)
        assert (response.step is None) == (not response.energy)


@pytest.mark.parametrize(("options", "size"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_what_a_convolution_reads_is_all_its_patches(options, size):
    layer = seeded(lambda: nn.Conv2d(2, 5, **options)).double()
    a = gaussian(1, 3, 2, *size)
    expected = (patches_of(a.numpy(), layer) ** 2).sum((1, 2))
    np.testing.assert_allclose(energy_read(view_of(layer), a).numpy(), expected, rtol=1e-7)


@pytest.mark.parametrize(
    "labels", [[0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 1], [3, 1, 3, 1, 3, 0, 0], [2, 0], [5, 5, 5], []]
)
def test_partners_are_of_another_class_wherever_there_are_enough(labels):
    y = torch.tensor(labels, dtype=torch.int64)
    rows, partners = other_class(y)
    assert (y[rows] != y[partners]).all()
    most = int(y.bincount().max()) if len(y) else 0
    if 2 * most <= len(y):
        assert sorted(rows.tolist()) == sorted(partners.tolist()) == list(range(len(y)))
    else:
        assert len(rows) >= min(len(y) - most, 1)


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_the_first_order_distance_is_exact_for_two_linear_classes(p):
    net = seeded(lambda: nn.Linear(6, 2)).double()
    x = gaussian(0, 20, 6)
    y = net(x).argmax(1).detach()
    found = first_order_distances(net, x, y, p, batch_size=7)
    w = net.weight[0] - net.weight[1]
    margin = (x @ w + net.bias[0] - net.bias[1]).abs()
    dual = w.abs().sum() if p == math.inf else w.norm()
    torch.testing.assert_close(found, (margin / dual).detach())
    with untouched(net):
        first_order_distances(net, x, y, p)
    assert first_order_distances(net, x[:0], y[:0], p).shape == (0,)
