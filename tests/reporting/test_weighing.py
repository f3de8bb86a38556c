"""Whether compressibility explains a fragility: one sentence, and silence where the numbers say nothing."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from brittle.reporting.verdict import judge
from brittle.reporting.weighing import CONCENTRATED, exceeds_random, explanation, total_owed, uses
from brittle.results import CertifiedCurve, Evaluation, Flag, LayerResponse, LipschitzResult, NormResult, Rate
from helpers.audits import layer

INF = math.inf


def of_excess(name, excess):
    """A layer whose spectral norm exceeds that of a random matrix so many times."""
    plain = layer(name, 32, 48)
    return dataclasses.replace(plain, filter_norm_2=plain.filter_norm_2 * excess / plain.excess(2))


def unstructured(of_layer):
    """The norm of a random matrix of its shape and scale."""
    return of_layer.frobenius / math.sqrt(32) * (1 + math.sqrt(32 / 48))


def response(name, step, *, energy=0.1, gain=1.0, n=50, error=0.02):
    return LayerResponse(name, INF, (1, 3), (energy / 2, energy), (1 / 48, 3 / 48), 0.2, gain, n, 0, (0.01, 0.01), step,
                         error)  # fmt: skip


def norm(layers, *, attack, between, reach, energy=(0.6, 0.2), whole=10.0, n=50, survive=30, flags=()):
    """A norm in which each layer enlarges the attack and the way between classes so many times of what a random matrix
    could at the most, and the whole network the attack ``whole`` times as much as the way between classes.
    """
    rows = list(zip(layers, attack, between, strict=True))
    evaluation = Evaluation(("apgd",), INF, 0.1, (0.0, 1.0), 1, 0, {}, 200, 200, 2 * survive, 0, 0.1)
    return NormResult(
        INF, 0.1, LipschitzResult(INF, None, "", None, 1.0, 1.0, n, reach=0.1 * reach), evaluation,
        responses=tuple(response(l.name, a * unstructured(l), energy=energy[0], gain=whole, n=n) for l, a, _ in rows),
        random_responses=tuple(response(l.name, unstructured(l), energy=energy[1], n=n) for l, *_ in rows),
        class_responses=tuple(response(l.name, b * unstructured(l), n=n) for l, _, b in rows),
        flags=flags,
    )  # fmt: skip


PAIR = [of_excess("steep", 3.0), of_excess("flat", 1.1)]


def sentence(**numbers):
    given = {"layers": PAIR, "attack": (2.0, 0.9), "between": (1.0, 0.9), "reach": 0.7} | numbers
    fragile = given.pop("fragile", True)
    return explanation(norm(**given), given["layers"], fragile=fragile)


def test_what_the_attack_owes_to_concentration_explains_if_it_makes_the_difference_to_the_budget():
    text = sentence()
    assert text == (
        "Compressibility explains the fragility in ℓ∞: “steep” is concentrated (its norm is 3.0 times that of a random"
        " matrix of equal shape and scale), takes up 60 % of the attack's energy in its 3 leading directions (20 % of a"
        " random perturbation's) and enlarges the attack 2.00 times as much as what tells the classes apart; to first"
        " order the median right answer lies 0.700 budgets from a wrong one, and would lie 1.40 without what"
        " concentration adds."
    )
    assert "in ℓ∞ partly: “steep” is" in sentence(reach=0.2)  # a small margin has its share
    assert "in ℓ∞ partly: “steep” is" in sentence(reach=1.3)  # the tail breaks, the median does not


@pytest.mark.parametrize("numbers", [
    {"between": (2.0, 0.9)},  # the classes pass the layer as well as the attack does
    {"attack": (0.9, 0.9), "between": (0.5, 0.9)},  # no more than a random matrix could
    {"attack": (1.2, 0.9)},  # below what is worth a word
    {"whole": 1.1},  # the network as a whole does not enlarge the attack: branches that add
    {"layers": [of_excess("steep", 1.4), PAIR[1]]},  # not concentrated
    {"attack": (0.9, 5.0)},  # the growth is elsewhere, in a layer that is not concentrated
])  # fmt: skip
def test_compressible_is_not_fragile_unless_the_attack_owes_its_growth_to_it(numbers):
    text = sentence(**numbers)
    assert text.startswith("Compressibility does not explain the fragility in ℓ∞: ")
    assert text.endswith("lies 0.700 budgets from a wrong one.")
    if "layers" in numbers:
        assert "no layer is concentrated (the norm of “steep” is 1.4 times" in text


def test_a_robust_network_is_told_that_its_concentration_does_no_harm():
    text = sentence(between=(2.0, 0.9), reach=3.0, fragile=False)
    assert text.startswith("Compressible, but not fragile in ℓ∞: “steep” is concentrated (its norm is 3.0 times")
    assert "such layers enlarge the attack no more than what tells the classes apart" in text
    assert text.endswith("lies 3.00 budgets from a wrong one.")
    assert "explains" not in sentence(reach=3.0, fragile=False)
    assert sentence(layers=[PAIR[1]], attack=(1.0,), between=(1.0,), fragile=False).startswith(
        "Not fragile in ℓ∞, and not compressible: no layer is concentrated"
    )


def test_growth_within_its_uncertainty_is_no_growth():
    noisy = norm(PAIR, attack=(2.0, 0.9), between=(1.0, 0.9), reach=0.7)
    wide = tuple(dataclasses.replace(r, step_error=0.5) for r in noisy.responses)
    (steep, _) = uses(dataclasses.replace(noisy, responses=wide), PAIR)
    assert (steep.owed, steep.growth) == (1.0, pytest.approx(2.0))
    (steep, flat) = uses(noisy, PAIR)
    assert (steep.owed, flat.owed) == (pytest.approx(2.0), 1.0)
    assert total_owed(noisy, [steep, flat]) == pytest.approx(2.0)


def test_what_was_not_measured_is_not_judged():
    whole = norm(PAIR, attack=(2.0, 0.9), between=(1.0, 0.9), reach=0.7)
    assert explanation(whole, PAIR, fragile=True)
    for lacking in (
        dataclasses.replace(whole, random_responses=()),
        dataclasses.replace(whole, class_responses=()),
        dataclasses.replace(whole, lipschitz=dataclasses.replace(whole.lipschitz, reach=None)),
        norm(PAIR, attack=(2.0, 0.9), between=(1.0, 0.9), reach=0.7, n=7),
    ):
        assert explanation(lacking, PAIR, fragile=True) is None
    assert explanation(whole, [], fragile=True) is None
    assert explanation(whole, [dataclasses.replace(each, degenerate=True) for each in PAIR], fragile=True) is None


@pytest.mark.parametrize(("attack", "random", "error", "worth"), [
    (0.14, 0.12, 0.001, False), (0.6, 0.2, 0.01, True), (0.6, 0.2, 0.3, False), (0.31, 0.2, 0.001, True),
    (0.29, 0.2, 0.001, False), (0.0, 0.2, 0.01, False),
])  # fmt: skip
def test_a_little_more_energy_than_chance_is_no_finding(attack, random, error, worth):
    one, two = (
        dataclasses.replace(response("fc", 1.0, energy=energy), energy_error=(error, error))
        for energy in (attack, random)
    )
    assert exceeds_random(one, two, 1) == worth
    whole = norm([PAIR[0]], attack=(1.0,), between=(1.0,), reach=1.0)
    said = judge([dataclasses.replace(whole, responses=(one,), random_responses=(two,))], []).findings
    assert any("where the attack comes in" in finding for finding in said) == worth


@pytest.mark.parametrize(("excess", "worth"), [(1.0, False), (1.49, False), (1.51, True)])
def test_a_layer_no_steeper_than_a_random_matrix_is_no_finding(excess, worth):
    said = judge([], [of_excess("fc", excess)]).findings
    assert any("most concentrated layer in ℓ₂ is “fc”" in finding for finding in said) == worth


@pytest.mark.parametrize(("m", "n"), [(10, 400), (100, 100), (400, 100), (256, 16)])
def test_random_matrices_are_not_concentrated(m, n):
    for seed in range(3):
        W = np.random.default_rng(seed).standard_normal((m, n))
        sigma, rows = np.linalg.svd(W, compute_uv=False), np.abs(W).sum(1)
        found = dataclasses.replace(
            layer("fc", m, n), filter_norm_2=sigma[0], filter_norm_inf=rows.max(), frobenius=np.linalg.norm(W),
            spectrum=min(m, n),
        )  # fmt: skip
        for p in (2.0, INF):
            assert found.excess(p) == pytest.approx(1.0, abs=0.1)
            assert found.excess(p) < CONCENTRATED
    rank_one = dataclasses.replace(found, filter_norm_2=found.frobenius)
    assert rank_one.excess(2) == pytest.approx(math.sqrt(min(m, n)) / (1 + math.sqrt(min(m, n) / max(m, n))))
    assert layer("zero", zero=True).excess(2) == layer("zero", zero=True).excess(INF) == 0


@pytest.mark.parametrize(("survive", "start"), [
    (95, "Compressible, but not fragile in ℓ∞"), (70, "Compressibility explains the fragility in ℓ∞: "),
    (30, "Compressibility explains the fragility in ℓ∞: "), (2, "Compressibility explains the fragility in ℓ∞: "),
])  # fmt: skip
def test_the_verdict_holds_exactly_one_sentence_about_it_and_it_fits_the_level(survive, start):
    def sentences(*flags):
        whole = norm(PAIR, attack=(2.0, 0.9), between=(1.0, 0.9), reach=0.7, survive=survive, flags=flags)
        return [f for f in judge([whole], PAIR).findings if "ompressib" in f]

    (text,) = sentences()
    assert text.startswith(start)
    (doubted,) = sentences(Flag("zero gradients", True, "All.", "why", INF))
    assert ("is not judged" in doubted) == (survive >= 50)


def test_a_network_that_guesses_is_not_explained():
    whole = norm(PAIR, attack=(2.0, 0.9), between=(1.0, 0.9), reach=0.7)
    guess = dataclasses.replace(whole, evaluation=dataclasses.replace(whole.evaluation, chance=1.0))
    assert not any("ompressib" in finding for finding in judge([guess], PAIR).findings)


def test_the_norm_that_decides_is_the_one_that_is_explained():
    fragile = norm(PAIR, attack=(2.0, 0.9), between=(1.0, 0.9), reach=0.7)
    proven = CertifiedCurve(2.0, (0.1,), (Rate(200, 200),), 0.2)
    robust = dataclasses.replace(
        fragile, p=2.0, certified=proven, evaluation=dataclasses.replace(fragile.evaluation, p=2.0, robust_correct=200)
    )
    for order in (1, -1):
        (text,) = [f for f in judge([fragile, robust][::order], PAIR).findings if "ompressib" in f]
        assert text.startswith("Compressibility explains the fragility in ℓ∞")
