"""What the site makes of docstrings that are written for a terminal: names as code, examples and tables as blocks."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|data|mod|meth|attr|exc):(`+)~?([^`]+)\1")
EXAMPLE = re.compile(r"((?:^|(?<=\n))>>> .*(?:\n(?!\s*\n).*)*)")
TABLE = re.compile(r"((?:^|(?<=\n))=+  =[= ]*\n(?:.*\n)*?=+  =[= ]*(?=\n|$))")


class Docstrings(griffe.Extension):
    """Turns roles, examples and tables of every docstring into Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            text = ROLE.sub(r"`\2`", obj.docstring.value)
            text = TABLE.sub(r"```text\n\1\n```", text)
            obj.docstring.value = EXAMPLE.sub(r"```pycon\n\1\n```", text)
