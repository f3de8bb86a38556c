"""The loop: what plain torch would do, which epoch is kept, and a user's network left alone."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import brittle
from brittle.data.load import load_data
from brittle.errors import InputError
from brittle.training import (
    CONSTRAINTS,
    Adversary,
    Interventions,
    Recipe,
    group_lasso,
    loop,
    nuclear_norm,
    train,
)
from brittle.training.adversarial import perturb
from brittle.training.batches import Batches
from brittle.training.history import frame
from brittle.training.jobs import split_validation
from helpers.networks import accuracy, digits, mlp, seeded, uniform, untidy, untouched
from helpers.trainings import FULL, QUIET, same, small, some, untimed, varied, weights

# What is computed


def by_hand(model, samples, recipe, optimizer, penalty=None, hold=None, attack=None):
    """The loop as one would write it oneself; returns the trained copy and each epoch's mean loss and accuracy."""
    x, y = samples
    batches = Batches.of(x, y, recipe.batch_size, seed=recipe.seed, crop=recipe.crop, flip=recipe.flip)
    step, told = 0, []
    for epoch in range(recipe.epochs):
        model.train()
        loss_sum = right = 0.0
        for rows in batches.order(epoch):
            inputs, labels = batches.take(rows, epoch)
            if attack is not None:
                n = round(attack.ratio * len(rows))
                worse = perturb(model, inputs[:n], labels[:n], attack, batches.keys[rows[:n]], epoch)
                inputs = torch.cat([worse, inputs[n:]])
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step, recipe.epochs * len(batches))
            optimizer.zero_grad()
            logits = model(inputs)
            loss = F.cross_entropy(logits, labels)
            (loss if penalty is None else loss + penalty(model)).backward()
            optimizer.step()
            if hold is not None:
                hold()
            step += 1
            loss_sum += float(loss.detach()) * len(rows)
            right += int((logits.argmax(1) == labels).sum())
        told.append((loss_sum / len(y), right / len(y)))
    return model, told


def assert_close(result, model, tolerance=1e-9):
    assert result.model.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[name], tensor, rtol=tolerance, atol=tolerance)


OPTIMIZERS = {
    "adamw": lambda p, r: torch.optim.AdamW(p, r.lr, weight_decay=r.weight_decay),
    "sgd": lambda p, r: torch.optim.SGD(p, r.lr, momentum=r.momentum, weight_decay=r.weight_decay),
}


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_loop_that_one_would_write(name, schedule):
    """108 samples in batches of 20: the last batch is smaller. In float64, so that rounding does not add up."""
    recipe = Recipe(
        epochs=3, batch_size=20, optimizer=name, lr=0.02, weight_decay=0.05, schedule=schedule, validation=0, **QUIET
    )
    samples, model = some(108, torch.float64), small(torch.float64)
    result = train(model, samples, recipe)
    model, told = by_hand(model, samples, recipe, OPTIMIZERS[name](model.parameters(), recipe))
    assert_close(result, model)
    for row, (loss, right) in zip(result.epochs, told, strict=True):
        assert row.loss == pytest.approx(loss, rel=1e-9)
        assert row.accuracy == pytest.approx(right)
        assert row.penalty == 0
        assert row.validation_accuracy is None
    assert [row.steps for row in result.epochs] == [6, 12, 18]
    assert [row.lr for row in result.epochs] == pytest.approx([recipe.rate(step, 18) for step in (5, 11, 17)])


def test_in_single_precision_too():
    recipe = Recipe(epochs=1, batch_size=20, optimizer="sgd", lr=0.1, validation=0, **QUIET)
    model = small()
    result = train(model, some(), recipe)
    model, _ = by_hand(model, some(), recipe, OPTIMIZERS["sgd"](model.parameters(), recipe))
    assert_close(result, model, 1e-6)


def test_every_intervention_is_where_one_would_put_it():
    """Crops, attack of the first half, penalties, optimiser, constraint: in this order, in every step."""
    attack = Adversary(0.1, steps=2, ratio=0.3)
    recipe = Recipe(
        epochs=2, batch_size=20, lr=0.01, validation=0, crop=1, flip=True, adversary=attack,
        penalties={"group_lasso": 0.02, "nuclear_norm": 0.01}, constraints={"frobenius": 2.0}, **QUIET,
    )  # fmt: skip
    samples, model = some(108, torch.float64), small(torch.float64)
    result = train(model, samples, recipe)
    seen = []

    def penalty(net):
        seen.append(0.02 * group_lasso(net) + 0.01 * nuclear_norm(net))
        return seen[-1]

    hold = CONSTRAINTS["frobenius"](model, 2.0)
    hold()  # the start satisfies the constraint as well
    model, told = by_hand(
        model, samples, recipe, OPTIMIZERS["adamw"](model.parameters(), recipe), penalty, hold, attack
    )
    assert_close(result, model)
    assert float(result.model[1].weight.detach().norm()) == pytest.approx(2.0)
    sizes = [20, 20, 20, 20, 20, 8] * 2
    means = [sum(float(v.detach()) * n for v, n in zip(seen[k : k + 6], sizes, strict=False)) / 108 for k in (0, 6)]
    assert [row.penalty for row in result.epochs] == pytest.approx(means, rel=1e-9)
    assert [row.loss for row in result.epochs] == pytest.approx([loss for loss, _ in told], rel=1e-9)


def test_a_penalty_of_ones_own_is_added():
    recipe = Recipe(epochs=2, batch_size=20, optimizer="sgd", lr=0.1, validation=0, **QUIET)
    samples, model = some(60, torch.float64), small(torch.float64)
    penalty = (lambda net: net[3].weight.square().sum()), 0.1
    result = train(model, samples, recipe, interventions=Interventions(penalties=[penalty]))
    optimizer = OPTIMIZERS["sgd"](model.parameters(), recipe)
    model, _ = by_hand(model, samples, recipe, optimizer, lambda net: 0.1 * net[3].weight.square().sum())
    assert_close(result, model)


def test_parameters_that_are_frozen_stay():
    model = small()
    model[1].weight.requires_grad_(False)
    result = train(model, some(), Recipe(epochs=2, lr=0.1, **QUIET))
    assert torch.equal(result.model[1].weight, model[1].weight)
    assert not torch.equal(result.model[3].weight, model[3].weight)
    assert not result.model[1].weight.requires_grad
    with pytest.raises(InputError, match="model"):
        train(small().requires_grad_(False), some(), Recipe(epochs=1, **QUIET))


def test_a_last_batch_of_one_sample_does_not_break_batch_norms():
    result = train(varied(), some(41), Recipe(epochs=1, batch_size=40, validation=0, **QUIET))
    assert all(torch.isfinite(tensor).all() for tensor in result.model.state_dict().values())


@pytest.mark.parametrize(
    ("n", "size", "steps"), [(45, 40, 1), (48, 40, 2), (80, 40, 2), (5, 40, 1), (40, 4, 10), (42, 4, 10)]
)
def test_steps_are_those_that_were_taken(n, size, steps):
    """A last batch of fewer than 8 samples is left out: it is no step, and the schedule ends without it."""
    calls = []

    def counted(model):
        calls.append(model)
        return torch.zeros(())

    recipe = Recipe(epochs=3, batch_size=size, validation=0, schedule="cosine", **QUIET)
    result = train(varied(), some(n), recipe, interventions=Interventions(penalties=[(counted, 1.0)]))
    assert [row.steps for row in result.epochs] == [steps, 2 * steps, 3 * steps]
    assert len(calls) == 3 * steps
    last = recipe.lr * (1 + math.cos(math.pi * (3 * steps - 1) / (3 * steps))) / 2
    assert result.epochs[-1].lr == pytest.approx(last)


def test_a_folder_holds_no_table_of_an_earlier_training(tmp_path):
    for every, there in ((1, True), (0, False)):
        recipe = Recipe(epochs=1, batch_size=40, validation=0, measure_every=every)
        train(small(), some(), recipe, folder=str(tmp_path))
        assert [(tmp_path / f"layers.{kind}").exists() for kind in ("csv", "parquet")] == [there, there]


def test_what_is_only_watched_changes_nothing(tmp_path):
    """Measurements, a folder, a listener and the global random state do not decide the weights."""
    recipe = dataclasses.replace(FULL, measure_every=0)
    expected = weights(train(varied(), some(), recipe))
    with torch.random.fork_rng():
        torch.manual_seed(123)
        assert (
            weights(train(varied(), some(), recipe, folder=tmp_path, callback=lambda moment: torch.rand(3))) == expected
        )
    assert weights(train(varied(), some(), dataclasses.replace(recipe, measure_every=1))) == expected


# What is left alone

EVERYTHING = dataclasses.replace(FULL, measure_every=1, layers=("4",))


def image_samples():
    x, y = some(60)
    return x.clone(), y.clone()


def test_the_users_network_and_data_stay_as_they_were(tmp_path):
    model, (x, y) = untidy(), image_samples()
    before = x.clone(), y.clone()
    with untouched(model):
        result = train(model, (x, y), EVERYTHING, folder=tmp_path)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert not any(module.training for module in result.model.modules())
    assert all(parameter.grad is None for parameter in result.model.parameters())
    assert {p.data_ptr() for p in result.model.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())


def failing(model):
    raise RuntimeError("a penalty that fails")


def failing_callback(moment):
    raise RuntimeError("a listener that fails")


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (RuntimeError, {"interventions": Interventions(penalties=[(failing, 1.0)])}),
        (RuntimeError, {"interventions": Interventions(constraints=[failing])}),
        (RuntimeError, {"callback": failing_callback}),
        (InputError, {"recipe": dataclasses.replace(EVERYTHING, layers=("nothing",))}),
        (InputError, {"recipe": dataclasses.replace(EVERYTHING, penalties={"nothing": 1.0})}),
    ],
)
def test_the_users_network_stays_as_it_was_after_an_error(error, options):
    model = untidy()
    with untouched(model), pytest.raises(error):
        train(model, image_samples(), **{"recipe": EVERYTHING} | options)


def test_another_default_dtype_is_left_and_does_not_matter():
    expected = weights(train(varied(), some(), FULL))
    torch.set_default_dtype(torch.float64)
    try:
        model = varied().float()
        assert torch.get_default_dtype() == torch.float64
        model.load_state_dict(expected_start)
        assert weights(train(model, some(), FULL)) == expected
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


expected_start = varied().state_dict()


# Selection, history, errors

RESTLESS = Recipe(epochs=6, batch_size=20, optimizer="sgd", lr=1.5, momentum=0.9, seed=3, **QUIET)


def validation_set():
    x, y = digits("test")
    return x[:80], y[:80]


def test_the_best_epoch_is_kept():
    result = train(small(), some(), RESTLESS, validation=validation_set())
    scores = [row.validation_accuracy for row in result.epochs]
    assert max(scores) > scores[-1]  # else the last would do
    assert result.epoch == result.epochs[scores.index(max(scores))].epoch or scores.count(max(scores)) > 1
    assert accuracy(result.model, *validation_set()) == pytest.approx(max(scores))
    best = result.epochs[result.epoch - 1]
    with torch.no_grad():
        loss = float(F.cross_entropy(result.model(validation_set()[0]), validation_set()[1]))
    assert best.validation_loss == pytest.approx(loss, rel=1e-5)


def test_the_last_epoch_is_kept_when_asked_for():
    result = train(small(), some(), dataclasses.replace(RESTLESS, select="last"), validation=validation_set())
    assert result.epoch == 6
    assert accuracy(result.model, *validation_set()) == pytest.approx(result.epochs[-1].validation_accuracy)
    best = train(small(), some(), RESTLESS, validation=validation_set())
    assert untimed(best.epochs) == untimed(result.epochs)


def test_with_an_adversary_the_mixture_selects():
    attack = Adversary(0.15, steps=2, ratio=0.5)
    recipe = dataclasses.replace(RESTLESS, adversary=attack, lr=0.5, epochs=8)
    result = train(small(), some(), recipe, validation=validation_set())
    mixture = [(row.validation_accuracy + row.validation_robust) / 2 for row in result.epochs]
    assert mixture[result.epoch - 1] == pytest.approx(max(mixture))
    assert max(mixture) > mixture[-1] or result.epoch == 8
    assert all(row.validation_robust <= row.validation_accuracy for row in result.epochs)
    assert any(row.validation_robust < row.validation_accuracy for row in result.epochs)


def test_the_validation_share_is_held_out():
    """A validation accuracy is one of the share's own samples, and these are not trained on."""
    x, y = some(100)
    result = train(small(), (x, y), Recipe(epochs=1, batch_size=7, validation=0.3, **QUIET))
    assert result.epochs[0].steps == 10  # 70 samples are left
    assert result.epochs[0].validation_accuracy * 30 == pytest.approx(round(result.epochs[0].validation_accuracy * 30))
    marked = x.clone()
    (kept, _), (held, _) = split_validation((torch.arange(100.0)[:, None], y), Recipe(validation=0.3))
    assert sorted([*kept[:, 0].tolist(), *held[:, 0].tolist()]) == list(range(100))
    marked[held[:, 0].long()] = 0.5  # changes validation alone
    changed = train(small(), (marked, y), Recipe(epochs=1, batch_size=7, validation=0.3, **QUIET))
    assert weights(changed) == weights(result)
    assert changed.epochs[0].validation_loss != result.epochs[0].validation_loss


def test_a_share_that_leaves_nothing_is_refused():
    with pytest.raises(InputError, match="validation"):
        train(small(), some(3), Recipe(epochs=1, validation=0.1))


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_patience_ends_the_training(patience):
    recipe = dataclasses.replace(RESTLESS, epochs=12)
    rows = train(small(), some(), recipe, validation=validation_set()).epochs
    best, waited, end = -1.0, 0, len(rows)
    for row in rows:
        assert row.validation_accuracy != best, "the rule is about ties of the accuracy below"
        waited = 0 if row.validation_accuracy > best else waited + 1
        best = max(best, row.validation_accuracy)
        if waited == patience:
            end = row.epoch
            break
    assert end < 12
    shorter = train(small(), some(), dataclasses.replace(recipe, patience=patience), validation=validation_set())
    assert untimed(shorter.epochs) == untimed(rows[:end])


def test_patience_counts_epochs_without_better_accuracy():
    """A lower loss alone is no better accuracy (Recipe.patience)."""
    recipe = Recipe(epochs=6, batch_size=20, lr=1e-5, patience=2, **QUIET)
    result = train(mlp(), some(), recipe, validation=validation_set())
    assert len({row.validation_accuracy for row in result.epochs}) == 1
    assert len(result.epochs) == 3


def test_patience_ends_the_training_also_when_the_last_weights_are_kept():
    recipe = Recipe(epochs=6, lr=1e-30, weight_decay=0.0, patience=1, select="last", **QUIET)
    assert len(train(small(), some(), recipe).epochs) == 2


def test_the_history_on_disk_is_that_of_the_result(tmp_path):
    recipe = dataclasses.replace(FULL, measure_every=1, epochs=3)
    result = train(varied(), some(), recipe, folder=tmp_path)
    for name, rows in (("history", result.epochs), ("layers", result.layers)):
        expected = frame(rows)
        assert len(expected) == len(rows) > 0
        for read in (
            pd.read_csv(tmp_path / f"{name}.csv", dtype={"layer": str}),
            pd.read_parquet(tmp_path / f"{name}.parquet"),
        ):
            assert list(read.columns) == list(expected.columns)
            for column in expected:
                if expected[column].dtype == object or column == "layer":
                    assert read[column].tolist() == expected[column].tolist()
                else:
                    np.testing.assert_allclose(read[column].astype(float), expected[column].astype(float), rtol=1e-14)
    assert [row.epoch for row in result.epochs] == [1, 2, 3]
    loaded = varied()
    brittle.fill(loaded, brittle.read_state(tmp_path / "weights.safetensors"))
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), result.model.state_dict().values(), strict=True)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["history.csv", "history.parquet", "layers.csv", "layers.parquet", "weights.safetensors"]
    )


def test_layers_are_measured_as_by_the_audit():
    """The last measurement is of the last weights: norms by numpy, and certified bounds above observed slopes."""
    result = train(small(), some(), Recipe(epochs=3, measure_every=2, select="last", lr=0.01))
    assert sorted({row.epoch for row in result.layers}) == [2, 3]
    for row in result.layers[-2:]:
        W = result.model.get_submodule(row.layer).weight.detach().double().numpy()
        sigma = np.linalg.svd(W, compute_uv=False)
        assert row.norm_2 == pytest.approx(sigma[0], rel=1e-6)
        assert row.frobenius == pytest.approx(np.sqrt((W**2).sum()), rel=1e-6)
        assert row.norm_inf == pytest.approx(np.abs(W).sum(1).max(), rel=1e-6)
        assert row.stable_rank == pytest.approx((sigma**2).sum() / sigma[0] ** 2, rel=1e-6)
    layers = result.layers[-2:]
    assert result.epochs[0].lipschitz_2 is None
    product = layers[0].norm_2 * layers[1].norm_2
    assert product * (1 - 1e-6) <= result.epochs[-1].lipschitz_2 <= product * (1 + 1e-4)
    assert result.epochs[-1].lipschitz_inf == pytest.approx(layers[0].norm_inf * layers[1].norm_inf, rel=1e-4)


@pytest.mark.parametrize("lr", [1e6, 1e38, 1e300])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_loss_that_is_not_finite_names_the_learning_rate(lr, optimizer, tmp_path):
    recipe = Recipe(epochs=8, batch_size=20, lr=lr, optimizer=optimizer, **QUIET)
    with pytest.raises(InputError, match=r"\blr\b"):
        train(small(), some(), recipe, folder=tmp_path)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_loss_that_is_not_finite_names_the_learning_rate_with_measurements(optimizer, tmp_path):
    with pytest.raises(InputError, match=r"\blr\b"):
        train(small(), some(), Recipe(epochs=8, batch_size=20, lr=1e38, optimizer=optimizer), folder=tmp_path)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_validation_loss_that_is_not_finite_names_the_learning_rate(optimizer, tmp_path):
    """The last step of an epoch spoils the weights; the training loss was finite throughout."""
    recipe = Recipe(epochs=1, batch_size=500, lr=1e38, optimizer=optimizer, **QUIET)
    with pytest.raises(InputError, match=r"\blr\b"):
        train(small(), some(), recipe, folder=tmp_path)


def spoilt_in_the_second_epoch(folder):
    """The learning rate is fine for an epoch, then a constraint spoils the weights; what is left in the folder."""
    recipe, calls = Recipe(epochs=3, batch_size=20, validation=0, **QUIET), []

    def spoil(model):
        def act():
            calls.append(None)
            if len(calls) == 1 + 5 + 2:  # once before the first step; in the second epoch
                with torch.no_grad():
                    model[3].bias.fill_(torch.nan)

        return act

    with pytest.raises(InputError, match="lr"):
        train(small(), some(), recipe, folder=folder, interventions=Interventions(constraints=[spoil]))
    tensors, facts = loop.read_snapshot(folder)
    assert facts["progress"]["epoch"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert same(train(small(), some(), recipe, folder=folder), train(small(), some(), recipe))


def test_a_loss_that_is_not_finite_leaves_the_state_before_it(tmp_path):
    spoilt_in_the_second_epoch(tmp_path)


def test_a_loss_that_is_not_finite_leaves_the_state_before_it_within_an_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "STATE_SECONDS", 0.0)
    spoilt_in_the_second_epoch(tmp_path)


@pytest.mark.parametrize(
    ("samples", "name"),
    [
        ((torch.full((4, 1, 8, 8), 1.5), torch.zeros(4).long()), "data"),
        ((torch.full((4, 1, 8, 8), torch.nan), torch.zeros(4).long()), "data"),
        ((torch.zeros(4, 1, 8, 8), torch.zeros(3).long()), "data"),
        ((torch.zeros(4, 1, 8, 8), torch.zeros(4)), "data"),
        ((torch.zeros(0, 1, 8, 8), torch.zeros(0).long()), "data"),
    ],
)
def test_bad_data_are_refused(samples, name):
    with pytest.raises(InputError, match=f"^{name}"):
        train(small(), samples, Recipe(epochs=1))
    with pytest.raises(InputError, match=r"^validation"):
        train(small(), some(), Recipe(epochs=1), validation=samples)


def test_labels_beyond_the_classes_are_refused():
    x, y = some()
    with pytest.raises(InputError, match="class"):
        train(small(), (x, y + 5), Recipe(epochs=1, **QUIET))


def test_flat_inputs_are_not_cropped():
    x, y = some()
    for field in ({"crop": 1}, {"flip": True}):
        with pytest.raises(InputError, match=r"crop, flip"):
            train(small(), (x.flatten(1), y), Recipe(epochs=1, **field))


@pytest.mark.parametrize("devices", [(), "gpu", ("cpu", "cuda"), ("cuda:1", "cuda:1"), "", ["cpu", ""]])
def test_devices_that_cannot_share_a_training_are_refused(devices):
    with pytest.raises(InputError, match="devices: expected"):
        train(small(), some(), Recipe(epochs=1), devices=devices)


def test_every_process_needs_two_samples_a_step():
    with pytest.raises(InputError, match="batch_size: expected at least 2 for each of 3 processes; got 5"):
        train(small(), some(), Recipe(epochs=1, batch_size=5), devices=("cpu",) * 3)


def test_moments_tell_how_far_it_is():
    moments = []
    result = train(small(), some(), Recipe(epochs=2, batch_size=20, validation=0, **QUIET), callback=moments.append)
    assert [(moment.epoch, moment.epochs, moment.steps) for moment in moments] == sorted(
        (moment.epoch, 2, 5) for moment in moments
    )
    rows = [moment.row for moment in moments if moment.row is not None]
    assert rows == list(result.epochs)
    for moment in moments:
        assert 0 <= moment.step <= 5
        assert 0 <= moment.accuracy <= 1
        assert moment.samples_per_second > 0
        if moment.row is not None:
            assert moment.loss == pytest.approx(moment.row.loss)
            assert moment.accuracy == pytest.approx(moment.row.accuracy)


def test_data_objects_are_taken_as_they_are():
    data = load_data("digits", split="train", limit=100)
    recipe = Recipe(epochs=1, **QUIET)
    assert same(train(small(), data, recipe), train(small(), (data.inputs, data.labels), recipe))


class Masks(nn.Module):
    """Dropout that keeps what it let through; copies share the list."""

    seen: list[tuple[bool, ...]]

    def __init__(self, seen: list[tuple[bool, ...]]) -> None:
        super().__init__()
        self.dropout, self.kept = nn.Dropout(0.5), nn.Linear(4, 4)
        Masks.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        """As dropout; the mask is noted in training mode alone."""
        if self.training:
            Masks.seen.append(tuple((self.dropout(torch.ones(64)) > 0).tolist()))
        return self.kept(self.dropout(x))


def masks(seed: int) -> list[tuple[bool, ...]]:
    seen: list[tuple[bool, ...]] = []
    recipe = Recipe(epochs=3, batch_size=10, validation=0, seed=seed, **QUIET)
    train(seeded(lambda: Masks(seen)), (uniform(0, 40, 4), torch.arange(40) % 4), recipe)
    return [mask for mask in seen if mask][-12:]


def test_dropout_is_drawn_anew_in_every_step_of_every_epoch_and_by_the_seed():
    """Four steps in each of three epochs; 64 fair coins agree once in 10^19 times."""
    first = masks(0)
    assert len(first) == len(set(first)) == 12
    assert masks(0) == first
    assert not set(masks(1)) & set(first)


class Starts(nn.Module):
    """A linear network that keeps the bright inputs whose gradient is asked for; copies share the list."""

    seen: list[Tensor]

    def __init__(self, seen: list[Tensor]) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        Starts.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        """Linear."""
        if x.requires_grad and x.mean() > 0.5:
            Starts.seen.append(x.detach().clone())
        return self.head(self.linear(x))


def validation_starts(seed: int, n: int) -> Tensor:
    """Where the attacks on n equal, bright validation samples begin; the training samples are dark."""
    seen: list[Tensor] = []
    recipe = Recipe(
        epochs=1, batch_size=20, seed=seed, adversary=Adversary(0.1, steps=1), lr=1e-6, **QUIET
    )  # fmt: skip
    dark, bright = uniform(0, 20, 4, high=0.2), torch.full((n, 4), 0.7)
    train(
        seeded(lambda: Starts(seen)),
        (dark, torch.arange(20) % 3),
        recipe,
        validation=(bright, torch.zeros(n, dtype=torch.int64)),
    )
    return torch.cat(seen)


def test_the_attack_on_the_validation_samples_starts_by_the_seed_and_elsewhere_for_every_sample():
    """300 of them: more than are attacked at once."""
    first = validation_starts(0, 300)
    assert first.shape == (300, 4)
    assert len(first.unique(dim=0)) == 300
    assert torch.equal(validation_starts(0, 300), first)
    assert not (validation_starts(1, 300) == first).all(1).any()


def test_the_share_that_is_attacked_weighs_the_selection():
    """The mixture of ratio r is r robust and 1 - r clean accuracy; the best epoch has the largest mixture."""
    telling = 0
    for seed in range(6):
        x, y = uniform(seed, 120, 4), torch.arange(120) % 3
        attack = Adversary(0.05, steps=1, ratio=0.1)
        recipe = Recipe(epochs=8, batch_size=20, lr=0.3, seed=seed, adversary=attack, **QUIET)
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), seed)
        result = train(model, (x, y), recipe, validation=(uniform(seed + 50, 60, 4), torch.arange(60) % 3))
        mixture = [0.9 * row.validation_accuracy + 0.1 * row.validation_robust for row in result.epochs]
        assert mixture[result.epoch - 1] >= max(mixture) - 1e-12
        robust = [row.validation_robust for row in result.epochs]
        telling += robust[result.epoch - 1] < max(robust)
    assert telling  # else the robust accuracy alone would do
