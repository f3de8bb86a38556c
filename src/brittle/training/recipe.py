"""How a network is trained: everything that decides the result, in one frozen, storable record."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from brittle.errors import InputError
from brittle.linear.norms import check_attack_norm

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("constant", "cosine", "step")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
SELECTIONS = ("best", "last")


@dataclass(frozen=True)
class Adversary:
    """Adversarial training (Madry et al. 2018): PGD inside the step, in evaluation mode, from a random start.

    Attributes:
        eps: Budget in input units, above 0.
        p: Norm of the budget: 2 or inf.
        steps: Gradient steps; all are taken, the last point counts.
        step_size: Length of a step in the norm p; ``2.5 eps / steps`` by default.
        ratio: Share of every batch that is attacked, above 0, at most 1.

    Raises:
        InputError: An attribute is out of range.
    """

    eps: float
    p: float = math.inf
    steps: int = 10
    step_size: float | None = None
    ratio: float = 0.5

    def __post_init__(self) -> None:
        check_attack_norm(self.p)
        _positive("eps", self.eps)
        _count("steps", self.steps)
        _positive("step_size", self.length)
        if not (_is_number(self.ratio) and 0 < self.ratio <= 1):
            raise InputError(f"ratio: expected a share above 0, at most 1; got {self.ratio}")

    @property
    def length(self) -> float:
        """Length of a step."""
        return 2.5 * self.eps / self.steps if self.step_size is None else self.step_size


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Optimiser, learning rate, weight decay and selection by validation default to the paper's (arXiv 2507.17725,
    section 4), as does the adversary's ratio.

    Attributes:
        epochs: Passes over the training samples.
        batch_size: Samples a step; a last batch of fewer than 8 is left out (unless it is the only one).
        optimizer: ``"adamw"`` or ``"sgd"``.
        lr: Learning rate.
        weight_decay: Decoupled for AdamW, in the gradient for SGD.
        momentum: Of SGD (Nesterov's form is not used).
        schedule: ``"constant"``; ``"cosine"``: from lr to 0 over all steps; ``"step"``: times ``decay`` at each of
            the ``milestones``.
        milestones: Shares of all steps.
        decay: Factor at a milestone.
        penalties: Strength by name of :data:`brittle.training.PENALTIES`, added to the loss.
        refresh: Steps for which the nuclear norm's polar factor is used before it is computed anew, and between two
            shrinkages; 1 is exact.
        constraints: Value by name of :data:`brittle.training.CONSTRAINTS`, applied after every step;
            None where the constraint has a value of its own (``frobenius``: the norms at the start).
        layers: Layers that penalties and constraints act on; None for the paper's choice.
        adversary: Adversarial training; None for none.
        crop: Pixels of zero padding from which every image is cropped at a random place.
        flip: Whether every other image is mirrored, at random.
        validation: Share of the training samples held out to select the weights, from 0 (none), below 1.
        patience: Epochs without a better validation accuracy after which training ends; None for no end.
        select: ``"best"``: the weights of best validation accuracy (with an adversary the mixture that is trained
            on); ``"last"``: those of the last epoch, also without validation.
        precision: ``"32-true"``, or ``"16-mixed"`` and ``"bf16-mixed"`` (Lightning Fabric).
        measure_every: Epochs between two measurements of all layers and bounds, also after the last of ``epochs``; 0
            for none.
        seed: Seed of the order, the augmentation, the attack's starts, dropout and the validation samples.

    Raises:
        InputError: An attribute is out of range.
    """

    epochs: int = 20
    batch_size: int = 128
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    momentum: float = 0.9
    schedule: str = "constant"
    milestones: tuple[float, ...] = (0.5, 0.75)
    decay: float = 0.1
    penalties: Mapping[str, float] = field(default_factory=dict)
    refresh: int = 1
    constraints: Mapping[str, float | None] = field(default_factory=dict)
    layers: tuple[str, ...] | None = None
    adversary: Adversary | None = None
    crop: int = 0
    flip: bool = False
    validation: float = 0.1
    patience: int | None = None
    select: str = "best"
    precision: str = "32-true"
    measure_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "refresh"):
            _count(name, getattr(self, name))
        if self.patience is not None:
            _count("patience", self.patience)
        for name in ("crop", "measure_every", "seed"):
            _count(name, getattr(self, name), 0)
        if not isinstance(self.flip, bool):
            raise InputError(f"flip: expected true or false; got {self.flip!r}")
        _positive("lr", self.lr)
        _positive("decay", self.decay)
        _from_zero("weight_decay", self.weight_decay)
        for name, value in (("momentum", self.momentum), ("validation", self.validation)):
            if not (_is_number(value) and 0 <= value < 1):
                raise InputError(f"{name}: expected a number from 0, below 1; got {value!r}")
        for name, listed in (("milestones", self.milestones), ("layers", self.layers or ())):
            if isinstance(listed, str) or not isinstance(listed, Sequence):
                raise InputError(f"{name}: expected a sequence; got {listed!r}")
        if not all(isinstance(name, str) for name in self.layers or ()):
            raise InputError(f"layers: expected names of modules; got {self.layers!r}")
        if (
            not all(_is_number(share) for share in self.milestones)
            or list(self.milestones) != sorted(self.milestones)
            or not all(0 < share < 1 for share in self.milestones)
        ):
            raise InputError(f"milestones: expected rising shares between 0 and 1; got {self.milestones}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name}: expected one of {', '.join(known)}; got {getattr(self, name)!r}")
        for name, strength in self.penalties.items():
            _from_zero(f"penalties[{name!r}]", strength)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step ``step`` (from 0) of ``steps``."""
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * step / steps)) / 2
        if self.schedule == "step":
            return self.lr * self.decay ** sum(step >= share * steps for share in self.milestones)
        return self.lr

    def differences(self, other: Recipe) -> list[str]:
        """Names of the attributes that differ."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(other, f.name)]


_CHOICES = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES, "precision": PRECISIONS, "select": SELECTIONS}


def _count(name: str, value: object, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name}: expected an integer of at least {least}; got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _positive(name: str, value: float) -> None:
    if not (_is_number(value) and 0 < value < math.inf):
        raise InputError(f"{name}: expected a finite number above 0; got {value!r}")


def _from_zero(name: str, value: float) -> None:
    if not (_is_number(value) and 0 <= value < math.inf):
        raise InputError(f"{name}: expected a finite number of at least 0; got {value!r}")
