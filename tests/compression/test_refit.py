"""Least-squares repair: the minimum that it claims, exact where it can be, and no layer further off than before."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from brittle.compression import channel_groups, factorised, kept_rows, refitted, remove_units, unit_scores
from brittle.compression.scores import row_l2
from brittle.errors import InputError
from helpers.branching import branching
from helpers.matrices import quick
from helpers.networks import accuracy, convnet, digits, generator, seeded, uniform, untouched

TINY = 1e-10


def draw(seed, *shape):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def dense(W, b=None):
    layer = nn.Linear(W.shape[1], W.shape[0], bias=b is not None, dtype=W.dtype)
    with torch.no_grad():
        layer.weight.copy_(W)
        if b is not None:
            layer.bias.copy_(b)
    return layer


def halved(model, x, seed=0):
    """The network with a random half of every group's units, and which outputs its layers still have."""
    groups, g = channel_groups(model, x), generator(seed)
    kept = {
        group.name: torch.randperm(group.units, generator=g)[: max(1, group.units // 2)].sort().values
        for group in groups.groups
    }
    return remove_units(model, groups, kept, x), kept_rows(model, groups.groups, kept)


def outputs(model, names, x):
    """What the named layers yield."""
    seen, hooks = {}, []
    for name in names:
        hook = lambda _, args, output, name=name: seen.update({name: output.clone()})  # noqa: E731
        hooks.append(model.get_submodule(name).register_forward_hook(hook))
    with torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    return seen


def taken(output, rows, layer):
    axis = 1 if isinstance(layer, nn.Conv2d) else output.ndim - 1
    return output if rows is None else output.index_select(axis, rows)


# The minimum


class Beside(nn.Module):
    """A layer that reads what another network makes of the input."""

    def __init__(self, before, layer):
        super().__init__()
        self.before, self.layer = before, layer

    def forward(self, x):
        return self.layer(self.before(x))


class Columns(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.index = index

    def forward(self, x):
        return x[:, self.index]


@quick
@given(
    n=st.integers(2, 8), k=st.integers(1, 7), m=st.integers(1, 4), count=st.integers(1, 30), bias=st.booleans(),
    ridge=st.sampled_from([1e-3, 0.3, 10.0]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_a_dense_layer_is_the_solution_of_its_least_squares_problem(n, k, m, count, bias, ridge, seed):
    """As numpy solves it: rows for the data, and rows of the root of lambda that draw to the weights that are there."""
    k = min(k, n - 1)
    x, W, b = draw(seed, count, n) + 1, draw(seed + 1, m, n), draw(seed + 2, m)
    kept = torch.randperm(n, generator=generator(seed))[:k].sort().values
    original = nn.Sequential(dense(W, b if bias else None))
    compact = Beside(Columns(kept), dense(W[:, kept], b if bias else None))
    before = x.clone()
    layer = refitted(compact, Wrapped(original), x, layers=["layer"], ridge=ridge).layer
    assert torch.equal(x, before)
    X, Y = x[:, kept].numpy(), original(x).detach().numpy()
    C = X - X.mean(0) if bias else X
    root = np.sqrt(ridge * (C**2).sum() / k)
    A = np.block([[X, np.ones((count, int(bias)))], [root * np.eye(k), np.zeros((k, int(bias)))]])
    solution = np.linalg.lstsq(A, np.vstack([Y, root * W[:, kept].T.numpy()]), rcond=None)[0]
    if root > 0:
        np.testing.assert_allclose(layer.weight.detach(), solution[:k].T, rtol=1e-6, atol=1e-8)
        if bias:
            np.testing.assert_allclose(layer.bias.detach(), solution[k], rtol=1e-6, atol=1e-8)


class Wrapped(nn.Module):
    """A network under the name ``layer``."""

    def __init__(self, network):
        super().__init__()
        self.layer = network[0]

    def forward(self, x):
        return self.layer(x)


GEOMETRIES = [
    {},
    {"padding": 1, "stride": 2},
    {"padding": (0, 2), "dilation": (1, 2)},
    {"padding": "same", "dilation": 2},
    {"padding": 2, "padding_mode": "circular", "bias": False},
    {"padding": 1, "padding_mode": "reflect"},
]


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_a_convolution_is_where_the_gradient_of_its_least_squares_problem_vanishes(options):
    """The gradient is taken by autograd through the convolution itself; the problem is convex."""
    original = seeded(lambda: nn.Sequential(nn.Conv2d(5, 4, 3, **options))).double()
    kept, x = torch.tensor([0, 2, 3]), draw(1, 6, 5, 7, 8) + 0.5
    layer = copy.deepcopy(original[0])
    layer.weight, layer.in_channels = nn.Parameter(original[0].weight.detach()[:, kept]), 3
    before = layer.weight.detach().clone()
    with torch.no_grad():
        target = original(x)
    fit = refitted(Beside(Columns(kept), layer), Wrapped(original), x, layers=["layer"], ridge=0.2).layer
    patches = nn.Unfold(3, fit.dilation, 0, fit.stride)
    if fit.padding_mode == "zeros" and fit.padding != "same":
        read = F.unfold(x[:, kept], 3, fit.dilation, fit.padding, fit.stride)
    else:
        wide = [2, 2, 2, 2] if options["padding"] in (2, "same") else [1, 1, 1, 1]
        read = patches(F.pad(x[:, kept], wide, "constant" if fit.padding_mode == "zeros" else fit.padding_mode))
    rows = read.transpose(1, 2).flatten(0, 1)
    rows = rows - rows.mean(0) if fit.bias is not None else rows
    strength = 0.2 * rows.square().sum() / rows.shape[1]
    loss = (fit(x[:, kept]) - target).square().sum() + strength * (fit.weight - before).square().sum()
    size = float(loss.detach())
    for gradient in torch.autograd.grad(loss, list(fit.parameters())):
        assert float(gradient.abs().max()) < 1e-9 * size
    assert size < float((layer(x[:, kept]) - target).square().sum().detach())


def test_a_low_rank_layer_has_its_second_factor_fitted():
    """``B = W C A^T (A C A^T)^-1`` for inputs of scatter C: the best product with these rows on these inputs."""
    W, x = draw(0, 6, 9), draw(1, 200, 9) * torch.arange(1, 10)
    original = nn.Sequential(dense(W), nn.Sequential(dense(draw(2, 4, 6))))
    compact = factorised(original, {"0": 3})
    first, second = refitted(compact, original, x, layers=["0.1"], ridge=TINY)[0]
    A, C = first.weight.detach(), x.mT @ x
    assert torch.equal(A, compact[0][0].weight)
    torch.testing.assert_close(second.weight.detach(), W @ C @ A.mT @ (A @ C @ A.mT).inverse(), rtol=1e-6, atol=1e-6)


# What it promises


@pytest.mark.parametrize("kind", ["dense", "convolutional"])
def test_it_is_exact_where_removed_units_depend_on_those_that_stay(kind):
    """Half of the units are multiples of others (a ReLU passes positive factors), constants, or never active."""
    dependent = torch.tensor([[0, 0, 0, 0], [2, 0, 0, 0], [0, 0.5, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
    factor = torch.cat([torch.eye(4, dtype=torch.float64), dependent])
    constant = torch.tensor([0, 0, 0, 0, 0.7, 0, 0, -1], dtype=torch.float64)
    if kind == "dense":
        model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).double()
        x = draw(3, 60, 5)
    else:
        model = nn.Sequential(
            nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3)
        ).double()
        x = draw(3, 60, 2, 7, 7)
    with torch.no_grad():
        model[0].weight.copy_((factor @ model[0].weight[:4].flatten(1)).view_as(model[0].weight))
        model[0].bias.copy_(factor @ model[0].bias[:4] + constant)
    kept = {"0": torch.arange(4)}
    groups = channel_groups(model, x)
    small = remove_units(model, groups, kept, x)
    repaired = refitted(small, model, x, rows=kept_rows(model, groups.groups, kept), ridge=TINY)
    with torch.no_grad():
        assert float((small(x) - model(x)).abs().max()) > 0.01
        torch.testing.assert_close(repaired(x), model(x), rtol=1e-6, atol=1e-6)
        fresh = draw(4, *x.shape)  # not only on what it was fitted to
        torch.testing.assert_close(repaired(fresh), model(fresh), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_no_layer_is_further_off_after_its_fit_and_all_fits_are_each_in_turn(seed):
    model, x = branching(seed).double().eval(), uniform(seed, 30, 3, 8, 8, dtype=torch.float64)
    small, rows = halved(model, x, seed)
    whole = refitted(small, model, x, rows=rows)
    order = list(outputs(small, [n for n, m in small.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)], x))
    order = [name for name in order if getattr(small.get_submodule(name), "groups", 1) == 1]
    wanted, repaired, gains = outputs(model, order, x), small, []
    for name in order:
        layer = small.get_submodule(name)
        target = taken(wanted[name], rows.get(name), layer)
        before = float((outputs(repaired, [name], x)[name] - target).square().sum())
        repaired = refitted(repaired, model, x, rows=rows, layers=[name])
        after = float((outputs(repaired, [name], x)[name] - target).square().sum())
        assert after <= before * (1 + 1e-9) + 1e-20 * float(target.square().sum())
        gains.append(after < 0.9 * before)
    assert any(gains)
    for name, tensor in repaired.state_dict().items():
        torch.testing.assert_close(whole.state_dict()[name], tensor, rtol=1e-8, atol=1e-10)


class Counted(nn.Module):
    """Passes on what it reads, and counts its calls, those of its copies as well."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __deepcopy__(self, memo):
        return Counted(self.calls)

    def forward(self, x):
        self.calls.append(len(x))
        return x


def test_every_network_passes_its_inputs_on_once_whatever_its_depth():
    passes = {"original": [], "compact": []}
    for depth in (2, 5):
        layers = seeded(lambda: [nn.Linear(6, 6) for _ in range(depth)])  # noqa: B023
        original, compact = (
            nn.Sequential(Counted(calls), *(one for layer in copy.deepcopy(layers) for one in (layer, nn.ReLU())))
            for calls in passes.values()
        )
        refitted(compact, original, uniform(0, 20, 6))
    assert passes == {"original": [20, 20], "compact": [2, 20, 2, 20]}  # two inputs tell which layers run


def test_outputs_that_are_changed_in_place_or_held_a_few_at_a_time_are_fitted_all_the_same(monkeypatch):
    model, x = branching(3), uniform(3, 30, 3, 8, 8)
    small, rows = halved(model, x)
    expected = refitted(small, model, x, rows=rows).state_dict()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    monkeypatch.setattr("brittle.compression.refit.OUTPUTS_AT_ONCE", 1)
    for name, tensor in refitted(small, model, x, rows=rows).state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_products_in_single_precision_are_near_enough_for_the_ridge():
    """Inputs that vary a thousand times more in one direction than in the others, far from zero."""
    x = 10 + draw(0, 400, 60) * torch.cat([torch.tensor([1e3], dtype=torch.float64), torch.ones(59).double()])
    original = nn.Sequential(dense(draw(1, 5, 60), draw(2, 5)))
    compact = copy.deepcopy(original)
    with torch.no_grad():
        compact[0].weight[:, 1:30] = 0
    exact, near = (
        refitted(copy.deepcopy(compact).to(kind), copy.deepcopy(original).to(kind), x.to(kind))[0].weight.detach()
        for kind in (torch.float64, torch.float32)
    )
    assert float((near - exact).norm()) < 1e-2 * float((exact - compact[0].weight.detach()).norm())


def test_a_trained_network_cut_in_half_is_repaired_without_labels():
    model, (x, _), (fresh, labels) = convnet(), digits("train"), digits("test")
    groups = channel_groups(model, x)
    kept = {
        name: score.topk(max(1, len(score) // 2)).indices.sort().values
        for name, score in unit_scores(model, groups, row_l2).items()
    }
    small = remove_units(model, groups, kept, x[:20])
    repaired = refitted(small, model, x[:300], rows=kept_rows(model, groups.groups, kept))
    lost = accuracy(model, fresh, labels) - accuracy(small, fresh, labels)
    assert lost > 0.1
    assert accuracy(model, fresh, labels) - accuracy(repaired, fresh, labels) < 0.3 * lost


def test_an_uncompressed_network_stays_bit_equal():
    model, x = convnet().eval(), digits()[0][:20]
    repaired = refitted(model, model, x)
    for name, tensor in model.state_dict().items():
        assert torch.equal(repaired.state_dict()[name], tensor)


def test_both_networks_and_the_inputs_are_left_bit_equal():
    model, x = branching(1).double(), uniform(1, 20, 3, 8, 8, dtype=torch.float64)
    small, rows = halved(model, x)
    model.train()
    before = x.clone()
    with untouched(model), untouched(small):
        repaired = refitted(small, model, x, rows=rows)
    assert torch.equal(x, before)
    assert [module.training for module in repaired.modules()] == [module.training for module in small.modules()]
    assert all(parameter.requires_grad for parameter in repaired.parameters())


# What is left alone, and what is refused


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.again, self.grouped = nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv1d(4, 4, 1)
        self.last, self.idle = nn.Linear(4, 2), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.grouped(self.again(self.again(self.first(x)))[:, :, None])[:, :, 0])


def test_what_runs_more_than_once_or_is_no_such_layer_is_left_alone_and_refused_by_name():
    model, x = seeded(Twice).double(), draw(0, 40, 4)
    small = copy.deepcopy(model)
    with torch.no_grad():
        small.first.weight *= 0.5
    repaired = refitted(small, model, x, ridge=TINY)
    changed = {n for n, p in repaired.named_parameters() if not torch.allclose(p, small.get_parameter(n), atol=1e-4)}
    assert changed == {"first.weight"}  # fitted exactly, so that nothing is left to do for the last
    assert torch.equal(repaired.again.weight, small.again.weight)
    with pytest.raises(InputError, match="layer 'again' runs more than once"):
        refitted(small, model, x, layers=["again"])
    for name in ("grouped", "idle", "nothing"):
        with pytest.raises(InputError, match=r"^layers: expected names of Linear and Conv2d layers that run"):
            refitted(small, model, x, layers=[name])


def test_outputs_that_do_not_correspond_are_refused():
    model, x = branching(0), uniform(0, 10, 3, 8, 8)
    small, rows = halved(model, x)
    assert rows
    with pytest.raises(InputError, match=r"^rows: expected the outputs of"):
        refitted(small, model, x)


@pytest.mark.parametrize("wrong", [{"ridge": 0.0}, {"ridge": float("nan")}])
def test_values_out_of_range_are_refused(wrong):
    model, x = convnet(), digits()[0][:4]
    with pytest.raises(InputError, match=r"^inputs, ridge: expected"):
        refitted(model, model, x, **wrong)
    with pytest.raises(InputError, match=r"^inputs"):
        refitted(model, model, x[:0])


def test_inputs_that_are_not_finite_are_refused():
    model, x = convnet(), digits()[0][:4]
    with pytest.raises(InputError, match=r"^inputs: expected finite values"):
        refitted(model, model, x * float("nan"))
