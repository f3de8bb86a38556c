"""How far sweeps are, told from their stores alone, while they run or afterwards."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from brittle.errors import InputError
from brittle.sweeps.drivers import STALE, gone_or_here, sign_of
from brittle.sweeps.store import State, Store


@dataclass(frozen=True)
class SweepStatus:
    """How far a sweep is.

    Attributes:
        url: Its store.
        done: Jobs that landed.
        running: Settings of the jobs that a driver is at.
        failed: Settings and error of the jobs whose last try failed; a driver that is at work may try them again.
        waiting: Jobs that nobody is at.
        drivers: How many drivers are at work.
        seconds_left: About how long the rest takes with as many workers as there are now, if jobs take as long as those
            that landed; None where no job runs or none has landed.
    """

    url: str
    done: int
    running: tuple[dict[str, Any], ...]
    failed: tuple[tuple[dict[str, Any], str], ...]
    waiting: int
    drivers: int
    seconds_left: float | None


def sweep_status(store: Store) -> SweepStatus:
    """How far the jobs are that drivers at work were asked to do; where none is at work, those of the last one.

    A driver on another machine counts as at work until it has given no sign for three minutes by the clocks of both.

    Raises:
        InputError: There was never a sweep.
    """
    names = sorted({name.split("/")[1] for name in store.names("drivers")})  # a name begins with its time
    if not names:
        raise InputError(f"sweep: expected the folder of a sweep; got {store.url}")
    at_work = {name for name in names if _works(sign_of(store, name))}
    asked = store.read(f"drivers/{name}/jobs.json" for name in at_work or names[-1:])
    jobs = {job["key"]: job["settings"] for document in asked.values() for job in document["jobs"]}
    begun_here = store.states()
    states = {key: begun_here.get(key, State()) for key in jobs}
    tries = {key: f"jobs/{key}/try-{state.tries}.json" for key, state in states.items() if state.open}
    begun = store.read(tries.values())
    running = [key for key, name in tries.items() if begun.get(name, {}).get("driver") in at_work]
    failed = {
        key: f"jobs/{key}/error-{state.tries}.json"
        for key, state in states.items()
        if state.tries and not state.landed and not state.open
    }
    errors = store.read(failed.values())
    rows = store.read(f"jobs/{key}/row.json" for key, state in states.items() if state.landed)
    waiting = len(jobs) - len(rows) - len(running) - len(failed)
    seconds = fmean(row["seconds"] for row in rows.values()) if rows else 0.0
    return SweepStatus(
        store.url,
        len(rows),
        tuple(jobs[key] for key in running),
        tuple((jobs[key], errors.get(name, {}).get("error", "error: lost")) for key, name in failed.items()),
        waiting,
        len(at_work),
        seconds * (waiting + len(running) / 2) / len(running) if running and rows else None,
    )


def _works(life: dict[str, Any]) -> bool:
    certain = gone_or_here(life)
    return time.time() - life.get("at", 0.0) < 3 * STALE if certain is None else certain


def stores_below(url: str) -> list[Store]:
    """The stores of sweeps at a place and below: a folder may hold those of several experiments.

    Raises:
        InputError: There is none.
    """
    root = Store(url)
    places = sorted({name.partition("drivers/")[0].rstrip("/") for name in root.names("") if "drivers/" in name})
    if not places:
        raise InputError(f"sweep: expected the folder of a sweep; got {url}")
    return [Store(f"{url.rstrip('/')}/{place}" if place else url) for place in places]
