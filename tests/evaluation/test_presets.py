"""Presets: what each runs, what a network's number of classes leaves out, and what is recorded."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
from torch import nn

from brittle.attacks import apgd, apgd_smoothed, apgd_targeted, square
from brittle.errors import InputError
from brittle.evaluation.accuracy import evaluate
from brittle.evaluation.execution import Execution
from brittle.evaluation.threat import PRESETS, Threat, for_classes, further_attacks, preset
from helpers.networks import Logistic, few, linear, mlp, uniform, untouched


def described(attacks):
    """Function and bound options of every attack."""
    return [(attack.func, dict(attack.keywords)) for attack in attacks]


CE, DLR = {"loss": "ce", "steps": 100}, {"loss": "dlr", "steps": 100}
WHOLE = {
    "fast": [(apgd, CE), (apgd, DLR), (apgd_smoothed, {"steps": 8})],
    "standard": [
        (apgd, CE),
        (apgd_targeted, {"steps": 100, "targets": 9}),
        (apgd_smoothed, CE),
        (apgd_smoothed, DLR),
        (square, {"queries": 5000}),
    ],
    "thorough": [
        (apgd, CE | {"steps": 300}),
        (apgd, DLR | {"steps": 300}),
        (apgd_targeted, {"steps": 200, "targets": 20}),
        (apgd_smoothed, CE | {"steps": 300}),
        (apgd_smoothed, DLR | {"steps": 300}),
        (square, {"queries": 10000}),
    ],
}


def fits(attack, options, classes):
    """DLR needs the third largest logit, targeted DLR the fourth."""
    return classes >= (4 if attack is apgd_targeted else 3 if options.get("loss") == "dlr" else 2)


def test_the_presets_are_the_three_documented_ones():
    assert sorted(PRESETS) == sorted(WHOLE) == ["fast", "standard", "thorough"]
    for words in ("100 steps", "8 steps along smoothed gradients"):
        assert words in PRESETS["fast"]
    for words in ("100 steps", "9 likeliest", "5,000 queries"):
        assert words in PRESETS["standard"]
    for words in ("300 steps", "200 steps", "20 likeliest", "10,000 queries"):
        assert words in PRESETS["thorough"]


@pytest.mark.parametrize("name", list(WHOLE))
@pytest.mark.parametrize("classes", [2, 3, 4, 10, 1000])
def test_composition(name, classes):
    attacks, left_out = preset(name, classes)
    assert described(attacks) == [part for part in WHOLE[name] if fits(*part, classes)]
    missing = [part for part in WHOLE[name] if not fits(*part, classes)]
    assert len(left_out) == len(missing)
    for (what, why), (attack, _) in zip(left_out, missing, strict=True):
        needed = 4 if attack is apgd_targeted else 3
        assert "DLR" in what
        assert ("targeted" in what) == (attack is apgd_targeted)
        assert why == f"needs at least {needed} classes; the model has {classes}"


@pytest.mark.parametrize("name", list(WHOLE))
@pytest.mark.parametrize("steps", [1, 7, 500])
def test_steps_replace_those_of_every_gradient_attack(name, steps):
    for (attack, options), (same, usual) in zip(described(preset(name, 10, steps)[0]), WHOLE[name], strict=True):
        assert attack is same
        is_trial = name == "fast" and attack is apgd_smoothed
        expected = max(1, steps // 12) if is_trial else steps
        assert options == usual | ({"steps": expected} if "steps" in usual else {})


def test_fast_alone_goes_on_where_gradients_mislead():
    for classes, losses in ((2, ["ce"]), (3, ["ce", "dlr"]), (10, ["ce", "dlr"])):
        expected = [(apgd_smoothed, {"loss": loss, "steps": 100}) for loss in losses]
        assert described(further_attacks("fast", classes)) == expected
        assert described(for_classes(Threat("fast"), classes)[0].further) == expected
        assert {attack.keywords["steps"] for attack in further_attacks("fast", classes, 7)} == {7}
        for other in ("standard", "thorough"):
            assert further_attacks(other, classes) == for_classes(Threat(other), classes)[0].further == ()


@pytest.mark.parametrize("name", list(WHOLE))
def test_every_option_is_one_that_its_attack_has(name):
    for attack, options in described(preset(name, 10)[0]):
        assert options.keys() <= inspect.signature(attack).parameters.keys()


@pytest.mark.parametrize("name", ["", "Fast", "AutoAttack", "apgd"])
def test_unknown_names_are_an_error(name):
    with pytest.raises(InputError, match=rf"^attacks: expected one of fast, standard, thorough, .*got {name!r}"):
        preset(name, 10)
    with pytest.raises(InputError, match=r"^attacks: expected one of fast, standard, thorough"):
        evaluate(mlp(), few(4), Threat(name), eps=0.1)


def three(classes):
    """A linear network on 12 values, inputs and their predicted classes."""
    net = Logistic() if classes == 2 else linear(classes)
    x = uniform(classes, 16, 12)
    with torch.no_grad():
        return net, x, net(x).argmax(1)


@pytest.mark.parametrize("classes", [2, 3, 4, 10])
def test_fast_is_the_worst_case_of_its_attacks(classes):
    net, x, y = three(classes)
    run = functools.partial(evaluate, net, (x, y), eps=0.05, execution=Execution(certify=False))
    with untouched(net):
        named = run(Threat("fast"))
    listed = run(Threat(list(preset("fast", classes)[0]), further=further_attacks("fast", classes)))
    assert named == listed
    assert named.samples == listed.samples
    assert 0 < named.robust_correct < named.clean_correct
    names = ("apgd(loss='ce', steps=100)", "apgd(loss='dlr', steps=100)", "apgd_smoothed(steps=8)")
    assert named.attacks == (names[::2] if classes == 2 else names)
    assert named.misled == 0  # gradients of an affine network are right everywhere
    assert set(named.settings) == set(named.attacks)
    assert {s.attack for s in named.samples} <= {None, *named.attacks}


def test_fast_on_a_network_of_ten_classes_that_is_not_linear():
    x, y = few(30)
    e = evaluate(mlp(), (x, y), Threat("fast"), eps=0.06)
    assert e.attacks[:3] == ("apgd(loss='ce', steps=100)", "apgd(loss='dlr', steps=100)", "apgd_smoothed(steps=8)")
    assert len(e.attacks) == (5 if e.misled else 3)
    ce = evaluate(mlp(), (x, y), Threat(functools.partial(apgd, loss="ce", steps=100)), eps=0.06)
    assert e.robust_correct <= ce.robust_correct


def test_standard_records_every_attack(monkeypatch):
    net, x, y = three(4)
    e = evaluate(
        net, (x[:4], y[:4]), Threat("standard"), eps=0.3, execution=Execution(certify=False)
    )  # all break at once
    assert e.attacks == (
        "apgd(loss='ce', steps=100)",
        "apgd_targeted(steps=100, targets=9)",
        "apgd_smoothed(loss='ce', steps=100)",
        "apgd_smoothed(loss='dlr', steps=100)",
        "square(queries=5000)",
    )
    assert e.robust_correct == 0


def test_presets_for_plain_callables_and_streams():
    net, x, y = three(3)
    base = evaluate(net, (x, y), Threat("fast"), eps=0.05, execution=Execution(certify=False))
    for form in ([(x[:5], y[:5]), (x[5:], y[5:])], ((x[i : i + 1], y[i : i + 1]) for i in range(16))):
        e = evaluate(lambda z: net(z), form, Threat("fast"), eps=0.05)
        assert [(s.attack, s.restart) for s in e.samples] == [(s.attack, s.restart) for s in base.samples]
        assert e.attacks == base.attacks


def test_the_number_of_classes_is_the_networks_not_the_labels():
    net, x, _ = three(3)
    e = evaluate(net, (x, torch.zeros(16, dtype=torch.long)), Threat("fast"), eps=0.01)
    assert len(e.attacks) == 3


X, Y = few(6)


@pytest.mark.parametrize(
    ("data", "message"),
    [((X / 0, Y), "^x: expected finite numbers"), (((255 * X).byte(), Y), "^x: expected a floating tensor")],
)
def test_bad_data_are_named_for_presets_as_for_attacks(data, message):
    with pytest.raises(InputError, match=message):
        evaluate(mlp(), data, Threat(functools.partial(apgd, steps=3)), eps=0.1)
    with pytest.raises(InputError, match=message):
        evaluate(mlp(), data, Threat("fast"), eps=0.1)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (mlp(), (X[:, :, :7], Y), "^data: the model cannot run"),
        (mlp(), (X, Y + 10), "^y: expected labels from 0 to 9"),
        (nn.Flatten(0), (X, Y), "^model: expected logits of shape"),
        (lambda x: None, (X, Y), "^model: expected a tensor of logits"),
    ],
)
def test_bad_models_are_named_for_presets(model, data, message):
    with pytest.raises(InputError, match=message):
        evaluate(model, data, Threat("fast"), eps=0.1)
