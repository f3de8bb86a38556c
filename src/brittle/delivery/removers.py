"""From a ratio to a smaller network: what can go is read off once, then taken out at any ratio."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from brittle.compression import (
    ALLOCATIONS,
    SCORES,
    RandomScores,
    channel_costs,
    channel_groups,
    cut,
    keep_best,
    mask_units,
    rank_costs,
    remove_units,
    singular_directions,
    truncate,
    unit_scores,
    weight_costs,
    weight_scores,
    with_zeros,
)
from brittle.compression.allocation import CLOSE, Cost
from brittle.compression.cost import Target
from brittle.compression.factorise import rank_map
from brittle.compression.groups import ChannelGroups
from brittle.compression.refit import kept_rows
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
        whole: Why units of other layers cannot go, by the layer's name.
        rows: Outputs that stay, rising, by the name of every layer that loses some.
        masked: From the network, repaired or trained, to the one of the uncompressed sizes that computes the same; None
            where there is none.
    """

    network: nn.Module
    cuts: tuple[GroupCut, ...]
    share: float
    whole: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    masked: Callable[[nn.Module], nn.Module] | None = None


class Unreachable(InputError):
    """So much cannot go, every group at its floor."""


Remover = Callable[[float], Removed]
"""From the share of the target's cost that is to go to the smaller network."""


def filter_remover(model: nn.Module, inputs: Tensor, asked: Compression) -> Remover:
    """Filters and neurons, each with all that can only go with it.

    Args:
        model: Left as it is.
        inputs: Samples ``(N, ...)``; every smaller network is compared with the masked one on the first of them.
        asked: What is asked; a latency is read as macs.

    Raises:
        InputError: As :func:`brittle.compression.channel_groups`, or a score that cannot be used.
    """
    x = inputs[:CHECKED]
    groups = channel_groups(model, x, keep=asked.keep)
    costs = channel_costs(model, groups.groups, x, _target(asked))
    scores = _filter_scores(model, groups, asked)
    priorities = _priorities(scores, asked)

    def remove(ratio: float) -> Removed:
        counts = counts_at(ratio, priorities, costs.without, asked)
        kept = keep_best(scores, counts)
        cuts = [GroupCut(g.name, g.units, counts[g.name], _others(kept[g.name], g.units)) for g in groups.groups]
        return Removed(
            network=remove_units(model, groups, kept, x),
            cuts=tuple(cuts),
            share=1 - costs.total(counts) / costs.total(),
            whole=groups.whole,
            rows=kept_rows(model, groups.groups, kept),
            masked=lambda network: mask_units(model, groups, kept, network),
        )

    return remove


def rank_remover(model: nn.Module, inputs: Tensor, asked: Compression) -> Remover:
    """Directions of the layers' outputs: layers become low-rank pairs where these are smaller.

    Args:
        model: Left as it is.
        inputs: Samples ``(N, ...)``; the score ``outputs`` looks at all of them, the comparison with the product of
            the pairs at the first.
        asked: What is asked; a latency is read as macs.

    Raises:
        InputError: As :func:`brittle.compression.singular_directions`.
    """
    spectra = singular_directions(model, inputs=inputs if asked.score == "outputs" else None)
    known = {name for name, _ in model.named_modules()}
    if unknown := [name for name in asked.keep if name not in known]:
        raise InputError(f"keep: expected names of the model's modules; got {', '.join(map(repr, unknown))}")
    left = {n: d for n, d in spectra.layers.items() if not any(n == k or n.startswith(f"{k}.") for k in asked.keep)}
    spectra = replace(spectra, layers=left)
    costs = rank_costs(model, spectra, inputs, _target(asked))
    priorities = _priorities(spectra.scores(), asked)

    def remove(ratio: float) -> Removed:
        ranks = counts_at(ratio, priorities, costs.without, asked)
        network = truncate(model, spectra, ranks, inputs[:CHECKED])
        pairs = rank_map(network)
        cuts = [GroupCut(name, len(left[name].scores), pairs.get(name, len(left[name].scores))) for name in left]
        return Removed(network, tuple(cuts), 1 - costs.total(ranks) / costs.total(), spectra.whole)

    return remove


def weight_remover(model: nn.Module, inputs: Tensor, asked: Compression) -> Remover:
    """Single weights, set to zero.

    Args:
        model: Left as it is.
        inputs: Not looked at.
        asked: What is asked.

    Raises:
        InputError: As :func:`brittle.compression.weight_scores`.
    """
    scores = {name: score for name, score in weight_scores(model).items() if name not in asked.keep}
    if asked.allocate == "random":
        draw = RandomScores(asked.seed)
        scores = {name: draw(score) for name, score in scores.items()}
    costs = weight_costs(model, scores)
    priorities = _priorities(scores, asked)

    def remove(ratio: float) -> Removed:
        counts = counts_at(ratio, priorities, costs.without, asked)
        network = with_zeros(model, keep_best(scores, counts))
        cuts = tuple(GroupCut(name, len(scores[name]), count) for name, count in counts.items())
        return Removed(network.eval(), cuts, 1 - costs.total(counts) / costs.total(), masked=copy.deepcopy)

    return remove


def counts_at(ratio: float, priorities: Mapping[str, Tensor], cost: Cost, asked: Compression) -> dict[str, int]:
    """How many units of every group stay when a share of the cost goes.

    Raises:
        Unreachable: So much cannot go; the message says how much can.
    """
    floors = {name: max(1, math.ceil(asked.floor * len(order))) for name, order in priorities.items()}
    units = torch.tensor([len(order) for order in priorities.values()]).double().numpy()
    least = torch.tensor([*floors.values()]).double().numpy()
    whole, reachable = cost(0 * units), 1 - cost(units - least) / cost(0 * units)
    if ratio > reachable + CLOSE:
        raise Unreachable(
            f"ratio: expected at most {reachable:.3f} of the {asked.target}, where every layer is at its floor "
            f"({asked.floor:g} of its units, one at least); got {ratio:g}"
        )
    return cut(priorities, cost, (1 - ratio) * whole, floor=floors, round_to=asked.round_to).counts


def collapsing(cuts: tuple[GroupCut, ...], asked: Compression) -> tuple[str, ...]:
    """Layers that are about to collapse: cut down to their floor, or to few of their units; in sentences."""
    return tuple(
        f"{group.name} keeps {group.after} of its {group.before} units and is about to collapse"
        for group in cuts
        if group.after < group.before and group.after <= max(1, FEW * group.before, asked.floor * group.before)
    )


def _target(asked: Compression) -> Target:
    return "parameters" if asked.target == "parameters" else "macs"


def _priorities(scores: Mapping[str, Tensor], asked: Compression) -> dict[str, Tensor]:
    """In which order units go; ``random`` draws it among all units, whatever their scores."""
    if asked.allocate == "random":
        draw = RandomScores(asked.seed)
        return ALLOCATIONS["global"]({name: draw(of_group) for name, of_group in scores.items()})
    return ALLOCATIONS[asked.allocate](scores)


def _filter_scores(model: nn.Module, groups: ChannelGroups, asked: Compression) -> dict[str, Tensor]:
    """Score of every unit."""
    if asked.allocate == "random":
        return unit_scores(model, groups, RandomScores(asked.seed))
    if callable(asked.score):
        return unit_scores(model, groups, asked.score)
    score, of = SCORES[asked.score_name]
    return unit_scores(model, groups, score, of=of)


def _others(kept: Tensor, units: int) -> tuple[int, ...]:
    """The units that are not kept, rising."""
    return tuple(sorted(set(range(units)) - set(kept.tolist())))


REMOVERS: Mapping[str, Callable[[nn.Module, Tensor, Compression], Remover]] = {
    "filters": filter_remover,
    "ranks": rank_remover,
    "weights": weight_remover,
}
"""What can be removed, by name."""
