"""Tables of experiments in files: with what made them, as the package keeps them, and one against another."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from brittle._version import __version__
from brittle.errors import InputError, first_line
from brittle.experiments.claims import correlate, over_seeds
from brittle.results import ColumnCheck
from brittle.storage.files import replacing

STORED = Path(__file__).parent / "tables"
"""The package's own tables of the scale ``small``: what every reader can check."""
NO_RESULT = ("seed", "seconds", "key")
"""Columns that every table has and that are no results."""
AGREEING = 0.5
"""Least correlation, and least share of overlapping intervals, of columns that agree; beyond -+ this a column falls
or rises along an axis."""
ENDS = ("value", "low", "high")
"""Of a mean over seeds: itself, and its interval's."""


@dataclass(frozen=True)
class Made:
    """What made a table.

    Attributes:
        experiment: Its name.
        scale: ``smoke``, ``small`` or ``paper``.
        command: The command.
        jobs: Jobs of the grid.
        failed: Settings and error of those that failed.
        brittle: Version of the package.
    """

    experiment: str
    scale: str
    command: str
    jobs: int
    failed: tuple[str, ...] = ()
    brittle: str = __version__


def write_table(table: pd.DataFrame, path: Path, made: Made) -> None:
    """Write a table as Parquet with what made it in the file's metadata, whole or not at all.

    Raises:
        InputError: A column holds values of several types.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = pa.Table.from_pandas(table, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(f"row: expected values of one type in a column; got {first_line(error)}") from None
    metadata = {**columns.schema.metadata, b"brittle": json.dumps(asdict(made)).encode()}
    with replacing(path) as beside:
        pq.write_table(columns.replace_schema_metadata(metadata), beside, compression="zstd")


def read_table(path: Path) -> tuple[pd.DataFrame, Made]:
    """The inverse of :func:`write_table`.

    Raises:
        InputError: The file is not there, or not such a table.
    """
    import pyarrow.parquet as pq

    try:
        columns = pq.read_table(path)
        made = json.loads(columns.schema.metadata[b"brittle"])
        return columns.to_pandas(), Made(**made | {"failed": tuple(made["failed"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"table: expected a table of brittle reproduce; got {path} ({first_line(error)})") from None


def compare_tables(new: pd.DataFrame, stored: pd.DataFrame, axes: Sequence[str]) -> tuple[ColumnCheck, ...]:
    """Every column of numbers in two tables of one experiment, over the settings that both have.

    Args:
        new: One row a job.
        stored: The table that it is compared with.
        axes: Names of the settings, the seed left out.

    Raises:
        InputError: The tables have no setting in common.
    """
    axes = [name for name in axes if name in new and name in stored]
    numbers = [str(name) for name in new.select_dtypes("number")]
    columns = [name for name in numbers if name in stored and name not in (*axes, *NO_RESULT)]
    new_means, stored_means = (_means(table, axes, columns) for table in (new, stored))
    common = new_means.index.intersection(stored_means.index)
    if common.empty:
        raise InputError("table: expected settings that the stored table has; got none in common")
    both = [means.loc[common].sort_index() for means in (new_means, stored_means)]
    return tuple(_check(column, both[0], both[1]) for column in columns)


def _means(table: pd.DataFrame, axes: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """By settings, of every column the mean over seeds and the ends of its interval."""
    lines = {}
    for settings, rows in table.fillna(dict.fromkeys(axes, "none")).groupby(list(axes)):
        found = {name: over_seeds(_mean_of(name))(rows) for name in columns}
        lines[settings] = {(name, end): getattr(mean, end) for name, mean in found.items() for end in ENDS}
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis(index=list(axes)).astype(float)


def _mean_of(column: str) -> Callable[[pd.DataFrame], float]:
    return lambda rows: float(rows[column].mean())


def _check(column: str, new: pd.DataFrame, stored: pd.DataFrame) -> ColumnCheck:
    a, b = (table[column] for table in (new, stored))
    correlation = correlate(np.stack([a["value"], b["value"]]), ranked=True) if len(a) > 2 else math.nan
    measured = a["low"].notna() & b["low"].notna()
    overlap = ((a["low"] <= b["high"]) & (b["low"] <= a["high"]))[measured].mean() if measured.any() else None
    turned = tuple(axis for axis in map(str, new.index.names) if _turns(a["value"], b["value"], axis))
    agrees = not turned and (math.isnan(correlation) or correlation >= AGREEING)
    return ColumnCheck(
        column,
        len(a),
        None if math.isnan(correlation) else correlation,
        None if overlap is None else float(overlap),
        turned,
        bool(agrees and (overlap is None or overlap >= AGREEING)),
    )


def _turns(a: pd.Series[float], b: pd.Series[float], axis: str) -> bool:
    """Whether one of two columns rises along an axis where the other falls, all other settings alike."""
    others = [name for name in a.index.names if name != axis]
    pairs = pd.DataFrame({"a": a, "b": b}).reset_index()
    if not pd.api.types.is_numeric_dtype(pairs[axis]):
        return False
    for _, rows in pairs.groupby(others) if others else [((), pairs)]:
        along = rows[axis].to_numpy(float)
        trends = [correlate(np.stack([along, rows[name].to_numpy(float)]), ranked=True) for name in "ab"]
        if len(rows) > 2 and min(trends) <= -AGREEING and max(trends) >= AGREEING:
            return True
    return False
