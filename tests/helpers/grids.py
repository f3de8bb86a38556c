"""Jobs whose effects can be counted, and that die or wait when they are told to."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Generator, Iterator
from pathlib import Path

from brittle.sweeps import Job
from brittle.sweeps.drivers import process
from brittle.sweeps.work import Done, Task, perform

HERE = "helpers.grids"


def add(*, a: int, b: int, folder: str) -> dict[str, object]:
    """The sum; leaves a line in ``folder`` for every call, and obeys what it finds there.

    ``kill-A-B`` kills the process unless it was killed before, ``hold-A-B`` has it wait until that file is gone, and
    ``fail-A-B`` lets it fail.
    """
    name = f"{a}-{b}"
    begin(Path(folder), name)
    place = Path(folder) / f"kill-{name}"
    if place.exists():
        place.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    while (Path(folder) / f"hold-{name}").exists():
        time.sleep(0.01)
    if (Path(folder) / f"fail-{name}").exists():
        raise ValueError(f"cannot add {a} and {b}")
    return {"sum": a + b}


def begin(folder: Path, name: str) -> None:
    """Leave a line for a call; lines of several processes do not mix."""
    with (folder / f"calls-{name}").open("a") as file:
        file.write(f"{os.getpid()}\n")


def calls(folder: Path, job: Job) -> list[int]:
    """The processes that were called with a job, one for every call."""
    path = folder / f"calls-{job.settings['a']}-{job.settings['b']}"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def grid(folder: Path, a: int = 3, b: int = 2, function: str = f"{HERE}:add") -> list[Job]:
    """Jobs that add, ``a`` times ``b`` of them, with effects in ``folder``."""
    folder.mkdir(exist_ok=True)
    settings = [{"a": i, "b": j} for i in range(a) for j in range(b)]
    return [Job(function, both, places={"folder": str(folder)}) for both in settings]


def in_this_process(tasks: Iterator[Task | None]) -> Generator[Done, None, None]:
    """An executor that does one task after the other where it is called."""
    for task in tasks:
        if task is None:
            time.sleep(0.01)
        else:
            yield Done(task, **perform(task.job.code, {**task.job.settings, **task.job.places}))


def gone(number: int) -> bool:
    """Whether there is no such process any more, or only its exit code."""
    return process(number) == str(number)
