"""Brittle: audit, train and compress neural networks whose robustness has to survive compression.

>>> import torch, brittle
>>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
>>> brittle.audit(net).layers[0].shape
(10, 64)

The names below are imported on first use, so that the command line answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from brittle._version import __version__ as __version__

if TYPE_CHECKING:
    from brittle.attacks import apgd, apgd_smoothed, apgd_targeted, fgsm, pgd, square, universal_perturbation
    from brittle.auditing import audit, compare
    from brittle.bounds import (
        adversarial_loss_bound,
        alignment,
        certified_accuracy,
        certified_radii,
        chain_bounds,
        jacobian_norms,
        largest_ratio,
        layer_bound,
        lipschitz_upper_bound,
        network_bounds,
    )
    from brittle.compression import factorised, merged
    from brittle.data import Data, load_data
    from brittle.delivery import Compression, Ladder, compress, frontier
    from brittle.errors import InputError
    from brittle.evaluation import (
        Execution,
        Threat,
        evaluate,
        feature_compression,
        minimal_distances,
        proven_robust,
    )
    from brittle.linear import (
        effective_rank,
        effective_sparsity,
        k_term_error,
        k_term_error_curve,
        nuclear_frobenius_ratio,
        nuclear_spectral_ratio,
        operator_norm,
        operator_norm_bounds,
        row_norms,
        singular_values,
        smallest_k,
        spread,
        stable_rank,
    )
    from brittle.models import Normalize, build_model, fill, read_layers, read_state, save_state
    from brittle.reporting import write_report
    from brittle.results import Audit, Comparison, Evaluation
    from brittle.training import Adversary, Recipe, load_run, train

_HOMES = {
    "attacks": "apgd apgd_smoothed apgd_targeted fgsm pgd square universal_perturbation",
    "auditing": "audit compare",
    "bounds": (
        "adversarial_loss_bound alignment certified_accuracy certified_radii chain_bounds jacobian_norms "
        "largest_ratio layer_bound lipschitz_upper_bound network_bounds"
    ),
    "compression": "factorised merged",
    "data": "Data load_data",
    "delivery": "Compression Ladder compress frontier",
    "errors": "InputError",
    "evaluation": "Execution Threat evaluate feature_compression minimal_distances proven_robust",
    "linear": (
        "effective_rank effective_sparsity k_term_error k_term_error_curve nuclear_frobenius_ratio "
        "nuclear_spectral_ratio operator_norm operator_norm_bounds row_norms singular_values smallest_k "
        "spread stable_rank"
    ),
    "models": "Normalize build_model fill read_layers read_state save_state",
    "reporting": "write_report",
    "results": "Audit Comparison Evaluation",
    "training": "Adversary Recipe load_run train",
}
"""The package that each public name comes from."""

__all__ = [
    "Adversary", "Audit", "Comparison", "Compression", "Data", "Evaluation", "Execution", "InputError", "Ladder",
    "Normalize", "Recipe", "Threat", "adversarial_loss_bound", "alignment", "apgd", "apgd_smoothed", "apgd_targeted",
    "audit", "build_model", "certified_accuracy", "certified_radii", "chain_bounds", "compare", "compress",
    "effective_rank", "effective_sparsity", "evaluate", "factorised", "feature_compression", "fgsm", "fill", "frontier",
    "jacobian_norms", "k_term_error", "k_term_error_curve", "largest_ratio", "layer_bound", "lipschitz_upper_bound",
    "load_data", "load_run", "merged", "minimal_distances", "network_bounds", "nuclear_frobenius_ratio",
    "nuclear_spectral_ratio", "operator_norm", "operator_norm_bounds", "pgd", "proven_robust", "read_layers",
    "read_state", "row_norms", "save_state", "singular_values", "smallest_k", "spread", "square", "stable_rank",
    "train", "universal_perturbation", "write_report",
]  # fmt: skip


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names.split():
            value = getattr(importlib.import_module(f"brittle.{module}"), name)
            globals()[name] = value
            return value
    try:
        return importlib.import_module(f"brittle.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"brittle.{name}":
            raise
    raise AttributeError(f"module 'brittle' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
