"""What the honesty checks look at: samples under attack, and the passes and attacks that a check asks for."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from brittle.attacks import apgd
from brittle.attacks.losses import Loss, loss_and_gradient, margins
from brittle.errors import InputError
from brittle.evaluation.execution import Execution
from brittle.evaluation.threat import Attack, Threat
from brittle.evaluation.worst_case import WorstCase, unchecked_logits, worst_case
from brittle.linear.norms import thin
from brittle.models.forward import logits_of
from brittle.models.network import Network
from brittle.results import Rate, SecurityCurve

SAMPLES = 64
"""Most samples of a check: they tell a share of 5 % from one of 20 %."""
FEWEST_SAMPLES = 8
"""Fewest samples of a check that counts shares. Among three, a single odd one would raise a flag."""
SHORT_STEPS = 15
"""Steps of the short attacks. Attacks that are compared have equal steps, so that their difference is what counts;
within the whole range of the inputs a sound attack needs a few."""


class Judgement(NamedTuple):
    """Whether a check raises its flag, and what was measured, with its number."""

    raised: bool
    finding: str


@dataclass(frozen=True)
class Evidence:
    """What the checks look at, as :func:`brittle.evaluation.honesty_flags` describes it, and what they ask for."""

    network: Network
    worst: WorstCase
    threat: Threat
    eps: float
    curve: SecurityCurve | None
    query_attacks: tuple[tuple[Attack, ...], ...]
    execution: Execution

    @functools.cached_property
    def right(self) -> Tensor:
        """Rows of samples that are right without attack: what is asked about the model."""
        return pick_rows(self.worst.clean_correct, SAMPLES, "are right without attack")

    @functools.cached_property
    def open_rows(self) -> Tensor:
        """Rows of samples that are right and not proven robust: for the others an attack need not be trusted."""
        is_open = self.worst.clean_correct & ~self.worst.proven
        return pick_rows(is_open, SAMPLES, "are right without attack and not proven robust")

    @functools.cached_property
    def broken_by_ce(self) -> Tensor:
        """Which of the open ones the short attack breaks that the others are compared with."""
        return self.broken_soon("ce")

    @functools.cached_property
    def two_passes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of one batch, right or wrong, and the logits of two passes over it."""
        rows = thin(torch.arange(len(self.worst.y)), min(SAMPLES, self.execution.batch_size))
        return rows, self.logits(rows), self.logits(rows)

    def logits(self, rows: Tensor) -> Tensor:
        """The network's answers to the samples ``rows``, ``(n, classes)``."""
        return logits_of(self.network.model, self.worst.x[rows], self.worst.y[rows])

    def margins_at(self, points: Tensor, rows: Tensor) -> Tensor:
        """Margins ``(n,)`` at ``points`` ``(n, ...)`` for the labels of the samples ``rows``."""
        return margins(unchecked_logits(self.network.model, points, self.execution.batch_size), self.worst.y[rows])

    def broken(self, rows: Tensor, attacks: tuple[Attack, ...], eps: float | None = None) -> Tensor:
        """Which of the samples ``rows`` the attacks break within ``eps`` (the budget, by default), ``(n,)``."""
        x, y, ids = self.worst.x[rows], self.worst.y[rows], self.worst.ids[rows.cpu()]
        threat, eps = self.threat.instead(attacks), self.eps if eps is None else eps
        return ~worst_case(self.network, x, y, threat, eps, ids=ids, execution=self.execution).robust_correct

    def broken_soon(self, *losses: str, random_start: bool = True, eps: float | None = None) -> Tensor:
        """Which of the open samples Auto-PGD breaks in :data:`SHORT_STEPS` on any of the losses, ``(n,)``."""
        short = functools.partial(apgd, steps=SHORT_STEPS, random_start=random_start)
        return self.broken(self.open_rows, tuple(functools.partial(short, loss=loss) for loss in losses), eps)

    def differentiate(self, rows: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """A loss at the samples ``rows``, ``(n,)``, and its gradient in the input, ``(n, ...)``."""
        parts = [
            loss_and_gradient(self.network.model, loss, self.worst.x[part], self.worst.y[part])
            for part in rows.split(self.execution.batch_size)
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[2] for part in parts])


def pick_rows(mask: Tensor, most: int, what: str, *, fewest: int = FEWEST_SAMPLES) -> Tensor:
    """Rows of at most so many samples of the mask, spread evenly.

    Raises:
        InputError: There are fewer than ``fewest``.
    """
    rows = mask.nonzero()[:, 0]
    if len(rows) < fewest:
        raise InputError(f"needs {fewest} sample{'s' if fewest > 1 else ''} that {what}; there are {len(rows)}")
    return thin(rows, most)


def count(mask: Tensor) -> Rate:
    """How many samples of the mask ``(N,)``."""
    return Rate(int(mask.sum()), len(mask))
