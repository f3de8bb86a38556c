"""An audit in plain words: sentences composed from the numbers, with every number in them measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

from brittle.results import (
    FRACTIONS,
    Evaluation,
    LayerResponse,
    LayerResult,
    LipschitzResult,
    UniversalResult,
    Verdict,
)

LEVELS = ((0.9, "robust"), (0.5, "weakened"), (0.1, "fragile"), (0.0, "broken"))
"""Smallest share of the clean accuracy that has to survive the worst standard budget, for every level."""


def judge(
    evaluations: Sequence[Evaluation],
    layers: Sequence[LayerResult],
    lipschitz: Sequence[LipschitzResult],
    responses: Sequence[LayerResponse],
    universal: Sequence[UniversalResult],
) -> Verdict:
    """The verdict: a level, a headline, and what was found and why, most important first."""
    level = _level(evaluations)
    findings = [*map(_attacked, evaluations)]
    findings += _concentration(layers)
    findings += _directions(responses)
    findings += [sentence for q in lipschitz if (sentence := _sensitivity(q))]
    findings += [_universal(u) for u in universal]
    return Verdict(level, _headline(level, evaluations, layers), tuple(findings))


def norm_name(p: float) -> str:
    """``l_inf`` or ``l_2``."""
    return f"l_{p:g}"


def _level(evaluations: Sequence[Evaluation]) -> str:
    rates = [e.robust_correct / e.clean_correct for e in evaluations if e.clean_correct]
    if not evaluations:
        return "not attacked"
    return next(level for least, level in LEVELS if min(rates, default=0.0) >= least)


def _headline(level: str, evaluations: Sequence[Evaluation], layers: Sequence[LayerResult]) -> str:
    if not evaluations:
        return f"Read from the weights of {len(layers)} layers alone: no data were given, so nothing was attacked."
    robust = " and ".join(f"{e.robust_accuracy.percent} within {norm_name(e.p)} {e.eps:.3g}" for e in evaluations)
    words = {
        "robust": "The network holds up",
        "weakened": "The network is weakened by attacks",
        "fragile": "The network is fragile",
        "broken": "The network breaks under attack",
    }[level]
    return f"{words}: {evaluations[0].clean_accuracy.percent} right without attack, {robust} under the worst attack."


def _attacked(e: Evaluation) -> str:
    lost = e.fooling_rate
    ball = (
        f"change every input value by at most {e.eps:.3g}"
        if math.isinf(e.p)
        else f"move an input by {e.eps:.3g} in l_2"
    )
    return f"An attacker who may {ball} turns {lost.percent} of the right answers wrong ({lost.hits} of {lost.n})."


def _concentration(layers: Sequence[LayerResult]) -> list[str]:
    sentences = []
    tenth = FRACTIONS.index(0.10)
    for p, what in ((2.0, "singular values"), (math.inf, "rows")):
        live = [layer for layer in layers if not layer.degenerate and min(layer.shape) > 1]
        if not live:
            return []
        layer = max(live, key=lambda candidate: candidate.concentration(p))
        error = (layer.spectral_error if p == 2 else layer.row_error)[tenth]
        norm = "spectral norm" if p == 2 else "l_inf norm"
        sentences.append(
            f"The most concentrated layer in {norm_name(p)} is {layer.name}: a tenth of its {what} holds"
            f" {100 * (1 - error):.0f} % of their sum, and the {norm} of its matrix is {layer.concentration(p):.1f} times"
            " that of a flat matrix of the same Frobenius norm."
        )
    return sentences


def _directions(responses: Sequence[LayerResponse]) -> list[str]:
    sentences = []
    for p in dict.fromkeys(r.p for r in responses):
        own = [r for r in responses if r.p == p]
        if first := next((r for r in own if r.energy), None):
            i = min(range(len(first.k)), key=lambda j: abs(first.isotropic[j] - 0.1))
            sentences.append(
                f"At the first layer, {first.layer}, {100 * first.energy[i]:.0f} % of the {norm_name(p)} attack's energy"
                f" lies in the {first.k[i]} directions of largest gain, where an aimless perturbation would put"
                f" {100 * first.isotropic[i]:.0f} %."
            )
        grown = [r for r in own if r.amplification is not None]
        if len(grown) > 1 and (start := grown[0].amplification) and (end := grown[-1].amplification):
            sentences.append(
                f"The {norm_name(p)} perturbation changes the output of {grown[0].layer} by {100 * start:.0f} % of its"
                f" length and that of {grown[-1].layer} by {100 * end:.0f} % (medians)."
            )
    return sentences


def _sensitivity(q: LipschitzResult) -> str | None:
    name = norm_name(q.p)
    if q.unavailable is not None:
        return f"No certified {name} bound: {q.unavailable}."
    if q.upper is None:
        return None
    certified = f"Certified: the logits move by at most {q.upper:.3g} per unit of input in {name}"
    if q.lower is None:
        return f"{certified}; how much of that is reached is not known without data."
    return (
        f"{certified}; the largest local gradient norm found on {q.n} samples is {q.lower:.3g}, so the truth lies within"
        f" a factor {q.tightness or math.inf:.3g}. A large upper bound alone does not prove fragility."
    )


def _universal(u: UniversalResult) -> str:
    return (
        f"One and the same {norm_name(u.p)} perturbation of size {u.eps:.3g} fools {u.fooled.percent} of the held-out"
        f" samples that were right; a random one of equal size fools {u.random_fooled.percent}."
    )
