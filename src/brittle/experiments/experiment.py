"""An experiment: its grids, what one job does, its figure and its claims."""

from __future__ import annotations

import hashlib
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brittle.data.load import load_data
from brittle.errors import InputError, one_line
from brittle.experiments.claims import SCALES, Claim
from brittle.storage.digest import digest
from brittle.sweeps import Job, name_of, read_module

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Scalar = str | float | int | bool | None
Settings = dict[str, Scalar]
"""What one job is asked: values of :class:`Experiment`'s ``run`` by their names."""
Axes = Mapping[str, Scalar | Sequence[Scalar]]
"""Settings, or several values of them: all combinations are run."""
EMBEDDED = ("digits",)
"""Data sets that need no files."""


@dataclass(frozen=True)
class Experiment:
    """A grid, what one job does, the figure of all rows, and the claims that the rows are asked about.

    Attributes:
        name: What it is called, also in names of files.
        title: What it shows, in a line.
        source: Paper and figure.
        run: One job: settings by name to one row, ``{column: number, string, boolean, None or list of numbers}``. Where
            it has a parameter ``data_root``, it is given the folder of the data sets. Settings called ``data``, or
            whose names end in ``_data``, name data sets as :func:`brittle.load_data` does.
        figure: From the table, one row a job with its settings and what ``run`` returned, to a matplotlib figure.
        grids: By scale (``smoke``, ``small``, ``paper``) the settings: of an axis with several values all combinations
            are run. Several such grids are a sequence. ``seed`` is the axis that intervals are over.
        claims: What the rows are asked about.
        about: What is done, in plain sentences for the page.
        seconds: By scale, what one job takes on one CPU core; measured, for the list of experiments.

    Raises:
        InputError: A scale is unknown, or settings do not fit ``run``.
    """

    name: str
    title: str
    source: str
    run: Callable[..., dict[str, Any]]
    figure: Callable[[pd.DataFrame], Figure]
    grids: Mapping[str, Axes | Sequence[Axes]]
    claims: tuple[Claim, ...] = ()
    about: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.grids or not set(self.grids) <= set(SCALES):
            raise InputError(f"grids: expected scales among {', '.join(SCALES)}; got {', '.join(self.grids) or 'none'}")
        signature, given = inspect.signature(self.run), {"data_root": None} if self.takes_data_root else {}
        for scale in self.grids:
            for settings in self.settings(scale):
                try:
                    signature.bind(**settings, **given)
                except TypeError as error:
                    raise InputError(f"grids: expected settings that run takes; got {settings} ({error})") from None

    @property
    def takes_data_root(self) -> bool:
        """Whether a job is told where the data sets are."""
        return "data_root" in inspect.signature(self.run).parameters

    def settings(self, scale: str) -> list[Settings]:
        """The settings of every job of a scale, the last axis running fastest.

        Raises:
            InputError: The experiment has no such scale, an axis is empty, or a value is not a plain one.
        """
        if scale not in self.grids:
            raise InputError(f"scale: expected one of {', '.join(self.grids)} for {self.name}; got {scale!r}")
        grid = self.grids[scale]
        jobs: list[Settings] = []
        for axes in [grid] if isinstance(grid, Mapping) else grid:
            values = [list(v) if isinstance(v, Sequence) and not isinstance(v, str) else [v] for v in axes.values()]
            for name, several in zip(axes, values, strict=True):
                if not several or not all(isinstance(value, str | float | int | None) for value in several):
                    raise InputError(f"grids: expected numbers, strings, booleans or None; got {name} = {several}")
            jobs += [dict(zip(axes, chosen, strict=True)) for chosen in itertools.product(*values)]
        return jobs

    def data(self, scale: str) -> tuple[str, ...]:
        """The data sets that a scale reads, those that need no files left out."""
        return tuple(dict.fromkeys(name for settings in self.settings(scale) for name in data_named(settings)))

    def jobs(self, scale: str, data_root: Path | None = None) -> list[Job]:
        """The jobs of a scale, known by their settings, the code of ``run`` and the content of their data sets.

        Args:
            scale: ``smoke``, ``small`` or ``paper``.
            data_root: Folder of the data sets; where it is does not make another job.

        Raises:
            InputError: The experiment has no such scale, or its data are not there.
        """
        contents = {name: fingerprint(name, data_root) for name in self.data(scale)}
        root = None if data_root is None else str(data_root.absolute())
        return [
            Job(
                name_of(self.run),
                settings,
                data=" ".join(contents[name] for name in data_named(settings)),
                places={"data_root": root} if self.takes_data_root else {},
            )
            for settings in self.settings(scale)
        ]

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of all settings but the seed, over all scales."""
        names = [name for scale in self.grids for settings in self.settings(scale) for name in settings]
        return tuple(dict.fromkeys(name for name in names if name != "seed"))


def data_named(settings: Mapping[str, object]) -> list[str]:
    """The data sets that settings name, those that need no files left out."""
    named = (value for name, value in settings.items() if name == "data" or name.endswith("_data"))
    return [str(value) for value in named if value not in EMBEDDED]


def fingerprint(data: str, root: Path | None) -> str:
    """SHA-256 over both splits of a data set, or over all files of a folder of images, as 64 hexadecimal digits.

    Raises:
        InputError: The data set is not there.
    """
    if data.startswith("folder:"):  # its images may have several sizes, until a job resizes them
        folder = Path(root or "", data.removeprefix("folder:"))
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if not files:
            raise InputError(f"data: expected a folder of images, one subfolder a class; got none at {folder}")
        names = [f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files]
        return hashlib.sha256("\n".join(names).encode()).hexdigest()
    splits = {}
    for split in ("train", "test"):
        read = load_data(data, root=root, split=split)
        splits[split] = digest({"inputs": read.inputs, "labels": read.labels})
    return hashlib.sha256(" ".join(splits.values()).encode()).hexdigest()


def load_experiment(path: Path) -> Experiment:
    """The ``EXPERIMENT`` that a file of Python defines; the file is run.

    Raises:
        InputError: There is no such file, it cannot be run, or it defines no experiment.
    """
    expected = "expected a file of Python that defines EXPERIMENT, a brittle.experiments.Experiment"
    if not path.is_file():
        raise InputError(f"{path}: {expected}; got no file")
    try:
        module = read_module(str(path.resolve()), path.read_text(encoding="utf-8"))
    except Exception as error:  # whatever a stranger's code raises
        raise InputError(f"{path}: {expected}; got {one_line(error)}") from None
    experiment = getattr(module, "EXPERIMENT", None)
    if not isinstance(experiment, Experiment):
        raise InputError(f"{path}: {expected}; got {type(experiment).__name__}")
    return experiment
