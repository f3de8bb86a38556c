"""The whole story in a minute: a dense and four compressible networks on the embedded digits, side by side.

Every weight matrix of every network is held at the Frobenius norm of the dense one's initialisation after each step, so
that what differs is structure and not scale. The attacks are the audit's own; nothing is tuned to the outcome, and a
compressible network that is not more fragile is shown as such.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import Tensor, nn

from brittle.attacks import apgd
from brittle.auditing import Stage, audit
from brittle.data import Data, load_data
from brittle.report import write_report
from brittle.results import FRACTIONS, Audit
from brittle.story import Chapter, Story, write_story
from brittle.training.penalties import Penalty, group_lasso, nuclear_norm

WIDTH, EPOCHS, BATCH = 256, 60, 64


@dataclass(frozen=True)
class Recipe:
    """How one of the networks is made.

    Attributes:
        name: What it is called.
        rank: Rank of the factors of both hidden layers; None for full matrices.
        penalty: Penalty on both hidden matrices, with its strength.
        strength: Multiplies the penalty.
    """

    name: str
    rank: int | None = None
    penalty: Penalty | None = None
    strength: float = 0.0


RECIPES = (
    Recipe("dense"),
    Recipe("rank 16", rank=16),
    Recipe("rank 8", rank=8),
    Recipe("nuclear norm", penalty=nuclear_norm, strength=0.03),
    Recipe("row-sparse", penalty=group_lasso, strength=0.02),
)


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    recipes: Sequence[Recipe] = RECIPES,
    epochs: int = EPOCHS,
    progress: Stage | None = None,
) -> Story:
    """Train, audit and compare the networks, and write the pages.

    Args:
        out: Folder for ``report.html`` (the story), ``story.png`` and a folder with the audit of every network.
        seed: Seed of weights, batches and attacks.
        recipes: The networks; the first is what the others are compared with.
        epochs: Passes over the training digits.
        progress: Called as the work goes on.

    Returns:
        The story.
    """
    tell = progress or (lambda stage, done, total: None)
    train, test = load_data("digits", split="train", seed=seed), load_data("digits", seed=seed)
    attacks = [functools.partial(apgd, loss=loss) for loss in ("ce", "dlr")]
    audits: list[Audit] = []
    for recipe in recipes:
        network = trained(recipe, train, seed=seed, epochs=epochs, progress=tell)

        def stage(name: str, done: int, total: int | None, recipe: Recipe = recipe) -> None:
            if name.endswith("attack"):
                tell(f"attack {recipe.name} {name.split()[0]}", done, total)

        audits.append(audit(network, test, attacks=attacks, seed=seed, name=recipe.name, progress=stage))
    story = Story(tuple(_chapter(result, audits[0]) for result in audits))
    for chapter in story.chapters:
        chapter.audit.save(out / chapter.folder / "audit.json")
        write_report(chapter.audit, out / chapter.folder / "report.html")
    write_story(story, out)
    return story


def trained(recipe: Recipe, data: Data, *, seed: int, epochs: int = EPOCHS, progress: Stage | None = None) -> nn.Module:
    """A network 64-256-256-10 trained after a recipe, every matrix held at the dense initialisation's Frobenius norm.

    AdamW (1e-3, weight decay 0.01), batches of 64. The global random state is left as it was.

    Args:
        recipe: What to train.
        data: Training data.
        seed: Seed of the weights and of the batches.
        epochs: Passes over the data.
        progress: Called after every epoch.

    Returns:
        The network in evaluation mode.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = [data.inputs[0].numel(), WIDTH, WIDTH, data.classes]
    layers = [_layer(n, m, recipe.rank if m == WIDTH else None, generator) for n, m in itertools.pairwise(sizes)]
    scales = [math.sqrt(2.0 * m) for m in sizes[1:]]  # expected Frobenius norm of He's initialisation
    network = nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01)
    _rescale(layers, scales)
    for epoch in range(epochs):
        for rows in torch.randperm(len(data.labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(data.inputs[rows]), data.labels[rows])
            if recipe.penalty is not None:
                loss = loss + recipe.strength * recipe.penalty(network)
            loss.backward()
            optimizer.step()
            _rescale(layers, scales)
        if progress is not None:
            progress(f"train {recipe.name}", epoch + 1, epochs)
    optimizer.zero_grad(set_to_none=True)
    return network.eval()


def _layer(n: int, m: int, rank: int | None, generator: torch.Generator) -> nn.Module:
    """A dense layer without bias, or a pair of factors, with He's initialisation."""

    def linear(inputs: int, outputs: int) -> nn.Linear:
        layer = torch.nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
        return layer

    return linear(n, m) if rank is None else nn.Sequential(linear(n, rank), linear(rank, m))


def _factors(layer: nn.Module) -> list[nn.Linear]:
    return [module for module in layer.modules() if isinstance(module, nn.Linear)]


def _matrix(layer: nn.Module) -> Tensor:
    return functools.reduce(lambda W, factor: factor.weight @ W, _factors(layer)[1:], _factors(layer)[0].weight)


@torch.no_grad()
def _rescale(layers: Sequence[nn.Module], scales: Sequence[float]) -> None:
    """``W <- c W / ||W||_F``; both factors of a pair take the same share."""
    for layer, scale in zip(layers, scales, strict=True):
        ratio = scale / float(_matrix(layer).norm())
        for factor in (factors := _factors(layer)):
            factor.weight.mul_(ratio ** (1 / len(factors)))


def _chapter(result: Audit, dense: Audit) -> Chapter:
    hidden, tenth = result.layers[:-1], FRACTIONS.index(0.10)
    return Chapter(
        name=result.model,
        audit=result,
        spectral_head=1 - sum(layer.spectral_error[tenth] for layer in hidden) / len(hidden),
        row_head=1 - sum(layer.row_error[tenth] for layer in hidden) / len(hidden),
        p_values={e.p: mcnemar(_verdicts(dense, e.p), _verdicts(result, e.p)) for e in result.evaluations},
    )


def _verdicts(result: Audit, p: float) -> list[bool]:
    evaluation = next(e for e in result.evaluations if e.p == p)
    return [s.clean_prediction == s.label and s.attack is None for s in evaluation.samples]


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Two-sided exact McNemar test: the p-value of "both are right equally often", from paired verdicts.

    Only the samples on which the two differ count; under the hypothesis each is a fair coin.

    >>> mcnemar([True] * 6, [False] * 6)
    0.03125
    """
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
