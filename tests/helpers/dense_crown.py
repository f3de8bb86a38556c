"""CROWN once more, from its paper alone (Zhang et al. 2018): every operation one explicit matrix, every unit bounded.

It shares no code with the package, speaks of absolute values where the package speaks of differences, and knows
nothing of rounding. In exact arithmetic its margins are lower bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Step:
    """``W v + b`` of one earlier vector, the ReLU of one (``W`` is None), or with it the sum with another.

    Attributes:
        source: Number of the vector that it reads; 0 is the input.
        W: Matrix; None for ReLU and for a sum.
        b: Constants.
        other: Number of the second summand.
    """

    source: int
    W: Tensor | None = None
    b: Tensor | None = None
    other: int | None = None


def unrolled(network: nn.Sequential, shape: tuple[int, ...]) -> list[Step]:
    """A chain of linear layers, convolutions, batch norms, ReLU and residual blocks (``c1 n1 c2 n2``) as matrices."""
    steps: list[Step] = []
    at, now = 0, shape

    def affine(module: nn.Module) -> None:
        nonlocal at, now
        zero = torch.zeros(1, *now)
        with torch.no_grad():
            b = module(zero)
            W = module(torch.eye(zero.numel()).view(-1, *now)) - b
        steps.append(Step(at, W.flatten(1).mT.contiguous(), b.flatten()))
        at, now = len(steps), tuple(b.shape[1:])

    def relu() -> None:
        nonlocal at
        steps.append(Step(at))
        at = len(steps)

    for module in network:
        if isinstance(module, nn.ReLU):
            relu()
        elif isinstance(module, nn.Flatten):
            now = (math.prod(now),)
        elif hasattr(module, "c1"):
            start = at
            affine(nn.Sequential(module.c1, module.n1))
            relu()
            affine(nn.Sequential(module.c2, module.n2))
            steps.append(Step(at, other=start))
            at = len(steps)
            relu()
        else:
            affine(module)
    return steps


def crown_margins(steps: list[Step], x: Tensor, y: Tensor, eps: float, p: float) -> Tensor:
    """Lower bounds of ``min_{j != y} s_y - s_j`` over the ball ``(N,)``, one by one; in l_inf it is cut to [0, 1]."""
    return torch.stack([_margin(steps, v, int(label), eps, p) for v, label in zip(x.flatten(1), y, strict=True)])


def _margin(steps: list[Step], x: Tensor, y: int, eps: float, p: float) -> Tensor:
    lines: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    last = steps[-1].W
    assert last is not None
    for number, step in enumerate(steps, 1):
        if step.W is None and step.other is None:
            width = _width(steps, step.source, x)
            low = _lower(steps, step.source, torch.eye(width), x, eps, p, lines)
            high = -_lower(steps, step.source, -torch.eye(width), x, eps, p, lines)
            above = (high.clamp_min(0) - low.clamp_min(0)) / (high - low).clamp_min(1e-12)
            below = torch.where(low >= 0, 1.0, torch.where(high <= 0, 0.0, (high > -low).float()))
            lines[number] = below, above, low.clamp_min(0) - above * low
    rows = torch.eye(len(last))[y] - torch.eye(len(last))
    return _lower(steps, len(steps), rows[torch.arange(len(last)) != y], x, eps, p, lines).min()


def _width(steps: list[Step], number: int, x: Tensor) -> int:
    if number == 0:
        return len(x)
    step = steps[number - 1]
    return len(step.W) if step.W is not None else _width(steps, step.source, x)


def _lower(
    steps: list[Step], start: int, rows: Tensor, x: Tensor, eps: float, p: float,
    lines: dict[int, tuple[Tensor, Tensor, Tensor]],
) -> Tensor:  # fmt: skip
    """Lower bounds ``(R,)`` of ``rows @ v`` for the vector of number ``start``."""
    waiting, total = {start: rows}, torch.zeros(len(rows))
    for number in range(start, 0, -1):
        if number not in waiting:
            continue
        g, step = waiting.pop(number), steps[number - 1]
        if step.W is not None:
            total, g = total + g @ step.b, g @ step.W
        elif step.other is not None:
            waiting[step.other] = waiting[step.other] + g if step.other in waiting else g
        else:
            below, above, constant = lines[number]
            total = total + g.clamp_max(0) @ constant
            g = g.clamp_min(0) * below + g.clamp_max(0) * above
        waiting[step.source] = waiting[step.source] + g if step.source in waiting else g
    g = waiting[0]
    if p == 2:
        return total + g @ x - eps * g.norm(dim=1)
    low, high = (x - eps).clamp_min(0), (x + eps).clamp_max(1)
    return total + g.clamp_min(0) @ low + g.clamp_max(0) @ high
