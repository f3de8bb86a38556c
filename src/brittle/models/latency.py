"""How long networks take, measured side by side: every round times each of them once, so that drifts hit all alike."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from brittle.errors import InputError, one_line
from brittle.models.borrow import copy_unshared, device_of, frozen, zero_like
from brittle.progress import Progress, silent
from brittle.results.size import Latency

WARM_UP = 3
"""Rounds that are not timed: the first passes choose kernels and take memory."""


def latency(
    models: Mapping[str, nn.Module],
    x_shape: Sequence[int],
    *,
    batch_sizes: Sequence[int] = (1, 64),
    device: str = "cpu",
    rounds: int = 30,
    progress: Progress = silent,
) -> tuple[Latency, ...]:
    """Time one pass of every network over a batch, without gradients and in evaluation mode.

    Networks take turns: a round runs each once, starting with another one every time, after :data:`WARM_UP` rounds
    that are not timed. On an accelerator a pass lasts until its result is there. Numbers of different calls are not
    comparable: the machine does other things as well.

    Args:
        models: Networks by name; left bit-equal, and copied where they are not on the device.
        x_shape: Of one sample; the numbers are random, uniform on [0, 1].
        batch_sizes: Samples a pass.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        rounds: Timed passes of each network and batch size.
        progress: Told the rounds that are done.

    Returns:
        One row for each network and batch size, networks in the order given within a batch size.

    Raises:
        InputError: A number below 1, a device that is not there, or a network that cannot run on such inputs.
    """
    for name, number in (("rounds", rounds), *(("batch_sizes", size) for size in batch_sizes)):
        if number < 1:
            raise InputError(f"{name}: expected at least 1; got {number}")
    place = _checked(device)
    rows = []
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        placed = {}
        for name, model in models.items():
            placed[name] = model if device_of(model) == place else copy_unshared(model, model).to(place)
            stack.enter_context(frozen(placed[name]))
        for position, size in enumerate(batch_sizes):
            x = torch.rand((size, *x_shape), generator=torch.Generator().manual_seed(0))
            inputs = {name: x.to(zero_like(model)) for name, model in placed.items()}
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in placed}
            for number in range(-WARM_UP, rounds):
                for name in _turn([*placed], number):
                    taken = _time(name, placed[name], inputs[name])
                    if number >= 0:
                        times[name].append(taken)
                progress("latency", position * rounds + max(0, number + 1), rounds * len(batch_sizes))
            rows += [_row(name, size, times[name], place) for name in placed]
    return tuple(rows)


def device_name(device: torch.device) -> str:
    """The name of the accelerator, or of the processor where the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next((name for name in (*names, platform.processor(), platform.machine()) if name), "cpu")


def _checked(device: str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch has an error of its own for each kind of device
        raise InputError(f"device: expected one that is there; got {device!r}: {one_line(error)}") from error


def _turn(names: list[str], number: int) -> list[str]:
    """The order of a round."""
    start = number % len(names) if names else 0
    return names[start:] + names[:start]


def _row(name: str, size: int, times: list[tuple[float, float]], device: torch.device) -> Latency:
    clock, processor = zip(*times, strict=True)
    return Latency(
        network=name,
        batch_size=size,
        median=_quantile(clock, 0.5),
        p90=_quantile(clock, 0.9),
        rounds=len(times),
        device=device_name(device),
        threads=torch.get_num_threads(),
        processor=_quantile(processor, 0.5) if device.type == "cpu" else None,
    )


def _time(name: str, model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Milliseconds of one pass, by the clock and of the processor."""
    try:
        _wait(x)
        started = time.perf_counter(), time.process_time()
        model(x)
        _wait(x)
    except Exception as error:  # of the user's network: whatever it raises, this input does not suit it
        raise InputError(f"{name}: expected a network for inputs {tuple(x.shape)}; got {one_line(error)}") from error
    return 1000 * (time.perf_counter() - started[0]), 1000 * (time.process_time() - started[1])


def _wait(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


def _quantile(times: Sequence[float], share: float) -> float:
    """The smallest time that a share of all does not exceed."""
    return sorted(times)[math.ceil(share * len(times)) - 1]
