"""A private copy of a network on which passes cost less: the same function, to rounding, and the same gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from brittle.linear.conv_geometry import is_stock
from brittle.models.borrow import Model, frozen
from brittle.models.trace import trace

AGREEMENT = 1e-3
"""Largest relative difference of logits and of input gradients, in l_2, at which a copy counts as the same network."""
REPEATED = 1e-5
"""The same for the network's own answers to one input: larger differences are noise, which a copy might freeze."""
PROBES = 4
"""Samples on which a copy is compared with the network."""


def private_copy(model: Model, x: Tensor, *, compiled: bool = False) -> Model:
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

    Returns:
        A network with the same logits and input gradients up to rounding (relative difference below 0.001 on ``x``).
    """
    if not isinstance(model, nn.Module) or not (compiled or _gains(model)):
        return model
    x = x[:PROBES]
    with frozen(model), torch.enable_grad():
        wanted, again = _probe(model, x), _probe(model, x)
        if wanted is None or again is None or not _agree(wanted, again, REPEATED):
            return model
        for prepare in (*([_compiled] if compiled else []), _folded, _plain):
            candidate = _attempt(model, prepare)
            found = None if candidate is None else _probe(candidate, x)
            if candidate is not None and found is not None and _agree(found, wanted, AGREEMENT):
                return candidate
    return model


def _gains(model: nn.Module) -> bool:
    """Whether there is anything to fold, to lay out anew or to compute once."""
    kinds = (nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return any(isinstance(module, kinds) or parametrize.is_parametrized(module) for module in model.modules())


def _attempt(model: nn.Module, prepare: Callable[[nn.Module], nn.Module]) -> nn.Module | None:
    """A prepared copy; None when there is none that shares nothing with the network."""
    try:
        result = copy.deepcopy(model)
        own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        if result is model or own & {id(tensor) for tensor in (*result.parameters(), *result.buffers())}:
            return None
        return prepare(result).eval().requires_grad_(False)
    except Exception:  # copying and tracing run the user's code, which may raise anything
        return None


def _plain(model: nn.Module) -> nn.Module:
    """Weights computed once, convolutions in channels_last."""
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


def _folded(model: nn.Module) -> nn.Module:
    """Batch norms folded into the convolution or linear layer whose output they alone read."""
    graph = trace(_plain(model), None, gradients=True)
    modules = dict(graph.named_modules())
    for node in list(graph.graph.nodes):
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        merged = _merged(modules[str(source.target)], modules[str(node.target)])
        if merged is None or _calls(graph, source.target) > 1:
            continue
        parent, _, leaf = str(source.target).rpartition(".")
        setattr(graph.get_submodule(parent), leaf, merged)
        modules[str(source.target)] = merged
        node.replace_all_uses_with(source)
        graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return _plain(graph)


def _compiled(model: nn.Module) -> nn.Module:
    """Folded, then compiled for any batch size."""
    result = torch.compile(_folded(model).eval().requires_grad_(False), dynamic=True)
    assert isinstance(result, nn.Module)
    return result


def _merged(linear: nn.Module, norm: nn.Module) -> nn.Module | None:
    """One layer that does the work of both; None where they are no stock pair with running statistics."""
    if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) or norm.running_var is None:
        return None
    for kind, after in ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d)):
        if is_stock(linear, kind) and is_stock(norm, after):
            assert isinstance(linear, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            return fuse_conv_bn_eval(linear, norm)
    if isinstance(linear, nn.Linear) and is_stock(linear, nn.Linear) and is_stock(norm, nn.BatchNorm1d):
        return fuse_linear_bn_eval(linear, norm)
    return None


def _calls(graph: fx.GraphModule, target: object) -> int:
    """How often a module runs."""
    return sum(node.op == "call_module" and node.target == target for node in graph.graph.nodes)


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


def _agree(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], within: float) -> bool:
    """Whether logits and gradients differ by no more than this share of their l_2 norms."""
    for one, other in zip(a, b, strict=True):
        if one.shape != other.shape or not bool(torch.isfinite(one).all() & torch.isfinite(other).all()):
            return False
        if float((one - other).double().norm()) > within * float(other.double().norm()):
            return False
    return True
