"""What an audit offers to whoever reads it: its norms by name, its rates, its frames."""

import json
import math
import pickle
from dataclasses import replace

import pytest

from brittle.errors import InputError
from brittle.results import Audit, CertifiedCurve, Evaluation, NormBounds, Rate, SampleResult
from brittle.results.methods import Argument, OperatorMethod, UniversalKind
from helpers.audits import CERTIFIED, data_free, full, with_parts, without


def test_a_norm_is_found_by_its_number():
    for p in (math.inf, 2, 2.0):
        assert full().norm(p).p == full().norm(p).evaluation.p == p
    with pytest.raises(InputError, match=r"^p: expected inf or 2, in which the audit was made; got 1$"):
        full().norm(1)
    with pytest.raises(InputError, match=r"^p: expected 2, in which the audit was made; got inf$"):
        data_free().norm(math.inf)
    with pytest.raises(InputError, match=r"^p: expected no norm"):
        replace(full(), norms=()).norm(2)


def test_clean_accuracy_is_that_of_the_data_in_whichever_norm_it_was_counted():
    assert full().clean_accuracy == Rate(912, 1000)
    assert with_parts(full(), math.inf, evaluation=None).clean_accuracy == Rate(912, 1000)
    assert without(full(), "evaluation").clean_accuracy is None
    assert data_free().clean_accuracy is None
    assert replace(full(), norms=()).clean_accuracy is None


def test_the_frame_of_samples_has_a_row_a_sample_and_norm():
    broken = SampleResult(0, 3, 3, 5, 2.0, -0.5, 0.03, "apgd", 1)
    wrong = SampleResult(1, 2, 4, 4, -1.0, -1.0, 0.0, None, None, 0.0)
    audit = full()
    for p in (math.inf, 2.0):
        audit = with_parts(audit, p, evaluation=replace(full().norm(p).evaluation, samples=(broken, wrong)))
    frame = audit.samples_frame()
    assert list(frame["p"]) == [math.inf, math.inf, 2.0, 2.0]
    assert list(frame["eps"]) == [8 / 255, 8 / 255, 0.5, 0.5]
    assert list(frame["index"]) == [0, 1, 0, 1]
    assert list(frame["attack"].isna()) == list(frame["restart"].isna()) == [False, True] * 2
    assert len(data_free().samples_frame()) == 0
    assert Audit.from_json(audit.to_json()) == audit  # samples are not part of the JSON nor of comparisons


def test_certified_accuracy_between_two_budgets_is_that_of_the_larger():
    assert CERTIFIED.at(0) == Rate(912, 1000)
    assert CERTIFIED.at(0.3) == CERTIFIED.at(0.4) == Rate(200, 1000)
    assert CERTIFIED.at(7.0) == Rate(0, 1000)
    norm = full().norm(2)
    assert CERTIFIED.undecided(norm.evaluation) == norm.undecided == Rate(583 - 121, 1000)
    assert norm.proven == Rate(121, 1000)
    # Radii searched for on some samples, while proofs at the budget spared more samples of all the attack.
    some = replace(CERTIFIED, certified=tuple(Rate(1, 10) for _ in CERTIFIED.eps), measured=10, withstood=Rate(6, 10))
    spared = replace(norm, certified=some, evaluation=replace(norm.evaluation, proven=300))
    assert (spared.proven, spared.undecided) == (Rate(300, 1000), Rate(283, 1000))
    fewer = replace(norm, certified=some)
    assert (fewer.proven, fewer.undecided) == (Rate(1, 10), Rate(5, 10))
    assert full().norm(math.inf).proven is None
    assert full().norm(math.inf).undecided is None
    assert CertifiedCurve(2.0, (), (), None).at(1.0) == Rate(0, 0)


def test_an_evaluation_says_itself_in_one_line():
    evaluation: Evaluation = full().norm(2).evaluation
    assert evaluation.summary.startswith("ℓ₂ 0.5: clean 91.2 %")
    assert replace(evaluation, proven=3).summary.endswith("; 3 proven robust")


def test_kinds_and_methods_have_a_sentence_each():
    assert {result.kind for norm in full().norms for result in norm.universal} == set(UniversalKind)
    for name in (*UniversalKind, *Argument, *OperatorMethod):
        assert name.explanation.endswith(".")


def test_the_names_of_methods_are_plain_strings_wherever_they_are_shown_kept_or_compared():
    for name in (*UniversalKind, *Argument, *OperatorMethod):
        plain = name.value
        assert type(plain) is str
        assert plain == name == f"{name}" == json.loads(json.dumps(name))
        assert {plain: 1}[name] == {name: 1}[plain] == 1
        assert (repr(name), pickle.loads(pickle.dumps(name))) == (repr(plain), plain)
    bound = NormBounds(2.0, 1.0, 1.0, OperatorMethod.EXACT)
    result = replace(full().layers[0], operator_norms=(bound,))
    again = Audit.from_json(replace(full(), layers=(result,)).to_json()).layers[0]
    assert again == result
    assert repr(again) == repr(result)
