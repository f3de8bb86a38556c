"""A training run's state on disk: tensors as safetensors, the rest as JSON, switched over in one rename.

``state.json`` names the file of tensors that belongs to it, so that a run killed at any moment finds a whole state.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from brittle.errors import InputError
from brittle.models.checkpoints import write_tensors
from brittle.storage.files import replacing, write_text

STATE = "state.json"
"""The file that says all but the tensors, and where these are."""
Tensors = dict[str, Tensor]
"""Tensors by name."""


def write_snapshot(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], step: int) -> None:
    """Put a state into ``folder``, in place of the one before.

    Args:
        folder: Made if missing.
        tensors: On any device, by name.
        facts: What JSON can hold exactly (no NaN).
        step: Names the file of tensors; a later state has a larger one.
    """
    name = f"state-{step:09d}.safetensors"  # a new file beside the old one, so that either state is whole
    # Clones, as safetensors refuses tensors that share memory.
    copies = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    with replacing(folder / name) as beside:
        write_tensors(copies, beside)
    write_text(folder / STATE, json.dumps({"tensors": name, **facts}, allow_nan=False, indent=1) + "\n")
    _remove_tensors(folder, keep=name)


def read_snapshot(folder: Path) -> tuple[Tensors, dict[str, Any]] | None:
    """The tensors and facts of the state in ``folder``; None when there is none.

    Raises:
        InputError: There is one that cannot be read.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        read = safetensors.torch.load_file(str(folder / Path(facts["tensors"]).name))
        # Clones, for those of a file begin anywhere in memory, and sums of single precision depend on that.
        tensors = {name: tensor.clone() for name, tensor in read.items()}
    except Exception as error:  # the reader of safetensors has an exception of its own
        raise InputError(
            f"folder: expected a training state that can be read, or --overwrite; got {folder}, whose state cannot be "
            f"read: {error}"
        ) from error
    return tensors, facts


def remove_snapshot(folder: Path) -> None:
    """Remove the state from ``folder``: first what names it, then the tensors."""
    with suppress(FileNotFoundError):
        (folder / STATE).unlink()
    _remove_tensors(folder)


def _remove_tensors(folder: Path, keep: str = "") -> None:
    for path in (*folder.glob("state-*.safetensors"), *folder.glob(".state*")):
        if path.name != keep:
            with suppress(FileNotFoundError):
                path.unlink()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimiser's state, ``optimizer.<parameter's number>.<name>``; numbers as tensors too."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{number}.{name}": value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        for number, values in state.items()
        for name, value in values.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Take over what :func:`optimizer_tensors` returned; the groups keep their options."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, number, name = key.split(".", 2)
            state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors under ``prefix.name``."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def under_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """The inverse of :func:`with_prefix`; others are left out."""
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
