"""The whole way of a compression: plan, remove, repair, train, and measure before against after."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from brittle.attacks import apgd, apgd_targeted
from brittle.auditing import compare
from brittle.data import Data
from brittle.delivery.planning import Plan, plan_removal
from brittle.delivery.repair import fine_tuned, repaired, steps_of
from brittle.delivery.request import Compression
from brittle.evaluation.execution import Execution
from brittle.evaluation.threat import Attack, Threat
from brittle.models.borrow import device_of
from brittle.models.macs import network_size
from brittle.progress import silent
from brittle.results import Comparison, CompressionRecipe, CompressionRequest

NAMES = ("uncompressed", "compressed")
"""What the networks are called in the comparison."""


@dataclass(frozen=True, eq=False)
class Compressed:
    """The result of :func:`brittle.compress`.

    Attributes:
        plan: What was removed.
        network: The smaller network, repaired and trained, in evaluation mode.
        recipe: What was removed, and what it cost before and after.
        comparison: Audits of the network before and after, on the same samples, with paired tests, sizes and latency.
    """

    plan: Plan
    network: nn.Module
    recipe: CompressionRecipe
    comparison: Comparison


def compress(
    model: nn.Module,
    data: Data,
    compression: Compression = Compression(),
    threat: Threat | None = None,
    *,
    training: Data | None = None,
    p: float | Sequence[float] = (math.inf, 2.0),
    eps: float | Mapping[float, float] | None = None,
    execution: Execution = Execution(),
) -> Compressed:
    """Make a network smaller, and measure what that costs in accuracy and robustness.

    Units (filters and neurons with all that is tied to them, singular directions, or single weights) are chosen, taken
    out, and the smaller network is checked against the masked one; then it is fitted to the uncompressed network
    without labels and, if asked for, fine-tuned. Both networks are audited alike, on the same samples.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``; left bit-equal.
        data: Samples to judge both networks by.
        compression: What to remove and how.
        threat: As :func:`brittle.audit`; by default APGD with cross-entropy, then with the targeted DLR loss.
        training: Samples that planning, repair and fine-tuning may look at; those that are in ``data`` are left out.
            None: a part of ``data``, at most half, which then is not evaluated.
        p: As :func:`brittle.audit`.
        eps: As :func:`brittle.audit`.
        execution: As :func:`brittle.audit`; its folder also keeps the state of the fine-tuning.

    Returns:
        The smaller network, its recipe, and the comparison.

    Raises:
        InputError: As :func:`plan_removal`, :func:`brittle.train` and :func:`brittle.compare`.
    """
    progress = execution.progress or silent
    plan = plan_removal(model, data, compression, training=training, p=p, eps=eps, progress=progress)
    return carry_out(plan, threat, p=p, eps=eps, execution=execution)


def carry_out(
    plan: Plan,
    threat: Threat | None = None,
    *,
    p: float | Sequence[float] = (math.inf, 2.0),
    eps: float | Mapping[float, float] | None = None,
    execution: Execution = Execution(),
) -> Compressed:
    """Repair, train and measure what :func:`plan_removal` has made smaller; arguments as :func:`compress`."""
    network, recipe = finish(plan, execution)
    networks, data = [plan.original, network], plan.parts.evaluated
    threat = threat or Threat(headline_attacks(data.classes), seed=plan.asked.seed)
    comparison = compare(networks, data, threat, names=NAMES, p=p, eps=eps, execution=execution)
    comparison = replace(comparison, title="Before and after compression", compression=recipe)
    return Compressed(plan, network, recipe, comparison)


def headline_attacks(classes: int, steps: int = 100) -> tuple[Attack, ...]:
    """The attacks that robust accuracies of compressed networks rest on by default.

    Args:
        classes: Of the network: the targeted DLR loss needs 4, the DLR loss 3.
        steps: Of each attack.
    """
    second = partial(apgd_targeted, steps=steps) if classes > 3 else partial(apgd, loss="dlr", steps=steps)
    return (partial(apgd, steps=steps), second)[: 1 if classes < 3 else 2]


def finish(plan: Plan, execution: Execution = Execution()) -> tuple[nn.Module, CompressionRecipe]:
    """The planned network, repaired and fine-tuned, and its recipe.

    Args:
        plan: What was removed.
        execution: Where the state of the fine-tuning is kept, and who is told how far it is.
    """
    started = time.perf_counter()
    network = repaired(plan)
    mended = time.perf_counter()
    folder = None if execution.resume is None else Path(execution.resume) / "fine-tuning"
    network = fine_tuned(network, plan, folder, execution.progress or silent).to(device_of(plan.original))
    seconds = {"planning": plan.seconds, "repair": mended - started}
    if plan.asked.fine_tune is not None:
        seconds["fine-tuning"] = time.perf_counter() - mended
    return network, replace(recipe_of(plan, network), seconds=seconds)


def recipe_of(plan: Plan, network: nn.Module) -> CompressionRecipe:
    """What a network was made of; by which architecture it can be built again, its saver says."""
    asked, x = plan.asked, plan.parts.seen[0][:1]
    return CompressionRecipe(
        asked=replace(request_of(asked), score=plan.removed.score or asked.score_name),
        arch=None,
        arguments={},
        mean=(),
        std=(),
        input_shape=tuple(x.shape[1:]),
        classes=plan.parts.evaluated.classes,
        before=network_size(plan.original, x),
        after=network_size(network, x),
        groups=plan.removed.cuts,
        share=plan.removed.share,
        whole=dict(plan.removed.whole),
        repair=steps_of(plan),
        candidate=plan.removed.candidate,
        warnings=plan.warnings,
        zeros=_share_of_zeros(network) if asked.remove == "weights" else 0.0,
    )


def request_of(asked: Compression) -> CompressionRequest:
    """What was asked, as it is kept."""
    return CompressionRequest(asked.remove, asked.allocation, asked.score_name, asked.target, asked.ratio, asked.seed)


def _share_of_zeros(network: nn.Module) -> float:
    """Of all weights with two axes or more."""
    weights = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    return sum(int((weight == 0).sum()) for weight in weights) / max(1, sum(weight.numel() for weight in weights))
