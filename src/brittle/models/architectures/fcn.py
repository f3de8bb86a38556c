"""Fully connected networks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise

from torch import Tensor, nn

from brittle.models.architectures.checks import check_sizes, refuse


def fcn(
    in_features: int = 784, width: int = 400, depth: int = 3, classes: int = 10, bias: bool = False
) -> nn.Sequential:
    """Build a fully connected ReLU network: flatten, ``depth - 1`` hidden layers, linear head.

    Args:
        in_features: Numbers in one input, after flattening.
        width: Neurons of each hidden layer.
        depth: Linear layers, the head included.
        classes: Logits.
        bias: Whether the linear layers have biases; the networks of arXiv 2507.17725 have none.

    Returns:
        A plain sequence that maps ``(N, ...)`` to logits ``(N, classes)``.

    Raises:
        InputError: A size is not a positive integer.

    >>> [type(layer).__name__ for layer in fcn(depth=2)]
    ['Flatten', 'Linear', 'ReLU', 'Linear']
    """
    check_sizes(in_features=in_features, width=width, depth=depth, classes=classes)
    sizes = [in_features, *[width] * (depth - 1)]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes, bias=bias))


def fcn_arguments(state: Mapping[str, Tensor]) -> dict[str, object]:
    """The arguments of :func:`fcn` that fit the shapes in ``state``; raises InputError where none do."""
    found = {int(m[1]): state[m[0]] for m in (re.fullmatch(r"(\d+)\.weight", key) for key in state) if m}
    weights = [found[index] for index in sorted(found)]
    if not found or sorted(found) != list(range(1, 2 * len(found), 2)) or any(w.ndim != 2 for w in weights):
        refuse(state, "fcn", "matrices 1.weight, 3.weight, ...")
    return {
        "in_features": weights[0].shape[1],
        "width": weights[0].shape[0],
        "depth": len(weights),
        "classes": weights[-1].shape[0],
        "bias": "1.bias" in state,
    }
