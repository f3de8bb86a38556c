r"""Ranges of a dense layer's units from parallel lines, flat around every earlier unit that matters little.

Any slope is valid, and with slope 0 a unit drops out of all further products. So a product of small matrices bounds
both ends of an entry, where CROWN takes two products of whole ones. Proof: theory page, section "Relaxations".
"""

from __future__ import annotations

import torch
from torch import Tensor

from brittle.bounds.graph.rules import Slope
from brittle.bounds.relaxation.crown import chord, dot, moves, offsets, pull_back, rounded
from brittle.bounds.relaxation.interval import Interval, Network, Reach, is_curved
from brittle.bounds.relaxation.linear_maps import sum_factor

MOST_ADDED = 0.02
"""What flat lines may add to the ranges of an earlier layer's results, as a share of what they would add alone."""
MOST_ENTRIES = 2**20
"""Entries of the largest tensor of coefficients: small ones stay in the processor's caches."""


def dense_chain(network: Network, target: int) -> list[int]:
    """The ReLUs before an activation, last first, where dense layers alone stand between them; else none.

    What lies before the first of these dense layers is linear.
    """
    source, chain = network.ops[target].inputs[0], list[int]()
    while _matrix(network, source) is not None and isinstance(network.ops[network.ops[source].inputs[0]].rule, Slope):
        chain.append(network.ops[source].inputs[0])
        source = network.ops[chain[-1]].inputs[0]
    dense = _matrix(network, source) is not None and all(network.low(number) == 0 for number in chain)
    return chain if dense and not any(is_curved(op.rule, op) for op in network.ops[:source]) else []


def flattened_ends(network: Network, reach: Reach, target: int, units: Tensor) -> Interval:
    """Lower and upper bounds of the differences of an activation's input, of entries given by number ``(N, R)``.

    Args:
        network: The operations, with a dense chain before the activation.
        reach: The samples.
        target: Number of the activation.
        units: Numbers of entries.

    Returns:
        Two tensors ``(N, R)``.
    """
    needed = _needed(_loss(network, reach, dense_chain(network, target)[0]))
    ends = reach.ball.mid.new_empty(2, *units.shape)
    rows, widest = max(units.shape[1], int(needed.max())), max(network.size(number) for number in range(target))
    for part in needed.argsort().split(max(1, MOST_ENTRIES // (rows * widest))):
        ends[:, part] = torch.stack(_ends(network, reach.at(part), target, units[part]))
    return ends[0], ends[1]


def _ends(network: Network, reach: Reach, target: int, units: Tensor) -> Interval:
    """The same, of samples that need about as many units."""
    dense = network.ops[target].inputs[0]
    matrix = _matrix(network, dense)
    assert matrix is not None
    g, rad = matrix[units], reach.errors[dense].flatten(1).gather(1, units)
    mid = torch.zeros_like(rad)
    for number in dense_chain(network, target):
        dense = network.ops[number].inputs[0]
        matrix = _matrix(network, dense)
        assert matrix is not None
        slope, kept = _steep(network, reach, number)
        middle, radius = offsets(network, reach, number, slope)
        radius = radius + reach.errors[number].flatten(1) + slope * reach.errors[dense].flatten(1)
        mid, rad = mid + dot(g, middle), rad + dot(g.abs(), radius) * sum_factor(g)
        few = g.gather(2, kept[:, None].expand(-1, g.shape[1], -1)) * slope.gather(1, kept)[:, None]
        g = torch.bmm(few, matrix[kept])

    def through(number: int, g: Tensor) -> Tensor:
        raise AssertionError("nothing is curved before a dense chain")

    start = network.ops[dense].inputs[0]
    for number, coefficients in pull_back(network, start, g.unflatten(2, network.shape(start)), through):
        if number in reach.errors:
            rad = rad + rounded(coefficients, reach.errors[number])
        elif number == 0:
            middle, radius = moves(reach.ball, coefficients)
            mid, rad = mid + middle, rad + radius
    return mid - rad, mid + rad


def _matrix(network: Network, number: int) -> Tensor | None:
    """The matrix of an operation that is a dense layer on vectors."""
    return network.maps[number].matrix if number in network.maps else None


def _steep(network: Network, reach: Reach, number: int) -> tuple[Tensor, Tensor]:
    """Slopes ``(N, n)``, a chord's where it matters and 0 elsewhere, and the places ``(N, k)`` of the former."""
    loss = _loss(network, reach, number)
    needed = _needed(loss)[:, None]
    most = int(needed.max())
    kept = loss.topk(most, dim=1).indices
    steep = chord(*reach.flat(number), 0.0).gather(1, kept) * (torch.arange(most, device=kept.device) < needed)
    return torch.zeros_like(loss).scatter(1, kept, steep), kept


def _loss(network: Network, reach: Reach, number: int) -> Tensor:
    """By how much a flat line around every unit would widen its range, against a parallel to the chord, ``(N, n)``."""
    slope = chord(*reach.flat(number), 0.0)
    flat, steep = (offsets(network, reach, number, s)[1] for s in (torch.zeros_like(slope), slope))
    return (flat - steep).clamp_min(0)


def _needed(loss: Tensor) -> Tensor:
    """How many units of every sample need a slope, so that no more than ``MOST_ADDED`` is added, ``(N,)``."""
    left = loss.sum(1, keepdim=True) - loss.sort(dim=1, descending=True).values.cumsum(1)
    return (left > MOST_ADDED * loss.sum(1, keepdim=True)).sum(1) + 1
