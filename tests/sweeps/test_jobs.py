"""A job is known by its function, its settings, its data and its code."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from brittle.errors import InputError
from brittle.sweeps import Job, name_of, read_module
from brittle.sweeps.work import perform, plain_row
from helpers import grids

SOURCE = "def run(*, rank):\n    return {'twice': 2 * rank}\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def test_the_key_is_the_same_wherever_the_file_lies_and_in_whatever_order_settings_stand(file, tmp_path):
    other = tmp_path / "elsewhere.py"
    other.write_text(SOURCE)
    job = Job(f"{file}:run", {"rank": 3, "seed": 0}, "digits", {"root": "/data"})
    again = Job(f"{other}:run", {"seed": 0, "rank": 3}, "digits", {"root": "/elsewhere"})
    assert job.key == again.key
    assert len(job.key) == 16
    int(job.key, 16)


def test_other_settings_data_function_or_code_give_another_key(file):
    def job(**changes):
        return Job(**{"function": f"{file}:run", "settings": {"rank": 3}, "data": "digits"} | changes)

    keys = [job(), job(settings={"rank": 4}), job(settings={"rank": 3.0}), job(settings={"rank": 3, "seed": None})]
    keys += [job(data="mnist"), job(function=f"{file}:walk")]
    keys = [each.key for each in keys]
    file.write_text(SOURCE.replace("2 *", "3 *"))
    keys.append(job().key)
    assert len(set(keys)) == len(keys)


def test_another_version_of_brittle_gives_another_key(file, monkeypatch):
    before = Job(f"{file}:run", {"rank": 3}).key
    monkeypatch.setattr("brittle.sweeps.job.__version__", "another")
    assert Job(f"{file}:run", {"rank": 3}).key != before


def test_a_worker_runs_the_text_that_the_key_was_made_of(file):
    job = Job(f"{file}:run", {"rank": 3})
    assert job.key
    file.write_text(SOURCE.replace("2 *", "3 *"))
    assert perform(job.code, job.settings)["row"] == {"twice": 6}
    assert perform(replace(job).code, job.settings)["row"] == {"twice": 9}


def test_a_function_is_named_by_its_module_or_else_by_its_file(file):
    assert name_of(grids.add) == "helpers.grids:add"
    assert name_of(read_module(str(file), SOURCE).run) == f"{file}:run"
    with pytest.raises(InputError, match=r"^function: expected one at the top of a file; got .*<lambda>"):
        name_of(lambda: {})


@pytest.mark.parametrize("function", ["run", "no.such.module:run", "no/such/file.py:run", "sys:exit", "helpers.grids:"])
def test_code_that_cannot_be_found_is_named(function):
    with pytest.raises(InputError, match=r"^function: expected package.module:name or path/to/file.py:name; got '"):
        _ = Job(function, {}).key


def test_settings_that_are_no_plain_values_are_refused():
    with pytest.raises(InputError, match=r"^settings: expected numbers, .*; got .*set"):
        _ = Job("helpers.grids:add", {"a": {1}}).key


def test_rows_hold_plain_values_exactly():
    row = {"x": 0.1 + 0.2, "n": 2**60, "name": "ß", "none": None, "yes": True, "list": [1.5, [2]]}
    assert plain_row(row) == row
    made = plain_row({"a": torch.tensor([1.5, 2.5]), "b": np.float64(0.1), "c": torch.tensor(3), "inf": math.inf})
    assert made == {"a": [1.5, 2.5], "b": 0.1, "c": 3, "inf": math.inf}
    assert math.isnan(plain_row({"x": math.nan})["x"])


@pytest.mark.parametrize("row", [None, [1], {1: 2}, {"a": {1, 2}}, {"a": object()}])
def test_a_row_of_other_things_fails_its_job(row, tmp_path):
    with pytest.raises(InputError, match=r"^row: expected "):
        plain_row(row)


def test_a_job_that_raises_or_leaves_says_how(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("import sys\ndef leave():\n    sys.exit(3)\ndef fail():\n    raise OSError('no\\nfile')\n")
    assert perform(Job(f"{path}:leave", {}).code, {})["error"] == "SystemExit: 3"
    failed = perform(Job(f"{path}:fail", {}).code, {})
    assert failed["error"] == "OSError: no file"
    assert f'File "{path}", line 5, in fail' in failed["trace"]
    assert perform(Job(f"{path}:none", {}).code, {})["error"].startswith(
        "InputError: function: expected a function none"
    )
