"""What a saved dataclass looks like: its JSON schema, with what its docstring says of every field."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any


def json_schema(kind: type) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of what :func:`brittle.storage.codec.to_json` writes of a dataclass.

    Fields that JSON leaves out are left out here; infinities are the strings "inf" and "-inf".
    """
    from pydantic import TypeAdapter
    from pydantic.json_schema import GenerateJsonSchema

    class Schema(GenerateJsonSchema):
        """pydantic's, with our infinities and the words of the docstrings."""

        def float_schema(self, schema: Any) -> dict[str, Any]:
            return {"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf"]}]}

        def dataclass_schema(self, schema: Any) -> dict[str, Any]:
            made, owner = super().dataclass_schema(schema), schema["cls"]
            said = meanings(owner.__doc__ or "")
            for field in dataclasses.fields(owner):
                if not field.metadata.get("json", True):
                    del made["properties"][field.name]
                elif field.name in said:
                    made["properties"][field.name] = {**made["properties"][field.name], "description": said[field.name]}
            return {**made, "description": plain((owner.__doc__ or "").split("\n\n")[0])}

    schema = TypeAdapter(kind).json_schema(schema_generator=Schema)
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema}


def meanings(docstring: str) -> dict[str, str]:
    r"""Names and texts under "Attributes:", on one line and without markup.

    >>> meanings("A point.\n\nAttributes:\n    x: To the right, see\n        `Map`.")
    {'x': 'To the right, see Map.'}
    """
    section = re.search(r"^Attributes:\n((?: {4}.*\n|\n)*)", inspect.cleandoc(docstring) + "\n", re.MULTILINE)
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: plain(text) for name, text in entries}


def plain(text: str) -> str:
    """A text of a docstring on one line and without markup."""
    return re.sub(r":\w+:(?=`)|[`\"]", "", " ".join(text.split()))
