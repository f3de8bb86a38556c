"""Signs that a robust accuracy must not be trusted: masked gradients, randomness, outputs that are no logits.

Robust accuracy is an upper estimate, and a network whose gradients are hidden looks robust to whoever follows them
(Athalye et al. 2018; Carlini et al. 2019). Every check here looks for one sign of it on a few samples, and returns a
:class:`~brittle.results.Flag` with the number that raised it or did not. No flag raised proves nothing.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from brittle.attacks import apgd, square
from brittle.attacks.losses import Loss, cross_entropy, loss_and_gradient, margins
from brittle.errors import InputError
from brittle.evaluation.worst_case import Attack, Threat, WorstCase, worst_case
from brittle.linear.norms import dual_exponent, lp_norm
from brittle.models.borrow import Model, frozen
from brittle.models.fast_copy import copy_for_attacks
from brittle.models.forward import logits_of
from brittle.results import Flag, NotMeasured, Rate, SecurityCurve
from brittle.results.wording import budget, norm_name, number

SAMPLES = 64
"""Most samples of a check: they tell a share of 5 % from one of 20 %, and all checks of one norm take about 5 % of
the passes of 100 steps on 1,000 samples, and 7 % where the whole range breaks nothing."""
LEAST = 8
"""Fewest samples of a check that counts shares. Among three, a single odd one would raise a flag."""
STEPS = 15
"""Steps of the short attacks. Attacks that are compared have equal steps, so that their difference is what counts;
within the whole range of the inputs a sound attack needs a few."""
QUERIES = 150
"""Queries of the attack without gradients: they break next to nothing that sound gradients left, and much where the
gradients lead nowhere."""
SURVIVORS = 32
"""Most survivors of the gradient attacks that are attacked by queries alone: it is the dearest check."""
ALONE = 8
"""Samples that are put through the network one by one."""
ZERO_SHARE = 0.05
"""Share of the samples whose gradient is exactly zero. Trained networks have none, not even confident ones: in float32
the cross-entropy's gradient vanishes at margins beyond 100."""
GAP = 0.10
"""Share of the samples that the attack on DLR breaks and the one on cross-entropy does not, or one start and the other
not. Honest networks, also overconfident ones, stay below; a loss or a start that is blind misses far more."""
BEHIND = 0.25
"""The same for samples that cross-entropy breaks and DLR does not: within few steps DLR is behind by up to a sixth on
honest networks."""
FALL = 0.05
"""Share of the samples by which a robust accuracy falls, from the least to the largest budget of its curve, if it is
not flat."""
PROMISED = 0.5
"""Share of the survivors that should have broken within the largest budget by their own gradients, or have none. Only
then is a flat curve odd: over small budgets a robust network's is flat as well."""
WHOLE = 0.05
"""Share of the samples that withstand a budget as large as the whole range. Pictures of the other classes lie within
it, so every one is a failure of the attacks; honest networks, also overconfident ones, leave none."""
UNFOUND = 0.02
"""Robust accuracy that queries alone take away from what the gradient attacks left: two points."""
REPEATED = 1e-3
"""Difference of two passes over one batch, as a share of the logits' range. Sums in another order differ by 10⁻⁶."""
COMPANY = 1e-2
"""Difference of a sample's logits alone and in a batch, likewise. Kernels of reduced precision (TF32), which may be
chosen by the batch's size, differ by 10⁻³."""
PROBABILITY = 1e-3
"""How far from 1 the sum of a sample's outputs may be if they count as probabilities: half precision's rounding."""

MEANINGS = {
    "zero gradients": (
        "An attack that follows gradients stands still where they are zero: it finds nothing, whether or not there is"
        " something to find."
    ),
    "different answers to one input": (
        "A randomised network is attacked through one draw and judged by another; only an attack on the average over"
        " many draws counts."
    ),
    "answers that depend on the batch": (
        "A sample's verdict changes with the samples beside it, so neither the attack nor its check is about the sample"
        " alone."
    ),
    "probabilities in place of logits": (
        "The losses expect logits; on probabilities they are flat wherever the network is sure. Leave the softmax out."
    ),
    "cross-entropy against DLR": (
        "Two attacks that differ in nothing but the loss break about the same samples; one that misses many is blind,"
        " and both may be."
    ),
    "random start against none": (
        "Where it matters much from which point of the budget an attack starts, the gradients around the samples"
        " mislead it."
    ),
    "flat security curve": (
        "Robust accuracy falls once the budget exceeds what the gradients promise; where it does not, following them"
        " leads nowhere."
    ),
    "budget of the whole range": (
        "Every picture is allowed, those of other classes too, so whatever is still right was missed by the attack"
        " (or the network does not look at its input)."
    ),
    "queries against gradients": (
        "An attack by queries alone knows less; if it breaks what the gradient attacks left, these were misled or too"
        " short."
    ),
}
"""What is looked for, and why it matters."""


def honesty_flags(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    eps: float,
    *,
    worst: WorstCase | None = None,
    curve: SecurityCurve | None = None,
    query_attack: Attack | None = None,
    of_model: bool = True,
    batch_size: int = 256,
) -> tuple[tuple[Flag, ...], tuple[NotMeasured, ...]]:
    """Look for the signs that the robust accuracy at one budget must not be trusted.

    A share raises a flag when the lower end of its 95 % interval exceeds the constant that its check names, so one odd
    sample of 64 raises none.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``; left bit-equal.
        x: Inputs ``(N, ...)`` within the threat's bounds.
        y: Labels ``(N,)``.
        threat: What the robust accuracy was measured under; its seed is that of the checks.
        eps: The budget, in input units.
        worst: The worst case at that budget; it is sought first if it is not given.
        curve: Robust accuracy over several budgets.
        query_attack: An attack that asks for logits alone, with its options bound; by default Square with
            :data:`QUERIES`. Not run when the threat has Square after other attacks, which tells as much.
        of_model: Whether to make the checks that belong to no budget.
        batch_size: Most samples at once.

    Returns:
        The flags, raised or not, and the checks that could not be made, with the reasons.

    Raises:
        InputError: As :func:`brittle.evaluate`.
    """
    if worst is None:
        worst = worst_case(model, x, y, threat, eps, batch_size=batch_size)
    flags, missing = [], []
    with frozen(model):
        probe = _Probe(model, copy_for_attacks(model, worst.x), worst, threat, eps, batch_size)
        query_attack = query_attack or functools.partial(square, queries=QUERIES)
        groups = [(probe.of_model() if of_model else {}, "")]
        groups += [(probe.of_budget(curve, query_attack), f", {norm_name(threat.p)}")]
        for checks, where in groups:
            for name, check in checks.items():
                try:
                    flags.append(check())
                except InputError as error:
                    missing.append(NotMeasured(name + where, str(error)))
    return tuple(flags), tuple(missing)


def zero_gradients(cross_entropy: Tensor, margin: Tensor) -> Flag:
    """Samples at which a loss has a gradient of exactly zero; raised above :data:`ZERO_SHARE`.

    Args:
        cross_entropy: Gradient of the cross-entropy at samples that are right, ``(N, ...)``.
        margin: Gradient of the margin ``s_y - max_{j != y} s_j`` at the same samples.
    """
    rates = [_count(gradient.flatten(1).eq(0).all(1)) for gradient in (cross_entropy, margin)]
    return _flag(
        "zero gradients",
        any(_above(rate, ZERO_SHARE) for rate in rates),
        f"The gradient is exactly zero at {_of(rates[0])} samples for the cross-entropy and at {_of(rates[1])} for the"
        " margin.",
    )


def different_answers(first: Tensor, second: Tensor) -> Flag:
    """Two passes over one batch, ``(N, classes)`` each; raised when they differ by more than :data:`REPEATED`."""
    change = _change(first, second)
    return _flag(
        "different answers to one input",
        change > _tolerance(REPEATED, first),
        f"Two passes over the same {len(first)} samples differ by at most {_percent(change)} of the logits' range.",
    )


def answers_in_company(together: Tensor, alone: Tensor) -> Flag:
    """Logits ``(N, classes)`` of samples in a batch and one by one; raised when they differ beyond :data:`COMPANY`."""
    change = _change(together, alone)
    return _flag(
        "answers that depend on the batch",
        change > _tolerance(COMPANY, together),
        f"Alone and in a batch, {len(alone)} samples get logits that differ by at most {_percent(change)} of their"
        " range.",
    )


def probabilities(outputs: Tensor) -> Flag:
    """Outputs ``(N, classes)``; raised when all are non-negative and every sample's add up to 1."""
    rate = _count((outputs >= 0).all(1) & ((outputs.sum(1) - 1).abs() <= PROBABILITY))
    return _flag(
        "probabilities in place of logits",
        rate.hits == rate.n > 0,
        f"The outputs of {_of(rate)} samples are non-negative and add up to 1.",
    )


def loss_gap(ce: Tensor, dlr: Tensor, p: float, later: Rate | None = None) -> Flag:
    """Samples that one of two losses breaks alone; raised beyond :data:`GAP` (DLR) or :data:`BEHIND` (cross-entropy).

    Args:
        ce: Which samples the attack on the cross-entropy breaks, ``(N,)``.
        dlr: Which of them the equally long attack on the DLR loss breaks.
        p: Norm of the budget.
        later: Among the samples that are right, those that withstood the full attack on the cross-entropy and fell to
            the one on the DLR loss after it.
    """
    rates = [_count(dlr & ~ce), _count(ce & ~dlr)]
    full = "" if later is None else f"Of {later.n} samples, {later.hits} withstood cross-entropy and fell to DLR. "
    return _flag(
        "cross-entropy against DLR",
        _above(rates[0], GAP) or _above(rates[1], BEHIND) or (later is not None and _above(later, GAP)),
        f"{full}With {STEPS} steps each, DLR alone breaks {_of(rates[0])} samples and cross-entropy alone"
        f" {rates[1].hits}.",
        p,
    )


def start_gap(random: Tensor, none: Tensor, p: float) -> Flag:
    """Which samples ``(N,)`` an attack breaks from a random start and from the samples themselves; raised by a share
    that only one of them breaks above :data:`GAP`.
    """
    rates = [_count(random & ~none), _count(none & ~random)]
    return _flag(
        "random start against none",
        any(_above(rate, GAP) for rate in rates),
        f"With {STEPS} steps each, {_of(rates[0])} samples break from a random start alone and {rates[1].hits} from the"
        " sample alone.",
        p,
    )


def flat_curve(curve: SecurityCurve, distances: Tensor, classes: int) -> Flag:
    """A curve that does not fall (see :func:`is_flat`) although gradients promise a fall; see :data:`PROMISED`.

    Args:
        curve: Robust accuracy over several budgets.
        distances: First-order estimate of the distance ``(N,)`` to the decision boundary, ``margin / ||gradient||``
            in the dual norm, of samples that withstood the standard budget; 0 where the gradient is zero. Empty when
            the curve falls.
        classes: Number of classes.
    """
    first, last = curve.robust[0], curve.robust[-1]
    promised = _count(distances < curve.eps[-1])
    more = (
        f", though {_of(promised)} survivors should have broken by their gradients, or have none" if promised.n else ""
    )
    return _flag(
        "flat security curve",
        is_flat(curve, classes) and _above(promised, PROMISED),
        f"Robust accuracy goes from {first.percent} at {budget(curve.eps[0])} to {last.percent} at"
        f" {budget(curve.eps[-1])}{more}.",
        curve.p,
    )


def is_flat(curve: SecurityCurve, classes: int) -> bool:
    """Whether a curve ends above chance, one in as many as there are classes, and falls by less than :data:`FALL`."""
    first, last = curve.robust[0], curve.robust[-1]
    return first.hits - last.hits < FALL * first.hits and _above(last, 1 / classes)


def whole_range(right: Tensor, eps: float, p: float) -> Flag:
    """Which samples ``(N,)`` are right at the budget ``eps`` that reaches every input; raised above :data:`WHOLE`."""
    rate = _count(right)
    return _flag(
        "budget of the whole range",
        _above(rate, WHOLE),
        f"{_of(rate)} samples withstand {STEPS} steps within {norm_name(p)} {budget(eps)}, which reaches every input.",
        p,
    )


def query_gap(broken: Rate, left: Rate, p: float) -> Flag:
    """What an attack without gradients adds; raised when it takes more than :data:`UNFOUND` off the robust accuracy.

    Args:
        broken: How many of those samples, or of some of them, it breaks.
        left: Samples that withstood the gradient attacks without being proven robust, among all samples.
        p: Norm of the budget.
    """
    points = 100 * broken.hits / max(1, broken.n) * left.hits / max(1, left.n)
    return _flag(
        "queries against gradients",
        _above(broken, UNFOUND * left.n / max(1, left.hits)),
        f"Queries alone break {_of(broken)} samples that the gradient attacks left, which takes about {points:.1f}"
        " points off the robust accuracy.",
        p,
    )


@dataclass(frozen=True)
class _Probe:
    """What the checks of one budget look at."""

    model: Model
    quick: Model
    worst: WorstCase
    threat: Threat
    eps: float
    batch_size: int

    def of_model(self) -> dict[str, Callable[[], Flag]]:
        """The checks that belong to no budget."""
        return {
            "zero gradients": self.zero_gradients,
            "different answers to one input": self.different_answers,
            "answers that depend on the batch": self.answers_in_company,
            "probabilities in place of logits": lambda: probabilities(self.worst.clean_logits),
        }

    def of_budget(self, curve: SecurityCurve | None, query_attack: Attack) -> dict[str, Callable[[], Flag]]:
        """The checks of one norm and budget."""
        p = self.threat.p
        broken = functools.cache(lambda loss, start: self.broken(self.right(), (_short(loss, start),), self.eps))
        return {
            "cross-entropy against DLR": lambda: loss_gap(
                broken("ce", True), broken("dlr", True), p, _later(self.worst, self.threat)
            ),
            "random start against none": lambda: start_gap(broken("ce", True), broken("ce", False), p),
            "flat security curve": lambda: self.flat_curve(curve),
            "budget of the whole range": self.whole_range,
            "queries against gradients": lambda: self.query_gap(query_attack),
        }

    def right(self) -> Tensor:
        """Rows of samples that are right without attack."""
        return _enough(self.worst.clean_correct, SAMPLES, "are right without attack")

    def broken(self, rows: Tensor, attacks: tuple[Attack, ...], eps: float) -> Tensor:
        """Which of the samples ``rows`` other attacks break, ``(n,)``; every example is checked again."""
        x, y = self.worst.x[rows], self.worst.y[rows]
        threat = replace(self.threat, attacks=attacks, restarts=1)
        found = worst_case(self.model, x, y, threat, eps, ids=rows.cpu(), batch_size=self.batch_size, quick=self.quick)
        return ~found.robust_correct

    def gradients(self, rows: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """A loss at the samples ``rows``, ``(n,)``, and its gradient, ``(n, ...)``."""
        parts = [
            loss_and_gradient(self.model, loss, self.worst.x[part], self.worst.y[part])
            for part in rows.split(self.batch_size)
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[2] for part in parts])

    def zero_gradients(self) -> Flag:
        rows = self.right()
        return zero_gradients(self.gradients(rows, cross_entropy)[1], self.gradients(rows, margins)[1])

    def batch(self) -> Tensor:
        """Rows of one batch, right or wrong."""
        return _thinned(torch.arange(len(self.worst.y)), min(SAMPLES, self.batch_size))

    def logits(self, rows: Tensor) -> Tensor:
        return logits_of(self.model, self.worst.x[rows], self.worst.y[rows])

    def different_answers(self) -> Flag:
        return different_answers(self.logits(self.batch()), self.logits(self.batch()))

    def answers_in_company(self) -> Flag:
        rows = self.batch()
        if len(rows) < 2:
            raise InputError("needs at least two samples in a batch")
        together = self.logits(rows)
        if different_answers(together, self.logits(rows)).raised:
            raise InputError("two passes over the same batch differ already")
        try:
            alone = torch.cat([self.logits(row) for row in rows[:ALONE].split(1)])
        except InputError as error:
            return _flag("answers that depend on the batch", True, f"A sample alone gets no answer: {error}.")
        return answers_in_company(together[:ALONE], alone)

    def flat_curve(self, curve: SecurityCurve | None) -> Flag:
        if curve is None:
            raise InputError("no security curve")
        classes, distances = self.worst.clean_logits.shape[1], torch.empty(0)
        if is_flat(curve, classes):
            rows = _enough(self.worst.robust_correct, SAMPLES, "withstood the attacks")
            margin, gradient = self.gradients(rows, margins)
            length = lp_norm(gradient, dual_exponent(self.threat.p))
            distances = torch.where(length > 0, margin / length, 0.0)
        return flat_curve(curve, distances, classes)

    def whole_range(self) -> Flag:
        p, (low, high) = self.threat.p, self.threat.bounds
        eps = (high - low) * (1.0 if math.isinf(p) else math.sqrt(self.worst.x[0].numel()))
        losses = ("ce", "dlr") if self.worst.clean_logits.shape[1] > 2 else ("ce",)
        broken = self.broken(self.right(), tuple(_short(loss, False) for loss in losses), eps)
        return whole_range(~broken, eps, p)

    def query_gap(self, query_attack: Attack) -> Flag:
        queries = [_unbound(attack) is square for attack in self.threat.attacks]
        if queries[0]:
            raise InputError("the first attack is by queries alone")
        found = self.worst.attack == (queries.index(True) if any(queries) else len(queries))
        left = (self.worst.robust_correct | found) & ~self.worst.proven
        what = "withstood the gradient attacks and are not proven robust"
        if any(queries):
            broken = found[_enough(left, len(left), what)]
        else:
            broken = self.broken(_enough(left, SURVIVORS, what), (query_attack,), self.eps)
        return query_gap(_count(broken), _count(left), self.threat.p)


def _flag(name: str, raised: bool, finding: str, p: float | None = None) -> Flag:
    return Flag(name, raised, finding, MEANINGS[name], None if p is None else float(p))


def _unbound(attack: Attack) -> Attack:
    return _unbound(attack.func) if isinstance(attack, functools.partial) else attack


def _short(loss: str, random_start: bool) -> Attack:
    return functools.partial(apgd, steps=STEPS, loss=loss, random_start=random_start)


def _later(worst: WorstCase, threat: Threat) -> Rate | None:
    """Samples that fell to DLR after they withstood cross-entropy, by attacks that are equal otherwise; else None."""
    kinds = [_loss_and_rest(attack) for attack in threat.attacks]
    pairs = [
        later
        for first, (loss, rest) in enumerate(kinds)
        for later, other in enumerate(kinds)
        if loss == "ce" and other == ("dlr", rest) and first < later
    ]
    return Rate(int((worst.attack == pairs[0]).sum()), int(worst.clean_correct.sum())) if pairs else None


def _loss_and_rest(attack: Attack) -> tuple[object, tuple[object, dict[str, object]]]:
    option = inspect.signature(attack).parameters.get("loss")
    rest = {name: value for name, value in getattr(attack, "keywords", {}).items() if name != "loss"}
    return None if option is None else option.default, (_unbound(attack), rest)


def _enough(mask: Tensor, most: int, what: str) -> Tensor:
    """Rows of at most so many samples of the mask.

    Raises:
        InputError: There are fewer than :data:`LEAST`.
    """
    rows = mask.nonzero()[:, 0]
    if len(rows) < LEAST:
        raise InputError(f"needs {LEAST} samples that {what}; there are {len(rows)}")
    return _thinned(rows, most)


def _thinned(rows: Tensor, most: int) -> Tensor:
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


def _change(one: Tensor, two: Tensor) -> float:
    """Largest difference as a share of the range of all values; 0 where both agree."""
    low, high = torch.cat([one, two]).aminmax()
    return float((one - two).abs().max() / (high - low)) if high > low else 0.0


def _tolerance(share: float, logits: Tensor) -> float:
    """The share, or more where the number format is coarser than single precision."""
    return max(share, 8 * torch.finfo(logits.dtype).eps)


def _percent(share: float) -> str:
    return f"{number(100 * share)} %"
