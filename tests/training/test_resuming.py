"""A training that was interrupted or killed goes on, and ends bit for bit as if it never had been."""

import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import brittle
from brittle.errors import InputError
from brittle.training import (
    CONSTRAINTS,
    Adversary,
    Interventions,
    Recipe,
    RefreshedNuclearNorm,
    loop,
    snapshots,
    train,
)
from helpers.kills import at_every_operation
from helpers.networks import seeded, uniform
from helpers.processes import run_code
from helpers.trainings import (
    FULL,
    MOMENTUM,
    QUIET,
    RECIPES,
    Interrupted,
    contents,
    differing,
    interrupted,
    same,
    small,
    some,
    stopped_in,
    varied,
    weights,
)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """By recipe and file operation at which a training was killed: what it ended with when started again."""
    samples, ends = some(60), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "STATE_SECONDS", 0.0)  # a state after every step
        for name, recipe in RECIPES.items():
            whole = train(varied(), samples, recipe)
            runs = (tmp_path_factory.mktemp("killed") for _ in itertools.count())
            folder = next(runs)
            for number in at_every_operation(
                lambda: train(varied(), samples, recipe, folder=folder),  # noqa: B023 - called at once
                11 if recipe is FULL else 2,
            ):
                try:
                    ends[name, number] = train(varied(), samples, recipe, folder=folder), whole
                except Exception as error:
                    ends[name, number] = error, whole
                folder = next(runs)
            assert number > 80
    return ends


def test_killed_at_every_file_operation_it_ends_with_the_same_weights(resumed):
    wrong = {
        place: str(end)
        for place, (end, whole) in resumed.items()
        if isinstance(end, Exception) or weights(end) != weights(whole) or end.epoch != whole.epoch
    }
    assert wrong == {}


def test_killed_at_every_file_operation_it_ends_with_the_same_history(resumed):
    ends = {place: pair for place, pair in resumed.items() if not isinstance(pair[0], Exception)}
    different = {place: differing(end, whole) for place, (end, whole) in ends.items() if differing(end, whole)}
    assert different == {}


DRIVER = """
import dataclasses, json, os, pathlib, random, signal, sys, time

from brittle.training import loop, train
from helpers.trainings import RECIPES, some, varied, weights

loop.STATE_SECONDS = 0.0  # a state after every step
recipe, out = dataclasses.replace(RECIPES[{name!r}], epochs=3, batch_size=16), pathlib.Path({out!r})
samples, killed, draw = some(), dict.fromkeys(("before", "within", "after"), 0), random.Random({seed})
train(varied(), samples, recipe)  # all modules are there
started = time.monotonic()
whole = weights(train(varied(), samples, recipe, folder=out / "whole"))
took = time.monotonic() - started


def stamp(path):
    return path.stat().st_mtime_ns if path.exists() else None


for run in range(8):
    if run >= 2 and killed["within"] >= 5:
        break  # two runs are enough, unless the machine was so busy that few kills came within a training
    folder = out / str(run)
    state, end = folder / "state.json", folder / "weights.safetensors"
    for attempt in range(40):
        before, status = stamp(state), None
        child = os.fork()
        if child == 0:
            result = train(varied(), samples, recipe, folder=folder)
            os._exit(0 if weights(result) == whole else 3)
        while attempt and stamp(state) == before and status is None:  # one state further, so that it ends
            done, code = os.waitpid(child, os.WNOHANG)
            status = code if done else None
            time.sleep(1e-3)
        if status is None:
            time.sleep(draw.uniform(0, 0.2) * took)
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            break
        killed["within" if state.exists() else "after" if end.exists() else "before"] += 1
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, status
    left = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    assert left == ["history.csv", "history.parquet", "weights.safetensors"], left
print(json.dumps(killed))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the driver forks")
@pytest.mark.parametrize("name", RECIPES)
def test_killed_by_a_signal_at_random_moments_it_ends_with_the_same_weights(name, tmp_path):
    printed = run_code(DRIVER.format(name=name, out=str(tmp_path), seed=len(name)), seconds=280)
    killed = json.loads(printed)
    assert killed["within"] >= 5, killed


@pytest.mark.parametrize("name", RECIPES)
def test_an_interrupted_training_goes_on_from_its_last_epoch(name, tmp_path):
    interrupted(tmp_path, recipe=RECIPES[name])
    moments = []
    result = train(varied(), some(), RECIPES[name], folder=tmp_path, callback=moments.append)
    assert {moment.epoch for moment in moments} == {2}
    assert same(result, train(varied(), some(), RECIPES[name]))


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_a_universal_perturbation_goes_on_bit_for_bit_within_an_epoch(p, tmp_path, monkeypatch):
    """Interrupted after every step in turn."""
    monkeypatch.setattr(loop, "STATE_SECONDS", 0.0)
    monkeypatch.setattr(loop, "REPORT_SECONDS", -1.0)
    recipe = dataclasses.replace(MOMENTUM, batch_size=20, adversary=Adversary(0.2, p, universal=True))
    whole = train(varied(), some(), recipe)
    assert weights(whole) != weights(train(varied(), some(), MOMENTUM))

    def stop_at(place):
        def callback(moment):
            if (moment.epoch, moment.step) == place and moment.row is None:
                raise Interrupted

        return callback

    for place in itertools.product((1, 2), (2, 4)):
        with pytest.raises(Interrupted):
            train(varied(), some(), recipe, folder=tmp_path, callback=stop_at(place))
    assert same(train(varied(), some(), recipe, folder=tmp_path), whole)


def test_the_state_of_a_version_that_knew_no_universal_adversary_goes_on(tmp_path):
    interrupted(tmp_path)
    path = tmp_path / "state.json"
    state = json.loads(path.read_text())
    assert state["identity"]["recipe"]["adversary"].pop("universal") is False
    path.write_text(json.dumps(state))
    assert same(train(varied(), some(), FULL, folder=tmp_path), train(varied(), some(), FULL))


@pytest.mark.parametrize("again", [False, True], ids=["gone", "made anew"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_folder_that_is_removed_meanwhile_is_an_error(epoch, again, tmp_path):
    folder = tmp_path / "run"

    def remove(moment):
        if moment.epoch == epoch and moment.row is None:
            shutil.rmtree(folder, ignore_errors=True)
            (tmp_path / "other").mkdir(exist_ok=True)  # takes the place of the folder's number on disk
            if again:
                folder.mkdir()

    with pytest.raises(FileNotFoundError, match="expected the run's folder; it was removed meanwhile"):
        train(small(), some(), MOMENTUM, folder=folder, callback=remove)
    assert not folder.exists() or not list(folder.iterdir())


def test_a_low_rank_network_with_a_refreshed_penalty_goes_on_bit_for_bit(tmp_path):
    recipe = dataclasses.replace(FULL, constraints={"orthonormal": 1}, adversary=None)
    net = brittle.training.factorised(varied(), 3)
    interrupted(tmp_path, net, recipe=recipe)
    assert weights(train(net, some(), recipe, folder=tmp_path)) == weights(train(net, some(), recipe))


def test_penalties_and_constraints_of_ones_own_go_on_bit_for_bit(tmp_path):
    def options():
        cap = functools.partial(CONSTRAINTS["spectral_cap"], value=0.8)
        return {"interventions": Interventions([(RefreshedNuclearNorm(3), 0.01)], [cap])}

    whole = train(varied(), some(), MOMENTUM, **options())
    assert weights(whole) != weights(train(varied(), some(), MOMENTUM))
    interrupted(tmp_path, recipe=MOMENTUM, **options())
    assert weights(train(varied(), some(), MOMENTUM, folder=tmp_path, **options())) == weights(whole)


class Decaying:
    """A constraint of one's own that remembers: it scales the head by less and less, and counts its calls."""

    def __init__(self, model):
        self.head, self.calls = model[-1], 0

    def __call__(self):
        self.calls += 1
        with torch.no_grad():
            self.head.weight.mul_(1 - 0.1 / self.calls)

    def state_dict(self):
        return {"calls": torch.tensor(self.calls)}

    def load_state_dict(self, state):
        self.calls = int(state["calls"])


def test_a_constraint_of_ones_own_that_remembers_goes_on_and_is_called_once_a_step(tmp_path):
    made = []

    def constraint(model):
        made.append(Decaying(model))
        return made[-1]

    own = Interventions(constraints=[constraint])
    whole = train(varied(), some(), MOMENTUM, interventions=own)
    assert made[-1].calls == whole.epochs[-1].steps  # not before the first step, where nothing has been counted
    interrupted(tmp_path, recipe=MOMENTUM, interventions=own)
    assert weights(train(varied(), some(), MOMENTUM, folder=tmp_path, interventions=own)) == weights(whole)
    assert made[-1].calls == whole.epochs[-1].steps


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("recipe", {"recipe": dataclasses.replace(FULL, lr=0.02)}),
        ("recipe", {"recipe": dataclasses.replace(FULL, adversary=Adversary(0.2, steps=2))}),
        ("recipe", {"recipe": dataclasses.replace(FULL, penalties={"l1": 1e-4})}),
        ("model", {"model": small()}),
        ("model", {"model": small(seed=1)}),
        ("data", {"samples": some(99)}),
        ("data", {"samples": (some()[0], some()[1].flip(0))}),
    ],
)
def test_the_state_of_another_training_is_refused_and_stays(name, changed, tmp_path):
    started = {"model": varied(), "samples": some(), "recipe": FULL}
    if isinstance(changed.get("model"), nn.Sequential) and len(changed["model"]) == 4 and changed["model"] is not None:
        started["model"] = small(seed=2)
    interrupted(tmp_path, **started)
    before = contents(tmp_path)
    given = started | changed
    with pytest.raises(InputError, match=rf"folder.*another {name}"):
        train(given["model"], given["samples"], given["recipe"], folder=tmp_path)
    assert contents(tmp_path) == before
    result = train(started["model"], started["samples"], started["recipe"], folder=tmp_path)
    assert same(result, train(started["model"], started["samples"], started["recipe"]))


def test_the_state_of_another_validation_set_is_refused(tmp_path):
    interrupted(tmp_path, recipe=MOMENTUM, validation=some(30))
    with pytest.raises(InputError, match="folder"):
        train(varied(), some(), MOMENTUM, folder=tmp_path, validation=some(20))


def test_the_state_of_another_structure_of_equal_weights_is_refused(tmp_path):
    interrupted(tmp_path, small(), recipe=MOMENTUM)
    other = small()
    other[2] = nn.Tanh()
    with pytest.raises(InputError, match="folder"):
        train(other, some(), MOMENTUM, folder=tmp_path)


def corrupt_text(path):
    path.write_text(path.read_text()[:-40])


def truncated(path):
    path.write_bytes(path.read_bytes()[:-9])


def no_progress(path):
    path.write_text(
        json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "progress"})
    )


def strange_progress(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"progress": {"epoch": "two"}}))


def lost_tensors(path):
    from safetensors.torch import load_file, save_file

    save_file({key: value for key, value in load_file(path).items() if not key.startswith("model")}, path)


@pytest.mark.parametrize(
    ("pattern", "spoil"),
    [
        ("state.json", corrupt_text),
        ("state.json", truncated),
        ("state-*.safetensors", truncated),
        ("state-*.safetensors", os.unlink),
        ("state.json", no_progress),
        ("state.json", strange_progress),
        ("state-*.safetensors", lost_tensors),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_spoilt_state_is_refused(pattern, spoil, tmp_path):
    interrupted(tmp_path)
    spoil(next(tmp_path.glob(pattern)))
    before = contents(tmp_path)
    with pytest.raises(InputError, match="state"):
        train(varied(), some(), FULL, folder=tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("shrinkage", ["row_shrinkage", "singular_shrinkage"])
def test_two_interventions_that_count_their_calls_go_on_each_from_its_own(shrinkage, tmp_path):
    """Four steps an epoch, both due at every third: after an interruption neither starts to count anew."""
    recipe = Recipe(
        epochs=3, batch_size=10, lr=0.01, validation=0, refresh=3,
        penalties={"nuclear_norm": 0.05}, constraints={shrinkage: 0.01}, **QUIET,
    )  # fmt: skip
    samples = uniform(0, 40, 6), torch.arange(40) % 3
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    whole = train(model, samples, recipe)
    for epoch in (2, 3):
        with pytest.raises(Interrupted):
            train(model, samples, recipe, folder=tmp_path, callback=stopped_in(epoch))
        assert (tmp_path / "state.json").is_file()
    resumed = train(model, samples, recipe, folder=tmp_path)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name])


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_stopped_between_the_two_files_of_a_state_the_state_before_is_whole(seconds, tmp_path, monkeypatch):
    """Whatever lies between two states, steps or whole epochs, the tensors of the one before are not overwritten."""
    recipe = Recipe(epochs=4, batch_size=10, lr=0.1, optimizer="sgd", validation=0, **QUIET)
    samples = uniform(0, 20, 6), torch.arange(20) % 3
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    whole = train(model, samples, recipe)
    monkeypatch.setattr(loop, "STATE_SECONDS", seconds)
    described, states = snapshots.write_text, 0

    def stopping(path: Path, text: str) -> None:
        nonlocal states
        if path.name == snapshots.STATE:
            states += 1
            if states % 2 == 0:
                raise Interrupted
        described(path, text)

    monkeypatch.setattr(snapshots, "write_text", stopping)
    for _ in range(20):
        try:
            resumed = train(model, samples, recipe, folder=tmp_path)
        except Interrupted:
            continue
        break
    assert states >= 6
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name])
