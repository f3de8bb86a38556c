"""Packed attacks: whatever the batch size and order, every sample has the trajectory it has alone, and no pass more."""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import Tensor

from brittle.attacks import apgd, apgd_targeted, auto_pgd, cross_entropy, dlr, fgsm, packing, pgd
from brittle.attacks import pool as attack_pool
from brittle.attacks.losses import targeted_dlr
from brittle.attacks.packing import run
from brittle.attacks.pool import random_start
from brittle.attacks.region import Region
from brittle.errors import InputError
from brittle.models.forward import widest
from helpers import networks
from helpers.matrices import quick
from helpers.networks import few, linear, mlp, uniform, untouched

CPU = torch.device("cpu")
NORMS = [math.inf, 2]
EPS = {math.inf: 0.06, 2: 0.3}
N, STEPS, TARGETS = 40, 9, 3
WIDTHS = [3, 16, 1000]
SEARCHES = {
    "pgd ce": functools.partial(pgd, steps=STEPS),
    "pgd dlr": functools.partial(pgd, steps=STEPS, loss="dlr"),
    "apgd ce": functools.partial(apgd, steps=STEPS),
    "apgd dlr": functools.partial(apgd, steps=STEPS, loss="dlr"),
    "apgd_targeted": functools.partial(apgd_targeted, steps=STEPS, targets=TARGETS),
}
LOSSES = {"ce": cross_entropy, "dlr": dlr}


def same_point(returned: Tensor, seen: Tensor) -> bool:
    """Equal but for values at the bounds, where gradients are taken a rounding step inside."""
    step = torch.finfo(seen.dtype).eps
    return torch.equal(returned.clamp(step, 1 - step), seen)


class Watch:
    """A network that keeps, by sample, every point put through it with a gradient.

    A point belongs to the sample that is nearest: attacks move by less than half of the smallest distance.
    """

    def __init__(self, net, x: Tensor, p: float) -> None:
        self.net, self.clean, self.p = net, x.flatten(1), p
        self.points: dict[int, list[Tensor]] = {row: [] for row in range(len(x))}
        self.wrong: dict[int, list[bool]] = {row: [] for row in range(len(x))}
        self.widths: list[int] = []

    def told(self, x: Tensor) -> list[int]:
        """Which sample each point belongs to."""
        return torch.cdist(x.detach().flatten(1), self.clean, p=self.p).argmin(1).tolist()

    def seeing(self, y: Tensor) -> Watch:
        """Also notes which points are misclassified."""
        self.y = y
        return self

    def __call__(self, x: Tensor) -> Tensor:
        """Pass on, and keep the points."""
        logits = self.net(x)
        if x.requires_grad:
            told = self.told(x)
            assert len(set(told)) == len(told)  # no sample twice in a batch
            self.widths.append(len(x))
            for row, point, wrong in zip(told, x.detach().clone(), logits.argmax(1) != self.y[told], strict=True):
                self.points[row].append(point)
                self.wrong[row].append(bool(wrong))
        return logits


def watched(attack, x, y, p, rows=None, net=None, **options):
    """What the attack returns for the samples ``rows`` under their ids, and the watch that it ran under."""
    watch = Watch(net or mlp(x.dtype), x, p).seeing(y)
    rows = torch.arange(len(x)) if rows is None else rows
    x_adv = attack(watch, x[rows], y[rows], p=p, ids=rows, **{"eps": EPS[p]} | options)
    return x_adv, watch


@functools.cache
def packed(name, p, width):
    """The run of the first digits with this batch size."""
    x, y = few(N, torch.float64)
    return watched(SEARCHES[name], x, y, p, batch_size=width)


def unpacked(name, p):
    """The run of all samples at once."""
    return packed(name, p, None)


def same_trajectories(watch, other, rows, tolerance=1e-9):
    for row in rows:
        assert len(watch.points[row]) == len(other.points[row]), row
        torch.testing.assert_close(
            torch.stack(watch.points[row]), torch.stack(other.points[row]), atol=tolerance, rtol=0
        )


# --- the same trajectories, whatever the batch ----------------------------------------------------------------


@pytest.mark.parametrize("p", NORMS)
def test_the_watch_can_tell_samples_apart(p):
    x, _ = few(N, torch.float64)
    apart = torch.cdist(x.flatten(1), x.flatten(1), p=p) + 99 * torch.eye(N)
    assert float(apart.min()) > 2.1 * 1.1 * EPS[p]


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", SEARCHES)
def test_trajectories_do_not_depend_on_the_batch_size(name, p):
    whole, reference = unpacked(name, p)
    for width in WIDTHS:
        x_adv, watch = packed(name, p, width)
        same_trajectories(watch, reference, range(N))
        torch.testing.assert_close(x_adv, whole, atol=1e-9, rtol=0)
        assert max(watch.widths) == min(width, N)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", SEARCHES)
def test_trajectories_do_not_depend_on_the_order(name, p):
    x, y = few(N, torch.float64)
    whole, reference = unpacked(name, p)
    for seed, width in ((0, 5), (1, None)):
        order = torch.randperm(N, generator=networks.generator(seed))
        x_adv, watch = watched(SEARCHES[name], x, y, p, order, batch_size=width)
        same_trajectories(watch, reference, range(N))
        torch.testing.assert_close(x_adv, whole[order], atol=1e-9, rtol=0)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", SEARCHES)
def test_a_sample_alone_goes_the_same_way(name, p):
    x, y = few(N, torch.float64)
    whole, reference = unpacked(name, p)
    for row in range(0, N, 5):
        x_adv, watch = watched(SEARCHES[name], x, y, p, torch.tensor([row]))
        same_trajectories(watch, reference, [row])
        torch.testing.assert_close(x_adv[0], whole[row], atol=1e-9, rtol=0)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", SEARCHES)
def test_float32_verdicts_do_not_depend_on_the_batch_size(name, p):
    x, y = few(80)
    verdicts = [
        mlp()(SEARCHES[name](mlp(), x, y, eps=EPS[p], p=p, batch_size=width)).argmax(1) == y for width in (None, 7, 64)
    ]
    assert torch.equal(verdicts[0], verdicts[1])
    assert torch.equal(verdicts[0], verdicts[2])
    assert 10 < int(verdicts[0].sum()) < 70


@pytest.mark.parametrize("width", [2, 5, None])
def test_channels_last_inputs_make_no_difference(width):
    net = networks.seeded(
        lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 5))
    ).double()
    x = uniform(0, 9, 3, 8, 8, dtype=torch.float64)
    y = net(x).argmax(1)
    for p in NORMS:
        for search in (SEARCHES["pgd ce"], SEARCHES["apgd dlr"]):
            rows, swapped = (
                search(net, images, y, eps=EPS[p], p=p, batch_size=width)
                for images in (x, x.contiguous(memory_format=torch.channels_last))
            )
            torch.testing.assert_close(rows, swapped, atol=1e-9, rtol=0)


# --- no pass more than needed ---------------------------------------------------------------------------------


def simulated(lives: list[int], width: int) -> list[int]:
    """Samples at once in every pass when slots are taken, as soon as they are free, by whoever waits."""
    queue, slots, widths = list(lives), [], []
    while queue or slots:
        while queue and len(slots) < width:
            slots.append(queue.pop(0))
        widths.append(len(slots))
        slots = [life - 1 for life in slots if life > 1]
    return widths


def assert_lean(watch, rows):
    """A broken sample's passes end with its first success; a survivor has one more than there are steps."""
    broken = 0
    for row in rows:
        wrong = watch.wrong[row]
        assert not any(wrong[:-1])
        if wrong[-1]:
            broken += 1
            assert len(wrong) <= STEPS + 1
        else:
            assert len(wrong) == STEPS + 1
    return broken


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", [name for name in SEARCHES if name != "apgd_targeted"])
def test_passes_are_those_up_to_the_first_success(name, p):
    _, y = few(N, torch.float64)
    whole, reference = unpacked(name, p)
    broken = assert_lean(reference, range(N))
    assert 5 < broken < N - 5
    passes = [len(reference.points[row]) for row in range(N)]
    assert len(set(passes)) > 3  # several lifetimes, or packing has nothing to do
    for row in range(N):
        points = torch.stack(reference.points[row])
        if reference.wrong[row][-1]:
            assert same_point(whole[row], points[-1])
        else:
            reached = LOSSES[name.split()[1]](mlp(torch.float64)(points).detach(), y[row].expand(len(points)))
            torch.testing.assert_close(whole[row], points[int(reached.argmax())], atol=1e-9, rtol=0)
    for width in WIDTHS:
        _, watch = packed(name, p, width)
        assert [len(watch.points[row]) for row in range(N)] == passes
        assert sum(watch.widths) == sum(passes)
        assert watch.widths == simulated(passes, width)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("attack", [pgd, apgd])
def test_the_first_misclassified_point_is_returned_even_if_its_loss_is_not_the_largest(attack, p):
    """Under a loss that falls where the prediction turns; some of these points fall on checkpoints."""

    def falling(logits, y):
        right = logits.argmax(1) == y
        return cross_entropy(logits, y) * torch.where(right, 1, -1)

    x, y = few(N, torch.float64)
    for width in (5, None):
        search = functools.partial(attack, steps=STEPS, loss=falling, batch_size=width)
        x_adv, watch = watched(search, x, y, p)
        broken = [row for row in range(N) if watch.wrong[row][-1]]
        assert len({len(watch.wrong[row]) for row in broken}) > 2
        for row in broken:
            assert same_point(x_adv[row], watch.points[row][-1])


@pytest.mark.parametrize("width", [3, 16, None])
@pytest.mark.parametrize("p", NORMS)
def test_targeted_passes_are_those_up_to_the_first_success_of_any_target(p, width):
    x, y = few(80, torch.float64)
    x_adv, watch = watched(SEARCHES["apgd_targeted"], x, y, p, batch_size=width)
    survivors = 0
    for row in range(80):
        wrong = watch.wrong[row]
        assert not any(wrong[:-1])
        if wrong[-1]:
            assert same_point(x_adv[row], watch.points[row][-1])
        else:
            survivors += 1
            assert len(wrong) == TARGETS * (STEPS + 1)
    assert 20 < survivors < 75
    later = [row for row in range(80) if watch.wrong[row][-1] and len(watch.wrong[row]) > STEPS + 1]
    assert later  # some sample resists its first target and falls to another


def test_samples_wrong_from_the_start_cost_one_pass():
    x, _ = few(N, torch.float64)
    wrong = (mlp(torch.float64)(x).argmax(1) + 1) % 10
    for name in ("pgd ce", "apgd ce", "apgd_targeted"):
        _, watch = watched(SEARCHES[name], x, wrong, math.inf, eps=1e-6, batch_size=7)
        assert {len(points) for points in watch.points.values()} == {1}


# --- a budget for every sample --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", [*SEARCHES, "fgsm"])
def test_budgets_a_sample_equal_separate_runs(name, p, dtype):
    x, y = few(24, dtype)
    levels = torch.tensor([0.0, 0.4, 1.0, 1.1], dtype=torch.float64) * EPS[p]
    which = torch.arange(24) % 4
    attack = SEARCHES.get(name, fgsm)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    for width in (None, 5):
        together = attack(mlp(dtype), x, y, eps=levels[which], p=p, batch_size=width)
        for level, eps in enumerate(levels.tolist()):
            rows = (which == level).nonzero()[:, 0]
            ids = {} if name == "fgsm" else {"ids": rows}
            separate = attack(mlp(dtype), x[rows], y[rows], eps=eps, p=p, **ids)
            far = (together[rows] - separate).abs().flatten(1).amax(1) > tolerance
            # In float32 a rounding may change the sign of a gradient's entry that is all but zero.
            assert int(far.sum()) <= (1 if dtype == torch.float32 else 0)
            length = torch.linalg.vector_norm((together[rows].double() - x[rows].double()).flatten(1), ord=p, dim=1)
            assert float(length.max()) <= eps * (1 + 1e-6)
    with pytest.raises(InputError, match=r"^eps: expected one budget or 24"):
        attack(mlp(dtype), x, y, eps=levels, p=p)
    with pytest.raises(InputError, match=r"^eps: .*-0.1"):
        attack(mlp(dtype), x, y, eps=torch.where(which == 2, -0.1, 0.1), p=p)


# --- an unpacked implementation by others ---------------------------------------------------------------------


class Recorded:
    """A network that keeps every batch and the predictions for it; rows stay where they are."""

    def __init__(self, net) -> None:
        self.net, self.batches, self.predictions = net, [], []

    def __call__(self, x: Tensor) -> Tensor:
        """Pass on, and keep the batch."""
        logits = self.net(x)
        self.batches.append(x.detach().clone())
        self.predictions.append(logits.detach().argmax(1))
        return logits


def theirs(kind, model, x, **options):
    """An attack of Croce & Hein's code in the inputs' type."""
    attack = kind(model, rho=0.75, device="cpu", n_iter=STEPS * 3, **options)
    attack.init_hyperparam(x)
    return attack


def in_type(dtype, call):
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng():
            return call()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.filterwarnings("ignore:there are .* points with zero gradient")
@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize(("p", "norm"), [(math.inf, "Linf"), (2, "L2")])
def test_packed_apgd_walks_where_its_authors_unpacked_one_walks(p, norm, loss):
    x, y = few(N, torch.float64)
    start = random_start(Region.of(x, EPS[p], p, (0.0, 1.0)), 4, list(range(N)))
    recorded = Recorded(mlp(torch.float64))
    attack = theirs(APGDAttack, recorded, x, norm=norm, eps=EPS[p], loss=loss)
    _, survived, _, _ = in_type(torch.float64, lambda: attack.attack_single_run(x, y, x_init=start))
    x_adv, watch = watched(functools.partial(apgd, steps=3 * STEPS, loss=loss, seed=4), x, y, p, batch_size=5)
    assert torch.equal(mlp(torch.float64)(x_adv).argmax(1) == y, survived.bool())
    assert 5 < int(survived.sum()) < N - 5
    wrong = torch.stack(recorded.predictions) != y
    assert len(wrong) == 3 * STEPS + 1
    compared = 0.0
    for row in range(N):
        hits = wrong[:, row].nonzero()[:, 0].tolist()
        points = torch.stack([batch[row] for batch in recorded.batches[: hits[0] + 1 if hits else None]])
        assert len(watch.points[row]) == len(points)
        losses = LOSSES[loss](mlp(torch.float64)(points).detach(), y[row].expand(len(points)))
        ties = ((losses[1:] - losses[:-1]).abs() < 1e-12).nonzero()[:, 0].tolist()
        sure = ties[0] + 2 if ties else len(points)  # whether a loss "rose" that stayed the same, rounding decides
        torch.testing.assert_close(torch.stack(watch.points[row][:sure]), points[:sure], atol=1e-7, rtol=0)
        compared += sure / len(points)
    assert compared > 0.4 * N


@pytest.mark.parametrize("p", NORMS)
def test_packed_pgd_walks_where_the_definition_walks(p):
    """Steps, projections and the end of every sample on its own, written down directly."""
    x, y = few(N, torch.float64)
    net, eps, step = mlp(torch.float64), EPS[p], 2.5 * EPS[p] / STEPS
    _, watch = watched(SEARCHES["pgd ce"], x, y, p, batch_size=5)
    start = random_start(Region.of(x, eps, p, (0.0, 1.0)), 0, list(range(N)))
    for row in range(N):
        z, points = start[row], []
        for _ in range(STEPS + 1):
            z = z.detach().requires_grad_()
            points.append(z.detach())
            logits = net(z[None])
            if int(logits.argmax()) != int(y[row]):
                break
            (g,) = torch.autograd.grad(cross_entropy(logits, y[row : row + 1]).sum(), z)
            delta = z.detach() + step * (g.sign() if p == math.inf else g / g.norm()) - x[row]
            delta = delta.clamp(-eps, eps) if p == math.inf else delta * min(1.0, eps / float(delta.norm()))
            z = (x[row] + delta).clamp(0, 1)
        assert len(points) == len(watch.points[row])
        torch.testing.assert_close(torch.stack(points), torch.stack(watch.points[row]), atol=1e-9, rtol=0)


@pytest.mark.filterwarnings("ignore:there are .* points with zero gradient")
@pytest.mark.parametrize(("p", "norm"), [(math.inf, "Linf"), (2, "L2")])
def test_packed_targeted_apgd_is_its_authors_from_equal_starts(p, norm, monkeypatch):
    """Their composition, target after target on what is left, with our starts."""
    monkeypatch.setattr(attack_pool, "random_start", lambda region, seed, names: region.x.clone())
    net = mlp(torch.float64)
    x, y = few(90, torch.float64)
    right = net(x).argmax(1) == y
    x, y = x[right], y[right]
    eps = 0.9 * EPS[p]
    attack = theirs(APGDAttack_targeted, net, x, norm=norm, eps=eps)
    left, order = torch.arange(len(x)), net(x).argsort(dim=1, descending=True)
    for target in range(1, 5):
        attack.y_target = order[left, target]
        part = (x[left], y[left])
        _, survived, _, _ = in_type(torch.float64, lambda part=part: attack.attack_single_run(*part, x_init=part[0]))
        left = left[survived.bool()]
    ours = functools.partial(apgd_targeted, net, x, y, eps=eps, p=p, steps=3 * STEPS, targets=4)
    for width in (5, None):
        survivors = (net(ours(batch_size=width)).argmax(1) == y).nonzero()[:, 0]
        assert torch.equal(survivors, left)
    assert 10 < len(left) < len(x) - 10


@pytest.mark.filterwarnings("ignore:there are .* points with zero gradient")
@pytest.mark.parametrize(("p", "norm"), [(math.inf, "Linf"), (2, "L2")])
def test_targeted_apgd_leaves_about_as_many_as_its_authors_from_other_starts(p, norm):
    x, y = few(150)
    attack = theirs(APGDAttack_targeted, mlp(), x, norm=norm, eps=0.9 * EPS[p], n_target_classes=4, seed=0)
    by_them = in_type(torch.float32, lambda: attack.perturb(x, y))
    by_us = apgd_targeted(mlp(), x, y, eps=0.9 * EPS[p], p=p, steps=3 * STEPS, targets=4, batch_size=32)
    with torch.no_grad():
        left = [int((mlp()(x_adv).argmax(1) == y).sum()) for x_adv in (by_them, by_us)]
    assert abs(left[0] - left[1]) <= 2
    assert 20 < left[0] < 130


# --- targets --------------------------------------------------------------------------------------------------


def test_targets_come_in_falling_order_of_the_clean_logits_and_end_with_the_classes(monkeypatch):
    net = linear(classes=5, n=12, dtype=torch.float64)
    x = uniform(1, 6, 12, dtype=torch.float64)
    clean = net(x).detach()
    y = clean.argmax(1)
    y[0] = clean[0].argsort()[2]  # wrong from the start: the label may stand anywhere in the order
    asked: list[tuple[Tensor, Tensor]] = []

    def spy(logits, labels, target):
        asked.append((labels.clone(), target.clone()))
        return targeted_dlr(logits, labels, target)

    monkeypatch.setattr(auto_pgd, "targeted_dlr", spy)
    apgd_targeted(net, x, y, eps=1e-9, steps=2, targets=9)
    expected = [[j for j in row.argsort(descending=True).tolist() if j != k] for row, k in zip(clean, y, strict=True)]
    assert [len(labels) for labels, _ in asked] == [6] + [5] * 11  # four other classes, three passes each
    for number, (labels, target) in enumerate(asked):
        left = range(6) if number == 0 else range(1, 6)  # the first sample is done after one pass
        wanted = sorted((int(y[row]), expected[row][number // 3]) for row in left)
        assert sorted(zip(labels.tolist(), target.tolist(), strict=True)) == wanted


def test_as_many_targets_as_asked_for():
    x, y = few(12, torch.float64)
    for targets, runs in ((1, 1), (4, 4), (9, 9), (30, 9)):
        search = functools.partial(apgd_targeted, steps=2, targets=targets)
        _, watch = watched(search, x, y, math.inf, eps=1e-6)
        assert {len(points) for points in watch.points.values()} <= {1, 3 * runs}
        assert max(map(len, watch.points.values())) == 3 * runs


@pytest.mark.parametrize("classes", [2, 3])
def test_targeted_needs_four_classes(classes):
    net = linear(classes=classes, n=12)
    with pytest.raises(InputError, match=f"at least 4 classes; got {classes}"):
        apgd_targeted(net, uniform(0, 5, 12), torch.zeros(5, dtype=torch.long), eps=0.1)
    with pytest.raises(InputError, match=f"at least 4 classes; got {classes}"):
        targeted_dlr(torch.zeros(2, classes), torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.long))


def test_bad_options_of_the_targeted_attack_are_named():
    x, y = few(3)
    for options, name in (({"targets": 0}, "targets"), ({"steps": 0}, "steps"), ({"batch_size": 0}, "batch_size")):
        with untouched(mlp()), pytest.raises(InputError, match=f"^{name}: expected at least 1; got 0"):
            apgd_targeted(mlp(), x, y, eps=0.1, **options)


@quick
@given(st.integers(4, 9), st.integers(0, 10**6), st.booleans())
def test_targeted_dlr_is_the_formula(classes, seed, ties):
    logits = 3 * torch.randn(9, classes, generator=networks.generator(seed), dtype=torch.float64)
    logits = logits.round() if ties else logits
    y = torch.arange(9) % classes
    target = (y + 1 + seed % (classes - 1)) % classes
    values = targeted_dlr(logits, y, target)
    expected = []
    for row, own, aimed in zip(logits.tolist(), y.tolist(), target.tolist(), strict=True):
        first, _, third, fourth = sorted(row, reverse=True)[:4]
        expected.append((row[aimed] - row[own]) / (first - (third + fourth) / 2 + 1e-12))
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-9)
    rows = torch.arange(9)
    assert torch.equal(values > 0, logits[rows, target] > logits[rows, y])
    if not ties:
        for scale, shift in ((7.0, 0.0), (1e-3, 0.0), (1.0, 5.0), (3.0, -2.0)):
            torch.testing.assert_close(targeted_dlr(scale * logits + shift, y, target), values, rtol=1e-6, atol=1e-7)


# --- the engine on its own ------------------------------------------------------------------------------------


class Toy:
    """Samples that live for a given number of passes; keeps account of everything that happens to them."""

    name = "toy"

    def __init__(self, lives: list[int], fits=lambda width: True) -> None:
        self.lives, self.fits = torch.tensor(lives), fits
        self.begun, self.measured, self.finished = Counter(), Counter(), Counter()
        self.widths: list[int] = []
        self.refused: list[int] = []
        self.calls = 0

    def begin(self, rows):
        """Name, age, and a row of values that tell the sample."""
        self.begun.update(rows.tolist())
        return {"name": rows.clone(), "age": torch.zeros_like(rows), "tag": rows[:, None] * torch.tensor([1.0, -2.0])}

    def measure(self, state):
        """Every sample once, or not at all."""
        width = len(state["name"])
        assert {len(values) for values in state.values()} == {width}
        if not self.fits(width):
            self.refused.append(width)
            raise torch.OutOfMemoryError("toy")
        self.widths.append(width)
        self.measured.update(state["name"].tolist())
        return state["name"] * 10 + state["age"]

    def advance(self, state, measured):
        """By new tensors on even calls, in place on odd ones."""
        assert torch.equal(measured, state["name"] * 10 + state["age"])
        self.calls += 1
        if self.calls % 2:
            state["age"] += 1
            state["tag"][:, 0] += 1
        else:
            state["age"] = state["age"] + 1
            state["tag"] = state["tag"] + torch.tensor([1.0, 0.0])
        return state["age"] >= self.lives[state["name"]]

    def finish(self, rows, state, done):
        """Once, at the end of the sample's life, in the sample's own slot."""
        assert torch.equal(rows, state["name"][done])
        assert torch.equal(state["age"][done], self.lives[rows])
        assert torch.equal(state["tag"][done, 0], (rows + self.lives[rows]).float())
        assert torch.equal(state["tag"][done, 1], -2.0 * rows)
        self.finished.update(rows.tolist())

    def account(self):
        """Every sample began once, was measured all its life, finished once."""
        everyone = dict.fromkeys(range(len(self.lives)), 1)
        assert dict(self.begun) == everyone
        assert dict(self.finished) == everyone
        assert [self.measured[row] for row in range(len(self.lives))] == self.lives.tolist()


LIVES = st.lists(st.integers(1, 9), min_size=1, max_size=40)


@quick
@given(LIVES, st.integers(1, 45))
def test_every_sample_lives_its_life_once(lives, width):
    toy, told = Toy(lives), []
    run(toy, len(lives), width, CPU, lambda *step: told.append(step))
    toy.account()
    assert told == sorted(set(told))
    assert told[-1] == ("toy", len(lives), len(lives))
    assert toy.widths[0] == max(toy.widths) == min(width, len(lives))


@quick
@given(LIVES, st.integers(1, 45))
def test_waiting_samples_fill_the_batch_at_once(lives, width):
    toy = Toy(lives)
    run(toy, len(lives), width, CPU)
    assert toy.widths == simulated(lives, width)


@quick
@given(LIVES, st.integers(1, 45), st.data())
def test_out_of_memory_at_any_time_loses_and_repeats_nothing(lives, width, data):
    refusals = data.draw(st.lists(st.booleans(), max_size=30))

    def fits(width):
        return width == 1 or not refusals or refusals.pop()

    toy, told = Toy(lives, fits), []
    run(toy, len(lives), width, CPU, lambda *step: told.append(step))
    toy.account()
    assert told == sorted(set(told))
    assert told[-1] == ("toy", len(lives), len(lives))
    assert sum(toy.widths) == sum(lives)


@quick
@given(LIVES, st.integers(1, 45), st.integers(1, 12))
def test_the_width_is_halved_until_it_fits_and_stays(lives, width, most):
    toy = Toy(lives, lambda n: n <= most)
    width = widest(width, len(lives))
    run(toy, len(lives), width, CPU)
    toy.account()
    expected = []
    while width > most:
        expected.append(width)
        width //= 2
    assert toy.refused == expected  # halved, and never tried again
    assert max(toy.widths) == width


def test_a_single_sample_that_does_not_fit_raises():
    with pytest.raises(torch.OutOfMemoryError, match="toy"):
        run(Toy([3] * 5, lambda width: False), 5, 4, CPU)


def test_other_errors_are_not_taken_for_out_of_memory():
    class Broken(Toy):
        def measure(self, state):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(Broken([3] * 5), 5, 4, CPU)


# --- memory runs out inside a model ---------------------------------------------------------------------------

FORMS = {
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:115] data. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
}


def small(net, most, form="gpu"):
    """A network for which memory runs out with more than ``most`` samples."""

    def model(x):
        if len(x) > most:
            raise FORMS[form]()
        return net(x)

    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", ["pgd ce", *(f"apgd {loss}" for loss in LOSSES)])
def test_out_of_memory_changes_no_result(name, p, form, caplog):
    x, y = few(N, torch.float64)
    net = mlp(torch.float64)
    expected = SEARCHES[name](net, x, y, eps=EPS[p], p=p, batch_size=7)
    told = []
    with caplog.at_level(logging.WARNING, logger=packing.__name__):
        x_adv = SEARCHES[name](small(net, 7, form), x, y, eps=EPS[p], p=p, progress=lambda *step: told.append(step))
    torch.testing.assert_close(x_adv, expected, atol=1e-9, rtol=0)
    assert [record.getMessage() for record in caplog.records] == [
        f"out of memory with {n} samples at once: going on with {n // 2}" for n in (40, 20, 10)
    ]
    assert told == sorted(set(told))
    assert told[-1] == (name.split()[0], N, N)


@pytest.mark.parametrize("form", FORMS)
def test_out_of_memory_changes_no_result_of_the_targeted_attack(form):
    x, y = few(N, torch.float64)
    net = mlp(torch.float64)
    expected = SEARCHES["apgd_targeted"](net, x, y, eps=0.06, batch_size=7)
    x_adv = SEARCHES["apgd_targeted"](small(net, 7, form), x, y, eps=0.06)
    torch.testing.assert_close(x_adv, expected, atol=1e-9, rtol=0)


def test_out_of_memory_changes_no_result_of_one_step():
    x, y = few(N, torch.float64)
    net = mlp(torch.float64)
    torch.testing.assert_close(fgsm(small(net, 7), x, y, eps=0.06), fgsm(net, x, y, eps=0.06))


@pytest.mark.parametrize("name", ["pgd ce", "apgd ce"])
def test_an_attack_for_which_not_even_one_sample_fits_raises(name):
    x, y = few(5, torch.float64)
    with pytest.raises(torch.OutOfMemoryError):
        SEARCHES[name](small(mlp(torch.float64), 0), x, y, eps=0.06)


# --- progress and the model's faults --------------------------------------------------------------------------


@pytest.mark.parametrize("width", [7, None])
@pytest.mark.parametrize("name", SEARCHES)
def test_progress_rises_to_the_total(name, width):
    x, y = few(N, torch.float64)
    for eps in (0.0, 0.06, 0.4):
        told: list[tuple[str, int, int]] = []
        search = functools.partial(SEARCHES[name], eps=eps, batch_size=width)
        search(mlp(torch.float64), x, y, progress=lambda *step, told=told: told.append(step))
        assert told == sorted(told)
        assert told[-1] == (name.split()[0], N, N)
        assert all(0 <= done <= total == N for _, done, total in told)


@pytest.mark.parametrize("name", ["pgd ce", "apgd ce", "apgd_targeted"])
def test_a_network_that_fails_at_far_points_does_so_whatever_the_batch_size(name):
    x, y = few(N, torch.float64)
    x = x.clone()
    x[:, 0, 0, 0] = 0

    def model(x):
        far = (x[:, 0, 0, 0] > 0.055)[:, None] & (torch.arange(10) == 9)
        return torch.where(far, -math.inf, mlp(torch.float64)(x))

    search = functools.partial(SEARCHES[name], model, x, y, eps=0.06)
    if name != "apgd_targeted":
        search = functools.partial(search, random_start=False)
        whole = search()
        for width in (3, 16):
            torch.testing.assert_close(search(batch_size=width), whole, atol=1e-9, rtol=0)
    else:
        with pytest.raises(InputError, match=r"^model: expected finite logits"):
            search(seed=0)


CHECKS = [(name, width) for name in SEARCHES for width in (None, 3)]


@pytest.mark.parametrize(("name", "width"), CHECKS)
def test_a_label_that_the_network_does_not_have_is_named_wherever_it_stands(name, width):
    x, y = few(N, torch.float64)
    y = y.clone()
    y[30] = 12
    with pytest.raises(InputError, match=r"^y: expected labels from 0 to 9"):
        SEARCHES[name](mlp(torch.float64), x, y, eps=0.06, batch_size=width)


@pytest.mark.parametrize(("name", "width"), CHECKS)
def test_an_input_on_which_the_network_fails_is_an_error_wherever_it_stands(name, width):
    x, y = few(N, torch.float64)

    def model(x_):
        failing = (x_ - x[30]).flatten(1).abs().amax(1) < 0.07
        return torch.where(failing[:, None], math.nan, mlp(torch.float64)(x_))

    with pytest.raises(InputError, match=r"^model: expected finite logits"):
        SEARCHES[name](model, x, y, eps=0.06, batch_size=width)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", ["pgd ce", "pgd dlr", "apgd ce"])
def test_memory_that_runs_out_later_changes_no_trajectory(name, p):
    """Somebody else takes the memory at the third pass and again at the sixth."""
    x, y = few(N, torch.float64)
    whole, reference = unpacked(name, p)
    calls = 0

    def model(x):
        nonlocal calls
        calls += 1
        if calls in (3, 6):
            raise FORMS["gpu"]()
        return mlp(torch.float64)(x)

    x_adv, watch = watched(SEARCHES[name], x, y, p, net=model, batch_size=16)
    same_trajectories(watch, reference, range(N))
    torch.testing.assert_close(x_adv, whole, atol=1e-9, rtol=0)
    assert [len(watch.points[row]) for row in range(N)] == [len(reference.points[row]) for row in range(N)]
    assert watch.widths[-1] <= 4
