"""How far samples are from being broken: security curves over budgets, and minimal distances, by bisection.

What is known is used: a sample broken at one budget is broken at every larger one, and one that survives counts as
surviving every smaller one. An example that an attack finds is drawn back towards the sample, which often decides
smaller budgets without another attack. Where the next budget is chosen, breaking costs little (a few passes) and
surviving much (all of them), so searches go nearer to the broken end than to the middle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from brittle.data.checks import check_batch
from brittle.errors import InputError
from brittle.evaluation.execution import Execution
from brittle.evaluation.threat import Threat
from brittle.evaluation.worst_case import WorstCase, correct, unchecked_logits, worst_case
from brittle.linear.norms import distances, per_sample, thin
from brittle.models.borrow import Model
from brittle.models.network import Network, borrowed
from brittle.progress import silent
from brittle.results import CertifiedCurve, Evaluation, Rate, SecurityCurve
from brittle.results.wording import norm_name

HALVINGS = 5
"""Halvings when an example is drawn back towards its sample."""
MOST_ATTACKS = 48
"""Attacks at most in the search of a minimal distance: enough to shrink a budget by (2/3)^48."""
CERTIFIED_POINTS = 64
"""Budgets of the certified curve at which certificates run out, at most."""
BUDGET_TOLERANCE = 1 + 1e-6
"""An example within a budget times this counts at that budget."""


def security_curve(
    model: Model | Network,
    worst: WorstCase,
    threat: Threat,
    *,
    at: float,
    budgets: Sequence[float],
    radii: Tensor | None = None,
    execution: Execution = Execution(),
) -> SecurityCurve:
    """Robust accuracy over several budgets, from one evaluation and a few attacks more.

    Every sample searches for the first budget that breaks it on its own; samples with different budgets share
    batches. The curve cannot rise.

    Args:
        model: Network, left bit-equal; or one that is ready.
        worst: The worst case at the budget ``at``.
        threat: The one it was found under.
        at: That budget.
        budgets: Further budgets, at least 0; the curve holds them and ``at``.
        radii: Certified radii ``(N,)``; budgets below them need no attack.
        execution: Samples at once, and whom to tell for how many samples the place on the curve is known.

    Returns:
        Budgets in rising order with the robust accuracy at each: upper estimates.

    Raises:
        InputError: A budget is negative or not finite.
    """
    points = sorted({float(at), *map(float, budgets)})
    if not all(0 <= eps < math.inf for eps in points):
        raise InputError(f"budgets: expected finite numbers of at least 0; got {points}")
    right, device = worst.clean_correct, worst.x.device
    ladder = torch.tensor(points, dtype=torch.float64, device=device)
    lost = right & ~worst.robust_correct
    survived = torch.full_like(worst.y, -1)
    survived[right] = 0 if points[0] == 0 else -1  # no budget breaks nothing
    survived[worst.robust_correct] = points.index(float(at))
    if radii is not None:
        proven = (ladder[None, :] < radii.to(ladder)[:, None]).sum(1) - 1
        survived = torch.maximum(survived, torch.where(right, proven, -1))
    broken = torch.full_like(worst.y, len(points))
    tell, quiet = execution.progress or silent, replace(execution, progress=None)
    with borrowed(model, worst.x, threat.bounds) as network:
        reached = _first_at_least(ladder, draw_back(network, worst, lost, threat.p, execution)[1])
        broken[lost] = reached.clamp_max(points.index(float(at)))
        while len(rows := (right & (broken - survived > 1)).nonzero()[:, 0]):
            probe = broken[rows] - ((broken - survived)[rows] // 3).clamp_min(1)
            attacked = worst_case(
                network, worst.x[rows], worst.y[rows], threat, ladder[probe], ids=worst.ids[rows.cpu()], execution=quiet
            )
            fallen = ~attacked.robust_correct
            survived[rows[~fallen]] = probe[~fallen]
            reached = _first_at_least(ladder, draw_back(network, attacked, fallen, threat.p, execution)[1])
            broken[rows[fallen]] = torch.minimum(reached, probe[fallen])
            # Drawn back further than a budget that counted as survived: the example is what counts.
            survived[rows[fallen]] = torch.minimum(survived[rows[fallen]], broken[rows[fallen]] - 1)
            known = len(right) - int((right & (broken - survived > 1)).sum())
            tell(f"{norm_name(threat.p)} curve", known, len(right))
    rates = tuple(Rate(int((right & (survived >= index)).sum()), len(right)) for index in range(len(points)))
    return SecurityCurve(float(threat.p), tuple(points), rates)


def certified_curve(evaluation: Evaluation, budgets: Sequence[float]) -> CertifiedCurve | None:
    """Count certificates over budgets: the given ones, and up to 64 at which certificates run out.

    Counted are the samples whose radii relaxations searched for; where there are none, all that have a radius.

    Args:
        evaluation: Holds the certified radii of the samples.
        budgets: Budgets to count at in any case.

    Returns:
        The curve; None where no sample has a radius.
    """
    measured = [sample for sample in evaluation.samples if sample.measured]
    counted = measured or [sample for sample in evaluation.samples if sample.certified_radius is not None]
    if not counted:
        return None
    right = [sample for sample in counted if sample.clean_prediction == sample.label]
    radii = torch.tensor([sample.certified_radius or 0.0 for sample in right], dtype=torch.float64)
    ends = thin(radii[(radii > 0) & radii.isfinite()].sort().values, CERTIFIED_POINTS)
    points = sorted({0.0, *budgets, *ends.tolist()})
    return CertifiedCurve(
        p=evaluation.p,
        eps=tuple(points),
        certified=tuple(Rate(int((radii > point).sum()), len(counted)) for point in points),
        median_radius=float(radii.median()) if len(radii) else None,
        measured=len(measured),
        untried=None if measured else evaluation.untried,
        withstood=Rate(sum(sample.attack is None for sample in right), len(counted)),
    )


@dataclass(frozen=True)
class MinimalDistances:
    """How far every sample is from the nearest adversarial example that was found.

    Attributes:
        p: Norm of the distances.
        distance: ``||x_adv - x||_p`` ``(N,)`` in input units, an upper bound of the least distance: 0 for samples that
            are wrong without attack, inf where no example was found within the largest budget.
        survived: Largest budget that a sample survived below its distance ``(N,)``; not proven unless certified.
        x_adv: The examples ``(N, ...)``; the sample itself where none was found.
    """

    p: float
    distance: Tensor
    survived: Tensor
    x_adv: Tensor


def minimal_distances(
    model: Model | Network,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    largest: float,
    radii: Tensor | None = None,
    precision: float = 0.02,
    execution: Execution = Execution(),
) -> MinimalDistances:
    """The least perturbation that breaks each sample, by bisection over budgets, every sample on its own.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``; left bit-equal; or one that is ready.
        x: Inputs ``(N, ...)`` within the threat's bounds.
        y: Labels ``(N,)``.
        threat: Attacks, norm, restarts, bounds and seed.
        largest: Largest budget tried, above 0, in input units.
        radii: Certified radii ``(N,)``; the search does not go below them.
        precision: A sample is done when the budgets that it survived and that broke it differ by less than this share.
        execution: Samples at once.

    Returns:
        Distances with their examples; verdicts recomputed on the network itself.

    Raises:
        InputError: An argument is out of range; it names the argument, what was expected and what came.
    """
    if not 0 < largest < math.inf:
        raise InputError(f"largest: expected a finite number above 0; got {largest}")
    if not 0 < precision < 1:
        raise InputError(f"precision: expected a share between 0 and 1; got {precision}")
    check_batch(x, y, bounds=threat.bounds)
    with borrowed(model, x, threat.bounds) as network:
        attacked = worst_case(network, x, y, threat, largest, execution=execution)
        x, y, right = attacked.x, attacked.y, attacked.clean_correct
        fallen, rows, x_adv = right & ~attacked.robust_correct, torch.arange(len(y), device=y.device), x.clone()
        distance = torch.full(right.shape, math.inf, dtype=torch.float64, device=right.device)
        distance[~right] = 0
        survived = torch.zeros_like(distance)
        survived[right & ~fallen] = largest
        if radii is not None:
            survived = torch.maximum(survived, radii.to(survived).clamp_max(largest) * right)
        for _ in range(MOST_ATTACKS):
            lost = rows[fallen]
            x_adv[lost], distance[lost] = draw_back(network, attacked, fallen, threat.p, execution)
            survived = torch.minimum(survived, distance)
            rows = (right & distance.isfinite() & (distance - survived > precision * distance)).nonzero()[:, 0]
            if len(rows) == 0:
                break
            eps = survived[rows] + (distance[rows] - survived[rows]) * 2 / 3
            attacked = worst_case(network, x[rows], y[rows], threat, eps, ids=rows.cpu(), execution=execution)
            fallen = ~attacked.robust_correct
            survived[rows[~fallen]] = eps[~fallen]
    return MinimalDistances(float(threat.p), distance, survived, x_adv)


def _first_at_least(ladder: Tensor, distances: Tensor) -> Tensor:
    """Index of the first budget within which an example at that distance lies."""
    return torch.searchsorted(ladder * BUDGET_TOLERANCE, distances.contiguous())


def draw_back(
    network: Network, worst: WorstCase, fallen: Tensor, p: float, execution: Execution
) -> tuple[Tensor, Tensor]:
    """Examples on the segments from samples to their examples, still misclassified, and their distances.

    Args:
        network: Judges every point.
        worst: Holds the examples.
        fallen: Broken samples ``(N,)``, n of them.
        p: Norm of the distances.
        execution: Samples at once.

    Returns:
        ``(n, ...)`` and ``(n,)``, in float64.
    """
    x, y, best = worst.x[fallen], worst.y[fallen], worst.x_adv[fallen]
    low = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    high = torch.ones_like(low)
    whole = best - x
    for _ in range(HALVINGS if len(x) else 0):
        middle = (low + high) / 2
        point = x + per_sample(middle, x) * whole
        wrong = ~correct(unchecked_logits(network.model, point, execution.batch_size), y)
        best = torch.where(per_sample(wrong, x), point, best)
        high, low = torch.where(wrong, middle, high), torch.where(wrong, low, middle)
    return best, distances(best, x, p)
