"""Figure 2: decision boundaries of a dense and a compressible network around one attacked image.

Both are attacked with one budget. In the input space both are shown in one plane, which holds both perturbations; in
the representation space each in the plane of its own shift and of its leading principal component.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes as Panel
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn

from brittle.data.load import Data
from brittle.experiments.claims import Claim, over_seeds
from brittle.experiments.dense_networks import initial_norm, robustness_of, splits, structure_of, train_dense
from brittle.experiments.experiment import Experiment, Scalar
from brittle.linear.norms import lp_norm
from brittle.models.borrow import frozen
from brittle.reporting.drawing import INK, legend
from brittle.training.adversarial import perturb
from brittle.training.recipe import Adversary, Recipe

NETWORKS = ("dense", "compressible")
CELLS = 41
"""Points along each side of a map; an odd number, so that the clean point is one."""
REACH = 3.0
"""Of the map of the input space to each side, in budgets."""
STEPS = 40
"""Of projected gradient descent, which goes on after the prediction has changed: perturbations have one size."""
LENGTHS = 4.0
"""Budgets up to which a boundary is looked for along a perturbation's direction."""
NAMED = 0.03
"""Share of a map from which on a region is labelled with its class."""


def run(
    *,
    data: str,
    rank: int,
    alpha: float,
    eps: float,
    seed: int,
    width: int,
    epochs: int,
    training: int | None,
    samples: int,
    data_root: str | None = None,
) -> dict[str, Any]:
    """Train a dense and a compressible network, attack both, and map what they predict around one image.

    Args:
        data: The data set.
        rank: Of the compressible network's hidden matrix, by factors; the width is full.
        alpha: Strength of the nuclear norm penalty on it.
        eps: Budget of the l_2 attack.
        seed: Of weights, batches and attacks.
        width: Neurons of the hidden layer.
        epochs: Passes over the training samples.
        training: Training samples; None for all.
        samples: Test samples that are attacked.
        data_root: Folder of the data sets.

    Returns:
        For each network accuracies, structure, the median distance to the boundary along the perturbation
        (``crossing_*``, an upper estimate of the distance to the nearest), the mean growth of the perturbation in the
        representation (``amplification_*``), and the share of images both get right on which the attack breaks this
        network alone (``only_*``); then the image and its maps.
    """
    learnt, test = splits(data, data_root, training=training, samples=samples)
    networks = {
        name: _trained(learnt, *how, seed=seed, width=width, epochs=epochs)
        for name, how in zip(NETWORKS, ((width, 0.0), (rank, alpha)), strict=True)
    }
    adversary, ids = Adversary(eps, 2.0, steps=STEPS), torch.arange(len(test.inputs))
    attacked = {
        name: perturb(network, test.inputs, test.labels, adversary, ids, seed).cpu()
        for name, network in networks.items()
    }
    row: dict[str, Any] = {}
    right = torch.ones(len(test.inputs), dtype=torch.bool)
    broken = {}
    for name, network in networks.items():
        measured = _measured(network, test, attacked[name], eps, seed)
        row |= {f"{column}_{name}": value for column, value in measured.items()}
        right &= _predictions(network, test.inputs) == test.labels
        broken[name] = _predictions(network, attacked[name]) != test.labels
    alone = {name: right & broken[name] & ~broken[other] for name, other in zip(NETWORKS, NETWORKS[::-1], strict=True)}
    row |= {f"only_{name}": float(alone[name].sum() / right.sum().clamp_min(1)) for name in NETWORKS}
    # The image that the paper shows is one on which the networks differ: the first such, else the first right one.
    candidates = [*alone["compressible"].nonzero().flatten(), *right.nonzero().flatten(), torch.tensor(0)]
    return row | around(networks, test, attacked, int(candidates[0]), eps)


def _trained(data: Data, rank: int, alpha: float, *, seed: int, width: int, epochs: int) -> nn.Module:
    recipe = Recipe(
        epochs=epochs,
        penalties={"nuclear_norm": alpha} if alpha else {},
        schedule="cosine",  # a reused gradient leaves noise of the size of a step in the small singular values
        refresh=10,  # of the nuclear norm's gradient
        constraints={"frobenius": initial_norm(width)},
        measure_every=0,
        seed=seed,
    )
    return train_dense(data, recipe, width=width, hidden=1, rank=rank).cpu()


def _measured(network: nn.Module, test: Data, attacked: Tensor, eps: float, seed: int) -> dict[str, object]:
    """What one network's row holds beside its maps."""
    z, z_adv = represented(network, test.inputs), represented(network, attacked)
    growth = lp_norm(z_adv - z, 2) / lp_norm(z, 2)
    robust = robustness_of(network, test, {"l2": (2.0, eps)}, seed)
    return {
        "spectral_error": structure_of(network)["spectral_error"],
        **{column: robust[column] for column in ("clean_accuracy", "kept_l2", "flags")},
        "amplification": float(growth[growth.isfinite()].mean()),
        "crossing": float(crossing(network, test, attacked, eps).median()),
    }


def crossing(network: nn.Module, test: Data, attacked: Tensor, eps: float) -> Tensor:
    """Distances at which predictions first change along each sample's perturbation, of the samples that are right.

    Looked for at 40 lengths up to :data:`LENGTHS` budgets, which stands for no change; values are not clipped.
    """
    x, y = test.inputs, test.labels
    direction = (attacked - x).flatten(1)
    direction = (direction / lp_norm(direction, 2)[:, None].clamp_min(1e-12)).view_as(x)
    lengths = torch.linspace(0, LENGTHS * eps, 41)[1:]
    first = torch.full((len(x),), LENGTHS * eps)
    for length in lengths.flip(0).tolist():
        first[_predictions(network, x + length * direction) != y] = length
    return first[_predictions(network, x) == y]


def represented(network: nn.Module, x: Tensor) -> Tensor:
    """What the linear head reads, ``(N, width)``."""
    assert isinstance(network, nn.Sequential)
    with frozen(network), torch.no_grad():
        return network[:-1](x)


def _predictions(network: nn.Module, x: Tensor) -> Tensor:
    with frozen(network), torch.no_grad():
        return network(x).argmax(1)


def around(
    networks: Mapping[str, nn.Module], test: Data, attacked: Mapping[str, Tensor], number: int, eps: float
) -> dict[str, Any]:
    """Both networks' maps around one image.

    Args:
        networks: By name.
        test: The images.
        attacked: Them under each network's attack.
        number: Which image.
        eps: Budget.

    Returns:
        ``image``, ``shape`` and ``label``; and of each network ``change_*`` (the perturbation), ``input_*`` and
        ``representation_*``, predictions at ``CELLS x CELLS`` points row by row, from the lowest, and where the
        attacked point lies, ``input_at_*`` in budgets and ``representation_at_*`` in lengths of the clean
        representation, of which the map of the representation reaches ``reach``. Its first axis is the shift under
        attack, so that both points are the network's own, its second the leading principal component.
    """
    x = test.inputs[number]
    shifts = {name: (attacked[name][number] - x).flatten() for name in networks}
    plane = orthonormal(torch.stack([shifts["compressible"], shifts["dense"]]))
    row: dict[str, Any] = {"image": x.flatten().tolist(), "shape": list(x.shape), "label": int(test.labels[number])}
    planes, lengths = {}, {}
    for name, network in networks.items():
        z, z_adv = represented(network, test.inputs), represented(network, attacked[name])
        both = torch.cat([z, z_adv])
        leading = torch.linalg.svd(both - both.mean(0), full_matrices=False)[2][0]
        shift = (z_adv - z)[number] / z[number].norm()
        planes[name], lengths[name] = orthonormal(torch.stack([shift, leading])), float(shift.norm())
        row |= {
            f"change_{name}": shifts[name].tolist(),
            f"input_{name}": _predictions(network, x + (REACH * eps * grid() @ plane).view(-1, *x.shape)).tolist(),
            f"input_at_{name}": (plane @ shifts[name] / eps).tolist(),
            f"representation_at_{name}": [lengths[name], 0.0],
        }
    row["reach"] = reach = 1.3 * max(0.2, *lengths.values())
    for name, network in networks.items():
        assert isinstance(network, nn.Sequential)
        z = represented(network, test.inputs[number : number + 1])
        points = z + reach * lp_norm(z, 2) * (grid() @ planes[name])
        row[f"representation_{name}"] = _predictions(network[-1:], points).tolist()
    return row


def grid() -> Tensor:
    """Coordinates from -1 to 1 of a map's points, ``(CELLS ** 2, 2)``, the first running fastest."""
    line = torch.linspace(-1, 1, CELLS)
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1).flatten(0, 1)


def orthonormal(directions: Tensor) -> Tensor:
    """Two orthonormal rows ``(2, n)`` that span two directions ``(2, n)``, the first along the first of them."""
    Q, R = torch.linalg.qr(directions.mT.double())
    signs = torch.where(R.diagonal() < 0, -1.0, 1.0)
    return (Q * signs).mT.to(directions)


def draw(table: pd.DataFrame) -> Figure:
    """The most compressible network of the first seed beside its dense one, a row of panels each."""
    row = most_compressible(table).sort_values("seed").iloc[0]
    figure = Figure(figsize=(8.6, 5.2), layout="constrained")
    figure.set_label("Decision boundaries around one attacked image")
    axes = figure.subplots(2, 4)
    largest = max(float(np.abs(np.asarray(row[f"change_{name}"])).max()) for name in NETWORKS)
    for line, name in zip(axes, NETWORKS, strict=True):
        image, change = (np.asarray(row[column], dtype=float) for column in ("image", f"change_{name}"))
        shape = [int(side) for side in row["shape"]]
        line[0].imshow(_picture(image + change, shape), cmap="gray", vmin=0, vmax=1)
        line[1].imshow(_picture(change / largest / 2 + 0.5, shape), cmap="RdBu_r", vmin=0, vmax=1)
        for axis in line[:2]:
            axis.set_xticks([])
            axis.set_yticks([])
        words = "Dense" if name == "dense" else f"Rank {row['rank']}" + (f", α = {row.alpha:g}" if row.alpha else "")
        accuracy, kept = row[f"clean_accuracy_{name}"], row[f"kept_l2_{name}"]
        line[0].set_ylabel(f"{words}\naccuracy {accuracy:.3f}, {kept:.0%} of it kept")
        _map(line[2], row, f"input_{name}", row[f"input_at_{name}"], REACH)
        _map(line[3], row, f"representation_{name}", row[f"representation_at_{name}"], row.reach)
    for axis, title in zip(axes[0], ("Attacked image", "Perturbation", "Input space", "Representation"), strict=True):
        axis.set_title(title)
    axes[1][2].set_xlabel(f"Budgets of ℓ₂ {row.eps:g}")
    axes[1][3].set_xlabel("Lengths of the representation")
    marks = [Line2D([], [], linestyle="none", marker=mark, color=INK) for mark in "oX"]
    legend(figure, marks, [f"clean image (class {row.label})", "attacked image; numbers are predicted classes"])
    return figure


def _picture(values: np.ndarray[Any, Any], shape: list[int]) -> np.ndarray[Any, Any]:
    """Grey pixels ``(height, width)`` or colours ``(height, width, 3)``."""
    picture = np.clip(values, 0, 1).reshape(shape)
    return np.moveaxis(picture, 0, -1) if picture.ndim == 3 and shape[0] == 3 else picture.reshape(shape[-2:])


def _map(axis: Panel, row: pd.Series[Any], column: str, place: Any, reach: float) -> None:
    """One map: a region a class, the clean point in the middle, the attacked one at its place."""
    classes = np.asarray(row[column], dtype=int).reshape(CELLS, CELLS)
    colours = matplotlib.colormaps["tab20"]
    picture = np.array([colours((2 * number + 1) % 20) for number in range(classes.max() + 1)])[classes]
    axis.imshow(picture, origin="lower", extent=(-reach, reach, -reach, reach), interpolation="nearest", aspect="auto")
    ends = np.linspace(-reach, reach, CELLS)
    for number in np.unique(classes):
        at = np.argwhere(classes == number)
        if len(at) >= NAMED * CELLS**2:
            y, x = at[((at - at.mean(0)) ** 2).sum(1).argmin()]  # of the region, nearest to its middle
            axis.text(ends[x], ends[y], str(number), ha="center", va="center", fontsize=9, color="black")
    axis.plot([0, place[0]], [0, place[1]], color="black", linewidth=1)
    axis.plot([0], [0], marker="o", color="black", markersize=5)
    axis.plot([place[0]], [place[1]], marker="X", color="black", markersize=6)
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach))


def most_compressible(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the lowest rank, and of the strongest penalty among these."""
    rows = table[table["rank"] == table["rank"].min()]
    return rows[rows.alpha == rows.alpha.max()]


def ratio(column: str) -> Callable[[pd.DataFrame], float]:
    """A column of the compressible network over that of the dense one, less 1, where it is most compressible."""

    def quantity(rows: pd.DataFrame) -> float:
        rows = most_compressible(rows)
        dense = float(rows[f"{column}_dense"].mean())
        return float(rows[f"{column}_compressible"].mean()) / dense - 1 if dense else math.nan

    return quantity


def alone(rows: pd.DataFrame) -> float:
    """Share of images on which the attack breaks the compressible network alone less the dense one alone."""
    rows = most_compressible(rows)
    return float((rows.only_compressible - rows.only_dense).mean())


PLACE = "section 3, Figure 2"
CLAIMS = (
    Claim(
        "With one budget in the input space, perturbations are dramatically amplified in the compressible network's "
        "representation.",
        PLACE,
        over_seeds(ratio("amplification")),
        at_least=0.2,
        measure="Change of the representation over its length, mean over test images: lowest rank over dense, less 1",
    ),
    Claim(
        "The perturbation fails to cross boundaries of the dense network and crosses those of the compressible one.",
        PLACE,
        over_seeds(alone),
        at_least=0.05,
        measure="Share of images, right in both networks, that the attack breaks in the compressible one alone, less "
        "the share that it breaks in the dense one alone",
    ),
    Claim(
        "Decision boundaries in the compressible network's input space are much more contracted.",
        PLACE,
        over_seeds(ratio("crossing")),
        at_most=-0.15,
        measure="Median distance to the boundary along the perturbation: lowest rank over dense, less 1",
    ),
)

COMMON: dict[str, dict[str, Scalar]] = {
    "smoke": {"data": "digits", "width": 32, "epochs": 5, "training": None, "samples": 80},
    "small": {"data": "mnist", "width": 400, "epochs": 8, "training": None, "samples": 500},
    "paper": {"data": "mnist", "width": 400, "epochs": 50, "training": None, "samples": 10_000},
}

EXPERIMENT = Experiment(
    name="fig2",
    title="Decision boundaries around one attacked image",
    source="arXiv 2507.17725, Figure 2",
    run=run,
    figure=draw,
    grids={
        "smoke": {**COMMON["smoke"], "rank": 3, "alpha": 0.0, "eps": 0.5, "seed": 0},
        "small": [
            {**COMMON["small"], "rank": (8, 16, 32), "alpha": 0.0, "eps": 1.0, "seed": tuple(range(5))},
            {**COMMON["small"], "rank": 400, "alpha": 0.05, "eps": 1.0, "seed": tuple(range(5))},
        ],
        "paper": [
            {**COMMON["paper"], "rank": (8, 16, 32), "alpha": 0.0, "eps": (0.5, 1.0, 2.0), "seed": tuple(range(10))},
            {**COMMON["paper"], "rank": 400, "alpha": (0.01, 0.05), "eps": (0.5, 1.0, 2.0), "seed": tuple(range(10))},
        ],
    },
    seconds={"smoke": 5, "small": 30},
    claims=CLAIMS,
    about=(
        "Networks with one hidden layer, ReLU, no biases, the hidden matrix at the Frobenius norm of its start after "
        f"each step of AdamW (cosine schedule). The perturbation is that of {STEPS} steps of projected gradient "
        "descent in ℓ₂. Claims are about all test images, the figure about one: the first that both networks get right "
        "and whose perturbation breaks the compressible network alone.",
        "The plane of the input space is the same for both networks and holds both perturbations. That of the "
        "representation space goes through the image's representation; its first axis is the shift under attack, its "
        "second the leading principal component of the network's representations of clean and attacked test images.",
    ),
)
