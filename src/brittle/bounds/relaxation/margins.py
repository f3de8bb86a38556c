"""Margins of samples, from the cheapest bound to the most expensive, each only where those before it leave a doubt."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from brittle.bounds.relaxation.crown import chord, gaps, lower_ends, steeper, unit_ends
from brittle.bounds.relaxation.flattened import dense_chain, flattened_ends
from brittle.bounds.relaxation.grouped import Groups, targets
from brittle.bounds.relaxation.interval import Ball, Network, Reach, intervals
from brittle.bounds.relaxation.linear_maps import unit_roundoff
from brittle.bounds.relaxation.windows import MOST_ENTRIES
from brittle.errors import InputError

STEP = 0.3
"""Length of the first step of a lower line's slope, of at most 1 in all; later ones fall to zero."""


@dataclass(frozen=True)
class Effort:
    """How hard certificates are tried where a sample could still be certified.

    Attributes:
        rounds: How often entries of hidden layers are bounded again; 0 is cheapest, by far for convolutions.
        rows: How many entries of a layer that is at most, those whose relaxation costs most; only entries that can
            change their side count.
        flattened: Whether entries behind dense layers are bounded again with lines that are flat around every unit that
            matters little, by one product in place of two: a fraction of the cost, for slightly wider ranges.
        slope_steps: Steps of gradient ascent that choose the slopes of the lower lines at last (alpha-CROWN), for
            every margin on its own.

    Raises:
        InputError: A number is too small.
    """

    rounds: int = 2
    rows: int = 32
    slope_steps: int = 0
    flattened: bool = False

    def __post_init__(self) -> None:
        if self.rounds < 0 or self.rows < 1:
            raise InputError(f"rounds: expected at least 0, rows: at least 1; got {self.rounds} and {self.rows}")
        if self.slope_steps < 0:
            raise InputError(f"slope_steps: expected at least 0; got {self.slope_steps}")


USUAL = Effort()
"""What is tried where nothing else is asked for."""
CROWN = Effort(rounds=1, rows=2**31)
"""Every entry that can change its side is bounded again: as sharp as CROWN, up to the allowance for rounding."""


def least_margins(
    network: Network,
    groups: Groups | None,
    values: dict[int, Tensor],
    ball: Ball,
    y: Tensor,
    effort: Effort,
    logits_at: Callable[[Tensor], Tensor],
) -> Tensor:
    """Lower bounds of ``min_{j != y} s_y - s_j`` over the ball, ``(N,)``.

    Args:
        network: The operations, the last one with results ``(N, K)``.
        groups: Slopes shared by groups of samples.
        values: Clean results of all operations, by number.
        ball: What the attacker may add.
        y: Labels ``(N,)``.
        effort: How hard it is tried.
        logits_at: The network itself: a sample that it gives another label at the worst point of a relaxation is left
            as it is, since nothing can be proven of it.
    """
    reach = intervals(network, values, ball)
    if groups is not None:
        reach = _tighten_by_groups(network, groups, reach, values)
    classes = network.shape(len(network.ops) - 1)[0]
    every = torch.arange(classes, device=y.device).expand(len(y), classes)
    others = every[every != y[:, None]].view(len(y), classes - 1)
    margins = _first_margins(network, reach, values, y, others)
    batch, gaining = _Batch(network, reach, values, y, others, margins), targets(network)
    gains = {target: torch.zeros_like(reach.flat(target)[0]) for target in gaining}
    hopeful = torch.ones_like(y, dtype=torch.bool)
    widest = max(network.size(n) for n in range(len(network.ops)))
    most = max((network.size(network.ops[target].inputs[0]) for target in gaining), default=0)
    small = effort.flattened and all(dense_chain(network, target) for target in gaining)
    for turn in range(effort.rounds + 1 if gaining else 1):
        todo = (hopeful & (margins <= 0).any(1)).nonzero()[:, 0]
        if not len(todo):
            break
        rows = 2 * min(effort.rows, most) if turn and not small else classes
        for part in todo.split(max(1, MOST_ENTRIES // (widest * rows))):
            some = batch.at(part)
            if turn:
                some = some.bounded_again({target: gain[part] for target, gain in gains.items()}, effort)
                reach.put(part, some.reach)
            margins[part], costs, worst = some.crown()
            hopeful[part] = logits_at(values[0][part] + worst).argmax(1) == y[part]
            for target, cost in costs.items():
                gains[target][part] = cost
    least = F.one_hot(margins.argmin(1), classes - 1).bool()
    for places in (least, ~least):
        pairs_left = (hopeful[:, None] & places & (margins <= 0)).nonzero()
        for pairs in pairs_left.split(max(1, MOST_ENTRIES // widest)) if len(pairs_left) else ():
            margins[pairs[:, 0], pairs[:, 1]] = batch.at(pairs[:, 0]).sharpened(pairs[:, 1], effort.slope_steps)
        hopeful = hopeful & (margins[least] > 0)  # the other classes only where the likeliest is excluded
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

    def lower(
        self, others: Tensor, slopes: dict[int, Tensor] | None = None, watched: dict[int, Tensor] | None = None
    ) -> Tensor:
        """CROWN's margins ``(N, R)`` to other classes ``(N, R)``; see :func:`lower_ends`."""
        last = len(self.network.ops) - 1
        logits = self.values[last]
        rows = F.one_hot(self.y, logits.shape[1])[:, None] - F.one_hot(others, logits.shape[1])
        label, other = logits.gather(1, self.y[:, None]), logits.gather(1, others)
        falls = lower_ends(self.network, self.reach, last, rows.to(logits), slopes=slopes, watched=watched)
        return _lower(label - other + falls, label, other)

    def crown(self) -> tuple[Tensor, dict[int, Tensor], Tensor]:
        """Margins with those that are not certain replaced by CROWN; what entries cost; the worst differences.

        The cost of an entry ``(N, n)``, for each target, is what its relaxation takes from the uncertain margins. The
        worst difference of an input is where the linear bound of its least margin is least.
        """
        network, reach = self.network, self.reach
        count = int((self.margins <= 0).sum(1).max())
        places = self.margins.topk(count, dim=1, largest=False).indices
        others, before = self.others.gather(1, places), self.margins.gather(1, places)
        watched: dict[int, Tensor] = {}
        bounds = torch.maximum(before, self.lower(others, watched=watched))
        bounds = torch.where(before > 0, before, bounds)  # certain ones only fill the batch
        wrong, gains = (bounds <= 0).to(bounds), {}
        for target in targets(network):
            falls, gap = watched[target].clamp_max(0), gaps(network, reach, target)
            gains[target] = torch.bmm(wrong[:, None], falls.abs_())[:, 0] * gap
        rows = torch.arange(len(bounds), device=bounds.device)
        worst = reach.ball.least(watched[0][rows, bounds.argmin(1)])
        return self.margins.scatter(1, places, bounds), gains, worst

    def bounded_again(self, gains: dict[int, Tensor], effort: Effort) -> _Batch:
        """With the entries of every target whose relaxation costs most bounded again, in order."""
        network, reach, values = self.network, self.reach, self.values
        for target, gain in gains.items():
            low, high = reach.flat(target)
            movable = (low < 0) & (high > 0)
            count = min(effort.rows, int(movable.sum(1).max()))
            if not count:
                continue
            units = torch.where(movable, gain, -1.0).topk(count, dim=1).indices
            shape, z = reach.inputs[target].shape, reach.inputs[target].flatten(1).gather(1, units)
            if effort.flattened and dense_chain(network, target):
                bottom, top = flattened_ends(network, reach, target, units)
            else:
                bottom, top = unit_ends(network, reach, network.ops[target].inputs[0], units)
            low = low.scatter(1, units, torch.maximum(low.gather(1, units), z + bottom))
            high = high.scatter(1, units, torch.minimum(high.gather(1, units), z + top))
            ranges = {**reach.ranges, target: (low.view(shape), high.view(shape))}
            reach = intervals(network, values, reach.ball, ranges)
        return replace(self, reach=reach)

    def sharpened(self, places: Tensor, steps: int) -> Tensor:
        """The margin ``(N,)`` at one place of every sample, with other slopes of the lower lines.

        First those of the chords, then what gradient ascent makes of the better ones. Any slope is valid, so the best
        bound counts.
        """
        network, reach = self.network, self.reach
        others, best = self.others.gather(1, places[:, None]), self.margins.gather(1, places[:, None])
        starts = {}
        for number in network.slopes():
            low, high = reach.flat(number)
            starts[number] = chord(low, high, network.low(number))
        bounds = self.lower(others, starts)
        adaptive = {n: steeper(*reach.flat(n), network.low(n)) for n in starts}
        slopes = {n: torch.where(bounds > best, starts[n], adaptive[n]) for n in starts}
        best = torch.maximum(best, bounds)
        for step in range(steps if slopes else 0):  # a linear network has none
            with torch.enable_grad():
                free = {n: slope.detach().requires_grad_(True) for n, slope in slopes.items()}
                bounds = self.lower(others, free)
                ascent = torch.autograd.grad(bounds.sum(), list(free.values()))
            best = torch.maximum(best, bounds.detach())
            length = STEP * (1 - step / steps)
            for (n, slope), g in zip(free.items(), ascent, strict=True):
                moved = slope.detach() + length * g / g.abs().amax(1, keepdim=True).clamp_min(1e-30)
                slopes[n] = moved.clamp(network.low(n), 1.0)
        if steps:
            best = torch.maximum(best, self.lower(others, slopes))
        return best[:, 0]


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
    error = reach.errors[last].gather(1, y[:, None]) + reach.errors[last].gather(1, others)
    return _lower(label - other + low.gather(1, others) - error, label, other)


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
