"""What a row of a weight is worth: functions ``weight -> scores (out,)``; what has more is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Score = Callable[[Tensor], Tensor]


def row_l1(weight: Tensor) -> Tensor:
    """Sum of the magnitudes of every row or filter, ``nu`` of the paper (arXiv 2507.17725, section 2): ``(out,)``."""
    return weight.flatten(1).abs().sum(1)


def row_l2(weight: Tensor) -> Tensor:
    """Euclidean norm of every row or filter: ``(out,)``."""
    return weight.flatten(1).norm(dim=1)


def magnitude(weight: Tensor) -> Tensor:
    """Magnitude of the scales of a batch norm (Liu et al. 2017, "Network slimming"): ``(out,)``."""
    return weight.abs().flatten(1).mean(1) if weight.ndim > 1 else weight.abs()


class RandomScores:
    """Uniform numbers, a control: the same for the same seed and order of calls."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, weight: Tensor) -> Tensor:
        """``(out,)`` in [0, 1)."""
        return torch.rand(len(weight), generator=self._generator, dtype=torch.float64)


SCORES: Mapping[str, tuple[Score, str]] = {
    "row_l1": (row_l1, "weight"),
    "row_l2": (row_l2, "weight"),
    "batch_norm_scale": (magnitude, "norm"),
}
"""Score by name, and what it is asked about: see :func:`brittle.compression.groups.unit_scores`."""
