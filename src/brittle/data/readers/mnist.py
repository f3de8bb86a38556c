"""MNIST: idx files of unsigned bytes."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np

from brittle.data.readers.contents import Array, Choose, Read, check_memory, check_unpacked, opened
from brittle.errors import InputError


def read_mnist(root: Path, split: str, choose: Choose) -> Read:
    """Read ``root/MNIST/raw/*-ubyte``, or the ``.gz`` where only that is there, into ``(N, 1, 28, 28)`` of uint8.

    Raises:
        InputError: A file is missing or broken, or there is not one label for each image.
    """
    stem = root / "MNIST" / "raw" / {"train": "train", "test": "t10k"}[split]
    x, y = _read_idx(Path(f"{stem}-images-idx3-ubyte"), 3), _read_idx(Path(f"{stem}-labels-idx1-ubyte"), 1)
    if len(x) != len(y):
        raise InputError(f"{stem}-*: expected one label for each image; got {len(x)} images and {len(y)} labels")
    chosen = choose(len(x))
    return x[chosen][:, None], y[chosen], 10


def _read_idx(path: Path, axes: int) -> Array:
    """Read an idx file of unsigned bytes, or its ``.gz`` when only that is there."""
    packed = path.with_name(path.name + ".gz")
    path = packed if packed.exists() and not path.exists() else path
    start, magic = 4 + 4 * axes, bytes([0, 0, 8, axes])
    with opened(path, f"an idx file of unsigned bytes with {axes} axes") as file:
        head, size = file.read(start), path.stat().st_size
        if len(head) < start or head[:4] != magic:
            raise InputError(f"{path}: expected the idx magic {magic.hex()} at the start; got {head[:4].hex() or None}")
        shape = struct.unpack(f">{axes}I", head[4:])
        announced = math.prod(shape)
        if path == packed:
            check_unpacked(path, size, announced)
            content = file.read(announced + 1)
            there = f"{len(content)}" if len(content) <= announced else "more"
        else:
            check_memory(path, size)
            content = file.read()
            there = f"{len(content)}"
    if len(content) != announced:
        raise InputError(f"{path}: expected the {announced} values it announces; got {there}")
    return np.frombuffer(content, np.uint8).reshape(shape)
