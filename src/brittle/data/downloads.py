"""Downloads of standard data sets, by torchvision and only when asked for."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from brittle.errors import InputError, MissingExtra, one_line

SETS: dict[str, tuple[str, dict[str, dict[str, str]]]] = {
    "mnist": ("MNIST", {"MNIST": {}}),
    "cifar10": ("CIFAR10", {"cifar-10-batches-py": {}}),
    "cifar100": ("CIFAR100", {"cifar-100-python": {}}),
    "svhn": ("SVHN", {"train_32x32.mat": {"split": "train"}, "test_32x32.mat": {"split": "test"}}),
}
"""By spec: torchvision's class and, for each file or folder it leaves in the root, the arguments that fetch it."""


def download(spec: str, root: Path | None) -> None:
    """Put a data set's files, both splits, where :func:`brittle.load_data` with the same ``root`` finds them.

    torchvision fetches them into a folder beside and checks their sums; they are renamed into place when all is
    there, so that an interrupted download leaves no set that looks whole. What is in place already stays as it is
    and is not fetched again.

    Args:
        spec: ``"mnist"``, ``"cifar10"``, ``"cifar100"`` or ``"svhn"``.
        root: The data root, made when it is missing.

    Raises:
        InputError: Another spec, no root, a network or a disk that fails, or files whose sums are wrong.
        MissingExtra: torchvision is not installed.
    """
    if spec not in SETS:
        raise InputError(f"data to download: expected one of {', '.join(SETS)}; got {spec!r}")
    if root is None:
        raise InputError(f"root: expected the folder that is to hold the files of {spec}; got None")
    name, products = SETS[spec]
    root = Path(root)
    missing = [product for product in products if not (root / product).exists()]
    if not missing:
        return
    try:
        from torchvision import datasets
    except ImportError:
        raise MissingExtra("torchvision", "vision", f"downloading {spec}") from None
    try:
        root.mkdir(parents=True, exist_ok=True)
        beside = root / f".{spec}-download"
        shutil.rmtree(beside, ignore_errors=True)  # what a download that was killed left
        beside.mkdir()
        try:
            for product in missing:
                getattr(datasets, name)(str(beside), download=True, **products[product])
            for product in missing:
                os.replace(beside / product, root / product)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except Exception as error:  # torchvision passes on whatever urllib, tarfile, gzip or the disk raise
        message = f"{spec}: expected a download of torchvision.datasets.{name} to {root}; got {one_line(error)}"
        raise InputError(message) from error
