"""Matrices and convolutions as linear maps: compressibility, norms, spectra. Knows no model."""

from brittle.linear.compressibility import (
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
from brittle.linear.convolution import operator_norm_bounds
from brittle.linear.norms import operator_norm

__all__ = [
    "effective_rank",
    "effective_sparsity",
    "k_term_error",
    "k_term_error_curve",
    "nuclear_frobenius_ratio",
    "nuclear_spectral_ratio",
    "operator_norm",
    "operator_norm_bounds",
    "row_norms",
    "singular_values",
    "smallest_k",
    "spread",
    "stable_rank",
]
