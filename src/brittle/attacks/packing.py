"""Packed execution: a sample leaves the batch as soon as it is done, and a waiting one takes its place.

An iterative attack is made of three parts:

- the pool (:class:`brittle.attacks.pool.Pool`) holds all samples of a call, their budgets, and the results;
- the search (a :class:`Search`, one class for each attack) is a state machine per sample: it begins samples of the
  pool, says at which points it wants to see the network, takes a step, and says which samples are done;
- the driver (:func:`run`) owns the batch: it fills it with samples, repeats ``measure`` and ``advance``, lets the
  search ``finish`` what is done (the pool keeps it) and fills the slots that fall free.

The state of a search is a dictionary of tensors whose first axis counts the slots of the batch. None of its rows
depends on another, so what happens to a sample does not depend on the batch it shares (apart from the rounding of
matrix products of other shapes). A tensor may stay on the CPU, as counters do, while the points are on a GPU.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Protocol

import torch
from torch import Tensor

from brittle.models.forward import fitting, widest
from brittle.progress import Progress

State = dict[str, Tensor]

logger = logging.getLogger(__name__)


class Search(Protocol):
    """One search over a pool of samples, as the driver calls it; ``name`` is the stage that progress tells."""

    name: str

    def begin(self, rows: Tensor) -> State:
        """The first state of the samples at ``rows`` ``(n,)`` of the pool; every tensor ``(n, ...)``."""

    def measure(self, state: State) -> Any:
        """Put the state's points through the network, once; changes nothing."""

    def advance(self, state: State, measured: Any) -> Tensor:
        """Take one step (in place, or by new tensors in ``state``); which samples are done, ``(n,)``."""

    def finish(self, rows: Tensor, state: State, done: Tensor) -> None:
        """Keep the results of the slots ``done``; they hold the pool's ``rows``."""


def run(
    search: Search, total: int, batch_size: int | None, device: torch.device, progress: Progress | None = None
) -> None:
    """Drive a search over all samples of a pool.

    When memory runs out, half of the samples are set aside with their states, the batch is halved and the others go
    on; nothing is lost or repeated.

    Args:
        search: What to run.
        total: Samples in the pool.
        batch_size: Most samples at once, at least 1; all by default.
        device: Where row numbers live.
        progress: Called with the search's name, the samples done and ``total``.

    Raises:
        torch.OutOfMemoryError: A single sample does not fit.
    """
    rows = torch.arange(widest(batch_size, total), device=device)  # which sample of the pool each slot holds
    state = search.begin(rows)
    queue = _Queue(search, len(rows), total, device)
    finished = 0
    while len(rows):
        measured = fitting(functools.partial(search.measure, state), len(rows))
        if measured is None:
            keep = len(rows) // 2
            logger.warning("out of memory with %d samples at once: going on with %d", len(rows), keep)
            # Copies: views would keep the memory of the whole batch.
            queue.put(rows[keep:].clone(), {name: values[keep:].clone() for name, values in state.items()})
            rows, state = rows[:keep].clone(), {name: values[:keep].clone() for name, values in state.items()}
            continue
        done = search.advance(state, measured).nonzero()[:, 0]
        if len(done) == 0:
            continue
        done = done.to(device)
        search.finish(rows[done], state, done)
        finished += len(done)
        free = done
        while len(free) and (waiting := queue.take(len(free))):
            new_rows, new_state = waiting
            filled, free = free[: len(new_rows)], free[len(new_rows) :]
            rows[filled] = new_rows
            for name, values in new_state.items():
                state[name].index_copy_(0, filled.to(values.device), values)
        if len(free):
            rows, state = _close(rows, state, free)
        if progress is not None:
            progress(search.name, finished, total)


class _Queue:
    """Samples without a slot: those that were set aside with their states, then those not begun."""

    def __init__(self, search: Search, begun: int, total: int, device: torch.device) -> None:
        self.search, self.begun, self.total, self.device = search, begun, total, device
        self.fewest = 1 + begun // 4  # to begin some at a time costs hardly more than to begin one
        self.aside: list[tuple[Tensor, State]] = []

    def put(self, rows: Tensor, state: State) -> None:
        """Set samples aside with their states."""
        self.aside.append((rows, state))

    def take(self, most: int) -> tuple[Tensor, State] | None:
        """At most ``most`` samples with their states; None when none is left."""
        if not self.aside:
            if self.begun == self.total:
                return None
            end = min(self.begun + max(most, self.fewest), self.total)
            rows, self.begun = torch.arange(self.begun, end, device=self.device), end
            self.put(rows, self.search.begin(rows))
        rows, state = self.aside.pop()
        if len(rows) > most:
            self.put(rows[most:], {name: values[most:] for name, values in state.items()})
        return rows[:most], {name: values[:most] for name, values in state.items()}


def _close(rows: Tensor, state: State, free: Tensor) -> tuple[Tensor, State]:
    """Move samples from the end of the batch into the ``free`` slots and cut the end off."""
    size = len(rows) - len(free)
    is_moved = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    is_moved[free] = False
    is_moved[:size] = False
    moved, free = is_moved.nonzero()[:, 0], free[free < size]
    if len(free):
        for values in (rows, *state.values()):
            values[free.to(values.device)] = values[moved.to(values.device)]
    return rows[:size], {name: values[:size] for name, values in state.items()}
