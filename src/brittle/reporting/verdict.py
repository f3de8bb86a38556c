"""An audit in plain words: sentences composed from the numbers, with every number in them measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from brittle.reporting.weighing import CONCENTRATED, exceeds_random, explanation
from brittle.results import (
    FRACTIONS,
    Audit,
    CertifiedCurve,
    Evaluation,
    FeatureCompression,
    Flag,
    LayerResult,
    LipschitzResult,
    NormResult,
    Rate,
    Verdict,
    warnings_of,
)
from brittle.results.wording import budget, norm_name, number, share

LEVELS = {"robust": 0.9, "weakened": 0.5, "fragile": 0.1, "broken": 0.0}
"""Smallest share of the clean accuracy that has to survive the worst standard budget, for every level."""
GUESSING = "no better than guessing"
"""The level of a network whose answers have nothing to do with its inputs."""
REST_ON_FAILURE = ("robust", "weakened")
"""Levels that rest on attacks that failed, not on examples that were found."""
HEADLINES = {
    "robust": "The network holds up",
    "weakened": "The network is weakened by attacks",
    "fragile": "The network is fragile",
    "broken": "The network breaks under attack",
    "unclear": "It is unclear how robust the network is",
    "too few samples": "Too few samples to say how robust the network is",
    GUESSING: "The network is no better than guessing",
}
"""How the headline begins, by level."""
ENOUGH = 100
"""Right samples from which on a failed attack says that a network is robust: of so many, all of which survive, at most
3.7 % of the others break (95 % interval)."""
MEET = 0.01
"""Most undecided samples, as a share of all, at which proof and attack are said to meet: the number stands then,
whatever the checks say of the attack."""
FEWEST_TO_STAND = 100
"""Samples on which that has to be seen at least, of fewer all."""
ALARMS = ("Warning: ", "Do not trust", "Only ")
"""How findings begin that put others in doubt."""
CAUSES = ("Compressib", "Not fragile", "Whether compressib")
"""How the finding begins that says whether compressibility explains the fragility."""
FEWEST_PAIRS = 8
"""Pairs of samples from which on a median of theirs is worth a sentence."""


def judge(
    norms: Sequence[NormResult],
    layers: Sequence[LayerResult],
    flags: Sequence[Flag] = (),
    features: FeatureCompression | None = None,
) -> Verdict:
    """The verdict: a level, a headline, and what was found and why, most important first.

    Args:
        norms: What was found in each norm.
        layers: What was measured of each layer.
        flags: The checks that belong to no norm.
        features: By how much of what separates the classes the network decides.
    """
    attacked = [norm for norm in norms if norm.evaluation]
    level, deciding = _level(attacked, flags) if attacked else ("not attacked", None)
    evaluations = [norm.evaluation for norm in attacked if norm.evaluation]
    findings = tuple(f"Warning: {warning}" for warning in warnings_of(evaluations))
    if level != GUESSING:  # where no answer means anything, neither does whether it survives
        findings += (
            *_distrust(norms, flags),
            *_few(norms),
            *_attacked_and_proven(norms),
            *_explanation(level, [norm for norm in norms if norm.p == deciding], layers),
            *_by_features(features),
        )
    findings += (*_concentration(layers), *_in_the_layers(norms), *_sensitivity([norm.lipschitz for norm in norms]))
    findings += () if level == GUESSING else tuple(_universal(norms))
    if not evaluations:
        alone = f"Read from the weights of {len(layers)} layers alone: no data were given, so nothing was attacked."
        return Verdict(level, alone, findings)
    return Verdict(level, _headline(level, deciding, evaluations), findings, deciding)


def short_findings(audit: Audit) -> tuple[str, ...]:
    """What a reader should know first, in a short sentence each: three at most, after whatever puts them in doubt.

    How many right answers the attack turns wrong, how much is proven, and whether the layers explain it. Warnings and
    doubts of :attr:`brittle.results.Verdict.findings` come first, however many there are.

    Args:
        audit: What was found; an older file will do.
    """
    alarms = [text for text in audit.verdict.findings if text.startswith(ALARMS)]
    if audit.verdict.level == GUESSING:
        return tuple(alarms)
    norms = [norm for norm in audit.norms if norm.evaluation and norm.evaluation.n]
    deciding = next((norm for norm in norms if norm.p == audit.verdict.decided_by), norms[0] if norms else None)
    short = (*_broken_in_short(deciding), *_proven_in_short(deciding), *_cause_in_short(audit))
    return (*alarms, *short)


def _broken_in_short(norm: NormResult | None) -> Iterator[str]:
    if norm and (e := norm.evaluation) and e.clean_correct:
        where = "in every input value" if math.isinf(e.p) else "in ℓ₂"
        yield f"Changes of at most {budget(e.eps)} {where} turn {e.fooling_rate.counts} right answers wrong."


def _proven_in_short(norm: NormResult | None) -> Iterator[str]:
    if norm and norm.proven is not None and norm.undecided is not None:
        undecided = norm.undecided.value or 0.0
        left = f"{100 * undecided:.0f} % are undecided" if undecided > MEET else "next to none is undecided"
        yield f"{norm.proven.percent} of the samples are proven to withstand all such changes; {left}."


def _cause_in_short(audit: Audit) -> Iterator[str]:
    """Whether the layers explain it, as the verdict has weighed it; without that, the most concentrated layer."""
    said = next((text for text in audit.verdict.findings if text.startswith(CAUSES)), None)
    live = [layer for layer in audit.layers if not layer.degenerate and min(layer.shape) > 1]
    if said is not None:
        judged, colon, _ = said.partition(":")
        yield f"{judged}." if colon else said
    elif live:
        layer = max(live, key=lambda candidate: candidate.excess(2))
        much = f"its norm is {layer.excess(2):.1f} times that of a random matrix of its shape and scale"
        concentrated = layer.excess(2) >= CONCENTRATED
        start = "The most concentrated layer is" if concentrated else "No layer is concentrated, not even"
        yield f"{start} “{layer.name}”: {much}."


def doubts(norms: Sequence[NormResult], flags: Sequence[Flag] = ()) -> dict[float, list[Flag]]:
    """The raised flags that put the robust accuracy in each norm in doubt.

    A flag of one norm says nothing of another, and where proof and attack meet no flag counts.

    Args:
        norms: What was found in each norm.
        flags: The checks that belong to no norm.

    Returns:
        By norm, those that were attacked; the model's own flags first.
    """
    return {
        norm.p: [] if _stands(norm) else [flag for flag in (*flags, *norm.flags) if flag.raised]
        for norm in norms
        if norm.evaluation
    }


def _stands(norm: NormResult) -> bool:
    """Whether the samples between proof and attack are so few that the robust accuracy needs no trust."""
    e, undecided = norm.evaluation, norm.undecided
    if not e or not e.n or undecided is None:
        return False
    # Proofs may have been searched for on a part of the samples: too few of them say little of all.
    return undecided.hits <= MEET * undecided.n and undecided.n >= min(e.n, FEWEST_TO_STAND)


def _level(norms: Sequence[NormResult], flags: Sequence[Flag]) -> tuple[str, float | None]:
    """The level, of the norm whose budget leaves the smallest share of the clean accuracy, and that norm."""
    in_doubt = doubts(norms, flags)

    def survives(norm: NormResult) -> float:
        e = norm.evaluation
        return e.robust_correct / e.clean_correct if e and e.clean_correct else 0.0

    def is_sure(norm: NormResult) -> float:
        """The share that survives; where the attack is in doubt, the share that is proven to."""
        e, proven = norm.evaluation, norm.proven
        if not in_doubt[norm.p] or not e or not e.clean_correct:
            return survives(norm)
        if not proven:
            return 0.0
        of_all = proven.value if proven.n >= e.n else (proven.interval or (0.0, 1.0))[0]  # of a part, its interval
        return (of_all or 0.0) * e.n / e.clean_correct

    def level_of(share: float) -> str:
        return next(level for level, smallest in LEVELS.items() if share >= smallest)

    first = norms[0].evaluation
    if first and first.chance is not None and not first.clean_accuracy.exceeds(first.chance):
        return GUESSING, None
    worst, least_sure = min(norms, key=survives), min(norms, key=is_sure)
    level = level_of(survives(worst))
    if level not in REST_ON_FAILURE:
        return level, worst.p
    if first and first.clean_correct < ENOUGH:
        return "too few samples", worst.p
    return (level, worst.p) if level_of(is_sure(least_sure)) == level else ("unclear", least_sure.p)


def _headline(level: str, deciding: float | None, evaluations: Sequence[Evaluation]) -> str:
    """The level in a sentence, with the accuracies that it rests on and the norm that decided it."""
    clean, chance = evaluations[0].clean_accuracy, evaluations[0].chance
    if level == GUESSING and chance is not None:
        return (
            f"{HEADLINES[level]}: {clean.percent} right without attack, where answers that ignore the input reach"
            f" {100 * chance:.1f} %, so that no robust accuracy means anything."
        )

    def mark(e: Evaluation) -> str:
        return " (decisive)" if e.p == deciding and len(evaluations) > 1 else ""

    robust = " and ".join(
        f"{e.robust_accuracy.percent} within {norm_name(e.p)} {budget(e.eps)}{mark(e)}" for e in evaluations
    )
    few = f" ({clean.counts}; {ENOUGH} right ones are needed)" if level == "too few samples" else ""
    return f"{HEADLINES[level]}: {clean.percent} right without attack{few}, {robust} under the worst attack."


def _distrust(norms: Sequence[NormResult], flags: Sequence[Flag]) -> Iterator[str]:
    in_doubt = doubts(norms, flags)
    raised = [(p, flag) for p, same in in_doubt.items() for flag in same]
    for name in dict.fromkeys(flag.name for _, flag in raised):
        found: dict[str, list[float]] = {}  # a check of the model found the same in every norm
        for p, flag in raised:
            if flag.name == name:
                found.setdefault(flag.finding, []).append(p)
        concerned = [p for ps in found.values() for p in ps]
        everything = len(concerned) == len(in_doubt) and all(flag.p is None for _, flag in raised if flag.name == name)
        where = " and ".join(norm_name(p) for p in concerned)
        what = "any robust accuracy here" if everything else f"the robust accuracy in {where}"
        texts = [text if len(found) == 1 else f"{norm_name(ps[0])}: {text}" for text, ps in found.items()]
        yield f"Do not trust {what} ({name}). {' '.join(texts)}"


def _few(norms: Sequence[NormResult]) -> Iterator[str]:
    """How little a share of few samples says."""
    attacked = [norm.evaluation for norm in norms if norm.evaluation and norm.evaluation.clean_correct]
    if attacked and attacked[0].clean_correct < ENOUGH:
        intervals = [Rate(e.robust_correct, e.clean_correct).interval or (0.0, 1.0) for e in attacked]
        parts = [
            f"between {100 * low:.0f} and {100 * high:.0f} % in {norm_name(e.p)}"
            for e, (low, high) in zip(attacked, intervals, strict=True)
        ]
        yield (
            f"Only {attacked[0].clean_correct} samples are right without attack: of such answers {' and '.join(parts)}"
            " survive (95 % intervals). Give more samples to know it better."
        )


def _attacked_and_proven(norms: Sequence[NormResult]) -> Iterator[str]:
    parts = []
    for e in (norm.evaluation for norm in norms if norm.evaluation):
        every_input = f"change every input value by {budget(e.eps)}"
        ball = every_input if math.isinf(e.p) else f"move an input by {budget(e.eps)} in ℓ₂"
        lost = e.fooling_rate
        parts.append(f"who may {ball} turns {lost.percent} of the right answers wrong ({lost.counts})")
    if parts:
        yield f"An attacker {', one '.join(parts)}."
    certified = [
        norm
        for norm in norms
        if norm.evaluation and norm.evaluation.n and norm.certified and norm.certified.median_radius is not None
    ]
    pairs = [(norm.evaluation, norm.certified) for norm in certified if norm.evaluation and norm.certified]
    if pairs:
        radii = " and ".join(f"{number(curve.median_radius, 'lower')} in {norm_name(e.p)}" for e, curve in pairs)
        budgets = " and ".join(budget(e.eps) for e, _ in pairs)
        shares = " and ".join(norm.proven.percent for norm in certified if norm.proven)
        points = " and ".join(norm.undecided.percent.removesuffix(" %") for norm in certified if norm.undecided)
        yield (
            f"Proven: half of the right answers withstand every change below {radii}. Within the standard"
            f" {'budget' if len(pairs) == 1 else 'budgets'} {budgets}, {shares} of the samples are proven robust, which"
            f" leaves {points} points undecided between proof and attack.{_searched(pairs)}"
        )
    ranges = [f"in {norm_name(norm.p)} {', '.join(sides)}" for norm in norms if (sides := _proven_to_attacked(norm))]
    if ranges:
        yield f"Robust accuracy, from proven to attacked: {'; '.join(ranges)}."


def _proven_to_attacked(norm: NormResult) -> list[str]:
    """Both sides of the robust accuracy at every budget of the curve; of budgets that leave nothing, the first."""
    sides: list[str] = []
    if norm.curve and norm.certified and norm.certified.n:
        for eps, attacked in zip(norm.curve.eps, norm.curve.robust, strict=True):
            proven = (eps == norm.eps and norm.proven) or norm.certified.at(eps)
            met = (proven.value or 0.0) >= (attacked.value or 0.0)  # proofs may have been sought on a part alone
            low = "" if met else f"{proven.percent.removesuffix(' %')} to "
            sides.append(f"{low}{attacked.percent} within {budget(eps)}")
            if not attacked.hits:
                break
    return sides


def _searched(pairs: Sequence[tuple[Evaluation, CertifiedCurve]]) -> str:
    """On how many samples proofs were searched for, where not on all; and where on none, why."""
    some = [f"{curve.n} of the {e.n} samples in {norm_name(e.p)}" for e, curve in pairs if curve.n < e.n]
    none = [f" Sample by sample no proof was tried in {norm_name(e.p)}: {c.untried}." for e, c in pairs if c.untried]
    return (f" Radii were searched for on {' and '.join(some)}, spread over all." if some else "") + "".join(none)


def _explanation(level: str, deciding: Sequence[NormResult], layers: Sequence[LayerResult]) -> Iterator[str]:
    """Whether compressibility explains the fragility in the norm that decided the level, where it can be said."""
    if level == "unclear":
        yield "Whether compressibility explains any fragility is not judged: the attack that would show it is in doubt."
    for norm in deciding if level in LEVELS else ():
        if sentence := explanation(norm, layers, fragile=level != "robust"):
            yield sentence


def _by_features(features: FeatureCompression | None) -> Iterator[str]:
    """By how much of what separates the classes the network decides, what that costs, and where the rest is lost."""
    if features is None or features.cosine is None or len(features.pairs) < FEWEST_PAIRS:
        return
    known = features.interpolant
    linear = "" if known is None else f", a linear classifier through all samples at most {share(known)}"
    text = (
        f"The network decides by {share(features.cosine)} of what separates a sample from the nearest one of another"
        f" class (median of {len(features.pairs)}; a random direction has {share(features.chance)}{linear}): so much of"
        " the way between them lies along the gradient of its decision."
    )
    (one, other), frequent = next(iter(features.by_classes.items()))
    if len(frequent.pairs) >= FEWEST_PAIRS and frequent.cosine is not None:
        text += f" Of what separates {one} from {other}, nearest most often, it is {share(frequent.cosine)}."
    if features.ratio is not None:
        text += (
            f" The attack needs at most {share(features.ratio)} of half that distance, up to which the rule of the"
            " nearest sample keeps its answer."
        )
    yield text
    cosines = [("input", 1.0), *((layer.layer, layer.cosine) for layer in features.layers if layer.cosine)]
    if len(cosines) > 2:
        # Below what a random direction has, a fall is noise.
        heights = [max(cosine, features.chance) for _, cosine in cosines]
        falls = [after / before for before, after in pairwise(heights)]
        steepest = falls.index(min(falls))
        (_, before), (name, after) = cosines[steepest : steepest + 2]
        (first, at_first), (last, at_last) = cosines[1], cosines[-1]
        yield (
            f"A rule that took the nearer of the two in a layer's output would decide by {share(at_first)} of it at"
            f" “{first}” and by {share(at_last)} at “{last}”; the largest loss is at “{name}”, from {share(before)}"
            f" to {share(after)}."
        )


def _concentration(layers: Sequence[LayerResult]) -> Iterator[str]:
    tenth = FRACTIONS.index(0.10)
    live = [layer for layer in layers if not layer.degenerate and min(layer.shape) > 1]
    for p, what in ((2.0, "singular values"), (math.inf, "rows")) if live else ():
        layer = max(live, key=lambda candidate: candidate.excess(p))
        if layer.excess(p) < CONCENTRATED:
            continue
        error = (layer.spectral_error if p == 2 else layer.row_error)[tenth]
        yield (
            f"The most concentrated layer in {norm_name(p)} is “{layer.name}”: a tenth of its {what} holds"
            f" {100 * (1 - error):.0f} % of their sum, and the {norm_name(p)} norm of its matrix is"
            f" {layer.concentration(p):.1f} times that of a flat matrix of the same Frobenius norm,"
            f" {layer.excess(p):.1f} times that of a random one."
        )


def _in_the_layers(norms: Sequence[NormResult]) -> Iterator[str]:
    """Where the attack's energy lies when it comes in, and how the relative change grows through the layers."""
    shares, k, where = [], 0, ""
    for norm in norms:
        random = {response.layer: response for response in norm.random_responses}
        first = next((response for response in norm.responses if response.energy), None)
        if first and first.layer in random and random[first.layer].k == first.k:
            i = min(range(len(first.k)), key=lambda j: abs(first.isotropic[j] - 0.1))
            if exceeds_random(first, random[first.layer], i):
                by_chance = f"{100 * random[first.layer].energy[i]:.0f} % of a random perturbation's"
                shares.append(f"{100 * first.energy[i]:.0f} % of the {norm_name(norm.p)} attack's energy ({by_chance})")
                where, k = first.layer, first.k[i]
    if shares:
        directions = "the direction" if k == 1 else f"the {k} directions"
        yield (f"At “{where}”, where the attack comes in, {' and '.join(shares)} lies in {directions} of largest gain.")
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
    for q in lipschitz:
        if q.upper is None and q.lower is not None:
            reach = (
                ""
                if q.reach is None
                else (f"; to first order the nearest wrong answer lies {number(q.reach)} away, at the median")
            )
            yield (
                f"Found in its place, in {norm_name(q.p)} on {q.n} samples: per unit of input the logits move by"
                f" {number(q.median_lower)} at the median sample, and by at least {number(q.lower, 'lower')} at the"
                f" worst that was found{reach}. None of these is a certificate."
            )
    certified = [q for q in lipschitz if q.upper is not None]
    uppers = " and ".join(f"{number(q.upper, 'upper')} in {norm_name(q.p)}" for q in certified)
    found = [q for q in certified if q.tightness is not None]
    if found:
        lowers = " and ".join(number(q.lower, "lower") for q in found)
        factors = " and ".join(number(q.tightness) for q in found)
        yield (
            f"Certified: per unit of input the logits move by at most {uppers}. Found on {found[0].n} samples and by"
            f" ascent from them: at least {lowers}, smaller by factors of {factors}; a large bound alone proves"
            " nothing."
        )
    elif certified:
        reached = "" if certified[0].n else "; how much of it is reached needs data"
        yield f"Certified: per unit of input the logits move by at most {uppers}{reached}."
    parts = []
    for q in certified:
        if q.upper and q.product is not None and len(q.arguments) > 1:
            gain = q.product / q.upper
            less = f", a factor of {number(gain)} below the product of norms" if gain >= 1.005 else ""
            parts.append(f"“{q.method}” in {norm_name(q.p)}{less}")
    if parts:
        yield f"The tightest method behind these bounds: {'; '.join(parts)}."


def _universal(norms: Sequence[NormResult]) -> Iterator[str]:
    parts = []
    for norm in norms:
        if (best := norm.best_universal) and best.fooled.n:
            parts.append(
                f"{best.fooled.percent} within {norm_name(norm.p)} {budget(best.eps)} ({best.kind}; random"
                f" perturbations of equal size {best.random_mean.percent} on average and at most"
                f" {best.random_range[1].percent})"
            )
    if parts:
        yield (
            "One and the same perturbation, the best of those found, fools of the held-out samples that were right"
            f" {' and '.join(parts)}."
        )
