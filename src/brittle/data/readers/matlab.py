"""Arrays of numbers in MATLAB files of version 5, which ``save -v6`` and ``-v7`` write.

Read here and not by scipy, whose compiled reader follows what a file says of itself: damaged files end the process.
After 128 bytes of header come elements, each ``type, size, content``; an array is an element of four: flags with its
class, dimensions, name, and values in column order, which may be of a smaller type than the class. Mostly each array is
packed as a whole. Source: MathWorks, MAT-File Format (level 5).
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from brittle.data.readers.contents import Array, check_memory, check_unpacked, opened

PLAIN, PACKED = 14, 15
"""Types of the elements that hold an array, plain and packed by zlib."""
STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
"""By type of an element, numpy's name of its numbers."""
CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
"""By class of an array, numpy's name of it; others hold text, cells or structures."""
COMPLEX = 0x0800
"""Flag of an array with imaginary parts."""
HEAD = 1024
"""Bytes in which an array's flags, dimensions and name have to fit; they take some 60."""


@dataclass(frozen=True)
class _Head:
    """What an array says of itself before its values; these are ``size`` bytes of ``kind`` from ``start``."""

    name: str
    flags: int
    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


def read_matrices(path: Path, names: Sequence[str]) -> list[Array]:
    """Real arrays of numbers by name, in the classes and shapes that they were saved in.

    Raises:
        InputError: The file is missing, broken, of another version, too large for this machine, or holds no such
            arrays.
    """
    arrays: dict[str, Array] = {}
    with opened(path, f"a MATLAB file with {' and '.join(names)}") as file:
        check_memory(path, path.stat().st_size)
        content = memoryview(file.read())
        order = {b"\0\1IM": "<", b"\1\0MI": ">"}.get(bytes(content[124:128]))
        if order is None:
            raise ValueError("it is not of version 5, as save -v6 and -v7 write it")
        place = 128
        while place < len(content) and len(arrays) < len(names):
            kind, size = struct.unpack_from(f"{order}2I", content, place)
            element, start = content[place + 8 : place + 8 + size], place
            place += 8 + size
            if kind not in (PLAIN, PACKED) or len(element) < size:
                raise ValueError(f"there is no whole array at byte {start}")
            arrays |= (_packed_array if kind == PACKED else _plain_array)(path, element, order, names)
        if missing := [name for name in names if name not in arrays]:
            raise ValueError(f"there is no {missing[0]}")
    return [arrays[name] for name in names]


def _packed_array(path: Path, packed: memoryview, order: str, names: Sequence[str]) -> dict[str, Array]:
    """The array of a packed element, if it is one of those named; of others no more than the head is unpacked."""
    stream = zlib.decompressobj()
    first = stream.decompress(packed, HEAD)
    kind, size = struct.unpack_from(f"{order}2I", first)
    head = _read_head(memoryview(first)[8:], order)
    if head.name not in names:
        return {}
    if kind != PLAIN or size < head.start + head.size:
        raise ValueError(f"{head.name} is no whole array")
    check_unpacked(path, len(packed), size)
    rest = stream.decompress(stream.unconsumed_tail, size) if len(first) < size + 8 else b""
    return _plain_array(path, memoryview(first + rest)[8:], order, names)


def _plain_array(path: Path, element: memoryview, order: str, names: Sequence[str]) -> dict[str, Array]:
    """The array of an element, if it is one of those named."""
    head = _read_head(element, order)
    if head.name not in names:
        return {}
    if head.flags & COMPLEX or head.flags & 0xFF not in CLASSES or head.kind not in STORED:
        raise ValueError(f"{head.name} is no array of real numbers")
    stored = np.dtype(order + STORED[head.kind])
    count = math.prod(head.shape)
    if min(head.shape) < 0 or count * stored.itemsize != head.size or len(element) < head.start + head.size:
        raise ValueError(f"{head.name} does not hold the values that it announces")
    check_memory(path, count)
    values = np.frombuffer(element, stored, count, head.start)
    return {head.name: values.astype(CLASSES[head.flags & 0xFF]).reshape(head.shape, order="F")}


def _read_head(element: memoryview, order: str) -> _Head:
    """What stands before an array's values."""
    parts, place = [], 0
    for _ in range(3):
        kind, size, start, place = _read_tag(element, place, order)
        parts.append(bytes(element[start : start + size]))
    (flags,) = struct.unpack_from(f"{order}I", parts[0])
    shape = struct.unpack(f"{order}{len(parts[1]) // 4}i", parts[1])
    kind, size, start, _ = _read_tag(element, place, order)
    return _Head(parts[2].decode("ascii"), flags, shape, kind, start, size)


def _read_tag(content: memoryview, place: int, order: str) -> tuple[int, int, int, int]:
    """Type, size and start of an element's content, and where the next begins: elements fill multiples of 8 bytes."""
    kind, size = struct.unpack_from(f"{order}2I", content, place)
    if kind >> 16:  # up to four bytes share the tag's own eight
        return kind & 0xFFFF, kind >> 16, place + 4, place + 8
    return kind, size, place + 8, place + 8 + size + -size % 8
