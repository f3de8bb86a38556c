"""What entries of hidden convolutions depend on: windows of images, where relaxations need not carry whole ones.

An entry of a convolution at one place depends on a window of its input, and that on a larger one of the input before.
All entries of one result have windows of one size, each at its own place, so they are carried back side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from brittle.bounds.graph.rules import (
    Average,
    Concat,
    Conv,
    Dense,
    Input,
    MaxPool,
    Multiple,
    Op,
    Rearrange,
    Scale,
    Slope,
    Sum,
    TransposedConv,
    no_rule,
)
from brittle.bounds.relaxation.interval import Ball, Network

MOST_ENTRIES = 2**20
"""Entries of the largest tensor of coefficients: so many windows are taken together."""
MOST_READ = 0.7
"""Share of whole images up to which windows pay for the copies that they need."""


@dataclass(frozen=True)
class Window:
    """The part of an image that an entry of a later result depends on, for every spatial axis.

    For the entry at ``place`` it begins at ``scale * place + start``; it may reach out of the image.
    """

    scale: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]

    def before(self, kernel: tuple[int, ...], stride: tuple[int, ...], ahead: tuple[int, ...]) -> Window:
        """What a kernel of this span reads, with so many entries of padding ahead of the image."""
        return Window(
            tuple(a * s for a, s in zip(self.scale, stride, strict=True)),
            tuple(b * s - pad for b, s, pad in zip(self.start, stride, ahead, strict=True)),
            tuple((n - 1) * s + k for n, s, k in zip(self.size, stride, kernel, strict=True)),
        )

    def hull(self, other: Window) -> Window | None:
        """The smallest window around two; None where they do not move alike from place to place."""
        if self.scale != other.scale:
            return None
        start = tuple(map(min, self.start, other.start))
        ends = [max(a + n, b + m) for a, n, b, m in zip(self.start, self.size, other.start, other.size, strict=True)]
        return Window(self.scale, start, tuple(end - a for end, a in zip(ends, start, strict=True)))


@singledispatch
def window_before(rule: object, op: Op, window: Window) -> Window | None:
    """The window of what an operation reads, from that of its result; None where it is passed whole.

    Raises:
        NoRule: It has no linear relaxation.
    """
    raise no_rule(op, "window")


@window_before.register
def _(rule: Dense | TransposedConv | Rearrange, op: Op, window: Window) -> None:
    return None


@window_before.register
def _(rule: Input | Scale | Slope | Multiple | Sum, op: Op, window: Window) -> Window:
    return window


@window_before.register
def _(rule: Concat, op: Op, window: Window) -> Window | None:
    assert op.shape is not None
    return window if rule.axis % len(op.shape) == 1 else None


@window_before.register
def _(rule: Conv, op: Op, window: Window) -> Window:
    geometry, kernel = rule.geometry, rule.K.shape[2:]
    spans = tuple(span + 1 for span in geometry.spans(kernel))
    return window.before(spans, geometry.stride, tuple(ahead for ahead, _ in geometry.padding))


@window_before.register
def _(rule: MaxPool, op: Op, window: Window) -> Window:
    m, axes = rule.run, rule.axes
    settings = [getattr(m, name) for name in ("kernel_size", "stride", "padding", "dilation")]
    kernel, stride, padding, dilation = (tuple(v) if isinstance(v, tuple | list) else (v,) * axes for v in settings)
    return window.before(tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)), stride, padding)


@window_before.register
def _(rule: Average, op: Op, window: Window) -> Window | None:
    return None if rule.stencil is None else window.before(*rule.stencil)


Windows = Mapping[int, Window | None]
"""The windows of every result that an entry depends on, by number; None where it is carried whole."""


def windows_to(network: Network, start: int) -> Windows:
    """What single entries of a result depend on; all of it whole where windows would save little."""
    shape = network.shape(start)
    one, zero = (1,) * (len(shape) - 1), (0,) * (len(shape) - 1)
    windows: dict[int, Window | None] = {start: Window(one, zero, one) if len(shape) > 1 else None}
    for number in range(start, -1, -1):
        op, window = network.ops[number], windows.get(number)
        before = None if window is None else window_before(op.rule, op, window)
        if window is not None and before is None:
            windows[number] = None
        for source in op.inputs if number in windows else ():
            other = windows.get(source, before)
            both = None if before is None or other is None else before.hull(other)
            fits = both is not None and math.prod(both.size) < math.prod(network.shape(source)[1:])
            windows[source] = both if fits else None
    read, whole = sum(entries_read(network, windows).values()), sum(network.size(number) for number in windows)
    return windows if read < MOST_READ * whole else dict.fromkeys(windows)


def entries_read(network: Network, windows: Windows) -> dict[int, int]:
    """How many entries of every result one entry depends on, by number."""
    return {
        number: network.size(number) if window is None else network.shape(number)[0] * math.prod(window.size)
        for number, window in windows.items()
    }


def alike(counts: Tensor, most: int) -> Iterator[Tensor]:
    """Numbers of pairs to take together: with similar counts of rows, of which there are at most so many in all."""
    order = counts.argsort(descending=True)
    while len(order):
        largest = int(counts[order[0]])
        similar = int((2 * counts[order] > largest).sum())
        size = min(similar, max(1, most // largest))
        yield order[:size]
        order = order[size:]


@dataclass(frozen=True, eq=False)
class Crops:
    """Rows that read windows: P pairs of a sample and a place, each with R rows.

    Attributes:
        network: The operations; those between windows carry coefficients from one to the next.
        windows: By number of what they lie in; what has none is carried whole.
        samples: Numbers of the samples ``(P,)``.
        places: Places of the rows' entries ``(P, axes)``.
        edges: The first and the last of them, for every axis.
    """

    network: Network
    windows: Windows
    samples: Tensor
    places: Tensor
    edges: tuple[tuple[int, int], ...]

    @staticmethod
    def of(network: Network, windows: Windows, samples: Tensor, places: Tensor) -> Crops:
        """With the transposed maps that know no borders."""
        maps = dict(network.maps)
        for number, window in windows.items():
            if window is not None and number in maps:
                linear = maps[number]
                maps[number] = replace(linear, transpose=linear.spread or linear.transpose)
        edges = tuple(zip(places.amin(0).tolist(), places.amax(0).tolist(), strict=True))
        return Crops(replace(network, maps=maps), windows, samples, places, edges)

    def ball(self, ball: Ball) -> Ball:
        """What the rows see of the balls of all samples."""
        length = None if ball.length is None else ball.length[self.samples]
        mid, rad = self.see(0, ball.mid, ball.rad)
        return Ball(mid, rad, length)

    def see(self, number: int, *values: Tensor) -> tuple[Tensor, ...]:
        """What the rows see of values ``(N, ...)`` of a result: ``(P, n)`` each, 0 out of the image."""
        window = self.windows[number]
        if window is None:
            return tuple(value.flatten(1)[self.samples] for value in values)
        image = torch.cat([value.reshape(-1, *self.network.shape(number)) for value in values], 1)
        widths = self._widths(window, image.shape[2:])
        if any(max(pair) for pair in widths):
            image = F.pad(image, [width for pair in reversed(widths) for width in pair])
        for axis, size in enumerate(window.size, 2):
            image = image.unfold(axis, size, 1)
        corners: tuple[Any, ...] = (self.samples, slice(None), *self._corners(window, widths))
        seen = image[corners]
        return tuple(part.flatten(1) for part in seen.chunk(len(values), 1))

    def points(self, number: int, points: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Points of the image that a pooling reads, ``(N, n)`` one for each entry of its result, within its windows.

        Returns:
            The points that the rows see ``(P, n)``, as numbers in the flattened window, and the window's shape.
        """
        op, window, (seen,) = self.network.ops[number], self.windows[number], self.see(number, points)
        image = self.network.shape(op.inputs[0])[1:]
        inner = None if window is None else window_before(op.rule, op, window)
        if inner is None:
            return seen, image
        strides = [math.prod(inner.size[axis + 1 :]) for axis in range(len(image))]
        within = torch.zeros_like(seen)
        for axis in reversed(range(len(image))):
            along = seen % image[axis] - (self.places[:, axis, None] * inner.scale[axis] + inner.start[axis])
            within += along.clamp(0, inner.size[axis] - 1) * strides[axis]  # what the clamp moves is read by nothing
            seen = seen // image[axis]
        return within, inner.size

    def fit(self, part: Tensor, number: int, source: int) -> Tensor:
        """Coefficients ``(P, R, ...)`` of what an operation reads, from its own window in that of its source."""
        window = self.windows[number]
        if window is None:
            return part
        op, image = self.network.ops[number], self.network.shape(source)[1:]
        inner, outer = window_before(op.rule, op, window), self.windows[source]
        assert inner is not None
        if outer is None:
            return self._placed(part, inner, image)
        if outer != inner:
            ahead = [b - a for a, b in zip(outer.start, inner.start, strict=True)]
            behind = [n - a - m for n, a, m in zip(outer.size, ahead, inner.size, strict=True)]
            part = F.pad(part, [w for pair in zip(reversed(ahead), reversed(behind), strict=True) for w in pair])
        if inner == window or not any(max(pair) for pair in self._widths(outer, image)):
            return part
        inside = torch.ones(len(part), 1, 1, *(1 for _ in image), dtype=part.dtype, device=part.device)
        for axis, n in enumerate(image):
            first = self.places[:, axis, None] * outer.scale[axis] + outer.start[axis]
            at = first + torch.arange(outer.size[axis], device=first.device)
            within = ((at >= 0) & (at < n)).to(part)
            inside = inside * within.view(len(at), 1, 1, *(-1 if k == axis else 1 for k in range(len(image))))
        return part * inside

    def _widths(self, window: Window, image: tuple[int, ...]) -> list[tuple[int, int]]:
        """By how much an image has to be widened to hold all windows."""
        axes = zip(self.edges, window.scale, window.start, window.size, image, strict=True)
        return [(max(0, -a * scale - b), max(0, z * scale + b + n - m)) for (a, z), scale, b, n, m in axes]

    def _corners(self, window: Window, widths: Sequence[tuple[int, int]]) -> list[Tensor]:
        """First entries ``(P,)`` of all windows in an image that is widened to hold them, for every axis."""
        axes = zip(self.places.unbind(1), window.scale, window.start, widths, strict=True)
        return [place * scale + (start + ahead) for place, scale, start, (ahead, _) in axes]

    def _placed(self, part: Tensor, window: Window, image: tuple[int, ...]) -> Tensor:
        """Coefficients of a window as those of the whole image."""
        widths = self._widths(window, image)
        wide = [n + sum(pair) for n, pair in zip(image, widths, strict=True)]
        at = torch.zeros(len(part), 1, dtype=torch.long, device=part.device)
        for n, size, corner in zip(wide, window.size, self._corners(window, widths), strict=True):
            along = corner[:, None] + torch.arange(size, device=at.device)
            at = (at[:, :, None] * n + along[:, None]).flatten(1)
        whole = part.new_zeros(*part.shape[:3], math.prod(wide))
        whole.scatter_(3, at[:, None, None].expand(*part.shape[:3], -1), part.flatten(3))
        return F.pad(whole.unflatten(3, wide), [-width for pair in reversed(widths) for width in pair])
