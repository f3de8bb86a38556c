"""Data of any size: taken as it comes, never held as a whole, in any form with the same results."""

from __future__ import annotations

import functools
import math
import weakref

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from brittle.attacks import apgd
from brittle.errors import InputError
from brittle.evaluation import run as running
from helpers.evaluations import (
    SEEN,
    Anything,
    Samples,
    Stream,
    evaluate_with,
    everything,
    hooked,
    names,
    noted,
    quick_apgd,
    whole,
)
from helpers.networks import few, mlp

X, Y = few(16)


def uneven(x, y, sizes=(1, 7, 2, 13, 5, 30, 3)):
    """Batches of uneven sizes."""
    start = 0
    for size in sizes:
        if start < len(x):
            yield x[start : start + size], y[start : start + size]
        start += size
    if start < len(x):
        yield x[start:], y[start:]


FORMS = {
    "list": lambda x, y: list(uneven(x, y)),
    "generator": uneven,
    "loader": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=11),
    "dataset": Samples,
    "stream": Stream,
    "batches of one": lambda x, y: ((x[i : i + 1], y[i : i + 1]) for i in range(len(x))),
    "an empty batch between": lambda x, y: [(x[:9], y[:9]), (x[:0], y[:0]), (x[9:], y[9:])],
}


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("devices", [(), ("cpu", "cpu")])
def test_the_form_of_the_data_changes_nothing(form, devices, tmp_path):
    net, (x, y) = hooked(mlp()), few(50)
    run = functools.partial(evaluate_with, net, attack=quick_apgd, eps=0.06, batch_size=4, devices=devices)
    base = run((x, y))
    assert whole(run(FORMS[form](x, y))) == whole(base)
    kept = run((x, y), resume=tmp_path)
    assert whole(run(FORMS[form](x, y), resume=tmp_path)) == whole(kept)
    assert len(names(tmp_path)) == math.ceil(50 / 16)  # chunks do not depend on the batches that came
    assert everything(kept)[1:5] == everything(base)[1:5]


@pytest.mark.parametrize("certify", [False, True])
def test_chunks_do_not_change_results(monkeypatch, certify):
    """All samples are easy to certify or all are not, so that trying on a few decides the same everywhere."""
    data, attack = few(30), functools.partial(apgd, steps=100)
    run = functools.partial(evaluate_with, mlp(), data, attack=attack, eps=0.01, batch_size=5, certify=certify)
    base = run()
    for size in (1, 7):
        monkeypatch.setattr(running, "CHUNK_SAMPLES", size)
        e = run()
        assert everything(e)[1:5] == everything(base)[1:5]
        if not certify:
            verdicts = [[(s.index, s.attack, s.adversarial_prediction) for s in found.samples] for found in (e, base)]
            assert verdicts[0] == verdicts[1]
    monkeypatch.setattr(running, "CHUNK_BYTES", 64 * 4 * 5)
    assert everything(run())[1:5] == everything(base)[1:5]


class Watched:
    """Batches that are counted as they are taken, and watched for as long as they are held."""

    def __init__(self, batches, size):
        self.batches, self.size, self.taken, self.alive, self.most = batches, size, 0, weakref.WeakSet(), 0

    def __iter__(self):
        """The batches."""
        for number in range(self.batches):
            x, y = torch.full((self.size, 1, 2, 2), 0.5), torch.zeros(self.size, dtype=torch.long)
            self.taken += self.size
            self.alive.add(x)
            self.most = max(self.most, len(self.alive) * self.size)
            yield x, y
            del x, y
            assert number < self.batches


def standing(model, x, y, *, eps, p):
    """An attack that does nothing."""
    return x


@pytest.mark.parametrize(
    ("options", "chunk"),
    [({}, 32), ({"devices": ("cpu",)}, 8), ({"devices": ("cpu", "cpu")}, 8), ({"resume": True}, 8)],
)
@pytest.mark.parametrize("size", [1, 5, 8])
def test_streams_are_taken_as_needed_and_never_held(monkeypatch, tmp_path, options, chunk, size):
    monkeypatch.setattr(running, "CHUNK_SAMPLES", 32)
    options = options | ({"resume": tmp_path} if "resume" in options else {})
    watched, ahead = Watched(400 // size, size), []
    real = running.worst_case

    def watching(*arguments, ids, **named):
        result = real(*arguments, ids=ids, **named)
        ahead.append(watched.taken - (ids + len(result.y) - 1))
        return result

    monkeypatch.setattr(running, "worst_case", watching)
    e = evaluate_with(hooked(Anything()), watched, attack=standing, eps=0.01, batch_size=2, certify=False, **options)
    assert e.n == 400 // size * size == watched.taken
    workers = len(options.get("devices", ()))
    assert max(ahead) <= (2 * workers + 3) * chunk + size
    assert watched.most <= (2 * workers + 4) * chunk + size


def test_large_inputs_are_not_gathered_beyond_the_bytes_of_a_chunk(monkeypatch):
    monkeypatch.setattr(running, "CHUNK_BYTES", 16 * 4 * 16)  # 16 samples of 16 bytes, and some
    watched, ahead = Watched(60, 8), []

    def watching(model, x, y, *, eps, p, ids):
        ahead.append(watched.taken - int(ids[-1]))
        return x

    evaluate_with(Anything(), watched, attack=watching, eps=0.01, batch_size=8, certify=False)
    assert max(ahead) <= 4 * 64


@pytest.mark.parametrize("devices", [(), ("cpu", "cpu")])
@pytest.mark.parametrize("empty", [(X[:0], Y[:0]), [], (), iter(()), [(X[:0], Y[:0])], TensorDataset(X[:0], Y[:0])])
def test_no_samples_are_an_error(devices, empty):
    with pytest.raises(InputError, match=r"^data: "):
        evaluate_with(hooked(mlp()), empty, attack=quick_apgd, eps=0.06, devices=devices)


BAD = {
    "NaN": ((X * math.nan, Y), "^x: expected finite numbers"),
    "beyond the bounds": ((X + 1, Y), "^x: expected values in"),
    "labels too large": ((X, Y + 10), "^y: expected labels from 0 to 9"),
    "labels below 0": ((X, Y - 10), "^y: expected labels of at least 0"),
    "labels that are no integers": ((X, Y + 0.5), "^y: expected an integer tensor"),
    "another size": ((X[:, :, :7], Y), "^data: "),
    "another rank": ((X[:, 0], Y), "^data: "),
    "fewer labels": ((X, Y[:-1]), "^(data|x)"),
    "more labels": ((X, torch.cat([Y, Y])), "^(data|x)"),
    "words": ((np.array(["a", "b"]), Y[:2]), "^data: "),
    "nothing": ((None, Y), "^data: "),
    "no labels": ((X, None), "^data: "),
    "no pair": ((X,), r"^data: expected batches \(inputs, labels\)"),
    "not even that": (X, r"^data: expected batches \(inputs, labels\)"),
}
UNNAMED = {"another size", "another rank", "words", "nothing", "no labels", "fewer labels", "more labels"}


WAYS = {"plain": {}, "kept": {"resume": True}, "spread": {"devices": ("cpu", "cpu")}}


@pytest.mark.parametrize(
    ("what", "way"),
    [
        pytest.param(what, way) if what in UNNAMED and (what, way) != ("more labels", "plain") else (what, way)
        for what in BAD
        for way in WAYS
    ],
)
def test_a_bad_batch_in_the_middle_is_named_and_what_is_finished_is_kept(what, way, tmp_path):
    net, (x, y), (bad, message) = hooked(mlp()), few(40), BAD[what]
    options = {"resume": tmp_path} if way == "kept" else WAYS[way]
    run = functools.partial(evaluate_with, net, attack=noted, eps=0.06, batch_size=2, **options)
    good = [(x[:20], y[:20]), (x[20:], y[20:])]
    SEEN.clear()
    with pytest.raises(InputError, match=message):
        run([*good, bad, *good])
    if way == "kept":
        assert len(names(tmp_path)) >= 4
        SEEN.clear()
        run(good)
        assert SEEN == []


def test_labels_never_slip_to_the_next_batch():
    with pytest.raises(InputError, match=r"^(data|x)"):
        evaluate_with(hooked(mlp()), [(X, torch.cat([Y, Y[:1]])), (X, Y[1:])], attack=quick_apgd, eps=0.06)


def test_what_a_loader_raises_reaches_the_caller():
    def failing():
        yield X, Y
        raise RuntimeError("disk gone")

    for devices in ((), ("cpu", "cpu")):
        with pytest.raises(RuntimeError, match="disk gone"):
            evaluate_with(hooked(mlp()), failing(), attack=quick_apgd, eps=0.06, batch_size=2, devices=devices)


@pytest.mark.parametrize(
    ("options", "n", "total"),
    [
        ({"batch_size": 5}, 16, 16),
        ({"batch_size": 5, "drop_last": True}, 15, 15),
        ({"batch_size": 5, "sampler": SubsetRandomSampler([3, 1, 7, 9])}, 4, 4),
        ({"batch_sampler": [[0, 2], [4, 5, 6]]}, 5, None),
    ],
)
def test_the_number_of_samples_of_a_loader_is_what_it_yields(options, n, total):
    told = []
    loader = DataLoader(TensorDataset(X, Y), **options)
    e = evaluate_with(mlp(), loader, attack=quick_apgd, eps=0.06, progress=lambda stage, *step: told.append(step))
    assert e.n == n
    assert told[-1] == (n, total)
