"""What attacks are called in results, and what tells them apart."""

from __future__ import annotations

import functools
import hashlib
import inspect
from types import FunctionType

from brittle.attacks import ATTACKS
from brittle.errors import InputError
from brittle.evaluation.worst_case import Attack, bound_options
from brittle.results import Setting


def attack_name(attack: Attack) -> str:
    """``apgd``, or ``apgd(loss='dlr', steps=50)`` for an attack with bound options."""
    if isinstance(attack, functools.partial):
        options = ", ".join(f"{name}={value!r}" for name, value in attack.keywords.items())
        return f"{attack_name(attack.func)}({options})"
    return getattr(attack, "__name__", type(attack).__name__)


def attack_settings(attack: Attack) -> Setting:
    """The options that an attack runs with and the caller did not set, as one line."""
    parameters = inspect.signature(attack).parameters.values()
    passed = {"eps", "p", "bounds", "seed", "ids", "batch_size", "progress", *bound_options(attack)}
    simple = [q for q in parameters if q.default is not q.empty and q.name not in passed]
    return ", ".join(f"{q.name}={getattr(q.default, '__name__', q.default)!r}" for q in simple)


def identity(attack: Attack) -> str:
    """A text that differs between attacks that may give different results.

    Raises:
        InputError: The attack is none of this package's and no plain function, or has options that are no plain
            values: then nothing tells it from others.
    """
    if isinstance(attack, functools.partial):
        options = [*enumerate(attack.args), *attack.keywords.items()]
        if not all(isinstance(value, bool | int | float | str | None) for _, value in options):
            raise InputError(f"resume: expected options that are plain values; got {attack_name(attack)}")
        return f"{identity(attack.func)} {options!r}"
    if any(attack is own for own in ATTACKS.values()):
        return f"{attack_name(attack)} {attack_settings(attack)}"
    if not isinstance(attack, FunctionType) or attack.__closure__ or attack.__name__ == "<lambda>":
        raise InputError(f"resume: expected attacks that can be told apart by name; got {attack_name(attack)}")
    code = hashlib.sha256(attack.__code__.co_code + repr(attack.__code__.co_consts).encode()).hexdigest()
    return f"{attack.__module__}.{attack.__qualname__} {attack.__defaults__} {attack.__kwdefaults__} {code}"
