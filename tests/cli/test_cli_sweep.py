"""``brittle sweep``: a person's own experiment, told apart from its status, and how it ends."""

import io
import itertools
import math
import re

import pandas as pd
import pytest
from rich.console import Console

from brittle.cli import run
from brittle.cli.progress import stage_bars
from brittle.cli.sweep_options import Workers, lasting, status_lines
from brittle.errors import InputError
from brittle.sweeps import SweepStatus
from helpers.command_line import one_line
from helpers.grids import in_this_process
from helpers.processes import TESTS

FILE = """
from pathlib import Path
from matplotlib.figure import Figure
from brittle.experiments import Claim, Experiment, over_seeds, slope

def run(*, x, seed):
    if Path(__file__).with_name(f"fail-{x}").exists():
        raise ValueError(f"no {x}")
    return {"y": 2 * x + seed % 2}

def figure(table):
    return Figure()

EXPERIMENT = Experiment(
    name="mine", title="Mine", source="nowhere", run=run, figure=figure,
    grids={"small": {"x": (1, 2, 3), "seed": (0, 1)}},
    claims=(Claim("y rises.", place="line 1", statistic=over_seeds(slope("y", "x")), at_least=1.0),),
)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def at_once(monkeypatch):
    """Jobs are done in this process, which has imported already what they need."""
    monkeypatch.setattr("brittle.sweeps.on_processes", lambda tasks, workers: in_this_process(tasks))


@pytest.mark.usefixtures("at_once")
def test_an_experiment_of_ones_own_is_run_judged_and_shown(file, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "fail-2").touch()
    assert run(["sweep", str(file), "-o", str(out), "--retries", "0", "-q"]) == 3
    one_line(capsys, "2 jobs failed")
    assert run(["sweep", "status", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{out / 'mine'}: 4 done, 0 running, 2 failed, 0 waiting; nobody at work"
    assert said[1:] == [f"  failed: x=2 seed={seed}: ValueError: no 2" for seed in (0, 1)]
    (tmp_path / "fail-2").unlink()
    assert run(["sweep", str(file), "-o", str(out)]) == 0
    assert "1 reproduced" in capsys.readouterr().out
    table = pd.read_parquet(out / "mine" / "table.parquet")
    assert list(table["y"]) == [2, 3, 4, 5, 6, 7]
    assert run(["sweep", "status", "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"{out / 'mine'}: 6 done, 0 running, 0 failed, 0 waiting; all done\n"


def test_ctrl_c_leaves_what_has_landed_and_says_that_it_goes_on(file, tmp_path, capsys, monkeypatch):
    def interrupted(tasks, workers):
        yield from in_this_process(itertools.islice(tasks, 4))
        raise KeyboardInterrupt

    monkeypatch.setattr("brittle.sweeps.on_processes", interrupted)
    out = tmp_path / "out"
    assert run(["sweep", str(file), "-o", str(out)]) == 130
    one_line(capsys, "interrupted; nothing was half-written, run the same command again", "a sweep resumes")
    assert [path.name for path in out.iterdir()] == ["mine"]
    assert not (out / "mine" / "table.parquet").exists()
    assert run(["sweep", "status", str(out)]) == 0
    assert capsys.readouterr().out.endswith("4 done, 0 running, 0 failed, 2 waiting; nobody at work\n")


@pytest.mark.usefixtures("at_once")
def test_rows_are_kept_where_the_option_says(file, tmp_path):
    out, store = tmp_path / "out", tmp_path / "store"
    assert run(["sweep", str(file), "-o", str(out), "--store", str(store), "-q"]) == 0
    assert len(list(store.glob("jobs/*/row.json"))) == 6
    assert [path.name for path in (out / "mine").iterdir() if path.is_dir()] == []
    assert len(pd.read_parquet(out / "mine" / "table.parquet")) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py"], "expected a file of Python that defines EXPERIMENT"),
        (["mine.py", "out"], "file: expected one file, or status and a folder; got mine.py and out"),
        (["mine.py", "--scale", "paper"], "scale: expected one of small for mine; got 'paper'"),
        (["mine.py", "--gpus-per-job", "1"], "gpus-per-job: expected --ray ADDRESS beside it; got none"),
        (["mine.py", "--store", "nosuch://x"], "store: expected a folder or a URL; got 'nosuch://x'"),
        (["status", "nowhere"], "sweep: expected the folder of a sweep; got nowhere"),
    ],
)
def test_what_cannot_be_run_is_said_in_a_line(file, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(["sweep", *arguments]) == 2
    one_line(capsys, message)


@pytest.mark.usefixtures("at_once")
def test_the_example_of_the_page_runs(tmp_path, capsys):
    page = (TESTS.parent / "docs" / "sweeps.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len([line for line in source.splitlines() if line.strip()]) <= 30
    (tmp_path / "ranks.py").write_text(source)
    assert run(["sweep", str(tmp_path / "ranks.py"), "--scale", "smoke", "-o", str(tmp_path / "swept"), "-q"]) == 0
    table = pd.read_parquet(tmp_path / "swept" / "ranks" / "table.parquet")
    assert list(table["rank"]) == [2, 64]
    assert table["clean"].between(0, 1).all()


def test_a_status_in_words():
    running = ({"rank": 4, "seed": 0}, {"rank": 8, "seed": 1})
    status = SweepStatus("out", 5, running, (({"rank": 2}, "ValueError: no"),), 3, 1, 150.0)
    assert list(status_lines(status)) == [
        "out: 5 done, 2 running, 1 failed, 3 waiting; about 2 min left",
        "  running: rank=4 seed=0",
        "  running: rank=8 seed=1",
        "  failed: rank=2: ValueError: no",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (119, "119 s"), (121, "2 min"), (7200, "2 h"), (200000, "2 days")]
)
def test_times_are_told_in_a_unit_that_suits_them(seconds, words):
    assert lasting(seconds) == words


def test_the_bar_tells_time_left_of_jobs_that_take_minutes(monkeypatch):
    now, shown = [0.0], []
    terminal = Console(file=io.StringIO(), force_terminal=True, width=200, get_time=lambda: now[0])
    monkeypatch.setattr("rich.console.Console", lambda stderr: terminal)
    monkeypatch.setattr("rich.progress.Progress.refresh", lambda bars: shown.append(bars))
    with stage_bars(quiet=False, window=math.inf) as progress:
        progress("jobs", 50, 100)  # done before: they say nothing of the time that others take
        for done in range(51, 56):
            now[0] += 40.0
            progress("jobs", done, 100)
        (task,) = shown[-1].tasks
        assert task.time_remaining == pytest.approx(45 * 40)
        progress("jobs", 55, 100)
        assert task.fields["rate"] == "1.5/min"


def test_a_share_of_a_cluster_is_passed_on():
    executor = Workers(workers=3, ray="auto", gpus_per_job=0.5).executor()
    assert executor.keywords == {"address": "auto", "workers": 3, "gpus": 0.5}
    with pytest.raises(InputError, match=r"^cpus-per-job: "):
        Workers(cpus_per_job=2.0).executor()
