"""Python processes that tests start: they can be interrupted, have a time limit, and leave no process behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent


@contextmanager
def start(
    *arguments: object, env: dict[str, str] | None = None, python: str | Path = sys.executable, **options: Any
) -> Iterator[subprocess.Popen]:
    """Start Python, this one or another, with these arguments; at the end of the block, end all that it started.

    Ctrl-C reaches it even where the tests run in the background, for which a shell ignores the signal: a process
    inherits that, and Python raises no KeyboardInterrupt then. What has a handler is at its default after ``exec``.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": _paths()} | (env or {})
    command = [str(python), *map(str, arguments)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, env=environment, process_group=0, **options)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:  # which closes its pipes and waits for it
        try:
            yield process
        finally:
            kill_group(process)


def run(*arguments: object, seconds: float = 120, **options: Any) -> subprocess.CompletedProcess:
    """Run Python with these arguments to its end within that many seconds; what it wrote comes back as text."""
    with start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        return finish(process, seconds)


def run_code(code: str, seconds: float = 120, **options: Any) -> str:
    """Run Python code that has to succeed; what it printed."""
    done = run("-c", code, seconds=seconds, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def finish(process: subprocess.Popen, seconds: float) -> subprocess.CompletedProcess:
    """Wait until a process ends; subprocess.TimeoutExpired where that takes longer."""
    out, err = process.communicate(timeout=seconds)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_until(condition: Callable[[], bool], seconds: float, process: subprocess.Popen | None = None) -> None:
    """Wait until a condition holds; fail after that many seconds, or once the process it depends on has ended."""
    limit = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < limit, f"not within {seconds} s"
        time.sleep(0.01)


def read_all(descriptor: int, seconds: float) -> bytes:
    """What is written to a pipe or a terminal until its other end is closed; fail after that many seconds."""
    limit, read = time.monotonic() + seconds, b""
    while True:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, limit - time.monotonic()))
        assert ready, f"not closed within {seconds} s; read {read[-200:]!r}"
        try:
            part = os.read(descriptor, 65536)
        except OSError:  # as Linux says that the other end of a terminal is closed
            part = b""
        if not part:
            return read
        read += part


def group_lives(process: subprocess.Popen) -> bool:
    """Whether anything that a process started is left, in the group that it began."""
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def lives(pid: int) -> bool:
    """Whether there is a process of that number, though it may have ended and wait to be asked how."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def kill_group(process: subprocess.Popen) -> None:
    """Kill a process and what is left of all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _paths() -> str:
    return os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
