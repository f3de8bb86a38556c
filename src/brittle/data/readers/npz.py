"""Arrays in an npz file."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from brittle.data.readers.contents import Array, Choose, Read, check_unpacked, opened
from brittle.errors import InputError

EXPECTED = "an npz file of plain arrays"


def read_npz(path: Path, split: str, choose: Choose) -> Read:
    """Read inputs and labels by one of their usual names; see :func:`brittle.load_data`.

    Raises:
        InputError: The file is missing, broken, asks for code to be unpickled, or holds no labelled inputs.
    """
    with opened(path, EXPECTED) as file, zipfile.ZipFile(file) as archive:
        x, y, classes = _stored_arrays(path, archive, split)
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise InputError(f"{path}: expected inputs of uint8 or floating in [0, 1]; got {x.dtype}")
    if y.dtype.kind not in "iu" or y.ndim != 1 or len(y) == 0:
        raise InputError(f"{path}: expected integer labels (N,), N > 0; got {y.dtype} of shape {y.shape}")
    if x.ndim not in (2, 4) or len(x) != len(y):
        raise InputError(f"{path}: expected inputs (N, D) or (N, C, H, W), with N = {len(y)} labels; got {x.shape}")
    if x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        raise InputError(
            f"{path}: expected inputs (N, C, H, W); got {x.shape}, whose last axis looks like the channels: "
            "store x.transpose(0, 3, 1, 2)"
        )
    chosen = choose(len(x))
    return np.ascontiguousarray(x[chosen]), y[chosen], int(y.max()) + 1 if classes is None else classes


def _stored_arrays(path: Path, archive: zipfile.ZipFile, split: str) -> tuple[Array, Array, int | None]:
    """Inputs, labels and, where it is stored, the number of classes."""
    pairs = [(f"x_{split}", f"y_{split}"), ("x", "y"), ("inputs", "labels"), ("images", "labels")]
    stored = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    names = next((pair for pair in pairs if set(pair) <= set(stored)), None)
    if names is None:
        forms = ", ".join(" and ".join(pair) for pair in pairs)
        raise InputError(f"{path}: expected one of the pairs {forms}; got {', '.join(stored) or 'no array'}")
    classes = _stored_array(path, archive, "classes") if "classes" in stored else None
    if classes is not None and (classes.shape != () or classes.dtype.kind not in "iu"):
        raise InputError(f"{path}: expected one integer as classes; got {classes.dtype} of shape {classes.shape}")
    x, y = (_stored_array(path, archive, name) for name in names)
    return x, y, None if classes is None else int(classes)


def _stored_array(path: Path, archive: zipfile.ZipFile, name: str) -> Array:
    """One array, read only when its header, its size and its packed size agree."""
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"{path}: expected arrays as numpy stores them; got {name} packed in another way")
    check_unpacked(path, min(member.compress_size, path.stat().st_size), member.file_size)
    with archive.open(member) as file:
        version = npy.read_magic(file)
        if version != (1, 0):  # numpy writes later ones for named fields alone, and their headers may be of any size
            raise InputError(f"{path}: expected {EXPECTED}; got {name} in version {version[0]}.{version[1]} of npy")
        shape, fortran, dtype = npy.read_array_header_1_0(file)
        if dtype.hasobject or dtype.shape or dtype.names:
            raise InputError(f"{path}: expected {EXPECTED}; reading it failed: {name} holds {dtype!s:.80}, no numbers")
        size = dtype.itemsize * math.prod(shape)
        if min(shape, default=0) < 0 or size != member.file_size - file.tell():
            raise InputError(
                f"{path}: expected {name} to hold the {shape} of {dtype} that it announces; got "
                f"{member.file_size - file.tell()} bytes"
            )
        content = file.read(
            size
        )  # a size given: without one, a false size of the member would not bound what is unpacked
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
