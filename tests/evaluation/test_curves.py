"""Security curves and minimal distances: exact on linear networks, monotone on all, and cheaper than they look."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from brittle.attacks import apgd, apgd_targeted, pgd
from brittle.attacks.losses import margins
from brittle.errors import InputError
from brittle.evaluation.accuracy import evaluate
from brittle.evaluation.curves import minimal_distances, security_curve
from brittle.evaluation.execution import Execution
from brittle.evaluation.threat import Threat
from brittle.evaluation.worst_case import worst_case
from brittle.linear.norms import dual_exponent, lp_norm
from brittle.models.forward import Counted
from helpers.networks import Logistic, convnet, few, linear, mlp, seeded, uniform, untouched

NORMS = [math.inf, 2]
EPS = {math.inf: 0.06, 2: 0.3}
WIDE = (-50.0, 50.0)
"""Bounds that no budget used here reaches."""
quick_apgd = functools.partial(apgd, steps=10)
ASKED = 1
"""Gradients by which a function is asked whether it has any."""
drawn = settings(max_examples=15, deadline=None, derandomize=True, database=None)


@functools.cache
def binary(p, n=50, seed=0):
    """The binary linear network, samples of which about a fifth are wrong, and their exact distances (0 if wrong)."""
    net = Logistic(12, torch.float64).eval()
    x = uniform(seed, n, 12, dtype=torch.float64)
    with torch.no_grad():
        z = net(x).diff(dim=1)[:, 0]
        length = torch.linalg.vector_norm(net.theta, ord=dual_exponent(p))
    y = (z > 0).long()
    y[::5] = 1 - y[::5]
    wrong = (z > 0).long() != y
    return net, x, y, torch.where(wrong, 0.0, z.abs() / length), ~wrong


@functools.cache
def several(p, n=40):
    """A linear network of five classes, samples of which some are wrong, and their exact distances (0 if wrong)."""
    net = linear(5, 12, torch.float64)
    x, y = uniform(3, n, 12, dtype=torch.float64), torch.arange(n) % 5
    W = net[1].weight.detach()
    with torch.no_grad():
        logits = net(x)
    y[: n // 2] = logits[: n // 2].argmax(1)
    gaps = logits.gather(1, y[:, None]) - logits
    lengths = torch.linalg.vector_norm(W[y][:, None] - W[None], ord=dual_exponent(p), dim=2)
    ratios = torch.where(lengths > 0, gaps / lengths.clamp_min(1e-30), math.inf)
    return net, x, y, ratios.amin(1).clamp_min(0), logits.argmax(1) == y


NEAREST = {
    binary: functools.partial(apgd, steps=30),
    several: functools.partial(apgd_targeted, steps=30, targets=4),  # cross-entropy need not head for the nearest class
}


def wrong_at(net, x, y):
    with torch.no_grad():
        return net(x).argmax(1) != y


def curve_of(net, x, y, threat, at, budgets, **options):
    """The worst case at ``at``, and the curve."""
    worst = worst_case(net, x, y, threat, at)
    return worst, security_curve(net, worst, threat, at=at, budgets=budgets, **options)


def hits(curve):
    return [rate.hits for rate in curve.robust]


# --- security curves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", NORMS)
@drawn
@given(
    budgets=st.lists(st.floats(0, 1.3), min_size=0, max_size=8),
    at=st.floats(0.001, 1.3),
    knows=st.booleans(),
)
def test_on_a_linear_network_the_curve_counts_the_closed_form_radii(p, budgets, at, knows):
    net, x, y, radii, right = binary(p)
    scale = float(radii.max())
    budgets, at = [b * scale for b in budgets], at * scale
    points = torch.tensor(sorted({at, *budgets}), dtype=torch.float64)
    assume(bool(((points[:, None] - radii[None, right]).abs() > 1e-4 * scale).all()))
    threat = Threat((functools.partial(apgd, steps=30),), p, bounds=WIDE)
    _, curve = curve_of(net, x, y, threat, at, budgets, radii=0.999 * radii if knows else None)
    assert curve.eps == tuple(points.tolist())
    assert hits(curve) == [int((right & (radii > eps)).sum()) for eps in points]
    assert {rate.n for rate in curve.robust} == {len(y)}


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("place", [0, 4, 9])
def test_the_curve_never_rises_and_is_the_worst_case_at_the_base_budget(p, place):
    x, y = few(120)
    budgets = [EPS[p] * f for f in (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0)]
    threat = Threat((quick_apgd,), p)
    for net in (mlp(), convnet()):
        with untouched(net):
            worst, curve = curve_of(net, x, y, threat, budgets[place], budgets)
        assert hits(curve) == sorted(hits(curve), reverse=True)
        assert hits(curve)[place] == int(worst.robust_correct.sum())
        assert hits(curve)[0] <= int(worst.clean_correct.sum())
        assert hits(curve)[0] > hits(curve)[-1]


def test_what_was_broken_at_the_base_budget_stays_broken_at_it():
    """Also where rounding put the example a hair over the budget, and the attack does not find it again."""
    eps, edge = 1e-5, torch.tensor(0.9) + 1.005e-5

    def lucky(model, x, y, *, eps, p, ids):
        over = x + 1.01 * torch.as_tensor(eps, dtype=x.dtype).view(-1, *[1] * (x.ndim - 1))
        return torch.where((ids >= 100)[:, None], over, x)

    def steps_up(x):
        return torch.stack([torch.full((len(x),), 0.5), (x[:, 0] >= edge).float()], dim=1)

    x, y = torch.full((3, 2), 0.9), torch.zeros(3, dtype=torch.long)
    threat = Threat((lucky,))
    worst = worst_case(steps_up, x, y, threat, eps, ids=100)
    assert not worst.robust_correct.any()
    curve = security_curve(steps_up, worst, threat, at=eps, budgets=[2 * eps, 3 * eps])
    assert curve.robust[0].hits == 0


def test_certified_radii_save_passes_and_change_nothing():
    for p in NORMS:
        net, x, y, radii, _ = binary(p)
        threat = Threat((functools.partial(apgd, steps=20),), p, bounds=WIDE)
        budgets = [float(f * radii.max()) for f in (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)]
        worst = worst_case(net, x, y, threat, budgets[3])
        plain, knowing = Counted(net), Counted(net)
        without = security_curve(plain, worst, threat, at=budgets[3], budgets=budgets)
        with_radii = security_curve(knowing, worst, threat, at=budgets[3], budgets=budgets, radii=0.99 * radii)
        assert hits(with_radii) == hits(without)
        assert knowing.backwards < 0.5 * plain.backwards


def test_certified_radii_above_every_budget_need_no_attack_at_all():
    net, x, y, _, right = binary(2)
    threat = Threat((quick_apgd,), 2, bounds=WIDE)
    worst = worst_case(net, x, y, threat, 1e-6)
    counted = Counted(net)
    curve = security_curve(counted, worst, threat, at=1e-6, budgets=[1e-5, 2e-5], radii=torch.full((50,), 1.0))
    assert counted.backwards <= ASKED
    assert hits(curve) == [int(right.sum())] * 3


@pytest.mark.parametrize("p", NORMS)
def test_a_samples_place_on_the_curve_does_not_depend_on_the_batch(p):
    net, (x, y) = mlp(torch.float64), few(40, torch.float64)
    budgets = [EPS[p] * f for f in (0.2, 0.5, 1.0, 1.5, 2.5)]
    threat = Threat((quick_apgd,), p)
    worst = worst_case(net, x, y, threat, EPS[p])
    curves = [
        hits(security_curve(net, worst, threat, at=EPS[p], budgets=budgets, execution=Execution(batch_size=b)))
        for b in (1, 7, 256)
    ]
    assert curves[0] == curves[1] == curves[2]
    for row in (0, 3, 17):  # alone as in company: the random start belongs to the id, which is 0 when alone
        alone = worst_case(net, x[row : row + 1], y[row : row + 1], threat, EPS[p])
        assert torch.equal(alone.clean_correct[0], worst.clean_correct[row])


@pytest.mark.parametrize("p", NORMS)
def test_ten_budgets_cost_at_most_two_and_a_half_times_the_dearest(p):
    x, y = few(150)
    budgets = [EPS[p] * f for f in (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)]
    attack = functools.partial(apgd, steps=30)
    singles = [evaluate(mlp(), (x, y), Threat(attack, p=p), eps=b, execution=Execution(certify=False)) for b in budgets]
    threat = Threat((attack,), p)
    worst = worst_case(mlp(), x, y, threat, budgets[4])
    counted = Counted(mlp())
    curve = security_curve(counted, worst, threat, at=budgets[4], budgets=budgets)
    assert worst.backwards + counted.backwards <= 2.5 * max(e.backwards for e in singles)
    for found, e in zip(hits(curve), singles, strict=True):  # cheaper, and not by finding less
        assert found <= e.robust_correct + 1


def test_unusual_budgets():
    x, y = few(40)
    clean = int((~wrong_at(mlp(), x, y)).sum())
    threat = Threat((quick_apgd,))
    worst, base = curve_of(mlp(), x, y, threat, 0.06, [0.03, 0.09])
    assert base.eps == (0.03, 0.06, 0.09)
    for budgets in ([0.09, 0.03], [0.03, 0.09, 0.06], [0.09, 0.03, 0.03, 0.06, 0.09], (0.09, 0.03), [0.03, 0.09, 0.06]):
        curve = security_curve(mlp(), worst, threat, at=0.06, budgets=budgets)
        assert (curve.eps, hits(curve)) == (base.eps, hits(base))
    alone = security_curve(mlp(), worst, threat, at=0.06, budgets=[])
    assert (alone.eps, hits(alone)) == ((0.06,), [int(worst.robust_correct.sum())])
    zero = security_curve(mlp(), worst, threat, at=0.06, budgets=[0.0, 0, 0.03])
    assert zero.eps == (0.0, 0.03, 0.06)
    assert hits(zero)[0] == clean
    at_zero = security_curve(mlp(), worst_case(mlp(), x, y, threat, 0.0), threat, at=0.0, budgets=[0.06])
    assert at_zero.eps == (0.0, 0.06)
    assert hits(at_zero)[0] == clean
    assert hits(at_zero)[1] == int(worst.robust_correct.sum())
    one_number = security_curve(mlp(), worst, threat, at=0.06, budgets=[1])
    assert one_number.eps == (0.06, 1.0)
    assert hits(one_number)[1] == 0


@pytest.mark.parametrize("bad", [-0.1, math.inf, math.nan])
def test_budgets_that_are_none_are_refused(bad):
    x, y = few(5)
    worst = worst_case(mlp(), x, y, Threat((quick_apgd,)), 0.06)
    with pytest.raises(InputError, match=r"^budgets: expected finite numbers of at least 0"):
        security_curve(mlp(), worst, Threat((quick_apgd,)), at=0.06, budgets=[0.01, bad])


def test_progress_of_a_curve_rises_to_all_samples():
    x, y = few(60)
    told = []
    curve_of(
        mlp(),
        x,
        y,
        Threat((quick_apgd,)),
        0.06,
        [0.01, 0.02, 0.04, 0.08, 0.12],
        execution=Execution(progress=lambda stage, done, total: told.append((done, total))),
    )
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (60, 60)
    assert {total for _, total in told} == {60}


def test_budget_zero_costs_nothing():
    x, y = few(60)
    threat = Threat((quick_apgd,))
    worst = worst_case(mlp(), x, y, threat, 0.06)
    without, having = Counted(mlp()), Counted(mlp())
    security_curve(without, worst, threat, at=0.06, budgets=[0.03])
    security_curve(having, worst, threat, at=0.06, budgets=[0.0, 0.03])
    assert having.backwards == without.backwards


# --- minimal distances --------------------------------------------------------------------------------------


def check(net, x, y, found, bounds):
    """What holds for every network: examples that break, at exactly the distance told, within the bounds."""
    wrong, has = wrong_at(net, x, y), found.distance.isfinite()
    assert torch.equal(found.distance == 0, wrong)
    assert torch.equal(found.x_adv[wrong | ~has], x[wrong | ~has])
    told, true = found.distance[has].double(), lp_norm(found.x_adv.double() - x.double(), found.p)[has]
    torch.testing.assert_close(told, true, rtol=2.0**-23 if x.dtype == torch.float32 else 1e-15, atol=0)
    assert wrong_at(net, found.x_adv[has], y[has]).all()
    assert found.x_adv.min() >= bounds[0]
    assert found.x_adv.max() <= bounds[1]
    assert (found.survived >= 0).all()
    assert (found.survived <= found.distance).all()


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("make", [binary, several])
@pytest.mark.parametrize("precision", [0.3, 0.01])
@pytest.mark.parametrize("knows", [False, True])
def test_distances_of_linear_networks_are_exact_to_the_precision_and_never_below(make, p, precision, knows):
    net, x, y, exact, right = make(p)
    threat = Threat((NEAREST[make],), p, bounds=WIDE)
    found = minimal_distances(net, x, y, threat, largest=10.0, precision=precision, radii=exact if knows else None)
    check(net, x, y, found, WIDE)
    rounding = 1 - 1e-9
    assert (found.distance[right] >= exact[right] * rounding).all()
    assert (found.distance[right] <= exact[right] / (1 - precision) / rounding).all()
    assert (found.survived[right] <= exact[right] / rounding).all()
    assert (found.distance[~right] == 0).all()


@drawn
@given(p=st.sampled_from(NORMS), share=st.floats(0.05, 0.95), seed=st.integers(0, 99))
def test_beyond_the_largest_budget_there_is_no_distance(p, share, seed):
    net, x, y, exact, right = binary(p, 20, seed)
    largest = float(share * exact.max())
    assume(bool(((exact[right] - largest).abs() > 1e-3 * largest).all()))
    threat = Threat((functools.partial(apgd, steps=20),), p, bounds=WIDE)
    found = minimal_distances(net, x, y, threat, largest=largest, precision=0.1)
    check(net, x, y, found, WIDE)
    assert torch.equal(found.distance.isinf(), right & (exact > largest))
    assert found.survived[found.distance.isinf()].tolist() == pytest.approx(
        [largest] * int(found.distance.isinf().sum())
    )
    assert (found.distance[found.distance.isfinite()] <= largest * (1 + 1e-6)).all()


def test_certified_radii_are_where_the_search_begins():
    for p in NORMS:
        net, x, y, exact, right = binary(p)
        threat = Threat((functools.partial(apgd, steps=20),), p, bounds=WIDE)
        plain, knowing = Counted(net), Counted(net)
        without = minimal_distances(plain, x, y, threat, largest=10.0, precision=0.02)
        radii = 0.95 * exact
        with_radii = minimal_distances(knowing, x, y, threat, largest=10.0, precision=0.02, radii=radii)
        assert knowing.backwards < plain.backwards
        assert (with_radii.survived >= radii)[right].all()
        assert ((with_radii.distance / without.distance)[right] - 1).abs().max() <= 0.03


@pytest.mark.parametrize("p", NORMS)
def test_a_samples_distance_does_not_depend_on_the_batch(p):
    net, (x, y) = mlp(torch.float64), few(24, torch.float64)
    threat = Threat((quick_apgd,), p)
    base, *others = (
        minimal_distances(net, x, y, threat, largest=1.0, precision=0.1, execution=Execution(batch_size=b))
        for b in (256, 1, 5)
    )
    for other in others:
        torch.testing.assert_close(other.distance, base.distance, rtol=1e-6, atol=0)
    first = minimal_distances(net, x[:9], y[:9], threat, largest=1.0, precision=0.1)
    torch.testing.assert_close(first.distance, base.distance[:9], rtol=1e-6, atol=0)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("make", [mlp, convnet])
def test_distances_are_no_larger_than_the_budgets_at_which_attacks_succeed(p, make):
    net, (x, y) = make(), few(80)
    attack = functools.partial(apgd, steps=40)
    threat = Threat((attack,), p)
    with untouched(net):
        found = minimal_distances(net, x, y, threat, largest=4 * EPS[p], precision=0.05)
    net.eval()
    check(net, x, y, found, (0.0, 1.0))
    least = torch.full((len(y),), math.inf, dtype=torch.float64)
    for budget in [EPS[p] * f for f in (2.0, 1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08)]:
        broken = ~worst_case(net, x, y, threat, budget).robust_correct
        least[broken] = budget
    assert (found.distance <= least / (1 - 0.05) * (1 + 1e-5)).all()
    assert found.distance.isfinite().all()
    assert (found.distance[found.distance > 0] < least[found.distance > 0]).double().mean() > 0.8


class Steps(nn.Module):
    """Class 0 at the grey point alone: every perturbation, however small, makes it class 1."""

    def forward(self, x):
        """``(N, ...)`` to ``(N, 2)``."""
        moved = (x - 0.5).flatten(1).abs().amax(1)
        return torch.stack([torch.full_like(moved, 1e-300 if x.dtype == torch.float64 else 1e-38), moved], dim=1)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_search_ends_where_the_least_perturbation_breaks(p, dtype):
    x, y = torch.full((4, 6), 0.5, dtype=dtype), torch.zeros(4, dtype=torch.long)
    counted = Counted(Steps())
    found = minimal_distances(counted, x, y, Threat((quick_apgd,), p), largest=0.3)
    check(Steps(), x, y, found, (0.0, 1.0))
    assert (found.distance > 0).all()
    assert found.distance.max() < 1e-6
    assert counted.backwards <= 4 * 11 * 60


@pytest.mark.parametrize("p", NORMS)
def test_the_search_ends_where_nothing_breaks(p):
    x, y = few(20)
    y = y.clone()
    y[:5] = 0
    constant = Counted(lambda x: x.flatten(1)[:, :1] * torch.zeros(10) + torch.eye(10)[0])
    found = minimal_distances(constant, x, y, Threat((quick_apgd,), p), largest=0.5)
    right = y == 0
    assert found.distance[right].isinf().all()
    assert (found.survived[right] == 0.5).all()
    assert (found.distance[~right] == 0).all()
    assert torch.equal(found.x_adv, x)
    assert constant.backwards <= ASKED + 11 * int(right.sum())


def test_nobody_to_attack_costs_nothing():
    x, y = few(10)
    y = (mlp()(x).argmax(1) + 1) % 10
    counted = Counted(mlp())
    found = minimal_distances(counted, x, y, Threat((quick_apgd,)), largest=0.5)
    assert counted.backwards <= ASKED
    assert (found.distance == 0).all()


def test_distances_respect_the_bounds():
    """The box stops the direct way: the network needs one value above 1, so only the other one can do it."""
    net = seeded(lambda: nn.Linear(2, 2)).double().eval()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0, 0.0], [10.0, 1.0]]))
        net.bias.copy_(torch.tensor([0.0, -10.35]))
    x, y = torch.tensor([[0.999, 0.1]], dtype=torch.float64), torch.tensor([0])  # score -0.26
    threat = Threat((functools.partial(apgd, steps=60),), math.inf)
    found = minimal_distances(net, x, y, threat, largest=1.0, precision=0.01)
    check(net, x, y, found, (0.0, 1.0))
    assert 0.25 <= found.distance[0] <= 0.25 / 0.99 + 1e-9


@pytest.mark.parametrize("what", ["curve", "distances"])
def test_networks_that_fall_over_are_broken_here_as_in_an_evaluation(what):
    def falls(x):
        return torch.where(x[:, :1] > 0.52, math.nan, torch.stack([1 + 0 * x[:, 0], x[:, 0]], 1))

    def push(model, x, y, *, eps, p):
        return x + 0.99 * torch.as_tensor(eps, dtype=x.dtype).reshape(-1, 1)

    x, y = torch.full((3, 2), 0.5, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    threat = Threat((push,))
    worst = worst_case(falls, x, y, threat, 0.1)
    assert not worst.robust_correct.any()
    if what == "curve":
        curve = security_curve(falls, worst, threat, at=0.1, budgets=[0.01, 0.2])
        assert hits(curve) == [3, 0, 0]
    else:
        found = minimal_distances(falls, x, y, threat, largest=0.3, precision=0.05)
        assert ((found.distance >= 0.02) & (found.distance <= 0.022)).all()


def test_the_largest_budget_is_what_was_survived():
    constant = lambda x: x[:, :1] * torch.tensor([0.0, 0.0]) + torch.tensor([1.0, 0.0])  # noqa: E731
    found = minimal_distances(constant, torch.zeros(3, 2), torch.zeros(3).long(), Threat((quick_apgd,)), largest=0.3)
    assert found.survived.tolist() == [0.3] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"largest": 0.0}, "^largest: expected a finite number above 0; got 0"),
        ({"largest": math.inf}, "^largest"),
        ({"largest": math.nan}, "^largest"),
        ({"precision": 0.0}, "^precision: expected a share between 0 and 1; got 0"),
        ({"precision": 1.0}, "^precision"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        minimal_distances(mlp(), Threat((quick_apgd,)), *few(3), **({"largest": 0.1} | options))


def test_the_margin_at_an_example_of_least_distance_is_small():
    """An example drawn back to the boundary lies near it: margins there are far smaller than without attack."""
    net, (x, y) = mlp(), few(60)
    found = minimal_distances(net, x, y, Threat((quick_apgd,)), largest=0.5, precision=0.02)
    with torch.no_grad():
        before, after = margins(net(x), y), margins(net(found.x_adv), y)
    right = before > 0
    assert after[right].abs().median() < 0.1 * before[right].median()


def test_a_certified_radius_does_not_cover_the_budget_that_equals_it():
    """At its own radius a sample of a linear network lies on the boundary, where the prediction is another class."""
    net = nn.Linear(1, 2, dtype=torch.float64)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        net.bias.copy_(torch.tensor([0.5, -0.5]))
    x, y = torch.tensor([[0.75]], dtype=torch.float64), torch.tensor([1])
    threat = Threat((functools.partial(pgd, random_start=False),), 2)
    worst = worst_case(net, x, y, threat, 0.25)
    assert not bool(worst.robust_correct)
    for at in (0.125, 0.25):
        base = worst_case(net, x, y, threat, at)
        curve = security_curve(net, base, threat, at=at, budgets=[0.125, 0.25], radii=torch.tensor([0.25]))
        assert [rate.hits for rate in curve.robust] == [1, 0]


def test_no_survived_budget_exceeds_the_largest_that_was_tried():
    net, x = linear(5, 12, torch.float64), uniform(1, 6, 12, dtype=torch.float64)
    with torch.no_grad():
        y = net(x).argmax(1)
    threat = Threat((functools.partial(pgd, steps=3),), 2)
    found = minimal_distances(net, x, y, threat, largest=1e-6, radii=torch.full((6,), 2e-6))
    assert torch.equal(found.survived, torch.full((6,), 1e-6, dtype=torch.float64))
    assert bool(found.distance.isinf().all())


def test_an_example_within_a_budget_that_was_survived_before_is_what_counts_on_the_curve():
    """An attack that tries only at large budgets: its example, drawn back, breaks every budget that contains it."""

    def late(model: object, x: Tensor, y: Tensor, *, eps: float, p: float) -> Tensor:
        return x - eps * (torch.as_tensor(eps) > 0.4)

    def above_half(x: Tensor) -> Tensor:
        return torch.cat([0.5 - x, x - 0.5], 1)

    x, y = torch.tensor([[0.62]], dtype=torch.float64), torch.tensor([1])
    threat = Threat((late,))
    worst = worst_case(above_half, x, y, threat, 0.3)
    assert bool(worst.robust_correct)
    curve = security_curve(above_half, worst, threat, at=0.3, budgets=[0.1, 0.2, 0.6])
    assert [rate.hits for rate in curve.robust] == [1, 0, 0, 0]
