r"""The linear operations of a network as maps on batches: ``A d``, ``|A| r``, ``A^T g``, and what they may round.

Relaxations speak of differences from the clean input, so maps act on differences and biases count only for rounding.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import partial, singledispatch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    Run,
    Scale,
    Slope,
    Sum,
    TransposedConv,
    no_rule,
)
from brittle.linear.conv_geometry import ConvGeometry
from brittle.linear.convolution import apply, apply_transposed
from brittle.models.normalize import Normalize
from brittle.models.trace import NoRule

FEW_CHANNELS = 3
"""Channels of an input up to which a transposed convolution is added up tap by tap: torch takes up to nine times as
long."""


@dataclass(frozen=True, eq=False)
class Map:
    """One linear operation A, on batches.

    Attributes:
        forward: ``A d``.
        magnitude: ``|A| r`` for ``r >= 0``.
        transpose: ``A^T g``.
        terms: Most summands of one entry of ``A d`` or ``A^T g``; 0 for an operation that does not round.
        row_sum: Largest l_1 norm of a row of A.
        lengths: l_2 norms of the rows, broadcastable to a result; None where they are not known.
        offset: Largest magnitude of the constants added.
        rounding: Relative rounding of one entry, against the sum of the magnitudes of its summands.
        matrix: A itself, ``(out, in)``, for a dense layer on vectors.
        spread: ``A^T g`` of an image of as many positions as g has, where A is a convolution: all that these positions
            read, padding included.
    """

    forward: Run
    magnitude: Run
    transpose: Run
    terms: int
    row_sum: float
    lengths: Tensor | None = None
    offset: float = 0.0
    rounding: float = 0.0
    matrix: Tensor | None = None
    spread: Run | None = None


@singledispatch
def as_map(rule: object, op: Op, shape: tuple[int, ...], called: object, like: Tensor) -> Map | None:
    """The map of a linear operation; None for one that relaxations treat otherwise.

    Args:
        rule: The operation's rule.
        op: The operation.
        shape: Shape of what it reads, with a batch of one.
        called: The module or function that computes it: a module's constants count for rounding.
        like: A tensor with the type and device to compute in.

    Raises:
        NoRule: The operation has no linear relaxation, or is not understood well enough to say what it rounds.
    """
    raise no_rule(op, "linear relaxation")


@as_map.register
def _(rule: Input | MaxPool | Sum | Concat, op: Op, shape: tuple[int, ...], called: object, like: Tensor) -> None:
    return None


@as_map.register
def _(rule: Slope, op: Op, shape: tuple[int, ...], called: object, like: Tensor) -> None:
    if not rule.kinked:
        name = type(called).__name__ if isinstance(called, nn.Module) else getattr(called, "__name__", called)
        raise NoRule(f"{op.name}: no linear relaxation for {name}")


@as_map.register
def _(rule: Multiple, op: Op, shape: tuple[int, ...], called: object, like: Tensor) -> Map:
    factor = rule.factor
    multiple = Map(lambda d: d * factor, lambda r: r * abs(factor), lambda g: g * factor, 1, abs(factor))
    return _with_rounding(multiple, like)


@as_map.register
def _(rule: Scale, op: Op, shape: tuple[int, ...], called: object, like: Tensor) -> Map:
    s = rule.factors.to(like).view(1, -1, *[1] * (len(shape) - 2))
    diagonal = Map(lambda d: d * s, lambda r: r * s.abs(), lambda g: g * s, 4, float(s.abs().max()))
    return _with_rounding(diagonal, like, _offset(op, rule.factors, called))


@as_map.register
def _(rule: Dense, op: Op, shape: tuple[int, ...], called: object, like: Tensor) -> Map:
    W = rule.W.to(like)
    size = W.abs()
    dense = Map(
        lambda d: F.linear(d, W), lambda r: F.linear(r, size), lambda g: g @ W, max(W.shape),
        float(size.sum(1).max()), W.norm(dim=1), matrix=W if len(shape) == 2 else None,
    )  # fmt: skip
    return _with_rounding(dense, like, _offset(op, None, called), reduced_precision(like))


@as_map.register
def _(rule: Conv, op: Op, shape: tuple[int, ...], called: object, like: Tensor) -> Map:
    geometry, axes = rule.geometry, rule.K.ndim - 2
    if geometry.mode != "zeros":
        raise NoRule(f"{op.name}: no linear relaxation for {geometry.mode} padding")
    convolve = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    K = rule.K.to(like)
    size = K.abs()
    widths = [width for pair in reversed(geometry.padding) for width in pair]

    def forward(d: Tensor, kernel: Tensor = K) -> Tensor:
        result: Tensor = convolve(
            F.pad(d, widths), kernel, None, geometry.stride, 0, geometry.dilation, geometry.groups
        )
        return result

    def spread(g: Tensor) -> Tensor:
        return _spread(g, K, geometry)

    def transpose(g: Tensor) -> Tensor:
        whole = spread(g)
        axes = list(zip(whole.shape[2:], shape[2:], geometry.padding, strict=True))
        return F.pad(whole, [width for full, n, (ahead, _) in reversed(axes) for width in (-ahead, n + ahead - full)])

    flat = K.flatten(1)
    terms = max(flat.shape[1], len(K) // geometry.groups * K[0, 0].numel())  # forwards and backwards
    lengths = forward(K.new_ones(1, *shape[1:]), K.square()).sqrt()  # rows that reach into the padding are shorter
    convolution = Map(
        forward,
        lambda r: forward(r, size),
        transpose,
        terms,
        float(size.flatten(1).sum(1).max()),
        lengths,
        spread=spread,
    )
    return _with_rounding(convolution, like, _offset(op, None, called), reduced_precision(like, convolution=True))


@as_map.register
def _(rule: TransposedConv, op: Op, shape: tuple[int, ...], called: object, like: Tensor) -> Map:
    assert op.shape is not None
    K, geometry, after = rule.K.to(like), rule.geometry, op.shape[2:]

    def back(g: Tensor) -> Tensor:
        g = apply(K, geometry, g)
        for axis, n in enumerate(shape[2:], 2):  # a convolution of an image with output_padding may yield more
            g = g.narrow(axis, 0, n)
        return g

    rows = K.unflatten(0, (geometry.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)  # all that a channel may read
    terms = max(rows.shape[1], K[0].numel())  # forwards and backwards
    lengths = apply_transposed(K.square(), geometry, K.new_ones(1, *shape[1:]), after).sqrt()
    transposed = Map(
        lambda d: apply_transposed(K, geometry, d, after), lambda r: apply_transposed(K.abs(), geometry, r, after),
        back, terms, float(rows.abs().sum(1).max()), lengths,
    )  # fmt: skip
    return _with_rounding(transposed, like, _offset(op, None, called), reduced_precision(like, convolution=True))


@as_map.register
def _(rule: Average, op: Op, shape: tuple[int, ...], called: object, like: Tensor) -> Map:
    spread = None
    if rule.stencil is not None:
        kernel, stride, padding = rule.stencil
        K = like.new_full((shape[1], 1, *kernel), 1 / math.prod(kernel))
        geometry = ConvGeometry(stride, tuple((n, n) for n in padding), (1,) * len(kernel), shape[1])
        spread = partial(_spread, K=K, geometry=geometry)
    adjoint = _adjoint(op, rule.run, shape, like)
    return _with_rounding(Map(rule.run, rule.run, adjoint, math.prod(shape[1:]), 1.0, spread=spread), like)


@as_map.register
def _(rule: Rearrange, op: Op, shape: tuple[int, ...], called: object, like: Tensor) -> Map:
    assert op.shape is not None
    after = op.shape[1:]
    if rule.flattens:
        return Map(
            lambda d: d.reshape(len(d), *after), lambda r: r.reshape(len(r), *after),
            lambda g: g.reshape(len(g), *shape[1:]), 0, 1.0,
        )  # fmt: skip
    if rule.run is None:
        raise NoRule(f"{op.name}: a rearrangement that is not understood")
    return Map(rule.run, rule.run, _adjoint(op, rule.run, shape, like), 0, 1.0)


def unit_roundoff(dtype: torch.dtype) -> float:
    """``u``: the largest relative error of one operation, rounded to nearest."""
    return torch.finfo(dtype).eps / 2


def _with_rounding(exact: Map, like: Tensor, offset: float = 0.0, extra: float = 0.0) -> Map:
    """The map with its rounding: ``gamma_m = m u / (1 - m u)``, m its summands and six operations more.

    Source: Higham 2002, section 3.1.
    """
    mu = (exact.terms + 6) * unit_roundoff(like.dtype)
    if mu > 0.01:
        raise NoRule(f"{like.dtype} is too coarse to bound sums of {exact.terms} terms")
    lengths = None if exact.lengths is None else exact.lengths * (1 + mu)
    return replace(
        exact, row_sum=exact.row_sum * (1 + mu), lengths=lengths, offset=offset, rounding=mu / (1 - mu) + extra
    )


def reduced_precision(like: Tensor, *, convolution: bool = False) -> float:
    """What products of single precision lose more where torch may cut both factors, to 10 bits or to 7."""
    if like.dtype != torch.float32:
        return 0.0
    bits = {"high": 10, "medium": 7}.get(torch.get_float32_matmul_precision())
    if like.device.type == "cuda" and bits is None:
        allowed = torch.backends.cudnn.allow_tf32 if convolution else torch.backends.cuda.matmul.allow_tf32
        bits = 10 if allowed else None
    return 0.0 if bits is None else 2.1 * 2.0**-bits


def sum_factor(summands: Tensor) -> float:
    """Raises a radius by what its sum along the last axis, and a middle's of at most its magnitude, can lose."""
    return 1 + 4 * ((summands.shape[-1] + 16) * unit_roundoff(summands.dtype) + reduced_precision(summands))


def _offset(op: Op, factors: Tensor | None, called: object) -> float:
    """Largest constant that a module adds on the way; ``factors`` are those of a diagonal matrix."""
    if isinstance(called, Normalize):
        return float((called.mean / called.std).abs().max())
    if isinstance(called, nn.modules.batchnorm._BatchNorm) and factors is not None:
        mean, bias = called.running_mean, called.bias
        assert mean is not None
        shifted = (mean.detach().cpu() * factors.cpu()).abs()
        return float((shifted if bias is None else shifted + bias.detach().cpu().abs()).max())
    if isinstance(called, nn.Linear | nn.modules.conv._ConvNd):
        return 0.0 if called.bias is None else float(called.bias.detach().abs().max())
    raise NoRule(f"{op.name}: the constants that it adds are not known")


def _adjoint(op: Op, run: Run, shape: tuple[int, ...], like: Tensor) -> Run:
    """``A^T`` of a map recorded with a batch of one, if a larger batch passes as samples side by side."""
    assert op.shape is not None
    try:
        after = tuple(run(like.new_zeros(2, *shape[1:])).shape)
    except RuntimeError:
        after = ()
    if after != (2, *op.shape[1:]):
        raise NoRule(f"{op.name}: mixes the samples of a batch")

    def transpose(g: Tensor) -> Tensor:
        with torch.enable_grad():
            at = g.new_zeros(len(g), *shape[1:]).requires_grad_(True)
            return torch.autograd.grad(run(at), at, g)[0]

    return transpose


def _spread(g: Tensor, K: Tensor, geometry: ConvGeometry) -> Tensor:
    """All that the positions of g ``(B, out, *size)`` read, padding included: ``(B, in, *extent)``.

    By whichever way is quickest: measured, torch's own is the last.
    """
    axes, kernel, size, stride, dilation = K.ndim - 2, K.shape[2:], g.shape[2:], geometry.stride, geometry.dilation
    spans, channels = geometry.spans(kernel), K.shape[1] * geometry.groups
    extent = [(n - 1) * step + span + 1 for n, step, span in zip(size, stride, spans, strict=True)]
    if geometry.groups == 1 and math.prod(size) == max(dilation) == 1:
        return (g.flatten(1) @ K.flatten(1)).view(len(g), channels, *kernel)
    if geometry.groups == 1 and channels <= FEW_CHANNELS:
        taps = (K.flatten(1).mT @ g.transpose(0, 1).flatten(1)).view(channels, math.prod(kernel), len(g), *size)
        result = g.new_zeros(channels, len(g), *extent)
        for number, tap in enumerate(itertools.product(*map(range, kernel))):
            walk = zip(tap, dilation, stride, size, strict=True)
            steps = (slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, s, n in walk)
            places = (slice(None), slice(None), *steps)
            result[places].add_(taps[:, number])
        return result.transpose(0, 1)
    if max(stride) == 1:  # a convolution with the kernel turned around
        turned = K.unflatten(0, (geometry.groups, -1)).transpose(1, 2).flatten(0, 1).flip(*range(2, 2 + axes))
        return (F.conv1d, F.conv2d, F.conv3d)[axes - 1](g, turned, None, 1, spans, dilation, geometry.groups)
    zeros, like_input = [0] * axes, g.new_empty(1).expand(len(g), channels, *extent)
    gradient: Tensor = torch.ops.aten.convolution_backward(
        g.contiguous(), like_input, K, None, list(stride), zeros, list(dilation), False, zeros, geometry.groups,
        [True, False, False],
    )[0]  # fmt: skip
    return gradient
