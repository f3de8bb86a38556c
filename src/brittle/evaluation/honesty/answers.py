"""Signs in the network's answers alone: noise, company, probabilities, jumps, gradients that are zero."""

from __future__ import annotations

import torch
from torch import Tensor

from brittle.errors import InputError
from brittle.evaluation.honesty.evidence import SAMPLES, Evidence, Judgement, count, pick_rows
from brittle.linear.norms import per_sample
from brittle.results.wording import number

HALVINGS = 12
"""Halvings of the way from a sample to one of another class: what is left of it is a four thousandth."""
FOLLOWED = 32
"""Most samples from which such a way is followed."""


def zero_gradients(cross_entropy: Tensor, margin: Tensor, *, most: float = 0.05) -> Judgement:
    """Gradients ``(N, ...)`` of two losses at the same samples; raised when one of them is exactly zero at more than
    the share ``most``. Trained networks have none, not even confident ones: in float32 the cross-entropy's gradient
    vanishes at margins beyond 100.
    """
    rates = [count(gradient.flatten(1).eq(0).all(1)) for gradient in (cross_entropy, margin)]
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
    rate = count((outputs >= 0).all(1) & ((outputs.sum(1) - 1).abs() <= tolerance))
    return Judgement(rate.hits == rate.n > 0, f"The outputs of {rate.counts} samples are non-negative and add up to 1.")


def jumps(before: Tensor, after: Tensor, whole: Tensor, *, most: float = 0.05, most_samples: float = 0.25) -> Judgement:
    """Margins ``(N,)`` on both sides of the decision, a four thousandth of the way from one class to another apart;
    raised when more than the share ``most_samples`` jump by more than the share ``most`` of the margin's change over
    the ``whole`` way. Trained networks change by a thousandth of it, 8-bit ones by a hundredth.
    """
    share = (before - after) / whole.clamp_min(torch.finfo(whole.dtype).tiny)
    rate = count(share > most)
    return Judgement(
        rate.exceeds(most_samples),
        f"On the way to a sample of another class the decision falls in one jump at {rate.counts} samples: the margin"
        f" changes by {number(100 * float(share.median()))} % of the whole way's change within a 4,000th of the way"
        " (median).",
    )


def cross_decisions(evidence: Evidence) -> Judgement:
    """:func:`jumps` between samples and the nearest ones that the network takes for another class."""
    worst = evidence.worst
    rows = pick_rows(worst.clean_correct, FOLLOWED, "are right without attack")
    if different_answers(*evidence.two_passes[1:]).raised:
        raise InputError("two passes over the same batch differ already")
    others = pick_rows(torch.ones_like(worst.clean_correct), 4 * SAMPLES, "are there")
    classes = worst.clean_logits.argmax(1)
    apart = torch.cdist(worst.x[rows].flatten(1).double(), worst.x[others].flatten(1).double())
    nearest = apart.masked_fill(classes[rows][:, None] == classes[others][None], torch.inf).min(1)
    rows, far = rows[nearest.values.isfinite()], others[nearest.indices[nearest.values.isfinite()]]
    if len(rows) == 0:
        raise InputError("needs samples that are predicted as different classes")
    start, way = worst.x[rows], worst.x[far] - worst.x[rows]
    first, last = (evidence.margins_at(points, rows) for points in (start, worst.x[far]))
    low, high = torch.zeros_like(first), torch.ones_like(first)
    before, after = first.clone(), last.clone()
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        margin = evidence.margins_at(start + per_sample(middle, start).to(start) * way, rows)
        is_right = margin > 0
        low, before = torch.where(is_right, middle, low), torch.where(is_right, margin, before)
        high, after = torch.where(is_right, high, middle), torch.where(is_right, after, margin)
    return jumps(before, after, first - last)
