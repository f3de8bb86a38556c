"""The network bounds against other people's methods: semidefinite programming, enumeration, and attacks."""

from __future__ import annotations

import math
from itertools import pairwise, product

import clarabel
import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor, nn

from brittle.attacks import apgd, pgd
from brittle.bounds.graph.read import read_graph
from brittle.bounds.lipschitz.gram import descend, gram_bound
from brittle.bounds.lipschitz.network import network_bounds
from brittle.bounds.lipschitz.product import own_factors
from brittle.bounds.radius import certified_accuracy, certified_radii
from brittle.evaluation.accuracy import evaluate
from brittle.evaluation.threat import Threat
from helpers.networks import digits, mlp

NORMS = (2, math.inf)


def chain(seed: int, *widths: int) -> tuple[nn.Module, list[np.ndarray]]:
    """A fully connected ReLU network with heavy-tailed weights, and its matrices."""
    rng = np.random.default_rng(seed)
    W = [rng.standard_t(4, (b, a)) / math.sqrt(a) for a, b in pairwise(widths)]
    layers: list[nn.Module] = []
    for matrix in W:
        layer = nn.Linear(matrix.shape[1], matrix.shape[0]).double()
        layer.weight.data = torch.from_numpy(matrix)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval(), W


def lipsdp(W: list[np.ndarray]) -> float:
    """LipSDP-Neuron (Fazlyab et al. 2019): slopes in [0, 1], one non-negative multiplier a unit, solved to the end.

    Minimises rho over t >= 0 where sum_i t_i (a_i b_i^T + b_i a_i^T - 2 b_i b_i^T) + last - rho first is negative
    semidefinite; a_i are the weights of unit i, b_i says which it is.
    """
    hidden = [len(matrix) for matrix in W[:-1]]
    sizes = [W[0].shape[1], *hidden]
    start = np.cumsum([0, *sizes])
    total, units = int(start[-1]), sum(hidden)
    A, B = np.zeros((units, total)), np.eye(total)[sizes[0] :]
    row = 0
    for l, matrix in enumerate(W[:-1]):
        A[row : row + len(matrix), start[l] : start[l] + sizes[l]] = matrix
        row += len(matrix)
    first, last = np.zeros((total, total)), np.zeros((total, total))
    first[: sizes[0], : sizes[0]] = np.eye(sizes[0])
    last[start[-2] :, start[-2] :] = W[-1].T @ W[-1]
    forms = [np.outer(a, b) + np.outer(b, a) - 2 * np.outer(b, b) for a, b in zip(A, B, strict=True)]
    return math.sqrt(semidefinite_minimum([*forms, -first], last))


def semidefinite_minimum(forms: list[np.ndarray], constant: np.ndarray) -> float:
    """The least last variable where sum_i v_i forms_i + constant is negative semidefinite, and all others >= 0."""
    n, size = len(forms), len(constant)
    i, j = np.tril_indices(size)  # the upper triangle, column by column, as the solver reads it
    triangles = np.column_stack([(form * np.sqrt(2 - np.eye(size)))[i, j] for form in (*forms, constant)])
    rows = sparse.csc_matrix(np.vstack([triangles[:, :-1], -np.eye(n - 1, n)]))
    slack = np.concatenate([-triangles[:, -1], np.zeros(n - 1)])
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    cones = [clarabel.PSDTriangleConeT(size), clarabel.NonnegativeConeT(n - 1)]
    solver = clarabel.DefaultSolver(sparse.csc_matrix((n, n)), np.eye(n)[-1], rows, slack, cones, settings)
    solution = solver.solve()
    assert str(solution.status) == "Solved"
    return float(solution.x[-1])


NETWORKS = [(seed, widths) for widths in ((4, 6, 2), (5, 8, 3), (4, 6, 5, 3), (6, 8, 8, 2)) for seed in range(4)]


@pytest.mark.parametrize(("seed", "widths"), NETWORKS)
def test_semidefinite_programming_confirms_the_multipliers(seed: int, widths: tuple[int, ...]) -> None:
    """The optimum over all multipliers is below ours; after 300 steps ours is within half a percent of it."""
    model, W = chain(seed, *widths)
    best = lipsdp(W)
    ops = read_graph(model, (widths[0],))
    factors = own_factors(ops, 2)
    closed = gram_bound(ops, factors)
    assert best <= closed.upper * (1 + 1e-5)
    optimised = min(bound.upper for bound in descend(closed, ops, factors, 300))
    assert best * (1 - 1e-5) <= optimised <= closed.upper
    assert optimised <= 1.005 * best
    assert closed.upper <= 1.7 * best


def test_one_output_is_optimised_too() -> None:
    model, W = chain(1, 6, 8, 8, 1)
    ops = read_graph(model, (6,))
    factors = own_factors(ops, 2)
    assert min(bound.upper for bound in descend(gram_bound(ops, factors), ops, factors, 300)) <= 1.005 * lipsdp(W)


@pytest.mark.parametrize("seed", range(3))
def test_semidefinite_programming_confirms_the_margins(seed: int) -> None:
    """Head rows ``c_i - c_j``: the table is above the optimum of every pair, and not far."""
    model, W = chain(seed, 4, 7, 3)
    table = network_bounds(model, (2,), input_shape=(4,))[2].margins
    assert table is not None
    for i, j in ((0, 1), (0, 2), (1, 2)):
        best = lipsdp([*W[:-1], (W[-1][i] - W[-1][j])[None]])
        assert best * (1 - 1e-5) <= float(table[i, j]) <= 1.6 * best


@pytest.mark.parametrize(
    ("seed", "widths"), [(s, w) for w in ((3, 8, 2), (4, 5, 4, 2), (3, 3, 3, 3, 2)) for s in range(4)]
)
def test_no_argument_is_below_the_largest_of_all_patterns(seed: int, widths: tuple[int, ...]) -> None:
    """Exact over all ``2^h`` patterns, in both norms and for every margin."""
    model, matrices = chain(seed, *widths)
    W, hidden = [torch.from_numpy(matrix) for matrix in matrices], widths[1:-1]
    bits = torch.tensor(list(product((0.0, 1.0), repeat=sum(hidden))), dtype=torch.float64)
    J = W[0].expand(len(bits), -1, -1)
    for layer, d in zip(W[1:], bits.split(list(hidden), 1), strict=True):
        J = (layer * d[:, None]) @ J
    for p, bound in network_bounds(model, NORMS, input_shape=(widths[0],), steps=30).items():
        exact = float(torch.linalg.matrix_norm(J, p).max())
        for name, value in bound.arguments:
            assert exact <= value * (1 + 1e-9), name
        differences = torch.linalg.vector_norm(J[:, :, None] - J[:, None], ord=2 if p == 2 else 1, dim=3).amax(0)
        assert bound.margins is not None
        assert (differences <= bound.margins * (1 + 1e-9)).all()
        assert bound.upper is not None
        assert bound.upper <= 2.5 * exact


# --- certified radii against attacks ------------------------------------------------------------------------


def certified(p: float, count: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    net = mlp(torch.float64)
    x, y = (part[:count] for part in digits("test", torch.float64))
    bound = network_bounds(net, (p,), input_shape=(1, 8, 8), steps=20)[p]
    assert bound.margins is not None
    with torch.no_grad():
        radii = certified_radii(net(x), y, bound.margins)
    return net, x, y, radii


@pytest.mark.parametrize("p", NORMS)
def test_certified_accuracy_is_never_above_robust_accuracy(p: float) -> None:
    net, x, y, radii = certified(p, 100)
    for eps in torch.quantile(radii, torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)).tolist():
        robust = evaluate(net, (x, y), Threat([apgd, pgd], p=p, bounds=(-10.0, 10.0)), eps=eps).robust_accuracy.value
        assert float(certified_accuracy(radii, [eps])[0]) <= (robust or 0.0) + 1e-12


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_no_attack_flips_inside_its_radius(p: float, loss: str) -> None:
    """Every sample attacked at 0.999 of its own radius."""
    net, x, y, radii = certified(p, 40)
    right = radii > 0
    assert right.sum() > 30
    for row in torch.nonzero(right).flatten().tolist():
        one, label = x[row : row + 1], y[row : row + 1]
        found = apgd(net, one, label, eps=0.999 * float(radii[row]), p=p, steps=25, loss=loss, bounds=(-10.0, 10.0))
        with torch.no_grad():
            assert int(net(found).argmax(1)) == int(label)


@pytest.mark.parametrize("p", NORMS)
def test_radii_are_not_vacuous(p: float) -> None:
    """An attack with a few dozen radii as its budget does flip."""
    net, x, y, radii = certified(p, 40)
    eps = 60 * float(radii.median())
    with torch.no_grad():
        flipped = net(apgd(net, x, y, eps=eps, p=p, steps=30, bounds=(-10.0, 10.0))).argmax(1) != y
    assert float(flipped.double().mean()) > 0.5
