"""However an audit is carried out, streamed, in pieces, on several devices or resumed, it finds the same."""

from __future__ import annotations

import copy
import dataclasses
import functools
import weakref

import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.utils.data import DataLoader, TensorDataset

from brittle.attacks import apgd
from brittle.auditing import run as auditing
from brittle.errors import InputError
from brittle.evaluation import Execution, Threat
from brittle.evaluation import run as running
from brittle.evaluation.parts import Chunk
from brittle.evaluation.signature import StreamDigest
from brittle.storage.digest import digest
from helpers.evaluations import audit_with, names, noted
from helpers.networks import convnet, few, mlp, untouched

audit = functools.partial(audit_with, attacks=functools.partial(apgd, steps=5), certify=False, honesty=False)
COST = {"seconds", "forwards", "backwards"}
"""What may differ."""
N = 40


def assert_same(a, b, where="audit"):
    """Equal in everything but what it cost; floating-point numbers up to rounding, samples included."""
    if dataclasses.is_dataclass(a):
        for field in {field.name for field in dataclasses.fields(a)} - COST:
            assert_same(getattr(a, field), getattr(b, field), f"{where}.{field}")
    elif isinstance(a, tuple):
        assert len(a) == len(b), where
        for number, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_same(one, other, f"{where}[{number}]")
    elif isinstance(a, np.ndarray):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7, err_msg=where)
    elif isinstance(a, float):
        assert b == pytest.approx(a, rel=1e-9, abs=1e-12), where
    else:
        assert a == b, where


@functools.cache
def whole():
    return audit(mlp(torch.float64), few(N, torch.float64))


@pytest.mark.parametrize(
    "form",
    {
        "tensors": lambda x, y: (x, y),
        "loader": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=7),
        "batches": lambda x, y: [(x[:9], y[:9]), (x[9:], y[9:])],
    }.items(),
    ids=lambda item: item[0],
)
@pytest.mark.parametrize("chunk", [8, 16, 8192])
def test_data_are_streamed_and_the_pieces_add_up(form, chunk, monkeypatch):
    monkeypatch.setattr(running, "CHUNK_SAMPLES", chunk)
    result = audit(mlp(torch.float64), form[1](*few(N, torch.float64)), batch_size=8)
    if form[0] == "batches":  # their number is not known beforehand, so their fingerprint is another
        result = dataclasses.replace(result, signature=whole().signature)
    assert_same(result, whole())


def test_a_stream_is_read_once_for_both_norms():
    x, y = few(N, torch.float64)
    taken = []

    def batches():
        for start in range(0, N, 10):
            taken.append(start)
            yield x[start : start + 10], y[start : start + 10]

    result = audit(mlp(torch.float64), batches(), batch_size=10)
    assert taken == [0, 10, 20, 30]
    assert [norm.evaluation.n for norm in result.norms] == [N, N]


@pytest.mark.parametrize("devices", [("cpu",), ("cpu", "cpu")])
def test_several_devices_share_the_attacks(devices):
    net = mlp(torch.float64)
    with untouched(net):
        result = audit(net, few(N, torch.float64), batch_size=4, devices=devices)
    assert_same(result, whole())


@pytest.mark.parametrize("lost", ["nothing", "examples", "results"])
def test_an_audit_goes_on_where_it_stopped(tmp_path, monkeypatch, lost):
    run = functools.partial(audit, mlp(torch.float64), few(N, torch.float64), batch_size=4)
    first = run(resume=tmp_path)
    kept = names(tmp_path)
    assert len(kept) == 2 * 2 * 3  # two files a piece of 16 samples and a norm
    if lost != "nothing":
        suffix = ".safetensors" if lost == "examples" else ".json"
        (
            tmp_path / next(name for name in kept if name.startswith("samples-00000016") and name.endswith(suffix))
        ).unlink()
    attacked, real = [], running.worst_case

    def counting(*arguments, ids, **options):
        attacked.append(ids)
        return real(*arguments, ids=ids, **options)

    monkeypatch.setattr(running, "worst_case", counting)
    assert_same(run(resume=tmp_path), first)
    assert attacked == ([] if lost == "nothing" else [16])
    assert names(tmp_path) == kept


def test_the_data_are_told_apart_from_others_of_equal_results(tmp_path):
    x, y = few(16, torch.float64)
    run = functools.partial(audit, mlp(torch.float64), attacks=noted, batch_size=4, resume=tmp_path)
    run((x, y))
    before = names(tmp_path)
    run(((x + 1e-9).clamp(0, 1), y))
    assert len(names(tmp_path)) == 2 * len(before)


def test_a_network_is_traced_and_copied_once(monkeypatch):
    """One trace serves the bounds, the certificates and the copy that attacks search on, in all norms."""
    net, copies, traces = convnet(), [], []
    real_copy, real_trace = copy.deepcopy, fx.Tracer.trace

    def count_copies(value, *arguments, **options):
        if isinstance(value, nn.Module) and len(list(value.modules())) > 3:
            copies.append(type(value).__name__)
        return real_copy(value, *arguments, **options)

    def count_traces(tracer, root, *arguments, **options):
        traces.append(type(root).__name__)
        return real_trace(tracer, root, *arguments, **options)

    monkeypatch.setattr(copy, "deepcopy", count_copies)
    monkeypatch.setattr(fx.Tracer, "trace", count_traces)
    audit_with(net, few(N), functools.partial(apgd, steps=3))
    assert len(traces) == 1
    assert len(copies) == 1 + 2  # for the attacks, and in float64 for the search of the largest ratio in each norm


@pytest.mark.parametrize("chunk", [16, 8192])
def test_examples_of_one_norm_are_gone_when_the_next_ones_are_looked_at(chunk, monkeypatch):
    of_first_norm, looks = [], []
    real_run = auditing.run_parts

    def record(*arguments):
        for outcomes in real_run(*arguments):
            of_first_norm.append(weakref.ref(outcomes[0].worst.x_adv))
            yield outcomes

    def look(model, data, **options):
        looks.append([reference() is None for reference in of_first_norm])
        return ()

    monkeypatch.setattr(running, "CHUNK_SAMPLES", chunk)
    monkeypatch.setattr(auditing, "run_parts", record)
    monkeypatch.setattr(auditing, "judged_perturbations", look)
    audit(mlp(), few(N), batch_size=8)
    assert len(looks) == 2
    assert all(looks[1])


@pytest.mark.parametrize("size", [1, 7, 40, 100])
def test_the_fingerprint_of_a_stream_is_that_of_its_tensors(size):
    x, y = few(N)
    read = StreamDigest(N)
    chunks = [Chunk(i, x[i : i + size], y[i : i + size], N) for i in range(0, N, size)]
    assert [chunk.first for chunk in read.over(chunks)] == list(range(0, N, size))
    assert read.hexdigest() == digest({"inputs": x, "labels": y})
    other = StreamDigest(N)
    list(other.over([Chunk(0, x.flip(0), y, N)]))
    assert other.hexdigest() != read.hexdigest()


def test_records_refuse_what_cannot_be():
    for options in ({"batch_size": 0}, {"ray_workers": -1}, {"ray_workers": 1, "devices": ("cpu",)}):
        with pytest.raises(InputError, match=rf"^{next(iter(options))}: expected"):
            Execution(**options)
    assert Execution().in_pieces is False
    assert Execution(resume="folder").in_pieces is True
    assert Threat().attacks == "fast"
