"""What a worker does with a job, wherever it runs."""

from __future__ import annotations

import json
import time
import traceback
from dataclasses import dataclass
from typing import Any

from brittle.errors import InputError, one_line
from brittle.sweeps.job import Code, Job, Row, Settings, load_function


@dataclass(frozen=True)
class Task:
    """A job to be done now.

    Attributes:
        job: The job.
        number: Which try of it this is, from 1.
    """

    job: Job
    number: int


@dataclass(frozen=True)
class Done:
    """What came of a task: a row, or an error.

    Attributes:
        task: The task.
        row: What the function returned; None where it failed.
        seconds: How long it took.
        error: Type and message of its error, in one line.
        trace: The traceback, or the last that its worker wrote.
    """

    task: Task
    row: Row | None = None
    seconds: float = 0.0
    error: str = ""
    trace: str = ""


def perform(code: Code, arguments: Settings) -> dict[str, Any]:
    """Call a job's function.

    Returns:
        Fields of :class:`Done`: ``row`` and ``seconds``, or ``error`` and ``trace``.
    """
    start = time.perf_counter()
    try:
        row = plain_row(load_function(code)(**arguments))
    except (Exception, SystemExit) as error:
        return {"error": one_line(error), "trace": traceback.format_exc()}
    return {"row": row, "seconds": time.perf_counter() - start}


def plain_row(row: object) -> Row:
    """A row as it comes back from its file; numbers of numpy and torch become Python's.

    Raises:
        InputError: It is no dict with names as keys, or holds something other than numbers, strings, booleans, None and
            lists of them.
    """
    if not isinstance(row, dict) or not all(isinstance(name, str) for name in row):
        raise InputError(f"row: expected a dict with names as keys; got {type(row).__name__}")
    try:
        plain: Row = json.loads(json.dumps(row, default=lambda value: value.tolist()))
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"row: expected numbers, strings, booleans, None and lists of them; got {error}") from None
    return plain
