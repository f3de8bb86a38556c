"""The product of operator norms: the plainest certified bound of a network, in either norm, and where it comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import singledispatch

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
from brittle.linear.convolution import bounds_of
from brittle.linear.norms import operator_norm
from brittle.linear.spectrum import largest_singular_value, raised
from brittle.models.trace import NoRule


def own_factors(ops: Sequence[Op], p: float) -> list[float]:
    """Upper bound of every operation's own Lipschitz constant; 1 for inputs, sums and concatenations.

    Raises:
        NoRule: With the name of an operation that has none for this norm and these shapes.
    """
    return [own_factor(op.rule, op, ops[op.inputs[0]].shape if op.inputs else None, p) for op in ops]


@singledispatch
def own_factor(rule: object, op: Op, before: tuple[int, ...] | None, p: float) -> float:
    """Upper bound of one operation's own Lipschitz constant.

    Args:
        rule: The operation's rule.
        op: The operation.
        before: Shape of what it reads, with a batch of one; None when it is not known.
        p: 2 or inf.

    Raises:
        NoRule: The operation has none for this norm and this shape.
    """
    raise no_rule(op, "Lipschitz constant")


@own_factor.register
def _(rule: Input | Sum | Concat | Rearrange, op: Op, before: tuple[int, ...] | None, p: float) -> float:
    return 1.0


@own_factor.register
def _(rule: Dense, op: Op, before: tuple[int, ...] | None, p: float) -> float:
    W = rule.W.double()
    return float(largest_singular_value(W)[1]) if p == 2 else raised(float(operator_norm(W, p)), max(W.shape))


@own_factor.register
def _(rule: Conv, op: Op, before: tuple[int, ...] | None, p: float) -> float:
    upper = bounds_of(rule.K, rule.geometry, p, None if before is None else before[2:], search=False).upper
    if math.isinf(upper):
        raise NoRule(f"{op.name}: {rule.geometry.mode} padding is bounded only for a known input_shape")
    return upper


@own_factor.register
def _(rule: TransposedConv, op: Op, before: tuple[int, ...] | None, p: float) -> float:
    """The convolution's norm in the dual norm; what it reads has the shape of the transpose's result."""
    size = None if op.shape is None else op.shape[2:]
    return bounds_of(rule.K, rule.geometry, 1 if math.isinf(p) else 2, size, search=False).upper


@own_factor.register
def _(rule: Scale, op: Op, before: tuple[int, ...] | None, p: float) -> float:
    return float(rule.factors.abs().max())


@own_factor.register
def _(rule: Slope, op: Op, before: tuple[int, ...] | None, p: float) -> float:
    return rule.steepest


@own_factor.register
def _(rule: MaxPool, op: Op, before: tuple[int, ...] | None, p: float) -> float:
    return 1.0 if math.isinf(p) else math.sqrt(rule.overlap)


@own_factor.register
def _(rule: Average, op: Op, before: tuple[int, ...] | None, p: float) -> float:
    if math.isinf(p):
        return 1.0
    if rule.norm is None:
        raise NoRule(f"{op.name}: {rule.why}")
    return rule.norm


@own_factor.register
def _(rule: Multiple, op: Op, before: tuple[int, ...] | None, p: float) -> float:
    return abs(rule.factor)


@own_factor.register
def _(rule: Softmax, op: Op, before: tuple[int, ...] | None, p: float) -> float:
    return 0.5


def product_bound(ops: Sequence[Op], factors: Sequence[float], p: float, *, start: int = 0, end: int = -1) -> float:
    """Upper bound of the constant of operation ``end`` as a function of operation ``start``.

    Constants multiply along a chain, add at a sum, and combine at a concatenation: the maximum for p = inf, the root
    of the sum of squares for p = 2. Operations that do not depend on ``start`` count as constants.

    Raises:
        NoRule: A sum in l_2 of tensors of unknown or different shapes.
    """
    end = len(ops) - 1 if end < 0 else end
    constants: dict[int, float] = {start: 1.0}
    for number in range(start + 1, end + 1):
        op = ops[number]
        shapes = [ops[source].shape for source in op.inputs]
        read = [constants.get(source, 0.0) for source in op.inputs]
        constants[number] = constant_after(op.rule, op, factors[number], read, shapes, p)
    return constants.get(end, 0.0)


@singledispatch
def constant_after(
    rule: object, op: Op, factor: float, read: Sequence[float], shapes: Sequence[tuple[int, ...] | None], p: float
) -> float:
    """The constant of an operation's result, from the constants of what it reads.

    Args:
        rule: The operation's rule.
        op: The operation.
        factor: Its own constant.
        read: The constants of what it reads.
        shapes: The shapes of what it reads, each with a batch of one.
        p: 2 or inf.

    Raises:
        NoRule: A sum in l_2 of tensors of unknown or different shapes, or a rule that is unknown.
    """
    raise no_rule(op, "Lipschitz constant")


@constant_after.register
def _(
    rule: Dense | Conv | TransposedConv | Scale | Slope | MaxPool | Average | Rearrange | Multiple | Softmax,
    op: Op, factor: float, read: Sequence[float], shapes: Sequence[tuple[int, ...] | None], p: float,
) -> float:  # fmt: skip
    return factor * read[0]


@constant_after.register
def _(
    rule: Input, op: Op, factor: float, read: Sequence[float], shapes: Sequence[tuple[int, ...] | None], p: float
) -> float:
    return 0.0


@constant_after.register
def _(
    rule: Concat, op: Op, factor: float, read: Sequence[float], shapes: Sequence[tuple[int, ...] | None], p: float
) -> float:
    return max(read) if math.isinf(p) else math.hypot(*read)


@constant_after.register
def _(
    rule: Sum, op: Op, factor: float, read: Sequence[float], shapes: Sequence[tuple[int, ...] | None], p: float
) -> float:
    # A term that is spread over a larger result counts more than once in l_2; terms of the result's shape add up.
    if p == 2 and None in (op.shape, *shapes):
        raise NoRule(f"{op.name}: a sum is bounded only for a known input_shape")
    if p == 2 and len({op.shape, *shapes}) > 1:
        raise NoRule(f"{op.name}: a sum of tensors of different shapes")
    return sum(read)


def stretching_factors(ops: Sequence[Op], factors: Sequence[float]) -> tuple[tuple[str, float], ...]:
    """Name and factor of every operation that stretches or shrinks, in the order of execution."""
    return tuple((op.name, factor) for op, factor in zip(ops, factors, strict=True) if factor != 1.0)
