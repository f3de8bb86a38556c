"""Which torus serves a network's convolutions, and means over the image that lies on it.

A convolution that pads with zeros is circular on a torus that the image fits with its padding, once the result is
taken on the image alone. Theory page, section "Multipliers".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from brittle.bounds.graph.rules import Average, Concat, Conv, Multiple, Op, Scale, Slope, Sum
from brittle.linear.conv_geometry import ConvGeometry


def convolutions(ops: Sequence[Op]) -> list[Conv | None]:
    """Every operation as a convolution with zero padding, where it is one; pooling by averages is."""
    return [_as_convolution(op, ops[op.inputs[0]]) if op.inputs else None for op in ops]


def _as_convolution(op: Op, source: Op) -> Conv | None:
    if isinstance(op.rule, Conv):
        return op.rule if op.rule.geometry.mode == "zeros" else None
    if isinstance(op.rule, Average) and op.rule.stencil is not None:
        kernel, stride, padding = op.rule.stencil
        assert source.shape is not None
        channels = source.shape[1]
        K = torch.full((channels, 1, *kernel), 1 / math.prod(kernel), dtype=torch.float64)
        return Conv(K, ConvGeometry(stride, tuple((width, width) for width in padding), (1,) * len(kernel), channels))
    return None


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
        elif not isinstance(op.rule, Slope | Scale | Sum | Concat | Multiple):
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
