r"""Theorem 3.2: upper bounds of the Lipschitz constant of a chain of dense layers.

The network is ``x -> W_L phi(W_{L-1} phi(... phi(W_1 x + b_1) ...) + b_{L-1}) + b_L`` with an activation whose slopes
lie in [0, 1] (ReLU and its kin); biases cancel in differences. Every number here is a certified upper bound. The
theorem is Barsbey et al. 2025, Theorem 3.2, with the constants of Theorem 3.1 as corrected; the stronger bounds and
all proofs are on the theory page, section "Theorem 3.2".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from brittle.bounds.layer import entries_kept, layer_bound, spectral_bound
from brittle.bounds.pairs import two as pair_two
from brittle.bounds.pairs.inf import row_bounds
from brittle.bounds.pairs.matrices import as_chain, normalise
from brittle.errors import InputError
from brittle.linear.norms import check_attack_norm, operator_norm
from brittle.linear.spectrum import ROUNDING
from brittle.results import LayerBound
from brittle.results.methods import Argument

FORMS = (Argument.PAPER_FORM, Argument.SHARP_FORM)
"""Theorem 3.2 with the norms bounded by Theorem 3.1, in two forms."""

SHARES = (0.0, 0.5, 1.0)
"""Powers of a layer's spectrum that may go to one of its neighbours."""


@dataclass(frozen=True)
class ChainBounds:
    """Certified upper bounds of one chain's Lipschitz constant, by name.

    Attributes:
        p: The norm on both sides: 2 or inf.
        inputs: Columns of the first layer.
        outputs: Rows of the last layer.
        values: Name and bound, the plain product of norms first. Each holds on its own.
        alignments: Upper bounds of the alignments of the pairs (1, 2), (2, 3), ... that went into Theorem 3.2:
            ``A_inf``, or ``A_2^(1/2,1/2)`` for p = 2.
        pairs: The pairs that the theorem uses, by the number (from 0) of their first layer: for p = inf the best set
            without neighbours, for p = 2 all.
    """

    p: float
    inputs: int
    outputs: int
    values: tuple[tuple[str, float], ...]
    alignments: tuple[float, ...]
    pairs: tuple[int, ...]

    @property
    def best(self) -> float:
        """The smallest of the bounds."""
        return min(value for _, value in self.values)

    @property
    def attained_by(self) -> str:
        """Name of the smallest bound; of equal ones the first."""
        return min(self.values, key=lambda named: named[1])[0]


def chain_bounds(
    weights: Sequence[Tensor], p: float, *, k_fraction: float | None = 0.25, steps: int = 0, exponents: bool = True
) -> ChainBounds:
    r"""Every certified upper bound of a chain of dense layers in one norm.

    ========================================  ===============================================================
    ``product of norms``                      ``prod_l ||W_l||_p``
    ``paper form``, ``sharp form``            Theorem 3.2 with the norms bounded by Theorem 3.1 in that form
    ``exact norms, disjoint pairs`` (inf)     Theorem 3.2: ``prod ||W_l|| prod_{l in S} A_inf(l)``, S without neighbours
    ``chain`` (inf)                           largest entry of ``|W_L| ... |W_1| 1``
    ``path``                                  norm of ``(|W_L ... W_1| + |W_L| ... |W_1|) / 2``
    ``segments`` (inf)                        product over the best division into contiguous segments
    ``weighted segments`` (inf)               the same coordinate by coordinate, see :func:`coordinate_bounds`
    ``exact norms, all pairs`` (2)            Theorem 3.2: ``prod ||W_l|| prod_l A_2^(1/2,1/2)(l)``
    ``ends`` (2)                              the same with the outer halves of the end layers' spectra used
    ``exponents`` (2)                         the same with every layer's spectrum shared out best
    ========================================  ===============================================================

    All pairs may not be used for p = inf: a layer's norm cannot be split between its neighbours there.

    Args:
        weights: ``W_1, ..., W_L``, each ``(h_l, h_{l-1})``, first layer first; real and finite.
        p: 2 or inf.
        k_fraction: Share of the rows (p = inf) or singular values (p = 2) kept in Theorem 3.1, rounded up, in
            (0, 1]; None leaves out the two forms that need it.
        steps: Steps of optimisation in each alignment for p = 2.
        exponents: Whether to compute the alignments that ``ends`` and ``exponents`` need besides those of the
            theorem: up to four a pair instead of one (p = 2).

    Returns:
        The bounds, in units of the product of the matrices. One layer: its norm. A zero layer: 0 throughout.

    Raises:
        InputError: ``p``, ``k_fraction`` or ``steps`` out of range, or weights that are no chain of finite matrices.

    >>> W1, W2 = torch.tensor([[1.0], [-1.0]]), torch.ones(1, 2)
    >>> [(name, round(value, 6)) for name, value in chain_bounds([W1, W2], math.inf, k_fraction=None).values[:2]]
    [('product of norms', 2.0), ('exact norms, disjoint pairs', 1.0)]
    """
    p = check_attack_norm(p)
    if k_fraction is not None and not 0 < k_fraction <= 1:
        raise InputError(f"k_fraction: expected a share above 0 and up to 1, or None; got {k_fraction}")
    if steps < 0:
        raise InputError(f"steps: expected a number of at least 0; got {steps}")
    layers = _Layers.of(weights)
    if layers.zero:
        shares = _shares_of_zero(p, k_fraction is not None, exponents, len(layers.weights))
    else:
        shares = _shares_two(layers, k_fraction, steps, exponents) if p == 2 else _shares_inf(layers, k_fraction)
    values = tuple((name, layers.value(log)) for name, log in shares.logs.items())
    return ChainBounds(p, layers.inputs, layers.outputs, values, tuple(shares.alignments), shares.pairs)


def best_disjoint_pairs(log_alignment: Sequence[float]) -> tuple[int, ...]:
    """S_opt: pairs of consecutive layers, no layer in two of them, with the smallest product of alignments.

    Exact, by dynamic programming over the layers in linear time (Barsbey et al. 2025, Theorem 3.2).

    Args:
        log_alignment: Logarithm of the alignment of every pair (1, 2), (2, 3), ...; minus infinity for alignment 0.

    Returns:
        The chosen pairs in rising order, each by the number (from 0) of its first layer. Pairs that gain nothing
        are left out.

    Raises:
        InputError: NaN or plus infinity.

    >>> best_disjoint_pairs([-1.0, -3.0, -1.0]), best_disjoint_pairs([-2.0, -3.0, -2.0])
    ((1,), (0, 2))
    """
    if not all(w < math.inf for w in log_alignment):
        raise InputError(f"log_alignment: expected numbers below inf; got {list(log_alignment)}")
    totals, used = [0.0, 0.0], [False, False]
    for pair, w in enumerate(log_alignment):
        used.append(totals[pair] + w < totals[pair + 1])
        totals.append(totals[pair] + w if used[-1] else totals[pair + 1])
    chosen, end = [], len(totals) - 1
    while end >= 2:
        if used[end]:
            chosen.append(end - 2)
        end -= 2 if used[end] else 1
    return tuple(reversed(chosen))


def coordinate_bounds(weights: Sequence[Tensor]) -> Tensor:
    r"""Lipschitz bound of every output by itself, from l_inf to the real line; certified.

    A vector of radii runs through the layers, from ones at the input. A segment of layers ``i + 1 ... j`` turns the
    radii d of its inputs into ``rows of (|W_j ... W_{i+1}| + |W_j| ... |W_{i+1}|) d / 2`` (for two layers also the
    bounds of the pair with ``W_{i+1} diag(d)``), and each coordinate keeps the smallest over all segments that end
    there. Never above the chain, the path or the segments bound.

    Args:
        weights: ``W_1, ..., W_L``, first layer first. With rows ``e_i - e_j`` times the head as the last of them,
            these are bounds of the margins.

    Returns:
        ``(h_L,)``; the largest is ``weighted segments`` of :func:`chain_bounds`.
    """
    layers = _Layers.of(weights)
    return layers.values(torch.zeros(layers.outputs) if layers.zero else _Segments.of(layers).radii)


@dataclass(frozen=True)
class _Layers:
    """A chain with every layer divided by its l_inf norm, and the logarithm of the product of these norms."""

    weights: list[Tensor]
    log_product: float
    slack: float

    @classmethod
    def of(cls, weights: Sequence[Tensor]) -> _Layers:
        """Check and divide the matrices of a chain, first layer first."""
        if isinstance(weights, Tensor) or not len(weights):
            raise InputError("weights: expected a sequence of one matrix or more")
        names = tuple(f"weights[{l}]" for l in range(len(weights)))
        chain = as_chain(tuple(weights)[::-1], names[::-1])[::-1]
        scaled, logs = zip(*(normalise(W, math.inf) for W in chain), strict=True)
        slack = ROUNDING * max(max(W.shape) for W in chain) * len(chain)
        return cls(list(scaled), sum(logs), slack)

    @property
    def inputs(self) -> int:
        return self.weights[0].shape[1]

    @property
    def outputs(self) -> int:
        return len(self.weights[-1])

    @property
    def zero(self) -> bool:
        return self.log_product == -math.inf

    def value(self, log_factor: float) -> float:
        """The product of l_inf norms times a factor, rounded up; inf where that is too large for a float."""
        log = self.log_product + log_factor
        if log == -math.inf:
            return 0.0
        return max(math.exp(log) * (1 + self.slack), math.ulp(0.0)) if log < 709 else math.inf

    def values(self, factors: Tensor) -> Tensor:
        """:meth:`value` of every factor (not its logarithm)."""
        return torch.tensor([self.value(_log(factor)) for factor in factors.tolist()], dtype=torch.float64)

    def rows(self, signed: Tensor, plain: Tensor) -> Tensor:
        """Path bounds from (row sums of) the product's magnitudes and the product of magnitudes."""
        return torch.minimum((signed + plain) / 2 + self.slack * plain, plain)

    def rounded_up(self, log_share: float) -> float:
        """A share of the product of norms plus what the rounding of decompositions may hide, at most 1; logarithms."""
        return _log(min(1.0, math.exp(log_share) + self.slack))

    @property
    def path_norm(self) -> float:
        """Spectral norm of ``(|W_L ... W_1| + |W_L| ... |W_1|) / 2``."""
        signed, plain = self.weights[0], self.weights[0].abs()
        if len(self.weights) > 1:
            signed = torch.linalg.multi_dot(self.weights[::-1])
            plain = torch.linalg.multi_dot([W.abs() for W in self.weights[::-1]])
        return float(operator_norm(self.rows(signed.abs(), plain), 2))


class _Shares(NamedTuple):
    """Logarithms of the bounds over the product of l_inf norms, alignments of the pairs, and the pairs in use."""

    logs: dict[str, float]
    alignments: list[float]
    pairs: tuple[int, ...]


def _shares_of_zero(p: float, forms: bool, exponents: bool, L: int) -> _Shares:
    """A chain with a zero layer: alignments are 1 by convention, every bound is 0."""
    names = [Argument.PRODUCT, *(FORMS if forms else ())]
    if p == 2:
        names += [Argument.PATH, Argument.ALL_PAIRS, *([Argument.ENDS, Argument.EXPONENTS] if exponents else [])]
    else:
        names += [Argument.DISJOINT_PAIRS, Argument.CHAIN, Argument.PATH, Argument.SEGMENTS, Argument.WEIGHTED_SEGMENTS]
    return _Shares(dict.fromkeys(names, -math.inf), [1.0] * (L - 1), tuple(range(L - 1)) if p == 2 else ())


# --- p = inf ------------------------------------------------------------------------------------------------


def _shares_inf(layers: _Layers, k_fraction: float | None) -> _Shares:
    """The l_inf bounds; the layers' norms are 1."""
    segments = _Segments.of(layers)
    alignments = [_log(pair) for pair in segments.pairs]
    pairs = best_disjoint_pairs(alignments)
    gained = sum(alignments[pair] for pair in pairs)
    logs: dict[str, float] = {Argument.PRODUCT: 0.0}
    if k_fraction is not None:
        bounds = [layer_bound(W, math.inf, entries_kept(k_fraction, len(W))) for W in layers.weights]
        logs |= _theorem_31(bounds, gained)
    logs |= {
        Argument.DISJOINT_PAIRS: gained,
        Argument.CHAIN: _log(segments.chain),
        Argument.PATH: _log(segments.path),
        Argument.SEGMENTS: segments.shortest,
        Argument.WEIGHTED_SEGMENTS: _log(float(segments.radii.max())),
    }
    return _Shares(logs, segments.pairs, pairs)


@dataclass(frozen=True)
class _Segments:
    """Bounds of all contiguous segments of a chain whose layers have l_inf norm 1.

    Attributes:
        costs: Bound of the segment of layers ``i ... j - 1``, by (i, j).
        pairs: Bounds of the pairs of consecutive layers: their alignments.
        chain: Chain bound of the whole chain.
        path: Its path bound.
        radii: Weighted bounds of every output ``(h_L,)``.
    """

    costs: dict[tuple[int, int], float]
    pairs: list[float]
    chain: float
    path: float
    radii: Tensor

    @classmethod
    def of(cls, layers: _Layers) -> _Segments:
        """Follow the products of every segment, and the radii with them."""
        weights = layers.weights
        L = len(weights)
        radii = [torch.ones(layers.inputs, dtype=torch.float64)]
        radii += [torch.ones(len(W), dtype=torch.float64) for W in weights]
        costs, pairs, chain, path = {}, [], 1.0, 1.0
        for i in range(L):
            d = radii[i]
            product, plain, weighted = None, torch.ones_like(d), d
            for j in range(i + 1, L + 1):
                W = weights[j - 1]
                product = W if product is None else W @ product
                sizes = product.abs()
                plain, weighted = W.abs() @ plain, W.abs() @ weighted
                rows, weighted_rows = layers.rows(sizes.sum(1), plain), layers.rows(sizes @ d, weighted)
                if (i, j) == (0, L):
                    chain, path = float(plain.max()), float(rows.max())
                if j == i + 2:
                    pair = torch.minimum(row_bounds(W, weights[i]), rows)
                    pairs.append(min(1.0, float(pair.max())))
                    rows, weighted_rows = pair, torch.minimum(weighted_rows, pair * d.max())
                    if i and weighted.any():
                        weighted_rows = torch.minimum(weighted_rows, row_bounds(W, weights[i] * d))
                costs[i, j] = float(rows.max())
                radii[j] = torch.minimum(radii[j], weighted_rows)
        return cls(costs, pairs, chain, path, radii[L])

    @property
    def shortest(self) -> float:
        """Logarithm of the smallest product of costs over the divisions of the chain into contiguous segments."""
        best = [0.0]
        for j in range(1, len(self.pairs) + 2):
            best.append(min(best[i] + _log(self.costs[i, j]) for i in range(j)))
        return best[-1]


# --- p = 2 --------------------------------------------------------------------------------------------------


def _shares_two(layers: _Layers, k_fraction: float | None, steps: int, exponents: bool) -> _Shares:
    """The l2 bounds."""
    spectra = [_Spectrum(*torch.linalg.svd(W, full_matrices=False)) for W in layers.weights]
    L = len(spectra)
    norms = sum(_log(float(spectrum.sigma[0])) for spectrum in spectra)
    table = [
        _shared_alignments(first, second, SHARES if l else (1.0,), SHARES if l < L - 2 else (1.0,), steps, exponents)
        for l, (first, second) in enumerate(itertools.pairwise(spectra))
    ]
    halves = [row[0.5, 0.5] for row in table]
    gained = _log(math.prod(halves))
    logs: dict[str, float] = {Argument.PRODUCT: norms}
    if k_fraction is not None:
        bounds = [spectral_bound(spectrum.sigma, entries_kept(k_fraction, len(spectrum.sigma))) for spectrum in spectra]
        logs |= _theorem_31(bounds, norms, layers.rounded_up(gained))
    logs[Argument.PATH] = min(norms, _log(layers.path_norm))
    logs[Argument.ALL_PAIRS] = norms + layers.rounded_up(gained)
    if exponents:
        outer = [row[1.0 if l == 0 else 0.5, 1.0 if l == L - 2 else 0.5] for l, row in enumerate(table)]
        logs[Argument.ENDS] = norms + layers.rounded_up(_log(math.prod(outer)))
        logs[Argument.EXPONENTS] = norms + layers.rounded_up(_best_shares(table))
    return _Shares(logs, halves, tuple(range(L - 1)))


class _Spectrum(NamedTuple):
    """Singular value decomposition ``U diag(sigma) Vh``."""

    U: Tensor
    sigma: Tensor
    Vh: Tensor

    def scaled(self, power: float) -> tuple[Tensor, Tensor]:
        """``(U Sigma^power, Sigma^power Vh)`` with Sigma over sigma_1; at power 0 of the retained support only."""
        kept = int((self.sigma > pair_two.SUPPORT * self.sigma[0]).sum()) if power == 0 else len(self.sigma)
        weights = (self.sigma[:kept] / self.sigma[0]) ** power
        return self.U[:, :kept] * weights, weights[:, None] * self.Vh[:kept]


def _shared_alignments(
    first: _Spectrum, second: _Spectrum, left: Sequence[float], right: Sequence[float], steps: int, exponents: bool
) -> dict[tuple[float, float], float]:
    """Upper bounds of ``A_2^(s,t)`` by (s, t), falling in both: of (1/2, 1/2), and with ``exponents`` of all shares."""
    h, bounds = len(first.U), {}
    for s, t in {(0.5, 0.5), *(itertools.product(left, right) if exponents else ())}:
        C, B = first.scaled(s)[0], second.scaled(t)[1]
        whole = (s == 0 and C.shape[1] == h) or (t == 0 and B.shape[0] == h)  # attained by D = I, it is exactly 1
        bounds[s, t] = 1.0 if whole else min(1.0, *pair_two.upper(B, C, steps=steps).values())
    return {(s, t): min(bounds[a, b] for a, b in bounds if a <= s and b <= t) for s, t in bounds}


def _best_shares(table: Sequence[dict[tuple[float, float], float]]) -> float:
    """Logarithm of the least ``prod_l A_2^(s_l, 1 - s_(l+1))(l)`` with ``s_1 = 1`` and ``s_L = 0``."""
    best = {1.0: 0.0}
    for l, row in enumerate(table):
        ahead = (0.0,) if l == len(table) - 1 else SHARES
        best = {s: min(total + _log(row[before, 1 - s]) for before, total in best.items()) for s in ahead}
    return min(best.values())


# --- logarithms ---------------------------------------------------------------------------------------------


def _log(x: float) -> float:
    return math.log(x) if x else -math.inf


def _theorem_31(bounds: Sequence[LayerBound], *log_factors: float) -> dict[str, float]:
    """Further factors times how far the product of all layers' bounds exceeds that of their norms, by form.

    A factor of zero (minus infinity) beats an infinite one.
    """

    def excess(bound: LayerBound, form: str) -> float:
        return max(1.0, bound.scale * (bound.paper if form == Argument.PAPER_FORM else bound.sharp) / bound.norm)

    logs = {form: sum(_log(excess(bound, form)) for bound in bounds) for form in FORMS}
    return {form: -math.inf if -math.inf in log_factors else sum([log, *log_factors]) for form, log in logs.items()}
