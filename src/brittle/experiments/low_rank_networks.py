"""What experiments on low-rank and sparse weights share: networks, ranks, fooling ratios, and which strengths count.

The questions are those of Langenberg, Balda, Behboodi & Mathar (2019), "On the effect of low-rank weights on
adversarial robustness of neural networks" (arXiv 1901.10371). Networks, budgets and strengths are ours, as theirs are
not known here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

import pandas as pd
import torch
from torch import Tensor, nn

from brittle.attacks import apgd
from brittle.data.load import Data, statistics_of
from brittle.errors import InputError
from brittle.evaluation import Execution, Threat, evaluate
from brittle.linear.compressibility import effective_sparsity, singular_values, spectral_summary
from brittle.models.borrow import device_of, frozen
from brittle.models.build import build_model
from brittle.models.layers import read_layers
from brittle.models.normalize import normalised

ARCHITECTURES = ("fcn", "conv")
RANKS = ("stable_rank", "nuclear_spectral_ratio", "nuclear_frobenius_ratio", "effective_rank", "effective_sparsity")
"""Every definition of an effective rank, and that of effective sparsity (theory page, "Ranks")."""
BATCH = 1_000
"""Samples that predictions are made of at a time."""
AFFORDED = 0.02
"""Validation accuracy that an intervention may cost."""


def build_network(arch: str, data: Data, *, width: int, seed: int) -> nn.Module:
    """A ReLU network without biases or batch normalisation: a multiple of a matrix changes no prediction.

    ``fcn``: two hidden layers of ``width`` neurons. ``conv``: three convolutions 3 x 3 of stride 2 with ``width``,
    twice and four times as many filters, then one matrix; no pooling, so that consecutive kernels compose. It stands
    behind the data's normalisation: where an image is 0, a filter without bias has its kink, and gradients mislead.

    Args:
        arch: One of :data:`ARCHITECTURES`.
        data: Training samples, for their shape, classes and statistics.
        width: Neurons, or filters of the first convolution.
        seed: Of the weights.

    Raises:
        InputError: There is no such architecture.
    """
    if arch == "fcn":
        size = {"in_features": data.inputs[0].numel(), "width": width, "depth": 3, "classes": data.classes}
        return build_model("fcn", size, seed=seed)
    if arch != "conv":
        raise InputError(f"arch: expected one of {', '.join(ARCHITECTURES)}; got {arch!r}")
    channels, *sides = data.inputs.shape[1:]
    places = math.prod(math.ceil(side / 8) for side in sides)
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for filters in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(channels, filters, 3, stride=2, padding=1, bias=False), nn.ReLU()]
            channels = filters
        layers += [nn.Flatten(), nn.Linear(channels * places, data.classes, bias=False)]
    return normalised(nn.Sequential(*layers), *statistics_of(data))


def weight_names(network: nn.Module) -> tuple[str, ...]:
    """Names of all layers that have a matrix, for penalties on every weight, first layer and head included."""
    return tuple(view.name for view in read_layers(network).views)


def rank_shares(network: nn.Module) -> dict[str, float]:
    """Every rank of :data:`RANKS` over the smaller side of its matrix, and the sparsity over the number of entries.

    Means over all layers but the head, from 0 to 1; a convolution counts by its matrix ``(out, in * k * k)``. None
    changes when a matrix is multiplied by a number.
    """
    shares: dict[str, list[float]] = {name: [] for name in RANKS}
    for view in read_layers(network).views[:-1]:
        W = view.matrix.detach().double().cpu()
        ranks = spectral_summary(singular_values(W))
        for name in RANKS[:-1]:
            shares[name].append(float(getattr(ranks, name)) / min(W.shape))
        shares["effective_sparsity"].append(float(effective_sparsity(W.flatten())) / W.numel())
    return {name: fmean(values) for name, values in shares.items()}


def share_right(network: nn.Module, test: Data) -> float:
    """Accuracy without attack."""
    return float((predictions(network, test) == test.labels).double().mean())


def predictions(network: nn.Module, test: Data) -> Tensor:
    """The class of largest logit for every sample, ``(N,)``, on the CPU."""
    device = device_of(network)
    with frozen(network), torch.no_grad():
        parts = [network(part.to(device)).argmax(1) for part in test.inputs.split(BATCH)]
    return torch.cat(parts).to(test.labels)


def fooling_ratios(
    network: nn.Module, test: Data, budgets: Mapping[str, tuple[float, float]], seed: int
) -> dict[str, object]:
    """Shares of inputs whose predicted label an attack changes: over all inputs, and over those right without attack.

    The attack is the worst of APGD on cross-entropy and on the DLR loss, 100 steps each, away from the network's own
    prediction, be it right or wrong: a lower estimate of the true ratio, whatever the scale of the logits.

    Args:
        network: From inputs to at least three logits.
        test: Samples that are attacked.
        budgets: Norm and budget by name.
        seed: Of the attacks.

    Returns:
        ``clean_accuracy``; ``fooled_NAME`` and ``fooled_right_NAME``, over all and over right inputs (NaN where none
        is), and their means over the budgets, ``fooled`` and ``fooled_right``; ``flags``, the checks that doubt one.
    """
    predicted = predictions(network, test)
    row: dict[str, object] = {"clean_accuracy": float((predicted == test.labels).double().mean())}
    every, right, flags = [], [], []
    for name, (p, eps) in budgets.items():
        threat = Threat([functools.partial(apgd, loss=loss) for loss in ("ce", "dlr")], p=p, seed=seed)
        own = replace(test, labels=predicted)
        measured = evaluate(network, own, threat, eps=eps, execution=Execution(certify=False))
        changed = {s.index: s.adversarial_prediction != s.clean_prediction for s in measured.samples}
        every.append(fmean(changed.values()))
        of_right = [changed[i] for i in range(len(predicted)) if predicted[i] == test.labels[i]]
        right.append(fmean(of_right) if of_right else math.nan)
        row[f"fooled_{name}"], row[f"fooled_right_{name}"] = every[-1], right[-1]
        flags += [f"{flag.name} at {name}" for flag in measured.flags if flag.raised]
    return {**row, "fooled": fmean(every), "fooled_right": fmean(right), "flags": "; ".join(flags)}


def afforded(table: pd.DataFrame, within: Sequence[str]) -> pd.DataFrame:
    """Of every intervention the largest strength that costs at most :data:`AFFORDED` of accuracy.

    Judged by ``validation``, the accuracy on samples held out of training, mean over seeds: the test samples choose
    nothing.

    Args:
        table: Rows with columns ``intervention`` (``none`` where there is none), ``strength`` and ``validation``.
        within: Columns of what is compared with one another alone, such as architecture and data.

    Returns:
        Rows without intervention, and of the chosen strengths; none of an intervention that always costs more.
    """
    chosen = []
    for _, rows in table.groupby(list(within)):
        plain = rows[rows.intervention == "none"]
        chosen.append(plain)
        for name in sorted(set(rows.intervention) - {"none"}):
            own = rows[rows.intervention == name]
            accuracies = own.groupby("strength").validation.mean()
            strengths = accuracies.index[accuracies >= plain.validation.mean() - AFFORDED]
            chosen.append(own[own.strength == strengths.max()])
    return pd.concat(chosen)
