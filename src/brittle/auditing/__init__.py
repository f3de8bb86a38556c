"""The main job: everything that can be said of one network."""

from brittle.auditing.directions import energy_shares, layer_responses, leading_directions
from brittle.auditing.run import audit

__all__ = ["audit", "energy_shares", "layer_responses", "leading_directions"]
