"""``--fail-under-robust``: a floor for pipelines, judged by what was written, after it was written."""

import pytest
from safetensors.torch import save_file

from brittle.cli.commands import run
from brittle.cli.options import Gate
from brittle.results import AttackResult
from helpers.audits import INF, full
from helpers.command_line import one_line
from helpers.networks import mlp

FILES = {
    "audit": ["audit.json", "audit.npz", "report.html", "samples.parquet"],
    "attack": ["attack.json", "samples.parquet"],
}
EVALUATIONS = [norm.evaluation for norm in full().norms]
"""417 of 1000 in l_inf, 583 of 1000 in l_2."""


@pytest.fixture
def command(tmp_path):
    """Run a command on a small network and a few digits with further arguments."""
    save_file(mlp().state_dict(), tmp_path / "net.safetensors")
    fixed = [str(tmp_path / "net.safetensors"), "--arch", "helpers.networks:mlp", "-o", str(tmp_path / "out")]
    return lambda name, *arguments: run([name, *fixed, *arguments])


FAST = ["--data", "digits", "--limit", "12", "--steps", "2", "--preset", "fast", "--p", "inf"]


@pytest.mark.parametrize(("floor", "names"), [(0.417, []), (0.4171, ["ℓ∞"]), (0.583, ["ℓ∞"]), (0.584, ["ℓ∞", "ℓ₂"])])
def test_below_the_floor_is_what_was_counted_below_it(floor, names):
    said = Gate(floor).failure([("net", e) for e in EVALUATIONS])
    assert [name for name in ("ℓ∞", "ℓ₂") if said and name in said] == names
    for part in ("net", str(floor)) if names else ():
        assert part in said


def test_every_network_below_the_floor_is_named():
    said = Gate(0.5).failure([("a", EVALUATIONS[0]), ("b", EVALUATIONS[1]), ("c", EVALUATIONS[0])])
    assert "of a in ℓ∞ (eps 8/255) is 41.7 % (417 of 1000), of c in ℓ∞" in said
    assert "of b" not in said


def test_no_floor_fails_nothing():
    assert Gate().failure([("net", full().norm(INF).evaluation)]) is None


@pytest.mark.parametrize("name", FILES)
def test_the_exit_code_is_4_after_everything_is_written(name, command, tmp_path, capsys):
    assert command(name, *FAST, "--fail-under-robust", "1", "--json") == 4
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES[name]
    printed = capsys.readouterr()
    assert printed.out.startswith("{")
    assert printed.out.endswith("}\n")
    assert printed.err.count("\n") == 1
    for part in ("net.safetensors", "ℓ∞", "of 12", "1.0"):
        assert part in printed.err


def test_at_the_floor_the_exit_code_is_0(command, tmp_path, capsys):
    assert command("attack", *FAST, "--fail-under-robust", "0") == 0
    assert capsys.readouterr().err == ""
    attacked = AttackResult.from_json((tmp_path / "out" / "attack.json").read_bytes()).evaluations[0]
    assert command("attack", *FAST, "--overwrite", "--fail-under-robust", str(attacked.robust_accuracy.value)) == 0


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("floor", ["1.01", "-0.1", "nan"])
def test_a_floor_that_is_no_share_is_refused_before_anything_runs(name, floor, command, tmp_path, capsys):
    assert command(name, *FAST, "--fail-under-robust", floor) == 2
    one_line(capsys, "fail-under-robust", "from 0 to 1")
    assert not (tmp_path / "out").exists()


def test_a_floor_without_attacks_is_refused(command, capsys):
    assert command("audit", "--fail-under-robust", "0") == 2
    one_line(capsys, "fail-under-robust", "expected data")
