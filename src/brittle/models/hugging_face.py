"""Networks of Hugging Face's transformers, from a folder as ``save_pretrained`` writes it or from the hub's cache.

Nothing is fetched unasked, and nothing unpickled or executed: the library builds the class that ``config.json`` names,
one of its own, and reads ``*.safetensors`` alone.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from brittle.errors import InputError, MissingExtra, one_line
from brittle.models.intake import Logits
from brittle.models.isolation import isolated_globals
from brittle.models.normalize import normalised
from brittle.models.quantised import check_finite

PREFIX = "hf:"
"""What the names of such networks start with, before the folder."""
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
INDEX = "safetensors.index.json"
"""How the name of the list of weights in several files ends."""
ON_THE_HUB = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
"""A network's name on the hub."""


def is_snapshot(name: str | Path) -> bool:
    """Whether a name is ``hf:FOLDER``."""
    return str(name).startswith(PREFIX)


def build_from_config(name: str, arguments: Mapping[str, object]) -> nn.Module:
    """The network that a folder describes, with fresh weights.

    Args:
        name: ``hf:FOLDER``; of the folder only ``config.json`` is read.
        arguments: Values of the configuration that are to be others, such as ``num_labels``.

    Returns:
        A network from images to logits where the class is one for images (:class:`brittle.models.intake.Logits`), else
        the library's own.

    Raises:
        InputError: No such folder, or none that describes a network of the library.
        MissingExtra: transformers is not installed.
    """
    folder, transformers = _folder(name), _library(name)
    with _quiet(transformers):
        config = _configuration(transformers, folder, arguments)
        return _for_images(_network_class(transformers, config, folder)(config))


def load_snapshot(name: str, *, download: bool = False, normalise: bool = True) -> nn.Module:
    """The trained network of a folder, in evaluation mode and single precision.

    A network for images stands behind the normalisation that its processor's file says, so that it takes images in
    [0, 1], as every network here.

    Args:
        name: ``hf:FOLDER`` with ``config.json``, ``*.safetensors`` and, where images are normalised,
            ``preprocessor_config.json``; or ``hf:ORG/MODEL``, such a folder in the cache of Hugging Face's hub.
        download: Whether to fetch ``hf:ORG/MODEL`` into that cache where it is not there.
        normalise: Whether to put the normalisation before the network.

    Raises:
        InputError: The folder does not hold a whole network of the library, and the message says what is missing; or
            there is none, and it is not to be fetched.
        MissingExtra: transformers is not installed.
    """
    transformers = _library(name)
    folder = _fetched(name) if download else _folder(name)
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder}: expected weights as *.safetensors; got none, and nothing else is read")
    with _quiet(transformers), isolated_globals(0):
        config = _configuration(transformers, folder, {})
        kind = _network_class(transformers, config, folder)
        try:
            network, found = kind.from_pretrained(
                str(folder), config=config, local_files_only=True, use_safetensors=True, trust_remote_code=False,
                dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
        except Exception as error:  # whatever the library makes of a damaged file
            raise InputError(f"{folder}: expected weights of a {kind.__name__}; got {one_line(error)}") from error
    for problem in ("missing", "mismatched", "unexpected"):
        if keys := found[f"{problem}_keys"]:
            names = sorted(key if isinstance(key, str) else key[0] for key in keys)  # of mismatched ones with shapes
            raise InputError(
                f"{folder}: expected all weights of a {kind.__name__} and no others; got {problem} "
                f"{', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            )
    check_finite(network.state_dict().items(), str(folder))
    model = _for_images(network)
    statistics = snapshot_statistics(name) if normalise and isinstance(model, Logits) else None
    return (model if statistics is None else normalised(model, *statistics, PROCESSOR)).eval()


def snapshot_image_size(name: str) -> tuple[int, int] | None:
    """``(height, width)`` of the images that a network takes, by its ``config.json``; None where that says nothing.

    Args:
        name: ``hf:FOLDER`` or ``hf:ORG/MODEL``.
    """
    size = _read_json(_folder(name) / CONFIG).get("image_size")
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(type(side) is int and side > 0 for side in pair):
        return None
    return pair[0], pair[1]


def absolute_name(name: str) -> str:
    """The name with the whole path of its folder, which means the same wherever it is read."""
    return f"{PREFIX}{_folder(name).absolute()}"


def snapshot_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation by which a network normalises images in [0, 1]; None where it takes them as they are.

    The processor computes ``(r v - mean) / std`` of a byte v, with r its ``rescale_factor``, 1/255 by default; of
    ``x = v / 255`` that is ``(x - mean / (255 r)) / (std / (255 r))``.

    Args:
        name: ``hf:FOLDER``; of the folder only ``preprocessor_config.json`` is read, if it is there.

    Raises:
        InputError: The file is not one of an image processor.
    """
    path = _folder(name) / PROCESSOR
    if not path.is_file():
        return None
    said = _read_json(path)
    try:
        scale = 255 * float(said.get("rescale_factor", 1 / 255)) if said.get("do_rescale", True) else 255.0
        if said.get("do_normalize", "image_mean" in said):
            mean, std = (tuple(float(v) / scale for v in said[key]) for key in ("image_mean", "image_std"))
        elif math.isclose(scale, 1):
            return None
        else:
            mean, std = (0.0,) * 3, (1 / scale,) * 3
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{path}: expected image_mean and image_std, numbers by channel; got {said}") from error
    return mean, std


def _folder(name: str) -> Path:
    """The folder of a network: the one that is named, or that of the hub's cache."""
    folder = Path(name.removeprefix(PREFIX))
    if not (folder / CONFIG).is_file():
        folder = _cached(name) or folder
    if not (folder / CONFIG).is_file():
        unasked = ", and nothing is downloaded unasked: add --download (download=True) to fetch it"
        raise InputError(
            f"{name}: expected a folder with a {CONFIG}, or a network in the cache of Hugging Face's hub; got neither"
            + (unasked if ON_THE_HUB.fullmatch(name.removeprefix(PREFIX)) else ", and nothing is downloaded")
        )
    return folder


def _cached(name: str) -> Path | None:
    """The folder of the hub's cache that holds ``hf:ORG/MODEL``; None where there is none."""
    repository = name.removeprefix(PREFIX)
    if not ON_THE_HUB.fullmatch(repository):
        return None
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    found = try_to_load_from_cache(repository, CONFIG)
    return Path(found).parent if isinstance(found, str) else None


def _fetched(name: str) -> Path:
    """The folder of a network, fetched into the hub's cache where it is neither a folder nor there already."""
    repository = name.removeprefix(PREFIX)
    if (Path(repository) / CONFIG).is_file():
        return Path(repository)
    if not ON_THE_HUB.fullmatch(repository):
        raise InputError(f"{name}: expected hf:ORG/MODEL to download, or a folder with a {CONFIG}; got neither")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=[CONFIG, PROCESSOR, "*.safetensors", f"*.{INDEX}"]))
    except Exception as error:  # what the network, the hub or the disk raise
        raise InputError(f"{name}: expected a download from Hugging Face's hub; got {one_line(error)}") from error


def _library(name: str) -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise MissingExtra("transformers", "transformers", f"the network {name}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: expected JSON; got {one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object; got {type(content).__name__}")
    return content


def _configuration(transformers: Any, folder: Path, arguments: Mapping[str, object]) -> Any:
    """What ``config.json`` says, by a class of the library's own, whatever code the file names."""
    said = _read_json(folder / CONFIG)
    kind = said.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise InputError(f"{folder / CONFIG}: expected a model_type of transformers; got {kind!r}")
    try:
        return transformers.CONFIG_MAPPING[kind].from_dict(said, **arguments)
    except Exception as error:  # the library checks types in its own ways
        raise InputError(f"{folder / CONFIG}: expected the values of a {kind}; got {one_line(error)}") from error


def _network_class(transformers: Any, config: Any, folder: Path) -> Any:
    """The class that the configuration names."""
    names = config.architectures or [None]
    kind = getattr(transformers, names[0], None) if isinstance(names[0], str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise InputError(
            f"{folder / CONFIG}: expected the name of a network of transformers under architectures; got {names[0]!r}"
        )
    return kind


def _for_images(network: Any) -> nn.Module:
    """The network as one from images to logits, if it is one that classifies images."""
    classifies = type(network).__name__.endswith("ForImageClassification")
    model: nn.Module = Logits(network) if classifies and network.main_input_name == "pixel_values" else network
    return model


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the library's progress bars and warnings: what matters is said by us."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
