"""The command line."""

from brittle.cli.commands import app, main, run

__all__ = ["app", "main", "run"]
