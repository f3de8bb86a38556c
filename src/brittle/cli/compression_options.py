"""The options of ``brittle compress`` that no other command has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from brittle.cli import values
from brittle.cli.completion import completing
from brittle.cli.from_dataclass import constant, options
from brittle.cli.options import PENALTIES, Samples, Values, option
from brittle.errors import InputError

if TYPE_CHECKING:
    from brittle.data import Data
    from brittle.delivery import Compression, Ladder
    from brittle.evaluation import Threat
    from brittle.training import Recipe
    from brittle.training.runs import RunConfig

COMPRESSION = options(
    "brittle.delivery",
    "Compression",
    {
        "Compression": "ratio target remove allocate score keep floor round_to",
        "Repair": "refit recalibrate calibration",
    },
    without={"fine_tune": "--fine-tune and what belongs to it", "seed": "the seed of the attacks"},
    target={
        "autocompletion": completing(*constant("brittle.results.compression", "TARGETS")),
        "help": "What the ratio is of: parameters, macs (multiply-accumulates), latency (measured) or filters.",
    },
    remove={
        "autocompletion": completing(*constant("brittle.results.compression", "REMOVALS")),
        "help": "filters (with neurons), ranks (singular directions) or weights (single ones; nothing gets faster).",
    },
    allocate={
        "autocompletion": completing(*constant("brittle.delivery.request", "ALLOCATIONS")),
        "help": f"How much goes where: {', '.join(constant('brittle.delivery.request', 'ALLOCATIONS'))}.",
        "show_default": "planner for filters, k_term else",
    },
    score={
        "type": str,
        "autocompletion": completing("row_l2", "row_l1", "batch_norm_scale", "outputs", "singular_values"),
        "help": "What ranks the units of a layer: row_l2, row_l1 or batch_norm_scale of filters, outputs or "
        "singular_values of ranks.",
        "show_default": "the first of them",
    },
    keep={"type": list[str], "default": None, "metavar": "LAYER", "help": "Layer that stays whole (repeatable)."},
)


@dataclass(frozen=True)
class FineTuning:
    """Training after the removal."""

    fine_tune: Annotated[
        int, option("Fine-tuning", metavar="EPOCHS", min=0, help="Train afterwards for so many epochs.")
    ] = 0
    adversarial: Annotated[
        str | None,
        option("Fine-tuning", metavar="P=EPS", help="Train against attacks of this budget: inf=8/255 or 2=0.5."),
    ] = None
    attack_steps: Annotated[int, option("Fine-tuning", help="Steps of the training attack.")] = 10
    distill: Annotated[
        float, option("Fine-tuning", help="Share of the loss that draws towards the uncompressed network, from 0 to 1.")
    ] = 0.0
    penalty: Annotated[
        list[str] | None,
        option(
            "Fine-tuning",
            metavar="NAME=STRENGTH",
            autocompletion=completing(*(f"{name}=" for name in PENALTIES)),
            help=f"Penalty on the loss (repeatable): {', '.join(PENALTIES)}.",
        ),
    ] = None
    lr: Annotated[float, option("Fine-tuning", help="Learning rate at the start; it falls to 0 along a cosine.")] = 1e-3
    crop: Annotated[int, option("Fine-tuning", help="Pixels of padding from which training images are cropped.")] = 0
    flip: Annotated[bool, option("Fine-tuning", "--flip", help="Mirror every other training image, at random.")] = False
    train_limit: Annotated[int | None, option("Fine-tuning", metavar="<int>", min=1, help="Most training samples.")] = (
        None
    )

    def recipe(self, seed: int) -> Recipe | None:
        """How to train; None for not at all."""
        from brittle.training import Adversary, Recipe

        if not self.fine_tune:
            if self.adversarial or self.distill or self.penalty:
                raise InputError("fine-tune: expected a number of epochs with --adversarial, --distill and --penalty")
            return None
        budgets = {} if self.adversarial is None else values.budgets([self.adversarial])
        if len(budgets) > 1:
            raise InputError(f"adversarial: expected one norm, P=EPS; got {self.adversarial!r}")
        enemies = [Adversary(eps, p, steps=self.attack_steps) for p, eps in budgets.items()]
        return Recipe(
            epochs=self.fine_tune,
            lr=self.lr,
            schedule="cosine",
            adversary=enemies[0] if enemies else None,
            distill=self.distill,
            penalties=values.strengths("penalty", self.penalty),
            crop=self.crop,
            flip=self.flip,
            measure_every=0,
            seed=seed,
        )

    def samples(self, samples: Samples, run: RunConfig | None, asked: Compression) -> Data | None:
        """Training samples; None where the data have none, and then a part of the data serves for planning."""
        limit = self.train_limit or (None if asked.fine_tune else 4 * asked.calibration)
        try:
            return samples.load_split("train", limit, asked.seed, run)
        except InputError:
            if asked.fine_tune:
                raise
            return None


@dataclass(frozen=True)
class FrontierOptions:
    """Several ratios and allocations in place of one."""

    sweep: Annotated[
        str | None,
        option(
            "Frontier", metavar="FROM:TO:STEP", help="Compress by each of these ratios and allocations: the frontier."
        ),
    ] = None
    allocations: Annotated[
        str | None, option("Frontier", help="Allocations of the frontier, separated by commas.", show_default="all")
    ] = None
    min_robust: Annotated[
        float | None,
        option(
            "Frontier",
            metavar="SHARE",
            help="Keep the smallest network of the frontier whose robust accuracy is at least this share (0 to 1) in "
            "every norm; end with exit code 4 if there is none.",
        ),
    ] = None

    def ladder(self, asked: Compression) -> Ladder | None:
        """The networks of the frontier; None where one is asked for."""
        if self.sweep is None:
            if self.allocations is not None or self.min_robust is not None:
                raise InputError("sweep: expected FROM:TO:STEP with --allocations and --min-robust; got none")
            return None
        from brittle.delivery import Ladder

        names = self.allocations and tuple(name.strip() for name in self.allocations.split(","))
        chosen = {"allocations": names} if names else {}
        return Ladder(values.steps("sweep", self.sweep), min_robust=self.min_robust, compression=asked, **chosen)


def compression(asked: Values, recipe: Recipe | None, seed: int) -> Compression:
    """What all options together ask for."""
    from brittle.delivery import Compression

    keep = tuple(asked["keep"] or ())
    return Compression(**asked | {"keep": keep, "fine_tune": recipe, "seed": seed})


def chosen_threat(asked: Values, classes: int) -> Threat:
    """The attacks of a preset; without one, those that compressed networks are judged by."""
    from brittle.delivery.compressing import headline_attacks
    from brittle.evaluation import Threat

    if asked["attacks"] is not None:
        return Threat(**asked)
    steps = {} if asked["steps"] is None else {"steps": asked["steps"]}
    return Threat(**asked | {"attacks": headline_attacks(classes, **steps), "steps": None})
