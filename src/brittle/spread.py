"""The same work on many chunks: in this process, on several devices, or on a Ray cluster; results in order."""

from __future__ import annotations

import copy
import itertools
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import nn

from brittle.errors import InputError
from brittle.frozen import Model

Task = TypeVar("Task")
Result = TypeVar("Result")
Work = Callable[[Model, Task], Result]
"""What to do with one chunk, given a network to do it with; must not depend on which worker does it."""


def on_devices(
    work: Work[Task, Result], tasks: Iterable[Task], model: Model, devices: Sequence[str]
) -> Iterator[Result]:
    """Run every task on the next free device, with a copy of the network there; results in the order of the tasks.

    Args:
        work: Called with the network on its device and the task.
        tasks: Taken one after the other, a few ahead.
        model: The network; with several devices it has to be a module that can be copied.
        devices: Device names; one may be named several times. None at all: the network itself, where it is.

    Raises:
        InputError: Devices are named for a plain callable, or a device does not exist.
    """
    if not devices:
        yield from (work(model, task) for task in tasks)
        return
    if not isinstance(model, nn.Module):
        raise InputError(f"devices: expected an nn.Module, which can be copied to them; got {type(model).__name__}")
    idle: queue.SimpleQueue[nn.Module] = queue.SimpleQueue()
    for device in devices:
        try:
            idle.put(copy.deepcopy(model).to(device))
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"devices: {device!r} cannot be used: {_first_line(error)}") from None

    def run(task: Task) -> Result:
        mine = idle.get()
        try:
            return work(mine, task)
        finally:
            idle.put(mine)

    with ThreadPoolExecutor(len(devices)) as pool:
        yield from _in_order((pool.submit(run, task) for task in tasks), 2 * len(devices))


def _in_order(futures: Iterator[Future[Result]], ahead: int) -> Iterator[Result]:
    """Results in order, with at most ``ahead`` tasks submitted before the first of them is asked for."""
    waiting = deque(itertools.islice(futures, ahead))
    try:
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(itertools.islice(futures, 1))
    finally:
        for future in waiting:
            future.cancel()


def on_ray(work: Work[Task, Result], tasks: Iterable[Task], model: Model, workers: int) -> Iterator[Result]:
    """Run tasks on a Ray cluster, ``workers`` at once; results in the order of the tasks.

    Connects to the cluster that Ray finds (``RAY_ADDRESS``), or starts one on this machine. A worker takes one GPU
    when the network is on one, else one CPU.

    Args:
        work: Called with the network and the task; both have to be picklable.
        tasks: Taken one after the other, a few ahead.
        model: The network.
        workers: Tasks at once, at least 1.

    Raises:
        InputError: Ray is not installed.
    """
    try:
        import ray  # type: ignore[import-not-found, unused-ignore]  # an extra
    except ImportError:
        raise InputError("ray_workers: needs the extra cluster: pip install 'brittle[cluster]'") from None
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    on_gpu = isinstance(model, nn.Module) and any(parameter.is_cuda for parameter in model.parameters())
    remote: Any = ray.remote(num_cpus=1, num_gpus=int(on_gpu))(_on_one_thread)
    shared = ray.put((work, model))
    waiting: deque[Any] = deque()
    for task in tasks:
        waiting.append(remote.remote(shared, task))
        if len(waiting) > workers:
            yield ray.get(waiting.popleft())
    while waiting:
        yield ray.get(waiting.popleft())


def _on_one_thread(shared: tuple[Work[Task, Result], Model], task: Task) -> Result:
    """One task on a Ray worker, which has one CPU to itself."""
    torch.set_num_threads(1)
    work, model = shared
    return work(model, task)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
