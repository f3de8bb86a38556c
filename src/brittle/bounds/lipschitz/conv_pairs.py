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

PAIRS_SHARE = 0.002
"""Multiplications of one decomposition of all pairs' symbols, over those of the recursion: as bounding a pair takes
some 25 times as many, real ones, the pairs then take about a twentieth of the recursion's time."""
LEAST_MULTIPLICATIONS = 1e7
"""What one pair may always cost: about a tenth of a second."""


def paired_factors(
    ops: Sequence[Op], factors: Sequence[float], spent: float = math.inf, steps: int = 0
) -> list[float] | None:
    """The operations' l_2 constants with pairs of convolutions sharing theirs; None where no pair gains.

    They belong into the product of the whole network: the factor of a pair's second convolution bounds nothing by
    itself. Convolutions of stride 1 are left to the recursion, which follows them without loss.

    Args:
        ops: The network; shapes must be known.
        factors: Upper bound of every operation's own l_2 constant.
        spent: Real multiplications of the recursion: pairs that would cost more than a small share keep their product.
        steps: Steps of optimisation of each pair's multipliers.
    """
    convs, readers = convolutions(ops), users(ops)
    after: dict[int, int] = {}  # the second convolution of a pair by its first
    for number, conv in enumerate(convs):
        if conv is None or max(conv.geometry.stride) == 1:
            continue
        # The second convolution alone reads the first, through an activation of slopes from 0 up.
        between = ops[number].inputs[0]
        slope = ops[between].rule
        if not isinstance(slope, Slope) or slope.low < 0 or len(readers[between]) > 1:
            continue
        first = ops[between].inputs[0]
        if convs[first] is not None and len(readers[first]) == 1 and factors[first] * factors[number]:
            after[first] = number
    if not after:
        return None
    most = min(max(PAIRS_SHARE * spent / len(after), LEAST_MULTIPLICATIONS), pair_conv.MOST_MULTIPLICATIONS)
    shares = {number: _share(ops, convs, (first, number), factors, steps, most) for first, number in after.items()}
    if not any(share < 1 for share in shares.values()):
        return None
    paired = list(factors)
    for first in [first for first in after if first not in shares]:
        chain = [number := after[first]]  # pairs in a row, each named by its second convolution
        while number in after:
            chain.append(number := after[number])
        logs = [math.log(shares[number]) if shares[number] else -math.inf for number in chain]
        for pair in best_disjoint_pairs(logs):
            paired[chain[pair]] *= shares[chain[pair]]
    return paired


def _share(
    ops: Sequence[Op],
    convs: Sequence[Conv | None],
    pair: tuple[int, int],
    factors: Sequence[float],
    steps: int,
    most: float,
) -> float:
    """Upper bound of two convolutions around an activation, over its largest slope and the product of their norms."""
    first, second = pair
    B, C, shape = convs[second], convs[first], ops[ops[first].inputs[0]].shape
    product = factors[first] * factors[second]
    assert B is not None
    assert C is not None
    assert shape is not None
    bounds = pair_conv.upper(B.K, B.geometry, C.K, C.geometry, shape[2:], product=product, steps=steps, most=most)
    return min(bounds.values()) / product
