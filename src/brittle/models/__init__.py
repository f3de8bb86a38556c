"""Networks: built, filled with weights, lent bit-equal, run, traced, and read layer by layer."""

from brittle.models.build import ARCHITECTURES, build_model
from brittle.models.checkpoints import fill, read_state, save_state
from brittle.models.layers import LayerView, read_layers
from brittle.models.normalize import Normalize, normalised

__all__ = [
    "ARCHITECTURES",
    "LayerView",
    "Normalize",
    "build_model",
    "fill",
    "normalised",
    "read_layers",
    "read_state",
    "save_state",
]
