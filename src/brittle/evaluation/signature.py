"""What makes two results comparable: versions, device, seed, settings, and fingerprints of weights and data."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version

import torch
from torch import Tensor, nn

from brittle._version import __version__
from brittle.evaluation.parts import Chunk
from brittle.models.borrow import Model, device_of
from brittle.results import Setting, Signature
from brittle.storage.digest import bytes_of, describe, digest


class StreamDigest:
    """The fingerprint of labelled data that are read once, chunk by chunk.

    It is :func:`~brittle.storage.digest.digest` of the inputs and labels as two tensors, however they were cut; a
    stream whose number of samples is not known beforehand gets one of its own.
    """

    def __init__(self, total: int | None) -> None:
        """Take the number of samples, where it is known."""
        self.total, self.inputs, self.labels = total, hashlib.sha256(), list[Tensor]()

    def over(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """The chunks, read on their way."""
        for chunk in chunks:
            if not self.labels:
                self.inputs.update(describe("inputs", chunk.x, (self.total, *chunk.x.shape[1:])))
            self.inputs.update(bytes_of(chunk.x))
            self.labels.append(chunk.y.detach().cpu())
            yield chunk

    def hexdigest(self) -> str:
        """The fingerprint of what was read, as 64 hexadecimal digits."""
        result, labels = self.inputs.copy(), torch.cat(self.labels)
        result.update(describe("labels", labels, (self.total,)))
        result.update(bytes_of(labels))
        return result.hexdigest()


def signature_of(
    model: Model | Mapping[str, Tensor], data: str | None, seed: int, settings: dict[str, Setting]
) -> Signature:
    """The signature of a result.

    Args:
        model: The network, or weights by name; a plain callable has none that could be told from others.
        data: Fingerprint of the data; None without data.
        seed: Seed of every random choice.
        settings: All settings of the run.
    """
    weights = model if isinstance(model, Mapping) else model.state_dict() if isinstance(model, nn.Module) else None
    device = torch.device("cpu") if isinstance(model, Mapping) else device_of(model)
    return Signature(
        versions={
            "brittle": __version__,
            "python": platform.python_version(),
            "torch": version("torch"),
            "numpy": version("numpy"),
        },
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        seed=seed,
        settings=settings,
        weights="" if weights is None else digest(weights),
        data=data,
    )
