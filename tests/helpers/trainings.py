"""Small trainings: networks, samples and recipes; which of two ended alike; and how one is interrupted."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from brittle.training import Adversary, Recipe, loop, train
from helpers.networks import digits, seeded

QUIET = {"measure_every": 0}


def small(dtype=torch.float32, seed=0):
    """An FCN with one layer that interventions act on."""
    make = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))  # noqa: E731
    return seeded(make, seed).to(dtype)


def varied():
    """Convolutions, batch norm and dropout, on which every intervention acts."""
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(),
            nn.Dropout(0.3), nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10),
        )
    )  # fmt: skip


def some(n=100, dtype=torch.float32):
    x, y = digits("train", dtype)
    return x[:n], y[:n]


FULL = Recipe(
    epochs=2,
    batch_size=40,
    lr=0.01,
    penalties={"nuclear_norm": 0.01, "l1": 1e-4},
    refresh=3,
    constraints={"frobenius": None},
    adversary=Adversary(0.1, steps=2),
    crop=1,
    flip=True,
    validation=0.2,
    schedule="cosine",
    **QUIET,
)
MOMENTUM = Recipe(epochs=2, batch_size=40, optimizer="sgd", lr=0.1, momentum=0.9, validation=0.2, **QUIET)
RECIPES = {"everything": FULL, "momentum": MOMENTUM}


def weights(result):
    return {name: tensor.numpy().tobytes() for name, tensor in result.model.state_dict().items()}


def untimed(rows):
    return [dataclasses.replace(row, seconds=0.0, samples_per_second=0.0) for row in rows]


def same(a, b):
    """Weights and history bit for bit, but for the time it took."""
    return weights(a) == weights(b) and a.epoch == b.epoch and a.layers == b.layers and differing(a, b) == set()


def differing(a, b):
    """Columns of the history in which two trainings differ."""
    assert len(a.epochs) == len(b.epochs)
    return {
        field.name
        for field in dataclasses.fields(loop.EpochRow)
        for row, expected in zip(untimed(a.epochs), untimed(b.epochs), strict=True)
        if getattr(row, field.name) != getattr(expected, field.name)
    }


class Interrupted(BaseException):
    """As Ctrl-C."""


def stopped_in(epoch):
    """A callback that interrupts in an epoch; the one before is on disk then."""

    def callback(moment):
        if moment.epoch == epoch:
            raise Interrupted

    return callback


def interrupted(folder, model=None, samples=None, recipe=FULL, **options):
    with pytest.raises(Interrupted):
        train(model or varied(), samples or some(), recipe, folder=folder, callback=stopped_in(2), **options)
    assert (folder / "state.json").is_file()
    assert not (folder / "weights.safetensors").exists()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
