"""When Auto-PGD halves a sample's step and returns to its best point (Croce & Hein 2020, section 3).

What is counted a sample is a handful of numbers; they are kept on the host, where such steps cost least.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bools = NDArray[np.bool_]
Counts = NDArray[np.void]
"""One record a sample ``(n,)``: its fields are those of :data:`FIELDS`."""

FIELDS = ("step", "best_loss", "last_loss", "rising", "length", "best_at_check", "halved_at_check", "wrong")
_RECORD = np.dtype([(name, np.float64) for name in FIELDS])


def first_counts(eps: Tensor) -> Tensor:
    """The counts of samples that begin, ``(n, fields)`` in float64 on the CPU: no loss seen, step length ``2 eps``."""
    book = torch.zeros((len(eps), len(FIELDS)), dtype=torch.float64)
    counts = counts_of(book)
    counts["best_loss"], counts["last_loss"] = -math.inf, math.inf
    counts["length"] = 2 * eps.cpu().double().numpy()
    counts["halved_at_check"] = 1  # best_at_check is not looked at while this holds
    return book


def counts_of(book: Tensor) -> Counts:
    """The rows of ``book`` ``(n, fields)`` as records; writing to them writes to the tensor."""
    records: Counts = book.numpy().view(_RECORD)[:, 0]
    return records


class Followed(NamedTuple):
    """What one step's losses mean, each ``(n,)``.

    Attributes:
        improved: The points just measured that are the best of their samples so far.
        back: Samples that return to their best point, with half the step.
        fresh: Samples whose first point this was.
        done: Samples that are broken or out of steps.
    """

    improved: Bools
    back: Bools
    fresh: Bools
    done: Bools


@dataclass(frozen=True)
class Schedule:
    """At which steps Auto-PGD may halve a sample's step, and after how few rising losses it does.

    Attributes:
        due: ``(steps + 1,)``: whether there is a checkpoint after that many steps.
        few: ``(steps + 1,)``: at a checkpoint, rho times the steps since the last one.
    """

    due: Bools
    few: NDArray[np.float32]

    @staticmethod
    def of(steps: int, rho: float) -> Schedule:
        """Checkpoints at 0.22 of the steps, then 0.03 closer each time, at least 0.06 apart."""
        first, shrink, smallest = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
        interval, at = np.zeros(steps + 1), first
        while at <= steps:
            interval[at] = first
            first = max(first - shrink, smallest)
            at += first
        return Schedule(interval > 0, (rho * interval).astype(np.float32))

    @property
    def steps(self) -> int:
        """Gradient steps of a sample that is not broken."""
        return len(self.due) - 1

    def follow(self, counts: Counts, losses: NDArray[np.floating], wrong: Bools) -> Followed:
        """Count the losses ``(n,)`` that were measured and go one step on, in place.

        A sample halves its step when at most :attr:`few` losses rose since its last checkpoint, or when neither its
        step nor its best loss has changed since.

        Args:
            counts: Changed in place.
            losses: At the points just measured.
            wrong: Whether those are misclassified: such a sample is done, and does not return.
        """
        step, best, rising = counts["step"].astype(np.int64), counts["best_loss"], counts["rising"]
        improved, fresh, done = losses > best, step == 0, wrong | (step >= self.steps)
        np.copyto(best, losses, where=improved)
        rising += losses > counts["last_loss"]
        counts["last_loss"] = np.where(fresh, 0, losses)  # as the authors' implementation
        counts["wrong"], counts["step"] = wrong, step + 1
        due = self.due[step]
        if not due.any():
            return Followed(improved, due, fresh, done)
        stalled = (counts["best_at_check"] >= best) & (counts["halved_at_check"] == 0)
        halved = due & ((rising <= self.few[step]) | stalled)
        np.copyto(counts["halved_at_check"], halved, where=due)
        np.copyto(counts["best_at_check"], best, where=due)
        np.copyto(rising, 0, where=due)
        back = halved & ~wrong
        counts["length"][back] /= 2
        return Followed(improved, back, fresh, done)
