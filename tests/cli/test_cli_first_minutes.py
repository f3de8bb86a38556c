"""What whoever begins meets: no arguments, near misses, results that are already there, and shells that complete."""

import math

import pytest
import torch
from safetensors.torch import save_file

from brittle.cli import values
from brittle.cli.commands import run
from brittle.errors import InputError
from brittle.evaluation import Threat
from brittle.models.build import fcn
from helpers import processes
from helpers.command_line import one_line


@pytest.mark.parametrize(
    ("entries", "budgets"),
    [
        (["8/255"], {math.inf: 8 / 255, 2.0: 8 / 255}),
        (["inf=8/255", "2=1/2"], {math.inf: 8 / 255, 2.0: 0.5}),
        (["inf=0.03"], {math.inf: 0.03}),
    ],
)
def test_budgets_may_be_fractions(entries, budgets):
    assert values.budgets(entries) == budgets


@pytest.mark.parametrize("entry", ["8/0", "8/", "/255", "8/255/2", "-8/255"])
def test_what_is_no_fraction_is_refused(entry):
    with pytest.raises(InputError, match="eps"):
        values.budgets([entry])


def test_auto_is_a_gpu_where_there_is_one():
    assert values.devices("auto") == ("cuda" if torch.cuda.is_available() else "cpu",)


def test_a_device_without_double_precision_is_refused_with_the_reason():
    with pytest.raises(InputError, match=r"mps.*double precision"):
        values.device("mps")


def test_autoattack_is_another_name_of_standard():
    assert Threat("autoattack", restarts=2) == Threat("standard", restarts=2)


def test_no_arguments_show_the_help(capsys):
    assert run([]) == 0
    captured = capsys.readouterr()
    assert "Usage: brittle" in captured.out
    assert captured.err == ""


def test_the_package_itself_is_the_program():
    assert processes.run("-m", "brittle", "--version").stdout.startswith("brittle ")


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "run" / "weights.safetensors"
    path.parent.mkdir()
    save_file(fcn(64, 4, 2, 10).state_dict(), path)
    return path


def test_a_network_of_a_library_is_suggested_in_its_form(weights, capsys):
    assert run(["audit", str(weights), "--arch", "resnet18"]) == 2
    one_line(capsys, "did you mean torchvision:resnet18 or timm:resnet18?")


def test_a_file_of_a_run_suggests_the_folder(weights, capsys):
    assert run(["audit", str(weights), "--data", "digits"]) == 2
    assert "give the folder" not in capsys.readouterr().err
    (weights.parent / "config.json").write_text("{}")
    assert run(["audit", str(weights)]) == 2
    one_line(capsys, f"give the folder: {weights.parent}")


def test_results_that_are_there_come_with_a_free_folder(weights, tmp_path, capsys):
    arguments = ["audit", str(weights), "--arch", "fcn", "-q"]
    for folder in ("out", "out-2"):
        (tmp_path / folder).mkdir()
    (tmp_path / "out" / "audit.json").write_text("{}")
    assert run([*arguments, "-o", str(tmp_path / "out")]) == 2
    one_line(capsys, f"-o {tmp_path / 'out-3'}", "--overwrite")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("brittle audit --preset a", ["autoattack"]),
        ("brittle train --penalty nuc", ["nuclear_norm="]),
        ("brittle train --arch res", ["resnet18-cifar"]),
        ("brittle reproduce fig7", ["fig7_adversarial", "fig7_universal", "fig7_transfer"]),
        ("brittle exp", ["export"]),
    ],
)
def test_the_shell_completes_without_torch(typed, offered):
    code = "import sys; from brittle.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    asked = {"_BRITTLE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    assert processes.run("-c", code, env=asked).stdout.split() == offered


def test_what_batch_systems_send_ends_as_control_c_does(weights, tmp_path):
    (tmp_path / "mine.py").write_text("import os, signal\ndef build(): os.kill(os.getpid(), signal.SIGTERM)\n")
    ended = processes.run("-m", "brittle", "audit", weights, "--arch", "mine:build", cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (143, "")
    assert ended.stderr.startswith("brittle: interrupted; nothing was half-written")
    assert ended.stderr.count("\n") == 1


def test_the_summary_says_what_another_name_of_a_preset_runs(weights, tmp_path, capsys):
    arguments = [
        "attack",
        str(weights),
        "--arch",
        "fcn",
        "--data",
        "digits",
        "--limit",
        "4",
        "--steps",
        "1",
        "--p",
        "2",
    ]
    assert run([*arguments, "--preset", "autoattack", "-o", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("Preset autoattack is standard. It runs AutoAttack's attacks, but")
