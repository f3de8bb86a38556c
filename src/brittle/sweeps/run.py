"""A sweep: every job done once, on whatever does jobs, and its row kept."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from brittle._version import __version__
from brittle.errors import InputError
from brittle.progress import DONE_BEFORE, Progress, silent
from brittle.sweeps.drivers import Driver, Watch
from brittle.sweeps.job import Job
from brittle.sweeps.processes import on_processes
from brittle.sweeps.store import State, Store
from brittle.sweeps.work import Done, Task

Executor = Callable[[Iterator["Task | None"]], Generator[Done, None, None]]
"""What does jobs. It takes a task whenever a worker is idle and yields what came of tasks, in any order.

None in place of a task means that there is none at present, and that it is to ask again: after the next result, or a
moment later where it awaits none. It never raises for a task's sake.
"""
LOOK_AGAIN = 2.0
"""Seconds after which the store is looked through again for what other drivers did."""


@dataclass(frozen=True)
class Failure:
    """A job that failed, and how.

    Attributes:
        job: The job.
        error: Type and message, in one line.
        trace: The traceback, or the last that its worker wrote.
    """

    job: Job
    error: str
    trace: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of every job of a sweep.

    Attributes:
        done: Landed by this call.
        skipped: Had landed before, or were landed meanwhile by another driver.
        failed: Failed as often as they may be tried.
    """

    done: tuple[Job, ...]
    skipped: tuple[Job, ...]
    failed: tuple[Failure, ...]


def run_sweep(
    jobs: Sequence[Job],
    store: Store,
    executor: Executor = on_processes,
    *,
    retries: int = 1,
    progress: Progress = silent,
) -> Outcome:
    """Do every job that has not landed in the store, and keep its row there.

    Jobs that failed in an earlier call are tried again. Another call on the same store, at the same time and on
    whatever machine, shares the jobs with this one. An interrupt, or the end of this process, loses only the jobs that
    are being done.

    Args:
        jobs: Jobs; those of one key count as one.
        store: Where rows are kept.
        executor: What does them.
        retries: How often a job that fails is tried again.
        progress: Called with ``"jobs"``, how many landed or failed for good, and how many there are.

    Raises:
        InputError: A job's code cannot be found, or the store is of no known kind.
    """
    if retries < 0:
        raise InputError(f"retries: expected at least 0; got {retries}")
    by_key = {job.key: job for job in jobs}
    with Driver(store, list(by_key.values())) as driver:
        sweep = _Sweep(by_key, store, driver.name, retries, progress)
        if sweep.waiting:
            with closing(executor(sweep.tasks())) as results:  # workers end before this driver says that it is gone
                for done in results:
                    sweep.keep(done)
    return sweep.outcome()


class _Sweep:
    """Which jobs of a sweep wait, are in hand, landed and failed."""

    def __init__(self, jobs: dict[str, Job], store: Store, driver: str, retries: int, progress: Progress) -> None:
        self.jobs, self.store, self.driver, self.retries, self.progress = jobs, store, driver, retries, progress
        self.watch = Watch(store)
        self.states = store.states()
        self.outdated = False
        self.rest_until = 0.0
        # What failed before this call does not count: it is tried again.
        self.failed_before = {key: len(state.failures) for key, state in self.states.items()}
        self.done: list[str] = []
        self.skipped = [key for key in jobs if self.states.get(key, State()).landed]
        self.failed: dict[str, str] = {}
        self.in_hand: set[str] = set()
        self.waiting = deque(key for key in jobs if not self.states.get(key, State()).landed)
        if self.skipped and self.waiting:
            self.progress(f"jobs{DONE_BEFORE}", len(self.skipped), len(self.jobs))
        self.tell()

    def tasks(self) -> Iterator[Task | None]:
        """The next job to be done by this driver; None where others have all that is left in hand."""
        while self.waiting or self.in_hand:
            yield self.next_task()

    def next_task(self) -> Task | None:
        """A job that is this driver's now; None where none can be begun at the moment."""
        if not self.waiting or time.monotonic() < self.rest_until:
            return None
        if self.outdated:
            self.states, self.outdated = self.store.states(), False
        for _ in range(len(self.waiting)):
            key = self.waiting.popleft()
            state = self.states.get(key, State())
            if state.landed:
                self.skipped.append(key)
            elif len(state.failures) - self.failed_before.get(key, 0) > self.retries:
                self.failed[key] = f"jobs/{key}/error-{state.failures[-1]}.json"
            elif not (state.open and self.elsewhere(key, state.tries)) and self.claim(key, state.tries + 1):
                if not self.store.exists(f"jobs/{key}/row.json"):
                    self.in_hand.add(key)
                    return Task(self.jobs[key], state.tries + 1)
                self.skipped.append(key)
            else:
                self.waiting.append(key)
            self.tell()
        # Others have what is left, and may fail or die.
        self.outdated, self.rest_until = True, time.monotonic() + LOOK_AGAIN
        return None

    def elsewhere(self, key: str, number: int) -> bool:
        """Whether another driver that lives has begun this try."""
        name = f"jobs/{key}/try-{number}.json"
        driver = self.store.read([name]).get(name, {}).get("driver", name)
        # An object store may say that a file is there which this driver has just put, if an answer was lost.
        return driver != self.driver and self.watch.lives(driver)

    def claim(self, key: str, number: int) -> bool:
        """Begin a try, unless another driver has begun it: of two that think the last one gone, one gets it."""
        claimed = self.store.create(f"jobs/{key}/try-{number}.json", {"driver": self.driver})
        self.outdated |= not claimed
        return claimed

    def keep(self, done: Done) -> None:
        """Keep what came of a job."""
        job, key = done.task.job, done.task.job.key
        self.in_hand.remove(key)
        folder = f"jobs/{key}"
        if done.row is not None:
            document = {
                "key": key,
                "function": job.code.name,
                "settings": dict(job.settings),
                "data": job.data,
                "row": done.row,
                "seconds": done.seconds,
                "brittle": __version__,
            }
            # It may have landed meanwhile where this driver was taken to be gone: what landed stays as it is.
            if self.store.exists(f"{folder}/row.json"):
                self.skipped.append(key)
            else:
                self.store.put(f"{folder}/row.json", document)
                self.done.append(key)
        else:
            self.store.put(f"{folder}/error-{done.task.number}.json", {"error": done.error, "trace": done.trace})
            earlier = self.states.get(key, State()).failures
            self.states[key] = State(tries=done.task.number, failures=(*earlier, done.task.number))
            self.waiting.append(key)
            self.rest_until = 0.0
        self.tell()

    def tell(self) -> None:
        self.progress("jobs", len(self.done) + len(self.skipped) + len(self.failed), len(self.jobs))

    def outcome(self) -> Outcome:
        errors = self.store.read(self.failed.values())
        failures = [
            Failure(self.jobs[key], **errors.get(name, {"error": "error: lost"})) for key, name in self.failed.items()
        ]
        done, skipped = (tuple(self.jobs[key] for key in keys) for keys in (self.done, self.skipped))
        return Outcome(done, skipped, tuple(failures))
