"""What is asked of a compression, in one frozen record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from brittle.errors import InputError
from brittle.results.compression import REMOVALS, TARGETS
from brittle.training import Recipe

ALLOCATIONS = ("planner", "k_term", "global", "layerwise", "random")
SCORES = {
    "filters": ("row_l2", "row_l1", "batch_norm_scale"),
    "ranks": ("outputs", "singular_values"),
    "weights": ("magnitude",),
}
"""What may rank the units of a layer, by what is removed; the first is the default."""


@dataclass(frozen=True)
class Compression:
    """What is removed from a network, how it is chosen, and how what is left is repaired.

    Attributes:
        ratio: Share of the target that goes, above 0 and below 1: 0.75 keeps a quarter.
        target: parameters, macs (multiply-accumulates of one sample), latency (median time of a pass over 64 samples,
            measured) or filters (rows of convolutions and Linear layers, where filters are removed), of the whole
            network.
        remove: filters (with neurons), ranks (singular directions) or weights (single ones: a baseline, nothing gets
            faster).
        allocate: How much goes where: planner (of filters, their default), k_term (that of all else), global,
            layerwise, or random as a control.
        score: What ranks the units of a layer, where no planner does. Of filters row_l2 (the default), row_l1,
            batch_norm_scale, or a function from a weight to one number a row; of ranks outputs (by the directions in
            which a layer's outputs are largest, the default) or singular_values; of weights magnitude.
        keep: Layers that stay whole.
        floor: Share of every layer that stays at least, below 1; one unit in any case.
        round_to: Kept numbers are multiples of this.
        refit: Fit the layers after a cut to the outputs of the uncompressed network (least squares, no labels).
        recalibrate: Measure the statistics of batch norms again (no labels); where layers are fitted, they stay.
        calibration: Samples that planning and repair look at; none of them is evaluated.
        fine_tune: How to train afterwards; None for not at all. The uncompressed network is the teacher of ``distill``.
        seed: Seed of every random choice.

    Raises:
        InputError: An attribute is out of range.
    """

    ratio: float = 0.5
    target: str = "parameters"
    remove: str = "filters"
    allocate: str | None = None
    score: str | Callable[[Tensor], Tensor] | None = None
    keep: tuple[str, ...] = ()
    floor: float = 0.05
    round_to: int = 1
    refit: bool = True
    recalibrate: bool = True
    calibration: int = 512
    fine_tune: Recipe | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise InputError(f"ratio: expected a share above 0 and below 1; got {self.ratio}")
        if not 0 <= self.floor < 1:
            raise InputError(f"floor: expected a share of at least 0 and below 1; got {self.floor}")
        choices: dict[str, tuple[str | None, ...]] = {"target": TARGETS, "remove": REMOVALS}
        if self.remove in REMOVALS:
            choices["allocate"] = (None, *allocations_for(self.remove))
            choices["score"] = (None, *SCORES[self.remove])
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed and not (name == "score" and callable(value) and self.remove == "filters"):
                listed = ", ".join(choice for choice in allowed if choice is not None)
                raise InputError(f"{name}: expected one of {listed}; got {value!r}")
        if self.allocate == "planner" and self.score is not None:
            raise InputError(f"score: expected none with the planner, which has its own; got {self.score_name}")
        for name, least in (("round_to", 1), ("calibration", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name}: expected at least {least}; got {getattr(self, name)}")
        if isinstance(self.keep, str):
            raise InputError(f"keep: expected a sequence of names; got {self.keep!r}")
        if self.remove == "ranks" and self.target == "filters":
            raise InputError("target: expected parameters, macs or latency where ranks go, no filter does; got filters")
        if self.remove == "weights" and self.target != "parameters":
            raise InputError(
                f"target: expected parameters where single weights go, as nothing else gets less; got {self.target}"
            )

    @property
    def allocation(self) -> str:
        """How much goes where, the default filled in; where a score is asked for that is not the planner."""
        ranked = self.score is not None and self.remove == "filters"
        return self.allocate or ("k_term" if ranked else allocations_for(self.remove)[0])

    @property
    def score_name(self) -> str:
        """What ranks the units of a layer, the default filled in; of the planner it is known when it has chosen."""
        if self.score is None:
            return "of the candidate" if self.allocation == "planner" else SCORES[self.remove][0]
        return self.score if isinstance(self.score, str) else getattr(self.score, "__name__", type(self.score).__name__)


def allocations_for(remove: str) -> tuple[str, ...]:
    """Allocations of what is removed, the default first."""
    return ALLOCATIONS if remove == "filters" else ALLOCATIONS[1:]
