"""Pickles of plain values, read without running any of their code."""

from __future__ import annotations

import codecs
import io
import pickle
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from brittle.data.readers.contents import Array
from brittle.errors import InputError


def plain_dict(content: bytes) -> dict[object, object]:
    """Return the dict of a pickle that holds only dicts, lists, numbers, strings and arrays of numbers.

    The strings of Python 2 come as bytes, arrays in a form that :func:`plain_array` opens.

    Raises:
        InputError: It asks for anything else, which is not run, or is no dict.
        Exception: Whatever else ``pickle`` raises for broken content.
    """
    value = _PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
    if not isinstance(value, dict):
        raise InputError(f"expected a dict, got {type(value).__name__}")
    return value


def plain_array(value: object) -> Array:
    """Return a value of :func:`plain_dict` as an array."""
    return value.array if isinstance(value, _StoredArray) else np.asarray(value)


class _StoredType:
    """Stands in for ``numpy.dtype`` in a pickle: a plain number type and its byte order, nothing else."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        name = code.decode("ascii") if isinstance(code, bytes) else str(code)
        if not re.fullmatch(r"[iuf][1248]", name):
            raise InputError(f"expected an array of numbers; got one of {name!r}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Sequence[Any]) -> None:
        self.dtype = self.dtype.newbyteorder("big" if state[1] in (">", b">") else "little")


class _StoredArray:
    """Stands in for ``numpy.ndarray`` in a pickle, so that numpy's own unpickling never sees the file."""

    def __init__(self, *_: object) -> None:
        self.array: Array = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[int, tuple[int, ...], _StoredType, bool, bytes]) -> None:
        _, shape, kind, fortran, content = state
        self.array = np.frombuffer(content, kind.dtype).reshape(shape, order="F" if fortran else "C")


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for one of the few names that a pickled array needs."""
        match module.replace("numpy._core", "numpy.core"), name:
            case ("numpy.core.multiarray", "_reconstruct") | ("numpy", "ndarray"):
                return _StoredArray
            case ("numpy", "dtype"):
                return _StoredType
            case ("_codecs", "encode"):
                return codecs.encode
        raise InputError(f"it asks for {module}.{name}, and code is never unpickled")
