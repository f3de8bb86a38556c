"""Networks as ``torch.fx`` graphs, with the shape of every tensor when the input's shape is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from brittle.errors import InputError, first_line
from brittle.linear.conv_geometry import conv_geometry, has_hooks
from brittle.models.borrow import frozen, unwrapped, zero_like
from brittle.models.normalize import Normalize
from brittle.models.quantised import check_finite, has_own_arithmetic

NO_ORIGINAL = "TorchScript keeps nothing of the module that it was made from; pass that module instead"
"""Why scripted and traced modules cannot be read."""


class NoRule(Exception):
    """Raised with the name of the operation for which there is no sound rule, and the reason."""


@dataclass(frozen=True, eq=False)
class Trace:
    """A network's graph, made once for everyone who reads it.

    Attributes:
        model: The network; the graph shares its parameters, buffers and leaf modules. Trace again after changing it.
        graph: Its operations in the order of execution; only read.
        input_shape: Shape of one input without the batch axis; then every tensor's shape, with a batch of one, stands
            in its node's ``meta["shape"]``, and what is computed of sizes alone in ``meta["size"]``. None where it is
            not known.
        gradients: Whether the graph has the network's gradients as well as its values: a forward that switches
            gradients off on the way leaves no sign of it in the graph.
    """

    model: nn.Module
    graph: fx.GraphModule
    input_shape: tuple[int, ...] | None
    gradients: bool


class _Tracer(fx.Tracer):
    """Stops at every module that has a rule of its own, and looks into all others."""

    gradients = True

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        self.gradients = self.gradients and torch.is_grad_enabled()
        return super().create_node(kind, *args, **kwargs)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        inner = unwrapped(m)
        if isinstance(inner, torch.jit.ScriptModule):
            raise NoRule(f"{type(inner).__name__}: {NO_ORIGINAL}")
        return super().call_module(inner, forward if inner is m else inner.forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        convolution = isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) and conv_geometry(m) is not None
        return convolution or isinstance(m, Normalize) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, input_shape: Sequence[int] | None) -> Trace:
    """Trace a network that is in evaluation mode.

    Args:
        model: The network; only read. Of ``DataParallel`` and ``torch.compile`` the network inside is traced.
        input_shape: Shape of one input without the batch axis, if known.

    Raises:
        NoRule: The module's forward cannot be traced.
        InputError: The module cannot run on ``input_shape``.
    """
    inner = unwrapped(model)
    if isinstance(inner, torch.jit.ScriptModule):
        raise NoRule(f"{type(inner).__name__}: {NO_ORIGINAL}")
    if has_hooks(inner):
        raise NoRule(f"{type(inner).__name__}: forward hooks may change what the network computes")
    for name, parameter in model.named_parameters():
        if has_own_arithmetic(parameter):
            raise NoRule(f"{name}: a quantised {type(parameter).__name__}, whose products round in their own way")
    # A module of torch alone would be traced through, though it is known as a whole: it becomes a leaf of a sequence.
    alone = not any(True for _ in inner.children()) and type(inner).__module__.startswith("torch.nn")
    root, tracer = nn.Sequential(inner) if alone else inner, _Tracer()
    try:
        # Whoever traces where gradients are off must not make the forward look as if it switched them off. A forward
        # that keeps what it computes would leave proxies among the buffers.
        with frozen(inner), torch.enable_grad():
            graph = fx.GraphModule(root, tracer.trace(root))
    except NoRule:
        raise
    except Exception as error:  # tracing runs the user's forward, which may raise anything
        raise NoRule(f"{type(inner).__name__}: forward cannot be traced ({first_line(error, 120)})") from None
    if input_shape is None:
        return Trace(model, graph, None, tracer.gradients)
    _record_shapes(graph, model, input_shape)
    return Trace(model, graph, tuple(input_shape), tracer.gradients)


def trace_unless_given(model: nn.Module, input_shape: Sequence[int] | None, traced: Trace | NoRule | None) -> Trace:
    """The trace that was handed down, or a new one where there is none.

    Args:
        model: The network, in evaluation mode.
        input_shape: Shape of one input without the batch axis; None: that of the trace at hand, if there is one.
        traced: The trace of this network, or the error that :func:`trace` raised for it.

    Raises:
        NoRule: The network's forward cannot be traced.
        InputError: The network cannot run on ``input_shape``, or the trace is another network's or another shape's.
    """
    if traced is None:
        return trace(model, input_shape)
    if isinstance(traced, NoRule):
        raise NoRule(*traced.args)
    # Bounds of another network would be unsound without a word.
    if unwrapped(traced.model) is not unwrapped(model):
        raise InputError(f"traced: expected the trace of this {type(model).__name__}; got another network's")
    if input_shape is not None and traced.input_shape != tuple(input_shape):
        raise InputError(f"traced: expected a trace of inputs {tuple(input_shape)}; got one of {traced.input_shape}")
    return traced


def check_finite_weights(model: nn.Module) -> None:
    """Refuse a network with weights or buffers that are NaN or infinite: no bound of it would mean anything.

    Raises:
        InputError: With the name of the first.
    """
    check_finite((*model.named_parameters(), *model.named_buffers()))


def where(node: fx.Node) -> str:
    """The qualified name of the module that an operation stands in, and the operation's own."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack")
    inside = next(reversed(stack.values()))[0] if stack else ""
    return f"{inside}.{node.name}" if inside else node.name


def asks_for_size(node: fx.Node) -> bool:
    """Whether an operation asks a tensor for its size, its type or its device."""
    if node.op == "call_method":
        return node.target in ("size", "dim")
    return node.target is getattr and node.args[1] in ("shape", "ndim", "device", "dtype")


def _record_shapes(graph: fx.GraphModule, model: nn.Module, input_shape: Sequence[int]) -> None:
    """Run once on zeros, writing every tensor's shape, and every size, into its node's ``meta``."""

    class Shapes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                n.meta["shape"] = tuple(result.shape)
            elif asks_for_size(n) or (n.all_input_nodes and all("size" in node.meta for node in n.all_input_nodes)):
                n.meta["size"] = result
            return result

    try:
        with torch.no_grad():
            Shapes(graph).run(zero_like(model).new_zeros(1, *input_shape))
    except Exception as error:  # the user's forward may raise anything
        reason = first_line(error, 120)
        raise InputError(f"input_shape: the model cannot run on shape {tuple(input_shape)}: {reason}") from None
