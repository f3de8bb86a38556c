"""The options of ``brittle compress`` that no other command has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from brittle.cli import values
from brittle.cli.from_dataclass import constant, options
from brittle.cli.options import Samples, Values, option
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
    allocate={
        "help": f"How much goes where: {', '.join(constant('brittle.delivery.request', 'ALLOCATIONS'))}.",
        "show_default": "planner for filters, k_term else",
    },
    score={
        "type": str,
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
        int, option("Repair", metavar="EPOCHS", min=0, help="Train afterwards for so many epochs.")
    ] = 0
    adversarial: Annotated[
        str | None, option("Repair", metavar="P=EPS", help="Train adversarially with this budget: inf=0.03 or 2=0.5.")
    ] = None
    attack_steps: Annotated[int, option("Repair", help="Steps of the training attack.")] = 10
    distill: Annotated[
        float, option("Repair", help="Share of the loss that draws towards the uncompressed network, from 0 to 1.")
    ] = 0.0
    penalty: Annotated[
        list[str] | None,
        option(
            "Repair",
            metavar="NAME=STRENGTH",
            help=f"Penalty on the loss (repeatable): {', '.join(constant('brittle.training', 'PENALTIES'))}.",
        ),
    ] = None
    lr: Annotated[float, option("Repair", help="Learning rate at the start; it falls to 0 along a cosine.")] = 1e-3
    crop: Annotated[int, option("Repair", help="Pixels of padding from which training images are cropped.")] = 0
    flip: Annotated[bool, option("Repair", "--flip", help="Mirror every other training image, at random.")] = False
    train_limit: Annotated[int | None, option("Repair", min=1, help="Most training samples.")] = None

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
        option("Frontier", metavar="FROM:TO:STEP", help="Networks of these ratios by all allocations: the frontier."),
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
