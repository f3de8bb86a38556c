"""The JSON schema of every saved result, for those who read them with other tools."""

from __future__ import annotations

from typing import Any

from brittle.errors import InputError
from brittle.results.comparison import Comparison
from brittle.results.compression import CompressionRecipe
from brittle.results.documents import AttackResult, Audit
from brittle.results.frontiers import Frontier
from brittle.results.reproduction import Reproduction
from brittle.storage.schema import json_schema

DOCUMENTS: dict[str, type] = {
    "audit": Audit,
    "attack": AttackResult,
    "comparison": Comparison,
    "frontier": Frontier,
    "recipe": CompressionRecipe,
    "reproduction": Reproduction,
}
"""What is saved, each in ``NAME.json``; a reproduction in ``results.json``."""


def schema_of(document: str) -> dict[str, Any]:
    """The JSON schema of a saved result.

    Args:
        document: A name in :data:`DOCUMENTS`.

    Raises:
        InputError: There is no such result.
    """
    if document not in DOCUMENTS:
        raise InputError(f"document: expected one of {', '.join(DOCUMENTS)}; got {document!r}")
    return json_schema(DOCUMENTS[document])
