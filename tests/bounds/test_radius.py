"""Certified losses and radii: never beaten by a search, attained where the theory says so."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import brittle
from brittle.bounds import radius
from brittle.bounds.radius import (
    adversarial_loss_bound,
    binary_loss_bound,
    certified_accuracy,
    certified_radii,
    head_margins,
    linear_loss_bound,
)
from brittle.errors import InputError
from brittle.linear.norms import lp_norm, operator_norm, project_ball
from helpers.networks import generator, seeded, uniform

SLACK = 1 + 1e-9
BOX = (-1e3, 1e3)  # far away: the certificates know of no bounds
both = pytest.mark.parametrize("p", [2, math.inf])
many = pytest.mark.parametrize("seed", range(4))


def normal(seed, *shape):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def net(seed, classes=4, n=6):
    """A random ReLU network: features and head."""
    make = functools.partial(_net, classes, n)
    return seeded(make, seed).double().eval()


def _net(classes, n):
    features = nn.Sequential(nn.Linear(n, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU())
    return nn.Sequential(features, nn.Linear(7, classes))


def margins_of(model, p):
    """Corollary's plain constants from the product of the features' layer norms."""
    product = math.prod(float(operator_norm(m.weight.detach(), p)) for m in model[0] if isinstance(m, nn.Linear))
    return head_margins(product, model[1].weight, p)


def certified(model, x, p):
    """Logits, predictions, constants and radii."""
    logits = model(x).detach()
    y, L = logits.argmax(1), margins_of(model, p)
    return logits, y, L, certified_radii(logits, y, L)


def points(x, eps, p, seed, count=40):
    """Random points ``(count * N, n)`` of every sample's ball, half of them on its surface."""
    step = normal(seed, count, *x.shape)
    flat = (step.sign() if p == math.inf else step).flatten(0, 1)
    sphere = flat / lp_norm(flat, p)[:, None]
    share = torch.where(torch.arange(count) % 2 == 0, 1.0, torch.rand(count, generator=generator(seed)).double())
    return x.repeat(count, 1) + eps * share.repeat_interleave(len(x))[:, None] * sphere


# --- losses -------------------------------------------------------------------------------------------------


@both
@many
@pytest.mark.parametrize("eps", [0.0, 0.03, 0.3])
def test_no_attack_exceeds_the_loss_bounds(p, seed, eps):
    model, x = net(seed), normal(seed, 12, 6)
    y = torch.randint(4, (12,), generator=generator(seed))
    logits, L = model(x).detach(), margins_of(model, p)
    sharp, linear = adversarial_loss_bound(logits, y, L, eps), linear_loss_bound(logits, y, L, eps)
    assert (sharp <= linear * SLACK).all()
    x_adv = brittle.pgd(model, x, y, eps=eps, p=p, bounds=BOX, steps=20)
    for found in (x_adv, points(x, eps, p, seed)):
        loss = F.cross_entropy(model(found).detach(), y.repeat(len(found) // len(x)), reduction="none")
        assert (loss.view(-1, len(x)) <= sharp * SLACK).all()
    if eps == 0:
        torch.testing.assert_close(sharp, F.cross_entropy(logits, y, reduction="none"), rtol=1e-10, atol=1e-13)


@both
@many
def test_no_attack_exceeds_the_binary_bound(p, seed):
    model, x = net(seed, classes=1), normal(seed, 12, 6)
    y = 2 * torch.randint(2, (12,), generator=generator(seed)) - 1
    theta, score = model[1].weight.detach()[0], model(x).detach()[:, 0]
    constant = math.prod(float(operator_norm(m.weight.detach(), p)) for m in model[0] if isinstance(m, nn.Linear))
    bound = binary_loss_bound(score, y, eps=0.2, lipschitz=constant, head=theta, p=p)
    found = model(points(x, 0.2, p, seed)).detach().view(-1, 12)
    assert (F.softplus(-y * found) <= bound * SLACK).all()
    printed = F.softplus(-y * score) + 0.2 * constant * theta.norm(p=1 if p == math.inf else 2)
    assert (bound <= printed * SLACK).all()


@both
def test_two_classes_recover_the_binary_form(p):
    C, s, y = normal(0, 2, 5), normal(1, 9, 2), torch.arange(9) % 2
    several = adversarial_loss_bound(s, y, head_margins(3.0, C, p), 0.1)
    binary = binary_loss_bound(s[:, 1] - s[:, 0], 2 * y - 1, eps=0.1, lipschitz=3.0, head=C[1] - C[0], p=p)
    torch.testing.assert_close(several, binary, rtol=1e-10, atol=0)


@both
@pytest.mark.parametrize("eps", [0.0, 0.05, 2.0])
def test_a_linear_classifier_attains_the_bound(p, eps):
    theta, x = normal(0, 7), normal(1, 10, 7)
    y = torch.where(torch.arange(10) % 2 == 0, 1.0, -1.0).double()
    step = theta.sign() if p == math.inf else theta / theta.norm()
    worst = F.softplus(-y * ((x - eps * y[:, None] * step) @ theta), threshold=50)
    bound = binary_loss_bound(x @ theta, y, eps=eps, lipschitz=1.0, head=theta, p=p)
    torch.testing.assert_close(bound, worst, rtol=1e-9, atol=0)
    C = torch.stack([-theta / 2, theta / 2])
    several = adversarial_loss_bound(x @ C.T, (y > 0).long(), head_margins(1.0, C, p), eps)
    torch.testing.assert_close(several, worst, rtol=1e-9, atol=0)


def test_small_losses_keep_their_digits():
    s, y = torch.tensor([[60.0, 0.0], [0.0, 800.0]]).double(), torch.zeros(2, dtype=torch.long)
    found = adversarial_loss_bound(s, y, torch.zeros(2, 2), 1.0)
    assert found.tolist() == pytest.approx([math.exp(-60), 800], rel=1e-9)
    assert found[0] >= math.exp(-60)


def test_single_precision_errs_upwards():
    s = (3 * normal(0, 50, 5)).float()
    y, L = s.argmax(1), torch.ones(5, 5) - torch.eye(5)
    for function in (adversarial_loss_bound, linear_loss_bound):
        single, double = function(s, y, L, 0.1), function(s.double(), y, L, 0.1)
        assert single.dtype == torch.float64
        assert (single > double).all()
        assert (single <= double * (1 + 1e-2)).all()
    single, double = certified_radii(s, y, L), certified_radii(s.double(), y, L)
    assert (single < double).all()
    margin = s.double().topk(2).values
    slack = 2**-20 * margin.abs().sum(1)
    torch.testing.assert_close(single, (margin[:, 0] - margin[:, 1] - slack).clamp_min(0), rtol=1e-3, atol=0)


def test_unknown_constants_leave_no_bound():
    L = torch.tensor([[0, math.inf], [math.inf, 0]])
    s, y = normal(0, 3, 2), torch.zeros(3, dtype=torch.long)
    assert adversarial_loss_bound(s, y, L, 0.1).tolist() == [math.inf] * 3
    assert linear_loss_bound(s, y, L, 0.1).tolist() == [math.inf] * 3
    assert adversarial_loss_bound(s, y, L, 0).isfinite().all()
    assert binary_loss_bound(s[:, 0], y + 1, eps=0, lipschitz=math.inf, head=s[:, 1], p=2).isfinite().all()
    assert binary_loss_bound(s[:, 0], y + 1, eps=1, lipschitz=math.inf, head=s[:, 1], p=2).isinf().all()
    assert certified_radii(s, s.argmax(1), L).tolist() == [0] * 3


# --- radii --------------------------------------------------------------------------------------------------


@both
@many
def test_nothing_flips_inside_the_radius(p, seed):
    model, x = net(seed), 3 * normal(seed, 15, 6)
    _, y, _, r = certified(model, x, p)
    assert (r > 0).any()
    for one, label, own in zip(x, y, r, strict=True):
        eps, one, label = 0.999 * float(own), one[None], label[None]
        assert bool((model(points(one, eps, p, seed, 100)).argmax(1) == label).all())
        assert bool(model(brittle.pgd(model, one, label, eps=eps, p=p, bounds=BOX)).argmax(1) == label)


@both
@pytest.mark.parametrize("classes", [2, 3, 6])
def test_a_linear_classifier_has_its_exact_distance(p, classes):
    C, c, x = normal(0, classes, 5), normal(1, classes), normal(2, 30, 5)
    logits = x @ C.T + c
    y, L = logits.argmax(1), head_margins(1.0, C, p)
    r = certified_radii(logits, y, L)
    gap = (logits.gather(1, y[:, None]) - logits) / L[y]
    nearest = gap.nan_to_num(math.inf).argmin(1)
    w = C[nearest] - C[y]
    step = w.sign() if p == math.inf else w / w.norm(dim=1, keepdim=True)
    flipped = (x + 1.000001 * r[:, None] * step) @ C.T + c
    assert (flipped.argmax(1) != y).all()
    assert ((x + 0.999999 * r[:, None] * step) @ C.T + c).argmax(1).equal(y)
    q = 1 if p == math.inf else 2
    for s, k, found in zip(logits, y, r, strict=True):
        exact = min((s[k] - s[j]) / (C[k] - C[j]).norm(p=q) for j in range(classes) if j != k)
        assert float(found) == pytest.approx(float(exact), rel=1e-9)


@both
def test_equal_rows_never_change_places(p):
    C = normal(0, 3, 4)[[0, 0, 1]]
    L = head_margins(2.0, C, p)
    assert L[0, 1] == 0
    two, y = L[:2, :2], torch.tensor([0, 0, 0])
    logits = torch.tensor([[1.0, 0.5], [1.0, 1.0], [0.5, 1.0]])
    assert certified_radii(logits, y, two).tolist() == [math.inf, 0, 0]
    third = torch.tensor([[1.0, 0.0, 0.0]]).double()
    assert float(certified_radii(third, y[:1], L)) == pytest.approx(1 / float(L[0, 2]), rel=1e-9)
    assert head_margins(math.inf, C, p)[0].tolist() == [0, 0, math.inf]


def test_equal_rows_in_a_network():
    """Logits of equal rows differ by their biases alone, wherever the input goes."""
    model, x = net(0, classes=2), normal(0, 5, 6)
    with torch.no_grad():
        model[1].weight[1] = model[1].weight[0]
        model[1].bias.copy_(torch.tensor([0.5, 0.0]))
    logits, _, L, r = certified(model, x, 2)
    assert r.tolist() == [math.inf] * 5
    clean = F.cross_entropy(logits, torch.zeros(5, dtype=torch.long), reduction="none")
    torch.testing.assert_close(adversarial_loss_bound(logits, torch.zeros(5, dtype=torch.long), L, 10.0), clean)


def test_wrong_and_tied_samples_get_no_credit():
    L = torch.ones(3, 3) - torch.eye(3)
    logits = torch.tensor([[3.0, 1.0, 0.0], [1.0, 3.0, 0.0], [2.0, 2.0, 0.0], [5.0, 5.0, 5.0]])
    r = certified_radii(logits, torch.zeros(4, dtype=torch.int32), L)
    assert r.tolist() == pytest.approx([2, 0, 0, 0], abs=1e-5)
    assert r[1:].tolist() == [0, 0, 0]
    assert certified_accuracy(r, [0.0, 1.0, 3.0]).tolist() == [0.25, 0.25, 0]


def test_rounding_away_a_margin_gives_no_credit():
    one = torch.tensor([[1.0, 1.0 - 2**-23]])
    y, L = torch.tensor([0]), torch.zeros(2, 2)
    assert float(certified_radii(one, y, L)) == 0
    assert float(certified_radii(one.double(), y, L)) == math.inf


def test_one_class_never_changes():
    logits, y, L = normal(0, 3, 1), torch.zeros(3, dtype=torch.long), torch.zeros(1, 1)
    assert certified_radii(logits, y, L).tolist() == [math.inf] * 3
    assert adversarial_loss_bound(logits, y, L, 5.0).tolist() == [0] * 3
    assert linear_loss_bound(logits, y, L, 5.0).tolist() == [0] * 3
    with pytest.raises(InputError, match=r"^logits: .* not empty"):
        certified_radii(torch.zeros(3, 0), y, torch.zeros(0, 0))


@both
def test_radii_scale_with_margins_and_constants(p):
    model, x = net(1), normal(1, 8, 6)
    logits, y, L, r = certified(model, x, p)
    torch.testing.assert_close(certified_radii(3 * logits, y, 3 * L), r, rtol=1e-9, atol=0)
    torch.testing.assert_close(certified_radii(logits, y, 2 * L), r / 2, rtol=1e-9, atol=0)
    torch.testing.assert_close(certified_radii(logits.float(), y, L.float()), r, rtol=1e-3, atol=1e-6)


@both
def test_margins_of_the_head(p):
    C = normal(0, 6, 5)
    L = head_margins(2.5, C, p)
    for i in range(6):
        for j in range(6):
            exact = 2.5 * float((C[i] - C[j]).norm(p=1 if p == math.inf else 2))
            assert exact <= float(L[i, j]) <= exact * SLACK
    assert L.dtype == torch.float64
    assert torch.equal(L, L.T)
    assert (head_margins(0.0, C, p) == 0).all()


def test_certified_accuracy_counts_strictly_and_never_rises():
    r = torch.tensor([0.0, 0.5, 1.0, math.inf])
    assert certified_accuracy(r, [0, 0.5, 0.9, 1, 1e9, math.inf]).tolist() == [0.75, 0.5, 0.5, 0.25, 0.25, 0]
    radii = uniform(0, 200)
    curve = certified_accuracy(radii, torch.linspace(0, 1.1, 50))
    assert (curve.diff() <= 0).all()
    assert curve.dtype == torch.float64
    assert certified_accuracy(radii, []).shape == (0,)


@both
def test_certified_accuracy_stays_below_accuracy_under_attack(p):
    model, x = net(2), 2 * normal(2, 60, 6)
    _, y, _, r = certified(model, x, p)
    y = torch.where(torch.arange(60) % 5 == 0, (y + 1) % 4, y)
    r = certified_radii(model(x).detach(), y, margins_of(model, p))
    for eps in (0.01, 0.1, 0.3):
        x_adv = brittle.pgd(model, x, y, eps=eps, p=p, bounds=BOX, steps=10)
        assert float(certified_accuracy(r, [eps])) <= float((model(x_adv).argmax(1) == y).double().mean())


# --- bad input ----------------------------------------------------------------------------------------------

S, Y, L3 = torch.zeros(2, 3), torch.tensor([0, 2]), torch.ones(3, 3) - torch.eye(3)
NAN = math.nan


@pytest.mark.parametrize(
    ("logits", "labels", "lipschitz", "message"),
    [
        (torch.zeros(3), Y, L3, r"^logits: .*got shape \(3,\)"),
        (torch.full((2, 3), NAN), Y, L3, r"^logits: expected finite"),
        (torch.full((2, 3), math.inf), Y, L3, r"^logits: expected finite"),
        (S, torch.tensor([0]), L3, r"^labels: expected integers of shape \(2,\)"),
        (S, torch.tensor([0.0, 1.0]), L3, r"^labels: .*float32"),
        (S, torch.tensor([0, 3]), L3, r"^labels: expected classes from 0 to 2; got 0 to 3"),
        (S, torch.tensor([-1, 0]), L3, r"^labels: .*got -1 to 0"),
        (S, Y, torch.zeros(2, 2), r"^lipschitz: expected shape \(3, 3\); got \(2, 2\)"),
        (S, Y, -L3, r"^lipschitz: expected upper bounds of at least 0; got -1"),
        (S, Y, L3 * NAN, r"^lipschitz: .*got nan"),
        (S, Y, torch.ones(3, 3), r"^lipschitz: expected a symmetric matrix with zero diagonal"),
        (S, Y, L3.triu(), r"^lipschitz: expected a symmetric matrix"),
    ],
)
def test_bad_logits_labels_and_constants(logits, labels, lipschitz, message):
    with pytest.raises(InputError, match=message):
        certified_radii(logits, labels, lipschitz)
    for function in (adversarial_loss_bound, linear_loss_bound):
        with pytest.raises(InputError, match=message):
            function(logits, labels, lipschitz, 0.1)


@pytest.mark.parametrize("eps", [-0.1, NAN, math.inf])
def test_bad_budgets(eps):
    for function in (adversarial_loss_bound, linear_loss_bound):
        with pytest.raises(InputError, match=r"^eps: expected a finite number"):
            function(S, Y, L3, eps)
    with pytest.raises(InputError, match=r"^eps: "):
        binary_loss_bound(S[:, 0], Y - 1, eps=eps, lipschitz=1.0, head=torch.ones(4), p=2)


def test_bad_binary_arguments():
    good = {"eps": 0.1, "lipschitz": 1.0, "head": torch.ones(4), "p": 2}
    s, y = torch.zeros(2), torch.tensor([-1, 1])
    for bad in (torch.tensor([0, 1]), torch.tensor([1])):
        with pytest.raises(InputError, match=r"^labels: expected -1 or \+1"):
            binary_loss_bound(s, bad, **good)
    for name, value in [("lipschitz", -1.0), ("lipschitz", NAN), ("head", torch.ones(2, 2)), ("p", 1)]:
        with pytest.raises(InputError, match=f"^{name}: "):
            binary_loss_bound(s, y, **good | {name: value})
    with pytest.raises(InputError, match=r"^scores: expected finite"):
        binary_loss_bound(s * NAN, y, **good)


def test_bad_heads_radii_and_budgets():
    for constant in (-1.0, NAN):
        with pytest.raises(InputError, match=r"^lipschitz_features: "):
            head_margins(constant, torch.ones(3, 4), 2)
    with pytest.raises(InputError, match=r"^p: expected 2 or inf; got 1"):
        head_margins(1.0, torch.ones(3, 4), 1)
    for head in (torch.ones(3), torch.full((3, 4), NAN), torch.ones(3, 0)):
        with pytest.raises(InputError, match=r"^head: "):
            head_margins(1.0, head, 2)
    for radii in (torch.ones(2, 2), torch.tensor([-1.0]), torch.tensor([NAN]), torch.ones(0)):
        with pytest.raises(InputError, match=r"^radii: "):
            certified_accuracy(radii, [0.1])
    for budgets in ([-0.1], [NAN]):
        with pytest.raises(InputError, match=r"^eps_values: "):
            certified_accuracy(torch.ones(3), budgets)


def test_random_points_lie_in_the_ball():
    """The search of these tests looks where the certificates speak."""
    x = normal(0, 3, 5)
    for p in (2, math.inf):
        step = points(x, 0.5, p, 1) - x.repeat(40, 1)
        assert float(lp_norm(step, p).max()) == pytest.approx(0.5)
        torch.testing.assert_close(project_ball(step, 0.5, p), step)
    assert radius.ULPS * torch.finfo(torch.float32).eps == 2**-20
