"""Once queries break what gradients left, the evaluation goes on with queries on all survivors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch

from brittle.evaluation.curves import security_curve
from brittle.evaluation.execution import Execution
from brittle.evaluation.honesty.checks import BY_QUERIES, default_queries
from brittle.evaluation.parts import Part
from brittle.evaluation.run import Case, sample_results
from brittle.evaluation.worst_case import WorstCase, go_on
from brittle.models.network import Network
from brittle.results import Flag


def go_on_with_queries(
    network: Network,
    case: Case,
    parts: Sequence[Part],
    worst: WorstCase,
    flags: Sequence[Flag],
    *,
    execution: Execution = Execution(),
) -> tuple[Case, list[Part], WorstCase]:
    """Attack all survivors by queries where a check found that some fall to them; else return what was given.

    The check asks 32 survivors. Once its flag is raised, the attacks that raised it run on every survivor whose example
    is at hand, after the threat's further attacks, and so they do at every other budget of the curve.

    Args:
        network: The network, ready.
        case: Threat and budget.
        parts: What the attacks gave, over all data.
        worst: The examples of the first of these parts, of all of them as a rule.
        flags: What the checks say about it.
        execution: Samples at once.

    Returns:
        The case, whose threat names the attacks, the parts and the examples.
    """
    threat = case.threat
    if not any(flag.raised and flag.name == BY_QUERIES and flag.p == threat.p for flag in flags):
        return case, list(parts), worst
    queries = itertools.chain.from_iterable(default_queries(worst, threat))
    threat = replace(threat, further=(*threat.further, *queries))
    case, quiet = replace(case, threat=threat), replace(execution, progress=None)
    changed, pieces = [], []
    for part in parts:
        if part.first < len(worst.y):
            piece = worst.between(part.first, part.first + len(part.samples))
            part, piece = _go_on(network, case, part, piece, quiet)
            pieces.append(piece)
        changed.append(part)
    return case, changed, WorstCase.joined(pieces)


def _go_on(network: Network, case: Case, part: Part, worst: WorstCase, execution: Execution) -> tuple[Part, WorstCase]:
    """One part and its examples once all survivors have been attacked further."""
    later = go_on(network, worst, case.threat, case.eps, execution=execution)
    known = [sample.certified_radius for sample in part.samples]
    radii = None if None in known else torch.tensor(known, dtype=torch.float64, device=network.device)
    changes = {name: getattr(part, name) + getattr(later, name) for name in ("rejected", "forwards", "backwards")}
    if case.curve:
        all_of_them = case.threat.instead([*case.threat.battery, *case.threat.further])
        curve = security_curve(
            network, later, all_of_them, at=case.eps, budgets=case.curve, radii=radii, execution=execution
        )
        changes["survivors"] = tuple(rate.hits for rate in curve.robust)
    measured = torch.tensor([sample.measured for sample in part.samples], device=network.device)
    samples = sample_results(later, case.threat, part.first, radii, measured)
    return replace(part, samples=samples, misled=int(later.misled.sum()), **changes), later
