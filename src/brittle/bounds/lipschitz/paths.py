r"""l_inf bounds of a whole network by one forward pass of absolute weights, and by counting paths.

Chain: if every entry of the input moves by at most 1, entry i of an operation's result moves by at most ``d_i``, with
``d <- |A| d`` for a linear map, ``max(|low|, |high|) d`` for an activation, and the pooling itself for pooling. No
product of operator norms is below ``max d``. Path: every entry of a Jacobian is a sum over paths of products of
weights, each path switched by a factor between 0 and 1, so that row i has an l_1 norm of at most
``(||J_i||_1 + d_i) / 2`` with J the network without its activations. Theory page, section "Networks".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch

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
    TransposedConv,
    no_rule,
)
from brittle.linear.convolution import apply, apply_transposed
from brittle.linear.spectrum import WALK_ROUNDING
from brittle.models.trace import NoRule

MOST_PATHS = 128
"""Outputs up to which paths are counted: one backward pass each."""


def radii(ops: Sequence[Op]) -> list[Tensor]:
    """How far every entry of every result can move, upper bounds, when all entries of the input move by at most 1.

    Returns:
        One tensor of the result's shape (batch of one) an operation.

    Raises:
        NoRule: A shape is not known, or an operation is not understood entry by entry.
    """
    moved: list[Tensor] = []
    for op in ops:
        moved.append(carry(op.rule, op, [moved[source] for source in op.inputs], True))
    return [radius * (1 + WALK_ROUNDING) for radius in moved]


def steepest_jacobian(ops: Sequence[Op]) -> Tensor:
    r"""The network's Jacobian with every activation replaced by its largest slope, ``(K, inputs)``.

    Raises:
        NoRule: Paths cannot be counted: an activation with negative slopes, a max pooling or a softmax on the way, an
            output that is no vector, or more than :data:`MOST_PATHS` outputs.
    """
    shape, last = ops[0].shape, ops[-1].shape
    if shape is None or last is None or len(last) != 2 or last[1] > MOST_PATHS:
        raise NoRule(f"{ops[-1].name}: paths are counted only to vectors of at most {MOST_PATHS} outputs")
    with torch.enable_grad():
        x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        values = [x]
        for op in ops[1:]:
            values.append(carry(op.rule, op, [values[source] for source in op.inputs], False))
        rows = [torch.autograd.grad(output, x, retain_graph=True)[0].flatten() for output in values[-1][0]]
    return torch.stack(rows)


@singledispatch
def carry(rule: object, op: Op, read: Sequence[Tensor], absolute: bool) -> Tensor:
    """One operation on radii, with absolute weights and steepest slopes, or on values, without constants.

    Args:
        rule: The operation's rule.
        op: The operation.
        read: Radii or values of what it reads, each of its shape (batch of one).
        absolute: Whether these are radii. On values, activations count with their largest slope.

    Raises:
        NoRule: The operation is not understood entry by entry, or is no sum of paths.
    """
    raise no_rule(op, "radius")


@carry.register
def _(rule: Input, op: Op, read: Sequence[Tensor], absolute: bool) -> Tensor:
    if op.shape is None:
        raise NoRule(f"{op.name}: radii are bounded only for a known input_shape")
    return torch.ones(op.shape, dtype=torch.float64)


@carry.register
def _(rule: Dense, op: Op, read: Sequence[Tensor], absolute: bool) -> Tensor:
    W = rule.W.double()
    return read[0] @ (W.abs() if absolute else W).mT


@carry.register
def _(rule: Conv, op: Op, read: Sequence[Tensor], absolute: bool) -> Tensor:
    K = rule.K.double()
    return apply(K.abs() if absolute else K, rule.geometry, read[0])


@carry.register
def _(rule: TransposedConv, op: Op, read: Sequence[Tensor], absolute: bool) -> Tensor:
    if op.shape is None:
        raise NoRule(f"{op.name}: a transposed convolution is understood only for a known input_shape")
    K = rule.K.double()
    return apply_transposed(K.abs() if absolute else K, rule.geometry, read[0], op.shape[2:])


@carry.register
def _(rule: Scale, op: Op, read: Sequence[Tensor], absolute: bool) -> Tensor:
    factors = rule.factors.abs() if absolute else rule.factors
    return read[0] * factors.view(1, -1, *[1] * (read[0].ndim - 2))


@carry.register
def _(rule: Multiple, op: Op, read: Sequence[Tensor], absolute: bool) -> Tensor:
    return read[0] * (abs(rule.factor) if absolute else rule.factor)


@carry.register
def _(rule: Average, op: Op, read: Sequence[Tensor], absolute: bool) -> Tensor:
    return rule.run(read[0])


@carry.register
def _(rule: Rearrange, op: Op, read: Sequence[Tensor], absolute: bool) -> Tensor:
    if rule.run is None:
        raise NoRule(f"{op.name}: a rearrangement that is not understood")
    return rule.run(read[0])


@carry.register
def _(rule: Sum, op: Op, read: Sequence[Tensor], absolute: bool) -> Tensor:
    if op.shape is None:
        raise NoRule(f"{op.name}: a sum is bounded only for a known input_shape")
    signs = [1 if absolute else sign for sign in rule.signs]
    return torch.stack([(sign * x).expand(op.shape) for sign, x in zip(signs, read, strict=True)]).sum(0)


@carry.register
def _(rule: Concat, op: Op, read: Sequence[Tensor], absolute: bool) -> Tensor:
    return rule.join(read, rule.axis)


@carry.register
def _(rule: Slope, op: Op, read: Sequence[Tensor], absolute: bool) -> Tensor:
    if not absolute and rule.low < 0:
        raise NoRule(f"{op.name}: paths through negative slopes are not counted")
    return read[0] * (rule.steepest if absolute else rule.high)


@carry.register
def _(rule: MaxPool, op: Op, read: Sequence[Tensor], absolute: bool) -> Tensor:
    if not absolute:
        raise NoRule(f"{op.name}: paths through max pooling are not counted")
    return rule.run(read[0])


@carry.register
def _(rule: Softmax, op: Op, read: Sequence[Tensor], absolute: bool) -> Tensor:
    if not absolute:
        raise NoRule(f"{op.name}: paths through a softmax are not counted")
    return torch.full_like(read[0], 0.5 * float(read[0].max()))
