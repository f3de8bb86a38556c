"""Networks of transformers from a folder: what they compute is what the library computes, and nothing else is read."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from brittle.errors import InputError
from brittle.models.build import build_model
from brittle.models.hugging_face import load_snapshot, snapshot_statistics
from brittle.models.intake import Logits
from brittle.models.layers import read_layers

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def vit(classes=5, **other):
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=classes, **SIZES, **other)
    return transformers.ViTForImageClassification(config).eval()


def swin():
    import transformers

    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, num_labels=3
    )
    return transformers.SwinForImageClassification(config).eval()


def text():
    import transformers

    return transformers.BertModel(transformers.BertConfig(vocab_size=20, max_position_embeddings=8, **SIZES)).eval()


@pytest.fixture
def folder(tmp_path):
    vit().save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def edit(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("make", [vit, swin])
def test_logits_are_the_library_s(make, tmp_path):
    original = make()
    original.save_pretrained(tmp_path / "net")
    model = load_snapshot(f"hf:{tmp_path / 'net'}")
    x = torch.rand(3, 3, 16, 16)
    assert isinstance(model, Logits)
    assert not model.training
    torch.testing.assert_close(model(x), original(pixel_values=x).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    "said",
    [
        {"do_normalize": True, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]},
        {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "rescale_factor": 1 / 127.5},
        {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0, 70.0, 80.0]},
        {"do_rescale": False, "do_normalize": False},
        {"do_normalize": False},
    ],
)
def test_the_processor_s_normalisation_is_part_of_the_network(said, folder):
    """Against the library's own processor, on bytes."""
    import transformers

    (folder / "preprocessor_config.json").write_text(json.dumps({"do_resize": False, **said}))
    processor = transformers.ViTImageProcessorPil(**{"do_resize": False, **said})
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16), dtype=np.uint8)
    read = processor(list(pixels), return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    if not said.get("do_normalize", True):
        read = read.float()
    model = load_snapshot(f"hf:{folder}")
    with torch.no_grad():
        expected = vit()(pixel_values=read).logits
        torch.testing.assert_close(model(torch.from_numpy(pixels) / 255), expected, rtol=1e-4, atol=1e-4)


def test_without_a_processor_s_file_images_are_taken_as_they_are(folder):
    assert snapshot_statistics(f"hf:{folder}") is None


def test_a_network_that_takes_no_images_is_read_as_it_is(tmp_path):
    text().save_pretrained(tmp_path / "bert")
    model = load_snapshot(f"hf:{tmp_path / 'bert'}")
    assert type(model).__name__ == "BertModel"
    views = read_layers(model).views
    assert [view.matrix.shape for view in views if "attention.self" in view.name or "attention.q" in view.name]


def test_the_architecture_alone_has_fresh_weights_and_takes_other_values(folder):
    name = f"hf:{folder}"
    (folder / "model.safetensors").unlink()
    state = torch.get_rng_state()
    model = build_model(name, {"num_labels": 7}, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 7)
    again, other = build_model(name, {"num_labels": 7}, seed=1), build_model(name, {"num_labels": 7}, seed=2)
    weights = [next(iter(net.parameters())) for net in (model, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_loading_leaves_random_states_dtype_and_the_library_s_settings(folder):
    from transformers.utils import logging

    before = (
        torch.get_rng_state(),
        torch.get_default_dtype(),
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
    )
    load_snapshot(f"hf:{folder}")
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (torch.get_default_dtype(), logging.get_verbosity(), logging.is_progress_bar_enabled())


def test_code_that_a_folder_brings_is_not_run(folder, tmp_path):
    trap = tmp_path / "ran"
    (folder / "mine.py").write_text(f"open({str(trap)!r}, 'w')\nclass Config: pass\nclass Net: pass\n")
    edit(folder, auto_map={"AutoConfig": "mine.Config", "AutoModelForImageClassification": "mine.Net"})
    load_snapshot(f"hf:{folder}")
    assert not trap.exists()
    edit(folder, model_type="mine")
    with pytest.raises(InputError, match="model_type of transformers; got 'mine'"):
        load_snapshot(f"hf:{folder}")
    assert not trap.exists()


def test_pickled_weights_are_not_read(folder):
    (folder / "model.safetensors").unlink()
    torch.save(vit().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"expected weights as \*\.safetensors"):
        load_snapshot(f"hf:{folder}")


def test_a_network_whose_head_is_missing_is_refused(folder):
    """The library would start the head at random and say so in a log."""
    vit().vit.save_pretrained(folder)
    edit(folder, architectures=["ViTForImageClassification"])
    with pytest.raises(InputError, match=r"got missing classifier\.bias"):
        load_snapshot(f"hf:{folder}")


def test_weights_of_another_shape_are_refused(folder):
    edit(folder, id2label={str(i): str(i) for i in range(9)}, label2id={str(i): i for i in range(9)})
    with pytest.raises(InputError, match=r"got mismatched classifier\.bias"):
        load_snapshot(f"hf:{folder}")


@pytest.mark.parametrize("damage", ["config", "list", "weights", "class", "nan", "statistics", "nothing", "size"])
def test_damage_is_told_in_words(damage, folder):
    config, weights = folder / "config.json", folder / "model.safetensors"
    if damage == "config":
        config.write_text("{")
    elif damage == "list":
        config.write_text("[]")
    elif damage == "weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "class":
        edit(folder, architectures=["Tensor"])
    elif damage == "nan":
        broken = vit()
        nn.init.constant_(broken.classifier.bias, float("nan"))
        broken.save_pretrained(folder)
    elif damage == "statistics":
        (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True, "image_mean": "grey"}))
    elif damage == "size":
        edit(folder, hidden_size=-3)
    else:
        shutil.rmtree(folder)
    with pytest.raises(InputError, match="expected"):
        load_snapshot(f"hf:{folder}")


def test_a_network_of_the_library_s_own_answers_with_logits_behind_a_wrapper():
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(Logits(vit())(x), vit()(x).logits)
