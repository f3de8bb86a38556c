"""Where a training runs: in this process with plain torch, or on Lightning Fabric in several or in mixed precision."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import pickle
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from brittle.errors import InputError, MissingExtra

T = TypeVar("T")
Tell = Callable[[Any], None]


PLAIN = "32-true"
"""The precision that needs no Fabric."""


class Host(Protocol):
    """What the loop needs of the place it runs at."""

    rank: int
    world: int
    device: torch.device

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model and the optimiser as the steps use them."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; with several processes, their mean."""

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes."""

    def agreed(self, value: T) -> T:
        """What the first process holds."""


class Here:
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

    def agreed(self, value: T) -> T:
        """The value itself."""
        return value


class OnFabric:
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

    def agreed(self, value: T) -> T:
        """By broadcast."""
        shared: T = self.fabric.broadcast(value)
        return shared


def check_host(processes: int, precision: str, batch_size: int) -> None:
    """Raise InputError or MissingExtra where no training can run like this; starts nothing."""
    if not isinstance(processes, int) or processes < 1:
        raise InputError(f"processes: expected an integer of at least 1; got {processes!r}")
    if processes > 1 and batch_size < 2 * processes:
        raise InputError(f"batch_size: expected at least 2 for each of {processes} processes; got {batch_size}")
    if processes > 1 or precision != PLAIN:
        _fabric()


def launched(
    work: Callable[[Host, Any, Tell | None], T],
    job: Any,
    *,
    device: str,
    processes: int,
    precision: str,
    tell: Tell | None,
) -> T:
    """Run ``work(host, job, tell)`` and return what the first process returns.

    Args:
        work: A function of a module, so that other processes can import it.
        job: What it works on; pickled for other processes.
        device: ``cpu``, ``cuda`` or ``cuda:N``; with several processes on GPUs, one each from the first on.
        processes: 1 and precision ``32-true``: plain torch here; else Lightning Fabric.
        precision: As Fabric names it.
        tell: Called in this process with what the first one reports.

    Raises:
        MissingExtra: Lightning is needed and not installed.
    """
    if processes == 1 and precision == PLAIN:
        return work(Here(device), job, tell)
    Fabric = _fabric()
    found = torch.device(device)
    several = processes > 1
    fabric = Fabric(
        accelerator="cuda" if found.type == "cuda" else "cpu",
        devices=processes if several or found.type == "cpu" else [found.index or 0],
        strategy="ddp_spawn" if several else "auto",
        precision=precision,
    )
    if not several:
        fabric.launch()
        return work(OnFabric(fabric), job, tell)
    reports, relay = torch.multiprocessing.get_context("spawn").SimpleQueue(), _Relay(tell)
    reader = threading.Thread(target=relay.run, args=(reports,), daemon=True)
    reader.start()
    others = set(multiprocessing.active_children())
    try:
        result: T = pickle.loads(fabric.launch(_in_process, work, _Parcel(job), reports))
    except BaseException as error:  # interrupted, too: the processes would train on, and wait for a reader at the end
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
            process.join(timeout=10)
            process.kill()
        # Not _stop(): a process that was ended while it wrote holds the queue for ever. Its word may be on the way.
        waited = time.monotonic() + (1.0 if isinstance(error, Exception) else 0.0)
        while relay.error is None and time.monotonic() < waited:
            time.sleep(0.02)
        if isinstance(relay.error, InputError):
            raise relay.error from None
        raise
    _stop(reader, reports)
    if relay.error is not None:
        raise relay.error
    return result


class _Relay:
    """Hands on what the first process reports; keeps the first error, its own or the other's."""

    def __init__(self, tell: Tell | None) -> None:
        self.tell, self.error = tell, cast("BaseException | None", None)

    def run(self, reports: Any) -> None:
        """Until None arrives, also after an error: nobody may wait for a full pipe."""
        while (report := reports.get()) is not None:
            if self.error is None and isinstance(report, BaseException):
                self.error = report
            elif self.error is None and self.tell is not None:
                try:
                    self.tell(report)
                except BaseException as error:  # raised again where the caller can see it
                    self.error = error


def _stop(reader: threading.Thread, reports: Any) -> None:
    reports.put(None)
    reader.join(timeout=10)


def _hushed() -> None:
    """No announcements on standard error."""
    for name in ("lightning_fabric", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _fabric() -> Any:
    """Fabric's class, of either package that holds it."""
    for package in ("lightning_fabric", "lightning.fabric"):
        with suppress(ImportError):
            found = importlib.import_module(package).Fabric
            _hushed()
            return found
    raise MissingExtra("lightning-fabric", "multi", "training in several processes or in mixed precision")


class _Parcel:
    """Hides what it holds from Fabric, which takes dataclasses apart and refuses frozen ones."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpacked in every process before Fabric announces itself there."""
        _hushed()
        self.__dict__.update(state)


def _in_process(fabric: Any, work: Callable[[Host, Any, Tell | None], T], parcel: _Parcel, reports: Any) -> bytes:
    """The first process's result as bytes: tensors handed over by themselves would go with the process."""
    host = OnFabric(fabric)
    try:
        result = work(host, parcel.content, reports.put if host.rank == 0 else None)
    except InputError as error:
        reports.put(InputError(str(error)))
        raise
    if torch.distributed.is_initialized():  # a process that ends while its group's threads run may abort
        torch.distributed.destroy_process_group()
    return pickle.dumps(result) if host.rank == 0 else b""
