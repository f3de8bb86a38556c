"""How long work tells how far it has come."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, "int | None"], None]
"""Called with the name of the stage, the steps done and, where it is known, their total."""


def silent(stage: str, done: int, total: int | None) -> None:
    """Progress that nobody hears."""
