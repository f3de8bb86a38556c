"""Signs in what an attack finds that uses no gradient, and one that uses no logits."""

from __future__ import annotations

import torch

from brittle.attacks import square
from brittle.evaluation.honesty.evidence import Evidence, Judgement, count, pick_rows
from brittle.evaluation.threat import unbind
from brittle.results import Rate

QUERIED_SURVIVORS = 32
"""Most survivors of the attacks that are attacked by queries alone: it is the check that costs most."""


MOST_POINTS = 0.02
"""Share of the right samples that queries may break after gradients; where fewer are left, nothing can be found."""


def query_gap(earlier: Rate, broken: Rate, left: Rate) -> Judgement:
    """What queries alone break of what withstood the gradient attacks; raised when that takes more than
    :data:`MOST_POINTS` off the robust accuracy.

    Args:
        earlier: Broken by the attack's own search by queries, of all samples that are right; 0 where it has none.
        broken: Broken now, of some of the survivors.
        left: Survivors that are not proven robust, of all samples that are right.
    """
    left_share = left.hits / max(1, left.n)
    points = 100 * (earlier.hits / max(1, earlier.n) + broken.hits / max(1, broken.n) * left_share)
    before = f"The attack's own queries broke {earlier.counts} samples. " if earlier.hits else ""
    return Judgement(
        earlier.exceeds(MOST_POINTS) or broken.exceeds(MOST_POINTS / max(MOST_POINTS, left_share)),
        f"{before}Queries alone break {broken.counts} samples that the attacks left; together that takes about"
        f" {points:.1f} points off what gradients leave.",
    )


def attack_by_queries(evidence: Evidence) -> Judgement:
    """:func:`query_gap` of Square in the battery, and of the query attacks on some of the survivors."""
    worst, attacks = evidence.worst, evidence.threat.battery
    searches = [number for number, attack in enumerate(attacks) if number and unbind(attack) is square]
    earlier = torch.isin(worst.attack, worst.attack.new_tensor(searches))
    left = worst.robust_correct & ~worst.proven
    right = worst.clean_correct
    fewest = 1 + int(MOST_POINTS * int(right.sum()))
    rows = pick_rows(left, QUERIED_SURVIVORS, "withstood the attacks and are not proven robust", fewest=fewest)
    broken = torch.zeros_like(rows, dtype=torch.bool)
    for number, stage in enumerate(evidence.query_attacks):
        pending = (~broken).nonzero()[:, 0]
        if len(pending) == 0 or (number and not bool(broken.any())):
            break
        broken[pending] = evidence.broken(rows[pending], stage)
    return query_gap(count(earlier[right]), count(broken), count(left[right]))
