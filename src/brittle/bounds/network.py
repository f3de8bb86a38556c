r"""Certified upper bounds of a whole network's Lipschitz constant, by composing sound rules over its graph.

The module is traced (``torch.fx``); every operation gets a factor that bounds its own Lipschitz constant, factors
multiply along a chain, add at a sum and combine at a concatenation. An operation without a sound rule makes the
whole bound unavailable, and its name is returned instead. Rules and proofs: theory page, section "Networks".
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from brittle.convolution import bounds_of
from brittle.errors import InputError
from brittle.frozen import frozen
from brittle.geometry import conv_geometry, has_hooks, is_stock
from brittle.models import Normalize
from brittle.norms import ROUNDING, check_attack_norm
from brittle.norms import operator_norm as dense_norm


@dataclass(frozen=True)
class NetworkBound:
    """An upper bound of ``sup ||f(x) - f(y)||_p / ||x - y||_p`` over all inputs, or why there is none.

    Attributes:
        p: The norm on both sides: 2 or inf.
        upper: Certified upper bound; None when some operation has no sound rule.
        unavailable: That operation's name and the reason; None when there is a bound.
        factors: Name and factor of every operation that stretches or shrinks, in the order of execution; norms
            of layers that were merged (a batch norm folded, two dense layers in a row) stand under the first name.
    """

    p: float
    upper: float | None
    unavailable: str | None
    factors: tuple[tuple[str, float], ...]


class _NoRule(Exception):
    """Raised inside the walk with the name of the operation that has no sound rule, and the reason."""


def lipschitz_upper_bound(model: nn.Module, p: float, *, input_shape: Sequence[int] | None = None) -> NetworkBound:
    r"""Product-of-norms upper bound of a network's Lipschitz constant from input to output, in evaluation mode.

    Along a chain ``prod_l ||W_l||_p`` with true operator norms (convolutions: certified upper bounds), batch
    norms folded into the layer before them, dense layers without an activation between them multiplied out. Sums
    add, concatenations take the maximum (p = inf) or the root of the sum of squares (p = 2).

    Args:
        model: Any module that ``torch.fx`` can trace; only read.
        p: 2 or inf.
        input_shape: Shape of one input without the batch axis. Without it convolutions are bounded for images of
            any size, which is looser.

    Returns:
        The bound, or the name of the operation for which there is no sound rule: attention, layer norm, batch norm
        or dropout in training mode, and everything unknown. Never a guess.

    Raises:
        InputError: ``p`` is neither 2 nor inf, or the model cannot run on ``input_shape``.

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> _ = net[0].weight.data.copy_(torch.eye(2)), net[2].weight.data.fill_(1.0)
    >>> round(lipschitz_upper_bound(net, math.inf).upper, 6)
    2.0
    """
    p = check_attack_norm(p)
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    training = frozenset(module for module in model.modules() if module.training)
    factors: list[tuple[str, float]] = []
    try:
        with frozen(model):
            _check_finite(model)
            upper = _Walk(_trace(model, input_shape), p, training, factors).run()
    except _NoRule as error:
        return NetworkBound(p, None, str(error), ())
    return NetworkBound(p, upper * (1 + 1e-12), None, tuple(factors))


class _Tracer(fx.Tracer):
    """Stops at every module that has a rule of its own, and looks into all others."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) and conv_geometry(m) is not None
        return known or isinstance(m, Normalize) or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module, input_shape: Sequence[int] | None) -> fx.GraphModule:
    if any(True for _ in model.children()) is False and type(model).__module__.startswith("torch.nn"):
        model = nn.Sequential(model)
    try:
        traced = fx.GraphModule(model, _Tracer().trace(model))
    except Exception as error:  # tracing runs the user's forward, which may raise anything
        raise _NoRule(f"{type(model).__name__}: forward cannot be traced ({_first_line(error)})") from None
    if input_shape is not None:
        _record_shapes(traced, model, input_shape)
    return traced


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:120]


def _record_shapes(traced: fx.GraphModule, model: nn.Module, input_shape: Sequence[int]) -> None:
    """Run once on zeros, writing every tensor's shape into its node's ``meta``."""

    class Shapes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                n.meta["shape"] = tuple(result.shape)
            return result

    like = next((t for t in model.parameters() if t.is_floating_point()), torch.zeros(()))
    try:
        with torch.no_grad():
            Shapes(traced).run(torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device))
    except Exception as error:  # the user's forward may raise anything
        reason = _first_line(error)
        raise InputError(f"input_shape: the model cannot run on shape {tuple(input_shape)}: {reason}") from None


@dataclass(frozen=True)
class _Walk:
    """One pass over a traced graph: the Lipschitz constant, from the input, of every node."""

    graph: fx.GraphModule
    p: float
    training: frozenset[nn.Module]
    factors: list[tuple[str, float]]

    def run(self) -> float:
        """The constant of the output."""
        values: dict[fx.Node, float | None] = {}
        merged: set[fx.Node] = set()
        inputs = [node for node in self.graph.graph.nodes if node.op == "placeholder"]
        for node in self.graph.graph.nodes:
            if node.op == "output":
                return self.value(values, node.args[0])
            values[node] = self.visit(node, values, merged, inputs)
        raise _NoRule("forward: nothing is returned")

    def value(self, values: dict[fx.Node, float | None], argument: Any) -> float:
        """The constant of one node; sizes have none."""
        if not isinstance(argument, fx.Node):
            raise _NoRule(f"forward: expected one tensor as output; got {type(argument).__name__}")
        value = values[argument]
        if value is None:
            raise _NoRule(f"{argument.name}: a size is used as a number")
        return value

    def visit(
        self,
        node: fx.Node,
        values: dict[fx.Node, float | None],
        merged: set[fx.Node],
        inputs: list[fx.Node],
    ) -> float | None:
        """The constant of one node from those of its inputs: 0 for constants, None for sizes."""
        if node.op == "placeholder":
            return 1.0 if node is inputs[0] else 0.0
        if node.op == "get_attr":
            return 0.0  # a constant
        sources = node.all_input_nodes
        known = [values[source] for source in sources if values[source] is not None]
        if not sources or (known and not any(known)):
            return 0.0  # made of constants and sizes only
        if _reads_a_size(node) or not known:
            return None
        self.refuse_aliasing(node)
        if node in merged:
            return self.value(values, sources[0])
        if node.op == "call_module":
            factor = self.module_factor(node, merged)
        else:
            combined = self.combination(node, values)
            if combined is not None:
                return combined
            factor = self.function_factor(node)
        if factor != 1.0:
            self.factors.append((str(node.target) if node.op == "call_module" else node.name, factor))
        return factor * self.value(values, sources[0])

    def combination(self, node: fx.Node, values: dict[fx.Node, float | None]) -> float | None:
        """Sums and concatenations; None for any other node."""
        target = node.target
        if target in (operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub, "add", "add_"):
            if node.kwargs or len(node.args) != 2:
                raise _NoRule(f"{_where(node)}: a sum with extra arguments")
            terms = [arg for arg in node.args if isinstance(arg, fx.Node)]
            if len(terms) > 1 and self.p == 2:
                self.refuse_broadcasting(node, [term for term in terms if values[term] != 0.0])
            return sum(self.value(values, term) for term in terms)
        if target in (torch.cat, torch.concat):
            listed = node.args[0]
            if not isinstance(listed, tuple | list):
                raise _NoRule(f"{_where(node)}: a concatenation of an unknown number of tensors")
            parts = [self.value(values, part) for part in listed]
            return max(parts) if math.isinf(self.p) else math.hypot(*parts)
        if target in (operator.mul, operator.truediv, torch.mul, "mul", "div"):
            scale = [arg for arg in node.args if isinstance(arg, int | float)]
            divides = target in (operator.truediv, "div")
            if node.kwargs or len(scale) != 1 or (divides and (node.args[1] is not scale[0] or not scale[0])):
                raise _NoRule(f"{_where(node)}: a product of tensors")
            return (1 / abs(scale[0]) if divides else abs(scale[0])) * self.value(values, node.all_input_nodes[0])
        return None

    def refuse_aliasing(self, node: fx.Node) -> None:
        """A sum written over its first term changes that term for everyone else who reads it."""
        if node.target not in (operator.iadd, operator.isub, "add_", "sub_"):
            return
        written = node.all_input_nodes[0]
        while True:
            if len(written.users) > 1:
                raise _NoRule(f"{_where(node)}: a sum in place of a tensor that is used elsewhere")
            if written.op == "placeholder" or not (written.op == "call_module" or written.target in _REARRANGING):
                return
            written = written.all_input_nodes[0]

    def refuse_broadcasting(self, node: fx.Node, live: list[fx.Node]) -> None:
        """A term that is spread over a larger result counts more than once; terms of the result's shape add up."""
        shapes = [term.meta.get("shape") for term in (node, *live)]
        if None in shapes:
            raise _NoRule(f"{_where(node)}: a sum is bounded only for a known input_shape")
        if len(set(shapes)) > 1:
            raise _NoRule(f"{_where(node)}: a sum of tensors of different shapes")

    def function_factor(self, node: fx.Node) -> float:
        """Upper bound of a function's or method's own constant."""
        target = node.target
        if target in _REARRANGING:
            return 1.0
        if target in _FUNCTIONS:
            return _FUNCTIONS[target](node)
        if target in _POOLING:
            raise _NoRule(f"{_where(node)}: functional pooling has no rule; use the module")
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        raise _NoRule(f"{_where(node)}: no sound rule for {name}")

    def module_factor(self, node: fx.Node, merged: set[fx.Node]) -> float:
        """Upper bound of a module's own constant; notes in ``merged`` what it already contains."""
        module = self.graph.get_submodule(str(node.target))
        name = str(node.target)
        if has_hooks(module):
            raise _NoRule(f"{name}: {type(module).__name__} with forward hooks")
        if is_stock(module, nn.Linear):
            return self.dense_factor(node, module, merged)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return self.conv_factor(node, module, merged)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return float(self.batch_norm_scale(name, module).abs().max())
        if isinstance(module, Normalize):
            return float((1 / module.std.double()).max())
        if isinstance(module, nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d | nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d):
            return _pool_factor(name, module, self.p, _axes(module))
        if isinstance(module, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d | nn.AdaptiveAvgPool3d):
            return self.adaptive_factor(node, module)
        if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d) and module in self.training:
            raise _NoRule(f"{name}: dropout in training mode; call model.eval() first")
        for kind, slope in _MODULES:
            if is_stock(module, kind):
                return slope(module)
        raise _NoRule(f"{name}: no sound rule for {type(module).__name__}")

    def dense_factor(self, node: fx.Node, module: nn.Module, merged: set[fx.Node]) -> float:
        """Norm of a dense layer with what follows it linearly: further dense layers, a batch norm."""
        W = _weight(module)
        while (follower := self.follower(node)) is not None:
            following = self.graph.get_submodule(str(follower.target))
            if is_stock(following, nn.Linear):
                W = _weight(following) @ W
            elif is_stock(following, nn.BatchNorm1d) and len(node.meta.get("shape", ())) == 2:
                W = self.batch_norm_scale(str(follower.target), following)[:, None] * W
            else:
                break
            merged.add(follower)
            node = follower
        return float(dense_norm(W, self.p)) * (1 + ROUNDING * max(W.shape))

    def conv_factor(self, node: fx.Node, module: nn.Module, merged: set[fx.Node]) -> float:
        """Upper bound of a convolution's operator norm, with the batch norm that alone follows it folded in."""
        geometry = conv_geometry(module)
        if geometry is None:
            raise _NoRule(f"{node.target}: {type(module).__name__} has a forward that is not understood")
        K = _weight(module)
        follower = self.follower(node)
        if follower is not None:
            following = self.graph.get_submodule(str(follower.target))
            if isinstance(following, nn.modules.batchnorm._BatchNorm):
                scale = self.batch_norm_scale(str(follower.target), following)
                K = scale.view(-1, *[1] * (K.ndim - 1)) * K
                merged.add(follower)
        upper = bounds_of(K, geometry, self.p, self.input_size(node), search=False).upper
        if math.isinf(upper):
            raise _NoRule(f"{node.target}: {geometry.mode} padding is bounded only for a known input_shape")
        return upper

    def batch_norm_scale(self, name: str, module: nn.Module) -> Tensor:
        """``gamma / sqrt(var + eps)`` per channel, in float64."""
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        if module in self.training or module.running_var is None:
            raise _NoRule(f"{name}: batch norm that uses the batch's statistics; call model.eval() first")
        scale = (module.running_var.detach().double().cpu() + module.eps).rsqrt()
        return scale if module.weight is None else scale * module.weight.detach().double().cpu()

    def adaptive_factor(self, node: fx.Node, module: nn.Module) -> float:
        """Adaptive average pooling: 1 in l_inf; in l_2 the product of the axes' exact norms, for a known size."""
        if math.isinf(self.p):
            return 1.0
        size = self.input_size(node)
        axes = _axes(module)
        out = module.output_size
        outs = list(out) if isinstance(out, tuple | list) else [out] * axes
        if size is None and outs == [1] * axes:
            return 1.0  # averages over an unknown number of points
        if size is None:
            raise _NoRule(f"{node.target}: {type(module).__name__} is bounded only for a known input_shape")
        norms = [_averaging_norm(n, m if isinstance(m, int) else n) for n, m in zip(size, outs, strict=True)]
        return math.prod(norms)

    def input_size(self, node: fx.Node) -> tuple[int, ...] | None:
        shape = node.all_input_nodes[0].meta.get("shape")
        return None if shape is None else tuple(shape[2:])

    def follower(self, node: fx.Node) -> fx.Node | None:
        """The module call that alone uses this node's result, if there is one."""
        users = list(node.users)
        return users[0] if len(users) == 1 and users[0].op == "call_module" else None


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().double().cpu()


def _check_finite(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"model: expected finite weights; got NaN or infinite ones in {name!r}")


def _where(node: fx.Node) -> str:
    """The qualified name of the module that an operation stands in, and the operation's own."""
    stack = node.meta.get("nn_module_stack")
    inside = next(reversed(stack.values()))[0] if stack else ""
    return f"{inside}.{node.name}" if inside else node.name


def _averaging_norm(n: int, m: int) -> float:
    """Spectral norm of adaptive average pooling from n to m points along one axis."""
    A = F.adaptive_avg_pool1d(torch.eye(n, dtype=torch.float64)[None], m)[0]
    return float(dense_norm(A, 2)) * (1 + ROUNDING * n)


def _axes(module: nn.Module) -> int:
    return int(type(module).__name__[-2])


def _pool_factor(name: str, module: nn.Module, p: float, axes: int) -> float:
    """Max and average pooling: 1 in l_inf; in l_2 by how many windows share a point, per axis."""

    def each(value: Any) -> list[int]:
        return list(value) if isinstance(value, tuple | list) else [int(value)] * axes

    kernel, stride = each(module.kernel_size), each(module.stride)
    if isinstance(module, nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d):
        if module.return_indices:
            raise _NoRule(f"{name}: max pooling that returns indices")
        gaps = [math.gcd(d, s) for d, s in zip(each(module.dilation), stride, strict=True)]
        shared = math.prod(-(-k * g // s) for k, g, s in zip(kernel, gaps, stride, strict=True))
        return 1.0 if math.isinf(p) else math.sqrt(shared)
    padded = any(each(module.padding))
    uneven = module.ceil_mode or (padded and not module.count_include_pad) or getattr(module, "divisor_override", None)
    if math.isinf(p) and not getattr(module, "divisor_override", None):
        return 1.0
    if uneven:
        raise _NoRule(f"{name}: average pooling with windows of unequal weight")
    shared = math.prod(-(-k // s) for k, s in zip(kernel, stride, strict=True))
    return math.sqrt(shared / math.prod(kernel))


def _reads_a_size(node: fx.Node) -> bool:
    return (node.op == "call_method" and node.target in ("size", "dim")) or (
        node.target is getattr and node.args[1] in ("shape", "ndim", "device", "dtype")
    )


def _no_rule(reason: str) -> float:
    raise _NoRule(reason)


def _leaky(slope: float) -> float:
    return max(1.0, abs(slope))


_REARRANGING: frozenset[Any] = frozenset({
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze,
    "flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "clone",
})  # fmt: skip
_FUNCTIONS: dict[Any, Callable[[fx.Node], float]] = {
    F.relu: lambda node: 1.0, torch.relu: lambda node: 1.0, "relu": lambda node: 1.0, "relu_": lambda node: 1.0,
    F.relu6: lambda node: 1.0, torch.tanh: lambda node: 1.0, "tanh": lambda node: 1.0,
    torch.sigmoid: lambda node: 0.25, "sigmoid": lambda node: 0.25,
}  # fmt: skip
_POOLING: frozenset[Any] = frozenset({F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, torch.max_pool2d})
_MODULES: list[tuple[type[nn.Module], Callable[[Any], float]]] = [
    (nn.ReLU, lambda m: 1.0), (nn.ReLU6, lambda m: 1.0), (nn.Tanh, lambda m: 1.0), (nn.Hardtanh, lambda m: 1.0),
    (nn.Softplus, lambda m: 1.0 if m.threshold >= 20 else _no_rule("softplus with a low threshold jumps")),
    (nn.Sigmoid, lambda m: 0.25), (nn.Hardsigmoid, lambda m: 1 / 6),
    (nn.LeakyReLU, lambda m: _leaky(m.negative_slope)), (nn.ELU, lambda m: _leaky(m.alpha)),
    (nn.PReLU, lambda m: _leaky(float(m.weight.detach().abs().max()))),
    (nn.GELU, lambda m: 1.13), (nn.SiLU, lambda m: 1.0999), (nn.Mish, lambda m: 1.0887),
    (nn.Hardswish, lambda m: 1.5), (nn.Softmax, lambda m: 0.5),
    (nn.Flatten, lambda m: 1.0), (nn.Unflatten, lambda m: 1.0), (nn.Identity, lambda m: 1.0),
    (nn.Dropout, lambda m: 1.0), (nn.Dropout1d, lambda m: 1.0), (nn.Dropout2d, lambda m: 1.0),
    (nn.Dropout3d, lambda m: 1.0), (nn.ZeroPad2d, lambda m: 1.0),
]  # fmt: skip
