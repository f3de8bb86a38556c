"""How a network is trained: everything that decides the result, in one frozen, storable record."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from brittle.errors import InputError
from brittle.linear.norms import check_attack_norm
from brittle.training.optimizers import OPTIMIZERS, SCHEDULES

PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
"""As Lightning Fabric names them; the first needs no Fabric."""
SELECTIONS = ("best", "last")
"""Which epoch's weights are kept."""


@dataclass(frozen=True)
class Adversary:
    """Adversarial training, the attack inside the step, in evaluation mode.

    By PGD from a random start, each sample its own perturbation (Madry et al. 2018); or, ``universal``, by one for all
    samples, which starts at zero and goes on from batch to batch (Shafahi et al. 2020).

    Attributes:
        eps: Budget in input units, above 0.
        p: Norm of the budget: 2 or inf.
        steps: Gradient steps a batch, 10 by default, 1 if ``universal``; all are taken, the last point counts.
        step_size: Length of a step in the norm p; ``2.5 eps / steps`` by default, ``eps / steps`` if ``universal``.
        ratio: Share of every batch that is attacked, above 0, at most 1.
        universal: Whether one perturbation is shared by all samples.

    Raises:
        InputError: An attribute is out of range.
    """

    eps: float
    p: float = math.inf
    steps: int | None = None
    step_size: float | None = None
    ratio: float = 0.5
    universal: bool = False

    def __post_init__(self) -> None:
        check_attack_norm(self.p)
        _check_number("eps", self.eps, above=0)
        if not isinstance(self.universal, bool):
            raise InputError(f"universal: expected true or false; got {self.universal!r}")
        _check_count("steps", self.count, 1)
        _check_number("step_size", self.length, above=0)
        if not (_is_number(self.ratio) and 0 < self.ratio <= 1):
            raise InputError(f"ratio: expected a share above 0, at most 1; got {self.ratio}")

    @property
    def count(self) -> int:
        """Number of steps."""
        return (1 if self.universal else 10) if self.steps is None else self.steps

    @property
    def length(self) -> float:
        """Length of a step."""
        if self.step_size is not None:
            return self.step_size
        # Shorter steps of a universal one harm: the network learns the perturbation that stands, and falls to others.
        return (1.0 if self.universal else 2.5) * self.eps / self.count


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
        refresh: Steps that one costly decomposition serves: of the nuclear norm's gradient, or between two shrinkages;
            1 is exact.
        constraints: Value by name of :data:`brittle.training.CONSTRAINTS`, applied after every step;
            None where the constraint has a value of its own (``frobenius``: the norms at the start).
        layers: Layers that penalties and constraints act on; None for the paper's choice.
        adversary: Adversarial training; None for none.
        distill: Share of the loss that teaches, from 0 (none) to 1 (no labels): the distance from the predictions of a
            teacher, an uncompressed network, on the clean inputs.
        temperature: By which the logits of both are divided there, above 0.
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
    distill: float = 0.0
    temperature: float = 1.0
    crop: int = 0
    flip: bool = False
    validation: float = 0.1
    patience: int | None = None
    select: str = "best"
    precision: str = "32-true"
    measure_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in _LEAST_COUNTS.items():
            _check_count(name, getattr(self, name), least)
        if self.patience is not None:
            _check_count("patience", self.patience, 1)
        if not isinstance(self.flip, bool):
            raise InputError(f"flip: expected true or false; got {self.flip!r}")
        _check_number("lr", self.lr, above=0)
        _check_number("decay", self.decay, above=0)
        _check_number("weight_decay", self.weight_decay)
        _check_number("momentum", self.momentum, below=1)
        _check_number("validation", self.validation, below=1)
        _check_number("temperature", self.temperature, above=0)
        if not (_is_number(self.distill) and 0 <= self.distill <= 1):
            raise InputError(f"distill: expected a share from 0 to 1; got {self.distill!r}")
        for name, strength in self.penalties.items():
            _check_number(f"penalties[{name!r}]", strength)
        for name, listed in (("milestones", self.milestones), ("layers", self.layers or ())):
            if isinstance(listed, str) or not isinstance(listed, Sequence):
                raise InputError(f"{name}: expected a sequence; got {listed!r}")
        if not all(isinstance(name, str) for name in self.layers or ()):
            raise InputError(f"layers: expected names of modules; got {self.layers!r}")
        shares = [share for share in self.milestones if _is_number(share) and 0 < share < 1]
        if list(self.milestones) != sorted(shares):
            raise InputError(f"milestones: expected rising shares between 0 and 1; got {self.milestones}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"{name}: expected one of {', '.join(choices)}; got {getattr(self, name)!r}")

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step ``step`` (from 0) of ``steps``."""
        return self.lr * SCHEDULES[self.schedule](step, steps, self.milestones, self.decay)

    def differences(self, other: Recipe) -> list[str]:
        """Names of the attributes that differ."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(other, f.name)]


_CHOICES = {
    "optimizer": tuple(OPTIMIZERS),
    "schedule": tuple(SCHEDULES),
    "precision": PRECISIONS,
    "select": SELECTIONS,
}
_LEAST_COUNTS = {"epochs": 1, "batch_size": 1, "refresh": 1, "crop": 0, "measure_every": 0, "seed": 0}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)  # True is an integer to Python


def _check_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name}: expected an integer of at least {least}; got {value!r}")


def _check_number(name: str, value: float, *, above: float | None = None, below: float = math.inf) -> None:
    """Raise unless the value is a number above ``above``, or at least 0 without it, and below ``below``."""
    if _is_number(value) and (value >= 0 if above is None else value > above) and value < below:
        return
    least = "of at least 0" if above is None else f"above {above}"
    limit = "finite number" if below == math.inf else "number"
    raise InputError(
        f"{name}: expected a {limit} {least}{'' if below == math.inf else f', below {below}'}; got {value!r}"
    )
