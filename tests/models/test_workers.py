"""Evaluations of any size: spread over devices and clusters, streamed, stopped and resumed, always the same results."""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import threading
import time
import tomllib
import weakref
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from test_dataset import GREY, anything_moves, push
from torch import fx, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from brittle.attacks import apgd
from brittle.errors import InputError
from brittle.evaluation import dataset as evaluation
from brittle.evaluation.dataset import evaluate
from brittle.storage import files
from helpers import networks
from helpers.networks import convnet, few, linear, mlp, untidy, untouched
from helpers.processes import start, wait_until

NORMS = [math.inf, 2]
EPS = {math.inf: 0.06, 2: 0.3}
quick_apgd = functools.partial(apgd, steps=6)
SEEN: list[int] = []
"""Ids that :func:`noted` was asked to attack."""


def noted(model, x, y, *, eps, p, ids, seed=0, strength=1.0):
    """APGD that takes notes."""
    SEEN.extend(ids.tolist())
    return apgd(model, x, y, eps=strength * eps, p=p, steps=5, seed=seed, ids=ids)


def everything(e):
    """All of a result but what it cost."""
    return e.samples, e.n, e.clean_correct, e.robust_correct, e.rejected, e.largest_perturbation, e.proven, e.settings


def whole(e):
    """All of a result."""
    return e, e.samples


def hooked(net):
    """The network with a hook that does nothing: such a network is never traced."""
    net = networks.copy.deepcopy(net)
    net.register_forward_hook(lambda module, inputs, output: None)
    return net


# --- devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("make", [mlp, convnet])
def test_two_devices_give_what_one_gives(p, make):
    net, data = hooked(make()), few(20)
    run = functools.partial(evaluate, data=data, attack=[quick_apgd, noted], eps=EPS[p], p=p, restarts=2)
    told, alone = [], run(net, batch_size=4, certify=False)
    with untouched(net):
        spread = run(net, batch_size=4, devices=("cpu", "cpu"), progress=lambda *step: told.append(step))
    for a, b in zip(alone.samples, spread.samples, strict=True):
        assert (a.index, a.label, a.attack, a.restart) == (b.index, b.label, b.attack, b.restart)
    assert everything(run(net, batch_size=1, devices=("cpu", "cpu"))) == everything(run(net, batch_size=1))
    assert spread.robust_correct == alone.robust_correct
    assert [s.index for s in spread.samples] == list(range(20))
    done = [step[0] for step in told]
    assert done == sorted(set(done))
    assert done[-1] == 20
    assert {step[1] for step in told} == {20}


def test_one_device_of_several_names_gives_the_same():
    net, data = hooked(mlp()), few(30)
    run = functools.partial(evaluate, net, data, attack=quick_apgd, eps=0.06, batch_size=3)
    base = run(devices=("cpu",))
    assert whole(run(devices=["cpu"] * 3)) == whole(base) == whole(run(devices=("cpu", "cpu")))


PAUSES: list[float] = []
"""How long the next traces of :class:`SlowToTrace` take, in seconds."""
GATES: list[threading.Barrier] = []
"""Where passes with gradient wait for those of the other thread."""


class SlowToTrace(nn.Module):
    """A network whose tracing takes long enough for another thread to run meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.net = networks.copy.deepcopy(mlp())

    def forward(self, x):
        """``(N, ...)`` to ``(N, 10)``."""
        if isinstance(x, fx.Proxy):
            time.sleep(PAUSES.pop(0) if PAUSES else 0.02)
            return self.net(x)
        logits = self.net(x)
        if GATES and x.requires_grad:
            with suppress(threading.BrokenBarrierError):
                GATES[0].wait(1)
        return logits


@pytest.fixture
def modules_mended():
    """What torch.fx does to all modules is undone, so that the tests after this one find them as they were."""
    before = nn.Module.__call__, nn.Module.__getattr__
    yield
    nn.Module.__call__, nn.Module.__getattr__ = before


@pytest.mark.parametrize("certify", [False, True])
def test_networks_are_not_traced_while_another_thread_runs_one(certify, modules_mended):
    net, data = SlowToTrace(), few(48)
    run = functools.partial(evaluate, net, data, attack=quick_apgd, eps=0.06, batch_size=1, certify=certify)
    base = run(devices=("cpu",))
    with untouched(net):
        for _ in range(3):
            assert whole(run(devices=("cpu", "cpu"))) == whole(base)


def test_modules_work_after_an_evaluation_on_several_devices(modules_mended):
    before = nn.Module.__call__
    PAUSES[:] = [0.1, 0.6]  # both threads come to trace at once; the second one ends after the first
    GATES[:] = [threading.Barrier(2)]
    run = functools.partial(evaluate, SlowToTrace(), few(8), attack=quick_apgd, eps=0.06, certify=False)
    with suppress(NameError):
        run(batch_size=1, devices=("cpu", "cpu"))
    PAUSES.clear()
    GATES.clear()
    assert nn.Module.__call__ is before


def test_attacks_that_draw_from_the_global_generator_leave_it_as_it_was():
    drew, entered = threading.Event(), threading.Event()

    def drawing(model, x, y, *, eps, p, ids):
        if ids[0] == 0:
            torch.rand(3)
            drew.set()
            entered.wait(5)
        else:
            entered.set()
            time.sleep(0.05)  # leaves last
            torch.rand(3)
        return x

    net = hooked(mlp())
    x, _ = few(8)
    y = net(x).argmax(1)

    def batches():
        yield x[:4], y[:4]
        drew.wait(5)  # the second chunk begins when the first has drawn
        yield x[4:], y[4:]

    with untouched(net):
        evaluate(net, batches(), attack=drawing, eps=0.01, batch_size=1, devices=("cpu", "cpu"), certify=False)


@pytest.mark.parametrize("make", [untidy, lambda: linear(10, 64)])
def test_the_users_model_is_never_touched(make):
    net = hooked(make())
    with untouched(net):
        evaluate(net, few(20), attack=quick_apgd, eps=0.06, batch_size=2, devices=("cpu", "cpu"))
    with untouched(net), pytest.raises(ZeroDivisionError):
        evaluate(net, few(20), attack=lambda *a, eps, p: 1 / 0, eps=0.06, batch_size=2, devices=("cpu", "cpu"))


def test_errors_of_devices():
    with pytest.raises(InputError, match=r"^devices: expected an nn\.Module"):
        evaluate(anything_moves, GREY, attack=push, eps=0.1, devices=("cpu",))
    for device in ("nowhere", "cuda:77", ""):
        with pytest.raises(InputError, match=r"^devices: "):
            evaluate(mlp(), few(5), attack=quick_apgd, eps=0.1, devices=("cpu", device))
    with pytest.raises(InputError, match=r"^ray_workers: "):
        evaluate(mlp(), few(5), attack=quick_apgd, eps=0.1, devices=("cpu",), ray_workers=2)
    with pytest.raises(InputError, match=r"^ray_workers: "):
        evaluate(mlp(), few(5), attack=quick_apgd, eps=0.1, ray_workers=-1)


def test_what_breaks_one_chunk_breaks_the_call():
    def failing(model, x, y, *, eps, p, ids):
        if 13 in ids:
            raise ZeroDivisionError("at 13")
        return x

    with pytest.raises(ZeroDivisionError, match="at 13"):
        evaluate(hooked(mlp()), few(40), attack=failing, eps=0.1, batch_size=1, devices=("cpu", "cpu"))
    x, y = few(40)
    x = x.clone()
    x[21] = math.nan
    with pytest.raises(InputError, match=r"^x must be finite"):
        evaluate(hooked(mlp()), (x, y), attack=quick_apgd, eps=0.1, batch_size=1, devices=("cpu", "cpu"))


# --- Ray ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster():
    """A small cluster on this machine."""
    before = os.environ.get("RAY_AUTH_MODE"), os.environ.get("PYTHONPATH")
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), before[1] or ""])
    ray = pytest.importorskip("ray", reason="Ray, the extra cluster, is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield ray
    ray.shutdown()
    for name, value in zip(("RAY_AUTH_MODE", "PYTHONPATH"), before, strict=True):
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def test_a_cluster_gives_what_one_process_gives(cluster, tmp_path):
    net, (x, y) = mlp(), few(40)
    run = functools.partial(evaluate, net, attack=[quick_apgd], eps=0.06, batch_size=3, certify=False)
    told = []
    with untouched(net):
        spread = run((x, y), ray_workers=2, progress=lambda *step: told.append(step))
    assert everything(spread) == everything(run((x, y), devices=("cpu",)))
    assert [(s.attack, s.restart) for s in spread.samples] == [(s.attack, s.restart) for s in run((x, y)).samples]
    assert told[-1] == (40, 40)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    kept = run((x, y), ray_workers=2, resume=tmp_path)
    assert whole(kept) == whole(spread) == whole(run((x, y), ray_workers=2, resume=tmp_path))
    assert len(list(tmp_path.glob("*.json"))) == 4
    wrong = x.clone()
    wrong[21] = math.nan
    with pytest.raises(InputError, match="x must be finite"):
        run((wrong, y), ray_workers=2)


def test_errors_of_a_cluster_read_as_those_of_one_process(cluster):
    x, y = few(8)
    with pytest.raises(InputError, match=r"^x must be finite"):
        evaluate(mlp(), (x * math.nan, y), attack=quick_apgd, eps=0.06, batch_size=3, ray_workers=2)


def test_ray_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"^ray_workers: .*brittle\[cluster\]"):
        evaluate(mlp(), few(5), attack=quick_apgd, eps=0.1, ray_workers=2)


def test_the_extra_that_the_message_names_exists():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert any("ray" in line for line in project["project"]["optional-dependencies"]["cluster"])


# --- stopped and resumed ------------------------------------------------------------------------------------


class Stop:
    """Progress that stops the run after a number of calls."""

    def __init__(self, samples):
        self.samples = samples

    def __call__(self, done, total):
        """Stop once that many samples are done."""
        if done >= self.samples:
            raise KeyboardInterrupt


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


@pytest.mark.parametrize("devices", [(), ("cpu", "cpu")])
@pytest.mark.parametrize("after", [8, 17, 33])
def test_a_stopped_run_goes_on_where_it_stopped(tmp_path, devices, after):
    net, data, folder = hooked(mlp()), few(40), tmp_path / "not" / "there yet"
    run = functools.partial(evaluate, net, data, attack=noted, eps=0.06, batch_size=2, devices=devices)
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
    assert whole(run(resume=folder, progress=lambda *step: told.append(step))) == whole(base)
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
    run = functools.partial(evaluate, hooked(mlp()), few(40), eps=0.06, batch_size=2, resume=tmp_path)
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
from helpers import networks
from brittle.attacks import apgd
from brittle.evaluation.dataset import evaluate
net = networks.mlp()
net.load_state_dict(torch.load(sys.argv[2]))
evaluate(net, networks.few(120), attack=functools.partial(apgd, steps=6), eps=0.06, batch_size=2, resume=sys.argv[1],
         progress=lambda done, total: time.sleep(0.03))
"""


def test_a_killed_process_leaves_whole_files_that_the_next_one_uses(tmp_path, monkeypatch):
    folder, weights = tmp_path / "kept", tmp_path / "weights.pt"
    torch.save(mlp().state_dict(), weights)
    with start("-c", CHILD, folder, weights) as evaluating:
        wait_until(lambda: len(names(folder)) >= 3, 120, evaluating)
    kept = [name for name in names(folder) if not name.startswith(".")]
    assert 3 <= len(kept) < 15
    parts = [json.loads((folder / name).read_text()) for name in kept]
    assert [len(part["samples"]) for part in parts] == [8] * len(parts)
    run = functools.partial(evaluate, mlp(), few(120), attack=quick_apgd, eps=0.06, batch_size=2)
    attacked = []
    real = evaluation.worst_case

    def counting(*args, first, **options):
        attacked.append(first)
        return real(*args, first=first, **options)

    monkeypatch.setattr(evaluation, "worst_case", counting)
    again = run(resume=folder)
    assert set(attacked) == set(range(0, 120, 8)) - {part["first"] for part in parts}
    assert whole(again) == whole(run(resume=tmp_path / "another"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_write_that_is_stopped_leaves_nothing(tmp_path, monkeypatch, error):
    def stop(*args):
        raise error

    monkeypatch.setattr(files.os, "replace", stop)
    with pytest.raises(error):
        evaluate(hooked(mlp()), few(8), attack=quick_apgd, eps=0.06, batch_size=2, resume=tmp_path)
    assert names(tmp_path) == []


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
    run = functools.partial(evaluate, hooked(mlp()), few(24), attack=noted, eps=0.06, batch_size=2, resume=tmp_path)
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
    run = functools.partial(evaluate, hooked(mlp()), few(24), attack=noted, eps=0.06, batch_size=2, resume=tmp_path)
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
        return evaluate(options.pop("model")(), options.pop("data"), **options)

    base = run(resume=tmp_path)
    before = names(tmp_path)
    assert len(before) == 2
    other = run(**CHANGES[what], resume=tmp_path)
    assert len(names(tmp_path)) == 4
    assert whole(other) == whole(run(**CHANGES[what], resume=tmp_path / "another"))
    assert whole(run(resume=tmp_path)) == whole(base)


def test_more_of_the_same_data_uses_what_is_there(tmp_path):
    x, y = few(40)
    run = functools.partial(evaluate, hooked(mlp()), attack=noted, eps=0.06, batch_size=2, resume=tmp_path)
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


class Anything(nn.Module):
    """Class 0 until something moves by more than 0.05."""

    def forward(self, x):
        """``(N, ...)`` to ``(N, 2)``."""
        moved = (x - 0.5).flatten(1).abs().amax(1)
        return torch.stack([torch.full_like(moved, 0.05), moved], dim=1)


UNSEEN = {
    "positional options": [functools.partial(bound, f) for f in (0.1, 0.9)],
    "closures": [factory(f) for f in (0.1, 0.9)],
    "objects": [Configured(f) for f in (0.1, 0.9)],
    "tensors": [functools.partial(shifted, by=torch.full((2, 2), f)) for f in (0.5, 0.50001)],
}


@pytest.mark.parametrize("what", list(UNSEEN))
def test_attacks_that_differ_inside_share_nothing(tmp_path, what):
    run = functools.partial(evaluate, Anything(), GREY, eps=0.0999, batch_size=2, certify=False)
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
    run = functools.partial(evaluate, data=few(8), attack=quick_apgd, eps=0.06, batch_size=2, certify=False)
    run(Scaled(1.0, kind), resume=tmp_path)
    fresh, resumed = run(Scaled(-1.0, kind)), run(Scaled(-1.0, kind), resume=tmp_path)
    assert [s.clean_prediction for s in resumed.samples] == [s.clean_prediction for s in fresh.samples]


def test_networks_that_fall_over_can_be_resumed(tmp_path):
    class Falls(nn.Module):
        def forward(self, x):
            sound = torch.stack([torch.ones(len(x)), x[:, 0, 0, 0]], 1)
            return torch.where(x[:, :1, 0, 0] > 0.52, math.nan, sound)

    run = functools.partial(evaluate, Falls(), GREY, attack=push, eps=0.1)
    assert run().robust_correct == 0
    assert run(resume=tmp_path).robust_correct == run(resume=tmp_path).robust_correct == 0


def test_where_nothing_can_be_kept(tmp_path):
    with pytest.raises(InputError, match=r"^resume: expected an nn\.Module"):
        evaluate(anything_moves, GREY, attack=push, eps=0.1, resume=tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"^resume: expected a folder"):
        evaluate(mlp(), few(4), attack=quick_apgd, eps=0.1, resume=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert evaluate(mlp(), few(4), attack=quick_apgd, eps=0.1, resume=str(tmp_path / "text")).n == 4


def test_a_folder_within_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"^resume: "):
        evaluate(mlp(), few(4), attack=quick_apgd, eps=0.1, resume=tmp_path / "file" / "folder")


# --- streams ------------------------------------------------------------------------------------------------


def uneven(x, y, sizes=(1, 7, 2, 13, 5, 30, 3)):
    """Batches of uneven sizes."""
    start = 0
    for size in sizes:
        if start < len(x):
            yield x[start : start + size], y[start : start + size]
        start += size
    if start < len(x):
        yield x[start:], y[start:]


class Map(Dataset):
    """Samples one by one."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        """How many."""
        return len(self.y)

    def __getitem__(self, i):
        """One sample."""
        return self.x[i], int(self.y[i])


class Endless(IterableDataset):
    """Samples without a length."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        """One after the other."""
        return ((x, int(y)) for x, y in zip(self.x, self.y, strict=True))


FORMS = {
    "list": lambda x, y: list(uneven(x, y)),
    "generator": uneven,
    "loader": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=11),
    "dataset": Map,
    "stream": Endless,
    "batches of one": lambda x, y: ((x[i : i + 1], y[i : i + 1]) for i in range(len(x))),
    "an empty batch between": lambda x, y: [(x[:9], y[:9]), (x[:0], y[:0]), (x[9:], y[9:])],
}


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("devices", [(), ("cpu", "cpu")])
def test_the_form_of_the_data_changes_nothing(form, devices, tmp_path):
    net, (x, y) = hooked(mlp()), few(50)
    run = functools.partial(evaluate, net, attack=quick_apgd, eps=0.06, batch_size=4, devices=devices)
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
    run = functools.partial(evaluate, mlp(), data, attack=attack, eps=0.01, batch_size=5, certify=certify)
    base = run()
    for size in (1, 7):
        monkeypatch.setattr(evaluation, "CHUNK_SAMPLES", size)
        e = run()
        assert everything(e)[1:5] == everything(base)[1:5]
        if not certify:
            verdicts = [[(s.index, s.attack, s.adversarial_prediction) for s in found.samples] for found in (e, base)]
            assert verdicts[0] == verdicts[1]
    monkeypatch.setattr(evaluation, "CHUNK_BYTES", 64 * 4 * 5)
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
    monkeypatch.setattr(evaluation, "CHUNK_SAMPLES", 32)
    options = options | ({"resume": tmp_path} if "resume" in options else {})
    watched, ahead = Watched(400 // size, size), []
    real = evaluation.worst_case

    def watching(*arguments, first, **named):
        result = real(*arguments, first=first, **named)
        ahead.append(watched.taken - (first + len(result.y) - 1))
        return result

    monkeypatch.setattr(evaluation, "worst_case", watching)
    e = evaluate(hooked(Anything()), watched, attack=standing, eps=0.01, batch_size=2, certify=False, **options)
    assert e.n == 400 // size * size == watched.taken
    workers = len(options.get("devices", ()))
    assert max(ahead) <= (2 * workers + 3) * chunk + size
    assert watched.most <= (2 * workers + 4) * chunk + size


def test_large_inputs_are_not_gathered_beyond_the_bytes_of_a_chunk(monkeypatch):
    monkeypatch.setattr(evaluation, "CHUNK_BYTES", 16 * 4 * 16)  # 16 samples of 16 bytes, and some
    watched, ahead = Watched(60, 8), []

    def watching(model, x, y, *, eps, p, ids):
        ahead.append(watched.taken - int(ids[-1]))
        return x

    evaluate(Anything(), watched, attack=watching, eps=0.01, batch_size=8, certify=False)
    assert max(ahead) <= 4 * 64


@pytest.mark.parametrize("devices", [(), ("cpu", "cpu")])
@pytest.mark.parametrize("empty", [(X[:0], Y[:0]), [], (), iter(()), [(X[:0], Y[:0])], TensorDataset(X[:0], Y[:0])])
def test_no_samples_are_an_error(devices, empty):
    with pytest.raises(InputError, match=r"^data: "):
        evaluate(hooked(mlp()), empty, attack=quick_apgd, eps=0.06, devices=devices)


BAD = {
    "NaN": ((X * math.nan, Y), "^x must be finite"),
    "beyond the bounds": ((X + 1, Y), "^x must lie in"),
    "labels too large": ((X, Y + 10), "^y: expected labels from 0 to 9"),
    "labels below 0": ((X, Y - 10), "^y must be at least 0"),
    "labels that are no integers": ((X, Y + 0.5), "^y must be an integer tensor"),
    "another size": ((X[:, :, :7], Y), "^data: "),
    "another rank": ((X[:, 0], Y), "^data: "),
    "fewer labels": ((X, Y[:-1]), "^(data|x)"),
    "more labels": ((X, torch.cat([Y, Y])), "^(data|x)"),
    "arrays": ((X.numpy(), Y), "^(data|x)"),
    "nothing": ((None, Y), "^data: "),
    "no labels": ((X, None), "^data: "),
    "no pair": ((X,), r"^data: expected batches \(inputs, labels\)"),
    "not even that": (X, r"^data: expected batches \(inputs, labels\)"),
}
UNNAMED = {"another size", "another rank", "arrays", "nothing", "no labels", "fewer labels", "more labels"}


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
    run = functools.partial(evaluate, net, attack=noted, eps=0.06, batch_size=2, **options)
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
        evaluate(hooked(mlp()), [(X, torch.cat([Y, Y[:1]])), (X, Y[1:])], attack=quick_apgd, eps=0.06)


def test_what_a_loader_raises_reaches_the_caller():
    def failing():
        yield X, Y
        raise RuntimeError("disk gone")

    for devices in ((), ("cpu", "cpu")):
        with pytest.raises(RuntimeError, match="disk gone"):
            evaluate(hooked(mlp()), failing(), attack=quick_apgd, eps=0.06, batch_size=2, devices=devices)
