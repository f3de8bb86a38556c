"""Output that is whole or absent: write beside, then rename."""

from __future__ import annotations

import errno
import glob
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block ends well and is removed otherwise.

    The folder is made when it is missing. A reader never sees a half-written file, since a rename within one
    folder is atomic. What a process that was killed while it wrote ``path`` left beside is removed first.

    Raises:
        OSError: Writing failed, or ``path`` is no file: a device would be gone for good.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "expected a file or nothing there", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    beside = Path(name)
    try:
        _lock(handle)  # for as long as this process lives
        yield beside
        mask = os.umask(0)
        os.umask(mask)
        beside.chmod(0o666 & ~mask)
        os.replace(beside, path)
    finally:
        os.close(handle)
        with suppress(FileNotFoundError):
            beside.unlink()


def _remove_abandoned(path: Path) -> None:
    """Remove what processes that are gone left beside ``path``: nobody holds its lock."""
    for beside in path.parent.glob(f".{glob.escape(path.name)}.????????{glob.escape(path.suffix)}"):
        with suppress(OSError):  # of another user, or gone meanwhile
            handle = os.open(beside, os.O_RDWR)
            try:
                if _lock(handle):
                    beside.unlink()
            finally:
                os.close(handle)


def _lock(handle: int) -> bool:
    """Lock an open file for this process, which the system undoes when it ends; False where another one has.

    Also False where the system has no such locks: then nothing is taken to be abandoned.
    """
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def remove_files(folder: Path, names: Sequence[str]) -> None:
    """Remove files of these names from ``folder``, where they are."""
    for name in names:
        with suppress(FileNotFoundError):
            (folder / name).unlink()
