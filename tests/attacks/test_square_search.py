"""The Square attack: its authors' points from equal numbers, closed forms, budgets, queries, bad input."""

from __future__ import annotations

import functools
import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyautoattack.square import SquareAttack
from torch import nn

from brittle.attacks import pgd
from brittle.attacks.square_search import Windows, square
from brittle.errors import InputError
from brittle.random_streams import GOLDEN, stream_keys, uniform
from helpers import networks
from helpers.matrices import quick
from helpers.networks import Logistic, convnet, distance, few, mlp, right, seeded, untidy, untouched

NORMS = [math.inf, 2]
EPS = {math.inf: 0.12, 2: 0.6}


def margin(model, x, y):
    with torch.no_grad():
        logits = model(x)
    own = logits.gather(1, y[:, None])[:, 0]
    return own - logits.scatter(1, y[:, None], -math.inf).amax(1)


class Watched:
    """A model that keeps the points it is asked about."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def __call__(self, x):
        assert not torch.is_grad_enabled()
        self.seen.append(x.clone())
        return self.model(x)

    def points(self):
        return torch.cat(self.seen)


@functools.cache
def pictures(n=8, *, height=11, width=11, dtype=torch.float64):
    """A random network of three channels, and inputs with its own labels; small margins are common."""
    net = seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * (height - 2) * (width - 2), 5))
    ).to(dtype)
    x = networks.uniform(1, n, 3, height, width, dtype=dtype)
    with torch.no_grad():
        return net, x, net(x).argmax(1)


# --- the authors' implementation ----------------------------------------------------------------------------


class Replayed(SquareAttack):
    """The authors' attack on one sample, fed with the numbers that ours draws for it."""

    def __init__(self, model, seed, name, channels, width, tiles, **options):
        super().__init__(model, **options)
        key = stream_keys(seed, [name])
        self.counter, self.taken = 0, 0
        self.draw = lambda counter, count: uniform(key, torch.tensor([counter]), count)[0]
        self.channels, self.width, self.tiles = channels, width, tiles

    def _tile(self):
        """Where the authors' loop over all tiles stands, and the numbers of that one; some lie off the image."""
        inside, loop = self.tiles
        row, column = divmod(self.taken, loop)
        numbers = self.draw(0, inside * inside * (1 + self.channels)).view(1 + self.channels, inside, inside)
        return numbers[:, min(row, inside - 1), min(column, inside - 1)]

    def random_choice(self, shape):
        if self.counter == 0 and self.norm == "Linf":
            numbers, self.counter = self.draw(0, self.channels * self.width).view(shape), 1
        elif self.counter == 0:
            numbers, self.taken = self._tile()[1:], self.taken + 1
            if self.taken == self.tiles[1] ** 2:
                self.counter, self.taken = 1, 0
        else:
            ahead = 2 if self.norm == "Linf" else 5
            numbers = self.draw(self.counter, ahead + self.channels)[ahead:]
            self.counter, self.taken = self.counter + 1, 0
        return torch.where(numbers < 0.5, -1.0, 1.0).view(shape)

    def random_int(self, low=0, high=1, shape=(1,)):
        number = self.draw(self.counter, 5)[self.taken]
        self.taken += 1
        return (low + (high - low + 1) * number).long().view(shape)  # theirs leaves the last place out

    def eta(self, s):
        number = self._tile()[0] if self.counter == 0 else self.draw(self.counter, 5)[4]
        pattern = super().eta(s)
        lying = s > 1 and bool(pattern[0, -1] < 0)
        return pattern.T if lying != bool(number < 0.5) else pattern


@pytest.mark.parametrize("kind", ["digits", "pictures"])
@pytest.mark.parametrize(("p", "norm"), [(math.inf, "Linf"), (2, "L2")])
def test_it_is_its_authors_attack_when_fed_with_equal_numbers(p, norm, kind):
    queries = 90
    if kind == "digits":
        model, (x, y), eps, tiles = mlp(torch.float64), few(8, torch.float64), {math.inf: 0.1, 2: 0.6}[p], (7, 8)
    else:
        (model, x, y), eps, tiles = pictures(), {math.inf: 0.02, 2: 0.4}[p], (5, 5)
    broken = 0
    torch.set_default_dtype(torch.float64)
    try:
        for i in range(len(x)):
            one, label = x[i : i + 1], y[i : i + 1]
            ours = square(model, one, label, eps=eps, p=p, queries=queries, seed=3, ids=torch.tensor([i]))
            broken += not bool(right(model, ours, label))
            options = {"norm": norm, "eps": eps, "n_queries": queries}
            theirs = Replayed(model, 3, i, x.shape[1], x.shape[3], tiles, **options)
            theirs.init_hyperparam(one)
            if right(model, one, label):
                _, found = theirs.attack_single_run(one, label)
                torch.testing.assert_close(ours, found, atol=1e-9, rtol=0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert 0 < broken < len(x)


class Reaching(SquareAttack):
    """The authors' attack, whose windows reach the last row and column."""

    def random_int(self, low=0, high=1, shape=(1,)):
        return super().random_int(low, high + 1, shape)


@pytest.mark.parametrize(("p", "norm"), [(math.inf, "Linf"), (2, "L2")])
def test_robust_accuracy_is_that_of_the_authors_attack(p, norm):
    x, y = few(150)
    model, eps = mlp(), {math.inf: 0.08, 2: 0.45}[p]
    ours = [right(model, square(model, x, y, eps=eps, p=p, queries=150, seed=s), y).double().mean() for s in range(4)]
    with torch.random.fork_rng():
        theirs = [
            right(model, Reaching(model, norm=norm, eps=eps, n_queries=150, seed=s).perturb(x, y), y) for s in range(4)
        ]
    gap = float(torch.stack(ours).mean() - torch.stack(theirs).double().mean())
    assert 0.1 < float(torch.stack(ours).mean()) < 0.9
    assert abs(gap) < 0.03


@pytest.mark.parametrize("p_init", [0.8, 0.3])
@pytest.mark.parametrize("queries", [1, 30, 777, 5000])
@pytest.mark.parametrize("p", NORMS)
def test_windows_follow_the_authors_schedule(p, queries, p_init):
    theirs = SquareAttack(None, n_queries=queries, p_init=p_init, eps=0.1)
    for side in (3, 28, 32):
        windows = Windows.of(queries, p_init, side, side, p)
        for query in range(queries):
            s = round(math.sqrt(theirs.p_selection(query) * side * side))
            s = max(s, 1) if p == math.inf else max(s, 3) // 2 * 2 + 1
            assert windows.sizes[windows.phase[query]].tolist() == [min(s, side)] * 2


# --- closed forms -------------------------------------------------------------------------------------------


def linear_data(n=30):
    model = Logistic(dtype=torch.float64)
    x = networks.uniform(3, n, 12, low=0.3, high=0.7, dtype=torch.float64)
    score = (x @ model.theta + model.bias).detach()
    return model, x, (score > 0).long(), score.abs()


@pytest.mark.parametrize("shape", [(12,), (1, 3, 4), (3, 2, 2), (1, 12, 1)])
def test_the_worst_corner_of_a_linear_model_is_found_exactly(shape):
    model, x, y, score = linear_data()
    theta = model.theta.detach()
    eps = float((score / theta.abs().sum()).sort().values[14:16].mean())
    worst = (x - (2 * y - 1)[:, None] * (eps * theta.sign())).clamp(0, 1)
    survive = score > eps * theta.abs().sum()
    assert 0 < int(survive.sum()) < len(x)
    found = square(model, x.view(-1, *shape), y, eps=eps, queries=600)
    assert torch.equal(right(model, found, y), survive)
    torch.testing.assert_close(found.flatten(1)[survive], worst[survive], atol=1e-15, rtol=0)


@pytest.mark.parametrize("p", NORMS)
def test_what_can_be_broken_is_and_nothing_inside_the_exact_radius(p):
    model, x, y, score = linear_data()
    radius = score / torch.linalg.vector_norm(model.theta.detach(), ord=1 if p == math.inf else 2)
    options = {"p": p, "bounds": (-9.0, 9.0), "queries": 400}
    assert bool(right(model, square(model, x, y, eps=0.9999 * radius, **options), y).all())
    beyond = 1.0001 if p == math.inf else 1.4  # p = 2: windows of three entries come no nearer to the best direction
    assert not bool(right(model, square(model, x, y, eps=beyond * radius, **options), y).any())


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize(("kind", "factor"), [("rounded inputs", 1), ("rounded logits", 2), ("saturated", 3)])
def test_it_needs_no_gradients(kind, factor, p):
    net, (x, y) = mlp(), few(60)
    model = {
        "rounded inputs": lambda x: net((x * 12).round() / 12),
        "rounded logits": lambda x: net(x).round(),
        "saturated": lambda x: (net(x) * 1e4).softmax(1) * 1e-3,
    }[kind]
    eps, clean = factor * EPS[p], int(right(model, x, y).sum())
    blind = pgd(model, x, y, eps=eps, p=p, steps=5, random_start=False)
    assert int(right(model, blind, y).sum()) == clean
    assert int(right(model, square(model, x, y, eps=eps, p=p, queries=300), y).sum()) < 0.5 * clean


# --- what a query is ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [1, 2, 30])
@pytest.mark.parametrize("p", NORMS)
def test_survivors_cost_exactly_their_queries_and_broken_ones_end_at_their_first_success(p, queries):
    model, (x, y) = mlp(torch.float64), few(30, torch.float64)
    counts, found = [], []
    for i in range(30):
        watched = Watched(model)
        found += [square(watched, x[i : i + 1], y[i : i + 1], eps=EPS[p], p=p, queries=queries, ids=torch.tensor([i]))]
        points = watched.points()
        success = (~right(model, points, y[i].expand(len(points)))).nonzero()[:, 0].tolist()
        counts.append(len(points))
        assert torch.equal(points[0], x[i])
        assert success == ([] if len(points) == queries + 2 and not success else [len(points) - 1])
        assert success or len(points) == queries + 2
        assert not success or torch.equal(found[-1][0], points[-1])
    assert min(counts) < max(counts) == queries + 2
    packed = Watched(model)
    whole = square(packed, x, y, eps=EPS[p], p=p, queries=queries, batch_size=8)
    assert len(packed.points()) == sum(counts)
    assert max(map(len, packed.seen)) == 8
    assert torch.equal(whole, torch.cat(found))


@pytest.mark.parametrize("p", NORMS)
def test_the_first_point_of_smallest_margin_is_kept_whatever_the_start(p):
    net, (x, y) = mlp(torch.float64), few(12, torch.float64)

    def model(x):
        return (net(x) * 2).round()  # ties are common

    survivors = 0
    for i in range(12):
        watched = Watched(model)
        one, label = x[i : i + 1], y[i : i + 1]
        found = square(watched, one, label, eps=EPS[p] / 2, p=p, queries=60)
        tried = watched.points()[1:]
        if len(tried) and right(model, found, label):
            values = margin(model, tried, label.expand(len(tried)))
            assert torch.equal(found[0], tried[int((values == values.min()).nonzero()[0])])
            survivors += 1
    assert survivors


def test_points_differ_from_the_best_in_one_window_at_the_ends_of_the_box():
    model, x, y = pictures()
    queries, eps, seen = 200, 0.01, set()
    windows = Windows.of(queries, 0.8, 11, 11, math.inf)
    for i in range(4):
        watched = Watched(model)
        square(watched, x[i : i + 1], y[i : i + 1], eps=eps, queries=queries, ids=torch.tensor([i]))
        tried = watched.points()[1:]
        best, least = tried[0], margin(model, tried[:1], y[i : i + 1])
        assert bool((best - x[i] == (best - x[i])[:, :1]).all()) or bool((x[i] < eps).any() or (x[i] > 1 - eps).any())
        for query, point in enumerate(tried[1:]):
            changed = (point != best).any(0).nonzero()
            if len(changed):
                span = changed.amax(0) - changed.amin(0) + 1
                assert bool((span <= windows.sizes[windows.phase[query]]).all())
                seen |= {tuple(place) for place in changed.tolist()}
            ends = torch.stack([(x[i] - eps).clamp_min(0), (x[i] + eps).clamp_max(1)])
            assert float((point - ends).abs().amin(0).max()) < 1e-15
            value = margin(model, point[None], y[i : i + 1])
            best, least = (point, value) if value < least else (best, least)
    assert len(seen) == 11 * 11


# --- budgets and bounds -------------------------------------------------------------------------------------


@st.composite
def shapes(draw):
    side = st.integers(1, 9)
    kind = draw(st.sampled_from(["vector", "image", "other"]))
    if kind == "vector":
        return (draw(st.integers(1, 40)),)
    return (draw(st.integers(1, 3)), draw(side), draw(side)) if kind == "image" else (draw(side), draw(side))


@quick
@given(
    shapes(),
    st.sampled_from(NORMS),
    st.sampled_from([(0.0, 1.0), (-1.0, 3.0), (0.0, 255.0)]),
    st.lists(st.one_of(st.just(0.0), st.floats(1e-7, 3.0)), min_size=4, max_size=4),
    st.floats(0.01, 1.0),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 10**6),
)
def test_any_budget_and_the_bounds_are_kept_in_any_shape(shape, p, bounds, eps, p_init, dtype, seed):
    low, high = bounds
    eps = torch.tensor(eps, dtype=torch.float64) * (high - low)
    x = networks.uniform(seed, 4, *shape, low=low, high=high, dtype=dtype).clamp(low, high)
    weights = torch.randn(x[0].numel(), 3, generator=networks.generator(seed), dtype=dtype)

    def model(x):
        return ((x - low) / (high - low)).flatten(1) @ weights

    with torch.no_grad():
        y = model(x).argmax(1)
    watched = Watched(model)
    x_adv = square(watched, x, y, eps=eps, p=p, queries=15, p_init=p_init, bounds=bounds, seed=seed)
    assert x_adv.shape == x.shape
    assert x_adv.dtype == dtype
    assert float(x_adv.min()) >= low
    assert float(x_adv.max()) <= high
    length = distance(x_adv, x, p)
    if p == math.inf and dtype == torch.float32:
        assert (length <= eps.numpy()).all()
    else:
        # float64 itself rounds x_adv - x to a few parts in 10^16 of the bounds
        assert (length <= eps.numpy() * (1 + 1e-6) + (4e-16 * high if dtype == torch.float64 else 0)).all()
    assert torch.equal(x_adv[eps == 0], x[eps == 0])
    assert bool((distance(x_adv, x, p)[eps.numpy() > 1e-4] > 0).all())
    assert bool(torch.isfinite(watched.points()).all())


@pytest.mark.parametrize("p", NORMS)
def test_budgets_of_samples_are_their_own(p):
    model, (x, y) = mlp(torch.float64), few(24, torch.float64)
    eps = torch.linspace(0, 2 * EPS[p], 24, dtype=torch.float64)
    whole = square(model, x, y, eps=eps, p=p, queries=40)
    for i in (0, 5, 23):
        alone = square(model, x[i : i + 1], y[i : i + 1], eps=float(eps[i]), p=p, queries=40, ids=torch.tensor([i]))
        assert torch.equal(alone[0], whole[i])


@pytest.mark.parametrize("p", NORMS)
def test_more_budget_and_more_queries_break_more(p):
    x, y = few(60)

    def left(eps, queries):
        return int(right(mlp(), square(mlp(), x, y, eps=eps, p=p, queries=queries), y).sum())

    by_eps = [left(factor * EPS[p], 100) for factor in (0, 0.5, 1, 2)]
    assert by_eps[0] == int(right(mlp(), x, y).sum())
    assert by_eps == sorted(by_eps, reverse=True)
    assert by_eps[3] < 0.3 * by_eps[0]
    assert left(EPS[p] / 2, 300) < left(EPS[p] / 2, 3)


# --- independence of batches, dependence on seeds and on every parameter ------------------------------------


@pytest.mark.parametrize("p", NORMS)
def test_results_depend_neither_on_batch_size_nor_on_order(p):
    model, (x, y) = mlp(torch.float64), few(30, torch.float64)

    def run(rows, **options):
        return square(model, x[rows], y[rows], eps=EPS[p], p=p, queries=40, ids=rows, **options)

    rows = torch.arange(30)
    whole = run(rows)
    assert 5 < int(right(model, whole, y).sum()) < 25
    for batch_size in (1, 7, 29):
        assert torch.equal(run(rows, batch_size=batch_size), whole)
    order = torch.randperm(30, generator=networks.generator(0))
    assert torch.equal(run(order, batch_size=11), whole[order])
    assert torch.equal(torch.cat([run(part) for part in rows.split(13)]), whole)


def test_memory_that_runs_out_changes_nothing():
    model, (x, y) = mlp(torch.float64), few(30, torch.float64)

    def small(x):
        if len(x) > 4:
            raise torch.OutOfMemoryError("no room")
        return model(x)

    options = {"eps": 0.06, "queries": 30}
    assert torch.equal(square(small, x, y, **options), square(model, x, y, **options))


def test_layouts_and_sample_counts_change_nothing():
    model, x, y = pictures()
    for p in NORMS:
        plain = square(model, x, y, eps=0.02, p=p, queries=30)
        assert torch.equal(square(model, x.to(memory_format=torch.channels_last), y, eps=0.02, p=p, queries=30), plain)
        assert torch.equal(
            square(model, x.transpose(2, 3).contiguous().transpose(2, 3), y, eps=0.02, p=p, queries=30), plain
        )


def test_vectors_are_images_of_one_row():
    model, x, y, _ = linear_data()
    for p in NORMS:
        as_vector, as_image, as_rows = (
            square(model, x.view(-1, *shape), y, eps=0.02, p=p, queries=30).flatten(1)
            for shape in ((12,), (1, 1, 12), (3, 4))
        )
        assert torch.equal(as_vector, as_image)
        assert torch.equal(as_vector, as_rows)
    assert Windows.of(100, 0.8, 1, 100, math.inf).sizes.tolist() == [[1, s] for s in (80, 40, 20, 10, 5, 2, 1, 1, 1, 1)]
    assert Windows.of(1, 0.5, 4, 100, math.inf).sizes[0].tolist() == [4, 50]
    assert Windows.of(1, 0.5, 100, 4, math.inf).sizes[0].tolist() == [50, 4]
    assert Windows.of(1, 0.5, 6, 8, math.inf).sizes[0].tolist() == [5, 5]


UNLIKE = [
    ("eps", 0.05),
    ("p", 2),
    ("queries", 29),
    ("p_init", 0.2),
    ("bounds", (-1.0, 2.0)),
    ("seed", 1),
    ("ids", torch.arange(100, 130)),
]


@pytest.mark.parametrize(("name", "value"), UNLIKE, ids=lambda v: v if isinstance(v, str) else None)
def test_every_parameter_matters(name, value):
    x, y = few(30)
    base = {"eps": 0.06, "queries": 30}
    assert torch.equal(square(mlp(), x, y, **base), square(mlp(), x, y, **base))
    assert not torch.equal(square(mlp(), x, y, **base), square(mlp(), x, y, **(base | {name: value})))


def test_the_table_above_is_complete_and_defaults_are_the_docstrings():
    named = {name for name, _ in UNLIKE}
    parameters = inspect.signature(square).parameters
    assert named == set(parameters) - {"model", "x", "y", "batch_size", "progress"}
    said = {"p": math.inf, "queries": 5000, "p_init": 0.8, "bounds": (0, 1), "seed": 0, "ids": None, "batch_size": None}
    assert said.items() <= {name: parameter.default for name, parameter in parameters.items()}.items()
    x, y = few(20)
    base = {"eps": 0.06, "queries": 10}
    assert torch.equal(square(mlp(), x, y, **base), square(mlp(), x, y, **base, ids=torch.arange(20)))


def test_progress_counts_the_samples():
    x, y = few(30)
    told = []
    square(mlp(), x, y, eps=0.1, queries=20, batch_size=8, progress=lambda *step: told.append(step))
    assert told == sorted(set(told))
    assert told[-1] == ("square", 30, 30)


def test_samples_of_one_id_draw_alike_and_others_do_not():
    x = torch.full((5, 1, 8, 8), 0.5)
    y = torch.zeros(5).long()

    def model(x):
        return torch.stack([1 + 0 * x.flatten(1).sum(1), 0 * x.flatten(1).sum(1)], 1)

    for p in NORMS:
        watched = Watched(model)
        square(watched, x, y, eps=0.1, p=p, queries=5, ids=torch.tensor([7, 7, 8, 9, 10]))
        for points in watched.seen[1:]:
            assert torch.equal(points[0], points[1])
            assert len({tuple(row.flatten().tolist()) for row in points}) == 4 if points is watched.seen[1] else True


# --- the random numbers -------------------------------------------------------------------------------------


def test_numbers_are_those_of_splitmix64():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]  # from 1234567
    numbers = uniform(torch.tensor([1234567]) + GOLDEN, torch.tensor([0]), 4)
    assert numbers[0].tolist() == [(number >> 11) / 2**53 for number in published]


def test_numbers_are_uniform_and_unrelated_across_samples_blocks_and_places():
    keys = stream_keys(0, range(40))
    assert len(set(keys.tolist())) == 40
    assert set(keys.tolist()).isdisjoint(stream_keys(1, range(40)).tolist())
    blocks = torch.stack([uniform(keys, torch.full((40,), block), 32) for block in range(40)])
    assert 0 <= float(blocks.min()) < float(blocks.max()) < 1
    counts = torch.histc(blocks, 16, 0, 1)
    assert float(((counts - counts.mean()).square() / counts.mean()).sum()) < 38  # chi squared, 15 degrees: 1 in 1,000
    for axis in range(3):
        a, b = blocks.narrow(axis, 0, 30), blocks.narrow(axis, 1, 30)
        correlation = np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1]
        assert abs(correlation) < 4 / math.sqrt(a.numel())
    mixed = uniform(keys, torch.arange(40), 32)
    assert torch.equal(mixed, blocks[torch.arange(40), torch.arange(40)])
    assert torch.equal(uniform(keys, torch.arange(40), 7), mixed[:, :7])


# --- the borrowed model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", NORMS)
def test_models_come_back_as_they_were(p):
    net = untidy()
    x, y = few(10)
    before = x.clone(), y.clone()
    with untouched(net):
        first = square(net, x.requires_grad_(), y, eps=0.1, p=p, queries=10)
    assert torch.equal(first, square(net.eval(), x, y, eps=0.1, p=p, queries=10))
    assert not first.requires_grad
    assert torch.equal(x.detach(), before[0])
    assert torch.equal(y, before[1])
    assert x.grad is None


def test_models_come_back_as_they_were_after_an_exception():
    net = convnet().train()
    x, y = few(10)
    with untouched(net), pytest.raises(InputError, match="y: expected"):
        square(net, x, y + 10, eps=0.1)

    def failing(x):
        torch.rand(3)
        raise ZeroDivisionError

    with untouched(None), pytest.raises(ZeroDivisionError):
        square(failing, x, y, eps=0.1)


def test_logits_may_be_of_another_type_and_labels_any_integers():
    x, y = few(12)
    plain = square(mlp(), x, y, eps=0.06, queries=30, batch_size=5)
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(square(mlp(), x, y.to(dtype), eps=0.06, queries=30), plain)
    assert torch.equal(square(lambda x: mlp()(x).double(), x, y, eps=0.06, queries=30, batch_size=5), plain)


# --- bad input ----------------------------------------------------------------------------------------------

X, Y = torch.full((6, 1, 8, 8), 0.5), torch.arange(6)
BAD = {
    "eps negative": ({"eps": -0.1}, "^eps"),
    "eps nan": ({"eps": math.nan}, "^eps"),
    "eps short": ({"eps": torch.full((5,), 0.1)}, "^eps: expected one budget or 6"),
    "p one": ({"p": 1}, "^p: expected 2 or inf; got 1"),
    "queries none": ({"queries": 0}, "^queries: expected at least 1; got 0"),
    "p_init zero": ({"p_init": 0.0}, "^p_init: expected a share above 0, at most 1; got 0.0"),
    "p_init large": ({"p_init": 1.1}, "^p_init: .*got 1.1"),
    "p_init nan": ({"p_init": math.nan}, "^p_init: .*got nan"),
    "ids short": ({"ids": torch.arange(5)}, "^ids: expected 6.*got 5"),
    "batch_size zero": ({"batch_size": 0}, "^batch_size: expected at least 1; got 0"),
    "x outside": ({"x": 255 * X}, r"^x: expected values in \[0, 1\].*127.5"),
    "x integer": ({"x": X.long()}, "^x: expected a floating tensor.*int64"),
    "x empty": ({"x": X[:0], "y": Y[:0]}, "^x: expected at least one example"),
    "y float": ({"y": Y.float()}, "^y: expected an integer tensor.*float32"),
    "y large": ({"y": Y + 5}, "^y: expected labels from 0 to 9.*5 to 10"),
    "bounds reversed": ({"bounds": (1.0, 0.0)}, "^bounds"),
    "model 1-d": ({"model": lambda x: x.flatten(1).sum(1)}, r"^model: expected logits of shape \(6, classes\)"),
    "model nan": ({"model": lambda x: x.flatten(1)[:, :10] * math.nan}, "^model: expected finite logits.* 6 of 6"),
    "model tuple": ({"model": lambda x: (x.flatten(1)[:, :10],)}, "^model: expected a tensor.*tuple"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    given_, message = BAD[case]
    with pytest.raises(InputError, match=message):
        square(**({"model": mlp(), "x": X, "y": Y, "eps": 0.1} | given_))
