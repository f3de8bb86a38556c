"""A smaller network fitted to the uncompressed one, without labels."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from brittle.compression import recalibrated, refitted
from brittle.compression.cost import layer_sizes
from brittle.delivery.request import Compression

JUDGED, FINAL = 2e11, 2e12
"""Multiply-accumulates that the fit of a candidate of the planner's, and of the network that is kept, may cost: about
3 and 30 CPU seconds on a ResNet-18, where a few dozen images have more patches than a layer has weights a row."""
FEWEST = 32
"""Samples that a fit looks at in any case."""
YIELDED = 2**28
"""Most entries of what one layer yields of all samples: a gigabyte in single precision."""


def affordable(model: nn.Module, x: Tensor, price: float) -> Tensor:
    """As many of some inputs as a fit may look at: the normal equations of a layer that reads n numbers at t positions
    take t n^2 multiply-accumulates a sample, and all samples go through the network together.

    Args:
        model: Left as it is.
        x: Inputs ``(N, ...)``.
        price: Multiply-accumulates in all.
    """
    layers = layer_sizes(model, x)
    each = sum(layer.positions * (layer.inputs * layer.kernel) ** 2 for layer in layers)
    largest = max((layer.positions * layer.outputs for layer in layers), default=0)
    return x[: max(FEWEST, int(min(price / max(1.0, each), YIELDED / max(1.0, largest))))]


def mended(
    network: nn.Module,
    original: nn.Module,
    x: Tensor,
    rows: Mapping[str, Tensor],
    asked: Compression,
    *,
    price: float = FINAL,
) -> nn.Module:
    """A smaller network, its layers fitted or else its batch norms measured again, as far as was asked.

    Not both: behind fitted layers the norms' own statistics are right, and new ones cost accuracy (theory page, "Repair
    without labels"). Zeros among single weights stay zeros: nothing is fitted where they were removed.

    Args:
        network: Left as it is.
        original: The uncompressed network; left as it is.
        x: Inputs ``(N, ...)``.
        rows: Outputs that stay, rising, by the name of every layer that lost some.
        asked: What was asked.
        price: Multiply-accumulates that the fit may cost; fewer samples are looked at where it would be more.
    """
    if asked.refit and asked.remove != "weights":
        return refitted(network, original, affordable(original, x, price), rows=rows)
    return recalibrated(network, x) if asked.recalibrate else network
