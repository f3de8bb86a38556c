"""Errors that a user can mend."""

from __future__ import annotations


class InputError(ValueError):
    """The caller handed in something that cannot be used.

    The message names the argument, what was expected and what came. It is the one error that the command
    line turns into a single line and exit code 2; anything else is a defect of ours and keeps its traceback.
    """


class MissingExtra(InputError):
    """An optional package is needed and not installed; the message holds the command that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package}; install it with: pip install 'brittle[{extra}]'")


def first_line(error: BaseException, most: int | None = None) -> str:
    """The first line of an error's message, at most ``most`` characters of it; the error's type when it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:most]


def one_line(error: BaseException) -> str:
    """Type and message of an error that foreign code raised, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
