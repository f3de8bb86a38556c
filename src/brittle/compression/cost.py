"""What a network costs, as a function of what is kept of it: parameters, multiply-accumulates, or filters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from brittle.compression.groups import ChannelGroup
from brittle.compression.removal import Convolution, counts_heads
from brittle.errors import InputError
from brittle.models.borrow import unwrapped
from brittle.models.macs import layer_macs, network_size

Target = Literal["parameters", "macs", "filters"]
Counts = Mapping[str, int]
"""Units that are kept, by group."""


@dataclass(frozen=True)
class Layer:
    """Sizes of a Linear or a convolution, from which its cost follows.

    Attributes:
        name: Of the module.
        outputs: Channels or neurons.
        inputs: Channels or neurons that one output reads: of a grouped convolution those of its own group.
        kernel: Entries of the kernel: 1 for a Linear.
        positions: Places at which the layer is evaluated for one sample, over all its calls: of the outputs, and of a
            transposed convolution of the inputs, each of which meets its whole kernel.
        bias: Whether it has one.
    """

    name: str
    outputs: int
    inputs: int
    kernel: int
    positions: float
    bias: bool


@dataclass(frozen=True)
class ChannelCosts:
    """Cost of a network as a function of the units that are kept of its groups.

    Attributes:
        names: The groups.
        units: ``(groups,)``: all units.
        weights: ``(layers,)``: what a pair of an output and an input costs.
        outputs: ``(layers,)``, with all units.
        inputs: ``(layers,)``, likewise.
        from_outputs: ``(layers, groups)``: outputs that go with a unit.
        from_inputs: ``(layers, groups)``: inputs that go with a unit.
        each: ``(groups,)``: what a unit costs by itself (biases, batch norms).
        constant: What stays whatever is removed.
    """

    names: tuple[str, ...]
    units: NDArray[np.int64]
    weights: NDArray[np.float64]
    outputs: NDArray[np.float64]
    inputs: NDArray[np.float64]
    from_outputs: NDArray[np.float64]
    from_inputs: NDArray[np.float64]
    each: NDArray[np.float64]
    constant: float

    def total(self, counts: Counts | None = None) -> float:
        """Exact cost of the compact network; by default of the whole one.

        Args:
            counts: Units that are kept; of groups that are not named, all.
        """
        removed = np.zeros(len(self.names))
        for i, name in enumerate(self.names):
            removed[i] = self.units[i] - (counts or {}).get(name, self.units[i])
        return self.without(removed)

    def without(self, removed: NDArray[np.float64]) -> float:
        """Cost with so many units removed of every group ``(groups,)``."""
        outputs = self.outputs - self.from_outputs @ removed
        inputs = self.inputs - self.from_inputs @ removed
        return float(self.weights @ (outputs * inputs) + self.each @ (self.units - removed) + self.constant)

    def of_one(self, removed: NDArray[np.float64]) -> NDArray[np.float64]:
        """What the next unit of every group saves ``(groups,)``, where so many are removed already.

        The product of outputs and inputs is differentiated: where a unit is both of one layer it saves that much less
        by one entry.
        """
        outputs = self.outputs - self.from_outputs @ removed
        inputs = self.inputs - self.from_inputs @ removed
        saved = (self.weights * inputs) @ self.from_outputs + (self.weights * outputs) @ self.from_inputs
        result: NDArray[np.float64] = saved + self.each
        return result


@dataclass(frozen=True)
class SeparateCosts:
    """Cost of a network whose layers get smaller each by itself: ranks, and single weights.

    Attributes:
        names: The layers.
        units: ``(layers,)``: all units, directions or entries.
        each: ``(layers,)``: what a unit costs.
        whole: ``(layers,)``: what the layer costs as it is, and so at most.
        constant: What the rest of the network costs.
    """

    names: tuple[str, ...]
    units: NDArray[np.int64]
    each: NDArray[np.float64]
    whole: NDArray[np.float64]
    constant: float

    def total(self, counts: Counts | None = None) -> float:
        """Exact cost of the compressed network; by default of the whole one.

        Args:
            counts: Units that are kept; of layers that are not named, all.
        """
        kept = [(counts or {}).get(name, units) for name, units in zip(self.names, self.units, strict=True)]
        return self.without(self.units - np.array(kept, dtype=float))

    def without(self, removed: NDArray[np.float64]) -> float:
        """Cost with so many units removed of every layer ``(layers,)``; it never rises with them."""
        return float(np.minimum(self.whole, self.each * (self.units - removed)).sum() + self.constant)


def channel_costs(model: nn.Module, groups: Sequence[ChannelGroup], x: Tensor, target: Target) -> ChannelCosts:
    """Read the cost of a network.

    Exact: parameters and MACs of the network and of every compact one are those of
    :func:`brittle.models.macs.network_size`; filters are the rows of all Linear layers and convolutions.

    Args:
        model: Left as it is.
        groups: Groups of units.
        x: Inputs ``(N, ...)``; the first is used.
        target: ``"parameters"``, ``"macs"`` or ``"filters"``.

    Raises:
        InputError: The target is unknown, or the network cannot run on the input.
    """
    check_target(target, *get_args(Target))
    layers = layer_sizes(model, x)
    place = {layer.name: i for i, layer in enumerate(layers)}
    from_outputs, from_inputs = np.zeros((2, len(layers), len(groups)))
    each = np.zeros(len(groups))
    for g, group in enumerate(groups):
        for side in group.sides:
            module, number = model.get_submodule(side.module), side.channels.shape[1]
            if side.module in place:
                layer = layers[place[side.module]]
                per_group = module.groups if isinstance(module, Convolution) and not side.out else 1
                (from_outputs if side.out else from_inputs)[place[side.module], g] += number / per_group
                if side.out and (target == "filters" or (layer.bias and target == "parameters")):
                    each[g] += number
            elif target == "parameters" and counts_heads(module):
                each[g] += sum(p.numel() for p in module.parameters(recurse=False)) / group.units
            elif target == "parameters":
                own = [p for p in module.parameters(recurse=False) if p.numel() > 1]
                each[g] += number * len(own)
    sizes = np.array([[layer.outputs, layer.inputs] for layer in layers], dtype=float).reshape(-1, 2)
    weighed = target != "filters"  # rows cost the same however much they read
    factor = [layer.kernel * (layer.positions if target == "macs" else 1.0) * weighed for layer in layers]
    units = np.array([group.units for group in groups], dtype=np.int64)
    inside = float(np.array(factor) @ sizes.prod(1) + each @ units)
    size = network_size(model, x)
    wholes = {"parameters": size.parameters, "macs": size.macs or 0, "filters": sizes[:, 0].sum()}
    whole = float(wholes[target])
    return ChannelCosts(
        tuple(group.name for group in groups), units, np.array(factor), sizes[:, 0], sizes[:, 1],
        from_outputs, from_inputs, each, whole - inside,
    )  # fmt: skip


def check_target(target: str, *allowed: str) -> None:
    """Raise :class:`InputError` unless it is allowed."""
    if target not in allowed:
        raise InputError(f"target: expected {' or '.join(allowed)}; got {target!r}")


def layer_sizes(model: nn.Module, x: Tensor) -> list[Layer]:
    """Sizes of every Linear and convolution, in the order of the modules.

    Args:
        model: Left as it is.
        x: Inputs ``(N, ...)``; the first is used.

    Raises:
        InputError: As :func:`brittle.models.macs.layer_macs`.
    """
    macs, layers = layer_macs(model, x), []
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, nn.Linear):
            sizes = module.out_features, module.in_features, 1
        elif isinstance(module, Convolution):
            sizes = module.out_channels, module.in_channels // module.groups, math.prod(module.kernel_size)
        else:
            continue
        positions = macs.get(name, 0) / max(1, math.prod(sizes))
        layers.append(Layer(name, *sizes, positions, module.bias is not None))
    return layers
