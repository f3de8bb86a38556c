"""Who works on a store: every driver says that it lives, and knows of the others whether they do."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from brittle.sweeps.job import Job
from brittle.sweeps.store import Store

BEAT = 10.0
"""Seconds from one sign of life to the next."""
STALE = 60.0
"""Seconds without one after which a driver on another machine is taken to be gone."""


class Driver:
    """A process that does jobs of a store, for as long as the ``with`` block lasts.

    ``drivers/ID/jobs.json`` says what it was asked to do, ``drivers/ID/beat.json`` that it lives.
    """

    def __init__(self, store: Store, jobs: Sequence[Job], workers: int | None = None) -> None:
        self.store = store
        self.name = f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{uuid.uuid4().hex[:8]}"  # in the order of their beginnings
        self.jobs = [{"key": job.key, "function": job.code.name, "settings": dict(job.settings)} for job in jobs]
        self._beats = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)

    def __enter__(self) -> Driver:
        self.store.create(f"drivers/{self.name}/jobs.json", {"jobs": self.jobs})
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._beat()

    def _live(self) -> None:
        while not self._over.wait(BEAT):
            with suppress(Exception):  # a store that cannot be reached for a moment; the next sign may come through
                self._beat()

    def _beat(self) -> None:
        self._beats += 1
        life = {
            "beats": self._beats,
            "over": self._over.is_set(),
            "machine": machine(),
            "process": process(os.getpid()),
        }
        self.store.put(f"drivers/{self.name}/beat.json", life)


class Watch:
    """Tells which drivers live; of those on other machines after having watched them for a while.

    Clocks of two machines need not agree: only how often a driver gave a sign is compared, at times of one clock.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._last: dict[str, tuple[Any, float]] = {}

    def lives(self, driver: str) -> bool:
        """Whether a driver is at work, as far as is known."""
        life = sign_of(self.store, driver)
        certain = gone_or_here(life)
        if certain is not None:
            return certain
        beats, since = self._last.get(driver, (None, 0.0))
        if driver not in self._last or beats != life.get("beats"):
            self._last[driver] = (life.get("beats"), time.monotonic())
            return True
        return time.monotonic() - since < STALE


def sign_of(store: Store, driver: str) -> dict[str, Any]:
    """A driver's last sign of life; empty where it left none."""
    name = f"drivers/{driver}/beat.json"
    return store.read([name]).get(name, {})


def gone_or_here(life: dict[str, Any]) -> bool | None:
    """Whether a driver lives, where its last sign tells: it is over, or was on this machine; else None."""
    if life.get("over"):
        return False
    if life and life["machine"] and life["machine"] == machine():
        return bool(life["process"] == process(int(life["process"].split()[0])))
    return None


def machine() -> str:
    """What tells this machine, since it was started, from all others; empty where the system does not say.

    Processes that cannot see each other, as those of two containers, count as on two machines.
    """
    if not sys.platform.startswith("linux"):
        return ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def process(number: int) -> str:
    """A process's number and when it was started, since numbers are given again; the number alone where it is gone."""
    with suppress(OSError):
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        if fields[0] != "Z":  # ended, though nobody has asked how
            return f"{number} {fields[19]}"
    return str(number)
