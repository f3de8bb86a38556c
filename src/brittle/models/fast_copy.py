"""A copy of a network on which passes cost less: the same function, to rounding, and the same gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from brittle.linear.conv_geometry import is_stock
from brittle.models.borrow import Model, copy_unshared, frozen
from brittle.models.trace import NoRule, Trace, trace

M = TypeVar("M", bound=nn.Module)

MOST_DIFFERENCE = 1e-3
"""Largest relative difference of logits and of input gradients, in l_2, at which a copy counts as the same network."""
MOST_NOISE = 1e-5
"""The same for the network's own answers to one input: larger differences are noise, which a copy might freeze."""
PROBES = 4
"""Samples on which a copy is compared with the network."""
FUSIONS: tuple[tuple[type[nn.Module], type[nn.Module], Callable[..., nn.Module]], ...] = (
    (nn.Conv1d, nn.BatchNorm1d, fuse_conv_bn_eval),
    (nn.Conv2d, nn.BatchNorm2d, fuse_conv_bn_eval),
    (nn.Conv3d, nn.BatchNorm3d, fuse_conv_bn_eval),
    (nn.Linear, nn.BatchNorm1d, fuse_linear_bn_eval),
)
"""A layer, the batch norm behind it that it can take over, and torch's function for that."""


def copy_for_attacks(model: Model, x: Tensor, *, compiled: bool = False, traced: Trace | NoRule | None = None) -> Model:
    """A copy of the network for attacks: frozen, in eval mode, batch norms folded, convolutions in channels_last.

    Parametrised weights (``torch.nn.utils.parametrize``) are computed once; a batch norm that follows a convolution
    or linear layer directly is folded into it; the copy's parameters want no gradients. Convolutions lay their
    weights out in channels_last, which is quicker on CPUs and GPUs. What cannot be copied, or traced, or answers
    differently from the network on ``x`` is left out, in the worst case everything: then the model itself is returned,
    as it is where there is nothing to gain.

    Args:
        model: Network from ``(N, ...)`` to logits; left bit-equal. A plain callable is returned as it is.
        x: Inputs ``(N, ...)`` on the model's device; up to 4 of them serve to compare the copy with the network.
        compiled: Whether to compile the copy (``torch.compile``, any batch size): worth its start of seconds to minutes
            on long runs on a GPU; on CPUs it gained nothing in our trials.
        traced: The network's trace (:func:`brittle.models.trace.trace`), or the error that tracing raised; None: it is
            traced here, where it must be.

    Returns:
        A network with the same logits and input gradients up to rounding (relative difference below 0.001 on ``x``).
    """
    if not isinstance(model, nn.Module):
        return model
    kinds = (nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if not compiled and not any(isinstance(m, kinds) or parametrize.is_parametrized(m) for m in model.modules()):
        return model

    def fold() -> nn.Module:
        return _fold_norms(_copy_graph(model, traced))

    def fold_and_compile() -> nn.Module:
        network = torch.compile(fold().eval().requires_grad_(False), dynamic=True)
        assert isinstance(network, nn.Module)
        return network

    x = x[:PROBES]
    with frozen(model), torch.enable_grad():
        answers = _probe(model, x)
        if answers is None or not _agree(_probe(model, x), answers, MOST_NOISE):
            return model
        makers: list[Callable[[], nn.Module]] = [fold, lambda: _lay_out(copy_unshared(model, model))]
        for make in [fold_and_compile, *makers] if compiled else makers:  # the quickest first
            try:
                candidate = make().eval().requires_grad_(False)
            except Exception:  # copying and tracing run the user's code, which may raise anything
                continue
            if _agree(_probe(candidate, x), answers, MOST_DIFFERENCE):
                return candidate
    return model


def _copy_graph(model: nn.Module, traced: Trace | NoRule | None) -> fx.GraphModule:
    """A copy of the network as a graph, with the network's gradients.

    Raises:
        NoRule: There is none.
    """
    # A weight that is computed stands in the graph as its computation, so it has to be computed before the tracing.
    if traced is None or any(parametrize.is_parametrized(module) for module in model.modules()):
        traced = trace(_lay_out(copy_unshared(model, model)), None)
        graph = traced.graph
    elif isinstance(traced, NoRule):
        raise NoRule(*traced.args)
    else:
        graph = _lay_out(copy_unshared(traced.graph, model))
    if not traced.gradients:
        raise NoRule("forward switches gradients off, which a traced graph would not do")
    return graph


def _lay_out(model: M) -> M:
    """Compute parametrised weights once and lay convolutions out in channels_last, in place."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            # Copies share the class that torch made for the original, and removing would change it.
            kind = type(module)
            module.__class__ = type(kind.__name__, kind.__bases__, dict(kind.__dict__))
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name)
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return model


def _fold_norms(graph: fx.GraphModule) -> nn.Module:
    """Fold batch norms into the convolution or linear layer whose output they alone read, in place."""
    modules = dict(graph.named_modules())
    calls = Counter(node.target for node in graph.graph.nodes if node.op == "call_module")
    for node in list(graph.graph.nodes):
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        merged = _merge(modules[str(source.target)], modules[str(node.target)])
        if merged is None or calls[source.target] > 1:
            continue
        parent, _, leaf = str(source.target).rpartition(".")
        setattr(graph.get_submodule(parent), leaf, merged)
        modules[str(source.target)] = merged
        node.replace_all_uses_with(source)
        graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    for node in graph.graph.nodes:
        # A tensor in channels_last cannot be viewed in another shape without a copy.
        if node.op == "call_method" and node.target == "view" and not _depend_on_type(node.args[1:], node.kwargs):
            node.target = "reshape"
    graph.recompile()
    # A graph prints its own traceback beside every error that passes it; that of a failing pass belongs to whoever
    # calls. torch makes a class of its own for every graph, so that no other module is changed.
    type(graph).__call__ = nn.Module.__call__  # type: ignore[method-assign]
    return _lay_out(graph)  # what was merged is a new layer


def _depend_on_type(args: tuple[object, ...], options: dict[str, object]) -> bool:
    """Whether a view is one of another type, not of another shape."""
    return any(isinstance(value, torch.dtype) for value in (*args, *options.values()))


def _merge(linear: nn.Module, norm: nn.Module) -> nn.Module | None:
    """One layer that does the work of both; None where they are no stock pair with running statistics."""
    for kind, after, fuse in FUSIONS:
        if is_stock(linear, kind) and is_stock(norm, after) and norm.running_var is not None:
            merged: nn.Module = fuse(linear, norm)
            return merged
    return None


def _probe(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Logits and the gradient of their squares; None where there are none."""
    try:
        with torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            logits = model(x)
            (gradient,) = torch.autograd.grad(logits.square().sum(), x)
    except Exception:  # the caller's own passes will say what is wrong with the model
        return None
    return logits.detach(), gradient


def _agree(answers: tuple[Tensor, Tensor] | None, expected: tuple[Tensor, Tensor], within: float) -> bool:
    """Whether there are logits and gradients, and they differ by no more than this share of the expected l_2 norms."""
    if answers is None:
        return False
    for one, other in zip(answers, expected, strict=True):
        if one.shape != other.shape or not bool(torch.isfinite(one).all() & torch.isfinite(other).all()):
            return False
        if float((one - other).double().norm()) > within * float(other.double().norm()):
            return False
    return True
