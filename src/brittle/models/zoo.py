"""The names of the networks that torchvision and timm build, read from their files: importing them takes seconds."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

BUILDER = re.compile(r"^@register_model\b.*\n(?:(?:@|\s|\)).*\n)*def (\w+)\(", re.MULTILINE)
"""A function that either library offers by its name."""


@functools.cache
def zoo_names(source: str) -> tuple[str, ...]:
    """Names of a library's classification models, as its files define them; nothing of it is imported.

    Args:
        source: ``"torchvision"`` or ``"timm"``; one that is not installed has none.
    """
    spec = importlib.util.find_spec(source)
    folders = spec.submodule_search_locations if spec else None
    files = sorted(path for folder in folders or () for path in Path(folder, "models").glob("*.py"))
    return tuple(name for path in files for name in BUILDER.findall(path.read_text(encoding="utf-8")))
