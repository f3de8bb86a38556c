"""Signs that a robust accuracy must not be trusted: masked gradients, randomness, outputs that are no logits.

Robust accuracy is an upper estimate, and a network whose gradients are hidden looks robust to whoever follows them
(Athalye et al. 2018; Carlini et al. 2019). Every :class:`Check` looks for one sign of it on a few samples: ``collect``
makes the passes and attacks that it needs, ``judge`` turns what came out into a :class:`~brittle.results.Flag` with the
number that raised it or did not. No flag raised proves nothing.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from brittle.attacks import apgd, square
from brittle.attacks.losses import Loss, cross_entropy, loss_and_gradient, margins
from brittle.errors import InputError
from brittle.evaluation.execution import Execution
from brittle.evaluation.threat import Attack, Threat, for_classes, unbind
from brittle.evaluation.worst_case import WorstCase, worst_case
from brittle.linear.norms import dual_exponent, lp_norm
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
SHORT_STEPS = 15
"""Steps of the short attacks. Attacks that are compared have equal steps, so that their difference is what counts;
within the whole range of the inputs a sound attack needs a few."""
QUERIES = 150
"""Queries of the attack without gradients: they break next to nothing that sound gradients left, and much where the
gradients lead nowhere."""


@dataclass(frozen=True)
class Check:
    """One sign that is looked for.

    Attributes:
        name: What its flag is called.
        meaning: Why it matters.
        collect: From the evidence to the arguments of ``judge``; InputError says why the check cannot be made.
        judge: From what was collected to the flag.
        of_model: Whether it belongs to the model alone, and to no norm and budget.
    """

    name: str
    meaning: str
    collect: Callable[[Evidence], tuple[Any, ...]]
    judge: Callable[..., Flag]
    of_model: bool = False

    def flag(self, raised: bool, finding: str, p: float | None = None) -> Flag:
        """The check's flag; p is the norm that it belongs to."""
        return Flag(self.name, raised, finding, self.meaning, None if p is None else float(p))


@dataclass(frozen=True)
class Evidence:
    """What the checks look at, and what several of them need.

    Attributes:
        network: The network, ready.
        worst: The worst case at the budget.
        threat: What it was sought under.
        eps: The budget, in input units.
        curve: Robust accuracy over several budgets.
        query_attack: An attack that asks for logits alone.
        execution: Most samples at once.
    """

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
        """Which of these the short attack breaks that the others are compared with: random start, cross-entropy."""
        return break_samples(self, self.right, (short_attack("ce", random_start=True),), self.eps)

    @functools.cached_property
    def two_passes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of one batch, right or wrong, and the logits of two passes over it."""
        rows = _thin(torch.arange(len(self.worst.y)), min(SAMPLES, self.execution.batch_size))
        return rows, self.logits(rows), self.logits(rows)

    def logits(self, rows: Tensor) -> Tensor:
        """The network's answers to the samples ``rows``, ``(n, classes)``."""
        return logits_of(self.network.model, self.worst.x[rows], self.worst.y[rows])


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

    A share raises a flag when the lower end of its 95 % interval exceeds the constant that its check names, so one odd
    sample of 64 raises none.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``, left bit-equal; or one that is ready.
        worst: The worst case at the budget (:func:`brittle.evaluation.worst_case.worst_case`).
        threat: What the robust accuracy was measured under; its seed is that of the checks.
        eps: The budget, in input units.
        curve: Robust accuracy over several budgets.
        query_attack: An attack that asks for logits alone, with its options bound; by default Square with
            :data:`QUERIES`. Not run when the threat has Square after other attacks, which tells as much.
        of_model: Whether to make the checks that belong to no budget.
        execution: Most samples at once.

    Returns:
        The flags, raised or not, and the checks that could not be made, with the reasons.

    Raises:
        InputError: As :func:`brittle.evaluate`.
    """
    query_attack = query_attack or functools.partial(square, queries=QUERIES)
    flags, missing = [], []
    execution = replace(execution, progress=None)
    with borrowed(model, worst.x, threat.bounds) as network:
        threat = for_classes(threat, worst.clean_logits.shape[1])[0]
        evidence = Evidence(network, worst, threat, eps, curve, query_attack, execution)
        for check in CHECKS:
            if check.of_model and not of_model:
                continue
            try:
                flags.append(check.judge(*check.collect(evidence)))
            except InputError as error:
                where = "" if check.of_model else f", {norm_name(threat.p)}"
                missing.append(NotMeasured(check.name + where, str(error)))
    return tuple(flags), tuple(missing)


def break_samples(evidence: Evidence, rows: Tensor, attacks: tuple[Attack, ...], eps: float) -> Tensor:
    """Which of the samples ``rows`` the attacks break within ``eps``, ``(n,)``; every example is checked again."""
    x, y = evidence.worst.x[rows], evidence.worst.y[rows]
    threat = replace(evidence.threat, attacks=attacks, restarts=1)
    ids = evidence.worst.ids[rows.cpu()]
    worst = worst_case(evidence.network, x, y, threat, eps, ids=ids, execution=evidence.execution)
    return ~worst.robust_correct


def differentiate(evidence: Evidence, rows: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """A loss at the samples ``rows``, ``(n,)``, and its gradient in the input, ``(n, ...)``."""
    parts = [
        loss_and_gradient(evidence.network.model, loss, evidence.worst.x[part], evidence.worst.y[part])
        for part in rows.split(evidence.execution.batch_size)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[2] for part in parts])


def short_attack(loss: str, *, random_start: bool) -> Attack:
    """Auto-PGD with :data:`SHORT_STEPS`."""
    return functools.partial(apgd, steps=SHORT_STEPS, loss=loss, random_start=random_start)


def pick_rows(mask: Tensor, most: int, what: str) -> Tensor:
    """Rows of at most so many samples of the mask, spread evenly.

    Raises:
        InputError: There are fewer than :data:`FEWEST_SAMPLES`.
    """
    rows = mask.nonzero()[:, 0]
    if len(rows) < FEWEST_SAMPLES:
        raise InputError(f"needs {FEWEST_SAMPLES} samples that {what}; there are {len(rows)}")
    return _thin(rows, most)


# --- zero gradients -----------------------------------------------------------------------------------------

MOST_ZERO_GRADIENTS = 0.05
"""Share of the samples whose gradient is exactly zero. Trained networks have none, not even confident ones: in float32
the cross-entropy's gradient vanishes at margins beyond 100."""


def zero_gradients(cross_entropy: Tensor, margin: Tensor) -> Flag:
    """Samples at which a loss has a gradient of exactly zero; raised above :data:`MOST_ZERO_GRADIENTS`.

    Args:
        cross_entropy: Gradient of the cross-entropy at samples that are right, ``(N, ...)``.
        margin: Gradient of the margin ``s_y - max_{j != y} s_j`` at the same samples.
    """
    rates = [_count(gradient.flatten(1).eq(0).all(1)) for gradient in (cross_entropy, margin)]
    return ZERO_GRADIENTS.flag(
        any(_above(rate, MOST_ZERO_GRADIENTS) for rate in rates),
        f"The gradient is exactly zero at {_of(rates[0])} samples for the cross-entropy and at {_of(rates[1])} for the"
        " margin.",
    )


ZERO_GRADIENTS = Check(
    "zero gradients",
    "An attack that follows gradients stands still where they are zero: it finds nothing, whether or not there is"
    " something to find.",
    lambda evidence: tuple(differentiate(evidence, evidence.right, loss)[1] for loss in (cross_entropy, margins)),
    zero_gradients,
    of_model=True,
)

# --- different answers to one input -------------------------------------------------------------------------

MOST_CHANGE_REPEATED = 1e-3
"""Difference of two passes over one batch, as a share of the logits' range. Sums in another order differ by 10⁻⁶."""


def different_answers(first: Tensor, second: Tensor) -> Flag:
    """Two passes over one batch, ``(N, classes)`` each; raised when they differ beyond :data:`MOST_CHANGE_REPEATED`."""
    is_beyond, change = _compare(first, second, MOST_CHANGE_REPEATED)
    return DIFFERENT_ANSWERS.flag(
        is_beyond,
        f"Two passes over the same {len(first)} samples differ by at most {change} of the logits' range.",
    )


DIFFERENT_ANSWERS = Check(
    "different answers to one input",
    "A randomised network is attacked through one draw and judged by another; only an attack on the average over"
    " many draws counts.",
    lambda evidence: evidence.two_passes[1:],
    different_answers,
    of_model=True,
)

# --- answers that depend on the batch -----------------------------------------------------------------------

MOST_CHANGE_IN_COMPANY = 1e-2
"""Difference of a sample's logits alone and in a batch, as a share of their range. Kernels of reduced precision (TF32),
which may be chosen by the batch's size, differ by 10⁻³."""
SINGLE_SAMPLES = 8
"""Samples that are put through the network one by one."""


def answers_in_company(together: Tensor, alone: Tensor | InputError) -> Flag:
    """Samples in a batch and one by one; raised when logits differ beyond :data:`MOST_CHANGE_IN_COMPANY`.

    Args:
        together: Logits ``(N, classes)`` in a batch.
        alone: Logits of the same samples one by one, or the error that one of them met.
    """
    if isinstance(alone, InputError):
        return ANSWERS_IN_COMPANY.flag(True, f"A sample alone gets no answer: {alone}.")
    is_beyond, change = _compare(together, alone, MOST_CHANGE_IN_COMPANY)
    return ANSWERS_IN_COMPANY.flag(
        is_beyond,
        f"Alone and in a batch, {len(alone)} samples get logits that differ by at most {change} of their range.",
    )


def _collect_company(evidence: Evidence) -> tuple[Tensor, Tensor | InputError]:
    rows, together, again = evidence.two_passes
    if len(rows) < 2:
        raise InputError("needs at least two samples in a batch")
    if different_answers(together, again).raised:
        raise InputError("two passes over the same batch differ already")
    together = together[:SINGLE_SAMPLES]
    try:
        return together, torch.cat([evidence.logits(row) for row in rows[:SINGLE_SAMPLES].split(1)])
    except InputError as error:  # a finding, and no reason to leave the check out
        return together, error


ANSWERS_IN_COMPANY = Check(
    "answers that depend on the batch",
    "A sample's verdict changes with the samples beside it, so neither the attack nor its check is about the sample"
    " alone.",
    _collect_company,
    answers_in_company,
    of_model=True,
)

# --- probabilities in place of logits -----------------------------------------------------------------------

SUM_TOLERANCE = 1e-3
"""How far from 1 the sum of a sample's outputs may be if they count as probabilities: half precision's rounding."""


def probabilities(outputs: Tensor) -> Flag:
    """Outputs ``(N, classes)``; raised when all are non-negative and every sample's add up to 1."""
    rate = _count((outputs >= 0).all(1) & ((outputs.sum(1) - 1).abs() <= SUM_TOLERANCE))
    return PROBABILITIES.flag(
        rate.hits == rate.n > 0,
        f"The outputs of {_of(rate)} samples are non-negative and add up to 1.",
    )


PROBABILITIES = Check(
    "probabilities in place of logits",
    "The losses expect logits; on probabilities they are flat wherever the network is sure. Leave the softmax out.",
    lambda evidence: (evidence.worst.clean_logits,),
    probabilities,
    of_model=True,
)

# --- cross-entropy against DLR ------------------------------------------------------------------------------

MOST_BROKEN_BY_ONE = 0.10
"""Share of the samples that the attack on DLR breaks and the one on cross-entropy does not, or one start and the other
not. Honest networks, also overconfident ones, stay below; a loss or a start that is blind misses far more."""
MOST_BROKEN_BY_CE = 0.25
"""The same for samples that cross-entropy breaks and DLR does not: within few steps DLR is behind by up to a sixth on
honest networks."""


def loss_gap(ce: Tensor, dlr: Tensor, p: float, later: Rate | None = None) -> Flag:
    """Samples that one of two losses breaks alone; raised beyond :data:`MOST_BROKEN_BY_ONE` for the DLR loss, and
    beyond :data:`MOST_BROKEN_BY_CE` for the cross-entropy.

    Args:
        ce: Which samples the attack on the cross-entropy breaks, ``(N,)``.
        dlr: Which of them the equally long attack on the DLR loss breaks.
        p: Norm of the budget.
        later: Among the samples that are right, those that withstood the full attack on the cross-entropy and fell to
            the one on the DLR loss after it.
    """
    by_dlr, by_ce = _count(dlr & ~ce), _count(ce & ~dlr)
    full = "" if later is None else f"Of {later.n} samples, {later.hits} withstood cross-entropy and fell to DLR. "
    return LOSS_GAP.flag(
        _above(by_dlr, MOST_BROKEN_BY_ONE)
        or _above(by_ce, MOST_BROKEN_BY_CE)
        or (later is not None and _above(later, MOST_BROKEN_BY_ONE)),
        f"{full}With {SHORT_STEPS} steps each, DLR alone breaks {_of(by_dlr)} samples and cross-entropy alone"
        f" {by_ce.hits}.",
        p,
    )


def _collect_losses(evidence: Evidence) -> tuple[Tensor, Tensor, float, Rate | None]:
    by_dlr = break_samples(evidence, evidence.right, (short_attack("dlr", random_start=True),), evidence.eps)
    return evidence.broken_by_ce, by_dlr, evidence.threat.p, _fell_later(evidence.worst, evidence.threat)


def _fell_later(worst: WorstCase, threat: Threat) -> Rate | None:
    """Samples that fell to DLR after they withstood cross-entropy, by attacks that are equal otherwise; else None."""

    def describe(attack: Attack) -> tuple[object, object]:
        loss = inspect.signature(attack).parameters.get("loss")
        others = {name: value for name, value in getattr(attack, "keywords", {}).items() if name != "loss"}
        return loss and loss.default, (unbind(attack), others)

    kinds = enumerate(describe(attack) for attack in threat.battery)
    for (_, (loss, others)), (later, kind) in itertools.combinations(kinds, 2):
        if loss == "ce" and kind == ("dlr", others):
            return Rate(int((worst.attack == later).sum()), int(worst.clean_correct.sum()))
    return None


LOSS_GAP = Check(
    "cross-entropy against DLR",
    "Two attacks that differ in nothing but the loss break about the same samples; one that misses many is blind,"
    " and both may be.",
    _collect_losses,
    loss_gap,
)

# --- random start against none ------------------------------------------------------------------------------


def start_gap(random: Tensor, none: Tensor, p: float) -> Flag:
    """Which samples ``(N,)`` an attack breaks from a random start and from the samples themselves; raised by a share
    that only one of them breaks above :data:`MOST_BROKEN_BY_ONE`.
    """
    rates = [_count(random & ~none), _count(none & ~random)]
    return START_GAP.flag(
        any(_above(rate, MOST_BROKEN_BY_ONE) for rate in rates),
        f"With {SHORT_STEPS} steps each, {_of(rates[0])} samples break from a random start alone and {rates[1].hits}"
        " from the sample alone.",
        p,
    )


def _collect_starts(evidence: Evidence) -> tuple[Tensor, Tensor, float]:
    random = evidence.broken_by_ce
    none = break_samples(evidence, evidence.right, (short_attack("ce", random_start=False),), evidence.eps)
    return random, none, evidence.threat.p


START_GAP = Check(
    "random start against none",
    "Where it matters much from which point of the budget an attack starts, the gradients around the samples"
    " mislead it.",
    _collect_starts,
    start_gap,
)

# --- flat security curve ------------------------------------------------------------------------------------

LEAST_FALL = 0.05
"""Share of itself by which a robust accuracy falls, from the least to the largest budget of its curve, if the curve is
not flat."""
MOST_OVERDUE_SURVIVORS = 0.5
"""Share of the survivors that should have broken within the largest budget by their own gradients, or have none. Only
above is a flat curve odd: over small budgets a robust network's is flat as well."""


def flat_curve(curve: SecurityCurve, distances: Tensor, classes: int) -> Flag:
    """A curve that does not fall (see :func:`is_flat`) although the gradients of more than
    :data:`MOST_OVERDUE_SURVIVORS` promise a fall.

    Args:
        curve: Robust accuracy over several budgets.
        distances: First-order estimate of the distance ``(N,)`` to the decision boundary, ``margin / ||gradient||``
            in the dual norm, of samples that withstood the standard budget; 0 where the gradient is zero. Empty when
            the curve falls.
        classes: Number of classes.
    """
    first, last = curve.robust[0], curve.robust[-1]
    overdue = _count(distances < curve.eps[-1])
    more = f", though {_of(overdue)} survivors should have broken by their gradients, or have none" if overdue.n else ""
    return FLAT_CURVE.flag(
        is_flat(curve, classes) and _above(overdue, MOST_OVERDUE_SURVIVORS),
        f"Robust accuracy goes from {first.percent} at {budget(curve.eps[0])} to {last.percent} at"
        f" {budget(curve.eps[-1])}{more}.",
        curve.p,
    )


def is_flat(curve: SecurityCurve, classes: int) -> bool:
    """Whether a curve ends above chance (one of the classes) and falls by less than :data:`LEAST_FALL`."""
    first, last = curve.robust[0], curve.robust[-1]
    return first.hits - last.hits < LEAST_FALL * first.hits and _above(last, 1 / classes)


def _collect_curve(evidence: Evidence) -> tuple[SecurityCurve, Tensor, int]:
    curve, classes = evidence.curve, evidence.worst.clean_logits.shape[1]
    if curve is None:
        raise InputError("no security curve")
    if not is_flat(curve, classes):
        return curve, torch.empty(0), classes
    rows = pick_rows(evidence.worst.robust_correct, SAMPLES, "withstood the attacks")
    margin, gradient = differentiate(evidence, rows, margins)
    length = lp_norm(gradient, dual_exponent(evidence.threat.p))
    return curve, torch.where(length > 0, margin / length, 0.0), classes


FLAT_CURVE = Check(
    "flat security curve",
    "Robust accuracy falls once the budget exceeds what the gradients promise; where it does not, following them"
    " leads nowhere.",
    _collect_curve,
    flat_curve,
)

# --- budget of the whole range ------------------------------------------------------------------------------

MOST_RIGHT_IN_WHOLE_RANGE = 0.05
"""Share of the samples that withstand a budget as large as the whole range. Pictures of the other classes lie within
it, so every one is a failure of the attacks; honest networks, also overconfident ones, leave none."""


def whole_range(right: Tensor, eps: float, p: float) -> Flag:
    """Which samples ``(N,)`` are right at the budget ``eps`` that reaches every input; raised above
    :data:`MOST_RIGHT_IN_WHOLE_RANGE`.
    """
    rate = _count(right)
    return WHOLE_RANGE.flag(
        _above(rate, MOST_RIGHT_IN_WHOLE_RANGE),
        f"{_of(rate)} samples withstand {SHORT_STEPS} steps within {norm_name(p)} {budget(eps)}, which reaches every"
        " input.",
        p,
    )


def _collect_whole_range(evidence: Evidence) -> tuple[Tensor, float, float]:
    p, (low, high) = evidence.threat.p, evidence.threat.bounds
    eps = (high - low) * (1.0 if math.isinf(p) else math.sqrt(evidence.worst.x[0].numel()))
    losses = ("ce", "dlr") if evidence.worst.clean_logits.shape[1] > 2 else ("ce",)
    attacks = tuple(short_attack(loss, random_start=False) for loss in losses)
    return ~break_samples(evidence, evidence.right, attacks, eps), eps, p


WHOLE_RANGE = Check(
    "budget of the whole range",
    "Every picture is allowed, those of other classes too, so whatever is still right was missed by the attack"
    " (or the network does not look at its input).",
    _collect_whole_range,
    whole_range,
)

# --- queries against gradients ------------------------------------------------------------------------------

MOST_TAKEN_BY_QUERIES = 0.02
"""Robust accuracy that queries alone take away from what the gradient attacks left: two points."""
QUERIED_SURVIVORS = 32
"""Most survivors of the gradient attacks that are attacked by queries alone: it is the check that costs most."""


def query_gap(broken: Rate, left: Rate, p: float) -> Flag:
    """What an attack without gradients adds; raised when it takes off more than :data:`MOST_TAKEN_BY_QUERIES`.

    Args:
        broken: How many of those samples, or of some of them, it breaks.
        left: Samples that withstood the gradient attacks without being proven robust, among all samples.
        p: Norm of the budget.
    """
    points = 100 * broken.hits / max(1, broken.n) * left.hits / max(1, left.n)
    return QUERY_GAP.flag(
        _above(broken, MOST_TAKEN_BY_QUERIES * left.n / max(1, left.hits)),
        f"Queries alone break {_of(broken)} samples that the gradient attacks left, which takes about {points:.1f}"
        " points off the robust accuracy.",
        p,
    )


def _collect_queries(evidence: Evidence) -> tuple[Rate, Rate, float]:
    worst, attacks = evidence.worst, evidence.threat.battery
    number = next((i for i, attack in enumerate(attacks) if unbind(attack) is square), len(attacks))
    if number == 0:
        raise InputError("the first attack is by queries alone")
    broken = worst.attack == number  # no sample, where Square was not run
    left = (worst.robust_correct | broken) & ~worst.proven
    rows = pick_rows(left, QUERIED_SURVIVORS, "withstood the gradient attacks and are not proven robust")
    if number < len(attacks):
        broken = broken[left]
    else:
        broken = break_samples(evidence, rows, (evidence.query_attack,), evidence.eps)
    return _count(broken), _count(left), evidence.threat.p


QUERY_GAP = Check(
    "queries against gradients",
    "An attack by queries alone knows less; if it breaks what the gradient attacks left, these were misled or too"
    " short.",
    _collect_queries,
    query_gap,
)

CHECKS = (
    ZERO_GRADIENTS,
    DIFFERENT_ANSWERS,
    ANSWERS_IN_COMPANY,
    PROBABILITIES,
    LOSS_GAP,
    START_GAP,
    FLAT_CURVE,
    WHOLE_RANGE,
    QUERY_GAP,
)
"""All checks, in the order in which flags are reported."""


def _thin(rows: Tensor, most: int) -> Tensor:
    """At most so many of the rows, spread evenly."""
    if len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most, device=rows.device).round().long()]


def _count(mask: Tensor) -> Rate:
    return Rate(int(mask.sum()), len(mask))


def _of(rate: Rate) -> str:
    return f"{rate.hits} of {rate.n}"


def _above(rate: Rate, share: float) -> bool:
    """Whether the lower end of the 95 % interval exceeds the share."""
    return rate.interval is not None and rate.interval[0] > share


def _compare(one: Tensor, two: Tensor, most: float) -> tuple[bool, str]:
    """Whether logits differ beyond ``most``, a share of the range of all, and the largest such share in words."""
    low, high = torch.cat([one, two]).aminmax()
    change = float((one - two).abs().max() / (high - low)) if high > low else 0.0
    most = max(most, 8 * torch.finfo(one.dtype).eps)  # number formats coarser than single precision round more
    return change > most, f"{number(100 * change)} %"
