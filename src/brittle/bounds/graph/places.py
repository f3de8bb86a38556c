"""What puts entries in other places without weights of its own: slices, parts, padding, resizing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from brittle.bounds.graph.calls import Context, Shape, argument, depend, settings
from brittle.bounds.graph.rules import Average, Concat, Conv, Rearrange, Rule, Run
from brittle.linear.conv_geometry import ConvGeometry
from brittle.linear.spectrum import raised
from brittle.models.trace import NoRule, where

SPLITS = (torch.chunk, torch.split, "chunk", "split")
"""Functions and methods that yield consecutive parts along an axis."""
WEIGHTED = ("nearest", "nearest-exact", "linear", "bilinear", "trilinear", "area")
"""Ways of resizing in which every pixel is a mean of pixels; others have negative weights."""


def taken(node: fx.Node) -> Rule | None:
    """Rule of ``x[...]``, x a tensor or the parts of one; None where it changes nothing.

    Raises:
        NoRule: The index is not one of fixed numbers and slices, repeats entries, or reaches into the batch axis.
    """
    source, index = node.all_input_nodes[0], argument(node, 1, "index", None)
    shape = source.meta.get("shape")
    if source.target in SPLITS and source.op != "call_module":
        shape = source.all_input_nodes[0].meta.get("shape")
        index = _slice_of_part(source, index, shape)
    index = index if isinstance(index, tuple) else (index,)
    listed = [entry for entry in index if isinstance(entry, list)]
    if len(listed) > 1 or not all(_is_fixed(entry, bool(listed)) for entry in index):
        raise NoRule(f"{where(node)}: only slices by fixed numbers that repeat no entry have a rule")
    behind = sum(entry is not None for entry in index) - 1
    whole = index[0] == slice(None) or (index[0] is ... and shape is not None and behind < len(shape))
    if not whole:
        raise NoRule(f"{where(node)}: slices along the batch axis")
    return None if index == (slice(None),) else Rearrange(lambda d: d[index], conv=_as_convolution(index, shape))


def _slice_of_part(split: fx.Node, number: object, shape: Shape) -> tuple[Any, ...]:
    """The slice of a tensor that one part of it is."""
    axis = argument(split, 2, "dim", 0)
    positional, named = settings(split)
    if shape is None or not isinstance(number, int) or depend([*positional, *named.values()]):
        raise NoRule(f"{where(split)}: parts of a tensor have a rule only for a known input_shape")
    function = getattr(Tensor, split.target) if isinstance(split.target, str) else split.target
    parts = function(torch.empty(shape, device="meta"), *positional, **named)
    ends = list(accumulate((part.shape[axis] for part in parts), initial=0))
    number = range(len(parts))[number]
    return (*[slice(None)] * (axis % len(shape)), slice(ends[number], ends[number + 1]))


def _is_fixed(entry: object, alone: bool) -> bool:
    """Whether an entry of an index is known beforehand and repeats nothing; beside a list, numbers move axes."""
    if isinstance(entry, slice):
        return all(end is None or type(end) is int for end in (entry.start, entry.stop, entry.step))
    if isinstance(entry, list):
        return all(type(place) is int and place >= 0 for place in entry) and len(set(entry)) == len(entry)
    return entry is None or entry is ... or (type(entry) is int and not alone)


def _as_convolution(index: tuple[Any, ...], shape: Shape) -> Conv | None:
    """A choice of channels, and of every so many positions from the first, as a convolution of one tap."""
    if shape is None or len(shape) < 3 or not all(isinstance(entry, slice) for entry in index[1:]):
        return None
    if index[0] is ...:
        return None
    slices: list[slice] = [*index[1:], *[slice(None)] * (len(shape) - len(index))]
    channels, axes = slices[0], slices[1:]
    walks = [range(*entry.indices(n)) for entry, n in zip(axes, shape[2:], strict=True)]
    strides = tuple(walk.step for walk in walks)
    if any(walk != range(0, n, walk.step) for walk, n in zip(walks, shape[2:], strict=True)):
        return None
    ones = (1,) * len(axes)
    K = torch.eye(shape[1], dtype=torch.float64)[channels]
    groups = 1
    if len(K) == shape[1]:
        K, groups = torch.ones(shape[1], 1, dtype=torch.float64), shape[1]
    return Conv(K.view(*K.shape, *ones), ConvGeometry(strides, ((0, 0),) * len(axes), ones, groups))


def padding(node: fx.Node, context: Context) -> Rule | None:
    """Rule of ``F.pad``."""
    widths, mode = argument(node, 1, "pad", ()), argument(node, 2, "mode", "constant")
    shape = node.all_input_nodes[0].meta.get("shape")
    if shape is None or depend([widths]):
        raise NoRule(f"{where(node)}: padding has a rule only for fixed widths and a known input_shape")
    return _padded(where(node), [int(width) for width in widths], mode, shape)


def padding_module(mode: str, name: str, module: Any, shape: Shape) -> Rule | None:
    """Rule of a padding module of this mode."""
    widths = list(module.padding)
    if shape is not None:
        return _padded(name, widths, mode, shape)
    if mode == "constant":
        return Rearrange(lambda d: F.pad(d, widths))
    return Average(lambda d: F.pad(d, widths, mode=mode), None, "padding is bounded only for a known input_shape")


def _padded(name: str, widths: Sequence[int], mode: str, shape: tuple[int, ...]) -> Rule | None:
    """Padding by widths ``(before, after)``, the last axis first. Constants count as zeros: differences have none."""
    pairs = {len(shape) - 1 - k: (widths[2 * k], widths[2 * k + 1]) for k in range(len(widths) // 2)}
    pairs = {axis: pair for axis, pair in pairs.items() if any(pair)}
    if not pairs:
        return None
    if min(pairs) < 1:
        raise NoRule(f"{name}: pads the batch axis")
    if mode != "constant":
        return _averaging(lambda d: F.pad(d, list(widths), mode=mode), shape, keeps_channels=min(pairs) > 1)
    if list(pairs) == [1] and min(pairs[1]) >= 0:
        return Concat(1, pairs[1])
    return Rearrange(lambda d: F.pad(d, list(widths)))


def resizing(node: fx.Node, context: Context) -> Rule:
    """Rule of ``F.interpolate``; a size that the network computes is the one that was recorded."""
    names = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
    options = {name: argument(node, place, name, None) for place, name in enumerate(names, 1)}
    shape, after = node.all_input_nodes[0].meta.get("shape"), node.meta.get("shape")
    if after is not None and depend([options["size"]]):
        options["size"] = after[2:]
    if depend(options.values()):
        raise NoRule(f"{where(node)}: resizing by factors that depend on the input")
    return _resized(where(node), options, shape)


def resizing_module(name: str, module: nn.Upsample, shape: Shape) -> Rule:
    """Rule of ``nn.Upsample`` and its kin."""
    options = {key: getattr(module, key) for key in ("size", "scale_factor", "mode", "align_corners")}
    return _resized(name, options | {"recompute_scale_factor": module.recompute_scale_factor}, shape)


def _resized(name: str, options: dict[str, Any], shape: Shape) -> Average:
    mode = options["mode"] or "nearest"
    if mode not in WEIGHTED or options.get("antialias"):
        raise NoRule(f"{name}: no sound rule for resizing by {mode}{' with antialias' * (mode in WEIGHTED)}")
    options = {key: value for key, value in options.items() if value is not None}

    def run(d: Tensor) -> Tensor:
        return F.interpolate(d, **options)

    if shape is None:
        return Average(run, None, "resizing is bounded only for a known input_shape")
    return _averaging(run, shape, keeps_channels=True)


def _averaging(run: Run, shape: tuple[int, ...], *, keeps_channels: bool) -> Average:
    """A linear map whose rows are means: ``||A||_2^2 <= ||A||_1 ||A||_inf``, the largest sum of a column."""
    with torch.enable_grad():
        x = torch.ones(shape, dtype=torch.float64, requires_grad=True)
        (columns,) = torch.autograd.grad(run(x).sum(), x)
    norm = raised(math.sqrt(float(columns.max())), columns.numel())
    return Average(run, norm, axes=len(shape) - 2 if keeps_channels else 0)
