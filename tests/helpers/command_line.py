"""What the command line says, as a test reads it."""

from __future__ import annotations


def one_line(capsys, *parts: str) -> None:
    """Standard error is one line that holds every part; standard output is empty."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("brittle: ")
    assert "Traceback" not in captured.err
    for part in parts:
        assert part in captured.err
