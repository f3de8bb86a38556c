"""What attacks achieve, checked again: robust accuracy, curves, certificates, honesty, universal perturbations."""

from brittle.evaluation.accuracy import attack, evaluate
from brittle.evaluation.certify import proven_robust
from brittle.evaluation.curves import minimal_distances, security_curve
from brittle.evaluation.execution import Execution
from brittle.evaluation.features import feature_compression
from brittle.evaluation.honesty import honesty_flags
from brittle.evaluation.threat import PRESETS, Attack, Threat, preset
from brittle.evaluation.universal_check import data_free_perturbations, judge_universal
from brittle.evaluation.worst_case import WorstCase

__all__ = [
    "PRESETS",
    "Attack",
    "Execution",
    "Threat",
    "WorstCase",
    "attack",
    "data_free_perturbations",
    "evaluate",
    "feature_compression",
    "honesty_flags",
    "judge_universal",
    "minimal_distances",
    "preset",
    "proven_robust",
    "security_curve",
]
