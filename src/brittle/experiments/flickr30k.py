"""CLIP at the paper's scale: published weights, Flickr30k to fine-tune on, ImageNet's classes in words."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from brittle.errors import InputError, MissingExtra
from brittle.experiments.clip_networks import Pairs
from brittle.models.hugging_face import PREFIX, load_snapshot, snapshot_statistics

ANNOTATIONS, IMAGES = "results_20130124.token", "flickr30k-images"
"""The names that the data set's own archive has, in the folder ``flickr30k`` of the data root."""
TEMPLATE = "a photo of a {}."
Tokens = Callable[[Sequence[str]], Tensor]
"""From texts to ``(n, T)`` numbers."""


def pretrained_clip(folder: Path) -> tuple[nn.Module, Tokens, tuple[Sequence[float], Sequence[float]]]:
    """A CLIP of transformers with its tokenizer and the normalisation of its images.

    Args:
        folder: As ``save_pretrained`` writes model, tokenizer and image processor.

    Raises:
        InputError: The folder does not hold them; nothing is downloaded.
        MissingExtra: transformers is not installed.
    """
    name = f"{PREFIX}{folder}"
    clip, statistics = load_snapshot(name), snapshot_statistics(name)
    if statistics is None:
        raise InputError(f"{folder}: expected preprocessor_config.json with a normalisation; got none")
    try:
        tokenizer: Any = importlib.import_module("transformers").AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: expected a tokenizer; got {error}") from error

    def tokens(texts: Sequence[str]) -> Tensor:
        read: Tensor = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
        return read

    return clip, tokens, statistics


def read_captions(root: Path) -> dict[str, list[str]]:
    """The captions of every image of Flickr30k, by the image's file name.

    Args:
        root: Holds ``results_20130124.token``: a line ``IMAGE.jpg#NUMBER``, a tab and the caption.

    Raises:
        InputError: The file is missing, or a line is not of this form.
    """
    path = root / ANNOTATIONS
    if not path.is_file():
        raise InputError(f"{path}: expected Flickr30k's captions; got nothing there, and nothing is downloaded")
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        image, tab, caption = line.partition("\t")
        file, mark, _ = image.partition("#")
        if not (tab and mark and caption):
            raise InputError(
                f"{path}: expected IMAGE.jpg#NUMBER, a tab and a caption; got {line[:60]!r} in line {number}"
            )
        captions.setdefault(file, []).append(caption.strip())
    return captions


def flickr_pairs(root: Path, tokens: Tokens, size: int, limit: int | None) -> Pairs:
    """Flickr30k's images, read when they are needed, each with its captions.

    Args:
        root: The folder ``flickr30k``.
        tokens: Of the network.
        size: Height and width to which images are brought: the shorter side resized, the centre kept.
        limit: Most images, the first by name; None for all.

    Raises:
        InputError: Captions or images are missing.
    """
    captions = read_captions(root)
    files = sorted(captions)[:limit]
    if absent := [file for file in files if not (root / IMAGES / file).is_file()]:
        raise InputError(f"{root / IMAGES}: expected every image that is captioned; got none called {absent[0]}")
    each = min(len(captions[file]) for file in files)
    texts = [caption for file in files for caption in captions[file][:each]]
    choices = torch.arange(len(texts)).view(len(files), each)

    def take(rows: Tensor, epoch: int) -> Tensor:
        return torch.stack([read_image(root / IMAGES / files[row], size) for row in rows.tolist()])

    return Pairs(take, tokens(texts), choices, torch.arange(len(files)).repeat_interleave(each))


def read_image(path: Path, size: int) -> Tensor:
    """A photograph as ``(3, size, size)`` in [0, 1]: shorter side resized (bicubic, as CLIP has it), centre kept."""
    from PIL import Image

    with Image.open(path, formats=("JPEG", "PNG")) as opened:
        image = opened.convert("RGB")
    scale = size / min(image.size)
    wide, high = (max(size, round(side * scale)) for side in image.size)
    left, top = (wide - size) // 2, (high - size) // 2
    image = image.resize((wide, high), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1).contiguous()


def imagenet_names() -> Sequence[str]:
    """ImageNet's 1000 classes in words, in the order of their WNIDs, from torchvision.

    Raises:
        MissingExtra: torchvision is not installed.
    """
    try:
        models = importlib.import_module("torchvision").models
    except ImportError:
        raise MissingExtra("torchvision", "vision", "ImageNet's classes in words") from None
    names: Sequence[str] = models.ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
    return names
