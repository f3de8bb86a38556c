"""Signs in what gradients achieve: losses, starts and budgets compared, and slopes compared with differences."""

from __future__ import annotations

import inspect
import itertools
import math

import torch
from torch import Tensor

from brittle.attacks.losses import margins
from brittle.errors import InputError
from brittle.evaluation.honesty.evidence import SAMPLES, SHORT_STEPS, Evidence, Judgement, count, pick_rows
from brittle.evaluation.threat import Attack, Threat, unbind
from brittle.evaluation.worst_case import WorstCase
from brittle.linear.norms import dual_exponent, lp_norm, per_sample, thin
from brittle.random_streams import stream_keys, uniform
from brittle.results import Rate, SecurityCurve
from brittle.results.wording import budget, norm_name

MOST_BROKEN_BY_ONE = 0.10
"""Share of the samples that one start breaks and the other does not. Honest networks stay below; a start that is blind
misses far more."""
MOST_BROKEN_BY_LOSS = 0.25
"""The same of losses: within few steps DLR is behind cross-entropy by up to a sixth on honest networks, and ahead of it
by a fifth on those whose logits are small."""
DIFFERENCED = 32
"""Most samples at which slopes are compared with differences."""
STEPS = (1 / 32, 1 / 4)
"""Lengths of the differences, as shares of the budget (of an eighth of the whole range, where that is less)."""
DIRECTIONS = 4
"""Random directions in which differences are taken, besides the gradient's own."""


def loss_gap(ce: Tensor, dlr: Tensor, later: Rate | None = None) -> Judgement:
    """Samples that one of two losses breaks alone; raised above :data:`MOST_BROKEN_BY_LOSS`.

    Args:
        ce: Which samples the attack on the cross-entropy breaks, ``(N,)``.
        dlr: Which of them the equally long attack on the DLR loss breaks.
        later: As :func:`fell_later`.
    """
    by_dlr, by_ce = count(dlr & ~ce), count(ce & ~dlr)
    full = f"Of {later.n} samples, {later.hits} withstood cross-entropy and fell to DLR. " if later else ""
    return Judgement(
        any(rate is not None and rate.exceeds(MOST_BROKEN_BY_LOSS) for rate in (by_dlr, by_ce, later)),
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
    rates = [count(random & ~none), count(none & ~random)]
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
    overdue = count(distances < curve.eps[-1])
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
    rate = count(right)
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


def slopes_and_differences(
    promised: Tensor, measured: Tensor, rounding: float | Tensor = 0.0, *, least: float = 0.2, most: float = 0.25
) -> Judgement:
    """Changes of the margin that the gradient promises, and those that are measured; raised when they disagree at more
    than the share ``most`` of the samples, whatever the length of the step.

    They disagree where less than the share ``least`` of the fall along the gradient comes, or where the gradient
    explains less than half of the changes (in squares) in random directions. Networks that are smooth or piecewise
    linear agree at short steps.

    Args:
        promised: ``(steps, 1 + directions, N)``, the steepest descent first; 0 where the gradient is zero.
        measured: Likewise.
        rounding: What rounding alone may change, ``(N,)``: less is no disagreement.
    """
    slow = measured[:, 0] - least * promised[:, 0] > rounding  # both changes are negative
    unexplained, all_of_it = ((change[:, 1:]).square().mean(1).sqrt() for change in (measured - promised, measured))
    elsewhere = (unexplained > all_of_it / math.sqrt(2)) & (unexplained > rounding)
    live = (promised[:, 0] < 0).any(0)
    rates = [count(wrong.all(0)[live]) for wrong in (slow, elsewhere)]
    return Judgement(
        any(rate.exceeds(most) for rate in rates),
        f"Steps along the gradient bring less than a fifth of what it promises at {rates[0].counts} samples, and it"
        f" explains less than half of the change in random directions at {rates[1].hits}.",
    )


def take_differences(evidence: Evidence) -> Judgement:
    """:func:`slopes_and_differences` of the margin at open samples."""
    worst, p, (low, high) = evidence.worst, evidence.threat.p, evidence.threat.bounds
    rows = thin(evidence.open_rows, DIFFERENCED)
    x = worst.x[rows]
    margin, gradient = evidence.differentiate(rows, margins)
    margin, keys = margin.double(), stream_keys(evidence.threat.seed, worst.ids[rows.cpu()].tolist()).to(x.device)
    whole = (high - low) * (1.0 if math.isinf(p) else math.sqrt(x[0].numel()))
    promised, measured = [], []
    for step in STEPS:
        reach = step * min(evidence.eps, whole / 8)
        for number in range(1 + DIRECTIONS):
            draws = uniform(keys, torch.full_like(keys, number), x[0].numel()).view_as(x).to(x) - 0.5
            way = draws if number else -gradient
            way = way.sign() if math.isinf(p) else way / per_sample(lp_norm(way, 2).clamp_min(1e-30), way)
            moved = (x + reach * way).clamp(low, high)
            promised.append((gradient.double() * (moved.double() - x.double())).flatten(1).sum(1))
            measured.append(evidence.margins_at(moved, rows).double() - margin)
    shape = len(STEPS), 1 + DIRECTIONS, len(rows)
    logits = worst.clean_logits[rows]
    rounding = 8 * torch.finfo(logits.dtype).eps * logits.double().abs().amax(1)
    return slopes_and_differences(torch.stack(promised).view(shape), torch.stack(measured).view(shape), rounding)
