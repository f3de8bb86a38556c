"""Local norms against torch's own Jacobian, the ascent against exact constants, and all below certified bounds."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from brittle.bounds import lipschitz_upper_bound
from brittle.bounds.sensitivity import jacobian_norms, largest_ratio
from brittle.errors import InputError
from brittle.linear.norms import operator_norm
from brittle.models.normalize import Normalize
from helpers.networks import convnet, few, generator, linear, mlp, seeded, uniform, untidy, untouched

NORMS = [2, math.inf]


def by_torch(model, x, p):
    """``||J||_{p->p}`` of every input's full Jacobian."""
    rows = [torch.autograd.functional.jacobian(lambda one: model(one[None])[0], one).flatten(1) for one in x]
    return torch.stack([torch.linalg.matrix_norm(J, ord=p) for J in rows])


def wide(classes):
    return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, classes))).double()


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("classes", [1, 2, 10])
def test_norms_are_exact_up_to_ten_classes(classes, p):
    x = uniform(0, 9, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(jacobian_norms(wide(classes), x, p), by_torch(wide(classes), x, p), rtol=1e-9, atol=0)


@pytest.mark.parametrize("p", NORMS)
def test_norms_of_trained_networks(p):
    x, _ = few(12, torch.float64)
    for net in (mlp(torch.float64), convnet(torch.float64)):
        torch.testing.assert_close(jacobian_norms(net, x, p), by_torch(net, x, p), rtol=1e-7, atol=0)
    single = jacobian_norms(mlp(), x.float(), p)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), by_torch(mlp(torch.float64), x, p), rtol=1e-4, atol=0)


def ten_rows(net, x, p):
    """The norm of the rows of the ten largest logits, ``(N,)``."""
    norms = []
    for one in x:
        J = torch.autograd.functional.jacobian(lambda a: net(a[None])[0], one).flatten(1)
        norms.append(torch.linalg.matrix_norm(J[net(one[None])[0].argsort(descending=True)[:10]], ord=p))
    return torch.stack(norms)


def test_more_classes_give_the_rows_of_the_ten_largest_logits():
    net, x = wide(30), uniform(1, 9, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(jacobian_norms(net, x, math.inf), ten_rows(net, x, math.inf), rtol=1e-9, atol=0)


@pytest.mark.parametrize("classes", [11, 30, 200])
def test_more_classes_give_a_power_iteration_over_all_rows(classes):
    net, x = wide(classes), uniform(1, 9, 1, 8, 8, dtype=torch.float64)
    found, exact = jacobian_norms(net, x, 2), by_torch(net, x, 2)
    assert (found <= exact * (1 + 1e-9)).all()
    assert (found >= 0.97 * exact).all()
    assert (found >= ten_rows(net, x, 2) * (1 - 1e-9)).all()
    assert (found > 1.03 * ten_rows(net, x, 2)).any()
    single = jacobian_norms(wide(classes).float(), x.float(), 2)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), found, rtol=1e-4, atol=0)
    torch.testing.assert_close(jacobian_norms(net, x[4:5], 2), found[4:5], rtol=1e-6, atol=0)


class Once(torch.autograd.Function):
    """Twice its input, with a gradient that has none."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient


def test_models_that_cannot_be_differentiated_twice_keep_the_ten_rows():
    net, x = wide(30), uniform(1, 9, 1, 8, 8, dtype=torch.float64)
    found = jacobian_norms(lambda a: net(Once.apply(a)), x, 2)
    torch.testing.assert_close(found, 2 * ten_rows(net, 2 * x, 2), rtol=1e-9, atol=0)


@pytest.mark.parametrize("p", NORMS)
def test_local_norms_stay_below_the_certified_bound(p):
    for dtype in (torch.float32, torch.float64):
        for net in (mlp(dtype), convnet(dtype), linear(classes=6, n=64, dtype=dtype)):
            found = jacobian_norms(net, few(30, dtype)[0], p)
            upper = lipschitz_upper_bound(net, p, input_shape=(1, 8, 8)).upper
            assert float(found.max()) <= upper * (1 + 1e-6)
            assert (found > 0).all()


@pytest.mark.parametrize("p", NORMS)
def test_linear_networks_have_their_matrix_norm_everywhere(p):
    net = linear(classes=6, n=64, dtype=torch.float64)
    found = jacobian_norms(net, uniform(2, 5, 64, dtype=torch.float64), p)
    torch.testing.assert_close(found, torch.linalg.matrix_norm(net[1].weight.detach(), ord=p).expand(5))


def test_constant_networks_have_norm_zero():
    for p in NORMS:
        assert jacobian_norms(lambda x: 0 * x.flatten(1)[:, :4], uniform(0, 3, 1, 8, 8), p).tolist() == [0, 0, 0]


def test_models_come_back_as_they_were():
    net = untidy()
    x, _ = few(8)
    with untouched(net), torch.no_grad():
        mixed = jacobian_norms(net, x, 2)
    net.eval()
    assert torch.equal(jacobian_norms(net, x, 2), mixed)
    assert not mixed.requires_grad


def test_other_norms_are_an_error():
    with pytest.raises(InputError, match=r"^p: expected 2 or inf; got 1"):
        jacobian_norms(mlp(), few(2)[0], 1)


# --- the ascent ---------------------------------------------------------------------------------------------

ROUNDED_DOWN = 1 - 2.0**-46
"""More than the result is lowered for rounding."""

BOTH_SIDES_MEET = {
    "linear": lambda: (nn.Sequential(nn.Flatten(), nn.Linear(60, 7)), (60,)),
    "one logit": lambda: (nn.Sequential(nn.Linear(300, 1)), (300,)),
    "two layers": lambda: (nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 9)), (40,)),
    "batch norm": lambda: (nn.Sequential(nn.Linear(20, 8), nn.BatchNorm1d(8)), (20,)),
    "normalised": lambda: (nn.Sequential(Normalize([0.5], [0.25]), nn.Flatten(), nn.Linear(64, 5)), (1, 8, 8)),
    "one tap": lambda: (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()), (3, 3, 3)),
    "rectified": lambda: (nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 1)), (9,)),
    "convolution": lambda: (nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten()), (2, 4, 4)),
}


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("kind", BOTH_SIDES_MEET)
def test_what_is_found_never_exceeds_the_certified_bound(kind, p):
    """Strictly, also where both are the constant itself and only rounding lies between them."""
    for seed in range(8):
        net, shape = seeded(BOTH_SIDES_MEET[kind], seed)
        net = net.to([torch.float32, torch.float64][seed % 2]).eval()
        x = uniform(seed, 6, *shape, dtype=next(net.parameters()).dtype)
        upper = lipschitz_upper_bound(net, p, input_shape=shape).upper
        found = largest_ratio(net, x, p, eps=[0.01, 1.0][seed % 2], steps=4)
        assert (found <= upper).all()
        if kind in ("linear", "one logit", "two layers", "batch norm"):
            assert float(found.max()) >= upper * (1 - 1e-9)


def hidden(seed, n=8, h=6, classes=3):
    """One hidden layer on at least as many inputs: every activation pattern occurs somewhere."""
    net = seeded(lambda: nn.Sequential(nn.Linear(n, h), nn.ReLU(), nn.Linear(h, classes)), seed)
    return net.double().eval()


def over_all_patterns(net, p):
    """The exact Lipschitz constant of such a network: the largest ``||W2 D W1||`` over all patterns D."""
    W1, W2 = net[0].weight.detach(), net[2].weight.detach()
    patterns = torch.tensor(list(itertools.product([0.0, 1.0], repeat=len(W1))), dtype=torch.float64)
    return float(operator_norm((W2 * patterns[:, None]) @ W1, p).max())


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("seed", range(4))
def test_the_ascent_stays_below_the_exact_constant_and_nearly_finds_it(p, seed):
    net, x = hidden(seed), uniform(seed, 10, 8, dtype=torch.float64)
    exact = over_all_patterns(net, p)
    for eps in (0.01, 1.0, 30.0):
        found = largest_ratio(net, x, p, eps=eps, steps=20)
        assert (found <= exact).all()
        assert (found >= jacobian_norms(net, x, p) * ROUNDED_DOWN).all()
    assert float(largest_ratio(net, x, p, eps=10.0, restarts=3).max()) >= 0.9 * exact


@pytest.mark.parametrize("p", NORMS)
def test_the_ascent_finds_more_than_the_data_show_and_less_than_is_certified(p):
    x, _ = few(20)
    for net in (mlp(), convnet()):
        local = jacobian_norms(net, x, p).double()
        upper = lipschitz_upper_bound(net, p, input_shape=(1, 8, 8)).upper
        for bounds in (None, (0.0, 1.0)):
            found = largest_ratio(net, x, p, eps=2.0 if p == 2 else 0.5, bounds=bounds)
            assert found.dtype == torch.float64
            assert float(found.max()) <= upper
            assert (found >= local * (1 - 1e-5)).all()
            assert float(found.max()) > float(local.max())
            assert float(found.mean()) >= 1.2 * float(local.mean())


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("classes", [1, 6])
def test_a_linear_network_has_its_operator_norm_at_every_input(p, classes):
    net = linear(classes=classes, n=64, dtype=torch.float64)
    found = largest_ratio(net, uniform(2, 5, 64, dtype=torch.float64), p, eps=0.5, steps=3, restarts=2)
    exact = torch.linalg.matrix_norm(net[1].weight.detach(), ord=p).expand(5)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)


def test_the_ascent_with_more_classes_than_rows():
    net, x = wide(30), uniform(1, 6, 1, 8, 8, dtype=torch.float64)
    upper = lipschitz_upper_bound(net, 2, input_shape=(1, 8, 8)).upper
    found = largest_ratio(net, x, 2, eps=1.0, steps=20)
    assert (found >= jacobian_norms(net, x, 2) * ROUNDED_DOWN).all()
    assert (found <= upper).all()


@pytest.mark.parametrize("p", NORMS)
def test_dead_inputs_are_left_along_a_random_direction(p):
    net = hidden(0)
    with torch.no_grad():
        net[0].bias.fill_(-2.0)
    x = torch.zeros(2, 8, dtype=torch.float64)
    assert jacobian_norms(net, x, p).tolist() == [0, 0]
    assert (largest_ratio(net, x, p, eps=20.0) >= 0.5 * over_all_patterns(net, p)).all()


@pytest.mark.parametrize("p", NORMS)
def test_constant_networks_have_no_ratio(p):
    found = largest_ratio(lambda x: 0 * x.flatten(1)[:, :4], uniform(0, 3, 1, 8, 8), p, eps=0.5, steps=3)
    assert found.tolist() == [0, 0, 0]


class Offset(nn.Module):
    """A slope of 1 under a bias that float32 cannot resolve it on."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([1e7, -1e7]))

    def forward(self, x):
        """``(N, n)`` to ``(N, 2)``."""
        return x[:, :2] + self.bias


@pytest.mark.parametrize("p", NORMS)
def test_rounding_does_not_pass_for_sensitivity(p):
    x = uniform(0, 20, 3)
    assert (largest_ratio(Offset(), x, p, eps=1e-3) <= 1 + 1e-12).all()
    assert (largest_ratio(lambda a: Offset()(a), x, p, eps=1e-3) <= 1 + 1e-6).all()
    double = Offset().double()
    assert (largest_ratio(double, x.double(), p, eps=1e-9) <= 1 + 1e-12).all()
    assert (largest_ratio(double, x.double(), p, eps=1e-9) >= 1 - 1e-12).all()


class Single(nn.Module):
    """A network that casts its input to single precision itself."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        """``(N, 4)`` to ``(N, 3)``."""
        return self.linear(x.float())


def test_a_module_of_fixed_precision_is_taken_as_it_is():
    net = seeded(Single)
    found = largest_ratio(net, uniform(0, 5, 4), 2, eps=0.5, steps=5)
    exact = float(torch.linalg.matrix_norm(net.linear.weight.detach(), ord=2))
    assert found.tolist() == pytest.approx([exact] * 5, rel=1e-5)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("restarts", [1, 2])
def test_the_ascent_ignores_the_batch_and_repeats(p, restarts):
    x, _ = few(9)
    options = {"eps": 1.0, "steps": 30, "restarts": restarts, "bounds": (0.0, 1.0), "seed": 3}
    whole = largest_ratio(mlp(), x, p, **options)
    assert torch.equal(largest_ratio(mlp(), x, p, **options), whole)
    parts = torch.cat([largest_ratio(mlp(), part, p, **options) for part in x.split([1, 5, 3])])
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)
    shuffled = torch.randperm(9, generator=generator(0))
    torch.testing.assert_close(largest_ratio(mlp(), x[shuffled], p, **options), whole[shuffled], rtol=1e-6, atol=0)


def test_restarts_only_add():
    x, _ = few(9)
    once, often = (largest_ratio(mlp(), x, 2, eps=0.3, steps=10, restarts=r) for r in (1, 4))
    assert (often >= once).all()
    assert (often > once).any()
    other = largest_ratio(mlp(), x, 2, eps=0.3, steps=10, restarts=4, seed=1)
    assert not torch.equal(other, often)
    assert torch.equal(largest_ratio(mlp(), x, 2, eps=0.3, steps=10, seed=1), once)


@pytest.mark.parametrize("p", NORMS)
def test_no_point_leaves_the_bounds(p):
    net, x = hidden(1), uniform(0, 5, 8, dtype=torch.float64)
    seen = []

    def watched(a):
        seen.append(a.detach())
        return net(a)

    largest_ratio(watched, x, p, eps=3.0, restarts=2, bounds=(0.0, 1.0))
    assert min(float(a.min()) for a in seen) >= 0
    assert max(float(a.max()) for a in seen) <= 1
    largest_ratio(watched, x, p, eps=3.0)
    assert max(float(a.max()) for a in seen) > 1


@pytest.mark.parametrize("net", [untidy(), mlp(torch.float64)], ids=["untidy", "double"])
def test_the_ascent_leaves_the_model_as_it_was(net):
    x = few(6, next(net.parameters()).dtype)[0]
    with untouched(net), torch.no_grad():
        mixed = largest_ratio(net, x, 2, eps=0.5, steps=5)
        with pytest.raises(InputError, match=r"^x: the model cannot run"):
            largest_ratio(net, torch.ones(2, 3), 2, eps=0.5)
    net.eval()
    assert torch.equal(largest_ratio(net, x, 2, eps=0.5, steps=5), mixed)
    assert not mixed.requires_grad


def test_pruned_models_can_be_searched():
    """A mask's product with the weights is no leaf of the graph, and cannot be copied as it stands."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    prune.l1_unstructured(net[1], "weight", 0.5)
    with untouched(net):
        found = largest_ratio(net, few(3)[0], 2, eps=0.5, steps=3)
    exact = float(torch.linalg.matrix_norm(net[1].weight.detach().double(), ord=2))
    assert found.tolist() == pytest.approx([exact] * 3, rel=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": 1}, r"^p: expected 2 or inf; got 1"),
        ({"eps": 0.0}, r"^eps: expected a finite number above 0; got 0"),
        ({"eps": math.nan}, r"^eps: "),
        ({"eps": math.inf}, r"^eps: "),
        ({"steps": 0}, r"^steps: expected at least 1; got 0"),
        ({"restarts": 0}, r"^restarts: expected at least 1; got 0"),
        ({"bounds": (1.0, 0.0)}, r"^bounds: "),
        ({"bounds": (0.0, math.inf)}, r"^bounds: "),
        ({"bounds": (0.0, 0.5)}, r"^x: expected values from 0 to 0.5; got 0 to 1"),
        ({"x": torch.full((2, 1, 8, 8), math.nan)}, r"^x: expected finite"),
        ({"x": torch.ones(2, 1, 8, 8, dtype=torch.int64)}, r"^x: .*int64"),
        ({"x": torch.ones(0, 1, 8, 8)}, r"^x: .*\(0, 1, 8, 8\)"),
        ({"x": torch.ones(2, 1, 7, 7)}, r"^x: the model cannot run on inputs of shape \(1, 7, 7\)"),
        ({"model": lambda x: x}, r"^model: expected logits \(N, classes\); got \(1, 1, 8, 8\)"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"model": mlp(), "x": few(3)[0], "p": 2, "eps": 0.5, "steps": 2}
    with pytest.raises(InputError, match=message):
        largest_ratio(**good | change)
