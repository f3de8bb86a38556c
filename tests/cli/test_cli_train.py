"""``brittle train`` as a user meets it, and its folder handed to ``brittle audit`` and ``brittle attack``."""

import json
import math
import os
import pathlib
import re
import shlex
import signal
import sys
from subprocess import DEVNULL, PIPE

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

import brittle
from brittle.cli.commands import run
from brittle.data.load import load_data
from brittle.results import AttackResult, Audit
from brittle.training import Adversary, Interventions, Recipe, loop
from brittle.training.runs import CONFIG, load_run, run_config
from helpers.command_line import one_line
from helpers.processes import finish, read_all, start, wait_until
from helpers.trainings import contents

DOCS = pathlib.Path(__file__).parents[2] / "docs"
FIXED = ("--data", "digits", "--limit", "120", "--batch-size", "32", "--width", "12", "--epochs", "2")
FILES = ["config.json", "history.csv", "history.parquet", "layers.csv", "layers.parquet", "weights.safetensors"]


@pytest.fixture
def train(tmp_path):
    """Run ``brittle train`` on a small FCN into ``tmp_path / "run"`` with further arguments."""
    return lambda *arguments: run(["train", *FIXED, "-o", str(tmp_path / "run"), *arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with pairs, to be read only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run(["train", *FIXED, "--rank", "6", "-q", "-o", str(folder)]) == 0
    return folder


def commands(page):
    """The commands of a page's first shell block."""
    block = re.search(r"```sh\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)[1]
    return [shlex.split(line)[1:] for line in block.replace("\\\n", " ").splitlines() if line.startswith("brittle ")]


def test_the_commands_of_the_page_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = commands("training.md")
    assert [command[0] for command in found] == ["train", "audit"]
    for command in found:
        assert run(command) == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == FILES
    audit = Audit.load(tmp_path / "brittle-audit" / "audit.json")
    assert audit.clean_accuracy.hits > 0.8 * audit.clean_accuracy.n > 0
    assert capsys.readouterr().err == ""


def test_it_writes_what_it_says(train, tmp_path, capsys):
    assert train() == 0
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    history = pd.read_csv(folder / "history.csv")
    best = history.sort_values(["validation_accuracy", "validation_loss"], ascending=[False, True]).iloc[0]
    printed = capsys.readouterr()
    assert printed.err == ""
    assert f"Epoch {int(best.epoch)} of 2 selected" in printed.out
    assert f"training {best.accuracy:.2%}, validation {best.validation_accuracy:.2%}" in printed.out
    assert f"brittle audit {folder}" in printed.out


def test_quiet_is_silent(train, tmp_path, capsys):
    assert train("-q") == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_every_option_reaches_the_recipe(train, tmp_path):
    options = (
        "--epochs 3 --batch-size 24 --optimizer sgd --lr 0.2 --weight-decay 0.003 --momentum 0.7 --schedule step "
        "--penalty nuclear-norm=0.003 --penalty l1=1e-5 --refresh 4 --constraint spectral_cap=2 --frobenius initial "
        "--layers model.1 --adversarial 2=0.3 --attack-steps 2 --adversarial-ratio 0.25 --universal --crop 1 --flip "
        "--validation 0.2 --patience 5 --select last --measure-every 2 --seed 7"
    )
    assert train(*options.split()) == 0
    config = run_config(tmp_path / "run")
    expected = Recipe(
        epochs=3,
        batch_size=24,
        optimizer="sgd",
        lr=0.2,
        weight_decay=0.003,
        momentum=0.7,
        schedule="step",
        penalties={"nuclear_norm": 0.003, "l1": 1e-5},
        refresh=4,
        constraints={"spectral_cap": 2.0, "frobenius": None},
        layers=("model.1",),
        adversary=Adversary(0.3, 2.0, 2, ratio=0.25, universal=True),
        crop=1,
        flip=True,
        validation=0.2,
        patience=5,
        select="last",
        measure_every=2,
        seed=7,
    )
    assert config.recipe.differences(expected) == []
    assert (config.data, config.limit, config.arguments["width"]) == ("digits", 120, 12)


def test_the_defaults_are_those_of_the_recipe(tmp_path):
    fixed = ["train", "--data", "digits", "--limit", "60", "--epochs", "1", "--width", "4", "-q"]
    assert run([*fixed, "-o", str(tmp_path)]) == 0
    found = run_config(tmp_path)
    assert found.recipe.differences(Recipe(epochs=1)) == []
    assert found.arch == "fcn"
    assert (found.mean, found.std) == ((0.3049,), (0.3758,))


def test_the_options_that_shape_the_network(train, tmp_path):
    arguments = ("--depth", "4", "--rank", "3", "--mean", "0.1", "--std", "0.9", "--arch-arg", "bias=true")
    assert train(*arguments, "--frobenius", "1.5") == 0
    network, config = load_run(tmp_path / "run")
    assert (config.mean, config.std) == ((0.1,), (0.9,))
    assert config.arguments["depth"] == 4
    assert len(config.ranks) == 3  # not the head
    for name, rank in config.ranks.items():
        first, second = network.get_submodule(name)
        assert (rank, first.out_features, second.out_features) == (3, 3, 12)
        assert float((second.weight @ first.weight).detach().norm()) == pytest.approx(1.5, rel=1e-5)


def test_fine_tuning_from_a_run_and_from_a_file(finished, train, tmp_path):
    """With a learning rate of almost nothing the weights stay."""
    start = load_file(finished / "weights.safetensors")
    frozen = ("--lr", "1e-30", "--weight-decay", "0", "--overwrite", "-q", "--epochs", "1")
    assert train("--fine-tune", str(finished), *frozen) == 0
    found = load_file(tmp_path / "run" / "weights.safetensors")
    assert found.keys() == start.keys()
    assert all(torch.equal(found[name], start[name]) for name in start)
    file = tmp_path / "net.safetensors"
    net = brittle.build_model("fcn", {"in_features": 64, "width": 12}, seed=9)
    brittle.save_state(net, file)
    assert train("--fine-tune", str(file), *frozen) == 0
    assert torch.equal(load_file(tmp_path / "run" / "weights.safetensors")["model.1.weight"], net[1].weight)


# A run's folder goes on


def test_audit_takes_the_folder_as_it_is(finished, tmp_path, capsys):
    before = contents(finished)
    assert run(["audit", str(finished), "--limit", "60", "--steps", "3", "-o", str(tmp_path / "a")]) == 0
    audit = Audit.load(tmp_path / "a" / "audit.json")
    network, _ = load_run(finished)
    data = load_data("digits", split="test", limit=60)
    with torch.no_grad():
        right = int((network(data.inputs).argmax(1) == data.labels).sum())
    assert {norm.evaluation.clean_correct for norm in audit.norms} == {right}
    assert {norm.p: norm.eps for norm in audit.norms} == {math.inf: 0.06, 2.0: 0.3}
    assert any(layer.name.startswith("model.") for layer in audit.layers)
    assert contents(finished) == before
    assert capsys.readouterr().err == ""


def test_attack_takes_the_folder_as_it_is(finished, tmp_path, capsys):
    arguments = ["--limit", "40", "--steps", "3", "--preset", "fast", "--p", "inf", "--eps", "0.05"]
    assert run(["attack", str(finished), *arguments, "-o", str(tmp_path / "a")]) == 0
    found = AttackResult.from_json((tmp_path / "a" / "attack.json").read_bytes())
    assert [(evaluation.p, evaluation.eps) for evaluation in found.evaluations] == [(math.inf, 0.05)]
    assert found.evaluations[0].summary in capsys.readouterr().out


@pytest.mark.parametrize("extra", [("--arch", "vgg16"), ("--arch-arg", "width=3"), ("--mean", "0", "--std", "1")])
@pytest.mark.parametrize("command", ["audit", "attack"])
def test_a_run_knows_its_own_architecture(command, extra, finished, tmp_path, capsys):
    assert run([command, str(finished), *extra, "-o", str(tmp_path / "a")]) == 2
    one_line(capsys, "is a run")


@pytest.mark.parametrize("command", ["audit", "attack"])
def test_a_folder_that_is_no_run(command, tmp_path, capsys):
    assert run([command, str(tmp_path), "-o", str(tmp_path / "a")]) == 2
    one_line(capsys, "config.json")


def test_a_run_on_relative_data_is_audited_from_elsewhere(tmp_path, monkeypatch):
    data = load_data("digits", split="test", limit=60)
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "d.npz", x=data.inputs.numpy(), y=data.labels.numpy())
    monkeypatch.chdir(tmp_path)
    fixed = ["--data", "npz:d.npz", "--data-root", "data", "--width", "4", "--epochs", "1", "-q"]
    assert run(["train", *fixed, "-o", "run"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run(["audit", "../run", "--steps", "2", "--limit", "20", "-q"]) == 0


def test_a_finished_run_is_not_replaced_unasked(train, tmp_path, capsys):
    assert train("-q") == 0
    before = contents(tmp_path / "run")
    assert train("--lr", "0.1") == 2
    one_line(capsys, "already holds", "--overwrite")
    assert contents(tmp_path / "run") == before
    assert train("--lr", "0.1", "--overwrite", "-q") == 0
    after = contents(tmp_path / "run")
    assert after["weights.safetensors"] != before["weights.safetensors"]
    assert run_config(tmp_path / "run").recipe.lr == 0.1
    assert train("--overwrite", "-q") == 0
    assert contents(tmp_path / "run")["weights.safetensors"] == before["weights.safetensors"]


@pytest.mark.parametrize(
    "wrong", [("--lr", "-1"), ("--penalty", "nothing=1"), ("--data-root", "x", "--data", "mnist"), ("--processes", "0")]
)
def test_a_mistake_beside_overwrite_costs_nothing(wrong, train, tmp_path):
    assert train("-q") == 0
    before = contents(tmp_path / "run")
    assert train("--overwrite", *wrong) == 2
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("options", [("--processes", "2"), ("--precision", "bf16-mixed")])
def test_without_lightning_nothing_is_lost(options, train, tmp_path, monkeypatch, capsys):
    assert train("-q") == 0
    before = contents(tmp_path / "run")
    for name in ("lightning_fabric", "lightning", "lightning.fabric"):
        monkeypatch.setitem(sys.modules, name, None)
    assert train("--overwrite", *options) == 2
    one_line(capsys, "brittle[multi]")
    assert contents(tmp_path / "run") == before


def test_it_learns_from_another_run(train, finished, tmp_path):
    """From the run's network as it was trained, pairs, normalisation and all."""
    lesson = ("--distill", "0.8", "--temperature", "2", "--select", "last", "-q")
    assert train("--fine-tune", str(finished), "--teacher", str(finished), *lesson) == 0
    network, config = load_run(tmp_path / "run")
    assert (config.teacher, config.recipe.distill, config.recipe.temperature) == (str(finished), 0.8, 2.0)
    start = load_run(finished)[0]
    data = load_data("digits", split="train", limit=120)
    result = brittle.train(start, data, config.recipe, interventions=Interventions(teacher=start))
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor)


def test_a_run_is_not_its_own_teacher(train, tmp_path, capsys):
    assert train("-q") == 0
    before = contents(tmp_path / "run")
    assert train("-q", "--teacher", str(tmp_path / "run"), "--distill", "0.5", "--overwrite") == 2
    one_line(capsys, "teacher: expected weights outside of")
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("start", ["run", "run/weights.safetensors"])
def test_a_run_is_not_fine_tuned_in_place(start, train, tmp_path, capsys):
    """Interrupted, it would have lost the only copy of what it started from."""
    assert train("-q") == 0
    before = contents(tmp_path / "run")
    assert train("-q", "--fine-tune", str(tmp_path / start), "--overwrite") == 2
    one_line(capsys, "fine_tune: expected weights outside of")
    assert contents(tmp_path / "run") == before


def test_a_folder_of_something_else_is_left(train, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CONFIG).write_text('{"mine": 1}')
    assert train("-q") == 2
    one_line(capsys, "schema_version")
    assert contents(tmp_path / "run") == {CONFIG: b'{"mine": 1}'}


@pytest.mark.parametrize(
    "options",
    [
        ("--penalty", "l1=1,2"),
        ("--frobenius", "1,2"),
        ("--adversarial", "inf=0.1,0.3"),
        ("--penalty", "l1=0.1", "--penalty", "l1=0.2"),
        ("--constraint", "frobenius=1", "--frobenius", "2"),
        ("--rank", "\u00b2"),
        ("--rank", "9" * 5000),
        ("--seed", "9" * 23),
        ("--threads", "99999999999"),
    ],
    ids=lambda options: " ".join(options)[:40],
)
def test_no_value_is_dropped_or_taken_on_trust(options, train, tmp_path, capsys):
    assert train("-q", *options) == 2
    one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_no_traceback(train, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise safetensors.SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    assert train("-q") == 1
    one_line(capsys, "No space left")


def test_no_table_of_the_run_before_is_left(train, tmp_path):
    assert train("-q") == 0
    assert train("-q", "--overwrite", "--measure-every", "0") == 0
    assert "layers.csv" not in contents(tmp_path / "run")


def test_a_file_is_no_folder(train, tmp_path, capsys):
    (tmp_path / "run").write_text("")
    assert train() == 2
    one_line(capsys, "out: expected a folder")


# Interruptions


def interrupt_after(monkeypatch, epochs):
    real, calls = loop.write_history, []

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) > epochs:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(loop, "write_history", interrupted)


def test_an_interrupted_run_goes_on(train, tmp_path, monkeypatch, capsys):
    assert train("-q") == 0
    whole = contents(tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        assert train("-q", "--overwrite") == 130
        one_line(capsys, "interrupted", "again", "where it stopped without --overwrite")
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert "weights.safetensors" not in left
    assert "state.json" in left
    assert run(["audit", str(tmp_path / "run"), "-o", str(tmp_path / "a")]) == 2
    one_line(capsys, "not finished")
    assert train("-q", "--lr", "0.5") == 2
    one_line(capsys, "another recipe")
    assert train("-q") == 0
    after = contents(tmp_path / "run")
    assert sorted(after) == FILES
    for name in ("weights.safetensors", "config.json", "layers.csv"):
        assert after[name] == whole[name], name


def test_a_refused_command_leaves_the_interrupted_run(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        assert train("-q") == 130
    before = contents(tmp_path / "run")
    assert train("-q", "--lr", "0.5") == 2
    assert contents(tmp_path / "run") == before


def test_a_spoilt_state_is_one_line(train, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        assert train("-q") == 130
    capsys.readouterr()
    (tmp_path / "run" / "state.json").write_text("{")
    assert train("-q") == 2
    one_line(capsys, "state cannot be read", "--overwrite")
    assert train("-q", "--overwrite") == 0
    assert sorted(contents(tmp_path / "run")) == FILES


def test_control_c(tmp_path):
    arguments = ["train", *FIXED, "--epochs", "100000", "--measure-every", "0", "-q", "-o", tmp_path / "run"]
    with start("-m", "brittle.cli", *arguments, stdout=PIPE, stderr=PIPE, text=True) as child:
        wait_until((tmp_path / "run" / "state.json").exists, 120, child)
        child.send_signal(signal.SIGINT)
        ended = finish(child, 60)
    assert ended.returncode == 130, ended.stderr
    assert ended.stdout == ""
    assert ended.stderr.startswith("brittle: interrupted")
    assert ended.stderr.count("\n") == 1
    assert loop.read_snapshot(tmp_path / "run") is not None


def test_a_terminal_shows_how_it_goes(tmp_path):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    arguments = ["train", *FIXED, "--measure-every", "0", "-o", tmp_path / "run"]
    terminal = {"COLUMNS": "200", "TERM": "xterm"}
    with start("-m", "brittle.cli", *arguments, env=terminal, stdout=DEVNULL, stderr=theirs) as child:
        os.close(theirs)
        shown = read_all(ours, 120)
        assert finish(child, 60).returncode == 0
    os.close(ours)
    text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", shown).decode()
    rows = pd.read_csv(tmp_path / "run" / "history.csv")
    for row in rows.itertuples():
        line = rf"epoch {row.epoch}/2  loss {row.loss:.4f}  accuracy {row.accuracy:.2%}  [\d,]+/s  validation"
        assert re.search(line, text), text
    assert re.search(r"100%\s+\d+:\d\d:\d\d", text), text  # time left


# Errors


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--lr", "-1"), ("lr",)),
        (("--lr", "fast"), ("lr", "fast")),
        (("--epochs", "0"), ("epochs",)),
        (("--batch-size", "0"), ("batch_size",)),
        (("--optimizer", "adam"), ("optimizer", "adamw")),
        (("--schedule", "linear"), ("schedule", "cosine")),
        (("--select", "first"), ("select",)),
        (("--precision", "8"), ("precision",)),
        (("--validation", "1"), ("validation",)),
        (("--penalty", "group_laso=1"), ("group_lasso", "group_laso")),
        (("--penalty", "l1"), ("penalty", "NAME=NUMBER")),
        (("--penalty", "l1=much"), ("penalty", "much")),
        (("--penalty", "l1=-1"), ("l1", "-1")),
        (("--constraint", "nothing=1"), ("frobenius", "nothing")),
        (("--constraint", "spectral_cap=0"), ("cap",)),
        (("--constraint", "orthonormal=1"), ("pair",)),
        (("--frobenius", "much"), ("frobenius", "much")),
        (("--frobenius", "-1"), ("constant",)),
        (("--layers", "nothing"), ("layers",)),  # used by nothing without a penalty, hence with one
        (("--rank", "0"), ("rank",)),
        (("--rank", "1.5"), ("rank",)),
        (("--rank", "500"), ("rank",)),
        (("--adversarial", "1=0.1"), ("p",)),
        (("--adversarial", "inf=0"), ("eps",)),
        (("--adversarial", "0.1"), ("adversarial", "P=EPS")),
        (("--adversarial", "inf=0.1", "--adversarial-ratio", "2"), ("ratio",)),
        (("--universal",), ("universal", "--adversarial")),
        (("--mean", "0.1"), ("mean, std",)),
        (("--mean", "0.1", "--std", "0"), ("std",)),
        (("--arch", "fnc"), ("arch", "fcn")),
        (("--arch-arg", "nothing=1"), ("fcn", "nothing")),
        (("--fine-tune", "missing.pt"), ("missing.pt",)),
        (("--teacher", "missing", "--distill", "0.5"), ("missing", "config.json")),
        (("--distill", "0.5"), ("teacher", "distill")),
        (("--distill", "2"), ("distill", "from 0 to 1")),
        (("--device", "tpu"), ("device",)),
        (("--processes", "0"), ("processes",)),
        (("--threads", "0"), ("threads",)),
        (("--limit", "0"), ("limit",)),
        (("--limit", "3"), ("validation",)),
        (("--data", "mnist"), ("root",)),
        (("--data", "nothing"), ("digits",)),
        (("--data", "npz:missing.npz"), ("missing.npz",)),
        (("--lr", "1e38", "--measure-every", "0"), ("lr",)),
        (("--nothing",), ("--nothing",)),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_input_is_one_line(arguments, parts, train, tmp_path, capsys):
    extra = ("--penalty", "l1=0.1") if arguments[0] == "--layers" else ()
    assert train(*arguments, *extra) == 2
    one_line(capsys, *parts)
    assert not (tmp_path / "run" / "weights.safetensors").exists()


def test_without_data(tmp_path, capsys):
    assert run(["train", "-o", str(tmp_path / "run")]) == 2
    one_line(capsys, "--data")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--arch-arg", "classes=5"),
        ("--arch-arg", "in_features=5"),
        ("--mean", "0,0", "--std", "1,1"),
        ("--adversarial", "inf=0.1", "--attack-steps", "0"),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_network_that_does_not_suit_the_data_is_one_line(arguments, train, capsys):
    assert train(*arguments) == 2
    one_line(capsys)


def test_a_network_for_colours_on_grey_images_is_one_line(tmp_path, capsys):
    pytest.importorskip("torchvision")
    fixed = ["train", "--data", "digits", "--limit", "40", "--epochs", "1", "-o", str(tmp_path)]
    assert run([*fixed, "--arch", "torchvision:resnet18"]) == 2
    one_line(capsys)


def test_a_missing_lightning_names_the_extra(train, monkeypatch, capsys):
    for name in ("lightning_fabric", "lightning", "lightning.fabric"):
        monkeypatch.setitem(sys.modules, name, None)
    assert train("--processes", "2") == 2
    one_line(capsys, "brittle[multi]")


# Downloads


def test_downloads_without_torchvision_name_the_extra(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert train("--data", "mnist", "--data-root", str(tmp_path / "data"), "--download") == 2
    one_line(capsys, "brittle[vision]")


def test_downloads_without_a_network_are_one_line(train, tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip("torchvision.datasets")
    from urllib.error import URLError

    def offline(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(datasets, "MNIST", offline)
    assert train("--data", "mnist", "--data-root", str(tmp_path / "data"), "--download") == 2
    one_line(capsys, "mnist", "no network")


def test_downloads_need_a_root_and_a_set_that_can_be_fetched(train, capsys):
    assert train("--data", "mnist", "--download") == 2
    one_line(capsys, "root")
    assert train("--download") == 2
    one_line(capsys, "digits")


# TensorBoard


def test_tensorboard_holds_the_history(train, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train("--tensorboard", "-q") == 0
    assert capsys.readouterr().err == ""
    folder = tmp_path / "run" / "tensorboard"
    assert list(folder.glob("events.out.tfevents.*"))
    events = EventAccumulator(str(folder)).Reload()
    history = pd.read_csv(tmp_path / "run" / "history.csv")
    tags = events.Tags()["scalars"]
    assert {"loss", "accuracy", "validation_accuracy", "lipschitz_2"} <= set(tags)
    for tag in tags:
        assert [event.step for event in events.Scalars(tag)] == [1, 2]
        assert [event.value for event in events.Scalars(tag)] == pytest.approx(history[tag].tolist(), rel=1e-6)


def test_without_tensorboard_the_extra_is_named(train, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train("--tensorboard") == 2
    one_line(capsys, "brittle[tensorboard]")


@pytest.mark.slow
def test_several_processes_are_as_silent(train, tmp_path, capfd):
    pytest.importorskip("lightning_fabric")
    assert train("--processes", "2", "-q", "--measure-every", "0") == 0
    assert capfd.readouterr().err == ""


def test_a_run_of_another_schema_is_one_line(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    for name, content in contents(finished).items():
        (folder / name).write_bytes(content)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"schema_version": 99}))
    assert run(["audit", str(folder), "-o", str(tmp_path / "a")]) == 2
    one_line(capsys, "schema_version", "99")
