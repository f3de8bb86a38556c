"""Labelled inputs in [0, 1], read from the data sets' standard on-disk layouts; nothing is downloaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from brittle.data.checks import check_batch
from brittle.data.readers.cifar import read_cifar10, read_cifar100
from brittle.data.readers.contents import Array, Choose, Read
from brittle.data.readers.folders import read_folder, read_imagenet
from brittle.data.readers.mnist import read_mnist
from brittle.data.readers.npz import read_npz
from brittle.data.readers.svhn import read_svhn
from brittle.errors import InputError

FORMS = "digits, mnist, cifar10, cifar100, svhn, imagenet, folder:PATH, npz:PATH"
BUDGETS = {
    "digits": {math.inf: 0.06, 2.0: 0.3},
    "mnist": {math.inf: 0.1, 2.0: 1.0},
    "imagenet": {math.inf: 4 / 255, 2.0: 3.0},
}
"""Attack budgets by norm, in units of inputs in [0, 1]; every other data set has ``OTHER_BUDGETS``."""
OTHER_BUDGETS = {math.inf: 8 / 255, 2.0: 0.5}
MEAN_STD: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "digits": ((0.3049,), (0.3758,)),
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""The usual mean and standard deviation of each channel of the training inputs, in units of inputs in [0, 1]."""
MOST_CLASSES = 2**20
"""A label far above all others is damage, and a network would be given an output for each."""
READERS = {"mnist": read_mnist, "cifar10": read_cifar10, "cifar100": read_cifar100, "svhn": read_svhn}
"""Readers of the sets that lie under the data root by their own names."""


@dataclass(frozen=True, eq=False)
class Data:
    """Labelled inputs of one split.

    Attributes:
        name: The spec it was loaded from.
        inputs: ``(N, ...)``, float32 in [0, 1].
        labels: ``(N,)``, int64 in ``[0, classes)``.
        classes: Number of classes, which a subset may not all contain.
        budgets: Standard attack budget for each norm exponent p (inf and 2), in units of the inputs.
    """

    name: str
    inputs: Tensor
    labels: Tensor
    classes: int
    budgets: dict[float, float]

    def take(self, n: int, seed: int = 0) -> Data:
        """Return ``n`` random examples, none twice, in their original order; all when there are no more.

        The same ``seed`` picks the same examples; the global random state is neither read nor changed.

        Raises:
            InputError: ``n`` is not positive.
        """
        if n >= len(self.labels):
            return self
        chosen = torch.from_numpy(_draw(len(self.labels), n, seed)).to(self.labels.device)
        return replace(self, inputs=self.inputs[chosen], labels=self.labels[chosen])


def load_data(
    spec: str,
    *,
    root: Path | None = None,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    image_size: tuple[int, int] | None = None,
) -> Data:
    """Load labelled inputs, scaled to [0, 1], from files that are already there.

    * ``digits``: scikit-learn's 8 x 8 digits, ``(N, 1, 8, 8)``; one fixed split, 80 % train and 20 % test.
    * ``mnist``: ``root/MNIST/raw/*-ubyte``, also ``.gz``, ``(N, 1, 28, 28)``.
    * ``cifar10``: ``root/cifar-10-batches-py`` or ``root/cifar-10-batches-bin``, ``(N, 3, 32, 32)``.
    * ``cifar100``: ``root/cifar-100-python``, the fine labels, ``(N, 3, 32, 32)``.
    * ``svhn``: ``root/train_32x32.mat`` and ``root/test_32x32.mat``, ``(N, 3, 32, 32)``.
    * ``imagenet``: ``root/train/WNID/*`` and ``root/val/WNID/*`` (the test split), ``(N, 3, 224, 224)``: resized,
      shorter side 256, and cropped to the centre; the classes are the sorted WNIDs. All of it takes far more memory
      than most machines have, so give ``limit``.
    * ``folder:PATH``: images ``PATH/class/image.png``, or ``PATH/train/class/image.png`` and ``PATH/test/...`` or
      ``PATH/val/...``, ``(N, C, H, W)``; the classes are the sorted subfolders, C is 1 when every image read is
      greyscale and 3 otherwise.
    * ``npz:PATH``: uint8 or floating inputs ``(N, D)`` or ``(N, C, H, W)`` and integer labels ``(N,)``,
      named ``x_test`` and ``y_test`` (by split), ``x`` and ``y``, ``inputs`` or ``images`` and ``labels``;
      the number of classes is the integer ``classes`` or else the largest label plus one.

    Args:
        spec: One of the forms above.
        root: The data root; a relative PATH is taken from there when it is given.
        split: ``"train"`` or ``"test"``. A folder without those two inside is one split by itself, as are arrays
            not named by split.
        limit: At most this many examples, picked as by :meth:`Data.take`; of images only they are opened.
        seed: Picks the examples under ``limit``, nothing else.
        image_size: ``(height, width)`` in pixels to which the images of a folder are resized (bilinear), or those of
            ImageNet cropped, the shorter side then being 256/224 of the larger number.

    Raises:
        InputError: A spec of another form, a missing or broken file, contents that are no labelled inputs, or images
            that need more than half of the machine's memory.

    >>> data = load_data("digits", limit=100)
    >>> data.inputs.shape, data.classes
    (torch.Size([100, 1, 8, 8]), 10)
    """
    if split not in ("train", "test"):
        raise InputError(f"split: expected 'train' or 'test'; got {split!r}")
    if image_size is not None and not spec.startswith(("folder:", "imagenet")):
        raise InputError(f"image_size: expected only for imagenet and folder:PATH; got it with data {spec!r}")
    if image_size is not None and (len(image_size) != 2 or min(image_size) < 1):
        raise InputError(f"image_size: expected (height, width) in pixels, both at least 1; got {image_size}")
    choose = partial(_draw, limit=limit, seed=seed)
    match spec.partition(":"):
        case ("digits", "", _):
            x, y, classes = _read_digits(split, choose)
        case ("mnist" | "cifar10" | "cifar100" | "svhn", "", _):
            x, y, classes = READERS[spec](_need_root(spec, root), split, choose)
        case ("imagenet", "", _):
            x, y, classes = read_imagenet(_need_root(spec, root), split, image_size, choose)
        case ("folder", ":", path) if path:
            x, y, classes = read_folder(Path(root or "", Path(path).expanduser()), split, image_size, choose)
        case ("npz", ":", path) if path:
            x, y, classes = read_npz(Path(root or "", Path(path).expanduser()), split, choose)
        case _:
            raise InputError(f"data: expected one of {FORMS}; got {spec!r}")
    if classes > MOST_CLASSES:
        raise InputError(f"{spec}: expected at most {MOST_CLASSES} classes; got {classes}")
    inputs, labels = _scale(x), torch.from_numpy(y.astype(np.int64))
    del x  # before the checks take memory
    try:
        check_batch(inputs, labels, classes=classes)
    except InputError as error:
        raise InputError(f"{spec}: {error}") from error
    return Data(spec, inputs.clamp_(0, 1), labels, classes, dict(BUDGETS.get(spec, OTHER_BUDGETS)))


def statistics_of(data: Data) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, over all examples and positions, in units of the inputs.

    Computed in float64, the deviation with divisor N (not N - 1). A channel that never changes has deviation 1, so
    that :class:`brittle.Normalize` only centres it. ``MEAN_STD`` holds the usual values of the standard sets; take
    the training split to compare.

    Args:
        data: Inputs ``(N, C, ...)``.

    Returns:
        ``mean`` and ``std``, C numbers each.

    >>> mean, std = statistics_of(load_data("digits", split="train"))
    >>> round(mean[0], 4), round(std[0], 4)
    (0.3049, 0.3758)
    """
    x = data.inputs.detach().flatten(2) if data.inputs.ndim > 2 else data.inputs.detach()[..., None]
    parts = x.split(1024)  # in float64 a whole set would take twice its memory
    count = x.shape[0] * x.shape[2]
    mean = torch.stack([part.cpu().double().sum((0, 2)) for part in parts]).sum(0) / count
    centred = (part.cpu().double() - mean[:, None] for part in parts)
    variance = torch.stack([part.square().sum((0, 2)) for part in centred]).sum(0) / count
    varies = (x.amin((0, 2)) < x.amax((0, 2))).cpu()
    return tuple(mean.tolist()), tuple(torch.where(varies, variance.sqrt(), 1.0).tolist())


def _draw(n: int, limit: int | None, seed: int) -> Array:
    """Return ``limit`` of the indices 0 ... n-1 in ascending order, or all of them."""
    if limit is not None and limit < 1:
        raise InputError(f"limit (n of take): expected at least 1; got {limit}")
    if limit is None or limit >= n:
        return np.arange(n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return np.sort(order[:limit].numpy())


def _need_root(spec: str, root: Path | None) -> Path:
    if root is None:
        raise InputError(
            f"root: expected the folder that holds the files of {spec!r}; got None, and nothing is downloaded"
        )
    return Path(root)


def _scale(x: Array) -> Tensor:
    """Turn stored inputs into float32: bytes are divided by 255, floating values are kept."""
    if x.dtype == np.uint8:
        return torch.from_numpy(x).to(torch.float32).div_(255)
    with np.errstate(over="ignore"):  # an overflow becomes infinite, which check_batch reports
        return torch.from_numpy(x.astype(np.float32))


def _read_digits(split: str, choose: Choose) -> Read:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0)).numpy()
    cut = int(0.8 * len(order))
    part = order[:cut] if split == "train" else order[cut:]
    part = part[choose(len(part))]
    return digits.images[part][:, None] / 16, digits.target[part], 10
