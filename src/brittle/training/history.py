"""What a training reports: moments while it runs, one row an epoch, and one a layer where layers are measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from brittle.bounds.graph.read import read_graph
from brittle.bounds.layer_table import measure_layer
from brittle.bounds.lipschitz.product import own_factors, product_bound
from brittle.models.layers import read_layers
from brittle.models.trace import NoRule
from brittle.results import FRACTIONS
from brittle.storage.files import replacing

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class EpochRow:
    """One epoch.

    Attributes:
        epoch: From 1.
        steps: Optimiser steps so far.
        lr: Learning rate of its last step.
        loss: Mean cross-entropy over the training samples as they were used (attacked, cropped), in nats.
        penalty: Mean of the penalties with their strengths.
        accuracy: Share of these that were right.
        validation_loss: Mean cross-entropy of the validation samples; None without.
        validation_accuracy: Share of them that is right; None without.
        validation_robust: Share of them that is right and stays right under the training attack, of a universal
            adversary under its perturbation as it stands (an upper bound of the robust accuracy: the attack is weak);
            None without an adversary.
        seconds: Of the epoch, validation and measurement included.
        samples_per_second: Of its steps.
        drift: Relative error of the reused nuclear gradient when it was last renewed,
            ``||P_old - P_new||_F / ||P_new||_F``; None without reuse.
        lipschitz_inf: Product of norms: certified upper bound of the network's constant from l_inf to l_inf; None
            where not measured.
        lipschitz_2: Likewise in l_2.
    """

    epoch: int
    steps: int
    lr: float
    loss: float
    penalty: float
    accuracy: float
    validation_loss: float | None
    validation_accuracy: float | None
    validation_robust: float | None
    seconds: float
    samples_per_second: float
    drift: float | None = None
    lipschitz_inf: float | None = None
    lipschitz_2: float | None = None


@dataclass(frozen=True)
class LayerRow:
    """One layer after an epoch; all numbers as the audit's (theory page, "Compressibility").

    Attributes:
        epoch: From 1.
        layer: Its name.
        row_error: Relative k-term error of the row norms, the largest tenth kept.
        spectral_error: Likewise of the singular values.
        row_spread: Spread of the largest tenth of the row norms.
        spectral_spread: Likewise of the singular values.
        rank: Numerical rank.
        stable_rank: Squared Frobenius over squared spectral norm.
        frobenius: Frobenius norm.
        norm_inf: Largest l_1 norm of a row (exact l_inf norm of the matrix).
        norm_2: Largest singular value (exact l_2 norm of the matrix).
    """

    epoch: int
    layer: str
    row_error: float
    spectral_error: float
    row_spread: float
    spectral_spread: float
    rank: int
    stable_rank: float
    frobenius: float
    norm_inf: float
    norm_2: float


@dataclass(frozen=True)
class Moment:
    """How far a training is.

    Attributes:
        epoch: The current one, from 1.
        epochs: At most.
        step: Steps of this epoch that are done.
        steps: Steps an epoch.
        loss: Mean training loss of this epoch so far, in nats.
        accuracy: Share of its samples that were right, as they were used.
        samples_per_second: Training samples.
        row: The epoch's row, once it is over.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float
    samples_per_second: float
    row: EpochRow | None = None


Callback = Callable[[Moment], None]
"""Called a few times a second and at the end of every epoch; what it raises ends the training."""


def measure_layers(model: nn.Module, epoch: int) -> list[LayerRow]:
    """One row for every layer that has a matrix."""
    tenth = FRACTIONS.index(0.10)
    return [
        LayerRow(
            epoch=epoch,
            layer=layer.name,
            row_error=layer.row_error[tenth],
            spectral_error=layer.spectral_error[tenth],
            row_spread=layer.row_spread[tenth],
            spectral_spread=layer.spectral_spread[tenth],
            rank=layer.rank,
            stable_rank=layer.stable_rank,
            frobenius=layer.frobenius,
            norm_inf=layer.filter_norm_inf,
            norm_2=layer.filter_norm_2,
        )
        for layer in (measure_layer(view, ()) for view in read_layers(model).views)
    ]


def lipschitz_products(model: nn.Module, shape: Sequence[int]) -> dict[str, float | None]:
    """The product of operator norms of a network in evaluation mode (certified upper bound), in both norms.

    The audit's bounds are sharper, and cost far more.

    Args:
        model: The network.
        shape: Of one input.

    Returns:
        ``lipschitz_inf`` and ``lipschitz_2``; None where no sound rule covers the network.
    """
    products: dict[str, float | None] = {"lipschitz_inf": None, "lipschitz_2": None}
    with suppress(NoRule):
        ops = read_graph(model, shape)
        for name, p in (("lipschitz_inf", math.inf), ("lipschitz_2", 2.0)):
            with suppress(NoRule):
                # The factor is more than the product of float64 norms can lose by rounding.
                upper = product_bound(ops, own_factors(ops, p), p) * (1 + 1e-6)
                products[name] = upper if math.isfinite(upper) else None
    return products


def frame(rows: Iterable[EpochRow | LayerRow]) -> pd.DataFrame:
    """The rows as a table."""
    import pandas as pd

    return pd.DataFrame([dataclasses.asdict(row) for row in rows])


def write_history(folder: Path, epochs: Sequence[EpochRow], layers: Sequence[LayerRow]) -> None:
    """``history`` and ``layers`` as CSV and as Parquet, each whole or not at all."""
    for name, rows in (("history", epochs), ("layers", layers)):
        if not rows:  # an empty table is none; one of an earlier training would be taken for this one's
            for kind in ("csv", "parquet"):
                (folder / f"{name}.{kind}").unlink(missing_ok=True)
            continue
        table = frame(rows)
        with replacing(folder / f"{name}.csv") as beside:
            table.to_csv(beside, index=False)
        with replacing(folder / f"{name}.parquet") as beside:
            table.to_parquet(beside, index=False)
