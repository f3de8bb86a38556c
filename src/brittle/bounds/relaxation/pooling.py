r"""Max pooling between a line and a constant: ``x_i <= max x``, and ``max x`` below what any entry can reach."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brittle.bounds.graph.rules import MaxPool
from brittle.bounds.relaxation.interval import Reach


@dataclass(frozen=True, eq=False)
class Pooled:
    """Max pooling around clean values, i the entry that is largest there.

    Attributes:
        place: i, as a number within the channel's plane, ``(N, C, P)`` for P windows.
        plane: Spatial shape of the input.
        excess: Upper bound of ``max x' - x'_i``, ``(N, C * P)``; 0 where i stays the largest.
        rise: Upper bound of ``max x' - max x``, ``(N, C * P)``.
    """

    place: Tensor
    plane: tuple[int, ...]
    excess: Tensor
    rise: Tensor

    @staticmethod
    def of(rule: MaxPool, reach: Reach, number: int) -> Pooled:
        """Read off the ranges of the inputs."""
        z, (low, high) = reach.inputs[number], reach.ranges[number]
        top, place = _with_places(rule, z)
        place = place.flatten(2)
        others = high
        if rule.overlap == 1:  # every entry in one window: leave i out
            others = high.flatten(2).scatter(2, place, -torch.inf).view_as(high)
        excess = rule.run(others).flatten(2) - low.flatten(2).gather(2, place)
        rise = (rule.run(high) - top).flatten(1)
        return Pooled(place, tuple(z.shape[2:]), excess.clamp_min(0).flatten(1), rise.clamp_min(0))

    def spread(self, g: Tensor) -> Tensor:
        """Coefficients ``(N, R, C, *windows)`` of ``x_i`` as coefficients of the input."""
        flat = g.flatten(3)
        size = int(torch.Size(self.plane).numel())
        places = self.place[:, None].expand_as(flat)
        return flat.new_zeros(*flat.shape[:3], size).scatter_add_(3, places, flat).unflatten(3, self.plane)


def _with_places(rule: MaxPool, z: Tensor) -> tuple[Tensor, Tensor]:
    m = rule.run
    assert isinstance(m, nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d)
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rule.axes - 1]
    found: tuple[Tensor, Tensor] = pool(
        z, m.kernel_size, m.stride, m.padding, m.dilation, ceil_mode=m.ceil_mode, return_indices=True
    )
    return found
