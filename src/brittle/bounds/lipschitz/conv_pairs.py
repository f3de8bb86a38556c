"""The product of norms in l_2 with strided convolutions bounded together with the convolution before them.

A stride ends the torus of the recursion of Gram matrices, so that what two convolutions share through the activation
between them is lost there. The bound of the pair keeps it. Theory page, section "Pairs of convolutions".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from brittle.bounds.chain import best_disjoint_pairs
from brittle.bounds.graph.rules import Conv, Op, Slope, users
from brittle.bounds.lipschitz.torus import convolutions
from brittle.bounds.pairs import conv as pair_conv


def paired_factors(ops: Sequence[Op], factors: Sequence[float], steps: int = 0) -> list[float] | None:
    """The operations' l_2 constants with pairs of convolutions sharing theirs; None where there is no pair.

    They belong into the product of the whole network: the factor of a pair's second convolution bounds nothing by
    itself. Convolutions of stride 1 are left to the recursion, which follows them without loss.

    Args:
        ops: The network; shapes must be known.
        factors: Upper bound of every operation's own l_2 constant.
        steps: Steps of optimisation of each pair's multipliers.
    """
    convs, readers = convolutions(ops), users(ops)
    paired, shares, after = list(factors), dict[int, float](), dict[int, int]()
    for number, conv in enumerate(convs):
        if conv is None or max(conv.geometry.stride) == 1:
            continue
        first = _convolution_before(ops, convs, readers, number)
        if first is not None and (product := factors[first] * factors[number]):
            shares[number], after[first] = _pair_bound(ops, convs, (first, number), product, steps) / product, number
    for first in [first for first in after if first not in shares]:
        chain = [number := after[first]]  # pairs in a row, each named by its second convolution
        while number in after:
            chain.append(number := after[number])
        logs = [math.log(shares[number]) if shares[number] else -math.inf for number in chain]
        for pair in best_disjoint_pairs(logs):
            paired[chain[pair]] *= shares[chain[pair]]
    return paired if shares else None


def _convolution_before(
    ops: Sequence[Op], convs: Sequence[Conv | None], readers: Sequence[Sequence[int]], number: int
) -> int | None:
    """The convolution that this one alone reads through an activation of slopes from 0 up; None for anything else."""
    between = ops[number].inputs[0]
    slope = ops[between].rule
    if not isinstance(slope, Slope) or slope.low < 0 or len(readers[between]) > 1:
        return None
    first = ops[between].inputs[0]
    return None if convs[first] is None or len(readers[first]) > 1 else first


def _pair_bound(
    ops: Sequence[Op], convs: Sequence[Conv | None], pair: tuple[int, int], product: float, steps: int
) -> float:
    """Upper bound of two convolutions around an activation, over the activation's largest slope."""
    first, second = pair
    B, C, shape = convs[second], convs[first], ops[ops[first].inputs[0]].shape
    assert B is not None
    assert C is not None
    assert shape is not None
    return min(pair_conv.upper(B.K, B.geometry, C.K, C.geometry, shape[2:], product=product, steps=steps).values())
