"""Evaluations over several devices and on a cluster: what one device would have found, and its errors."""

from __future__ import annotations

import functools
import math
import os
import sys
import threading
import time
import tomllib
from contextlib import suppress

import pytest
import torch
from torch import fx, nn

from brittle.errors import InputError
from helpers import networks
from helpers.evaluations import (
    GREY,
    anything_moves,
    evaluate_with,
    everything,
    hooked,
    noted,
    push,
    quick_apgd,
    whole,
)
from helpers.networks import convnet, few, linear, mlp, untidy, untouched
from helpers.processes import TESTS, lives, wait_until

NORMS = [math.inf, 2]
EPS = {math.inf: 0.06, 2: 0.3}


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("make", [mlp, convnet])
def test_two_devices_give_what_one_gives(p, make):
    net, data = hooked(make()), few(20)
    run = functools.partial(evaluate_with, data=data, attack=[quick_apgd, noted], eps=EPS[p], p=p, restarts=2)
    told, alone = [], run(net, batch_size=4, certify=False)
    with untouched(net):
        spread = run(net, batch_size=4, devices=("cpu", "cpu"), progress=lambda stage, *step: told.append(step))
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
    run = functools.partial(evaluate_with, net, data, attack=quick_apgd, eps=0.06, batch_size=3)
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
    run = functools.partial(evaluate_with, net, data, attack=quick_apgd, eps=0.06, batch_size=1, certify=certify)
    base = run(devices=("cpu",))
    with untouched(net):
        for _ in range(3):
            assert whole(run(devices=("cpu", "cpu"))) == whole(base)


def test_modules_work_after_an_evaluation_on_several_devices(modules_mended):
    before = nn.Module.__call__
    PAUSES[:] = [0.1, 0.6]  # both threads come to trace at once; the second one ends after the first
    GATES[:] = [threading.Barrier(2)]
    run = functools.partial(evaluate_with, SlowToTrace(), few(8), attack=quick_apgd, eps=0.06, certify=False)
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
        evaluate_with(net, batches(), attack=drawing, eps=0.01, batch_size=1, devices=("cpu", "cpu"), certify=False)


@pytest.mark.parametrize("make", [untidy, lambda: linear(10, 64)])
def test_the_users_model_is_never_touched(make):
    net = hooked(make())
    with untouched(net):
        evaluate_with(net, few(20), attack=quick_apgd, eps=0.06, batch_size=2, devices=("cpu", "cpu"))
    with untouched(net), pytest.raises(ZeroDivisionError):
        evaluate_with(net, few(20), attack=lambda *a, eps, p: 1 / 0, eps=0.06, batch_size=2, devices=("cpu", "cpu"))


def test_errors_of_devices():
    with pytest.raises(InputError, match=r"^devices: expected an nn\.Module"):
        evaluate_with(anything_moves, GREY, attack=push, eps=0.1, devices=("cpu",))
    for device in ("nowhere", "cuda:77", ""):
        with pytest.raises(InputError, match=r"^devices: "):
            evaluate_with(mlp(), few(5), attack=quick_apgd, eps=0.1, devices=("cpu", device))
    with pytest.raises(InputError, match=r"^ray_workers: "):
        evaluate_with(mlp(), few(5), attack=quick_apgd, eps=0.1, devices=("cpu",), ray_workers=2)
    with pytest.raises(InputError, match=r"^ray_workers: "):
        evaluate_with(mlp(), few(5), attack=quick_apgd, eps=0.1, ray_workers=-1)


@pytest.mark.parametrize("error", [TypeError("no copies"), None])
def test_networks_that_cannot_be_copied_are_refused_and_left_where_they_are(error):
    """Also one that says it is its own copy: moving that one to a device would move the user's."""

    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, x):
            return self.inner(x)

        def __deepcopy__(self, memo):
            if error is not None:
                raise error
            return self

    net = Single()
    with untouched(net.inner), pytest.raises(InputError, match=r"^devices: expected a network .* copied; got Single"):
        evaluate_with(net, few(5), attack=quick_apgd, eps=0.1, devices=("cpu", "meta"))


def test_the_name_of_a_single_device_is_no_sequence_of_names():
    with pytest.raises(InputError, match=r"^devices: expected names of devices, as \('cpu',\); got 'cpu'"):
        evaluate_with(mlp(), few(5), attack=quick_apgd, eps=0.1, devices="cpu")


def test_what_breaks_one_chunk_breaks_the_call():
    def failing(model, x, y, *, eps, p, ids):
        if 13 in ids:
            raise ZeroDivisionError("at 13")
        return x

    with pytest.raises(ZeroDivisionError, match="at 13"):
        evaluate_with(hooked(mlp()), few(40), attack=failing, eps=0.1, batch_size=1, devices=("cpu", "cpu"))
    x, y = few(40)
    x = x.clone()
    x[21] = math.nan
    with pytest.raises(InputError, match=r"^x: expected finite numbers"):
        evaluate_with(hooked(mlp()), (x, y), attack=quick_apgd, eps=0.1, batch_size=1, devices=("cpu", "cpu"))


# --- Ray ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster():
    """A small cluster on this machine."""
    before = os.environ.get("RAY_AUTH_MODE"), os.environ.get("PYTHONPATH")
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), before[1] or ""])
    ray = pytest.importorskip("ray", reason="Ray, the extra cluster, is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield ray
    ray.shutdown()
    for name, value in zip(("RAY_AUTH_MODE", "PYTHONPATH"), before, strict=True):
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


run_small = functools.partial(evaluate_with, mlp(), attack=[quick_apgd], eps=0.06, batch_size=3, certify=False)


@pytest.fixture(scope="module")
def spread(cluster, tmp_path_factory):
    """One evaluation on two processes of the cluster, what it told, and where it was asked from to keep its results.

    Every process imports PyTorch, which takes seconds: the tests below look at different sides of the same call.
    """
    folder, lock, told = tmp_path_factory.mktemp("cluster"), threading.Lock(), []

    def tell(stage, done, total):  # holds a lock, which cannot be pickled
        with lock:
            told.append((done, total))

    with pytest.MonkeyPatch.context() as patch, untouched(mlp()):
        patch.chdir(folder)  # the cluster's processes started elsewhere
        result = run_small(few(40), ray_workers=2, resume="kept", progress=tell)
    return result, told, folder


def test_a_cluster_gives_what_one_process_gives(spread):
    result, *_ = spread
    alone = run_small(few(40), devices=("cpu",))
    assert everything(result) == everything(alone)
    assert [(s.attack, s.restart) for s in result.samples] == [(s.attack, s.restart) for s in alone.samples]


def test_progress_stays_at_home(spread):
    _, told, _ = spread
    assert told[-1] == (40, 40)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_a_cluster_keeps_results_where_the_caller_stands_and_takes_them_up_again(spread):
    result, _, folder = spread
    before = {path: path.stat().st_mtime_ns for path in (folder / "kept").glob("*.json")}
    assert len(before) == 4
    assert whole(run_small(few(40), ray_workers=1, resume=folder / "kept")) == whole(result)
    assert {path: path.stat().st_mtime_ns for path in (folder / "kept").glob("*.json")} == before


def test_an_error_ends_the_other_tasks_of_a_cluster(cluster, tmp_path):
    """Also where the cluster has no room for a third process."""

    def failing(model, x, y, *, eps, p, ids):
        if 0 in ids:
            wait_until(lambda: list(tmp_path.glob("*.pid")), 120)  # the other one is at work
            raise ZeroDivisionError
        (tmp_path / "pid").write_text(str(os.getpid()))
        (tmp_path / "pid").rename(tmp_path / f"{ids[0]}.pid")
        time.sleep(60)
        return x

    net, (x, _) = mlp(), few(40)
    with pytest.raises(ZeroDivisionError):
        evaluate_with(net, (x, net(x).argmax(1)), attack=failing, eps=0.06, batch_size=4, certify=False, ray_workers=3)
    (begun,) = tmp_path.glob("*.pid")
    wait_until(lambda: not lives(int(begun.read_text())), 20)


def test_errors_of_a_cluster_read_as_those_of_one_process(cluster):
    x, y = few(40)
    x = x.clone()
    x[21] = math.nan  # in the second of four parts
    with pytest.raises(InputError, match=r"^x: expected finite numbers"):
        run_small((x, y), ray_workers=1)


def test_what_cannot_be_sent_to_a_cluster_is_an_error_of_one_line(cluster):
    lock = threading.Lock()

    def locked(model, x, y, *, eps, p):
        with lock:
            return x

    with pytest.raises(InputError, match=r"^ray_workers: expected a network and attacks that can be pickled; got .+$"):
        evaluate_with(mlp(), few(8), attack=locked, eps=0.06, ray_workers=2)


def test_ray_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"^ray_workers: .*brittle\[cluster\]"):
        evaluate_with(mlp(), few(5), attack=quick_apgd, eps=0.1, ray_workers=2)


def test_the_extra_that_the_message_names_exists():
    project = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())
    assert any("ray" in line for line in project["project"]["optional-dependencies"]["cluster"])
