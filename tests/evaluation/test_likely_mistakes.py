"""Warnings: each mistake is seen where it was made, silence is kept where all is well, and what to do is said."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import brittle
from brittle.attacks import fgsm
from brittle.cli.commands import run
from brittle.data.load import MEAN_STD
from brittle.evaluation.likely_mistakes import Glance, Rival, Tally, accuracy_of_guessing, glance_at, with_warnings
from brittle.evaluation.parts import Chunk
from brittle.evaluation.threat import Threat
from brittle.models.build import fcn
from brittle.models.normalize import Normalize, normalisations_of, normalised
from brittle.results import Evaluation, SampleResult, warnings_of
from helpers.networks import convnet, few, mlp, seeded, uniform, untouched

INF = math.inf


def evaluation(labels, answers, *, p=INF, eps=0.1, bounds=(0.0, 1.0)) -> Evaluation:
    """An evaluation of samples with these labels and answers, none of which broke."""
    samples = tuple(
        SampleResult(index, y, k, k, 1.0, 1.0, 0.0, None, None)
        for index, (y, k) in enumerate(zip(labels, answers, strict=True))
    )
    right = sum(y == k for y, k in zip(labels, answers, strict=True))
    return Evaluation(("fgsm",), p, eps, bounds, 1, 0, {}, len(samples), right, right, 0, 0.0, samples=samples)


def tallied(x, labels) -> Tally:
    tally = Tally()
    half = len(labels) // 2
    y = torch.tensor(labels)
    chunks = [Chunk(0, x[:half], y[:half], None), Chunk(half, x[half:], y[half:], None)]
    assert list(tally.over(chunks)) == chunks
    return tally


LABELS = [index % 10 for index in range(1000)]
"""A hundred of every class."""
TEN = Glance(10)


def said(labels=LABELS, answers=None, x=None, glance=TEN, **options) -> tuple[str, ...]:
    x = uniform(0, len(labels), 1, 4, 4) if x is None else x
    answers = labels if answers is None else answers
    return with_warnings(evaluation(labels, answers, **options), tallied(x, labels), glance).warnings


def test_nothing_is_said_where_nothing_is_wrong():
    assert said() == ()
    assert said(LABELS[:40]) == ()
    mostly = [y if index % 5 else (y + 1) % 10 for index, y in enumerate(LABELS)]
    assert said(answers=mostly) == ()
    assert said(eps=0.49) == said(p=2.0, eps=1.9) == ()
    assert said(glance=Glance(10, "bn1", 1.7)) == ()
    assert said(x=0.2 + 0.1 * uniform(0, 1000, 16)) == ()
    assert said(glance=Glance(0)) == ()  # an output that is no matrix of logits


@pytest.mark.parametrize(("n", "classes", "absent", "warns"), [
    (1000, 10, [3], True), (40, 10, [3], False), (70, 10, [3], True), (12, 10, [7, 8, 9], False),
    (200, 1000, range(10, 1000), True), (200, 200, range(0, 200, 3), False), (1000, 10, [], False),
])  # fmt: skip
def test_classes_without_a_sample_are_missed_where_chance_does_not_leave_them_out(n, classes, absent, warns):
    absent = set(absent)
    present = [k for k in range(classes) if k not in absent]
    labels = [present[index % len(present)] for index in range(n)]
    warnings = said(labels, glance=Glance(classes))
    assert bool(warnings) == warns
    if warns:
        (warning,) = warnings
        assert f"No sample is labelled {min(absent)}" in warning
        assert f"{classes} classes" in warning
        assert "restore it" in warning
        assert ("and 987 more" in warning) == (len(absent) == 990)


def test_the_chance_of_missing_classes_is_no_smaller_than_simulated():
    """Among 66 even draws from ten classes one is missing in at most one of a hundred data sets, among 40 in more."""
    draws = torch.randint(10, (4000, 66), generator=torch.Generator().manual_seed(0))
    missing = torch.tensor([len(row.unique()) < 10 for row in draws]).double().mean()
    assert 0.005 < missing < 0.01 + 3 * math.sqrt(0.01 / 4000)
    assert said([k for k in range(9) for _ in range(7)] + [0, 0, 0], glance=Glance(10))
    assert not said([k for k in range(9) for _ in range(7)] + [0, 0], glance=Glance(10))


@pytest.mark.parametrize(("p", "eps", "bounds", "advice"), [
    (INF, 8.0, (0.0, 1.0), "--eps inf=0.0314"), (INF, 0.5, (0.0, 1.0), "choose a smaller one"),
    (2.0, 128.0, (0.0, 1.0), "--eps 2=0.502"), (2.0, 2.0, (0.0, 1.0), "divide it by 255"),
    (INF, 128.0, (0.0, 255.0), "choose a smaller one"), (INF, 8.0, (0.0, 255.0), None),
])  # fmt: skip
def test_a_budget_that_makes_all_inputs_one_is_not_meant(p, eps, bounds, advice):
    """The middle of the bounds is within reach of every admissible input: the farthest are the corners."""
    x = bounds[1] * uniform(0, 1000, 1, 4, 4)
    warnings = said(x=x, p=p, eps=eps, bounds=bounds)
    assert len(warnings) == (advice is not None)
    middle = sum(bounds) / 2
    corner = torch.full((16,), bounds[1])
    assert (torch.linalg.vector_norm(corner - middle, ord=p) <= eps) == (advice is not None)
    if advice:
        assert advice in warnings[0]


@pytest.mark.parametrize(("right", "n", "warns"), [
    (140, 1000, True), (98, 1000, True), (4, 40, True),
    (300, 1000, False), (14, 40, False), (980, 1000, False),
])  # fmt: skip
def test_an_accuracy_near_chance_asks_for_normalisation_and_order(right, n, warns):
    labels = LABELS[:n]
    answers = [y if index < right else (y + 1 + index % 9) % 10 for index, y in enumerate(labels)]
    warnings = said(labels, answers)
    assert bool(warnings) == warns
    if warns:
        assert "normalised as in training" in warnings[0]
        assert "order of the network's classes" in warnings[0]


@pytest.mark.parametrize(("labels", "answers", "chance"), [
    ([0, 1, 2, 3], [0, 1, 2, 3], 0.25), ([0, 0, 0, 1], [0, 0, 0, 0], 0.75), ([2, 2], [2, 2], 1.0),
    ([0, 1], [5, 6], 0.1), ([0, 0, 1, 1], [0, 0, 0, 1], 0.5),
])  # fmt: skip
def test_guessing_reaches_what_shuffled_answers_reach(labels, answers, chance):
    classes = 4 if chance == 0.25 else 10
    assert accuracy_of_guessing(evaluation(labels, answers), classes) == pytest.approx(chance)


def test_a_constant_network_never_exceeds_guessing():
    labels = [0] * 700 + [1] * 300
    found = with_warnings(evaluation(labels, [0] * 1000), tallied(uniform(0, 1000, 4), labels), Glance(2))
    assert found.chance == found.clean_accuracy.value == 0.7
    assert not found.clean_accuracy.exceeds(found.chance)


@pytest.mark.parametrize("variance", [0.06, 0.2, 5.0, 16.0])
def test_inputs_unlike_those_of_the_training_ask_for_normalisation(variance):
    (warning,) = said(glance=Glance(10, "bn1", variance))
    assert "“bn1”" in warning
    assert "normalise them as in training" in warning


@pytest.mark.parametrize(("scale", "bounds"), [(1 / 255, (0.0, 1.0)), (1.0, (0.0, 255.0))])
def test_inputs_that_use_next_to_nothing_of_the_bounds_are_not_in_their_units(scale, bounds):
    (warning,) = said(x=scale * uniform(0, 1000, 16), bounds=bounds)
    assert "0.39 % of the bounds" in warning


def test_the_first_batch_norm_knows_the_scale_of_the_training():
    x = uniform(0, 64, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=1.0), nn.Flatten(), nn.Linear(144, 7))
    with torch.no_grad():
        net(4 * x - 2)  # takes the statistics
    net.eval()
    with untouched(net):
        glance = glance_at(net, x)
        meant = glance_at(net, 4 * x - 2)
    assert (glance.classes, glance.batch_norm) == (7, "1")
    assert glance.variance == pytest.approx(1 / 16, rel=1e-2)
    assert meant.variance == pytest.approx(1.0, rel=1e-2)
    assert glance_at(net, x[:20]).batch_norm is None  # too few to compare
    assert glance_at(mlp(), few(40)[0]) == Glance(10)
    assert glance_at(lambda x: x.flatten(1)[:, :3], x) == Glance(3)
    assert 0.5 < glance_at(convnet(), few(64)[0]).variance < 2


def test_evaluating_says_what_was_probably_forgotten_and_keeps_its_verdicts():
    x, y = few(60)
    fine = brittle.evaluate(mlp(), (x, y), Threat(fgsm), eps=0.05)
    assert fine.warnings == ()
    assert 0.1 <= fine.chance < 0.2
    shifted = brittle.evaluate(mlp(), (x, (y + 1) % 10), Threat(fgsm), eps=0.05)
    assert any("order of the network's classes" in warning for warning in shifted.warnings)


class Raw(nn.Module):
    """The digits network for inputs that were normalised."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x):
        (mean,), (std,) = MEAN_STD["digits"]
        return self.inner(std * x + mean)


def heard(model, data):
    return brittle.evaluate(model, data, Threat(fgsm), eps=0.01, honesty=False).warnings


def test_a_network_that_answers_better_normalised_is_noticed_on_a_known_data_set():
    data = brittle.load_data("digits", limit=100)
    with untouched(net := Raw()):
        (warning,) = [said for said in heard(net, data) if "usual constants" in said]
    plain, better = ((m(data.inputs).argmax(1) == data.labels).sum() for m in (Raw(), mlp()))
    assert f"{better}.0 % are right instead of {plain}.0 %" in warning
    assert "--normalise dataset" in warning
    assert heard(mlp(), data) == ()
    assert not any("usual constants" in said for said in heard(Raw(), (data.inputs, data.labels)))
    assert heard(normalised(Raw(), *MEAN_STD["digits"]), data) == ()


def test_a_rise_that_may_be_chance_is_not_worth_a_word():
    answers = [(y + 1) % 10 if index < 8 else y for index, y in enumerate(LABELS)]
    assert said(answers=answers, glance=Glance(10, rival=Rival("cifar10", tuple(LABELS)))) == ()  # less than a point
    few_labels, wrong = LABELS[:40], [5, *LABELS[1:40]]
    assert said(few_labels, wrong, glance=Glance(10, rival=Rival("cifar10", tuple(few_labels)))) == ()  # one of forty
    answers = [(y + 1) % 10 if index < 12 else y for index, y in enumerate(LABELS)]
    assert len(said(answers=answers, glance=Glance(10, rival=Rival("cifar10", tuple(LABELS))))) == 1


class Theirs(nn.Module):
    """A normalisation as others write it."""

    def __init__(self, mean, std, power=1):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.power = power

    def forward(self, x):
        return ((x - self.mean) / self.std) ** self.power


def test_normalisations_at_the_head_of_a_network_are_read_if_that_is_what_they_compute():
    inner, own = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), Normalize([0.5], [0.25], "a paper")
    (known,) = normalisations_of(nn.Sequential(own, inner))
    assert (known.mean, known.std, known.source) == ((0.5,), (0.25,), "a paper")
    twice = nn.Sequential(own, nn.Sequential(Theirs([0.1], [0.2]), inner))
    assert [known.mean for known in normalisations_of(twice)] == [(0.5,), pytest.approx((0.1,))]
    assert normalisations_of(nn.Sequential(Theirs([0.1], [0.2], power=3), inner)) == []
    assert normalisations_of(nn.Sequential(inner, own)) == normalisations_of(mlp()) == normalisations_of(len) == []
    assert any("normalised twice" in warning for warning in said(glance=glance_at(twice, uniform(0, 8, 1, 2, 2))))


def test_the_command_line_warns_and_ends_as_before(tmp_path, capsys):
    save_file(seeded(lambda: fcn(64, 32, 2, 10)).state_dict(), tmp_path / "net.safetensors")
    network = ["--arch", "fcn", "--data", "digits", "--limit", "40", "--preset", "fast", "--steps", "2"]
    common = [str(tmp_path / "net.safetensors"), *network, "--p", "inf", "--eps", "inf=8"]
    assert run(["attack", *common, "-o", str(tmp_path / "attack")]) == 0
    assert "  - Warning: Within the ℓ∞ budget 8 every input in [0, 1]" in capsys.readouterr().out
    assert run(["audit", *common, "-o", str(tmp_path / "audit")]) == 0
    assert "  - Warning: Within the ℓ∞ budget 8 every input in [0, 1]" in capsys.readouterr().out
    saved = brittle.Audit.load(tmp_path / "audit" / "audit.json")
    assert any("divide it by 255" in warning for warning in warnings_of([saved.norms[0].evaluation]))
