"""The command line as a user meets it: what it writes, and one clear line with exit code 2 for every bad input."""

import json
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from brittle.cli.commands import run
from brittle.evaluation import run as running
from brittle.models.build import fcn
from brittle.results import Audit
from helpers import processes
from helpers.command_line import one_line
from helpers.hostile import Hostile


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "net.safetensors"
    save_file(fcn(64, 16, 3, 10).state_dict(), path)
    return path


@pytest.fixture
def audit(weights, tmp_path):
    """Run ``brittle audit`` on a small FCN with further arguments."""
    return lambda *arguments: run(["audit", str(weights), "--arch", "fcn", "-o", str(tmp_path / "out"), *arguments])


def npz(tmp_path, x, y):
    np.savez(tmp_path / "data.npz", x=x, y=y)
    return f"npz:{tmp_path / 'data.npz'}"


def test_audit_writes_json_parquet_and_report(audit, tmp_path, capsys):
    assert audit("--data", "digits", "--limit", "20", "--steps", "5") == 0
    out = tmp_path / "out"
    found = Audit.load(out / "audit.json")
    samples = pd.read_parquet(out / "samples.parquet")
    assert len(samples) == 2 * 20
    assert found.norms[0].evaluation.clean_correct == (samples[:20].label == samples[:20].clean_prediction).sum()
    assert found.verdict.headline.split(":")[0] in (out / "report.html").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["audit.json", "audit.npz", "report.html", "samples.parquet"]
    assert found.pictures is not None
    assert found.source["arch"] == "fcn"
    printed = capsys.readouterr()
    assert str(out / "report.html") in printed.out
    assert found.signature.line in printed.out
    assert printed.err == ""


def test_data_free_audit_writes_no_samples(audit, tmp_path):
    assert audit() == 0
    assert Audit.load(tmp_path / "out" / "audit.json").clean_accuracy is None
    assert not (tmp_path / "out" / "samples.parquet").exists()


def test_json_goes_to_standard_output_alone(audit, capsys):
    assert audit("--json") == 0
    assert Audit.from_json(capsys.readouterr().out).model == "net.safetensors"


def test_options_reach_the_audit(audit, tmp_path):
    arguments = [
        "--data",
        "digits",
        "--limit",
        "7",
        "--steps",
        "3",
        "--p",
        "2",
        "--eps",
        "2=0.7",
        "--restarts",
        "2",
        "--seed",
        "5",
    ]
    assert audit(*arguments, "--mean", "0.5", "--std", "0.25") == 0
    found = Audit.load(tmp_path / "out" / "audit.json")
    (norm,) = found.norms
    e = norm.evaluation
    assert (e.p, e.eps, e.n, e.restarts, e.seed) == (2.0, 0.7, 7, 2, 5)
    assert e.attacks[:3] == ("apgd(loss='ce', steps=3)", "apgd(loss='dlr', steps=3)", "apgd_smoothed(steps=1)")
    assert found.layers[0].name == "model.1"


def test_report_is_drawn_again_from_json(audit, tmp_path):
    assert audit() == 0
    assert run(["report", str(tmp_path / "out" / "audit.json"), "-o", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "out" / "report.html").read_bytes()


def test_an_audit_is_not_overwritten_unasked(audit, tmp_path, capsys):
    assert audit("-q") == 0
    before = (tmp_path / "out" / "audit.json").read_bytes()
    capsys.readouterr()
    assert audit("--seed", "1") == 2
    one_line(capsys, "already holds results (audit.json)", "--overwrite")
    assert (tmp_path / "out" / "audit.json").read_bytes() == before
    assert audit("--seed", "1", "--overwrite") == 0


BAD_OPTIONS = {
    "negative eps": (["--eps", "-0.1"], ["eps", "above 0", "-0.1"]),
    "eps of words": (["--eps", "inf=much"], ["eps", "numbers", "much"]),
    "eps nan": (["--eps", "nan"], ["eps"]),
    "unknown norm": (["--p", "1"], ["p: expected inf, 2", "'1'"]),
    "unknown data": (["--data", "mnits"], ["mnits", "digits"]),
    "missing data root": (["--data", "mnist", "--data-root", "/nowhere"], ["/nowhere"]),
    "unknown device": (["--device", "tpu9"], ["device", "tpu9"]),
    "no such GPU": (["--device", "cuda:99"], ["device", "cuda:99"]),
    "no limit": (["--data", "digits", "--limit", "0"], ["0"]),
    "no steps": (["--data", "digits", "--steps", "0"], ["steps", "0"]),
    "no restarts": (["--data", "digits", "--restarts", "0"], ["restarts", "0"]),
    "no batch": (["--data", "digits", "--batch-size", "0"], ["batch_size", "0"]),
    "no threads": (["--threads", "0"], ["threads", "0"]),
    "steps of words": (["--steps", "many"], ["steps", "many"]),
    "unknown option": (["--epsilon", "1"], ["--epsilon"]),
    "mean without std": (["--mean", "0.5"], ["mean, std"]),
    "zero std": (["--mean", "0", "--std", "0"], ["std"]),
    "shape of words": (["--input-shape", "a,b"], ["input-shape", "a,b"]),
    "shape that does not fit": (["--input-shape", "3,5"], ["(3, 5)"]),
    "architecture argument": (["--arch-arg", "width"], ["arch-arg", "width"]),
    "unknown split": (["--data", "digits", "--split", "dev"], ["split", "dev"]),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(case, audit, tmp_path, capsys):
    arguments, parts = BAD_OPTIONS[case]
    assert audit(*arguments) == 2
    one_line(capsys, *parts)
    assert not (tmp_path / "out").exists()


BAD_DATA = {
    "NaN": (np.full((3, 64), np.nan, np.float32), [0, 1, 2], ["finite"]),
    "outside the bounds": (np.full((3, 64), 2.0, np.float32), [0, 1, 2], ["[0, 1]", "2"]),
    "labels the model does not have": (np.zeros((3, 64), np.float32), [0, 1, 12], ["0 to 9", "12"]),
    "negative labels": (np.zeros((3, 64), np.float32), [0, -1, 2], ["-1"]),
    "wrong shape": (np.zeros((3, 1, 9, 9), np.float32), [0, 1, 2], ["(1, 9, 9)"]),
    "labels missing": (np.zeros((3, 64), np.float32), [0, 1], ["3", "2"]),
    "nothing": (np.zeros((0, 64), np.float32), [], []),
    "complex": (np.zeros((3, 64), np.complex64), [0, 1, 2], ["complex"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(case, audit, tmp_path, capsys):
    x, y, parts = BAD_DATA[case]
    assert audit("--data", npz(tmp_path, x, np.array(y, dtype=np.int64))) == 2
    one_line(capsys, *parts)
    assert not (tmp_path / "out").exists()


def bad_checkpoint(case, tmp_path):
    path = tmp_path / ("net.safetensors" if case == "corrupt safetensors" else "net.pt")
    if case == "corrupt safetensors":
        path.write_bytes(b"\xff" * 100)
    elif case == "hostile":
        path.write_bytes(pickle.dumps(Hostile(tmp_path / "owned")))
    elif case == "whole module":
        torch.save(fcn(64, 16, 3, 10), path)
    elif case == "truncated":
        torch.save(fcn(64, 16, 3, 10).state_dict(), path)
        path.write_bytes(path.read_bytes()[:-200])
    elif case == "empty":
        path.write_bytes(b"")
    elif case == "NaN weights":
        torch.save({name: w * torch.nan for name, w in fcn(64, 16, 3, 10).state_dict().items()}, path)
    elif case == "not weights":
        torch.save({"epoch": 3}, path)
    return path


@pytest.mark.parametrize(
    "case",
    ["corrupt safetensors", "hostile", "whole module", "truncated", "empty", "NaN weights", "not weights", "missing"],
)
def test_bad_checkpoints(case, tmp_path, capsys):
    path = bad_checkpoint(case, tmp_path)
    assert run(["audit", str(path), "--arch", "fcn", "-o", str(tmp_path / "out")]) == 2
    one_line(capsys, path.name if case != "NaN weights" else "NaN")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("arch", "parts"),
    [
        ("fnc", ["fnc", "fcn"]),
        ("resnet18-cifar", ["resnet18"]),
        ("torchvision:resnet19", ["resnet19", "resnet18"]),
        ("no.such.module:build", ["no.such.module"]),
        ("os:getcwd", ["getcwd"]),
    ],
)
def test_bad_architectures(arch, parts, weights, tmp_path, capsys):
    assert run(["audit", str(weights), "--arch", arch, "-o", str(tmp_path / "out")]) == 2
    one_line(capsys, *parts)


def snapshot(folder):
    """A network of transformers for images of 8 x 8 pixels with one channel, as its library writes it."""
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, num_labels=10,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return f"hf:{folder}"


def test_a_network_of_transformers_is_audited_and_compared(tmp_path):
    name = snapshot(tmp_path / "net")
    x = np.random.default_rng(0).random((4, 1, 8, 8), dtype=np.float32)
    data = ["--data", npz(tmp_path, x, np.arange(4)), "--steps", "2", "-q"]
    assert run(["audit", name, *data, "-o", str(tmp_path / "out")]) == 0
    found = Audit.load(tmp_path / "out" / "audit.json")
    assert sum(bool(layer.head_norms) for layer in found.layers) == 3
    assert run(["compare", name, name, *data, "-o", str(tmp_path / "side")]) == 0


@pytest.mark.parametrize(
    ("options", "parts"),
    [(["--arch", "fcn"], ["arch", "leave them out"]), (["--arch-arg", "depth=1"], ["arch-arg", "leave them out"])],
)
def test_a_network_of_transformers_knows_its_own(options, parts, tmp_path, capsys):
    name = snapshot(tmp_path / "net")
    capsys.readouterr()  # the library shows how far it is with writing
    assert run(["audit", name, *options, "-o", str(tmp_path / "out")]) == 2
    one_line(capsys, *parts)


def test_a_folder_that_is_none_of_transformers(tmp_path, capsys):
    assert run(["audit", f"hf:{tmp_path}", "-o", str(tmp_path / "out")]) == 2
    one_line(capsys, "config.json", "nothing is downloaded")


def test_weights_that_do_not_fit(weights, tmp_path, capsys):
    assert run(["audit", str(weights), "--arch", "torchvision:resnet18", "-o", str(tmp_path / "out")]) == 2
    one_line(capsys, "conv1.weight")


def test_unknown_layers_are_named_and_not_guessed(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Odd(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__(); self.scale = torch.nn.Parameter(torch.ones(10))\n"
        "    def forward(self, x): return x * self.scale\n"
        "def build(): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10), Odd())\n"
    )
    monkeypatch.chdir(tmp_path)
    save_file({"1.weight": torch.ones(10, 64), "1.bias": torch.zeros(10), "2.scale": torch.ones(10)}, "odd.safetensors")
    assert run(["audit", "odd.safetensors", "--arch", "mine:build", "-o", "out", "-q"]) == 0
    found = Audit.load("out/audit.json")
    assert "2" in [item.name for item in found.not_measured]
    assert all(norm.lipschitz.upper is None and norm.lipschitz.unavailable for norm in found.norms)


def test_output_that_is_a_file(audit, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert audit() == 2
    one_line(capsys, "out", "is a file")
    assert (tmp_path / "out").read_text() == "mine"


def test_broken_audit_json(tmp_path, capsys):
    (tmp_path / "audit.json").write_text("{")
    assert run(["report", str(tmp_path / "audit.json")]) == 2
    one_line(capsys, "JSON")
    (tmp_path / "audit.json").write_text(json.dumps({"schema_version": 99}))
    assert run(["report", str(tmp_path / "audit.json")]) == 2
    one_line(capsys, "99")


SMALL = ("--data", "digits", "--limit", "60", "--steps", "3", "--p", "inf", "--batch-size", "4")  # parts of 16 samples


def interrupt_at(monkeypatch, part):
    """Ctrl-C at the start of a part, the first time; returns the first samples of the parts that were begun."""
    real, begun = running.worst_case, []

    def interrupted(*arguments, **options):
        begun.append(options["ids"])
        if len(begun) == part:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(running, "worst_case", interrupted)
    return begun


def test_an_interrupted_audit_goes_on_where_it_stopped(audit, tmp_path, monkeypatch, capsys):
    assert audit(*SMALL, "--json") == 0
    whole = Audit.from_json(capsys.readouterr().out)
    begun = interrupt_at(monkeypatch, 3)
    assert audit(*SMALL, "--overwrite") == 130
    assert "an audit" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / "parts").glob("*.json"))) == 2
    assert audit(*SMALL, "--overwrite", "--json") == 0
    assert begun == [0, 16, 32, 32, 48]
    assert Audit.from_json(capsys.readouterr().out) == whole
    assert not (tmp_path / "out" / "parts").exists()


def test_interrupt_leaves_nothing_half_written(audit, tmp_path, monkeypatch, capsys):
    interrupt_at(monkeypatch, 1)
    assert audit(*SMALL) == 130
    one_line(capsys, "interrupted")
    assert not (tmp_path / "out").exists()


def test_how_an_audit_is_carried_out_changes_no_verdict(audit, capsys):
    robust = {}
    for options in ((), ("--device", "cpu,cpu"), ("--no-certify",), ("--batch-size", "7")):
        assert audit(*SMALL, "--json", "--overwrite", *options) == 0
        robust[options] = Audit.from_json(capsys.readouterr().out).norms[0].evaluation.robust_correct
    assert robust == dict.fromkeys(robust, robust[()])


def test_write_errors_are_one_line(audit, monkeypatch, capsys):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device", "audit.json")

    monkeypatch.setattr("os.replace", full)
    assert audit("-q") == 1
    one_line(capsys, "audit.json", "No space left")


def test_help_version_and_exit_code_as_a_process():
    def brittle(*arguments):
        return processes.run("-m", "brittle.cli", *arguments)

    assert "brittle audit" in brittle("audit", "--help").stdout
    assert brittle("--version").stdout.startswith("brittle ")
    bad = brittle("audit", "nothing.pt", "--arch", "fcn")
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)
