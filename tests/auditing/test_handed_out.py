"""What an audit hands out beside its numbers: examples, fragile samples, classes, margins, pictures."""

import functools
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import brittle
from brittle.auditing.directions import margins_and_slopes
from brittle.auditing.pictures import DIRECTIONS
from brittle.errors import InputError
from brittle.models.borrow import frozen
from brittle.results import Audit

NOTEBOOK = Path(__file__).parents[2] / "docs" / "example.ipynb"
P = math.inf


@functools.cache
def network() -> nn.Module:
    """Dense, and right about half of the digits: each class has the mean of some digits as its row."""
    digits = brittle.load_data("digits", split="train", limit=300)
    means = torch.stack([digits.inputs[digits.labels == label].mean(0).flatten() for label in range(10)])
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        net[1].weight.copy_(means)
        net[1].bias.copy_(-0.5 * means.square().sum(1))
    return net


def data():
    return brittle.load_data("digits", limit=40)


THREAT = brittle.Threat(functools.partial(brittle.pgd, steps=4))


@functools.cache
def found() -> Audit:
    return brittle.audit(network(), data(), THREAT, p=(P,), honesty=False, examples=6)


def test_examples_are_handed_out_for_the_first_samples_on_request_alone():
    direct = brittle.evaluate(network(), data(), THREAT, eps=0.06, honesty=False, examples=6)
    for evaluation in (direct, found().norm(P).evaluation):
        examples = evaluation.examples
        assert examples.index.tolist() == list(range(6))
        assert np.array_equal(examples.x, data().inputs[:6].numpy())
        assert 0 < np.abs(examples.x_adv - examples.x).max() <= 0.06 * (1 + 1e-5)
        with torch.no_grad():
            answers = network()(torch.from_numpy(examples.x_adv)).argmax(1)
        assert examples.adversarial_prediction.tolist() == answers.tolist()
        assert examples.adversarial_prediction.tolist() == [s.adversarial_prediction for s in evaluation.samples[:6]]
    assert brittle.evaluate(network(), data(), THREAT, eps=0.06, honesty=False).examples is None
    assert '"examples"' not in found().to_json()


def test_examples_are_saved_as_arrays(tmp_path):
    found().norm(P).evaluation.examples.save(tmp_path / "examples.npz")
    with np.load(tmp_path / "examples.npz") as arrays:
        assert arrays["x_adv"].shape == (6, 1, 8, 8)


@pytest.mark.parametrize("wrong", [-1, True, 2.0])
def test_a_number_of_examples_that_is_none_is_refused(wrong):
    with pytest.raises(InputError, match="examples: expected a number of samples of at least 0"):
        brittle.evaluate(network(), data(), THREAT, eps=0.06, examples=wrong)


def test_classes_add_up_and_the_margin_is_that_of_the_right_samples():
    evaluation = found().norm(P).evaluation
    labels = data().labels.tolist()
    assert [(c.label, c.clean.n) for c in evaluation.classes] == [(k, labels.count(k)) for k in sorted(set(labels))]
    for c in evaluation.classes:
        own = [s for s in evaluation.samples if s.label == c.label and s.clean_prediction == c.label]
        assert (c.clean.hits, c.robust.hits) == (len(own), sum(s.attack is None for s in own))
    right = [s.clean_margin for s in evaluation.samples if s.clean_prediction == s.label]
    assert evaluation.median_margin == statistics.median(right)


def test_the_most_fragile_samples_change_their_answer_at_the_distance_that_is_said():
    listed, evaluation = found().norm(P).most_fragile, found().norm(P).evaluation
    broken = [s for s in evaluation.samples if s.clean_prediction == s.label and s.attack]
    assert len(listed) == 10
    near = [s for s in listed if s.distance is not None]
    assert len(near) == min(10, len(broken)) > 0
    assert [s.distance for s in near] == sorted(s.distance for s in near)
    by_index = {s.index: s for s in broken}
    for sample in near:
        assert 0 < sample.distance <= by_index[sample.index].distance * (1 + 1e-5)
        assert sample.prediction != sample.label == by_index[sample.index].label
        # No linear margin falls faster than its slope: nothing nearer changes the answer.
        x, y = data().inputs[sample.index][None], torch.tensor([sample.label])
        with frozen(network()):
            weights = network()[1].weight
            gaps = (weights[sample.label] - weights).abs().sum(1)
            logits = network()(x)[0]
        least = min(float((logits[y] - logits[j]) / gaps[j]) for j in range(10) if j != sample.label)
        assert sample.distance >= least * (1 - 1e-4)


def test_margin_over_sensitivity_is_taken_sample_by_sample():
    right = [s.index for s in found().norm(P).evaluation.samples if s.clean_prediction == s.label]
    margin, slope = margins_and_slopes(network(), data().inputs[right], data().labels[right], P)
    lipschitz = found().norm(P).lipschitz
    assert lipschitz.slope == pytest.approx(float(slope.median()))
    assert lipschitz.reach == pytest.approx(float((margin / slope).median()))


def test_pictures_hold_broken_samples_the_first_layers_directions_and_the_universal_perturbation():
    pictures = found().pictures
    assert len(pictures.index) == 3
    assert (pictures.clean_prediction == pictures.label).all()
    assert (pictures.adversarial_prediction != pictures.label).all()
    assert len(set(pictures.label.tolist())) == 3
    assert np.array_equal(pictures.x[0], data().inputs[int(pictures.index[0])].numpy())
    assert pictures.layer == "1"
    V = torch.from_numpy(pictures.directions).flatten(1)
    assert 1 <= len(V) <= DIRECTIONS
    assert torch.allclose(V @ V.T, torch.eye(len(V)), atol=1e-5)
    gains = torch.linalg.svdvals(network()[1].weight.detach())[: len(V)]
    assert torch.allclose(torch.from_numpy(pictures.gains).float(), gains, rtol=1e-4)
    assert np.abs(pictures.universal).max() == pytest.approx(0.06)


def test_what_is_no_image_has_no_pictures():
    flat = (data().inputs.flatten(1)[:12], data().labels[:12])
    audit = brittle.audit(network(), flat, THREAT, p=(P,), eps=0.06, honesty=False)
    assert audit.pictures is None
    assert audit.norm(P).most_fragile


def test_the_example_notebook_runs():
    names = {}
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5
    for cell in cells:
        exec("".join(cell["source"]), names)
    assert names["both"].first.name == "dense"
