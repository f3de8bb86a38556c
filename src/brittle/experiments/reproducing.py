"""From experiments to one page: run what is not done, draw, judge, compare with stored tables."""

from __future__ import annotations

import inspect
import platform
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from brittle._version import __version__
from brittle.errors import InputError
from brittle.experiments.claims import judge
from brittle.experiments.experiment import Experiment
from brittle.experiments.stored import STORED, Made, compare_tables, read_table, write_table
from brittle.progress import Progress, silent
from brittle.reporting.drawing import styled
from brittle.reporting.reproductions import reproduction_html
from brittle.results import ExperimentResult, Reproduction
from brittle.storage.files import replacing, write_text
from brittle.sweeps import Executor, Job, Store, on_processes, run_sweep

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

TABLE = "table.parquet"


def reproduce(
    experiments: Sequence[Experiment],
    scale: str,
    out: Path,
    *,
    data_root: Path | None = None,
    executor: Executor = on_processes,
    check: bool = False,
    progress: Progress = silent,
) -> Reproduction:
    """Run experiments, judge their claims and write the page; what is done already is not done again.

    Args:
        experiments: What to run.
        scale: ``smoke``, ``small`` or ``paper``.
        out: Folder for ``report.html``, ``results.json`` and, in a folder for each experiment, ``table.parquet``,
            ``figure.png`` and the jobs.
        data_root: Folder of the data sets.
        executor: What does the jobs.
        check: Whether to compare every table with the one that the package keeps.
        progress: Called as the work goes on.

    Returns:
        The claims with their verdicts; jobs that failed are named, and the rest is judged without them.

    Raises:
        InputError: An experiment has no such scale, its data are not there, a table lacks what a claim reads, or
            ``check`` is asked for an experiment without a stored table.
    """
    swept = [(experiment, experiment.jobs(scale, data_root)) for experiment in experiments]
    for experiment, jobs in swept:
        run_experiment(experiment, scale, jobs, out, executor=executor, progress=progress)
    return redraw(experiments, out, check=check)


def run_experiment(
    experiment: Experiment,
    scale: str,
    jobs: Sequence[Job],
    out: Path,
    *,
    store: Store | None = None,
    executor: Executor = on_processes,
    retries: int = 1,
    progress: Progress = silent,
) -> None:
    """Do the jobs of an experiment that are not done, and write its table.

    Args:
        experiment: The experiment.
        scale: Whose jobs they are.
        jobs: As :meth:`brittle.experiments.Experiment.jobs` gives them.
        out: Folder for ``NAME/table.parquet``.
        store: Where the jobs' rows are kept; None for ``NAME`` in ``out``.
        executor: What does the jobs.
        retries: How often a job that fails is tried again.
        progress: Called as the work goes on.

    Raises:
        InputError: The rows do not make a table.
    """
    kept = Store(str(out / experiment.name)) if store is None else store

    def tell(stage: str, done: int, total: int | None) -> None:
        progress(f"{experiment.name} {stage}", done, total)

    outcome = run_sweep(jobs, kept, executor, retries=retries, progress=tell)
    failed = tuple(f"{dict(failure.job.settings)}: {failure.error}" for failure in outcome.failed)
    made = Made(experiment.name, scale, command_of(experiment, scale), len(jobs), failed)
    write_table(kept.table(jobs), out / experiment.name / TABLE, made)


def redraw(experiments: Sequence[Experiment], out: Path, *, check: bool = False) -> Reproduction:
    """Draw and judge again from tables, and write the page; nothing is trained.

    Args:
        experiments: What to draw: from the table in ``out``, or else from the one that the package keeps.
        out: As :func:`reproduce`.
        check: As :func:`reproduce`.

    Raises:
        InputError: An experiment has no table, one is not whole, or it lacks what a claim reads.
    """
    results, figures = [], {}
    for experiment in experiments:
        path = out / experiment.name / TABLE
        table, made = read_table(path if path.exists() else stored_path(experiment))
        results.append(conclude(experiment, table, made, check=check))
        if len(table):
            figures[experiment.name] = figure = draw(experiment, table)
            with replacing(out / experiment.name / "figure.png") as beside:
                figure.savefig(beside, dpi=150, facecolor="white")
    versions = {"brittle": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "numpy")}
    reproduction = Reproduction(tuple(results), versions)
    reproduction.save(out / "results.json")
    write_text(out / "report.html", reproduction_html(reproduction, figures))
    return reproduction


def conclude(experiment: Experiment, table: pd.DataFrame, made: Made, *, check: bool = False) -> ExperimentResult:
    """What a table says of an experiment's claims, and how it compares with the stored one.

    Raises:
        InputError: The table lacks what a claim reads, or there is no stored table.
    """
    checks = compare_tables(table, read_table(stored_path(experiment))[0], experiment.axes) if check else ()
    return ExperimentResult(
        experiment.name,
        experiment.title,
        experiment.source,
        experiment.about,
        made.scale,
        made.command,
        made.jobs,
        len(table),
        tuple(judge(claim, table, made.scale) for claim in experiment.claims) if len(table) else (),
        made.failed,
        flags_raised(table),
        checks,
    )


def flags_raised(table: pd.DataFrame) -> tuple[str, ...]:
    """How many rows have each flag of the columns ``flags`` and ``flags_*``, separated by semicolons in a row."""
    raised = Counter(
        f"{flag} ({column})" if column != "flags" else flag
        for column in map(str, table)
        if column == "flags" or column.startswith("flags_")
        for row in table[column]
        for flag in str(row).split("; ")
        if flag
    )
    return tuple(f"{flag} in {count} of {len(table)} rows" for flag, count in raised.most_common())


@styled
def draw(experiment: Experiment, table: pd.DataFrame) -> Figure:
    """The experiment's figure, in the look of the reports."""
    figure = experiment.figure(table)
    if not str(figure.get_label()):
        figure.set_label(experiment.title)
    return figure


def stored_path(experiment: Experiment) -> Path:
    """The table that the package keeps of an experiment.

    Raises:
        InputError: It keeps none.
    """
    path = STORED / f"{experiment.name}.parquet"
    if not path.is_file():
        raise InputError(f"table: expected one of {experiment.name} in the output folder or the package; got none")
    return path


def command_of(experiment: Experiment, scale: str) -> str:
    """What makes an experiment's table, with DATA and OUT in place of folders."""
    ours = experiment.run.__module__.startswith("brittle.experiments.")
    what = f"reproduce {experiment.name}" if ours else f"sweep {Path(inspect.getfile(experiment.run)).name}"
    return f"brittle {what} --scale {scale}{' --data-root DATA' if experiment.data(scale) else ''} -o OUT"
