"""SVHN, cropped digits: MATLAB files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from brittle.data.readers.contents import Choose, Read
from brittle.data.readers.matlab import read_matrices
from brittle.errors import InputError


def read_svhn(root: Path, split: str, choose: Choose) -> Read:
    """Read ``root/train_32x32.mat`` or ``root/test_32x32.mat`` into ``(N, 3, 32, 32)`` of uint8; label 10 is digit 0.

    Raises:
        InputError: The file is missing, broken, or holds something else.
    """
    path = root / f"{split}_32x32.mat"
    x, y = read_matrices(path, ("X", "y"))
    fits = x.ndim == 4 and x.shape[:3] == (32, 32, 3) and y.shape in ((x.shape[3], 1), (x.shape[3],))
    if x.dtype != np.uint8 or not fits:
        raise InputError(
            f"{path}: expected X (32, 32, 3, N) of uint8 and y (N, 1) of numbers; "
            f"got X {x.shape} of {x.dtype}, y {y.shape} of {y.dtype}"
        )
    if not np.isin(y, np.arange(1, 11)).all():
        raise InputError(f"{path}: expected labels y from 1 to 10, where 10 is the digit 0; got {y.min()} to {y.max()}")
    chosen = choose(len(y))
    return np.ascontiguousarray(x[..., chosen].transpose(3, 2, 0, 1)), y.reshape(-1)[chosen] % 10, 10
