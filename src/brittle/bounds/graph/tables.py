"""What torch's modules and functions are as rules: a table of slopes, one of modules, one of functions of one tensor.

What is in no table has no rule. Constants that an operation adds are left out: bounds speak of differences.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from brittle.bounds.graph.calls import Context, Shape, argument, depend, settings
from brittle.bounds.graph.places import SPLITS, padding, padding_module, resizing, resizing_module
from brittle.bounds.graph.rules import (
    Average,
    Conv,
    Dense,
    MaxPool,
    Multiple,
    Rearrange,
    Rule,
    Scale,
    Slope,
    Softmax,
    TransposedConv,
)
from brittle.linear.conv_geometry import ConvGeometry, conv_geometry, has_hooks, is_stock
from brittle.linear.spectrum import largest_singular_value
from brittle.models.normalize import Normalize
from brittle.models.trace import NoRule, where

ModuleReader = Callable[[str, Any, Shape], Rule | None]
"""Name, module and input shape to the module's rule; None for a module that changes nothing."""


FunctionReader = Callable[[fx.Node, Context], Rule | None]
"""A node that calls a function or a method to its rule; None for one that changes nothing."""

USES_THE_BATCH = "batch norm that uses the batch's statistics; call model.eval() first"
DROPS = "dropout in training mode; call model.eval() first"


def module_rule(node: fx.Node, context: Context) -> Rule | None:
    """Rule of a module; None where it changes nothing.

    Raises:
        NoRule: It has no sound rule.
    """
    name = str(node.target)
    module = context.traced.graph.get_submodule(name)
    if has_hooks(module):
        raise NoRule(f"{name}: {type(module).__name__} with forward hooks")
    if module in context.training:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise NoRule(f"{name}: {USES_THE_BATCH}")
        if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d):
            raise NoRule(f"{name}: {DROPS}")
    return _stock_rule(name, module, node.all_input_nodes[0].meta.get("shape"))


def function_rule(node: fx.Node, context: Context) -> Rule | None:
    """Rule of a function or method of one tensor; None where it changes nothing.

    Raises:
        NoRule: It has no sound rule.
    """
    if node.target in SLOPES:
        return SLOPES[node.target]
    if node.target in FUNCTIONS:
        return FUNCTIONS[node.target](node, context)
    called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
    raise NoRule(f"{where(node)}: no sound rule for {called}")


# --- modules --------------------------------------------------------------------------------------------------


def _stock_rule(name: str, module: nn.Module, shape: Shape) -> Rule | None:
    """Rule of a module that computes what one of the table's kinds computes."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):  # own forwards may be understood
        geometry = conv_geometry(module)
        if geometry is None:
            raise NoRule(f"{name}: {type(module).__name__} has a forward that is not understood")
        return Conv(module.weight.detach().cpu(), geometry)
    kind = next((kind for kind in (*MODULES, *SLOPES) if isinstance(kind, type) and is_stock(module, kind)), None)
    if kind is None:
        raise NoRule(f"{name}: no sound rule for {type(module).__name__}")
    return MODULES[kind](name, module, shape) if kind in MODULES else SLOPES[kind]


def _batch_norm(name: str, module: Any, shape: Shape) -> Scale:
    """``gamma / sqrt(var + eps)`` per channel, in float64."""
    if module.running_var is None:
        raise NoRule(f"{name}: {USES_THE_BATCH}")
    scale = (module.running_var.detach().double().cpu() + module.eps).rsqrt()
    return Scale(scale if module.weight is None else scale * module.weight.detach().double().cpu())


def _max_pool(name: str, module: Any, shape: Shape) -> MaxPool:
    """A point lies in ``ceil(k g / s)`` windows per axis, g = gcd(dilation, stride)."""
    if module.return_indices:
        raise NoRule(f"{name}: max pooling that returns indices")
    kernel, stride, dilation = _per_axis(module, "kernel_size", "stride", "dilation")
    overlap = math.prod(-(-k * math.gcd(d, s) // s) for k, s, d in zip(kernel, stride, dilation, strict=True))
    return MaxPool(module, overlap, len(kernel))


def _average_pool(name: str, module: Any, shape: Shape) -> Average:
    """l_2: ``sqrt(overlap / window)``, from ``sqrt(||A||_1 ||A||_inf)``."""
    kernel, stride, padding = _per_axis(module, "kernel_size", "stride", "padding")
    axes = len(kernel)
    unequal = "average pooling with windows of unequal weight"
    if getattr(module, "divisor_override", None):  # rows may sum to more than 1
        raise NoRule(f"{name}: {unequal}")
    if module.ceil_mode or (any(padding) and not module.count_include_pad):
        return Average(module, None, unequal, axes=axes)
    shared = math.prod(-(-k // s) for k, s in zip(kernel, stride, strict=True))
    return Average(module, math.sqrt(shared / math.prod(kernel)), stencil=(kernel, stride, padding), axes=axes)


def _adaptive_pool(name: str, module: Any, shape: Shape) -> Average:
    """l_2: the product of the axes' norms, for a known size."""
    (outs,) = _per_axis(module, "output_size")
    axes, everything = len(outs), set(outs) == {1}
    if shape is None:
        why = f"{type(module).__name__} is bounded only for a known input_shape"
        return Average(module, 1.0 if everything else None, why, everything=everything, axes=axes)
    norms = [averaging_norm(n, m if isinstance(m, int) else n) for n, m in zip(shape[2:], outs, strict=True)]
    return Average(module, math.prod(norms), everything=everything, axes=axes)


def averaging_norm(n: int, m: int) -> float:
    """Spectral norm of adaptive average pooling from n to m points along one axis; exact up to rounding, upwards."""
    if m == 1:
        return n**-0.5
    A = F.adaptive_avg_pool1d(torch.eye(n, dtype=torch.float64)[None], m)[0]
    return float(largest_singular_value(A)[1])


def _softplus(name: str, module: Any, shape: Shape) -> Slope:
    if module.threshold < 20:
        raise NoRule(f"{name}: softplus with a low threshold jumps")
    return Slope(0.0, 1.0)


def _bent(name: str, module: Any, shape: Shape) -> Slope:
    """Slope 1 above zero, and below it a given one or one of several weights."""
    below = module.weight.detach().flatten().tolist() if isinstance(module, nn.PReLU) else [module.negative_slope]
    low, high = min(1.0, *below), max(1.0, *below)
    return Slope(low, high, kinked=isinstance(module, nn.LeakyReLU) and 0 <= low <= high <= 1)


def _celu(name: str, module: Any, shape: Shape) -> Slope:
    if module.alpha <= 0:
        raise NoRule(f"{name}: CELU of a negative alpha has no steepest slope")
    return Slope(0.0, 1.0)


def _transposed(name: str, module: Any, shape: Shape) -> TransposedConv:
    """The transpose of the convolution that the same weight is."""
    widths = tuple((width, width) for width in module.padding)
    geometry = ConvGeometry(module.stride, widths, module.dilation, module.groups)
    return TransposedConv(module.weight.detach().cpu(), geometry)


def _per_axis(module: nn.Module, *names: str) -> list[tuple[Any, ...]]:
    """Settings of a pooling with one entry a spatial axis."""
    kind = next(kind for kind in type(module).__mro__ if kind in MODULES)
    axes = int(kind.__name__[-2])  # MaxPool2d: 2
    settings = [getattr(module, name) for name in names]
    return [tuple(value) if isinstance(value, tuple | list) else (value,) * axes for value in settings]


MODULES: Mapping[type[nn.Module], ModuleReader] = {
    nn.Linear: lambda name, module, shape: Dense(module.weight.detach().cpu()),
    Normalize: lambda name, module, shape: Scale(1 / module.std.detach().double().cpu()),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), _batch_norm),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), _max_pool),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), _average_pool),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), _adaptive_pool),
    **dict.fromkeys(
        (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), lambda name, module, shape: None
    ),
    nn.Flatten: lambda name, module, shape: Rearrange(module, flattens=True),
    **dict.fromkeys(
        (nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
        lambda name, module, shape: Rearrange(module),
    ),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _transposed),
    **dict.fromkeys(
        (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
        partial(padding_module, "constant"),
    ),
    **dict.fromkeys((nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d), partial(padding_module, "reflect")),
    **dict.fromkeys(
        (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d), partial(padding_module, "replicate")
    ),
    **dict.fromkeys((nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d), partial(padding_module, "circular")),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), resizing_module),
    nn.Softmax: lambda name, module, shape: Softmax(),
    nn.Softplus: _softplus,
    **dict.fromkeys((nn.LeakyReLU, nn.PReLU), _bent),
    nn.ELU: lambda name, module, shape: Slope(min(0.0, module.alpha), max(1.0, module.alpha)),
    nn.CELU: _celu,
}


# --- functions and methods ------------------------------------------------------------------------------------


def _as_module(node: fx.Node, context: Context) -> Rule | None:
    """A function through the module of the same arguments."""
    kind, names = AS_MODULES[node.target]
    positional, named = settings(node)
    values = dict(zip(names, positional, strict=False)) | {k: v for k, v in named.items() if k in names}
    if depend(values.values()):
        raise NoRule(f"{where(node)}: settings that depend on the input")
    return _stock_rule(where(node), kind(**values), node.all_input_nodes[0].meta.get("shape"))


def _clamp(node: fx.Node, context: Context) -> Slope:
    if depend([*node.args[1:], *node.kwargs.values()]):
        raise NoRule(f"{where(node)}: a clamp whose limits are tensors")
    return Slope(0.0, 1.0)


def _drop(node: fx.Node, context: Context) -> None:
    if argument(node, 2, "training", True) is not False:
        raise NoRule(f"{where(node)}: no sound rule for dropout")
    if _owner_trains(node, context):
        raise NoRule(f"{where(node)}: {DROPS}")


def _functional_batch_norm(node: fx.Node, context: Context) -> Scale:
    """``F.batch_norm`` of a module's own statistics, as timm's batch norms with an activation call it."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    call: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if call.get("training", False) is not False or _owner_trains(node, context):
        raise NoRule(f"{where(node)}: {USES_THE_BATCH}")
    tensors = []
    for read in (call.get("running_var"), call.get("weight")):
        if not isinstance(read, fx.Node) or read.op != "get_attr":
            raise NoRule(f"{where(node)}: batch norm of statistics that are not buffers")
        tensors.append(operator.attrgetter(str(read.target))(context.traced.graph).detach().double().cpu())
    variance, weight = tensors  # mean and bias are constants
    return Scale((variance + float(call.get("eps", 1e-5))).rsqrt() * weight)


def _mean(node: fx.Node, context: Context) -> Average:
    """The mean over given axes."""
    shape = node.all_input_nodes[0].meta.get("shape")
    axes = argument(node, 1, "dim", None)
    keep = bool(argument(node, 2, "keepdim", False))
    if shape is None or axes is None or depend([axes]):
        raise NoRule(f"{where(node)}: a mean is bounded only over given axes of a known input_shape")
    reduced = sorted(axis % len(shape) for axis in (axes if isinstance(axes, tuple | list) else [axes]))
    if 0 in reduced:
        raise NoRule(f"{where(node)}: a mean over the batch")
    everything = reduced == list(range(2, len(shape)))
    norm = math.prod(shape[axis] for axis in reduced) ** -0.5
    return Average(lambda d: d.mean(reduced, keepdim=keep), norm, everything=everything, axes=everything * len(reduced))


def _rearrange(node: fx.Node, context: Context) -> Rearrange:
    """What keeps the order of the entries as a reshape to the recorded shape, what may change it as the call itself."""
    shape, (rest, options) = node.meta.get("shape"), settings(node)
    if shape is not None and node.target in _FLATTENING:
        return Rearrange(lambda d: d.reshape(shape), flattens=True)
    if shape is None or depend([*rest, *options.values()]):
        return Rearrange(None)
    function = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
    return Rearrange(lambda d: function(d, *rest, **options))


def _owner_trains(node: fx.Node, context: Context) -> bool:
    """Whether the module that a function stands in is in training mode when nobody reads."""
    stack = node.meta.get("nn_module_stack")
    owner = next(reversed(stack.values()))[0] if stack else ""
    module = context.traced.graph.get_submodule(owner) if owner else context.traced.model
    return module in context.training


SLOPES: Mapping[Any, Slope] = {
    **dict.fromkeys((nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_"), Slope(0.0, 1.0, kinked=True)),
    **dict.fromkeys((nn.ReLU6, F.relu6, nn.Tanh, torch.tanh, F.tanh, "tanh"), Slope(0.0, 1.0)),
    **dict.fromkeys((nn.Hardtanh, nn.Softsign, nn.LogSigmoid), Slope(0.0, 1.0)),
    **dict.fromkeys((nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid"), Slope(0.0, 0.25)),
    **dict.fromkeys((nn.Hardsigmoid, F.hardsigmoid), Slope(0.0, 1 / 6)),
    **dict.fromkeys((torch.abs, "abs"), Slope(-1.0, 1.0)),
    # The extreme slopes of these are rounded outwards; theory page, section "Networks".
    **dict.fromkeys((nn.GELU, F.gelu), Slope(-0.13, 1.13)),
    **dict.fromkeys((nn.SiLU, F.silu), Slope(-0.0999, 1.0999)),
    **dict.fromkeys((nn.Mish, F.mish), Slope(-0.1127, 1.0887)),
    **dict.fromkeys((nn.SELU, F.selu, torch.selu, torch.selu_), Slope(0.0, 1.7581)),
    **dict.fromkeys((nn.Hardswish, F.hardswish), Slope(-0.5, 1.5)),
}
"""Modules, functions and methods that work elementwise between two fixed slopes."""
_WINDOW = ("kernel_size", "stride", "padding")
AS_MODULES: Mapping[Any, tuple[Any, tuple[str, ...]]] = {
    F.max_pool1d: (nn.MaxPool1d, (*_WINDOW, "dilation", "ceil_mode")),
    F.max_pool2d: (nn.MaxPool2d, (*_WINDOW, "dilation", "ceil_mode")),
    torch.max_pool2d: (nn.MaxPool2d, (*_WINDOW, "dilation", "ceil_mode")),
    F.avg_pool1d: (nn.AvgPool1d, (*_WINDOW, "ceil_mode", "count_include_pad")),
    F.avg_pool2d: (nn.AvgPool2d, (*_WINDOW, "ceil_mode", "count_include_pad", "divisor_override")),
    F.adaptive_avg_pool1d: (nn.AdaptiveAvgPool1d, ("output_size",)),
    F.adaptive_avg_pool2d: (nn.AdaptiveAvgPool2d, ("output_size",)),
    F.elu: (nn.ELU, ("alpha", "inplace")),
    F.celu: (nn.CELU, ("alpha", "inplace")),
    F.leaky_relu: (nn.LeakyReLU, ("negative_slope", "inplace")),
    F.softplus: (nn.Softplus, ("beta", "threshold")),
    **dict.fromkeys((F.softmax, torch.softmax, "softmax"), (nn.Softmax, ("dim",))),
}
"""Functions that are a module with the same settings, behind what they read."""
_FLATTENING = (
    torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze,
    "flatten", "reshape", "view", "squeeze", "unsqueeze",
)  # fmt: skip
_PERMUTING = (torch.permute, torch.transpose, "permute", "transpose", F.pixel_shuffle, F.pixel_unshuffle)
_UNCHANGED = ("contiguous", "clone", "detach")
SAME_MEMORY: frozenset[Any] = frozenset({*_FLATTENING, *_PERMUTING, *_UNCHANGED, *SPLITS, operator.getitem})
"""Functions and methods whose result may lie in the memory of what they read."""
FUNCTIONS: Mapping[Any, FunctionReader] = {
    **dict.fromkeys(_UNCHANGED, lambda node, context: None),
    **dict.fromkeys((*_FLATTENING, *_PERMUTING), _rearrange),
    **dict.fromkeys(AS_MODULES, _as_module),
    **dict.fromkeys((F.dropout, F.dropout2d), _drop),
    **dict.fromkeys((torch.mean, "mean"), _mean),
    **dict.fromkeys((torch.clamp, "clamp", "clamp_", "clamp_min", "clamp_max", F.hardtanh, torch.clip), _clamp),
    **dict.fromkeys((operator.neg, torch.neg, "neg"), lambda node, context: Multiple(-1.0)),
    F.batch_norm: _functional_batch_norm,
    F.pad: padding,
    **dict.fromkeys((F.interpolate, F.upsample), resizing),
}
