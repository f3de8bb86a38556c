"""What the command line says, as a test reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from brittle.cli.commands import app


def commands() -> dict[str, Any]:
    """Every command as typer makes it, by its name; those of groups as ``GROUP COMMAND``."""

    def below(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from below(command, f"{before}{name} ")
            else:
                yield f"{before}{name}", command

    return dict(below(typer.main.get_command(app)))


def one_line(capsys, *parts: str) -> None:
    """Standard error is one line that holds every part; standard output is empty."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("brittle: ")
    assert "Traceback" not in captured.err
    for part in parts:
        assert part in captured.err
