"""A few damaged and nonsensical inputs through every door; benchmarks/fuzz.py sends as many as are asked for."""

import itertools
import os
import random
import runpy
import signal
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="inputs are read in forked processes")
FUZZ = Path(__file__).parent.parent / "benchmarks" / "fuzz.py"
SLOW = {"report": 10, "comparison": 60, "options": 20}
"""Fewer inputs where one takes tens of milliseconds."""


@pytest.fixture(scope="module")
def fuzz():
    return runpy.run_path(str(FUZZ), run_name="imported")


DOORS = (
    "cifar-binary", "cifar-pickle", "mnist", "mnist-gz", "npz", "svhn", "folder", "safetensors", "checkpoint",
    "compressed", "audit", "report", "comparison", "options",
)  # fmt: skip


def test_every_door_is_tried(fuzz):
    assert set(fuzz["DOORS"]) == set(DOORS)


@pytest.mark.parametrize("name", DOORS)
def test_what_is_not_read_is_refused_in_one_sentence(fuzz, name):
    tally = fuzz["fuzz"](name, SLOW.get(name, 200), seed=2026)
    assert tally.bad == ()
    assert tally.counts["read"] + tally.counts["refused"] == SLOW.get(name, 200)
    assert tally.counts["refused"] > 0


@pytest.mark.parametrize("name", DOORS)
def test_what_is_whole_is_read(fuzz, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    door = fuzz["DOORS"][name]()
    fuzz["lay_out"](tmp_path / "in", door.valid)
    outcome, what = fuzz["judge"](door, tmp_path / "in")
    assert outcome == ("refused" if name == "options" else "read"), what
    assert name != "options" or what.endswith("what was asked for would start here\n")


def test_what_goes_wrong_is_counted(fuzz, monkeypatch):
    """A door that dies, hangs, takes memory or raises, by what comes in: each is seen, and the next goes on."""
    acts = [
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        lambda: next(number for number in itertools.count() if number < 0),
        lambda: bytearray(2**32),
        lambda: 1 / 0,
        lambda: None,
    ]
    make = lambda rng, files: {"act": b"%d" % rng.randrange(len(acts))}  # noqa: E731
    door = fuzz["Door"]({}, make, lambda root: acts[int((root / "act").read_bytes())]())
    monkeypatch.setitem(fuzz["DOORS"], "odd", lambda: door)
    monkeypatch.setitem(fuzz["fuzz"].__globals__, "SECONDS", 0.05)
    drawn = Counter(random.Random(f"0 odd {number}").randrange(len(acts)) for number in range(24))
    expected = dict(
        zip(("crashes", "hangs", "allocations", "tracebacks", "read"), map(drawn.get, range(5)), strict=True)
    )
    assert min(expected.values()) > 0
    assert fuzz["fuzz"]("odd", 24, 0).counts == expected | {"refused": 0}
