"""The recipe: every wrong value is named, schedules have closed forms, and every attribute changes what comes out."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from brittle.errors import InputError
from brittle.training import CONSTRAINTS, PENALTIES, Adversary, Interventions, Recipe, train
from brittle.training.optimizers import OPTIMIZERS, SCHEDULES
from helpers.matrices import quick
from helpers.networks import digits, seeded

NAN, INF = math.nan, math.inf
WRONG = {
    "epochs": (0, -1, 1.5, True, "3", None),
    "batch_size": (0, -4, 2.0),
    "optimizer": ("adam", "", None),
    "lr": (0.0, -1e-3, NAN, INF),
    "weight_decay": (-1e-9, NAN, INF),
    "momentum": (-0.1, 1.0, NAN, INF),
    "schedule": ("linear", None),
    "milestones": ((0.0,), (1.0,), (0.6, 0.5), (-0.5,), (NAN,), (0.5, 2.0)),
    "decay": (0.0, -1.0, NAN, INF),
    "penalties": ({"l1": -1.0}, {"l1": NAN}, {"l1": INF}),
    "refresh": (0, -1, 2.5),
    "distill": (-0.1, 1.1, NAN, True, "half"),
    "temperature": (0.0, -1.0, NAN, INF),
    "crop": (-1, 0.5),
    "validation": (-0.1, 1.0, NAN),
    "patience": (0, -1, 1.5),
    "select": ("first", None),
    "precision": ("16", "64-true", None),
    "measure_every": (-1, 0.5),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_value_is_named(name, value):
    with pytest.raises(InputError, match=rf"^{name}\b"):
        Recipe(**{name: value})


WRONG_KINDS = [
    ("lr", "fast"),
    ("penalties", {"l1": "strong"}),
    ("milestones", 0.5),
    ("flip", "no"),
    ("seed", "a"),
    ("seed", 1.5),
    ("layers", "1"),
]


@pytest.mark.parametrize(("name", "value"), WRONG_KINDS)
def test_a_value_of_a_wrong_kind_is_named(name, value):
    with pytest.raises(InputError, match=rf"^{name}\b"):
        Recipe(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eps", 0.0), ("eps", -1.0), ("eps", NAN), ("eps", INF), ("p", 1.0), ("p", NAN), ("steps", 1.5),
        ("step_size", 0.0), ("step_size", NAN), ("step_size", INF), ("ratio", 0.0), ("ratio", 1.1), ("ratio", NAN),
        ("universal", 1), ("universal", "no"), ("universal", None),
    ],
)  # fmt: skip
def test_a_wrong_value_of_the_adversary_is_named(name, value):
    with pytest.raises(InputError, match=rf"^{name}\b"):
        Adversary(**{"eps": 0.1, name: value})


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_of_the_adversary_are_named(steps):
    with pytest.raises(InputError, match=r"^steps\b"):
        Adversary(0.1, steps=steps)


def test_the_step_of_the_adversary():
    assert Adversary(0.2, steps=5).length == pytest.approx(2.5 * 0.2 / 5)
    assert Adversary(0.2, steps=5, step_size=0.7).length == 0.7
    assert Adversary(0.2, steps=5, universal=True).length == pytest.approx(0.2 / 5)
    assert (Adversary(0.2).count, Adversary(0.2, universal=True).count) == (10, 1)


def test_a_recipe_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().lr = 1.0


def rates(recipe, steps):
    return [recipe.rate(step, steps) for step in range(steps)]


def torch_rates(recipe, steps, schedule):
    """Those of torch's own scheduler, stepped after every step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], recipe.lr)
    scheduler, found = schedule(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@quick
@given(st.floats(1e-6, 10), st.integers(1, 60))
def test_schedules_are_those_of_torch(lr, steps):
    schedulers = torch.optim.lr_scheduler
    assert rates(Recipe(lr=lr), steps) == [lr] * steps
    cosine = torch_rates(Recipe(lr=lr), steps, lambda o: schedulers.CosineAnnealingLR(o, steps))
    assert rates(Recipe(lr=lr, schedule="cosine"), steps) == pytest.approx(cosine, rel=1e-6, abs=1e-9 * lr)
    recipe = Recipe(lr=lr, schedule="step", milestones=(0.25, 0.6), decay=0.3)
    places = [math.ceil(0.25 * steps), math.ceil(0.6 * steps)]
    decayed = torch_rates(recipe, steps, lambda o: schedulers.MultiStepLR(o, places, 0.3))
    assert rates(recipe, steps) == pytest.approx(decayed, rel=1e-6)


def test_the_ends_of_the_schedules():
    cosine = Recipe(lr=0.5, schedule="cosine")
    assert cosine.rate(0, 10) == 0.5
    assert cosine.rate(5, 10) == pytest.approx(0.25)
    assert 0 < cosine.rate(9, 10) < 0.02
    step = Recipe(lr=1.0, schedule="step")
    assert rates(step, 8) == pytest.approx([1.0] * 4 + [0.1] * 2 + [0.01] * 2)


def test_differences_are_named():
    base = Recipe(adversary=Adversary(0.1))
    assert base.differences(Recipe(adversary=Adversary(0.1))) == []
    other = dataclasses.replace(base, lr=1.0, adversary=Adversary(0.2), penalties={"l1": 1.0})
    assert sorted(base.differences(other)) == ["adversary", "lr", "penalties"]


def image_net():
    """A small network on which every attribute can show."""
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(36, 12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 10),
        )
    )  # fmt: skip


def outcome(**fields):
    """Everything that a training yields but the time it took."""
    x, y = digits("train")
    start = {"epochs": 2, "batch_size": 32, "lr": 0.01, "validation": 0.25, "measure_every": 2}
    recipe = Recipe(**start | fields)
    own = Interventions(teacher=seeded(image_net, 1) if recipe.distill else None)
    result = train(image_net(), (x[:120], y[:120]), recipe, interventions=own)
    rows = [dataclasses.replace(row, seconds=0.0, samples_per_second=0.0) for row in result.epochs]
    weights = [tensor.flatten().tolist() for tensor in result.model.state_dict().values()]
    return weights, rows, result.layers


sgd, steps = {"optimizer": "sgd"}, {"schedule": "step", "lr": 0.03}
nuclear, bound = {"penalties": {"nuclear_norm": 0.01}}, {"penalties": {"l1": 0.01}}
poor = {"epochs": 3, "lr": 1e-9}  # no epoch is better than the first
CHANGES = {
    "epochs": ({}, 3),
    "batch_size": ({}, 31),
    "optimizer": ({}, "sgd"),
    "lr": ({}, 0.011),
    "weight_decay": ({}, 0.1),
    "momentum": (sgd, 0.5),
    "schedule": ({}, "cosine"),
    "milestones": (steps, (0.25,)),
    "decay": (steps, 0.5),
    "penalties": ({}, {"group_lasso": 0.01}),
    "refresh": (nuclear, 3),
    "constraints": ({}, {"spectral_cap": 0.5}),
    "layers": (bound, ("0",)),
    "adversary": ({}, Adversary(0.1, steps=1)),
    "distill": ({"distill": 0.5}, 0.6),
    "temperature": ({"distill": 0.5}, 2.0),
    "crop": ({}, 1),
    "flip": ({}, True),
    "validation": ({}, 0.3),
    "patience": ({**poor, "weight_decay": 0.0, "epochs": 6}, 1),
    "select": ({"lr": 0.3, "epochs": 3}, "last"),
    "precision": ({}, "bf16-mixed"),
    "measure_every": ({}, 1),
    "seed": ({}, 1),
}


def test_every_attribute_has_a_case():
    assert sorted(CHANGES) == sorted(field.name for field in dataclasses.fields(Recipe))


def test_the_same_recipe_gives_the_same():
    assert outcome() == outcome()


@pytest.mark.parametrize("name", CHANGES)
def test_every_attribute_changes_the_outcome(name):
    if name == "precision":
        pytest.importorskip("lightning_fabric")
    around, value = CHANGES[name]
    assert outcome(**around) != outcome(**around | {name: value})


@pytest.mark.parametrize(
    "change",
    [{"p": 2.0}, {"eps": 0.05}, {"steps": 2}, {"step_size": 0.01}, {"ratio": 1.0}, {"universal": True}],
    ids=lambda change: next(iter(change)),
)
def test_every_attribute_of_the_adversary_changes_the_outcome(change):
    base = {"eps": 0.1, "steps": 1}
    assert outcome(adversary=Adversary(**base)) != outcome(adversary=Adversary(**base | change))


@pytest.mark.parametrize("kind", ["penalties", "constraints"])
def test_an_unknown_name_is_refused(kind):
    x, y = digits("train")
    with pytest.raises(InputError, match="group_laso"):
        train(image_net(), (x[:40], y[:40]), Recipe(epochs=1, **{kind: {"group_laso": 1.0}}))


@pytest.mark.parametrize("value", [-1.0, 0.0, NAN, INF])
@pytest.mark.parametrize("name", ["frobenius", "spectral_cap"])
def test_a_constraint_out_of_range_is_refused(name, value):
    x, y = digits("train")
    with pytest.raises(InputError, match="positive"):
        train(image_net(), (x[:40], y[:40]), Recipe(epochs=1, constraints={name: value}))


# The tables

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*PENALTIES, *CONSTRAINTS])
def test_every_intervention_has_its_line_on_the_page(name):
    assert f"\n| `{name}`" in PAGE


@pytest.mark.parametrize("name", [*OPTIMIZERS, *SCHEDULES])
def test_every_optimiser_and_schedule_is_named_where_the_recipe_explains_itself(name):
    assert f'``"{name}"``' in Recipe.__doc__


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_lowers_a_quadratic(name):
    """Half the squared distance from 0; gradients are the point itself."""
    point = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = OPTIMIZERS[name]([point], lr=0.01, momentum=0.5, weight_decay=0.0, fused=False)
    for _ in range(20):
        optimizer.zero_grad()
        (point.square().sum() / 2).backward()
        optimizer.step()
    assert float(point.detach().square().sum()) < 0.9 * 5
