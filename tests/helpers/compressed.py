"""Compressed networks without the code that compresses: an architecture at a smaller width is one of the wider one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import brittle
from brittle.models.normalize import normalised
from brittle.results import CompressionRecipe, CompressionRequest, GroupCut, NetworkSize
from helpers.networks import uniform


def dense(growth: int = 6, start: int = 8) -> nn.Module:
    """A DenseNet of two blocks: concatenations, and batch norms over them."""
    from torchvision.models.densenet import DenseNet

    return DenseNet(growth, (2, 2), start, num_classes=5)


def attentive(heads: int = 3) -> nn.Module:
    """Torchvision's vision transformer, of which whole heads are removed."""
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(16, 8, 2, heads, 4 * heads, 8 * heads, num_classes=5)


class Kinds(nn.Module):
    """Every other kind of module that has sizes, in a row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 2 * width, 3),
            nn.GroupNorm(width, 2 * width),
            nn.PReLU(2 * width),
            nn.Conv2d(2 * width, 2 * width, 3, groups=2 * width),
            nn.InstanceNorm2d(2 * width, affine=True),
            nn.ConvTranspose2d(2 * width, 3 * width, 2, groups=width),
            nn.Flatten(2),
            nn.Conv1d(3 * width, width, 1),
            nn.BatchNorm1d(width),
            nn.Unflatten(2, (1, 13, 13)),
            nn.ConvTranspose3d(width, width, 2),
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
            nn.LayerNorm(width),
            nn.utils.parametrizations.weight_norm(nn.Linear(width, width)),
            nn.RMSNorm(width),
        )
        self.scale = nn.Parameter(torch.ones(width))
        self.register_buffer("shift", torch.ones(width))
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(N, 3, 16, 16)`` to logits ``(N, 5)``."""
        return self.head(self.layers(x) * self.scale + self.shift)


def recipe(arch: str | None, arguments: dict[str, Any], **facts: Any) -> CompressionRecipe:
    """A recipe for images of three channels, without a ``Normalize`` unless ``facts`` say so."""
    size = NetworkSize(6, 4, 24)
    default = {
        "mean": (), "std": (), "input_shape": (3, 16, 16), "classes": 5, "before": size, "after": size,
        "groups": (GroupCut("conv1", 4, 2, (0, 3)),), "data": "digits",
    }  # fmt: skip
    asked = CompressionRequest("filters", "global", "row_l2", "parameters", 0.5)
    return CompressionRecipe(asked, arch, arguments, **default | facts)


def filled(network: nn.Module, seed: int = 3) -> nn.Module:
    """The network in evaluation mode, with values of its own in every parameter and buffer."""
    with torch.no_grad():
        for place, tensor in enumerate((*network.parameters(), *network.buffers())):
            if tensor.is_floating_point():
                tensor.copy_(uniform(seed + place, *tensor.shape, low=0.05, high=0.4))
    return network.eval()


def small_fcn() -> tuple[nn.Module, CompressionRecipe]:
    """A network for the digits, behind its ``Normalize``, of which neurons and ranks were removed, and its recipe."""
    arguments = {"in_features": 64, "width": 12, "depth": 4, "bias": True}
    inner = brittle.build_model("fcn", arguments)
    inner[1], inner[3] = nn.Linear(64, 9), nn.Sequential(nn.Linear(9, 3, bias=False), nn.Linear(3, 7))
    inner[5] = nn.Linear(7, 12)
    network = normalised(filled(inner), (0.3,), (0.4,)).eval()
    return network, recipe("fcn", arguments, mean=(0.3,), std=(0.4,), input_shape=(1, 8, 8), classes=10)
