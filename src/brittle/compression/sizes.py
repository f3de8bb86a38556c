"""What a network whose units were removed differs in from its architecture: the sizes of some of its modules.

Sizes are a mapping from a module's name to its sizes by name, as JSON holds it: the attributes that fix the shapes of
a torch module's tensors (``out_channels``, ``groups``, ``num_features``, ...), and of any other module its integers
and the shapes of its own tensors. Nothing but smaller sizes can be said, so whatever a file says, the network takes
no more memory than its architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from brittle.errors import InputError

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Size = int | Shape
Sizes = Mapping[str, Mapping[str, Size]]
"""Sizes by name, by the name of the module."""


def _linear(m: nn.Linear) -> Shapes:
    return {"weight": (m.out_features, m.in_features), "bias": (m.out_features,)}


def _convolution(m: _ConvNd) -> Shapes:
    sides = (m.in_channels, m.out_channels) if m.transposed else (m.out_channels, m.in_channels)
    return {"weight": (sides[0], sides[1] // m.groups, *m.kernel_size), "bias": (m.out_channels,)}


def _statistics(m: _NormBase) -> Shapes:
    return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (m.num_features,))


def _attention(m: nn.MultiheadAttention) -> Shapes:
    e = m.embed_dim
    parts: Shapes = {"q_proj_weight": (e, e), "k_proj_weight": (e, m.kdim), "v_proj_weight": (e, m.vdim)}
    return parts | {"in_proj_weight": (3 * e, e), "in_proj_bias": (3 * e,), "bias_k": (1, 1, e), "bias_v": (1, 1, e)}


KINDS: tuple[tuple[type[nn.Module], tuple[str, ...], Callable[..., Shapes]], ...] = (
    (nn.Linear, ("in_features", "out_features"), _linear),
    (_ConvNd, ("in_channels", "out_channels", "groups"), _convolution),
    (_NormBase, ("num_features",), _statistics),
    (nn.GroupNorm, ("num_groups", "num_channels"), lambda m: dict.fromkeys(("weight", "bias"), (m.num_channels,))),
    (nn.LayerNorm, ("normalized_shape",), lambda m: dict.fromkeys(("weight", "bias"), m.normalized_shape)),
    (nn.RMSNorm, ("normalized_shape",), lambda m: {"weight": m.normalized_shape}),
    (nn.PReLU, ("num_parameters",), lambda m: {"weight": (m.num_parameters,)}),
    (nn.MultiheadAttention, ("embed_dim", "kdim", "vdim", "num_heads", "head_dim"), _attention),
)
"""Types of modules (with their subclasses), the attributes that are their sizes, and the shapes that follow."""
DIVIDED = (
    ("in_channels", "groups"),
    ("out_channels", "groups"),
    ("num_channels", "num_groups"),
    ("embed_dim", "num_heads"),
)
"""Sizes of which the second has to divide the first."""


def changed_sizes(model: nn.Module, like: nn.Module) -> dict[str, dict[str, Size]]:
    """The sizes of every module of a network that differ from those of its architecture.

    Args:
        model: A network of which units were removed; only read.
        like: The architecture, freshly built; only read.

    Returns:
        What :func:`resized` makes ``model``'s sizes of ``like``'s with.

    Raises:
        InputError: A module is missing or of another type.
    """
    there = dict(model.named_modules())
    sizes: dict[str, dict[str, Size]] = {}
    for name, module in like.named_modules():
        other = there.get(name)
        if other is None or type(other).__qualname__ != type(module).__qualname__:
            got = "nothing" if other is None else type(other).__name__
            raise InputError(f"model: expected {type(module).__name__} as {name!r}, as the architecture has; got {got}")
        before, after = _sizes_of(module), _sizes_of(other)
        if changed := {key: after[key] for key in before if after.get(key, before[key]) != before[key]}:
            sizes[name] = changed
    return sizes


def resized(model: nn.Module, sizes: Sizes) -> nn.Module:
    """A copy of a network some of whose modules have other sizes, to be filled with a state dict.

    Args:
        model: Freshly built; left as it is.
        sizes: As :func:`changed_sizes` returns them, or as a file says.

    Returns:
        The copy; tensors of another shape are zero, and those that were shared stay so.

    Raises:
        InputError: A module or a size that the network does not have, a size that is no integer from 1 to the
            network's own, or sizes that do not go together.

    >>> resized(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), {"0": {"out_features": 2}, "1": {"in_features": 2}})
    Sequential(
      (0): Linear(in_features=5, out_features=2, bias=True)
      (1): Linear(in_features=2, out_features=3, bias=True)
    )
    """
    result = copy.deepcopy(model)
    modules = dict(result.named_modules())
    made: dict[tuple[Tensor, Shape], Tensor] = {}
    for name, new in sizes.items():
        if name not in modules:
            raise InputError(
                f"sizes: expected names of modules; got {name!r:.80}, which the architecture does not have"
            )
        own = _sizes_of(modules[name])
        for key, size in new.items():
            if key not in own:
                raise InputError(f"sizes: {name}: expected some of {', '.join(own) or 'none'}; got {key!r:.80}")
            if not _smaller(size, own[key]):
                raise InputError(f"sizes: {name}.{key}: expected at least 1 and at most {own[key]}; got {size!r:.80}")
        _resize(name, modules[name], new, made)
    return result


def _kind(module: nn.Module) -> tuple[tuple[str, ...], Shapes]:
    """The attributes that are a module's sizes, and the shapes that follow from them."""
    for kind, attributes, shapes in KINDS:
        if isinstance(module, kind):
            return attributes, shapes(module)
    if type(module).__module__.startswith("torch.nn."):  # kernels of pooling and the like are no sizes
        return (), {}
    return tuple(key for key, value in vars(module).items() if type(value) is int and not key.startswith("_")), {}


def _sizes_of(module: nn.Module) -> dict[str, Size]:
    """All sizes of a module that can differ: attributes, and shapes of the tensors that do not follow from these."""
    attributes, shapes = _kind(module)
    tensors = {key: tuple(tensor.shape) for key, tensor in _tensors(module).items() if key not in shapes}
    return {key: getattr(module, key) for key in attributes} | tensors


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers by name."""
    return {
        key: tensor for key, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is not None
    }


def _smaller(size: object, own: Size) -> bool:
    """Whether a size is of the kind of its own one, and not above."""
    if isinstance(own, int):
        return type(size) is int and min(1, own) <= size <= own
    return isinstance(size, tuple) and len(size) == len(own) and all(map(_smaller, size, own))


def _resize(name: str, module: nn.Module, new: Mapping[str, Size], made: dict[tuple[Tensor, Shape], Tensor]) -> None:
    """Give a module its sizes; ``made`` holds the new tensors by the old ones and their new shape."""
    tensors = _tensors(module)
    for key, size in new.items():
        if key not in tensors:
            setattr(module, key, size)
    for whole, parts in DIVIDED:
        if hasattr(module, whole) and hasattr(module, parts) and getattr(module, whole) % getattr(module, parts):
            got = f"{getattr(module, whole)} and {getattr(module, parts)}"
            raise InputError(f"sizes: {name}: expected {parts} to divide {whole}; got {got}")
    shapes = _kind(module)[1] | {key: size for key, size in new.items() if isinstance(size, tuple)}
    for key, tensor in tensors.items():
        shape = shapes.get(key, tuple(tensor.shape))
        if shape != tuple(tensor.shape):
            if (tensor, shape) not in made:
                zeros = tensor.detach().new_zeros(shape)
                trained = isinstance(tensor, nn.Parameter)
                made[tensor, shape] = nn.Parameter(zeros, tensor.requires_grad) if trained else zeros
            setattr(module, key, made[tensor, shape])
