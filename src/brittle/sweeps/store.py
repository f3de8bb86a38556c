"""Where rows are kept: a folder, here or shared, or an object store."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brittle.errors import InputError, first_line
from brittle.storage.files import write_text
from brittle.sweeps.job import Job

if TYPE_CHECKING:
    import pandas as pd

Document = dict[str, Any]
_CREATING = threading.Lock()


@dataclass(frozen=True)
class State:
    """How far a job is, from the names of the files in its folder.

    Attributes:
        landed: Its row is there.
        tries: How often it was begun.
        failures: The numbers of the tries that failed.
    """

    landed: bool = False
    tries: int = 0
    failures: tuple[int, ...] = ()

    @property
    def open(self) -> bool:
        """Whether the last try has neither landed nor failed: somebody is at it, or was ended in the midst."""
        return not self.landed and self.tries > 0 and self.tries not in self.failures


@dataclass(frozen=True)
class Store:
    """A place for rows, that several processes and machines may share.

    A job has a folder ``jobs/KEY``: ``try-1.json`` says who began it, ``error-1.json`` how that failed, ``row.json``
    what came of it. Files are created once and are never changed, so that nothing has to be locked.

    Attributes:
        url: A folder, or what fsspec understands (``s3://bucket/folder``, ``gs://...``, ``memory://name``). Two drivers
            on a store of another kind than these may do a job twice, as it may not tell who created a file first.
    """

    url: str

    @cached_property
    def _place(self) -> tuple[Any, str]:
        """The file system and the path of the root on it."""
        import fsspec

        try:
            system, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise InputError(f"store: expected a folder or a URL; got {self.url!r}: {first_line(error)}") from None
        return system, root.rstrip("/")

    @cached_property
    def folder(self) -> Path | None:
        """The folder, where it is one on this machine."""
        from fsspec.implementations.local import LocalFileSystem

        system, root = self._place
        return Path(root) if isinstance(system, LocalFileSystem) else None

    def create(self, name: str, document: Document) -> bool:
        """Write a file unless it is there; whether it was not. Of many that create one file, one is told so."""
        system, root = self._place
        text = json.dumps(document, indent=1) + "\n"
        try:
            if self.folder is None:
                with _CREATING:  # the store in memory looks first and writes then
                    system.pipe_file(f"{root}/{name}", text.encode(), mode="create")
            else:
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("x", encoding="utf-8") as file:
                    file.write(text)
        except FileExistsError:
            return False
        except OSError:
            if self.folder is None and self.exists(name):  # servers say in several ways that it was there
                return False
            raise
        return True

    def put(self, name: str, document: Document) -> None:
        """Write a file, whole or not at all."""
        system, root = self._place
        text = json.dumps(document, indent=1) + "\n"
        if self.folder is None:
            system.pipe_file(f"{root}/{name}", text.encode())
        else:
            write_text(self.folder / name, text)

    def read(self, names: Iterable[str]) -> dict[str, Document]:
        """The files of these names that are there and whole."""
        system, root = self._place
        if self.folder is None:
            paths = {f"{root}/{name}": name for name in names}
            contents = system.cat(list(paths), on_error="omit") if paths else {}
            texts = {paths[path]: content for path, content in contents.items()}
        else:
            files = {name: self.folder / name for name in names}
            texts = {name: file.read_bytes() for name, file in files.items() if file.is_file()}
        documents = {}
        for name, text in texts.items():
            with suppress(ValueError):
                documents[name] = json.loads(text)
        return documents

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        system, root = self._place
        system.invalidate_cache()  # others write as well: what was listed before says nothing of now
        return bool(system.exists(f"{root}/{name}"))

    def names(self, folder: str) -> list[str]:
        """The names of all files in a folder and below, from the root on."""
        system, root = self._place
        system.invalidate_cache()
        return [path[len(root) + 1 :] for path in system.find(f"{root}/{folder}")]

    def states(self) -> dict[str, State]:
        """How far every job is that was ever begun here, by its key; one listing tells it."""
        files: dict[str, list[str]] = {}
        for name in self.names("jobs"):
            key, _, file = name.removeprefix("jobs/").partition("/")
            files.setdefault(key, []).append(file)
        return {key: _state(names) for key, names in files.items()}

    def documents(self, jobs: Sequence[Job] | None = None) -> list[Document]:
        """What is kept of every job that landed, with its row; of these jobs, in their order, or of all, by key."""
        keys = [job.key for job in jobs] if jobs is not None else sorted(self.states())
        documents = self.read(f"jobs/{key}/row.json" for key in keys)
        return [documents[name] for key in keys if (name := f"jobs/{key}/row.json") in documents]

    def table(self, jobs: Sequence[Job] | None = None) -> pd.DataFrame:
        """One line a job that landed: its settings, its row, ``seconds`` and ``key``.

        Args:
            jobs: Only these, in their order; None takes all that is in the store, also what an older version of the
                code made.

        Raises:
            InputError: A row names a setting, ``seconds`` or ``key``.
        """
        import pandas as pd

        lines = []
        for document in self.documents(jobs):
            further = {"seconds": document["seconds"], "key": document["key"]}
            twice = (set(document["settings"]) | set(further)) & set(document["row"])
            if twice:
                raise InputError(f"row: expected names other than those of settings, seconds and key; got {twice}")
            lines.append(document["settings"] | document["row"] | further)
        return pd.DataFrame(lines)


def _state(files: Sequence[str]) -> State:
    numbers = {"try": [0], "error": [0]}
    for file in files:
        match = re.fullmatch(r"(try|error)-(\d+)\.json", file)
        if match:
            numbers[match[1]].append(int(match[2]))
    return State("row.json" in files, max(numbers["try"]), tuple(sorted(numbers["error"])[1:]))
