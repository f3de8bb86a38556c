r"""A network as a list of operations with sound rules, read from its ``torch.fx`` graph.

Bounds speak of differences of outputs, so biases and constants are left out. Batch norms in evaluation mode and input
normalisations are diagonal matrices; they are folded into the linear operation beside them where nothing else reads
what lies between. What has no sound rule raises :class:`~brittle.models.trace.NoRule` with its name. Rules and
proofs: theory page, section "Networks".
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from brittle.bounds.graph.calls import Context, argument
from brittle.bounds.graph.fold import fold
from brittle.bounds.graph.places import SPLITS, taken
from brittle.bounds.graph.rules import Concat, Input, Multiple, Op, Rule, Sum, spatial_axes
from brittle.bounds.graph.tables import AS_MODULES, SAME_MEMORY, function_rule, module_rule
from brittle.models.trace import NoRule, Trace, asks_for_size, trace_unless_given, where

CONSTANT, SIZE, PARTS = -1, -2, -3
"""In place of an operation's number: what a node yields does not depend on the input, is a size of a tensor, or is
several parts of one."""
FILLED = (torch.zeros_like, torch.ones_like, torch.full_like, "new_zeros", "new_ones", "new_full")
"""What yields a constant, whatever tensor it reads."""


def read_graph(
    model: nn.Module,
    input_shape: Sequence[int] | None,
    training: frozenset[nn.Module] = frozenset(),
    traced: Trace | NoRule | None = None,
) -> tuple[Op, ...]:
    """The operations of a network in the order of execution, folded; the first is the input, the last the output.

    Args:
        model: Any module that ``torch.fx`` can trace, in evaluation mode; only read.
        input_shape: Shape of one input without the batch axis, if known.
        training: Submodules that are in training mode outside this call: batch norms and dropout among them have no
            rule.
        traced: The network's trace, or the error that tracing raised; None: it is traced here.

    Raises:
        NoRule: With the name of an operation that has no sound rule.
        InputError: The model cannot run on ``input_shape``, or ``traced`` belongs to another model or shape.
    """
    return fold(read_operations(trace_unless_given(model, input_shape, traced), training))


def read_operations(traced: Trace, training: frozenset[nn.Module] = frozenset()) -> tuple[Op, ...]:
    """The operations that a network's output depends on, one for every node; none where it is constant.

    Args:
        traced: The network's trace.
        training: As for :func:`read_graph`.

    Raises:
        NoRule: With the name of an operation that has no sound rule.
    """
    reading = Reading(Context(traced, training), [], {})
    for node in traced.graph.graph.nodes:
        if node.op == "output":
            returned = node.args[0]
            if not isinstance(returned, fx.Node):
                raise NoRule(f"forward: expected one tensor as output; got {type(returned).__name__}")
            last = reading.place(returned)
            return () if last == CONSTANT else reading.needed_for(last)
        reading.places[node] = reading.read(node)
    raise NoRule("forward: nothing is returned")


def overwritten_by(node: fx.Node, graph: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes over whose results a node writes its own: if any, its first input and all in the same memory."""
    views = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten, nn.Unflatten)
    goes_on = _writes_in_place(node, graph)
    while goes_on:
        node = node.all_input_nodes[0]
        yield node
        if node.op in ("placeholder", "get_attr"):
            return
        if node.op == "call_module":
            goes_on = isinstance(graph.get_submodule(str(node.target)), views)
        else:
            goes_on = node.target in SAME_MEMORY
        goes_on = goes_on or _writes_in_place(node, graph)


def _writes_in_place(node: fx.Node, graph: fx.GraphModule) -> bool:
    """Whether a node writes its result over its first input."""
    if node.op not in ("call_module", "call_method", "call_function") or not node.all_input_nodes:
        return False
    if node.op == "call_module":
        return bool(getattr(graph.get_submodule(str(node.target)), "inplace", False))
    if isinstance(node.target, str):
        return node.target.endswith("_")
    in_place = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
    names: tuple[str, ...] = AS_MODULES[node.target][1] if node.target in AS_MODULES else ("inplace",)
    flagged = "inplace" in names and argument(node, 1 + names.index("inplace"), "inplace", False) is True
    return flagged or node.target in in_place or getattr(node.target, "__name__", "").endswith("_")


@dataclass(frozen=True, eq=False)
class Reading:
    """Operations read so far.

    Attributes:
        context: What a reader may have to know beside its node.
        ops: The operations, in the order of execution.
        places: Number of the operation that every node became, :data:`CONSTANT` or :data:`SIZE`.
    """

    context: Context
    ops: list[Op]
    places: dict[fx.Node, int]

    def read(self, node: fx.Node) -> int:
        """The number of the operation that a node becomes, appended where it is a new one, or CONSTANT or SIZE."""
        if node.op == "placeholder":
            return CONSTANT if self.ops else self.append(node, Input(), ())  # further arguments have their defaults
        read = [self.places[source] for source in node.all_input_nodes]
        if all(place == CONSTANT for place in read if place != SIZE) and (CONSTANT in read or not read):
            return CONSTANT
        if node.op != "call_module" and node.target in FILLED:
            return CONSTANT
        if asks_for_size(node) or all(place == SIZE for place in read):
            return SIZE
        if node.op != "call_module" and node.target in SPLITS:
            return PARTS
        # What is overwritten changes for everyone else who reads it.
        if any(len(written.users) > 1 for written in overwritten_by(node, self.context.traced.graph)):
            raise NoRule(f"{where(node)}: written in place of a tensor that is used elsewhere")
        rule: Rule | None
        if node.op != "call_module" and node.target in COMBINATIONS:
            rule, inputs = COMBINATIONS[node.target](node, self)
        else:
            rule = (module_rule if node.op == "call_module" else function_rule)(node, self.context)
            inputs = (self.place(node.all_input_nodes[0]),)
            if inputs == (CONSTANT,):
                raise NoRule(f"{where(node)}: a function of a constant whose arguments depend on the input")
        return inputs[0] if rule is None else self.append(node, rule, inputs)

    def append(self, node: fx.Node, rule: Rule, inputs: tuple[int, ...]) -> int:
        """The number of the new operation that a node becomes."""
        shape = node.meta.get("shape")
        op = Op(where(node), rule, inputs, shape, node.name)
        if shape is not None and shape[:1] != (1,):
            raise NoRule(f"{op.name}: moves entries into or out of the batch axis")
        axes, before = spatial_axes(rule, op), self.ops[inputs[0]].shape if len(inputs) == 1 else None
        if axes and before is not None and len(before) != axes + 2:
            raise NoRule(f"{op.name}: expected images with a channel axis")
        self.ops.append(op)
        return len(self.ops) - 1

    def place(self, node: fx.Node) -> int:
        """Number of the operation that yields a tensor, or CONSTANT."""
        if self.places[node] == SIZE:
            raise NoRule(f"{node.name}: a size is used as a number")
        if self.places[node] == PARTS:
            raise NoRule(f"{node.name}: parts of a tensor are used together")
        return self.places[node]

    def needed_for(self, last: int) -> tuple[Op, ...]:
        """The operations that one result depends on, renumbered, that result last."""
        needed = {last}
        for number in range(last, -1, -1):
            if number in needed:
                needed.update(self.ops[number].inputs)
        new = {number: position for position, number in enumerate(sorted(needed))}
        return tuple(replace(self.ops[n], inputs=tuple(new[i] for i in self.ops[n].inputs)) for n in new)


# --- operations of several tensors, or of a tensor and a number --------------------------------------------------


Combination = Callable[[fx.Node, Reading], tuple[Rule | None, tuple[int, ...]]]
"""A node to its rule and the operations it reads; None for one that changes nothing but adds a constant."""


def _add(node: fx.Node, reading: Reading) -> tuple[Rule | None, tuple[int, ...]]:
    """A sum or difference, of which constants are left out."""
    if node.kwargs or len(node.args) != 2:
        raise NoRule(f"{where(node)}: a sum with extra arguments")
    signs = (1, -1 if node.target in DIFFERENCES else 1)
    tensors = [(reading.place(arg), s) for arg, s in zip(node.args, signs, strict=True) if isinstance(arg, fx.Node)]
    terms = [(place, sign) for place, sign in tensors if place != CONSTANT]
    inputs = tuple(place for place, _ in terms)
    if len(tensors) == 1:  # the other term is a number; a tensor might spread this one over a larger result
        return (None if terms[0][1] == 1 else Multiple(-1.0)), inputs
    return Sum(tuple(sign for _, sign in terms)), inputs


def _concatenate(node: fx.Node, reading: Reading) -> tuple[Rule, tuple[int, ...]]:
    listed = node.args[0] if node.args else node.kwargs.get("tensors")
    axis = argument(node, 1, "dim", 0)
    if not isinstance(listed, tuple | list) or not isinstance(axis, int):
        raise NoRule(f"{where(node)}: a concatenation of an unknown number of tensors")
    parts = [part for part in listed if isinstance(part, fx.Node)]
    places = [reading.place(part) for part in parts]
    inputs = tuple(place for place in places if place != CONSTANT)
    if len(inputs) == len(places):
        return Concat(axis), inputs
    gaps = [0]
    for part, place in zip(parts, places, strict=True):
        shape = part.meta.get("shape")
        if place != CONSTANT:
            gaps.append(0)
        elif shape is None:
            raise NoRule(f"{where(node)}: a concatenation with a constant is bounded only for a known input_shape")
        else:
            gaps[-1] += shape[axis]
    return Concat(axis, tuple(gaps)), inputs


def _take(node: fx.Node, reading: Reading) -> tuple[Rule | None, tuple[int, ...]]:
    """A slice, or one of the parts of a tensor."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if reading.places[source] == PARTS:
        return taken(node), (reading.place(source.all_input_nodes[0]),)
    return taken(node), (reading.place(source),)


def _multiply(node: fx.Node, reading: Reading) -> tuple[Rule, tuple[int, ...]]:
    """A product or quotient with a number."""
    numbers = [arg for arg in node.args if isinstance(arg, int | float)]
    divides = node.target in QUOTIENTS
    if node.kwargs or len(numbers) != 1 or (divides and (node.args[1] is not numbers[0] or not numbers[0])):
        raise NoRule(f"{where(node)}: a product of tensors")
    factor = 1 / numbers[0] if divides else float(numbers[0])
    return Multiple(factor), (reading.place(node.all_input_nodes[0]),)


DIFFERENCES: tuple[Any, ...] = (operator.sub, operator.isub, torch.sub, "sub", "sub_")
QUOTIENTS: tuple[Any, ...] = (operator.truediv, torch.div, "div")
COMBINATIONS: Mapping[Any, Combination] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_", *DIFFERENCES), _add),
    **dict.fromkeys((torch.cat, torch.concat), _concatenate),
    operator.getitem: _take,
    **dict.fromkeys((operator.mul, torch.mul, "mul", *QUOTIENTS), _multiply),
}
