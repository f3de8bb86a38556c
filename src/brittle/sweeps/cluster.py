"""Jobs on a Ray cluster."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import Any

from brittle.errors import InputError, MissingExtra, first_line, one_line
from brittle.sweeps.job import Code, Settings
from brittle.sweeps.pool import share_out
from brittle.sweeps.work import Done, Task, perform

STARTS = 3
"""How often a worker may die while it starts, as with its node, before it is said that none can start."""


def on_ray(
    tasks: Iterator[Task | None],
    *,
    address: str | None = None,
    workers: int | None = None,
    cpus: float = 1.0,
    gpus: float = 0.0,
) -> Generator[Done, None, None]:
    """Do tasks on a Ray cluster. A worker or a node that dies costs the tasks that it was at this try.

    Brittle, and the modules that jobs are named by, have to be installed on the nodes; a file's text travels with the
    job. ``places`` have to be the same on all nodes. This process alone writes to the store.

    Args:
        tasks: See :data:`brittle.sweeps.run.Executor`.
        address: Of the cluster; None for the one that ``RAY_ADDRESS`` names, or else one on this machine for as long as
            this takes. A connection that stands already is used and kept.
        workers: How many at most; None for as many as the cluster has room for.
        cpus: CPUs of each; also its threads.
        gpus: GPUs of each; several workers share one where this is below 1.

    Raises:
        InputError: Ray is not installed, there is no such cluster, no worker can start, or a number is out of range.
    """
    try:
        import ray  # type: ignore[import-not-found, unused-ignore]  # an extra
    except ImportError:
        raise MissingExtra("ray", "cluster", "ray: a cluster") from None
    demand = {"CPU": cpus, "GPU": gpus}
    if not (0 <= cpus < math.inf and 0 <= gpus < math.inf and cpus + gpus > 0) or (workers is not None and workers < 1):
        raise InputError(f"ray: expected workers of some CPUs or GPUs, at least one; got {workers} of {demand}")
    connected = ray.is_initialized()
    try:
        if not connected:
            ray.init(address, include_dashboard=False, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"ray: expected the address of a cluster; got {address}: {first_line(error)}") from None
    try:
        if workers is None:
            total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call, unused-ignore]
            workers = max(1, int(min(total.get(name, 0.0) / each for name, each in demand.items() if each)))
        hire = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(_Actor).remote
        yield from share_out(tasks, [_RayWorker(ray, hire) for _ in range(workers)])
    finally:
        if not connected:
            ray.shutdown()


class _Actor:
    """A process of the cluster. Killing it ends what it does, where cancelling a task that is being sent does not."""

    def stand(self) -> None:
        """Return as soon as the process stands."""

    def do(self, code: Code, arguments: Settings) -> dict[str, Any]:
        return perform(code, arguments)


class _RayWorker:
    """A worker that is an actor of the cluster."""

    def __init__(self, ray: Any, hire: Any) -> None:
        self.ray, self.hire, self.actor, self.over = ray, hire, None, False

    @property
    def lives(self) -> bool:
        return self.actor is not None

    def start(self) -> None:
        """Hire an actor that answers; InputError where several in turn die before they do."""
        deaths = 0
        while not self.over:
            self.actor = actor = self.hire()
            if self.over:  # since, and there was no actor yet to be killed
                return self.close()
            try:
                self.ray.get(actor.stand.remote())
                return
            except self.ray.exceptions.RayError as error:
                deaths += 1
                if deaths == STARTS and not self.over:
                    raise InputError(f"ray: expected workers that can start; got {one_line(error)}") from None

    def do(self, task: Task) -> Done:
        actor: Any = self.actor
        try:
            reply = self.ray.get(actor.do.remote(task.job.code, {**task.job.settings, **task.job.places}))
        except self.ray.exceptions.RayError as error:
            self.close()  # it may live, and only not be reached: it is not to go on while another has its task
            return Done(task, error=f"worker: {first_line(error)}", trace=str(error))
        return Done(task, **reply)

    def kill(self) -> None:
        self.over = True
        self.close()

    def close(self) -> None:
        actor, self.actor = self.actor, None
        if actor is not None:
            with suppress(Exception):  # the cluster itself may be gone
                self.ray.kill(actor)
