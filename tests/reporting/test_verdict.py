"""The verdict in words: its level, and which findings follow from which numbers."""

import dataclasses
import math

import pytest

from brittle.reporting.verdict import doubts, judge
from brittle.results import (
    CertifiedCurve,
    Evaluation,
    FeatureCompression,
    FeatureLayer,
    FeaturePair,
    Flag,
    LipschitzResult,
    Rate,
    SecurityCurve,
    UniversalResult,
)
from helpers.audits import norm_result


def counted(clean, robust, p=math.inf, *, n=200, chance=None, warnings=(), **parts):
    """A norm with so many right samples of ``n``, and so many that survive."""
    evaluation = Evaluation(
        ("apgd",), p, 0.1, (0.0, 1.0), 1, 0, {}, n, clean, robust, 0, 0.1, chance=chance, warnings=warnings
    )
    return norm_result(p, evaluation=evaluation, **parts)


@pytest.mark.parametrize(
    ("clean", "robust", "level"),
    [
        (100, 100, "robust"),
        (100, 90, "robust"),
        (100, 89, "weakened"),
        (100, 50, "weakened"),
        (100, 49, "fragile"),
        (100, 10, "fragile"),
        (100, 9, "broken"),
        (100, 0, "broken"),
    ],
)
def test_levels_are_shares_of_the_clean_accuracy_at_the_worst_budget(clean, robust, level):
    assert judge([counted(clean, robust)], []).level == level
    for order in (1, -1):
        both = [counted(100, 100, 2.0), counted(clean, robust)][::order]
        verdict = judge(both, [])
        assert verdict.level == level
        assert Rate(robust, 200).percent in verdict.headline
        if robust < 100:
            assert verdict.decided_by == math.inf
            assert f"{Rate(robust, 200).percent} within ℓ∞ 0.1 (decisive)" in verdict.headline


@pytest.mark.parametrize(
    ("robust", "level"), [(99, "too few samples"), (60, "too few samples"), (49, "fragile"), (5, "broken")]
)
def test_a_failed_attack_on_few_samples_is_no_verdict_but_a_successful_one_is(robust, level):
    verdict = judge([counted(99, robust, n=110)], [])
    assert verdict.level == level
    (few,) = [finding for finding in verdict.findings if finding.startswith("Only 99 samples are right")]
    low, high = Rate(robust, 99).interval
    assert f"between {100 * low:.0f} and {100 * high:.0f} % in ℓ∞ survive" in few
    assert ("100 right ones are needed" in verdict.headline) == (level == "too few samples")
    enough = judge([counted(100, robust, n=110)], [])
    assert enough.level not in ("too few samples", "no better than guessing")
    assert not any("samples are right" in finding for finding in enough.findings)


@pytest.mark.parametrize(
    ("clean", "n", "chance", "guesses"),
    [
        (78, 1000, 0.1, True),  # nearly constant
        (98, 1000, 0.1, True),  # all weights are zero
        (118, 1000, 0.1, True),  # above it, but not beyond chance
        (140, 1000, 0.1, False),
        (400, 1000, 0.4, True),  # always the commonest label
        (4, 40, 0.1, True),
        (38, 40, 0.1, False),
        (0, 50, 0.1, True),
        (500, 1000, None, False),  # a file of an older version
    ],
)
def test_what_is_not_above_chance_is_never_robust(clean, n, chance, guesses):
    norms = [counted(clean, clean, p, n=n, chance=chance) for p in (math.inf, 2.0)]
    verdict = judge(norms, [])
    assert (verdict.level == "no better than guessing") == guesses
    assert any("survive" in finding or "attacker" in finding for finding in verdict.findings) == (not guesses)
    if guesses:
        assert f"{Rate(clean, n).percent} right without attack" in verdict.headline
        assert f"ignore the input reach {100 * chance:.1f} %" in verdict.headline
        assert verdict.decided_by is None


RAISED = Flag("zero gradients", True, "12 of 64 are zero.", "why")


def in_norm(flag, p):
    return dataclasses.replace(flag, p=p)


def test_a_flag_of_one_norm_decides_that_norm_alone():
    """Doubt about one norm cannot be answered by, nor asked of, what is proven in another."""
    flagged = (in_norm(RAISED, math.inf),)
    proven = curve(math.inf, 190)
    for order in (1, -1):
        # Flagged, but proven to be robust; the other norm is neither flagged nor proven.
        norms = [counted(200, 198, flags=flagged, certified=proven), counted(200, 190, 2.0)][::order]
        assert judge(norms, []).level == "robust"
        # Flagged and not proven.
        norms = [counted(200, 198, flags=flagged), counted(200, 190, 2.0, certified=curve(2.0, 190))][::order]
        verdict = judge(norms, [])
        assert (verdict.level, verdict.decided_by) == ("unclear", math.inf)
        (distrust,) = [finding for finding in verdict.findings if "Do not trust" in finding]
        assert distrust == "Do not trust the robust accuracy in ℓ∞ (zero gradients). 12 of 64 are zero."


def test_what_belongs_to_the_model_puts_every_norm_in_doubt_that_is_not_proven():
    verdict = judge([counted(200, 198), counted(200, 190, 2.0)], [], [RAISED])
    assert verdict.level == "unclear"
    assert verdict.findings[0] == "Do not trust any robust accuracy here (zero gradients). 12 of 64 are zero."
    one = judge([counted(200, 198, certified=curve(math.inf, 197)), counted(200, 190, 2.0)], [], [RAISED])
    assert one.findings[0] == "Do not trust the robust accuracy in ℓ₂ (zero gradients). 12 of 64 are zero."


@pytest.mark.parametrize(("proven", "stands"), [(198, True), (196, True), (195, False), (0, False)])
def test_flags_give_way_where_proof_and_attack_meet_within_a_point(proven, stands):
    flagged = (in_norm(RAISED, math.inf),)
    norm = counted(200, 198, flags=flagged, certified=curve(math.inf, proven))
    assert bool(doubts([norm], [RAISED])[math.inf]) == (not stands)
    verdict = judge([norm], [], [RAISED])
    assert any("Do not trust" in finding for finding in verdict.findings) == (not stands)
    assert verdict.level == ("unclear" if proven == 0 else "robust")


def test_proofs_on_a_few_of_the_samples_do_not_answer_a_doubt_about_all():
    """16 of 16 proven leave up to 19 % of all samples open."""
    flagged = (in_norm(RAISED, math.inf),)
    for n, level in ((16, "unclear"), (200, "robust")):
        searched = CertifiedCurve(math.inf, (0.1,), (Rate(n, n),), 0.2, measured=n, withstood=Rate(n, n))
        norm = counted(200, 200, flags=flagged, certified=searched)
        assert judge([norm], []).level == level
        assert bool(doubts([norm])[math.inf]) == (n < 100)


def test_an_attack_that_succeeded_needs_no_trust():
    assert judge([counted(200, 30, flags=(in_norm(RAISED, math.inf),))], []).level == "fragile"


def universal(p, kind, hits, eps=0.1):
    return UniversalResult(
        p, eps, kind, "how", 100, Rate(hits, 100), (Rate(2, 100), Rate(4, 100)), Rate(90 - hits, 100)
    )


def test_the_universal_perturbations_number_is_the_best_of_those_found():
    norms = [
        norm_result(math.inf, universal=(universal(math.inf, "fitted", 20), universal(math.inf, "data-free", 35))),
        norm_result(2.0, universal=(universal(2.0, "fitted", 12), universal(2.0, "data-free", 3))),
    ]
    assert [norm.best_universal.fooled.hits for norm in norms] == [35, 12]
    (finding,) = [finding for finding in judge(norms, []).findings if "One and the same" in finding]
    assert (
        "35.0 % within ℓ∞ 0.1 (data-free; random perturbations of equal size 3.0 % on average and at most 4.0 %)"
        in finding
    )
    assert "12.0 % within ℓ₂ 0.1 (fitted;" in finding
    assert "20.0 %" not in finding
    assert norm_result().best_universal is None


def test_nothing_right_is_not_robust():
    verdict = judge([counted(0, 0)], [])
    assert verdict.level != "robust"
    assert "0.0 %" in verdict.headline


def curve(p, hits, median=0.0123):
    return CertifiedCurve(p, (0.0, 0.1, 0.2), (Rate(180, 200), Rate(hits, 200), Rate(0, 200)), median)


def test_the_gap_between_proof_and_attack_is_a_finding():
    def proofs(of_inf, of_two):
        norms = [counted(180, 100, certified=of_inf), counted(180, 150, 2.0, certified=of_two)]
        return [finding for finding in judge(norms, []).findings if "Prov" in finding]

    (finding,) = proofs(curve(math.inf, 40), curve(2.0, 3, 0.5))
    assert finding == (
        "Proven: half of the right answers withstand every change below 0.0123 in ℓ∞ and 0.500 in ℓ₂. Within the"
        " standard budgets 0.1 and 0.1, 20.0 % and 1.5 % of the samples are proven robust, which leaves 30.0 and 73.5"
        " points undecided between proof and attack."
    )
    (finding,) = proofs(None, curve(2.0, 3))
    assert "Within the standard budget 0.1, 1.5 % of" in finding
    assert proofs(None, None) == proofs(None, curve(2.0, 0, None)) == []


def test_both_sides_of_the_robust_accuracy_are_said_at_every_budget_of_the_curve():
    eps = (0.1, 0.2, 0.3, 0.4)
    attacked = SecurityCurve(math.inf, eps, (Rate(150, 200), Rate(60, 200), Rate(0, 200), Rate(0, 200)))
    proven = CertifiedCurve(math.inf, (0.0, *eps), (Rate(180, 200), Rate(150, 200), *[Rate(3, 200)] * 3), 0.0123)
    proven = dataclasses.replace(proven, certified=(*proven.certified[:3], Rate(0, 200), Rate(0, 200)))
    norm = counted(180, 150, certified=proven, curve=attacked)
    (said,) = [f for f in judge([norm], []).findings if "from proven to attacked" in f]
    assert said == (
        "Robust accuracy, from proven to attacked: in ℓ∞ 75.0 % within 0.1, 1.5 to 30.0 % within 0.2, 0.0 % within 0.3."
    )
    assert not any("proven to attacked" in f for f in judge([counted(180, 150, curve=attacked)], []).findings)


@pytest.mark.parametrize(
    ("method", "upper", "said"),
    [
        ("multipliers", 2.0, "“multipliers” in ℓ₂, a factor of 6.00 below the product of norms."),
        ("multipliers", 11.99, "“multipliers” in ℓ₂."),
        ("product of norms", 12.0, "“product of norms” in ℓ₂."),
    ],
)
def test_the_method_that_attained_the_bound_is_a_finding(method, upper, said):
    arguments = (("product of norms", 12.0), ("multipliers", max(upper, 2.0)))
    result = LipschitzResult(2.0, upper, method, None, 1.0, 0.5, 9, 0.9, arguments)
    assert any(finding.endswith(said) for finding in judge([norm_result(2.0, lipschitz=result)], []).findings)
    alone = norm_result(2.0, lipschitz=dataclasses.replace(result, arguments=arguments[:1]))
    assert not any("tightest" in finding for finding in judge([alone], []).findings)


def test_what_the_network_decides_by_is_a_finding_with_the_classes_that_are_neighbours_most_often():
    layers = FeatureLayer("a", 9, 0.8), FeatureLayer("b", 9, 0.3), FeatureLayer("c", 9, 0.24)
    pairs = [FeaturePair(i, i + 1, 4, 9, 2.0, 0.03, True, 0.25) for i in range(9)]
    pairs += [FeaturePair(i, i + 1, 1, 7, 2.0, 0.5) for i in range(8)]
    found = FeatureCompression(100, 50, tuple(pairs), layers, interpolant=0.02)

    def said(features):
        return [text for text in judge([counted(100, 60)], [], (), features).findings if "decide" in text]

    by, where = said(found)
    assert by.startswith(
        "The network decides by 3.0 % of what separates a sample from the nearest one of another class"
    )
    assert "median of 17; a random direction has 6.7 %, a linear classifier through all samples at most 2.0 %" in by
    assert "Of what separates 4 from 9, nearest most often, it is 3.0 %." in by
    assert "The attack needs at most 25 % of half that distance" in by
    assert "by 80 % of it at “a” and by 24 % at “c”; the largest loss is at “b”, from 80 % to 30 %" in where
    _, where = said(
        dataclasses.replace(found, layers=(*layers, FeatureLayer("d", 9, 0.05), FeatureLayer("e", 9, 0.005)))
    )
    assert "the largest loss is at “d”, from 24 % to 5.0 %" in where  # not at e: 6.7 % is what a random direction has
    assert said(dataclasses.replace(found, pairs=tuple(pairs[:7]))) == []
    assert said(None) == []
    (alone,) = said(dataclasses.replace(found, layers=layers[:1], interpolant=None))
    assert "linear classifier" not in alone
