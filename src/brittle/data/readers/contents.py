"""What all readers share: their types, and files read whole."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from brittle.errors import InputError

Array = NDArray[Any]
Read = tuple[Array, Array, int]
"""What every reader returns: inputs ``(N, ...)`` as stored, labels ``(N,)``, number of classes."""
Choose = Callable[[int], Array]
"""From the number of examples to the indices of those wanted, so that no reader converts what is not used."""


def contents(path: Path, expected: str) -> bytes:
    """Read a whole file, unpacking it when it ends in ``.gz``.

    Raises:
        InputError: It is missing or broken; the message names the path and what was ``expected`` there.
    """
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except FileNotFoundError:
        raise InputError(f"{path}: expected {expected}; got no file, and nothing is downloaded") from None
    except Exception as error:  # gzip reports damage by four unrelated exceptions
        raise InputError(f"{path}: expected {expected}; reading it failed: {error}") from error
