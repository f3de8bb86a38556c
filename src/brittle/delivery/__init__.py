"""From a network to a smaller one that is measured and kept: plan, remove, repair, train, compare."""

from brittle.delivery.compressing import Compressed, carry_out, compress
from brittle.delivery.frontiers import Ladder, Walk, frontier, walk_of
from brittle.delivery.keeping import Origin, check_formats, check_kept, keep_frontier, write_compressed
from brittle.delivery.planning import Plan, plan_removal
from brittle.delivery.request import Compression

__all__ = [
    "Compressed",
    "Compression",
    "Ladder",
    "Origin",
    "Plan",
    "Walk",
    "carry_out",
    "check_formats",
    "check_kept",
    "compress",
    "frontier",
    "keep_frontier",
    "plan_removal",
    "walk_of",
    "write_compressed",
]
