"""Images of an audit for its page: samples, perturbations, attacked samples and directions, as PNGs in the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from PIL import Image

from brittle.results import Audit, Pictures
from brittle.results.wording import norm_name, number, printable

Pixels: TypeAlias = npt.NDArray[Any]

SIGNED = "RdBu_r"
"""Colours of what has signs, on one channel: blue below zero, white at zero, red above. Of three, zero is grey."""


@dataclass(frozen=True)
class Picture:
    """One image of the page.

    Attributes:
        png: The image, as a ``data:`` address.
        caption: What stands below it.
        alternative: What it shows, for those who cannot see it.
    """

    png: str
    caption: str
    alternative: str


@dataclass(frozen=True)
class Row:
    """Images that belong together.

    Attributes:
        title: What they are of.
        pictures: In their order.
    """

    title: str
    pictures: tuple[Picture, ...]


def attacked_rows(audit: Audit) -> dict[float, list[Row]]:
    """By norm, the samples that can be shown: image, perturbation, attacked image."""
    pictures = audit.pictures
    if pictures is None:
        return {}
    norms = [norm.p for norm in audit.norms]
    rows = {p: [_attacked_row(pictures, int(i)) for i in np.flatnonzero(pictures.norms == p)] for p in norms}
    return {p: found for p, found in rows.items() if found}


def _attacked_row(pictures: Pictures, i: int) -> Row:
    low, high = map(float, pictures.bounds)
    before, after, label = (
        int(part[i]) for part in (pictures.clean_prediction, pictures.adversarial_prediction, pictures.label)
    )
    change = pictures.x_adv[i] - pictures.x[i]
    largest = float(np.abs(change).max()) or 1.0
    factor = 0.5 * (high - low) / largest
    outcome = f"is taken for {after}" if after != before else f"is still taken for {after}"
    scale = f"perturbation × {number(factor)}"
    shown = (
        Picture(_png(_plain(pictures.x[i], low, high)), f"taken for {before}", f"sample of class {label}"),
        Picture(_png(_signed(change, largest)), scale, f"perturbation, {number(factor)} times enlarged"),
        Picture(_png(_plain(pictures.x_adv[i], low, high)), outcome, f"the sample under attack, which {outcome}"),
    )
    return Row(f"Sample {int(pictures.index[i])}, class {label}", shown)


def direction_pictures(audit: Audit) -> list[Picture]:
    """The leading right singular vectors of the first layer, each over its largest entry."""
    pictures = audit.pictures
    if pictures is None:
        return []
    name = printable(pictures.layer)
    return [
        Picture(_png(_signed(v, float(np.abs(v).max()) or 1.0)), f"gain {number(float(gain))}", f"direction of {name}")
        for v, gain in zip(pictures.directions, pictures.gains, strict=True)
    ]


def universal_pictures(audit: Audit) -> list[Picture]:
    """The universal perturbations that fool most, norm by norm, each over its largest entry."""
    return list(_universal(audit))


def _universal(audit: Audit) -> Iterator[Picture]:
    pictures = audit.pictures
    for norm in audit.norms:
        for u, p in zip(*(pictures.universal, pictures.universal_norms) if pictures else ((), ()), strict=True):
            best = norm.best_universal
            if p == norm.p and best is not None:
                largest = float(np.abs(u).max()) or 1.0
                caption = f"{norm_name(norm.p)}, changes {best.fooled.percent} of the predictions"
                yield Picture(_png(_signed(u, largest)), caption, f"universal perturbation in {norm_name(norm.p)}")


def _plain(image: Pixels, low: float, high: float) -> Pixels:
    """``(C, H, W)`` within the bounds to 8 bit ``(H, W)`` or ``(H, W, 3)``."""
    grey = np.clip((np.nan_to_num(image) - low) / (high - low or 1.0), 0, 1).transpose(1, 2, 0)
    return np.round(255 * (grey[..., 0] if grey.shape[2] == 1 else grey)).astype(np.uint8)


def _signed(image: Pixels, largest: float) -> Pixels:
    """``(C, H, W)`` between plus and minus ``largest`` to 8 bit ``(H, W, 3)``, zero in the middle of the colours."""
    shares = np.clip(0.5 + 0.5 * np.nan_to_num(image) / largest, 0, 1).transpose(1, 2, 0)
    coloured = colormaps[SIGNED](shares[..., 0])[..., :3] if shares.shape[2] == 1 else shares
    return np.round(255 * coloured).astype(np.uint8)


def _png(pixels: Pixels) -> str:
    """An image as an address that holds it; small ones are enlarged without blurring by the page."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", optimize=False)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
