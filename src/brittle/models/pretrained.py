"""Trained networks of torchvision and timm by name, with what their libraries know of the inputs they expect.

Weights come from the library's own cache, and are fetched into it only when asked for. No pickle runs code: of
torchvision's files plain tensors alone are read, of timm's ``*.safetensors`` alone.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from brittle.errors import InputError, MissingExtra, one_line
from brittle.models.isolation import isolated_globals
from brittle.models.normalize import normalised
from brittle.models.quantised import check_finite

LIBRARIES = ("torchvision", "timm")
DEFAULT = "DEFAULT"
"""The weights that a library takes for its best."""
ONLY_TENSORS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""With this set in the environment torch unpickles plain tensors alone, whatever the library asks for."""


@dataclass(frozen=True)
class Pretraining:
    """What a library says of weights that it keeps.

    Attributes:
        source: Library and weights, in words.
        classes: Number of classes.
        input_shape: ``(channels, height, width)`` of an input.
        mean: By which inputs in [0, 1] are normalised, per channel.
        std: Likewise.
        url: Where the library fetches the weights.
        repository: Their repository on Hugging Face's hub; ``""`` for none.
    """

    source: str
    classes: int
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    url: str
    repository: str = ""


def is_pretrained(name: str | Path) -> bool:
    """Whether a name is ``torchvision:NAME`` or ``timm:NAME``."""
    library, colon, rest = str(name).partition(":")
    return bool(colon and rest) and library in LIBRARIES


def pretraining_of(name: str, weights: str = DEFAULT) -> Pretraining:
    """What the library says of the weights of one of its networks; nothing is read or fetched.

    Args:
        name: ``torchvision:NAME`` or ``timm:NAME``.
        weights: Which: for torchvision as ``IMAGENET1K_V1``, for timm the tag after the name, as ``a1_in1k``.

    Raises:
        InputError: The library has no such network, or no such weights of it.
        MissingExtra: The library is not installed.
    """
    library, _, rest = name.partition(":")
    zoo = _library(name)
    if library == "timm":
        return _of_timm(zoo, rest, weights)
    entry = _entry(zoo, rest, weights)
    preset, kind = entry.transforms(), type(entry).__name__
    size = preset.crop_size[0] if isinstance(preset.crop_size, list | tuple) else preset.crop_size
    return Pretraining(
        f"torchvision's {kind}.{entry.name}",
        len(entry.meta["categories"]),
        (3, size, size),
        tuple(preset.mean),
        tuple(preset.std),
        entry.url,
    )


def load_pretrained(name: str, weights: str = DEFAULT, *, download: bool = False, normalise: bool = True) -> nn.Module:
    """A trained network of torchvision or timm, in evaluation mode, which takes images in [0, 1].

    Args:
        name: ``torchvision:NAME`` or ``timm:NAME``.
        weights: As :func:`pretraining_of`.
        download: Whether to fetch the weights where the library's own cache lacks them (torch.hub's folder, or that of
            Hugging Face's hub).
        normalise: Whether to put the normalisation before it that the library says.

    Raises:
        InputError: No such network or weights; they are not in the cache and not to be fetched; or they are damaged.
        MissingExtra: The library is not installed.
    """
    known, library = pretraining_of(name, weights), _library(name)
    timm = name.startswith("timm:")
    path = _hub_file(name, known, download) if timm else _torch_file(name, known, download)
    try:
        with isolated_globals(0), _only_tensors():
            if timm:
                overlay = {"file": str(path), "custom_load": False}
                arch = _timm_name(name.partition(":")[2], weights)
                network = library.create_model(arch, pretrained=True, pretrained_cfg_overlay=overlay)
            else:
                arch = name.partition(":")[2]
                network = library.models.get_model(arch, weights=_entry(library, arch, weights), progress=False)
    except Exception as error:  # whatever the library makes of a damaged file
        raise InputError(f"{path}: expected the weights of {name}; got {one_line(error)}") from error
    check_finite(network.state_dict().items(), str(path))
    result: nn.Module = normalised(network, known.mean, known.std, known.source) if normalise else network
    return result.eval()


def expected_statistics(arch: str, arguments: Mapping[str, object]) -> Pretraining | None:
    """What a library says of its own weights of an architecture, where others in a file are probably of their kind.

    They are taken for that if the network has the library's number of classes, which whoever trains it on other data
    changes.

    Args:
        arch: As :func:`brittle.build_model` takes it.
        arguments: Those of the architecture.
    """
    if not is_pretrained(arch):
        return None
    try:
        known = pretraining_of(arch)
    except InputError:  # an architecture without weights
        return None
    same = arguments.get("num_classes", known.classes) == known.classes and arguments.get("in_chans", 3) == 3
    return known if same else None


def _library(name: str) -> Any:
    source = name.partition(":")[0]
    try:
        return importlib.import_module(source)
    except ImportError:
        raise MissingExtra(source, "vision", f"the network {name}") from None


def _entry(torchvision: Any, arch: str, weights: str) -> Any:
    """The library's entry of weights."""
    names = torchvision.models.list_models(module=torchvision.models)
    if arch not in names:
        raise InputError(f"torchvision:{arch}: expected a classification model of torchvision; got {arch!r}")
    entries = torchvision.models.get_model_weights(arch)
    wanted = weights.rpartition(".")[2]
    if wanted not in entries.__members__:
        known = ", ".join([DEFAULT, *(entry.name for entry in entries)])
        raise InputError(f"weights: expected one of {known} for torchvision:{arch}; got {weights!r}")
    return entries[wanted]


def _timm_name(arch: str, weights: str) -> str:
    return arch if weights == DEFAULT else f"{arch.partition('.')[0]}.{weights}"


def _of_timm(timm: Any, arch: str, weights: str) -> Pretraining:
    name = _timm_name(arch, weights)
    if not timm.is_model(name):  # true for names that would be read from elsewhere, which have no entry
        raise InputError(f"timm:{arch}: expected a model of timm; got {name!r}")
    try:
        entry = timm.get_pretrained_cfg(name)
    except (RuntimeError, KeyError):
        entry = None
    if entry is None or not entry.has_weights:
        known = [model.partition(".")[2] for model in timm.list_pretrained(f"{arch.partition('.')[0]}.*")]
        expected = f"one of {', '.join([DEFAULT, *filter(None, known)])}" if known else "a model with weights in timm"
        raise InputError(f"weights: expected {expected} for timm:{arch}; got {weights!r}")
    return Pretraining(
        f"timm's {entry.architecture}{f'.{entry.tag}' if entry.tag else ''}",
        entry.num_classes,
        tuple(entry.input_size),
        tuple(entry.mean),
        tuple(entry.std),
        entry.url or "",
        entry.hf_hub_id or "",
    )


def _torch_file(name: str, known: Pretraining, download: bool) -> Path:
    """The file of torch.hub's cache that holds the weights."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(known.url).path).name
    if not path.is_file():
        if not download:
            raise _not_fetched(name, known, f"none at {path}")
        digits = re.search(r"-([a-f0-9]{8,})\.", path.name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(known.url, str(path), digits[1] if digits else None, progress=False)
        except Exception as error:  # what urllib, the disk or a wrong sum raise
            raise InputError(f"{name}: expected a download of {known.url}; got {one_line(error)}") from error
    return path


def _hub_file(name: str, known: Pretraining, download: bool) -> Path:
    """The file of the hub's cache that holds the weights."""
    if not known.repository:
        raise InputError(f"{name}: expected weights on Hugging Face's hub, as *.safetensors; got {known.url or 'none'}")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    found = try_to_load_from_cache(known.repository, "model.safetensors")
    if isinstance(found, str):
        return Path(found)
    if not download:
        raise _not_fetched(name, known, "none there")
    try:
        return Path(hf_hub_download(known.repository, "model.safetensors"))
    except Exception as error:  # what the network, the hub or the disk raise
        message = f"{name}: expected a download of {known.repository} from the hub; got {one_line(error)}"
        raise InputError(message) from error


def _not_fetched(name: str, known: Pretraining, got: str) -> InputError:
    return InputError(
        f"{name}: expected the weights of {known.source} in the library's cache; got {got}, and nothing is downloaded "
        "unasked: add --download (download=True) to fetch them"
    )


@contextmanager
def _only_tensors() -> Iterator[None]:
    """Inside, torch unpickles nothing but plain tensors."""
    before = os.environ.get(ONLY_TENSORS)
    os.environ[ONLY_TENSORS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ONLY_TENSORS]
        else:
            os.environ[ONLY_TENSORS] = before
