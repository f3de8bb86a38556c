"""The main job: everything that can be said of one network, and of several side by side."""

from brittle.auditing.directions import energy_shares, layer_responses, leading_directions
from brittle.auditing.run import audit
from brittle.auditing.side_by_side import compare

__all__ = ["audit", "compare", "energy_shares", "layer_responses", "leading_directions"]
