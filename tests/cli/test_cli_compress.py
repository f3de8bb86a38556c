"""``brittle compress`` as a user meets it."""

import json

import pandas as pd
import pytest
import torch

import brittle
from brittle.cli.commands import run
from brittle.results import Comparison, Frontier
from helpers.command_line import one_line
from helpers.networks import mlp

FIXED = ("--data", "digits", "--limit", "40", "--p", "inf", "--steps", "2", "--no-certify", "--calibration", "64")
SWEEP = ("--sweep", "0.3:0.6:0.3", "--allocations", "k_term,random", "--min-robust", "0.0")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A trained network of the architecture fcn, as a file."""
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    net = brittle.build_model("fcn", {"in_features": 64, "width": 24, "depth": 3, "classes": 10, "bias": True})
    trained, state = mlp().state_dict(), net.state_dict()
    slices = {name: tuple(map(slice, tensor.shape)) for name, tensor in state.items()}
    brittle.fill(net, {name: trained[name][slices[name]] for name in state})
    brittle.save_state(net, path)
    return path


@pytest.fixture(scope="module")
def into(weights):
    """Run ``brittle compress`` into a folder with further arguments."""
    return lambda folder, *options: run(
        ["compress", str(weights), "--arch", "fcn", *FIXED, "-o", str(folder), *options]
    )


@pytest.fixture
def compress(into, tmp_path):
    """Run ``brittle compress`` into ``tmp_path / "out"`` with further arguments."""
    return lambda *options: into(tmp_path / "out", *options)


@pytest.fixture(scope="module")
def swept(into, tmp_path_factory):
    """The folder of a frontier, to be read only."""
    folder = tmp_path_factory.mktemp("swept") / "out"
    assert into(folder, *SWEEP, "-q") == 0
    return folder


def test_the_folder_holds_the_network_and_what_it_cost_also_below_a_floor(compress, tmp_path, capsys):
    assert compress("--ratio", "0.4", "--format", "apb", "--fail-under-robust", "1.0") == 4
    said = capsys.readouterr()
    assert "of the parameters went (asked for: 40 %)" in said.out
    assert "robust accuracy of compressed in ℓ∞" in said.err
    names = ["comparison.json", "masked.pt", "model.safetensors", "recipe.json", "report.html", "samples.parquet"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    comparison = Comparison.load(tmp_path / "out" / "comparison.json")
    network, config = brittle.load_run(tmp_path / "out")
    before, after = comparison.networks
    data = brittle.load_data("digits", limit=40)
    masked = brittle.build_model("fcn", config.arguments)
    brittle.fill(masked, brittle.read_state(tmp_path / "out" / "masked.pt"))
    with torch.no_grad():
        logits = network(data.inputs)
        assert float((masked(data.inputs) - logits).abs().max()) <= 1e-4 * float(logits.abs().max())
    right = int((logits.argmax(1) == data.labels).sum())
    assert (after.clean.hits, after.clean.n) == (right, 40)
    assert sum(p.numel() for p in network.parameters()) == after.size.parameters
    assert after.size.parameters == pytest.approx(0.6 * before.size.parameters, abs=0.01 * before.size.parameters)
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert (recipe["asked"]["ratio"], recipe["arch"], recipe["data"]) == (0.4, "fcn", "digits")
    assert recipe["arguments"] == {"in_features": 64, "width": 24, "depth": 3, "classes": 10, "bias": True}
    assert compress("--ratio", "0.4") == 2  # already there


def test_the_planner_goes_by_the_first_budget_of_the_command(compress, monkeypatch):
    from brittle.delivery import filters
    from brittle.errors import InputError

    asked = []

    def note(*_, eps, p, **__):
        asked.append((p, eps))
        raise InputError("attack: expected no more")

    monkeypatch.setattr(filters, "apgd", note)
    assert compress("--p", "2", "--eps", "2=0.7", "--eps", "inf=0.01") == 2
    assert asked == [(2.0, 0.7)]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--ratio", "1.5"), ["ratio: expected a share above 0 and below 1"]),
        (("--ratio", "0.99"), ["ratio: expected at most", "every layer is at its floor"]),
        (("--keep", "9"), ["keep: expected names of the model's modules"]),
        (("--allocate", "best"), ["allocate: expected one of"]),
        (("--adversarial", "inf=0.1"), ["fine-tune: expected a number of epochs"]),
        (("--format", "exe"), ["format: expected some of run, pt2, onnx, apb"]),
        (("--format", "apb", "--remove", "ranks"), ["format: expected filters or weights"]),
        (("--min-robust", "0.4"), ["sweep: expected FROM:TO:STEP"]),
        (("--sweep", "0.5:0.1:0.1"), ["sweep: expected FROM:TO:STEP, rising"]),
        ((*SWEEP, "--fail-under-robust", "0.5"), ["fail-under-robust: expected none with --sweep"]),
        (("--data", "npz:nothing.npz"), ["nothing.npz"]),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(compress, tmp_path, capsys, options, parts):
    assert compress(*options) == 2
    one_line(capsys, *parts)
    assert not (tmp_path / "out").exists()


def test_a_frontier_keeps_the_smallest_network_above_the_floor(swept):
    names = ["frontier.csv", "frontier.json", "frontier.parquet", "model.safetensors", "recipe.json", "report.html"]
    assert sorted(path.name for path in swept.iterdir()) == names
    frontier = Frontier.load(swept / "frontier.json")
    network, _ = brittle.load_run(swept)
    assert sum(p.numel() for p in network.parameters()) == frontier.smallest.size.parameters
    assert frontier.smallest.ratio == 0.6
    tables = [read(swept / f"frontier.{kind}") for read, kind in ((pd.read_csv, "csv"), (pd.read_parquet, "parquet"))]
    assert [*tables[0].columns] == [*tables[1].columns]
    assert [*tables[0]["parameters"]] == [*tables[1]["parameters"]]


def test_the_page_of_a_frontier_is_drawn_again_from_its_folder(swept, tmp_path):
    for place in (swept, swept / "frontier.json"):
        assert run(["report", str(place), "-o", str(tmp_path / "again.html")]) == 0
        assert (tmp_path / "again.html").read_bytes() == (swept / "report.html").read_bytes()


def test_a_frontier_without_a_network_above_the_floor_says_so_and_writes_all_the_same(compress, tmp_path, capsys):
    command = ("--sweep", "0.3", "--allocations", "k_term", "--min-robust", "1.0", "-q")
    (tmp_path / "out").mkdir()
    for name in ("recipe.json", "model.safetensors"):  # an earlier network, which must not pass for one above the floor
        (tmp_path / "out" / name).write_text("earlier")
    assert compress(*command) == 2
    one_line(capsys, "already holds results (recipe.json)")
    assert compress(*command, "--overwrite") == 4
    one_line(capsys, "no compressed network has a robust accuracy of at least 1")
    names = ["frontier.csv", "frontier.json", "frontier.parquet", "report.html"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_an_interrupted_frontier_goes_on_where_it_stopped(compress, swept, tmp_path, monkeypatch):
    from brittle.delivery import frontiers

    real, made = frontiers.finish, []

    def finish(plan, execution):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append((plan.asked.allocate, plan.asked.ratio))
        return real(plan, execution)

    monkeypatch.setattr(frontiers, "finish", finish)
    assert compress(*SWEEP) == 130
    assert len(pd.read_csv(tmp_path / "out" / "frontier.csv")) == 3
    assert not (tmp_path / "out" / "frontier.json").exists()
    interrupted = list(made)
    made.clear()
    monkeypatch.setattr(frontiers, "finish", lambda *given: made.append(given[0].asked) or real(*given))
    assert compress(*SWEEP) == 0
    went_on = [(asked.allocate, asked.ratio) for asked in made[:2]]
    assert interrupted + went_on == [(name, ratio) for ratio in (0.3, 0.6) for name in ("k_term", "random")]
    assert Frontier.load(tmp_path / "out" / "frontier.json") == Frontier.load(swept / "frontier.json")
