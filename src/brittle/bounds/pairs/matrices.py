r"""Adversarial alignment of two consecutive layers: the share of ``||W_2|| ||W_1||`` that an activation can realise.

``A_p = max_D ||W_2 D W_1||_p / (||W_2||_p ||W_1||_p)`` over the activation patterns ``D = diag(d), d in {0, 1}^h``.
It is the factor by which Theorem 3.2 of Barsbey et al. 2025 improves on the product of two norms; theory page,
section "Alignment".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.bounds.pairs import inf as pair_inf
from brittle.bounds.pairs import two as pair_two
from brittle.errors import InputError
from brittle.linear.norms import check_attack_norm, operator_norm
from brittle.linear.spectrum import ROUNDING

EXACT = 1 + 1e-8
"""Margin by which an exact alignment, found up to a relative 1e-9, is raised before it serves as an upper bound."""


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
            ``zero matrix`` or ``exact``; for p = inf also ``half``, ``entry``, ``half entry`` and ``spectral``, for
            p = 2 the names of :func:`brittle.bounds.pairs.two.uppers`.
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

    >>> round(alignment(torch.ones(1, 2), torch.tensor([[1.0], [-1.0]]), torch.inf).upper, 9)
    0.5
    """
    p = check_attack_norm(p)
    W2, W1 = as_chain((W2, W1), ("W2", "W1"))
    (W2, log2), (W1, log1) = normalised(W2, p), normalised(W1, p)
    if -math.inf in (log1, log2):
        return Alignment(p, 0.0, 1.0, 1.0, 1.0 if exact else None, "zero matrix")
    rounding = 1 + ROUNDING * max(*W2.shape, *W1.shape)
    uppers = {"product": 1.0}
    if p == 2:
        low, value = pair_two.lower(W2, W1), pair_two.exact(W2, W1) if exact else None
        uppers |= pair_two.uppers(W2, W1, steps=steps)
    else:
        low, value = pair_inf.lower(W2, W1), pair_inf.exact(W2, W1) if exact else None
        rows = {
            "entry": pair_inf.entry_bounds(W2, W1),
            "half entry": pair_inf.half_entry_bounds(W2, W1),
            "spectral": pair_inf.row_bounds(W2, W1),
        }
        uppers["half"] = (float(operator_norm(W2 @ W1, p)) + 1) / 2 * rounding
        uppers |= {name: float(bounds.max()) * rounding for name, bounds in rows.items()}
    least = min(uppers.values())
    argument = next(name for name, bound in uppers.items() if bound <= least * rounding)
    if value is not None:
        least, argument = min(least, value * EXACT), "exact"
    upper = min(1.0, least)
    return Alignment(
        p, math.exp(log1 + log2), min(low, upper), upper, None if value is None else min(value, upper), argument
    )


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
    return (pair_two if p == 2 else pair_inf).compressed(W2, W1, k2, k1)


def as_chain(matrices: tuple[Tensor, ...], names: tuple[str, ...]) -> list[Tensor]:
    """The matrices in float64 on the CPU, later layers first, after checking that they are finite and compose.

    Args:
        matrices: ``(..., W_2, W_1)``: the columns of each are the rows of the next.
        names: What to call them in an error.
    """
    found: list[Tensor] = []
    for W, name in zip(matrices, names, strict=True):
        if not isinstance(W, Tensor) or W.ndim != 2 or W.numel() == 0 or W.is_complex():
            got = tuple(W.shape) if isinstance(W, Tensor) else type(W).__name__
            raise InputError(f"{name}: expected a real matrix, not empty; got {got}")
        W = W.detach().double().cpu()
        if not torch.isfinite(W).all():
            raise InputError(f"{name}: expected finite numbers; got {int((~torch.isfinite(W)).sum())} NaN or infinite")
        if found and found[-1].shape[1] != len(W):
            raise InputError(f"{name}: expected {found[-1].shape[1]} rows, as the next layer has columns; got {len(W)}")
        found.append(W)
    return found


def normalised(W: Tensor, p: float) -> tuple[Tensor, float]:
    """``W / ||W||_p`` and ``log ||W||_p``; a zero matrix comes back as it is, with minus infinity."""
    largest = W.abs().max()
    if not largest:
        return W, -math.inf
    W = W / largest
    norm = operator_norm(W, p)
    return W / norm, float(norm.log() + largest.log())
