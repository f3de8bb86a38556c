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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from brittle.bounds.graph.rules import Op
from brittle.bounds.lipschitz.gram_walk import Walk
from brittle.linear.spectrum import WALK_ROUNDING

RATE = 0.1
"""Adam's first step size, of the logarithms of multipliers and weights."""
HALVED_AFTER = 20
"""Steps after which it is half of that; it falls as ``1 / (1 + step / 20)``, whatever the number of steps."""
SHARPNESS = (8.0, 4.0)
"""Exponent of the smooth maximum at first, and what every step adds: in the end only the largest values count."""

MARGINS_POWER = 3.0
"""Power of the squared margins whose sum falls: with 0, a mean of logarithms, the largest stay 3 percent larger."""


@dataclass(frozen=True)
class GramBound:
    """``J diag(start) J^T <= gram`` for every Jacobian of the output.

    Attributes:
        gram: ``(K, K)``, or ``(1, 1)`` when only the norm is bounded.
        multipliers: The diagonal of T at every activation that was eliminated, by operation.
        spent: Real multiplications of one recursion.
        skipped: Stretches that count with their product of norms.
        inputs: Entries of one input.
        start: Weights of the input's entries ``(inputs,)``; None for ones.
    """

    gram: Tensor
    multipliers: dict[int, Tensor]
    spent: float
    skipped: int
    inputs: int
    start: Tensor | None

    @property
    def upper(self) -> float:
        """Upper bound of the l_2 Lipschitz constant; infinite where the numbers overflowed."""
        return self.constant(2)

    def constant(self, p: float) -> float:
        """Upper bound of the Lipschitz constant in l_2 or l_inf; infinite where the numbers overflowed."""
        if not bool(self.gram.isfinite().all()):
            return math.inf
        gram = self.gram.detach()
        largest = torch.linalg.eigvalsh(gram)[-1] if p == 2 else gram.diagonal().max()
        return math.sqrt(max(float(largest * self.scale(p)), 0.0)) * (1 + WALK_ROUNDING)

    def differences(self, p: float) -> Tensor:
        """Upper bounds, before rounding, of the constants of all differences of two outputs, of gram's shape."""
        gram = self.gram.detach()
        energy = gram.diagonal()
        squares = energy[:, None] + energy - 2 * gram
        return ((squares.clamp_min(0) + 1e-12 * (energy[:, None] + energy)) * self.scale(p)).sqrt()

    def scale(self, p: float) -> Tensor:
        """What the weights cost: ``|g|^2 <= scale * g diag(start) g^T`` for all rows g, in the norm dual to p."""
        if self.start is None:
            return torch.tensor(1.0 if p == 2 else float(self.inputs), dtype=torch.float64)
        weights = 1 / self.start
        return weights.max() if p == 2 else weights.sum()


def gram_bound(
    ops: Sequence[Op],
    factors: Sequence[float],
    *,
    start: Tensor | None = None,
    multipliers: Mapping[int, Tensor] | None = None,
    uniform: bool = False,
) -> GramBound:
    r"""Certified upper bound of ``J J^T`` over all Jacobians of a network, in the Loewner order.

    Args:
        ops: The network; shapes must be known.
        factors: Upper bound of every operation's own l_2 constant, for where the recursion cannot go on.
        start: Positive weights of the input's entries, for an input that is a vector or is flattened at once:
            bounds ``J diag(start) J^T``; ones by default.
        multipliers: Diagonals of T to use, by operation; where absent they are chosen in closed form.
        uniform: Choose one multiplier for all units of a layer, the norm of what it reads, in place of the best of
            several forms: better for networks whose layers stretch all directions alike.

    Returns:
        The bound. With multipliers given that are not feasible, the affected segment falls back to norms.
    """
    walk = Walk(ops, factors, dict(multipliers or {}), uniform)
    gram = walk.run(start)
    return GramBound(gram, walk.multipliers, walk.spent, walk.skipped, math.prod(ops[0].shape or ()), start)


def descend(
    bound: GramBound, ops: Sequence[Op], factors: Sequence[float], steps: int, *, p: float = 2, margins: bool = False
) -> Iterator[GramBound]:
    """Bounds met on the way down from one: Adam on all multipliers together, and in l_inf on the input's weights.

    What falls is a smooth maximum of the eigenvalues of the output's Gram matrix for p = 2, and of its diagonal, times
    what the weights cost, for p = inf; or the mean of the margins' sixth powers. Multipliers that are not feasible are
    raised by two percent until they are. Each bound is certified by itself, and the first ones are the same for every
    number of steps: the least of more steps is never larger.

    Args:
        bound: What :func:`gram_bound` gave; its multipliers and weights are where the steps start.
        ops: The network; shapes must be known.
        factors: Upper bound of every operation's own l_2 constant.
        steps: Number of steps, each a recursion and its gradient.
        p: The norm: 2 or inf.
        margins: Whether the constants of all differences of two outputs shall fall, on average, in place of the
            network's own; there must be two outputs or more.

    Yields:
        The bound of every step with feasible multipliers.
    """
    keys, learn = list(bound.multipliers), p != 2 and bound.start is not None
    logs = [t.log() for t in [*bound.multipliers.values(), *([bound.start] if learn else [])] if t is not None]
    if not logs:
        return
    # Adam by hand: its bias corrections count infeasible steps as well, which torch.optim.Adam never sees. Without them
    # bounds come out up to 0.4 percent different, in either direction (29 small networks, 40 steps).
    means, squares = [torch.zeros_like(t) for t in logs], [torch.zeros_like(t) for t in logs]
    for step in range(1, steps + 1):
        logs = [t.detach().requires_grad_() for t in logs]
        with torch.enable_grad():
            multipliers = {key: t.exp() for key, t in zip(keys, logs, strict=False)}
            start = logs[-1].exp() if learn else bound.start
            now = gram_bound(ops, factors, start=start, multipliers=multipliers)
            feasible = now.gram.requires_grad and now.skipped == bound.skipped and bool(now.gram.isfinite().all())
            if feasible:
                loss = _mean_margin(now) if margins else _smooth_constant(now, p, SHARPNESS[0] + SHARPNESS[1] * step)
                loss = loss + now.scale(p).log()
                slopes = torch.autograd.grad(loss, logs, allow_unused=True, materialize_grads=True)
        if not feasible:
            logs = [t.detach() + (0.02 if place < len(keys) else 0) for place, t in enumerate(logs)]
            continue
        yield _detached(now)
        means = [0.9 * mean + 0.1 * slope for mean, slope in zip(means, slopes, strict=True)]
        squares = [0.99 * square + 0.01 * slope**2 for square, slope in zip(squares, slopes, strict=True)]
        rate = RATE / (1 + step / HALVED_AFTER)
        logs = [
            t.detach() - rate * (mean / (1 - 0.9**step)) / ((square / (1 - 0.99**step)).sqrt() + 1e-12)
            for t, mean, square in zip(logs, means, squares, strict=True)
        ]


def _smooth_constant(bound: GramBound, p: float, sharpness: float) -> Tensor:
    """Logarithm of a smooth maximum of the values whose largest is the squared constant, before the weights' cost."""
    values = torch.linalg.eigvalsh(bound.gram) if p == 2 else bound.gram.diagonal()
    return torch.logsumexp(sharpness * values.clamp_min(1e-300).log(), 0) / sharpness


def _mean_margin(bound: GramBound) -> Tensor:
    """Logarithm of a mean of the squared constants of all differences, more of the large than of the small ones."""
    energy, (i, j) = bound.gram.diagonal(), torch.triu_indices(len(bound.gram), len(bound.gram), 1)
    squares = (energy[i] + energy[j] - 2 * bound.gram[i, j]).clamp_min(1e-300)
    return torch.logsumexp(MARGINS_POWER * squares.log(), 0) / MARGINS_POWER


def _detached(bound: GramBound) -> GramBound:
    """The same numbers without their history."""
    multipliers = {key: t.detach() for key, t in bound.multipliers.items()}
    start = None if bound.start is None else bound.start.detach()
    return replace(bound, gram=bound.gram.detach(), multipliers=multipliers, start=start)
