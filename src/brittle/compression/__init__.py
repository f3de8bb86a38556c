"""Networks made smaller: what to remove, how much where, and how. Knows no attack and no training."""

from brittle.compression.allocation import ALLOCATIONS, cut, keep_best
from brittle.compression.cost import channel_costs
from brittle.compression.factorise import factorised, merged
from brittle.compression.folders import load_compressed, save_compressed
from brittle.compression.groups import channel_groups, mask_units, remove_units, unit_scores
from brittle.compression.recalibration import recalibrated
from brittle.compression.refit import kept_rows, refitted
from brittle.compression.scores import SCORES, RandomScores
from brittle.compression.sparsity import weight_costs, weight_scores, with_zeros
from brittle.compression.truncation import rank_costs, singular_directions, truncate

__all__ = [
    "ALLOCATIONS",
    "SCORES",
    "RandomScores",
    "channel_costs",
    "channel_groups",
    "cut",
    "factorised",
    "keep_best",
    "kept_rows",
    "load_compressed",
    "mask_units",
    "merged",
    "rank_costs",
    "recalibrated",
    "refitted",
    "remove_units",
    "save_compressed",
    "singular_directions",
    "truncate",
    "unit_scores",
    "weight_costs",
    "weight_scores",
    "with_zeros",
]
