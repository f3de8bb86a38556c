"""The whole story in a minute: a dense and four compressible networks on the embedded digits, side by side.

Every weight matrix of every network is held at the Frobenius norm of the dense one's initialisation after each step, so
that what differs is structure and not scale. The attacks are the audit's own; nothing is tuned to the outcome, and a
compressible network that is not more fragile is shown as such.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import Tensor, nn

from brittle.attacks import apgd
from brittle.auditing import Stage, audit
from brittle.data import Data, load_data
from brittle.regularizers import group_lasso, nuclear_norm
from brittle.results import FRACTIONS, Audit

WIDTH, EPOCHS, BATCH = 256, 60, 64
SIGNIFICANT = 0.05
"""Level of the paired (McNemar) test between a network's robust verdicts and the dense network's."""


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
    penalty: Callable[[Tensor], Tensor] | None = None
    strength: float = 0.0


RECIPES = (
    Recipe("dense"),
    Recipe("rank 16", rank=16),
    Recipe("rank 8", rank=8),
    Recipe("nuclear norm", penalty=nuclear_norm, strength=0.03),
    Recipe("row-sparse", penalty=group_lasso, strength=0.02),
)


@dataclass(frozen=True)
class Chapter:
    """One network of the story.

    Attributes:
        recipe: Its name.
        audit: Its audit.
        spectral_head: Share of the singular values' sum in their largest tenth, mean over the two hidden layers.
        row_head: Share of the row l1 norms' sum in the largest tenth of the rows, likewise.
        p_values: For each norm, the two-sided exact McNemar p-value against the dense network's robust verdicts.
    """

    recipe: str
    audit: Audit
    spectral_head: float
    row_head: float
    p_values: dict[float, float]

    def robust(self, p: float) -> float:
        """Robust accuracy at the standard budget of the norm p."""
        return next(e.robust_accuracy.value or 0.0 for e in self.audit.evaluations if e.p == p)

    def norm(self, p: float) -> float:
        """Product of the layers' operator norms: an upper bound of the network's Lipschitz constant."""
        return next(q.upper or math.inf for q in self.audit.lipschitz if q.p == p)

    def local(self, p: float) -> float:
        """Largest local gradient norm found on data: a lower bound of the same constant."""
        return next(q.lower or 0.0 for q in self.audit.lipschitz if q.p == p)


@dataclass(frozen=True)
class Story:
    """The demo's networks, the dense one first, and what they show in plain words."""

    chapters: tuple[Chapter, ...]
    lines: tuple[str, ...]


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
        out: Folder for ``report.html`` (the story), ``story.svg`` and a folder with the audit of every network.
        seed: Seed of weights, batches and attacks.
        recipes: The networks; the first is what the others are compared with.
        epochs: Passes over the training digits.
        progress: Called as the work goes on.

    Returns:
        The story.
    """
    from brittle.report import write_report, write_story

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
        folder = out / recipe.name.replace(" ", "-")
        audits[-1].save(folder / "audit.json")
        write_report(audits[-1], folder / "report.html")
    chapters = tuple(_chapter(recipe, result, audits[0]) for recipe, result in zip(recipes, audits, strict=True))
    story = Story(chapters, tuple(_lines(chapters)))
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
    layers = [
        _layer(n, m, recipe.rank if m == WIDTH else None, generator) for n, m in zip(sizes, sizes[1:], strict=False)
    ]
    scales = [math.sqrt(2.0 * m) for m in sizes[1:]]  # expected Frobenius norm of He's initialisation
    network = nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01)
    _rescale(layers, scales)
    for epoch in range(epochs):
        for rows in torch.randperm(len(data.labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(data.inputs[rows]), data.labels[rows])
            if recipe.penalty is not None:
                for layer in layers[:-1]:
                    loss = loss + recipe.strength * recipe.penalty(_matrix(layer))
            loss.backward()  # type: ignore[no-untyped-call]
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


def _chapter(recipe: Recipe, result: Audit, dense: Audit) -> Chapter:
    hidden, tenth = result.layers[:-1], FRACTIONS.index(0.10)
    return Chapter(
        recipe=recipe.name,
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


def _lines(chapters: Sequence[Chapter]) -> Iterator[str]:
    dense = chapters[0]
    clean = [100 * (c.audit.clean_accuracy.value or 0) for c in chapters if c.audit.clean_accuracy]
    e = dense.audit.evaluations[0]
    yield (
        f"{len(chapters)} networks with equal Frobenius norms, clean accuracy {min(clean):.1f} to {max(clean):.1f} %;"
        f" robust accuracy of the {dense.recipe} one {100 * dense.robust(e.p):.1f} % within l_{e.p:g} {e.eps:g}."
    )
    for chapter in chapters[1:]:
        yield _comparison(chapter, dense)


def _comparison(chapter: Chapter, dense: Chapter) -> str:
    """One network against the dense one: structure, norm, and whether the difference in robustness is significant."""
    head = max(
        ("spectral", chapter.spectral_head / dense.spectral_head),
        ("row", chapter.row_head / dense.row_head),
        key=lambda h: h[1],
    )
    kind, share, before = {
        "spectral": ("singular values", chapter.spectral_head, dense.spectral_head),
        "row": ("rows", chapter.row_head, dense.row_head),
    }[head[0]]
    differences = []
    for e in chapter.audit.evaluations:
        change = 100 * (chapter.robust(e.p) - dense.robust(e.p))
        clear = chapter.p_values[e.p] < SIGNIFICANT
        words = ("more fragile" if change < 0 else "more robust") if clear else "no clear difference"
        differences.append(f"{words} in l_{e.p:g} ({100 * chapter.robust(e.p):.1f} %, {change:+.1f} points)")
    return (
        f"{chapter.recipe}: the largest tenth of its {kind} holds {100 * share:.0f} % instead of {100 * before:.0f} %;"
        f" {' and '.join(differences)}; the l_2 Lipschitz bound is {chapter.norm(2) / dense.norm(2):.1f} times the dense"
        f" one's, the largest local gradient norm {chapter.local(2) / dense.local(2):.1f} times."
    )
