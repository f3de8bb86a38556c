"""Margins of samples, from the cheapest bound to the most expensive, each only where those before it leave a doubt."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from brittle.bounds.relaxation.crown import gaps, lower_ends, unit_ends
from brittle.bounds.relaxation.grouped import Groups, targets
from brittle.bounds.relaxation.interval import Ball, Network, Reach, intervals
from brittle.bounds.relaxation.linear_maps import unit_roundoff
from brittle.errors import InputError

MOST_ENTRIES = 2**22
"""Entries of the largest tensor of coefficients: so many samples are taken together."""
RECOVERABLE = 0.75
"""Share of what relaxation costs that bounding entries again may win back: without hope of so much it is not tried."""


@dataclass(frozen=True)
class Effort:
    """How hard certificates are tried where a sample could still be certified.

    Attributes:
        rounds: How often the entries of hidden layers whose relaxation costs most are bounded again; 0 is cheapest,
            by far for convolutions.
        rows: How many entries a layer that is, at most.

    Raises:
        InputError: A number is too small.
    """

    rounds: int = 2
    rows: int = 32

    def __post_init__(self) -> None:
        if self.rounds < 0 or self.rows < 1:
            raise InputError(f"rounds: expected at least 0, rows: at least 1; got {self.rounds} and {self.rows}")


USUAL = Effort()
"""What is tried where nothing else is asked for."""


def least_margins(
    network: Network, groups: Groups | None, values: dict[int, Tensor], ball: Ball, y: Tensor, effort: Effort
) -> Tensor:
    """Lower bounds of ``min_{j != y} s_y - s_j`` over the ball, ``(N,)``.

    Args:
        network: The operations, the last one with results ``(N, K)``.
        groups: Slopes shared by groups of samples.
        values: Clean results of all operations, by number.
        ball: What the attacker may add.
        y: Labels ``(N,)``.
        effort: How hard it is tried.
    """
    reach = intervals(network, values, ball)
    if groups is not None:
        reach = _tighten_by_groups(network, groups, reach, values)
    classes = network.shape(len(network.ops) - 1)[0]
    every = torch.arange(classes, device=y.device).expand(len(y), classes)
    others = every[every != y[:, None]].view(len(y), classes - 1)
    margins = _first_margins(network, reach, values, y, others)
    widest = max(network.size(n) for n in range(len(network.ops)))
    size = max(1, MOST_ENTRIES // (widest * max(effort.rows if effort.rounds else 1, classes)))
    for part in (margins <= 0).sum(1).argsort().split(size):
        margins[part] = _Batch(network, reach, values, y, others, margins).at(part).deepened(effort)
    return margins.amin(1).nan_to_num(nan=-math.inf)


@dataclass(frozen=True, eq=False)
class _Batch:
    """Samples that fit into memory together, with the best margins ``(N, K - 1)`` known so far, to ``others``."""

    network: Network
    reach: Reach
    values: dict[int, Tensor]
    y: Tensor
    others: Tensor
    margins: Tensor

    def at(self, rows: Tensor) -> _Batch:
        """Some of the samples."""
        values = {number: value[rows] for number, value in self.values.items()}
        reach = self.reach.at(rows)
        return _Batch(self.network, reach, values, self.y[rows], self.others[rows], self.margins[rows])

    def deepened(self, effort: Effort) -> Tensor:
        """The margins after CROWN for those not certain, then with entries bounded again and CROWN again."""
        margins = self.margins.clone()
        todo = (margins <= 0).any(1).nonzero()[:, 0]
        batch = self.at(todo)
        for turn in range(effort.rounds + 1):
            if not len(todo):
                break
            bounds, gains, hope = batch.crown()
            margins[todo] = bounds
            keep = ((bounds <= 0).any(1) & hope).nonzero()[:, 0]
            if turn == effort.rounds or not len(keep) or not gains:
                break
            batch = replace(batch, margins=bounds).at(keep)
            todo = todo[keep]
            gains = {target: gain[keep] for target, gain in gains.items()}
            batch = replace(batch, reach=batch.bound_again(gains, effort.rows))
        return margins

    def crown(self) -> tuple[Tensor, dict[int, Tensor], Tensor]:
        """Margins with those that are not certain replaced by CROWN; what entries cost; whether there is hope.

        The cost of an entry ``(N, n)``, for each target, is what its relaxation takes from the uncertain margins. Hope:
        no class would stay uncertain if bounding entries again took away the share ``RECOVERABLE`` of that cost.
        """
        network, reach = self.network, self.reach
        last = len(network.ops) - 1
        logits = self.values[last]
        count = int((self.margins <= 0).sum(1).max())
        places = self.margins.topk(count, dim=1, largest=False).indices
        others, before = self.others.gather(1, places), self.margins.gather(1, places)
        rows = F.one_hot(self.y, logits.shape[1])[:, None] - F.one_hot(others, logits.shape[1])
        label, other = logits.gather(1, self.y[:, None]), logits.gather(1, others)
        watched: dict[int, Tensor] = {}
        bounds = _lower(label - other + lower_ends(network, reach, last, rows.to(logits), watched), label, other)
        bounds = torch.where(before > 0, before, torch.maximum(before, bounds))  # certain ones only fill the batch
        wrong, hope, gains = (bounds <= 0).to(logits), bounds, {}
        for target in targets(network):
            falls, gap = -watched[target].clamp_max(0), gaps(network, reach, target)
            hope = hope + RECOVERABLE * torch.bmm(falls, gap[..., None])[..., 0]
            gains[target] = torch.bmm(wrong[:, None], falls)[:, 0] * gap
        return self.margins.scatter(1, places, bounds), gains, (hope > 0).all(1)

    def bound_again(self, gains: dict[int, Tensor], rows: int) -> Reach:
        """Bound again the entries of every target whose relaxation costs most, in order."""
        network, reach, values = self.network, self.reach, self.values
        for target, gain in gains.items():
            units = gain.topk(min(rows, gain.shape[1]), dim=1).indices
            shape, z = reach.inputs[target].shape, reach.inputs[target].flatten(1).gather(1, units)
            bottom, top = unit_ends(network, reach, network.ops[target].inputs[0], units)
            low, high = reach.flat(target)
            low = low.scatter(1, units, torch.maximum(low.gather(1, units), z + bottom))
            high = high.scatter(1, units, torch.minimum(high.gather(1, units), z + top))
            ranges = {**reach.ranges, target: (low.view(shape), high.view(shape))}
            reach = intervals(network, values, reach.ball, ranges)
        return reach


def _first_margins(network: Network, reach: Reach, values: dict[int, Tensor], y: Tensor, others: Tensor) -> Tensor:
    """Margins ``(N, K - 1)`` from the intervals before the last layer; -inf where that is not dense."""
    last = len(network.ops) - 1
    W = network.maps[last].matrix if last in network.maps else None
    logits = values[last]
    if W is None:
        return torch.full_like(logits[:, 1:], -math.inf)
    mid, rad = reach.final
    low = torch.empty_like(logits)
    for c in y.unique().tolist():
        mine, pairs = y == c, W[c] - W
        low[mine] = mid[mine] @ pairs.mT - rad[mine] @ pairs.abs().mT
    label, other = logits.gather(1, y[:, None]), logits.gather(1, others)
    return _lower(label - other + low.gather(1, others) - 2 * reach.errors[last][:, None], label, other)


def _lower(margins: Tensor, label: Tensor, other: Tensor) -> Tensor:
    """Margins lowered by the rounding of the few sums that they and their two logits went through."""
    return margins - 8 * unit_roundoff(label.dtype) * (label.abs() + other.abs() + margins.abs())


def _tighten_by_groups(network: Network, groups: Groups, reach: Reach, values: dict[int, Tensor]) -> Reach:
    """Tighter ranges from the groups' common slopes."""
    nearest = groups.nearest(reach.inputs)
    for place in range(len(groups.stretches[0])):
        target = groups.stretches[0][place].target
        low, high = (end.clone() for end in reach.ranges[target])
        for number in nearest.unique().tolist():
            members = (nearest == number).nonzero()[:, 0]
            bottom, top = groups.stretches[number][place].ends(network, reach.at(members))
            low[members] = torch.maximum(low[members], bottom.view_as(low[members]))
            high[members] = torch.minimum(high[members], top.view_as(high[members]))
        reach = intervals(network, values, reach.ball, {**reach.ranges, target: (low, high)})
    return reach
