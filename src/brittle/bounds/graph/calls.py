"""What is read of a node of a network's graph before its rule is known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import fx, nn

from brittle.models.trace import Trace

Shape = tuple[int, ...] | None
"""Shape of what a module reads, with a batch of one; None when it is not known."""


@dataclass(frozen=True)
class Context:
    """What a reader may have to know beside its node.

    Attributes:
        traced: The network's trace.
        training: The modules that are in training mode outside the reading, for which all are in evaluation mode.
    """

    traced: Trace
    training: frozenset[nn.Module]


def settings(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments behind the first, with recorded numbers in place of what is computed of sizes alone."""
    return fx.map_arg((node.args[1:], node.kwargs), lambda read: read.meta.get("size", read))


def argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    """An argument of a call behind the first, by its place or its name; sizes as recorded."""
    positional, named = settings(node)
    return positional[place - 1] if len(positional) >= place else named.get(name, default)


def depend(arguments: Iterable[Any]) -> bool:
    """Whether an argument of a call, or an entry of one, is computed by the network."""
    entries = [value if isinstance(value, tuple | list) else [value] for value in arguments]
    return any(isinstance(entry, fx.Node) for entry in chain(*entries))
