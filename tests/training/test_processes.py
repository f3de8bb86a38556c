"""Several processes on gloo compute what one does; mixed precision comes near it."""

import dataclasses
import signal
import sys
from subprocess import PIPE

import pytest
import torch

from brittle.errors import InputError, MissingExtra
from brittle.training import Adversary, Interventions, Recipe, group_lasso, loop, train
from brittle.training.snapshots import read_snapshot
from helpers.networks import digits, untouched
from helpers.processes import finish, group_lives, start, wait_until
from helpers.trainings import interrupted, small, some

pytest.importorskip("lightning_fabric")


def held():
    x, y = digits("test")
    return x[:41], y[:41]


FULL = Recipe(
    epochs=2,
    batch_size=20,
    lr=0.01,
    penalties={"nuclear_norm": 0.01, "group_lasso": 0.01},
    refresh=3,
    constraints={"frobenius": 2.0},
    adversary=Adversary(0.1, steps=2, ratio=0.35),
    distill=0.4,
)
TWO = ("cpu", "cpu")
PLAIN = Recipe(epochs=2, batch_size=20, optimizer="sgd", lr=0.5, measure_every=0)


def assert_agree(one, two, tolerance=1e-5):
    assert one.epoch == two.epoch
    for name, tensor in one.model.state_dict().items():
        torch.testing.assert_close(two.model.state_dict()[name], tensor, rtol=tolerance, atol=tolerance, msg=name)
    for a, b in zip(one.epochs, two.epochs, strict=True):
        assert (b.epoch, b.steps, b.lr) == (a.epoch, a.steps, a.lr)
        for name in ("loss", "penalty", "accuracy", "validation_loss", "validation_accuracy", "validation_robust"):
            expected = getattr(a, name)
            assert getattr(b, name) == (expected if expected is None else pytest.approx(expected, rel=1e-4)), name
        if a.lipschitz_2 is not None:
            assert b.lipschitz_2 == pytest.approx(a.lipschitz_2, rel=1e-4)
            assert b.lipschitz_inf == pytest.approx(a.lipschitz_inf, rel=1e-4)
    assert len(one.layers) == len(two.layers)


def test_two_processes_share_one_universal_perturbation():
    """One sample of every batch is attacked: the other process has none, and still learns of its perturbation."""
    adversary = Adversary(0.5, 2.0, ratio=0.05, universal=True)
    recipe = dataclasses.replace(PLAIN, adversary=adversary)
    one, two = (train(small(), some(80), recipe, validation=held(), devices=devices) for devices in ("cpu", TWO))
    assert one.epochs[-1].validation_robust < one.epochs[-1].validation_accuracy  # else nothing would be compared
    assert_agree(one, two)


def test_two_processes_agree_with_one(tmp_path):
    """85 samples in batches of 20: of the last five one process has three, the other two."""
    model, moments = small(), []
    own = Interventions(penalties=[(group_lasso, 0.02)], teacher=small(seed=1))
    one = train(small(), some(85), FULL, validation=held(), interventions=own)
    with untouched(model):
        two = train(
            model,
            some(85),
            FULL,
            validation=held(),
            interventions=own,
            folder=tmp_path,
            devices=TWO,
            callback=moments.append,
        )
    assert_agree(one, two)
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), two.model.parameters(), strict=True))
    assert [moment.row for moment in moments if moment.row is not None] == list(two.epochs)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "history.csv",
        "history.parquet",
        "layers.csv",
        "layers.parquet",
        "weights.safetensors",
    ]


@pytest.mark.slow
def test_two_processes_go_on_where_one_stopped(tmp_path):
    """43 samples in batches of 20: of the last three one process has two, the other one."""
    options = {"validation": held(), "folder": tmp_path}
    interrupted(tmp_path, small(), some(43), PLAIN, validation=held())
    moments = []
    two = train(small(), some(43), PLAIN, devices=TWO, callback=moments.append, **options)
    assert {moment.epoch for moment in moments} == {2}
    assert_agree(train(small(), some(43), PLAIN, validation=held()), two)


class Stopping:
    """A penalty of 0 that makes its process write a state after every step, and raises at one of its calls."""

    def __init__(self, at):
        self.at, self.calls = at, 0

    def __setstate__(self, state):
        loop.STATE_SECONDS, loop.VOTE_STEPS = -1.0, 1
        self.__dict__.update(state)

    def __call__(self, model):
        self.calls += 1
        if self.calls == self.at:
            raise InputError("stopped")
        return torch.zeros(())


def stopping(at):
    return Interventions(penalties=[(Stopping(at), 1.0)])


@pytest.mark.slow
def test_two_processes_go_on_within_an_epoch_with_the_whole_epochs_sums(tmp_path):
    options = {"validation": held(), "devices": TWO, "folder": tmp_path}
    with pytest.raises(InputError, match="stopped"):
        train(small(), some(85), PLAIN, interventions=stopping(7), **options)  # four steps an epoch
    assert read_snapshot(tmp_path)[1]["progress"]["step"] == 2
    two = train(small(), some(85), PLAIN, interventions=stopping(0), **options)
    assert_agree(train(small(), some(85), PLAIN, validation=held()), two)


ENDLESS = """
import pathlib
from brittle.training import Recipe, train
from helpers.trainings import small, some

recipe = Recipe(epochs=100_000, batch_size=20, measure_every=0)
train(small(), some(85), recipe, devices=("cpu", "cpu"), callback=lambda moment: pathlib.Path({began!r}).touch())
"""


@pytest.mark.slow
def test_interrupted_no_process_stays(tmp_path):
    """The signal goes to the first process alone, which has to end the others."""
    began = tmp_path / "began"
    with start("-c", ENDLESS.format(began=str(began)), stderr=PIPE, text=True) as training:
        wait_until(began.exists, 120, training)
        assert group_lives(training)
        training.send_signal(signal.SIGINT)
        ended = finish(training, 60)
        assert ended.returncode == -signal.SIGINT
        assert "KeyboardInterrupt" in ended.stderr
        wait_until(lambda: not group_lives(training), 10)


@pytest.mark.slow
def test_an_error_in_another_process_is_the_users():
    with pytest.raises(InputError, match="lr"):
        train(small(), some(43), Recipe(epochs=3, lr=1e30, measure_every=0), devices=TWO)


def test_bfloat16_comes_near_single_precision():
    recipe = {"epochs": 3, "batch_size": 20, "lr": 0.01, "measure_every": 0, "penalties": {"nuclear_norm": 0.01}}
    single = train(small(), some(100), Recipe(**recipe))
    mixed = train(small(), some(100), Recipe(**recipe, precision="bf16-mixed"))
    assert mixed.epochs[-1].loss == pytest.approx(single.epochs[-1].loss, rel=0.05)
    assert mixed.epochs[-1].loss != single.epochs[-1].loss
    for name, tensor in mixed.model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert float((tensor - single.model.state_dict()[name]).norm() / tensor.norm()) < 0.05


@pytest.mark.parametrize("options", [{"devices": TWO}, {"recipe": Recipe(precision="bf16-mixed")}])
def test_without_lightning_the_extra_is_named(options, monkeypatch):
    for name in ("lightning_fabric", "lightning", "lightning.fabric"):
        monkeypatch.setitem(sys.modules, name, None)
    model = small()
    with untouched(model), pytest.raises(MissingExtra, match=r"brittle\[multi\]"):
        train(model, some(43), **options)
