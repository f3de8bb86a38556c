"""What is read from weights: norms and compressibility of each layer, and the sensitivity of the whole network."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from brittle.results.methods import Argument

if TYPE_CHECKING:
    import pandas as pd

FRACTIONS = (0.05, 0.10, 0.25, 0.50)
"""Fractions of the rows or singular values kept, at which every layer is described."""
PROFILE_POINTS = 128
"""Most points kept of a layer's row-norm or singular-value profile."""


@dataclass(frozen=True)
class NormBounds:
    """Bounds on an operator norm ``||A||_{p->p}``: ``lower <= ||A|| <= upper``.

    Attributes:
        p: The norm on both sides: 1, 2 or inf.
        lower: Certified lower bound.
        upper: Certified upper bound; equal to ``lower`` when the norm is exact.
        method: What attained the upper bound, one of :class:`~brittle.results.methods.OperatorMethod`.
    """

    p: float
    lower: float
    upper: float
    method: str

    @property
    def exact(self) -> bool:
        """Whether the two bounds coincide, that is, whether the norm is known exactly."""
        return self.lower == self.upper


@dataclass(frozen=True)
class LayerBound:
    """Theorem 3.1 at one layer: an operator norm bounded by (structure factor) x (scale).

    The structure factors depend on the compressibility alone and are unchanged when the matrix is scaled; multiply
    by :attr:`scale` for a bound. ``lower <= norm / scale <= sharp <= linear <= paper``.

    Attributes:
        p: inf for row (neuron) compressibility, 2 for spectral compressibility.
        k: Rows, or singular values, kept.
        k_term_error: Of the vector of row l1 norms (p = inf) or singular values (p = 2), at ``k`` with q = 1.
        spread: beta = 1 - (k-th / largest).
        k_row: Entries kept within each row (p = inf only).
        row_k_term_error: Largest within-row error at ``k_row`` with q = 2 (p = inf only).
        scale: The Frobenius norm.
        norm: Exact norm of the matrix: largest row sum of magnitudes, or largest singular value.
        lower: Structure factor of the lower bound (iv).
        sharp: Structure factor of the sharp upper bound (i).
        linear: Structure factor of the linear upper bound (ii).
        paper: Structure factor of the upper bound in the paper's form (iii), for m x n matrices; inf at spread 1.
    """

    p: float
    k: int
    k_term_error: float
    spread: float
    k_row: int | None
    row_k_term_error: float | None
    scale: float
    norm: float
    lower: float
    sharp: float
    linear: float
    paper: float


@dataclass(frozen=True)
class LayerResult:
    """Everything that is measured of one layer's matrix; needs weights only.

    Attributes:
        name: Qualified name in the model.
        kind: Type of the module, with what makes its matrix special (groups, low-rank pair, part of a fused qkv).
        shape: ``(m, n)`` of the matrix: rows are output neurons or filters.
        parameters: Weight entries stored (of both factors for a low-rank pair).
        row_error: k-term errors (q = 1) of the row l1 norms with the fractions :data:`FRACTIONS` of rows kept.
        spectral_error: The same of the singular values.
        row_spread: Spread of the row l1 norms at the same fractions.
        spectral_spread: The same of the singular values.
        row_norms: The row l1 norms, largest first (at most :data:`PROFILE_POINTS`, evenly thinned).
        singular_values: The singular values, largest first (thinned alike).
        spectrum: Number of singular values: min(m, n), or the sum of it over the groups of a convolution.
        rank: Singular values above 1e-10 of the largest.
        stable_rank: ``||W||_F^2 / ||W||_2^2``.
        nuclear_spectral_ratio: ``||W||_* / ||W||_2``.
        nuclear_frobenius_ratio: ``(||W||_* / ||W||_F)^2``.
        effective_rank: Exponential of the entropy of the normalised singular values (Roy & Vetterli 2007).
        effective_sparsity: ``(sum |W_ij| / ||W||_F)^2``, between 1 and the number of non-zeros.
        frobenius: ``||W||_F``.
        filter_norm_inf: Largest row l1 norm of the matrix (for convolutions: not the operator norm).
        filter_norm_2: Largest singular value of the matrix (for convolutions: not the operator norm).
        operator_norms: Bounds on the true operator norms, one for each p.
        bounds: Theorem 3.1, for each p and each of :data:`FRACTIONS`.
        input_size: Spatial size of the input on which a convolution's operator is taken; None: unknown or dense.
        degenerate: Whether every weight is zero.
        head_norms: Frobenius norms of the rows of each attention head, in the heads' order; () where rows belong to no
            heads.
        head_error: k-term errors of these norms (q = 1), for each of :data:`FRACTIONS` of the heads, rounded up; ()
            likewise.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    parameters: int
    row_error: tuple[float, ...]
    spectral_error: tuple[float, ...]
    row_spread: tuple[float, ...]
    spectral_spread: tuple[float, ...]
    row_norms: tuple[float, ...]
    singular_values: tuple[float, ...]
    spectrum: int
    rank: int
    stable_rank: float
    nuclear_spectral_ratio: float
    nuclear_frobenius_ratio: float
    effective_rank: float
    effective_sparsity: float
    frobenius: float
    filter_norm_inf: float
    filter_norm_2: float
    operator_norms: tuple[NormBounds, ...]
    bounds: tuple[LayerBound, ...]
    input_size: tuple[int, ...] | None
    degenerate: bool
    head_norms: tuple[float, ...] = ()
    head_error: tuple[float, ...] = ()

    def concentration(self, p: float) -> float:
        """How many times the norm exceeds that of a flat matrix of the same shape and Frobenius norm.

        A flat matrix has equal singular values (p = 2: norm ``||W||_F / sqrt(spectrum)``, so the factor is at least
        1) or entries of one magnitude (p = inf: norm ``||W||_F sqrt(n / m)``; the factor is below 1 where rows are
        sparse and equally large). Exact for the matrix; 0 stands for the zero matrix, and for
        one whose Frobenius norm is below or above the range of float64.
        """
        m, n = self.shape
        if self.degenerate or not 0 < self.frobenius < math.inf:
            return 0.0
        if p == 2:
            return self.filter_norm_2 * math.sqrt(self.spectrum) / self.frobenius
        return self.filter_norm_inf * math.sqrt(m / n) / self.frobenius

    def excess(self, p: float) -> float:
        """How many times the norm exceeds that of a random matrix of the same shape and Frobenius norm; 0 for zero.

        The concentration over that of a matrix of independent normal entries, which is up to fluctuations
        ``1 + sqrt(min(m, n) / max(m, n))`` for p = 2 (groups of a convolution count as square blocks, which have the
        most, 2), and ``sqrt(2 / pi) + sqrt((1 - 2 / pi) 2 ln(m) / n)`` for p = inf, the largest of m rows. Training
        without structure leaves it near 1.
        """
        m, n = self.shape
        if p == 2:
            alike = self.spectrum == min(m, n)
            return self.concentration(2) / (1 + (math.sqrt(min(m, n) / max(m, n)) if alike else 1.0))
        mean, variance = math.sqrt(2 / math.pi), 1 - 2 / math.pi
        return self.concentration(p) / (mean + math.sqrt(variance * 2 * math.log(m) / n))

    def operator_norm(self, p: float) -> NormBounds | None:
        """The bounds for the norm ``p``; None when it was not measured."""
        return next((norm for norm in self.operator_norms if norm.p == p), None)

    def bound(self, p: float, fraction: float) -> LayerBound:
        """Theorem 3.1 for the norm ``p`` with the ``fraction`` (one of :data:`FRACTIONS`) kept."""
        return [bound for bound in self.bounds if bound.p == p][FRACTIONS.index(fraction)]


@dataclass(frozen=True)
class LipschitzResult:
    """Sensitivity of the logits to the input, ``sup ||s(x) - s(y)||_p / ||x - y||_p``, from both sides.

    Attributes:
        p: The norm on both sides.
        upper: Certified global upper bound, the least of ``arguments``; None when no sound rule covers the network.
        method: Name of the argument that attained ``upper``.
        unavailable: The module that forbids an upper bound and why; None when there is one.
        lower: Largest ratio or Jacobian norm found, on data and by ascent from the samples of largest Jacobian norm
            (a lower bound of the global constant); None without data.
        median_lower: Median over the samples of the norm of the logits' Jacobian.
        n: Samples at which the Jacobian was taken.
        largest_on_data: Largest of these Jacobian norms.
        arguments: Name and value of every argument that was tried; each value is a certified upper bound.
        reach: Median over samples that are right without attack of the margin over its slope, ``m / ||grad m||_q`` with
            q dual to p: to first order the distance to the nearest wrong answer, in input units. An estimate and no
            bound; None without data.
        slope: Median over the same samples of ``||grad m||_q``, in logit units per input unit: how fast the margin can
            shrink, to first order. An estimate; None without data, and in older files.
    """

    p: float
    upper: float | None
    method: str
    unavailable: str | None
    lower: float | None
    median_lower: float | None
    n: int
    largest_on_data: float | None = None
    arguments: tuple[tuple[str, float], ...] = ()
    reach: float | None = None
    slope: float | None = None

    @property
    def tightness(self) -> float | None:
        """``upper / lower``: how far the certificate may be from the truth."""
        return self.upper / self.lower if self.upper is not None and self.lower else None

    @property
    def product(self) -> float | None:
        """The plain product of operator norms; None where it was not among the arguments."""
        return dict(self.arguments).get(Argument.PRODUCT)


def layers_frame(layers: Sequence[LayerResult]) -> pd.DataFrame:
    """The layer table: one row a layer, with flat column names that say norm, fraction and side."""
    import pandas as pd

    return pd.DataFrame([_layer_row(layer) for layer in layers])


def _layer_row(layer: LayerResult) -> dict[str, Any]:
    row: dict[str, Any] = {
        f.name: getattr(layer, f.name) for f in dataclasses.fields(layer) if f.type in ("str", "int", "float", "bool")
    }
    row |= {"rows": layer.shape[0], "columns": layer.shape[1]}
    for vector in ("row_error", "spectral_error", "row_spread", "spectral_spread"):
        for fraction, value in zip(FRACTIONS, getattr(layer, vector), strict=True):
            row[f"{vector}_{fraction:.0%}".replace("%", "pct")] = value
    if layer.head_norms:
        row["heads"] = len(layer.head_norms)
        for fraction, value in zip(FRACTIONS, layer.head_error, strict=True):
            row[f"head_error_{fraction:.0%}".replace("%", "pct")] = value
    for norm in layer.operator_norms:
        row |= {f"operator_norm_{norm.p:g}_lower": norm.lower, f"operator_norm_{norm.p:g}_upper": norm.upper}
        row[f"operator_norm_{norm.p:g}_method"] = norm.method
        row[f"concentration_{norm.p:g}"] = layer.concentration(norm.p)
    for p in sorted({bound.p for bound in layer.bounds}):
        bound = layer.bound(p, 0.10)
        for side in ("lower", "sharp", "linear", "paper"):
            row[f"structure_{p:g}_{side}_10pct"] = getattr(bound, side)
    return row
