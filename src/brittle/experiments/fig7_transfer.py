"""Figure 7, right: a linear head on the features of a compressible network, which inherits its fragility.

ResNet18 is trained on one data set under a scale-invariant group lasso, or of low rank; then only a new head, without
any penalty on the features, learns another.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from brittle.data.load import Data
from brittle.experiments.claims import Claim, spearman
from brittle.experiments.conv_effect import (
    ROWS,
    SPECTRUM,
    crosscheck_claim,
    draw_effects,
    effect_claims,
    penalties_and_ranks,
    strengthened,
)
from brittle.experiments.conv_networks import (
    PAPER,
    SMALL,
    SMOKE,
    conv_recipe,
    crosscheck,
    filter_structure,
    train_convolutional,
)
from brittle.experiments.dense_networks import robustness_of, splits
from brittle.experiments.experiment import Experiment
from brittle.experiments.fig5_conv import BUDGETS, WORDS
from brittle.models.borrow import device_of

HEAD_DECAY = 1e-3
"""Weight of the head's squared norm, its features at unit variance: all heads are regularised alike."""
BATCH = 500


def run(
    *,
    data: str,
    downstream_data: str,
    stem: str,
    alpha: float,
    rank: int,
    seed: int,
    width: int,
    training: int | None,
    samples: int,
    epochs: int,
    patience: int | None,
    annealed: bool,
    data_root: str | None = None,
) -> dict[str, Any]:
    """Train one network on a data set, a head on another, and attack them there in both norms.

    Args:
        data: The data set of pretraining.
        downstream_data: The data set of the head.
        stem: ``7x7``, torchvision's, or ``3x3``.
        alpha: Strength of the scale-invariant group lasso in pretraining.
        rank: Of every convolution but the first, by factors; 0 for none.
        seed: Of weights, batches and attacks.
        width: Channels of the first stage.
        training: Training samples of either; None for all.
        samples: Test samples that are attacked.
        epochs: Passes over the training samples of pretraining, at most.
        patience: Epochs without a better validation accuracy that end it; None for no end.
        annealed: Whether steps fall along a cosine in pretraining, with crops and flips.
        data_root: Folder of the data sets.

    Returns:
        Structure of the filters (:func:`brittle.experiments.conv_networks.filter_structure`), ``pretrained_accuracy``
        on the first data set, and robust accuracy on the second at every one of :data:`BUDGETS`
        (:func:`brittle.experiments.dense_networks.robustness_of`).
    """
    learnt, held_out = splits(data, data_root, training=training, samples=samples)
    recipe = conv_recipe(epochs=epochs, patience=patience, annealed=annealed, alpha=alpha, seed=seed)
    pretrained = train_convolutional(learnt, recipe, width=width, rank=rank, stem=stem)
    logits = outputs_of(pretrained, held_out.inputs)
    target, test = splits(downstream_data, data_root, training=training, samples=samples)
    downstream = with_head_for(pretrained, target)
    row = {
        **filter_structure(pretrained),
        "pretrained_accuracy": float((logits.argmax(1).cpu() == held_out.labels).double().mean()),
        **robustness_of(downstream, test, BUDGETS, seed),
    }
    return row if alpha or rank else {**row, **crosscheck(downstream, test, BUDGETS["linf"], seed)}


def with_head_for(network: nn.Module, data: Data) -> nn.Module:
    """A copy whose head ``model.fc`` is fitted to other data by :func:`fit_head`; all else is as it was."""
    copied = copy.deepcopy(network)
    inner = copied.get_submodule("model")
    inner.fc = nn.Identity()
    features = outputs_of(copied, data.inputs)
    inner.fc = fit_head(features, data.labels.to(features.device), data.classes)
    return copied.eval()


def outputs_of(network: nn.Module, inputs: Tensor) -> Tensor:
    """What the network makes of inputs, without gradients, ``(N, ...)``."""
    device = device_of(network)
    with torch.no_grad():
        return torch.cat([network(part.to(device)) for part in inputs.split(BATCH)])


def fit_head(features: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    """Multinomial logistic regression: mean cross-entropy plus ``HEAD_DECAY / 2 ||W||_F^2``, a convex problem.

    The features are brought to mean 0 and variance 1 for it, so that their scale does not count, and the head that is
    returned takes them as they are.

    Args:
        features: ``(N, n)``.
        labels: ``(N,)``.
        classes: Logits.
    """
    mean, deviation = features.double().mean(0), features.double().std(0)
    alive = deviation > 1e-6 * features.abs().amax(0)
    deviation = torch.where(alive, deviation, math.inf)  # a feature that never changes gets no weight
    x = (features.double() - mean) / deviation
    W, b = (
        torch.zeros(size, dtype=x.dtype, device=x.device, requires_grad=True)
        for size in ((classes, x.shape[1]), classes)
    )
    optimizer = torch.optim.LBFGS([W, b], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(x @ W.T + b, labels) + HEAD_DECAY / 2 * W.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    head = nn.utils.skip_init(nn.Linear, x.shape[1], classes, device=features.device)
    with torch.no_grad():
        head.weight.copy_(W / deviation)
        head.bias.copy_(b - (W / deviation) @ mean)
    return head


EFFECTS = tuple(dataclasses.replace(effect, words=f"the pretraining's {effect.words}") for effect in (ROWS, SPECTRUM))


def draw(table: pd.DataFrame) -> Figure:
    """For rows and for the spectrum: downstream accuracies, the robust share in both norms, compressibility."""
    return draw_effects("Linear heads on compressible networks", table, EFFECTS, strengthened, WORDS)


FIGURE = "section 4.1, Figure 7 right"
CLAIMS = (
    *effect_claims(EFFECTS[0], strengthened, FIGURE, WORDS),
    *effect_claims(EFFECTS[1], strengthened, "appendix, the spectral form of Figure 7 right", WORDS),
    Claim(
        "Compressibility in pretraining affects robustness in the downstream task.",
        FIGURE,
        lambda table: spearman("row_error", "kept_linf")(strengthened(table, ROWS)),
        at_least=0.7,
        measure=f"Spearman's ρ of the filters' k-term error and robust over clean accuracy downstream at "
        f"{WORDS['linf']}, over the networks of full rank",
    ),
    crosscheck_claim(lambda rows: strengthened(rows, ROWS), WORDS["linf"]),
)


EXPERIMENT = Experiment(
    name="fig7_transfer",
    title="Linear heads on compressible networks",
    source="arXiv 2507.17725, Figure 7 (right)",
    run=run,
    figure=draw,
    grids={
        "smoke": {**SMOKE, "annealed": True, "downstream_data": "digits", "seed": 0, "alpha": 0.1, "rank": 0},
        "small": penalties_and_ranks(
            {**SMALL, "annealed": True, "data": "cifar100", "downstream_data": "cifar10", "training": 20_000},
            3, (0.1, 0.5, 2.0), (4, 8, 16),
        ),
        "paper": penalties_and_ranks(
            {**PAPER, "annealed": False, "data": "cifar100", "downstream_data": "cifar10"},
            5, (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.5), (4, 8, 16, 32, 64, 128),
        ),
    },
    seconds={"smoke": 5, "small": 140},
    claims=CLAIMS,
    about=(
        "ResNet18 with torchvision's stem is trained on CIFAR-100 by AdamW with weight decay (at small along a cosine, "
        "with crops and flips), under a group lasso that no scale changes or of low rank. Its features then stay as "
        "they are; logistic regression on them is the head for CIFAR-10, and the whole is attacked there. "
        "Compressibility grows to the right. Intervals are 95 % over seeds.",
        "Robust accuracy is the worst of APGD with 100 steps on the cross-entropy and 100 on the DLR loss. k-term "
        "errors are those of the pretrained filters' ℓ₁ norms and of the singular values of the matrices of filters "
        "when a tenth of them is kept; 0 is most compressible.",
    ),
)  # fmt: skip
