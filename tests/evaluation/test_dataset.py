"""Evaluation: nothing an attack claims is believed, the worst case counts, and every way to hand in data agrees."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import brittle
from brittle.attacks import apgd, fgsm, pgd
from brittle.attacks.losses import margins
from brittle.errors import InputError
from brittle.evaluation.curves import security_curve
from brittle.evaluation.execution import Execution
from brittle.evaluation.threat import Threat
from brittle.evaluation.worst_case import WorstCase, admissible, worst_case
from brittle.results import Audit, Rate
from helpers import networks
from helpers.evaluations import GREY, Samples, Stream, anything_moves, evaluate_with, push
from helpers.matrices import quick
from helpers.networks import few, linear, mlp, uniform, untidy, untouched

NORMS = [math.inf, 2]
EPS = {math.inf: 0.06, 2: 0.3}
quick_apgd = functools.partial(apgd, steps=10)


def evaluate(model, data, threat=Threat(apgd), *, eps, execution=Execution()):
    """What is tested here are attacks; certificates have tests of their own."""
    plain = dataclasses.replace(execution, certify=False)
    return brittle.evaluate(model, data, threat, eps=eps, honesty=False, execution=plain)


def predictions(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


def counts(e):
    return e.n, e.clean_correct, e.robust_correct


def verdicts(e):
    """Everything per sample that a decision, and not a rounding, makes."""
    return [(s.index, s.label, s.clean_prediction, s.attack, s.restart) for s in e.samples]


def noisy_digits(n=60):
    """Digits of which the first ten carry wrong labels."""
    x, y = few(n)
    y = y.clone()
    y[:10] = (y[:10] + 1) % 10
    return x, y


# --- counts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", NORMS)
def test_counts_are_those_counted_by_hand(p):
    x, y = noisy_digits()
    e = evaluate(mlp(), (x, y), Threat(quick_apgd, p=p), eps=EPS[p])
    clean = predictions(mlp(), x)
    right = (clean == y).nonzero()[:, 0]
    x_adv = apgd(mlp(), x[right], y[right], eps=EPS[p], p=p, steps=10, ids=right)
    after = predictions(mlp(), x_adv)
    robust = int((after == y[right]).sum())
    assert counts(e) == (60, len(right), robust)
    assert 0 < robust < len(right) < 60
    assert e.clean_accuracy == Rate(len(right), 60)
    assert e.robust_accuracy == Rate(robust, 60)
    assert e.fooling_rate == Rate(len(right) - robust, len(right))
    assert (e.p, e.eps, e.bounds, e.restarts, e.seed, e.rejected) == (p, EPS[p], (0.0, 1.0), 1, 0, 0)
    assert e.attacks == ("apgd(steps=10)",)
    with torch.no_grad():
        logits, logits_adv = mlp()(x), mlp()(x_adv)
    distances = np.linalg.norm((x_adv.double() - x[right].double()).flatten(1).numpy(), ord=p, axis=1)
    assert e.largest_perturbation == pytest.approx(distances.max(), rel=1e-6)
    position = {int(i): j for j, i in enumerate(right)}
    for s in e.samples:
        assert (s.label, s.clean_prediction) == (int(y[s.index]), int(clean[s.index]))
        assert s.clean_margin == pytest.approx(margin(logits[s.index], s.label), abs=1e-4)
        if s.index in position:
            j = position[s.index]
            assert s.adversarial_prediction == int(after[j])
            assert s.adversarial_margin == pytest.approx(margin(logits_adv[j], s.label), abs=1e-4)
            assert s.distance == pytest.approx(distances[j], rel=1e-5)
            assert (s.attack is None) == (s.adversarial_prediction == s.label) == (s.restart is None)
        else:
            assert (s.adversarial_prediction, s.attack, s.distance) == (s.clean_prediction, None, 0.0)
            assert s.adversarial_margin == s.clean_margin


def margin(logits, label):
    row = logits.tolist()
    return row[label] - max(v for j, v in enumerate(row) if j != label)


def test_margins_by_hand():
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, -1.0], [0.0, 0.0, 4.0]])
    assert margins(logits, torch.tensor([1, 0, 0])).tolist() == [1.0, 0.0, -4.0]
    assert margins(torch.tensor([[2.0]]), torch.tensor([0])).tolist() == [2.0]


def test_no_budget_breaks_nothing():
    e = evaluate(mlp(), few(), Threat([fgsm, quick_apgd]), eps=0.0)
    assert e.robust_correct == e.clean_correct
    assert e.largest_perturbation == 0
    assert e.rejected == 0


# --- attacks that cheat -------------------------------------------------------------------------------------


def beyond_inf(model, x, y, *, eps, p):
    return x + eps * (1 + 1e-3)


def beyond_two(model, x, y, *, eps, p):
    return x + eps * (1 + 1e-3) / math.sqrt(x[0].numel())


def beyond_bounds(model, x, y, *, eps, p):
    return x + eps * 0.999 / (1 if p == math.inf else math.sqrt(x[0].numel()))


def infinite(model, x, y, *, eps, p):
    return torch.full_like(x, math.inf)


def not_a_number(model, x, y, *, eps, p):
    x = (x + 0.5 * eps).clone()
    x[:, 0, 0, 0] = math.nan
    return x


def someone_elses(model, x, y, *, eps, p):
    return torch.full_like(x, 0.9)


def test_the_honest_attack_breaks_everything():
    e = evaluate(anything_moves, GREY, Threat(push), eps=0.1)
    assert counts(e) == (8, 8, 0)
    assert e.rejected == 0
    assert e.largest_perturbation == pytest.approx(0.05, rel=1e-5)


@pytest.mark.parametrize(
    ("attack", "p", "bounds"),
    [
        (beyond_inf, math.inf, (0.0, 1.0)),
        (beyond_two, 2, (0.0, 1.0)),
        (beyond_bounds, math.inf, (0.0, 0.55)),
        (beyond_bounds, 2, (0.0, 0.52)),
        (infinite, math.inf, (0.0, 1.0)),
        (not_a_number, math.inf, (0.0, 1.0)),
        (not_a_number, 2, (0.0, 1.0)),
        (someone_elses, math.inf, (0.0, 1.0)),
        (someone_elses, 2, (0.0, 1.0)),
    ],
)
def test_cheats_are_rejected_and_counted(attack, p, bounds):
    e = evaluate(anything_moves, GREY, Threat(attack, p=p, bounds=bounds), eps=0.1, execution=Execution(batch_size=3))
    assert counts(e) == (8, 8, 8)
    assert e.rejected == 8
    assert e.largest_perturbation == 0
    assert all(s.attack is None and s.distance == 0 and s.adversarial_prediction == 0 for s in e.samples)


def test_a_cheat_does_not_spoil_an_honest_attack():
    e = evaluate(anything_moves, GREY, Threat([beyond_inf, push, beyond_inf]), eps=0.1)
    assert counts(e) == (8, 8, 0)
    assert e.rejected == 8
    assert {s.attack for s in e.samples} == {"push"}


def test_rejection_is_by_sample():
    def half(model, x, y, *, eps, p, ids):
        return torch.where((ids % 2 == 0)[:, None, None, None], x + 0.9 * eps, x + 1.1 * eps)

    e = evaluate(anything_moves, GREY, Threat(half), eps=0.1, execution=Execution(batch_size=3))
    assert e.rejected == 4
    assert [s.attack is not None for s in e.samples] == [True, False] * 4


def test_returning_another_samples_image_earns_nothing():
    x, y = few(30)
    clean = predictions(mlp(), x)
    x, y = x[clean == y], y[clean == y]

    def rolled(model, x, y, *, eps, p):
        return x.roll(1, 0)

    e = evaluate(mlp(), (x, y), Threat(rolled), eps=0.06)
    assert e.robust_correct == e.clean_correct == len(y)
    assert e.rejected == len(y)


@pytest.mark.parametrize("bad", [lambda x: x[:2], lambda x: x[:, :, :1], lambda x: x.flatten(1), lambda x: x[:0]])
def test_examples_of_another_shape_are_an_error(bad):
    with pytest.raises(InputError, match=r"^attack: expected examples \(8, 1, 2, 2\); got"):
        evaluate(anything_moves, GREY, Threat(lambda model, x, y, *, eps, p: bad(x)), eps=0.1)


@pytest.mark.parametrize("nothing", [None, np.zeros((8, 1, 2, 2)), "x_adv"])
def test_examples_that_are_no_tensor_are_an_error(nothing):
    with pytest.raises(InputError, match=r"^attack: expected"):
        evaluate(anything_moves, GREY, Threat(lambda model, x, y, *, eps, p: nothing), eps=0.1)


def test_attacks_cannot_change_the_inputs():
    x, y = GREY[0].clone(), GREY[1]

    def tampering(model, x, y, *, eps, p):
        x += 0.4
        return x

    e = evaluate(anything_moves, (x, y), Threat(tampering), eps=0.1)
    assert torch.equal(x, GREY[0])
    assert e.robust_correct == 8
    assert e.rejected == 8


@quick
@given(st.floats(1e-4, 1), st.sampled_from(NORMS), st.floats(0.0, 2.0), st.integers(0, 99))
def test_admissible_is_the_budget_in_float64(eps, p, factor, seed):
    x = uniform(seed, 5, 3, 4, low=0.3, high=0.7, dtype=torch.float64)
    a = torch.randn(5, 3, 4, generator=networks.generator(seed), dtype=torch.float64)
    a = a * (factor * eps / torch.linalg.vector_norm(a.flatten(1), ord=p, dim=1))[:, None, None]
    inside = ((x + a >= 0) & (x + a <= 1)).flatten(1).all(1)
    expected = inside & (factor <= 1)
    assume(abs(factor - 1) > 1e-5)
    assert torch.equal(admissible(x + a, x, eps, p, (0.0, 1.0)), expected)


# --- the worst case -----------------------------------------------------------------------------------------


def on_seed(wanted, model, x, y, *, eps, p, seed):
    """Succeeds for one seed only."""
    return x + 0.5 * eps if seed == wanted else x


def test_restarts_draw_from_seeds_in_a_row():
    for restarts, broken in ((1, None), (2, None), (3, 2), (5, 2)):
        e = evaluate(anything_moves, GREY, Threat(functools.partial(on_seed, 12), restarts=restarts, seed=10), eps=0.1)
        assert e.robust_correct == (8 if broken is None else 0)
        assert {s.restart for s in e.samples} == {broken}
        assert (e.restarts, e.seed) == (restarts, 10)


@pytest.mark.parametrize("p", NORMS)
def test_more_restarts_never_leave_more(p):
    attack = functools.partial(pgd, steps=3)
    left = [evaluate(mlp(), few(120), Threat(attack, p=p, restarts=r), eps=EPS[p]) for r in (1, 2, 4, 8)]
    assert [e.robust_correct for e in left] == sorted((e.robust_correct for e in left), reverse=True)
    assert left[0].robust_correct > left[-1].robust_correct
    survivors = [{s.index for s in e.samples if s.attack is None} for e in left]
    assert all(after <= before for before, after in itertools.pairwise(survivors))
    for before, after in itertools.pairwise(left):
        for a, b in zip(before.samples, after.samples, strict=True):
            assert a.restart is None or a.restart == b.restart


def on_ids(which, model, x, y, *, eps, p, ids):
    return torch.where(torch.isin(ids, torch.tensor(which))[:, None, None, None], x + 0.5 * eps, x)


def test_several_attacks_count_by_their_worst_case():
    def first(model, x, y, *, eps, p, ids):
        return on_ids([0, 1, 2], model, x, y, eps=eps, p=p, ids=ids)

    attacks = [functools.partial(on_ids, w) for w in ([0, 1, 2], [2, 3], [5])]
    e = evaluate(anything_moves, GREY, Threat([first, *attacks[1:]]), eps=0.1, execution=Execution(batch_size=3))
    assert [s.attack for s in e.samples] == ["first"] * 3 + ["on_ids()", None, "on_ids()", None, None]
    assert e.robust_correct == 3
    alone = [evaluate(anything_moves, GREY, Threat(a), eps=0.1).robust_correct for a in attacks]
    assert alone == [5, 6, 7]


def test_worst_of_two_losses_is_the_intersection():
    x, y = few(120)
    losses = [functools.partial(apgd, steps=10, loss=loss) for loss in ("ce", "dlr")]
    one, two, both = (evaluate(mlp(), (x, y), Threat(a), eps=0.06) for a in (*losses, losses))
    survivors = [{s.index for s in e.samples if s.attack is None} for e in (one, two, both)]
    assert survivors[0] & survivors[1] == survivors[2]
    assert both.attacks == ("apgd(steps=10, loss='ce')", "apgd(steps=10, loss='dlr')")
    for a, b in zip(one.samples, both.samples, strict=True):
        assert a.attack is None or b.attack == a.attack


class Recorder:
    """An attack that remembers whom it was asked to attack, and breaks the ids it is told to."""

    def __init__(self, breaks=()):
        self.asked, self.breaks = [], torch.tensor(list(breaks), dtype=torch.long)

    def __call__(self, model, x, y, *, eps, p, ids):
        """Record the ids."""
        self.asked.append(ids.tolist())
        return torch.where(torch.isin(ids, self.breaks)[:, None, None, None], x + 0.5 * eps, x)


def test_samples_wrong_without_attack_are_never_attacked():
    x, y = noisy_digits()
    clean = predictions(mlp(), x)
    recorder = Recorder()
    e = evaluate(mlp(), (x, y), Threat(recorder, restarts=2), eps=0.05, execution=Execution(batch_size=16))
    wanted = (clean == y).nonzero()[:, 0].tolist()
    assert [i for part in recorder.asked for i in part] == wanted + wanted
    assert max(map(len, recorder.asked)) == 16
    assert e.attacks == ("Recorder",)


def test_an_attack_is_not_called_for_nobody():
    recorder = Recorder()
    evaluate(anything_moves, (GREY[0], 1 + GREY[1]), Threat(recorder), eps=0.1)
    assert recorder.asked == []


def test_broken_samples_are_not_attacked_again():
    first, second = Recorder([1, 4]), Recorder([2])
    evaluate(anything_moves, GREY, Threat([first, second], restarts=2), eps=0.1)
    assert first.asked == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 3, 5, 6, 7]]
    assert second.asked == [[0, 2, 3, 5, 6, 7], [0, 3, 5, 6, 7]]


def test_the_worst_accepted_example_is_kept():
    def model(x):
        return torch.stack([1 - x.flatten(1).amax(1), torch.zeros(len(x))], dim=1)

    x, y = torch.full((3, 1, 2, 2), 0.2), torch.zeros(3, dtype=torch.long)

    def by_seed(model, x, y, *, eps, p, seed):
        return x + [0.01, 0.05, 0.02, 0.5][seed]

    worst = worst_case(model, x, y, Threat((by_seed,), restarts=4), 0.1)
    torch.testing.assert_close(worst.x_adv, x + 0.05)
    torch.testing.assert_close(worst.adversarial_logits[:, 0], torch.full((3,), 0.75))
    assert worst.rejected == 3
    assert worst.robust_correct.all()


# --- the ways to hand in data -------------------------------------------------------------------------------


def test_all_forms_of_data_agree():
    x, y = noisy_digits(50)
    forms = {
        "tensors": (x, y),
        "list of batches": [(x[:20], y[:20]), (x[20:], y[20:])],
        "lists as pairs": [[x[:20], y[:20]], [x[20:], y[20:]]],
        "loader": DataLoader(TensorDataset(x, y), batch_size=13),
        "dataset": Samples(x, y),
        "tensor dataset": TensorDataset(x, y),
        "stream": Stream(x, y),
        "generator": ((x[i : i + 9], y[i : i + 9]) for i in range(0, 50, 9)),
    }
    base = evaluate(mlp(), forms["tensors"], Threat(quick_apgd), eps=0.06)
    for name, data in forms.items():
        e = evaluate(mlp(), data, Threat(quick_apgd), eps=0.06, execution=Execution(batch_size=17))
        assert verdicts(e) == verdicts(base), name
        assert counts(e) == counts(base), name


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("attack", [quick_apgd, functools.partial(pgd, steps=10), fgsm])
def test_counts_do_not_depend_on_the_batch_size(attack, p):
    x, y = noisy_digits()
    base = evaluate(mlp(), (x, y), Threat(attack, p=p), eps=EPS[p])
    for size in (1, 7, 1000):
        e = evaluate(mlp(), (x, y), Threat(attack, p=p), eps=EPS[p], execution=Execution(batch_size=size))
        assert verdicts(e) == verdicts(base)
        assert counts(e) == counts(base)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("attack", [apgd, pgd])
def test_the_whole_result_does_not_depend_on_the_batch_size(attack, p):
    net = mlp(torch.float64)
    data = few(40, torch.float64)
    attack = functools.partial(attack, steps=10)
    base, small = (
        evaluate(net, data, Threat(attack, p=p), eps=EPS[p], execution=Execution(batch_size=size)) for size in (40, 3)
    )
    for a, b in zip(base.samples, small.samples, strict=True):
        assert a.adversarial_prediction == b.adversarial_prediction
        assert a.adversarial_margin == pytest.approx(b.adversarial_margin, rel=1e-6, abs=1e-9)
        assert a.distance == pytest.approx(b.distance, rel=1e-6)


def test_another_seed_is_another_run():
    a, b, c = (evaluate(mlp(), few(), Threat(quick_apgd, seed=s), eps=0.06) for s in (0, 0, 1))
    assert a == b
    assert a.samples == b.samples
    assert a.samples != c.samples


def rising(told, total):
    """Samples done, each number once, up to the last one."""
    done = [step[1] for step in told]
    assert done == sorted(set(done))
    assert done[-1] == 20
    assert {step[2] for step in told} == {total}


def test_progress_tells_samples_done_and_their_total():
    x, y = few(20)
    told = []
    evaluate(
        mlp(),
        (x, y),
        Threat(fgsm),
        eps=0.1,
        execution=Execution(batch_size=8, progress=lambda *step: told.append(step)),
    )
    rising(told, 20)
    for data, total in (
        (TensorDataset(x, y), 20),
        (DataLoader(TensorDataset(x, y), batch_size=8), 20),
        (((x[i : i + 8], y[i : i + 8]) for i in (0, 8, 16)), None),
        (Stream(x, y), None),
    ):
        told.clear()
        evaluate(
            mlp(),
            data,
            Threat(fgsm),
            eps=0.1,
            execution=Execution(batch_size=8, progress=lambda *step: told.append(step)),
        )
        rising(told, total)


# --- what attacks are offered -------------------------------------------------------------------------------


def test_bounds_seed_and_ids_are_passed_to_attacks_that_have_them():
    seen = []

    def greedy(model, x, y, *, eps, p, bounds, seed, ids, extra=3):
        seen.append((eps, p, bounds, seed, ids.tolist(), extra))
        return x

    def modest(model, x, y, *, eps, p):
        seen.append((eps, p))
        return x

    attacks = [greedy, modest, functools.partial(greedy, seed=99, bounds=(0, 0.7), extra=4)]
    e = evaluate(
        anything_moves, GREY, Threat(attacks, p=2, bounds=(-1, 2), seed=5), eps=0.1, execution=Execution(batch_size=5)
    )
    first = [(0.1, 2, (-1, 2), 5, [0, 1, 2, 3, 4], 3), (0.1, 2), (0.1, 2, (0, 0.7), 99, [0, 1, 2, 3, 4], 4)]
    assert seen[::2] == first  # every attack has all samples, in batches, before the next one begins
    assert seen[1][4] == [5, 6, 7]
    assert e.attacks == ("greedy", "modest", "greedy(seed=99, bounds=(0, 0.7), extra=4)")
    assert e.settings["greedy"] == "extra=3"


@pytest.mark.parametrize("overflow", [math.inf, -math.inf, math.nan])
def test_answers_that_are_not_finite_have_a_margin_of_minus_infinity(overflow):
    """Whatever the difference of such logits is: a broken sample with a large margin would be nonsense."""

    def net(x):
        first = x.flatten(1)[:, 0]
        return torch.stack([torch.where(first > 0.5, overflow, 1.0), torch.zeros_like(first)], 1)

    data = torch.full((3, 1, 2, 2), 0.4), torch.zeros(3, dtype=torch.long)
    e = evaluate(net, data, Threat(lambda model, x, y, *, eps, p: x + eps), eps=0.2)
    assert e.robust_correct == 0
    assert [sample.adversarial_margin for sample in e.samples] == [-math.inf] * 3


def test_settings_record_the_defaults_that_were_used():
    e = evaluate(mlp(), few(5), Threat(functools.partial(apgd, steps=7)), eps=0.01)
    assert e.attacks == ("apgd(steps=7)",)
    assert "steps" not in e.settings["apgd(steps=7)"]  # it stands in the name
    assert "rho=0.75" in e.settings["apgd(steps=7)"]
    assert "loss='ce'" in e.settings["apgd(steps=7)"]


# --- the borrowed model -------------------------------------------------------------------------------------


def test_models_come_back_as_they_were_and_are_judged_in_evaluation_mode():
    net = untidy()
    data = few(20)
    with untouched(net):
        a = evaluate(net, data, Threat(quick_apgd), eps=0.05)
    net.eval()
    assert evaluate(net, data, Threat(quick_apgd), eps=0.05) == a

    def raising(model, x, y, *, eps, p):
        model.train()
        raise ZeroDivisionError

    net = untidy()
    with untouched(net), pytest.raises(ZeroDivisionError):
        evaluate(net, data, Threat(raising), eps=0.05)


def test_attacks_that_meddle_with_the_model_are_undone():
    def meddling(model, x, y, *, eps, p):
        model.train()
        model.requires_grad_(True)
        model(x)
        torch.manual_seed(3)
        return x

    net = untidy()
    with untouched(net):
        e = evaluate(net, few(20), Threat(meddling), eps=0.05)
    assert e.robust_correct == e.clean_correct


# --- bad input ----------------------------------------------------------------------------------------------

X, Y = few(6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -1}, "^eps: expected a finite number of at least 0; got -1"),
        ({"eps": math.nan}, "^eps: .*nan"),
        ({"p": 1}, "^p: expected 2 or inf; got 1"),
        ({"restarts": 0}, "^restarts: expected at least 1; got 0"),
        ({"batch_size": 0}, "^batch_size: expected at least 1; got 0"),
        ({"attack": []}, "^attacks: expected an attack or a sequence of attacks"),
        ({"attack": ["apgd"]}, "^attacks: expected an attack or a sequence of attacks"),
        ({"bounds": (1, 0)}, "^bounds"),
        ({"data": []}, "^data: expected at least one sample; got none"),
        ({"data": (X[:0], Y[:0])}, "^data: expected at least one sample; got none"),
        ({"data": iter(())}, "^data: expected at least one sample; got none"),
        ({"data": (X, Y[:5])}, "^data: expected as many labels as inputs; got 6 inputs and 5 labels"),
        ({"data": [X, X]}, r"^data: expected batches \(inputs, labels\); got Tensor"),
        ({"data": (X * math.nan, Y)}, "^x: expected finite numbers"),
        ({"data": (X * 255, Y)}, r"^x: expected values in \[0, 1\]"),
        ({"data": (X, Y - 10)}, "^y: expected labels of at least 0"),
        ({"data": (X, Y + 10)}, "^y: expected labels from 0 to 9"),
        ({"data": (X, Y.float())}, "^y: expected an integer tensor"),
        ({"data": ((255 * X).byte(), Y)}, "^x: expected a floating tensor"),
        ({"data": (X[:, :, :7], Y)}, r"^data: the model cannot run on inputs of shape \(1, 7, 8\)"),
        ({"model": lambda x: x}, r"^model: expected logits of shape \(6, classes\)"),
        ({"model": lambda x: math.nan * x.flatten(1)}, "^model: expected finite logits"),
        ({"model": lambda x: None}, "^model: expected a tensor of logits.*NoneType"),
    ],
)
def test_bad_input_is_named(options, message):
    call = {"model": mlp(), "data": (X, Y), "eps": 0.1, "attack": quick_apgd} | options
    with pytest.raises(InputError, match=message):
        evaluate_with(call.pop("model"), call.pop("data"), certify=False, **call)


# --- rates --------------------------------------------------------------------------------------------------


@quick
@given(st.integers(0, 3000), st.integers(1, 3000))
def test_rates(hits, n):
    hits = min(hits, n)
    rate = Rate(hits, n)
    assert rate.value == hits / n
    expected = binomtest(hits, n).proportion_ci(0.95, "wilson")
    assert rate.interval == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert rate.interval[0] <= rate.value <= rate.interval[1]
    assert (rate.percent == "100.0 %") == (hits == n)
    assert (rate.percent == "0.0 %") == (hits == 0)
    assert abs(float(rate.percent.removesuffix(" %")) - 100 * hits / n) <= 0.1
    assert f"{hits} of {n}" in str(rate)


def test_rates_at_the_edges():
    assert Rate(0, 0).value is None
    assert Rate(0, 0).interval is None
    assert str(Rate(0, 0)) == Rate(0, 0).percent == "not measured"
    assert Rate(9_999_999, 10_000_000).percent == "99.9 %"
    assert Rate(1, 10_000_000).percent == "0.1 %"
    assert Rate(352, 360).percent == "97.8 %"


# --- security curves ----------------------------------------------------------------------------------------


def survivors_of(e):
    return {s.index for s in e.samples if s.attack is None and s.clean_prediction == s.label}


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("batch_size", [256, 9])
def test_curves_are_the_worst_case_over_nested_budgets(p, batch_size):
    x, y = noisy_digits(80)
    threat = Threat((quick_apgd,), p)
    at = EPS[p]
    budgets = [f * at for f in (2.0, 0.25, 0.5, 1.5, 0.0)]
    told = []
    curve = security_curve(
        mlp(),
        worst_case(mlp(), x, y, threat, at),
        threat,
        at=at,
        budgets=budgets,
        execution=Execution(batch_size=batch_size, progress=lambda *step: told.append(step)),
    )
    assert curve.p == p
    assert curve.eps == tuple(sorted([*budgets, at]))
    assert [step[1] for step in told] == sorted(step[1] for step in told)
    assert told[-1][1:] == (80, 80)
    hits = [rate.hits for rate in curve.robust]
    assert hits == sorted(hits, reverse=True)
    assert {rate.n for rate in curve.robust} == {80}
    direct = {eps: survivors_of(evaluate(mlp(), (x, y), Threat(quick_apgd, p=p), eps=eps)) for eps in curve.eps}
    assert curve.robust[0].hits == int((predictions(mlp(), x) == y).sum())
    expected = {at: direct[at]}
    for eps in sorted((b for b in budgets if b < at), reverse=True):
        expected[eps] = direct[eps] | expected[min(expected)]
    for eps in sorted(b for b in budgets if b > at):
        expected[eps] = direct[eps] & expected[max(expected)]
    assert [len(expected[eps]) for eps in curve.eps] == hits


def test_curves_when_everything_or_nothing_breaks():
    x, y = few(20)
    for net, at in ((mlp(), 1.0), (mlp(), 1e-7), (lambda x: 0 * mlp()(x), 0.1)):
        threat = Threat((quick_apgd,))
        worst = worst_case(net, x, y, threat, at)
        curve = security_curve(net, worst, threat, at=at, budgets=[0.5 * at, 2 * at])
        hits = [rate.hits for rate in curve.robust]
        assert hits == sorted(hits, reverse=True)
        assert hits[1] == int(worst.robust_correct.sum())
    wrong = (y + 1) % 10
    worst = worst_case(mlp(), x, wrong, Threat((quick_apgd,)), 0.1)
    curve = security_curve(mlp(), worst, Threat((quick_apgd,)), at=0.1, budgets=[0.05, 0.2])
    assert [rate.hits for rate in curve.robust] == [int((predictions(mlp(), x) == wrong).sum())] * 3


def test_repeated_budgets_count_once():
    x, y = few(10)
    threat = Threat((fgsm,))
    curve = security_curve(
        mlp(), worst_case(mlp(), x, y, threat, 0.05), threat, at=0.05, budgets=[0.05, 0.1, 0.1, 0.01]
    )
    assert curve.eps == (0.01, 0.05, 0.1)


# --- the pieces of a result ---------------------------------------------------------------------------------


def test_batches_are_joined_in_order():
    x, y = noisy_digits(30)
    threat = Threat((quick_apgd,))
    whole = worst_case(mlp(), x, y, threat, 0.06)
    parts = [worst_case(mlp(), x[i : i + 11], y[i : i + 11], threat, 0.06, ids=i) for i in range(0, 30, 11)]
    joined = WorstCase.joined(parts)
    assert torch.equal(joined.x, whole.x)
    assert torch.equal(joined.robust_correct, whole.robust_correct)
    assert torch.equal(joined.attack, whole.attack)
    assert torch.equal(joined.clean_correct, whole.clean_correct)


def test_frames_hold_one_row_a_sample():
    x, y = noisy_digits(30)
    e = evaluate(mlp(), (x, y), Threat(quick_apgd), eps=0.06)
    frame = e.to_frame()
    assert len(frame) == 30
    assert frame["index"].tolist() == list(range(30))
    assert frame["label"].tolist() == y.tolist()
    assert int((frame["label"] == frame["clean_prediction"]).sum()) == e.clean_correct
    assert (
        int(frame["attack"].notna().sum()) == e.clean_correct - e.robust_correct == int(frame["restart"].notna().sum())
    )
    assert set(frame["eps"]) == {0.06}
    assert set(frame["p"]) == {math.inf}


def test_per_sample_results_stay_out_of_json_and_of_comparisons():
    e = evaluate(mlp(), few(10), Threat(fgsm), eps=0.06)
    assert dataclasses.replace(e, samples=()) == e
    net = linear(classes=3, n=64)
    x, y = few(10)
    a = brittle.audit(net, (x, y % 3), Threat([fgsm]), p=[2])
    document = json.loads(a.to_json())
    assert "samples" not in document["norms"][0]["evaluation"]
    assert document["norms"][0]["evaluation"]["n"] == 10
    assert Audit.from_json(a.to_json()).norms == a.norms


def test_a_sample_that_is_broken_has_no_positive_margin_even_where_the_network_falls_over():
    """So that results can be ordered and compared: NaN is neither below 0 nor equal to itself."""

    def falls(x: Tensor) -> Tensor:
        sound = torch.stack([torch.ones(len(x)), torch.zeros(len(x))], 1)
        return torch.where(x[:, :1] > 0.52, math.nan, sound)

    def push(model: object, x: Tensor, y: Tensor, *, eps: float, p: float) -> Tensor:
        return x + eps

    grey = torch.full((3, 4), 0.5), torch.zeros(3, dtype=torch.int64)
    found = brittle.evaluate(falls, grey, Threat(push), eps=0.1)
    assert found.robust_correct == 0
    assert all(sample.adversarial_margin <= 0 < sample.clean_margin for sample in found.samples or ())
    assert len(found.samples or ()) == 3
