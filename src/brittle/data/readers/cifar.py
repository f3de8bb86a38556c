"""CIFAR-10 and CIFAR-100: pickled batches, of which only plain arrays are taken, or CIFAR-10's binary version."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from brittle.data.readers.contents import Array, Choose, Read, contents
from brittle.data.readers.plain_pickle import plain_array, plain_dict
from brittle.errors import InputError


def read_cifar10(root: Path, split: str, choose: Choose) -> Read:
    """Read ``root/cifar-10-batches-py`` or else ``root/cifar-10-batches-bin`` into ``(N, 3, 32, 32)`` of uint8.

    Raises:
        InputError: A file is missing, broken, or holds something else.
    """
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    pickled, binary = root / "cifar-10-batches-py", root / "cifar-10-batches-bin"
    if pickled.is_dir():
        parts = [_pickled_batch(pickled / name, "labels") for name in names]
    elif binary.is_dir():
        parts = [_binary_batch(binary / f"{name}.bin") for name in names]
    else:
        raise InputError(
            f"{pickled}: expected this folder or {binary.name} beside it; got neither, and nothing is downloaded"
        )
    x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    chosen = choose(len(x))
    return x[chosen].reshape(-1, 3, 32, 32), y[chosen], 10


def read_cifar100(root: Path, split: str, choose: Choose) -> Read:
    """Read ``root/cifar-100-python`` into ``(N, 3, 32, 32)`` of uint8, with the fine labels of 100 classes.

    Raises:
        InputError: A file is missing, broken, or holds something else.
    """
    x, y = _pickled_batch(root / "cifar-100-python" / split, "fine_labels")
    chosen = choose(len(x))
    return x[chosen].reshape(-1, 3, 32, 32), y[chosen], 100


def _binary_batch(path: Path) -> tuple[Array, Array]:
    content = contents(path, "a CIFAR-10 batch in the binary version")
    if not content or len(content) % 3073:
        raise InputError(f"{path}: expected whole records of 3073 bytes; got {len(content)} bytes")
    records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    return records[:, 1:], records[:, 0].astype(np.int64)


def _pickled_batch(path: Path, labels: str) -> tuple[Array, Array]:
    content = contents(path, "a CIFAR batch in the Python version")
    try:
        batch = plain_dict(content)
        x, y = (plain_array(batch.get(key, batch.get(key.encode()))) for key in ("data", labels))
    except Exception as error:  # what a broken pickle raises depends on where it breaks
        raise InputError(f"{path}: expected a CIFAR batch of plain arrays; reading it failed: {error}") from error
    fits = x.ndim == 2 and x.shape[1] == 3072 and y.shape == x.shape[:1]
    if x.dtype != np.uint8 or y.dtype.kind not in "iu" or not fits:
        raise InputError(
            f"{path}: expected data (N, 3072) of uint8 and N integer {labels}; "
            f"got data {x.shape} of {x.dtype}, {labels} {y.shape} of {y.dtype}"
        )
    return x, y.astype(np.int64)
