"""Evaluations that were stopped: what is finished is used again, and only where nothing differs."""

from __future__ import annotations

import functools
import json
import math

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from brittle.errors import InputError
from brittle.evaluation import run as running
from brittle.storage import files
from helpers import networks
from helpers.evaluations import (
    GREY,
    SEEN,
    Anything,
    anything_moves,
    audit_with,
    evaluate_with,
    hooked,
    names,
    noted,
    push,
    quick_apgd,
    whole,
)
from helpers.networks import convnet, few, mlp
from helpers.processes import start, wait_until


class Stop:
    """Progress that stops the run after a number of calls."""

    def __init__(self, samples):
        self.samples = samples

    def __call__(self, stage, done, total):
        """Stop once that many samples are done."""
        if done >= self.samples:
            raise KeyboardInterrupt


@pytest.mark.parametrize("devices", [(), ("cpu", "cpu")])
@pytest.mark.parametrize("after", [8, 17, 33])
def test_a_stopped_run_goes_on_where_it_stopped(tmp_path, devices, after):
    net, data, folder = hooked(mlp()), few(40), tmp_path / "not" / "there yet"
    run = functools.partial(evaluate_with, net, data, attack=noted, eps=0.06, batch_size=2, devices=devices)
    base = run(resume=tmp_path / "another")
    with pytest.raises(KeyboardInterrupt):
        run(resume=folder, progress=Stop(after))
    left = names(folder)
    assert after // 8 - 1 <= len(left) <= after // 8 + 5
    assert all(json.loads((folder / name).read_text())["schema_version"] == 1 for name in left)
    finished = {s["index"] for name in left for s in json.loads((folder / name).read_text())["samples"]}
    SEEN.clear()
    again = run(resume=folder)
    assert whole(again) == whole(base)
    assert not finished & set(SEEN)
    assert set(SEEN) | finished >= {s.index for s in base.samples if s.clean_prediction == s.label}
    assert set(left) < set(names(folder))
    SEEN.clear()
    told = []
    assert whole(run(resume=folder, progress=lambda stage, *step: told.append(step))) == whole(base)
    assert SEEN == []
    assert told[-1] == (40, 40)


CALLS = []


def once(model, x, y, *, eps, p, ids):
    """An attack that stops in its twelfth batch, and in its last."""
    CALLS.append(ids.tolist())
    if len(CALLS) == 12 or (39 in ids and len(CALLS) < 20):
        raise KeyboardInterrupt
    return x


def test_an_attack_that_stops_leaves_the_finished_chunks(tmp_path):
    run = functools.partial(evaluate_with, hooked(mlp()), few(40), eps=0.06, batch_size=2, resume=tmp_path)
    CALLS.clear()
    with pytest.raises(KeyboardInterrupt):
        run(attack=once)
    assert len(names(tmp_path)) == 2  # four calls a chunk, the twelfth within the third
    done = {i for part in CALLS[:8] for i in part}
    CALLS.clear()
    with pytest.raises(KeyboardInterrupt):
        run(attack=once)
    assert not done & {i for part in CALLS for i in part}


CHILD = """
import sys, time, functools, torch
from brittle.attacks import apgd
from helpers import networks
from helpers.evaluations import evaluate_with
net = networks.mlp()
net.load_state_dict(torch.load(sys.argv[2]))
evaluate_with(net, networks.few(120), functools.partial(apgd, steps=6), eps=0.06, batch_size=2, resume=sys.argv[1],
         progress=lambda *told: time.sleep(0.1))
"""


def finished(folder):
    """Names of parts, without those that are still being written."""
    return [name for name in names(folder) if not name.startswith(".")]


def test_a_killed_process_leaves_whole_files_that_the_next_one_uses(tmp_path, monkeypatch):
    folder, weights = tmp_path / "kept", tmp_path / "weights.pt"
    torch.save(mlp().state_dict(), weights)
    with start("-c", CHILD, folder, weights) as evaluating:
        wait_until(lambda: len(finished(folder)) >= 3, 120, evaluating)
    kept = finished(folder)
    assert 3 <= len(kept) < 15
    parts = [json.loads((folder / name).read_text()) for name in kept]
    assert [len(part["samples"]) for part in parts] == [8] * len(parts)
    run = functools.partial(evaluate_with, mlp(), few(120), attack=quick_apgd, eps=0.06, batch_size=2)
    attacked = []
    real = running.worst_case

    def counting(*args, ids, **options):
        attacked.append(ids)
        return real(*args, ids=ids, **options)

    monkeypatch.setattr(running, "worst_case", counting)
    again = run(resume=folder)
    assert set(attacked) == set(range(0, 120, 8)) - {part["first"] for part in parts}
    assert whole(again) == whole(run(resume=tmp_path / "another"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_write_that_is_stopped_leaves_nothing(tmp_path, monkeypatch, error):
    def stop(*args):
        raise error

    monkeypatch.setattr(files.os, "replace", stop)
    with pytest.raises(error):
        evaluate_with(hooked(mlp()), few(8), attack=quick_apgd, eps=0.06, batch_size=2, resume=tmp_path)
    assert names(tmp_path) == []


def test_a_disk_that_is_full_is_an_error_of_the_system(tmp_path, monkeypatch):
    """The library that writes tensors has an error of its own, which nobody expects."""

    def fail(*args, **options):
        raise safetensors.SafetensorError("no space left")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        audit_with(mlp(), few(8), attacks=quick_apgd, batch_size=2, resume=tmp_path)
    assert list(tmp_path.iterdir()) == []


SPOILT = {
    "empty": lambda text: b"",
    "truncated": lambda text: text[: len(text) // 2],
    "no JSON": lambda text: b"\x00\xff\xfe garbage",
    "other JSON": lambda text: b"[1, 2, 3]",
    "null": lambda text: b"null",
    "other version": lambda text: text.replace(b'"schema_version": 1', b'"schema_version": 99'),
    "missing field": lambda text: text.replace(b'"label"', b'"mislabel"'),
    "other type": lambda text: text.replace(b'"label": ', b'"label": "no" , "was": '),
    "two documents": lambda text: text + text,
}


@pytest.mark.parametrize("how", list(SPOILT))
def test_files_that_cannot_be_read_are_replaced(tmp_path, how):
    run = functools.partial(
        evaluate_with, hooked(mlp()), few(24), attack=noted, eps=0.06, batch_size=2, resume=tmp_path
    )
    base = run()
    victim = tmp_path / names(tmp_path)[1]
    good = victim.read_bytes()
    victim.write_bytes(SPOILT[how](good))
    assert victim.read_bytes() != good
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "samples-00000000-0123.json").write_text("{}")
    (tmp_path / "sub").mkdir()
    SEEN.clear()
    assert whole(run()) == whole(base)
    assert SEEN
    assert set(SEEN) <= set(range(8, 16))
    assert victim.read_bytes() == good
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("how", ["another chunk's", "fewer samples", "no samples"])
def test_files_that_hold_other_samples_are_replaced(tmp_path, how):
    run = functools.partial(
        evaluate_with, hooked(mlp()), few(24), attack=noted, eps=0.06, batch_size=2, resume=tmp_path
    )
    base = run()
    first, victim = (tmp_path / name for name in names(tmp_path)[:2])
    document = json.loads((first if how == "another chunk's" else victim).read_text())
    document["samples"] = document["samples"][: {"fewer samples": 5, "no samples": 0}.get(how)]
    victim.write_text(json.dumps(document))
    assert whole(run()) == whole(base)


def other_weights(net):
    with torch.no_grad():
        net[-1].bias[0] += 0.3
    return net


def other_statistics(net):
    net[1].running_mean += 0.2
    return net


X, Y = few(16)
CHANGES = {
    "weights": {"model": lambda: other_weights(hooked(convnet()))},
    "statistics of a batch norm": {"model": lambda: other_statistics(hooked(convnet()))},
    "precision": {"model": lambda: hooked(convnet()).double(), "data": (X.double(), Y)},
    "eps": {"eps": 0.060001},
    "norm": {"p": 2},
    "inputs": {"data": ((X + 1e-4).clamp(0, 1), Y)},
    "labels": {"data": (X, (Y + 1) % 10)},
    "order": {"data": (X.flip(0), Y.flip(0))},
    "place": {"data": (torch.cat([X[8:], X[:8]]), torch.cat([Y[8:], Y[:8]]))},
    "shape": {"model": lambda: nn.Sequential(nn.Unflatten(1, (1, 8, 8)), hooked(convnet())), "data": (X.flatten(1), Y)},
    "seed": {"seed": 1},
    "restarts": {"restarts": 2},
    "bounds": {"bounds": (0.0, 1.5)},
    "attack": {"attack": quick_apgd},
    "options": {"attack": functools.partial(noted, strength=0.5)},
    "order of attacks": {"attack": [quick_apgd, noted]},
    "certificates": {"certify": False},
}


@pytest.mark.parametrize("what", list(CHANGES))
def test_nothing_is_used_again_when_anything_differs(tmp_path, what):
    call = {"model": lambda: hooked(convnet()), "data": (X, Y), "attack": noted, "eps": 0.06, "batch_size": 2}
    if what == "order of attacks":
        call["attack"] = [noted, quick_apgd]

    def run(**options):
        options = call | options
        return evaluate_with(options.pop("model")(), options.pop("data"), **options)

    base = run(resume=tmp_path)
    before = names(tmp_path)
    assert len(before) == 2
    other = run(**CHANGES[what], resume=tmp_path)
    assert len(names(tmp_path)) == 4
    assert whole(other) == whole(run(**CHANGES[what], resume=tmp_path / "another"))
    assert whole(run(resume=tmp_path)) == whole(base)


def test_more_of_the_same_data_uses_what_is_there(tmp_path):
    x, y = few(40)
    run = functools.partial(evaluate_with, hooked(mlp()), attack=noted, eps=0.06, batch_size=2, resume=tmp_path)
    run((x[:24], y[:24]))
    SEEN.clear()
    more = run((x, y))
    assert SEEN
    assert min(SEEN) >= 24
    assert whole(more) == whole(run((x, y), resume=tmp_path / "another"))


class Scaled(nn.Module):
    """A network with numbers that are in no state dictionary."""

    def __init__(self, scale, kind):
        super().__init__()
        self.net = networks.copy.deepcopy(mlp())
        tensor = torch.tensor([scale] * 10)
        if kind == "buffer":
            self.register_buffer("scale", tensor, persistent=False)
        else:
            self.scale = tensor if kind == "tensor" else scale

    def forward(self, x):
        """``(N, ...)`` to ``(N, 10)``."""
        return self.net(x) * self.scale


def bound(fraction, model, x, y, *, eps, p):
    return x + fraction * eps


def factory(fraction):
    def made(model, x, y, *, eps, p):
        return x + fraction * eps

    return made


class Configured:
    """An attack with a setting."""

    def __init__(self, fraction):
        self.fraction = fraction

    def __call__(self, model, x, y, *, eps, p):
        """Push."""
        return x + self.fraction * eps


def shifted(model, x, y, *, eps, p, by):
    return x + by[0, 0] * eps


UNSEEN = {
    "positional options": [functools.partial(bound, f) for f in (0.1, 0.9)],
    "closures": [factory(f) for f in (0.1, 0.9)],
    "objects": [Configured(f) for f in (0.1, 0.9)],
    "tensors": [functools.partial(shifted, by=torch.full((2, 2), f)) for f in (0.5, 0.50001)],
}


@pytest.mark.parametrize("what", list(UNSEEN))
def test_attacks_that_differ_inside_share_nothing(tmp_path, what):
    run = functools.partial(evaluate_with, Anything(), GREY, eps=0.0999, batch_size=2, certify=False)
    one, two = UNSEEN[what]
    if what != "positional options":  # nothing tells these from others
        with pytest.raises(InputError, match=r"^resume: expected (attacks that can be told|options that are plain)"):
            run(attack=one, resume=tmp_path)
        return
    run(attack=one, resume=tmp_path)
    fresh = run(attack=two)
    resumed = run(attack=two, resume=tmp_path)
    assert [s.distance for s in resumed.samples] == [s.distance for s in fresh.samples]


@pytest.mark.parametrize("kind", ["buffer", "tensor", "number"])
def test_networks_that_differ_outside_their_state_share_nothing(tmp_path, kind):
    run = functools.partial(evaluate_with, data=few(8), attack=quick_apgd, eps=0.06, batch_size=2, certify=False)
    run(Scaled(1.0, kind), resume=tmp_path)
    fresh, resumed = run(Scaled(-1.0, kind)), run(Scaled(-1.0, kind), resume=tmp_path)
    assert [s.clean_prediction for s in resumed.samples] == [s.clean_prediction for s in fresh.samples]


def test_networks_that_fall_over_can_be_resumed(tmp_path):
    class Falls(nn.Module):
        def forward(self, x):
            sound = torch.stack([torch.ones(len(x)), x[:, 0, 0, 0]], 1)
            return torch.where(x[:, :1, 0, 0] > 0.52, math.nan, sound)

    run = functools.partial(evaluate_with, Falls(), GREY, attack=push, eps=0.1)
    assert run().robust_correct == 0
    assert run(resume=tmp_path).robust_correct == run(resume=tmp_path).robust_correct == 0


def test_where_nothing_can_be_kept(tmp_path):
    with pytest.raises(InputError, match=r"^resume: expected an nn\.Module"):
        evaluate_with(anything_moves, GREY, attack=push, eps=0.1, resume=tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"^resume: expected a folder"):
        evaluate_with(mlp(), few(4), attack=quick_apgd, eps=0.1, resume=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert evaluate_with(mlp(), few(4), attack=quick_apgd, eps=0.1, resume=str(tmp_path / "text")).n == 4


def test_a_folder_within_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"^resume: "):
        evaluate_with(mlp(), few(4), attack=quick_apgd, eps=0.1, resume=tmp_path / "file" / "folder")
