"""What an experiment asks of its jobs, and what a file that defines one has to be."""

import dataclasses
import shutil

import numpy as np
import pytest

from brittle.errors import InputError
from brittle.experiments import EXPERIMENTS, load_experiment, named_experiments, overview
from helpers.experiments import lines, run


def test_a_grid_is_all_combinations_of_its_axes_and_several_grids_follow_each_other():
    product = lines(smoke={"x": (1, 2), "seed": (0, 1), "broken": 7}).settings("smoke")
    assert [(s["x"], s["seed"], s["broken"]) for s in product] == [(1, 0, 7), (1, 1, 7), (2, 0, 7), (2, 1, 7)]
    listed = lines(smoke=[{"x": (1, 2), "seed": 0}, {"x": 3, "seed": (5, 6)}])
    assert [(s["x"], s["seed"]) for s in listed.settings("smoke")] == [(1, 0), (2, 0), (3, 5), (3, 6)]
    assert listed.axes == ("x",)


@pytest.mark.parametrize(
    ("grids", "part"),
    [
        ({"large": {"x": 1, "seed": 0}}, "scales among smoke, small, paper; got large"),
        ({"smoke": {"x": 1}}, "settings that run takes.*seed"),
        ({"smoke": {"x": 1, "seed": 0, "z": 1}}, "settings that run takes.*z"),
        ({"smoke": {"x": (), "seed": 0}}, "got x = "),
        ({"smoke": {"x": [[1, 2]], "seed": 0}}, "got x = "),
    ],
)
def test_grids_that_do_not_fit_are_refused(grids, part):
    with pytest.raises(InputError, match=part):
        lines(**grids)


def test_a_scale_that_is_not_there_is_named():
    with pytest.raises(InputError, match="scale: expected one of smoke for lines; got 'paper'"):
        lines().settings("paper")


def read(*, data: str, seed: int, data_root: str | None = None) -> dict[str, object]:
    return {"seed": seed}


def test_jobs_follow_the_content_of_their_data_and_not_where_it_is(tmp_path):
    def write(folder, value):
        folder.mkdir(exist_ok=True)
        x = np.full((4, 3), value, dtype=np.uint8)
        np.savez(folder / "small.npz", x=x, y=np.array([0, 1, 0, 1]), classes=2)

    base = lines(smoke={"x": 1, "seed": 0})
    reading = dataclasses.replace(base, run=read, claims=(), grids={"smoke": {"data": "npz:small.npz", "seed": 0}})
    here, there = tmp_path / "here", tmp_path / "there"
    write(here, 1)
    shutil.copytree(here, there)
    (first,), (second,) = reading.jobs("smoke", here), reading.jobs("smoke", there)
    assert reading.data("smoke") == ("npz:small.npz",)
    assert first.key == second.key
    assert first.places != second.places
    write(there, 2)
    assert reading.jobs("smoke", there)[0].key != first.key
    with pytest.raises(InputError, match="small"):
        reading.jobs("smoke", tmp_path)


def test_jobs_that_read_no_data_need_none():
    (job, *_) = lines().jobs("smoke")
    assert job.function == "helpers.experiments:run"
    assert dict(job.places) == {}
    assert run(**job.settings)["effect"] == 2.0


# --- files and names ----------------------------------------------------------------------------------------


FILE = """
from brittle.experiments import Experiment
from matplotlib.figure import Figure

def run(*, x, seed):
    return {"y": x + seed}

def figure(table):
    return Figure()

EXPERIMENT = Experiment("own", "Mine", "here", run, figure, {"small": {"x": (1, 2), "seed": (0, 1)}})
"""


def test_an_experiment_is_read_from_a_file_and_its_jobs_name_that_file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(FILE)
    experiment = load_experiment(path)
    jobs = experiment.jobs("small")
    assert [job.function for job in jobs] == [f"{path}:run"] * 4
    assert len({job.key for job in jobs}) == 4


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (None, "no file"),
        ("x = 1", "NoneType"),
        ("EXPERIMENT = 3", "int"),
        ("1 / 0", "ZeroDivisionError"),
        ("(", "Syntax"),
    ],
)
def test_files_that_define_no_experiment_are_refused(text, part, tmp_path):
    path = tmp_path / "own.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=rf"own.py: expected a file of Python that defines EXPERIMENT.*{part}"):
        load_experiment(path)


def test_experiments_of_the_papers_go_by_their_names():
    experiments = named_experiments(["all"])
    assert tuple(experiment.name for experiment in experiments) == EXPERIMENTS
    assert [e.name for e in named_experiments(["fig4", "fig4"])] == ["fig4"]
    for names in ([], ["fig99"]):
        with pytest.raises(InputError, match="name: expected all or some of fig2"):
            named_experiments(names)


def test_the_overview_tells_claims_jobs_and_data_of_every_scale():
    text = "\n".join(overview(named_experiments(["all"])))
    for experiment in named_experiments(["all"]):
        for scale in ("smoke", "small", "paper"):
            jobs = len(experiment.settings(scale))
            assert f"{scale}: {jobs} jobs" in text
        for claim in experiment.claims:
            assert claim.sentence in text
    assert "smoke: 2 jobs, " in text
    assert "data mnist" in text
