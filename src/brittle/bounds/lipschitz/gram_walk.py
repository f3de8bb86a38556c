"""The walk over a network's operations that turns one Gram matrix into the next.

All live results are bounded together, by a diagonal or by a joint matrix (``gram_states``). Here is decided which of
them serves an operation, what may be afforded, and where only the product of norms is left. Theory page, section
"Multipliers".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from brittle.bounds.graph.rules import Average, Conv, Dense, Op, Rearrange, Slope, Sum, users
from brittle.bounds.lipschitz.gram_multipliers import (
    Reader,
    Stuck,
    choose_multipliers,
    dominating_diagonal,
    outer_norms,
    uniform_multipliers,
)
from brittle.bounds.lipschitz.gram_states import (
    Diagonal,
    Joint,
    append_rows,
    convolve_diagonal,
    eliminate_activation,
    joint_of_diagonal,
    lost_by_cancellation,
    rows_after,
    weights_after,
)
from brittle.bounds.lipschitz.product import product_bound
from brittle.bounds.lipschitz.torus import convolutions, fits, is_local, least_torus, mean_over_image, spills
from brittle.bounds.pairs.multipliers import factor
from brittle.linear.conv_symbol import frequencies, symbol
from brittle.models.trace import NoRule

MOST_MULTIPLICATIONS = 8e11
"""Real multiplications of one recursion, about a minute on two cores; what is left then counts with its norms."""
MOST_ENTRIES = 6e7
"""Entries of a joint matrix that are kept in memory: about 1 GB."""


@dataclass
class Walk:
    """One walk over the operations in their order, with a bound of all live results: a diagonal or a joint matrix.

    Attributes:
        ops: The network; shapes must be known.
        factors: Upper bound of every operation's own l_2 constant.
        multipliers: Of the activations; those that are chosen on the way are added.
        uniform: Whether the same multiplier is chosen for all units of a layer.
        spent: Real multiplications so far.
        skipped: Stretches so far that count with their product of norms.
    """

    ops: Sequence[Op]
    factors: Sequence[float]
    multipliers: dict[int, Tensor]
    uniform: bool = False
    spent: float = 0.0
    skipped: int = 0

    def run(self, start: Tensor | None) -> Tensor:
        """The Gram matrix above all Jacobians of the output, ``(K, K)``, or ``(1, 1)`` when only the norm is bounded.

        Where the walk is stuck, the product of norms counts from the last cut with one live result to the next cut.

        Args:
            start: Positive weights of the input's entries; ones by default.
        """
        shape = self.ops[0].shape
        assert shape is not None
        state: Diagonal | Joint = Diagonal(0, torch.ones(shape[1], dtype=torch.float64))
        number = 1
        if start is not None and len(shape) == 2:
            state = Diagonal(0, start)
        elif start is not None:  # weights of the entries stand behind a flattening
            state, number = Diagonal(1, start), 2
        last_cut = state
        while number < len(self.ops):
            try:
                state = self.step(state, number)
            except Stuck:
                number = self.cuts.index(True, number)
                state = self.skip(last_cut, number)
                self.skipped += 1
            if state.alone is not None and self.cuts[number]:
                last_cut = state
            number += 1
        return self.finish(state)

    # --- what the graph says ----------------------------------------------------------------------------------

    @cached_property
    def convs(self) -> list[Conv | None]:
        """Every operation as a convolution, where it is one."""
        return convolutions(self.ops)

    @cached_property
    def readers(self) -> list[list[int]]:
        """For every operation those that read it, once for every reading."""
        return users(self.ops)

    @cached_property
    def last_use(self) -> list[int]:
        """The last reader of every operation; -1 for the output."""
        return [max(readers, default=-1) for readers in self.readers]

    @cached_property
    def cuts(self) -> list[bool]:
        """For every operation, whether everything after it reads nothing before its result."""
        return [last <= number for number, last in enumerate(accumulate(self.last_use[:-1], max, initial=0))]

    def read_later(self, state: Joint, number: int) -> list[int]:
        """Live results that are read after an operation."""
        return [x for x in state.place if self.last_use[x] > number]

    def linear_readers(self, readers: Sequence[int]) -> list[Reader]:
        """Readers as linear operations, where they are."""
        rules = [self.ops[reader].rule for reader in readers]
        return [r if isinstance(r, Dense) else self.convs[n] for n, r in zip(readers, rules, strict=True)]

    # --- where only one result is live ------------------------------------------------------------------------

    def skip(self, state: Diagonal | Joint, number: int) -> Diagonal:
        """From one cut to another by the product of norms."""
        shape = self.ops[number].shape
        assert shape is not None
        assert state.alone is not None
        ratio = product_bound(self.ops, self.factors, 2, start=state.alone, end=number)
        weight = state.largest() * ratio * ratio  # a power would raise where this overflows
        if not math.isfinite(weight):
            raise NoRule(f"{self.ops[number].name}: squared norms exceed the range of float64")
        return Diagonal(number, torch.full((shape[1],), weight, dtype=torch.float64))

    def finish(self, state: Diagonal | Joint) -> Tensor:
        """The Gram matrix of the output ``(K, K)``, or its norm's bound ``(1, 1)`` for an output with positions."""
        if isinstance(state, Joint):
            return torch.tensor([[state.largest()]], dtype=torch.float64) if state.grid else state.P[0]
        vector = len(self.ops[-1].shape or ()) == 2
        return torch.diag(state.t) if vector else state.t.max().view(1, 1)

    # --- one operation ----------------------------------------------------------------------------------------

    def step(self, state: Diagonal | Joint, number: int) -> Diagonal | Joint:
        """What is live after one more operation.

        Raises:
            Stuck: No rule applies, or the step would cost too much.
        """
        if isinstance(state, Diagonal):
            return self.from_diagonal(state, number)
        if number in state.place:
            return state  # computed together with another reader of its input
        return self.append(state, number) if self.stays(state, number) else self.leave(state, number)

    def from_diagonal(self, state: Diagonal, number: int) -> Diagonal | Joint:
        """The operation after a diagonal: with a joint matrix where it is linear or has siblings, else by weights."""
        op, x = self.ops[number], state.alone
        convs = {reader: conv for reader in self.readers[x] if (conv := self.convs[reader]) is not None}
        if len(convs) == len(set(self.readers[x])) and len({conv.geometry.stride for conv in convs.values()}) == 1:
            return self.convolve(state, convs)
        shape = self.ops[x].shape
        assert shape is not None
        if len(self.readers[x]) > 1:
            grid = self.torus(x, [1] * len(shape[2:]))
            self.afford(frequencies(grid), shape[1])
            joint = joint_of_diagonal(x, state.t, grid)
            # Several readers, and not all of them convolutions of one stride: they share one torus or none.
            if not self.stays(joint, number):
                raise Stuck
            return self.append(joint, number)
        if isinstance(op.rule, Dense) and len(op.shape or ()) == 2:
            W = op.rule.W.double()
            self.afford(1, W.shape[0], float(W.shape[0]) ** 2 * W.shape[1])
            return Joint(((W * state.t) @ W.mT)[None], {number: (0, W.shape[0])}, ())
        return Diagonal(number, weights_after(op.rule, op, state.t, shape))

    def convolve(self, state: Diagonal, convs: Mapping[int, Conv]) -> Joint:
        """All convolutions that read the only live result, side by side."""
        stride = next(iter(convs.values())).geometry.stride
        grid = self.torus(state.alone, stride)
        out = sum(len(conv.K) for conv in convs.values())
        width = len(state.t) * math.prod(stride)
        self.afford(frequencies(grid), max(out, width), float(out) ** 2 * width)
        return convolve_diagonal(convs, state.t, grid)

    def torus(self, x: int, stride: Sequence[int]) -> tuple[int, ...]:
        """A torus for the readers of a result; empty for a vector."""
        return least_torus(self.ops, self.convs, x, stride) if stride else ()

    def stays(self, state: Joint, number: int) -> bool:
        """Whether an operation can be done on the torus of this state, or off it on vectors."""
        op, conv = self.ops[number], self.convs[number]
        after = op.shape or ()
        if conv is not None:
            before = self.ops[op.inputs[0]].shape
            assert before is not None
            plain = bool(state.grid) and max(conv.geometry.stride) == 1
            return plain and fits(conv, before[2:], after[2:], state.grid)
        if isinstance(op.rule, Dense):
            return not state.grid and len(after) == 2
        return is_local(op.rule, op)

    def leave(self, state: Joint, number: int) -> Diagonal | Joint:
        """An operation on the only live result that cannot be done on its torus: by its mean, or by a diagonal."""
        op, x = self.ops[number], state.alone
        if x is None:
            raise Stuck
        shape, later = self.ops[x].shape, self.last_use[x] > number
        assert shape is not None
        pixels = math.prod(shape[2:])
        # A flattening of one pixel only renames the channels; a mean over the image has a Gram matrix of its own.
        flat = isinstance(op.rule, Rearrange) and op.rule.flattens and pixels == 1
        mean = isinstance(op.rule, Average) and op.rule.everything
        if (flat or (mean and state.grid)) and not later:
            P = (mean_over_image(state.P, state.grid, shape[2:]) / pixels)[None] if state.grid else state.P
            return Joint(P, {number: (0, shape[1])}, ())
        # Off the torus P is of a vector, or of something that a diagonal of channels does not describe.
        if not state.grid and (later or len(shape) != 2):
            raise Stuck
        outer = outer_norms(self.linear_readers([number]), state.P.shape[-1])
        return self.from_diagonal(Diagonal(x, dominating_diagonal(state.P, outer)), number)

    def append(self, state: Joint, number: int) -> Joint:
        """One more live result, on the same torus."""
        op, rule, conv = self.ops[number], self.ops[number].rule, self.convs[number]
        if isinstance(rule, Slope):
            return self.activate(state, number, rule)
        if conv is not None:
            return self.append_convolution(state, number, conv)
        spilt = any(source in state.spilt for source in op.inputs)
        if isinstance(rule, Dense):
            return self.append_matrix(state, number, rule.W.to(state.P.dtype)[None], spilt=spilt)
        lost = None
        if isinstance(rule, Sum):
            # A term that is spread over a larger result is no longer one matrix a frequency.
            if len({self.ops[n].shape for n in (number, *op.inputs)}) > 1:
                raise Stuck
            lost = lost_by_cancellation(state, op)
        rows = rows_after(rule, op, state)
        return append_rows(state, number, rows, self.read_later(state, number), spilt=spilt, lost=lost)

    def append_convolution(self, state: Joint, number: int, conv: Conv) -> Joint:
        """A convolution of stride 1 on the torus."""
        (x,) = self.ops[number].inputs
        spilt = x in state.spilt
        if spilt and (spills(conv) or any(map(any, conv.geometry.padding))):
            raise Stuck  # the zeros around the image would have to be put back first
        spilt = spilt or spills(conv)
        if conv.geometry.groups == len(conv.K) == state.height([x]):  # a diagonal matrix cancels nothing
            k, rows = symbol(conv.K, replace(conv.geometry, groups=1), state.grid), state.rows(x)
            return append_rows(state, number, lambda R: k * R[:, rows], self.read_later(state, number), spilt=spilt)
        return self.append_matrix(state, number, symbol(conv.K, conv.geometry, state.grid), spilt=spilt)

    def append_matrix(self, state: Joint, number: int, A: Tensor, *, spilt: bool) -> Joint:
        """A linear map by its matrix, one a frequency or one for all, ``(F or 1, m, n)``."""
        op, later = self.ops[number], self.read_later(state, number)
        rows, (m, n) = state.rows(op.inputs[0]), A.shape[-2:]
        products = (float(m) * n * state.P.shape[-1], float(m) ** 2 * n)
        self.afford(len(state.P), m + state.height(later), *products)
        lost = lost_by_cancellation(state, op, A)
        return append_rows(state, number, lambda R: A @ R[:, rows], later, spilt=spilt, lost=lost)

    def activate(self, state: Joint, number: int, rule: Slope) -> Joint:
        """An activation, by its multipliers; they are chosen unless given."""
        (x,), low, high = self.ops[number].inputs, rule.low, rule.high
        if x in state.spilt:  # zeros around the image: slope 0
            low, high = min(low, 0.0), max(high, 0.0)
        Q, later = state.block(x, x), self.read_later(state, number)
        n, total = Q.shape[-1], Q.shape[-1] + state.height(later)
        self.afford(len(Q), total, float(n) ** 3, float(n) ** 2 * total, float(n) * total**2)
        t, L = self.multipliers.get(number), None
        if t is None and self.uniform:
            t, L = uniform_multipliers(Q)
        elif t is None:
            t, L = choose_multipliers(Q, self.linear_readers(self.readers[number]), state.grid, (low, high))
        elif (L := factor(Q, t)) is None:
            raise Stuck
        self.multipliers[number] = t
        return eliminate_activation(state, x, number, (low, high), t, L, later)

    def afford(self, count: int, n: int, *products: float) -> None:
        """Stop before a step that would take too much memory (n x n matrices) or time (multiplications each)."""
        spent = self.spent + count * sum(products) * (4 if count > 1 else 1)
        if float(count) * n * n > MOST_ENTRIES or spent > MOST_MULTIPLICATIONS:
            raise Stuck
        self.spent = spent
