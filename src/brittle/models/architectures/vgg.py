"""VGG-16 in CIFAR form: configuration D with batch normalisation and one linear head."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from torch import Tensor, nn

from brittle.models.architectures.checks import check_sizes, kernel_and_head

STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))
"""Configuration D (Simonyan and Zisserman 2015): channels as multiples of the width, and convolutions, by stage."""


class VGG16(nn.Module):
    """Thirteen 3 x 3 convolutions in five stages, each stage ended by max pooling; see :func:`vgg16`."""

    def __init__(self, classes: int, width: int, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for multiple, convolutions in STAGES:
            sizes = [channels, *[multiple * width] * convolutions]
            for before, channels in pairwise(sizes):
                layers += [nn.Conv2d(before, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
            layers.append(nn.MaxPool2d(2, ceil_mode=True))  # rounding up, no image is too small for five of them
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to logits ``(N, classes)``."""
        logits: Tensor = self.classifier(self.flatten(self.avgpool(self.features(x))))
        return logits


def vgg16(classes: int = 10, width: int = 64, in_channels: int = 3) -> nn.Module:
    """Build the CIFAR form of VGG-16 with batch normalisation (Simonyan and Zisserman 2015, configuration D).

    ``features`` is torchvision's ``vgg16_bn.features``, entry for entry; its three linear layers are one here,
    ``classifier``, after the mean over the positions, of which an image up to 32 x 32 leaves a single one.

    Args:
        classes: Logits.
        width: Channels of the first stage; the next four have 2, 4, 8 and 8 times as many.
        in_channels: Channels of the images.

    Returns:
        A network from ``(N, in_channels, H, W)`` to logits ``(N, classes)``; ``torch.fx`` can trace it.

    Raises:
        InputError: A size is not a positive integer.
    """
    check_sizes(classes=classes, width=width, in_channels=in_channels)
    return VGG16(classes, width, in_channels)


def vgg16_arguments(state: Mapping[str, Tensor]) -> dict[str, object]:
    """The arguments of :func:`vgg16` that fit the shapes in ``state``; raises InputError where none do."""
    first, head = kernel_and_head(state, "vgg16", "features.0.weight", "classifier.weight")
    return {"classes": head.shape[0], "width": first.shape[0], "in_channels": first.shape[1]}
