"""Tasks shared out among workers, each of which may die."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

from brittle.sweeps.work import Done, Task

ASK_AGAIN = 0.5
"""Seconds until a task is asked for again where there was none."""


class Worker(Protocol):
    """A process somewhere that does one task after the other."""

    @property
    def lives(self) -> bool:
        """Whether it is started and has not died since."""

    def start(self) -> None:
        """Start the process and wait until it stands."""

    def do(self, task: Task) -> Done:
        """Have a task done and wait for it; where the process dies, that is the error."""

    def kill(self) -> None:
        """Kill the process, which ends what waits for it. Called from another thread, at any time."""

    def close(self) -> None:
        """Kill the process, and wait until it is gone."""


def share_out(tasks: Iterator[Task | None], workers: Sequence[Worker]) -> Generator[Done, None, None]:
    """Give every worker that is free the next task, and yield what comes of them; start again those that died.

    A worker that takes long to start, as one that a cluster has no room for, holds up no task. Whatever ends this, an
    interrupt as well, kills the workers: of a task that is not done nothing is left.

    Args:
        tasks: None in place of a task means to ask again later.
        workers: Not yet started.
    """
    idle: list[Worker] = []
    doing: dict[Future[Any], Worker] = {}
    over = False
    with ThreadPoolExecutor(len(workers)) as pool:  # a thread waits for each worker
        starting: dict[Future[Any], Worker] = {pool.submit(worker.start): worker for worker in workers}
        try:
            while not over or doing:
                while idle and not over:
                    try:
                        task = next(tasks)
                    except StopIteration:
                        over = True
                        break
                    if task is None:
                        break
                    worker = idle.pop()
                    doing[pool.submit(worker.do, task)] = worker
                if over and not doing:
                    break
                if idle and not (over or doing or starting):
                    time.sleep(ASK_AGAIN)
                finished = wait([*doing, *starting], ASK_AGAIN if idle and not over else None, FIRST_COMPLETED).done
                for start in starting.keys() & finished:
                    start.result()  # raises what kept the worker from starting
                    idle.append(starting.pop(start))
                for future in doing.keys() & finished:
                    worker = doing.pop(future)
                    if worker.lives:
                        idle.append(worker)
                    else:
                        starting[pool.submit(worker.start)] = worker
                    yield future.result()
        finally:
            for worker in workers:
                worker.kill()
    for worker in workers:
        worker.close()
