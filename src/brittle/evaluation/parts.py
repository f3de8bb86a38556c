"""What one piece of the data gave, and a folder that keeps it, so that an evaluation goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from brittle.errors import InputError
from brittle.evaluation.threat import Attack, identity
from brittle.evaluation.worst_case import WorstCase
from brittle.models.borrow import Model, device_of
from brittle.models.checkpoints import write_tensors
from brittle.models.forward import logits_of
from brittle.results import SampleResult
from brittle.storage import codec
from brittle.storage.digest import digest
from brittle.storage.files import replacing, write_text

IDENTIFYING_SAMPLES = 8
"""Samples whose logits tell networks of equal weights apart."""
EXAMPLE_TENSORS = ("x_adv", "clean_logits", "adversarial_logits", "attack", "restart", "proven", "misled")
"""What is kept of a worst case beside the data themselves."""


@dataclass(frozen=True)
class Chunk:
    """Samples that are attacked as one pool.

    Attributes:
        first: Number of the first one.
        x: Inputs ``(N, ...)``.
        y: Labels ``(N,)``.
        total: Samples of the data set, where known.
        form: Of the first one, how its batches were read where they are no pairs.
    """

    first: int
    x: Tensor
    y: Tensor
    total: int | None
    form: str = ""


@dataclass(frozen=True)
class Part:
    """What one chunk of samples gave under one threat.

    Attributes:
        first: Number of its first sample.
        samples: Per-sample results.
        rejected: Examples that were not admissible.
        forwards: Samples put through the network without gradient.
        backwards: Samples put through the network with a gradient.
        survivors: Samples right under attack at each budget of a security curve; none if no curve was asked for.
        misled: Samples on which plain gradients were found to mislead, so that they were attacked further.
        tried: Samples on which a relaxation was tried.
        untried: Why it was tried on none, if so.
        schema_version: Of the file that keeps it.
    """

    first: int
    samples: tuple[SampleResult, ...]
    rejected: int
    forwards: int
    backwards: int
    survivors: tuple[int, ...] = ()
    misled: int = 0
    tried: int = 0
    untried: str | None = None
    schema_version: int = 1


@dataclass(frozen=True)
class Outcome:
    """A part, and the examples themselves where they were asked for.

    Attributes:
        part: Counts and per-sample results.
        worst: The examples, on the CPU.
    """

    part: Part
    worst: WorstCase | None = None


@dataclass(frozen=True)
class Kept:
    """A folder with one file a chunk, named by a fingerprint of everything that its content depends on.

    Attributes:
        folder: Where the files lie.
        fingerprint: Of the network, the attacks and all settings but the data.
        examples: Samples from the start of the data whose examples are kept as well, at least.
    """

    folder: Path
    fingerprint: str
    examples: int = 0

    def path(self, chunk: Chunk) -> Path:
        """Where the results of a chunk lie."""
        data = digest({"x": chunk.x, "y": chunk.y})
        name = hashlib.sha256(f"{self.fingerprint} {chunk.first} {data}".encode()).hexdigest()[:24]
        return self.folder / f"samples-{chunk.first:08d}-{name}.json"

    def read(self, chunk: Chunk, bounds: tuple[float, float]) -> Outcome | None:
        """The kept results of a chunk; None when there are none that can be read and belong to it."""
        path = self.path(chunk)
        if not path.is_file():
            return None
        try:
            part = codec.from_json(path.read_bytes(), {1: Part}, "resume")
            tensors: dict[str, Any] | None = None
            if chunk.first < self.examples:
                tensors = load_file(path.with_suffix(".safetensors"))
        except (InputError, OSError, SafetensorError):
            return None
        labels = [(chunk.first + index, label) for index, label in enumerate(chunk.y.tolist())]
        if [(sample.index, sample.label) for sample in part.samples] != labels:
            return None
        if tensors is None:
            return Outcome(part)
        if set(tensors) != set(EXAMPLE_TENSORS) or tensors["x_adv"].shape != chunk.x.shape:
            return None
        x = chunk.x.cpu().clamp(*bounds)
        ids = torch.arange(chunk.first, chunk.first + len(x))
        return Outcome(part, WorstCase(x=x, y=chunk.y.cpu().long(), ids=ids, rejected=part.rejected, **tensors))

    def write(self, chunk: Chunk, outcome: Outcome) -> None:
        """Keep the results of a chunk, whole or not at all: the file that says that it is done comes last."""
        path = self.path(chunk)
        if outcome.worst is not None:
            with replacing(path.with_suffix(".safetensors")) as beside:
                write_tensors({name: getattr(outcome.worst, name).contiguous() for name in EXAMPLE_TENSORS}, beside)
        write_text(path, codec.to_json(outcome.part))


def make_folder(folder: Path) -> Path:
    """The folder by its absolute path, made if it is missing: processes of a cluster may start elsewhere.

    Raises:
        InputError: There can be none of that name.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"resume: expected a folder; {folder} is or lies in a file") from None
    return folder.absolute()


def fingerprint(model: Model, attacks: Sequence[Attack], settings: Sequence[str], x: Tensor, y: Tensor) -> str:
    """A text that differs between runs whose results may differ, the data left aside.

    Args:
        model: The network, borrowed: its weights, buffers, structure and logits for a few samples count.
        attacks: The attacks.
        settings: Everything but network, attacks and data that results depend on.
        x: At least one input.
        y: Labels.

    Raises:
        InputError: The network is no module, or an attack cannot be told from others.
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise InputError(f"resume: expected an nn.Module, whose weights can be told from others; got {kind}")
    device, some = device_of(model), slice(IDENTIFYING_SAMPLES)
    logits = logits_of(model, x[some].to(device), y[some].to(device)).double().cpu()
    # To a thousandth of the largest, so that the rounding of another batch size makes no other network.
    rounded = (logits / (1e-3 * logits.abs().max().clamp_min(torch.finfo(torch.float64).tiny))).round()
    tensors = model.state_dict() | dict(model.named_buffers()) | {"logits": rounded}
    return json.dumps([str(model), digest(tensors), *map(identity, attacks), *settings])
