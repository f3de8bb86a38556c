"""Labelled samples in whatever form they come: tensors, loaders, data sets, iterables of batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from brittle.data.checks import check_dense
from brittle.data.load import OTHER_BUDGETS, Data
from brittle.errors import InputError

Array = Tensor | NDArray[Any]
Pair = tuple[Array, Array]
DataLike = Data | Pair | Mapping[str, Any] | Iterable[Pair] | Iterable[Mapping[str, Any]]
"""A :class:`brittle.data.Data`, a pair of tensors or arrays, a dictionary of them, any iterable of such batches (a
DataLoader), or a Dataset, of torch or of Hugging Face's datasets."""
INPUTS = ("pixel_values", "images", "image", "img", "inputs", "input", "x")
LABELS = ("labels", "label", "targets", "target", "y", "fine_label")
"""Names under which dictionaries hold inputs and labels; the first that is there counts."""
Tell = Callable[[str], None]
"""Told once how batches were read, where they are no pairs."""


def batches_of(
    data: DataLike, batch_size: int, tell: Tell | None = None
) -> Iterator[tuple[Tensor, Tensor, int | None]]:
    """Batches ``(x, y, total)`` of whatever form the data come in; the total is None when it is unknown.

    This is the one place where batches are read: pairs, or dictionaries with a name of ``INPUTS`` and one of
    ``LABELS``. Arrays of NumPy become tensors, of float64, which is NumPy's own default, single ones.

    Args:
        data: Labelled samples.
        batch_size: Samples that tensors and data sets are read by, at least 1.
        tell: Told once, before the first batch, how dictionaries are read.

    Raises:
        InputError: The data are of none of these forms.
    """
    if batch_size < 1:
        raise InputError(f"batch_size: expected at least 1; got {batch_size}")
    if isinstance(data, Data):
        data = data.inputs, data.labels
    if isinstance(data, Mapping) or _is_pair(data):
        x, y = _read_batch(data, tell)
        for start in range(0, len(x), batch_size):
            yield x[start : start + batch_size], y[start : start + batch_size], len(x)
        return
    if isinstance(data, Dataset) or hasattr(data, "__getitems__"):  # as data sets of Hugging Face have it
        data = DataLoader(data, batch_size=batch_size)  # type: ignore[arg-type]
    shape, total = None, _known_size(data)
    for batch in _together(data):
        x, y = _read_batch(batch, tell if shape is None else None)
        if shape not in (None, x.shape[1:]):
            raise InputError(f"data: expected inputs of one shape, {tuple(shape or ())}; got {tuple(x.shape[1:])}")
        shape = x.shape[1:]
        yield x, y, total


def _is_pair(data: object) -> bool:
    """Whether data are inputs and labels as a whole, and no sequence of batches."""
    return isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor | np.ndarray)


def _together(data: Any) -> Iterator[object]:
    """The batches of a loader or another iterable, with what torch says of samples that make no batch in our words."""
    try:
        yield from data
    except TypeError as error:
        if not isinstance(data, DataLoader) or "collate" not in str(error):
            raise
        reason = "samples that are no tensors: give the data set a transform, as torchvision.transforms.ToTensor()"
        raise InputError(f"data: expected samples that torch can put in a batch; got {reason}") from error


def _known_size(data: Any) -> int | None:
    """Samples that a loader will yield; None where it does not say."""
    source = getattr(data, "dataset", None)
    if isinstance(data, DataLoader) and not isinstance(source, IterableDataset):
        source = data.sampler if data.batch_size else None  # it may take a part only; else batches are made elsewhere
    length = getattr(source, "__len__", None)
    n: int | None = length() if callable(length) else None
    return n - n % data.batch_size if n and getattr(data, "drop_last", False) else n


def _read_batch(batch: object, tell: Tell | None = None) -> tuple[Tensor, Tensor]:
    """One batch as inputs and labels of equal number."""
    if isinstance(batch, Mapping):
        names = [next((name for name in known if name in batch), None) for known in (INPUTS, LABELS)]
        if None in names:
            expected = f"one of {', '.join(INPUTS)} and one of {', '.join(LABELS)}"
            raise InputError(f"data: expected dictionaries with {expected}; got {', '.join(map(str, batch))}")
        if tell is not None:
            tell(f"dictionaries: {names[0]} as inputs, {names[1]} as labels")
        batch = batch[names[0]], batch[names[1]]
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        got = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
        raise InputError(f"data: expected batches (inputs, labels); got {got}")
    x, y = batch
    x = _tensor(x)
    if isinstance(x, Tensor):
        check_dense(x, "data")
    if not isinstance(x, Tensor) or x.ndim == 0:
        remedy = '; a data set of Hugging Face needs .with_format("torch")' if isinstance(x, list) else ""
        raise InputError(f"data: expected inputs as a tensor (N, ...); got {type(x).__name__}{remedy}")
    try:
        y = torch.as_tensor(y)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"data: expected labels as integers (N,); got {type(y).__name__}") from None
    check_dense(y, "data")
    if y.ndim != 1 or len(y) != len(x):
        got = f"{len(y)} labels" if y.ndim == 1 else f"labels {tuple(y.shape)}"
        raise InputError(f"data: expected as many labels as inputs; got {len(x)} inputs and {got}")
    return x, y


def _tensor(x: object) -> object:
    """An array as a tensor, in single precision where it has NumPy's default type; anything else as it is."""
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "fiub":
        return x
    native = np.dtype(np.float32) if x.dtype == np.float64 else x.dtype.newbyteorder("=")
    return torch.as_tensor(np.require(x, native, ["C", "W"]))


def chunks_of(
    data: DataLike, size: int, batch_size: int, most_bytes: int | None = None, tell: Tell | None = None
) -> Iterator[tuple[Tensor, Tensor, int | None]]:
    """Chunks ``(x, y, total)`` of exactly ``size`` samples (the last may be smaller), whatever the batches were.

    Args:
        data: Labelled samples, taken as they are asked for.
        size: Samples of a chunk.
        batch_size: Samples that tensors and data sets are read by, and the least size of a chunk.
        most_bytes: Bytes of inputs of a chunk, at most; makes chunks smaller.
        tell: As :func:`batches_of`.
    """
    waiting: list[tuple[Tensor, Tensor]] = []
    count, total = 0, None
    for x, y, total in batches_of(data, batch_size, tell):
        if most_bytes is not None and len(x):
            size = min(size, max(batch_size, most_bytes // max(1, x[0].numel() * x.element_size())))
        waiting.append((x, y))
        count += len(x)
        if count >= size:
            xs, ys = torch.cat([x for x, _ in waiting]), torch.cat([y for _, y in waiting])
            whole = count - count % size
            for start in range(0, whole, size):
                yield xs[start : start + size], ys[start : start + size], total
            count -= whole
            waiting = [(xs[whole:].clone(), ys[whole:].clone())] if count else []
    if count:
        yield torch.cat([x for x, _ in waiting]), torch.cat([y for _, y in waiting]), total


def budgets_by_norm(
    eps: float | Mapping[float, float] | None, norms: Sequence[float], data: DataLike | None
) -> dict[float, float]:
    """One budget for every norm: the given one, else the data set's own, else 8/255 (inf) and 0.5 (2).

    Args:
        eps: Budget for every norm, or by norm; None for standard ones.
        norms: 2, inf or both.
        data: Where standard budgets are looked up.

    Raises:
        InputError: A budget is not above 0 and finite, or belongs to another norm.
    """
    standard = data.budgets if isinstance(data, Data) else OTHER_BUDGETS
    given = dict(eps) if isinstance(eps, Mapping) else {} if eps is None else dict.fromkeys(norms, eps)
    if unknown := [q for q in given if q not in norms]:
        raise InputError(f"eps: expected budgets for p in {norms}; got one for {unknown[0]!r}")
    budgets = {q: float(given.get(q, standard.get(q, OTHER_BUDGETS[q]))) for q in norms}
    for q, budget in budgets.items():
        if not 0 < budget < math.inf:
            raise InputError(f"eps: expected a finite number above 0 for l_{q:g}; got {budget}")
    return budgets
