"""A comparison in a minute: a dense and four compressible networks on the embedded digits, side by side.

Every weight matrix of every network is held at the Frobenius norm of the dense one's initialisation after each step, so
that what differs is structure and not scale. The attacks are the audit's own; nothing is tuned to the outcome, and a
compressible network that is not more fragile is shown as such.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from brittle.attacks import apgd
from brittle.auditing import compare
from brittle.compression.factorise import factorised
from brittle.data.load import Data, load_data
from brittle.evaluation import Execution, Threat
from brittle.models.architectures.fcn import fcn
from brittle.progress import Progress, silent
from brittle.reporting.comparison import write_comparison
from brittle.reporting.page import write_report
from brittle.results import Comparison
from brittle.training.history import Moment
from brittle.training.interventions.assembly import Interventions
from brittle.training.interventions.constraints import frobenius_normalisation
from brittle.training.loop import train
from brittle.training.recipe import Recipe

TITLE = "Compressible networks beside a dense one"
ABOUT = (
    "All networks have the same shape (64–256–256–10), see the same digits in the same order, and every weight matrix"
    " is held at the same Frobenius norm after each step. So none of them can be larger or smaller than another; only"
    " how their energy is distributed differs. Compressible networks put it into a few directions or a few neurons. At"
    " a fixed Frobenius norm that raises the operator norms, and attackers aim at exactly those directions.",
    "This is one run with one seed; another seed gives other numbers.",
)
"""What the page says of the networks."""
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
    networks = [train_variant(v, train_data, seed=seed, epochs=epochs, progress=progress) for v in variants]

    def report(stage: str, done: int, total: int | None) -> None:
        if stage.endswith("attack"):  # all else is over in no time
            progress(f"attack {stage.removesuffix(' attack')}", done, total)

    compared = compare(
        networks, test_data, threat, names=[variant.name for variant in variants], execution=Execution(progress=report)
    )
    comparison = replace(compared, title=TITLE, about=ABOUT)
    folders = {variant.name: variant.name.replace(" ", "-") for variant in variants}
    for each in comparison.networks:
        each.audit.save(out / folders[each.name] / "audit.json")
        write_report(each.audit, out / folders[each.name] / "report.html")
    write_comparison(comparison, out, {name: f"{folder}/report.html" for name, folder in folders.items()})
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
