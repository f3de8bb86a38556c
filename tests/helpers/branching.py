"""Small random networks with the ties that removing channels has to follow."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """A sum of two branches, the second a convolution where sizes differ."""

    def __init__(self, inputs: int, outputs: int, inside: int) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(inputs, inside, 3, padding=1, bias=False), nn.BatchNorm2d(inside)
        self.second, self.norm2 = nn.Conv2d(inside, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.short = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, inputs, H, W)`` to ``(N, outputs, H, W)``."""
        inside = torch.sigmoid(self.norm1(self.first(x)))  # not zero where nothing comes in
        return torch.relu(self.norm2(self.second(inside)) + self.short(x))


class Dense(nn.Module):
    """A concatenation of the input and what is made of it."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, growth, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, inputs, H, W)`` to ``(N, inputs + growth, H, W)``."""
        return torch.cat([x, self.conv(torch.relu(self.norm(x)))], dim=1)


def branching(seed: int) -> nn.Module:
    """A network of random blocks from ``(N, 3, 8, 8)`` to ``(N, 5)``, its batch norms' statistics drawn at random."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    channels = draw.choice([4, 6, 8])
    blocks: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1), nn.ReLU()]
    for kind in draw.choices(["residual", "dense", "depthwise", "grouped", "transposed"], k=draw.randint(1, 3)):
        outputs = draw.choice([4, 8, channels])
        if kind == "residual":
            blocks.append(Residual(channels, outputs, draw.choice([3, 6])))
        elif kind == "dense":
            outputs = channels + draw.choice([2, 3])
            blocks.append(Dense(channels, outputs - channels))
        elif kind == "depthwise":
            outputs = channels
            blocks += [
                nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
                nn.BatchNorm2d(channels),
                nn.SiLU(),
            ]
        elif kind == "grouped":
            blocks += [nn.Conv2d(channels, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.PReLU(8)]
            outputs = 8
        else:
            blocks += [nn.ConvTranspose2d(channels, outputs, 2, stride=2), nn.AvgPool2d(2), nn.ReLU()]
        channels = outputs
    ends = {
        "flat": [nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4 * channels, 7), nn.ReLU(), nn.Linear(7, 5)],
        "pooled": [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)],
    }
    network = nn.Sequential(*blocks, *ends[draw.choice(["flat", "pooled"])])
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in (
                (module.weight, 0.2),
                (module.bias, -0.5),
                (module.running_mean, -0.5),
                (module.running_var, 0.5),
            ):
                nn.init.uniform_(tensor, low, low + 1)
    return network.eval()
