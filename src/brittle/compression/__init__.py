"""Networks made smaller: what to remove, how much where, and how. Knows no attack and no training."""

from brittle.compression.allocation import ALLOCATIONS, cut, keep_best
from brittle.compression.cost import channel_costs
from brittle.compression.factorise import factorised, merged
from brittle.compression.groups import channel_groups, mask_units, remove_units, unit_scores
from brittle.compression.scores import SCORES, RandomScores

__all__ = [
    "ALLOCATIONS",
    "SCORES",
    "RandomScores",
    "channel_costs",
    "channel_groups",
    "cut",
    "factorised",
    "keep_best",
    "mask_units",
    "merged",
    "remove_units",
    "unit_scores",
]
