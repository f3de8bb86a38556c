"""What makes two results comparable: versions, device, seed, settings, and fingerprints of weights and data."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch
from torch import Tensor, nn

from brittle._version import __version__
from brittle.models.borrow import device_of
from brittle.results import Setting, Signature
from brittle.storage.digest import digest


def signature_of(
    model: nn.Module, samples: tuple[Tensor, Tensor] | None, seed: int, settings: dict[str, Setting]
) -> Signature:
    """The signature of a result.

    Args:
        model: The network.
        samples: Inputs and labels; None without data.
        seed: Seed of every random choice.
        settings: All settings of the run.
    """
    device = device_of(model)
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
        weights=digest(model.state_dict()),
        data=None if samples is None else digest({"inputs": samples[0], "labels": samples[1]}),
    )
