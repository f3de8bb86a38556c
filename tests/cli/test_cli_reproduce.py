"""``brittle reproduce``: what it prints, what it writes, and how it ends."""

import dataclasses

import pytest

from brittle.cli import run
from brittle.experiments.stored import read_table, write_table
from helpers.command_line import one_line
from helpers.experiments import lines
from helpers.grids import in_this_process


@pytest.fixture
def reproduce(monkeypatch, tmp_path):
    """Runs the command on an experiment in place of the papers'."""

    def call(*options, experiment=None):
        monkeypatch.setattr("brittle.experiments.named_experiments", lambda names: [experiment or lines()])
        monkeypatch.setattr("brittle.sweeps.on_processes", lambda tasks, workers: in_this_process(tasks))
        return run(["reproduce", "lines", "--scale", "smoke", "-o", str(tmp_path / "out"), *options])

    return call


def test_verdicts_are_printed_and_the_page_is_written(reproduce, tmp_path, capsys):
    assert reproduce() == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "3 claims: 1 reproduced, 1 opposite, 1 not testable at this scale."
    assert said[-1] == f"Report: {tmp_path / 'out' / 'report.html'}"
    assert (tmp_path / "out" / "lines" / "table.parquet").is_file()
    assert reproduce("--redraw", "--quiet") == 0
    assert capsys.readouterr().out == ""


def test_failed_jobs_end_with_3_and_the_rest_is_written(reproduce, tmp_path, capsys):
    broken = lines(smoke={"x": (1, 2, 3, 4), "seed": (0, 1, 2), "broken": 3})
    assert reproduce("--quiet", experiment=broken) == 3
    one_line(capsys, "3 jobs failed")
    assert read_table(tmp_path / "out" / "lines" / "table.parquet")[1].jobs == 12
    assert reproduce("--quiet") == 0


def test_tables_that_differ_end_with_4(reproduce, tmp_path, capsys, monkeypatch):
    assert reproduce("--quiet") == 0
    monkeypatch.setattr("brittle.experiments.reproducing.STORED", tmp_path)
    table, made = read_table(tmp_path / "out" / "lines" / "table.parquet")
    write_table(table, tmp_path / "lines.parquet", made)
    assert reproduce("--check", "--quiet") == 0
    write_table(table.assign(effect=-table["effect"]), tmp_path / "lines.parquet", made)
    assert reproduce("--check", "--quiet", "--redraw") == 4
    one_line(capsys, "check: ", "effect")


def test_the_list_needs_no_folder_and_names_every_experiment(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["reproduce", "--list"]) == 0
    listed = capsys.readouterr().out
    for part in ("fig3: ", "fig4: ", "small: ", "data mnist", "section 4.1, Figure 4"):
        assert part in listed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["name: expected all or some of fig2", "got none"]),
        (["fig99"], ["name: expected all or some of fig2", "got fig99"]),
        (["fig3", "--scale", "huge"], ["scale: expected one of smoke, small, paper for fig3", "'huge'"]),
        (["fig3", "--scale", "small"], ["root: expected the folder", "mnist"]),
        (["fig3", "--redraw", "--workers", "0"], ["workers", "0"]),
    ],
)
def test_bad_usage_is_one_line_and_writes_nothing(arguments, parts, tmp_path, capsys):
    assert run(["reproduce", *arguments, "-o", str(tmp_path / "out")]) == 2
    one_line(capsys, *parts)
    assert not (tmp_path / "out").exists()


def test_an_experiment_of_ones_own_says_how_it_is_made_again(reproduce, tmp_path):
    assert reproduce(experiment=dataclasses.replace(lines(), name="own")) == 0
    made = read_table(tmp_path / "out" / "own" / "table.parquet")[1]
    assert made.command == "brittle sweep experiments.py --scale smoke -o OUT"
