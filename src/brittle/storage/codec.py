"""Frozen dataclasses to JSON and back, exactly."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from brittle.errors import InputError

T = TypeVar("T")


def to_json(value: object) -> str:
    """A dataclass as JSON; infinities as strings, fields with ``metadata={"json": False}`` left out.

    Args:
        value: A dataclass of dataclasses, tuples, dicts, strings, numbers, booleans and None; NaN is refused.
    """
    return json.dumps(_plain(value), indent=1, allow_nan=False) + "\n"


def from_json(text: str | bytes, kinds: Mapping[int, type[T]], name: str) -> T:
    """The inverse of :func:`to_json`: every number, tuple and nested dataclass as it was.

    Args:
        text: What :func:`to_json` returned.
        kinds: By ``schema_version``, the dataclass (with a field of that name) that such a document holds.
        name: What to call the document in an error.

    Raises:
        InputError: The text is not JSON, or not such a document; the message names the first field at fault.
    """
    from pydantic import ValidationError

    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: expected JSON; got text that does not parse ({error})") from None
    version = document.get("schema_version") if isinstance(document, dict) else None
    if not isinstance(version, int) or version not in kinds:
        raise InputError(f"{name}: expected schema_version {' or '.join(map(str, kinds))}; got {version!r}")
    try:
        result: T = _adapter(kinds[version]).validate_python(document)  # type: ignore[arg-type]  # classes are hashable
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{name}: {where}: {first['msg']}; got {first['input']!r:.80}") from None
    return result


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _plain(value: Any) -> Any:
    """Dataclasses to dicts and tuples to lists; JSON has no infinity, so one is written as the string "inf"."""
    if dataclasses.is_dataclass(value):
        kept = [f.name for f in dataclasses.fields(value) if f.metadata.get("json", True)]
        return {name: _plain(getattr(value, name)) for name in kept}
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


@functools.cache
def _adapter(kind: type) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
