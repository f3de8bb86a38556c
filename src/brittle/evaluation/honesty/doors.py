"""The checks of an evaluation that keeps no examples: made on the first samples of its data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from brittle.evaluation.execution import Execution
from brittle.evaluation.honesty.checks import honesty_flags
from brittle.evaluation.parts import Outcome, Part
from brittle.evaluation.run import Case
from brittle.evaluation.worst_case import WorstCase
from brittle.models.network import Network
from brittle.results import Flag, NotMeasured

CHECKED = 1024
"""Samples from the start of the data among which the checks look for theirs, at most; of a robustness of 5 % are
left as many survivors as the queries are tried on."""
CHECKED_BYTES = 2**26
"""Bytes of their inputs, at most (and at least one sample)."""


def checked_samples(x: Tensor) -> int:
    """From how many samples the checks choose, given some inputs ``(N, ...)``."""
    return max(1, min(CHECKED, CHECKED_BYTES // max(1, x[0].numel() * x.element_size())))


def split_off(outcomes: Iterable[Sequence[Outcome]], most: int) -> tuple[list[list[Part]], list[WorstCase]]:
    """The parts of every case, chunk by chunk, and of every case the first ``most`` samples under attack."""
    parts: list[list[Part]] = []
    kept: list[list[WorstCase]] = []
    for of_cases in outcomes:
        parts.append([outcome.part for outcome in of_cases])
        before = sum(len(worst.y) for worst in kept[0]) if kept else 0
        for number, outcome in enumerate(of_cases):
            if outcome.worst is not None and before < most:
                kept += [[] for _ in of_cases[len(kept) :]]
                kept[number].append(first_of(outcome.worst, most - before))
    return [list(column) for column in zip(*parts, strict=True)], [WorstCase.joined(some) for some in kept]


def first_of(worst: WorstCase, most: int) -> WorstCase:
    """The first samples alone, in memory of their own; the counts stay."""
    tensors = {name: value[:most].clone() for name, value in vars(worst).items() if isinstance(value, Tensor)}
    return replace(worst, **tensors)  # type: ignore[arg-type]


def flags_of_cases(
    network: Network, cases: Sequence[Case], examples: Sequence[WorstCase], execution: Execution
) -> tuple[list[tuple[Flag, ...]], tuple[NotMeasured, ...]]:
    """The flags of every case, the model's own among them, and the checks that could not be made.

    Args:
        network: Ready, and borrowed.
        cases: Threats and budgets.
        examples: Of every case, some samples under attack.
        execution: Most samples at once.
    """
    flags: list[tuple[Flag, ...]] = []
    missing: list[NotMeasured] = []
    for case, worst in zip(cases, examples, strict=True):
        found, unmade = honesty_flags(
            network, worst.to(network.device), case.threat, case.eps, of_model=not flags, execution=execution
        )
        of_model = tuple(flag for flag in (flags[0] if flags else ()) if flag.p is None)
        flags.append((*of_model, *found))
        missing += [item for item in unmade if not item.name.startswith("flat security curve")]
    return flags, tuple(missing)
