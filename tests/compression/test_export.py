"""Exported networks compute what the network computes, for any number of samples, or there is no file."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import brittle
from brittle.compression.export import TOLERANCE, export_onnx, export_program, relative_gap
from brittle.compression.leaderboard import export_masked
from brittle.errors import InputError, MissingExtra
from brittle.models.normalize import normalised
from helpers.compressed import Kinds, attentive, dense, filled, small_fcn
from helpers.networks import digits, uniform, untidy, untouched

IMAGES = uniform(5, 3, 3, 16, 16)
EXPORTS = {"pt2": export_program, "onnx": export_onnx}


def run(path, x):
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(x)
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(["logits"], {"x": x.numpy()})[0])


@pytest.mark.parametrize(
    ("ending", "make"),
    [("pt2", dense), ("onnx", lambda: normalised(attentive(), (0.2,) * 3, (0.7,) * 3))],
    ids=["concatenations", "attention"],
)
def test_a_file_computes_what_the_network_does(ending, make, tmp_path):
    network, path = filled(make()), tmp_path / f"net.{ending}"
    gap = EXPORTS[ending](network, IMAGES, path)
    assert gap <= TOLERANCE
    for n in (1, 2, 7):
        x = uniform(n, n, 3, 16, 16)
        with torch.no_grad():
            assert relative_gap(run(path, x), network(x)) <= TOLERANCE


@pytest.mark.parametrize("ending", EXPORTS)
def test_export_is_silent_and_leaves_everything_as_it_was(ending, tmp_path, capfd):
    network, (x, _) = untidy(), digits()
    with untouched(network):
        EXPORTS[ending](network, x[:1], tmp_path / f"net.{ending}")
    assert capfd.readouterr() == ("", "")
    x = x[:40]
    with torch.no_grad():
        assert relative_gap(run(tmp_path / f"net.{ending}", x), network.eval()(x)) <= TOLERANCE
    assert [path.name for path in tmp_path.iterdir()] == [f"net.{ending}"]


class Drawn(nn.Module):
    """Another answer every time."""

    def forward(self, x):
        return x.flatten(1) + torch.rand_like(x.flatten(1))


class Fixed(nn.Module):
    """Reads a number off the data, which no graph can hold."""

    def forward(self, x):
        return x.flatten(1) * float(x.sum())


@pytest.mark.parametrize(
    ("network", "x", "name", "message"),
    [
        (Kinds(2), IMAGES, "net.txt", r"path: expected the ending .pt2; got .*net.txt"),
        (Kinds(2), IMAGES[:0], "net.pt2", "x: expected at least one sample"),
        (Kinds(2), IMAGES[:, :2], "net.pt2", "x: expected samples that the network can run on"),
        (Drawn(), IMAGES, "net.pt2", r"keeps within 0.0001 of the largest; got 0\.\d"),
        (Fixed(), IMAGES, "net.pt2", "expected a network that .pt2 can hold"),
    ],
)
def test_what_does_not_compute_the_same_is_not_written(network, x, name, message, tmp_path):
    (tmp_path / "net.pt2").write_text("before")
    with pytest.raises(InputError, match=message):
        export_program(network, x, tmp_path / name)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("net.pt2", "before")]


def test_onnx_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"ONNX needs the package onnxruntime; .*brittle\[export\]"):
        export_onnx(small_fcn()[0], digits()[0][:2], tmp_path / "net.onnx")


@pytest.mark.parametrize(
    ("outputs", "gap"),
    [([1.0, -4.0], 0), ([1.0, -3.0], 0.25), ([1.0, float("nan")], float("inf")), ([1.0], float("inf"))],
)
def test_gaps_are_relative_to_the_largest_output(outputs, gap):
    assert relative_gap(torch.tensor(outputs), torch.tensor([1.0, -4.0])) == gap


# The benchmark's form


def benchmark_resnet18(state, x):
    """The benchmark's ResNet-18, from the names and shapes of its state alone."""

    def norm(x, name):
        return F.batch_norm(x, *(state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))

    x = F.relu(norm(F.conv2d(x, state["conv1.weight"], padding=1), "bn1"))
    for block in (f"layer{stage}.{place}" for stage in range(1, 5) for place in range(2)):
        stride = 2 if block in ("layer2.0", "layer3.0", "layer4.0") else 1
        out = F.relu(norm(F.conv2d(x, state[f"{block}.conv1.weight"], stride=stride, padding=1), f"{block}.bn1"))
        out = norm(F.conv2d(out, state[f"{block}.conv2.weight"], padding=1), f"{block}.bn2")
        if f"{block}.shortcut.0.weight" in state:
            x = norm(F.conv2d(x, state[f"{block}.shortcut.0.weight"], stride=stride), f"{block}.shortcut.1")
        x = F.relu(out + x)
    return F.linear(F.avg_pool2d(x, 4).flatten(1), state["linear.weight"], state["linear.bias"])


@pytest.mark.parametrize("wrapped", [True, False])
def test_the_masked_form_computes_the_same_in_the_benchmark(wrapped, tmp_path):
    network, x = filled(brittle.build_model("resnet18-cifar", {"width": 2})), uniform(1, 2, 3, 32, 32)
    network.layer2[0].conv1.weight.data[::2] = 0
    network = normalised(network, (0.0,) * 3, (1.0,) * 3) if wrapped else network
    export_masked(network, tmp_path / "net.pt")
    state = torch.load(tmp_path / "net.pt", weights_only=True)["state_dict"]
    with torch.no_grad():
        torch.testing.assert_close(benchmark_resnet18(state, x), network.eval()(x))
    zeros = state["layer2.0.conv1.weight"].flatten(1).abs().sum(1) == 0
    assert zeros.tolist() == [True, False] * 2


def test_other_masked_networks_keep_their_names(tmp_path):
    network = brittle.build_model("vgg16", {"width": 1})
    export_masked(network, tmp_path / "net.pth")
    again = brittle.build_model("vgg16", {"width": 1}, seed=1)
    brittle.fill(again, brittle.read_state(tmp_path / "net.pth"))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


def test_the_benchmark_takes_no_normalisation(tmp_path):
    network = brittle.build_model("resnet18-cifar", {"width": 2})
    with pytest.raises(InputError, match="--mean 0,0,0 --std 1,1,1"):
        export_masked(normalised(network, (0.5,) * 3, (1.0,) * 3), tmp_path / "net.pt")
    with pytest.raises(InputError, match="path: expected an ending"):
        export_masked(network, tmp_path / "net.safetensors")
    assert not any(tmp_path.iterdir())
