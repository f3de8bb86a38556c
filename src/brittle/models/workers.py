"""The same work on many chunks, on several devices or on a Ray cluster; results in order."""

from __future__ import annotations

import functools
import itertools
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import nn

from brittle.errors import InputError, first_line
from brittle.models.borrow import Model, copy_unshared, device_of

Task = TypeVar("Task")
Worker = TypeVar("Worker")
Result = TypeVar("Result")
Prepare = Callable[[Model], Worker]
"""What every worker makes of its network before its first task."""
Work = Callable[[Worker, Task], Result]
"""What to do with one task; must not depend on which worker does it."""


def on_devices(
    prepare: Prepare[Worker],
    work: Work[Worker, Task, Result],
    tasks: Iterable[Task],
    model: Model,
    devices: Sequence[str],
) -> Iterator[Result]:
    """Run every task on the next free device, with a copy of the network there; results in the order of the tasks.

    Workers are threads, prepared one after the other before the first of them starts: tracing a network replaces
    parts of torch for a moment, which no other thread may see. An error or an interrupt waits for the tasks that are
    being worked on and ends all others.

    Args:
        prepare: Called with the network on its device.
        work: Called with what ``prepare`` returned and the task.
        tasks: Taken one after the other, a few ahead.
        model: The network, a module that can be copied.
        devices: Device names, at least one; one may be named several times.

    Raises:
        InputError: The network is a plain callable or cannot be copied, or a device does not exist.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"devices: expected an nn.Module, which can be copied to them; got {type(model).__name__}")
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for device in devices:
        try:
            copied = copy_unshared(model, model)
        except Exception as error:  # a module may say itself how it is copied
            message = f"devices: expected a network that can be copied; got {type(model).__name__}: {first_line(error)}"
            raise InputError(message) from error
        try:
            copied.to(device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"devices: {device!r} cannot be used: {first_line(error)}") from None
        idle.put(prepare(copied))

    def run(task: Task) -> Result:
        worker = idle.get()
        try:
            return work(worker, task)
        finally:
            idle.put(worker)

    # Threads save and restore the one global random state across each other; whatever they leave is undone here.
    with torch.random.fork_rng(devices=[]), ThreadPoolExecutor(len(devices)) as pool:
        # At most so many are submitted and not yielded, and whatever ends this ends them.
        futures = (pool.submit(run, task) for task in tasks)
        waiting = deque(itertools.islice(futures, 2 * len(devices)))
        try:
            while waiting:
                value = waiting[0].result()  # stays in line until it is there: an interrupt cancels it, too
                waiting.popleft()
                yield value
                waiting.extend(itertools.islice(futures, 1))
        finally:
            for future in waiting:
                future.cancel()


def on_ray(
    prepare: Prepare[Worker], work: Work[Worker, Task, Result], tasks: Iterable[Task], model: Model, workers: int
) -> Iterator[Result]:
    """Run tasks on a Ray cluster, ``workers`` at once; results in the order of the tasks.

    Connects to the cluster that Ray finds (``RAY_ADDRESS``), or starts one on this machine. A worker takes one GPU
    when the network is on one, else one CPU. An error or an interrupt ends all of them, and what they are at.

    Args:
        prepare: Called with the network, once a worker.
        work: Called with what ``prepare`` returned and the task; all have to be picklable.
        tasks: Taken one after the other, a few ahead.
        model: The network.
        workers: Tasks at once, at least 1.

    Raises:
        InputError: Ray is not installed, something cannot be pickled, or a task raised it.
    """
    try:
        import ray  # type: ignore[import-not-found, unused-ignore]  # an extra
    except ImportError:
        raise InputError("ray_workers: needs the extra cluster: pip install 'brittle[cluster]'") from None
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)

    try:
        shared = ray.put((prepare, work, model))
    except Exception as error:  # whatever pickling runs into
        message = f"ray_workers: expected a network and attacks that can be pickled; got {first_line(error)}"
        raise InputError(message) from error
    # Processes of their own: killing one ends what it does, where cancelling a task that is just being sent does not.
    gpus = int(device_of(model).type == "cuda")
    hire: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=3, max_task_retries=3)(_RayWorker)
    hired = [hire.remote() for _ in range(workers)]

    def result(promise: Any) -> Result:
        try:
            value: Result = ray.get(promise)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, InputError) else error from None
        return value

    try:
        # A worker that the cluster has no room for stays busy with its start, and gets no task.
        busy: dict[Any, Any] = {worker.start.remote(): worker for worker in hired}
        waiting: deque[Any] = deque()
        idle: list[Any] = []
        rest = iter(tasks)
        while True:
            for task in itertools.islice(rest, min(len(idle), 2 * workers - len(waiting))):
                worker = idle.pop()
                waiting.append(worker.run.remote([shared], task))
                busy[waiting[-1]] = worker
            if not waiting and idle:
                return
            for promise in ray.wait(list(busy))[0]:
                idle.append(busy.pop(promise))
            while waiting and waiting[0] not in busy:
                yield result(waiting.popleft())
    finally:
        for worker in hired:
            ray.kill(worker)


class _RayWorker:
    """A process of a Ray cluster that works on one task after the other."""

    def __init__(self) -> None:
        torch.set_num_threads(1)  # it has one CPU to itself
        self.work: Callable[[Any], Any] | None = None

    def start(self) -> None:
        """Return as soon as the process stands."""

    def run(self, shared: list[Any], task: Any) -> Any:
        """Work on a task. The first one fetches what all share, in a list since Ray would fetch it for every task."""
        if self.work is None:
            import ray

            prepare, work, model = ray.get(shared[0])
            self.work = functools.partial(work, prepare(model))
        return self.work(task)
