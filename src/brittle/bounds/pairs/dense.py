r"""Adversarial alignment of two consecutive layers: the share of ``||W_2|| ||W_1||`` that an activation can realise.

``A_p = max_D ||W_2 D W_1||_p / (||W_2||_p ||W_1||_p)`` over the activation patterns ``D = diag(d), d in {0, 1}^h``.
It is the factor by which Theorem 3.2 of Barsbey et al. 2025 improves on the product of two norms; theory page,
section "Alignment".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from brittle.bounds.pairs import inf as pair_inf
from brittle.bounds.pairs import two as pair_two
from brittle.bounds.pairs.matrices import SEARCH_TOLERANCE, as_chain, normalise
from brittle.linear.norms import check_attack_norm
from brittle.linear.spectrum import raised


@dataclass(frozen=True)
class Alignment:
    """How far two consecutive layers stretch the same directions: ``lower <= A_p <= upper``, all in [0, 1].

    Attributes:
        p: The norm on both sides: 2 or inf.
        scale: ``||W_2||_p ||W_1||_p``; times it, the other numbers bound ``max_D ||W_2 D W_1||_p``.
        lower: Attained by a pattern, so a lower bound of the maximum over patterns. It is an estimate only of what
            the two layers do in a network: no input may have that pattern.
        upper: Certified upper bound.
        exact: The alignment itself, up to rounding; None when it was not asked for or is out of reach.
        argument: What attained the upper bound, the simplest of equals: ``product`` (no better than the norms),
            ``zero matrix``, ``exact``, or a name of :func:`brittle.bounds.pairs.two.upper` (p = 2) or
            :func:`brittle.bounds.pairs.inf.upper` (p = inf).
    """

    p: float
    scale: float
    lower: float
    upper: float
    exact: float | None
    argument: str


def alignment(W2: Tensor, W1: Tensor, p: float, *, exact: bool = False, steps: int = 0) -> Alignment:
    r"""The alignment of two layers with an activation of slopes in [0, 1] between them.

    For p = 2 this is ``A_2^(1,1)``, of the two whole matrices; the alignments that share each layer's spectrum
    between its two neighbours belong to a chain, see :func:`brittle.bounds.chain.chain_bounds`.

    Args:
        W2: Later layer ``(m, h)``.
        W1: Earlier layer ``(h, n)``.
        p: 2 or inf.
        exact: Whether to search for the exact value too; it comes back as None for large h.
        steps: Steps of optimisation of the multipliers (p = 2); 0 takes the best closed form.

    Returns:
        Lower estimate, certified upper bound and, if asked for, the exact value. A zero matrix has alignment 1 by
        convention (it multiplies a scale of 0).

    Raises:
        InputError: ``p`` is another number, a matrix is not finite, or the shapes do not chain.

    >>> import torch
    >>> round(alignment(torch.ones(1, 2), torch.tensor([[1.0], [-1.0]]), torch.inf).upper, 9)
    0.5
    """
    p = check_attack_norm(p)
    W2, W1 = as_chain((W2, W1), ("W2", "W1"))
    (W2, log2), (W1, log1) = normalise(W2, p), normalise(W1, p)
    if -math.inf in (log1, log2):
        return Alignment(p, 0.0, 1.0, 1.0, 1.0 if exact else None, "zero matrix")
    pairs = pair_two if p == 2 else pair_inf
    lower, maximum = pairs.lower(W2, W1), pairs.exact(W2, W1) if exact else None
    bounds = {"product": 1.0} | (pair_two.upper(W2, W1, steps=steps) if p == 2 else pair_inf.upper(W2, W1))
    least = min(bounds.values())
    argument = next(name for name, bound in bounds.items() if bound <= raised(least, max(*W2.shape, *W1.shape)))
    if maximum is not None:  # ten times what a search may miss
        least, argument = min(least, maximum * (1 + 10 * SEARCH_TOLERANCE)), "exact"
    upper = min(1.0, least)
    exact_value = None if maximum is None else min(maximum, upper)
    return Alignment(p, math.exp(log1 + log2), min(lower, upper), upper, exact_value, argument)


def compressed_alignment(W2: Tensor, W1: Tensor, p: float, k2: int, k1: int) -> tuple[float, float]:
    """Upper bounds of an alignment from compressed layers and a remainder, as in Barsbey et al. 2025, Theorem 3.2.

    p = inf: of ``A_inf``, with the rows of largest l1 norm kept. p = 2: of ``A_2^(1/2,1/2)``, with the largest
    singular values kept. The alignment of the kept parts is itself a certified upper bound. :func:`alignment` and
    :func:`brittle.bounds.chain.chain_bounds` bound the whole matrices, where no remainder is needed.

    Args:
        W2: Later layer ``(m, h)``.
        W1: Earlier layer ``(h, n)``.
        p: 2 or inf.
        k2: Rows or singular values of W2 kept.
        k1: The same of W1.

    Returns:
        (with the paper's remainder, corrected and clipped at 1; sharper form), both in [0, 1].

    Raises:
        InputError: As for :func:`alignment`, or ``k2`` or ``k1`` out of range.
    """
    p = check_attack_norm(p)
    W2, W1 = as_chain((W2, W1), ("W2", "W1"))
    return (pair_two if p == 2 else pair_inf).upper_of_compressed(W2, W1, k2, k1)
