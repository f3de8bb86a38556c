"""Packed execution: a sample leaves the batch as soon as it is done, and waiting ones take its place.

A search is a state machine per sample. Its state is a dictionary of tensors whose first axis counts samples; none of
its rows depends on another, so what happens to a sample does not depend on the batch it shares (apart from the
rounding of matrix products of other shapes). What is only counted may stay on the CPU beside points on a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from brittle.models.forward import fitting

State = dict[str, Tensor]
Tell = Callable[[int], None]
"""Progress: called with the number of samples that are done."""

logger = logging.getLogger(__name__)


class Search(Protocol):
    """One search over a pool of samples, as the packed execution drives it."""

    def begin(self, rows: Tensor) -> State:
        """The first state of the samples at ``rows`` ``(n,)`` of the pool; every tensor ``(n, ...)``."""

    def measure(self, state: State) -> Any:
        """Put the state's points through the network, once; changes nothing."""

    def advance(self, state: State, measured: Any) -> Tensor:
        """Take one step (in place, or by new tensors in ``state``); which samples are done, ``(n,)``."""

    def finish(self, rows: Tensor, state: State, done: Tensor) -> None:
        """Keep the results of the slots ``done``; they hold the pool's ``rows``."""


def run(search: Search, total: int, width: int, device: torch.device, tell: Tell | None = None) -> None:
    """Drive a search over a pool of samples, at most ``width`` at once.

    When memory runs out, half of the samples are set aside with their states, the width is halved and the others go
    on; nothing is lost or repeated.

    Args:
        search: What to run.
        total: Samples in the pool.
        width: Most samples at once, at least 1.
        device: Where row numbers live.
        tell: Called with the samples done.

    Raises:
        torch.OutOfMemoryError: A single sample does not fit.
    """
    rows = torch.arange(min(width, total), device=device)
    state = search.begin(rows)
    waiting = _Waiting(search, len(rows), total, 1 + len(rows) // 4)
    finished = 0
    while len(rows):
        measured = fitting(lambda state=state: search.measure(state), len(rows))  # type: ignore[misc]
        if measured is None:
            keep = len(rows) // 2
            logger.warning("out of memory with %d samples at once: going on with %d", len(rows), keep)
            waiting.put(*_copied(rows, state, slice(keep, None)))
            rows, state = _copied(rows, state, slice(keep))
            continue
        done = search.advance(state, measured).nonzero()[:, 0]
        if len(done) == 0:
            continue
        done = done.to(device)
        search.finish(rows[done], state, done)
        finished += len(done)
        holes = done
        while len(holes) and (incoming := waiting.take(len(holes), device)):
            new_rows, new_state = incoming
            filled, holes = holes[: len(new_rows)], holes[len(new_rows) :]
            rows[filled] = new_rows
            for name, values in new_state.items():
                state[name].index_copy_(0, filled.to(values.device), values)
        if len(holes):
            rows, state = _closed(rows, state, holes)
        if tell is not None:
            tell(finished)


class _Waiting:
    """Samples that have no slot yet: those set aside first, then the ones not begun, some at a time."""

    def __init__(self, search: Search, begun: int, total: int, ahead: int) -> None:
        self.search, self.begun, self.total, self.ahead = search, begun, total, ahead
        self.aside: list[tuple[Tensor, State]] = []

    def put(self, rows: Tensor, state: State) -> None:
        """Set samples aside with their states."""
        self.aside.append((rows, state))

    def take(self, most: int, device: torch.device) -> tuple[Tensor, State] | None:
        """At most ``most`` samples with their states; None when nobody waits."""
        if not self.aside:
            if self.begun == self.total:
                return None
            end = min(self.begun + max(most, self.ahead), self.total)
            rows, self.begun = torch.arange(self.begun, end, device=device), end
            self.put(rows, self.search.begin(rows))
        rows, state = self.aside.pop()
        if len(rows) > most:
            self.put(rows[most:], {name: values[most:] for name, values in state.items()})
        return rows[:most], {name: values[:most] for name, values in state.items()}


def _copied(rows: Tensor, state: State, part: slice) -> tuple[Tensor, State]:
    """Some of the slots, in memory of their own."""
    return rows[part].clone(), {name: values[part].clone() for name, values in state.items()}


def _closed(rows: Tensor, state: State, holes: Tensor) -> tuple[Tensor, State]:
    """Move the last rows into the holes and cut the end off."""
    size = len(rows) - len(holes)
    last = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    last[holes] = False
    last[:size] = False
    last_rows, holes = last.nonzero()[:, 0], holes[holes < size]
    if len(holes):
        for values in (rows, *state.values()):
            values[holes.to(values.device)] = values[last_rows.to(values.device)]
    return rows[:size], {name: values[:size] for name, values in state.items()}
