"""The command line where things go wrong around it: full disks, hostile names, interrupts that get lost, pipes."""

import errno
import os
import pathlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from brittle.cli.commands import run
from brittle.models.build import fcn
from brittle.reporting.page import report_html
from brittle.results import Audit
from brittle.results.wording import printable
from helpers import audits, processes
from helpers.command_line import one_line

HOSTILE = "\x1b[2J\x1b]0;owned\x07\rfake\u202egnp\u2028line"


@pytest.fixture
def arguments(tmp_path):
    torch.manual_seed(0)
    save_file(fcn(64, 8, 2, 10).state_dict(), tmp_path / "net.safetensors")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).random((8, 64)), y=np.arange(8))
    out = str(tmp_path / "out")
    return [
        "audit", str(tmp_path / "net.safetensors"), "--arch", "fcn", "--data", f"npz:{tmp_path / 'data.npz'}",
        "--steps", "2", "--p", "2", "-o", out, "-q",
    ]  # fmt: skip


@pytest.mark.parametrize("full", ["report.html", "samples.parquet"])
def test_a_full_disk_leaves_no_result_and_the_same_command_ends_well(arguments, tmp_path, monkeypatch, capsys, full):
    import pandas as pd

    real = pathlib.Path.write_text, pd.DataFrame.to_parquet

    def guarded(place, path):
        if f".{full}." in str(path):
            with open(path, "wb") as file:
                file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real[place]

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "write_text", lambda path, *a, **b: guarded(0, path)(path, *a, **b))
        patch.setattr(pd.DataFrame, "to_parquet", lambda frame, path, **b: guarded(1, path)(frame, path, **b))
        assert run(arguments) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["parts"]
    assert run(arguments) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "audit.json",
        "report.html",
        "samples.parquet",
    ]


def test_a_replaced_audit_stays_whole_where_the_disk_is_full(arguments, tmp_path, monkeypatch):
    assert run(arguments) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(pathlib.Path, "write_text", fail)
    assert run([*arguments, "--overwrite", "--seed", "1"]) == 1
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert after == before


def test_printable_leaves_what_people_write_and_writes_out_what_acts():
    for text in ("a b", "ä é 8/255 ℓ∞ × 10⁻³", "100\xa0%", "层.conv1", "🙂"):
        assert printable(text) == text
    assert printable(HOSTILE).isprintable()
    assert printable(HOSTILE) == r"\x1b[2J\x1b]0;owned\x07\rfake\u202egnp\u2028line"


@pytest.mark.parametrize(
    "arguments", [["audit", HOSTILE], ["report", HOSTILE], ["train", "--data", HOSTILE], [HOSTILE]]
)
def test_names_in_errors_do_not_act_on_the_terminal(arguments, capsys):
    assert run(arguments) == 2
    one_line(capsys)


@pytest.mark.parametrize("processes", [0, -1, 10**9, 10**30])
def test_absurd_numbers_of_processes_are_refused(processes, capsys):
    assert run(["train", "--data", "digits", "--processes", str(processes)]) == 2
    one_line(capsys, "processes: expected an integer from 1 to 1024")


@pytest.mark.skipif(os.name != "posix", reason="other systems refuse such names")
def test_names_in_results_do_not_act_on_the_terminal(arguments, tmp_path, capsys):
    hostile = tmp_path / f"net{HOSTILE}.safetensors"
    (tmp_path / "net.safetensors").rename(hostile)
    arguments = [str(hostile) if part.endswith("net.safetensors") else part for part in arguments if part != "-q"]
    assert run([*arguments[:-1], f"{arguments[-1]}{HOSTILE}"]) == 0
    printed = capsys.readouterr()
    assert all(line.isprintable() for line in (printed.out + printed.err).split("\n"))


def test_names_do_not_act_in_the_report():
    layer = audits.layer(HOSTILE)
    verdict = audits.replace(audits.full().verdict, headline=f"Fragile {HOSTILE}", findings=(HOSTILE,))
    audit = audits.replace(audits.full(), model=HOSTILE, layers=(layer,), verdict=verdict)
    page = report_html(audit)
    assert not set("\x1b\x07\r\u202e\u2028") & set(page)
    assert printable(HOSTILE) in page
    assert Audit.from_json(audit.to_json()) == audit


LOSING = """
import os, signal, sys, time
from brittle.cli import commands

class Foreign:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(1000))  # the interrupt comes in here, where nothing can be raised

def work(arguments):
    try:
        Foreign()
        for _ in range(1000):
            time.sleep(0.02)
        return 0
    except KeyboardInterrupt:
        return 130

commands.run = work
commands.main([])
"""


def test_an_interrupt_that_is_lost_in_a_finaliser_comes_again():
    done = processes.run("-c", LOSING, seconds=60)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_pipes_are_refused_everywhere(arguments, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    pipe = str(tmp_path / "pipe")
    assert run(["audit", pipe, *arguments[2:]]) == 2
    assert run([*arguments[:-2], pipe]) == 2
    assert run(["report", pipe]) == 2
    assert run([part if not part.startswith("npz:") else f"npz:{pipe}" for part in arguments]) == 2
    assert run(["train", "--data", "digits", "--fine-tune", pipe, "-o", str(tmp_path / "run")]) == 2
    assert "Traceback" not in capsys.readouterr().err
