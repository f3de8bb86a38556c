"""Which torus serves a network's convolutions, and means over the image that lies on it.

A convolution that pads with zeros is circular on a torus that the image fits with its padding, once the result is
taken on the image alone. Theory page, section "Multipliers".
"""

from __future__ import annotations

import math
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
from brittle.linear.conv_geometry import ConvGeometry


def convolutions(ops: Sequence[Op]) -> list[Conv | None]:
    """Every operation as a convolution with zero padding, where it is one; pooling by averages is."""
    return [as_convolution(op.rule, op, ops[op.inputs[0]].shape if op.inputs else None) for op in ops]


@singledispatch
def as_convolution(rule: object, op: Op, before: tuple[int, ...] | None) -> Conv | None:
    """One operation as a convolution with zero padding; None where it is none.

    Args:
        rule: The operation's rule.
        op: The operation.
        before: Shape of what it reads, with a batch of one.

    Raises:
        NoRule: The rule is unknown.
    """
    raise no_rule(op, "convolution")


@as_convolution.register
def _(
    rule: Input | Dense | TransposedConv | Scale | Slope | MaxPool | Sum | Concat | Multiple | Softmax,
    op: Op, before: tuple[int, ...] | None,
) -> None:  # fmt: skip
    return None


@as_convolution.register
def _(rule: Conv, op: Op, before: tuple[int, ...] | None) -> Conv | None:
    return rule if rule.geometry.mode == "zeros" else None


@as_convolution.register
def _(rule: Rearrange, op: Op, before: tuple[int, ...] | None) -> Conv | None:
    return rule.conv


@as_convolution.register
def _(rule: Average, op: Op, before: tuple[int, ...] | None) -> Conv | None:
    if rule.stencil is None or before is None:
        return None
    kernel, stride, padding = rule.stencil
    K = torch.full((before[1], 1, *kernel), 1 / math.prod(kernel), dtype=torch.float64)
    return Conv(K, ConvGeometry(stride, tuple((width, width) for width in padding), (1,) * len(kernel), before[1]))


@singledispatch
def is_local(rule: object, op: Op) -> bool:
    """Whether an operation works on every position by itself, in the same way: then a torus of any size serves it.

    Raises:
        NoRule: The rule is unknown.
    """
    raise no_rule(op, "torus")


@is_local.register
def _(rule: Slope | Scale | Sum | Multiple, op: Op) -> bool:
    return True


@is_local.register
def _(rule: Concat, op: Op) -> bool:
    return rule.axis == 1


@is_local.register
def _(rule: Input | Dense | Conv | TransposedConv | MaxPool | Average | Rearrange | Softmax, op: Op) -> bool:
    return False


def spills(conv: Conv) -> bool:
    """Whether the result may be nonzero outside the image: more than one tap, or a stride."""
    return math.prod(conv.K.shape[2:]) * max(conv.geometry.stride) > 1


def least_torus(ops: Sequence[Op], convs: Sequence[Conv | None], x: int, stride: Sequence[int]) -> tuple[int, ...]:
    """Points per axis of a torus for what follows operation x.

    The image fits with the padding of every convolution up to the next stride or pooling.

    Args:
        ops: The network; shapes must be known.
        convs: Its :func:`convolutions`.
        x: The result that is read; the torus is that of its readers.
        stride: Stride of the readers: there are so many times more points before them.
    """
    points = [1] * len(stride)
    for number in range(x + 1, len(ops)):
        op, conv = ops[number], convs[number]
        if conv is not None and (x in op.inputs or max(conv.geometry.stride) == 1):
            read = ops[op.inputs[0]].shape
            assert read is not None
            for axis, (n, pads) in enumerate(zip(read[2:], conv.geometry.padding, strict=True)):
                need = -(-(n + max(pads)) // conv.geometry.stride[axis])
                points[axis] = max(points[axis], need, (op.shape or ())[2 + axis])
        elif not is_local(op.rule, op):
            break
    if points == [1] * len(stride):
        shape = ops[x].shape
        assert shape is not None
        points = [-(-n // s) for n, s in zip(shape[2:], stride, strict=True)]
    return tuple(points)


def fits(conv: Conv, before: Sequence[int], after: Sequence[int], grid: Sequence[int]) -> bool:
    """Whether a torus holds the image before a convolution, with its padding, and the image after it (sizes)."""
    axes = zip(before, after, conv.geometry.padding, grid, strict=True)
    return all(n + max(pads) <= points and m <= points for n, m, pads, points in axes)


def mean_over_image(P: Tensor, grid: Sequence[int], size: Sequence[int]) -> Tensor:
    """``1^T P 1 / pixels`` with ones on the image: the mean of P, weighted by the image's spectrum.

    Args:
        P: One matrix a frequency, ``(F, n, n)``.
        grid: Points of the torus per axis.
        size: The image's, per axis.
    """
    image = torch.zeros(tuple(grid), dtype=torch.float64)
    image[tuple(slice(0, n) for n in size)] = 1.0
    weight = torch.fft.rfftn(image).abs().square()
    weight[..., 1 : (grid[-1] + 1) // 2] *= 2  # the other half of the last axis
    weight = weight.flatten() / weight.sum()
    return (P * weight.to(P.dtype)[:, None, None]).sum(0).real
