"""From a network to a smaller one that is measured and kept: plan, remove, repair, train, compare."""

from brittle.delivery.compressing import Compressed, carry_out, compress
from brittle.delivery.keeping import Origin, check_formats, check_kept, run_sweep, write_compressed
from brittle.delivery.planning import Plan, plan_removal
from brittle.delivery.request import Compression
from brittle.delivery.sweeping import Ladder, Sweep, sweep, sweep_of

__all__ = [
    "Compressed",
    "Compression",
    "Ladder",
    "Origin",
    "Plan",
    "Sweep",
    "carry_out",
    "check_formats",
    "check_kept",
    "compress",
    "plan_removal",
    "run_sweep",
    "sweep",
    "sweep_of",
    "write_compressed",
]
