"""Training with the papers' interventions: penalties, constraints, low-rank factors and adversarial examples."""

from brittle.training.constraints import CONSTRAINTS
from brittle.training.history import EpochRow, LayerRow
from brittle.training.loop import Moment, Training, train
from brittle.training.low_rank import factorised, merged
from brittle.training.nuclear import RefreshedNuclearNorm
from brittle.training.penalties import (
    PENALTIES,
    group_lasso,
    joint_l1,
    l1,
    nuclear_norm,
    scale_invariant_group_lasso,
    spread_control,
)
from brittle.training.recipe import Adversary, Recipe

__all__ = [
    "CONSTRAINTS",
    "PENALTIES",
    "Adversary",
    "EpochRow",
    "LayerRow",
    "Moment",
    "Recipe",
    "RefreshedNuclearNorm",
    "Training",
    "factorised",
    "group_lasso",
    "joint_l1",
    "l1",
    "merged",
    "nuclear_norm",
    "scale_invariant_group_lasso",
    "spread_control",
    "train",
]
