"""A pickle that acts when it is read, which no reader of files may let happen."""

from __future__ import annotations

import os
from pathlib import Path


class Hostile:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
