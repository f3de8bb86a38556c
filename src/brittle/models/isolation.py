"""Foreign code that builds networks, kept from the caller's random states and default dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def isolated_globals(seed: int) -> Iterator[None]:
    """Seed the CPU's random numbers inside and put back, at the end, all random states and the default dtype."""
    dtype = torch.get_default_dtype()
    devices = range(len(torch.cuda.default_generators))  # none before CUDA is in use
    try:
        with torch.random.fork_rng(devices=devices), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the accelerators
            yield
    finally:
        torch.set_default_dtype(dtype)
