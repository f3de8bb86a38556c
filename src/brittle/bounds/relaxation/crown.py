r"""Linear functions of a network's tensors, carried back to its input through relaxed activations.

CROWN (Zhang et al. 2018; Xu et al. 2020), with differences from a clean input in place of biases. Proofs: theory page,
section "Relaxations".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.bounds.graph.rules import Concat, Input, MaxPool, Slope, Sum
from brittle.bounds.relaxation.interval import Ball, Interval, Network, Reach, activation
from brittle.bounds.relaxation.linear_maps import sum_factor
from brittle.bounds.relaxation.pooling import Pooled

Through = Callable[[int, Tensor], Tensor]
"""Number of an activation or max pooling and coefficients of its result, to the coefficients of its input."""


def pull_back(network: Network, start: int, rows: Tensor, through: Through) -> Iterator[tuple[int, Tensor]]:
    """Coefficients of linear functions on every tensor that they depend on, from the last to the input.

    Args:
        network: The operations.
        start: Number of the operation whose result the functions read.
        rows: R functions for each of N samples: ``(N, R, *shape)``.
        through: How coefficients pass what is not linear.

    Yields:
        Number of an operation and the coefficients of its result ``(N, R, *shape)``.
    """
    waiting = {start: rows}
    for number in range(start, -1, -1):
        if number not in waiting:
            continue
        g, op = waiting.pop(number), network.ops[number]
        yield number, g
        if isinstance(op.rule, Input):
            continue
        if isinstance(op.rule, Slope | MaxPool):
            parts = [through(number, g)]
        elif isinstance(op.rule, Sum):
            parts = [g if sign == 1 else -g for sign in op.rule.signs]
        elif isinstance(op.rule, Concat):
            axis = op.rule.axis % (g.ndim - 1)  # an axis of (N, *shape)
            parts = list(g.split([network.shape(source)[axis - 1] for source in op.inputs], axis + 1))
        else:
            parts = [network.maps[number].transpose(g.flatten(0, 1)).unflatten(0, g.shape[:2])]
        del g
        for source, part in zip(op.inputs, parts, strict=True):
            waiting[source] = waiting[source] + part if source in waiting else part


def lower_ends(
    network: Network, reach: Reach, start: int, rows: Tensor, watched: dict[int, Tensor] | None = None
) -> Tensor:
    """Lower bounds of linear functions' differences from the clean input, by CROWN.

    Above an activation lies its chord; below, the line of slope 1 or of the slope below zero, whichever leaves the
    smaller area.

    Args:
        network: The operations.
        reach: The samples.
        start: Number of the operation whose result the functions read.
        rows: ``(N, R, *shape)``.
        watched: Filled with the coefficients ``(N, R, n)`` of the activations' results, by number.

    Returns:
        ``(N, R)``.
    """
    falls: list[Tensor] = []

    def through(number: int, g: Tensor) -> Tensor:
        rule, flat = network.ops[number].rule, g.flatten(2)
        negative = flat.clamp_max(0)
        if isinstance(rule, MaxPool):
            pooled = Pooled.of(rule, reach, number)
            loose = (pooled.excess > 0)[:, None]
            falls.append(_dot(-negative, pooled.rise * loose[:, 0]) * _sum_factor(flat))
            return pooled.spread(torch.where(loose, flat - negative, flat).view(g.shape))
        if watched is not None:
            watched[number] = flat
        lines = _Lines.of(network, reach, number)
        fall = _dot(flat - negative, lines.below) + _dot(negative, lines.above)
        falls.append(fall * _sum_factor(flat))
        return (flat * lines.low[:, None]).addcmul_(negative, lines.steeper[:, None]).view(g.shape)

    for number, g in pull_back(network, start, rows, through):
        if number in reach.errors:
            falls.append(_absolute(g) * reach.errors[number][:, None])
        elif number == 0:
            middle, radius = _moves(reach.ball, g)
            falls.append(radius - middle)
    return -torch.stack(falls).sum(0)


def both_ends(network: Network, reach: Reach, start: int, rows: Tensor) -> Interval:
    """Lower and upper bounds of linear functions' differences, with parallel lines around every activation.

    Looser than :func:`lower_ends` for both signs, for half of its cost.

    Args:
        network: The operations.
        reach: The samples.
        start: Number of the operation whose result the functions read.
        rows: ``(N, R, *shape)``.

    Returns:
        Two tensors ``(N, R)``.
    """
    middles: list[Tensor] = []
    radii: list[Tensor] = []

    def through(number: int, g: Tensor) -> Tensor:
        rule, flat = network.ops[number].rule, g.flatten(2)
        if isinstance(rule, MaxPool):
            pooled = Pooled.of(rule, reach, number)
            middles.append(_dot(flat, pooled.excess / 2))
            radii.append(_dot(flat.abs(), pooled.excess / 2) * _sum_factor(flat))
            return pooled.spread(g)
        slope = chord(*_flat(reach.ranges[number]), network.low(number))
        middle, radius = offsets(network, reach, number, slope)
        middles.append(_dot(flat, middle))
        radii.append(_dot(flat.abs(), radius) * _sum_factor(flat))
        return (flat * slope[:, None]).view(g.shape)

    for number, g in pull_back(network, start, rows, through):
        if number in reach.errors:
            radii.append(_absolute(g) * reach.errors[number][:, None])
        elif number == 0:
            middle, radius = _moves(reach.ball, g)
            middles.append(middle)
            radii.append(radius)
    mid, rad = torch.stack(middles).sum(0), torch.stack(radii).sum(0)
    return mid - rad, mid + rad


def unit_ends(network: Network, reach: Reach, start: int, units: Tensor) -> Interval:
    """:func:`both_ends` of single entries of a result, given as numbers ``(N, R)`` within the flattened sample."""
    own = network.maps.get(start)
    if own is not None and own.matrix is not None:
        low, high = both_ends(network, reach, network.ops[start].inputs[0], own.matrix[units])
        error = reach.errors[start][:, None]
        return low - error, high + error
    shape = torch.Size(network.shape(start))
    rows = reach.ball.mid.new_zeros(*units.shape, shape.numel()).scatter_(2, units[..., None], 1.0)
    return both_ends(network, reach, start, rows.unflatten(2, shape))


def chord(low: Tensor, high: Tensor, slope: float) -> Tensor:
    """Slope between the ends of an activation's graph over ``[low, high]``; ``slope`` is the one below zero."""
    inside = (activation(high, slope) - activation(low, slope)) / (high - low)
    return torch.where(low >= 0, 1.0, torch.where(high <= 0, slope, inside.clamp(slope, 1.0)))


def offsets(network: Network, reach: Reach, number: int, slope: Tensor) -> Interval:
    """Range (middle, half-width) of an activation's difference minus ``slope`` times its input's difference.

    ``phi(z) - slope z`` is convex with its least value at the kink, so its range follows from both ends and from the
    point of the range nearest to 0.
    """
    kink = network.low(number)
    low, high = _flat(reach.ranges[number])

    def off(z: Tensor) -> Tensor:
        return activation(z, kink) - slope * z

    top, bottom = torch.maximum(off(low), off(high)), off(torch.zeros_like(low).clamp(low, high))
    return (top + bottom) / 2 - off(reach.inputs[number].flatten(1)), (top - bottom) / 2


def gaps(network: Network, reach: Reach, number: int) -> Tensor:
    """How far the chord lies above an activation at its kink, ``(N, n)``."""
    kink = network.low(number)
    low, high = _flat(reach.ranges[number])
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
    def of(network: Network, reach: Reach, number: int) -> _Lines:
        kink = network.low(number)
        low, high = _flat(reach.ranges[number])
        z = reach.inputs[number].flatten(1)
        upper = chord(low, high, kink)
        lower = torch.where((low >= 0) | ((high > 0) & (high > -low)), torch.ones_like(low), kink)
        top = torch.maximum(activation(low, kink) - upper * low, activation(high, kink) - upper * high)
        value = activation(z, kink)
        below, above = (value - lower * z).clamp_min(0), (value - (upper * z + top)).clamp_max(0)
        return _Lines(lower, upper - lower, below, above)


def _flat(ends: Interval) -> Interval:
    return ends[0].flatten(1), ends[1].flatten(1)


def _moves(ball: Ball, g: Tensor) -> Interval:
    """Middle and half-width of ``<g, d>`` over the ball, ``(N, R)``."""
    flat = g.flatten(2)
    if ball.length is not None:
        radius = torch.linalg.vector_norm(flat, dim=2) * ball.length
        return torch.zeros_like(radius), radius * _sum_factor(flat)
    return _dot(flat, ball.mid.flatten(1)), _dot(flat.abs(), ball.rad.flatten(1)) * _sum_factor(flat)


def _dot(rows: Tensor, values: Tensor) -> Tensor:
    """``(N, R, n)`` with ``(N, n)`` to ``(N, R)``."""
    return torch.bmm(rows, values[..., None])[..., 0]


def _absolute(g: Tensor) -> Tensor:
    flat = g.flatten(2)
    return torch.linalg.vector_norm(flat, ord=1, dim=2) * _sum_factor(flat)


def _sum_factor(flat: Tensor) -> float:
    return sum_factor(flat.shape[-1], flat)
