"""Pickles of plain values, read without running any of their code.

Read here, operation by operation, and not by ``pickle``: its compiled reader allocates what a file announces (9 bytes
can ask for 4 GB), and a few bytes can build keys whose hash takes for ever.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from brittle.data.readers.contents import Array
from brittle.errors import InputError

Values = list[Any]

VALUES = (
    "INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8",
)  # fmt: skip
"""Operations that put their argument on the stack."""
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple,
}  # fmt: skip
"""Operations that put a value of their own on the stack."""


def plain_dict(content: bytes) -> dict[object, object]:
    """Return the dict of a pickle that holds only dicts, lists, numbers, strings and arrays of numbers.

    The strings of Python 2 come as text, arrays in a form that :func:`plain_array` opens. Time and memory are of the
    order of the content's length.

    Raises:
        InputError: It asks for anything else, which is not run, or is no dict.
        Exception: Whatever else broken content leads to.
    """
    value = _run(content)
    if not isinstance(value, dict):
        raise InputError(f"expected a dict, got {type(value).__name__}")
    return value


def plain_array(value: object) -> Array:
    """Return a value of :func:`plain_dict` as an array: one that is stored, or a flat list of integers.

    Anything else becomes an array of no dimension and type object, for the caller to refuse: made an array of their
    own, lists in lists and texts of unequal length can take any amount of memory.
    """
    if isinstance(value, _StoredArray):
        return value.array
    integers = isinstance(value, list) and all(isinstance(entry, int) for entry in value)
    return np.array(value, np.int64) if integers else np.empty((), object)


class _StoredType:
    """Stands in for ``numpy.dtype`` in a pickle: a plain number type and its byte order, nothing else."""

    def __init__(self, code: object, *_: object) -> None:
        name = code.decode("ascii") if isinstance(code, bytes) else str(code)
        if not re.fullmatch(r"[iuf][1248]", name):
            raise InputError(f"expected an array of numbers; got one of {name!r:.80}")
        self.dtype = np.dtype(name)

    def set_state(self, state: Sequence[Any]) -> None:
        self.dtype = self.dtype.newbyteorder("big" if state[1] in (">", b">") else "little")


class _StoredArray:
    """Stands in for ``numpy.ndarray`` in a pickle, so that numpy's own unpickling never sees the file."""

    def __init__(self, *_: object) -> None:
        self.array: Array = np.empty(0, np.uint8)

    def set_state(self, state: Sequence[Any]) -> None:
        _, shape, kind, fortran, content = state
        content = content.encode("latin-1") if isinstance(content, str) else content
        self.array = np.frombuffer(content, kind.dtype).reshape(shape, order="F" if fortran else "C")


def _text_as_bytes(text: str, encoding: str) -> bytes:
    """Stands in for ``_codecs.encode``, by which Python 3 pickles bytes for Python 2."""
    if encoding != "latin1":  # others can double the text at every call
        raise InputError(f"expected bytes in latin1; got {encoding!r:.80}")
    return text.encode("latin-1")


def _stand_in(module: object, name: object) -> Callable[..., object]:
    """What stands in for one of the few names that a pickled array needs."""
    match str(module).replace("numpy._core", "numpy.core"), name:
        case ("numpy.core.multiarray", "_reconstruct") | ("numpy", "ndarray"):
            return _StoredArray
        case ("numpy", "dtype"):
            return _StoredType
        case ("_codecs", "encode"):
            return _text_as_bytes
    raise InputError(f"it asks for {module}.{name}, and code is never unpickled")


def _run(content: bytes) -> object:
    """Carry out a pickle's operations; what is not listed is refused."""
    stack: Values = []
    below: list[Values] = []  # what stood on the stack at each mark
    memo: dict[int, Any] = {}
    argument: Any
    for operation, argument, _ in pickletools.genops(content):
        match operation.name:
            case name if name in VALUES:
                stack.append(argument)
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name]())
            case "BINPUT" | "LONG_BINPUT" | "PUT" | "MEMOIZE":
                memo[len(memo) if argument is None else argument] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[argument])
            case "MARK":
                below.append(stack)
                stack = []
            case name if name in OF_MARKED:
                items, stack = stack, below.pop()
                OF_MARKED[name](stack, items)
            case name if name in OF_LAST:
                count, act = OF_LAST[name]
                items = stack[-count:]
                del stack[-count:]
                act(stack, items)
            case "GLOBAL":
                stack.append(_stand_in(*argument.split(" ", 1)))
            case "STOP":
                return stack.pop()
            case name if name not in ("PROTO", "FRAME"):
                raise InputError(f"it holds {name}, which plain values do not need")
    raise InputError("it has no end")


def _add_entries(stack: Values, items: Values) -> None:
    """Put keys and values in turn into the dict on the stack; keys whose hash is quick alone."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | bytes | int):
            raise InputError(f"expected names as keys; got {type(key).__name__}")
        stack[-1][key] = value


def _add_dict(stack: Values, items: Values) -> None:
    stack.append({})
    _add_entries(stack, items)


def _build(stack: Values, items: Values) -> None:
    """Give an array or a number type its state."""
    if not isinstance(stack[-1], _StoredArray | _StoredType):
        raise InputError(f"expected arrays alone to have a state; got {type(stack[-1]).__name__}")
    stack[-1].set_state(items[0])


def _reduce(stack: Values, items: Values) -> None:
    """Call one of the stand-ins."""
    function, arguments = items
    if function not in (_StoredArray, _StoredType, _text_as_bytes):
        raise InputError(f"expected to make arrays alone; got {type(function).__name__}")
    stack.append(function(*arguments))


OF_MARKED: dict[str, Callable[[Values, Values], None]] = {
    "TUPLE": lambda stack, items: stack.append(tuple(items)),
    "LIST": lambda stack, items: stack.append(items),
    "DICT": _add_dict,
    "APPENDS": lambda stack, items: stack[-1].extend(items),
    "SETITEMS": _add_entries,
}
"""Operations on all above the last mark."""
OF_LAST: dict[str, tuple[int, Callable[[Values, Values], None]]] = {
    "TUPLE1": (1, lambda stack, items: stack.append(tuple(items))),
    "TUPLE2": (2, lambda stack, items: stack.append(tuple(items))),
    "TUPLE3": (3, lambda stack, items: stack.append(tuple(items))),
    "APPEND": (1, lambda stack, items: stack[-1].extend(items)),
    "SETITEM": (2, _add_entries),
    "BUILD": (1, _build),
    "REDUCE": (2, _reduce),
    "STACK_GLOBAL": (2, lambda stack, items: stack.append(_stand_in(*items))),
}
"""Operations on so many of the last values."""
