r"""Certified upper bounds of a whole network's Lipschitz constant, from several arguments over its graph.

The module is traced (``torch.fx``) and read as a list of operations with sound rules. Each argument bounds the
constant by itself; the least is reported with the name of the argument that attained it. An operation without a sound
rule makes the whole bound unavailable, and its name is returned instead. Rules and proofs: theory page, section
"Networks".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from brittle.bounds.chain import chain_bounds, coordinate_bounds
from brittle.bounds.graph.read import read_graph
from brittle.bounds.graph.rules import Dense, Input, Multiple, Op, Rearrange, Slope
from brittle.bounds.lipschitz.conv_pairs import paired_factors
from brittle.bounds.lipschitz.gram import GramBound, gram_bound, tighten
from brittle.bounds.lipschitz.paths import radii, steepest_jacobian
from brittle.bounds.lipschitz.product import own_factors, product_bound, stretching_factors
from brittle.errors import InputError
from brittle.linear.norms import check_attack_norm
from brittle.linear.spectrum import WALK_ROUNDING, raised
from brittle.models.borrow import frozen
from brittle.models.trace import NoRule, Trace, check_finite_weights
from brittle.results.methods import CHAIN, CONV_PAIRS, CROSS_NORM, MULTIPLIERS, PATH, PRODUCT

_MOST_MARGINS = 2000  # classes up to which every pair gets a bound of its own
_WIDE = 1024  # widest layer for which the exponents of Theorem 3.2 and the pairs' rows of margins are tried


@dataclass(frozen=True)
class NetworkBound:
    """An upper bound of ``sup ||f(x) - f(y)||_p / ||x - y||_p`` over all inputs, or why there is none.

    Attributes:
        p: The norm on both sides: 2 or inf.
        upper: The least certified upper bound; None when some operation has no sound rule.
        unavailable: That operation's name and the reason; None when there is a bound.
        factors: Name and factor of every operation that stretches or shrinks, in the order of execution: together
            with sums and concatenations they make up the product of norms. Operations that were merged (a batch
            norm folded, two dense layers in a row) stand under one name.
        arguments: Name and value of every argument's bound; each is a certified upper bound by itself.
        margins: ``(K, K)``, upper bounds of the Lipschitz constants of ``s_i - s_j`` for outputs s, from the input's
            l_p norm to the real line; None without a bound or for outputs that are no vector.
    """

    p: float
    upper: float | None
    unavailable: str | None
    factors: tuple[tuple[str, float], ...]
    arguments: tuple[tuple[str, float], ...] = ()
    margins: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def attained_by(self) -> str | None:
        """Name of the argument with the least bound; of equal ones the first."""
        return min(self.arguments, key=lambda named: named[1])[0] if self.arguments else None


def lipschitz_upper_bound(
    model: nn.Module, p: float, *, input_shape: Sequence[int] | None = None, steps: int = 0
) -> NetworkBound:
    r"""Certified upper bound of a network's Lipschitz constant from input to output, in evaluation mode.

    The least of these arguments, as far as each applies:

    ===========================  ======================================================================================
    ``product of norms``         ``prod_l ||W_l||_p`` with true operator norms; sums add, concatenations take the
                                 maximum (p = inf) or the root of the sum of squares (p = 2)
    ``multipliers`` (2)          one recursion of Gram matrices over the graph, activations by diagonal multipliers
                                 (for p = inf: with the input's coordinates weighted)
    ``pairs of convolutions``    (2) the product of norms, strided convolutions bounded together with those before them
    ``chain``, ``path`` (inf)    absolute weights passed through the network; paths counted
    ``cross norm``               from the other norm: ``Lip_inf <= sqrt(inputs) Lip_2``, ``Lip_2 <= sqrt(K) Lip_inf``
    those of ``chain_bounds``    for plain chains of dense layers: Theorem 3.2 in all its forms, and stronger ones
    ===========================  ======================================================================================

    Args:
        model: Any module that ``torch.fx`` can trace; only read.
        p: 2 or inf.
        input_shape: Shape of one input without the batch axis. Without it only the product of norms is used
            (convolutions are then bounded for images of any size), unless the network is a plain dense chain.
        steps: Steps of optimisation of the multipliers, each about as long as the recursion itself; 0 for closed
            forms.

    Returns:
        The bound, or the name of the operation for which there is no sound rule: attention, layer norm, batch norm
        or dropout in training mode, and everything unknown. Never a guess.

    Raises:
        InputError: ``p`` is neither 2 nor inf, ``steps`` is negative, or the model cannot run on ``input_shape``.

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0, 1.0], [-1.0, -1.0]])), net[2].weight.data.fill_(1.0)
    >>> bound = lipschitz_upper_bound(net, 2)
    >>> round(dict(bound.arguments)["product of norms"], 4), round(bound.upper, 4), bound.attained_by
    (2.8284, 1.4142, 'path')
    """
    p = check_attack_norm(p)
    return network_bounds(model, (p,), input_shape=input_shape, steps=steps)[p]


def network_bounds(
    model: nn.Module,
    norms: Sequence[float],
    *,
    input_shape: Sequence[int] | None = None,
    steps: int = 0,
    traced: Trace | NoRule | None = None,
) -> dict[float, NetworkBound]:
    """:func:`lipschitz_upper_bound` in several norms, with the work that they share done once.

    Args:
        model: As :func:`lipschitz_upper_bound`.
        norms: The norms: 2, inf or both.
        input_shape: As :func:`lipschitz_upper_bound`; None with a trace at hand: the trace's.
        steps: As :func:`lipschitz_upper_bound`.
        traced: The network's trace (:func:`brittle.models.trace.trace`), or the error that tracing raised; None: it is
            traced here.

    Raises:
        InputError: As :func:`lipschitz_upper_bound`, or ``traced`` belongs to another model or shape.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    if steps < 0:
        raise InputError(f"steps: expected a number of at least 0; got {steps}")
    training = frozenset(module for module in model.modules() if module.training)
    with frozen(model):
        check_finite_weights(model)
        try:
            ops = read_graph(model, input_shape, training, traced)
        except NoRule as error:
            return {p: NetworkBound(p, None, str(error), ()) for p in norms}
        if ops and ops[0].shape is None and (inputs := _dense_inputs(ops)):
            with suppress(InputError, NoRule):  # a flattening that a vector does not fit
                ops = read_graph(model, (inputs,), training)
        arguments = _Arguments(ops, steps)
        return {p: arguments.bound(p) for p in norms}


def _dense_inputs(ops: Sequence[Op]) -> int | None:
    """Inputs of a plain chain of dense layers, whose bounds need no shapes: on tokens they hold for each token."""
    kinds = [op.rule for op in ops]
    first = next((n for n, rule in enumerate(kinds) if isinstance(rule, Dense)), None)
    if first is None or not all(isinstance(rule, Dense | Slope | Multiple) for rule in kinds[first:]):
        return None
    flat = all(isinstance(rule, Input) or (isinstance(rule, Rearrange) and rule.flattens) for rule in kinds[:first])
    rule = kinds[first]
    return rule.W.shape[1] if flat and isinstance(rule, Dense) else None


@dataclass(frozen=True)
class _Arguments:
    """Everything that bounds one network, each part computed once."""

    ops: tuple[Op, ...]
    steps: int

    def bound(self, p: float) -> NetworkBound:
        """Every argument's certified upper bound in one norm and the least of them, or why there is none."""
        if not self.ops:
            return NetworkBound(p, 0.0, None, (), ((PRODUCT, 0.0),))
        try:
            factors = own_factors(self.ops, p)
            product = raised(product_bound(self.ops, factors, p))
            if not math.isfinite(product):
                raise NoRule("the product of norms exceeds the range of float64")
        except NoRule as error:
            return NetworkBound(p, None, str(error), ())
        values = {PRODUCT: product} | (self.two if p == 2 else self.sup)
        upper = min(values.values())
        margins = self.margins(p, upper)
        return NetworkBound(p, upper, None, stretching_factors(self.ops, factors), tuple(values.items()), margins)

    # --- the arguments ------------------------------------------------------------------------------------------

    @cached_property
    def two(self) -> dict[str, float]:
        """Bounds in l_2 beside the product of norms."""
        values: dict[str, float] = {}
        if self.gram is not None:
            values[MULTIPLIERS] = self.gram.upper
        if self.conv_pairs is not None:
            values[CONV_PAIRS] = self.conv_pairs
        if self.weights is not None:
            wide = max(max(W.shape) for W in self.weights) > _WIDE
            values |= dict(chain_bounds(self.weights, 2, exponents=not wide).values)
        if self.distances is not None and self.outputs:
            values[CROSS_NORM] = raised(math.sqrt(self.outputs) * float(self.distances[-1].max()))
        return values

    @cached_property
    def sup(self) -> dict[str, float]:
        """Bounds in l_inf beside the product of norms."""
        values: dict[str, float] = {}
        if self.distances is not None:
            values[CHAIN] = float(self.distances[-1].max())
            if self.paths is not None:
                values[PATH] = float((self.paths.abs().sum(1) + self.distances[-1][0]).max()) / 2 * (1 + WALK_ROUNDING)
        if self.gram is not None:
            two = self.gram.upper if self.conv_pairs is None else min(self.gram.upper, self.conv_pairs)
            values[CROSS_NORM] = raised(math.sqrt(self.inputs) * two)
        if self.weighted is not None:
            values[MULTIPLIERS] = _row_norm(self.weighted)
        if self.weights is not None:
            values |= dict(chain_bounds(self.weights, math.inf).values)
        return values

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
    def gram(self) -> GramBound | None:
        """The recursion in l_2."""
        return self.recursion(None)

    @cached_property
    def conv_pairs(self) -> float | None:
        """The product of norms in l_2 with pairs of convolutions bounded together; None where there is no pair."""
        if self.gram is None:
            return None
        paired = paired_factors(self.ops, own_factors(self.ops, 2), self.steps)
        return None if paired is None else raised(product_bound(self.ops, paired, 2))

    @cached_property
    def weighted(self) -> Tensor | None:
        r"""``c J diag(t) J^T`` with ``c = sum_j 1 / t_j``: its diagonal bounds the rows' squared l_1 norms."""
        if self.paths is None or not self.vector_input:
            return None
        columns = self.paths.square().mean(0).sqrt()
        if not float(columns.max()):
            return None
        t = 1 / columns.clamp_min(0.01 * float(columns.max()))
        t = t / t.min()
        bound = self.recursion(t)
        return None if bound is None else bound.gram * float((1 / t).sum())

    @cached_property
    def vector_input(self) -> bool:
        """Whether the input is a vector, or flattened at once."""
        first = self.ops[1].rule if len(self.ops) > 1 else None
        shape = self.ops[0].shape
        flattened = isinstance(first, Rearrange) and first.flattens and len(self.ops[1].shape or ()) == 2
        alone = sum(0 in op.inputs for op in self.ops) == 1
        return shape is not None and (len(shape) == 2 or (flattened and alone))

    def recursion(self, start: Tensor | None) -> GramBound | None:
        """The bound of ``J diag(start) J^T``, optimised; None without shapes, without a rule or where it overflows."""
        if not all(op.shape is not None and len(op.shape) > 1 for op in self.ops):
            return None
        try:
            factors = own_factors(self.ops, 2)
            bound = gram_bound(self.ops, factors, start=start)
            if not math.isfinite(bound.upper):
                return None
            return tighten(bound, self.ops, factors, self.steps, start=start)
        except NoRule:
            return None

    @cached_property
    def weights(self) -> list[Tensor] | None:
        """The matrices of a plain chain of dense layers whose activations have slopes in [0, 1]."""
        if not self.shapes_known or _dense_inputs(self.ops) is None:
            return None
        weights: list[Tensor] = []
        scale, ready = 1.0, False
        for op in self.ops:
            if isinstance(op.rule, Dense):
                if ready:
                    return None
                weights.append(op.rule.W.double() * scale)
                scale, ready = 1.0, True
            elif isinstance(op.rule, Slope):
                if op.rule.low < 0 or not ready:
                    return None
                scale, ready = scale * op.rule.high, False
            elif isinstance(op.rule, Multiple):
                scale *= abs(op.rule.factor)
        return weights if ready and scale == 1 else None

    # --- pairs of outputs ---------------------------------------------------------------------------------------

    def margins(self, p: float, upper: float) -> Tensor | None:
        """The least bound of every difference of two outputs."""
        K = self.outputs
        if K is None or K > _MOST_MARGINS:
            return None
        tables = [torch.full((K, K), (math.sqrt(2) if p == 2 else 2.0) * upper, dtype=torch.float64)]
        if self.gram is not None and len(self.gram.gram) == K:
            tables.append(_differences(self.gram.gram) * (1.0 if p == 2 else math.sqrt(self.inputs)))
        if math.isinf(p):
            tables += self.margins_inf(K)
        best = torch.stack(tables).amin(0) * (1 + WALK_ROUNDING)
        best = torch.minimum(best, best.mT)
        return best.fill_diagonal_(0.0)

    def margins_inf(self, K: int) -> list[Tensor]:
        """Upper bounds of all pairs' differences in l_inf, ``(K, K)``: one table an argument that applies."""
        tables = []
        if self.weighted is not None and len(self.weighted) == K:
            tables.append(_differences(self.weighted))
        if self.distances is not None:
            chain = self.chain_margins()
            tables.append(chain)
            if self.paths is not None:
                tables.append((torch.cdist(self.paths, self.paths, p=1) + chain) / 2)
        if self.weights is not None and max(max(W.shape) for W in self.weights) <= _WIDE and K <= 32:
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


def _differences(gram: Tensor) -> Tensor:
    """``sqrt(g_ii + g_jj - 2 g_ij)``; infinite where the matrix is not of the outputs."""
    energy = gram.diagonal()
    squares = energy[:, None] + energy - 2 * gram
    return (squares.clamp_min(0) + 1e-12 * (energy[:, None] + energy)).sqrt()


def _row_norm(gram: Tensor) -> float:
    """Root of the largest diagonal entry, rounded up."""
    return math.sqrt(max(float(gram.diagonal().max()), 0.0)) * (1 + WALK_ROUNDING)
