"""Robust accuracy alone, at the standard budgets of a data set of any size."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from brittle.data.batches import budgets_by_norm
from brittle.data.load import Data
from brittle.errors import InputError
from brittle.evaluation.dataset import class_count, evaluate
from brittle.evaluation.presets import preset as battery
from brittle.evaluation.signature import signature_of
from brittle.linear.norms import check_attack_norm
from brittle.results import AttackResult, NotMeasured, Setting
from brittle.results.wording import norm_name

Stage = Callable[[str, int, int | None], None]
"""Progress: called with the name of the stage, the samples done and their total."""


def attack(
    model: nn.Module,
    data: Data,
    *,
    p: float | Sequence[float] = (math.inf, 2.0),
    eps: float | Mapping[float, float] | None = None,
    preset: str = "standard",
    steps: int | None = None,
    restarts: int = 1,
    bounds: tuple[float, float] = (0.0, 1.0),
    certify: bool = True,
    compiled: bool = False,
    batch_size: int = 256,
    seed: int = 0,
    devices: Sequence[str] = (),
    ray_workers: int = 0,
    resume: str | Path | None = None,
    name: str | None = None,
    progress: Stage | None = None,
) -> AttackResult:
    """Robust accuracy of a network under a preset's attacks, for one norm after the other.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``; left bit-equal.
        data: Labelled inputs within ``bounds``.
        p: Norms of the budgets: inf, 2 or both.
        eps: Budget for every norm, in input units; by default the data set's own, else 8/255 (inf) and 0.5 (2).
        preset: ``fast``, ``standard`` or ``thorough``.
        steps: Steps of every gradient attack; the preset's own by default.
        restarts: Runs of every attack.
        bounds: Smallest and largest admissible input value.
        certify: As :func:`brittle.evaluate`.
        compiled: As :func:`brittle.evaluate`.
        batch_size: Samples at once.
        seed: Seed of every random choice.
        devices: As :func:`brittle.evaluate`.
        ray_workers: As :func:`brittle.evaluate`.
        resume: As :func:`brittle.evaluate`.
        name: What to call the model; its class name by default.
        progress: Called as samples are done.

    Returns:
        One evaluation a norm; robust accuracies are upper estimates.

    Raises:
        InputError: An argument is out of range; it names the argument, what was expected and what came.
    """
    started = time.perf_counter()
    norms = tuple(check_attack_norm(q) for q in (p if isinstance(p, Sequence) else (p,)))
    if not norms:
        raise InputError("p: expected at least one of inf and 2; got none")
    budgets = budgets_by_norm(eps, norms, data)
    attacks, left_out = battery(preset, class_count(model, data.inputs, data.labels), steps)
    tell = progress or (lambda stage, done, total: None)
    evaluations = tuple(
        evaluate(
            model,
            data,
            attack=attacks,
            eps=budgets[q],
            p=q,
            restarts=restarts,
            bounds=bounds,
            batch_size=batch_size,
            seed=seed,
            certify=certify,
            compiled=compiled,
            devices=devices,
            ray_workers=ray_workers,
            resume=resume,
            progress=lambda done, total, q=q: tell(f"{norm_name(q)} attack", done, total),  # type: ignore[misc]
        )
        for q in norms
    )
    settings: dict[str, Setting] = {
        "preset": preset,
        "certify": certify,
        "restarts": restarts,
        "bounds": tuple(map(float, bounds)),
    }
    settings["steps"] = steps
    settings |= {"p": tuple(f"{q:g}" for q in norms), "eps": tuple(budgets.values())}
    result = AttackResult(
        model=name or type(model).__name__,
        evaluations=evaluations,
        not_measured=tuple(NotMeasured(attack_name, reason) for attack_name, reason in left_out),
        signature=signature_of(model, (data.inputs, data.labels), seed, settings),
    )
    return replace(result, seconds=time.perf_counter() - started)
