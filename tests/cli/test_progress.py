"""Off a terminal: a plain line now and then, and what a resumed command says."""

import pytest

from brittle.cli.commands import run
from brittle.cli.progress import stage_lines
from brittle.evaluation import run as running


class Clock:
    """A clock that a test sets."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def told():
    return []


def test_lines_are_half_a_minute_apart(clock, told):
    progress = stage_lines(told.append, 30.0, clock)
    for clock.now in range(100):
        progress("attack", clock.now, 1000)
    assert told == [
        "attack: 30 of 1,000 (30.0 s so far)",
        "attack: 60 of 1,000 (1 min 0 s so far)",
        "attack: 90 of 1,000 (1 min 30 s so far)",
    ]


def test_quick_work_says_nothing(clock, told):
    progress = stage_lines(told.append, 30.0, clock)
    for clock.now, stage in enumerate(("layers", "bounds", "attack")):
        progress(stage, 0, 1)
        progress(stage, 1, 1)
    assert told == []


def test_the_end_of_a_long_stage_is_told_once(clock, told):
    progress = stage_lines(told.append, 30.0, clock)
    progress("bounds", 0, 1)
    clock.now = 29.0
    progress("layers", 0, None)
    clock.now = 31.0
    progress("layers", 5, None)
    progress("bounds", 1, 1)
    progress("bounds", 1, 1)
    assert told == ["layers: 5 (31.0 s so far)", "bounds: 1 of 1 (31.0 s so far)"]


def test_a_resumed_command_says_what_was_done_before(tmp_path, monkeypatch, capsys):
    train = ["train", "--data", "digits", "--limit", "60", "--width", "6", "--epochs", "1", "--measure-every", "0"]
    assert run([*train, "-q", "-o", str(tmp_path / "run")]) == 0
    attack = ["attack", str(tmp_path / "run"), "--limit", "48", "--preset", "fast", "--steps", "2", "--batch-size", "4"]
    real, begun = running.worst_case, []

    def interrupted(*arguments, **options):
        begun.append(options["ids"])
        if len(begun) == 4:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(running, "worst_case", interrupted)
    assert run([*attack, "-o", str(tmp_path / "out")]) == 130
    assert "resumes with" not in capsys.readouterr().err
    assert run([*attack, "-o", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == "brittle: resumes with 3 of 6 parts done\n"
