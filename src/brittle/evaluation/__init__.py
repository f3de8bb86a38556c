"""What attacks achieve, checked again: robust accuracy, curves, certificates, honesty, universal perturbations."""

from brittle.evaluation.certify import proven_robust
from brittle.evaluation.curves import minimal_distances, security_curve
from brittle.evaluation.dataset import evaluate
from brittle.evaluation.honesty import honesty_flags
from brittle.evaluation.presets import PRESETS, preset
from brittle.evaluation.standard import attack
from brittle.evaluation.universal_check import data_free_perturbations, judge_universal
from brittle.evaluation.worst_case import Attack, Threat, WorstCase

__all__ = [
    "PRESETS",
    "Attack",
    "Threat",
    "WorstCase",
    "attack",
    "data_free_perturbations",
    "evaluate",
    "honesty_flags",
    "judge_universal",
    "minimal_distances",
    "preset",
    "proven_robust",
    "security_curve",
]
