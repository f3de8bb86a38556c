"""Matrices that chain, checked, in float64, and scaled so that products neither overflow nor vanish."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from brittle.bounds.pairs.multipliers import Slopes
from brittle.errors import InputError
from brittle.linear.norms import operator_norm

RELU: Slopes = (0.0, 1.0)

SEARCH_TOLERANCE = 1e-9
"""Relative gain below which a search for a maximum stops: to so much are exact values exact."""


class Pair(NamedTuple):
    """Two matrices around an activation, each over its largest magnitude.

    Attributes:
        B: The later matrix, ``(m, h)``.
        C: The earlier one, ``(h, n)``.
        scale: The product of what they were divided by.
        slopes: ``(alpha, gamma)`` of the activation.
    """

    B: Tensor
    C: Tensor
    scale: float
    slopes: Slopes

    @property
    def middle(self) -> float:
        """Magnitude of the slope in the middle."""
        return abs(sum(self.slopes)) / 2

    @property
    def radius(self) -> float:
        """How far a slope may lie from the middle."""
        return (self.slopes[1] - self.slopes[0]) / 2

    @property
    def magnitudes(self) -> Tensor:
        """Bounds of the l_1 norms of the rows of ``B D C`` for slopes in [-1, 1]: ``|B| |C| 1``."""
        return self.B.abs() @ self.C.abs().sum(1)

    def alive(self) -> Pair:
        """The pair without units that have a zero column in B or a zero row in C: they contribute nothing."""
        units = self.B.any(0) & self.C.any(1)
        return self if bool(units.all()) else self._replace(B=self.B[:, units], C=self.C[units])

    def used(self) -> Pair:
        """The pair without units and inputs that contribute nothing."""
        pair = self.alive()
        return pair._replace(C=pair.C[:, pair.C.any(0)])

    def without_tall_sides(self) -> Pair:
        """The triangular factor of a side that exceeds the number of units: it has the same norms, and is small."""
        B, C, h = self.B, self.C, len(self.C)
        B = torch.linalg.qr(B, mode="r").R.contiguous() if len(B) > h else B
        C = torch.linalg.qr(C.mT, mode="r").R.mT.contiguous() if C.shape[1] > h else C
        return self._replace(B=B, C=C)


def pair_of(B: Tensor, C: Tensor, slopes: Slopes = RELU) -> Pair:
    """Two matrices and the slopes between them, after checks.

    Raises:
        InputError: The matrices do not chain, or one is empty, complex or not finite; slopes that are not two finite
            numbers, the smaller first.
    """
    B, C = as_chain((B, C), ("B", "C"))
    if not -math.inf < slopes[0] <= slopes[1] < math.inf:
        raise InputError(f"slopes: expected (alpha, gamma) with alpha <= gamma, both finite; got {slopes}")
    b, c = (float(W.abs().max()) for W in (B, C))
    return Pair(B / (b or 1), C / (c or 1), b * c, slopes)


def as_chain(matrices: tuple[Tensor, ...], names: tuple[str, ...]) -> list[Tensor]:
    """The matrices in float64 on the CPU, later layers first, after checking that they are finite and compose.

    Args:
        matrices: ``(..., W_2, W_1)``: the columns of each are the rows of the next.
        names: What to call them in an error.
    """
    chain: list[Tensor] = []
    for W, name in zip(matrices, names, strict=True):
        if not isinstance(W, Tensor) or W.ndim != 2 or W.numel() == 0 or W.is_complex():
            got = tuple(W.shape) if isinstance(W, Tensor) else type(W).__name__
            raise InputError(f"{name}: expected a real matrix, not empty; got {got}")
        W = W.detach().double().cpu()
        if not torch.isfinite(W).all():
            raise InputError(f"{name}: expected finite numbers; got {int((~torch.isfinite(W)).sum())} NaN or infinite")
        if chain and chain[-1].shape[1] != len(W):
            raise InputError(f"{name}: expected {chain[-1].shape[1]} rows, as the next layer has columns; got {len(W)}")
        chain.append(W)
    return chain


def normalise(W: Tensor, p: float) -> tuple[Tensor, float]:
    """``W / ||W||_p`` and ``log ||W||_p``; a zero matrix comes back as it is, with minus infinity."""
    largest = W.abs().max()
    if not largest:
        return W, -math.inf
    W = W / largest
    norm = operator_norm(W, p)
    return W / norm, float(norm.log() + largest.log())
