"""Benchmarks are run by hand, long after the code has moved on: at least what they import has to be there."""

import runpy
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).parent.parent / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_finds_what_it_imports(path, monkeypatch):
    monkeypatch.syspath_prepend(str(path.parent))  # as running it does
    monkeypatch.syspath_prepend(str(path.parent.parent / "tests"))
    monkeypatch.syspath_prepend(str(path.parent))  # as for whoever runs the script
    assert callable(runpy.run_path(str(path), run_name="imported")["main"])
