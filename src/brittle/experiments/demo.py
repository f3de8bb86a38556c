"""A comparison in a minute: a dense and four compressible networks on the embedded digits, side by side.

Every weight matrix of every network is held at the Frobenius norm of the dense one's initialisation after each step, so
that what differs is structure and not scale. The attacks are the audit's own; nothing is tuned to the outcome, and a
compressible network that is not more fragile is shown as such.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from brittle.attacks import apgd
from brittle.auditing import audit
from brittle.compression.factorise import factorised
from brittle.data.load import Data, load_data
from brittle.evaluation import Execution, Threat
from brittle.experiments.claims import mcnemar
from brittle.models.architectures.fcn import fcn
from brittle.progress import Progress, silent
from brittle.reporting.comparison import ComparedNetwork, Comparison, write_comparison
from brittle.reporting.page import write_report
from brittle.results import FRACTIONS, Audit
from brittle.training.history import Moment
from brittle.training.interventions.assembly import Interventions
from brittle.training.interventions.constraints import frobenius_normalisation
from brittle.training.loop import train
from brittle.training.recipe import Recipe

WIDTH, EPOCHS, BATCH_SIZE = 256, 60, 64


@dataclass(frozen=True)
class Variant:
    """How one of the networks is made.

    Attributes:
        name: What it is called.
        rank: Rank of the factors of both hidden layers; None for full matrices.
        penalties: Strength by name of penalties on both hidden matrices.
    """

    name: str
    rank: int | None = None
    penalties: Mapping[str, float] = field(default_factory=dict)


VARIANTS = (
    Variant("dense"),
    Variant("rank 16", rank=16),
    Variant("rank 8", rank=8),
    Variant("nuclear norm", penalties={"nuclear_norm": 0.03}),
    Variant("row-sparse", penalties={"group_lasso": 0.02}),
)
"""The first is what the others are compared with."""


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    variants: Sequence[Variant] = VARIANTS,
    epochs: int = EPOCHS,
    progress: Progress = silent,
) -> Comparison:
    """Train, audit and compare the networks, and write the pages.

    Args:
        out: Folder for ``report.html`` (the comparison), ``story.png`` and a folder with the audit of every network.
        seed: Seed of weights, batches and attacks.
        variants: The networks; the first is what the others are compared with.
        epochs: Passes over the training digits.
        progress: Called as the work goes on.

    Returns:
        The networks side by side.
    """
    train_data, test_data = load_data("digits", split="train", seed=seed), load_data("digits", seed=seed)
    threat = Threat([functools.partial(apgd, loss=loss) for loss in ("ce", "dlr")], seed=seed)
    audits: list[Audit] = []
    for variant in variants:
        network = train_variant(variant, train_data, seed=seed, epochs=epochs, progress=progress)

        def report(stage: str, done: int, total: int | None, name: str = variant.name) -> None:
            if stage.endswith("attack"):  # all else is over in no time
                progress(f"attack {name} {stage.split()[0]}", done, total)

        audits.append(audit(network, test_data, threat, name=variant.name, execution=Execution(progress=report)))
    comparison = Comparison(tuple(_compare(result, audits[0]) for result in audits))
    for compared in comparison.networks:
        compared.audit.save(out / compared.folder / "audit.json")
        write_report(compared.audit, out / compared.folder / "report.html")
    write_comparison(comparison, out)
    return comparison


def train_variant(
    variant: Variant, data: Data, *, seed: int, epochs: int = EPOCHS, progress: Progress = silent
) -> nn.Module:
    """A network 64-256-256-10 of one variant, trained with every matrix held at the Frobenius norm of the dense start.

    AdamW (1e-3, weight decay 0.01), batches of 64, after :func:`brittle.training.train`.

    Args:
        variant: What to train.
        data: Training data.
        seed: Seed of the weights and of the batches.
        epochs: Passes over the data.
        progress: Called with the epochs that are over.

    Returns:
        The network in evaluation mode.
    """
    generator, widths = torch.Generator().manual_seed(seed), (WIDTH, WIDTH, data.classes)
    with torch.random.fork_rng(devices=[]):
        network: nn.Module = fcn(data.inputs[0].numel(), WIDTH, len(widths), data.classes)
    linear = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    for module in linear.values():
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
    if variant.rank is not None:
        network = factorised(network, variant.rank, initial="random", seed=seed)
    # The expected Frobenius norm of He's initialisation, of every layer.
    norms = {name: math.sqrt(2.0 * m) for name, m in zip(linear, widths, strict=True)}
    recipe = Recipe(
        epochs=epochs, batch_size=BATCH_SIZE, penalties=variant.penalties, validation=0.0, measure_every=0, seed=seed
    )

    def report(moment: Moment) -> None:
        progress(f"train {variant.name}", moment.epoch if moment.row else moment.epoch - 1, epochs)

    # One constraint a layer, as each has a norm of its own.
    hold = [functools.partial(frobenius_normalisation, value=norm, layers=[name]) for name, norm in norms.items()]
    return train(network, data, recipe, interventions=Interventions(constraints=hold), callback=report).model


def _compare(result: Audit, dense: Audit) -> ComparedNetwork:
    hidden, tenth = result.layers[:-1], FRACTIONS.index(0.10)
    return ComparedNetwork(
        name=result.model,
        audit=result,
        spectral_head=1 - sum(layer.spectral_error[tenth] for layer in hidden) / len(hidden),
        row_head=1 - sum(layer.row_error[tenth] for layer in hidden) / len(hidden),
        p_values={norm.p: mcnemar(_verdicts(dense, norm.p), _verdicts(result, norm.p)) for norm in result.norms},
    )


def _verdicts(result: Audit, p: float) -> list[bool]:
    evaluation = result.norm(p).evaluation
    assert evaluation is not None  # every audit of the demo has data
    return [s.clean_prediction == s.label and s.attack is None for s in evaluation.samples]
