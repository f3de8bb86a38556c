r"""Linear functions of a network's tensors, carried back to its input through relaxed activations.

CROWN (Zhang et al. 2018; Xu et al. 2020), with differences from a clean input in place of biases. Proofs: theory page,
section "Relaxations".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from brittle.bounds.relaxation.interval import Ball, Interval, Network, Reach, activation
from brittle.bounds.relaxation.linear_maps import sum_factor
from brittle.bounds.relaxation.windows import MOST_ENTRIES, Crops, Windows, alike, entries_read, windows_to

Through = Callable[[int, Tensor], Tensor]
"""Number of an activation or max pooling and coefficients of its result, to the coefficients of its input."""


def pull_back(
    network: Network, start: int, rows: Tensor, through: Through, crops: Crops | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Coefficients of linear functions on every tensor that they depend on, from the last to the input.

    Args:
        network: The operations.
        start: Number of the operation whose result the functions read.
        rows: R functions for each of N samples: ``(N, R, *shape)``.
        through: How coefficients pass what is not linear.
        crops: Where the functions read windows of images, these: then each pair of a sample and a place counts as a
            sample, and the shapes are those of the windows.

    Yields:
        Number of an operation and the coefficients of its result ``(N, R, *shape)``.

    Raises:
        NoRule: An operation on the way has no linear relaxation.
    """
    waiting = {start: rows}
    network = network if crops is None else crops.network
    for number in range(start, -1, -1):
        if number not in waiting:
            continue
        g, op = waiting.pop(number), network.ops[number]
        yield number, g
        parts = pull_through(op.rule, op, number, g, network, through)
        del g  # large; not kept while the rest of the network is passed
        for source, part in zip(op.inputs, parts, strict=True):
            part = part if crops is None else crops.fit(part, number, source)
            waiting[source] = waiting[source] + part if source in waiting else part


@singledispatch
def pull_through(rule: object, op: Op, number: int, g: Tensor, network: Network, through: Through) -> Sequence[Tensor]:
    """Coefficients ``(N, R, *shape)`` of all that an operation reads, from those of its result.

    Raises:
        NoRule: It has no linear relaxation.
    """
    raise no_rule(op, "linear relaxation")


@pull_through.register
def _(rule: Input, op: Op, number: int, g: Tensor, network: Network, through: Through) -> Sequence[Tensor]:
    return ()


@pull_through.register
def _(rule: Slope | MaxPool, op: Op, number: int, g: Tensor, network: Network, through: Through) -> Sequence[Tensor]:
    return (through(number, g),)


@pull_through.register
def _(rule: Sum, op: Op, number: int, g: Tensor, network: Network, through: Through) -> Sequence[Tensor]:
    return [g if sign == 1 else -g for sign in rule.signs]


@pull_through.register
def _(rule: Concat, op: Op, number: int, g: Tensor, network: Network, through: Through) -> Sequence[Tensor]:
    axis = rule.axis % (g.ndim - 1)  # an axis of (N, *shape)
    return rule.parts(g, axis + 1, [network.shape(source)[axis - 1] for source in op.inputs])


@pull_through.register
def _(
    rule: Dense | Conv | TransposedConv | Scale | Average | Rearrange | Multiple,
    op: Op, number: int, g: Tensor, network: Network, through: Through,
) -> Sequence[Tensor]:  # fmt: skip
    return (network.maps[number].transpose(g.flatten(0, 1)).unflatten(0, g.shape[:2]),)


def lower_ends(
    network: Network,
    reach: Reach,
    start: int,
    rows: Tensor,
    *,
    slopes: Mapping[int, Tensor] | None = None,
    watched: dict[int, Tensor] | None = None,
    crops: Crops | None = None,
) -> Tensor:
    """Lower bounds of linear functions' differences from the clean input, by CROWN.

    Above an activation lies its chord; below, a line through the kink.

    Args:
        network: The operations.
        reach: The samples.
        start: Number of the operation whose result the functions read.
        rows: ``(N, R, *shape)``.
        slopes: Slopes of the lower lines ``(N, n)``, by number, each between the activation's own two; None: of these
            two whichever leaves the smaller area, which is CROWN's choice.
        watched: Filled with the coefficients ``(N, R, n)`` of the activations' results, by number, and with those of
            the input ``(N, R, *shape)`` at 0.
        crops: Windows that the functions read, as for :func:`pull_back`.

    Returns:
        ``(N, R)``.
    """
    falls: list[Tensor] = []

    def see(number: int, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(value.flatten(1) for value in values) if crops is None else crops.see(number, *values)

    def through(number: int, g: Tensor) -> Tensor:
        """Coefficients behind an activation or a pooling, carried to its input; what they lose is noted."""
        rule, flat = network.ops[number].rule, g.flatten(2)
        negative = flat.clamp_max(0)
        if isinstance(rule, MaxPool):
            pooled = _Pool.of(rule, reach, number)
            excess, rise = see(number, pooled.excess, pooled.rise)
            loose = excess > 0
            falls.append(dot(-negative, rise * loose) * sum_factor(flat))
            moved = torch.where(loose[:, None], flat - negative, flat).view(g.shape)
            place = (pooled.place, pooled.plane) if crops is None else crops.points(number, pooled.place)
            return _place_back(moved, *place)
        if watched is not None:
            watched[number] = flat
        lines = _Lines.of(network, reach, number, None if slopes is None else slopes[number])
        low, steeper, below, above = see(number, lines.low, lines.steeper, lines.below, lines.above)
        falls.append((dot(flat - negative, below) + dot(negative, above)) * sum_factor(flat))
        return (flat * low[:, None]).addcmul_(negative, steeper[:, None]).view(g.shape)

    for number, g in pull_back(network, start, rows, through, crops):
        if number in reach.errors:
            falls.append(rounded(g, *see(number, reach.errors[number])))
        elif number == 0:
            middle, radius = moves(reach.ball if crops is None else crops.ball(reach.ball), g)
            falls.append(radius - middle)
            if watched is not None:
                watched[0] = g
    return -torch.stack(falls).sum(0)


def unit_ends(network: Network, reach: Reach, start: int, units: Tensor) -> Interval:
    """Lower and upper bounds of single entries' differences, given as numbers ``(N, R)`` in the flattened result."""
    windows = windows_to(network, start)
    if any(windows.values()):
        return _ends_by_windows(network, reach, start, units, windows)
    linear = network.maps.get(start)
    if linear is not None and linear.matrix is not None:
        error = reach.errors[start].flatten(1).gather(1, units)
        start, rows = network.ops[start].inputs[0], linear.matrix[units]
    else:
        shape = torch.Size(network.shape(start))
        rows = reach.ball.mid.new_zeros(*units.shape, shape.numel()).scatter_(2, units[..., None], 1.0)
        error, rows = rows.new_zeros(units.shape), rows.unflatten(2, shape)
    low, high = lower_ends(network, reach, start, torch.cat([rows, -rows], 1)).chunk(2, 1)
    return low - error, error - high


def _ends_by_windows(network: Network, reach: Reach, start: int, units: Tensor, windows: Windows) -> Interval:
    """The same where entries read windows: those of a sample at one place have one window, so they share its lines."""
    channels, *image = network.shape(start)
    plane = math.prod(image)
    samples = torch.arange(len(units), device=units.device)[:, None]
    pairs, pair, counts = (samples * plane + units % plane).flatten().unique(return_inverse=True, return_counts=True)
    order = pair.argsort()
    turn = torch.empty_like(pair)
    turn[order] = torch.arange(len(pair), device=pair.device) - (counts.cumsum(0) - counts)[pair[order]]
    channel = pair.new_full((len(pairs), int(counts.max())), channels)  # one too many: a row of zeros
    channel[pair, turn] = (units // plane).flatten()
    places = torch.stack(torch.unravel_index(pairs % plane, image), 1)
    ends = reach.ball.mid.new_zeros(2, *channel.shape)
    widest = max(entries_read(network, windows).values())
    for some in alike(counts, MOST_ENTRIES // (2 * widest)):
        shown = channel[some, : int(counts[some].max())]
        rows = F.one_hot(shown, channels + 1)[..., :channels].to(ends).view(*shown.shape, channels, *(1 for _ in image))
        crops = Crops.of(network, windows, pairs[some] // plane, places[some])
        falls = lower_ends(network, reach, start, torch.cat([rows, -rows], 1), crops=crops)
        ends[:, some, : shown.shape[1]] = falls.unflatten(1, (2, -1)).transpose(0, 1)
    low, high = ends[:, pair, turn].view(2, *units.shape)
    return low, -high


def chord(low: Tensor, high: Tensor, slope: float) -> Tensor:
    """Slope between the ends of an activation's graph over ``[low, high]``; ``slope`` is the one below zero."""
    inside = (activation(high, slope) - activation(low, slope)) / (high - low)
    return torch.where(low >= 0, 1.0, torch.where(high <= 0, slope, inside.clamp(slope, 1.0)))


def steeper(low: Tensor, high: Tensor, slope: float) -> Tensor:
    """Of the two slopes of an activation that which leaves the smaller area below the chord: CROWN's lower line."""
    return torch.where(high > -low, 1.0, slope).to(low)


def offsets(network: Network, reach: Reach, number: int, slope: Tensor) -> Interval:
    """Range (middle, half-width) of an activation's difference minus ``slope`` times its input's difference.

    ``phi(z) - slope z`` is convex with its least value at the kink, so its range follows from both ends and from the
    point of the range nearest to 0.
    """
    kink = network.low(number)
    low, high = reach.flat(number)

    def off(z: Tensor) -> Tensor:
        return activation(z, kink) - slope * z

    top, bottom = torch.maximum(off(low), off(high)), off(torch.zeros_like(low).clamp(low, high))
    return (top + bottom) / 2 - off(reach.inputs[number].flatten(1)), (top - bottom) / 2


def gaps(network: Network, reach: Reach, number: int) -> Tensor:
    """How far the chord lies above an activation at its kink, ``(N, n)``."""
    kink = network.low(number)
    low, high = reach.flat(number)
    inside = (low < 0) & (high > 0)
    return torch.where(inside, activation(high, kink) - chord(low, high, kink) * high, 0.0)


@dataclass(frozen=True, eq=False)
class _Lines:
    """Lines below and above an activation over each range, and their gaps at the clean value; all ``(N, n)``.

    Attributes:
        low: Slope of the lower line.
        steeper: Slope of the upper line minus that of the lower.
        below: Clean value minus the lower line, at least 0.
        above: Clean value minus the upper line, at most 0.
    """

    low: Tensor
    steeper: Tensor
    below: Tensor
    above: Tensor

    @staticmethod
    def of(network: Network, reach: Reach, number: int, slope: Tensor | None) -> _Lines:
        """Read off the ranges; ``slope`` is the lower line's where the range lies on both sides of the kink."""
        kink = network.low(number)
        low, high = reach.flat(number)
        z = reach.inputs[number].flatten(1)
        upper = chord(low, high, kink)
        inside = steeper(low, high, kink) if slope is None else slope
        lower = torch.where(low >= 0, 1.0, torch.where(high <= 0, kink, inside))
        top = torch.maximum(activation(low, kink) - upper * low, activation(high, kink) - upper * high)
        value = activation(z, kink)
        below, above = (value - lower * z).clamp_min(0), (value - (upper * z + top)).clamp_max(0)
        return _Lines(lower, upper - lower, below, above)


@dataclass(frozen=True, eq=False)
class _Pool:
    """Max pooling around clean values, i the entry that is largest there: between ``x_i`` and what any can reach.

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
    def of(rule: MaxPool, reach: Reach, number: int) -> _Pool:
        """Read off the ranges of the inputs."""
        z, (low, high) = reach.inputs[number], reach.ranges[number]
        m, pool = rule.run, (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rule.axes - 1]
        assert isinstance(m, nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d)
        top, place = pool(z, m.kernel_size, m.stride, m.padding, m.dilation, ceil_mode=m.ceil_mode, return_indices=True)
        place = place.flatten(2)
        others = high
        if rule.overlap == 1:  # every entry in one window: leave i out
            others = high.flatten(2).scatter(2, place, -torch.inf).view_as(high)
        excess = rule.run(others).flatten(2) - low.flatten(2).gather(2, place)
        rise = (rule.run(high) - top).flatten(1)
        return _Pool(place, tuple(z.shape[2:]), excess.clamp_min(0).flatten(1), rise.clamp_min(0))


def _place_back(g: Tensor, place: Tensor, plane: tuple[int, ...]) -> Tensor:
    """Coefficients ``(N, R, C, *windows)`` of single entries, from their places as coefficients of the whole plane."""
    flat = g.flatten(3)
    places = place.view(len(g), 1, *flat.shape[2:]).expand_as(flat)
    return flat.new_zeros(*flat.shape[:3], math.prod(plane)).scatter_add_(3, places, flat).unflatten(3, plane)


def moves(ball: Ball, g: Tensor) -> Interval:
    """Middle and half-width of ``<g, d>`` over the ball, ``(N, R)``."""
    flat = g.flatten(2)
    if ball.length is not None:
        radius = torch.linalg.vector_norm(flat, dim=2) * ball.length[:, None]
        return torch.zeros_like(radius), radius * sum_factor(flat)
    return dot(flat, ball.mid.flatten(1)), dot(flat.abs(), ball.rad.flatten(1)) * sum_factor(flat)


def dot(rows: Tensor, values: Tensor) -> Tensor:
    """``(N, R, n)`` with ``(N, n)`` to ``(N, R)``."""
    return torch.bmm(values[:, None], rows.mT)[:, 0]  # many times faster than a product with a column


def rounded(g: Tensor, errors: Tensor) -> Tensor:
    """What the rounding of a result ``(N, *shape)`` takes from functions of it."""
    flat = g.flatten(2)
    return dot(flat.abs(), errors.flatten(1)) * sum_factor(flat)
