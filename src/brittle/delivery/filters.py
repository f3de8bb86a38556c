"""Filters and neurons: which of them stay at a ratio, and the network without the others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from brittle.attacks import apgd
from brittle.compression import (
    SCORES,
    RandomScores,
    channel_costs,
    channel_groups,
    keep_best,
    kept_rows,
    mask_units,
    remove_units,
    unit_scores,
)
from brittle.compression.cost import ChannelCosts
from brittle.compression.groups import ChannelGroups
from brittle.compression.planner import Calibration, Plan, candidates, plan
from brittle.compression.removal import Kept
from brittle.delivery.mending import JUDGED, mended
from brittle.delivery.removed import (
    CHECKED,
    Removed,
    Remover,
    check_reachable,
    counts_at,
    floors_of,
    priorities_of,
    target_of,
)
from brittle.delivery.request import Compression
from brittle.delivery.samples import Basis
from brittle.models.borrow import frozen
from brittle.models.macs import network_size
from brittle.results import GroupCut

CALIBRATION_STEPS, JUDGE_STEPS = 20, 5
"""Steps of APGD that attack the samples of a plan, and those that judge its candidates."""
PARTS, PART, CHEAP = 4, 16, 1e11
"""Parts of the samples whose influences make further candidates, the least samples of one, and the most
multiply-accumulates that judging all of these candidates may take: some seconds."""
Choice = Callable[[float], tuple[Kept, Plan | None]]
"""From a ratio to the units that stay, and the plan where the planner chose."""
TRIED = 2
"""Samples on which the network of a candidate is compared with the masked one; that of the winner on all."""


def filter_remover(model: nn.Module, basis: Basis, asked: Compression) -> Remover:
    """Filters and neurons, each with all that can only go with it.

    Args:
        model: Left as it is.
        basis: What the choice rests on; every smaller network is compared with the masked one on its first samples.
        asked: What is asked; a latency is read as macs.

    Raises:
        InputError: As :func:`brittle.compression.channel_groups`, or a score that cannot be used.
    """
    x = basis.x[:CHECKED]
    groups = channel_groups(model, x, keep=asked.keep)
    costs = channel_costs(model, groups.groups, x, target_of(asked))
    by = _by_planner if asked.allocation == "planner" else _by_scores
    choose = by(model, groups, costs, basis, asked)

    def remove(ratio: float) -> Removed:
        """The smaller network at a ratio, with what went and what it is compared with."""
        kept, chosen = choose(ratio)
        counts = {name: len(units) for name, units in kept.items()}
        cuts = [GroupCut(g.name, g.units, counts[g.name], _others(kept[g.name], g.units)) for g in groups.groups]
        return Removed(
            network=remove_units(model, groups, kept, x),
            cuts=tuple(cuts),
            share=1 - costs.total(counts) / costs.total(),
            candidate=chosen.candidate if chosen else None,
            score=chosen.score if chosen else None,
            whole=groups.whole,
            rows=kept_rows(model, groups.groups, kept),
            masked=lambda network: mask_units(model, groups, kept, network),
        )

    return remove


def _by_scores(
    model: nn.Module, groups: ChannelGroups, costs: ChannelCosts, basis: Basis, asked: Compression
) -> Choice:
    """Units of the highest scores, so many of every group as an allocation says."""
    scores = _filter_scores(model, groups, asked)
    priorities = priorities_of(scores, asked)
    return lambda ratio: (keep_best(scores, counts_at(ratio, priorities, costs.without, asked)), None)


def _by_planner(
    model: nn.Module, groups: ChannelGroups, costs: ChannelCosts, basis: Basis, asked: Compression
) -> Choice:
    """What the planner keeps: half of the samples, attacked, to plan on, and the other half to judge its candidates."""
    half, units = len(basis.y) // 2, {group.name: group.units for group in groups.groups}
    x, y = basis.x[:half], basis.y[:half]
    attacked = apgd(
        model, x, y, eps=basis.eps, p=basis.p, steps=CALIBRATION_STEPS, seed=asked.seed, progress=basis.progress
    )
    judge = judge_of(basis.x[half:], basis.y[half:], basis.p, basis.eps, asked.seed)

    judging = 2 * PARTS * len(basis.x[half:]) * 2 * (JUDGE_STEPS + 1) * (network_size(model, x).macs or 0)
    parts = PARTS if judging <= CHEAP and half >= PARTS * PART else 1
    choices = candidates(model, groups, costs, Calibration(x, y, attacked), parts)

    def judge_repaired(kept: Kept) -> float:
        small = remove_units(model, groups, kept, x[:TRIED])
        return judge(mended(small, model, x, kept_rows(model, groups.groups, kept), asked, price=JUDGED))

    def choose(ratio: float) -> tuple[Kept, Plan]:
        check_reachable(ratio, units, costs.without, asked)
        chosen = plan(
            choices, costs.without, (1 - ratio) * costs.total(), judge_repaired,
            floor=floors_of(units, asked), round_to=asked.round_to, progress=basis.progress,
        )  # fmt: skip
        return chosen.kept, chosen

    return choose


def judge_of(x: Tensor, y: Tensor, p: float, eps: float, seed: int) -> Callable[[nn.Module], float]:
    """From a network to its robust accuracy under a short attack, an upper estimate, with a tenth of the clean one.

    Args:
        x: Inputs ``(N, ...)``.
        y: Labels ``(N,)``.
        p: Norm of the budget.
        eps: The budget.
        seed: Of the attack's starts.
    """

    def judge(network: nn.Module) -> float:
        with frozen(network), torch.no_grad():
            right = network(x).argmax(1) == y
            if not right.any():
                return 0.0
            attacked = apgd(network, x[right], y[right], eps=eps, p=p, steps=JUDGE_STEPS, seed=seed)
            left = network(attacked).argmax(1) == y[right]
        return float((left.sum() + 0.1 * right.sum()) / len(x))

    return judge


def _filter_scores(model: nn.Module, groups: ChannelGroups, asked: Compression) -> dict[str, Tensor]:
    """Score of every unit."""
    if asked.allocation == "random":
        return unit_scores(model, groups, RandomScores(asked.seed))
    if callable(asked.score):
        return unit_scores(model, groups, asked.score)
    score, of = SCORES[asked.score_name]
    return unit_scores(model, groups, score, of=of)


def _others(kept: Tensor, units: int) -> tuple[int, ...]:
    """The units that are not kept, rising."""
    return tuple(sorted(set(range(units)) - set(kept.tolist())))
