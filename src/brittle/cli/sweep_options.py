"""Who does the jobs of an experiment, and how far they are in words."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from brittle.cli.options import option
from brittle.errors import InputError

if TYPE_CHECKING:
    from brittle.sweeps import Executor, SweepStatus


@dataclass(frozen=True)
class Workers:
    """Processes that do jobs."""

    workers: Annotated[
        int | None,
        option(
            "Execution",
            min=1,
            metavar="<int>",
            help="Jobs at once, one thread each.",
            show_default="one a core; with --ray, as many as the cluster has room for",
        ),
    ] = None
    ray: Annotated[
        str | None,
        option(
            "Execution", metavar="ADDRESS", help="Do the jobs on this Ray cluster; auto finds one, local starts one."
        ),
    ] = None
    cpus_per_job: Annotated[
        float | None,
        option("Execution", min=0.0, metavar="<float>", help="With --ray: CPUs of a job.", show_default="1"),
    ] = None
    gpus_per_job: Annotated[
        float | None,
        option(
            "Execution",
            min=0.0,
            metavar="<float>",
            help="With --ray: GPUs of a job; jobs share one below 1.",
            show_default="0",
        ),
    ] = None

    def executor(self) -> Executor:
        """What does jobs.

        Raises:
            InputError: A share of a cluster is asked for without a cluster.
        """
        from brittle.sweeps import on_processes, on_ray

        per_job = {"cpus": self.cpus_per_job, "gpus": self.gpus_per_job}
        demand: dict[str, Any] = {name: amount for name, amount in per_job.items() if amount is not None}
        if self.ray is not None:
            return functools.partial(on_ray, address=self.ray, workers=self.workers, **demand)
        if demand:
            raise InputError(f"{next(iter(demand))}-per-job: expected --ray ADDRESS beside it; got none")
        return functools.partial(on_processes, workers=self.workers)


def status_lines(status: SweepStatus) -> Iterator[str]:
    """How far a sweep is, with what runs and what failed."""
    counts = {
        "done": status.done,
        "running": len(status.running),
        "failed": len(status.failed),
        "waiting": status.waiting,
    }
    told = ", ".join(f"{count} {state}" for state, count in counts.items())
    rest = "nobody at work" if not status.drivers else "time left unknown"
    if status.seconds_left is not None:
        rest = f"about {lasting(status.seconds_left)} left"
    yield f"{status.url}: {told}; {rest if counts['running'] + counts['failed'] + counts['waiting'] else 'all done'}"
    yield from (f"  running: {in_words(settings)}" for settings in status.running)
    yield from (f"  failed: {in_words(settings)}: {error}" for settings, error in status.failed)


def in_words(settings: dict[str, Any]) -> str:
    """Settings of a job, as ``rank=4 seed=0``."""
    return " ".join(f"{name}={value}" for name, value in settings.items())


def lasting(seconds: float) -> str:
    """A time in the largest unit of which it has two."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
