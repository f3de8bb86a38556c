"""Certificates in an evaluation: no attack may break what they prove, and they change nothing but the cost."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import brittle
from brittle.attacks import apgd, square
from brittle.errors import InputError
from brittle.evaluation import certify as certificates
from brittle.evaluation.accuracy import evaluate
from brittle.evaluation.certify import proven_robust
from brittle.evaluation.execution import Execution
from brittle.evaluation.threat import Threat
from brittle.linear.norms import dual_exponent, lp_norm
from helpers.evaluations import evaluate_with
from helpers.networks import convnet, few, generator, linear, mlp, seeded, uniform, untouched

NORMS = [math.inf, 2]
SMALL = {math.inf: 0.01, 2: 0.06}
quick_apgd = functools.partial(apgd, steps=10)
full_apgd = functools.partial(apgd, steps=400)
"""Dear enough for certificates to be worth their cost."""
ATTACKS = [functools.partial(apgd, steps=20), functools.partial(apgd, steps=20, loss="dlr")]
drawn = settings(max_examples=15, deadline=None, derandomize=True, database=None)


def small_net(seed, width, depth, scale):
    """A random ReLU network from 5 values to 3 classes."""

    def make():
        sizes = [5, *[width] * depth]
        layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], 3))

    net = seeded(make, seed).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= scale
    return net


def predicted(net, x):
    with torch.no_grad():
        return net(x).argmax(1)


def points_in(x, eps, p, seed, count=200):
    """Corners and random points of every sample's ball, in the box: ``(count + 32, N, 5)``."""
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=x.shape[1]))).to(x)
    inside = torch.randn(count, x.shape[1], generator=generator(seed)).to(x)
    directions = torch.cat([corners, inside])
    directions = directions / lp_norm(directions, p)[:, None]
    return (x[None] + eps * (1 - 1e-6) * directions[:, None]).clamp(0, 1)


@drawn
@given(
    seed=st.integers(0, 999),
    width=st.integers(1, 12),
    depth=st.integers(0, 3),
    scale=st.sampled_from([0.5, 1.0, 3.0]),
    eps=st.floats(1e-4, 0.3),
    p=st.sampled_from(NORMS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_nothing_breaks_what_is_proven(seed, width, depth, scale, eps, p, dtype):
    net = small_net(seed, width, depth, scale).to(dtype)
    x = uniform(seed, 24, 5).to(dtype)
    y = predicted(net, x)
    with untouched(net):
        proven = proven_robust(net, x, y, eps=eps, p=p)
    assert (proven.shape, proven.dtype) == ((24,), torch.bool)
    e = evaluate(
        net,
        (x, y),
        Threat([*ATTACKS, functools.partial(square, queries=30)], p=p),
        eps=eps,
        execution=Execution(certify=False),
    )
    broken = torch.tensor([s.attack is not None for s in e.samples])
    assert not (proven & broken).any()
    for points in points_in(x, eps, p, seed):
        assert not (proven & (predicted(net, points) != y)).any()
    assert not proven_robust(net, x, (y + 1) % 3, eps=eps, p=p).any()  # wrong labels are never proven


@drawn
@given(seed=st.integers(0, 999), factor=st.floats(0.5, 1.5), p=st.sampled_from(NORMS))
def test_on_linear_networks_the_proof_ends_at_the_exact_distance(seed, factor, p):
    net = linear(2, 12)
    x = uniform(seed, 30, 12, low=0.4, high=0.6)
    y, w = predicted(net, x), net[1].weight.detach().double().diff(dim=0)[0]
    with torch.no_grad():
        distance = net(x).double().diff(dim=1)[:, 0].abs() / torch.linalg.vector_norm(w, ord=dual_exponent(p))
    eps = float(factor * distance.median())
    proven = proven_robust(net, x, y, eps=eps, p=p, bounds=(-9.0, 9.0))
    assert not proven[distance < eps * (1 - 1e-5)].any()
    assert proven[distance > 1.001 * eps + 1e-4].all()


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("make", [mlp, convnet, lambda: linear(10, 64)])
def test_certificates_change_the_cost_and_no_verdict(p, make):
    net, (x, y) = make(), few(120)
    if make not in (mlp, convnet):  # not trained
        y = torch.where(torch.arange(120) % 15 == 0, y, predicted(net, x))
    run = functools.partial(evaluate_with, net, (x, y), full_apgd, p=p, eps=SMALL[p])
    with untouched(net):
        having = run()
    without = run(certify=False)
    assert without.proven == 0
    assert not any(s.proven for s in without.samples)
    assert having.proven == sum(s.proven for s in having.samples) > 12
    assert having.backwards < without.backwards
    assert (having.clean_correct, having.robust_correct) == (without.clean_correct, without.robust_correct)
    for a, b in zip(having.samples, without.samples, strict=True):
        assert (a.index, a.label, a.clean_prediction, a.attack, a.restart) == (
            b.index,
            b.label,
            b.clean_prediction,
            b.attack,
            b.restart,
        )
        if a.proven:
            assert (a.attack, a.restart, a.distance) == (None, None, 0.0)
            assert a.clean_prediction == a.adversarial_prediction == a.label
            assert a.adversarial_margin == a.clean_margin > 0
        else:
            assert a.adversarial_prediction == b.adversarial_prediction
            assert a.distance == pytest.approx(b.distance, rel=1e-3)  # batches of other shapes round differently


def test_proven_samples_are_never_attacked():
    asked = []

    def recorder(model, x, y, *, eps, p, ids, steps=1000):
        asked.extend(ids.tolist())
        return x

    e = evaluate(mlp(), few(60), Threat(recorder), eps=0.01)
    right = {s.index for s in e.samples if s.clean_prediction == s.label}
    proven = {s.index for s in e.samples if s.proven}
    assert proven
    assert proven <= right
    assert set(asked) == right - proven


def test_what_is_wrong_without_attack_is_not_proven():
    x, y = few(60)
    y = (predicted(mlp(), x) + 1) % 10
    assert not proven_robust(mlp(), x, y, eps=1e-4).any()
    e = evaluate(mlp(), (x, y), Threat(full_apgd), eps=1e-4)
    assert (e.proven, e.clean_correct, e.backwards) == (0, 0, 0)


def test_all_that_is_right_may_be_proven_and_then_costs_no_gradient():
    net, (x, y) = mlp(), few(60)
    y = predicted(net, x)
    e = evaluate(net, (x, y), Threat(full_apgd), eps=1e-5)
    assert e.proven == e.robust_correct == e.clean_correct == 60
    assert e.backwards == 0
    zero = evaluate(net, (x, y), Threat(full_apgd), eps=0.0)
    assert zero.robust_correct == 60


def normalised():
    return nn.Sequential(nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 10))


class Wandering(nn.Module):
    """Its way through depends on its input, so that it cannot be traced."""

    def __init__(self):
        super().__init__()
        self.net = seeded(lambda: nn.Linear(64, 10))

    def forward(self, x):
        """``(N, ...)`` to ``(N, 10)``."""
        return self.net(x.flatten(1)) if x.sum() > -1e9 else x.flatten(1)[:, :10]


@pytest.mark.parametrize("make", [normalised, Wandering, lambda: nn.Sequential(nn.Flatten(), nn.Softmax(1))])
def test_networks_without_a_rule_prove_nothing_and_raise_nothing(make):
    net = seeded(make).eval()
    x, _ = few(20)
    y = predicted(net, x)
    with untouched(net):
        proven = proven_robust(net, x, y, eps=1e-6)
        e = evaluate(net, (x, y), Threat(full_apgd), eps=1e-3)
    assert proven.tolist() == [False] * 20
    assert e.proven == 0
    without = evaluate(net, (x, y), Threat(full_apgd), eps=1e-3, execution=Execution(certify=False))
    assert (e.tried, without.tried) == (0, 0)
    assert e.untried != without.untried == "they were switched off"
    assert e == replace(without, untried=e.untried)


@pytest.mark.parametrize(("make", "p"), [(mlp, math.inf), (mlp, 2), (convnet, math.inf)])
def test_an_audit_proves_the_same_whatever_attacks_cost(make, p):
    """Certified radii are a measurement: other attacks, and none that pays for a proof, leave them as they are."""
    net, data = make(), few(24)
    audits = [
        brittle.audit(net, data, Threat(attacks), p=p, eps=SMALL[p], honesty=False)
        for attacks in (functools.partial(apgd, steps=1), [quick_apgd, functools.partial(apgd, steps=40)])
    ]
    cheap, dear = (audit.norm(p).certified for audit in audits)
    assert replace(cheap, withstood=None) == replace(dear, withstood=None)
    assert cheap.measured > 0
    assert cheap.untried is None
    assert cheap.median_radius > 2 * SMALL[p] / 3  # not cut off at the budgets of the curve
    for audit in audits:
        norm = audit.norm(p)
        assert all(
            norm.certified.at(eps).hits <= rate.hits
            for eps, rate in zip(norm.curve.eps, norm.curve.robust, strict=True)
        )
        assert norm.certified.undecided(norm.evaluation).hits >= 0
        for sample in norm.evaluation.samples:
            assert not (sample.attack is not None and (sample.certified_radius or 0) > SMALL[p])
        curve = brittle.evaluation.curves.certified_curve(norm.evaluation, norm.curve.eps)
        assert [rate.hits for rate in curve.certified] == sorted((r.hits for r in curve.certified), reverse=True)


@pytest.mark.parametrize("p", NORMS)
def test_measured_radii_hold_against_attacks_at_budgets_of_their_own(p):
    net, (x, y) = mlp(), few(60)
    norm = brittle.audit(net, (x, y), Threat(quick_apgd), p=p, eps=SMALL[p], honesty=False).norm(p)
    radii = torch.tensor([s.certified_radius if s.measured else 0.0 for s in norm.evaluation.samples])
    rows = radii > 0
    x_adv = apgd(net, x[rows], y[rows], eps=0.999999 * radii[rows].double(), p=p, steps=30)
    assert rows.double().mean() > 0.5
    assert torch.equal(predicted(net, x_adv), y[rows])


def test_what_was_not_tried_is_said_and_is_not_zero():
    net, data = mlp(), few(30)
    switched_off = Execution(certify=False)
    off = brittle.audit(net, data, Threat(quick_apgd), eps=0.01, p=math.inf, execution=switched_off, honesty=False)
    norm = off.norm(math.inf)
    assert (norm.evaluation.tried, norm.certified.measured) == (0, 0)
    assert "switched off" in norm.certified.untried
    assert any(item.name == "ℓ∞ proofs sample by sample" for item in off.not_measured)
    on = brittle.audit(net, data, Threat(quick_apgd), eps=0.5, p=math.inf, honesty=False)
    assert on.norm(math.inf).certified.at(0.5).hits == 0 < on.norm(math.inf).certified.measured
    assert not any("sample by sample" in item.name for item in on.not_measured)


def test_samples_measured_do_not_depend_on_how_the_data_are_cut():
    proofs = certificates.Proofs(None, measured=0.3)
    whole = proofs.chosen(0, 1000)
    pieces = torch.cat([proofs.chosen(first, 50) for first in range(0, 1000, 50)])
    assert torch.equal(whole, pieces)
    for first in range(0, 1000, 50):  # spread evenly over every stretch
        assert 12 <= int(whole[first : first + 50].sum()) <= 18
    for step in (2, 3, 5, 10):  # and over labels that come in turn
        assert abs(float(whole[::step].double().mean()) - 0.3) < 0.05


def test_plain_callables_prove_nothing():
    x, y = few(20)
    assert proven_robust(lambda z: mlp()(z), x, y, eps=1e-6).tolist() == [False] * 20
    assert evaluate(lambda z: mlp()(z), (x, y), Threat(full_apgd), eps=1e-6).proven == 0
    assert proven_robust(mlp(), x[:0], y[:0], eps=0.1).tolist() == []


@pytest.mark.parametrize("error", [RuntimeError("a bug"), torch.OutOfMemoryError("out of memory"), TypeError("a bug")])
@pytest.mark.parametrize("broken", ["read_relaxation", "margin_bounds"])
def test_bugs_and_a_lack_of_memory_are_not_taken_for_a_lack_of_rules(error, broken, monkeypatch):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(certificates, broken, fail)
    with pytest.raises(type(error)):
        proven_robust(mlp(), *few(20), eps=1e-4)


def test_quantised_networks_without_gradients_prove_nothing_and_raise_nothing():
    quantise = pytest.importorskip("torch.ao.quantization").quantize_dynamic
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = quantise(mlp(), {nn.Linear}, dtype=torch.qint8)
    x, _ = few(20)
    e = evaluate(net, (x, predicted(net, x)), Threat(functools.partial(square, queries=300)), eps=0.06)
    assert e.clean_correct == 20 > e.robust_correct
    assert e.proven == 0


def hooked(place, kind):
    """The digits network with a hook somewhere that turns the network's answer around."""
    net = nn.Sequential(nn.Flatten(), seeded(lambda: nn.Linear(64, 10)), nn.Sequential(nn.ReLU()), nn.Linear(10, 3))
    with torch.no_grad():
        net[3].weight.copy_(torch.eye(3, 10) * 5)
        net[3].bias.zero_()
    module = {"root": net, "linear": net[1], "container": net[2], "unit": net[2][0], "last": net[3]}[place]
    if kind == "output":
        module.register_forward_hook(lambda module, inputs, output: torch.sin(80 * output))
    else:
        module.register_forward_pre_hook(lambda module, inputs: (torch.sin(80 * inputs[0]),))
    return net.eval()


@pytest.mark.parametrize("place", ["root", "linear", "container", "unit", "last"])
@pytest.mark.parametrize("kind", ["output", "input"])
def test_hooks_never_lead_to_a_wrong_proof(place, kind):
    net, (x, _) = hooked(place, kind), few(40)
    y = predicted(net, x)
    proven = proven_robust(net, x, y, eps=0.05)
    e = evaluate(
        net,
        (x, y),
        Threat([quick_apgd, functools.partial(square, queries=50)]),
        eps=0.05,
        execution=Execution(certify=False),
    )
    assert e.robust_correct < 40
    assert not (proven & torch.tensor([s.attack is not None for s in e.samples])).any()


@pytest.mark.parametrize("p", NORMS)
def test_other_bounds_are_minded(p):
    """The box helps a proof only where it is the box of the evaluation."""
    x, y = few(60)
    counts = {}
    for bounds in ((0.0, 1.0), (-5.0, 5.0)):
        proven = proven_robust(mlp(), x, y, eps=3 * SMALL[p], p=p, bounds=bounds)
        e = evaluate(
            mlp(), (x, y), Threat(quick_apgd, p=p, bounds=bounds), eps=3 * SMALL[p], execution=Execution(certify=False)
        )
        assert not (proven & torch.tensor([s.attack is not None for s in e.samples])).any()
        counts[bounds] = int(proven.sum())
    assert counts[(0.0, 1.0)] >= counts[(-5.0, 5.0)]


@pytest.mark.parametrize("eps", [0.3, 0.03, 0.005])
@pytest.mark.parametrize("make", [mlp, convnet])
def test_certificates_that_save_little_are_left_off(make, eps, monkeypatch):
    """By their estimated price they never cost more than a twentieth of the attack beyond what they save."""
    x, y = few(120)
    spent = []
    real = certificates.margin_bounds

    def counting(relaxation, x, *args, effort, **options):
        spent.append(len(x) * certificates.price(relaxation, effort))
        return real(relaxation, x, *args, effort=effort, **options)

    monkeypatch.setattr(certificates, "margin_bounds", counting)
    all_that_can = proven_robust(make(), x, y, eps=eps)
    for passes in (1.0, 60.0, 100.0, 1e4):
        spent.clear()
        proven = proven_robust(make(), x, y, eps=eps, passes=passes)
        assert not (proven & ~all_that_can).any()
        assert sum(spent) <= passes * (int(proven.sum()) + 0.05 * len(x))
    assert proven.double().mean() >= 0.8 * all_that_can.double().mean()  # at a high price
    spent.clear()
    assert not proven_robust(make(), x, y, eps=eps, passes=1.0).any()  # an attack of one step is cheaper
    assert spent == []


def test_a_single_sample_and_fewer_than_are_tried():
    x, y = few(40)
    y = predicted(mlp(), x)
    for n in (1, 2, 31, 32, 33):
        assert proven_robust(mlp(), x[:n], y[:n], eps=1e-5).tolist() == [True] * n


X, Y = few(6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": (X * math.nan, Y)}, "^x: expected finite numbers"),
        ({"data": (X * 255, Y)}, r"^x: expected values in \[0, 1\]"),
        ({"data": (X, Y - 10)}, "^y: expected labels of at least 0"),
        ({"data": (X, Y + 10)}, "^y: expected labels from 0 to 9"),
        ({"data": (X, Y.float())}, "^y: expected an integer tensor"),
        ({"data": ((255 * X).byte(), Y)}, "^x: expected a floating tensor"),
        pytest.param({"data": (X[:, :, :7], Y)}, r"^data: the model cannot run on inputs of shape \(1, 7, 8\)"),
        pytest.param({"data": (X.double(), Y)}, "^data: the model cannot run"),
        pytest.param({"data": (X.half(), Y)}, "^data: the model cannot run"),
        ({"eps": -0.1}, "^eps"),
        ({"eps": math.nan}, "^eps"),
        ({"p": 1}, "^p: expected 2 or inf"),
        ({"bounds": (1.0, 0.0)}, "^bounds"),
        ({"bounds": (0.0, math.inf)}, "^bounds"),
        ({"model": nn.Flatten(0)}, "^model: expected logits of shape"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 1))}, "^y: expected labels from 0 to 0"),
    ],
)
def test_bad_input_is_named_with_certificates_as_without(options, message):
    call = {"model": mlp(), "data": (X, Y), "eps": 0.1, "attack": quick_apgd} | options
    for certify in (False, True):
        with pytest.raises(InputError, match=message):
            evaluate_with(certify=certify, **call)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -1.0}, "^eps"),
        ({"eps": math.nan}, "^eps"),
        ({"p": 1}, "^p: expected 2 or inf"),
        ({"y": Y[:3]}, "with one N"),
    ],
)
@pytest.mark.parametrize("passes", [100.0, math.inf])
@pytest.mark.parametrize("model", [mlp(), lambda x: x.flatten(1)], ids=["a network", "no network"])
def test_bad_input_is_named_whether_certificates_are_tried_or_not(model, passes, options, message):
    with pytest.raises(InputError, match=message):
        proven_robust(**({"model": model, "x": X, "y": Y, "eps": 0.1, "passes": passes} | options))


def test_what_is_wrong_without_attack_is_not_proven_at_budget_zero_either():
    net, x = linear(5, 12), uniform(1, 10, 12)
    with torch.no_grad():
        right = net(x).argmax(1)
    y = torch.where(torch.arange(10) < 4, right, (right + 1) % 5)
    for certify in (True, False):
        found = evaluate_with(net, (x, y), eps=0.0, certify=certify)
        assert [sample.proven for sample in found.samples or ()] == [True] * 4 + [False] * 6
        assert found.proven == found.clean_correct == found.robust_correct == 4
