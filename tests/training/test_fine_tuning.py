"""A compressed network, channels gone or layers in pairs, is trained like any other: clean, attacked, held together."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from brittle.compression import channel_groups, factorised, remove_units
from brittle.models.checkpoints import read_state
from brittle.training import Adversary, Interventions, Recipe, condition, spread_control, train
from helpers.networks import convnet, digits, untouched
from helpers.trainings import QUIET, interrupted, same, small

TUNE = Recipe(epochs=4, batch_size=32, lr=0.01, validation=0, **QUIET)
RECIPES = {
    "clean": TUNE,
    "adversarial": dataclasses.replace(TUNE, adversary=Adversary(0.1, steps=2)),
    "spread": dataclasses.replace(TUNE, penalties={"spread_control": 1.0}),
    "condition": dataclasses.replace(TUNE, penalties={"condition": 0.1}, constraints={"condition_cap": 3.0}),
    "everything": dataclasses.replace(
        TUNE, penalties={"spread_control": 0.1, "condition": 0.01}, adversary=Adversary(0.1, steps=2), distill=0.5
    ),
}


@pytest.fixture(scope="module")
def samples():
    x, y = digits("train")
    return x[:160], y[:160]


@pytest.fixture(scope="module")
def teacher(samples):
    return train(small(seed=1), samples, TUNE).model


@pytest.fixture(scope="module")
def compressed(samples):
    """A trained network without half of its channels, and one with a low-rank pair."""
    model = convnet()
    groups = channel_groups(model, samples[0])
    kept = {group.name: torch.arange(0, group.units, 2) for group in groups.groups}
    return {"channels": remove_units(model, groups, kept, samples[0]), "ranks": factorised(small(), {"1": 5})}


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_learns_and_keeps_its_sizes(recipe, compressed, samples, teacher):
    model = compressed["channels"] if recipe == "spread" else compressed["ranks"]
    own = Interventions(teacher=teacher if RECIPES[recipe].distill else None)
    before = loss(model, samples)
    with untouched(model):
        result = train(model, samples, RECIPES[recipe], interventions=own)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in result.model.state_dict().items()} == shapes
    assert loss(result.model, samples) < 0.95 * before


def loss(model, samples):
    with torch.no_grad():
        return float(F.cross_entropy(model.eval()(samples[0]), samples[1]))


def test_penalties_act_on_what_is_left(compressed, samples):
    for name, penalty, model in (
        ("spread_control", spread_control, compressed["channels"]),
        ("condition", condition, compressed["ranks"]),
    ):
        free = train(model, samples, TUNE).model
        held = train(model, samples, dataclasses.replace(TUNE, penalties={name: 10.0})).model
        with torch.no_grad():
            assert float(penalty(held)) < 0.5 * float(penalty(free))


def test_its_layers_and_bounds_are_measured(compressed, samples):
    for model in compressed.values():
        result = train(model, samples, dataclasses.replace(TUNE, epochs=1, measure_every=1))
        assert result.epochs[0].lipschitz_2 > 0
        assert {row.layer: row.rank for row in result.layers}.get("1.0") == (
            5 if model is compressed["ranks"] else None
        )


def test_an_interrupted_fine_tuning_goes_on_bit_for_bit(compressed, samples, teacher, tmp_path):
    recipe = RECIPES["everything"]
    own = {"interventions": Interventions(teacher=teacher)}
    interrupted(tmp_path, compressed["ranks"], samples, recipe, **own)
    resumed = train(compressed["ranks"], samples, recipe, folder=tmp_path, **own)
    assert same(resumed, train(compressed["ranks"], samples, recipe, **own))
    kept = read_state(tmp_path / "weights.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in resumed.model.state_dict().items())
