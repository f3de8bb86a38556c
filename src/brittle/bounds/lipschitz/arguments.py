"""The arguments that bound a network's Lipschitz constant, each by itself, and what they share.

Each is a certified upper bound; one that does not apply to a network is left out. Theory page, section "Networks".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from brittle.bounds.chain import chain_bounds, coordinate_bounds
from brittle.bounds.graph.rules import Dense, Input, Multiple, Op, Rearrange, Slope
from brittle.bounds.lipschitz.conv_pairs import paired_factors
from brittle.bounds.lipschitz.gram import GramBound, descend, gram_bound
from brittle.bounds.lipschitz.paths import radii, steepest_jacobian
from brittle.bounds.lipschitz.product import own_factors, product_bound
from brittle.linear.spectrum import WALK_ROUNDING, raised
from brittle.models.trace import NoRule
from brittle.results.methods import Argument

MOST_FOR_TWO_STARTS = 2e9
"""Real multiplications of one recursion, half a second or so, up to which it is begun in two ways."""
MOST_MARGINS = 2000
"""Classes up to which every pair gets a bound of its own."""
WIDEST_FOR_EXPONENTS = 1024
"""Widest layer for which the exponents of Theorem 3.2 and the pairs' rows of margins are tried."""
MOST_PAIRED_CLASSES = 32
"""Classes up to which every pair of outputs goes through Theorem 3.2 as a row of its own."""


def dense_chain_inputs(ops: Sequence[Op]) -> int | None:
    """Inputs of a plain chain of dense layers and activations, flattened at most before it; None for anything else.

    The bounds of such a chain need no shapes: on tokens they hold for each token.
    """
    rules = [op.rule for op in ops]
    start = next((n for n, rule in enumerate(rules) if isinstance(rule, Dense)), len(rules))
    flat = all(isinstance(rule, Input) or (isinstance(rule, Rearrange) and rule.flattens) for rule in rules[:start])
    plain = all(isinstance(rule, Dense | Slope | Multiple) for rule in rules[start:])
    match rules[start:]:
        case [Dense(W), *_] if flat and plain:
            return int(W.shape[1])
        case _:
            return None


@dataclass(frozen=True)
class Arguments:
    """All that bounds one network, each part computed once.

    Attributes:
        ops: The network's operations, at least one.
        steps: Steps of optimisation of the multipliers.
    """

    ops: tuple[Op, ...]
    steps: int

    def upper_bounds(self, p: float) -> dict[str, float]:
        """Every argument's certified upper bound of the network's constant in one norm, by the argument's name.

        Raises:
            NoRule: An operation has no constant of its own in this norm, or their product overflows.
        """
        product = raised(product_bound(self.ops, self.factors(p), p))
        if not math.isfinite(product):
            raise NoRule("the product of norms exceeds the range of float64")
        return {Argument.PRODUCT: product} | (self.two if p == 2 else self.sup)

    def factors(self, p: float) -> list[float]:
        """Every operation's own constant (:func:`brittle.bounds.lipschitz.product.own_factors`)."""
        return self.factors_two if p == 2 else own_factors(self.ops, p)

    # --- the arguments ------------------------------------------------------------------------------------------

    @cached_property
    def two(self) -> dict[str, float]:
        """Bounds in l_2 beside the product of norms."""
        values: dict[str, float] = {}
        if self.gram is not None:
            values[Argument.MULTIPLIERS] = self.gram.two
        if self.conv_pairs is not None:
            values[Argument.CONV_PAIRS] = self.conv_pairs
        if self.weights is not None:
            values |= dict(chain_bounds(self.weights, 2, exponents=self.widest <= WIDEST_FOR_EXPONENTS).values)
        if self.distances is not None and self.outputs:
            values[Argument.CROSS_NORM] = raised(math.sqrt(self.outputs) * float(self.distances[-1].max()))
        return values

    @cached_property
    def sup(self) -> dict[str, float]:
        """Bounds in l_inf beside the product of norms."""
        values: dict[str, float] = {}
        if self.distances is not None:
            values[Argument.CHAIN] = float(self.distances[-1].max())
            if self.paths is not None:
                values[Argument.PATH] = (
                    float((self.paths.abs().sum(1) + self.distances[-1][0]).max()) / 2 * (1 + WALK_ROUNDING)
                )
        if self.gram is not None:
            two = self.gram.two if self.conv_pairs is None else min(self.gram.two, self.conv_pairs)
            values[Argument.CROSS_NORM] = raised(math.sqrt(self.inputs) * two)
            values[Argument.MULTIPLIERS] = min(bound.sup for bound in (self.gram, self.rows) if bound is not None)
        if self.weights is not None:
            values |= dict(chain_bounds(self.weights, math.inf).values)
        return values

    @cached_property
    def factors_two(self) -> list[float]:
        """Every operation's own constant in l_2."""
        return own_factors(self.ops, 2)

    @cached_property
    def shapes_known(self) -> bool:
        """Whether every operation's shape is known."""
        return all(op.shape is not None for op in self.ops)

    @cached_property
    def outputs(self) -> int | None:
        """Length of the output, if it is a vector."""
        shape = self.ops[-1].shape
        return shape[1] if shape is not None and len(shape) == 2 else None

    @cached_property
    def inputs(self) -> int:
        """Entries of one input."""
        shape = self.ops[0].shape
        assert shape is not None
        return math.prod(shape)

    @cached_property
    def distances(self) -> list[Tensor] | None:
        """How far every entry of every result can move (:func:`brittle.bounds.lipschitz.paths.radii`)."""
        with suppress(NoRule):
            return radii(self.ops)
        return None

    @cached_property
    def paths(self) -> Tensor | None:
        """The Jacobian with every activation at its largest slope, ``(K, inputs)``."""
        with suppress(NoRule):
            return steepest_jacobian(self.ops)
        return None

    @cached_property
    def gram(self) -> _Least | None:
        """What the recursion bounds in both norms, steepest for l_2; None without shapes or without a rule."""
        return _least(self.recursions(None, 2))

    @cached_property
    def rows(self) -> _Least | None:
        """The same with steps, and weights of the input's entries where it is a vector, that are for l_inf."""
        if not self.shapes_known:
            return None
        start = None
        if self.vector_input:
            start = torch.ones(self.inputs, dtype=torch.float64) if self.columns is None else self.columns
        if not self.steps and self.columns is None:
            return None  # the same as without weights
        return _least(self.recursions(start, math.inf))

    @cached_property
    def conv_pairs(self) -> float | None:
        """The product of norms in l_2 with pairs of convolutions bounded together; None where no pair gains."""
        if self.gram is None:
            return None
        paired = paired_factors(self.ops, self.factors_two, self.gram.spent, self.steps)
        return None if paired is None else raised(product_bound(self.ops, paired, 2))

    @cached_property
    def columns(self) -> Tensor | None:
        """Weights of an input that is a vector, one over the columns' lengths of the steepest Jacobian."""
        if self.paths is None or not self.vector_input:
            return None
        columns = self.paths.square().mean(0).sqrt()
        if not float(columns.max()):
            return None
        t = 1 / columns.clamp_min(0.01 * float(columns.max()))
        return t / t.min()

    @cached_property
    def vector_input(self) -> bool:
        """Whether the input is a vector, or flattened at once."""
        shape, readers = self.ops[0].shape, [op for op in self.ops if 0 in op.inputs]
        if shape is None or len(shape) == 2 or len(readers) != 1:
            return shape is not None and len(shape) == 2
        (reader,) = readers
        return isinstance(reader.rule, Rearrange) and reader.rule.flattens and len(reader.shape or ()) == 2

    def recursions(self, start: Tensor | None, p: float) -> Iterator[GramBound]:
        """Bounds of ``J diag(start) J^T``: closed forms, then step by step down from the better one in the norm p.

        Twice down: for the constant and for the margins, which without weights are the same in both norms.
        """
        if not all(op.shape is not None and len(op.shape) > 1 for op in self.ops):
            return
        with suppress(NoRule):
            first = [gram_bound(self.ops, self.factors_two, start=start)]
            if first[0].spent < MOST_FOR_TWO_STARTS:
                first.append(gram_bound(self.ops, self.factors_two, start=start, uniform=True))
            yield from first
            best = min(first, key=lambda bound: bound.constant(p))
            yield from descend(best, self.ops, self.factors_two, self.steps, p=p)
            if 1 < len(best.gram) <= MOST_MARGINS and (p == 2 or start is not None):
                yield from descend(best, self.ops, self.factors_two, self.steps, p=p, margins=True)

    @cached_property
    def weights(self) -> list[Tensor] | None:
        """The matrices of a plain chain of dense layers whose activations have slopes in [0, 1]."""
        if not self.shapes_known or dense_chain_inputs(self.ops) is None:
            return None
        weights: list[Tensor] = []
        scale, after_dense = 1.0, False  # scale: of what follows the last dense layer, moved into the next one
        for op in self.ops:
            match op.rule:
                case Dense(W) if not after_dense:
                    weights.append(W.double() * scale)
                    scale, after_dense = 1.0, True
                case Slope(low, high) if after_dense and low >= 0:
                    scale, after_dense = scale * high, False
                case Multiple(factor):
                    scale *= abs(factor)
                case Input() | Rearrange():  # before the first dense layer
                    pass
                case _:
                    return None
        return weights if after_dense and scale == 1 else None

    @cached_property
    def widest(self) -> int:
        """Width of the widest dense layer of a plain chain; 0 for any other network."""
        return max((max(W.shape) for W in self.weights or ()), default=0)

    # --- pairs of outputs ---------------------------------------------------------------------------------------

    def margins(self, p: float, upper: float) -> Tensor | None:
        """The least bound of every difference of two outputs, ``(K, K)``; None for outputs that are no vector.

        Args:
            p: The norm.
            upper: Upper bound of the network's constant in it.
        """
        K = self.outputs
        if K is None or K > MOST_MARGINS:
            return None
        tables = [torch.full((K, K), (math.sqrt(2) if p == 2 else 2.0) * upper, dtype=torch.float64)]
        if self.gram is not None:
            tables += self.gram.tables(p, K)
        if math.isinf(p):
            tables += self.margins_inf(K)
        best = torch.stack(tables).amin(0) * (1 + WALK_ROUNDING)
        best = torch.minimum(best, best.mT)
        return best.fill_diagonal_(0.0)

    def margins_inf(self, K: int) -> list[Tensor]:
        """Upper bounds of all pairs' differences in l_inf, ``(K, K)``: one table an argument that applies."""
        tables: list[Tensor] = []
        if self.rows is not None:
            tables += self.rows.tables(math.inf, K)
        if self.distances is not None:
            chain = self.chain_margins()
            tables.append(chain)
            if self.paths is not None:
                tables.append((torch.cdist(self.paths, self.paths, p=1) + chain) / 2)
        if self.weights is not None and self.widest <= WIDEST_FOR_EXPONENTS and K <= MOST_PAIRED_CLASSES:
            i, j = torch.triu_indices(K, K, 1)
            table = torch.zeros(K, K, dtype=torch.float64)
            if len(i):
                rows = self.weights[-1][i] - self.weights[-1][j]
                table[i, j] = table[j, i] = coordinate_bounds([*self.weights[:-1], rows])
            tables.append(table)
        return tables

    def chain_margins(self) -> Tensor:
        """``|c_i - c_j| d`` for a linear head on entries that move by at most d; else the sum of both movements."""
        assert self.distances is not None
        head = self.ops[-1]
        if isinstance(head.rule, Dense):
            W, d = head.rule.W.double(), self.distances[head.inputs[0]][0]
            return torch.stack([(row - W).abs() @ d for row in W])
        d = self.distances[-1][0]
        return d[:, None] + d


@dataclass(frozen=True)
class _Least:
    """The least of what several Gram matrices bound, each of them certified.

    Attributes:
        two: Upper bound of the constant in l_2.
        sup: Upper bound of the constant in l_inf.
        differences: Upper bounds, before rounding, of all differences of two outputs in l_2 and in l_inf.
        spent: Real multiplications of one recursion.
    """

    two: float
    sup: float
    differences: tuple[Tensor, Tensor]
    spent: float

    def tables(self, p: float, K: int) -> list[Tensor]:
        """The differences in one norm, where they are of K outputs."""
        table = self.differences[0 if p == 2 else 1]
        return [table] if len(table) == K else []


def _least(bounds: Iterable[GramBound]) -> _Least | None:
    """The least of all that are finite; None where none is."""
    least = None
    for bound in bounds:
        two, sup = bound.constant(2), bound.constant(math.inf)
        if not math.isfinite(two):
            continue
        tables = bound.differences(2), bound.differences(math.inf)
        if least is not None:
            two, sup = min(two, least.two), min(sup, least.sup)
            tables = torch.minimum(tables[0], least.differences[0]), torch.minimum(tables[1], least.differences[1])
        least = _Least(two, sup, tables, bound.spent)
    return least
