"""A job: a function, its settings, and the key by which it is known to be done."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from brittle._version import __version__
from brittle.errors import InputError, first_line
from brittle.sweeps.reach import reached_text

Settings = Mapping[str, Any]
"""Arguments by name: numbers, strings, booleans, None, and lists of them."""
Row = dict[str, Any]
"""What a job returns, likewise."""


@dataclass(frozen=True)
class Code:
    """The source of a job's function.

    Attributes:
        name: The function's name, behind its module's where it is importable.
        path: The file that holds it.
        source: The file's text where the file is no importable module: workers run exactly this text.
        digest: SHA-256 of what the function reaches (:func:`brittle.sweeps.reach.reached_text`) and Brittle's version.
    """

    name: str
    path: str
    source: str | None
    digest: str


@dataclass(frozen=True)
class Job:
    """One call of a function whose result is kept.

    Attributes:
        function: ``"package.module:name"``, importable where workers run, or ``"path/to/file.py:name"``. Called with
            settings and places by name, it returns a row.
        settings: What the result depends on.
        data: Fingerprint or name of the data that the function reads; other data are another job.
        places: Further arguments, which say where things lie on this machine and change nothing of the result.
    """

    function: str
    settings: Settings
    data: str = ""
    places: Settings = field(default_factory=dict)

    @cached_property
    def code(self) -> Code:
        """The function's source as it is now.

        Raises:
            InputError: There is no such file or module.
        """
        return read_code(self.function)

    @cached_property
    def key(self) -> str:
        """The first 16 hexadecimal digits of SHA-256 over the function's name, settings, data and code.

        Raises:
            InputError: There is no such file or module, or a setting is no plain value.
        """
        parts = [self.code.name, dict(self.settings), self.data, self.code.digest]
        try:
            text = json.dumps(parts, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"settings: expected numbers, strings, booleans, None and lists of them; got {first_line(error)}"
            ) from None
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_code(function: str) -> Code:
    """The source of ``"package.module:name"`` or ``"path/to/file.py:name"``.

    Raises:
        InputError: There is no such file or module.
    """
    where, _, name = function.rpartition(":")
    is_file = where.endswith(".py")
    path = Path(where).resolve() if is_file else _module_file(where)
    if path is None or not path.is_file() or not name.isidentifier():
        raise InputError(f"function: expected package.module:name or path/to/file.py:name; got {function!r}")
    source = path.read_bytes()
    digest = hashlib.sha256((reached_text(path, name) + __version__).encode()).hexdigest()
    return Code(name if is_file else function, str(path), source.decode() if is_file else None, digest)


def _module_file(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def read_module(path: str, source: str) -> types.ModuleType:
    """Run a file's text as a module of its own, once in a process; imports find what lies beside the file.

    Args:
        path: Where the text stands or stood.
        source: The text.

    Raises:
        Exception: Whatever the text raises.
    """
    digest = hashlib.sha256(f"{path} {source}".encode()).hexdigest()
    name = f"{Path(path).stem}_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    module = types.ModuleType(name)
    module.__file__ = path
    if str(Path(path).parent) not in sys.path:
        sys.path.append(str(Path(path).parent))
    sys.modules[name] = module  # dataclasses look for their module there
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def load_function(code: Code) -> Callable[..., Row]:
    """The function itself.

    Raises:
        InputError: Its module has no such function.
    """
    where, _, name = code.name.rpartition(":")
    module = importlib.import_module(where) if code.source is None else read_module(code.path, code.source)
    function: Callable[..., Row] | None = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"function: expected a function {name} in {code.path}; got none")
    return function


def name_of(function: Callable[..., Row]) -> str:
    """The name by which a job calls a function: its module's if that can be imported, else its file's.

    Raises:
        InputError: It does not stand at the top of a file.
    """
    module = sys.modules.get(function.__module__)
    name = function.__qualname__
    file = getattr(module, "__file__", None)
    if file is None or getattr(module, name, None) is not function:
        raise InputError(f"function: expected one at the top of a file; got {name} of {function.__module__}")
    importable = _module_file(function.__module__) == Path(file)  # not a script that runs as __main__
    return f"{function.__module__ if importable else Path(file).resolve()}:{name}"
