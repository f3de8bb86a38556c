"""How much of what: an order in which units go, and where along it a target is met.

An allocation gives every unit of every group a priority. Within a group units go by their scores, the least first;
among the groups the least priority goes first. The cut is where the network's exact cost comes closest to the target.
So ``k_term`` with the priority "k-term error once it is gone" is the paper's search over all breakpoints of the error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brittle.errors import InputError
from brittle.linear.compressibility import k_term_error_curve

Priorities = Mapping[str, Tensor]
"""``(units,)`` by group, non-decreasing: of the unit that goes first, second, ..."""
Cost = Callable[[NDArray[np.float64]], float]
"""From the numbers of units removed of every group to what is left of the cost."""
CLOSE = 0.01
"""How far from the target a cut may end, as a share of the whole network's cost."""


@dataclass(frozen=True)
class Cut:
    """Where an order of removals was cut.

    Attributes:
        counts: Units kept, by group.
        cost: Of what is left, in the target's unit.
        collapsing: Groups that were cut down to their floor.
    """

    counts: dict[str, int]
    cost: float
    collapsing: tuple[str, ...]


def layerwise(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every group loses the same share: the j-th of m units goes at ``(j + 1/2) / m``, j = 0 ..."""
    return {name: (torch.arange(len(s), dtype=torch.float64) + 0.5) / len(s) for name, s in scores.items()}


def global_threshold(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All scores against one threshold: a unit goes at its score."""
    return {name: s.double().sort().values for name, s in scores.items()}


def k_term(scores: Mapping[str, Tensor], q: float = 1.0) -> dict[str, Tensor]:
    r"""One k-term error for every group, as in the paper (arXiv 2507.17725, section 4, "Compression and robustness").

    The unit that leaves k of them goes at ``eps(k) = ||s - s_k||_q / ||s||_q``, the relative error of the k largest
    scores; theory page, "Pruning schedules".

    Args:
        scores: Non-negative, ``(units,)`` by group: norms of rows, or singular values.
        q: Exponent of the norm, from 1 to inf.
    """
    return {name: k_term_error_curve(s.double(), q).flip(0)[1:] for name, s in scores.items()}


def cut(
    priorities: Priorities,
    cost: Cost,
    budget: float,
    *,
    floor: int | Mapping[str, int] = 1,
    round_to: int = 1,
    in_order: bool = False,
) -> Cut:
    """Remove units in the order of their priorities until the cost comes closest to the budget.

    Where that misses it by more than ``CLOSE``, units too large to be removed are passed over for smaller ones.

    Args:
        priorities: Of every group, non-decreasing; ties go in the order of the groups.
        cost: What is left, by the numbers removed.
        budget: The cost to meet.
        floor: Units that every group keeps at least, or by group; at least 1.
        round_to: Kept numbers are rounded to multiples of this (of groups that have at least so many units).
        in_order: Never pass over a unit, however far from the budget that ends.

    Returns:
        The cut. Of two equally close, the one that keeps more.

    Raises:
        InputError: Not even the floors meet the budget, or the budget is above the whole cost.
    """
    names = list(priorities)
    units = np.array([len(priorities[name]) for name in names])
    floors = np.array([_floor(floor, name, m) for name, m in zip(names, units, strict=True)])
    owner = np.repeat(np.arange(len(names)), units)
    values = torch.cat([priorities[name].double() for name in names]).numpy() if names else np.empty(0)
    order = owner[np.argsort(values, kind="stable")]

    def removed(count: int) -> NDArray[np.float64]:
        gone = np.bincount(order[:count], minlength=len(names))
        kept = np.maximum(units - gone, floors)
        if round_to > 1:
            rounded = np.maximum(np.round(kept / round_to), 1) * round_to
            kept = np.where(units >= round_to, np.minimum(rounded, units), kept)
        return (units - kept).astype(float)

    whole, least = cost(removed(0)), cost(removed(len(order)))
    if not least <= budget + CLOSE * whole or not budget <= whole:
        raise InputError(
            f"ratio: expected to keep between {least / whole:.3f} (every group at its floor) and 1 of the cost; "
            f"got {budget / whole:.3f}"
        )
    low, high = 0, len(order)  # the cost does not rise along the order
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(removed(middle)) >= budget else (low, middle)
    found = min((removed(low), removed(high)), key=lambda gone: (abs(cost(gone) - budget), gone.sum()))
    if (
        abs(cost(found) - budget) > CLOSE * whole and round_to == 1 and not in_order
    ):  # the next unit is a large one: smaller ones first
        found = removed(low)
        for group in order[low:]:
            one = np.arange(len(names)) == group
            if found[group] < units[group] - floors[group] and cost(found + one) >= budget:
                found = found + one
    kept = units - found.astype(int)
    return Cut(
        {name: int(k) for name, k in zip(names, kept, strict=True)},
        cost(found),
        tuple(name for name, k, f, m in zip(names, kept, floors, units, strict=True) if k <= f < m),
    )


def keep_best(scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """The units of the highest scores, so many of every group: their indices, rising. Of equal scores the first."""
    return {
        name: scores[name].double().sort(descending=True, stable=True).indices[:count].sort().values
        for name, count in counts.items()
    }


def _floor(floor: int | Mapping[str, int], name: str, units: int) -> int:
    least = floor if isinstance(floor, int) else floor.get(name, 1)
    if least < 1:
        raise InputError(f"floor: expected at least 1 unit; got {least} for {name!r}")
    return min(least, units)


ALLOCATIONS: Mapping[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {
    "layerwise": layerwise,
    "global": global_threshold,
    "k_term": k_term,
}
"""Priorities by name, from the scores of every group."""
