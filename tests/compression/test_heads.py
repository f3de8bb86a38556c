"""Attention heads as units: what goes with a head, and the network without it is the one with zeros in its place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from brittle.compression.cost import channel_costs
from brittle.compression.groups import channel_groups, mask_units, remove_units
from brittle.compression.sizes import changed_sizes, resized
from brittle.models.build import build_model
from brittle.models.intake import Logits
from brittle.models.macs import network_size
from helpers.networks import generator, seeded, uniform

SWIN = {
    "img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (2, 1), "num_heads": (2, 4),
    "num_classes": 5,
}  # fmt: skip


def timm_vit():
    timm = pytest.importorskip("timm")
    return timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=3, num_classes=5
    )


def hf_vit():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=24,
        num_labels=5,
    )  # fmt: skip
    return Logits(transformers.ViTForImageClassification(config))


def hf_swin():
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 4], window_size=4, num_labels=3
    )
    return Logits(transformers.SwinForImageClassification(config))


FORMS = {
    "ours": lambda: build_model("vit", {"image_size": 16, "patch_size": 8, "width": 12, "depth": 2, "heads": 3}),
    "timm": timm_vit,
    "timm's Swin": lambda: build_model("timm:swin_tiny_patch4_window7_224", SWIN),
    "transformers": hf_vit,
    "transformers' Swin": hf_swin,
}


def made(form):
    """The network with weights that are no small perturbation of a constant, and two images."""
    model = seeded(FORMS[form]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(parameter.numel())) * 0.3)
    return model, uniform(0, 2, 3, 16, 16)


def heads_of(groups):
    return [group for group in groups.groups if any(part in group.name for part in ("qkv", "q_proj"))]


def without_first_heads(groups):
    return {group.name: torch.arange(1, group.units) for group in heads_of(groups)}


@pytest.mark.parametrize("form", FORMS)
def test_heads_and_neurons_go_and_the_rest_stays_what_it_was(form):
    model, x = made(form)
    groups = channel_groups(model, x)
    assert len(heads_of(groups)) == (3 if "Swin" in form else 2)
    assert {group.units for group in heads_of(groups)} == ({2, 4} if "Swin" in form else {3})
    kept = without_first_heads(groups)
    kept |= {g.name: torch.arange(0, g.units, 2) for g in groups.groups if g not in heads_of(groups)}
    small, masked = remove_units(model, groups, kept, x), mask_units(model, groups, kept)
    with torch.no_grad():
        torch.testing.assert_close(small(x), masked(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(small(x), model(x), atol=1e-2)
    assert network_size(small, x).parameters < network_size(model, x).parameters
    assert sum(p.numel() for p in masked.parameters()) == sum(p.numel() for p in model.parameters())


def test_a_head_that_goes_is_one_whose_output_nobody_reads():
    """Against zeros in what the projection reads, written by a hook."""
    model, x = made("ours")
    groups = channel_groups(model, x)
    kept = {"blocks.0.attn.qkv": torch.tensor([0, 2])}

    def hide(module, inputs):
        heads = inputs[0].unflatten(2, (3, 4)).clone()
        heads[:, :, 1] = 0
        return heads.flatten(2)

    hidden = copy.deepcopy(model)
    hidden.blocks[0].attn.proj.register_forward_pre_hook(hide)
    with torch.no_grad():
        torch.testing.assert_close(remove_units(model, groups, kept, x)(x), hidden(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target", ["parameters", "macs", "filters"])
def test_costs_are_those_of_the_network_without_the_heads(form, target):
    model, x = made(form)
    groups = channel_groups(model, x)
    kept = without_first_heads(groups)
    small = remove_units(model, groups, kept, x)
    said = channel_costs(model, groups.groups, x, target).total({name: len(units) for name, units in kept.items()})
    rows = sum(m.weight.shape[0] for m in small.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    size = network_size(small, x)
    assert said == {"parameters": size.parameters, "macs": size.macs, "filters": rows}[target]


@pytest.mark.parametrize("form", FORMS)
def test_a_network_without_heads_is_built_again_from_its_sizes(form):
    model, x = made(form)
    groups = channel_groups(model, x)
    small = remove_units(model, groups, without_first_heads(groups), x)
    fresh = seeded(FORMS[form])
    again = resized(fresh, changed_sizes(small, fresh)).eval()
    again.load_state_dict(small.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(x), small(x), rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_what_a_smaller_network_has_learnt_since_stands_in_the_masked_one(form):
    model, x = made(form)
    groups = channel_groups(model, x)
    kept = without_first_heads(groups)
    small = remove_units(model, groups, kept, x)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(1.1)
        torch.testing.assert_close(mask_units(model, groups, kept, small)(x), small(x), rtol=1e-4, atol=1e-5)


def test_heads_that_torch_fuses_stay_whole():
    models = pytest.importorskip("torchvision").models
    model = models.VisionTransformer(16, 8, 2, 2, 16, 24, num_classes=5).eval()
    groups = channel_groups(model, uniform(0, 2, 3, 16, 16))
    assert [group.name.rpartition(".")[2] for group in groups.groups] == ["0", "0"]
    assert not any(
        isinstance(model.get_submodule(s.module), nn.MultiheadAttention) for g in groups.groups for s in g.sides
    )


def test_layers_that_are_to_be_kept_keep_their_heads():
    model, x = made("ours")
    groups = channel_groups(model, x, keep=["blocks.0.attn"])
    assert [group.name for group in heads_of(groups)] == ["blocks.1.attn.qkv"]
    assert "is to be kept" in groups.whole["blocks.0.attn.qkv"]
