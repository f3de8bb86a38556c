"""Reading the command line's option values; what cannot be read is an InputError that names the option."""

from __future__ import annotations

import json
import math

from brittle.errors import InputError


def arguments(pairs: list[str]) -> dict[str, object]:
    """``NAME=VALUE`` pairs; values are read as JSON, else as text."""
    found: dict[str, object] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name.isidentifier():
            raise InputError(f"arch-arg: expected NAME=VALUE; got {pair!r}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def strengths(name: str, entries: list[str] | None) -> dict[str, float]:
    """``NAME=NUMBER`` entries, hyphens in names as underscores; ``name`` is the option's."""
    found: dict[str, float] = {}
    for entry in entries or []:
        key, separator, value = entry.partition("=")
        if not separator or not key.strip():
            raise InputError(f"{name}: expected NAME=NUMBER; got {entry!r}")
        key = key.strip().replace("-", "_")
        if key in found:
            raise InputError(f"{name}: {key} is given twice")
        found[key] = number(name, value)
    return found


def rank(text: str | None) -> int | float | None:
    """A rank (``8``), or a share of the full one (``0.25``)."""
    if text is None:
        return None
    if _whole(text):
        return int(text)
    share = number("rank", text)
    if not 0 < share < 1:
        raise InputError(f"rank: expected a positive integer or a share between 0 and 1; got {text!r}")
    return share


def norms(text: str) -> tuple[float, ...]:
    """``inf``, ``2`` or ``inf,2``."""
    found = numbers("p", text)
    if not found or any(q not in (2, math.inf) for q in found) or len(set(found)) < len(found):
        raise InputError(f"p: expected inf, 2 or inf,2; got {text!r}")
    return tuple(found)


def budgets(entries: list[str] | None) -> dict[float, float]:
    """``P=EPS`` entries; ``EPS`` alone holds for every norm."""
    found: dict[float, float] = {}
    for entry in entries or []:
        norm, separator, value = entry.rpartition("=")
        for q in norms(norm) if separator else (math.inf, 2.0):
            found[q] = number("eps", value)
            if not 0 < found[q] < math.inf:
                raise InputError(f"eps: expected a finite number above 0; got {value}")
    return found


def number(name: str, text: str) -> float:
    """One number; ``name`` is the option's."""
    found = numbers(name, text)
    if len(found) > 1:
        raise InputError(f"{name}: expected one number; got {text!r}")
    return found[0]


def _whole(text: str) -> bool:
    """Whether a text is a positive integer, of a size that counts something."""
    return text.isascii() and text.isdecimal() and len(text) < 10 and int(text) > 0


def numbers(name: str, text: str) -> list[float]:
    """Numbers separated by commas; ``name`` is the option's."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{name}: expected numbers separated by commas; got {text!r}") from None
    if any(math.isnan(number) for number in found):
        raise InputError(f"{name}: expected numbers; got {text!r}")
    return found


def integers(name: str, text: str | None, count: int | None = None) -> tuple[int, ...] | None:
    """Positive integers separated by commas, ``count`` of them; ``name`` is the option's."""
    if text is None:
        return None
    parts = text.split(",")
    if not all(_whole(part.strip()) for part in parts) or count not in (None, len(parts)):
        raise InputError(f"{name}: expected {count or 'some'} positive integers separated by commas; got {text!r}")
    return tuple(int(part) for part in parts)


def statistics(mean: str | None, std: str | None) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation by channel; None without either."""
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise InputError("mean, std: expected both or neither; got one")
    return tuple(numbers("mean", mean)), tuple(numbers("std", std))


def image_size(text: str | None) -> tuple[int, int] | None:
    """``HEIGHT,WIDTH``."""
    sizes = integers("image-size", text, count=2)
    return None if sizes is None else (sizes[0], sizes[1])


def device(name: str) -> str:
    """A device that this machine has."""
    import torch

    try:
        found = torch.device(name)
    except RuntimeError:
        raise InputError(f"device: expected cpu, cuda or cuda:N; got {name!r}") from None
    if found.type not in ("cpu", "cuda") or (found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"device: expected cpu or one of {torch.cuda.device_count()} CUDA devices; got {name!r}")
    return name
