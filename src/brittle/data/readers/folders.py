"""Images in one folder per class, and ImageNet, which is stored so."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from brittle.data.readers.contents import BYTES_PER_VALUE, Array, Choose, Read, contents, machine_memory
from brittle.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
CROP, SHORTER_SIDE = 224, 256
"""ImageNet's evaluation: the shorter side is resized to 256 pixels and the centre of 224 x 224 is kept."""
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of what these files may hold; others, whatever they are called, are not opened: some run programs."""
MOST_PIXELS = 2**26
"""Of an image, also while it is resized; 8,192 x 8,192."""


def read_folder(path: Path, split: str, image_size: tuple[int, int] | None, choose: Choose) -> Read:
    """Read ``path/class/image.png``, or ``path/SPLIT/class/image.png`` where ``path`` is divided into splits.

    It is when ``path/train`` and ``path/test`` (or ``path/val``) are both there and hold no images themselves.

    Returns:
        ``(N, C, H, W)`` of uint8: C is 1 when every image read is greyscale and 3 otherwise.

    Raises:
        InputError: Another layout, no common size without ``image_size``, an unreadable image, too little memory.
    """
    for held_out in ("test", "val"):
        parts = path / "train", path / held_out
        if all(part.is_dir() and not _images(part) for part in parts):
            _check_same_classes(*parts)
            path = parts[split == "test"]
            break

    def resize(image: Image) -> Image:
        from PIL.Image import Resampling

        if image_size is None:
            return image
        _check_pixels("image_size", image_size)
        return image.resize(image_size[::-1], Resampling.BILINEAR)

    return _read(path, choose, resize, grey=True)


def read_imagenet(root: Path, split: str, image_size: tuple[int, int] | None, choose: Choose) -> Read:
    """Read ``root/train/WNID/*.JPEG`` or ``root/val/WNID/*.JPEG``; the classes are the sorted WNIDs.

    The shorter side is resized to 256 pixels (bilinear) and the centre of 224 x 224 is kept, or, for another
    ``image_size`` (height, width), the shorter side to 256/224 of its larger number.

    Returns:
        ``(N, 3, H, W)`` of uint8.

    Raises:
        InputError: Another layout, an unreadable image, too little memory.
    """
    parts = root / "train", root / "val"
    if all(part.is_dir() for part in parts):
        _check_same_classes(*parts)
    height, width = image_size or (CROP, CROP)

    def crop_centre(image: Image) -> Image:
        from PIL.Image import Resampling

        # With torchvision's rounding.
        shorter = round(max(height, width) * SHORTER_SIDE / CROP)
        longer = int(shorter * max(image.size) / min(image.size))
        wide, high = (shorter, longer) if image.width <= image.height else (longer, shorter)
        _check_pixels("image, resized to be cropped", (wide, high))
        left, top = round((wide - width) / 2), round((high - height) / 2)
        return image.resize((wide, high), Resampling.BILINEAR).crop((left, top, left + width, top + height))

    return _read(parts[split == "test"], choose, crop_centre, grey=False)


def _read(path: Path, choose: Choose, fit: Callable[[Image], Image], *, grey: bool) -> Read:
    files, labels, classes = _list_images(path)
    chosen = choose(len(files))
    picked = [files[i] for i in chosen]
    first = _read_image(picked[0], fit, grey)
    _check_memory(path, len(picked), first.shape)
    images = [first, *(_read_image(file, fit, grey) for file in picked[1:])]
    for file, image in zip(picked, images, strict=True):
        if image.shape[1:] != first.shape[1:]:
            raise InputError(
                f"{path}: expected images of one size, or image_size; got (height, width) {first.shape[1:]} in "
                f"{picked[0]} and {image.shape[1:]} in {file}"
            )
    x = np.empty((len(images), max(len(image) for image in images), *first.shape[1:]), np.uint8)
    for i, image in enumerate(images):
        x[i] = image
    return x, labels[chosen], classes


def _list_images(path: Path) -> tuple[list[Path], Array, int]:
    """List the images, class by class and by name, with their labels and the number of classes."""
    if not path.is_dir():
        raise InputError(f"{path}: expected a folder; got nothing there, and nothing is downloaded")
    folders = _subfolders(path)
    if not folders:
        raise InputError(f"{path}: expected one subfolder of images per class; got no subfolder")
    files = [_images(folder) for folder in folders]
    for folder, images in zip(folders, files, strict=True):
        if not images:
            deeper = f"; did you mean folder:{folder}?" if any(f.is_dir() for f in folder.iterdir()) else ""
            raise InputError(f"{folder}: expected images ({', '.join(IMAGE_SUFFIXES)}); got none{deeper}")
    labels = np.repeat(np.arange(len(folders)), [len(images) for images in files])
    return [image for images in files for image in images], labels, len(folders)


def _subfolders(path: Path) -> list[Path]:
    return sorted(f for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())


def _check_same_classes(train: Path, held_out: Path) -> None:
    one, other = ({folder.name for folder in _subfolders(part)} for part in (train, held_out))
    if one != other:
        raise InputError(
            f"{train} and {held_out}: expected the same classes, which are numbered by name; "
            f"got only in one of them {', '.join(sorted(one ^ other)[:5])}"
        )


def _check_memory(path: Path, n: int, shape: Sequence[int]) -> None:
    """Refuse to read more than half of the machine's memory, before it is done."""
    needed, memory = BYTES_PER_VALUE * n * int(np.prod(shape)), machine_memory()
    if memory is not None and needed > memory / 2:
        raise InputError(
            f"{path}: expected images that need at most half of this machine's {memory / 1e9:.1f} GB of memory; "
            f"got {n} images of (channels, height, width) {tuple(shape)}, {needed / 1e9:.1f} GB; give limit, at most "
            f"{max(1, int(n * memory / 2 / needed))}"
        )


def _read_image(path: Path, fit: Callable[[Image], Image], grey: bool) -> Array:
    """Read one image as uint8 ``(C, H, W)``: C is 1 for greyscale where ``grey`` allows it and 3 otherwise."""
    from PIL import Image

    content = contents(path, "an image")  # of an open file Pillow would ask for as much as a damaged length says
    try:
        with warnings.catch_warnings():  # of damage that is harmless, and of sizes, which are looked at here
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                _check_pixels(str(path), image.size)
                if image.mode[0] in "IF":
                    raise InputError(f"{path}: expected 8 bits per channel; got Pillow's mode {image.mode}")
                pixels = np.asarray(fit(image.convert("L" if grey and image.mode in ("1", "L", "LA") else "RGB")))
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and others
        raise InputError(f"{path}: expected an image; reading it failed: {error}") from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _check_pixels(what: str, size: tuple[int, int]) -> None:
    """Refuse an image that would be too large in memory, before it is unpacked or resized."""
    if size[0] * size[1] > MOST_PIXELS:
        raise InputError(f"{what}: expected at most {MOST_PIXELS} pixels; got {size[0]} x {size[1]}")
