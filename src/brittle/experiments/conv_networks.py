"""What experiments on convolutional networks share: how they are built and trained, and what their filters are like.

Robust accuracies are measured as those of fully connected networks
(:func:`brittle.experiments.dense_networks.robustness_of`).
"""

from __future__ import annotations

import math
from statistics import fmean

import torch
from torch import Tensor, nn

from brittle.compression.factorise import factorised
from brittle.data.load import Data, statistics_of
from brittle.errors import InputError
from brittle.evaluation import Execution, Threat, evaluate
from brittle.experiments.dense_networks import SHARE
from brittle.experiments.experiment import Scalar
from brittle.linear.compressibility import k_term_error, row_norms, singular_values
from brittle.models.build import build_model
from brittle.models.normalize import normalised
from brittle.models.selection import chosen_layers, matrix
from brittle.training.loop import train
from brittle.training.recipe import Adversary, Recipe

STEMS = ("7x7", "3x3")
"""torchvision's first layers, as the paper's code has them, and those of benchmarks on small images."""
RESIDUAL = ("resnet18-cifar", "wide-resnet101-2")
"""Architectures that have a stem."""
BUDGETS = {"linf": (math.inf, 8 / 255), "l2": (2.0, 0.5)}
"""Norm and budget of adversarial training, the paper's."""
RATIO = 0.5
"""Share of every batch that is attacked in adversarial training, the paper's."""
SMOKE: dict[str, Scalar] = {
    "data": "digits", "stem": "7x7", "width": 4, "training": 128, "samples": 10, "epochs": 1, "patience": None,
}  # fmt: skip
SMALL: dict[str, Scalar] = {
    "data": "cifar10", "stem": "7x7", "width": 16, "training": 10_000, "samples": 300, "epochs": 15, "patience": None,
}  # fmt: skip
PAPER: dict[str, Scalar] = {
    "data": "cifar10", "stem": "7x7", "width": 64, "training": None, "samples": 10_000, "epochs": 200, "patience": 14,
}  # fmt: skip
"""Settings that the figures share, by scale. The paper's patience is 5,000 steps, of 45,000 samples in batches."""


def conv_recipe(
    *,
    epochs: int,
    seed: int,
    patience: int | None = None,
    alpha: float = 0.0,
    annealed: bool = False,
    pgd: int = 0,
    norm: str = "linf",
) -> Recipe:
    """AdamW with weight decay and no norm held.

    Args:
        epochs: Passes over the training samples, at most.
        seed: Of batches, crops and attacks.
        patience: Epochs without a better validation accuracy that end training; None for no end.
        alpha: Strength of the scale-invariant group lasso, summed over layers.
        annealed: The paper's setting of adversarial training: a cosine schedule, crops and flips. Elsewhere a short
            training needs it too: at a constant step the noise of the last steps hides what a penalty does.
        pgd: Steps of the attack on half of every batch; 0 for none, 1 for a single step of 1.25 eps from a random
            start (Wong et al. 2020), a cheap stand-in for the paper's 10.
        norm: The attack's, a key of :data:`BUDGETS`.
    """
    p, eps = BUDGETS[norm]
    length = 1.25 * eps if pgd == 1 else None
    return Recipe(
        epochs=epochs,
        patience=patience,
        penalties={"scale_invariant_group_lasso": alpha} if alpha else {},
        schedule="cosine" if annealed else "constant",
        crop=4 if annealed else 0,
        flip=annealed,
        adversary=Adversary(eps, p, steps=pgd, step_size=length, ratio=RATIO) if pgd else None,
        measure_every=0,
        seed=seed,
    )


def build_convolutional(
    data: Data, *, width: int, rank: int, seed: int, stem: str = "7x7", arch: str = "resnet18-cifar"
) -> nn.Module:
    """A network for images behind their normalisation, all convolutions but the first of low rank if asked for.

    Args:
        data: Training samples, for their shape and statistics.
        width: Channels of the first stage; the last has 8 times as many.
        rank: Of every convolution's matrix of filters but the first one's, by factors: a k x k convolution into so many
            channels and a 1 x 1 convolution. Those with no larger side stay whole; 0 leaves all whole.
        seed: Of the weights.
        stem: One of :data:`STEMS`; a network that is not of :data:`RESIDUAL` has 3x3.
        arch: ``resnet18-cifar``, ``wide-resnet101-2`` or ``vgg16``.

    Raises:
        InputError: There is no such stem, or the architecture has none to choose.
    """
    if stem not in STEMS or (stem == "7x7" and arch not in RESIDUAL):
        raise InputError(f"stem: expected 3x3, or 7x7 of {' or '.join(RESIDUAL)}; got {stem!r} of {arch}")
    size = {"in_channels": data.inputs.shape[1], "classes": data.classes, "width": width}
    network = build_model(arch, size, seed=seed)
    if stem == "7x7":
        _give_large_stem(network, seed)
    if rank:
        network = factorised(network, rank, initial="random", seed=seed)
    return normalised(network, *statistics_of(data))


def _give_large_stem(network: nn.Module, seed: int) -> None:
    """Replace the first convolution by torchvision's, 7 x 7 with stride 2, and pool by 3 x 3 with stride 2 behind it.

    The names of the weights stay torchvision's. A 32 x 32 image leaves 8 x 8 positions to the first stage.
    """
    small = network.conv1
    assert isinstance(small, nn.Conv2d)
    channels = small.in_channels, small.out_channels
    stem = nn.utils.skip_init(nn.Conv2d, *channels, kernel_size=7, stride=2, padding=3, bias=False)
    generator = torch.Generator().manual_seed(seed)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu", generator=generator)
    network.conv1 = stem
    network.relu = nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))


def train_convolutional(
    data: Data,
    recipe: Recipe,
    *,
    width: int,
    rank: int,
    stem: str = "7x7",
    arch: str = "resnet18-cifar",
) -> nn.Module:
    """The network of :func:`build_convolutional` trained, in evaluation mode, on a GPU where there is one.

    The recipe's seed is that of the weights as well.
    """
    network = build_convolutional(data, width=width, rank=rank, seed=recipe.seed, stem=stem, arch=arch)
    return train(network, data, recipe, devices="cuda" if torch.cuda.is_available() else "cpu").model.eval()


def crosscheck(network: nn.Module, test: Data, budget: tuple[float, float], seed: int) -> dict[str, float]:
    """Robust accuracy under the preset ``standard``, targeted APGD and then Square, as a second opinion.

    Args:
        network: As :func:`~brittle.experiments.dense_networks.robustness_of` has attacked it.
        test: Samples that are attacked.
        budget: Norm and budget.
        seed: Of the attacks.

    Returns:
        ``standard_linf``; a table has it in the rows of networks without intervention.
    """
    p, eps = budget
    threat = Threat("standard", p=p, seed=seed)
    measured = evaluate(network, test, threat, eps=eps, execution=Execution(certify=False), honesty=False)
    return {"standard_linf": measured.robust_accuracy.value or 0.0}


def filter_structure(network: nn.Module) -> dict[str, float]:
    """Compressibility of the filters and operator norms, means over the layers of interventions.

    ``||W||_inf``, the largest l_1 norm of a row, is the convolution's l_inf operator norm on images no smaller than its
    kernel; ``||W||_2`` is the largest singular value of the matrix.

    Returns:
        The columns of :func:`matrix_structure`, and the same of the matrices as they act behind their batch
        normalisations (:func:`folded_matrices`): ``folded_error`` of the rows, and geometric means of both norms,
        ``gain_inf`` and ``gain_2``, which have a scale.
    """
    folded = folded_matrices(network)
    return {
        **matrix_structure(network),
        "folded_error": fmean(_error_at_a_tenth(row_norms(W)) for W in folded),
        "gain_inf": float(torch.stack([row_norms(W).max() for W in folded]).log().mean().exp()),
        "gain_2": float(torch.stack([singular_values(W)[0] for W in folded]).log().mean().exp()),
    }


def matrix_structure(network: nn.Module) -> dict[str, float]:
    """Compressibility and operator norms of the matrices, means over the layers of interventions.

    These are all Linear layers but the last and all convolutions but the first, the latter as ``(out, in * k * k)``; of
    low rank, the factors' product.

    Returns:
        ``row_error`` and ``spectral_error``: k-term errors in the 1-norm of the rows' l_1 norms and of the singular
        values at a tenth of them (Definition 2.1; 0 is most compressible). ``structure_inf`` and ``structure_2``:
        ``||W||_inf`` and ``||W||_2`` over the Frobenius norm.
    """
    matrices = [matrix(layer).detach().double().cpu() for layer in chosen_layers(network)]
    return {
        "row_error": fmean(_error_at_a_tenth(row_norms(W)) for W in matrices),
        "spectral_error": fmean(_error_at_a_tenth(singular_values(W)) for W in matrices),
        "structure_inf": fmean(float(row_norms(W).max() / W.norm()) for W in matrices),
        "structure_2": fmean(float(singular_values(W)[0] / W.norm()) for W in matrices),
    }


def _error_at_a_tenth(values: Tensor) -> float:
    return float(k_term_error(values, max(1, len(values) // SHARE)))


def folded_matrices(network: nn.Module) -> list[Tensor]:
    """Every filter times what its batch normalisation multiplies it by, ``gamma / sqrt(variance + eps)``.

    In evaluation a network computes with these. Multiply a filter, and training's variance follows: whatever a penalty
    does to the filters' norms, a batch normalisation can undo.

    Returns:
        The matrices of the layers of interventions, on the CPU; the normalisation of a layer is the one registered next
        after it, as in all our architectures.
    """
    owners = {module: layer for layer in chosen_layers(network) for module in layer.modules}
    matrices, last = [], None
    for module in network.modules():
        last = owners.get(module, last)
        if isinstance(module, nn.BatchNorm2d) and last is not None:
            assert module.running_var is not None
            factors = module.weight / (module.running_var + module.eps).sqrt()
            matrices.append((factors[:, None] * matrix(last)).detach().double().cpu())
            last = None
    return matrices
