"""What all tests of the command line share."""

import math

import pytest


@pytest.fixture(autouse=True)
def _no_lines_now_and_then(monkeypatch):
    """Nothing about progress on standard error, however slow the machine is."""
    monkeypatch.setattr("brittle.cli.progress.SECONDS", math.inf)
