"""What all readers share: their types, files opened safely, and the most that a file may take in memory."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import NDArray

from brittle.errors import InputError

Array = NDArray[Any]
Read = tuple[Array, Array, int]
"""What every reader returns: inputs ``(N, ...)`` as stored, labels ``(N,)``, number of classes."""
Choose = Callable[[int], Array]
"""From the number of examples to the indices of those wanted, so that no reader converts what is not used."""
BYTES_PER_VALUE = 13
"""Memory for every value of the inputs at the worst moment, measured: the float32 that stays, and its check."""
DEFLATE_RATIO = 1032
"""No deflated byte (gzip, zip, MATLAB) yields more: a file that announces more is refused before it is unpacked."""


@contextmanager
def opened(path: Path, expected: str) -> Iterator[BinaryIO]:
    """Open a regular file for reading, unpacking it when it ends in ``.gz``; what goes wrong inside names it.

    Raises:
        InputError: It is missing, a folder, a pipe or a device (which could be waited for for ever), or broken; the
            message names the path and what was ``expected`` there.
    """
    if not path.is_file():
        there = " but a folder" if path.is_dir() else " but a pipe, a socket or a device" if path.exists() else None
        raise InputError(f"{path}: expected {expected}; got no file{there or ', and nothing is downloaded'}")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file  # type: ignore[misc]  # of both only what reads is used
    except InputError:
        raise
    except Exception as error:  # gzip, zip, pickles and arrays report damage by many unrelated exceptions
        raise InputError(f"{path}: expected {expected}; reading it failed: {error}") from error


def contents(path: Path, expected: str) -> bytes:
    """Read a whole file that is not packed.

    Raises:
        InputError: As :func:`opened`, or it takes too much memory.
    """
    with opened(path, expected) as file:
        check_memory(path, path.stat().st_size)
        return file.read()


def check_unpacked(path: Path, packed: int, unpacked: int) -> None:
    """Refuse to unpack what cannot be there, or would take too much memory.

    Args:
        path: The file.
        packed: Its bytes, or those of the part of it.
        unpacked: Bytes that it announces.
    """
    if unpacked > DEFLATE_RATIO * (packed + 1):
        raise InputError(
            f"{path}: expected at most {DEFLATE_RATIO} bytes of each packed one; got {unpacked} of {packed}"
        )
    check_memory(path, unpacked)


def check_memory(path: Path, values: int) -> None:
    """Refuse inputs of so many values that they would take more than half of the machine's memory, unread."""
    needed, memory = BYTES_PER_VALUE * values, machine_memory()
    if memory is not None and needed > memory / 2:
        raise InputError(
            f"{path}: expected inputs that need at most half of this machine's {memory / 1e9:.1f} GB of memory; got "
            f"{values} values, {needed / 1e9:.1f} GB"
        )


def machine_memory() -> int | None:
    """The machine's memory in bytes; None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
