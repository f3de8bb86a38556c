"""What a network is fed with from the command line, and that it is said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from brittle.cli.commands import run
from brittle.cli.options import Network
from brittle.data.load import MEAN_STD
from brittle.models.build import build_model, fcn
from brittle.models.normalize import normalisations_of
from brittle.results import AttackResult, Audit, Normalisation
from helpers.command_line import one_line

DIGITS = ["--data", "digits", "--limit", "12", "--preset", "fast", "--steps", "1", "--p", "inf"]


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "net.safetensors"
    save_file(fcn(64, 16, 3, 10).state_dict(), path)
    return path


@pytest.fixture
def attacked(weights, tmp_path):
    """Attack a small network with further arguments, and read what was written."""

    def attack(*arguments):
        out = tmp_path / "out"
        assert run(["attack", str(weights), "--arch", "fcn", *DIGITS, *arguments, "-o", str(out), "--overwrite"]) == 0
        return AttackResult.from_json((out / "attack.json").read_text())

    return attack


def test_a_network_is_normalised_by_the_usual_constants_when_asked_to_and_told(attacked, capsys):
    (mean,), (std,) = MEAN_STD["digits"]
    by_set = attacked("--normalise", "dataset")
    assert by_set.normalisation.mean == pytest.approx((mean,))
    printed = capsys.readouterr().out
    assert "normalised inside the network by mean 0.305 and std 0.376 (the usual constants of digits)" in printed
    assert "ℓ∞ 0.06 = 15.3/255 (0.160 after the normalisation)" in printed
    by_hand = attacked("--mean", str(mean), "--std", str(std))
    assert by_hand.evaluations == by_set.evaluations
    assert by_hand.signature.weights == by_set.signature.weights
    assert attacked("--mean", "0", "--std", "0.5", "--normalise", "dataset").normalisation == Normalisation(
        (0.0,), (0.5,), "--mean, --std"
    )
    capsys.readouterr()
    assert attacked().normalisation == Normalisation()
    assert "Inputs in [0, 1], fed as they are: no normalisation is known" in capsys.readouterr().out


BAD = {
    "unknown way": (["--normalise", "imagenet"], ["auto, dataset or none", "imagenet"]),
    "no constants": (["--normalise", "dataset", "--data", "npz:x.npz"], ["usual constants", "npz:x.npz"]),
    "weights of a file": (["--weights", "DEFAULT"], ["weights", "torchvision:NAME"]),
    "nothing to fetch": (["--download"], ["download", "torchvision:NAME"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(case, weights, tmp_path, capsys):
    options, parts = BAD[case]
    assert run(["attack", str(weights), "--arch", "fcn", *DIGITS, *options, "-o", str(tmp_path / "out")]) == 2
    one_line(capsys, *parts)


def test_a_file_is_taken_for_the_library_s_by_its_classes(tmp_path):
    pytest.importorskip("torchvision")
    for classes, mean in ((1000, [pytest.approx((0.485, 0.456, 0.406))]), (7, [])):
        net = build_model("torchvision:squeezenet1_1", {"num_classes": classes})
        save_file(net.state_dict(), tmp_path / "net.safetensors")
        arguments = None if classes == 1000 else [f"num_classes={classes}"]
        network = Network(tmp_path / "net.safetensors", "torchvision:squeezenet1_1", arguments)
        assert [known.mean for known in normalisations_of(network.load("cpu")[0])] == mean
        assert normalisations_of(network.load("cpu", "cifar10")[0]) == []
        assert normalisations_of(replace(network, normalise="none").load("cpu")[0]) == []


def test_weights_without_an_architecture_are_audited_alone(weights, tmp_path, capsys):
    out = ["-o", str(tmp_path / "out")]
    assert run(["audit", str(weights), *out]) == 0
    found = Audit.load(tmp_path / "out" / "audit.json")
    assert [(layer.name, layer.shape) for layer in found.layers] == [("1", (16, 64)), ("3", (16, 16)), ("5", (10, 16))]
    capsys.readouterr()
    assert run(["audit", str(weights), "--data", "digits", *out, "--overwrite"]) == 2
    one_line(capsys, "arch: expected an architecture", "without --data the weights alone are audited")
    assert run(["attack", str(weights), *DIGITS, *out]) == 2
    one_line(capsys, "arch: expected an architecture")


def test_a_program_of_torch_is_not_loaded_from_a_file(tmp_path, capsys):
    (tmp_path / "net.pt2").write_bytes(b"anything")
    assert run(["audit", str(tmp_path / "net.pt2"), "-o", str(tmp_path / "out")]) == 2
    one_line(capsys, "torch.export", "unpickles", "brittle.audit(torch.export.load(PATH), data)")
