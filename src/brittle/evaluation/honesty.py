"""Signs that a robust accuracy must not be trusted: masked gradients, randomness, outputs that are no logits.

Robust accuracy is an upper estimate, and a network whose gradients are hidden looks robust to whoever follows them
(Athalye et al. 2018; Carlini et al. 2019). Every one of the :data:`CHECKS` looks for one sign of it on a few samples:
it takes the passes and attacks that it needs from the :class:`Evidence`, and a function without a network judges what
came out. No flag raised proves nothing.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from brittle.attacks import apgd, square
from brittle.attacks.losses import Loss, cross_entropy, loss_and_gradient, margins
from brittle.errors import InputError
from brittle.evaluation.execution import Execution
from brittle.evaluation.threat import Attack, Threat, for_classes, unbind
from brittle.evaluation.worst_case import WorstCase, worst_case
from brittle.linear.norms import dual_exponent, lp_norm, thin
from brittle.models.borrow import Model
from brittle.models.forward import logits_of
from brittle.models.network import Network, borrowed
from brittle.results import Flag, NotMeasured, Rate, SecurityCurve
from brittle.results.wording import budget, norm_name, number

SAMPLES = 64
"""Most samples of a check: they tell a share of 5 % from one of 20 %, and all checks of one norm take about 5 % of
the passes of 100 steps on 1,000 samples, and 7 % where the whole range breaks nothing."""
FEWEST_SAMPLES = 8
"""Fewest samples of a check that counts shares. Among three, a single odd one would raise a flag."""
QUERIED_SURVIVORS = 32
"""Most survivors of the gradient attacks that are attacked by queries alone: it is the check that costs most."""
SHORT_STEPS = 15
"""Steps of the short attacks. Attacks that are compared have equal steps, so that their difference is what counts;
within the whole range of the inputs a sound attack needs a few."""
MOST_BROKEN_BY_ONE = 0.10
"""Share of the samples that the attack on DLR breaks and the one on cross-entropy does not, or one start and the other
not. Honest networks, also overconfident ones, stay below; a loss or a start that is blind misses far more."""


class Judgement(NamedTuple):
    """Whether a check raises its flag, and what was measured, with its number."""

    raised: bool
    finding: str


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


@dataclass(frozen=True)
class Evidence:
    """What the checks look at, as :func:`honesty_flags` describes it, and the passes and attacks that they ask for."""

    network: Network
    worst: WorstCase
    threat: Threat
    eps: float
    curve: SecurityCurve | None
    query_attack: Attack
    execution: Execution

    @functools.cached_property
    def right(self) -> Tensor:
        """Rows of samples that are right without attack."""
        return pick_rows(self.worst.clean_correct, SAMPLES, "are right without attack")

    @functools.cached_property
    def broken_by_ce(self) -> Tensor:
        """Which of these the short attack breaks that the others are compared with."""
        return self.broken_soon("ce")

    @functools.cached_property
    def two_passes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of one batch, right or wrong, and the logits of two passes over it."""
        rows = thin(torch.arange(len(self.worst.y)), min(SAMPLES, self.execution.batch_size))
        return rows, self.logits(rows), self.logits(rows)

    def logits(self, rows: Tensor) -> Tensor:
        """The network's answers to the samples ``rows``, ``(n, classes)``."""
        return logits_of(self.network.model, self.worst.x[rows], self.worst.y[rows])

    def broken(self, rows: Tensor, attacks: tuple[Attack, ...], eps: float | None = None) -> Tensor:
        """Which of the samples ``rows`` the attacks break within ``eps`` (the budget, by default), ``(n,)``."""
        x, y, ids = self.worst.x[rows], self.worst.y[rows], self.worst.ids[rows.cpu()]
        threat, eps = replace(self.threat, attacks=attacks, restarts=1), self.eps if eps is None else eps
        return ~worst_case(self.network, x, y, threat, eps, ids=ids, execution=self.execution).robust_correct

    def broken_soon(self, *losses: str, random_start: bool = True, eps: float | None = None) -> Tensor:
        """Which of the samples that are right Auto-PGD breaks in :data:`SHORT_STEPS` on any of the losses, ``(n,)``."""
        short = functools.partial(apgd, steps=SHORT_STEPS, random_start=random_start)
        return self.broken(self.right, tuple(functools.partial(short, loss=loss) for loss in losses), eps)

    def differentiate(self, rows: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """A loss at the samples ``rows``, ``(n,)``, and its gradient in the input, ``(n, ...)``."""
        parts = [
            loss_and_gradient(self.network.model, loss, self.worst.x[part], self.worst.y[part])
            for part in rows.split(self.execution.batch_size)
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[2] for part in parts])

    def gradients(self, loss: Loss) -> Tensor:
        """The gradient of a loss at the samples that are right, ``(n, ...)``."""
        return self.differentiate(self.right, loss)[1]


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
        query_attack: An attack that asks for logits alone, with its options bound; by default Square with 150
            queries. Not run when the threat has Square after other attacks, which tells as much.
        of_model: Whether to make the checks that belong to no budget.
        execution: Most samples at once.

    Returns:
        The flags, raised or not, and the checks that could not be made, with the reasons.

    Raises:
        InputError: As :func:`brittle.evaluate`.
    """
    # So many queries break next to nothing that sound gradients left, and much where the gradients lead nowhere.
    query_attack = query_attack or functools.partial(square, queries=150)
    flags, missing = [], []
    with borrowed(model, worst.x, threat.bounds) as network:
        threat = for_classes(threat, worst.clean_logits.shape[1])[0]
        evidence = Evidence(network, worst, threat, eps, curve, query_attack, replace(execution, progress=None))
        for check in CHECKS:
            if check.of_model and not of_model:
                continue
            try:
                raised, finding = check.judge(evidence)
                p = None if check.of_model else float(threat.p)
                flags.append(Flag(check.name, raised, finding, check.meaning, p))
            except InputError as error:
                where = "" if check.of_model else f", {norm_name(threat.p)}"
                missing.append(NotMeasured(check.name + where, str(error)))
    return tuple(flags), tuple(missing)


def pick_rows(mask: Tensor, most: int, what: str) -> Tensor:
    """Rows of at most so many samples of the mask, spread evenly.

    Raises:
        InputError: There are fewer than :data:`FEWEST_SAMPLES`.
    """
    rows = mask.nonzero()[:, 0]
    if len(rows) < FEWEST_SAMPLES:
        raise InputError(f"needs {FEWEST_SAMPLES} samples that {what}; there are {len(rows)}")
    return thin(rows, most)


def zero_gradients(cross_entropy: Tensor, margin: Tensor, *, most: float = 0.05) -> Judgement:
    """Gradients ``(N, ...)`` of two losses at the same samples; raised when one of them is exactly zero at more than
    the share ``most``. Trained networks have none, not even confident ones: in float32 the cross-entropy's gradient
    vanishes at margins beyond 100.
    """
    rates = [_count(gradient.flatten(1).eq(0).all(1)) for gradient in (cross_entropy, margin)]
    return Judgement(
        any(rate.exceeds(most) for rate in rates),
        f"The gradient is exactly zero at {rates[0].counts} samples for the cross-entropy and at {rates[1].counts} for"
        " the margin.",
    )


def different_answers(first: Tensor, second: Tensor, *, most: float = 1e-3) -> Judgement:
    """Two passes over one batch, ``(N, classes)`` each; raised when they differ by more than the share ``most`` of the
    logits' range. Sums in another order differ by 10⁻⁶ of it.
    """
    finding = f"Two passes over the same {len(first)} samples differ by at most {{}} of the logits' range."
    return _compare(first, second, most, finding)


def answers_in_company(together: Tensor, alone: Tensor | InputError, *, most: float = 1e-2) -> Judgement:
    """Logits ``(N, classes)`` of samples in a batch and of the same one by one, or the error that one of them met;
    raised when they differ by more than the share ``most`` of their range. Kernels of reduced precision (TF32), which
    may be chosen by the batch's size, differ by 10⁻³ of it.
    """
    if isinstance(alone, InputError):
        return Judgement(True, f"A sample alone gets no answer: {alone}.")
    finding = f"Alone and in a batch, {len(alone)} samples get logits that differ by at most {{}} of their range."
    return _compare(together, alone, most, finding)


def _compare(one: Tensor, two: Tensor, most: float, finding: str) -> Judgement:
    """Raised where logits differ by more than the share ``most`` of their range; the finding says by how much."""
    low, high = torch.cat([one, two]).aminmax()
    change = float((one - two).abs().max() / (high - low)) if high > low else 0.0
    most = max(most, 8 * torch.finfo(one.dtype).eps)  # number formats coarser than single precision round more
    return Judgement(change > most, finding.format(f"{number(100 * change)} %"))


def ask_alone(evidence: Evidence) -> Judgement:
    """:func:`answers_in_company` of the first eight samples of the two passes."""
    rows, together, again = evidence.two_passes
    if len(rows) < 2:
        raise InputError("needs at least two samples in a batch")
    if different_answers(together, again).raised:
        raise InputError("two passes over the same batch differ already")
    rows, together = rows[:8], together[:8]
    try:
        return answers_in_company(together, torch.cat([evidence.logits(row) for row in rows.split(1)]))
    except InputError as error:  # a finding, and no reason to leave the check out
        return answers_in_company(together, error)


def probabilities(outputs: Tensor, *, tolerance: float = 1e-3) -> Judgement:
    """Outputs ``(N, classes)``; raised when all are non-negative and add up to 1, up to half precision's rounding."""
    rate = _count((outputs >= 0).all(1) & ((outputs.sum(1) - 1).abs() <= tolerance))
    return Judgement(rate.hits == rate.n > 0, f"The outputs of {rate.counts} samples are non-negative and add up to 1.")


def loss_gap(ce: Tensor, dlr: Tensor, later: Rate | None = None, *, most_by_ce: float = 0.25) -> Judgement:
    """Samples that one of two losses breaks alone; raised above :data:`MOST_BROKEN_BY_ONE` for the DLR loss.

    Args:
        ce: Which samples the attack on the cross-entropy breaks, ``(N,)``.
        dlr: Which of them the equally long attack on the DLR loss breaks.
        later: As :func:`fell_later`.
        most_by_ce: Share above which the cross-entropy raises the flag: within few steps DLR is behind by up to a
            sixth on honest networks.
    """
    by_dlr, by_ce = _count(dlr & ~ce), _count(ce & ~dlr)
    full = f"Of {later.n} samples, {later.hits} withstood cross-entropy and fell to DLR. " if later else ""
    return Judgement(
        any(rate is not None and rate.exceeds(MOST_BROKEN_BY_ONE) for rate in (by_dlr, later))
        or by_ce.exceeds(most_by_ce),
        f"{full}With {SHORT_STEPS} steps each, DLR alone breaks {by_dlr.counts} samples and cross-entropy alone"
        f" {by_ce.hits}.",
    )


def fell_later(worst: WorstCase, threat: Threat) -> Rate | None:
    """Samples that withstood cross-entropy and fell to DLR after it, where two attacks differ in nothing else."""

    def describe(attack: Attack) -> tuple[object, object]:
        loss = inspect.signature(attack).parameters.get("loss")
        others = {name: value for name, value in getattr(attack, "keywords", {}).items() if name != "loss"}
        return loss and loss.default, (unbind(attack), others)

    kinds = enumerate(describe(attack) for attack in threat.battery)
    for (_, (loss, others)), (later, kind) in itertools.combinations(kinds, 2):
        if loss == "ce" and kind == ("dlr", others):
            return Rate(int((worst.attack == later).sum()), int(worst.clean_correct.sum()))
    return None


def start_gap(random: Tensor, none: Tensor) -> Judgement:
    """Which samples ``(N,)`` break from a random start, and which from themselves; raised by those in one alone."""
    rates = [_count(random & ~none), _count(none & ~random)]
    return Judgement(
        any(rate.exceeds(MOST_BROKEN_BY_ONE) for rate in rates),
        f"With {SHORT_STEPS} steps each, {rates[0].counts} samples break from a random start alone and {rates[1].hits}"
        " from the sample alone.",
    )


def flat_curve(curve: SecurityCurve, distances: Tensor, classes: int, *, most_overdue: float = 0.5) -> Judgement:
    """A curve that does not fall (see :func:`is_flat`) although the gradients promise a fall.

    Args:
        curve: Robust accuracy over several budgets.
        distances: First-order estimates ``(N,)`` of the distance to the decision boundary, ``margin / ||gradient||`` in
            the dual norm, of samples that withstood the standard budget; 0 where the gradient is zero.
        classes: Number of classes.
        most_overdue: Share of the survivors that should have broken within the largest budget by their own gradients,
            or have none. Only above is a flat curve odd: over small budgets a robust network's is flat as well.
    """
    first, last = curve.robust[0], curve.robust[-1]
    overdue = _count(distances < curve.eps[-1])
    more = f", though {overdue.counts} survivors should have broken by their gradients, or have none"
    return Judgement(
        is_flat(curve, classes) and overdue.exceeds(most_overdue),
        f"Robust accuracy goes from {first.percent} at {budget(curve.eps[0])} to {last.percent} at"
        f" {budget(curve.eps[-1])}{more if overdue.n else ''}.",
    )


def is_flat(curve: SecurityCurve, classes: int, *, least_fall: float = 0.05) -> bool:
    """Whether a curve ends above chance and falls by less than the share ``least_fall`` of where it starts."""
    first, last = curve.robust[0], curve.robust[-1]
    return first.hits - last.hits < least_fall * first.hits and last.exceeds(1 / classes)


def follow_curve(evidence: Evidence) -> Judgement:
    """:func:`flat_curve` with the distances of survivors, where the curve does not fall."""
    curve, classes, distances = evidence.curve, evidence.worst.clean_logits.shape[1], torch.empty(0)
    if curve is None:
        raise InputError("no security curve")
    if is_flat(curve, classes):
        rows = pick_rows(evidence.worst.robust_correct, SAMPLES, "withstood the attacks")
        margin, gradient = evidence.differentiate(rows, margins)
        length = lp_norm(gradient, dual_exponent(evidence.threat.p))
        distances = torch.where(length > 0, margin / length, 0.0)
    return flat_curve(curve, distances, classes)


def whole_range(right: Tensor, eps: float, p: float, *, most: float = 0.05) -> Judgement:
    """Which samples ``(N,)`` are right at the budget ``eps`` that reaches every input; raised above the share ``most``.
    Pictures of other classes lie within it, so every one is a failure of the attacks; honest networks leave none.
    """
    rate = _count(right)
    return Judgement(
        rate.exceeds(most),
        f"{rate.counts} samples withstand {SHORT_STEPS} steps within {norm_name(p)} {budget(eps)}, which reaches every"
        " input.",
    )


def attack_whole_range(evidence: Evidence) -> Judgement:
    """:func:`whole_range` of short attacks on both losses; DLR needs three classes."""
    p, (low, high) = evidence.threat.p, evidence.threat.bounds
    eps = (high - low) * (1.0 if math.isinf(p) else math.sqrt(evidence.worst.x[0].numel()))
    losses = ("ce", "dlr") if evidence.worst.clean_logits.shape[1] > 2 else ("ce",)
    return whole_range(~evidence.broken_soon(*losses, random_start=False, eps=eps), eps, p)


def query_gap(broken: Rate, left: Rate, *, most: float = 0.02) -> Judgement:
    """What queries alone break of the samples ``left`` (or of some) that withstood the gradient attacks unproven;
    raised when that takes more than the share ``most`` off the robust accuracy.
    """
    points = 100 * broken.hits / max(1, broken.n) * left.hits / max(1, left.n)
    return Judgement(
        broken.exceeds(most * left.n / max(1, left.hits)),
        f"Queries alone break {broken.counts} samples that the gradient attacks left, which takes about {points:.1f}"
        " points off the robust accuracy.",
    )


def attack_by_queries(evidence: Evidence) -> Judgement:
    """:func:`query_gap` of Square in the battery, or else of the query attack on some of the survivors."""
    worst, attacks = evidence.worst, evidence.threat.battery
    number = next((i for i, attack in enumerate(attacks) if unbind(attack) is square), len(attacks))
    if number == 0:
        raise InputError("the first attack is by queries alone")
    broken = worst.attack == number  # no sample, where Square was not run
    left = (worst.robust_correct | broken) & ~worst.proven
    rows = pick_rows(left, QUERIED_SURVIVORS, "withstood the gradient attacks and are not proven robust")
    broken = broken[left] if number < len(attacks) else evidence.broken(rows, (evidence.query_attack,))
    return query_gap(_count(broken), _count(left))


def _count(mask: Tensor) -> Rate:
    return Rate(int(mask.sum()), len(mask))


CHECKS = (
    Check(
        "zero gradients",
        "An attack that follows gradients stands still where they are zero: it finds nothing, whether or not there is"
        " something to find.",
        lambda evidence: zero_gradients(evidence.gradients(cross_entropy), evidence.gradients(margins)),
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
        "queries against gradients",
        "An attack by queries alone knows less; if it breaks what the gradient attacks left, these were misled or too"
        " short.",
        attack_by_queries,
    ),
)
"""All checks, in the order in which flags are reported."""
