"""One vision transformer in the forms of three libraries: what is found of it is the same."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch

import brittle
from brittle.attacks import apgd
from brittle.auditing import audit
from brittle.evaluation import Threat
from brittle.linear.compressibility import k_term_error
from brittle.models.intake import Logits
from brittle.models.layers import read_layers

WIDTH, HEADS, DEPTH, HIDDEN, CLASSES = 16, 2, 2, 24, 3
PARTS = ("q", "k", "v", "proj", "fc1", "fc2")


def hugging_face():
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
        intermediate_size=HIDDEN, num_labels=CLASSES, layer_norm_eps=1e-6, initializer_range=0.3,
    )  # fmt: skip
    return Logits(transformers.ViTForImageClassification(config)).eval()


def state_of(model):
    """The weights by names of our own: what each matrix or vector is for."""
    tensors = {name.removeprefix("network."): tensor for name, tensor in model.state_dict().items()}
    ends = {
        "embeddings.cls_token": "cls", "embeddings.position_embeddings": "positions",
        "patch_embeddings.projection.weight": "patches.weight", "patch_embeddings.projection.bias": "patches.bias",
        "vit.layernorm.weight": "norm.weight", "vit.layernorm.bias": "norm.bias",
        "classifier.weight": "head.weight", "classifier.bias": "head.bias",
    }  # fmt: skip
    inner = {
        "attention.q_proj": "q", "attention.k_proj": "k", "attention.v_proj": "v", "attention.o_proj": "proj",
        "mlp.fc1": "fc1", "mlp.fc2": "fc2", "layernorm_before": "norm1", "layernorm_after": "norm2",
    }  # fmt: skip
    named = {}
    for name, tensor in tensors.items():
        block = name.removeprefix("vit.layers.").partition(".")
        if name.startswith("vit.layers."):
            module, _, kind = block[2].rpartition(".")
            named[f"{block[0]}.{inner[module]}.{kind}"] = tensor
        else:
            named[next(role for end, role in ends.items() if name.endswith(end))] = tensor
    return named


def timm_form(state):
    timm = pytest.importorskip("timm")
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, mlp_ratio=HIDDEN / WIDTH,
        num_classes=CLASSES,
    )  # fmt: skip
    names = {
        "cls_token": "cls", "pos_embed": "positions", "patch_embed.proj.weight": "patches.weight",
        "patch_embed.proj.bias": "patches.bias",
        **{f"{part}.{kind}": f"{part}.{kind}" for part in ("norm", "head") for kind in ("weight", "bias")},
    }  # fmt: skip
    filled = {name: state[role] for name, role in names.items()}
    for block in range(DEPTH):
        for kind in ("weight", "bias"):
            filled[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat([state[f"{block}.{part}.{kind}"] for part in "qkv"])
            for name, part in (
                ("attn.proj", "proj"), ("mlp.fc1", "fc1"), ("mlp.fc2", "fc2"), ("norm1", "norm1"), ("norm2", "norm2")
            ):  # fmt: skip
                filled[f"blocks.{block}.{name}.{kind}"] = state[f"{block}.{part}.{kind}"]
    model.load_state_dict(filled)
    return model.eval()


def torchvision_form(state):
    models = pytest.importorskip("torchvision").models
    model = models.VisionTransformer(16, 8, DEPTH, HEADS, WIDTH, HIDDEN, num_classes=CLASSES)
    filled = {
        "class_token": state["cls"], "encoder.pos_embedding": state["positions"],
        "conv_proj.weight": state["patches.weight"], "conv_proj.bias": state["patches.bias"],
    }  # fmt: skip
    for kind in ("weight", "bias"):
        filled |= {f"encoder.ln.{kind}": state[f"norm.{kind}"], f"heads.head.{kind}": state[f"head.{kind}"]}
        for block in range(DEPTH):
            layer = f"encoder.layers.encoder_layer_{block}"
            filled[f"{layer}.self_attention.in_proj_{kind}"] = torch.cat(
                [state[f"{block}.{part}.{kind}"] for part in "qkv"]
            )
            for name, part in (
                ("self_attention.out_proj", "proj"), ("mlp.0", "fc1"), ("mlp.3", "fc2"), ("ln_1", "norm1"),
                ("ln_2", "norm2"),
            ):  # fmt: skip
                filled[f"{layer}.{name}.{kind}"] = state[f"{block}.{part}.{kind}"]
    model.load_state_dict(filled)
    return model.eval()


FORMS = {
    "transformers": lambda: hugging_face(),
    "timm": lambda: timm_form(state_of(hugging_face())),
    "torchvision": lambda: torchvision_form(state_of(hugging_face())),
}


def samples():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(12, 3, 16, 16, generator=generator)
    with torch.no_grad():
        return x, hugging_face()(x).argmax(1)


@functools.cache
def audited(form):
    threat = Threat([functools.partial(apgd, steps=5)])
    return audit(FORMS[form](), samples(), threat, eps={math.inf: 0.1}, p=math.inf, honesty=False)


@pytest.mark.parametrize("form", ["timm", "torchvision"])
def test_each_library_s_form_computes_the_same(form):
    x, _ = samples()
    with torch.no_grad():
        torch.testing.assert_close(FORMS[form]()(x), hugging_face()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["timm", "torchvision"])
def test_each_library_s_form_has_the_same_audit(form):
    one, other = audited("transformers"), audited(form)
    matrices = {view.name: view.matrix for view in read_layers(hugging_face()).views}
    others = {view.name: view.matrix for view in read_layers(FORMS[form]()).views}
    assert len(one.layers) == len(other.layers) == len(matrices) == 2 + len(PARTS) * DEPTH
    for layer in one.layers:
        (same,) = [found for found in other.layers if torch.equal(others[found.name], matrices[layer.name])]
        assert dataclasses.replace(same, name=layer.name, kind=layer.kind) == layer
    (a,), (b,) = one.norms, other.norms
    assert a.evaluation.clean_accuracy == b.evaluation.clean_accuracy
    assert a.evaluation.robust_accuracy == b.evaluation.robust_accuracy
    assert a.lipschitz.upper is b.lipschitz.upper is None
    assert a.lipschitz.median_lower == pytest.approx(b.lipschitz.median_lower, rel=1e-3)
    assert one.parameters == other.parameters


def test_heads_are_rows_of_queries_keys_and_values():
    layers = {layer.name.rpartition(".")[2]: layer for layer in audited("transformers").layers}
    views = {view.name.rpartition(".")[2]: view for view in read_layers(hugging_face()).views}
    for part in ("q_proj", "k_proj", "v_proj"):
        W = views[part].matrix.double()
        norms = torch.stack([rows.norm() for rows in W.chunk(HEADS)])
        assert layers[part].head_norms == pytest.approx(norms.tolist())
        assert layers[part].head_error[0] == pytest.approx(float(k_term_error(norms, 1)))
        assert layers[part].head_error[3] == pytest.approx(float(k_term_error(norms, 1)))
    assert layers["o_proj"].head_norms == layers["fc1"].head_error == ()


def test_what_attention_forbids_is_said_in_words():
    for form in FORMS:
        (reason,) = [item.reason for item in audited(form).not_measured if item.name == "certified ℓ∞ bound"]
        assert "attention" in reason.lower()


def test_an_audit_with_heads_is_kept_whole_and_drawn():
    found = audited("timm")
    assert brittle.Audit.from_json(found.to_json()) == found
    page = brittle.reporting.page.report_html(found)
    assert "head_error_10pct" in page
    assert found.to_frame()["heads"].tolist().count(HEADS) == 3 * DEPTH
