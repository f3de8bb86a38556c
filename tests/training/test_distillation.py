"""Learning from a teacher: the loss against its formula, what teacher and network are shown, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from brittle.errors import InputError
from brittle.training import Adversary, Interventions, Recipe, train
from brittle.training.adversarial import perturb
from brittle.training.batches import Batches
from brittle.training.distillation import distilled_cross_entropy
from helpers.matrices import quick
from helpers.networks import generator, seeded, untidy, untouched
from helpers.trainings import FULL, QUIET, interrupted, same, small, some, varied, weights

TAUGHT = dataclasses.replace(FULL, distill=0.5, temperature=2.0)


def taught(teacher):
    return {"interventions": Interventions(teacher=teacher)}


def softmax(z):
    z = np.exp(z - z.max(1, keepdims=True))
    return z / z.sum(1, keepdims=True)


def pair(seed, n=7, classes=4):
    """Logits of a network and of a teacher, and labels."""
    g = generator(seed)
    draw = lambda: 3 * torch.randn(n, classes, generator=g, dtype=torch.float64)  # noqa: E731
    return draw(), draw(), torch.randint(classes, (n,), generator=g)


# The loss


@quick
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0.3, 30))
def test_value_and_gradient_are_the_formulas(seed, weight, temperature):
    logits, target, y = pair(seed)
    logits.requires_grad_()
    loss = distilled_cross_entropy(logits, y, target, weight, temperature)
    loss.backward()
    s, t = logits.detach().numpy(), target.numpy()
    own, soft, plain = softmax(s / temperature), softmax(t / temperature), softmax(s)
    hits = np.eye(4)[y.numpy()]
    distance = (soft * (np.log(soft) - np.log(own))).sum()
    expected = -(1 - weight) * np.log((plain * hits).sum(1)).sum() + weight * temperature**2 * distance
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    gradient = (1 - weight) * (plain - hits) + weight * temperature * (own - soft)
    np.testing.assert_allclose(logits.grad.numpy(), gradient, rtol=1e-8, atol=1e-9)


def test_a_pupil_that_equals_its_teacher_has_nothing_to_learn():
    logits, _, y = pair(0)
    logits.requires_grad_()
    loss = distilled_cross_entropy(logits, y, logits.detach() + 5, 1.0, 3.0)  # a constant changes no prediction
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    assert float(logits.grad.abs().max()) < 1e-12


def test_at_a_high_temperature_logits_are_matched():
    """Then the gradient tends to the difference of the centred logits over the classes (Hinton et al. 2015)."""
    logits, target, y = pair(1)
    logits.requires_grad_()
    distilled_cross_entropy(logits, y, target, 1.0, 1e5).backward()
    difference = (logits - logits.mean(1, keepdim=True)) - (target - target.mean(1, keepdim=True))
    torch.testing.assert_close(logits.grad, difference.detach() / 4, rtol=1e-3, atol=1e-4)


# The training


@pytest.mark.parametrize("adversary", [None, Adversary(0.1, steps=2, ratio=0.3)], ids=["clean", "adversarial"])
def test_it_is_the_loop_that_one_would_write(adversary):
    """The network answers for attacked inputs, the teacher for the same inputs before the attack; both cropped."""
    recipe = Recipe(
        epochs=2, batch_size=20, optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, validation=0, crop=1,
        adversary=adversary, distill=0.7, temperature=2.0, **QUIET,
    )  # fmt: skip
    (x, y), model, teacher = some(108, torch.float64), small(torch.float64), small(torch.float64, seed=1)
    result = train(model, (x, y), recipe, **taught(teacher))
    batches = Batches.of(x, y, 20, seed=0, crop=1)
    for epoch in range(2):
        total = 0.0
        for rows in batches.order(epoch):
            clean, labels = batches.take(rows, epoch)
            inputs = clean
            if adversary is not None:
                n = round(0.3 * len(rows))
                worse = perturb(model, clean[:n], labels[:n], adversary, batches.keys[rows[:n]], epoch)
                inputs = torch.cat([worse, clean[n:]])
            own, target = model(inputs), (teacher(clean).detach() / 2).softmax(1)
            hard = -own.log_softmax(1)[torch.arange(len(rows)), labels].mean()
            soft = (target * (target.log() - (own / 2).log_softmax(1))).sum(1).mean()
            loss = 0.3 * hard + 0.7 * 4 * soft
            total += float(loss.detach()) * len(rows) / 108
            for weight, gradient in zip(
                model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
            ):
                weight.data -= 0.1 * gradient
        assert result.epochs[epoch].loss == pytest.approx(total, rel=1e-9)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[name], tensor, rtol=1e-9, atol=1e-9)


def test_without_labels_a_network_learns_its_teachers_predictions():
    """Labels are random, so that nothing but the teacher can be learnt from."""
    x, y = some(100)
    shuffled = y[torch.randperm(100, generator=generator(0))]
    teacher = train(small(), (x, y), Recipe(epochs=20, batch_size=20, lr=0.01, validation=0, **QUIET)).model
    recipe = Recipe(epochs=20, batch_size=20, lr=0.01, validation=0, distill=1.0, **QUIET)
    pupil = train(small(seed=5), (x, shuffled), recipe, **taught(teacher)).model
    with torch.no_grad():
        agreement = float((pupil(x).argmax(1) == teacher(x).argmax(1)).float().mean())
    assert agreement > 0.9


def test_the_teacher_is_asked_in_evaluation_mode_and_stays_as_it_was():
    teacher, x = untidy(), some()
    ready = untidy().eval()
    recipe = dataclasses.replace(TAUGHT, epochs=1)
    with untouched(teacher):
        result = train(varied(), x, recipe, **taught(teacher))
    assert weights(result) == weights(train(varied(), x, recipe, **taught(ready)))


# What is refused


@pytest.mark.parametrize(
    ("distill", "teacher", "said"),
    [
        (0.5, None, "exactly where distill is above 0; got no teacher"),
        (0.0, small(), "exactly where distill is above 0; got a Sequential"),
        (0.5, lambda x: x, "expected a torch.nn.Module; got function"),
        (0.5, nn.Sequential(nn.Flatten(), nn.Linear(64, 11)), "expected 10 logits, as the network has; got 11"),
        (0.5, nn.Sequential(nn.Flatten(), nn.Linear(63, 10)), "cannot run on inputs of shape"),
        (0.5, nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), "labels"),
    ],
)
def test_a_teacher_that_cannot_teach_is_named(distill, teacher, said):
    with pytest.raises(InputError, match=rf"^teacher: .*{said}"):
        train(small(), some(), Recipe(epochs=1, distill=distill, **QUIET), **taught(teacher))


# Interrupted trainings


def test_an_interrupted_training_goes_on_with_its_teacher_bit_for_bit(tmp_path):
    interrupted(tmp_path, recipe=TAUGHT, **taught(small()))
    resumed = train(varied(), some(), TAUGHT, folder=tmp_path, **taught(small()))
    assert same(resumed, train(varied(), some(), TAUGHT, **taught(small())))


def test_a_state_of_another_teacher_is_refused(tmp_path):
    interrupted(tmp_path, recipe=TAUGHT, **taught(small()))
    silent = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)))
    for other in (small(seed=1), silent):
        with pytest.raises(InputError, match="another teacher"):
            train(varied(), some(), TAUGHT, folder=tmp_path, **taught(other))


def test_a_state_from_before_there_were_teachers_is_one_without(tmp_path):
    interrupted(tmp_path)
    path = tmp_path / "state.json"
    state = json.loads(path.read_text())
    for name in ("distill", "temperature"):
        del state["identity"]["recipe"][name]
    path.write_text(json.dumps(state))
    with pytest.raises(InputError, match="another recipe"):
        train(varied(), some(), TAUGHT, folder=tmp_path, **taught(small()))
    assert same(train(varied(), some(), FULL, folder=tmp_path), train(varied(), some(), FULL))
