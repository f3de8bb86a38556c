"""Training with the papers' interventions: penalties, constraints, low-rank factors and adversarial examples."""

from brittle.compression.factorise import factorised, merged
from brittle.training.history import Callback, EpochRow, LayerRow, Moment
from brittle.training.interventions.assembly import Interventions
from brittle.training.interventions.constraints import CONSTRAINTS
from brittle.training.interventions.nuclear import RefreshedNuclearNorm
from brittle.training.interventions.penalties import (
    PENALTIES,
    condition,
    group_lasso,
    interlayer_alignment,
    joint_l1,
    l1,
    nuclear_norm,
    scale_invariant_group_lasso,
    spread_control,
)
from brittle.training.loop import Training, train
from brittle.training.recipe import Adversary, Recipe
from brittle.training.runs import load_run

__all__ = [
    "CONSTRAINTS",
    "PENALTIES",
    "Adversary",
    "Callback",
    "EpochRow",
    "Interventions",
    "LayerRow",
    "Moment",
    "Recipe",
    "RefreshedNuclearNorm",
    "Training",
    "condition",
    "factorised",
    "group_lasso",
    "interlayer_alignment",
    "joint_l1",
    "l1",
    "load_run",
    "merged",
    "nuclear_norm",
    "scale_invariant_group_lasso",
    "spread_control",
    "train",
]
