"""What experiments on fully connected networks share: how they are trained, and what is measured of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from brittle.attacks import apgd
from brittle.compression.factorise import factorised
from brittle.data.load import Data, load_data
from brittle.evaluation import Execution, Threat, evaluate, judge_universal
from brittle.experiments.experiment import Scalar
from brittle.linear.compressibility import k_term_error, row_norms, singular_values
from brittle.models.borrow import device_of
from brittle.models.build import build_model
from brittle.models.layers import read_layers
from brittle.results.methods import UniversalKind
from brittle.training.adversarial import perturb
from brittle.training.loop import train
from brittle.training.recipe import Adversary, Recipe

SHARE = 10
"""Compressibility is told at a tenth of the rows or singular values."""
DRAWS = 5
"""Random perturbations beside which a universal one is judged."""
GAP_STEPS = 40
"""Of the attack on the loss itself."""
SMOKE: dict[str, Scalar] = {
    "data": "digits", "width": 32, "hidden": 2, "training": None, "samples": 60, "epochs": 4, "patience": None,
}  # fmt: skip
SMALL: dict[str, Scalar] = {
    "data": "cifar10", "width": 800, "hidden": 3, "training": None, "samples": 400, "epochs": 20, "patience": None,
}  # fmt: skip
PAPER: dict[str, Scalar] = {
    "data": "cifar10", "width": 2000, "hidden": 4, "training": None, "samples": 10_000, "epochs": 200, "patience": 11,
}  # fmt: skip
"""Settings that Figures 5 and 7 share, by scale."""
ON_MNIST: dict[str, dict[str, Scalar]] = {
    "smoke": {"data": "digits", "width": 32, "training": None, "samples": 60},
    "small": {"data": "mnist", "width": 400, "training": 20_000, "samples": 500},
    "paper": {"data": "mnist", "width": 400, "training": None, "samples": 10_000},
}
"""Settings that experiments on where compressibility comes from share, by scale: two hidden layers."""
MNIST_BUDGETS = {"linf": (math.inf, 0.04), "l2": (2.0, 0.7)}
"""Norm and budget of the attacks there: networks without penalty keep 60 to 90 % of their accuracy."""
MNIST_WORDS = {"linf": "ℓ∞ 0.04", "l2": "ℓ₂ 0.7"}


def splits(data: str, data_root: str | None, *, training: int | None, samples: int) -> tuple[Data, Data]:
    """Training and test samples, at random where not all are taken, and the same for every job.

    Args:
        data: As :func:`brittle.load_data`.
        data_root: Folder of the data sets.
        training: Most training samples; None for all.
        samples: Most test samples.
    """
    read = functools.partial(load_data, data, root=None if data_root is None else Path(data_root))
    return read(split="train", limit=training), read(limit=samples)


def train_dense(data: Data, recipe: Recipe, *, width: int, hidden: int, rank: int) -> nn.Module:
    """A network of ReLU layers without biases, its hidden matrices products of factors where the rank is below full.

    Args:
        data: Training samples.
        recipe: How; its seed is that of the weights as well.
        width: Neurons of a hidden layer.
        hidden: Hidden layers.
        rank: Of every hidden matrix; matrices of no larger side stay whole.

    Returns:
        The network, in evaluation mode, on a GPU where there is one.
    """
    size = {"in_features": data.inputs[0].numel(), "width": width, "depth": hidden + 1, "classes": data.classes}
    network = factorised(build_model("fcn", size, seed=recipe.seed), rank, initial="random", seed=recipe.seed)
    return train(network, data, recipe, devices="cuda" if torch.cuda.is_available() else "cpu").model.eval()


def initial_norm(width: int) -> float:
    """Expected Frobenius norm of a hidden matrix at its start, ``sqrt(width / 3)`` whatever the number of inputs n.

    Its entries are uniform between ``-1 / sqrt(n)`` and ``1 / sqrt(n)`` (torch's own initialisation).
    """
    return math.sqrt(width / 3)


def structure_of(network: nn.Module) -> dict[str, float]:
    """Compressibility and operator norms of the hidden matrices.

    ``row_error`` and ``spectral_error`` are k-term errors in the 1-norm of the rows' l_1 norms and of the singular
    values at a tenth of them (Definition 2.1; 0 is most compressible), means over layers; ``norm_inf`` and ``norm_2``
    are products of operator norms. ``frobenius`` is the largest Frobenius norm.
    """
    hidden = [view.matrix.detach().double().cpu() for view in read_layers(network).views[:-1]]
    errors: dict[str, list[float]] = {"row_error": [], "spectral_error": []}
    largest = {"norm_inf": 1.0, "norm_2": 1.0}
    for W in hidden:
        rows, sigma = row_norms(W), singular_values(W)
        errors["row_error"].append(float(k_term_error(rows, max(1, len(rows) // SHARE))))
        errors["spectral_error"].append(float(k_term_error(sigma, max(1, len(sigma) // SHARE))))
        largest["norm_inf"] *= float(rows.max())
        largest["norm_2"] *= float(sigma[0])
    means = {name: sum(values) / len(values) for name, values in errors.items()}
    return {**means, **largest, "frobenius": max(float(W.norm()) for W in hidden)}


def scale_of(network: nn.Module) -> dict[str, float]:
    """What of the operator norms of the hidden matrices is scale, and what is structure (theory page, "Theorem 3.1").

    ``scale`` is the product of Frobenius norms; ``structure_inf`` and ``structure_2`` are the products of operator
    norms over it, which no multiple of a matrix changes. Where they grow, the norms grow at one scale.
    """
    structure = structure_of(network)
    hidden = [view.matrix.detach().double() for view in read_layers(network).views[:-1]]
    scale = math.prod(float(W.norm()) for W in hidden)
    return {"scale": scale, "structure_inf": structure["norm_inf"] / scale, "structure_2": structure["norm_2"] / scale}


def robustness_of(
    network: nn.Module, test: Data, budgets: Mapping[str, tuple[float, float]], seed: int
) -> dict[str, object]:
    """Accuracy without attack, and under the worst of APGD on cross-entropy and on the DLR loss, 100 steps each.

    Args:
        network: From inputs to at least three logits.
        test: Samples that are attacked.
        budgets: Norm and budget by name.
        seed: Of the attacks.

    Returns:
        ``clean_accuracy``; ``robust_NAME`` and ``kept_NAME``, the robust accuracy and its share of the clean one (NaN
        where that is 0); ``flags``, the checks that doubt one of them.
    """
    row: dict[str, object] = {}
    flags: list[str] = []
    for name, (p, eps) in budgets.items():
        threat = Threat([functools.partial(apgd, loss=loss) for loss in ("ce", "dlr")], p=p, seed=seed)
        measured = evaluate(network, test, threat, eps=eps, execution=Execution(certify=False))
        clean, robust = measured.clean_accuracy.value or 0.0, measured.robust_accuracy.value or 0.0
        row["clean_accuracy"] = clean
        row[f"robust_{name}"], row[f"kept_{name}"] = robust, robust / clean if clean else math.nan
        flags += [f"{flag.name} at {name}" for flag in measured.flags if flag.raised]
    return {**row, "flags": "; ".join(flags)}


def fooling_of(
    network: nn.Module, test: Data, budgets: Mapping[str, tuple[float, float]], seed: int
) -> dict[str, object]:
    """What attacks on single samples do (:func:`robustness_of`), and what one perturbation for all does beside them.

    Half of the samples fit the universal perturbation, the others judge it.

    Returns:
        Beside the columns of :func:`robustness_of` shares of the samples that are right without attack. At every
        budget those of :func:`_universal_shares`; as means over the budgets ``sample_fooled``, ``universal_fooled`` (by
        the better of a fitted perturbation and one read from the weights; lower estimates, both), ``random_fooled``,
        and ``relative``, the share that one perturbation fools beyond random ones over the share that falls sample by
        sample.
    """
    robust = robustness_of(network, test, budgets, seed)
    shares = _universal_shares(network, test, budgets, seed)
    one = sum(max(shares[f"one_{name}"], shares.get(f"weights_{name}", 0.0)) for name in budgets) / len(budgets)
    noise = sum(shares[f"random_{name}"] for name in budgets) / len(budgets)
    single = sum(1 - float(str(robust[f"kept_{name}"])) for name in budgets) / len(budgets)
    return {
        **robust,
        **shares,
        "sample_fooled": single,
        "universal_fooled": one,
        "random_fooled": noise,
        "relative": (one - noise) / single if single else math.nan,
    }


def _universal_shares(
    network: nn.Module, test: Data, budgets: Mapping[str, tuple[float, float]], seed: int
) -> dict[str, float]:
    """At every budget the share of right predictions on held-out samples that one perturbation changes.

    ``one_NAME`` is fitted on other samples by FGSM-like steps (Moosavi-Dezfooli et al. 2017 for the idea; theory page,
    "Adversarial directions"), ``weights_NAME`` is read from the first layer's weights, ``random_NAME`` is the mean over
    random signs (or, for p = 2, directions).
    """
    shares: dict[str, float] = {}
    names: dict[str, str] = {UniversalKind.FITTED: "one", UniversalKind.DATA_FREE: "weights"}
    for name, (p, eps) in budgets.items():
        for result in judge_universal(network, (test.inputs, test.labels), p=p, eps=eps, draws=DRAWS, seed=seed):
            fooled, random = result.fooled.value, result.random_mean.value
            shares[f"{names[result.kind]}_{name}"] = math.nan if fooled is None else fooled
            shares[f"random_{name}"] = math.nan if random is None else random
    return shares


def loss_gap(network: nn.Module, test: Data, p: float, eps: float, seed: int) -> float:
    """Mean cross-entropy under attack less that without, in nats: the paper's robustness gap, a lower estimate.

    The attack is :data:`GAP_STEPS` steps of projected gradient descent on the loss, which go on when the prediction has
    changed. Unlike accuracies it grows with the scale of a network without biases.
    """
    device = device_of(network)
    x, y = test.inputs.to(device), test.labels.to(device)
    attacked = perturb(network, x, y, Adversary(eps, p, steps=GAP_STEPS), torch.arange(len(x), device=device), seed)
    with torch.no_grad():
        clean, worst = (cross_entropy(network(inputs), y, reduction="none").double() for inputs in (x, attacked))
    return float((worst - clean).clamp_min(0).mean())
