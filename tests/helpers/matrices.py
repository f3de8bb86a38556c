"""Matrices of every kind that the theory distinguishes, as a hypothesis strategy."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def _rank_deficient(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    rank = 1 + int(rng.integers(max(1, min(m, n) // 2)))
    return rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n))


def _with_zero_rows(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    return rng.standard_normal((m, n)) * (rng.random((m, 1)) < 0.5)


KINDS = {
    "gaussian": lambda rng, m, n: rng.standard_normal((m, n)),
    "heavy tails": lambda rng, m, n: np.clip(rng.standard_cauchy((m, n)), -1e6, 1e6),
    "sparse": lambda rng, m, n: rng.standard_normal((m, n)) * (rng.random((m, n)) < rng.uniform(0.2, 0.4)),
    "rank deficient": _rank_deficient,
    "power-law rows": lambda rng, m, n: rng.standard_normal((m, n)) * np.arange(1.0, m + 1)[:, None] ** -2,
    "zero rows": _with_zero_rows,
    "ties": lambda rng, m, n: rng.integers(-2, 3, (m, n)).astype(float),
    "signs": lambda rng, m, n: rng.choice([-1.0, 1.0], (m, n)),
    "identity": lambda rng, m, n: np.eye(m, n),
    "row": lambda rng, m, n: rng.standard_normal((1, n)),
    "column": lambda rng, m, n: rng.standard_normal((m, 1)),
    "zero": lambda rng, m, n: np.zeros((m, n)),
}


def matrix(kind: str, m: int, n: int, seed: int) -> Tensor:
    """One matrix of a kind, in float64; a single row or column has only one of the two sizes."""
    return torch.from_numpy(np.ascontiguousarray(KINDS[kind](np.random.default_rng(seed), m, n)))


def matrices(largest: int = 24, zero: bool = True) -> st.SearchStrategy[Tensor]:
    """Matrices up to ``largest`` on both sides; drawn by kind and seed, so that they shrink at once."""
    side, seed = st.integers(1, largest), st.integers(0, 2**32 - 1)
    drawn = st.builds(matrix, st.sampled_from(list(KINDS)), side, side, seed)
    return drawn if zero else drawn.filter(lambda W: bool(W.any()))


def vectors(largest: int = 24, zero: bool = True) -> st.SearchStrategy[Tensor]:
    """Vectors: all entries of such a matrix of one row."""
    side, seed = st.integers(1, largest), st.integers(0, 2**32 - 1)
    drawn = st.builds(lambda kind, n, seed: matrix(kind, 1, n, seed)[0], st.sampled_from(list(KINDS)), side, seed)
    return drawn if zero else drawn.filter(lambda v: bool(v.any()))
