"""Trained networks by name: from the library's own cache, with the library's constants, and nothing fetched unasked."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from brittle.cli.commands import run
from brittle.errors import InputError
from brittle.models.hugging_face import load_snapshot, snapshot_image_size
from brittle.models.normalize import normalisations_of
from brittle.models.pretrained import expected_statistics, load_pretrained, pretraining_of
from brittle.results import Audit
from helpers.command_line import one_line
from helpers.hostile import Hostile

torchvision = pytest.importorskip("torchvision")
SMALL = "torchvision:squeezenet1_1"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch.hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def face(tmp_path, monkeypatch):
    """An empty cache of Hugging Face's hub, by repository and file."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "face"))

    def place(repository):
        at = tmp_path / "face" / f"models--{repository.replace('/', '--')}"
        (at / "refs").mkdir(parents=True)
        (at / "refs" / "main").write_text("0" * 40)
        (at / "snapshots" / ("0" * 40)).mkdir(parents=True)
        return at / "snapshots" / ("0" * 40)

    return place


def kept(hub, name=SMALL):
    """Fresh weights in the place of the library's, and the network that holds them."""
    torch.manual_seed(0)
    network = torchvision.models.get_model(name.partition(":")[2]).eval()
    torch.save(network.state_dict(), hub / pretraining_of(name).url.rpartition("/")[2])
    return network


def test_what_is_not_in_the_cache_is_not_fetched_and_the_remedy_is_said(hub):
    with pytest.raises(InputError, match=r"got none at .*squeezenet1_1-.*nothing is downloaded.*--download"):
        load_pretrained(SMALL)
    assert list(hub.iterdir()) == []


def test_a_network_of_torchvision_comes_from_the_cache_behind_its_normalisation(hub):
    network, x = kept(hub), torch.rand(1, 3, 64, 64)
    model = load_pretrained(SMALL)
    assert not model.training
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET)
    torch.testing.assert_close(model(x), network((x - mean) / std))
    (known,) = normalisations_of(model)
    assert known.mean == pytest.approx(IMAGENET[0])
    assert known.source == "torchvision's SqueezeNet1_1_Weights.IMAGENET1K_V1"
    torch.testing.assert_close(load_pretrained(SMALL, normalise=False)(x), network(x))


def test_code_in_the_library_s_cache_is_not_run(hub, tmp_path):
    path, witness = hub / pretraining_of(SMALL).url.rpartition("/")[2], tmp_path / "witness"
    torch.save({"weight": Hostile(witness)}, path)
    before = dict(os.environ)
    with pytest.raises(InputError, match="expected the weights of torchvision:squeezenet1_1"):
        load_pretrained(SMALL)
    assert not witness.exists()
    assert dict(os.environ) == before


def test_metadata_are_the_library_s():
    assert pretraining_of("torchvision:vit_b_16", "IMAGENET1K_SWAG_E2E_V1").input_shape == (3, 384, 384)
    assert pretraining_of("torchvision:resnet50").source.endswith("IMAGENET1K_V2")
    timm = pytest.importorskip("timm")
    known, entry = pretraining_of("timm:resnet18"), timm.get_pretrained_cfg("resnet18")
    assert (known.mean, known.std, known.input_shape) == (entry.mean, entry.std, entry.input_size)
    assert known.repository == "timm/resnet18.a1_in1k"
    assert pretraining_of("timm:resnet18", "fb_swsl_ig1b_ft_in1k").repository == "timm/resnet18.fb_swsl_ig1b_ft_in1k"


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("torchvision:resnet1", "DEFAULT", "classification model of torchvision"),
        ("torchvision:resnet18", "V9", "weights: expected one of DEFAULT, IMAGENET1K_V1"),
        ("timm:resnet1", "DEFAULT", "model of timm"),
        ("timm:resnet18", "v9", "weights: expected one of DEFAULT, a1_in1k"),
    ],
)
def test_names_that_no_library_knows_are_refused(name, weights, message):
    pytest.importorskip("timm")
    with pytest.raises(InputError, match=message):
        load_pretrained(name, weights)


def test_a_network_of_timm_comes_from_the_hub_s_cache(face):
    timm = pytest.importorskip("timm")
    name = "test_vit"
    with pytest.raises(InputError, match="nothing is downloaded"):
        load_pretrained(f"timm:{name}")
    torch.manual_seed(0)
    network, known = timm.create_model(name).eval(), pretraining_of(f"timm:{name}")
    save_file(network.state_dict(), face(known.repository) / "model.safetensors")
    model, x = load_pretrained(f"timm:{name}"), torch.rand(1, *known.input_shape)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (known.mean, known.std))
    torch.testing.assert_close(model(x), network((x - mean) / std))


def test_a_network_of_the_hub_comes_from_its_cache(face):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, num_labels=5, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8,
    )  # fmt: skip
    network, name = transformers.ViTForImageClassification(config).eval(), "hf:brittle/tiny"
    with pytest.raises(InputError, match=r"nothing is downloaded unasked: add --download"):
        load_snapshot(name)
    network.save_pretrained(face("brittle/tiny"))
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(load_snapshot(name)(x), network(x).logits)
    assert snapshot_image_size(name) == (16, 16)


def test_weights_in_a_file_are_taken_for_the_library_s_by_their_number_of_classes():
    assert expected_statistics("torchvision:resnet18", {}).mean == IMAGENET[0]
    assert expected_statistics("torchvision:resnet18", {"num_classes": 10}) is None
    assert expected_statistics("fcn", {}) is None


def test_the_command_line_audits_a_network_by_name(hub, tmp_path, capsys):
    out = ["-o", str(tmp_path / "out")]
    assert run(["audit", SMALL, *out]) == 2
    one_line(capsys, "--download", "nothing is downloaded")
    assert run(["audit", SMALL, "--weights", "V9", *out]) == 2
    one_line(capsys, "IMAGENET1K_V1", "V9")
    for options in (["--arch", "fcn"], ["--arch-arg", "depth=1"]):
        assert run(["audit", SMALL, *options, *out]) == 2
        one_line(capsys, "knows its own")
    kept(hub)
    assert run(["audit", SMALL, "--p", "2", *out]) == 0
    found = Audit.load(tmp_path / "out" / "audit.json")
    assert found.normalisation.source == "torchvision's SqueezeNet1_1_Weights.IMAGENET1K_V1"
    assert len(found.layers) == 26
