"""Output that is whole or absent: write beside, then rename."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block ends well and is removed otherwise.

    The folder is made when it is missing. A reader never sees a half-written file, since a rename within one
    folder is atomic.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        mask = os.umask(0)
        os.umask(mask)
        beside.chmod(0o666 & ~mask)
        os.replace(beside, path)
    finally:
        with suppress(FileNotFoundError):
            beside.unlink()


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def remove_files(folder: Path, names: Sequence[str]) -> None:
    """Remove files of these names from ``folder``, where they are."""
    for name in names:
        with suppress(FileNotFoundError):
            (folder / name).unlink()
