"""Feature compression of networks: closed forms of linear classifiers, and inequalities between the layers."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

import brittle
from brittle.errors import InputError
from brittle.evaluation import Threat, feature_compression
from brittle.evaluation.features import PRECISION
from brittle.linear.minimum_distance import interpolant_cosines
from helpers.networks import Logistic, convnet, few, generator, mlp, seeded, uniform, untidy, untouched
from helpers.quantised import dynamic

QUICK = Threat(partial(brittle.apgd, steps=20))


def interpolant(points):
    """The linear classifier of least norm, with a bias, that gives every point a class of its own."""
    middle = points.mean(0)
    W = torch.linalg.pinv((points - middle).mT)
    net = nn.Sequential(nn.Flatten(), nn.Linear(points.shape[1], len(points)).double())
    net[1].weight.data, net[1].bias.data = W, 1 / len(points) - W @ middle
    return net


def way(pair, x):
    return (x[pair.partner] - x[pair.index]).flatten().double()


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).abs())


@pytest.fixture(scope="module")
def of_digits():
    """What is found of a trained network with two hidden layers, on digits in double precision."""
    x, y = few(60, torch.float64)
    return feature_compression(mlp(torch.float64), (x, y), QUICK, pairs=40, attacked=12), x, y


def test_of_a_linear_interpolant_the_cosine_is_what_the_points_predict():
    points = uniform(0, 7, 12, low=0.2, high=0.8, dtype=torch.float64)
    found = feature_compression(interpolant(points), (points, torch.arange(7)), QUICK)
    predicted = interpolant_cosines(points, bias=True)
    assert len(found.pairs) == 7
    for pair in found.pairs:
        assert pair.cosine == pytest.approx(float(predicted[pair.index, pair.partner]), abs=1e-9)
    assert found.interpolant == pytest.approx(found.cosine, abs=1e-9)
    assert found.layers[0].cosine <= found.layers[0].kept + 1e-12
    assert found.layers[0].rank == 6


def test_two_points_under_a_linear_interpolant_keep_all_of_the_minimum_distance_rules_radius():
    points = uniform(1, 2, 30, low=0.3, high=0.7, dtype=torch.float64)
    found = feature_compression(interpolant(points), (points, torch.arange(2)), QUICK)
    assert (found.cosine, found.interpolant) == pytest.approx((1, 1))
    assert all(1 - 1e-9 <= pair.ratio <= 1 + PRECISION + 0.01 for pair in found.pairs)


def test_attacked_radii_are_at_least_the_true_ones_of_a_linear_classifier_and_close_to_them():
    net, x = Logistic(dtype=torch.float64), uniform(2, 40, 12, low=0.3, high=0.7, dtype=torch.float64)
    y = net(x).argmax(1)
    found = feature_compression(net, (x, y), QUICK)
    for pair in (pair for pair in found.pairs if pair.radius is not None):
        true = float(((x[pair.index] @ net.theta + net.bias).abs() / net.theta.norm()).detach())
        assert true * (1 - 1e-9) <= pair.radius <= true * (1 + PRECISION + 0.02)
        assert pair.cosine == pytest.approx(cosine(net.theta, way(pair, x)), abs=1e-9)
        assert pair.ratio <= 2  # the partner itself is answered otherwise


def test_partners_are_the_nearest_of_another_class_and_pairs_are_right(of_digits):
    found, x, y = of_digits
    net = mlp(torch.float64)
    for pair in found.pairs:
        distances = {k: float((x[k] - x[pair.index]).norm()) for k in range(len(x)) if y[k] != y[pair.index]}
        assert pair.distance == pytest.approx(min(distances.values())) == pytest.approx(distances[pair.partner])
        assert int(net(x[[pair.index]]).argmax()) == pair.label == int(y[pair.index])
        assert pair.other == int(y[pair.partner])


def test_the_cosine_is_that_of_the_margin_differentiated_by_finite_differences(of_digits):
    found, x, _ = of_digits
    net, pair = mlp(torch.float64), found.pairs[3]

    def margin(flat):
        scores = net(flat.view(1, *x.shape[1:]))[0]
        return scores[pair.label] - scores[pair.other]

    base, steps = x[pair.index].flatten(), 1e-6 * torch.eye(64).double()
    gradient = torch.stack([margin(base + step) - margin(base - step) for step in steps])
    assert pair.cosine == pytest.approx(cosine(gradient, way(pair, x)), abs=1e-6)


def test_layers_are_measured_as_their_jacobians_written_out_say():
    x, y = few(60, torch.float64)
    net = mlp(torch.float64)
    found = feature_compression(net, (x, y), QUICK, attacked=1)
    pair = next(pair for pair in found.pairs if pair.radius is not None)
    u, parts = way(pair, x), {"1": net[:2], "3": net[:4], "5": net}
    for layer in found.layers:
        part = parts[layer.layer]
        J = torch.autograd.functional.jacobian(lambda v, part=part: part(v[None])[0], x[pair.index]).flatten(1)
        step = part(x[[pair.index]])[0] - part(x[[pair.partner]])[0]
        assert layer.cosine == pytest.approx(cosine(J.mT @ step, u), abs=1e-9)
        _, gains, V = torch.linalg.svd(J, full_matrices=False)
        rank = int((gains > 1e-7 * gains[0]).sum())
        strong = int((gains.square().cumsum(0) < 0.99 * gains.square().sum()).sum()) + 1
        shares = [float((V[:k] @ u).norm() / u.norm()) for k in (rank, strong)]
        assert (layer.rank, layer.directions, layer.width) == (rank, strong, len(J))
        assert [layer.kept, layer.strong] == pytest.approx(shares, abs=1e-9)


def test_what_a_layer_has_lost_no_later_one_and_not_the_network_gets_back():
    x, y = few(60, torch.float64)
    found = feature_compression(mlp(torch.float64), (x, y), QUICK, attacked=1)
    pair = next(pair for pair in found.pairs if pair.radius is not None)
    kept = [layer.kept for layer in found.layers]
    assert kept == sorted(kept, reverse=True)
    assert pair.cosine <= kept[-1] + 1e-12
    assert all(layer.cosine <= layer.kept + 1e-12 and layer.strong <= layer.kept + 1e-12 for layer in found.layers)


def test_a_layer_that_only_turns_its_input_loses_nothing_and_one_that_drops_a_coordinate_loses_that():
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator(3), dtype=torch.float64)).Q
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 2, bias=False)).double()
    net[0].weight.data, net[1].weight.data = 3 * turn, torch.tensor([[1.0], [-1.0]]).double() @ turn[:, :1].mT
    x = torch.full((2, 6), 0.5, dtype=torch.float64)
    x[1] += torch.tensor([-0.3, 0.4, 0, 0, 0, 0])  # 0.6 of the way lies in the coordinate that the scores read
    y = torch.tensor([0, 1])
    net = nn.Sequential(Shift(torch.tensor([0.35, 0, 0, 0, 0, 0]).double()), *net)
    found = feature_compression(net, (x, y), QUICK)
    assert [layer.kept for layer in found.layers] == pytest.approx([1, 0.6])
    assert [layer.cosine for layer in found.layers] == pytest.approx([1, 0.6])
    assert [pair.cosine for pair in found.pairs] == pytest.approx([0.6, 0.6])


class Shift(nn.Module):
    """Takes something away from every input."""

    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def forward(self, x):
        return x - self.shift


def test_branches_are_left_out_and_blocks_around_them_stand():
    class Block(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.inside = seeded(lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6)), seed)

        def forward(self, x):
            return x + self.inside(x)

    net = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(9, 6), Block(1), Block(2), nn.Linear(6, 3))).double()
    x = uniform(6, 30, 9, dtype=torch.float64)
    y = net(x).argmax(1)
    found = feature_compression(net, (x, y), QUICK, attacked=1)
    assert [layer.layer for layer in found.layers] == ["1", "2", "3", "4"]
    kept = [layer.kept for layer in found.layers]
    assert all(later <= before + 1e-9 for before, later in pairwise(kept))
    assert found.followed.cosine <= kept[-1] + 1e-9


def test_the_network_and_all_random_states_come_back_as_they_were():
    net = untidy()
    with untouched(net):
        found = feature_compression(net, few(40), QUICK, attacked=4)
    assert found.pairs
    assert found.layers == feature_compression(net, few(40), QUICK, attacked=4).layers


def test_wide_layers_have_no_jacobian_and_nothing_else_is_missing(monkeypatch):
    monkeypatch.setattr("brittle.evaluation.features.MOST_ROWS", 100)
    found = feature_compression(convnet(), few(40), QUICK, attacked=4)
    assert {layer.layer: layer.kept is None for layer in found.layers} == {"0": True, "4": False, "8": False}
    assert all(layer.cosine is not None for layer in found.layers)


def test_a_plain_function_has_pairs_and_no_layers():
    net = mlp()
    found = feature_compression(lambda x: net(x), few(30), QUICK, attacked=2)
    assert found.pairs
    assert found.layers == ()


def test_a_constant_margin_has_no_cosine():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.tensor([[1.0, 0.0]]).repeat(len(x), 1) + 0 * x.flatten(1)[:, :1]

    x = uniform(4, 6, 3)
    found = feature_compression(Constant(), (x, torch.tensor([0, 0, 0, 1, 1, 1])), QUICK)
    assert found.cosine is None
    assert len(found.pairs) == 3
    assert all(pair.radius is None for pair in found.pairs)  # it answers every input alike, partners too


@pytest.mark.parametrize("labels", [torch.zeros(5), torch.tensor([2, 2, 2, 2, 3])], ids=["one class", "none right"])
def test_without_two_classes_or_a_right_answer_there_is_no_pair(labels):
    found = feature_compression(seeded(lambda: nn.Linear(4, 4)).eval(), (torch.zeros(5, 4), labels.long()), QUICK)
    assert (found.pairs, found.layers, found.cosine, found.ratio) == ((), (), None, None)


def test_a_network_without_gradients_and_odd_numbers_are_refused():
    with pytest.raises(InputError, match="differentiated"):
        feature_compression(dynamic(mlp()), few(10), QUICK)
    with pytest.raises(InputError, match="pairs: expected at least 1; got 0"):
        feature_compression(mlp(), few(10), QUICK, pairs=0)
    with pytest.raises(InputError, match="attacked: expected at least 1; got -1"):
        feature_compression(mlp(), few(10), QUICK, attacked=-1)


def test_classes_are_counted_both_ways_and_the_most_frequent_come_first(of_digits):
    found, _, _ = of_digits
    by_classes = found.by_classes
    sizes = [len(part.pairs) for part in by_classes.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == len(found.pairs)
    assert all({pair.label, pair.other} == {*both} for both, part in by_classes.items() for pair in part.pairs)


def test_a_random_direction_has_the_cosine_that_is_said():
    found = feature_compression(mlp(), few(30), QUICK, attacked=1)
    directions = torch.randn(20000, 64, generator=generator(5))
    cosines = directions[:, 0].abs() / directions.norm(dim=1)
    assert found.chance == pytest.approx(float(cosines.median()), rel=0.03)
    assert math.isclose(found.inputs, 64)
