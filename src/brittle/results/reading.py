"""Results read again from their files, whatever they are of: an audit, networks side by side, a frontier."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from brittle.errors import InputError
from brittle.results.comparison import Comparison
from brittle.results.documents import Audit, read_document
from brittle.results.frontiers import Frontier

FILES = ("audit.json", "comparison.json", "frontier.json")
"""What the commands call the results that have a page."""
MARKS: Mapping[str, type[Comparison] | type[Frontier]] = {"networks": Comparison, "rows": Frontier}
"""A field by which a document is told from an audit."""


def read_result(path: Path) -> Audit | Comparison | Frontier:
    """What a file holds, or the file of :data:`FILES` in a folder.

    Raises:
        InputError: There is no such file or more than one, and as :meth:`Audit.load`, :meth:`Comparison.load` and
            :meth:`Frontier.load`.
    """
    files = [path / name for name in FILES if (path / name).is_file()] if path.is_dir() else [path]
    if len(files) != 1:
        got = " and ".join(file.name for file in files) or "none of them"
        raise InputError(f"result: expected a folder with one of {', '.join(FILES)}; got {got} in {path}")
    text = read_document(files[0], "result")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    kinds = [kind for mark, kind in MARKS.items() if isinstance(document, dict) and mark in document]
    return kinds[0].from_json(text) if kinds else Audit.from_json(text).with_pictures(files[0])
