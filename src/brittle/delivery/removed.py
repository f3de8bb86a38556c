"""A smaller network with what went, and how much may stay at a ratio."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from brittle.compression import ALLOCATIONS, RandomScores, cut
from brittle.compression.allocation import CLOSE, Cost
from brittle.compression.cost import Target
from brittle.delivery.request import Compression
from brittle.errors import InputError
from brittle.results import GroupCut

CHECKED = 64
"""Samples on which a smaller network is compared with the masked one."""
FEW = 0.1
"""Share of its units below which a layer is about to collapse."""


@dataclass(frozen=True, eq=False)
class Removed:
    """A network without some of its units.

    Attributes:
        network: Smaller, in evaluation mode, not repaired.
        cuts: Units before and after, by group.
        share: Of the target's cost that went, exactly.
        candidate: Which of the planner's candidates it is; None without a planner.
        score: What ranked the units of that candidate; None likewise.
        whole: Why units of other layers cannot go, by the layer's name.
        rows: Outputs that stay, rising, by the name of every layer that loses some.
        masked: From the network, repaired or trained, to the one of the uncompressed sizes that computes the same; None
            where there is none.
    """

    network: nn.Module
    cuts: tuple[GroupCut, ...]
    share: float
    candidate: str | None = None
    score: str | None = None
    whole: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    masked: Callable[[nn.Module], nn.Module] | None = None


class Unreachable(InputError):
    """So much cannot go, every group at its floor."""


Remover = Callable[[float], Removed]
"""From the share of the target's cost that is to go to the smaller network."""


def floors_of(units: Mapping[str, int], asked: Compression) -> dict[str, int]:
    """How many units of every group stay in any case."""
    return {name: max(1, math.ceil(asked.floor * count)) for name, count in units.items()}


def check_reachable(ratio: float, units: Mapping[str, int], cost: Cost, asked: Compression) -> None:
    """Raise where a share of the cost cannot go.

    Raises:
        Unreachable: So much cannot go; the message says how much can.
    """
    every = torch.tensor([*units.values()]).double().numpy()
    least = torch.tensor([*floors_of(units, asked).values()]).double().numpy()
    reachable = 1 - cost(every - least) / cost(0 * every)
    if ratio > reachable + CLOSE:
        raise Unreachable(
            f"ratio: expected at most {reachable:.3f} of the {asked.target}, where every layer is at its floor "
            f"({asked.floor:g} of its units, one at least); got {ratio:g}"
        )


def counts_at(ratio: float, priorities: Mapping[str, Tensor], cost: Cost, asked: Compression) -> dict[str, int]:
    """How many units of every group stay when a share of the cost goes.

    Raises:
        Unreachable: So much cannot go; the message says how much can.
    """
    floors = floors_of({name: len(order) for name, order in priorities.items()}, asked)
    check_reachable(ratio, {name: len(order) for name, order in priorities.items()}, cost, asked)
    whole = cost(torch.zeros(len(floors)).double().numpy())
    return cut(priorities, cost, (1 - ratio) * whole, floor=floors, round_to=asked.round_to).counts


def collapsing(cuts: tuple[GroupCut, ...], asked: Compression) -> tuple[str, ...]:
    """Layers that are about to collapse: cut down to their floor, or to few of their units; in sentences."""
    return tuple(
        f"layer {group.name} keeps {group.after} of its {group.before} units and is about to collapse"
        for group in cuts
        if group.after < group.before and group.after <= max(1, FEW * group.before, asked.floor * group.before)
    )


def target_of(asked: Compression) -> Target:
    """What costs are counted in; a latency is read as multiply-accumulates."""
    counted: dict[str, Target] = {"parameters": "parameters", "filters": "filters"}
    return counted.get(asked.target, "macs")


def priorities_of(scores: Mapping[str, Tensor], asked: Compression) -> dict[str, Tensor]:
    """In which order units go; ``random`` draws it among all units, whatever their scores."""
    if asked.allocation == "random":
        draw = RandomScores(asked.seed)
        return ALLOCATIONS["global"]({name: draw(of_group) for name, of_group in scores.items()})
    return ALLOCATIONS[asked.allocation](scores)
