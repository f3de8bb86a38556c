"""An audit in plain words: sentences composed from the numbers, with every number in them measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from brittle.results import (
    FRACTIONS,
    Flag,
    LayerResult,
    LipschitzResult,
    NormResult,
    Verdict,
)
from brittle.results.methods import UniversalKind
from brittle.results.wording import budget, norm_name, number

LEVELS = {"robust": 0.9, "weakened": 0.5, "fragile": 0.1, "broken": 0.0}
"""Smallest share of the clean accuracy that has to survive the worst standard budget, for every level."""
HEADLINES = {
    "robust": "The network holds up",
    "weakened": "The network is weakened by attacks",
    "fragile": "The network is fragile",
    "broken": "The network breaks under attack",
    "unclear": "It is unclear how robust the network is",
}
"""How the headline begins, by level."""


def judge(norms: Sequence[NormResult], layers: Sequence[LayerResult], flags: Sequence[Flag] = ()) -> Verdict:
    """The verdict: a level, a headline, and what was found and why, most important first.

    Args:
        norms: What was found in each norm.
        layers: What was measured of each layer.
        flags: The checks that belong to no norm.
    """
    raised = [flag for flag in (*flags, *(flag for norm in norms for flag in norm.flags)) if flag.raised]
    findings = (
        *_distrust(raised),
        *_attacked_and_proven(norms),
        *_concentration(layers),
        *_in_the_layers(norms),
        *_sensitivity([norm.lipschitz for norm in norms]),
        *_universal(norms),
    )
    evaluations = [norm.evaluation for norm in norms if norm.evaluation]
    if not evaluations:
        alone = f"Read from the weights of {len(layers)} layers alone: no data were given, so nothing was attacked."
        return Verdict("not attacked", alone, findings)
    level, clean = _level(norms, bool(raised)), evaluations[0].clean_accuracy
    robust = " and ".join(f"{e.robust_accuracy.percent} within {norm_name(e.p)} {budget(e.eps)}" for e in evaluations)
    headline = f"{HEADLINES[level]}: {clean.percent} right without attack, {robust} under the worst attack."
    return Verdict(level, headline, findings)


def _level(norms: Sequence[NormResult], doubted: bool) -> str:
    """The level of the share of the clean accuracy that the worst standard budget leaves."""

    def of_least(shares: Iterable[float]) -> str:
        least = min(shares, default=0.0)
        return next(level for level, smallest in LEVELS.items() if least >= smallest)

    pairs = [(norm.evaluation, norm.certified) for norm in norms if norm.evaluation and norm.evaluation.clean_correct]
    level = of_least(evaluation.robust_correct / evaluation.clean_correct for evaluation, _ in pairs)
    if level not in ("robust", "weakened") or not doubted:
        return level
    # These two levels rest on attacks that failed: where those are in doubt, certificates have to say the same.
    proven = of_least(curve.at(e.eps).hits / e.clean_correct if curve else 0.0 for e, curve in pairs)
    return level if level == proven else "unclear"


def _distrust(raised: Sequence[Flag]) -> Iterator[str]:
    for name in dict.fromkeys(flag.name for flag in raised):
        same = [flag for flag in raised if flag.name == name]
        norms = [norm_name(flag.p) for flag in same if flag.p is not None]
        what = f"the robust accuracy in {' and '.join(norms)}" if norms else "any robust accuracy here"
        found = [f"{norm_name(f.p)}: {f.finding}" if f.p is not None and len(same) > 1 else f.finding for f in same]
        yield f"Do not trust {what} ({name}). {' '.join(found)}"


def _attacked_and_proven(norms: Sequence[NormResult]) -> Iterator[str]:
    parts = []
    for e in (norm.evaluation for norm in norms if norm.evaluation):
        every_input = f"change every input value by {budget(e.eps)}"
        ball = every_input if math.isinf(e.p) else f"move an input by {budget(e.eps)} in ℓ₂"
        lost = e.fooling_rate
        parts.append(f"who may {ball} turns {lost.percent} of the right answers wrong ({lost.counts})")
    if parts:
        yield f"An attacker {', one '.join(parts)}."
    pairs = [
        (norm.evaluation, norm.certified)
        for norm in norms
        if norm.evaluation and norm.evaluation.n and norm.certified and norm.certified.median_radius is not None
    ]
    if pairs:
        radii = " and ".join(f"{number(curve.median_radius, 'lower')} in {norm_name(e.p)}" for e, curve in pairs)
        budgets = " and ".join(budget(e.eps) for e, _ in pairs)
        shares = " and ".join(curve.at(e.eps).percent for e, curve in pairs)
        points = " and ".join(curve.undecided(e).percent.removesuffix(" %") for e, curve in pairs)
        yield (
            f"Proven: half of the right answers withstand every change below {radii}. Within the standard"
            f" {'budget' if len(pairs) == 1 else 'budgets'} {budgets}, {shares} of the samples are proven robust, which"
            f" leaves {points} points undecided between proof and attack."
        )


def _concentration(layers: Sequence[LayerResult]) -> Iterator[str]:
    tenth = FRACTIONS.index(0.10)
    live = [layer for layer in layers if not layer.degenerate and min(layer.shape) > 1]
    for p, what in ((2.0, "singular values"), (math.inf, "rows")) if live else ():
        layer = max(live, key=lambda candidate: candidate.concentration(p))
        error = (layer.spectral_error if p == 2 else layer.row_error)[tenth]
        yield (
            f"The most concentrated layer in {norm_name(p)} is “{layer.name}”: a tenth of its {what} holds"
            f" {100 * (1 - error):.0f} % of their sum, and the {norm_name(p)} norm of its matrix is"
            f" {layer.concentration(p):.1f} times that of a flat matrix of the same Frobenius norm."
        )


def _in_the_layers(norms: Sequence[NormResult]) -> Iterator[str]:
    """Where the attack's energy lies when it comes in, and how the relative change grows through the layers."""
    followed = [[response for response in norm.responses if response.energy] for norm in norms]
    firsts = [responses[0] for responses in followed if responses]
    if firsts:
        first = firsts[0]
        i = min(range(len(first.k)), key=lambda j: abs(first.isotropic[j] - 0.1))
        shares = [f"{100 * r.energy[i]:.0f} % of the {norm_name(r.p)} attack's energy" for r in firsts]
        where = "the direction" if first.k[i] == 1 else f"the {first.k[i]} directions"
        yield (
            f"At “{first.layer}”, where the attack comes in, {' and '.join(shares)} lies in {where} of largest"
            f" gain; an aimless perturbation would put {100 * first.isotropic[i]:.0f} % there."
        )
    parts, names = [], ("", "")
    for norm in norms:
        changes = [(r.layer, 100 * r.amplification) for r in norm.responses if r.amplification is not None]
        if len(changes) > 1:
            (start_name, start), (end_name, end) = changes[0], changes[-1]
            names = start_name, end_name
            parts.append(f"from {start:.0f} % to {end:.0f} % under the {norm_name(norm.p)} attack")
    if parts:
        yield (
            f"From “{names[0]}” to “{names[1]}” the relative change of the output goes {' and '.join(parts)} (medians)."
        )


def _sensitivity(lipschitz: Sequence[LipschitzResult]) -> Iterator[str]:
    for reason in dict.fromkeys(q.unavailable for q in lipschitz if q.unavailable is not None):
        yield f"There is no certified bound on the network's sensitivity: {reason}."
    certified = [q for q in lipschitz if q.upper is not None]
    uppers = " and ".join(f"{number(q.upper, 'upper')} in {norm_name(q.p)}" for q in certified)
    found = [q for q in certified if q.lower is not None]
    if found:
        lowers = " and ".join(number(q.lower, "lower") for q in found)
        factors = " and ".join(number(q.tightness) for q in found)
        yield (
            f"Certified: per unit of input the logits move by at most {uppers}. Found on {found[0].n} samples and by"
            f" ascent from them: at least {lowers}, smaller by factors of {factors}; a large bound alone proves"
            " nothing."
        )
    elif certified:
        yield f"Certified: per unit of input the logits move by at most {uppers}; how much of it is reached needs data."
    parts = []
    for q in certified:
        if q.upper and q.product is not None and len(q.arguments) > 1:
            gain = q.product / q.upper
            less = f", a factor of {number(gain)} below the product of norms" if gain >= 1.005 else ""
            parts.append(f"“{q.method}” in {norm_name(q.p)}{less}")
    if parts:
        yield f"The tightest argument behind these bounds: {'; '.join(parts)}."


def _universal(norms: Sequence[NormResult]) -> Iterator[str]:
    parts = []
    for norm in norms:
        by_kind = {result.kind: result for result in norm.universal}
        fitted, free = by_kind.get(UniversalKind.FITTED), by_kind.get(UniversalKind.DATA_FREE)
        if fitted and fitted.fooled.n:
            of_weights = f"one read from the weights alone {free.fooled.percent}, " if free else ""
            parts.append(
                f"{fitted.fooled.percent} in {norm_name(norm.p)} ({of_weights}random ones of equal size"
                f" {fitted.random_mean.percent} on average and at most {fitted.random_range[1].percent})"
            )
    if parts:
        yield f"One and the same perturbation fools, of the held-out samples that were right, {' and '.join(parts)}."
