"""Labelled inputs in [0, 1], read from the data sets' standard on-disk layouts; nothing is downloaded."""

from __future__ import annotations

import codecs
import gzip
import io
import math
import pickle
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brittle.errors import InputError
from brittle.inputs import check_batch

Array = NDArray[Any]
Read = tuple[Array, Array, int]
"""What every reader returns: inputs ``(N, ...)`` as stored, labels ``(N,)``, number of classes."""
Choose = Callable[[int], Array]
"""From the number of examples to the indices of those wanted, so that no reader converts what is not used."""

FORMS = "digits, mnist, cifar10, folder:PATH, npz:PATH"
BUDGETS = {"digits": {math.inf: 0.06, 2.0: 0.3}, "mnist": {math.inf: 0.1, 2.0: 1.0}}
"""Attack budgets by norm, in units of inputs in [0, 1]; every other data set has ``OTHER_BUDGETS``."""
OTHER_BUDGETS = {math.inf: 8 / 255, 2.0: 0.5}
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


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
        chosen = torch.from_numpy(_choose(len(self.labels), n, seed)).to(self.labels.device)
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
    * ``folder:PATH``: images ``PATH/class/image.png``, ``(N, C, H, W)``; the classes are the sorted
      subfolders, C is 1 when every image read is greyscale and 3 otherwise.
    * ``npz:PATH``: uint8 or floating inputs ``(N, D)`` or ``(N, C, H, W)`` and integer labels ``(N,)``,
      named ``x_test`` and ``y_test`` (by split), ``x`` and ``y``, ``inputs`` or ``images`` and ``labels``;
      the number of classes is the integer ``classes`` or else the largest label plus one.

    Args:
        spec: One of the forms above.
        root: The data root; a relative PATH is taken from there when it is given.
        split: ``"train"`` or ``"test"``. A folder is one split by itself, as are arrays not named by split.
        limit: At most this many examples, picked as by :meth:`Data.take`; of a folder only they are opened.
        seed: Picks the examples under ``limit``, nothing else.
        image_size: ``(height, width)`` in pixels to which the images of a folder are resized (bilinear).

    Raises:
        InputError: A spec of another form, a missing or broken file, or contents that are no labelled inputs.

    >>> data = load_data("digits", limit=100)
    >>> data.inputs.shape, data.classes
    (torch.Size([100, 1, 8, 8]), 10)
    """
    _check_options(spec, split, image_size)
    choose = partial(_choose, limit=limit, seed=seed)
    match spec.partition(":"):
        case ("digits", "", _):
            x, y, classes = _read_digits(split, choose)
        case ("mnist", "", _):
            x, y, classes = _read_mnist(_rooted(spec, root), split, choose)
        case ("cifar10", "", _):
            x, y, classes = _read_cifar10(_rooted(spec, root), split, choose)
        case ("folder", ":", path) if path:
            x, y, classes = _read_folder(_relative(path, root), image_size, choose)
        case ("npz", ":", path) if path:
            x, y, classes = _read_npz(_relative(path, root), split, choose)
        case _:
            raise InputError(f"data must be one of {FORMS}; got {spec!r}")
    inputs, labels = _scaled(x), torch.from_numpy(y.astype(np.int64))
    try:
        check_batch(inputs, labels, classes=classes)
    except InputError as error:
        raise InputError(f"{spec}: {error}") from error
    return Data(spec, inputs.clamp_(0, 1), labels, classes, dict(BUDGETS.get(spec, OTHER_BUDGETS)))


def _check_options(spec: str, split: str, image_size: tuple[int, int] | None) -> None:
    if split not in ("train", "test"):
        raise InputError(f"split must be 'train' or 'test'; got {split!r}")
    if image_size is not None and not spec.startswith("folder:"):
        raise InputError(f"image_size is for folder:PATH only; got it with data {spec!r}")
    if image_size is not None and (len(image_size) != 2 or min(image_size) < 1):
        raise InputError(f"image_size must be (height, width) in pixels, both at least 1; got {image_size}")


def _choose(n: int, limit: int | None, seed: int) -> Array:
    """Return ``limit`` of the indices 0 ... n-1 in ascending order, or all of them."""
    if limit is not None and limit < 1:
        raise InputError(f"limit (n of take) must be at least 1; got {limit}")
    if limit is None or limit >= n:
        return np.arange(n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return np.sort(order[:limit].numpy())


def _rooted(spec: str, root: Path | None) -> Path:
    if root is None:
        raise InputError(f"data {spec!r} needs root, the folder that holds its files; nothing is downloaded")
    return Path(root)


def _relative(path: str, root: Path | None) -> Path:
    given = Path(path).expanduser()
    return given if root is None else Path(root) / given


def _scaled(x: Array) -> Tensor:
    """Turn stored inputs into float32: bytes are divided by 255, floating values are kept."""
    if x.dtype == np.uint8:
        return torch.from_numpy(x).to(torch.float32).div_(255)
    with np.errstate(over="ignore"):  # an overflow becomes infinite, which check_batch reports
        return torch.from_numpy(x.astype(np.float32))


def _contents(path: Path, expected: str) -> bytes:
    """Read a whole file, unpacking it when it ends in ``.gz``."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except FileNotFoundError:
        raise InputError(f"{path} is missing: expected {expected} there, and nothing is downloaded") from None
    except Exception as error:  # gzip reports damage by four unrelated exceptions
        raise InputError(f"{path} cannot be read as {expected}: {error}") from error


def _read_digits(split: str, choose: Choose) -> Read:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0)).numpy()
    cut = int(0.8 * len(order))
    part = order[:cut] if split == "train" else order[cut:]
    part = part[choose(len(part))]
    return digits.images[part][:, None] / 16, digits.target[part], 10


def _read_mnist(root: Path, split: str, choose: Choose) -> Read:
    stem = root / "MNIST" / "raw" / {"train": "train", "test": "t10k"}[split]
    x, y = _read_idx(Path(f"{stem}-images-idx3-ubyte"), 3), _read_idx(Path(f"{stem}-labels-idx1-ubyte"), 1)
    if len(x) != len(y):
        raise InputError(f"{stem}-* must hold one label for each image; got {len(x)} images, {len(y)} labels")
    chosen = choose(len(x))
    return x[chosen][:, None], y[chosen], 10


def _read_idx(path: Path, axes: int) -> Array:
    """Read an idx file of unsigned bytes, or its ``.gz`` when only that is there."""
    packed = path.with_name(path.name + ".gz")
    path = packed if packed.exists() and not path.exists() else path
    content = _contents(path, f"an idx file of unsigned bytes with {axes} axes")
    start, magic = 4 + 4 * axes, bytes([0, 0, 8, axes])
    if len(content) < start or content[:4] != magic:
        raise InputError(f"{path} must begin with the idx magic {magic.hex()}; got {content[:4].hex() or None}")
    shape = struct.unpack(f">{axes}I", content[4:start])
    if len(content) - start != math.prod(shape):
        held = f"{math.prod(shape)} values and holds {len(content) - start}"
        raise InputError(f"{path} is truncated or corrupt: it announces {held}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _read_cifar10(root: Path, split: str, choose: Choose) -> Read:
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    pickled, binary = root / "cifar-10-batches-py", root / "cifar-10-batches-bin"
    if pickled.is_dir():
        parts = [_read_pickled_batch(pickled / name) for name in names]
    elif binary.is_dir():
        parts = [_read_binary_batch(binary / f"{name}.bin") for name in names]
    else:
        raise InputError(f"{pickled} (or {binary.name} beside it) is missing, and nothing is downloaded")
    x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    chosen = choose(len(x))
    return x[chosen].reshape(-1, 3, 32, 32), y[chosen], 10


def _read_binary_batch(path: Path) -> tuple[Array, Array]:
    content = _contents(path, "a CIFAR-10 batch in the binary version")
    if not content or len(content) % 3073:
        raise InputError(f"{path} must hold records of 3073 bytes and is truncated: {len(content)} bytes")
    records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    return records[:, 1:], records[:, 0].astype(np.int64)


def _read_pickled_batch(path: Path) -> tuple[Array, Array]:
    content = _contents(path, "a CIFAR-10 batch in the Python version")
    try:
        batch = _PlainUnpickler(content).plain()
        x, y = (_plain_array(batch.get(key, batch.get(key.encode()))) for key in ("data", "labels"))
    except Exception as error:  # what a broken pickle raises depends on where it breaks
        raise InputError(f"{path} is not a CIFAR-10 batch of plain arrays: {error}") from error
    fits = x.ndim == 2 and x.shape[1] == 3072 and y.shape == x.shape[:1]
    if x.dtype != np.uint8 or y.dtype.kind not in "iu" or not fits:
        raise InputError(
            f"{path} must hold data (N, 3072) of uint8 and N integer labels; "
            f"got data {x.shape} of {x.dtype}, labels {y.shape} of {y.dtype}"
        )
    return x, y.astype(np.int64)


def _plain_array(value: object) -> Array:
    return value.array if isinstance(value, _StoredArray) else np.asarray(value)


class _StoredType:
    """Stands in for ``numpy.dtype`` in a pickle: a plain number type and its byte order, nothing else."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        name = code.decode("ascii") if isinstance(code, bytes) else str(code)
        if not re.fullmatch(r"[iuf][1248]", name):
            raise InputError(f"an array of {name!r} where numbers were expected")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Sequence[Any]) -> None:
        self.dtype = self.dtype.newbyteorder("big" if state[1] in (">", b">") else "little")


class _StoredArray:
    """Stands in for ``numpy.ndarray`` in a pickle, so that numpy's own unpickling never sees the file."""

    def __init__(self, *_: object) -> None:
        self.array: Array = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[int, tuple[int, ...], _StoredType, bool, bytes]) -> None:
        _, shape, kind, fortran, content = state
        self.array = np.frombuffer(content, kind.dtype).reshape(shape, order="F" if fortran else "C")


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, numbers, strings and arrays of numbers; a pickle that asks for more is refused."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")

    def plain(self) -> dict[object, object]:
        """Return the dict that the pickle holds."""
        value = self.load()
        if not isinstance(value, dict):
            raise InputError(f"expected a dict, got {type(value).__name__}")
        return value

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for one of the few names that a pickled array needs."""
        match module.replace("numpy._core", "numpy.core"), name:
            case ("numpy.core.multiarray", "_reconstruct") | ("numpy", "ndarray"):
                return _StoredArray
            case ("numpy", "dtype"):
                return _StoredType
            case ("_codecs", "encode"):
                return codecs.encode
        raise InputError(f"it asks for {module}.{name}, and code is never unpickled")


def _read_folder(path: Path, image_size: tuple[int, int] | None, choose: Choose) -> Read:
    files, labels, classes = _list_images(path)
    chosen = choose(len(files))
    picked = [files[i] for i in chosen]
    images = [_read_image(file, image_size) for file in picked]
    for file, image in zip(picked, images, strict=True):
        if image.shape[1:] != images[0].shape[1:]:
            raise InputError(
                f"all images must have one size unless image_size is given; {picked[0]} has (height, width) "
                f"{images[0].shape[1:]} and {file} has {image.shape[1:]}"
            )
    shape = (max(len(image) for image in images), *images[0].shape[1:])
    return np.stack([np.broadcast_to(image, shape) for image in images]), labels[chosen], classes


def _list_images(path: Path) -> tuple[list[Path], Array, int]:
    """List the images, class by class and by name, with their labels and the number of classes."""
    if not path.is_dir():
        raise InputError(f"{path} is missing: expected a folder there, and nothing is downloaded")
    folders = sorted(f for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))
    if not folders:
        raise InputError(f"{path} must hold one subfolder of images per class; it has no subfolder")
    files = [sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES) for folder in folders]
    for folder, found in zip(folders, files, strict=True):
        if not found:
            deeper = f"; did you mean folder:{folder}?" if any(f.is_dir() for f in folder.iterdir()) else ""
            raise InputError(f"{folder} must hold images ({', '.join(IMAGE_SUFFIXES)}); it has none{deeper}")
    labels = np.repeat(np.arange(len(folders)), [len(found) for found in files])
    return [file for found in files for file in found], labels, len(folders)


def _read_image(path: Path, image_size: tuple[int, int] | None) -> Array:
    """Read one image as uint8 ``(C, H, W)``: C is 1 for greyscale and 3 for every other kind."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise InputError(f"{path} must have 8 bits per channel; got Pillow's mode {image.mode}")
            plain = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
            if image_size is not None:
                plain = plain.resize(image_size[::-1], Image.Resampling.BILINEAR)
            pixels = np.asarray(plain)
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and others
        raise InputError(f"{path} cannot be read as an image: {error}") from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _read_npz(path: Path, split: str, choose: Choose) -> Read:
    if not path.is_file():
        raise InputError(f"{path} is missing: expected an npz file there, and nothing is downloaded")
    try:
        x, y, classes = _npz_arrays(path, split)
    except InputError:
        raise
    except Exception as error:  # a broken archive raises by what is broken: zip, header, compression, pickle
        raise InputError(f"{path} cannot be read as an npz file of plain arrays: {error}") from error
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise InputError(f"{path}: inputs must be uint8 or floating in [0, 1]; got {x.dtype}")
    if y.dtype.kind not in "iu" or y.ndim != 1 or len(y) == 0:
        raise InputError(f"{path}: labels must be integers (N,), N > 0; got {y.dtype} of shape {y.shape}")
    if x.ndim not in (2, 4) or len(x) != len(y):
        raise InputError(f"{path}: inputs must be (N, D) or (N, C, H, W), with N = {len(y)} labels; got {x.shape}")
    if x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        raise InputError(
            f"{path}: inputs must be (N, C, H, W); the last axis of {x.shape} looks like the channels, "
            "so store x.transpose(0, 3, 1, 2)"
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
            raise InputError(f"{path} must hold one of the pairs {forms}; it holds {', '.join(stored.files)}")
        classes = stored["classes"] if "classes" in stored.files else None
        if classes is not None and (classes.shape != () or classes.dtype.kind not in "iu"):
            raise InputError(f"{path}: classes must be one integer; got {classes.dtype} of shape {classes.shape}")
        return stored[names[0]], stored[names[1]], None if classes is None else int(classes)
