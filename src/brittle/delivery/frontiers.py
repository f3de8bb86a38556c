"""The frontier: compressed networks of many ratios and allocations, all measured on the same samples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from brittle.auditing.run import lipschitz_result
from brittle.bounds import network_bounds
from brittle.data import Data
from brittle.data.batches import budgets_by_norm
from brittle.delivery.compressing import finish, headline_attacks, request_of
from brittle.delivery.planning import Plan, plans_of
from brittle.delivery.removed import Unreachable
from brittle.delivery.repair import steps_of
from brittle.delivery.request import ALLOCATIONS, Compression, allocations_for
from brittle.delivery.samples import Parts, split_samples
from brittle.errors import InputError
from brittle.evaluation import attack
from brittle.evaluation.accuracy import check_norms
from brittle.evaluation.execution import Execution
from brittle.evaluation.threat import Threat
from brittle.models.borrow import unwrapped
from brittle.models.macs import network_size
from brittle.progress import silent
from brittle.results import CompressionRecipe, Frontier, FrontierRow, NormResult, Signature
from brittle.results.comparison import paired_verdicts
from brittle.storage.digest import digest


@dataclass(frozen=True)
class Ladder:
    """The networks of a frontier.

    Attributes:
        ratios: Shares of the target that go, rising.
        allocations: How much goes where; every ratio is made by each. None for all that there are.
        min_robust: Floor under the robust accuracy in every norm, from 0 to 1; None for none.
        compression: What else is asked; its ``ratio`` and ``allocate`` are not looked at.

    Raises:
        InputError: An attribute is out of range.
    """

    ratios: tuple[float, ...]
    allocations: tuple[str, ...] | None = None
    min_robust: float | None = None
    compression: Compression = Compression()

    def __post_init__(self) -> None:
        inside = [ratio for ratio in self.ratios if 0 < ratio < 1]
        if not inside or list(self.ratios) != sorted(set(inside)):
            raise InputError(f"ratios: expected rising shares above 0 and below 1; got {self.ratios}")
        chosen = ALLOCATIONS if self.allocations is None else self.allocations
        if not chosen or not set(chosen) <= set(ALLOCATIONS):
            raise InputError(f"allocations: expected some of {', '.join(ALLOCATIONS)}; got {self.allocations}")
        if self.min_robust is not None and not 0 <= self.min_robust <= 1:
            raise InputError(f"min_robust: expected a share from 0 to 1; got {self.min_robust}")


@dataclass(frozen=True, eq=False)
class Walk:
    """A frontier that can be found row by row, and whose networks can be made again.

    Attributes:
        model: The user's network; only read.
        parts: Samples by what they serve for.
        ladder: The networks, its allocations filled in.
        threat: The attacks.
        budgets: Budget by norm.
        execution: How the work is carried out.
    """

    model: nn.Module
    parts: Parts
    ladder: Ladder
    threat: Threat
    budgets: Mapping[float, float]
    execution: Execution

    def frontiers(self, before: Frontier | None = None, name: str | None = None) -> Iterator[Frontier]:
        """The frontier after each of its networks; the last is the whole one.

        Args:
            before: What an earlier call had found; its networks are not made again.
            name: What to call the network; its class name by default.

        Raises:
            InputError: ``before`` is of another network, of other data or settings.
        """
        base, signature = self._measure("none", 0.0, self.model, None, None)
        if before is not None and before.signature != signature:
            raise InputError(
                "out: expected an earlier part of the same frontier; got one of other data, settings or networks"
            )
        found = {(row.allocate, row.ratio): row for row in (before.rows if before else ())}
        makers, repair = dict[str, Callable[[float], Plan]](), before.repair if before else ()
        rows: list[FrontierRow] = []
        wanted = [(allocate, ratio) for ratio in self.ladder.ratios for allocate in self.ladder.allocations or ()]
        for number, key in enumerate(wanted):
            (self.execution.progress or silent)("networks", number, len(wanted))
            if key not in found:
                plan = self._plan(makers, *key)
                repair = repair if isinstance(plan, str) else steps_of(plan)
                found[key] = self._row(plan, base, *key)
            rows.append(found[key])
            yield Frontier(
                model=name or type(self.model).__name__,
                asked=replace(request_of(replace(self.ladder.compression, allocate="k_term")), allocate="all"),
                repair=repair,
                base=base,
                rows=tuple(rows),
                min_robust=self.ladder.min_robust,
                signature=signature,
            )

    def make(self, row: FrontierRow) -> tuple[nn.Module, CompressionRecipe]:
        """The network of a row once more, and its recipe: the same by the same seed."""
        return finish(self._plans(row.allocate)(row.ratio), self.execution)

    def _plans(self, allocate: str) -> Callable[[float], Plan]:
        asked, progress = self.ladder.compression, self.execution.progress or silent
        asked = replace(asked, allocate=allocate, score=None if allocate == "planner" else asked.score)
        return plans_of(self.model, self.parts, asked, self.budgets, progress=progress)

    def _plan(self, makers: dict[str, Callable[[float], Plan]], allocate: str, ratio: float) -> Plan | str:
        """What goes at a ratio, or why so much cannot go."""
        if allocate not in makers:
            makers[allocate] = self._plans(allocate)
        try:
            return makers[allocate](ratio)
        except Unreachable as error:
            return str(error)

    def _row(self, plan: Plan | str, base: FrontierRow, allocate: str, ratio: float) -> FrontierRow:
        """One network, made and measured."""
        if isinstance(plan, str):
            return FrontierRow(allocate, ratio, warnings=(plan,))
        network, recipe = finish(plan, self.execution)
        row, _ = self._measure(allocate, ratio, network, base, recipe)
        return row

    def _measure(
        self,
        allocate: str,
        ratio: float,
        network: nn.Module,
        base: FrontierRow | None,
        recipe: CompressionRecipe | None,
    ) -> tuple[FrontierRow, Signature]:
        """Accuracies and certified bounds of a network, beside those of the uncompressed one."""
        started, data = time.perf_counter(), self.parts.evaluated
        attacked = attack(
            network, data, self.threat, p=[*self.budgets], eps=self.budgets, honesty=False, execution=self.execution
        )
        bounds = network_bounds(network, [*self.budgets], input_shape=tuple(data.inputs.shape[1:]))
        norms = tuple(NormResult(e.p, e.eps, lipschitz_result(bounds[e.p]), evaluation=e) for e in attacked.evaluations)
        seconds = {"measuring": time.perf_counter() - started}
        row = FrontierRow(
            allocate=allocate,
            ratio=ratio,
            share=recipe.share if recipe else 0.0,
            size=recipe.after if recipe else network_size(network, data.inputs[:1]),
            norms=norms,
            paired=paired_verdicts(base.norms, norms) if base else (),
            candidate=recipe.candidate if recipe else None,
            warnings=recipe.warnings if recipe else (),
            seconds=(recipe.seconds if recipe else {}) | seconds,
        )
        return row, self._signed(attacked.signature)

    def _signed(self, signature: Signature) -> Signature:
        """The signature of the attacks on a network with all else that the networks depend on."""
        asked, training = self.ladder.compression, self.parts.training
        settings = {
            name: value if isinstance(value, str | int | float | tuple) else str(value)
            for name, value in vars(asked).items()
            if name not in ("ratio", "allocate", "score")
        }
        attacks = tuple(self.threat.names) if not isinstance(self.threat.attacks, str) else self.threat.attacks
        seen = digest({"inputs": training.inputs, "labels": training.labels})
        return replace(
            signature,
            settings=signature.settings | settings | {"score": asked.score_name, "attacks": attacks, "training": seen},
        )


def walk_of(
    model: nn.Module,
    data: Data,
    ladder: Ladder,
    threat: Threat | None = None,
    *,
    training: Data | None = None,
    p: float | Sequence[float] = (math.inf, 2.0),
    eps: float | Mapping[float, float] | None = None,
    execution: Execution = Execution(),
) -> Walk:
    """A frontier to be found row by row; arguments and errors as :func:`frontier`."""
    budgets = budgets_by_norm(eps, check_norms(p), data)
    compression = ladder.compression
    if ladder.allocations is None:
        ladder = replace(ladder, allocations=allocations_for(compression.remove))
    parts = split_samples(data, training, compression.calibration, compression.seed)
    threat = threat or Threat(headline_attacks(data.classes), seed=compression.seed)
    return Walk(unwrapped(model), parts, ladder, threat, budgets, execution)


def frontier(
    model: nn.Module,
    data: Data,
    ladder: Ladder,
    threat: Threat | None = None,
    *,
    training: Data | None = None,
    p: float | Sequence[float] = (math.inf, 2.0),
    eps: float | Mapping[float, float] | None = None,
    execution: Execution = Execution(),
) -> Frontier:
    """Compress a network at many ratios by several allocations, and measure all networks on the same samples.

    Args:
        model: As :func:`brittle.compress`.
        data: As :func:`brittle.compress`.
        ladder: Ratios, allocations, the floor under the robust accuracy, and what else is asked.
        threat: As :func:`brittle.compress`.
        training: As :func:`brittle.compress`.
        p: As :func:`brittle.compress`.
        eps: As :func:`brittle.compress`.
        execution: As :func:`brittle.compress`; without the checks of an audit.

    Returns:
        One row a network; ``smallest`` is the one of which most went above the floor.

    Raises:
        InputError: As :func:`brittle.compress`; a ratio that cannot be met is no error but a row without numbers.
    """
    walk = walk_of(model, data, ladder, threat, training=training, p=p, eps=eps, execution=execution)
    *_, last = walk.frontiers()
    return last
