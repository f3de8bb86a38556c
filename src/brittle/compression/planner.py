"""The planner: what goes so that robust accuracy stays.

Beyond the paper. A unit's influence is the mean square of what the loss of clean and of attacked samples would change
by to first order if it went: the diagonal of the empirical Fisher matrix in the units' presence (Molchanov et al. 2019,
Liu et al. 2021, "Group Fisher pruning"), on adversarial samples. Units go in the order of influence over cost saved.

Tried and left out: influence measured anew in twelve rounds along the way (no better, twelve times the price), and
measured sensitivities (every group alone cut to several sizes, the loss read off): worse on both networks tried, and
most of the planner's time; theory page, "The planner".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brittle.compression.allocation import Cost, Cut, Priorities, cut, global_threshold, k_term, keep_best, layerwise
from brittle.compression.cost import ChannelCosts
from brittle.compression.groups import ChannelGroups, unit_energies, unit_scores
from brittle.compression.importance import unit_gradients
from brittle.compression.removal import Kept
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


def influences(
    model: nn.Module, groups: ChannelGroups, calibration: Calibration, parts: int = 1
) -> list[dict[str, Tensor]]:
    """Mean over clean and attacked samples of the squared first-order change of the loss: ``(units,)`` by group.

    Args:
        model: Left as it is.
        groups: Of the network.
        calibration: The samples.
        parts: Above 1, means over parts of the samples follow that over all: part k has the k-th, (k + parts)-th, ...
    """
    x, y = calibration.both
    changes = unit_gradients(model, groups.groups, x, y, cross_entropy)
    part = torch.arange(len(y)) % len(calibration.y) % parts
    chosen = [part >= 0, *(part == k for k in range(parts) if parts > 1)]
    return [{name: (d[rows] ** 2).mean(0) for name, d in changes.items()} for rows in chosen]


def per_cost(scores: Mapping[str, Tensor], costs: ChannelCosts) -> dict[str, Tensor]:
    """Priorities: scores over what a unit of the whole network saves."""
    saved = dict(zip(costs.names, costs.of_one(np.zeros(len(costs.names))), strict=True))
    return {name: s.sort().values / saved[name] for name, s in scores.items()}


@dataclass(frozen=True)
class Candidate:
    """A way to choose what goes.

    Attributes:
        score: What ranks the units of a group.
        scores: ``(units,)`` by group; units of the highest stay.
        priorities: In which order units go.
    """

    score: str
    scores: Mapping[str, Tensor]
    priorities: Priorities


def candidates(
    model: nn.Module, groups: ChannelGroups, costs: ChannelCosts, calibration: Calibration, parts: int = 1
) -> dict[str, Candidate]:
    """What the planner chooses from, whatever the budget, by name.

    ``influence`` over the cost that a unit saves, the paper's ``k_term`` error of the rows' norms, ``layerwise`` by
    influence, and ``magnitude``: one threshold on :func:`~brittle.compression.groups.unit_energies`. Of units with
    nearly the same influence samples decide which stays, and much can hang on it: where judging is cheap, more
    candidates come from ``parts`` of the samples.

    Args:
        model: Left as it is.
        groups: Of the network.
        costs: Of the network, in the target's unit.
        calibration: What influence is measured on.
        parts: As :func:`influences`; two candidates each.
    """
    norms, (whole, *others) = unit_scores(model, groups, row_l2), influences(model, groups, calibration, parts)
    energies = unit_energies(model, groups)
    choices = {
        "influence": Candidate("influence", whole, per_cost(whole, costs)),
        "k_term": Candidate("row_l2", norms, k_term(norms, q=2.0)),
        "layerwise": Candidate("influence", whole, layerwise(whole)),
        "magnitude": Candidate("energy", energies, global_threshold(energies)),
    }
    for number, part in enumerate(others, 1):
        choices[f"influence on part {number} of {parts}"] = Candidate("influence", part, per_cost(part, costs))
        choices[f"layerwise on part {number} of {parts}"] = Candidate("influence", part, layerwise(part))
    return choices


@dataclass(frozen=True)
class Plan:
    """What the planner decided.

    Attributes:
        kept: Units that stay, by group.
        cut: Their numbers, what is left of the cost, groups at their floor.
        candidate: Name of the candidate that won.
        score: What ranked its units.
        judged: What the judge said of every candidate.
    """

    kept: dict[str, Tensor]
    cut: Cut
    candidate: str
    score: str
    judged: dict[str, float]


def plan(
    choices: Mapping[str, Candidate],
    cost: Cost,
    budget: float,
    judge: Callable[[Kept], float],
    *,
    floor: int | Mapping[str, int] = 1,
    round_to: int = 1,
    progress: Progress = silent,
) -> Plan:
    """Choose how many and which units of every group stay so that robust accuracy does.

    Each candidate is cut to the budget and judged; the best one wins, the first of equals.

    Args:
        choices: The :func:`candidates`.
        cost: What is left of the cost, by the numbers removed.
        budget: The cost to meet.
        judge: From the units that stay to how good their network is: robust accuracy on held-out attacked samples, of
            the network repaired as it will be, for example. Asked once where candidates keep the same units.
        floor: Units that every group keeps at least, or by group.
        round_to: Kept numbers are multiples of this.
        progress: Told how far it is.

    Raises:
        InputError: The budget cannot be met.
    """
    plans, judged = dict[str, tuple[Cut, dict[str, Tensor]]](), dict[str, float]()
    for number, (name, choice) in enumerate(choices.items()):
        progress("judge plans", number, len(choices))
        made = cut(choice.priorities, cost, budget, floor=floor, round_to=round_to)
        kept = keep_best(choice.scores, made.counts)
        same = next((other for other, (_, units) in plans.items() if _equal(units, kept)), None)
        plans[name], judged[name] = (made, kept), judge(kept) if same is None else judged[same]
    progress("judge plans", len(choices), len(choices))
    best = max(judged, key=judged.__getitem__)
    return Plan(plans[best][1], plans[best][0], best, choices[best].score, judged)


def _equal(one: Kept, other: Kept) -> bool:
    return all(torch.equal(units, other[name]) for name, units in one.items())
