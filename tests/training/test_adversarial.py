"""Attacks inside the step: within the budget, up the loss; the same for a sample in every batch, or one for all."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from brittle.evaluation import judge_universal
from brittle.training import Adversary, Recipe, train
from brittle.training.adversarial import perturb, perturb_first
from helpers.matrices import quick
from helpers.networks import Logistic, convnet, digits, few, generator, mlp, seeded, uniform, untidy, untouched


def keys(n, seed=0):
    return torch.randint(2**62, (n,), generator=generator(seed))


class Flat(nn.Module):
    """Logits with a gradient of zero, so that PGD returns its start."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        """``(N, ...)`` to ``(N, 10)``."""
        self.calls += 1
        return (0 * x.flatten(1)).sum(1, keepdim=True).expand(-1, 10)


def lengths(delta, p):
    return torch.linalg.vector_norm(delta.double().flatten(1), p, dim=1)


@quick
@given(st.sampled_from([2.0, math.inf]), st.floats(1e-3, 2.0), st.integers(1, 4), st.integers(0, 1000))
def test_within_budget_and_bounds(p, eps, steps, seed):
    x, y = few(12)
    found = perturb(mlp(), x, y, Adversary(eps, p, steps), keys(12, seed))
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert float(lengths(found.double() - x.double(), p).max()) <= eps * (1 + (0 if p == math.inf else 1e-5))


@pytest.mark.parametrize(("p", "eps"), [(math.inf, 0.06), (2.0, 0.4)])
def test_the_loss_rises(p, eps):
    x, y = few(60)
    with torch.no_grad():
        clean = F.cross_entropy(mlp()(x), y)
        noisy = F.cross_entropy(mlp()(perturb(Flat(), x, y, Adversary(eps, p, 1), keys(60))), y)
    losses = []
    for steps in (1, 3, 10):
        with torch.no_grad():
            losses.append(float(F.cross_entropy(mlp()(perturb(mlp(), x, y, Adversary(eps, p, steps), keys(60))), y)))
    assert min(losses) > float(noisy)
    assert losses[-1] > 2 * float(clean)
    assert losses[-1] == pytest.approx(max(losses), rel=0.02)


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_a_sample_is_attacked_alike_in_every_batch(p):
    x, y = few(20)
    net, own, adversary = mlp(torch.float64), keys(20), Adversary(0.1, p, 3)
    x = x.double()
    whole = perturb(net, x, y, adversary, own, 2)
    assert torch.equal(whole, perturb(net, x, y, adversary, own, 2))
    some = torch.tensor([4, 17, 9])
    alone = perturb(net, x[some], y[some], adversary, own[some], 2)
    torch.testing.assert_close(alone, whole[some], rtol=0, atol=1e-12)
    one = Adversary(0.1, p, 1)
    first = perturb(Flat(), x, y, one, own, 2)
    assert torch.equal(perturb(Flat(), x[some], y[some], one, own[some], 2), first[some])
    for changed in (perturb(Flat(), x, y, one, own, 3), perturb(Flat(), x, y, one, keys(20, 1), 2)):
        assert bool((changed != first).flatten(1).any(1).all())


def binary(n=20, dtype=torch.float64):
    net = Logistic(12, dtype)
    x = uniform(3, n, 12, low=0.3, high=0.7, dtype=dtype)
    y = torch.arange(n) % 2
    return net, x, y, net.theta.detach() * (1.0 - 2 * y[:, None])  # the direction that raises the loss


def test_one_long_step_on_a_linear_model_is_the_closed_form_in_l_inf():
    net, x, y, up = binary()
    found = perturb(net, x, y, Adversary(0.1, math.inf, 1, step_size=0.2), keys(20))
    torch.testing.assert_close(found, x + 0.1 * up.sign(), rtol=0, atol=1e-12)


def test_one_long_step_on_a_linear_model_is_the_closed_form_in_l_2():
    net, x, y, up = binary()
    found = perturb(net, x, y, Adversary(0.1, 2.0, 1, step_size=1e6), keys(20))
    torch.testing.assert_close(found, x + 0.1 * up / up.norm(dim=1, keepdim=True), rtol=0, atol=1e-6)


def test_bounds_hold_in_the_closed_form():
    net, x, y, up = binary()
    found = perturb(net, x, y, Adversary(0.6, math.inf, 1, step_size=1.2), keys(20))
    torch.testing.assert_close(found, (x + 0.6 * up.sign()).clamp(0, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_starts_lie_on_the_sphere_in_uniform_directions(n):
    count, eps = 4000, 0.25
    x = torch.full((count, n), 0.5, dtype=torch.float64)
    start = perturb(Flat(), x, torch.zeros(count).long(), Adversary(eps, 2.0, 1), keys(count))
    direction = (start - x) / eps
    torch.testing.assert_close(direction.norm(dim=1), torch.ones(count, dtype=torch.float64), rtol=0, atol=1e-6)
    assert float(direction.mean(0).abs().max()) < 5 / math.sqrt(count * n)  # standard deviation 1 / sqrt(count n)
    second = direction.mT @ direction / count
    assert float((second - torch.eye(n) / n).abs().max()) < 5 / math.sqrt(count) / n * math.sqrt(2)
    if n > 1:  # a projection along any direction: the fourth moment on the sphere is 3 / (n (n + 2))
        along = direction @ torch.full((n,), n**-0.5, dtype=torch.float64)
        assert float((along**4).mean()) == pytest.approx(3 / (n * (n + 2)), rel=0.15)


def test_starts_in_l_inf_touch_the_box_and_are_centred():
    count, n, eps = 3000, 6, 0.25
    x = torch.full((count, n), 0.5)
    delta = perturb(Flat(), x, torch.zeros(count).long(), Adversary(eps, math.inf, 1), keys(count)) - x
    torch.testing.assert_close(delta.abs().amax(1), torch.full((count,), eps), rtol=0, atol=1e-6)
    assert float(delta.mean(0).abs().max()) < 5 * eps / math.sqrt(count)
    correlation = torch.corrcoef(delta.mT) - torch.eye(n)
    assert float(correlation.abs().max()) < 5 / math.sqrt(count)
    assert (delta.abs().argmax(1).bincount(minlength=n) - count / n).abs().max() < 5 * math.sqrt(count / n)


def test_every_step_is_taken_also_once_all_are_wrong():
    x, y = few(5)
    net = Flat()
    perturb(net, x, (y + 1) % 10, Adversary(0.1, steps=7), keys(5))
    assert net.calls == 7


def test_the_last_point_counts():
    """With a step far above the budget the attack jumps between corners: its last point is not its worst."""
    x, y = few(40)
    found = [perturb(mlp(), x, y, Adversary(0.3, math.inf, n, step_size=0.6), keys(40)) for n in (1, 2, 3)]
    with torch.no_grad():
        losses = torch.stack([F.cross_entropy(mlp()(z), y, reduction="none") for z in found])
    assert bool((losses[1] < losses[0] - 1e-3).any())
    again = perturb(mlp(), x, y, Adversary(0.3, math.inf, 3, step_size=0.6), keys(40))
    assert torch.equal(again, found[2])


def test_evaluation_mode_while_attacking():
    """Dropout and batch norm act as in evaluation, whatever mode the network is in."""
    x, y = few(16)
    found = perturb(convnet().train(), x, y, Adversary(0.1, steps=3), keys(16))
    assert torch.equal(found, perturb(convnet().eval(), x, y, Adversary(0.1, steps=3), keys(16)))


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_the_network_is_left_as_it_was(p):
    net = untidy()
    x, y = few(8)
    before = x.clone()
    with untouched(net):
        perturb(net, x, y, Adversary(0.1, p, 2), keys(8))
    assert torch.equal(x, before)
    assert not x.requires_grad


def test_the_network_is_left_as_it_was_after_an_error():
    net = untidy()
    x, y = few(8)
    with untouched(net), pytest.raises(RuntimeError):
        perturb(net, x.expand(-1, 3, -1, -1), y, Adversary(0.1), keys(8))


def test_the_first_samples_of_a_batch_are_attacked():
    x, y = few(10)
    own, adversary = keys(10), Adversary(0.1, steps=2)
    assert torch.equal(perturb_first(mlp(), x, y, adversary, own, 0, 0), x)
    whole = perturb(mlp(), x, y, adversary, own)
    assert torch.equal(perturb_first(mlp(), x, y, adversary, own, 0, 10), whole)
    found = perturb_first(mlp(), x, y, adversary, own, 0, 4)
    assert torch.equal(found[4:], x[4:])
    torch.testing.assert_close(found[:4], perturb(mlp(), x[:4], y[:4], adversary, own[:4]))
    assert bool((found[:4] != x[:4]).flatten(1).any(1).all())


PLAIN = {"validation": 0.0, "measure_every": 0}


class Watched(nn.Module):
    """A linear network that notes what it is trained on."""

    seen: list = []  # noqa: RUF012 - shared with the copy that is trained

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        """``(N, 12)`` to ``(N, 3)``."""
        if self.training:
            Watched.seen.append(x.detach().clone())
        return self.head(x)


@pytest.mark.parametrize("p", [2.0, math.inf])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_universal_perturbation_is_one_for_all_samples_within_the_budget_and_goes_on_from_batch_to_batch(p, steps):
    Watched.seen, eps = [], 0.2
    adversary = Adversary(eps, p, steps, step_size=eps / 5 / steps, universal=True, ratio=0.7)
    train(
        seeded(Watched),
        (torch.full((30, 12), 0.5), torch.arange(30) % 3),
        Recipe(epochs=4, batch_size=10, lr=0.01, adversary=adversary, **PLAIN),
    )
    assert len(Watched.seen) == 12
    shared = []
    for x in Watched.seen:
        u = x[:7] - 0.5
        assert torch.equal(u, u[:1].expand_as(u))
        assert bool((x[7:] == 0.5).all())
        shared.append(u[:1])
    moved = torch.cat([shared[0], *(after - before for before, after in itertools.pairwise(shared))])
    assert float(lengths(torch.cat(shared), p).max()) <= eps * (1 + 1e-6)
    assert float(lengths(moved, p).max()) <= eps / 5 * (1 + 1e-5)
    assert float(lengths(torch.cat(shared), p).max()) > eps / 2  # further than one batch can bring it


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_universal_training_is_the_alternation_of_its_source(p):
    """Written anew, with all samples in one batch: a step of the perturbation, then one of the weights."""
    (x, y), eps = few(40), 0.3
    x, net, lr, steps = x.double(), copy.deepcopy(mlp(torch.float64)), 0.5, 2
    adversary = Adversary(eps, p, steps, universal=True, ratio=1.0)
    recipe = Recipe(
        epochs=8, batch_size=40, optimizer="sgd", lr=lr, momentum=0.0, weight_decay=0.0, adversary=adversary, **PLAIN
    )
    trained = train(net, (x, y), recipe).model
    u = torch.zeros_like(x[0])
    for _ in range(8):
        for _ in range(steps):
            z = (x + u).clamp(0, 1).requires_grad_()
            gradient = torch.autograd.grad(F.cross_entropy(net(z), y, reduction="sum"), z)[0].sum(0)
            direction = gradient.sign() if math.isinf(p) else gradient / gradient.norm()
            u = u + eps / steps * direction
            u = u.clamp(-eps, eps) if math.isinf(p) else u * min(1.0, eps / float(u.norm()))
        weights = list(net.parameters())
        gradients = torch.autograd.grad(F.cross_entropy(net((x + u).clamp(0, 1)), y), weights)
        with torch.no_grad():
            for weight, slope in zip(weights, gradients, strict=True):
                weight -= lr * slope
    for name, tensor in trained.state_dict().items():
        torch.testing.assert_close(tensor, net.state_dict()[name], rtol=1e-8, atol=1e-8)


def test_training_against_a_universal_perturbation_lowers_universal_fooling():
    def fooled(seed, adversary):
        network = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), seed)
        recipe = Recipe(epochs=8, batch_size=32, lr=0.005, adversary=adversary, seed=seed, **PLAIN)
        trained = train(network, digits("train"), recipe).model
        return judge_universal(trained, digits("test"), p=math.inf, eps=0.15)[0].fooled.value

    universal = Adversary(0.15, universal=True)
    assert sum(fooled(seed, universal) for seed in (0, 1)) < sum(fooled(seed, None) for seed in (0, 1))
