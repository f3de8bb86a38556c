"""What is written is whole or absent, and what a killed process left goes with the next."""

import os
import signal

import pytest

from brittle.storage.files import replacing, write_text
from helpers.processes import start

WRITER = """
import sys, time
from pathlib import Path
from brittle.storage.files import replacing

with replacing(Path(sys.argv[1])) as beside:
    beside.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="locks are those of POSIX")
def test_what_a_killed_process_left_goes_with_the_next_and_what_a_living_one_writes_stays(tmp_path):
    path = tmp_path / "audit.json"
    other = tmp_path / ".audit.json.notes.txt"
    other.write_text("not ours")
    with (
        start("-c", WRITER, path, stdout=-1, text=True) as dead,
        start("-c", WRITER, path, stdout=-1, text=True) as live,
    ):
        for process in (dead, live):
            assert process.stdout.readline() == "writing\n"
        assert len(names(tmp_path)) == 3
        dead.send_signal(signal.SIGKILL)
        dead.wait(10)
        write_text(path, "whole")
        assert len(names(tmp_path)) == 3  # the living one's, audit.json, and what is not ours
    write_text(path, "whole again")
    assert names(tmp_path) == [".audit.json.notes.txt", "audit.json"]
    assert path.read_text() == "whole again"


def test_two_writers_of_one_file_in_one_process_do_not_take_each_others_for_abandoned(tmp_path):
    path = tmp_path / "a.txt"
    with replacing(path) as first:
        first.write_text("first")
        write_text(path, "second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert names(tmp_path) == ["a.txt"]


def test_a_failure_leaves_what_was_there(tmp_path):
    write_text(tmp_path / "a.txt", "before")

    def fail():
        with replacing(tmp_path / "a.txt") as beside:
            beside.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "before"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_or_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="expected a file or nothing there"):
        write_text(tmp_path / "pipe", "text")
    assert names(tmp_path) == ["pipe"]
