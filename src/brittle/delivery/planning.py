"""What a compression takes out of a network, known before anything is trained, attacked or written."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from brittle.compression.allocation import CLOSE
from brittle.data import Data
from brittle.data.batches import budgets_by_norm
from brittle.delivery.removed import Removed, Remover, Unreachable, collapsing
from brittle.delivery.removers import REMOVERS
from brittle.delivery.request import Compression
from brittle.delivery.samples import Basis, Parts, split_samples
from brittle.errors import InputError
from brittle.evaluation.accuracy import check_norms
from brittle.models.borrow import device_of, unwrapped
from brittle.models.latency import latency
from brittle.progress import Progress, silent

TIMED_BATCH, TIMED_ROUNDS = 64, 15
"""Samples and rounds of a measurement of latency on the way to a target."""
NEAR_TIME = 0.02
"""How near to the target latency the search ends, as a share of the uncompressed network's."""
MOST_TRIED = 10
"""Networks that the search for a latency measures at most."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What is going to be removed.

    Attributes:
        asked: What was asked.
        original: The user's network; only read.
        removed: The smaller network, not repaired yet, and what went; of a latency, the measured share.
        warnings: What should be known before going on, in sentences.
        parts: Samples to evaluate, to train on, and to look at.
        seconds: That planning took.
    """

    asked: Compression
    original: nn.Module
    removed: Removed
    warnings: tuple[str, ...]
    parts: Parts
    seconds: float


def plan_removal(
    model: nn.Module,
    data: Data,
    asked: Compression = Compression(),
    *,
    training: Data | None = None,
    p: float | Sequence[float] = (math.inf, 2.0),
    eps: float | Mapping[float, float] | None = None,
    progress: Progress = silent,
) -> Plan:
    """Choose what to remove, and take it out of a copy.

    Args:
        model: Network from ``(N, ...)`` to logits; left bit-equal.
        data: Samples to judge networks by.
        asked: What is asked.
        training: Samples to look at and to train on; those that are in ``data`` are left out. None: a part of ``data``,
            at most half, which is not evaluated.
        p: Norms of the budgets, as :func:`brittle.compress`; the planner goes by the first.
        eps: Budgets, as :func:`brittle.compress`.
        progress: Told how far the choice is.

    Raises:
        InputError: The ratio cannot be met (the message says what can), a name in ``keep`` is no layer, nothing can be
            removed, or the smaller network computes something else than the masked one.
    """
    parts = split_samples(data, training, asked.calibration, asked.seed)
    budgets = budgets_by_norm(eps, check_norms(p), data)
    return plans_of(model, parts, asked, budgets, progress=progress)(asked.ratio)


def plans_of(
    model: nn.Module, parts: Parts, asked: Compression, budgets: Mapping[float, float], *, progress: Progress = silent
) -> Callable[[float], Plan]:
    """From a ratio to a plan; what does not depend on the ratio is found once.

    Args:
        model: As :func:`plan_removal`.
        parts: Samples by what they serve for.
        asked: What is asked, whatever the ratio.
        budgets: The attacker's budget by norm; the planner goes by the first.
        progress: As :func:`plan_removal`.

    Raises:
        InputError: As :func:`plan_removal`.
    """
    model, started = unwrapped(model), time.perf_counter()
    x, y = (tensor.to(device_of(model)) for tensor in parts.seen)
    progress("plan", 0, 1)
    basis = Basis(x, y, *next(iter(budgets.items())), progress)
    remove = REMOVERS[asked.remove](model, basis, asked)
    shared = time.perf_counter() - started

    def plan(ratio: float) -> Plan:
        began, wanted = time.perf_counter(), replace(asked, ratio=ratio)
        in_time = asked.target == "latency"
        removed = _meet_latency(model, remove, x, wanted, progress) if in_time else remove(ratio)
        warnings = (*collapsing(removed.cuts, wanted), *_missed(removed.share, wanted))
        progress("plan", 1, 1)
        return Plan(wanted, model, removed, warnings, parts, shared + time.perf_counter() - began)

    return plan


def _meet_latency(model: nn.Module, remove: Remover, x: Tensor, asked: Compression, progress: Progress) -> Removed:
    """The network whose pass over a batch takes the wanted share of the uncompressed network's.

    Networks of other shares of the multiply-accumulates are timed, each side by side with the uncompressed one; next is
    the share at which a line through what was timed meets the wanted one.

    Raises:
        InputError: So little time cannot be met; the message says what was.
    """
    below: tuple[float, float] = (0.0, 0.0)  # shares of the multiply-accumulates, and of the latency
    above: tuple[float, float | None] = (1.0, None)
    nearest: Removed | None = None
    ratio = asked.ratio
    for tried in range(MOST_TRIED):
        progress("latency", tried, MOST_TRIED)
        try:
            removed = remove(ratio)
        except Unreachable:
            above = ratio, None
        else:
            removed = replace(removed, share=_saved_time(model, removed.network, x, asked.ratio))
            if nearest is None or abs(removed.share - asked.ratio) < abs(nearest.share - asked.ratio):
                nearest = removed
            if abs(removed.share - asked.ratio) <= NEAR_TIME:
                break
            if removed.share < asked.ratio:
                below = ratio, removed.share
            else:
                above = ratio, removed.share
        ratio = _where_met(asked.ratio, below, above)
    if nearest is None or nearest.share < asked.ratio - 5 * NEAR_TIME:
        got = "none" if nearest is None else f"{nearest.share:.2f}"
        raise InputError(
            f"ratio: expected a share of the latency that this machine can save, about {got} here; got {asked.ratio:g}"
        )
    return nearest


def _where_met(wanted: float, below: tuple[float, float], above: tuple[float, float | None]) -> float:
    """The share of the multiply-accumulates, between two, where a share of the latency is met if it rises evenly.

    Args:
        wanted: Share of the latency.
        below: Shares of both that are too small.
        above: Likewise too large; where the first of them cannot be, None: the line goes on from 0 through ``below``.
    """
    (low, less), (high, more) = below, above
    if more is None:
        met = low * wanted / less if less > 0 else high
    else:
        met = low + (high - low) * (wanted - less) / (more - less)
    margin = (high - low) / 20
    return met if low + margin <= met <= high - margin else (low + high) / 2


def _saved_time(model: nn.Module, network: nn.Module, x: Tensor, wanted: float) -> float:
    """Share of the uncompressed network's time that a smaller one saves.

    What is near to the wanted share is timed once more, and the mean is taken: it may have come near by chance.
    """
    saved = 1 - _relative_time(model, network, x)
    return saved if abs(saved - wanted) > NEAR_TIME else (saved + 1 - _relative_time(model, network, x)) / 2


def _relative_time(model: nn.Module, network: nn.Module, x: Tensor) -> float:
    rows = latency(
        {"before": model, "after": network}, x.shape[1:], batch_sizes=(TIMED_BATCH,), device=str(x.device),
        rounds=TIMED_ROUNDS,
    )  # fmt: skip
    before, after = (row.median for row in rows)
    return after / before


def _missed(share: float, asked: Compression) -> tuple[str, ...]:
    """A sentence where whole units do not allow what was asked."""
    near = 5 * NEAR_TIME if asked.target == "latency" else CLOSE
    if abs(share - asked.ratio) <= near:
        return ()
    return (
        f"{100 * share:.1f} % of the {asked.target} went, not {100 * asked.ratio:g} %: the nearest to it that "
        f"whole units allow",
    )
