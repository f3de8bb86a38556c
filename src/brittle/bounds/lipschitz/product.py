"""The product of operator norms: the plainest certified bound of a network, in either norm, and where it comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

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
from brittle.linear.convolution import bounds_of
from brittle.linear.norms import operator_norm as dense_norm
from brittle.linear.spectrum import largest_singular_value, raised
from brittle.models.trace import NoRule


def own_factors(ops: Sequence[Op], p: float) -> list[float]:
    """Upper bound of every operation's own Lipschitz constant; 1 for inputs, sums and concatenations.

    Raises:
        NoRule: With the name of an operation that has none for this norm and these shapes.
    """
    return [own_factor(op, ops[op.inputs[0]] if op.inputs else op, p) for op in ops]


def own_factor(op: Op, source: Op, p: float) -> float:
    """Upper bound of one operation's own constant; ``source`` is what it reads."""
    rule = op.rule
    if isinstance(rule, Dense):
        return dense_upper(rule.W, p)
    if isinstance(rule, Conv):
        size = None if source.shape is None else source.shape[2:]
        upper = bounds_of(rule.K, rule.geometry, p, size, search=False).upper
        if math.isinf(upper):
            raise NoRule(f"{op.name}: {rule.geometry.mode} padding is bounded only for a known input_shape")
        return upper
    if isinstance(rule, Scale):
        return float(rule.factors.abs().max())
    if isinstance(rule, Slope):
        return rule.steepest
    if isinstance(rule, MaxPool):
        return 1.0 if math.isinf(p) else math.sqrt(rule.overlap)
    if isinstance(rule, Average):
        if math.isinf(p):
            return 1.0
        if rule.norm is None:
            raise NoRule(f"{op.name}: {rule.why}")
        return rule.norm
    if isinstance(rule, Multiple):
        return abs(rule.factor)
    return 0.5 if isinstance(rule, Softmax) else 1.0


def dense_upper(W: torch.Tensor, p: float) -> float:
    """Certified upper bound, exact up to rounding, of a matrix's operator norm."""
    W = W.double()
    return float(largest_singular_value(W)[1]) if p == 2 else raised(float(dense_norm(W, p)), max(W.shape))


def product_bound(ops: Sequence[Op], factors: Sequence[float], p: float, *, start: int = 0, end: int = -1) -> float:
    """Upper bound of the constant of operation ``end`` as a function of operation ``start``.

    Constants multiply along a chain, add at a sum, and combine at a concatenation: the maximum for p = inf, the root
    of the sum of squares for p = 2. Operations that do not depend on ``start`` count as constants.

    Raises:
        NoRule: A sum in l_2 of tensors of unknown or different shapes.
    """
    end = len(ops) - 1 if end < 0 else end
    values: dict[int, float] = {start: 1.0}
    for number in range(start + 1, end + 1):
        op, read = ops[number], [values.get(n, 0.0) for n in ops[number].inputs]
        if isinstance(op.rule, Sum):
            if p == 2:
                _refuse_broadcasting(ops, number)
            values[number] = sum(read)
        elif isinstance(op.rule, Concat):
            values[number] = max(read) if math.isinf(p) else math.hypot(*read)
        elif not isinstance(op.rule, Input):
            values[number] = factors[number] * read[0]
    return values.get(end, 0.0)


def _refuse_broadcasting(ops: Sequence[Op], number: int) -> None:
    """A term that is spread over a larger result counts more than once; terms of the result's shape add up."""
    shapes = [ops[n].shape for n in (number, *ops[number].inputs)]
    if None in shapes:
        raise NoRule(f"{ops[number].name}: a sum is bounded only for a known input_shape")
    if len(set(shapes)) > 1:
        raise NoRule(f"{ops[number].name}: a sum of tensors of different shapes")


def stretching(ops: Sequence[Op], factors: Sequence[float]) -> tuple[tuple[str, float], ...]:
    """Name and factor of every operation that stretches or shrinks, in the order of execution."""
    still = (Input, Sum, Concat, Rearrange)
    return tuple(
        (op.name, f) for op, f in zip(ops, factors, strict=True) if f != 1.0 and not isinstance(op.rule, still)
    )
