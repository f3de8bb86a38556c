"""Jobs in processes of this machine, each of which may die."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

from brittle.errors import InputError
from brittle.sweeps.work import Done, Task

ASK_AGAIN = 0.5
"""Seconds until a task is asked for again where there was none."""
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
    hired = [_Worker(threads) for _ in range(count)]
    idle, busy, over = list(hired), dict[Future[Done], _Worker](), False
    with ThreadPoolExecutor(count) as pool:  # a thread waits for each worker
        try:
            while not over or busy:
                task = None
                while idle and not over:
                    try:
                        task = next(tasks)
                    except StopIteration:
                        over = True
                    if over or task is None:
                        break
                    worker = idle.pop()
                    worker.start()
                    busy[pool.submit(worker.do, task)] = worker
                for future in wait(busy, ASK_AGAIN if idle and not over else None, FIRST_COMPLETED).done:
                    idle.append(busy.pop(future))
                    yield future.result()
                if task is None and not busy and not over:
                    time.sleep(ASK_AGAIN)
        finally:
            for worker in hired:
                worker.kill()
    for worker in hired:
        worker.close()


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """A process that does one task after the other, and a new one after its death."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the process where there is none that lives."""
        if self.process is None:
            threads = {
                name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
            }
            environment = os.environ | threads | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            command = [sys.executable, "-c", "from brittle.sweeps.worker import serve; serve()"]
            self.log = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
            self.process = subprocess.Popen(command, env=environment, text=True, encoding="utf-8", **pipes)

    def do(self, task: Task) -> Done:
        """Have a task done and wait for it."""
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
        self.kill()
        process.wait()
        self.log.seek(max(0, os.fstat(self.log.fileno()).st_size - TAIL))
        trace = self.log.read().decode(errors="replace")
        self.close()
        return Done(task, error=f"worker: {_ending(process.returncode)}", trace=trace)

    def kill(self) -> None:
        """Kill the process, and with it what it does: nothing of an unfinished job is kept."""
        if self.process is not None:
            self.process.kill()

    def close(self) -> None:
        """Wait until the killed process is gone, and forget it."""
        if self.process is not None:
            self.log.close()
            with suppress(BrokenPipeError), self.process:
                pass
            self.process = None


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code} in the midst of the job"
    with suppress(ValueError):
        return f"killed by {signal.Signals(-code).name} in the midst of the job"
    return f"killed by signal {-code} in the midst of the job"
