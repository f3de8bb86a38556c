"""How far work has come: bars on a terminal; elsewhere a plain line now and then, on standard error as well."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from brittle.cli.messages import note
from brittle.errors import MissingExtra
from brittle.progress import DONE_BEFORE, Progress, silent
from brittle.results.wording import duration, printable

if TYPE_CHECKING:
    from rich.progress import TaskID

    from brittle.training import EpochRow, Moment


SECONDS = 30.0
"""Between two plain lines, at least."""


def now_and_then(
    tell: Callable[[str], None], every: float, clock: Callable[[], float] = time.monotonic
) -> Callable[[str, bool], None]:
    """What passes on a line when none was told for ``every`` seconds, or when it is due in any case."""
    told = clock()

    def maybe(line: str, due: bool = False) -> None:
        nonlocal told
        if due or clock() - told >= every:
            told = clock()
            tell(line)

    return maybe


def stage_lines(tell: Callable[[str], None], every: float, clock: Callable[[], float] = time.monotonic) -> Progress:
    """A line now and then, and at the end of every stage that took so long."""
    maybe, begun, over, start = now_and_then(tell, every, clock), dict[str, float](), set[str](), clock()

    def progress(stage: str, done: int, total: int | None) -> None:
        if line := resumed_line(stage, done, total):
            tell(line)
            return
        now = clock()
        lasted = now - begun.setdefault(stage, now)
        ends = done == total and lasted >= every and stage not in over
        if done == total:
            over.add(stage)
        of_all = "" if total is None else f" of {total:,}"
        maybe(f"{stage}: {done:,}{of_all} ({duration(now - start)} so far)", ends)

    return progress


def resumed_line(stage: str, done: int, total: int | None) -> str | None:
    """What a stage says of work that was done before; None where it is none of these.

    >>> resumed_line("parts done before", 3, 12), resumed_line("dense: parts done before", 3, None)
    ('resumes with 3 of 12 parts done', 'dense: resumes with 3 parts done')
    """
    if not stage.endswith(DONE_BEFORE):
        return None
    whose, _, what = stage.removesuffix(DONE_BEFORE).rpartition(" ")
    of_all = "" if total is None else f" of {total}"
    return f"{whose.rstrip(':')}{': ' if whose else ''}resumes with {done}{of_all} {what} done"


@contextmanager
def stage_bars(quiet: bool, window: float = 30.0) -> Iterator[Progress]:
    """A bar for every stage, with what is done of its total, the rate and the time left; off a terminal, lines.

    Args:
        quiet: Show none.
        window: Seconds over which the rate is taken. It says nothing where steps take longer.
    """
    from rich import progress as rich
    from rich.console import Console

    console = Console(stderr=True)
    columns = (
        rich.TextColumn("{task.description:<22}", markup=False),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[rate]}"),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
    )
    if quiet or not console.is_terminal:
        yield silent if quiet else stage_lines(note, SECONDS)
        return
    with rich.Progress(*columns, console=console, speed_estimate_period=window) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int | None) -> None:
            """Move the bar of a stage; a new stage gets one."""
            if line := resumed_line(stage, done, total):
                console.print(printable(line), markup=False, highlight=False)
                return
            if stage not in tasks:
                tasks[stage] = bars.add_task(printable(stage), total=total, rate="")
            speed = bars.tasks[tasks[stage]].speed
            rate = f"{speed:,.1f}/s" if speed and speed >= 0.1 else f"{60 * speed:.1f}/min" if speed else ""
            bars.update(tasks[stage], completed=done, total=total, rate=rate)

        yield progress


@contextmanager
def training_bar(quiet: bool, tensorboard: Path | None) -> Iterator[Callable[[Moment], None]]:
    """A bar over all steps with loss, accuracy, throughput and time left, and a line for every epoch; off a terminal,
    a line now and then.

    Args:
        quiet: Show neither.
        tensorboard: Folder for TensorBoard's log of every epoch; None for none.

    Raises:
        MissingExtra: TensorBoard is asked for and not installed.
    """
    from rich import progress as rich
    from rich.console import Console

    console = Console(stderr=True)
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.TextColumn("{task.percentage:>3.0f}%"),
        rich.TimeRemainingColumn(),
    )
    shown = not quiet and console.is_terminal
    log_to = nullcontext() if tensorboard is None else tensorboard_log(tensorboard)
    with rich.Progress(*columns, console=console, disable=not shown) as bars, log_to as log:
        task, maybe, begun = bars.add_task("starting", total=None), now_and_then(note, SECONDS), False

        def progress(moment: Moment) -> None:
            """Move the bar; print and log the row of an epoch that is over."""
            nonlocal begun
            if not begun and not quiet and (moment.epoch, moment.step) > (1, 1):
                note(f"resumes in epoch {moment.epoch} of {moment.epochs}")
            begun = True
            text = (
                f"epoch {moment.epoch}/{moment.epochs}  loss {moment.loss:.4f}  accuracy {moment.accuracy:.2%}  "
                f"{moment.samples_per_second:,.0f}/s"
            )
            # The row comes when its epoch is over: the steps of that epoch are then all done.
            done = (moment.epoch - 1) * moment.steps + (moment.step if moment.row is None else moment.steps)
            if not shown and not quiet:
                maybe(text, False)
            bars.update(task, description=text, completed=done, total=moment.epochs * moment.steps)
            if moment.row is not None and log is not None:
                log(moment.row)
            if moment.row is not None and shown:
                accuracy = moment.row.validation_accuracy
                console.print(text + ("" if accuracy is None else f"  validation {accuracy:.2%}"), highlight=False)

        yield progress


@contextmanager
def tensorboard_log(folder: Path) -> Iterator[Callable[[EpochRow], None]]:
    """Writes every number of an epoch's row for TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtra("tensorboard", "tensorboard", "--tensorboard") from None
    with SummaryWriter(str(folder)) as writer:

        def log(row: EpochRow) -> None:
            for name, value in dataclasses.asdict(row).items():
                if name != "epoch" and value is not None:
                    writer.add_scalar(name, value, row.epoch)

        yield log
