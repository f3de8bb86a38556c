r"""Multiplier bounds of a whole network in l_2: one recursion of Gram matrices over its operations.

Every Jacobian ``J`` of an operation's result with respect to the input, for every choice of the slopes that
activations may take, obeys ``J J^H <= P`` in the Loewner order. A linear map turns P into ``A P A^H``; an activation
with slopes in ``[alpha, gamma]`` and any positive diagonal T with ``M = 2T - P > 0`` turns it into
``(alpha + gamma)^2 T M^-1 T - 2 alpha gamma T`` (theory page, section "Multipliers"). Results that are needed later,
such as both ends of a shortcut, are carried together in one joint Gram matrix. Convolutions are circular on a torus
that the image fits with its padding, so one matrix per frequency suffices; the zeros around the image are a pattern
of an activation. Where that does not go on (a stride, a max pooling), P is relaxed to a diagonal matrix above it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from brittle.bounds.graph import (
    Average,
    Concat,
    Conv,
    Dense,
    MaxPool,
    Multiple,
    Op,
    Rearrange,
    Scale,
    Slope,
    Softmax,
    Sum,
    users,
)
from brittle.bounds.multipliers import MULTIPLES, directions, factor, floored
from brittle.bounds.product import product_bound
from brittle.geometry import ConvGeometry

_BUDGET = 8e11
"""Real multiplications of one recursion, about a minute on two cores; what is left then counts with its norms."""
_WIDEST = 6e7
"""Entries of a joint matrix that are kept in memory: about 1 GB."""
Multipliers = dict[int, Tensor]


class Stuck(Exception):
    """Raised where the joint recursion cannot go on; the segment then counts with its product of norms."""


@dataclass(frozen=True)
class GramBound:
    """``J J^T <= gram`` for every Jacobian of the output.

    Attributes:
        gram: ``(K, K)``, or ``(1, 1)`` when only the norm is bounded.
        multipliers: The diagonal of T at every activation that was eliminated, by operation.
    """

    gram: Tensor
    multipliers: Multipliers

    @property
    def upper(self) -> float:
        """Upper bound of the l_2 Lipschitz constant; infinite where the numbers overflowed."""
        if not bool(self.gram.isfinite().all()):
            return math.inf
        return math.sqrt(max(float(torch.linalg.eigvalsh(self.gram.detach())[-1]), 0.0)) * (1 + 1e-9)


@dataclass
class _Diagonal:
    """One live result with ``P <= diag(t)``, t a channel (axis 1)."""

    op: int
    t: Tensor


@dataclass
class _Joint:
    """All live results: P ``(F, n, n)``, one matrix a frequency (F = 1 off the torus).

    Attributes:
        P: Joint Gram matrix.
        place: First row and number of rows of every live result.
        grid: Points of the torus per axis; empty off the torus.
        spilt: Live results that may be nonzero on the torus outside the image.
    """

    P: Tensor
    place: dict[int, tuple[int, int]]
    grid: tuple[int, ...]
    spilt: set[int] = field(default_factory=set)

    def rows(self, op: int) -> slice:
        start, length = self.place[op]
        return slice(start, start + length)

    def block(self, a: int, b: int) -> Tensor:
        return self.P[:, self.rows(a), self.rows(b)]


def gram_bound(
    ops: Sequence[Op],
    factors: Sequence[float],
    *,
    start: Tensor | None = None,
    multipliers: Mapping[int, Tensor] | None = None,
) -> GramBound:
    r"""Certified upper bound of ``J J^T`` over all Jacobians of a network, in the Loewner order.

    Args:
        ops: The network; shapes must be known.
        factors: Upper bound of every operation's own l_2 constant, for where the recursion cannot go on.
        start: Positive weights of the input's entries, for an input that is a vector or is flattened at once:
            bounds ``J diag(start) J^T``; ones by default.
        multipliers: Diagonals of T to use, by operation; where absent they are chosen in closed form.

    Returns:
        The bound. With multipliers given that are not feasible, the affected segment falls back to norms.
    """
    return _Recursion(ops, factors, users(ops), dict(multipliers or {})).run(start)


@dataclass
class _Recursion:
    ops: Sequence[Op]
    factors: Sequence[float]
    readers: list[list[int]]
    multipliers: Multipliers
    spent: float = 0.0

    def run(self, start: Tensor | None) -> GramBound:
        shape = self.ops[0].shape
        assert shape is not None
        first = _Diagonal(0, torch.ones(shape[1], dtype=torch.float64))
        if start is not None:  # weights of the entries stand behind a flattening
            first = _Diagonal(0 if len(shape) == 2 else 1, start)
        state: _Diagonal | _Joint = first
        last = len(self.ops) - 1
        saved, number = state, first.op + 1
        while number <= last:
            try:
                state = self.step(state, number)
            except Stuck:
                number = self.next_cut(number)
                state = self.skip(saved, number)
            alone = state.op if isinstance(state, _Diagonal) else self.alone(state)
            if alone is not None and self.is_cut(number):
                saved = state
            number += 1
        return GramBound(self.finish(state, last), self.multipliers)

    # --- where only one result is live ---------------------------------------------------------------------

    def is_cut(self, number: int) -> bool:
        """Whether everything after reads nothing before this operation's result."""
        return all(source >= number for op in self.ops[number + 1 :] for source in op.inputs)

    def next_cut(self, number: int) -> int:
        return next(n for n in range(number, len(self.ops)) if self.is_cut(n))

    def alone(self, state: _Joint) -> int | None:
        return next(iter(state.place)) if len(state.place) == 1 else None

    def skip(self, state: _Diagonal | _Joint, number: int) -> _Diagonal:
        """From one cut to another by the product of norms."""
        if isinstance(state, _Joint):
            op = self.alone(state)
            assert op is not None
            scale, start = _largest(state.P), op
        else:
            scale, start = float(state.t.max()), state.op
        ratio = product_bound(self.ops, self.factors, 2, start=start, end=number)
        shape = self.ops[number].shape
        assert shape is not None
        return _Diagonal(number, torch.full((shape[1],), scale * ratio**2, dtype=torch.float64))

    def finish(self, state: _Diagonal | _Joint, last: int) -> Tensor:
        if isinstance(state, _Diagonal):
            shape = self.ops[last].shape
            vector = shape is not None and len(shape) == 2
            return torch.diag(state.t) if vector else state.t.max().view(1, 1)
        if not state.grid:
            return state.block(last, last)[0]
        return torch.tensor([[_largest(state.block(last, last))]], dtype=torch.float64)

    # --- one operation --------------------------------------------------------------------------------------

    def step(self, state: _Diagonal | _Joint, number: int) -> _Diagonal | _Joint:
        if isinstance(state, _Diagonal):
            return self.from_diagonal(state, number)
        op = self.ops[number]
        if number in state.place:
            return state  # computed together with another reader of its input
        if not self.leaves_torus(state, op):
            return self.append(state, number)
        source = self.alone(state)
        if source is None:
            raise Stuck
        if not self.reads_later(source, number):
            return self.off_torus(state, source, number)
        if not state.grid:
            raise Stuck
        return self.from_diagonal(_Diagonal(source, self.relax(state.P, number)), number)

    def from_diagonal(self, state: _Diagonal, number: int) -> _Diagonal | _Joint:
        op, x = self.ops[number], state.op
        readers = sorted(set(self.readers[x]))
        convs = [self.as_conv(self.ops[reader]) for reader in readers]
        together = [conv for conv in convs if conv is not None]
        if together and len(together) == len(readers) and len({conv.geometry.stride for conv in together}) == 1:
            return self.convolved(state, readers, together)
        if len(self.readers[x]) > 1:
            joint = self.spread(state)
            if self.leaves_torus(joint, op):
                raise Stuck
            return self.append(joint, number)
        if isinstance(op.rule, Dense) and len(op.shape or ()) == 2:
            W = op.rule.W.double()
            self.afford(1, W.shape[0], float(W.shape[0]) ** 2 * W.shape[1])
            return _Joint(((W * state.t) @ W.mT)[None], {number: (0, W.shape[0])}, ())
        return _Diagonal(number, self.diagonal_rule(op, state.t, self.ops[x].shape))

    def convolved(self, state: _Diagonal, readers: Sequence[int], convs: Sequence[Conv]) -> _Joint:
        """All convolutions that read the only live result, side by side."""
        stride = convs[0].geometry.stride
        grid = self.grid(state.op, stride)
        out = [conv.K.shape[0] for conv in convs]
        width = len(state.t) * math.prod(stride)
        self.afford(_frequencies(grid), max(sum(out), width), float(sum(out)) ** 2 * width)
        A = torch.cat([symbol(conv.K, conv.geometry, grid) for conv in convs], 1)
        P = (A * state.t.repeat_interleave(math.prod(stride))) @ A.mH
        place = {reader: (sum(out[:k]), out[k]) for k, reader in enumerate(readers)}
        spilt = {r for r, conv in zip(readers, convs, strict=True) if math.prod(conv.K.shape[2:]) * max(stride) > 1}
        return _Joint(P, place, grid, spilt)

    def diagonal_rule(self, op: Op, t: Tensor, before: tuple[int, ...] | None) -> Tensor:
        """The weights after an operation that keeps channels apart, or else one weight for all."""
        rule, after = op.rule, op.shape
        assert before is not None
        assert after is not None
        if isinstance(rule, Slope):
            return t * rule.steepest**2
        if isinstance(rule, Scale):
            return t * rule.factors**2
        if isinstance(rule, Multiple):
            return t * rule.factor**2
        if isinstance(rule, MaxPool):
            return t * rule.overlap
        if isinstance(rule, Average) and rule.norm is not None and rule.axes:
            return t * rule.norm**2
        if isinstance(rule, Rearrange) and rule.run is not None and len(after) == 2 and rule.flattens:
            return rule.run(t.view(1, -1, *[1] * (len(before) - 2)).expand(before))[0]
        if isinstance(rule, Rearrange | Softmax | Average):
            own = {Softmax: 0.5, Rearrange: 1.0}.get(type(rule), getattr(rule, "norm", None))
            if own is None:
                raise Stuck
            worst = float(t.detach().max()) * own**2
            return torch.full((after[1],), worst, dtype=torch.float64)
        raise Stuck

    def spread(self, state: _Diagonal) -> _Joint:
        """A result with several readers, as a joint matrix of its own."""
        x, shape = state.op, self.ops[state.op].shape
        assert shape is not None
        if len(shape) == 2:
            self.afford(1, shape[1])
            return _Joint(torch.diag(state.t)[None], {x: (0, shape[1])}, ())
        grid = self.grid(x, [1] * len(shape[2:]))
        self.afford(_frequencies(grid), shape[1])
        P = torch.diag(state.t).to(torch.complex128)
        return _Joint(P.expand(_frequencies(grid), -1, -1), {x: (0, shape[1])}, grid)

    def afford(self, frequencies: int, n: int, *products: float) -> None:
        """Stop before a step that would take too much memory (n x n matrices) or time (multiplications each)."""
        spent = self.spent + frequencies * sum(products) * (4 if frequencies > 1 else 1)
        if float(frequencies) * n * n > _WIDEST or spent > _BUDGET:
            raise Stuck
        self.spent = spent

    def as_conv(self, op: Op) -> Conv | None:
        """The operation as a convolution with zero padding, if it is one."""
        if isinstance(op.rule, Conv):
            return op.rule if op.rule.geometry.mode == "zeros" else None
        if isinstance(op.rule, Average) and op.rule.stencil is not None:
            kernel, stride, padding = op.rule.stencil
            before = self.ops[op.inputs[0]].shape
            assert before is not None
            K = torch.full((before[1], 1, *kernel), 1 / math.prod(kernel), dtype=torch.float64)
            pads = tuple((width, width) for width in padding)
            return Conv(K, ConvGeometry(stride, pads, tuple(1 for _ in kernel), before[1]))
        return None

    def grid(self, x: int, stride: Sequence[int]) -> tuple[int, ...]:
        """A torus on which the image fits with the padding of every convolution up to the next stride or pooling."""
        shape = self.ops[x].shape
        assert shape is not None
        points = [1] * len(stride)
        for number in range(x + 1, len(self.ops)):
            op, conv = self.ops[number], self.as_conv(self.ops[number])
            if conv is not None and (x in op.inputs or max(conv.geometry.stride) == 1):
                read = self.ops[op.inputs[0]].shape
                assert read is not None
                for axis, (n, pads) in enumerate(zip(read[2:], conv.geometry.padding, strict=True)):
                    s = conv.geometry.stride[axis]
                    need = -(-(n + max(pads)) // s)
                    points[axis] = max(points[axis], need, (op.shape or ())[2 + axis])
            elif not isinstance(op.rule, Slope | Scale | Sum | Concat | Multiple):
                break
        if points == [1] * len(stride):
            points = [-(-n // s) for n, s in zip(shape[2:], stride, strict=True)]
        return tuple(points)

    # --- joint matrices -------------------------------------------------------------------------------------

    def leaves_torus(self, state: _Joint, op: Op) -> bool:
        """Whether an operation cannot be done on the torus of this state."""
        conv = self.as_conv(op)
        if conv is not None:
            source = self.ops[op.inputs[0]].shape
            assert source is not None
            axes = zip(source[2:], (op.shape or ())[2:], conv.geometry.padding, state.grid, strict=False)
            fits = all(n + max(pads) <= points and m <= points for n, m, pads, points in axes)
            return max(conv.geometry.stride) > 1 or not state.grid or not fits
        if isinstance(op.rule, Dense):
            return bool(state.grid) or len(op.shape or ()) != 2
        if isinstance(op.rule, Concat):
            return op.rule.axis != 1
        return not isinstance(op.rule, Slope | Scale | Sum | Multiple)

    def off_torus(self, state: _Joint, x: int, number: int) -> _Diagonal | _Joint:
        """An operation on the only live result that ends the run on this torus."""
        op, shape = self.ops[number], self.ops[x].shape
        assert shape is not None
        pixels = math.prod(shape[2:])
        P = state.block(x, x)
        keeps = isinstance(op.rule, Rearrange) and op.rule.flattens and pixels == 1
        if state.grid and (keeps or (isinstance(op.rule, Average) and op.rule.everything)):
            return _Joint((_mean_over_image(P, state.grid, shape[2:]) / pixels)[None], {number: (0, shape[1])}, ())
        if not state.grid and keeps:
            return _Joint(P, {number: (0, shape[1])}, ())
        if not state.grid and len(shape) != 2:
            raise Stuck
        return self.from_diagonal(_Diagonal(x, self.relax(P, number)), number)

    def relax(self, P: Tensor, number: int) -> Tensor:
        """A diagonal matrix above P at every frequency, with weights that suit what reads it."""
        P = P.detach()
        energy = P.diagonal(dim1=-2, dim2=-1).real.mean(0)
        outer = self.outer_norms([number], len(energy))
        best, least = torch.ones_like(energy), math.inf
        for w in (torch.ones_like(energy), floored(energy).sqrt(), floored(energy)):
            t = w * _largest(P, w)
            size = float((t * outer**2).sum())
            if size < least * 0.999:
                best, least = t, size
        if not math.isfinite(least):
            raise Stuck
        return best

    def append(self, state: _Joint, number: int) -> _Joint:
        op, rule = self.ops[number], self.ops[number].rule
        if isinstance(rule, Slope):
            spilt = op.inputs[0] in state.spilt
            low, high = (min(rule.low, 0.0), max(rule.high, 0.0)) if spilt else (rule.low, rule.high)
            return self.eliminate(state, op.inputs[0], number, low, high)
        spills = any(source in state.spilt for source in op.inputs)
        n = state.place[op.inputs[0]][1]
        conv = self.as_conv(op)
        if conv is not None:
            padded = any(width for pads in conv.geometry.padding for width in pads)
            if spills and (math.prod(conv.K.shape[2:]) > 1 or padded):
                raise Stuck  # the zeros around the image would have to be put back first
            if conv.geometry.groups == conv.K.shape[0] == n:
                k, rows = symbol(conv.K, replace(conv.geometry, groups=1), state.grid), state.rows(op.inputs[0])
                return self.extend(state, number, lambda R: k * R[:, rows], spills or math.prod(conv.K.shape[2:]) > 1)
            A = symbol(conv.K, conv.geometry, state.grid)
            spills = spills or math.prod(conv.K.shape[2:]) > 1
            return self.extend(state, number, self.matrix(state, op, A), spills, self.cancelled(state, op, A))
        if isinstance(rule, Dense):
            A = rule.W.to(state.P.dtype)[None]
            return self.extend(state, number, self.matrix(state, op, A), False, self.cancelled(state, op, A))
        lost = self.cancelled(state, op) if isinstance(rule, Sum) else None
        return self.extend(state, number, self.combination(state, op), spills, lost)

    def matrix(self, state: _Joint, op: Op, A: Tensor) -> Callable[[Tensor], Tensor]:
        rows, (m, n), total = state.rows(op.inputs[0]), A.shape[-2:], state.P.shape[-1]
        kept = sum(size for x, (_, size) in state.place.items() if self.reads_later(x, self.ops.index(op)))
        self.afford(len(state.P), m + kept, float(m) * n * total, float(m) ** 2 * n)
        return lambda R: A @ R[:, rows]

    def combination(self, state: _Joint, op: Op) -> Callable[[Tensor], Tensor]:
        """Sums, concatenations and diagonal matrices, as a map of the joint matrix's rows."""
        rows, rule = [state.rows(source) for source in op.inputs], op.rule
        if isinstance(rule, Sum):
            if len({self.ops[source].shape for source in op.inputs} | {op.shape}) > 1:
                raise Stuck
            return lambda R: reduce(
                torch.add, [R[:, r] if s > 0 else -R[:, r] for r, s in zip(rows, rule.signs, strict=True)]
            )
        if isinstance(rule, Concat):
            return lambda R: torch.cat([R[:, r] for r in rows], 1)
        if isinstance(rule, Multiple):
            return lambda R: rule.factor * R[:, rows[0]]
        if isinstance(rule, Scale) and len(rule.factors) == state.place[op.inputs[0]][1]:
            return lambda R: rule.factors[:, None] * R[:, rows[0]]
        raise Stuck

    def cancelled(self, state: _Joint, op: Op, A: Tensor | None = None) -> Tensor:
        """What rounding may hide, for every frequency ``(F,)``, where large terms of a linear map cancel.

        Entries of ``A P A^H`` are off by at most ``2 n u ||A||_F^2 tr P``, u the unit roundoff and n the columns.
        """
        roots = [state.block(x, x).diagonal(dim1=1, dim2=2).real.sum(1).clamp_min(0).sqrt() for x in op.inputs]
        if A is None:
            return 1e-12 * reduce(torch.add, roots).square()
        frobenius = A.abs().square().sum((1, 2))
        return 2.0**-51 * (A.shape[-1] + 1) * frobenius * roots[0].square()

    def extend(
        self,
        state: _Joint,
        number: int,
        rows: Callable[[Tensor], Tensor],
        spills: bool,
        lost: Tensor | None = None,
    ) -> _Joint:
        """Add the rows of a linear map of what is live to the joint matrix, raised by what rounding may hide."""
        cross = rows(state.P)
        own = rows(cross.mH)
        if lost is not None:
            own = own + torch.eye(own.shape[-1], dtype=torch.float64) * lost[:, None, None]
        spilt = state.spilt | {number} if spills else set(state.spilt)
        kept = [x for x in state.place if self.reads_later(x, number)]
        place, index = _stacked(state, kept)
        place[number] = (len(index), own.shape[-1])
        if kept:
            cross = cross[:, :, index]
            own = torch.cat([torch.cat([_selected(state.P, index), cross.mH], 2), torch.cat([cross, own], 2)], 1)
        return _Joint(own, place, state.grid, spilt & {*place})

    def reads_later(self, x: int, number: int) -> bool:
        return any(reader > number for reader in self.readers[x])

    def eliminate(self, state: _Joint, x: int, number: int, low: float, high: float) -> _Joint:
        """The joint matrix with ``z = phi(x)`` added: the largest value over all slopes, by one Schur complement."""
        frequencies, n = state.P.shape[0], state.place[x][1]
        others = [y for y in state.place if self.reads_later(y, number)]
        total = n + sum(state.place[y][1] for y in others)
        self.afford(frequencies, total, float(n) ** 3, float(n) ** 2 * total, float(n) * total**2)
        Q = state.block(x, x)
        if number not in self.multipliers:
            self.multipliers[number], L = self.choose(state, x, number, low, high)
        elif (given := factor(Q, self.multipliers[number])) is not None:
            L = given
        else:
            raise Stuck
        root = self.multipliers[number].sqrt().to(Q.dtype)
        # X: L^-1 of [ (low + high) T^1/2 for z, T^-1/2 P_xo for the others ]
        right = [torch.diag((low + high) * root).expand(frequencies, n, n)]
        right += [state.block(x, y) / root[:, None] for y in others]
        X = torch.linalg.solve_triangular(L, torch.cat(right, 2), upper=False)
        P = X.mH @ X
        if low:
            P[:, :n, :n] -= 2 * low * high * torch.diag(root**2)
        place, index = _stacked(state, others)
        place = {y: (start + n, length) for y, (start, length) in place.items()}
        if others:
            P = P + F.pad(_selected(state.P, index), (n, 0, n, 0))
        place[number] = (0, n)
        return _Joint(P, place, state.grid, state.spilt & {*place})

    # --- closed-form multipliers ----------------------------------------------------------------------------

    def outer_norms(self, readers: Sequence[int], n: int) -> Tensor:
        """Column norms of the linear operations that read a result (1 for any other reading)."""
        total = torch.zeros(n, dtype=torch.float64)
        for op in [self.ops[reader] for reader in readers]:
            columns = self.columns(op)
            total += columns if columns is not None and len(columns) == n else torch.ones(n, dtype=torch.float64)
        return total.sqrt() if float(total.max()) > 0 else torch.ones(n, dtype=torch.float64)

    def columns(self, op: Op) -> Tensor | None:
        """Squared column norms a channel."""
        if isinstance(op.rule, Dense):
            return op.rule.W.double().square().sum(0)
        conv = self.as_conv(op)
        if conv is None:
            return None
        squares = conv.K.double().square().flatten(2).sum(2)
        return squares.unflatten(0, (conv.geometry.groups, -1)).sum(1).flatten()

    def choose(self, state: _Joint, x: int, number: int, low: float, high: float) -> tuple[Tensor, Tensor]:
        """Multipliers by the best of a few closed forms, judged at the heaviest frequencies, and their factor."""
        Q = state.block(x, x).detach()
        energy = Q.diagonal(dim1=-2, dim2=-1).real
        forms = directions(energy.mean(0).clamp_min(0).sqrt(), self.outer_norms(self.readers[number], Q.shape[-1]))
        heavy = energy.sum(1).topk(min(len(Q), 3)).indices
        few = Q[heavy]
        readers = [self.linear_map(self.ops[reader], state, heavy) for reader in self.readers[number]]
        scale = [max(_estimate(few, w) * 1.0001, 1e-200) for w in forms]

        def value(key: int, multiple: float) -> float:
            t = forms[key] * scale[key] * multiple
            L = factor(few, t)
            return math.inf if L is None else _response(L, t, readers, low, high)

        values = [value(key, 0.75) for key in range(len(forms))]
        best = min(range(len(forms)), key=values.__getitem__)
        tried = {0.75: values[best]} | {multiple: value(best, multiple) for multiple in MULTIPLES}
        for multiple in sorted((m for m in tried if math.isfinite(tried[m])), key=tried.__getitem__):
            for slack in (1.0, 1.02, 1.1):
                t = forms[best] * scale[best] * multiple * slack
                if (L := factor(Q, t)) is not None:
                    return t, L
        raise Stuck

    def linear_map(self, op: Op, state: _Joint, chosen: Tensor) -> Tensor | None:
        """The matrix of a reader at the chosen frequencies; None for readers that are no linear operation here."""
        if isinstance(op.rule, Dense):
            return op.rule.W.double()
        conv = self.as_conv(op)
        if conv is None or not state.grid or max(conv.geometry.stride) > 1:
            return None
        return symbol(conv.K, conv.geometry, state.grid)[chosen]


def _stacked(state: _Joint, kept: Sequence[int]) -> tuple[dict[int, tuple[int, int]], Tensor]:
    """Places of some live results alone, and the rows they have now."""
    place, start = {}, 0
    for x in kept:
        place[x] = (start, state.place[x][1])
        start += state.place[x][1]
    rows = [torch.arange(state.place[x][0], sum(state.place[x])) for x in kept]
    return place, torch.cat(rows) if rows else torch.arange(0)


def _selected(P: Tensor, index: Tensor) -> Tensor:
    """Rows and columns of a batch of matrices, without a copy where they are consecutive."""
    if bool((index.diff() == 1).all()):
        rows = slice(int(index[0]), int(index[-1]) + 1)
        return P[:, rows, rows]
    return P[:, index][:, :, index]


def _frequencies(grid: Sequence[int]) -> int:
    return math.prod(grid[:-1]) * (grid[-1] // 2 + 1)


def symbol(K: Tensor, geometry: ConvGeometry, grid: Sequence[int]) -> Tensor:
    """The convolution at every frequency of a torus, ``(F, out, in * phases)``, with the padding's shift.

    Tap u reads position ``stride * p + offset``, ``offset = u * dilation - padding = stride * q + r``: it contributes
    ``K[o, c, u] exp(i w q)`` to column (c, r). K is real, so half of the last axis stands for all.
    """
    K = K.double()
    out, width, kernel = K.shape[0], K.shape[1], K.shape[2:]
    phases, places = [], []
    for k, d, s, n, (before, _) in zip(kernel, geometry.dilation, geometry.stride, grid, geometry.padding, strict=True):
        offset = torch.arange(k) * d - before
        phases.append(offset % s)
        places.append(torch.div(offset, s, rounding_mode="floor") % n)
    axes = [*torch.meshgrid(*phases, indexing="ij"), *torch.meshgrid(*places, indexing="ij")]
    flat = torch.zeros(kernel, dtype=torch.int64)
    for index, length in zip(axes, [*geometry.stride, *grid], strict=True):
        flat = flat * length + index
    full = torch.zeros(out, width * geometry.groups, math.prod([*geometry.stride, *grid]), dtype=torch.float64)
    filters = out // geometry.groups
    for g in range(geometry.groups):
        rows, columns = slice(g * filters, (g + 1) * filters), slice(g * width, (g + 1) * width)
        full[rows, columns] = full[rows, columns].index_add(2, flat.flatten(), K[rows].flatten(2))
    full = full.unflatten(2, [math.prod(geometry.stride), *grid])
    spectrum = torch.fft.rfftn(full, dim=list(range(-len(grid), 0))).conj()
    return spectrum.flatten(3).permute(3, 0, 1, 2).flatten(2).contiguous()


def _mean_over_image(P: Tensor, grid: Sequence[int], size: Sequence[int]) -> Tensor:
    """``1^T P 1 / pixels`` with ones on the image: the mean of P, weighted by the image's spectrum."""
    image = torch.zeros(tuple(grid), dtype=torch.float64)
    image[tuple(slice(0, n) for n in size)] = 1.0
    weight = torch.fft.rfftn(image).abs().square()
    weight[..., 1 : (grid[-1] + 1) // 2] *= 2  # the other half of the last axis
    weight = weight.flatten() / weight.sum()
    return (P * weight.to(P.dtype)[:, None, None]).sum(0).real


def _start(like: Tensor) -> Tensor:
    v = torch.randn(like.shape[-1], 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return v.to(like.dtype).expand(len(like), -1, -1)


def _estimate(Q: Tensor, w: Tensor, iterations: int = 20) -> float:
    """Estimate, from below, of the largest eigenvalue of ``W^-1/2 Q W^-1/2`` over the batch, by power iteration."""
    root = w.rsqrt().to(Q.dtype)[:, None]
    v, value = _start(Q), 0.0
    for _ in range(iterations):
        v = root * (Q @ (root * v))
        length = torch.linalg.vector_norm(v, dim=1, keepdim=True)
        value = float(length.max())
        v = v / length.clamp_min(1e-300)
    return value


def _largest(P: Tensor, w: Tensor | None = None) -> float:
    """Upper bound, within some percent, of the largest eigenvalue of ``W^-1/2 P W^-1/2`` over the batch."""
    P = P.detach()
    w = torch.ones(P.shape[-1], dtype=torch.float64) if w is None else w
    traces = (P.diagonal(dim1=-2, dim2=-1).real / w).sum(1)
    guess = _estimate(P[traces.topk(min(len(P), 4)).indices], w)
    if not guess:
        return 0.0 if not P.any() else math.inf
    for doubling in range(20):
        guess *= 1 + 0.003 * 2**doubling
        if factor(2 * P, w * guess) is not None:  # 2 guess W - 2 P > 0
            return guess
    return math.inf


def _response(L: Tensor, t: Tensor, readers: Sequence[Tensor | None], low: float, high: float) -> float:
    """Estimate of the largest eigenvalue of ``sum_A A R A^H`` over the batch, R the eliminated matrix."""
    root = t.sqrt().to(L.dtype)[:, None]
    v, value = _start(L), 0.0
    for _ in range(12):
        g = torch.zeros_like(v)
        for A in readers or [None]:
            g = g + (v if A is None else A.mH.to(L.dtype) @ (A.to(L.dtype) @ v))
        r = (low + high) ** 2 * root * torch.cholesky_solve(root * g, L) - 2 * low * high * root**2 * g
        length = torch.linalg.vector_norm(r, dim=1, keepdim=True)
        value = float((length / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(1e-300)).max())
        v = r / length.clamp_min(1e-300)
    return value


def tightened(
    bound: GramBound,
    ops: Sequence[Op],
    factors: Sequence[float],
    steps: int,
    *,
    start: Tensor | None = None,
    rate: float = 0.1,
) -> GramBound:
    """The bound after steps of optimisation (Adam) of all multipliers together; never worse than before.

    The loss is a smooth maximum of the eigenvalues of the output's Gram matrix. Multipliers that are not feasible are
    raised by two percent until they are.
    """
    best, logs = bound, [t.log() for t in bound.multipliers.values()]
    if not steps or not logs:
        return best
    mean, square = [torch.zeros_like(t) for t in logs], [torch.zeros_like(t) for t in logs]
    keys = list(bound.multipliers)
    for step in range(1, steps + 1):
        logs = [t.detach().requires_grad_() for t in logs]
        with torch.enable_grad():
            now = gram_bound(
                ops, factors, start=start, multipliers={k: t.exp() for k, t in zip(keys, logs, strict=True)}
            )
            found = now.gram.requires_grad and bool(now.gram.isfinite().all())
            if found:
                values = torch.linalg.eigvalsh(now.gram).clamp_min(1e-300)
                slopes = torch.autograd.grad(torch.logsumexp(8 * values.log(), 0) / 8, logs, allow_unused=True)
        if not found:
            logs = [t.detach() + 0.02 for t in logs]
            continue
        if now.upper < best.upper:
            best = GramBound(now.gram.detach(), {k: t.detach() for k, t in now.multipliers.items()})
        moved = []
        for k, (t, slope) in enumerate(zip(logs, slopes, strict=True)):
            slope = torch.zeros_like(t) if slope is None else slope
            mean[k] = 0.9 * mean[k] + 0.1 * slope
            square[k] = 0.99 * square[k] + 0.01 * slope**2
            stride = rate * (mean[k] / (1 - 0.9**step)) / ((square[k] / (1 - 0.99**step)).sqrt() + 1e-12)
            moved.append(t.detach() - stride)
        logs = moved
    return best
