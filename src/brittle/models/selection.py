"""Which layers an intervention acts on, and their matrices."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from brittle.errors import InputError
from brittle.models import layers as layer_view
from brittle.models.borrow import frozen
from brittle.models.quantised import has_own_arithmetic


@dataclass(frozen=True)
class Chosen:
    """One layer that an intervention acts on.

    Attributes:
        name: Qualified name; of a low-rank pair, the first module's.
        modules: The module, or the two of a low-rank pair in the order of computation: the first is ``(r, n)``, the
            second ``(m, r)``.
    """

    name: str
    modules: tuple[nn.Module, ...]


def chosen_layers(model: nn.Module, layers: Sequence[str] | None = None) -> list[Chosen]:
    """The layers that an intervention acts on, in the order of ``model.named_modules()``.

    By default those of Barsbey et al. (2025): every ``nn.Linear`` but the last one (the head) and every ``nn.Conv2d``
    but the first one, subclasses included. First and last are told by the order in which the modules were registered,
    so a network that registers them out of the order of computation needs ``layers``. Two maps that
    :func:`brittle.read_layers` reads as a low-rank pair are one layer. Fused weights that no ``nn.Linear`` holds
    (``nn.MultiheadAttention.in_proj_weight``) are no layer.

    Args:
        model: Any module; only read.
        layers: Names of modules instead, ``nn.Linear`` or ``nn.Conv1d`` to ``nn.Conv3d``. A low-rank pair goes by the
            name of either module, or of the ``nn.Sequential`` that holds just the two; named twice it counts once.

    Returns:
        At least one layer.

    Raises:
        InputError: A name is unknown or has no matrix, ``layers`` is empty, a chosen weight is not a tensor of real
            numbers, or the default leaves no layer.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    if layers is not None and (isinstance(layers, str) or not layers):
        raise InputError(f"layers: expected names of modules, at least one; got {layers!r}")
    lists = [module for module in model.modules() if isinstance(module, ParametrizationList)]
    inside = {part for parametrisation in lists for part in parametrisation.modules()}
    names = {module: name for name, module in model.named_modules() if module not in inside}
    with frozen(model) if lists else nullcontext():  # reading a parametrised weight may change its buffers
        pairs = layer_view.low_rank_pairs(model)
    seconds = {second: first for first, second in pairs.items()}
    every = [module for module in names if isinstance(module, nn.Linear | layer_view.Conv) and module not in seconds]
    if layers is None:
        linears = [module for module in every if isinstance(module, nn.Linear)]
        images = [module for module in every if isinstance(module, nn.Conv2d)]
        acting = {*linears[:-1], *images[1:]}
        if not acting:
            raise InputError(
                "layers: expected their names, since every Linear but the last and every Conv2d but the first, the "
                "default, leaves none in this model; got None"
            )
    else:
        acting = {_find_module(model, name, pairs, seconds) for name in layers}
    chosen = [
        Chosen(names[module], (module, pairs[module]) if module in pairs else (module,))
        for module in every
        if module in acting
    ]
    for layer in chosen:
        for module in layer.modules:
            _check_weight(module, names[module])
    return chosen


def matrix(chosen: Chosen) -> Tensor:
    """The matrix of a layer, differentiable with respect to the parameters.

    Args:
        chosen: A layer; of a low-rank pair the matrix is the product, whatever autocast says in the weights' type.

    Returns:
        ``(m, n)``: rows are output neurons or filters, ``n = in / groups * kernel entries``. The stacked filters of a
        grouped convolution, not the block-diagonal matrix. A view of the weight where there is one.
    """
    first, *rest = factors(chosen)
    with torch.autocast(first.device.type, enabled=False):
        return rest[0] @ first if rest else first


def factors(chosen: Chosen) -> list[Tensor]:
    """The one matrix ``(m, n)`` of a layer, or the two of a pair, ``(r, n)`` and ``(m, r)``; differentiable."""
    return [_read_weight(module).flatten(1) for module in chosen.modules]


def _read_weight(module: nn.Module) -> Tensor:
    """The weight; a parametrised one as in evaluation mode, since in training mode reading it may change buffers."""
    if not is_parametrized(module, "weight"):
        weight = module.weight
    else:
        assert isinstance(module.parametrizations, nn.ModuleDict)
        parts = list(module.parametrizations["weight"].modules())
        modes = [part.training for part in parts]
        try:
            for part in parts:
                part.training = False
            weight = module.weight
        finally:
            for part, training in zip(parts, modes, strict=True):
                part.training = training
    assert isinstance(weight, Tensor)
    return weight


def _find_module(
    model: nn.Module, name: str, pairs: dict[nn.Module, nn.Module], seconds: dict[nn.Module, nn.Module]
) -> nn.Module:
    """The module, or the first of the pair, that goes by a name."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise InputError(f"layers: expected names of the model's modules; got {name!r}") from None
    if type(module) is nn.Sequential and len(module) == 2 and pairs.get(module[0]) is module[1]:
        module = module[0]
    if not isinstance(module, nn.Linear | layer_view.Conv):
        raise InputError(f"layers: expected Linear or convolution modules; got {name!r}, a {type(module).__name__}")
    return seconds.get(module, module)


def _check_weight(module: nn.Module, name: str) -> None:
    if is_parametrized(module, "weight"):
        return
    weight = module.weight
    own_type = isinstance(weight, nn.UninitializedParameter) or has_own_arithmetic(weight)
    if not isinstance(weight, Tensor) or own_type:
        raise InputError(f"layers: expected weights of real numbers; got {type(weight).__name__} in {name!r}")
    if not weight.is_floating_point():
        raise InputError(f"layers: expected weights of real numbers; got {weight.dtype} in {name!r}")
