"""A folder of finished parts of an evaluation, so that it goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from brittle.errors import InputError
from brittle.evaluation.naming import identity
from brittle.evaluation.worst_case import Attack
from brittle.models.borrow import Model, device_of, frozen
from brittle.models.forward import logits_of
from brittle.results import SampleResult
from brittle.storage import codec
from brittle.storage.digest import digest
from brittle.storage.files import write_text

PROBES = 8
"""Samples whose logits tell networks of equal weights apart."""


class Chunk(Protocol):
    """Samples that are attacked as one pool."""

    @property
    def first(self) -> int:
        """Number of the first one."""

    @property
    def x(self) -> Tensor:
        """Inputs ``(N, ...)``."""

    @property
    def y(self) -> Tensor:
        """Labels ``(N,)``."""


@dataclass(frozen=True)
class Part:
    """What one chunk of samples gave.

    Attributes:
        first: Number of its first sample.
        samples: Per-sample results.
        rejected: Examples that were not admissible.
        forwards: Samples put through the network without gradient.
        backwards: Samples put through the network with a gradient.
        schema_version: Of the file that keeps it.
    """

    first: int
    samples: tuple[SampleResult, ...]
    rejected: int
    forwards: int
    backwards: int
    schema_version: int = 1


@dataclass(frozen=True)
class Kept:
    """A folder with one file a chunk, named by a fingerprint of everything that its content depends on."""

    folder: Path
    settings: str

    @staticmethod
    def of(
        model: Model, folder: Path, settings: Sequence[str], attacks: Sequence[Attack], x: Tensor, y: Tensor
    ) -> Kept:
        """The folder for a run with these settings, made if it is missing.

        Args:
            model: The network: its weights, buffers, structure and logits for a few samples make the fingerprint.
            folder: Where parts are kept.
            settings: Everything but network, attacks and data that results depend on.
            attacks: The attacks.
            x: At least one input.
            y: Labels.

        Raises:
            InputError: The network is no module, an attack cannot be told from others, or there can be no folder.
        """
        if not isinstance(model, nn.Module):
            kind = type(model).__name__
            raise InputError(f"resume: expected an nn.Module, whose weights can be told from others; got {kind}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise InputError(f"resume: expected a folder; {folder} is or lies in a file") from None
        device = device_of(model)
        with frozen(model):
            logits = logits_of(model, x[:PROBES].to(device), y[:PROBES].to(device))
        tensors = model.state_dict() | dict(model.named_buffers()) | {"logits": _rounded(logits)}
        return Kept(folder, json.dumps([str(model), digest(tensors), *map(identity, attacks), *settings]))

    def path(self, chunk: Chunk) -> Path:
        """Where the results of a chunk lie."""
        data = digest({"x": chunk.x, "y": chunk.y})
        name = hashlib.sha256(f"{self.settings} {chunk.first} {data}".encode()).hexdigest()[:24]
        return self.folder / f"samples-{chunk.first:08d}-{name}.json"

    def read(self, chunk: Chunk) -> Part | None:
        """The kept results of a chunk; None when there are none that can be read and belong to it."""
        path = self.path(chunk)
        if not path.is_file():
            return None
        try:
            part = codec.from_json(path.read_bytes(), {1: Part}, "resume")
        except InputError:
            return None
        wanted = [(chunk.first + index, label) for index, label in enumerate(chunk.y.tolist())]
        return part if [(sample.index, sample.label) for sample in part.samples] == wanted else None

    def write(self, chunk: Chunk, part: Part) -> None:
        """Keep the results of a chunk, whole or not at all."""
        write_text(self.path(chunk), codec.to_json(part))


def _rounded(logits: Tensor) -> Tensor:
    """To a thousandth of the largest, so that the rounding of another batch size makes no other network."""
    logits = logits.double().cpu()
    return (logits / (1e-3 * logits.abs().max().clamp_min(torch.finfo(torch.float64).tiny))).round()
