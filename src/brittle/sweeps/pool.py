"""Tasks shared out among workers, each of which may die."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Protocol

from brittle.sweeps.work import Done, Task

ASK_AGAIN = 0.5
"""Seconds until a task is asked for again where there was none."""
Inbox = queue.SimpleQueue["Task | None"]
"""What a worker is told to do; None to end."""


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
        """Kill the process for good, which ends what waits for it. Called from another thread, at any time."""

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
    # Queues alone join the threads: an interrupt at any place leaves no lock behind, as it may with futures.
    heard: queue.SimpleQueue[Done | Inbox | BaseException] = queue.SimpleQueue()
    inboxes: list[Inbox] = [queue.SimpleQueue() for _ in workers]
    threads = [
        threading.Thread(target=_attend, args=(worker, inbox, heard), daemon=True)
        for worker, inbox in zip(workers, inboxes, strict=True)
    ]
    try:
        for thread in threads:
            thread.start()
        yield from _hand_out(tasks, heard)
    finally:
        for worker, inbox in zip(workers, inboxes, strict=True):
            worker.kill()
            inbox.put(None)
        for thread, worker in zip(threads, workers, strict=True):
            if thread.ident is not None:  # an interrupt may have come before all were started
                thread.join()
            worker.close()


def _hand_out(
    tasks: Iterator[Task | None], heard: queue.SimpleQueue[Done | Inbox | BaseException]
) -> Generator[Done, None, None]:
    """Answer what is heard of workers: that one is free, by its inbox, that a task is done, or what went wrong."""
    idle: list[Inbox] = []
    doing, over = 0, False
    while not over or doing:
        try:
            while idle and not over and (task := next(tasks)) is not None:
                idle.pop().put(task)
                doing += 1
        except StopIteration:
            over = True
            continue
        try:
            message = heard.get(timeout=ASK_AGAIN if idle and not over else None)
        except queue.Empty:
            continue
        if isinstance(message, BaseException):
            raise message
        if isinstance(message, Done):
            doing -= 1
            yield message
        else:
            idle.append(message)


def _attend(worker: Worker, inbox: Inbox, heard: queue.SimpleQueue[Done | Inbox | BaseException]) -> None:
    """Keep a worker alive and pass its tasks on, until there is none to come."""
    try:
        while True:
            if not worker.lives:
                worker.start()
            heard.put(inbox)
            task = inbox.get()
            if task is None:
                return
            heard.put(worker.do(task))
    except BaseException as error:
        heard.put(error)
