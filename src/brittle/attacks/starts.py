"""Random numbers that belong to a sample, whatever batch it shares, and whatever device it is on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from brittle.attacks.ball import Ball
from brittle.errors import InputError


def generator(seed: int, name: int) -> torch.Generator:
    """A CPU generator whose numbers depend on ``seed`` and on the sample's id ``name`` alone."""
    return torch.Generator().manual_seed(_number(seed, name))


def _number(seed: int, name: int) -> int:
    digest = hashlib.sha256(b"%d:%d" % (seed, name)).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def random_start(ball: Ball, seed: int, names: Sequence[int]) -> Tensor:
    """A random point of every sample's budget sphere, projected onto the bounds.

    p = inf: uniform noise scaled to largest magnitude eps; p = 2: a uniform direction (as Croce & Hein 2020).

    Args:
        ball: The samples and their budgets.
        seed: Seed of the draw.
        names: One id a sample; a sample's start depends on ``seed`` and its id alone.

    Returns:
        ``(N, ...)``, like ``ball.x``.
    """
    noise = torch.empty(ball.x.shape, dtype=torch.float32)
    source = torch.Generator()
    for row, name in zip(noise.unbind(), names, strict=True):
        source.manual_seed(_number(seed, name))
        if math.isinf(ball.p):
            row.uniform_(generator=source)
        else:
            row.normal_(generator=source)
    if math.isinf(ball.p):
        noise.mul_(2).sub_(1)
    return ball.start(noise.to(ball.x))


def sample_ids(ids: Tensor | None, n: int) -> list[int]:
    """The samples' ids; their positions when none are given.

    Raises:
        InputError: There are not n of them.
    """
    names = list(range(n)) if ids is None else [int(i) for i in ids]
    if len(names) != n:
        raise InputError(f"ids: expected {n} of them, one a sample; got {len(names)}")
    return names
