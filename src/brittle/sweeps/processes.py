"""Jobs in processes of this machine."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import Any

from brittle.errors import InputError
from brittle.sweeps.pool import share_out
from brittle.sweeps.work import Done, Task

THREAD_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
TAIL = 4000
"""How much of what a worker wrote is kept when it dies, in bytes."""


def on_processes(
    tasks: Iterator[Task | None], *, workers: int | None = None, threads: int = 1
) -> Generator[Done, None, None]:
    """Do tasks in processes of this machine. A process that dies costs its task this try, and no other task anything.

    Workers are fresh Python processes that know the driver's ``sys.path``; none outlives the driver, however that ends.
    What a job prints goes to its worker's log, of which the end is kept when the worker dies.

    Args:
        tasks: See :data:`brittle.sweeps.run.Executor`.
        workers: How many; None for one a core that this process may use.
        threads: CPU threads of each: with as many workers as cores, more would only get in each other's way.

    Raises:
        InputError: ``workers`` or ``threads`` is below 1.
    """
    count = usable_cores() if workers is None else workers
    if count < 1 or threads < 1:
        raise InputError(f"workers: expected at least 1, of at least 1 thread; got {count} of {threads}")
    yield from share_out(tasks, [_Process(threads) for _ in range(count)])


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Process:
    """A worker that is a process of this machine, told its tasks through a pipe."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.process: subprocess.Popen[str] | None = None
        self.over = False

    @property
    def lives(self) -> bool:
        return self.process is not None

    def start(self) -> None:
        if self.over:
            return
        environment = os.environ | dict.fromkeys(THREAD_COUNTS, str(self.threads))
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        command = [sys.executable, "-c", "from brittle.sweeps.worker import serve; serve()"]
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = subprocess.Popen(command, env=environment, text=True, encoding="utf-8", **pipes)

    def do(self, task: Task) -> Done:
        """Have a task done and wait for it; the process's death is an error of the task."""
        process, job, reply = self.process, task.job, ""
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        request = {"code": dataclasses.asdict(job.code), "arguments": {**job.settings, **job.places}}
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            reply = process.stdout.readline()
        if reply.endswith("\n"):
            return Done(task, **json.loads(reply))
        process.wait()
        self.log.seek(max(0, os.fstat(self.log.fileno()).st_size - TAIL))
        trace = self.log.read().decode(errors="replace")
        self.close()
        return Done(task, error=f"worker: {_ending(process.returncode)}", trace=trace)

    def kill(self) -> None:
        self.over = True
        process = self.process  # which another thread may be closing
        if process is not None:
            process.kill()

    def close(self) -> None:
        process = self.process
        if process is not None:
            process.kill()
            with suppress(BrokenPipeError), process:  # which closes its pipes and waits for it
                self.log.close()
            self.process = None


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code} in the midst of the job"
    with suppress(ValueError):
        return f"killed by {signal.Signals(-code).name} in the midst of the job"
    return f"killed by signal {-code} in the midst of the job"
