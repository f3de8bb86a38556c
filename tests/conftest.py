"""What holds for every test: one thread, no process that outlives it, and what tests share stays as it is."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator

import pytest
import torch

from brittle.cli import progress
from helpers import networks

progress.SECONDS = math.inf  # however slow the machine is, no line about progress stands on standard error
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


@pytest.fixture(autouse=True)
def shared_samples_and_networks_stay() -> Iterator[None]:
    """Fail a test that changes a sample or a weight that others use; which fail by it depends on their order."""
    yield
    with torch.no_grad():
        assert networks.repaired() == []
