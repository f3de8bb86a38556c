"""What the shell offers for an option's value; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable


def completing(*values: str) -> Callable[[str], list[str]]:
    """Offers those of some values that begin as what is typed does."""

    def offer(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return offer
