"""Weights in files: read without ever unpickling code, filled into a model strictly, written whole."""

from __future__ import annotations

import errno
import io
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from brittle.errors import InputError
from brittle.models.quantised import check_finite
from brittle.storage.files import replacing

NESTED = ("state_dict", "model", "model_state_dict", "state_dict_ema")
"""Keys under which training scripts keep the weights, in the order in which they are tried."""
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DataParallel and torch.compile put before every name."""
MOST_GROWTH = 2**24
"""Bytes by which a checkpoint may grow when it is unpacked: torch.save compresses nothing, TorchScript its code."""
REMEDY = "save the weights instead: safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a model's weights; code in the file is never run.

    ``*.safetensors`` is read as such and everything else as a checkpoint of ``torch.save`` that holds plain tensors.
    Weights nested under ``state_dict``, ``model``, ``model_state_dict`` or ``state_dict_ema`` are taken out, and
    a prefix ``module.`` or ``_orig_mod.`` that all names have is removed.

    Args:
        path: The file.

    Returns:
        Tensors by name, on the CPU, dtypes as stored; at least one.

    Raises:
        InputError: The file is missing, broken or not what its ending says, holds code or something other than
            tensors, or a tensor has values that are NaN or infinite.
    """
    path = Path(path)
    if not path.is_file():
        instead = "a folder" if path.is_dir() else "no regular file" if path.exists() else "nothing"
        raise InputError(f"{path}: expected a file of weights (.safetensors, .pt, .pth); got {instead} there")
    if path.suffix.lower() == ".pt2":
        raise InputError(
            f"{path}: expected a file of weights; got a program of torch.export, which torch unpickles to load it, so "
            "that code in it would run; if you trust it, do so in Python: brittle.audit(torch.export.load(PATH), data)"
        )
    state = _find_state(path, _read_file(path))
    check_finite(state.items(), str(path))
    names = _unwrap(state)
    return {names[key]: tensor for key, tensor in state.items()}


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy ``state`` into ``model``: every name once, every shape equal; the model keeps its dtypes and devices.

    The prefixes that :func:`read_state` removes may be absent from ``state`` where ``model`` has them, and so may the
    batch norms' ``num_batches_tracked``, which old checkpoints lack: it then stays as it is.

    Args:
        model: The model to fill.
        state: Tensors by name.

    Raises:
        InputError: Names are missing or unexpected, shapes differ, or a value is not finite in the model's dtype;
            the model is then untouched.
    """
    own: dict[str, Tensor] = model.state_dict()
    full = {short: key for key, short in _unwrap(own).items()}
    # Counters that torch's batch norms did not have before version 0.4.1, and that evaluation does not read.
    counters = {key: tensor for key, tensor in own.items() if key.split(".")[-1] == "num_batches_tracked"}
    given = counters | {full.get(key, key): tensor for key, tensor in state.items()}
    if problems := _describe_mismatches(own, given):
        raise InputError(f"state: expected the model's names and shapes; got {'; '.join(problems)}")
    cast = {key: tensor.to(own[key].dtype) for key, tensor in given.items()}
    check_finite(cast.items(), "state")
    model.load_state_dict(cast, strict=True)


def save_state(model: nn.Module, path: Path) -> None:
    """Write the weights of ``model`` as safetensors, whole or not at all; tied tensors are written under each name.

    Args:
        model: The model; its tensors may lie on any device.
        path: The file, ending in ``.safetensors``, by which :func:`read_state` knows it.

    Raises:
        InputError: The file has another ending, or the state holds something other than tensors.
    """
    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        raise InputError(f"path: expected the ending .safetensors; got {path}")
    state = model.state_dict()
    check_tensors(state, f"the state of {type(model).__name__}")
    copies = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in state.items()}
    with replacing(path) as beside:
        write_tensors(copies, beside, metadata={"format": "pt"})


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write contiguous tensors on the CPU as safetensors.

    Raises:
        OSError: Writing failed, as on a full disk.
    """
    try:
        safetensors.torch.save_file(dict(tensors), str(path), metadata=metadata)
    except safetensors.SafetensorError as error:
        raise OSError(errno.EIO, f"writing failed: {error}", str(path)) from error


def _read_file(path: Path) -> object:
    """What a file holds, by its ending; code in it is not run."""
    if path.suffix.lower() == ".safetensors":
        try:
            return safetensors.torch.load_file(str(path))
        except Exception as error:  # the reader has an exception of its own beside OSError and others
            raise InputError(f"{path}: expected a whole safetensors file; reading it failed: {error}") from error
    if grown := _grown(path):
        raise InputError(f"{path}: expected a checkpoint as torch.save writes it, uncompressed; got {grown}")
    try:
        with warnings.catch_warnings():  # about foreign pickles and TorchScript, both refused below in our words
            warnings.simplefilter("ignore")
            if zipfile.is_zipfile(path):
                return torch.load(path, map_location="cpu", weights_only=True)
            with _Bounded(path) as file:
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a broken file raises depends on where it breaks
        code = re.search(r"GLOBAL ([\w.]+)|TorchScript", str(error))
        if not code and not isinstance(error, pickle.UnpicklingError):
            message = f"{path}: expected a whole checkpoint of torch.save; got one that is truncated or corrupt"
            raise InputError(message) from error
        instead = f"one that asks for {code[1] or code[0]}" if code else "a pickle of another kind or none"
        raise InputError(
            f"{path}: expected plain tensors as torch.save writes them; got {instead}, and code is never unpickled; "
            f"{REMEDY}"
        ) from error


class _Bounded(io.FileIO):
    """A file that is not asked for more than it holds: the memory for it would be taken first."""

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes, at most those that are left."""
        left = max(0, os.fstat(self.fileno()).st_size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def _grown(path: Path) -> str | None:
    """How much larger an archive's content is than its file, in words; None where that costs nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            total = sum(info.file_size for info in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):  # torch will say what is wrong with it
        return None
    size = path.stat().st_size
    return f"members of {total} bytes in a file of {size}" if total > size + MOST_GROWTH else None


def _find_state(path: Path, content: object) -> dict[str, Tensor]:
    """Take the weights out of what a file held."""
    seen = set[int]()
    while isinstance(content, Mapping) and id(content) not in seen:  # a dictionary may hold itself
        seen.add(id(content))
        inner = next((content[key] for key in NESTED if isinstance(content.get(key), Mapping)), None)
        content = content if inner is None else inner
    if not isinstance(content, Mapping) or not content:
        got = f"an empty {type(content).__name__}" if isinstance(content, Mapping) else type(content).__name__
        raise InputError(f"{path}: expected a state dict, tensors by name; got {got}")
    check_tensors(content, str(path))
    return {key: tensor.detach() for key, tensor in content.items()}


def check_tensors(state: Mapping[Any, object], where: str) -> None:
    """Refuse a state that holds something other than dense tensors by name, whose values are all there.

    Raises:
        InputError: The first such entry; the message begins with ``where``.
    """
    for key, value in state.items():
        if (
            not isinstance(key, str)
            or not isinstance(value, Tensor)
            or value.layout != torch.strided
            or value.is_quantized
            or value.is_meta
            or value.is_nested
        ):
            got = f"{type(value).__name__} under {key!r}"
            raise InputError(f"{where}: expected only dense tensors by name; got {got}")
        # Expanded tensors may claim any size: checking them would need that much memory.
        stored = value.untyped_storage().nbytes()
        if value.numel() * value.element_size() > stored:
            got = f"shape {tuple(value.shape)} on {stored} bytes under {key!r}"
            raise InputError(f"{where}: expected tensors that store all their values; got {got}")


def _unwrap(keys: Iterable[str]) -> dict[str, str]:
    """Map each name to the name without the prefixes that all of them have."""
    names = {key: key for key in keys}
    while prefix := next((p for p in WRAPPERS if names and all(n.startswith(p) for n in names.values())), None):
        names = {key: name.removeprefix(prefix) for key, name in names.items()}
    return names


def _describe_mismatches(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Describe what keeps ``given`` from filling ``own``, a few names of each kind."""
    shapes = [
        f"{key} expected {tuple(own[key].shape)}, got {tuple(given[key].shape)}"
        for key in own
        if key in given and own[key].shape != given[key].shape
    ]
    mixed = [key for key in own if key in given and own[key].is_complex() != given[key].is_complex()]
    kinds = {
        "missing": [key for key in own if key not in given],
        "unexpected": [key for key in given if key not in own],
        "shapes": shapes,
        "real and complex mixed": mixed,
    }
    return [
        f"{kind}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for kind, names in kinds.items()
        if names
    ]
