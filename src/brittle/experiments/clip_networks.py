"""CLIP in small: built, and trained on images and their captions by the contrastive loss (Radford et al. 2021)."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brittle.errors import MissingExtra
from brittle.experiments.captions import BEGIN, PAD, Words
from brittle.models.isolation import isolated_globals
from brittle.models.zero_shot import image_encoder, temperature, text_features
from brittle.random_streams import generator
from brittle.training.interventions.assembly import Interventions, bind_penalties
from brittle.training.recipe import Recipe
from brittle.training.streams import order_stream

CAPTIONS = 5
"""The stream that draws which of its captions an image meets."""
PROJECTIONS = ("visual_projection", "text_projection")
"""Maps into the space that both halves share: their heads."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Images and what is said of them.

    Attributes:
        images: From rows ``(n,)`` and the epoch, from 0, to images ``(n, C, H, W)`` in [0, 1].
        captions: ``(M, T)`` tokens.
        choices: ``(N, c)``: the captions of every image.
        meaning: ``(M,)``: captions of one meaning have one number, and none of them is wrong for the other's image.
    """

    images: Callable[[Tensor, int], Tensor]
    captions: Tensor
    choices: Tensor
    meaning: Tensor


def tiny_clip(words: Words, *, channels: int, size: int, patch: int, width: int, depth: int, seed: int) -> nn.Module:
    """A CLIP of transformers with fresh weights, for sentences of some words.

    Args:
        words: Of all sentences.
        channels: Of the images.
        size: Their height and width.
        patch: Pixels of a side of a patch.
        width: Numbers in a token, in either half; 32 for every head.
        depth: Blocks of either half.
        seed: Of the weights.

    Raises:
        MissingExtra: transformers is not installed.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise MissingExtra("transformers", "transformers", "a CLIP") from None
    half = {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth,
        "num_attention_heads": max(1, width // 32),
    }  # fmt: skip
    config = transformers.CLIPConfig(
        text_config={
            **half, "vocab_size": words.end + 1, "max_position_embeddings": words.length, "eos_token_id": words.end,
            "bos_token_id": BEGIN, "pad_token_id": PAD,
        },
        vision_config={**half, "image_size": size, "patch_size": patch, "num_channels": channels},
        projection_dim=width,
    )  # fmt: skip
    with isolated_globals(seed):
        clip: nn.Module = transformers.CLIPModel(config)
    return clip


def contrastive_loss(images: Tensor, texts: Tensor, same: Tensor, scale: Tensor) -> Tensor:
    r"""The symmetric loss of CLIP, where several texts of a batch may say the same.

    With S the scaled cosines, both directions of

    .. math:: -\frac1n \sum_i \frac{1}{|P_i|} \sum_{j \in P_i} \log \mathrm{softmax}(S_i)_j

    are averaged; P_i are the texts that are right for image i. With one each it is the published loss.

    Args:
        images: Features ``(n, d)``.
        texts: Features ``(n, d)``, of one caption of every image.
        same: ``(n, n)``: whether text j is right for image i; symmetric, true on the diagonal.
        scale: The inverse temperature.
    """
    scores = scale * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    target = same.to(scores.dtype)
    target = target / target.sum(1, keepdim=True)
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


def fit_contrastive(
    clip: nn.Module,
    normalize: nn.Module,
    pairs: Pairs,
    *,
    epochs: int,
    alpha: float,
    seed: int,
    lr: float,
    batch: int = 128,
) -> None:
    """Train a CLIP in place, on the device where it is: AdamW with weight decay, the learning rate along a cosine.

    Args:
        clip: Of transformers or open_clip.
        normalize: Stands before its image half.
        pairs: What it learns from.
        epochs: Passes over the images.
        alpha: Strength of the scale-invariant group lasso, summed over the Linear layers of both halves but the two
            projections.
        seed: Of order, crops and captions.
        lr: Learning rate at the start.
        batch: Images a step, each with one of its captions.
    """
    encoder, device = image_encoder(clip), next(clip.parameters()).device
    layers = tuple(
        name for name, module in clip.named_modules() if isinstance(module, nn.Linear) and name not in PROJECTIONS
    )
    recipe = Recipe(penalties={"scale_invariant_group_lasso": alpha} if alpha else {}, layers=layers)
    penalties = bind_penalties(clip, recipe, Interventions())
    optimizer = torch.optim.AdamW(clip.parameters(), lr=lr, weight_decay=recipe.weight_decay)
    count, done = len(pairs.choices), 0
    steps = epochs * max(1, count // batch)
    clip.train()
    for epoch in range(epochs):
        order = torch.randperm(count, generator=generator(seed, order_stream(epoch)))
        drawn = torch.randint(pairs.choices.shape[1], (count,), generator=generator(seed + epoch, CAPTIONS))
        for rows in order.split(batch)[: max(1, count // batch)]:
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 + math.cos(math.pi * done / steps)) / 2
            chosen = pairs.choices[rows, drawn[rows]]
            meaning = pairs.meaning[chosen]
            images = encoder(normalize(pairs.images(rows, epoch).to(device)))
            texts = text_features(clip, pairs.captions[chosen].to(device))
            same = (meaning[:, None] == meaning[None, :]).to(device)
            loss = contrastive_loss(images, texts, same, temperature(clip))
            loss = loss + sum((penalty() for penalty in penalties), loss.new_zeros(()))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            done += 1
    clip.eval()
