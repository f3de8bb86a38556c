"""``brittle attack`` as a user meets it: what it writes, how it goes on after an interruption, and its errors."""

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from brittle.cli.commands import run
from brittle.data.load import load_data
from brittle.evaluation import run as running
from brittle.models.build import fcn
from brittle.results import AttackResult


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A linear reading of the digits: right on most of them."""
    data = load_data("digits", split="train")
    torch.manual_seed(0)
    net = fcn(64, 32, 2, 10)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(data.inputs), data.labels).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    save_file(net.state_dict(), path)
    return path


@pytest.fixture
def attack(weights, tmp_path):
    """Run ``brittle attack`` on a small FCN with further arguments."""
    fixed = ["attack", str(weights), "--arch", "fcn", "--data", "digits", "-o", str(tmp_path / "out")]
    return lambda *arguments: run([*fixed, "--limit", "60", "--steps", "10", "--preset", "fast", *arguments])


def test_it_writes_results_and_cleans_up(attack, tmp_path, capsys):
    assert attack("--eps", "0.1") == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["attack.json", "samples.parquet"]
    found = AttackResult.from_json((out / "attack.json").read_bytes())
    samples = pd.read_parquet(out / "samples.parquet")
    assert len(samples) == 2 * 60
    for evaluation_, rows in zip(found.evaluations, (samples[:60], samples[60:]), strict=True):
        assert evaluation_.eps == 0.1
        right = rows.label == rows.clean_prediction
        assert evaluation_.clean_correct == right.sum()
        assert evaluation_.robust_correct == (right & rows.attack.isna()).sum()
        assert 0 < evaluation_.robust_correct < evaluation_.clean_correct
        assert evaluation_.backwards > 0
    printed = capsys.readouterr()
    assert found.evaluations[0].summary in printed.out
    assert found.signature.line in printed.out
    assert printed.err == ""


def test_json_alone_on_standard_output(attack, capsys):
    assert attack("--p", "2", "--json") == 0
    found = AttackResult.from_json(capsys.readouterr().out)
    assert [e.p for e in found.evaluations] == [2]


def test_an_interrupted_attack_goes_on_where_it_stopped(attack, tmp_path, monkeypatch, capsys):
    small = ("--p", "inf", "--batch-size", "4")  # parts of 16 samples
    assert attack(*small, "--json") == 0
    whole = AttackResult.from_json(capsys.readouterr().out)
    real, calls = running.worst_case, []

    def interrupted(*arguments, **options):
        calls.append(options["ids"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(running, "worst_case", interrupted)
    assert attack(*small, "--overwrite") == 130
    assert "resumes" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / "parts").glob("*.json"))) == 2
    assert attack(*small, "--json", "--overwrite") == 0
    assert calls == [0, 16, 32, 32, 48]
    again = AttackResult.from_json(capsys.readouterr().out)
    assert again == whole
    assert not (tmp_path / "out" / "parts").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--preset", "strong"], ["fast, standard, thorough", "strong"]),
        (["--eps", "-1"], ["eps", "above 0", "-1"]),
        (["--device", "cpu,warp"], ["device", "warp"]),
        (["--ray-workers", "-1"], ["ray_workers", "at least 0", "-1"]),
        (["--batch-size", "0"], ["batch_size", "at least 1", "0"]),
        (["--steps", "0"], ["steps", "at least 1", "0"]),
        (["--restarts", "0"], ["restarts", "at least 1", "0"]),
        (["--limit", "0"], ["limit"]),
        (["--p", "1"], ["p", "inf, 2 or inf,2", "1"]),
    ],
)
def test_bad_options_are_one_line(arguments, parts, attack, tmp_path, capsys):
    assert attack(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(part in error for part in parts), error
    assert not (tmp_path / "out" / "attack.json").exists()


def test_results_are_not_overwritten_unasked(attack, capsys):
    assert attack("--p", "inf") == 0
    assert attack("--p", "inf") == 2
    assert "already holds" in capsys.readouterr().err
    assert attack("--p", "inf", "--overwrite") == 0


def test_devices_and_certificates_change_no_verdict(attack, capsys):
    found = []
    for further in ((), ("--device", "cpu,cpu"), ("--no-certify",), ("--batch-size", "7")):
        assert attack("--p", "inf", "--json", "--overwrite", *further) == 0
        found.append(AttackResult.from_json(capsys.readouterr().out).evaluations[0].robust_correct)
    assert len(set(found)) == 1
