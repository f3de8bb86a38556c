"""Signs that a robust accuracy must not be trusted: masked gradients, randomness, outputs that are no logits.

Robust accuracy is an upper estimate, and a network whose gradients are hidden looks robust to whoever follows them
(Athalye et al. 2018; Carlini et al. 2019). Every one of the :data:`CHECKS` looks for one sign of it on a few samples:
it takes the passes and attacks that it needs from the :class:`Evidence`, and a function without a network judges what
came out. No flag raised proves nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from brittle.attacks import square
from brittle.attacks.decision_search import boundary_walk
from brittle.attacks.losses import cross_entropy, margins
from brittle.errors import InputError
from brittle.evaluation.execution import Execution
from brittle.evaluation.honesty.answers import (
    ask_alone,
    cross_decisions,
    different_answers,
    probabilities,
    zero_gradients,
)
from brittle.evaluation.honesty.evidence import Evidence, Judgement
from brittle.evaluation.honesty.gradients import (
    attack_whole_range,
    fell_later,
    follow_curve,
    loss_gap,
    start_gap,
    take_differences,
)
from brittle.evaluation.honesty.queries import attack_by_queries
from brittle.evaluation.threat import Attack, Threat, for_classes, unbind
from brittle.evaluation.worst_case import WorstCase
from brittle.linear.norms import thin
from brittle.models.borrow import Model
from brittle.models.network import Network, borrowed
from brittle.results import Flag, NotMeasured, SecurityCurve
from brittle.results.wording import norm_name

CANDIDATES = 256
"""Most samples of other classes among which the walk along the boundary looks for its start."""
WALK, QUERIES, MORE_QUERIES = 5, 150, 1000
"""Rounds of the walk and queries of Square, together about 420 of a sample that withstands, and how many Square asks
in a second run once one sample broke. The walk finds what logits hide; Square finds more where they hide nothing."""
MEET = 0.01
"""Most samples between proof and attack, as a share of all, at which no check of the attack is needed."""


@dataclass(frozen=True)
class Check:
    """One sign that is looked for.

    Attributes:
        name: What its flag is called.
        meaning: Why it matters.
        judge: From the evidence to the judgement; InputError says why the check cannot be made.
        of_model: Whether it belongs to the model alone, and to no norm and budget.
    """

    name: str
    meaning: str
    judge: Callable[[Evidence], Judgement]
    of_model: bool = False


def honesty_flags(
    model: Model | Network,
    worst: WorstCase,
    threat: Threat,
    eps: float,
    *,
    curve: SecurityCurve | None = None,
    query_attack: Attack | None = None,
    of_model: bool = True,
    execution: Execution = Execution(),
) -> tuple[tuple[Flag, ...], tuple[NotMeasured, ...]]:
    """Look for the signs that the robust accuracy at one budget must not be trusted: make all :data:`CHECKS`.

    A share raises a flag when the lower end of its 95 % interval exceeds the most that its check allows, so one odd
    sample of 64 raises none.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``, left bit-equal; or one that is ready.
        worst: The worst case at the budget (:func:`brittle.evaluation.worst_case.worst_case`).
        threat: What the robust accuracy was measured under; its seed is that of the checks.
        eps: The budget, in input units.
        curve: Robust accuracy over several budgets.
        query_attack: An attack that asks for logits or predictions alone, with its options bound; by default a walk
            along the decision boundary from samples of other classes and, if the threat has no Square, a short one,
            and a longer one once either broke a sample.
        of_model: Whether to make the checks that belong to no budget.
        execution: Most samples at once.

    Returns:
        The flags, raised or not, and the checks that could not be made, with the reasons.

    Raises:
        InputError: As :func:`brittle.evaluate`.
    """
    flags, missing = [], []
    settled = int((worst.robust_correct & ~worst.proven).sum()) <= MEET * len(worst.y)
    with borrowed(model, worst.x, threat.bounds) as network:
        threat = for_classes(threat, worst.clean_logits.shape[1])[0]
        attacks = ((query_attack,),) if query_attack else default_queries(worst, threat)
        evidence = Evidence(network, worst, threat, eps, curve, attacks, replace(execution, progress=None))
        for check in CHECKS:
            if check.of_model and not of_model:
                continue
            try:
                if settled and bool(worst.proven.any()) and not check.of_model:
                    raise InputError("proof and attack meet within a point: the number stands without it")
                raised, finding = check.judge(evidence)
                p = None if check.of_model else float(threat.p)
                flags.append(Flag(check.name, raised, finding, check.meaning, p))
            except InputError as error:
                where = "" if check.of_model else f", {norm_name(threat.p)}"
                missing.append(NotMeasured(check.name + where, str(error)))
    return tuple(flags), tuple(missing)


def default_queries(worst: WorstCase, threat: Threat) -> tuple[tuple[Attack, ...], ...]:
    """The attacks by queries alone that the survivors have to withstand, and those once the first ones broke some."""
    walk = functools.partial(boundary_walk, candidates=thin(worst.x, CANDIDATES), rounds=WALK)
    if any(unbind(attack) is square for attack in threat.battery):
        return ((walk,),)
    first, then = (functools.partial(square, queries=queries) for queries in (QUERIES, MORE_QUERIES))
    return (walk, first), (then,)


BY_QUERIES = "queries against gradients"
"""The check whose raised flag lets the evaluation go on with queries."""
CHECKS = (
    Check(
        "zero gradients",
        "An attack that follows gradients stands still where they are zero: it finds nothing, whether or not there is"
        " something to find.",
        lambda evidence: zero_gradients(
            *(evidence.differentiate(evidence.right, loss)[1] for loss in (cross_entropy, margins))
        ),
        of_model=True,
    ),
    Check(
        "different answers to one input",
        "A randomised network is attacked through one draw and judged by another; only an attack on the average over"
        " many draws counts.",
        lambda evidence: different_answers(*evidence.two_passes[1:]),
        of_model=True,
    ),
    Check(
        "answers that depend on the batch",
        "A sample's verdict changes with the samples beside it, so neither the attack nor its check is about the sample"
        " alone.",
        ask_alone,
        of_model=True,
    ),
    Check(
        "probabilities in place of logits",
        "The losses expect logits; on probabilities they are flat wherever the network is sure. Leave the softmax out.",
        lambda evidence: probabilities(evidence.worst.clean_logits),
        of_model=True,
    ),
    Check(
        "answers that jump",
        "Between its jumps such a network shows gradients and logits that have nothing to do with its decisions, and an"
        " attack sees no more than they show.",
        cross_decisions,
        of_model=True,
    ),
    Check(
        "gradients against differences",
        "A small step changes the output by what the gradient says, unless the gradient is not the network's own.",
        take_differences,
    ),
    Check(
        "cross-entropy against DLR",
        "Two attacks that differ in nothing but the loss break about the same samples; one that misses many is blind,"
        " and both may be.",
        # DLR first: where there are too few classes for it, that is the reason to give.
        lambda evidence: loss_gap(
            dlr=evidence.broken_soon("dlr"), ce=evidence.broken_by_ce, later=fell_later(evidence.worst, evidence.threat)
        ),
    ),
    Check(
        "random start against none",
        "Where it matters much from which point of the budget an attack starts, the gradients around the samples"
        " mislead it.",
        lambda evidence: start_gap(evidence.broken_by_ce, evidence.broken_soon("ce", random_start=False)),
    ),
    Check(
        "flat security curve",
        "Robust accuracy falls once the budget exceeds what the gradients promise; where it does not, following them"
        " leads nowhere.",
        follow_curve,
    ),
    Check(
        "budget of the whole range",
        "Every picture is allowed, those of other classes too, so whatever is still right was missed by the attack"
        " (or the network does not look at its input).",
        attack_whole_range,
    ),
    Check(
        BY_QUERIES,
        "An attack by queries alone knows less; if it breaks what the others left, these were misled or too short.",
        attack_by_queries,
    ),
)
"""All checks, in the order in which flags are reported."""
