r"""l_inf bounds of a whole network by one forward pass of absolute weights, and by counting paths.

Chain: if every entry of the input moves by at most 1, entry i of an operation's result moves by at most ``d_i``, with
``d <- |A| d`` for a linear map, ``max(|low|, |high|) d`` for an activation, and the pooling itself for pooling. No
product of operator norms is below ``max d``. Path: every entry of a Jacobian is a sum over paths of products of
weights, each path switched by a factor between 0 and 1, so that row i has an l_1 norm of at most
``(||J_i||_1 + d_i) / 2`` with J the network without its activations. Theory page, section "Networks".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from brittle.bounds.graph.rules import (
    Average,
    Concat,
    Conv,
    Dense,
    Input,
    MaxPool,
    Multiple,
    Op,
    Rearrange,
    Scale,
    Slope,
    Softmax,
    Sum,
)
from brittle.linear.convolution import apply
from brittle.linear.spectrum import WALK_ROUNDING

MOST_PATHS = 128
"""Outputs up to which paths are counted: one backward pass each."""


def movable(ops: Sequence[Op]) -> bool:
    """Whether absolute weights can be passed through every operation: shapes known, rearrangements understood."""
    known = all(op.shape is not None for op in ops)
    return known and all(op.rule.run is not None for op in ops if isinstance(op.rule, Rearrange))


def radii(ops: Sequence[Op]) -> list[Tensor]:
    """How far every entry of every result can move, upper bounds, when all entries of the input move by at most 1.

    Returns:
        One tensor of the result's shape (batch of one) an operation.
    """
    done: list[Tensor] = []
    for op in ops:
        done.append(_apply(op, [done[source] for source in op.inputs], absolute=True))
    return [d * (1 + WALK_ROUNDING) for d in done]


def gradients(ops: Sequence[Op]) -> Tensor | None:
    r"""Rows of the network's Jacobian with every activation replaced by its largest slope, ``(K, inputs)``.

    None when paths cannot be counted: an activation with negative slopes, a max pooling or a softmax on the way, an
    output that is no vector, or more than :data:`MOST_PATHS` outputs.
    """
    shape = ops[-1].shape
    if shape is None or len(shape) != 2 or shape[1] > MOST_PATHS:
        return None
    if any(isinstance(op.rule, MaxPool | Softmax) or (isinstance(op.rule, Slope) and op.rule.low < 0) for op in ops):
        return None
    with torch.enable_grad():
        first = ops[0].shape
        assert first is not None
        x = torch.zeros(first, dtype=torch.float64, requires_grad=True)
        done: list[Tensor] = [x]
        for op in ops[1:]:
            done.append(_apply(op, [done[source] for source in op.inputs], absolute=False))
        rows = [torch.autograd.grad(s, x, retain_graph=True)[0].flatten() for s in done[-1][0]]
    return torch.stack(rows)


def _apply(op: Op, read: Sequence[Tensor], *, absolute: bool) -> Tensor:
    """One operation on radii (with absolute weights) or on values (without constants)."""
    rule = op.rule
    if isinstance(rule, Input):
        assert op.shape is not None
        return torch.ones(op.shape, dtype=torch.float64)
    if isinstance(rule, Sum):
        signs = [1 if absolute else sign for sign in rule.signs]
        total = sum(sign * x for sign, x in zip(signs, read, strict=True))
        assert isinstance(total, Tensor)
        assert op.shape is not None
        return total.expand(op.shape)
    if isinstance(rule, Concat):
        return torch.cat(list(read), rule.axis)
    x = read[0]
    if isinstance(rule, Dense | Conv | Scale):
        return _linear(rule, x, absolute)
    if isinstance(rule, Slope):
        return x * (rule.steepest if absolute else rule.high)
    if isinstance(rule, Multiple):
        return x * (abs(rule.factor) if absolute else rule.factor)
    if isinstance(rule, MaxPool | Average):
        return rule.run(x)
    if isinstance(rule, Rearrange):
        assert rule.run is not None
        return rule.run(x)
    return torch.full_like(x, 0.5 * float(x.max()))  # softmax


def _linear(rule: Dense | Conv | Scale, x: Tensor, absolute: bool) -> Tensor:
    if isinstance(rule, Dense):
        W = rule.W.double()
        return x @ (W.abs() if absolute else W).mT
    if isinstance(rule, Conv):
        K = rule.K.double()
        return apply(K.abs() if absolute else K, rule.geometry, x)
    factors = rule.factors.abs() if absolute else rule.factors
    return x * factors.view(1, -1, *[1] * (x.ndim - 2))
