"""Labelled samples in whatever form they come: tensors, loaders, data sets, iterables of batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from brittle.data.checks import check_dense
from brittle.data.load import OTHER_BUDGETS, Data
from brittle.errors import InputError

DataLike = Data | tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]
"""A :class:`brittle.data.Data`, a pair of tensors, any iterable of batches ``(x, y)`` (a DataLoader), or a Dataset."""


def batches_of(data: DataLike, batch_size: int) -> Iterator[tuple[Tensor, Tensor, int | None]]:
    """Batches ``(x, y, total)`` of whatever form the data come in; the total is None when it is unknown."""
    if batch_size < 1:
        raise InputError(f"batch_size: expected at least 1; got {batch_size}")
    if isinstance(data, Data):
        data = data.inputs, data.labels
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        x, y = data
        assert isinstance(x, Tensor)
        assert isinstance(y, Tensor)
        check_dense(x, "data")
        check_dense(y, "data")
        if len(x) != len(y):
            raise InputError(f"data: expected as many labels as inputs; got {len(x)} inputs and {len(y)} labels")
        for start in range(0, len(x), batch_size):
            yield x[start : start + batch_size], y[start : start + batch_size], len(x)
        return
    if isinstance(data, Dataset):
        data = DataLoader(data, batch_size=batch_size)
    shape, total = None, _known_size(data)
    for batch in data:
        x, y = _read_batch(batch)
        if shape not in (None, x.shape[1:]):
            raise InputError(f"data: expected inputs of one shape, {tuple(shape or ())}; got {tuple(x.shape[1:])}")
        shape = x.shape[1:]
        yield x, y, total


def _known_size(data: Any) -> int | None:
    """Samples that a loader will yield; None where it does not say."""
    source = getattr(data, "dataset", None)
    if isinstance(data, DataLoader) and not isinstance(source, IterableDataset):
        source = data.sampler if data.batch_size else None  # it may take a part only; else batches are made elsewhere
    length = getattr(source, "__len__", None)
    n: int | None = length() if callable(length) else None
    return n - n % data.batch_size if n and getattr(data, "drop_last", False) else n


def _read_batch(batch: object) -> tuple[Tensor, Tensor]:
    """One batch as inputs and labels of equal number."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise InputError(f"data: expected batches (inputs, labels); got {type(batch).__name__}")
    x, y = batch
    if isinstance(x, Tensor):
        check_dense(x, "data")
    if not isinstance(x, Tensor) or x.ndim == 0:
        raise InputError(f"data: expected inputs as a tensor (N, ...); got {type(x).__name__}")
    try:
        y = torch.as_tensor(y)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"data: expected labels as integers (N,); got {type(y).__name__}") from None
    check_dense(y, "data")
    if y.ndim != 1 or len(y) != len(x):
        raise InputError(f"data: expected as many labels as inputs; got {len(x)} inputs and labels {tuple(y.shape)}")
    return x, y


def chunks_of(
    data: DataLike, size: int, batch_size: int, most_bytes: int | None = None
) -> Iterator[tuple[Tensor, Tensor, int | None]]:
    """Chunks ``(x, y, total)`` of exactly ``size`` samples (the last may be smaller), whatever the batches were.

    Args:
        data: Labelled samples, taken as they are asked for.
        size: Samples of a chunk.
        batch_size: Samples that tensors and data sets are read by, and the least size of a chunk.
        most_bytes: Bytes of inputs of a chunk, at most; makes chunks smaller.
    """
    waiting: list[tuple[Tensor, Tensor]] = []
    count, total = 0, None
    for x, y, total in batches_of(data, batch_size):
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
