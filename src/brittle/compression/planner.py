"""The planner: what goes so that robust accuracy stays.

Beyond the paper. A unit's influence is the mean square of what the loss of clean and of attacked samples would change
by to first order if it went: the diagonal of the empirical Fisher matrix in the units' presence (Molchanov et al. 2019,
Liu et al. 2021, "Group Fisher pruning"), on adversarial samples. Units go in the order of influence over cost saved.

Tried and left out: influence measured anew in twelve rounds along the way (no better, twelve times the price), and
measured sensitivities (every group alone cut to several sizes, the loss read off): worse on both networks tried, and
most of the planner's time; theory page, "The planner".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brittle.compression.allocation import Cut, Priorities, cut, k_term, keep_best, layerwise
from brittle.compression.cost import ChannelCosts
from brittle.compression.groups import ChannelGroups, unit_scores
from brittle.compression.importance import unit_gradients
from brittle.compression.recalibration import recalibrated
from brittle.compression.removal import Kept, masked
from brittle.compression.scores import row_l2
from brittle.progress import Progress, silent


@dataclass(frozen=True)
class Calibration:
    """Samples that a plan is made on; none of them should be evaluated later.

    Attributes:
        x: Clean inputs ``(N, ...)``.
        y: Labels ``(N,)``.
        attacked: The inputs attacked on the uncompressed network ``(N, ...)``.
    """

    x: Tensor
    y: Tensor
    attacked: Tensor

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        """Clean and attacked inputs, and their labels."""
        return torch.cat([self.x, self.attacked]), torch.cat([self.y, self.y])


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """``(N,)``."""
    return F.cross_entropy(logits, y, reduction="none")


def influence(model: nn.Module, groups: ChannelGroups, calibration: Calibration) -> dict[str, Tensor]:
    """Mean over clean and attacked samples of the squared first-order change of the loss: ``(units,)`` by group."""
    x, y = calibration.both
    found = unit_gradients(model, groups.groups, x, y, cross_entropy)
    return {name: (d**2).mean(0) for name, d in found.items()}


def per_cost(scores: Mapping[str, Tensor], costs: ChannelCosts) -> dict[str, Tensor]:
    """Priorities: scores over what a unit of the whole network saves."""
    saved = dict(zip(costs.names, costs.of_one(np.zeros(len(costs.names))), strict=True))
    return {name: s.sort().values / saved[name] for name, s in scores.items()}


@dataclass(frozen=True)
class Plan:
    """What the planner decided.

    Attributes:
        kept: Units that stay, by group.
        cut: Their numbers, what is left of the cost, groups at their floor.
        candidate: Name of the candidate that won.
        judged: What the judge said of every candidate's network.
    """

    kept: dict[str, Tensor]
    cut: Cut
    candidate: str
    judged: dict[str, float]


def plan(
    model: nn.Module,
    groups: ChannelGroups,
    costs: ChannelCosts,
    budgets: Sequence[float],
    calibration: Calibration,
    judge: Callable[[nn.Module], float],
    *,
    repair: Callable[[Kept], nn.Module] | None = None,
    floor: int | Mapping[str, int] = 1,
    round_to: int = 1,
    progress: Progress = silent,
) -> list[Plan]:
    """Choose how many and which units of every group stay so that robust accuracy does.

    Candidates: ``influence`` (over the cost that a unit saves), the paper's ``k_term`` on the norms of rows, and
    ``layerwise`` by influence. Each is cut to the budget, repaired and judged; the best one wins, the first of equals.

    Args:
        model: Left as it is.
        groups: Of the network.
        costs: Of the network, in the target's unit.
        budgets: Costs to meet; a plan each, for one price of measuring.
        calibration: What influence and losses are measured on.
        judge: From a network to how good it is, robust accuracy on held-out attacked samples for example.
        repair: From kept units to the network that is judged, repaired as it will be; by default the masked network
            with its batch norms measured again.
        floor: Units that every group keeps at least, or by group.
        round_to: Kept numbers are multiples of this.
        progress: Told how far it is.

    Returns:
        A plan for every budget.

    Raises:
        InputError: A budget cannot be met.
    """
    influences = influence(model, groups, calibration)
    norms = unit_scores(model, groups, row_l2)
    candidates: dict[str, tuple[dict[str, Tensor], Priorities]] = {
        "influence": (influences, per_cost(influences, costs)),
        "k_term": (norms, k_term(norms, q=2.0)),
        "layerwise": (influences, layerwise(influences)),
    }
    repair = repair or (lambda kept: recalibrated(masked(model, groups.groups, kept), calibration.both[0]))
    plans, done = [], 0
    for budget in budgets:
        cuts = {
            name: cut(priorities, costs.without, budget, floor=floor, round_to=round_to)
            for name, (_, priorities) in candidates.items()
        }
        judged = {}
        for name, found in cuts.items():
            progress("judge plans", done, len(budgets) * len(candidates))
            judged[name], done = judge(repair(keep_best(candidates[name][0], found.counts))), done + 1
        best = max(judged, key=judged.__getitem__)
        plans.append(Plan(keep_best(candidates[best][0], cuts[best].counts), cuts[best], best, judged))
    progress("judge plans", done, done)
    return plans
