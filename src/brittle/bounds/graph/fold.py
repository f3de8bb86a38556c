"""Folding: diagonal matrices and dense layers merged into the linear operation beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from brittle.bounds.graph.rules import Conv, Dense, Op, Rearrange, Rule, Scale, TransposedConv, users


def fold(ops: Sequence[Op]) -> tuple[Op, ...]:
    """The same network with fewer operations: ``op`` merged into what it alone reads, as often as they merge.

    Merged are a diagonal matrix with a convolution, a dense layer or another diagonal matrix, on either side and past
    a flattening, and two dense layers in a row. What does not merge stays two operations, which is always sound.
    """
    folded, number = list(ops), 0
    while number < len(folded):
        # After a merge the next operation stands at this number.
        shorter = _merge(folded, number)
        if shorter is None:
            number += 1
        else:
            folded = shorter
    return tuple(folded)


def _merge(ops: list[Op], number: int) -> list[Op] | None:
    """The list with operation ``number`` merged into the one that it alone reads; None if they do not merge."""
    op = ops[number]
    if not isinstance(op.rule, Dense | Conv | TransposedConv | Scale):  # nothing else has a product
        return None
    before, read_by = ops[op.inputs[0]], users(ops)
    if len(read_by[op.inputs[0]]) > 1:
        return None
    rule = _product(op.rule, before.rule, before.shape)
    if rule is not None:
        name = op.name if isinstance(before.rule, Scale) else before.name
        merged = Op(name, rule, before.inputs, op.shape, op.node)
        return _remove([*ops[:number], merged, *ops[number + 1 :]], op.inputs[0])
    if not isinstance(before.rule, Rearrange) or len(read_by[before.inputs[0]]) > 1:
        return None
    rule = _product_past(op.rule, before, ops[before.inputs[0]])
    if rule is None:
        return None
    return _remove([*ops[:number], replace(op, rule=rule), *ops[number + 1 :]], before.inputs[0])


def _remove(ops: list[Op], gone: int) -> list[Op]:
    """Remove operation ``gone``; its readers read its input."""
    places = [n - (n > gone) for n in range(len(ops))]
    places[gone] = places[ops[gone].inputs[0]]
    return [replace(op, inputs=tuple(places[n] for n in op.inputs)) for n, op in enumerate(ops) if n != gone]


def _product(rule: Rule, before: Rule, shape: tuple[int, ...] | None) -> Rule | None:
    """The one rule that is ``rule`` after ``before``, whose result has this shape; None if there is none."""
    vector = shape is not None and len(shape) == 2  # a dense layer's last axis is the channel axis
    match rule, before:
        case Dense(W), Dense(V):
            return Dense(W.double() @ V.double())
        case Scale(s), Scale(t):
            return Scale(s * t)
        case Scale(s), Conv(K, geometry):
            return Conv(_along(s, K.ndim, 0) * K.double(), geometry)
        case Conv(K, geometry), Scale(s):
            columns = s.view(geometry.groups, 1, -1, *[1] * (K.ndim - 2))
            return Conv((K.double().unflatten(0, (geometry.groups, -1)) * columns).flatten(0, 1), geometry)
        case Scale(s), TransposedConv(K, geometry):
            channels = s.view(geometry.groups, 1, -1, *[1] * (K.ndim - 2))
            return TransposedConv((K.double().unflatten(0, (geometry.groups, -1)) * channels).flatten(0, 1), geometry)
        case TransposedConv(K, geometry), Scale(s):
            return TransposedConv(_along(s, K.ndim, 0) * K.double(), geometry)
        case Scale(s), Dense(W) if vector:
            return Dense(s[:, None] * W.double())
        case Dense(W), Scale(s) if vector:
            return Dense(W.double() * s)
        case _:
            return None


def _product_past(rule: Rule, flattening: Op, before: Op) -> Rule | None:
    """A dense layer after the flattening of a diagonal matrix; None if it is something else."""
    if flattening.shape is None or len(flattening.shape) != 2 or before.shape is None:
        return None
    match rule, flattening.rule, before.rule:
        case Dense(W), Rearrange(run), Scale(s) if run is not None:
            return Dense(W.double() * run(_along(s, len(before.shape), 1).expand(before.shape))[0])
        case _:
            return None


def _along(factors: Tensor, axes: int, axis: int) -> Tensor:
    """Factors ``(C,)`` that multiply a tensor of so many axes along one of them."""
    return factors.view(*[1] * axis, -1, *[1] * (axes - axis - 1))
