"""Minimum-distance rules and linear interpolants: forms against each other, against W = pinv(X), and flips."""

from __future__ import annotations

import math

import pytest
import torch

from brittle.errors import InputError
from brittle.linear.minimum_distance import (
    interpolant_cosine,
    interpolant_cosine_by_qr,
    interpolant_cosines,
    interpolant_radii,
    nearest_centre_radius,
    nearest_neighbour_radius,
    nearest_of_another_class,
)

SHAPES = [(2, 2), (2, 9), (3, 3), (7, 12), (20, 20), (15, 60)]


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def off_diagonal(matrix):
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


def margins(points, i, j, *, bias):
    """Gradient and offset of ``g_i - g_j``, where W (and b) solve ``W x_k + b = e_k`` with least ``||w_i - w_j||``."""
    if not bias:
        W = torch.linalg.pinv(points.mT)
        return W[i] - W[j], 0.0
    middle = (points[i] + points[j]) / 2
    rows = torch.cat([(points[i] - points[j])[None], points - middle])  # the pair's own two rows say +1 and -1 again
    wanted = torch.zeros(len(rows), dtype=points.dtype)
    wanted[0], wanted[1 + i], wanted[1 + j] = 2, 1, -1
    gradient = torch.linalg.pinv(rows) @ wanted
    return gradient, -gradient @ middle


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_forms_give_the_cosine_of_the_gradient_written_out(shape, bias):
    points = gaussian(*shape, seed=sum(shape)) + 0.5
    every = interpolant_cosines(points, bias=bias)
    for i, j in [(0, 1), (shape[0] - 1, 0)]:
        gradient, offset = margins(points, i, j, bias=bias)
        torch.testing.assert_close(
            points @ gradient + offset, torch.eye(len(points))[i] - torch.eye(len(points))[j].double()
        )
        expected = torch.nn.functional.cosine_similarity(gradient, points[i] - points[j], dim=0).abs()
        assert abs(interpolant_cosine(points, i, j, bias=bias) - expected) < 1e-9
        assert abs(every[i, j] - expected) < 1e-9
        if not bias:
            assert abs(interpolant_cosine_by_qr(points, i, j) - expected) < 1e-9


@pytest.mark.parametrize("bias", [False, True])
def test_the_interpolant_flips_just_beyond_its_radius_and_not_just_before(bias):
    points = gaussian(12, 30, seed=3)
    radii = interpolant_radii(points, bias=bias)
    for i, j in [(0, 1), (4, 9), (11, 2)]:
        gradient, offset = margins(points, i, j, bias=bias)
        step = -radii[i, j] * gradient / gradient.norm()
        assert (points[i] + step * (1 - 1e-6)) @ gradient + offset > 0
        assert (points[i] + step * (1 + 1e-6)) @ gradient + offset < 0


def test_no_linear_interpolant_has_a_larger_radius_than_the_one_of_least_norm():
    points = gaussian(6, 15, seed=4)
    W, radii = torch.linalg.pinv(points.mT), interpolant_radii(points)
    beside = torch.eye(15).double() - points.mT @ W  # what the points do not see
    for seed in range(5):
        other = W + gaussian(6, 15, seed=seed) @ beside
        torch.testing.assert_close(other @ points.mT, torch.eye(6).double())
        assert ((other[0] - other[1]).norm() * radii[0, 1]) >= 1 - 1e-12


@pytest.mark.parametrize("bias", [False, True])
def test_a_bias_never_costs_radius_and_every_further_point_does(bias):
    points = gaussian(10, 14, seed=5)
    assert (off_diagonal(interpolant_cosines(points, bias=True) - interpolant_cosines(points)) >= -1e-12).all()
    fewer, more = (interpolant_cosines(points[:n], bias=bias)[:6, :6] for n in (6, 10))
    assert (off_diagonal(fewer - more) > 0).all()


@pytest.mark.parametrize("bias", [False, True])
def test_dependent_points_keep_the_pairs_that_can_still_be_told_apart(bias):
    # The last three rows depend on each other, so none of them can be told from the rest; 0 and 1 can.
    base = gaussian(6, 40, seed=6)
    points = torch.cat([base, (0.3 * base[4] + 0.7 * base[5])[None]])
    every = interpolant_cosines(points, bias=bias)
    assert abs(every[0, 1] - interpolant_cosines(base, bias=bias)[0, 1]) < 1e-9
    assert abs(every[0, 1] - interpolant_cosine(points, 0, 1, bias=bias)) < 1e-9
    assert (every[6, :6] == 0).all()
    assert interpolant_cosine(points, 4, 6, bias=bias) == 0 == interpolant_cosine(points, 0, 5, bias=bias)
    with pytest.raises(InputError, match="linearly independent rows"):
        interpolant_cosine_by_qr(points, 0, 1)


def test_constant_columns_and_scale_change_nothing_that_they_should_not():
    points = torch.cat([gaussian(8, 20, seed=7), torch.zeros(8, 30)], dim=1)
    for scale in (1e-6, 1e6):
        torch.testing.assert_close(
            interpolant_cosines(scale * points), interpolant_cosines(points), equal_nan=True, rtol=1e-9, atol=0
        )
    shifted = points + 7  # a bias takes away what is common to all points
    difference = interpolant_cosines(shifted, bias=True) - interpolant_cosines(points, bias=True)
    assert off_diagonal(difference).abs().max() < 1e-9


def test_more_points_than_dimensions_and_equal_points_have_no_interpolant():
    assert (off_diagonal(interpolant_cosines(gaussian(9, 5))) == 0).all()
    assert interpolant_cosine(gaussian(9, 5), 0, 1) == 0
    with pytest.raises(InputError, match="linearly independent rows"):
        interpolant_cosine_by_qr(gaussian(9, 5), 0, 1)
    twins = gaussian(4, 10)[[0, 0, 1, 2]]
    assert interpolant_cosine(twins, 0, 1) == 0 == interpolant_cosines(twins)[0, 1]
    assert (off_diagonal(interpolant_cosines(torch.ones(3, 4), bias=True)) == 0).all()


@pytest.mark.parametrize(("d", "N"), [(30, 3), (30, 15), (30, 30)])
@pytest.mark.parametrize("bias", [False, True])
def test_gaussian_centres_follow_their_law(d, N, bias):
    """E phi^2 = (d - N + 1) / d, with a bias (d - N + 2) / d: within 4 standard errors of 400 independent draws."""
    squares = torch.stack([interpolant_cosine(gaussian(N, d, seed=s), 0, 1, bias=bias) ** 2 for s in range(400)])
    expected = (d - N + 1 + bias) / d
    assert abs(squares.mean() - expected) <= 4 * squares.std() / math.sqrt(len(squares))


def test_all_points_as_centres_their_own_rule_has_half_the_distance_to_the_nearest_other():
    points = gaussian(12, 5, seed=8)
    distances = torch.cdist(points, points).fill_diagonal_(math.inf)
    torch.testing.assert_close(nearest_centre_radius(points, points), distances.amin(1) / 2)
    torch.testing.assert_close(nearest_neighbour_radius(points, points, torch.arange(12)), distances.amin(1) / 2)


def test_the_nearest_centre_rule_flips_just_beyond_its_radius_and_nowhere_before():
    centres, x = gaussian(6, 4, seed=9), 0.7 * gaussian(50, 4, seed=10)
    radii = nearest_centre_radius(x, centres)
    nearest = torch.cdist(x, centres).argmin(1)
    ways = centres - centres[nearest][:, None]
    steps = radii[:, None, None] * torch.nn.functional.normalize(ways, dim=-1)
    before, beyond = (torch.cdist(x[:, None] + r * steps, centres).argmin(-1).squeeze(1) for r in (1 - 1e-6, 1 + 1e-6))
    assert (before == nearest[:, None]).all()
    assert (beyond != nearest[:, None]).any(1).all()


def test_nothing_within_its_radius_flips_the_nearest_neighbour_rule():
    points, labels, x = gaussian(40, 3, seed=11), torch.arange(40) % 3, gaussian(60, 3, seed=12)
    radii = nearest_neighbour_radius(x, points, labels)
    answers = labels[torch.cdist(x, points).argmin(1)]
    steps = torch.nn.functional.normalize(gaussian(60, 500, 3, seed=13), dim=-1) * radii[:, None, None] * (1 - 1e-9)
    toward = torch.nn.functional.normalize(points - x[:, None], dim=-1) * radii[:, None, None] * (1 - 1e-9)
    for moves in (steps, toward):
        flipped = labels[torch.cdist(x[:, None] + moves, points).argmin(-1)]
        assert (flipped == answers[:, None]).all()
    assert (radii > 0).all()


def test_the_nearest_point_of_another_class_is_the_one_that_a_search_by_hand_finds():
    points, labels, x = gaussian(30, 8, seed=14), torch.arange(30) % 4, gaussian(9, 8, seed=15)
    y = torch.arange(9) % 4
    rows, distances = nearest_of_another_class(x.float(), y, points.float(), labels)
    for k in range(9):
        by_hand = {r: (x[k] - points[r]).norm().item() for r in range(30) if labels[r] != y[k]}
        assert rows[k].item() == min(by_hand, key=by_hand.__getitem__)
        assert distances[k].item() == pytest.approx(min(by_hand.values()), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interpolant_cosine(torch.ones(3), 0, 1), "points: expected a real matrix"),
        (lambda: interpolant_cosine(torch.ones(1, 3), 0, 0), "at least 2 rows"),
        (lambda: interpolant_cosines(torch.full((2, 2), math.nan)), "points: expected finite numbers"),
        (lambda: interpolant_cosine(torch.eye(3), 1, 1), "i, j: expected two different rows of 3; got 1 and 1"),
        (lambda: interpolant_cosine_by_qr(torch.eye(3), 0, 3), "i, j: expected two different rows of 3; got 0 and 3"),
        (lambda: nearest_centre_radius(torch.ones(1, 2), torch.eye(3)), "x: expected 3 columns"),
        (lambda: nearest_centre_radius(torch.ones(1, 2), torch.ones(1, 2)), "centres: expected a real matrix"),
        (lambda: nearest_neighbour_radius(torch.eye(3), torch.eye(3), torch.zeros(3)), "another class"),
        (
            lambda: nearest_of_another_class(torch.eye(3), torch.zeros(2), torch.eye(3), torch.ones(3)),
            "labels: expected one a row, 3 and 3 of them; got 2 and 3",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(call, message):
    with pytest.raises(InputError, match=message):
        call()
