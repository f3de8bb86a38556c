"""Writing to disk in a process that is killed at any of its file operations."""

import contextlib
import os
import pathlib
import tempfile

import pytest
import safetensors.torch


class Killed(BaseException):
    """The process is gone: no clean-up runs after it either."""


class Killer:
    """Lets ``left`` file operations happen; the next is done by half or not at all, and nothing after it."""

    def __init__(self, monkeypatch, left):
        self.left, self.dead = left, False
        for owner, name in (
            (os, "replace"),
            (pathlib.Path, "unlink"),
            (pathlib.Path, "chmod"),
            (pathlib.Path, "mkdir"),
            (tempfile, "mkstemp"),
        ):
            monkeypatch.setattr(owner, name, self.guarded(getattr(owner, name)))
        for owner, name, torn in (
            (pathlib.Path, "write_text", lambda path, text, **_: path.write_bytes(text.encode()[: len(text) // 2])),
            (safetensors.torch, "save_file", lambda tensors, path, **_: pathlib.Path(path).write_bytes(b"\x40\0\0\0")),
        ):
            monkeypatch.setattr(owner, name, self.guarded(getattr(owner, name), torn))

    def guarded(self, real, torn=lambda *_, **__: None):
        def operation(*arguments, **options):
            if self.dead:
                raise Killed
            if self.left == 0:
                self.dead = True
                torn(*arguments, **options)
                raise Killed
            self.left -= 1
            return real(*arguments, **options)

        return operation


def at_every_operation(act, stride=1, limit=400):
    """Call ``act`` with a kill at file operation 0, ``stride``, 2 ``stride`` ... until one call comes through alive."""
    for left in range(0, limit, stride):
        with pytest.MonkeyPatch.context() as patch:
            killer = Killer(patch, left)
            with contextlib.suppress(Killed):
                act()
        yield left
        if not killer.dead:
            return
    pytest.fail("never came through")
