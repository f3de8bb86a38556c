"""The verdict in words: its level, and which findings follow from which numbers."""

import dataclasses
import math

import pytest

from brittle.reporting.verdict import judge
from brittle.results import CertifiedCurve, Evaluation, LipschitzResult, Rate
from helpers.audits import norm_result


def counted(clean, robust, p=math.inf, **parts):
    evaluation = Evaluation(("apgd",), p, 0.1, (0.0, 1.0), 1, 0, {}, 200, clean, robust, 0, 0.1)
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


@pytest.mark.parametrize(
    ("method", "upper", "said"),
    [
        ("multipliers", 2.0, "“multipliers” in ℓ₂, a factor of 6.00 below the product of norms."),
        ("multipliers", 11.99, "“multipliers” in ℓ₂."),
        ("product of norms", 12.0, "“product of norms” in ℓ₂."),
    ],
)
def test_the_argument_that_attained_the_bound_is_a_finding(method, upper, said):
    arguments = (("product of norms", 12.0), ("multipliers", max(upper, 2.0)))
    result = LipschitzResult(2.0, upper, method, None, 1.0, 0.5, 9, 0.9, arguments)
    assert any(finding.endswith(said) for finding in judge([norm_result(2.0, lipschitz=result)], []).findings)
    alone = norm_result(2.0, lipschitz=dataclasses.replace(result, arguments=arguments[:1]))
    assert not any("argument" in finding for finding in judge([alone], []).findings)
