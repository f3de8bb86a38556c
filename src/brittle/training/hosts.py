"""Where a training runs: in this process with plain torch, or on Lightning Fabric in several or in mixed precision."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from brittle.errors import InputError, MissingExtra
from brittle.training.history import Callback
from brittle.training.recipe import Recipe

T = TypeVar("T")
PLAIN_PRECISION = "32-true"
"""The precision that needs no Fabric."""


class Host(Protocol):
    """What a training needs of the place it runs at."""

    rank: int
    world: int
    device: torch.device

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model and the optimiser as the steps use them."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; with several processes, their mean."""

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes."""

    def agree_on(self, value: T) -> T:
        """What the first process holds."""


class LocalHost:
    """Plain torch in one process."""

    rank, world = 0, 1

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Both as they are."""
        return model, optimizer

    def backward(self, loss: Tensor) -> None:
        """Plain backward."""
        loss.backward()

    def total(self, value: Tensor) -> Tensor:
        """The value itself."""
        return value

    def agree_on(self, value: T) -> T:
        """The value itself."""
        return value


class FabricHost:
    """One of Fabric's processes."""

    def __init__(self, fabric: Any) -> None:
        self.fabric = fabric
        self.rank, self.world, self.device = fabric.global_rank, fabric.world_size, fabric.device

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Wrapped for gradients that are shared and for the precision."""
        model, optimizer = self.fabric.setup(model, optimizer)
        return model, optimizer

    def backward(self, loss: Tensor) -> None:
        """Backward with loss scaling where the precision asks for it."""
        self.fabric.backward(loss)

    def total(self, value: Tensor) -> Tensor:
        """By all-reduce."""
        summed: Tensor = self.fabric.all_reduce(value.clone(), reduce_op="sum")  # it sums in place
        return summed

    def agree_on(self, value: T) -> T:
        """By broadcast."""
        shared: T = self.fabric.broadcast(value)
        return shared


def check_devices(devices: str | Sequence[str], recipe: Recipe) -> tuple[str, ...]:
    """The devices as a tuple; starts nothing.

    Raises:
        InputError: There are none, they are of two kinds or one GPU twice, or a batch is too small for so many.
        MissingExtra: Lightning is needed and not installed.
    """
    names = (devices,) if isinstance(devices, str) else tuple(devices)
    kinds = {name.partition(":")[0] for name in names}
    numbered = [name for name in names if ":" in name]
    if len(kinds) != 1 or not kinds <= {"cpu", "cuda"} or len(set(numbered)) < len(numbered):
        raise InputError(f"devices: expected cpu, cuda or different cuda:N, one for each process; got {names}")
    if len(names) > 1 and recipe.batch_size < 2 * len(names):
        raise InputError(f"batch_size: expected at least 2 for each of {len(names)} processes; got {recipe.batch_size}")
    if len(names) > 1 or recipe.precision != PLAIN_PRECISION:
        _load_fabric()
    return names


def launch(
    work: Callable[[Host, Any, Callback | None], T],
    job: Any,
    *,
    devices: Sequence[str],
    precision: str,
    callback: Callback | None,
) -> T:
    """Run ``work(host, job, callback)`` and return what the first process returns.

    Args:
        work: A function of a module, so that other processes can import it.
        job: What it works on; pickled for other processes.
        devices: One of each process, as :func:`check_devices` returns them. One device and precision ``32-true``:
            plain torch in this process; else Lightning Fabric.
        precision: As Fabric names it.
        callback: Called in this process with what the first one reports.
    """
    if len(devices) == 1 and precision == PLAIN_PRECISION:
        return work(LocalHost(devices[0]), job, callback)
    places, several = [torch.device(name) for name in devices], len(devices) > 1
    numbered = places[0].type == "cuda" and (not several or all(place.index is not None for place in places))
    fabric = _load_fabric()(
        accelerator=places[0].type,
        devices=[place.index or 0 for place in places] if numbered else len(places),
        strategy="ddp_spawn" if several else "auto",
        precision=precision,
    )
    if several:
        return _launch_processes(fabric, work, job, callback)
    fabric.launch()
    return work(FabricHost(fabric), job, callback)


def _launch_processes(
    fabric: Any, work: Callable[[Host, Any, Callback | None], T], job: Any, callback: Callback | None
) -> T:
    """Run the work in several processes: the first one's result and reports come back, and none outlives the call."""
    reports = _Reports(callback)
    processes_before = set(multiprocessing.active_children())
    try:
        result: T = pickle.loads(fabric.launch(_work_in_process, work, _Wrapped(job), reports.queue))
    except BaseException as error:  # interrupted, too: the processes would train on, and wait for a reader at the end
        for process in set(multiprocessing.active_children()) - processes_before:
            process.terminate()
            process.join(timeout=10)
            process.kill()
        # Not closed: a process that was ended while it wrote holds the queue for ever. Its error may still arrive.
        patience_ends = time.monotonic() + (1.0 if isinstance(error, Exception) else 0.0)
        while reports.error is None and time.monotonic() < patience_ends:
            time.sleep(0.02)
        if isinstance(reports.error, InputError):
            raise reports.error from None
        raise
    reports.close()
    if reports.error is not None:
        raise reports.error
    return result


class _Reports:
    """Hands what the first process reports to the callback, in a thread; keeps the first error of either."""

    def __init__(self, callback: Callback | None) -> None:
        self.callback = callback
        self.error: BaseException | None = None
        self.queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        # On until None arrives, also after an error: else the process would wait for room in a full pipe.
        while (report := self.queue.get()) is not None:
            if self.error is None and isinstance(report, BaseException):
                self.error = report
            elif self.error is None and self.callback is not None:
                try:
                    self.callback(report)
                except BaseException as error:  # raised again where the caller can see it
                    self.error = error

    def close(self) -> None:
        """Wait until all reports are read."""
        self.queue.put(None)
        self.reader.join(timeout=10)


class _Wrapped:
    """Hides a job from Fabric, which takes dataclasses apart and refuses frozen ones."""

    def __init__(self, job: Any) -> None:
        self.job = job

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpacked in every process before Fabric announces itself there."""
        _silence_fabric()
        self.__dict__.update(state)


def _work_in_process(
    fabric: Any, work: Callable[[Host, Any, Callback | None], T], wrapped: _Wrapped, reports: Any
) -> bytes:
    """The first process's result as bytes: tensors handed over by themselves would go with the process."""
    host = FabricHost(fabric)
    try:
        result = work(host, wrapped.job, reports.put if host.rank == 0 else None)
    except InputError as error:
        reports.put(InputError(str(error)))
        raise
    if torch.distributed.is_initialized():  # a process that ends while its group's threads run may abort
        torch.distributed.destroy_process_group()
    return pickle.dumps(result) if host.rank == 0 else b""


def _load_fabric() -> Any:
    """Fabric's class, of either package that holds it."""
    for package in ("lightning_fabric", "lightning.fabric"):
        with suppress(ImportError):
            fabric = importlib.import_module(package).Fabric
            _silence_fabric()
            return fabric
    raise MissingExtra("lightning-fabric", "multi", "training in several processes or in mixed precision")


def _silence_fabric() -> None:
    """No announcements on standard error."""
    for name in ("lightning_fabric", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
