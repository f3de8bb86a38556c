"""Arrays in an npz file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from brittle.data.readers.contents import Array, Choose, Read
from brittle.errors import InputError


def read_npz(path: Path, split: str, choose: Choose) -> Read:
    """Read inputs and labels by one of their usual names; see :func:`brittle.load_data`.

    Raises:
        InputError: The file is missing, broken, asks for code to be unpickled, or holds no labelled inputs.
    """
    if not path.is_file():
        raise InputError(f"{path}: expected an npz file; got no file, and nothing is downloaded")
    try:
        x, y, classes = _npz_arrays(path, split)
    except InputError:
        raise
    except Exception as error:  # a broken archive raises by what is broken: zip, header, compression, pickle
        raise InputError(f"{path}: expected an npz file of plain arrays; reading it failed: {error}") from error
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
    return x[chosen], y[chosen], int(y.max()) + 1 if classes is None else classes


def _npz_arrays(path: Path, split: str) -> tuple[Array, Array, int | None]:
    """Load inputs, labels and, where it is stored, the number of classes."""
    pairs = [(f"x_{split}", f"y_{split}"), ("x", "y"), ("inputs", "labels"), ("images", "labels")]
    with np.load(path, allow_pickle=False) as stored:
        names = next((pair for pair in pairs if set(pair) <= set(stored.files)), None)
        if names is None:
            forms = ", ".join(" and ".join(pair) for pair in pairs)
            raise InputError(f"{path}: expected one of the pairs {forms}; got {', '.join(stored.files)}")
        classes = stored["classes"] if "classes" in stored.files else None
        if classes is not None and (classes.shape != () or classes.dtype.kind not in "iu"):
            raise InputError(f"{path}: expected one integer as classes; got {classes.dtype} of shape {classes.shape}")
        return stored[names[0]], stored[names[1]], None if classes is None else int(classes)
