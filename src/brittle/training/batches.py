"""Batches of training samples held in memory; order, crops and mirroring follow from the seed, not from the process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from brittle.random_streams import generator, uniform
from brittle.training.streams import SAMPLE_KEYS, augmentation_block, order_stream


@dataclass(frozen=True, eq=False)
class Batches:
    """Samples in memory, on the device they are trained on.

    Attributes:
        inputs: ``(N, ...)``.
        labels: ``(N,)``.
        size: Samples a batch; the last one of an epoch may hold fewer.
        fewest: A last batch of fewer is left out, unless it is the only one.
        seed: Of everything random.
        crop: Pixels of zero padding from which images ``(N, C, H, W)`` are cropped at a random place.
        flip: Whether every other image is mirrored, at random.
        keys: ``(N,)`` int64: one random number stream a sample, so that its crops do not depend on the batch.
    """

    inputs: Tensor
    labels: Tensor
    size: int
    fewest: int
    seed: int
    crop: int
    flip: bool
    keys: Tensor

    @staticmethod
    def of(
        inputs: Tensor, labels: Tensor, size: int, *, seed: int, fewest: int = 1, crop: int = 0, flip: bool = False
    ) -> Batches:
        """Batches of samples ``(N, ...)``."""
        drawn = torch.randint(2**62, (len(labels),), generator=generator(seed, SAMPLE_KEYS))
        return Batches(inputs, labels, size, fewest, seed, crop, flip, drawn.to(labels.device))

    def __len__(self) -> int:
        """Batches an epoch."""
        whole, rest = divmod(len(self.labels), self.size)
        return max(1, whole + (rest >= self.fewest))

    def order(self, epoch: int) -> tuple[Tensor, ...]:
        """The rows of every batch of an epoch: a permutation drawn from the seed and the epoch."""
        drawn = torch.randperm(len(self.labels), generator=generator(self.seed, order_stream(epoch)))
        return drawn.to(self.labels.device).split(self.size)[: len(self)]

    def take(self, rows: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Inputs, cropped and mirrored for that epoch, and labels of some samples."""
        x, y = self.inputs.index_select(0, rows), self.labels.index_select(0, rows)
        if self.crop or self.flip:
            # Three numbers a sample whatever is asked for, so that crops are the same with and without flips.
            draws = uniform(self.keys[rows], torch.full_like(rows, augmentation_block(epoch)), 3)
            corners, flips = (draws[:, :2] * (2 * self.crop + 1)).long(), draws[:, 2] < 0.5
            x = crop(mirror(x, flips) if self.flip else x, corners, self.crop)
        return x, y


def mirror(x: Tensor, which: Tensor) -> Tensor:
    """Images ``(N, C, H, W)``, those of ``which`` ``(N,)`` mirrored left to right."""
    return torch.where(which[:, None, None, None], x.flip(3), x)


def crop(x: Tensor, corners: Tensor, padding: int) -> Tensor:
    """Windows of the images ``(N, C, H, W)`` padded with zeros, at ``corners`` ``(N, 2)`` of the padded ones."""
    if padding == 0:
        return x
    n, channels, height, width = x.shape
    padded = F.pad(x, [padding] * 4)
    down = corners[:, :1] + torch.arange(height, device=x.device)
    across = corners[:, 1:] + torch.arange(width, device=x.device)
    places = (down[:, :, None] * (width + 2 * padding) + across[:, None, :]).flatten(1)
    taken = padded.flatten(2).gather(2, places[:, None].expand(n, channels, -1))
    return taken.view(n, channels, height, width)
