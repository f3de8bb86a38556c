"""Figure 6: captions, the contrastive loss, and what the claims compare."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from brittle.errors import InputError
from brittle.experiments import captions, fig6_clip, fig6_vit, judge
from brittle.experiments.captions import CIFAR100, HELD_OUT, KIND_OF, KINDS, NEVER_CAPTIONED, PHRASES, TAUGHT, words_of
from brittle.experiments.clip_networks import contrastive_loss
from brittle.experiments.dense_networks import splits
from helpers.networks import generator


def test_every_class_has_a_name_and_every_kind_five_classes():
    assert len(set(CIFAR100)) == 100
    assert sorted(CIFAR100) == list(CIFAR100)
    assert [KIND_OF.count(kind) for kind in range(len(KINDS))] == [5] * 20
    assert {KIND_OF[k] for k in NEVER_CAPTIONED["cifar100"]} == set(range(20))


def test_held_out_sentences_are_new_and_their_words_are_known():
    assert not set(HELD_OUT) & set(TAUGHT)
    taught = {word for sentence in TAUGHT for word in sentence.split()}
    assert {word for sentence in HELD_OUT for word in sentence.split()} <= taught
    of_kinds = {
        word
        for k, phrase in enumerate(PHRASES["cifar100"])
        if k not in NEVER_CAPTIONED["cifar100"]
        for word in phrase.split()
    }
    for k in NEVER_CAPTIONED["cifar100"]:
        name, *kind = PHRASES["cifar100"][k].split()
        assert name not in of_kinds
        assert set(kind) <= of_kinds


@pytest.mark.parametrize("data", [["digits"], ["cifar10", "cifar100"]])
def test_sentences_are_numbers_that_can_be_read_back(data):
    words = words_of(data)
    back = {number: word for word, number in words.number.items()}
    for name in data:
        sentences = [template.format(phrase) for phrase in PHRASES[name] for template in (*TAUGHT, *HELD_OUT)]
        rows = words(sentences)
        assert rows.shape == (len(sentences), words.length)
        for sentence, row in zip(sentences, rows.tolist(), strict=True):
            assert row[0] == captions.BEGIN
            end = row.index(words.end)
            assert set(row[end + 1 :]) <= {captions.PAD}
            assert " ".join(back[number] for number in row[1:end]) == sentence
            assert max(row) == words.end


def test_the_contrastive_loss_with_one_text_each_is_the_published_one():
    images, texts = (torch.randn(5, 3, generator=generator(seed), dtype=torch.float64) for seed in (0, 1))
    scale = torch.tensor(7.0, dtype=torch.float64)
    scores = scale * F.cosine_similarity(images[:, None], texts[None], dim=2)
    rows, columns = scores.log_softmax(1).diagonal(), scores.log_softmax(0).diagonal()
    found = contrastive_loss(images, texts, torch.eye(5, dtype=torch.bool), scale)
    torch.testing.assert_close(found, -(rows.mean() + columns.mean()) / 2)


def test_texts_of_one_meaning_are_right_for_each_other_s_image():
    images, texts = (torch.randn(3, 4, generator=generator(seed), dtype=torch.float64) for seed in (2, 3))
    same = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    one = torch.tensor(1.0, dtype=torch.float64)
    scores = F.cosine_similarity(images[:, None], texts[None], dim=2)
    rows, columns = scores.log_softmax(1), scores.log_softmax(0)
    by_rows = [(rows[0, 0] + rows[0, 1]) / 2, (rows[1, 0] + rows[1, 1]) / 2, rows[2, 2]]
    by_columns = [(columns[0, 0] + columns[1, 0]) / 2, (columns[0, 1] + columns[1, 1]) / 2, columns[2, 2]]
    expected = -(sum(by_rows) + sum(by_columns)) / 6
    torch.testing.assert_close(contrastive_loss(images, texts, same, one), expected)


def test_classes_without_captions_are_kept_from_training_and_judged_apart():
    learnt, _ = splits("digits", None, training=None, samples=1)
    unseen = set(NEVER_CAPTIONED["digits"])
    seen = fig6_clip.captioned(learnt)
    assert not unseen & set(seen.labels.tolist())
    assert seen.classes == 10
    pairs = fig6_clip.taught_pairs(["digits"], [seen], words_of(["digits"]), 0)
    assert torch.equal(pairs.meaning[pairs.choices[:, 2]], seen.labels)
    assert torch.equal(pairs.images(torch.tensor([3, 1]), 0), seen.inputs[[3, 1]])
    strange = fig6_clip.of_classes(fig6_clip.whole_test("digits", None), sorted(unseen), 12, 0)
    assert strange.classes == len(unseen)
    assert set(strange.labels.tolist()) == set(range(len(unseen)))


def vit_table(harm):
    """Three seeds whose robust share falls by ``harm`` with the strength."""
    rows = []
    for seed in range(3):
        for arch in ("vit", "swin"):
            for alpha, rank in [(0.0, 0), (0.1, 0), (0.5, 0), (0.0, 16), (0.0, 4)]:
                strength = {0.1: 0.5, 0.5: 1.0}.get(alpha, {16: 0.5, 4: 1.0}.get(rank, 0.0))
                kept = 0.6 - harm * strength + 0.001 * seed
                row = {"seed": seed, "arch": arch, "alpha": alpha, "rank": rank, "clean_accuracy": 0.5}
                row |= {"row_error": 0.9 - 0.5 * (alpha > 0) - 0.001 * seed}
                row |= {"spectral_error": 0.9 - 0.5 * (rank > 0) - 0.001 * seed}
                for name in ("linf", "linf_other", "l2", "l2_other"):
                    row |= {f"kept_{name}": kept, f"robust_{name}": kept / 2}
                rows.append(row | {"standard_linf": kept / 2 - 0.001 * seed})
    return pd.DataFrame(rows)


def test_transformers_that_lose_robustness_reproduce_every_claim():
    assert {str(judge(claim, vit_table(0.3), "small").verdict) for claim in fig6_vit.CLAIMS} == {"reproduced"}
    assert fig6_vit.draw(vit_table(0.3)).axes


def test_transformers_that_gain_it_are_the_opposite_wherever_robustness_is_compared():
    table = vit_table(-0.3)
    compared = [claim for claim in fig6_vit.CLAIMS if claim.measure.startswith(("Accuracy under", "Robust over"))]
    found = [str(judge(claim, table, "small").verdict) for claim in compared if "stronger one" not in claim.sentence]
    assert set(found) == {"opposite"}
    assert len(found) == 10


@pytest.mark.parametrize(("harm", "verdict"), [(0.3, "reproduced"), (-0.3, "opposite")])
def test_zero_shot_claims_compare_the_strongest_penalty_with_none(harm, verdict):
    table = vit_table(harm)
    table = table[(table.arch == "vit") & (table["rank"] == 0)].assign(
        unseen_accuracy=0.3, unseen_kept=table.kept_linf, unseen_robust=0.1
    )
    found = [str(judge(claim, table, "small").verdict) for claim in fig6_clip.CLAIMS]
    assert found == ["reproduced", *[verdict] * 6, "reproduced"]
    assert fig6_clip.draw(table).axes


LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def papers_folders(tmp_path):
    """A tiny CLIP with a tokenizer of letters, three photographs with captions, and two classes of ImageNet."""
    from PIL import Image
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    numbers = {
        "<pad>": 0,
        "<start>": 1,
        **{letter: place for place, letter in enumerate(LETTERS, 3)},
        "?": 2,
        "<end>": 40,
    }
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 40)]
    )
    folder = tmp_path / "clip-vit-base-patch32"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", bos_token="<start>", unk_token="?",
        model_max_length=12,
    ).save_pretrained(folder)  # fmt: skip
    half = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(
            text_config={
                **half,
                "vocab_size": 41,
                "max_position_embeddings": 12,
                "eos_token_id": 40,
                "bos_token_id": 1,
            },
            vision_config={**half, "image_size": 16, "patch_size": 8},
            projection_dim=8,
        )
    ).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}')
    pixels = torch.randint(0, 256, (7, 20, 30, 3), dtype=torch.uint8, generator=generator(0)).numpy()
    (tmp_path / "flickr30k" / "flickr30k-images").mkdir(parents=True)
    lines = []
    for place in range(3):
        Image.fromarray(pixels[place]).save(tmp_path / "flickr30k" / "flickr30k-images" / f"{place}.jpg")
        lines += [f"{place}.jpg#{number}\tcaption {LETTERS[place]} {number}" for number in range(2)]
    (tmp_path / "flickr30k" / "results_20130124.token").write_text("\n".join(lines))
    for place, wnid in enumerate(["n01", "n01", "n02", "n02"]):
        for split in ("train", "val"):
            path = tmp_path / split / wnid / f"{place}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[3 + place]).save(path)
    return tmp_path


def test_the_paper_s_scale_runs_on_folders_as_they_are_published(papers_folders, monkeypatch):
    monkeypatch.setattr(fig6_clip, "imagenet_names", lambda: ["tench", "goldfish", "shark"])
    settings = fig6_clip.EXPERIMENT.settings("paper")[-1] | {
        "samples": 4,
        "tuning": 1,
        "data_root": str(papers_folders),
    }
    task = fig6_clip.papers_task("imagenet", settings["pretrained"], papers_folders, training=None, samples=4)
    assert task.pairs.choices.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert task.pairs.meaning.tolist() == [0, 0, 1, 1, 2, 2]
    assert task.pairs.images(torch.tensor([2, 0]), 0).shape == (2, 3, 16, 16)
    assert len(task.ways[0].prompts) == task.ways[0].test.classes == 2
    monkeypatch.setattr(fig6_clip, "robustness_of", lambda network, test, budgets, seed: {
        "logits": tuple(network(test.inputs).shape)
    })  # fmt: skip
    row = fig6_clip.run(**settings)
    assert row["logits"] == (4, 2)
    assert "unseen_kept" not in row


@pytest.mark.parametrize("missing", ["captions", "image", "line"])
def test_what_flickr30k_lacks_is_named(missing, papers_folders):
    root = papers_folders / "flickr30k"
    if missing == "captions":
        (root / "results_20130124.token").unlink()
    elif missing == "image":
        (root / "flickr30k-images" / "1.jpg").unlink()
    else:
        (root / "results_20130124.token").write_text("no caption here")
    with pytest.raises(InputError, match="expected"):
        fig6_clip.papers_task("imagenet", "clip-vit-base-patch32", papers_folders, training=None, samples=4)
