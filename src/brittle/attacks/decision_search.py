"""A walk along the decision boundary that asks for predictions alone: neither gradients nor logits can mislead it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from brittle.attacks.pool import check_count, sample_ids
from brittle.attacks.region import Region
from brittle.data.checks import check_batch
from brittle.linear.norms import lp_norm, per_sample
from brittle.models.borrow import Model, frozen
from brittle.models.forward import in_parts, output_of, widest
from brittle.random_streams import stream_keys, uniform

STARTS = 3
"""Nearest candidates of other classes from which the walk may start; the one with the nearest boundary is taken."""
BISECTIONS, HALVINGS = 6, 4
"""Queries on the way back to the boundary, and at most on the way away from it, in every round."""
PROBE = 0.1
"""How far from the boundary the probes lie, as a share of the distance to the sample."""
FINEST_GRID = 16
"""Most rows and columns of the grid on which the probes of an image are drawn."""

Wrong = Callable[[Tensor, Tensor], Tensor]
"""Points ``(n, ...)`` and the rows ``(n,)`` of their samples to whether each is misclassified, ``(n,)``."""


def boundary_walk(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    p: float = math.inf,
    candidates: Tensor | None = None,
    rounds: int = 8,
    probes: int = 40,
    bounds: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    ids: Tensor | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """HopSkipJump (Chen et al. 2020) with few queries: starts from inputs of other classes and walks nearer.

    A round asks for the predictions at ``probes`` random points around a point of the boundary; their mean, weighted
    by whether each is misclassified, estimates the boundary's normal. It steps that way, as far as the points stay
    misclassified, and goes back towards the sample by bisection. Probes of an image are smooth, drawn on a coarse grid
    (as QEBA, Li et al. 2020), which finds the normal with a tenth of the queries. A sample whose point, projected onto
    the budget, is misclassified leaves.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``; only its predictions are used; left bit-equal.
        x: Inputs ``(N, ...)`` within ``bounds``.
        y: True labels ``(N,)``.
        eps: Budget, at least 0, in input units; one for all or one a sample ``(N,)``.
        p: Norm of the budget: 2 or inf.
        candidates: Inputs ``(M, ...)`` to start from: each sample from the nearest that are not predicted as its label.
            Uniform noise is tried as well.
        rounds: Rounds of probes, at least 1.
        probes: Points of a round, at least 1; a sample that withstands costs about ``rounds (probes + 9) + 28``.
        bounds: Smallest and largest admissible input value.
        seed: Seed of the random numbers.
        ids: Integers ``(N,)`` that name the samples (their positions by default); a sample's random numbers depend on
            ``seed`` and its id alone.
        batch_size: Most samples at once (all by default).

    Returns:
        ``x_adv``, like ``x``: a misclassified point within the budget, or ``x`` itself where none was met.

    Raises:
        InputError: An argument is out of range; it names the argument, what was expected and what came.
    """
    check_batch(x, y, bounds=bounds)
    check_count(rounds, "rounds")
    check_count(probes, "probes")
    check_count(batch_size, "batch_size")
    region = Region.of(x, eps, p, bounds)
    keys = stream_keys(seed, sample_ids(ids, len(x))).to(x.device)
    y, x_adv = y.long(), region.x.clone()

    def predict(points: Tensor) -> Tensor:
        def ask(part: Tensor) -> Tensor:
            logits = output_of(model, part)
            assert isinstance(logits, Tensor)
            return logits.argmax(1)

        return in_parts(ask, batch_size, points)

    with frozen(model), torch.no_grad():
        walk = _Walk(region, keys, widest(batch_size, len(x) * probes), lambda points, rows: predict(points) != y[rows])
        rows, points = walk.start(_nearest(region, y, candidates, predict), torch.arange(len(x), device=x.device))
        for number in range(rounds + 1):
            inside = walk.within(points, rows, region.eps[rows])
            wrong = walk.wrong(inside, rows) if len(rows) else rows.bool()
            x_adv[rows[wrong]] = inside[wrong]
            rows, points = rows[~wrong], points[~wrong]
            if number == rounds or len(rows) == 0:
                break
            points = walk.nearer(points, rows, number, probes)
    return region.tighten(x_adv)


def _nearest(region: Region, y: Tensor, candidates: Tensor | None, predict: Callable[[Tensor], Tensor]) -> Tensor:
    """The nearest candidates ``(N, k, ...)`` that are not predicted as the sample's label; itself for missing ones."""
    x = region.x
    if candidates is None or len(candidates) == 0:
        return x[:, None]
    candidates = candidates.to(x).clamp(*region.bounds)
    apart = torch.cdist(x.flatten(1).float(), candidates.flatten(1).float())
    apart = apart.masked_fill(predict(candidates)[None, :] == y[:, None], math.inf)
    nearest = apart.topk(min(STARTS, len(candidates)), largest=False)
    missing = nearest.values.isinf().view(*nearest.values.shape, *[1] * (x.ndim - 1))
    return torch.where(missing, x[:, None], candidates[nearest.indices])


@dataclass(frozen=True)
class _Walk:
    """The samples with their budgets, their random streams, how many points to ask about at once, and whom."""

    region: Region
    keys: Tensor
    width: int
    wrong: Wrong

    def within(self, points: Tensor, rows: Tensor, radius: Tensor) -> Tensor:
        """The points moved towards their samples, to at most the distance ``radius`` ``(n,)``, within the bounds."""
        return Region.of(self.region.x[rows], radius.double(), self.region.p, self.region.bounds).project(points)

    def distance(self, points: Tensor, rows: Tensor) -> Tensor:
        """From their samples, ``(n,)``."""
        return lp_norm(points - self.region.x[rows], self.region.p)

    def start(self, starts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the samples for which a misclassified point is known, and its point nearest to the boundary."""
        best, least = torch.empty_like(starts[:, 0]), torch.full(rows.shape, math.inf, device=rows.device)
        for points in (*starts.unbind(1), self.noise(rows)):
            usable = self.wrong(points, rows).nonzero()[:, 0]  # noise may be right, and what stands for missing ones is
            if len(usable) == 0:
                continue
            back = self.back(points[usable], rows[usable])
            apart = self.distance(back, rows[usable]).to(least)
            closer = apart < least[usable]
            best[usable[closer]], least[usable[closer]] = back[closer], apart[closer]
        met = least.isfinite()
        return rows[met], best[met]

    def noise(self, rows: Tensor) -> Tensor:
        """Uniform noise over the whole range."""
        low, high = self.region.bounds
        x = self.region.x[rows]
        draws = uniform(self.keys[rows], torch.zeros_like(rows), x[0].numel())
        return (low + (high - low) * draws).to(x).view_as(x)

    def back(self, points: Tensor, rows: Tensor) -> Tensor:
        """The misclassified points moved towards their samples by bisection, still misclassified."""
        high = self.distance(points, rows)
        low = torch.minimum(self.region.eps[rows].to(high), high)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            nearer = self.within(points, rows, middle)
            wrong = self.wrong(nearer, rows)
            points = torch.where(per_sample(wrong, points), nearer, points)
            high, low = torch.where(wrong, middle, high), torch.where(wrong, low, middle)
        return points

    def nearer(self, points: Tensor, rows: Tensor, number: int, probes: int) -> Tensor:
        """One round: the boundary's normal, a step along it, and back; the old point where that led no nearer."""
        normal, apart = self.normal(points, rows, number, probes), self.distance(points, rows)
        normal = normal.sign() if math.isinf(self.region.p) else normal / per_sample(lp_norm(normal, 2) + 1e-12, normal)
        length, moved = apart / math.sqrt(number + 1), points.clone()
        waiting = torch.arange(len(rows), device=rows.device)
        for _ in range(HALVINGS):
            if len(waiting) == 0:
                break
            further = points[waiting] + per_sample(length[waiting], points) * normal[waiting]
            further = further.clamp(*self.region.bounds)
            wrong = self.wrong(further, rows[waiting])
            moved[waiting[wrong]] = further[wrong]
            waiting, length = waiting[~wrong], length / 2
        moved = self.back(moved, rows)
        closer = self.distance(moved, rows) < apart
        return torch.where(per_sample(closer, points), moved, points)

    def normal(self, points: Tensor, rows: Tensor, number: int, probes: int) -> Tensor:
        """The estimated direction in which the points get further into the wrong class, ``(n, ...)``, of any length."""
        reach = PROBE * lp_norm(points - self.region.x[rows], 2)
        weighted, plain = torch.zeros_like(points), torch.zeros_like(points)
        balance = torch.zeros_like(reach)
        for steps in torch.arange(probes, device=rows.device).split(max(1, self.width // len(rows))):
            owners = rows.repeat(len(steps))
            directions = self.direction(points, owners, 1 + number * probes + steps.repeat_interleave(len(rows)))
            seen = points.repeat(len(steps), *[1] * (points.ndim - 1))
            seen = (seen + per_sample(reach.repeat(len(steps)), seen) * directions).clamp(*self.region.bounds)
            side = torch.where(self.wrong(seen, owners), 1.0, -1.0).to(reach)
            weighted = weighted + (per_sample(side, seen) * directions).view(len(steps), *points.shape).sum(0)
            plain = plain + directions.view(len(steps), *points.shape).sum(0)
            balance = balance + side.view(len(steps), -1).sum(0) / probes
        balance = torch.where(balance.abs() < 1, balance, 0.0)  # all on one side: nothing to compare
        return weighted - per_sample(balance, points) * plain

    def direction(self, points: Tensor, rows: Tensor, step: Tensor) -> Tensor:
        """Random directions of length 1, smooth over an image (all but ``(n, C, H, W)`` is taken as one row)."""
        shape = points.shape[1:] if points.ndim == 4 else (1, 1, points[0].numel())
        most = FINEST_GRID if shape[1] > 1 else shape[2]
        grid = [min(side, max(7, side // 4), most) for side in shape[1:]]
        draws = uniform(self.keys[rows], step, shape[0] * grid[0] * grid[1]) - 0.5
        coarse = draws.to(points).view(len(rows), shape[0], *grid)
        smooth = F.interpolate(coarse, size=tuple(shape[1:]), mode="bilinear", align_corners=False)
        smooth = smooth.reshape(len(rows), *points.shape[1:])
        return smooth / per_sample(lp_norm(smooth, 2) + 1e-12, smooth)
