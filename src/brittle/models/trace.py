"""Tracing a module into a ``torch.fx`` graph, with the shape of every tensor when the input's shape is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from brittle.errors import InputError, first_line
from brittle.linear.conv_geometry import conv_geometry, has_hooks
from brittle.models.borrow import zero_like
from brittle.models.normalize import Normalize


class NoRule(Exception):
    """Raised with the name of the operation for which there is no sound rule, and the reason."""


class _Tracer(fx.Tracer):
    """Stops at every module that has a rule of its own, and looks into all others."""

    def __init__(self, gradients: bool) -> None:
        super().__init__()
        self.gradients = gradients

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if self.gradients and not torch.is_grad_enabled():
            raise NoRule("forward switches gradients off, which a traced graph would not do")
        return super().create_node(kind, *args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) and conv_geometry(m) is not None
        return known or isinstance(m, Normalize) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, input_shape: Sequence[int] | None, *, gradients: bool = False) -> fx.GraphModule:
    """The module's graph; with ``input_shape`` every tensor's shape stands in its node's ``meta["shape"]``.

    With ``gradients`` (and gradients enabled) the graph has the module's gradients as well as its values.

    Raises:
        NoRule: The module's forward cannot be traced.
        InputError: The module cannot run on ``input_shape``.
    """
    if has_hooks(model):
        raise NoRule(f"{type(model).__name__}: forward hooks may change what the network computes")
    if any(True for _ in model.children()) is False and type(model).__module__.startswith("torch.nn"):
        model = nn.Sequential(model)
    try:
        traced = fx.GraphModule(model, _Tracer(gradients).trace(model))
    except Exception as error:  # tracing runs the user's forward, which may raise anything
        raise NoRule(f"{type(model).__name__}: forward cannot be traced ({first_line(error, 120)})") from None
    if input_shape is not None:
        _record_shapes(traced, model, input_shape)
    return traced


def where(node: fx.Node) -> str:
    """The qualified name of the module that an operation stands in, and the operation's own."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack")
    inside = next(reversed(stack.values()))[0] if stack else ""
    return f"{inside}.{node.name}" if inside else node.name


def _record_shapes(traced: fx.GraphModule, model: nn.Module, input_shape: Sequence[int]) -> None:
    """Run once on zeros, writing every tensor's shape into its node's ``meta``."""

    class Shapes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                n.meta["shape"] = tuple(result.shape)
            return result

    try:
        with torch.no_grad():
            Shapes(traced).run(zero_like(model).new_zeros(1, *input_shape))
    except Exception as error:  # the user's forward may raise anything
        reason = first_line(error, 120)
        raise InputError(f"input_shape: the model cannot run on shape {tuple(input_shape)}: {reason}") from None
