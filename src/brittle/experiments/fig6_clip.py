"""Figure 6, right: CLIP fine-tuned under growing sparsification, as a zero-shot classifier without and under attack.

At ``small`` a small CLIP learns CIFAR-10 and CIFAR-100 with captions from fresh weights, and is then fine-tuned under a
group lasso that no scale changes. It is judged by sentences that it has not seen, and on classes that were never
captioned: their sentences name their kind alone in words that it knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from brittle.data.load import Data, load_data, statistics_of
from brittle.experiments.captions import HELD_OUT, NEVER_CAPTIONED, PHRASES, TAUGHT, Words, words_of
from brittle.experiments.claims import Claim, change, over_seeds, spearman
from brittle.experiments.clip_networks import Pairs, fit_contrastive, tiny_clip
from brittle.experiments.conv_effect import crosscheck_claim
from brittle.experiments.conv_networks import crosscheck, matrix_structure
from brittle.experiments.dense_networks import robustness_of, splits
from brittle.experiments.experiment import Experiment, Scalar
from brittle.experiments.flickr30k import TEMPLATE, flickr_pairs, imagenet_names, pretrained_clip
from brittle.experiments.plots import draw_means, evenly
from brittle.models.normalize import Normalize, normalised
from brittle.models.zero_shot import image_encoder, zero_shot_classifier
from brittle.results import Statistic
from brittle.training.batches import Batches

BUDGETS = {"linf": (math.inf, 1 / 255), "linf_other": (math.inf, 2 / 255), "l2": (2.0, 0.125)}
"""Norm and budget of the attacks on the classes that were captioned, and of the first on those that were not."""
WORDS = {"linf": "ℓ∞ 1/255", "linf_other": "ℓ∞ 2/255", "l2": "ℓ₂ 0.125"}


def run(
    *,
    data: str,
    beside: str | None,
    pretrained: str | None,
    patch: int,
    width: int,
    depth: int,
    alpha: float,
    seed: int,
    training: int | None,
    samples: int,
    epochs: int,
    tuning: int,
    lr: float,
    data_root: str | None = None,
) -> dict[str, Any]:
    """Fine-tune one CLIP under a penalty, and attack the classifiers that prompts make of it.

    Args:
        data: The data set whose classes it is judged by.
        beside: Another of which it learns as well, and whose classes that are never captioned judge it too; None: those
            of ``data``.
        pretrained: Folder, in that of the data sets, of a published CLIP, which is then fine-tuned on Flickr30k; None
            for a small one that first learns from fresh weights.
        patch: Pixels of a side of a patch, of the small one; so are width, depth and epochs.
        width: Numbers in a token.
        depth: Blocks of either half.
        alpha: Strength of the scale-invariant group lasso in fine-tuning.
        seed: Of weights, batches, captions and attacks.
        training: Training samples of either data set; None for all.
        samples: Test samples that are attacked.
        epochs: Passes over the training samples without a penalty.
        tuning: And then with it.
        lr: Learning rate at the start of fine-tuning.
        data_root: Folder of the data sets.

    Returns:
        Structure of the image half's matrices (:func:`brittle.experiments.conv_networks.matrix_structure`), robust
        accuracy by held-out sentences at every one of :data:`BUDGETS`
        (:func:`brittle.experiments.dense_networks.robustness_of`), and ``unseen_accuracy``, ``unseen_robust`` and
        ``unseen_kept`` of the classes that were never captioned, where there are such; without a penalty a second
        opinion (:func:`brittle.experiments.conv_networks.crosscheck`).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if pretrained is None:
        names = [data] if beside is None else [data, beside]
        task = small_task(
            names, data_root, patch=patch, width=width, depth=depth, seed=seed, training=training, samples=samples
        )
    else:
        task = papers_task(data, pretrained, Path(data_root or ""), training=training, samples=samples)
    clip, normalize = task.clip.to(device), Normalize(*task.statistics).to(device)
    if pretrained is None:
        fit_contrastive(clip, normalize, task.pairs, epochs=epochs, alpha=0.0, seed=seed, lr=1e-3)
    fit_contrastive(clip, normalize, task.pairs, epochs=tuning, alpha=alpha, seed=seed, lr=lr)

    classifiers = [normalised(zero_shot_classifier(clip, way.prompts), *task.statistics).eval() for way in task.ways]
    row: dict[str, Any] = {
        **matrix_structure(image_encoder(clip)),
        **robustness_of(classifiers[0], task.ways[0].test, BUDGETS, seed),
    }
    for way, classifier in zip(task.ways[1:], classifiers[1:], strict=True):
        found = robustness_of(classifier, way.test, {"linf": BUDGETS["linf"]}, seed)
        row |= {"unseen_accuracy": found["clean_accuracy"], "unseen_robust": found["robust_linf"]}
        row |= {"unseen_kept": found["kept_linf"], "flags_unseen": found["flags"]}
    return row if alpha else {**row, **crosscheck(classifiers[0], task.ways[0].test, BUDGETS["linf"], seed)}


@dataclass(frozen=True, eq=False)
class Way:
    """One way to judge a CLIP.

    Attributes:
        prompts: Of each class ``(n, T)`` tokens.
        test: Samples with the classes' places as labels.
    """

    prompts: Sequence[Tensor]
    test: Data


@dataclass(frozen=True, eq=False)
class Task:
    """What is fine-tuned, on what, and how it is judged.

    Attributes:
        clip: The network.
        statistics: Mean and standard deviation by which its images are normalised.
        pairs: Images and captions.
        ways: The first is judged in full; another is that of classes that were never captioned.
    """

    clip: nn.Module
    statistics: tuple[Sequence[float], Sequence[float]]
    pairs: Pairs
    ways: tuple[Way, ...]


def small_task(
    names: Sequence[str],
    data_root: str | None,
    *,
    patch: int,
    width: int,
    depth: int,
    seed: int,
    training: int | None,
    samples: int,
) -> Task:
    """A small CLIP with fresh weights, and captions from templates.

    Args:
        names: The data set that judges, and one beside it.
        data_root: Folder of the data sets.
        patch: As :func:`run`; so are the others.
        width: Numbers in a token.
        depth: Blocks.
        seed: Of weights, crops and choices of test samples.
        training: Training samples.
        samples: Test samples.
    """
    learnt = [captioned(splits(name, data_root, training=training, samples=1)[0]) for name in names]
    words = words_of(names)
    images = learnt[0].inputs.shape[1:]
    clip = tiny_clip(words, channels=images[0], size=images[-1], patch=patch, width=width, depth=depth, seed=seed)
    ways = []
    for name, classes in ((names[0], others(names[0])), (names[-1], NEVER_CAPTIONED[names[-1]])):
        prompts = [words([template.format(PHRASES[name][k]) for template in HELD_OUT]) for k in sorted(classes)]
        ways.append(Way(prompts, of_classes(whole_test(name, data_root), classes, samples, seed)))
    return Task(clip, statistics_of(learnt[0]), taught_pairs(names, learnt, words, seed), tuple(ways))


def papers_task(data: str, pretrained: str, root: Path, *, training: int | None, samples: int) -> Task:
    """A published CLIP, Flickr30k's captions, and ImageNet's classes.

    Args:
        data: What judges: ``imagenet``, or a folder of images with as many classes.
        pretrained: The network's folder in the data root.
        root: The data root, which holds ``flickr30k`` as well.
        training: Most images of Flickr30k; None for all.
        samples: Test samples.

    Raises:
        InputError: Something is missing; nothing is downloaded.
    """
    clip, tokens, statistics = pretrained_clip(root / pretrained)
    size = int(clip.config.vision_config.image_size)  # type: ignore[union-attr, arg-type]
    test = load_data(data, root=root, split="test", limit=samples, image_size=(size, size))
    prompts = [tokens([TEMPLATE.format(name)]) for name in imagenet_names()[: test.classes]]
    return Task(clip, statistics, flickr_pairs(root / "flickr30k", tokens, size, training), (Way(prompts, test),))


def whole_test(data: str, data_root: str | None) -> Data:
    """All test samples of a data set."""
    return splits(data, data_root, training=1, samples=2**31)[1]


def others(data: str) -> tuple[int, ...]:
    """The classes that are captioned."""
    return tuple(k for k in range(len(PHRASES[data])) if k not in NEVER_CAPTIONED[data])


def captioned(data: Data) -> Data:
    """The samples of classes that are captioned, with the labels that they had."""
    return of_classes(data, others(data.name), None, 0, renumber=False)


def of_classes(data: Data, classes: Sequence[int], samples: int | None, seed: int, *, renumber: bool = True) -> Data:
    """The samples of some classes, at most so many.

    Args:
        data: Samples of all classes.
        classes: Which stay.
        samples: At most; None for all.
        seed: Of the choice.
        renumber: Whether labels become places in ``classes``.
    """
    stays = torch.isin(data.labels, torch.tensor(classes)).nonzero()[:, 0]
    labels = data.labels[stays]
    if renumber:
        labels = torch.searchsorted(torch.tensor(sorted(classes)), labels)
    count = len(classes) if renumber else data.classes
    chosen = Data(data.name, data.inputs[stays], labels, count, data.budgets)
    return chosen if samples is None else chosen.take(samples, seed)


def taught_pairs(names: Sequence[str], learnt: Sequence[Data], words: Words, seed: int) -> Pairs:
    """The images of some data sets, each with the sentences of its class.

    Args:
        names: Of the data sets.
        learnt: Their samples, as many data sets.
        words: Of all sentences.
        seed: Of crops.
    """
    sentences = [template.format(phrase) for name in names for phrase in PHRASES[name] for template in TAUGHT]
    first = [sum(len(PHRASES[name]) for name in names[:place]) for place in range(len(names))]
    classes = torch.cat([part.labels + start for part, start in zip(learnt, first, strict=True)])
    batches = Batches.of(
        torch.cat([part.inputs for part in learnt]), classes, 1, seed=seed, crop=4 if "cifar10" in names else 0,
        flip="cifar10" in names,
    )  # fmt: skip
    choices = classes[:, None] * len(TAUGHT) + torch.arange(len(TAUGHT))
    meaning = torch.arange(len(sentences)) // len(TAUGHT)
    return Pairs(lambda rows, epoch: batches.take(rows, epoch)[0], words(sentences), choices, meaning)


def draw(table: pd.DataFrame) -> Figure:
    """Accuracies of captioned and never captioned classes, robust shares, compressibility, over the strength."""
    figure = Figure(figsize=(8.6, 3.3), layout="constrained")
    figure.set_label("Zero-shot classification by CLIP under growing sparsification")
    places, ticks = evenly(table, "alpha")
    rows = table.assign(place=places)
    panels = (
        (
            "Accuracy, zero-shot",
            {
                "captioned classes": "clean_accuracy", f"the same, {WORDS['linf']}": "robust_linf",
                "never captioned": "unseen_accuracy", f"the same, {WORDS['linf']} ": "unseen_robust",
            },
        ),
        (
            "Robust over clean accuracy",
            {
                WORDS["linf"]: "kept_linf", WORDS["l2"]: "kept_l2",
                f"never captioned, {WORDS['linf']}": "unseen_kept",
            },
        ),
        ("k-term error at a tenth", {"rows of the image half": "row_error"}),
    )  # fmt: skip
    for axis, (heading, columns) in zip(figure.subplots(1, 3), panels, strict=True):
        for series, (name, column) in enumerate(columns.items()):
            draw_means(axis, rows, "place", column, series=series)
            axis.lines[-1].set_label(name)
        axis.set_xticks(range(len(ticks)), ticks)
        axis.set(title=heading, xlabel="Strength α of the group lasso in fine-tuning", ylim=(0, 1.03))
        axis.grid(visible=True)
        axis.legend(fontsize=6, loc="upper right")
    return figure


def falls(column: str) -> Callable[[pd.DataFrame], Statistic]:
    """Mean over seeds of a column under the strongest penalty less that without."""
    return over_seeds(change(column, "alpha"))


FIGURE, CONTRAST = "section 4.1, Figure 6 right", "the strongest penalty less none"
CLAIMS = (
    Claim(
        "Fine-tuning under the penalty makes neurons more compressible.",
        FIGURE,
        falls("row_error"),
        at_most=-0.1,
        measure=f"1-norm k-term error at a tenth, mean over the Linear layers of the image half, {CONTRAST}",
    ),
    Claim(
        "The adversarial robustness of zero-shot classification falls as row compressibility grows.",
        FIGURE,
        falls("robust_linf"),
        at_most=-0.05,
        measure=f"Accuracy under {WORDS['linf']} by held-out prompts, {CONTRAST}",
    ),
    Claim(
        "It falls also relative to the accuracy without attack.",
        FIGURE,
        falls("kept_linf"),
        at_most=-0.1,
        measure=f"Robust over clean accuracy at {WORDS['linf']} by held-out prompts, {CONTRAST}",
    ),
    Claim(
        "It falls step by step.",
        FIGURE,
        spearman("alpha", "kept_linf"),
        at_most=-0.7,
        measure=f"Spearman's ρ of the strength and robust over clean accuracy at {WORDS['linf']}, over all networks",
    ),
    Claim(
        "Results in another norm are alike.",
        "appendix",
        falls("kept_l2"),
        at_most=-0.1,
        measure=f"Robust over clean accuracy at {WORDS['l2']} by held-out prompts, {CONTRAST}",
    ),
    Claim(
        "Results under another budget are alike.",
        "appendix",
        falls("kept_linf_other"),
        at_most=-0.05,
        measure=f"Robust over clean accuracy at {WORDS['linf_other']} by held-out prompts, {CONTRAST}",
    ),
    Claim(
        "Classes that were never captioned lose robustness as well.",
        FIGURE,
        falls("unseen_kept"),
        at_most=-0.1,
        scales=("small",),
        measure=f"Robust over clean accuracy at {WORDS['linf']} among classes without captions, {CONTRAST}",
    ),
    crosscheck_claim(lambda rows: rows, WORDS["linf"]),
)
TINY: dict[str, Scalar] = {
    "data": "digits", "beside": None, "pretrained": None, "patch": 4, "width": 32, "depth": 1, "training": 128,
    "samples": 4, "epochs": 1, "tuning": 1, "lr": 5e-4, "seed": 0, "alpha": 0.1,
}  # fmt: skip
EXPERIMENT = Experiment(
    name="fig6_clip",
    title="Zero-shot classification by CLIP under growing sparsification",
    source="arXiv 2507.17725, Figure 6 (right)",
    run=run,
    figure=draw,
    grids={
        "smoke": TINY,
        "small": {
            "data": "cifar10", "beside": "cifar100", "pretrained": None, "patch": 8, "width": 96, "depth": 4,
            "training": 10_000, "samples": 300, "epochs": 8, "tuning": 5, "lr": 5e-4, "seed": (0, 1, 2),
            "alpha": (0.0, 0.02, 0.1, 0.5),
        },
        "paper": {
            "data": "imagenet", "beside": None, "pretrained": "clip-vit-base-patch32", "patch": 32, "width": 768,
            "depth": 12, "training": None, "samples": 10_000, "epochs": 0, "tuning": 10, "lr": 1e-5,
            "seed": tuple(range(5)), "alpha": (0.0, 0.0001, 0.001, 0.01, 0.1),
        },
    },
    claims=CLAIMS,
    about=(
        "A small CLIP that learns CIFAR-10 and 80 classes of CIFAR-100 with captions from fresh weights, by the "
        "contrastive loss, and is then fine-tuned under a group lasso that no scale changes, on every Linear layer of "
        "both halves but the projections (at paper a published CLIP, fine-tuned on Flickr30k and judged on "
        "ImageNet). It is judged by sentences that it has not seen: on the classes of CIFAR-10, "
        "and on 20 classes of CIFAR-100 that were never captioned, of which it knows the word for their kind alone. "
        "Intervals are 95 % over seeds.",
        "Robust accuracy is the worst of APGD with 100 steps on the cross-entropy and 100 on the DLR loss, through the "
        "image half against the classifier made of prompts; networks without penalty are attacked by targeted APGD and "
        "Square as well. k-term errors are those of the rows' ℓ₁ norms when a tenth of them is kept; 0 is most "
        "compressible.",
    ),
)  # fmt: skip
