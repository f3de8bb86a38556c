"""CLIP as a classifier: its logits are those of the libraries' own, for either form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import brittle
from brittle.errors import InputError
from brittle.models.zero_shot import image_encoder, temperature, text_features, zero_shot_classifier
from helpers.networks import uniform, untouched

END = 40
TOKENS = torch.tensor([[39, 5, 6, END, 0], [39, 7, 8, 9, END], [39, 1, END, 0, 0]])


def hugging_face():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    half = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**half, "vocab_size": END + 1, "max_position_embeddings": 5, "eos_token_id": END},
        vision_config={**half, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    return transformers.CLIPModel(config).eval()


def open_clip_form():
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    half = {"width": 64, "layers": 1}
    return open_clip.CLIP(
        embed_dim=8,
        vision_cfg={**half, "image_size": 16, "patch_size": 8},
        text_cfg={**half, "context_length": 5, "vocab_size": END + 1, "heads": 2},
    ).eval()


FORMS = {"transformers": hugging_face, "open_clip": open_clip_form}


@pytest.mark.parametrize("form", FORMS)
def test_with_one_prompt_a_class_logits_are_the_library_s(form):
    clip, x = FORMS[form](), uniform(0, 4, 3, 16, 16)
    with untouched(clip):
        classifier = zero_shot_classifier(clip, [row[None] for row in TOKENS])
    with torch.no_grad():
        if form == "transformers":
            expected = clip(input_ids=TOKENS, pixel_values=x).logits_per_image
        else:
            image, text, scale = clip(x, TOKENS)
            expected = scale * image @ text.T
        torch.testing.assert_close(classifier(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_several_prompts_count_as_their_mean_direction(form):
    clip = FORMS[form]()
    classifier = zero_shot_classifier(clip, [TOKENS[:2], TOKENS[2:]])
    with torch.no_grad():
        one, two, three = F.normalize(text_features(clip, TOKENS), dim=1)
    torch.testing.assert_close(classifier.classes[0], F.normalize(one + two, dim=0))
    torch.testing.assert_close(classifier.classes[1], three)
    assert float(classifier.scale) == pytest.approx(float(temperature(clip).detach()))


@pytest.mark.parametrize("form", FORMS)
def test_the_classifier_shares_the_image_half_and_is_attacked_like_any_network(form):
    clip, x = FORMS[form](), uniform(1, 6, 3, 16, 16)
    classifier = zero_shot_classifier(clip, [row[None] for row in TOKENS])
    own = {id(parameter) for parameter in clip.parameters()}
    assert {id(parameter) for parameter in classifier.parameters()} <= own
    with torch.no_grad():
        y = classifier(x).argmax(1)
    found = brittle.evaluate(classifier, (x, y), brittle.Threat([brittle.fgsm]), eps=0.1)
    assert found.clean_accuracy.hits == len(x)


def test_a_temperature_is_at_most_a_hundred():
    clip = hugging_face()
    with torch.no_grad():
        clip.logit_scale.fill_(9.0)
    assert float(temperature(clip)) == 100


@pytest.mark.parametrize("prompts", [[], [TOKENS[:0]], [TOKENS[0]], [TOKENS + 100]])
def test_prompts_that_cannot_be_read_are_refused(prompts):
    with pytest.raises(InputError, match="prompts: expected tokens"):
        zero_shot_classifier(hugging_face(), prompts)


def test_other_networks_are_refused():
    for ask in (image_encoder, lambda net: text_features(net, TOKENS), temperature):
        with pytest.raises(InputError, match="clip: expected a"):
            ask(nn.Linear(3, 3))
