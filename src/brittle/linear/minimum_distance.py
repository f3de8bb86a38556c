r"""How far a linear classifier through given points stays behind the minimum-distance rule, from the points alone.

Points ``x_1 ... x_N`` are the rows of a matrix ``(N, d)``. An interpolant gives point i the score 1 for itself and 0
for every other point; the margin of a pair, ``f = g_i - g_j``, is then 1 at ``x_i``, -1 at ``x_j`` and 0 at all others.
The minimum-distance rule keeps its answer at ``x_i`` up to half the distance to ``x_j``; the linear interpolant of
least norm only up to ``phi`` times that, where ``phi`` is the cosine between its gradient and ``x_i - x_j``. All of
this is worked out on the theory page, section "Feature compression", after Gao et al., "Feature compression is the
root cause of adversarial fragility in neural network classifiers" (arXiv 2406.16200). Everything is computed in
float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from brittle.errors import InputError
from brittle.linear.compressibility import RANK_TOLERANCE

IN_SPAN = 1e-8
"""Distance from a span, relative to the vector, up to which a vector lies in it: a basis is no more exact than this."""


def interpolant_cosine(points: Tensor, i: int, j: int, *, bias: bool = False) -> Tensor:
    r"""The cosine phi of the least-norm linear interpolant for one pair, by projection: exact up to rounding.

    ``phi = dist(u, S) / ||u||`` with ``u = x_i - x_j`` and ``S`` the span of ``x_i + x_j`` and all other points (with a
    bias: of ``x_k - (x_i + x_j) / 2``). No interpolant has a larger radius than ``phi ||u|| / 2`` at ``x_i`` against j.

    Args:
        points: ``(N, d)``, real and finite, one point a row; they may depend on each other.
        i, j: Rows of the pair.
        bias: Whether the classifier has one.

    Returns:
        A number in [0, 1] without unit: 1 where the classifier decides along ``x_i - x_j`` itself, and 0 where no
        linear interpolant exists, because ``u`` lies in ``S`` (to 1e-8). Singular values up to 1e-10 of the largest
        do not count for ``S``.

    Raises:
        InputError: ``points`` is no real, finite matrix of two rows or more, or i and j are no two of its rows.

    >>> interpolant_cosine(torch.tensor([[3.0, 0.0], [3.0, 4.0]]), 0, 1)
    tensor(0.8321, dtype=torch.float64)
    """
    points, others = _pair(points, i, j)
    direction, middle = points[i] - points[j], (points[i] + points[j]) / 2
    constraints = others - middle if bias else torch.cat([others, middle[None]])
    length = torch.linalg.vector_norm(direction)
    if length == 0:
        return torch.zeros_like(length)
    _, gains, basis = torch.linalg.svd(constraints, full_matrices=False)
    basis = basis[gains > RANK_TOLERANCE * gains.max()] if gains.numel() else basis
    for _ in range(2):  # the second pass takes away what rounding left of the first
        direction = direction - basis.mT @ (basis @ direction)
    cosine = torch.linalg.vector_norm(direction) / length
    return torch.where(cosine > IN_SPAN, cosine.clamp_max(1), 0)


def interpolant_cosine_by_qr(points: Tensor, i: int, j: int) -> Tensor:
    r"""The cosine phi of one pair without bias, from one QR factorisation: exact up to rounding.

    With the pair last and ``X = QR``, where ``a = R_{N-1,N-1}``, ``b = R_{N-1,N}``, ``c = R_{N,N}``: the radius is
    ``|a c| / sqrt(c^2 + (a + b)^2)`` and phi is twice that over ``||x_i - x_j||``. For many points in many dimensions
    this is the cheapest form; points that depend on each other need :func:`interpolant_cosine`.

    Args:
        points: ``(N, d)``, real and finite, one point a row, linearly independent.
        i, j: Rows of the pair.

    Returns:
        A number in (0, 1], without unit.

    Raises:
        InputError: as in :func:`interpolant_cosine`, or the points depend on each other.

    >>> interpolant_cosine_by_qr(torch.tensor([[3.0, 0.0], [3.0, 4.0]]), 0, 1)
    tensor(0.8321, dtype=torch.float64)
    """
    points, others = _pair(points, i, j)
    R = torch.linalg.qr(torch.cat([others, points[[i, j]]]).mT, mode="r").R
    pivots = R.diagonal().abs()
    if len(pivots) < len(points) or pivots.min() <= RANK_TOLERANCE * pivots.max():
        raise InputError("points: expected linearly independent rows; got rows that depend on each other")
    a, b, c = R[-2, -2], R[-2, -1], R[-1, -1]
    radius = (a * c).abs() / torch.hypot(c, a + b)
    return (2 * radius / torch.linalg.vector_norm(points[i] - points[j])).clamp_max(1)


def interpolant_cosines(points: Tensor, *, bias: bool = False) -> Tensor:
    r"""The cosines phi of all pairs at once, from one singular value decomposition: exact up to rounding.

    ``phi_ij = 2 / (||w_i - w_j|| ||x_i - x_j||)`` with ``w_i`` the columns of the pseudo-inverse of the points (with a
    bias: of the points less their mean).

    Args:
        points: ``(N, d)``, real and finite, one point a row; they may depend on each other.
        bias: Whether the classifier has one.

    Returns:
        ``(N, N)``, symmetric, in [0, 1], without unit; 0 where a pair has no linear interpolant, NaN on the diagonal.

    Raises:
        InputError: ``points`` is no real, finite matrix of two rows or more.

    >>> interpolant_cosines(torch.tensor([[3.0, 0.0], [3.0, 4.0]]))
    tensor([[   nan, 0.8321],
            [0.8321,    nan]], dtype=torch.float64)
    """
    points = _checked(points)
    left, gains, _ = torch.linalg.svd(points - points.mean(0) if bias else points, full_matrices=False)
    left, gains = (kept := left[:, gains > RANK_TOLERANCE * gains.max()]), gains[: kept.shape[1]]
    # e_i - e_j is reached by the points if nothing of it lies beside their left singular vectors
    beside = torch.linalg.qr(left, mode="complete").Q[:, left.shape[1] :]
    missed = _distances(beside)
    cosines = 2 / (_distances(left / gains) * _distances(points))
    return torch.where(missed > IN_SPAN * math.sqrt(2), 0, cosines.clamp_max(1)).fill_diagonal_(math.nan)


def interpolant_radii(points: Tensor, *, bias: bool = False) -> Tensor:
    """The l2 radii of the least-norm linear interpolant for all pairs: exact up to rounding.

    ``phi_ij ||x_i - x_j|| / 2``: the shortest step from ``x_i`` at which ``g_i - g_j`` is no longer positive.

    Args:
        points: ``(N, d)``, real and finite, one point a row.
        bias: Whether the classifier has one.

    Returns:
        ``(N, N)`` in units of the points, symmetric; 0 where a pair has no linear interpolant, NaN on the diagonal.

    Raises:
        InputError: ``points`` is no real, finite matrix of two rows or more.
    """
    return interpolant_cosines(points, bias=bias) * _distances(_checked(points)) / 2


def nearest_centre_radius(x: Tensor, centres: Tensor) -> Tensor:
    r"""The l2 distance up to which the nearest-centre rule keeps its answer: exact.

    ``min_j (||x - c_j||^2 - ||x - c_i||^2) / (2 ||c_i - c_j||)``, where ``c_i`` is the centre next to x.

    Args:
        x: Samples ``(B, d)``.
        centres: ``(K, d)``, one centre a class, at least two.

    Returns:
        ``(B,)`` in units of x, at least 0; 0 where two centres are equally near.

    Raises:
        InputError: a matrix is not real and finite, has too few rows, or other columns than the other.

    >>> nearest_centre_radius(torch.tensor([[1.0, 5.0]]), torch.tensor([[0.0, 0.0], [4.0, 0.0]]))
    tensor([1.], dtype=torch.float64)
    """
    x, centres = _together(x, _checked(centres, "centres"), "centres")
    radii = []
    for sample in x:
        steps = sample - centres
        nearest = torch.linalg.vector_norm(steps, dim=1).argmin()
        ways = torch.cat([centres[:nearest], centres[nearest + 1 :]]) - centres[nearest]
        lengths = torch.linalg.vector_norm(ways, dim=1)
        gone = ways @ steps[nearest] / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)
        radii.append((lengths / 2 - gone).min().clamp_min(0))
    return torch.stack(radii)


def nearest_neighbour_radius(x: Tensor, points: Tensor, labels: Tensor) -> Tensor:
    r"""An l2 distance up to which the 1-nearest-neighbour rule keeps its answer: a certified lower bound.

    ``(d_other - d_own) / 2``, with ``d_own`` the distance to the nearest point and ``d_other`` to the nearest point of
    another class than its. At a point of the set itself this is half the distance to the nearest of another class.

    Args:
        x: Samples ``(B, d)``.
        points: ``(N, d)`` of at least two classes.
        labels: Classes of the points, integers ``(N,)``.

    Returns:
        ``(B,)`` in units of x, at least 0.

    Raises:
        InputError: as in :func:`nearest_of_another_class`.
    """
    x, points = _together(x, _checked(points), "points")
    nearest = torch.cdist(x, points).argmin(1)
    _, other = nearest_of_another_class(x, labels[nearest], points, labels)
    return (other - torch.linalg.vector_norm(x - points[nearest], dim=1)).clamp_min(0) / 2


def nearest_of_another_class(x: Tensor, y: Tensor, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The point of another class that is nearest in l2, and how far it is.

    Args:
        x: Samples ``(B, d)``.
        y: Classes of the samples, integers ``(B,)``.
        points: ``(N, d)``, where another class is looked for.
        labels: Classes of the points, integers ``(N,)``.

    Returns:
        Rows of ``points`` ``(B,)``, and distances ``(B,)`` in float64, in units of x.

    Raises:
        InputError: a matrix is not real and finite, sizes do not match, or some sample has no point of another class.
    """
    x, points = _together(x, _checked(points), "points")
    if len(y) != len(x) or len(labels) != len(points):
        raise InputError(
            f"labels: expected one a row, {len(x)} and {len(points)} of them; got {len(y)} and {len(labels)}"
        )
    distances = torch.cdist(x, points).masked_fill(y[:, None] == labels, math.inf)
    if not distances.amin(1).isfinite().all():
        raise InputError("labels: expected a point of another class for every sample; got points of one class")
    nearest = distances.argmin(1)
    return nearest, torch.linalg.vector_norm(x - points[nearest], dim=1)  # cdist cancels where points nearly meet


def _checked(points: Tensor, name: str = "points", rows: int = 2) -> Tensor:
    """A real, finite matrix of at least so many rows, in float64."""
    if points.ndim != 2 or len(points) < rows or points.shape[1] == 0 or points.is_complex():
        raise InputError(
            f"{name}: expected a real matrix of at least {rows} rows, one point a row; got shape {tuple(points.shape)}"
        )
    if not points.isfinite().all():
        raise InputError(f"{name}: expected finite numbers; got inf or NaN")
    return points.double()


def _pair(points: Tensor, i: int, j: int) -> tuple[Tensor, Tensor]:
    """The checked points, and all of them but two."""
    points = _checked(points)
    if i == j or not (0 <= i < len(points) and 0 <= j < len(points)):
        raise InputError(f"i, j: expected two different rows of {len(points)}; got {i} and {j}")
    return points, points[[k for k in range(len(points)) if k not in (i, j)]]


def _together(x: Tensor, points: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Samples and points of the same number of columns."""
    x = _checked(x, "x", rows=1)
    if x.shape[1] != points.shape[1]:
        raise InputError(f"x: expected {points.shape[1]} columns, as {name} have; got {x.shape[1]}")
    return x, points


def _distances(points: Tensor) -> Tensor:
    """Distances between all rows, by differences: the faster way by products loses half the digits of small ones."""
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
