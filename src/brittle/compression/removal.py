"""Channels taken out of a network, or set to zero: two forms of one function."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from brittle.models.borrow import frozen
from brittle.models.layers import HEADS, head_count

WIDTHS = ("attn_dim", "kv_dim", "all_head_size")
"""What attention modules call the number of all columns that their heads yield."""
TABLE = "relative_position_bias_table"
"""And a parameter with a column for every head."""
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | Transposed
Kept = Mapping[str, Tensor]
"""Units that stay ``(kept,)``, rising, by the name of their group."""


@dataclass(frozen=True)
class Side:
    """A module that yields or reads the channels of a group.

    Attributes:
        module: Its name.
        out: Whether the channels are its outputs (also of a batch norm or a depthwise convolution), or its inputs.
        channels: ``(units, c)``: the channels of every unit.
    """

    module: str
    out: bool
    channels: Tensor


class Units(Protocol):
    """A group of units, as :class:`brittle.compression.groups.ChannelGroup`."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def units(self) -> int:
        """How many there are."""

    @property
    def sides(self) -> tuple[Side, ...]:
        """Modules that they go through."""


def lost_channels(groups: Sequence[Units], kept: Kept) -> dict[tuple[str, bool], Tensor]:
    """The channels that go, rising, by module and whether they are its outputs."""
    lost = dict[tuple[str, bool], list[Tensor]]()
    for group in groups:
        if group.name in kept and len(kept[group.name]) < group.units:
            goes = torch.ones(group.units, dtype=torch.bool)
            goes[kept[group.name]] = False
            for side in group.sides:
                lost.setdefault((side.module, side.out), []).append(side.channels[goes].flatten())
    return {place: torch.cat(channels).unique() for place, channels in lost.items()}


def masked(model: nn.Module, groups: Sequence[Units], kept: Kept) -> nn.Module:
    """A copy with zeros where units are not kept.

    Zero are the weights and biases that yield their channels, scale and shift of their batch norms, and the weights
    that read them, so that the copy computes what the compact network does whatever stands in between.

    Args:
        model: Left as it is.
        groups: Groups of units.
        kept: What stays; groups that are not named stay whole.
    """
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for (name, out), channels in lost_channels(groups, kept).items():
            module = copied.get_submodule(name)
            if out:
                for tensor in _rows(module):
                    _from_outputs(module, tensor).index_fill_(0, channels.to(tensor.device), 0)
            else:
                weight = module.weight
                assert isinstance(weight, Tensor)
                _from_inputs(module, weight).index_fill_(1, _inside(module, channels).to(weight.device), 0)
    return copied


def compact(model: nn.Module, groups: Sequence[Units], kept: Kept) -> nn.Module:
    """A copy without the units that are not kept: the same modules under the same names, smaller.

    Args:
        model: Left as it is.
        groups: Groups of units.
        kept: What stays; groups that are not named stay whole.
    """
    copied = copy.deepcopy(model)
    for (name, out), channels in lost_channels(groups, kept).items():
        module = copied.get_submodule(name)
        if not out:
            _cut_inputs(module, channels)
        else:  # whether it is depthwise is asked of the whole module
            _cut_outputs(module, channels, depthwise=is_depthwise(model.get_submodule(name)))
    return copied


def expanded(small: nn.Module, model: nn.Module, groups: Sequence[Units], kept: Kept) -> nn.Module:
    """The masked form of a compact network whose weights may have changed since: its values, and zeros in between.

    Args:
        small: Made by :func:`compact`, and repaired or trained; left as it is.
        model: The uncompressed network; left as it is.
        groups: Groups of units.
        kept: What stayed.
    """
    result, lost, none = masked(model, groups, kept), lost_channels(groups, kept), torch.empty(0, dtype=torch.long)
    for name, module in small.named_modules():
        target, before = result.get_submodule(name), model.get_submodule(name)
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            place = getattr(target, key).detach()
            if tensor.shape == place.shape:
                place.copy_(tensor)
            elif key == TABLE:
                place[:, _left(place.shape[1], lost[name, True])] = tensor.detach()
            elif tensor.ndim < 2:
                place[_left(len(place), lost[name, True])] = tensor.detach()
            else:
                swap = isinstance(before, Transposed) and not is_depthwise(before)
                place, values = (w.transpose(0, 1) if swap else w for w in (place, tensor.detach()))
                goes = none if is_depthwise(before) else _inside(before, lost.get((name, False), none))
                rows = _left(place.shape[0], lost.get((name, True), none))
                place[rows[:, None], _left(place.shape[1], goes)[None, :]] = values
    return result


def is_depthwise(module: nn.Module) -> bool:
    """Whether every channel of a convolution is made of one channel, its own."""
    return isinstance(module, Convolution) and 1 < module.groups == module.in_channels == module.out_channels


def difference(model: nn.Module, groups: Sequence[Units], kept: Kept, x: Tensor) -> float:
    """How far the compact network's logits are from the masked one's on ``x``, relative to the largest; inf: it fails.

    Args:
        model: Left as it is.
        groups: Groups of units.
        kept: What stays.
        x: Inputs ``(N, ...)``.
    """
    return logit_gap(masked(model, groups, kept), compact(model, groups, kept), x)


def logit_gap(reference: nn.Module, small: nn.Module, x: Tensor) -> float:
    """How far a network's logits are from another's on ``x``, relative to the largest of these; inf: it fails.

    Args:
        reference: What it should compute; both are left as they are.
        small: The network in question.
        x: Inputs ``(N, ...)``.
    """
    with frozen(reference), frozen(small), torch.no_grad():
        expected = reference(x)
        try:
            got = small(x)
        except Exception:  # a forward that counts on its sizes fails as it likes
            return math.inf
    if got.shape != expected.shape:
        return math.inf
    largest = float(expected.abs().max())
    gap = float((got - expected).abs().max())
    return gap / largest if largest > 0 else gap


def table_of(module: nn.Module) -> Tensor | None:
    """A module's own table of biases with a column for every attention head; None for none."""
    table = module._parameters.get(TABLE)
    return table if table is not None and table.ndim == 2 else None


def counts_heads(module: nn.Module) -> bool:
    """Whether a module counts attention heads, or has a table of biases for them."""
    return not isinstance(module, nn.MultiheadAttention) and (head_count(module) > 0 or table_of(module) is not None)


def _cut_heads(module: nn.Module, lost: Tensor) -> None:
    table = table_of(module)
    before = head_count(module) or (0 if table is None else table.shape[1])
    left = _left(before, lost)
    for name in HEADS:
        if hasattr(module, name):
            setattr(module, name, len(left))
    for name in WIDTHS:
        if hasattr(module, name):
            setattr(module, name, getattr(module, name) // before * len(left))
    if table is not None:
        _shrink(module, TABLE, left, 1)


def _rows(module: nn.Module) -> list[Tensor]:
    """Parameters with an entry or a row for every output channel."""
    if isinstance(module, nn.PReLU) or counts_heads(module):
        return []  # a slope, or a bias of attention, where nothing comes in
    return [p for p in (module.weight, getattr(module, "bias", None)) if isinstance(p, Tensor)]


def _from_outputs(module: nn.Module, tensor: Tensor) -> Tensor:
    """A view with output channels first."""
    second = isinstance(module, Transposed) and not is_depthwise(module)
    return tensor.data.transpose(0, 1) if tensor.ndim > 1 and second else tensor.data


def _from_inputs(module: nn.Module, weight: Tensor) -> Tensor:
    """A view with input channels second."""
    return weight.data.transpose(0, 1) if isinstance(module, Transposed) else weight.data


def _inside(module: nn.Module, channels: Tensor) -> Tensor:
    """Places of input channels in the weight: of a grouped convolution, the same in all of its groups."""
    if isinstance(module, Convolution) and module.groups > 1:
        return (channels % (module.in_channels // module.groups)).unique()
    return channels


def _left(size: int, lost: Tensor) -> Tensor:
    stays = torch.ones(size, dtype=torch.bool)
    stays[lost] = False
    return stays.nonzero().flatten()


def _shrink(module: nn.Module, name: str, index: Tensor, axis: int) -> None:
    old = getattr(module, name, None)
    if not isinstance(old, Tensor):
        return
    new = old.detach().index_select(axis, index.to(old.device)).clone()
    setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _cut_outputs(module: nn.Module, lost: Tensor, *, depthwise: bool) -> None:
    if isinstance(module, Convolution):
        left = _left(module.out_channels, lost)
        _shrink(module, "weight", left, 1 if isinstance(module, Transposed) and not depthwise else 0)
        _shrink(module, "bias", left, 0)
        module.out_channels = len(left)
        if depthwise:
            module.in_channels = module.groups = len(left)
    elif isinstance(module, nn.Linear):
        left = _left(module.out_features, lost)
        _shrink(module, "weight", left, 0)
        _shrink(module, "bias", left, 0)
        module.out_features = len(left)
    elif counts_heads(module):
        _cut_heads(module, lost)
    else:  # a batch norm, or a PReLU with a slope a channel
        size = "num_parameters" if isinstance(module, nn.PReLU) else "num_features"
        if getattr(module, size) == 1:
            return
        left = _left(getattr(module, size), lost)
        for name in ("weight", "bias", "running_mean", "running_var"):
            _shrink(module, name, left, 0)
        setattr(module, size, len(left))


def _cut_inputs(module: nn.Module, lost: Tensor) -> None:
    if isinstance(module, nn.Linear):
        left = _left(module.in_features, lost)
        _shrink(module, "weight", left, 1)
        module.in_features = len(left)
    else:
        assert isinstance(module, Convolution)
        inside = _left(module.in_channels // module.groups, _inside(module, lost))
        axis = 0 if isinstance(module, Transposed) else 1
        _shrink(module, "weight", inside, axis)
        module.in_channels = len(inside) * module.groups
