r"""Ranges of hidden layers from slopes that do not depend on the sample.

Around any activation lie two parallel lines of any slope, so groups of similar samples can share their slopes. Then
the matrix of a whole stretch of the network is composed once for a group, and every sample pays for two products with
it. Proof: theory page, section "Relaxations".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.bounds.graph.rules import Op, Slope
from brittle.bounds.relaxation.crown import offsets, pull_back
from brittle.bounds.relaxation.interval import Interval, Network, Reach, is_curved
from brittle.bounds.relaxation.linear_maps import sum_factor

MOST_ENTRIES = 2**25
"""Entries that the composed matrices of all groups may have together."""


@dataclass(frozen=True, eq=False)
class Stretch:
    """Everything from the input to one activation, with the slopes of one group.

    Attributes:
        target: Number of the activation; its input is what the stretch ends in.
        source: From the input of the network, ``(n, inputs)``.
        slopes: Slope of every activation on the way, by number.
        inner: From the result of every activation on the way, ``(n, n_j)``, by number.
        sums: l_1 norms of the rows from the results of rounding operations, ``(n,)``, by number.
    """

    target: int
    source: Tensor
    slopes: dict[int, Tensor]
    inner: dict[int, Tensor]
    sums: dict[int, Tensor]

    @staticmethod
    def compose(network: Network, target: int, slopes: dict[int, Tensor]) -> Stretch:
        """The stretch to an activation, from the slopes of all activations by number."""
        start = network.ops[target].inputs[0]
        width = network.size(start)
        like = next(iter(slopes.values()))
        rows = torch.eye(width, dtype=like.dtype, device=like.device).view(1, width, *network.shape(start))
        inner: dict[int, Tensor] = {}
        sums: dict[int, Tensor] = {}
        source = rows[0]

        def pass_activation(number: int, g: Tensor) -> Tensor:
            inner[number] = g[0].flatten(1)
            return (g.flatten(2) * slopes[number]).view(g.shape)

        for number, g in pull_back(network, start, rows, pass_activation):
            if number == 0:
                source = g[0].flatten(1)
            elif network.rounds(number):
                flat = g[0].flatten(1)
                sums[number] = torch.linalg.vector_norm(flat, ord=1, dim=1) * sum_factor(flat)
        return Stretch(target, source, {number: slopes[number] for number in inner}, inner, sums)

    def ends(self, network: Network, reach: Reach) -> Interval:
        """Lower and upper ends of the activation's input, ``(N, n)``."""
        ball, mid = reach.ball, reach.inputs[self.target].flatten(1)
        grow = sum_factor(self.source)
        if ball.length is None:
            mid = mid + ball.mid.flatten(1) @ self.source.mT
            rad = ball.rad.flatten(1) @ self.source.abs().mT * grow
        else:
            rad = ball.length[:, None] * torch.linalg.vector_norm(self.source, dim=1) * grow
        for number, matrix in self.inner.items():
            middle, radius = offsets(network, reach, number, self.slopes[number])
            mid = mid + middle @ matrix.mT
            rad = rad + radius @ matrix.abs().mT * sum_factor(matrix)
        for number, sums in self.sums.items():
            rad = rad + reach.errors[number].flatten(1).amax(1, keepdim=True) * sums
        return mid - rad, mid + rad


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups of samples with similar patterns of active units.

    Attributes:
        watched: Numbers of the activations whose patterns are compared.
        centres: Shares of the group's samples for which a unit is active, ``(G, units)``.
        stretches: For every group the stretches to all hidden activations but the first, in order.
    """

    watched: tuple[int, ...]
    centres: Tensor
    stretches: tuple[tuple[Stretch, ...], ...]

    def nearest(self, inputs: dict[int, Tensor]) -> Tensor:
        """The group of every sample ``(N,)``, from the clean inputs of the activations."""
        return _nearest(_patterns(inputs, self.watched), self.centres)


def targets(network: Network) -> list[int]:
    """Activations whose ranges gain from relaxation: those behind another one, or behind a max pooling."""
    behind: set[int] = set()
    gaining = []
    for number, op in enumerate(network.ops):
        relaxed_before = any(source in behind for source in op.inputs)
        if is_curved(op.rule, op) or relaxed_before:
            behind.add(number)
        if relaxed_before and isinstance(op.rule, Slope):
            gaining.append(number)
    return gaining


def group(network: Network, inputs: dict[int, Tensor], most: int) -> Groups | None:
    """Group examples and compose every group's matrices.

    Args:
        network: The operations.
        inputs: Clean inputs of the activations at some examples, by number.
        most: Largest number of groups; fewer where the matrices would get too large.

    Returns:
        The groups, or None where there is nothing to gain or the network is too large.
    """
    gaining = targets(network)
    entries, watched = 0, set()
    for target in gaining:
        curved = [k for k in _before(network.ops, target) if is_curved(network.ops[k].rule, network.ops[k])]
        if not all(isinstance(network.ops[k].rule, Slope) for k in curved):  # max pooling has no slope to share
            return None
        watched.update(curved)
        width = network.size(network.ops[target].inputs[0])
        entries += width * (network.size(0) + sum(network.size(k) for k in curved))
    count = min(most, len(next(iter(inputs.values()))) if inputs else 0, MOST_ENTRIES // max(entries, 1))
    if not gaining or count < 1:
        return None
    order = tuple(sorted(watched))
    patterns = _patterns(inputs, order)
    # Cut down to rows, not rounded as elsewhere: other first centres would move every certificate a little.
    centres = patterns[torch.linspace(0, len(patterns) - 1, count).long().to(patterns.device)]
    for _ in range(4):  # Lloyd's algorithm; a group that loses all its samples keeps its centre
        of = _nearest(patterns, centres)
        sums = torch.zeros_like(centres).index_add_(0, of, patterns)
        sizes = torch.bincount(of, minlength=count)[:, None]
        centres = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
    widths = [network.size(k) for k in order]
    stretches = []
    for centre in centres:
        shares = dict(zip(order, centre.split(widths), strict=True))
        slopes = {k: network.low(k) + (1 - network.low(k)) * share for k, share in shares.items()}
        stretches.append(tuple(Stretch.compose(network, target, slopes) for target in gaining))
    return Groups(order, centres, tuple(stretches))


def _patterns(inputs: dict[int, Tensor], watched: tuple[int, ...]) -> Tensor:
    return torch.cat([(inputs[number] > 0).flatten(1).to(inputs[number].dtype) for number in watched], dim=1)


def _nearest(patterns: Tensor, centres: Tensor) -> Tensor:
    """Least squared distance, up to what is the same for all centres; of equal ones the first."""
    return (centres.square().sum(1) - 2 * patterns @ centres.mT).argmin(1)


def _before(ops: tuple[Op, ...], target: int) -> set[int]:
    """Numbers of all operations that one depends on."""
    before: set[int] = set()
    waiting = list(ops[target].inputs)
    while waiting:
        number = waiting.pop()
        if number not in before:
            before.add(number)
            waiting += ops[number].inputs
    return before
