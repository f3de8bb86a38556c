"""Attention heads as units: what belongs to each in the layers around an attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from brittle.compression.removal import Side, table_of
from brittle.models.layers import BY_HEAD, head_count

TRIPLES = (("q", "k", "v"), ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
"""What the maps to queries, keys and values are called where they are three."""


@dataclass(frozen=True)
class AttentionHeads:
    """The heads of one attention.

    Attributes:
        heads: How many.
        sides: The maps to queries, keys and values, the map that reads the heads, and the modules that count them.
        producers: Names of the maps to queries, keys and values.
    """

    heads: int
    sides: tuple[Side, ...]
    producers: tuple[str, ...]


def attention_heads(model: nn.Module) -> list[AttentionHeads]:
    """The heads of every attention that says how many it has and whose layers are its own, in the order of the modules.

    These have one ``qkv`` Linear, or one each for queries, keys and values, as many rows of each for every head and in
    the heads' order, and one other Linear that reads what the heads yield. A table of biases by head
    (``relative_position_bias_table``) goes with them.

    Args:
        model: Only read.
    """
    found = []
    for name, module in model.named_modules():
        heads = head_count(module)
        children = dict(module.named_children())
        rows = _rows_by_head(children, heads) if heads and not isinstance(module, nn.MultiheadAttention) else {}
        values = next((len(table[0]) for child, table in rows.items() if child != "qkv"), 0)
        width = values or len(rows["qkv"][0]) // 3 if rows else 0
        readers = [
            key
            for key, child in children.items()
            if isinstance(child, nn.Linear) and key not in ("qkv", *BY_HEAD) and child.in_features == heads * width
        ]
        if not rows or len(readers) != 1:
            continue
        prefix = f"{name}." if name else ""
        sides = [Side(f"{prefix}{child}", True, table) for child, table in rows.items()]
        sides.append(Side(f"{prefix}{readers[0]}", False, torch.arange(heads * width).view(heads, width)))
        counting = [key for key, part in module.named_modules() if part is module or table_of(part) is not None]
        each = torch.arange(heads)[:, None]
        sides += [Side(f"{prefix}{key}".rstrip("."), True, each) for key in counting]
        found.append(AttentionHeads(heads, tuple(sides), tuple(f"{prefix}{child}" for child in rows)))
    return found


def _rows_by_head(children: dict[str, nn.Module], heads: int) -> dict[str, Tensor]:
    """``(heads, rows)`` of each map to queries, keys and values; nothing where they are not as expected."""
    fused = children.get("qkv")
    if isinstance(fused, nn.Linear) and fused.out_features % (3 * heads) == 0:
        return {"qkv": torch.arange(fused.out_features).view(3, heads, -1).transpose(0, 1).flatten(1)}
    for triple in TRIPLES:
        maps = [children.get(key) for key in triple]
        sizes = [child.out_features for child in maps if isinstance(child, nn.Linear)]
        if len(sizes) == 3 and len(set(sizes)) == 1 and sizes[0] % heads == 0:
            return {key: torch.arange(sizes[0]).view(heads, -1) for key in triple}
    return {}
