"""What holds for every test: one thread, and no process that outlives it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)  # the tests' matrices are small, and tests run beside each other


@pytest.fixture(autouse=True)
def no_process_stays() -> Iterator[None]:
    """Kill the processes that a test left, and fail it for them; those of ``helpers.processes`` end by themselves."""
    before = set(multiprocessing.active_children())
    yield
    left = set(multiprocessing.active_children()) - before
    for process in left:
        process.kill()
        process.join(10)
    assert not left
