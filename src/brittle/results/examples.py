"""Adversarial examples beside their samples, and the pictures of an audit: arrays of numpy, never in the JSON."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from brittle.storage.files import replacing

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[np.generic]
else:
    Array = Any  # what JSON is read by knows no arrays, and meets none

MOST_BYTES = 2**26
"""Of the file of an audit's pictures, and of all that is in it."""


@dataclass(frozen=True, eq=False, repr=False)
class Examples:
    """Samples and what the attacks made of them: the worst example found of each, checked again on the network.

    Attributes:
        index: Positions in the data ``(N,)``.
        x: Inputs ``(N, ...)``.
        x_adv: Adversarial examples ``(N, ...)``: of those within the budget, the one of smallest margin. The input
            itself where the sample is wrong without attack or proven robust, or where no example lowered the margin.
        label: True classes ``(N,)``.
        clean_prediction: Classes predicted at ``x``, ``(N,)``.
        adversarial_prediction: Classes predicted at ``x_adv``, ``(N,)``.
    """

    index: Array
    x: Array
    x_adv: Array
    label: Array
    clean_prediction: Array
    adversarial_prediction: Array

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        return f"<Examples of {len(self)} samples, each {tuple(self.x.shape[1:])}>"

    def save(self, path: str | Path) -> None:
        """Write all arrays to an ``.npz`` file, whole or not at all; ``numpy.load`` reads it."""
        write_arrays(Path(path), vars(self))


@dataclass(frozen=True, eq=False, repr=False)
class Pictures:
    """What of an audit can be looked at where inputs are images ``(C, H, W)`` of 1 or 3 channels.

    Attributes:
        bounds: Smallest and largest admissible value of a pixel, ``(2,)``.
        norms: Norm of the attack on each of some samples, ``(S,)``: 2 or inf.
        index: Their positions in the data ``(S,)``.
        label: Their true classes ``(S,)``.
        clean_prediction: Classes predicted without attack ``(S,)``.
        adversarial_prediction: Classes predicted on the adversarial examples ``(S,)``.
        x: The samples ``(S, C, H, W)``.
        x_adv: Their adversarial examples ``(S, C, H, W)``.
        layer: Name of the first layer, whose leading right singular vectors are ``directions``; empty without any.
        directions: Unit vectors in what the layer reads ``(K, C, h, w)``, those of the largest gain first: of the whole
            image where the layer is dense, of a filter's patch where it is a convolution. Their signs mean nothing.
        gains: The layer's singular values in these directions ``(K,)``.
        universal: The universal perturbation that fools most, of each norm ``(U, C, H, W)``.
        universal_norms: Their norms ``(U,)``.
    """

    bounds: Array
    norms: Array
    index: Array
    label: Array
    clean_prediction: Array
    adversarial_prediction: Array
    x: Array
    x_adv: Array
    layer: str
    directions: Array
    gains: Array
    universal: Array
    universal_norms: Array

    def __repr__(self) -> str:
        return f"<Pictures of {len(self.index)} samples under attack>"

    def save(self, path: Path, signature: str) -> None:
        """Write all arrays to an ``.npz`` file, with the signature of the audit that they belong to."""
        write_arrays(path, vars(self) | {"signature": signature})

    @staticmethod
    def read(path: Path, signature: str) -> Pictures | None:
        """The pictures that :meth:`save` wrote; None where there is no such file, or one of another audit or origin."""
        arrays = read_arrays(path)
        if str(arrays.pop("signature", None)) != signature or set(arrays) != set(Pictures.__annotations__):
            return None
        layer = str(arrays.pop("layer"))
        pictures = Pictures(layer=layer, **arrays)
        return pictures if pictures._fits() else None

    def _fits(self) -> bool:
        """Whether shapes and types are those of pictures."""
        samples, shape = len(self.index), self.x.shape[1:]
        by_sample = (self.norms, self.index, self.label, self.clean_prediction, self.adversarial_prediction)
        numbers = [value for value in vars(self).values() if not isinstance(value, str)]
        return (
            all(array.dtype.kind in "fi" for array in numbers)
            and all(array.shape == (samples,) for array in by_sample)
            and self.x.shape == self.x_adv.shape == (samples, *shape)
            and all(array.ndim == 4 and array.shape[1] in (1, 3) for array in (self.x, self.directions, self.universal))
            and self.bounds.shape == (2,)
            and self.gains.shape == self.directions.shape[:1]
            and self.universal_norms.shape == self.universal.shape[:1]
        )


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays to an ``.npz`` file, whole or not at all."""
    import numpy as np

    with replacing(path) as beside, beside.open("wb") as file:
        np.savez(file, **arrays)


def read_arrays(path: Path) -> dict[str, Any]:
    """The arrays of an ``.npz`` file; none where there is no such file, or one that is too large or no such file."""
    import numpy as np

    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        return {}
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MOST_BYTES:
                return {}
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError):
        return {}
