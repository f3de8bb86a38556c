"""How long work tells how far it has come."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, "int | None"], None]
"""Called with the name of the stage, the steps done and, where it is known, their total."""
DONE_BEFORE = " done before"
"""What the stage's name ends with that tells, once, how much of the work an interrupted run has left done."""


def silent(stage: str, done: int, total: int | None) -> None:
    """Progress that nobody hears."""


def rising(progress: Progress | None) -> Progress:
    """Progress that is told only when a stage has come further than before; silent for None."""
    if progress is None:
        return silent
    furthest: dict[str, int] = {}

    def tell(stage: str, done: int, total: int | None) -> None:
        if done > furthest.get(stage, -1):
            furthest[stage] = done
            progress(stage, done, total)

    return tell
