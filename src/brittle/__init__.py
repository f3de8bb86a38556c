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

__version__ = "0.1.0"

if TYPE_CHECKING:
    from brittle.attacks import apgd, apgd_targeted, fgsm, pgd, square, universal_perturbation
    from brittle.auditing import audit
    from brittle.bounds import (
        adversarial_loss_bound,
        certified_accuracy,
        certified_radii,
        chain_bounds,
        layer_bound,
        lipschitz_upper_bound,
        network_bounds,
    )
    from brittle.bounds.alignment import alignment
    from brittle.certificates import proven_robust
    from brittle.checkpoints import fill, read_state, save_state
    from brittle.compressibility import (
        effective_rank,
        effective_sparsity,
        k_term_error,
        k_term_error_curve,
        nuclear_frobenius_ratio,
        nuclear_spectral_ratio,
        row_norms,
        singular_values,
        smallest_k,
        spread,
        stable_rank,
    )
    from brittle.convolution import operator_norm_bounds
    from brittle.curves import minimal_distances
    from brittle.data import Data, load_data
    from brittle.errors import InputError
    from brittle.evaluation import evaluate
    from brittle.layers import read_layers
    from brittle.models import Normalize, build_model
    from brittle.norms import operator_norm
    from brittle.report import write_report
    from brittle.results import Audit, Evaluation
    from brittle.runs import load_run
    from brittle.sensitivity import jacobian_norms, largest_ratio
    from brittle.training import Adversary, Recipe, factorised, merged, train
    from brittle.worst import Threat

_HOMES = {
    "attacks": ("apgd", "apgd_targeted", "fgsm", "pgd", "square", "universal_perturbation"),
    "auditing": ("audit",),
    "bounds": (
        "adversarial_loss_bound", "certified_accuracy", "certified_radii", "chain_bounds", "layer_bound",
        "lipschitz_upper_bound", "network_bounds",
    ),
    "bounds.alignment": ("alignment",),
    "checkpoints": ("fill", "read_state", "save_state"),
    "compressibility": (
        "effective_rank", "effective_sparsity", "k_term_error", "k_term_error_curve", "nuclear_frobenius_ratio",
        "nuclear_spectral_ratio", "row_norms", "singular_values", "smallest_k", "spread", "stable_rank",
    ),
    "certificates": ("proven_robust",),
    "convolution": ("operator_norm_bounds",),
    "curves": ("minimal_distances",),
    "data": ("Data", "load_data"),
    "errors": ("InputError",),
    "evaluation": ("evaluate",),
    "layers": ("read_layers",),
    "models": ("Normalize", "build_model"),
    "norms": ("operator_norm",),
    "report": ("write_report",),
    "results": ("Audit", "Evaluation"),
    "runs": ("load_run",),
    "sensitivity": ("jacobian_norms", "largest_ratio"),
    "training": ("Adversary", "Recipe", "factorised", "merged", "train"),
    "worst": ("Threat",),
}  # fmt: skip

__all__ = [
    "Adversary", "Audit", "Data", "Evaluation", "InputError", "Normalize", "Recipe", "Threat",
    "adversarial_loss_bound", "alignment", "apgd", "apgd_targeted", "audit", "build_model", "certified_accuracy",
    "certified_radii", "chain_bounds", "effective_rank", "effective_sparsity", "evaluate", "factorised", "fgsm",
    "fill", "jacobian_norms", "k_term_error", "k_term_error_curve", "largest_ratio", "layer_bound",
    "lipschitz_upper_bound", "load_data", "load_run", "merged", "minimal_distances", "network_bounds",
    "nuclear_frobenius_ratio", "nuclear_spectral_ratio", "operator_norm", "operator_norm_bounds", "pgd",
    "proven_robust", "read_layers", "read_state", "row_norms", "save_state", "singular_values", "smallest_k",
    "spread", "square", "stable_rank", "train", "universal_perturbation", "write_report",
]  # fmt: skip


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
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
