r"""A network as a list of operations with sound rules, read from its ``torch.fx`` graph.

Bounds speak of differences of outputs, so biases and constants are left out. Batch norms in evaluation mode and input
normalisations are diagonal matrices; they are folded into the linear operation beside them where nothing else reads
what lies between. What has no sound rule raises :class:`~brittle.models.trace.NoRule` with its name. Rules and
proofs: theory page, section "Networks".
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from brittle.linear.conv_geometry import ConvGeometry, conv_geometry, has_hooks, is_stock
from brittle.models.normalize import Normalize
from brittle.models.trace import NoRule, Trace, trace_unless_given, where

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Input:
    """The network's input."""


@dataclass(frozen=True, eq=False)
class Dense:
    """``W x`` on the last axis; W ``(out, in)``."""

    W: Tensor


@dataclass(frozen=True, eq=False)
class Conv:
    """A convolution; K ``(out, in / groups, *kernel)``."""

    K: Tensor
    geometry: ConvGeometry


@dataclass(frozen=True, eq=False)
class Scale:
    """A diagonal matrix with one factor ``(C,)`` a channel (axis 1), of either sign."""

    factors: Tensor


@dataclass(frozen=True, eq=False)
class Slope:
    """An elementwise function whose difference quotients lie in ``[low, high]``."""

    low: float
    high: float

    @property
    def steepest(self) -> float:
        """The function's Lipschitz constant, up to outward rounding."""
        return max(abs(self.low), abs(self.high))


@dataclass(frozen=True, eq=False)
class MaxPool:
    """Max pooling over ``axes`` spatial axes; ``overlap`` windows share one point (counted without borders)."""

    run: Run
    overlap: int
    axes: int


@dataclass(frozen=True, eq=False)
class Average:
    """A linear map with non-negative entries whose rows sum to at most 1.

    Attributes:
        run: The map itself, on tensors of a batch of one.
        norm: Upper bound of its l_2 norm; None where it is not known.
        why: What is missing when it is not known.
        stencil: Kernel size, stride and padding when it is a convolution with equal weights.
        everything: Whether it averages over all positions.
        axes: Spatial axes of the pooling; 0 for a mean over other axes, which may mix channels.
    """

    run: Run
    norm: float | None
    why: str = ""
    stencil: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None
    everything: bool = False
    axes: int = 0


@dataclass(frozen=True, eq=False)
class Rearrange:
    """A permutation of the entries, or one that adds zeros; ``flattens`` keeps their order."""

    run: Run | None
    flattens: bool = False


@dataclass(frozen=True, eq=False)
class Sum:
    """Inputs with the given signs, added."""

    signs: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Concat:
    """Inputs side by side."""

    axis: int


@dataclass(frozen=True, eq=False)
class Multiple:
    """``factor * x``."""

    factor: float


@dataclass(frozen=True, eq=False)
class Softmax:
    """Lipschitz constant 1/2 in l_2 and in l_inf."""


Rule = (
    Input | Dense | Conv | Scale | Slope | MaxPool | Average | Rearrange | Sum | Concat | Multiple | Softmax
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Op:
    """One operation.

    Attributes:
        name: The module's qualified name, or the function's with the module it stands in.
        rule: What it computes.
        inputs: Numbers of the operations it reads.
        shape: Shape of its result with a batch of one; None when the input's shape is not known.
    """

    name: str
    rule: Rule
    inputs: tuple[int, ...]
    shape: tuple[int, ...] | None


def read_graph(
    model: nn.Module,
    input_shape: Sequence[int] | None,
    training: frozenset[nn.Module] = frozenset(),
    traced: Trace | NoRule | None = None,
) -> tuple[Op, ...]:
    """The operations of a network in the order of execution; the first is the input, the last the output.

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
    return _fold(
        GraphReader(trace_unless_given(model, input_shape, traced).graph, training, model in training, []).read()
    )


def users(ops: Sequence[Op]) -> list[list[int]]:
    """For every operation those that read it, once for every reading."""
    read_by: list[list[int]] = [[] for _ in ops]
    for number, op in enumerate(ops):
        for source in op.inputs:
            read_by[source].append(number)
    return read_by


_CONSTANT, _SIZE = -1, -2


@dataclass(frozen=True)
class GraphReader:
    """One pass over a traced graph."""

    graph: fx.GraphModule
    training: frozenset[nn.Module]
    root_trains: bool
    ops: list[Op]

    def read(self) -> list[Op]:
        """All operations that the output needs, the output last."""
        number: dict[fx.Node, int] = {}
        inputs = [node for node in self.graph.graph.nodes if node.op == "placeholder"]
        for node in self.graph.graph.nodes:
            if node.op == "output":
                return self.finish(number, node.args[0])
            number[node] = self.visit(node, number, inputs)
        raise NoRule("forward: nothing is returned")

    def finish(self, number: dict[fx.Node, int], returned: Any) -> list[Op]:
        if not isinstance(returned, fx.Node):
            raise NoRule(f"forward: expected one tensor as output; got {type(returned).__name__}")
        last = self.live(number, returned)
        if last == _CONSTANT:
            return []
        return _needed(self.ops, last)

    def live(self, number: dict[fx.Node, int], node: fx.Node) -> int:
        if number[node] == _SIZE:
            raise NoRule(f"{node.name}: a size is used as a number")
        return number[node]

    def visit(self, node: fx.Node, number: dict[fx.Node, int], inputs: list[fx.Node]) -> int:
        """Number of the operation that a node became, or that it is a constant or a size."""
        if node.op == "placeholder":
            return self.add(node, Input(), ()) if node is inputs[0] else _CONSTANT
        if node.op == "get_attr":
            return _CONSTANT
        sources = node.all_input_nodes
        known = [number[source] for source in sources if number[source] != _SIZE]
        if not sources or (known and all(n == _CONSTANT for n in known)):
            return _CONSTANT
        if _reads_a_size(node) or not known:
            return _SIZE
        self.refuse_aliasing(node)
        combined = self.combination(node, number) if node.op != "call_module" else None
        if combined is not None:
            return combined
        rule = self.module_rule(node) if node.op == "call_module" else self.function_rule(node)
        source = self.live(number, sources[0])
        if rule is None:
            return source
        return self.add(node, rule, (source,))

    def add(self, node: fx.Node, rule: Rule, inputs: tuple[int, ...]) -> int:
        name = str(node.target) if node.op == "call_module" else where(node)
        shape = node.meta.get("shape")
        if shape is not None and shape[:1] != (1,):
            raise NoRule(f"{name}: moves entries into or out of the batch axis")
        spatial = len(inputs) == 1 and self.ops[inputs[0]].shape is not None and _spatial_axes(rule)
        if spatial and len(self.ops[inputs[0]].shape or ()) != spatial + 2:
            raise NoRule(f"{name}: expected images with a channel axis")
        self.ops.append(Op(name, rule, inputs, shape))
        return len(self.ops) - 1

    def combination(self, node: fx.Node, number: dict[fx.Node, int]) -> int | None:
        """Sums, concatenations and multiples; None for any other node."""
        target = node.target
        if target in _SUMS:
            if node.kwargs or len(node.args) != 2:
                raise NoRule(f"{where(node)}: a sum with extra arguments")
            sign = -1 if target in _DIFFERENCES else 1
            terms = [(arg, s) for arg, s in zip(node.args, (1, sign), strict=True) if isinstance(arg, fx.Node)]
            live = [(self.live(number, term), s) for term, s in terms]
            live = [(n, s) for n, s in live if n != _CONSTANT]
            if len(terms) == 1:  # the other term is a number
                return live[0][0] if live[0][1] == 1 else self.add(node, Multiple(-1.0), (live[0][0],))
            return self.add(node, Sum(tuple(s for _, s in live)), tuple(n for n, _ in live))
        if target in (torch.cat, torch.concat):
            listed = node.args[0] if node.args else node.kwargs.get("tensors")
            axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            if not isinstance(listed, tuple | list) or not isinstance(axis, int):
                raise NoRule(f"{where(node)}: a concatenation of an unknown number of tensors")
            parts = [self.live(number, part) for part in listed if isinstance(part, fx.Node)]
            if _CONSTANT in parts:
                raise NoRule(f"{where(node)}: a concatenation with a constant")
            return self.add(node, Concat(axis), tuple(parts))
        if target in (operator.mul, operator.truediv, torch.mul, torch.div, "mul", "div"):
            scale = [arg for arg in node.args if isinstance(arg, int | float)]
            divides = target in (operator.truediv, torch.div, "div")
            if node.kwargs or len(scale) != 1 or (divides and (node.args[1] is not scale[0] or not scale[0])):
                raise NoRule(f"{where(node)}: a product of tensors")
            factor = 1 / scale[0] if divides else float(scale[0])
            return self.add(node, Multiple(factor), (self.live(number, node.all_input_nodes[0]),))
        return None

    def refuse_aliasing(self, node: fx.Node) -> None:
        """What is written over its first input changes that input for everyone else who reads it."""
        if not self.in_place(node):
            return
        written = node.all_input_nodes[0]
        while True:
            if len(written.users) > 1:
                raise NoRule(f"{where(node)}: written in place of a tensor that is used elsewhere")
            if not self.shares_memory(written):
                return
            written = written.all_input_nodes[0]

    def shares_memory(self, node: fx.Node) -> bool:
        """Whether a result may lie in the memory of the node's first input."""
        if node.op == "call_module":
            views = (*_IDENTITIES, nn.Flatten, nn.Unflatten)
            return isinstance(self.graph.get_submodule(str(node.target)), views) or self.in_place(node)
        return node.op != "placeholder" and (node.target in _REARRANGING or self.in_place(node))

    def in_place(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self.graph.get_submodule(str(node.target)), "inplace", False))
        if isinstance(node.target, str):
            return node.target.endswith("_")
        in_place = (operator.iadd, operator.isub, operator.imul, operator.itruediv, torch.relu_)
        return node.target in in_place or _argument(node, 1, "inplace", False) is True

    def function_rule(self, node: fx.Node) -> Rule | None:
        """Rule of a function or method; None where it changes nothing."""
        target = node.target
        if target in _UNCHANGED:
            return None
        if target in _REARRANGING:
            return _rearrangement(node)
        if target in _FUNCTIONS:
            return _FUNCTIONS[target]
        if target in _POOLING:
            return self.pooling(node)
        if target in (F.dropout, F.dropout2d) and _argument(node, 2, "training", True) is False:
            if self.owner_trains(node):
                raise NoRule(f"{where(node)}: dropout in training mode; call model.eval() first")
            return None
        if target in (torch.mean, "mean"):
            return self.mean(node)
        if target is F.batch_norm:
            return self.functional_batch_norm(node)
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        raise NoRule(f"{where(node)}: no sound rule for {name}")

    def pooling(self, node: fx.Node) -> Rule | None:
        """Functional pooling, through the module of the same arguments."""
        kind, names = _POOLING[node.target]
        values = dict(zip(names, node.args[1:], strict=False)) | {k: v for k, v in node.kwargs.items() if k in names}
        if any(isinstance(leaf, fx.Node) for value in values.values() for leaf in _leaves(value)):
            raise NoRule(f"{where(node)}: pooling whose window depends on the input")
        return self.stock_rule(where(node), kind(**values), node)

    def functional_batch_norm(self, node: fx.Node) -> Rule:
        """``F.batch_norm`` of a module's own statistics, as timm's batch norms with an activation call it."""
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        call = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        if call.get("training", False) is not False or self.owner_trains(node):
            raise NoRule(f"{where(node)}: batch norm that uses the batch's statistics; call model.eval() first")
        variance, weight = call.get("running_var"), call.get("weight")
        if not all(isinstance(t, fx.Node) and t.op == "get_attr" for t in (variance, weight)):
            raise NoRule(f"{where(node)}: batch norm of statistics that are not buffers")
        scale = (self.attribute(variance) + _number(call.get("eps", 1e-5))).rsqrt()
        return Scale(scale * self.attribute(weight))

    def owner_trains(self, node: fx.Node) -> bool:
        """Whether the module that a function stands in is in training mode outside this call."""
        stack = node.meta.get("nn_module_stack")
        owner = next(reversed(stack.values()))[0] if stack else ""
        return self.graph.get_submodule(owner) in self.training if owner else self.root_trains

    def attribute(self, node: Any) -> Tensor:
        value = operator.attrgetter(str(node.target))(self.graph)
        assert isinstance(value, Tensor)
        return value.detach().double().cpu()

    def mean(self, node: fx.Node) -> Rule:
        """The mean over all spatial axes."""
        shape = node.all_input_nodes[0].meta.get("shape")
        axes = _argument(node, 1, "dim", None)
        keep = bool(_argument(node, 2, "keepdim", False))
        if shape is None or axes is None or any(isinstance(leaf, fx.Node) for leaf in _leaves(axes)):
            raise NoRule(f"{where(node)}: a mean is bounded only over given axes of a known input_shape")
        reduced = sorted(axis % len(shape) for axis in _leaves(axes))
        if 0 in reduced:
            raise NoRule(f"{where(node)}: a mean over the batch")
        everything = reduced == list(range(2, len(shape)))
        norm = math.prod(shape[axis] for axis in reduced) ** -0.5
        return Average(
            lambda d: d.mean(reduced, keepdim=keep), norm, everything=everything, axes=everything * len(reduced)
        )

    def module_rule(self, node: fx.Node) -> Rule | None:
        """Rule of a module; None where it changes nothing."""
        module, name = self.graph.get_submodule(str(node.target)), str(node.target)
        if has_hooks(module):
            raise NoRule(f"{name}: {type(module).__name__} with forward hooks")
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            geometry = conv_geometry(module)
            if geometry is None:
                raise NoRule(f"{name}: {type(module).__name__} has a forward that is not understood")
            return Conv(_weight(module), geometry)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return Scale(self.batch_norm_scale(name, module))
        if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d) and module in self.training:
            raise NoRule(f"{name}: dropout in training mode; call model.eval() first")
        return self.stock_rule(name, module, node)

    def stock_rule(self, name: str, module: nn.Module, node: fx.Node) -> Rule | None:
        """Rule of one of torch's own modules."""
        if is_stock(module, nn.Linear):
            return Dense(_weight(module))
        if isinstance(module, Normalize):
            return Scale(1 / module.std.detach().double().cpu())
        if isinstance(module, nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d):
            return _max_pool(name, module)
        if isinstance(module, nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d):
            return _average_pool(name, module)
        if isinstance(module, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d | nn.AdaptiveAvgPool3d):
            shape = node.all_input_nodes[0].meta.get("shape")
            return _adaptive_pool(module, None if shape is None else tuple(shape[2:]))
        if isinstance(module, _IDENTITIES):
            return None
        if is_stock(module, nn.Flatten) or is_stock(module, nn.Unflatten) or is_stock(module, nn.ZeroPad2d):
            return Rearrange(module, flattens=isinstance(module, nn.Flatten))
        if is_stock(module, nn.Softmax):
            return Softmax()
        for kind, slopes in _SLOPES:
            if is_stock(module, kind):
                return _checked(name, module, *slopes(module))
        raise NoRule(f"{name}: no sound rule for {type(module).__name__}")

    def batch_norm_scale(self, name: str, module: nn.Module) -> Tensor:
        """``gamma / sqrt(var + eps)`` per channel, in float64."""
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        if module in self.training or module.running_var is None:
            raise NoRule(f"{name}: batch norm that uses the batch's statistics; call model.eval() first")
        scale = (module.running_var.detach().double().cpu() + module.eps).rsqrt()
        return scale if module.weight is None else scale * module.weight.detach().double().cpu()


def _needed(ops: Sequence[Op], last: int) -> list[Op]:
    """The operations that one result depends on, renumbered, that result last."""
    wanted = {last}
    for number in range(last, -1, -1):
        if number in wanted:
            wanted.update(ops[number].inputs)
    kept = sorted(wanted)
    place = {number: position for position, number in enumerate(kept)}
    return [replace(ops[n], inputs=tuple(place[i] for i in ops[n].inputs)) for n in kept]


def _fold(ops: list[Op]) -> tuple[Op, ...]:
    """Merge diagonal matrices and dense layers into the linear operation beside them."""
    number = 0
    while number < len(ops):
        merged = _merge(ops, number)
        if merged is None:
            number += 1
        else:
            ops = merged
    return tuple(ops)


def _merge(ops: list[Op], number: int) -> list[Op] | None:
    """The list with this operation merged into the one it alone reads, if they merge."""
    op = ops[number]
    if not isinstance(op.rule, Dense | Conv | Scale) or len(users(ops)[op.inputs[0]]) > 1:
        return None
    before = ops[op.inputs[0]]
    rule = _product(op, before)
    if rule is None and isinstance(before.rule, Rearrange):  # a diagonal matrix moves past a flattening
        return _merge_past(ops, number)
    if rule is None:
        return None
    name = before.name if not isinstance(before.rule, Scale) else op.name
    joined = Op(name, rule, before.inputs, op.shape)
    return _without([*ops[:number], joined, *ops[number + 1 :]], op.inputs[0])


def _merge_past(ops: list[Op], number: int) -> list[Op] | None:
    op, flat = ops[number], ops[ops[number].inputs[0]]
    scale = ops[flat.inputs[0]]
    fits = isinstance(op.rule, Dense) and isinstance(scale.rule, Scale) and isinstance(flat.rule, Rearrange)
    single = len(users(ops)[flat.inputs[0]]) == 1 and flat.shape is not None and len(flat.shape) == 2
    if not fits or not single or flat.rule.run is None or scale.shape is None:  # type: ignore[union-attr]
        return None
    factors = scale.rule.factors.view(1, -1, *[1] * (len(scale.shape) - 2)).expand(scale.shape)  # type: ignore[union-attr]
    columns = flat.rule.run(factors)[0]  # type: ignore[union-attr]
    ops = list(ops)
    ops[number] = replace(op, rule=Dense(op.rule.W.double() * columns))  # type: ignore[union-attr]
    return _without(ops, flat.inputs[0])


def _without(ops: list[Op], gone: int) -> list[Op]:
    """The list without one operation; who read it reads what it read."""
    source = ops[gone].inputs[0]

    def moved(number: int) -> int:
        number = source if number == gone else number
        return number - (number > gone)

    return [replace(op, inputs=tuple(map(moved, op.inputs))) for n, op in enumerate(ops) if n != gone]


def _product(op: Op, before: Op) -> Rule | None:
    """The rule of ``op`` after ``before``, if it is one of the linear rules."""
    rule, first = op.rule, before.rule
    if isinstance(rule, Dense) and isinstance(first, Dense):
        return Dense(rule.W.double() @ first.W.double())
    if isinstance(rule, Scale) and isinstance(first, Conv):
        return Conv(rule.factors.view(-1, *[1] * (first.K.ndim - 1)) * first.K.double(), first.geometry)
    if isinstance(rule, Scale) and isinstance(first, Scale):
        return Scale(rule.factors * first.factors)
    flat = before.shape is not None and len(before.shape) == 2
    if isinstance(rule, Scale) and isinstance(first, Dense) and flat:
        return Dense(rule.factors[:, None] * first.W.double())
    if isinstance(rule, Dense) and isinstance(first, Scale) and flat:
        return Dense(rule.W.double() * first.factors)
    if isinstance(rule, Conv) and isinstance(first, Scale):
        groups = rule.geometry.groups
        columns = first.factors.view(groups, 1, -1, *[1] * (rule.K.ndim - 2))
        K = rule.K.double().unflatten(0, (groups, -1)) * columns
        return Conv(K.flatten(0, 1), rule.geometry)
    return None


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().cpu()


def _spatial_axes(rule: Rule) -> int:
    """How many spatial axes an operation on images has; 0 for other operations."""
    if isinstance(rule, Conv):
        return rule.K.ndim - 2
    return rule.axes if isinstance(rule, MaxPool | Average) else 0


def _number(value: Any) -> float:
    return float(value)


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _leaves(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value]


def _axes(module: nn.Module) -> int:
    return int(type(module).__name__[-2])


def _each(value: Any, axes: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (int(value),) * axes


def _max_pool(name: str, module: nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d) -> MaxPool:
    """A point lies in ``ceil(k g / s)`` windows per axis, g = gcd(dilation, stride)."""
    if module.return_indices:
        raise NoRule(f"{name}: max pooling that returns indices")
    axes = _axes(module)
    kernel, stride = _each(module.kernel_size, axes), _each(module.stride, axes)
    gaps = [math.gcd(d, s) for d, s in zip(_each(module.dilation, axes), stride, strict=True)]
    overlap = math.prod(-(-k * g // s) for k, g, s in zip(kernel, gaps, stride, strict=True))
    return MaxPool(module, overlap, axes)


def _average_pool(name: str, module: nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d) -> Average:
    """l_2: ``sqrt(overlap / window)``, from ``sqrt(||A||_1 ||A||_inf)``."""
    axes = _axes(module)
    kernel, stride, padding = (_each(v, axes) for v in (module.kernel_size, module.stride, module.padding))
    if getattr(module, "divisor_override", None):
        raise NoRule(f"{name}: average pooling with windows of unequal weight")
    if module.ceil_mode or (any(padding) and not module.count_include_pad):
        return Average(module, None, "average pooling with windows of unequal weight", axes=axes)
    shared = math.prod(-(-k // s) for k, s in zip(kernel, stride, strict=True))
    return Average(module, math.sqrt(shared / math.prod(kernel)), stencil=(kernel, stride, padding), axes=axes)


def _adaptive_pool(module: Any, size: tuple[int, ...] | None) -> Average:
    """l_2: the product of the axes' norms, for a known size."""
    axes = _axes(module)
    outs = module.output_size if isinstance(module.output_size, tuple | list) else [module.output_size] * axes
    everything = list(outs) == [1] * axes
    if size is None:
        why = f"{type(module).__name__} is bounded only for a known input_shape"
        return Average(module, 1.0 if everything else None, why, everything=everything, axes=axes)
    norms = [averaging_norm(n, m if isinstance(m, int) else n) for n, m in zip(size, outs, strict=True)]
    return Average(module, math.prod(norms), everything=everything, axes=axes)


def averaging_norm(n: int, m: int) -> float:
    """Spectral norm of adaptive average pooling from n to m points along one axis; exact."""
    if m == 1:
        return n**-0.5
    A = F.adaptive_avg_pool1d(torch.eye(n, dtype=torch.float64)[None], m)[0]
    return float(torch.linalg.matrix_norm(A, 2)) * (1 + 1e-12 * n)


def _rearrangement(node: fx.Node) -> Rearrange:
    """What a rearranging function does to a tensor of the recorded shape."""
    shape = node.meta.get("shape")
    flattens = node.target in (torch.flatten, torch.reshape, "flatten", "reshape", "view", torch.squeeze, "squeeze")
    flattens = flattens or node.target in (torch.unsqueeze, "unsqueeze")
    if shape is None:
        return Rearrange(None)
    if flattens:
        return Rearrange(lambda d: d.reshape(shape), flattens=True)
    rest, options = node.args[1:], dict(node.kwargs)
    if any(isinstance(leaf, fx.Node) for value in (*rest, *options.values()) for leaf in _leaves(value)):
        return Rearrange(None)
    target = node.target
    function = getattr(Tensor, target) if isinstance(target, str) else target
    return Rearrange(lambda d: function(d, *rest, **options))


def _reads_a_size(node: fx.Node) -> bool:
    return (node.op == "call_method" and node.target in ("size", "dim")) or (
        node.target is getattr and node.args[1] in ("shape", "ndim", "device", "dtype")
    )


def _checked(name: str, module: nn.Module, low: float, high: float) -> Slope:
    if isinstance(module, nn.Softplus) and module.threshold < 20:
        raise NoRule(f"{name}: softplus with a low threshold jumps")
    return Slope(low, high)


def _prelu(module: nn.PReLU) -> tuple[float, float]:
    slopes = module.weight.detach()
    return min(1.0, float(slopes.min())), max(1.0, float(slopes.max()))


_SUMS: frozenset[Any] = frozenset({
    operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub, "add", "add_", "sub", "sub_",
})  # fmt: skip
_DIFFERENCES: frozenset[Any] = frozenset({operator.sub, operator.isub, torch.sub, "sub", "sub_"})
_UNCHANGED: frozenset[Any] = frozenset({"contiguous", "clone"})
_REARRANGING: frozenset[Any] = frozenset({
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze,
    "flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "clone",
})  # fmt: skip
_RELU, _SIGMOID = Slope(0.0, 1.0), Slope(0.0, 0.25)
_FUNCTIONS: dict[Any, Rule] = {
    F.relu: _RELU, torch.relu: _RELU, "relu": _RELU, "relu_": _RELU, torch.relu_: _RELU, F.relu6: _RELU,
    torch.tanh: _RELU, "tanh": _RELU, F.tanh: _RELU, torch.sigmoid: _SIGMOID, "sigmoid": _SIGMOID,
    F.sigmoid: _SIGMOID, F.silu: Slope(-0.0999, 1.0999), F.hardswish: Slope(-0.5, 1.5),
    F.gelu: Slope(-0.13, 1.13), F.mish: Slope(-0.1127, 1.0887),
}  # fmt: skip
_WINDOW = ("kernel_size", "stride", "padding")
_POOLING: dict[Any, tuple[Any, tuple[str, ...]]] = {
    F.max_pool1d: (nn.MaxPool1d, (*_WINDOW, "dilation", "ceil_mode")),
    F.max_pool2d: (nn.MaxPool2d, (*_WINDOW, "dilation", "ceil_mode")),
    torch.max_pool2d: (nn.MaxPool2d, (*_WINDOW, "dilation", "ceil_mode")),
    F.avg_pool1d: (nn.AvgPool1d, (*_WINDOW, "ceil_mode", "count_include_pad")),
    F.avg_pool2d: (nn.AvgPool2d, (*_WINDOW, "ceil_mode", "count_include_pad", "divisor_override")),
    F.adaptive_avg_pool1d: (nn.AdaptiveAvgPool1d, ("output_size",)),
    F.adaptive_avg_pool2d: (nn.AdaptiveAvgPool2d, ("output_size",)),
}
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_SLOPES: list[tuple[type[nn.Module], Callable[[Any], tuple[float, float]]]] = [
    (nn.ReLU, lambda m: (0.0, 1.0)), (nn.ReLU6, lambda m: (0.0, 1.0)), (nn.Tanh, lambda m: (0.0, 1.0)),
    (nn.Hardtanh, lambda m: (0.0, 1.0)), (nn.Softplus, lambda m: (0.0, 1.0)), (nn.Softsign, lambda m: (0.0, 1.0)),
    (nn.Sigmoid, lambda m: (0.0, 0.25)), (nn.LogSigmoid, lambda m: (0.0, 1.0)),
    (nn.Hardsigmoid, lambda m: (0.0, 1 / 6)),
    (nn.LeakyReLU, lambda m: (min(1.0, m.negative_slope), max(1.0, m.negative_slope))),
    (nn.ELU, lambda m: (min(0.0, m.alpha), max(1.0, m.alpha))),
    (nn.PReLU, _prelu),
    (nn.GELU, lambda m: (-0.13, 1.13)), (nn.SiLU, lambda m: (-0.0999, 1.0999)),
    (nn.Mish, lambda m: (-0.1127, 1.0887)), (nn.Hardswish, lambda m: (-0.5, 1.5)),
]  # fmt: skip
