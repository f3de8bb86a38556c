"""The honesty flags: raised by networks that are built to deserve them, not by honest ones, and by no single sample."""

from __future__ import annotations

import dataclasses
import functools
import html
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import Tensor, nn

import brittle
from brittle.attacks import apgd, square
from brittle.evaluation.curves import security_curve
from brittle.evaluation.execution import Execution
from brittle.evaluation.honesty import CHECKS, answers, evidence, gradients, honesty_flags, queries
from brittle.evaluation.threat import Threat
from brittle.evaluation.worst_case import worst_case
from brittle.reporting.page import report_html
from brittle.reporting.verdict import judge
from brittle.results import Audit, CertifiedCurve, Evaluation, Flag, Rate, SecurityCurve
from brittle.results.wording import budget
from helpers import networks
from helpers.audits import norm_result, with_parts, without
from helpers.deceivers import Backwards, Deceiver
from helpers.matrices import quick
from helpers.networks import few, generator, mlp, seeded, uniform, untouched

INF = math.inf
BUDGETS = {INF: 0.1, 2.0: 0.6}
OF_MODEL = [
    "zero gradients",
    "different answers to one input",
    "answers that depend on the batch",
    "probabilities in place of logits",
    "answers that jump",
]
OF_BUDGET = [
    "gradients against differences",
    "cross-entropy against DLR",
    "random start against none",
    "flat security curve",
    "budget of the whole range",
    "queries against gradients",
]
SQUARE = functools.partial(square, queries=150)
ATTACKS = tuple(functools.partial(apgd, loss=loss, steps=15) for loss in ("ce", "dlr"))


def checked(model, x, y, p=INF, eps=None, attacks=ATTACKS, **options) -> tuple[dict[str, Flag], dict[str, str]]:
    """Flags and reasons by name, with a security curve around the budget."""
    threat, eps = Threat(attacks, p, bounds=options.pop("bounds", (0.0, 1.0))), eps or BUDGETS[p]
    worst = worst_case(model, x, y, threat, eps)
    curve = security_curve(model, worst, threat, at=eps, budgets=[share * eps for share in (0.25, 0.5, 1.5, 2)])
    flags, missing = honesty_flags(model, worst, threat, eps, curve=curve, **options)
    return {flag.name: flag for flag in flags}, {item.name: item.reason for item in missing}


def raised(flags: dict[str, Flag]) -> set[str]:
    return {name for name, flag in flags.items() if flag.raised}


# --- networks that deserve a flag ---------------------------------------------------------------------------


class Masked(nn.Module):
    """The trained network behind something that hides its gradients or changes its answers."""

    def __init__(self, disguise) -> None:
        super().__init__()
        self.net, self.disguise = mlp(), disguise

    def forward(self, x: Tensor) -> Tensor:
        """Whatever the disguise makes of the network and the input."""
        return self.disguise(self.net, x)


def dead_zone(net, x):
    """Around every sixteenth (where the pixels of the digits are) nothing changes; further off it does."""
    grid = ((16 * x).round() / 16).detach()
    return net(grid + F.softshrink(x - grid, 1 / 128))


DESERVED = {
    "quantised input": (
        lambda net, x: net((8 * x).round() / 8),
        {"zero gradients", "answers that jump", "budget of the whole range", "queries against gradients"},
    ),
    "logits scaled by 10,000": (lambda net, x: 1e4 * net(x), {"zero gradients", "cross-entropy against DLR"}),
    "gradient-shattering sine": (
        lambda net, x: net(x + 0.005 * torch.sin(1e4 * x)),
        {"gradients against differences", "queries against gradients"},
    ),
    "noise": (lambda net, x: net(x + 0.1 * torch.randn_like(x)), {"different answers to one input"}),
    "gradient of the wrong sign": (
        lambda net, x: net(Backwards.apply(x)),
        {"gradients against differences", "queries against gradients"},
    ),
    "no gradient at the samples": (dead_zone, {"zero gradients", "random start against none"}),
    "constant": (
        lambda net, x: 0 * net(x) + torch.arange(10.0).flip(0),
        {"zero gradients", "flat security curve", "budget of the whole range"},
    ),
    "softmax": (lambda net, x: net(x).softmax(1), {"probabilities in place of logits"}),
    "saturated softmax": (
        lambda net, x: (40 * net(x)).softmax(1),
        {"probabilities in place of logits", "zero gradients"},
    ),
    "statistics of the batch": (
        lambda net, x: net(F.batch_norm(x, None, None, training=True)),
        {"answers that depend on the batch"},
    ),
}


UNASKED = {"noise": {"answers that depend on the batch", "answers that jump"}, "constant": {"answers that jump"}}
"""Checks that make no sense of such a network."""


@functools.cache
def deserved(name: str, p: float):
    x, y = few(100)
    return checked(Masked(DESERVED[name][0]), x, torch.zeros_like(y) if name == "constant" else y, p)


CASES = [
    (name, p)
    for name, (_, expected) in DESERVED.items()
    for p in BUDGETS
    if (p == INF or not expected <= set(OF_MODEL)) and (name, p) != ("gradient-shattering sine", 2.0)
]
"""Signs of the model itself in one norm; and in l_2 gradient attacks find their way past the sine."""


@pytest.mark.parametrize(("name", "p"), CASES)
def test_a_network_that_deserves_a_flag_raises_it(name, p):
    flags, missing = deserved(name, p)
    expected = DESERVED[name][1]
    assert raised(flags) >= expected
    assert raised(flags) & set(OF_MODEL) == expected & set(OF_MODEL)
    assert set(missing) == UNASKED.get(name, set())
    for flag in flags.values():
        assert flag.p == (None if flag.name in OF_MODEL else p)


def test_the_number_that_raised_a_flag_is_in_its_finding():
    assert deserved("quantised input", INF)[0]["zero gradients"].finding.count("64 of 64") == 2
    zero = deserved("logits scaled by 10,000", INF)[0]["zero gradients"].finding
    assert re.findall(r"\d+ of 64", zero) == ["64 of 64", "0 of 64"]
    assert deserved("softmax", INF)[0]["probabilities in place of logits"].finding.startswith(
        "The outputs of 100 of 100"
    )
    for name in ("constant", "quantised input"):  # from the samples themselves nothing moves, however large the budget
        assert deserved(name, 2.0)[0]["budget of the whole range"].finding.startswith("64 of 64")


def test_every_check_has_its_line_in_the_documentation():
    lines = (Path(__file__).parents[2] / "docs" / "attacks.md").read_text(encoding="utf-8").splitlines()
    table = lines[lines.index("| flag | made on | raised when |") + 2 :][: len(CHECKS) + 1]
    assert [check.name for check in CHECKS] == [*OF_MODEL, *OF_BUDGET]
    assert [line.split(" | ")[0].removeprefix("| ") for line in table] == [*OF_MODEL, *OF_BUDGET, ""]
    assert [check.name for check in CHECKS if check.of_model] == OF_MODEL


# --- honest networks ----------------------------------------------------------------------------------------


def small_conv() -> nn.Module:
    """Two convolutions with batch norm."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 12, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip


def deep() -> nn.Module:
    """Four smooth hidden layers."""
    hidden = [layer for _ in range(3) for layer in (nn.Linear(48, 48), nn.GELU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.GELU(), *hidden, nn.Linear(48, 10))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("make", [small_conv, deep])
def test_honest_networks_raise_none(make, seed):
    net = networks._trained(seeded(make, seed), 80)
    for p, scale in ((INF, 0.6), (2.0, 0.5)):
        flags, missing = checked(net, *few(70), p, scale * BUDGETS[p])
        assert raised(flags) == set()
        assert [*flags, *missing] == [*OF_MODEL, *OF_BUDGET]


@pytest.mark.parametrize("p", BUDGETS)
@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_an_honest_network_raises_none_at_any_budget(p, scale):
    flags, _ = checked(mlp(), *few(100), p, scale * BUDGETS[p])
    assert raised(flags) == set()


# --- what each check counts ---------------------------------------------------------------------------------


def above(hits: int, n: int, share: float) -> bool:
    """SciPy's opinion on whether the 95 % interval lies above the share, one of those in docs/attacks.md."""
    return binomtest(hits, n).proportion_ci(method="wilson").low > share


def mask(hits: int, n: int, offset: int = 0) -> Tensor:
    return (torch.arange(n) >= offset) & (torch.arange(n) < offset + hits)


counts = st.integers(evidence.FEWEST_SAMPLES, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@quick
@given(counts)
def test_shares_are_judged_by_their_interval(pair):
    hits, n = pair
    gradient = torch.ones(n, 2, 3)
    gradient[mask(hits, n)] = 0
    for other in (gradient, torch.ones(n, 2, 3)):
        assert answers.zero_gradients(gradient, other).raised == above(hits, n, 0.05)
        assert answers.zero_gradients(other, gradient).raised == above(hits, n, 0.05)
    none, some = mask(0, n), mask(hits, n)
    assert gradients.loss_gap(none, some).raised == above(hits, n, 0.25)
    assert gradients.loss_gap(some, none).raised == above(hits, n, 0.25)
    assert gradients.loss_gap(none, none, Rate(hits, n)).raised == above(hits, n, 0.25)
    assert gradients.start_gap(none, some).raised == above(hits, n, 0.10)
    assert gradients.start_gap(some, none).raised == above(hits, n, 0.10)
    assert gradients.whole_range(some, 1.0, INF).raised == above(hits, n, 0.05)
    assert queries.query_gap(Rate(0, n), Rate(hits, n), Rate(3, 4)).raised == above(hits, n, 0.02 * 4 / 3)
    assert queries.query_gap(Rate(hits, n), Rate(0, n), Rate(3, 4)).raised == above(hits, n, 0.02)


@quick
@given(counts, st.integers(0, 200))
def test_what_both_attacks_break_raises_nothing(pair, extra):
    hits, n = pair
    same = mask(hits, n)
    assert not gradients.loss_gap(same, same).raised
    assert not gradients.start_gap(same, same).raised
    one = same.clone()
    one[extra % n] ^= True  # a difference of one sample is no finding
    assert not gradients.loss_gap(same, one).raised
    assert not gradients.start_gap(one, same).raised


def test_one_odd_sample_of_64_raises_nothing_and_most_of_them_do():
    for hits, expected in ((0, False), (1, False), (2, False), (40, True)):
        gradient = torch.ones(64, 5)
        gradient[:hits] = 0
        found = [
            answers.zero_gradients(gradient, gradient),
            gradients.loss_gap(mask(hits, 64), mask(0, 64)),
            gradients.loss_gap(mask(0, 64), mask(hits, 64)),
            gradients.start_gap(mask(hits, 64), mask(0, 64)),
            gradients.whole_range(mask(hits, 64), 1.0, INF),
            queries.query_gap(Rate(0, 64), Rate(hits, 64), Rate(1, 1)),
        ]
        assert [flag.raised for flag in found] == [expected] * len(found)
        assert all(f"{hits} of 64" in flag.finding or f"alone {hits}" in flag.finding for flag in found)


def test_queries_count_by_the_points_that_they_take_off():
    for left, expected in ((Rate(9, 10), True), (Rate(1, 200), False)):
        flag = queries.query_gap(Rate(0, 1), Rate(16, 32), left)
        assert flag.raised is expected
        assert f"{50 * left.hits / left.n:.1f} points" in flag.finding
    assert not queries.query_gap(Rate(0, 1), Rate(0, 32), Rate(0, 10)).raised


def curve(*hits: int, n: int = 100) -> SecurityCurve:
    return SecurityCurve(INF, tuple(0.01 * k for k in range(1, len(hits) + 1)), tuple(Rate(h, n) for h in hits))


def test_a_curve_is_flat_when_it_should_have_fallen_and_did_not():
    near, far = torch.full((40,), 0.005), torch.full((40,), 0.5)
    flag = gradients.flat_curve
    assert flag(curve(90, 90, 88), near, 10).raised
    assert not flag(curve(90, 90, 88), far, 10).raised  # the budgets are small
    assert not flag(curve(90, 60, 30), near, 10).raised  # it falls
    assert not flag(curve(90, 86, 85), near, 10).raised  # by 5 %
    assert not flag(curve(12, 12, 12), near, 10).raised  # not above chance
    assert flag(curve(30, 30, 30), near, 10).raised
    assert not flag(curve(30, 30, 30), near, 3).raised
    assert not flag(curve(90, 90, 90), near[:0], 10).raised
    assert "90.0 % at 0.01 to 88.0 % at 0.03" in flag(curve(90, 90, 88), near, 10).finding
    assert "40 of 40" in flag(curve(90, 90, 88), near, 10).finding


@quick
@given(st.integers(1, 30), st.integers(2, 12), st.integers(0, 100))
def test_logits_are_no_probabilities_and_softmax_is(n, classes, seed):
    logits = torch.randn(n, classes, generator=generator(seed))
    assert not answers.probabilities(logits.abs() + 0.1 + 1 / classes).raised  # adds up to more than 1
    assert not answers.probabilities(logits - logits.mean(1, keepdim=True) + 1 / classes - 2).raised
    assert not answers.probabilities(logits.log_softmax(1)).raised
    for scale in (1.0, 100.0):
        assert answers.probabilities((scale * logits).softmax(1)).raised
        mixed = torch.cat([(scale * logits).softmax(1), 1 + logits.abs()[:1]])
        assert not answers.probabilities(mixed).raised


def test_a_decision_that_falls_in_one_jump_is_told_from_one_that_is_crossed():
    whole = torch.linspace(1, 3, 40)
    assert not answers.jumps(whole / 4096, -whole / 4096, 2 * whole).raised
    assert answers.jumps(whole / 2, -whole / 2, 2 * whole).raised
    some = torch.where(torch.arange(40) < 10, whole / 2, whole / 4096)
    assert not answers.jumps(some, -some, 2 * whole).raised  # a quarter of the samples, up to chance
    assert "10 of 40" in answers.jumps(some, -some, 2 * whole).finding


@quick
@given(counts, st.integers(0, 100))
def test_gradients_that_are_the_networks_own_explain_its_differences(pair, seed):
    hits, n = pair
    promised = torch.randn(2, 5, n, generator=generator(seed), dtype=torch.float64)
    promised[:, 0] = -promised[:, 0].abs()
    judge = gradients.slopes_and_differences
    assert not judge(promised, promised).raised
    assert not judge(promised, promised * (1 + 0.3 * promised.sign())).raised  # curved
    odd = torch.where(mask(hits, n), -promised, promised)
    assert judge(promised, odd).raised == above(hits, n, 0.25)  # reversed
    odd[1] = promised[1]
    assert not judge(promised, odd).raised  # one length at which they agree is enough
    elsewhere = torch.where(mask(hits, n), 4 * promised, promised)
    elsewhere[:, 0] = promised[:, 0]
    assert judge(promised, elsewhere).raised == above(hits, n, 0.25)  # blind for most of the input
    assert not judge(0 * promised, promised).raised  # no gradient: another check's matter
    assert not judge(promised, odd, rounding=promised.abs().amax((0, 1)) * 4).raised


# --- deceivers ----------------------------------------------------------------------------------------------


@functools.cache
def untrained() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))).eval()


@pytest.mark.parametrize(
    ("name", "p"),
    [("one-hot and 0.001 of another network", INF), ("one-hot and 0.001 of another network", 2.0),
     ("sharp softmax and 0.001 of another", INF), ("another network's gradients", INF),
     ("detached, and 0.001 of another", INF), ("oscillating logits", INF),
     ("straight through to the wrong places", INF)],
)  # fmt: skip
def test_a_deceiver_is_found_out_on_40_samples(name, p):
    """Those of ``benchmarks/deceivers.py`` that no test above has; the network that they hide breaks."""
    x, y = few(40)
    net, threat = Deceiver(name, mlp(), untrained()), Threat(ATTACKS, p)
    worst = worst_case(net, x, y, threat, 1.5 * BUDGETS[p])
    flags, _ = honesty_flags(net, worst, threat, 1.5 * BUDGETS[p])
    assert int(worst.robust_correct.sum()) > 2 * int(
        worst_case(mlp(), x, y, threat, 1.5 * BUDGETS[p]).robust_correct.sum()
    )
    assert any(flag.raised for flag in flags)


def test_rounding_is_no_difference_and_noise_is():
    logits = torch.randn(64, 10, generator=generator(0))
    span = float(logits.max() - logits.min())
    noise = torch.rand(64, 10, generator=generator(1)) - 0.5
    for check, share in (
        (answers.different_answers, 1e-3),
        (answers.answers_in_company, 1e-2),
    ):
        assert not check(logits, logits).raised
        assert not check(logits, logits * (1 + 1e-6)).raised
        assert not check(logits, logits + share * span * noise).raised  # at most half the share
        assert check(logits, logits + 5 * share * span * noise).raised
        assert not check(torch.zeros(4, 3), torch.zeros(4, 3)).raised
        half = logits.bfloat16()
        assert not check(half, half * (1 + 2**-8)).raised  # one unit in the last place


# --- closed forms: a linear classifier of two classes -------------------------------------------------------


def blind(model, x, y, *, eps, p):
    """An attack that finds nothing."""
    return x


def logistic() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Two classes told apart by a line, inputs far from the bounds, and their exact distances ``|z| / ||theta||``."""
    net, x = networks.Logistic(12, torch.float64), uniform(3, 80, 12, low=0.4, high=0.6, dtype=torch.float64)
    z = (x @ net.theta + net.bias).detach()
    return net, x, (z > 0).long(), z.abs()


@pytest.mark.parametrize("p", BUDGETS)
def test_a_blind_attack_gives_itself_away_and_the_number_is_exact(p):
    net, x, y, z = logistic()
    distance = z / (net.theta.abs().sum() if p == INF else net.theta.norm()).detach()
    eps = float(distance.sort().values[70])

    def nearest(model, x, y, *, eps, p):
        step = net.theta.sign() if p == INF else net.theta / net.theta.norm()
        return x - eps * (2 * y - 1)[:, None] * step.detach()

    assert bool(((x - 2 * eps >= 0) & (x + 2 * eps <= 1)).all())
    flags, missing = checked(net, x, y, p, eps, (blind,), query_attack=nearest)
    assert {"flat security curve", "queries against gradients"} <= raised(flags)
    rows = torch.linspace(0, 79, evidence.SAMPLES).round().long()
    promised = int((distance[rows] < 2 * eps).sum())
    assert f"{promised} of 64 survivors" in flags["flat security curve"].finding
    rows = torch.linspace(0, 79, queries.QUERIED_SURVIVORS).round().long()
    assert f"break {int((distance[rows] < eps).sum())} of 32" in flags["queries against gradients"].finding
    assert "at least 3 classes; got 2" in missing[f"cross-entropy against DLR, {'ℓ∞' if p == INF else 'ℓ₂'}"]
    tiny = float(distance.min()) / 4  # a budget that nothing can break within
    flags, _ = checked(net, x, y, p, tiny, (blind,), query_attack=nearest)
    assert raised(flags) == set()


def test_the_whole_range_is_the_diameter_of_the_box():
    net, x, y, _ = logistic()
    for p, eps in ((INF, 4.0), (2.0, 4 * math.sqrt(12))):
        flags, _ = checked(net, x, y, p, 0.01, ATTACKS[:1], bounds=(-1.0, 3.0))
        assert f" {budget(eps)}, which reaches every input" in flags["budget of the whole range"].finding


# --- what cannot be checked ---------------------------------------------------------------------------------


def test_few_samples_are_not_measured_and_nothing_is_passed_over():
    for n in (1, evidence.FEWEST_SAMPLES - 1):
        flags, missing = checked(mlp(), *few(n))
        counted = set(OF_BUDGET) - {"flat security curve", "queries against gradients"}  # queries count every survivor
        assert {"zero gradients", "answers that jump", *(f"{name}, ℓ∞" for name in counted)} <= set(missing)
        assert all("needs" in reason for reason in missing.values())
        assert raised(flags) == set()
        assert {*flags, *(name.removesuffix(", ℓ∞") for name in missing)} == {*OF_MODEL, *OF_BUDGET}


def test_a_network_without_gradient_is_named_as_such():
    x, y = few(40)
    flags, missing = checked(Masked(lambda net, x: net(x.detach())), x, y, attacks=(blind,))
    for name in ("zero gradients", "cross-entropy against DLR, ℓ∞", "budget of the whole range, ℓ∞"):
        assert "differentiable" in missing[name]
    assert flags["queries against gradients"].raised
    assert not flags["answers that depend on the batch"].raised


def test_a_network_that_refuses_single_samples_depends_on_the_batch():
    def refusing(net, x):
        if len(x) == 1 and not torch.is_grad_enabled():
            raise ValueError("one sample is too few")
        return net(x)

    x, y = few(64)
    worst = worst_case(Masked(refusing), x, y, Threat((blind,)), 1e-6)
    flags, _ = honesty_flags(Masked(refusing), worst, Threat((blind,)), 1e-6)
    flag = {flag.name: flag for flag in flags}["answers that depend on the batch"]
    assert flag.raised
    assert "one sample is too few" in flag.finding


def test_square_in_the_battery_is_counted_and_what_it_left_is_asked_once_more():
    x, y = few(100)
    net = Masked(DESERVED["gradient of the wrong sign"][0])
    asked = []

    def recorded(model, x, y, *, eps, p):
        asked.append(len(x))
        return x

    for attacks in ((ATTACKS[0], SQUARE), (blind, ATTACKS[0], SQUARE)):
        threat = Threat(attacks)
        worst = worst_case(net, x, y, threat, 0.1)
        flags, _ = honesty_flags(net, worst, threat, 0.1, query_attack=recorded, of_model=False)
        (flag,) = [flag for flag in flags if flag.name == "queries against gradients"]
        fell, left = int((worst.attack == len(attacks) - 1).sum()), int(worst.robust_correct.sum())
        assert f"own queries broke {fell} of {int(worst.clean_correct.sum())}" in flag.finding
        assert f"break 0 of {min(left, 32)} " in flag.finding
        assert asked.pop() == min(left, 32)
        assert flag.raised


def test_an_attack_by_queries_alone_is_no_surprise():
    flags, _ = checked(mlp(), *few(100), attacks=(SQUARE,))
    assert "own queries" not in flags["queries against gradients"].finding


def test_proven_samples_are_not_asked_again():
    x, y = few(60)
    threat = Threat(ATTACKS)
    worst = worst_case(mlp(), x, y, threat, 0.02)
    robust = worst.robust_correct.nonzero()[:, 0]
    for left in (0, 1, 5):  # one of 60 is more than a point
        proven = torch.zeros_like(worst.proven)
        proven[robust[left:]] = True
        flags, missing = honesty_flags(mlp(), dataclasses.replace(worst, proven=proven), threat, 0.02)
        reasons = {item.name: item.reason for item in missing}
        if left == 0:
            assert {flag.p for flag in flags} == {None}
            assert all("meet within a point" in reasons[f"{name}, ℓ∞"] for name in OF_BUDGET)
        elif left == 1:
            assert "not proven robust; there are 1" in reasons["queries against gradients, ℓ∞"]
        else:
            assert any(f"of {left} samples" in f.finding for f in flags if f.name == "queries against gradients")
        if left:
            assert reasons["flat security curve, ℓ∞"] == "no security curve"


def test_flags_are_not_made_where_a_proof_stands_and_the_other_norm_keeps_its_own():
    """A deceiver whose l_inf accuracy were proven: the flags of l_inf are gone, those of l_2 stay."""
    x, y = few(60)
    net = Masked(DESERVED["gradient of the wrong sign"][0])
    for p, eps in BUDGETS.items():
        threat = Threat(ATTACKS, p)
        worst = worst_case(net, x, y, threat, eps)
        if p == INF:
            worst = dataclasses.replace(worst, proven=worst.robust_correct)
        flags, _ = honesty_flags(net, worst, threat, eps)
        assert any(flag.raised for flag in flags if flag.p == p) == (p == 2)


def test_only_like_attacks_are_compared_by_their_loss():
    x, y = few(15)
    ce, dlr = ATTACKS
    for attacks, count in (
        ((ce, dlr), 1),
        ((dlr, ce), 0),
        ((ce,), 0),
        ((functools.partial(apgd, steps=3), dlr), 0),
        ((blind, functools.partial(apgd, steps=15), dlr), 1),
    ):
        flags, _ = checked(mlp(), x, y, attacks=attacks)
        assert flags["cross-entropy against DLR"].finding.count("withstood cross-entropy") == count


# --- the caller's model and state ---------------------------------------------------------------------------


@pytest.mark.parametrize("p", BUDGETS)
def test_the_model_and_the_global_state_are_untouched_and_flags_repeat(p):
    net, (x, y) = networks.untidy(), few(20)
    threat = Threat(ATTACKS, p, seed=3)
    with untouched(net):
        first = flags_of(net, x, y, threat, BUDGETS[p])
    torch.rand(3)  # another global state
    assert flags_of(net, x, y, threat, BUDGETS[p]) == first
    noisy = Masked(DESERVED["noise"][0])
    with untouched(noisy):
        flags_of(noisy, x, y, threat, BUDGETS[p])


def flags_of(net, x, y, threat, eps, **options):
    return honesty_flags(net, worst_case(net, x, y, threat, eps), threat, eps, **options)


def test_flags_of_a_norm_alone_and_in_small_batches():
    x, y = few(30)
    threat = Threat(ATTACKS, 2.0)
    flags, _ = flags_of(mlp(), x, y, threat, 0.5, of_model=False)
    assert {flag.p for flag in flags} == {2.0}
    small, _ = flags_of(mlp(), x, y, threat, 0.5, execution=Execution(batch_size=7))
    whole, _ = flags_of(mlp(), x, y, threat, 0.5)
    assert [(flag.name, flag.raised) for flag in small] == [(flag.name, flag.raised) for flag in whole]


# --- in the audit -------------------------------------------------------------------------------------------

light = functools.partial(brittle.audit, threat=Threat(ATTACKS))


@functools.cache
def audits() -> tuple[Audit, Audit]:
    """Of an honest network and of one whose gradients point the wrong way."""
    x, y = few(30)
    return light(mlp(), (x, y), eps=BUDGETS), light(
        Masked(DESERVED["gradient of the wrong sign"][0]), (x, y), eps=BUDGETS
    )


def all_flags(audit: Audit) -> list[Flag]:
    """Those of no norm, then those of each."""
    return [*audit.flags, *(flag for norm in audit.norms for flag in norm.flags)]


def test_an_audit_checks_every_norm_once_and_the_model_once():
    honest, masked = audits()
    for audit in (honest, masked):
        names = [flag.name for flag in all_flags(audit)]
        missing = [item.name for item in audit.not_measured]
        for name in OF_MODEL:
            assert names.count(name) == 1
        for name in OF_BUDGET:
            assert names.count(name) + sum(item.startswith(name) for item in missing) == 2
        assert Audit.from_json(audit.to_json()) == audit
    assert not any(flag.raised for flag in all_flags(honest))
    assert any(flag.raised for flag in all_flags(masked))


def test_raised_flags_come_first_in_the_verdict():
    honest, masked = audits()
    assert not any("trust" in finding for finding in honest.verdict.findings)
    flags = all_flags(masked)
    names = list(dict.fromkeys(flag.name for flag in flags if flag.raised))
    first = masked.verdict.findings[: len(names)]
    for name, finding in zip(names, first, strict=True):
        assert finding.startswith("Do not trust")
        assert f"({name})" in finding
        assert all(flag.finding in finding for flag in flags if flag.raised and flag.name == name)
    assert not any("trust" in finding for finding in masked.verdict.findings[len(names) :])


def test_the_verdict_says_which_norm_is_concerned():
    evaluation = Evaluation(("apgd",), INF, 0.1, (0.0, 1.0), 1, 0, {}, 200, 100, 90, 0, 0.1)

    def findings(*flags):
        of_norm = tuple(flag for flag in flags if flag.p is not None)
        norms = [
            norm_result(p, evaluation=dataclasses.replace(evaluation, p=p), flags=tuple(f for f in of_norm if f.p == p))
            for p in (INF, 2.0)
        ]
        return judge(norms, [], tuple(flag for flag in flags if flag.p is None)).findings

    here, there = (Flag("start", True, f"Found {p:g}.", "why", p) for p in (INF, 2.0))
    everywhere = Flag("noise", True, "Found 3.", "why")
    quiet = dataclasses.replace(everywhere, raised=False)
    assert findings(everywhere)[0] == "Do not trust any robust accuracy here (noise). Found 3."
    assert findings(here)[0] == "Do not trust the robust accuracy in ℓ∞ (start). Found inf."
    assert findings(here, there)[0] == (
        "Do not trust the robust accuracy in ℓ∞ and ℓ₂ (start). ℓ∞: Found inf. ℓ₂: Found 2."
    )
    assert findings(quiet) == findings()
    assert [finding.split("(")[1][:5] for finding in findings(everywhere, here)[:2]] == ["noise", "start"]


@pytest.mark.parametrize(
    ("robust", "proven", "level"),
    [(95, 0, "unclear"), (60, 20, "unclear"), (95, 60, "unclear"), (95, 92, "robust"), (60, 55, "weakened"),
     (40, 0, "fragile"), (5, 0, "broken")],
)  # fmt: skip
def test_a_doubted_network_holds_up_only_as_far_as_it_is_proven(robust, proven, level):
    """What attacks broke is broken; that they failed says nothing once they are in doubt."""
    evaluation = Evaluation(("apgd",), INF, 0.1, (0.0, 1.0), 1, 0, {}, 200, 100, robust, 0, 0.1)
    curve = CertifiedCurve(INF, (0.0, 0.1), (Rate(100, 200), Rate(proven, 200)), 0.1)
    raised = Flag("noise", True, "Found 3.", "why")
    norm = norm_result(INF, evaluation=evaluation, certified=curve)
    verdict = judge([norm], [], [raised])
    assert verdict.level == level
    assert ("unclear" in verdict.headline) == (level == "unclear")
    trusted = judge([norm], [], [dataclasses.replace(raised, raised=False)])
    assert trusted.level != "unclear"


def test_flags_can_be_switched_off_and_need_data():
    off = light(mlp(), few(20), p=[2.0], honesty=False)
    assert all_flags(off) == []
    assert {item.name: item.reason for item in off.not_measured}["honesty flags"] == "switched off"
    assert (off.signature.settings["honesty"], audits()[0].signature.settings["honesty"]) == (False, True)
    weights_only = brittle.audit(mlp())
    assert all_flags(weights_only) == []
    assert {item.name: item.reason for item in weights_only.not_measured}["honesty flags"] == "no data given"


def section(audit: Audit) -> str:
    """The report's section on trust; without the figures, which take their time."""
    bare = without(audit, "lipschitz", "curve", "certified", "responses", "universal")
    page = report_html(dataclasses.replace(bare, layers=()))
    return page[page.index('<section id="trust">') :].partition("</section>")[0] if 'id="trust"' in page else ""


def test_the_report_says_of_every_flag_in_words_whether_it_is_raised():
    for audit in audits():
        part, flags = section(audit), all_flags(audit)
        results = re.findall(r'<td class="text nowrap">(.*?)</td><td class="text">(.*?)</td>', part)
        said = [
            (re.sub("<[^>]*>", "", word), html.unescape(text).replace("\N{NO-BREAK SPACE}", " "))
            for word, text in results
        ]
        where = {None: "", INF: " in ℓ∞", 2.0: " in ℓ₂"}
        expected = [(("Raised" if f.raised else "Not raised") + where[f.p], f.finding) for f in flags]
        assert sorted(said) == sorted(expected)
        for flag in flags:
            assert part.count(html.escape(flag.meaning, quote=False).replace("'", "&#39;")) == 1
        number = sum(flag.raised for flag in flags)
        assert (f"No: {number} of {len(flags)} checks" if number else f"None of {len(flags)} checks") in part
    assert section(dataclasses.replace(without(audits()[0], "flags"), flags=())) == ""


def test_hostile_text_in_a_flag_stays_text():
    hostile = "</section><script>alert(1)</script>"
    audit = with_parts(audits()[0], 2.0, flags=(Flag(hostile, True, hostile, hostile, 2.0),))
    assert "alert(1)" in section(audit)
    assert "<script>" not in section(audit)
    assert Audit.from_json(audit.to_json()) == audit
