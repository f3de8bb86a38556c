"""Convolutions on a torus: one small matrix a frequency, the (polyphase) symbol.

A convolution that pads with zeros is circular on a torus that the image fits with its padding, once the result is
taken on the image alone. Theory page, sections "Operator norms" and "Multipliers".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from brittle.linear.conv_geometry import ConvGeometry
from brittle.linear.spectrum import largest_singular_value

CHUNK = 2**20
"""Entries of the symbols that one thread decomposes at once: 16 MiB of complex numbers."""


def frequencies(grid: Sequence[int]) -> int:
    """Number of frequencies that are kept: half of the last axis stands for all; 1 off the torus."""
    return math.prod(grid[:-1]) * (grid[-1] // 2 + 1) if grid else 1


def symbol_blocks(K: Tensor, geometry: ConvGeometry, grid: Sequence[int]) -> Tensor:
    """Every group's convolution at every frequency w of a torus, with the padding's shift.

    Tap u reads position ``stride * p + offset``, ``offset = u * dilation - padding = stride * q + r``: it contributes
    ``K[o, c, u] exp(i w q)`` to column (c, r); the remainders r are the phases. Singular values do not depend on the
    padding, which permutes the columns and turns each by a phase. Offsets wrap around the torus.

    Args:
        K: Kernel ``(out, in / groups, *kernel)``.
        geometry: How it walks; its padding mode is not read.
        grid: Points of the torus per axis, counted after the stride.

    Returns:
        ``(groups, F, out / groups, in / groups * phases)``, complex. K is real, so that half of the last axis of
        frequencies stands for all; F is :func:`frequencies`.
    """
    K = K.double()
    phases, points = [], []
    axes = zip(K.shape[2:], geometry.dilation, geometry.stride, grid, geometry.padding, strict=True)
    for k, d, s, n, (before, _) in axes:
        offset = torch.arange(k) * d - before
        phases.append(offset % s)
        points.append(-torch.div(offset, s, rounding_mode="floor") % n)  # the transform's exponent has a minus
    lengths = [*geometry.stride, *grid]
    place = torch.zeros(K.shape[2:], dtype=torch.int64)
    indices = [*torch.meshgrid(*phases, indexing="ij"), *torch.meshgrid(*points, indexing="ij")]
    for index, length in zip(indices, lengths, strict=True):
        place = place * length + index
    image = torch.zeros(*K.shape[:2], math.prod(lengths), dtype=torch.float64)
    image = image.index_add(2, place.flatten(), K.flatten(2)).unflatten(2, [math.prod(geometry.stride), *grid])
    spectrum = torch.fft.rfftn(image, dim=list(range(-len(grid), 0))).flatten(3)
    return spectrum.unflatten(0, (geometry.groups, -1)).permute(0, 4, 1, 2, 3).flatten(3).contiguous()


def symbol(K: Tensor, geometry: ConvGeometry, grid: Sequence[int]) -> Tensor:
    """The convolution at every frequency of a torus, ``(F, out, in * phases)``: :func:`symbol_blocks` put together."""
    blocks = symbol_blocks(K, geometry, grid)
    if len(blocks) == 1:
        return blocks[0]
    groups, count, m, n = blocks.shape
    whole = blocks.new_zeros(count, groups, m, groups, n)
    whole.diagonal(dim1=1, dim2=3).copy_(blocks.permute(1, 2, 3, 0))
    return whole.flatten(3, 4).flatten(1, 2)


def largest_symbol_norm(K: Tensor, geometry: ConvGeometry, grid: Sequence[int]) -> float:
    """Largest singular value of the symbol over a torus of this many points per axis; exact up to rounding."""
    blocks = symbol_blocks(K, geometry, grid).flatten(0, 1)
    parts = blocks.split(max(1, CHUNK // blocks[0].numel()))
    with _single_threaded() as threads, ThreadPoolExecutor(threads) as pool:
        return max(pool.map(lambda part: float(largest_singular_value(part)[0].max()), parts))


@contextmanager
def _single_threaded() -> Iterator[int]:
    """One thread an operation inside the block, and how many there were: small decompositions gain from no more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
