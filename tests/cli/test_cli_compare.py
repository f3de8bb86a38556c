"""``brittle compare`` as a user meets it: what it takes, what it writes, and its errors."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from brittle.cli.commands import run
from brittle.models.build import fcn
from brittle.results import Comparison
from brittle.results.comparison import paired_verdicts
from helpers.audits import full, with_verdicts
from helpers.command_line import one_line
from helpers.networks import mlp

FAST = ["--data", "digits", "--limit", "12", "--steps", "2", "--p", "inf"]
MLP = ["--arch", "helpers.networks:mlp"]


@pytest.fixture
def files(tmp_path):
    """Two files of weights of one name in two folders: the trained network and one with neurons set to zero."""
    state = {name: tensor.clone() for name, tensor in mlp().state_dict().items()}
    weaker = {name: tensor.clone() for name, tensor in state.items()}
    weaker["1.weight"][::3] = 0
    paths = []
    for folder, tensors in (("dense", state), ("pruned", weaker)):
        (tmp_path / folder).mkdir()
        paths.append(str(tmp_path / folder / "net.safetensors"))
        save_file(tensors, paths[-1])
    return paths


@pytest.fixture
def audits(tmp_path):
    """Two saved audits with their samples."""
    paths = []
    for seed, folder in enumerate(("dense", "pruned")):
        audit, path = with_verdicts(seed), tmp_path / "audits" / folder
        audit.save(path / "audit.json")
        audit.samples_frame().to_parquet(path / "samples.parquet", index=False)
        paths.append(path / "audit.json")
    return paths


@pytest.fixture
def compare(tmp_path):
    return lambda *arguments: run(["compare", *arguments, "-o", str(tmp_path / "out")])


def test_files_of_weights_are_compared(files, compare, tmp_path, capsys):
    assert compare(*files, *MLP, *FAST) == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["comparison.json", "report.html"]
    found = Comparison.load(out / "comparison.json")
    assert [network.name for network in found.networks] == ["dense/net.safetensors", "pruned/net.safetensors"]
    assert [test.kind for test in found.networks[1].paired] == ["clean", "robust", "certified"]
    assert found.networks[0].row_head < found.networks[1].row_head  # though `mlp` returns one network
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "pruned/net.safetensors beside dense/net.safetensors" in printed.out
    assert printed.out.splitlines()[-1] == f"Report: {out / 'report.html'}"
    # Drawn again from the JSON alone, it is the same page.
    assert run(["report", str(out / "comparison.json"), "-o", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_bytes() == (out / "report.html").read_bytes()
    assert compare(*files, *MLP, *FAST) == 2
    assert "already holds results" in capsys.readouterr().err


def test_saved_audits_are_compared_with_their_samples_and_a_floor(audits, compare, tmp_path, capsys):
    assert compare(*map(str, audits), "--json", "--fail-under-robust", "1") == 4
    printed = capsys.readouterr()
    found = Comparison.from_json(printed.out)
    assert found == Comparison.load(tmp_path / "out" / "comparison.json")
    assert [network.name for network in found.networks] == ["dense", "pruned"]
    assert found.networks[1].paired == paired_verdicts(with_verdicts(0).norms, with_verdicts(1).norms)
    assert printed.err.count("\n") == 1
    assert re.search(r"of dense in ℓ∞ .*, of pruned in ℓ∞ .*below the floor 1.0", printed.err)


def test_without_its_samples_an_audit_is_not_tested(audits, compare, capsys):
    audits[1].with_name("samples.parquet").unlink()
    assert compare(*map(str, audits)) == 0
    assert "not tested" in capsys.readouterr().out


def test_samples_of_another_audit_are_refused(audits, compare, capsys):
    audits[0].with_name("samples.parquet").replace(audits[1].with_name("samples.parquet"))
    assert compare(*map(str, audits)) == 2
    one_line(capsys, "samples", "expected those of the audit")


def test_networks_of_different_architectures_have_one_each(compare, tmp_path, capsys):
    torch.manual_seed(0)
    paths = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    save_file(mlp().state_dict(), paths[0])
    save_file(fcn(64, 8, 2, 10).state_dict(), paths[1])
    assert compare(*paths, *MLP, "--arch", "fcn", "--name", "mine", "--name", "theirs", "--json") == 0
    found = Comparison.from_json(capsys.readouterr().out)
    assert [(network.name, len(network.audit.layers)) for network in found.networks] == [("mine", 3), ("theirs", 2)]
    assert compare(*paths, "--arch", "fcn", "--overwrite") == 2
    one_line(capsys, "expected")


def test_folders_of_runs_know_their_architecture_and_data(compare, tmp_path, capsys):
    folder = str(tmp_path / "run")
    training = ["--data", "digits", "--limit", "64", "--epochs", "1", "--width", "8", "--measure-every", "0", "-q"]
    assert run(["train", *training, "-o", folder]) == 0
    save_file(mlp().state_dict(), tmp_path / "net.safetensors")
    capsys.readouterr()
    attack = ["--limit", "8", "--steps", "1", "--p", "2"]
    assert compare(str(tmp_path / "net.safetensors"), folder, *MLP, *attack, "--json") == 0
    found = Comparison.from_json(capsys.readouterr().out)
    assert [network.name for network in found.networks] == ["net.safetensors", "run"]
    assert found.networks[1].evaluations[0].n == 8
    # A run of three layers under model., beside a bare network with a layer in the place of each.
    assert [row.name for row in found.layers if all(row.layers)] == ["1", "3", "5"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["{0}", *MLP], ["models", "at least two", "1"]),
        (["{0}", "{0}.not", *MLP], ["net.safetensors.not"]),
        (["{0}", "missing.json", *MLP], ["audit", "no file", "missing.json"]),
        (["{0}", "{1}"], ["arch", "got none"]),
        (["{0}", "{1}", "{0}", *MLP, *MLP], ["arch", "one for all 3"]),
        (["{0}", "{1}", *MLP, "--name", "a"], ["names", "2 different names"]),
        (["{0}", "{1}", *MLP, "--name", "a", "--name", "a"], ["names", "2 different names"]),
        (["{0}", "{1}", *MLP, *FAST, "--fail-under-robust", "1.5"], ["fail-under-robust", "from 0 to 1"]),
        (["{0}", "{1}", *MLP, "--fail-under-robust", "0.5"], ["fail-under-robust", "expected data"]),
        (["{0}", "{1}", *MLP, "--p", "1"], ["p", "inf, 2 or inf,2"]),
    ],
)
def test_bad_usage_is_one_line(arguments, parts, files, compare, tmp_path, capsys):
    assert compare(*(argument.format(*files) for argument in arguments)) == 2
    one_line(capsys, *parts)
    assert not (tmp_path / "out").exists()


def test_an_audit_of_other_data_is_refused(audits, compare, capsys):
    other = replace(full(), signature=replace(full().signature, data="00" * 32))
    audits[1].with_name("samples.parquet").unlink()
    other.save(audits[1])
    assert compare(*map(str, audits)) == 2
    one_line(capsys, "networks", "the same data", "(dense)", "(pruned)")


def test_a_file_that_is_no_audit_is_refused(files, compare, tmp_path, capsys):
    (tmp_path / "other.json").write_text(json.dumps({"schema_version": 2, "networks": []}))
    assert compare(files[0], str(tmp_path / "other.json"), *MLP) == 2
    one_line(capsys, "audit")
