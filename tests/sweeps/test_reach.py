"""What of a file a job depends on: theory of nothing, but hours of rows hang on it."""

import pytest

from brittle.sweeps import Job

MAIN = """
import math
from helper import scale
import whole as everything

WIDTH = 3
TITLE = "a figure"


def width():
    return WIDTH


def run(*, seed):
    return {"y": scale(width()) + everything.offset + math.pi}


def figure(table):
    return TITLE, unused(table)


if __name__ == "__main__":
    print(run(seed=0))
"""
HELPER = """
FACTOR = 2


def scale(x):
    return FACTOR * x


def unused(x):
    return x
"""


@pytest.fixture
def key(tmp_path):
    """The key of the job after texts were replaced."""

    def key_of(main=("", ""), helper=("", ""), whole="offset = 1\n"):
        (tmp_path / "main.py").write_text(MAIN.replace(*main))
        (tmp_path / "helper.py").write_text(HELPER.replace(*helper))
        (tmp_path / "whole.py").write_text(whole)
        return Job(f"{tmp_path / 'main.py'}:run", {"seed": 0}).key

    return key_of


@pytest.mark.parametrize(
    "change",
    [
        {"main": ("WIDTH = 3", "WIDTH = 4")},
        {"main": ("return WIDTH", "return WIDTH + 1")},
        {"main": ("+ math.pi", "- math.pi")},
        {"main": ("WIDTH = 3", "WIDTH = 3\nmath.seed(1)")},
        {"main": ("def width", "@decorated\ndef width")},
        {"helper": ("FACTOR = 2", "FACTOR = 3")},
        {"helper": ("return FACTOR * x", "return x")},
        {"helper": ("FACTOR = 2", "if True:\n    FACTOR = 2")},
        {"whole": "offset = 2\n"},
    ],
)
def test_what_the_function_reaches_makes_another_job(key, change):
    before = key()
    assert key(**change) != before


@pytest.mark.parametrize(
    "change",
    [
        {"main": ("a figure", "a better figure")},
        {"main": ("return TITLE", "return table")},
        {"main": ("seed=0", "seed=1")},
        {"helper": ("return x\n", "return -x\n")},
    ],
)
def test_what_it_does_not_reach_leaves_the_job_as_it_is(key, change):
    before = key()
    assert key(**change) == before


def test_experiments_of_the_package_reach_what_they_share_but_not_their_figures():
    from pathlib import Path

    from brittle.experiments import dense_networks, fig2
    from brittle.sweeps.reach import reached_text

    text = reached_text(Path(fig2.__file__), "run")
    assert "def train_dense" in text
    assert "def run" in text
    assert "EXPERIMENT = " not in text
    assert Path(dense_networks.__file__).name in text
