"""Reading the values of options; what cannot be read is an InputError that names the option."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from brittle.errors import InputError

DEVICES = "auto, cpu, cuda or cuda:N"


def arguments(entries: Sequence[str]) -> dict[str, object]:
    """``NAME=VALUE`` entries; values are read as JSON, else as text."""
    values: dict[str, object] = {}
    for entry in entries:
        name, separator, value = entry.partition("=")
        if not separator or not name.isidentifier():
            raise InputError(f"arch-arg: expected NAME=VALUE; got {entry!r}")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return values


def strengths(option: str, entries: Sequence[str] | None) -> dict[str, float]:
    """``NAME=NUMBER`` entries, hyphens in names as underscores."""
    strength: dict[str, float] = {}
    for entry in entries or ():
        name, separator, value = entry.partition("=")
        name = name.strip().replace("-", "_")
        if not separator or not name:
            raise InputError(f"{option}: expected NAME=NUMBER; got {entry!r}")
        if name in strength:
            raise InputError(f"{option}: {name} is given twice")
        strength[name] = number(option, value)
    return strength


def rank(text: str | None) -> int | float | None:
    """A rank (``8``), or a share of the full one (``0.25``)."""
    if text is None:
        return None
    if _is_count(text):
        return int(text)
    share = number("rank", text)
    if not 0 < share < 1:
        raise InputError(f"rank: expected a positive integer or a share between 0 and 1; got {text!r}")
    return share


def norms(text: str) -> tuple[float, ...]:
    """``inf``, ``2`` or ``inf,2``."""
    listed = numbers("p", text)
    if any(p not in (2, math.inf) for p in listed) or len(set(listed)) < len(listed):
        raise InputError(f"p: expected inf, 2 or inf,2; got {text!r}")
    return listed


def budgets(entries: Sequence[str] | None) -> dict[float, float]:
    """``P=EPS`` entries; ``EPS`` alone holds for every norm."""
    eps: dict[float, float] = {}
    for entry in entries or ():
        norm, separator, value = entry.rpartition("=")
        for p in norms(norm) if separator else (math.inf, 2.0):
            eps[p] = number("eps", value)
            if not 0 < eps[p] < math.inf:
                raise InputError(f"eps: expected a finite number above 0; got {value}")
    return eps


def number(option: str, text: str) -> float:
    """One number."""
    listed = numbers(option, text)
    if len(listed) > 1:
        raise InputError(f"{option}: expected one number; got {text!r}")
    return listed[0]


def numbers(option: str, text: str) -> tuple[float, ...]:
    """Numbers separated by commas; each may be a fraction, as in ``8/255``."""
    try:
        listed = tuple(map(_fraction, text.split(",")))
    except (ValueError, ZeroDivisionError):
        raise InputError(f"{option}: expected numbers separated by commas; got {text!r}") from None
    if any(math.isnan(value) for value in listed):
        raise InputError(f"{option}: expected numbers; got {text!r}")
    return listed


def _fraction(text: str) -> float:
    """``0.03`` or ``8/255``."""
    whole, slash, parts = text.partition("/")
    return float(whole) / float(parts) if slash else float(whole)


def steps(option: str, text: str) -> tuple[float, ...]:
    """``FROM:TO:STEP``, both ends included: ``0.1:0.3:0.1`` are 0.1, 0.2 and 0.3; or one number."""
    parts = [number(option, part) for part in text.split(":")]
    if len(parts) == 1:
        return (parts[0],)
    if len(parts) != 3 or not parts[2] > 0 or not parts[0] <= parts[1] or (parts[1] - parts[0]) / parts[2] > 1000:
        raise InputError(f"{option}: expected FROM:TO:STEP, rising, with a STEP above 0; got {text!r}")
    start, end, step = parts
    return tuple(round(start + i * step, 10) for i in range(int((end - start) / step + 1e-9) + 1))


def integers(option: str, text: str | None, count: int | None = None) -> tuple[int, ...] | None:
    """Positive integers separated by commas, ``count`` of them."""
    if text is None:
        return None
    parts = text.split(",")
    if not all(_is_count(part.strip()) for part in parts) or count not in (None, len(parts)):
        raise InputError(f"{option}: expected {count or 'some'} positive integers separated by commas; got {text!r}")
    return tuple(map(int, parts))


def image_size(text: str | None) -> tuple[int, int] | None:
    """``HEIGHT,WIDTH``."""
    sizes = integers("image-size", text, count=2)
    return None if sizes is None else (sizes[0], sizes[1])


def statistics(mean: str | None, std: str | None) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation by channel; None without either."""
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise InputError("mean, std: expected both or neither; got one")
    return numbers("mean", mean), numbers("std", std)


def devices(text: str) -> tuple[str, ...]:
    """Devices that this machine has, separated by commas; ``auto`` is the first CUDA device, or else the CPU."""
    import torch

    count = torch.cuda.device_count()
    names = tuple("cuda" if name == "auto" and count else name for name in map(str.strip, text.split(",")))
    names = tuple("cpu" if name == "auto" else name for name in names)
    for name in names:
        try:
            device = torch.device(name)
        except RuntimeError:
            raise InputError(f"device: expected {DEVICES}; got {name!r}") from None
        if device.type == "mps":
            raise InputError(
                f"device: expected {DEVICES}; got {name!r}, which has no double precision: budgets, bounds and "
                "certificates are computed in it"
            )
        if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= count):
            raise InputError(f"device: expected cpu, auto or one of {count} CUDA devices; got {name!r}")
    return names


def device(text: str) -> str:
    """One device that this machine has."""
    names = devices(text)
    if len(names) > 1:
        raise InputError(f"device: expected one of {DEVICES}; got {text!r}")
    return names[0]


def _is_count(text: str) -> bool:
    """Whether a text is a positive integer, of a size that counts something."""
    return text.isascii() and text.isdecimal() and len(text) < 10 and int(text) > 0
