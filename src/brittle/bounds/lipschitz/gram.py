r"""Multiplier bounds of a whole network in l_2: one recursion of Gram matrices over its operations.

Every Jacobian ``J`` of an operation's result with respect to the input, for every choice of the slopes that
activations may take, obeys ``J J^H <= P`` in the Loewner order. A linear map turns P into ``A P A^H``; an activation
with slopes in ``[alpha, gamma]`` and any positive diagonal T with ``M = 2T - P > 0`` turns it into
``(alpha + gamma)^2 T M^-1 T - 2 alpha gamma T`` (theory page, section "Multipliers"). Results that are needed later,
such as both ends of a shortcut, are carried together in one joint Gram matrix. Convolutions are circular on a torus
that the image fits with its padding, so one matrix per frequency suffices; the zeros around the image are a pattern
of an activation. Where that does not go on (a stride, a max pooling), P is relaxed to a diagonal matrix above it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.bounds.graph.rules import Op
from brittle.bounds.lipschitz.gram_walk import Walk
from brittle.linear.spectrum import WALK_ROUNDING


@dataclass(frozen=True)
class GramBound:
    """``J J^T <= gram`` for every Jacobian of the output.

    Attributes:
        gram: ``(K, K)``, or ``(1, 1)`` when only the norm is bounded.
        multipliers: The diagonal of T at every activation that was eliminated, by operation.
        spent: Real multiplications of one recursion.
    """

    gram: Tensor
    multipliers: dict[int, Tensor]
    spent: float

    @property
    def upper(self) -> float:
        """Upper bound of the l_2 Lipschitz constant; infinite where the numbers overflowed."""
        if not bool(self.gram.isfinite().all()):
            return math.inf
        return math.sqrt(max(float(torch.linalg.eigvalsh(self.gram.detach())[-1]), 0.0)) * (1 + WALK_ROUNDING)


def gram_bound(
    ops: Sequence[Op],
    factors: Sequence[float],
    *,
    start: Tensor | None = None,
    multipliers: Mapping[int, Tensor] | None = None,
) -> GramBound:
    r"""Certified upper bound of ``J J^T`` over all Jacobians of a network, in the Loewner order.

    Args:
        ops: The network; shapes must be known.
        factors: Upper bound of every operation's own l_2 constant, for where the recursion cannot go on.
        start: Positive weights of the input's entries, for an input that is a vector or is flattened at once:
            bounds ``J diag(start) J^T``; ones by default.
        multipliers: Diagonals of T to use, by operation; where absent they are chosen in closed form.

    Returns:
        The bound. With multipliers given that are not feasible, the affected segment falls back to norms.
    """
    walk = Walk(ops, factors, dict(multipliers or {}))
    gram = walk.run(start)
    return GramBound(gram, walk.multipliers, walk.spent)


def tighten(
    bound: GramBound,
    ops: Sequence[Op],
    factors: Sequence[float],
    steps: int,
    *,
    start: Tensor | None = None,
    rate: float = 0.1,
) -> GramBound:
    """The bound after steps of optimisation (Adam) of all multipliers together; never worse than before.

    The loss is a smooth maximum of the eigenvalues of the output's Gram matrix. Multipliers that are not feasible are
    raised by two percent until they are.

    Args:
        bound: What :func:`gram_bound` gave; its multipliers are where the steps start.
        ops: The network; shapes must be known.
        factors: Upper bound of every operation's own l_2 constant.
        steps: Number of steps, each a recursion and its gradient; 0 returns ``bound``.
        start: Weights of the input's entries, as for ``bound``.
        rate: Adam's step size, of the multipliers' logarithms.

    Returns:
        The least certified upper bound met.
    """
    best, keys, logs = bound, list(bound.multipliers), [t.log() for t in bound.multipliers.values()]
    if not steps or not logs:
        return best
    # Adam by hand: its bias corrections count infeasible steps as well, which torch.optim.Adam never sees. Without them
    # bounds come out up to 0.4 percent different, in either direction (29 small networks, 40 steps).
    means, squares = [torch.zeros_like(t) for t in logs], [torch.zeros_like(t) for t in logs]
    for step in range(1, steps + 1):
        logs = [t.detach().requires_grad_() for t in logs]
        with torch.enable_grad():
            multipliers = {key: t.exp() for key, t in zip(keys, logs, strict=True)}
            now = gram_bound(ops, factors, start=start, multipliers=multipliers)
            feasible = now.gram.requires_grad and bool(now.gram.isfinite().all())
            if feasible:
                values = torch.linalg.eigvalsh(now.gram).clamp_min(1e-300)
                loss = torch.logsumexp(8 * values.log(), 0) / 8
                slopes = torch.autograd.grad(loss, logs, allow_unused=True, materialize_grads=True)
        if not feasible:
            logs = [t.detach() + 0.02 for t in logs]
            continue
        if now.upper < best.upper:
            best = GramBound(now.gram.detach(), {k: t.detach() for k, t in now.multipliers.items()}, now.spent)
        means = [0.9 * mean + 0.1 * slope for mean, slope in zip(means, slopes, strict=True)]
        squares = [0.99 * square + 0.01 * slope**2 for square, slope in zip(squares, slopes, strict=True)]
        logs = [
            t.detach() - rate * (mean / (1 - 0.9**step)) / ((square / (1 - 0.99**step)).sqrt() + 1e-12)
            for t, mean, square in zip(logs, means, squares, strict=True)
        ]
    return best
