"""Lines for the terminal; names in them come from files and from others, so nothing in them acts on it."""

from __future__ import annotations

import sys

from brittle.results.wording import printable


def say(*lines: str) -> None:
    """Print lines to standard output."""
    print("\n".join(map(printable, lines)))


def note(message: str) -> None:
    """Print one line to standard error."""
    print(printable(f"brittle: {' '.join(message.split())}"), file=sys.stderr, flush=True)


def complain(message: str, code: int) -> int:
    """Print what went wrong to standard error; returns the exit code."""
    note(message)
    return code
