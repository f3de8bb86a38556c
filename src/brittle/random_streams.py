"""Random numbers that belong to a sample, whatever batch it shares and whatever device it is on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
"""2^64 over the golden ratio, odd, as a signed number: steps by it visit all 64-bit numbers, spread evenly."""


def generator(seed: int, name: int) -> torch.Generator:
    """A CPU generator whose numbers depend on ``seed`` and on the sample's id ``name`` alone."""
    return torch.Generator().manual_seed(seed_of(seed, name))


def seed_of(seed: int, name: int) -> int:
    """63 bits that depend on ``seed`` and the sample's id ``name`` alone."""
    digest = hashlib.sha256(b"%d:%d" % (seed, name)).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def stream_keys(seed: int, names: Sequence[int]) -> Tensor:
    """One 63-bit integer a sample, ``(N,)`` on the CPU, from ``seed`` and the sample's id alone."""
    return torch.tensor([seed_of(seed, name) for name in names])


def uniform(keys: Tensor, counters: Tensor, count: int) -> Tensor:
    """Numbers ``0`` to ``count - 1`` of block ``counters`` of the streams ``keys``: SplitMix64 (Steele et al. 2014).

    Args:
        keys: One integer a sample ``(N,)``, int64.
        counters: Which block of the sample's stream, ``(N,)``, int64 from 0, below 2^31.
        count: Numbers of a block, below 2^32.

    Returns:
        ``(N, count)`` in float64, multiples of 2^-53 in [0, 1); each depends on its key, counter and place alone.
    """
    places = torch.arange(count, device=keys.device)
    numbers = (keys + GOLDEN * (counters << 32))[:, None] + GOLDEN * places
    return _shift_right(_mix(numbers), 11).double() * 2.0**-53


def _mix(z: Tensor) -> Tensor:
    """A one-to-one map of 64-bit integers that spreads every bit over all; products wrap around."""
    z = (z ^ _shift_right(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ _shift_right(z, 27)) * (0x94D049BB133111EB - 2**64)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift right with zeros from the left: ``>>`` alone copies the sign of a signed number."""
    return (z >> bits) & (2 ** (64 - bits) - 1)
