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
from brittle.linear.spectrum import largest_norm

CHUNK = 2**18
"""Entries of the symbols that one thread looks at together: 4 MiB of complex numbers."""


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
    # A sum over few taps for each frequency: a product of matrices, which lies in memory as it is read next.
    counts = [*grid[:-1], grid[-1] // 2 + 1]
    frequency = _points(counts)
    offset = _points(K.shape[2:]) * torch.tensor(geometry.dilation) - torch.tensor([pad for pad, _ in geometry.padding])
    stride, period = torch.tensor(geometry.stride), torch.tensor(grid)
    steps = torch.div(offset, stride, rounding_mode="floor")
    turns = ((frequency[:, None] * steps) % period / period.double()).sum(2)
    taps = K.double().flatten(2).permute(2, 0, 1).flatten(1)
    phases = []
    for phase in _points(geometry.stride):
        met = (offset % stride == phase).all(1)
        angle = 2 * math.pi * turns[:, met]
        phases.append(torch.complex(angle.cos() @ taps[met], angle.sin() @ taps[met]))
    columns = phases[0] if len(phases) == 1 else torch.stack(phases, -1)
    return columns.view(len(frequency), geometry.groups, K.shape[0] // geometry.groups, -1).transpose(0, 1)


def _points(sizes: Sequence[int]) -> Tensor:
    """All points of a box of integers from 0, ``(prod(sizes), axes)``, the last axis fastest."""
    return torch.stack(torch.meshgrid(*map(torch.arange, sizes), indexing="ij"), -1).flatten(0, -2)


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
    largest = largest_norm(blocks[:1])
    parts = blocks[1:].split(max(1, CHUNK // blocks[0].numel()))

    def norm_of(part: Tensor) -> float:
        nonlocal largest
        # Threads may write over each other's norm, which costs a computation and changes no result.
        norm = largest = largest_norm(part, largest)
        return norm

    with _single_threaded() as threads, ThreadPoolExecutor(threads) as pool:
        return max([largest, *pool.map(norm_of, parts)]) if len(blocks) > 1 else largest


@contextmanager
def _single_threaded() -> Iterator[int]:
    """One thread an operation inside the block, and how many there were: small decompositions gain from no more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
