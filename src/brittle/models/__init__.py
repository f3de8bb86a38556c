"""Networks: built, filled with weights, lent bit-equal, run, traced, and read layer by layer."""

from brittle.models.build import ARCHITECTURES, build_model
from brittle.models.checkpoints import fill, read_state, save_state
from brittle.models.hugging_face import load_snapshot
from brittle.models.intake import Logits
from brittle.models.layers import LayerView, read_layers
from brittle.models.normalize import Normalize, normalised
from brittle.models.pretrained import load_pretrained
from brittle.models.zero_shot import ZeroShotClassifier, zero_shot_classifier

__all__ = [
    "ARCHITECTURES",
    "LayerView",
    "Logits",
    "Normalize",
    "ZeroShotClassifier",
    "build_model",
    "fill",
    "load_pretrained",
    "load_snapshot",
    "normalised",
    "read_layers",
    "read_state",
    "save_state",
    "zero_shot_classifier",
]
