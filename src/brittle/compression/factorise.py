"""Low-rank training by module surgery: a chosen layer becomes two layers in a row, a pair, whose product it is.

A pair stands at its layer's name, as ``nn.Sequential(first, second)`` with weights ``<name>.0.weight`` (r x n) and
``<name>.1.weight`` (m x r), the bias with the second: ``brittle.audit`` reads it as one layer of rank r. Weight decay
on the factors is a surrogate of the nuclear norm, as ``||BA||_* <= (||B||_F^2 + ||A||_F^2) / 2``.
Formulas: theory page, "Interventions".
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from brittle.errors import InputError
from brittle.models.layers import read_layers
from brittle.models.selection import Chosen, chosen_layers

Map = nn.Linear | nn.Conv2d


def factorised(
    model: nn.Module,
    rank: int | float | Mapping[str, int],
    *,
    layers: Sequence[str] | None = None,
    initial: str = "svd",
    seed: int = 0,
) -> nn.Module:
    """A copy of a model in which every chosen layer is a low-rank pair.

    A Linear of n inputs and m outputs becomes Linear(n, r) without bias and Linear(r, m); a Conv2d with k x k kernels
    becomes a convolution into r channels with k x k kernels and the layer's own stride, padding, padding mode and
    dilation, and a 1 x 1 convolution. Its matrix, as theirs, is m x n with n = inputs * k * k. A pair has fewer
    weights than its layer if ``r (m + n) < m n``.

    Args:
        model: Left as it is.
        rank: r of every layer; or a number between 0 and 1, the share of ``min(m, n)`` (rounded, at least 1); or the
            rank of each layer by name, which then are the layers.
        layers: Names of the layers; by default :func:`brittle.models.selection.chosen_layers`. By default, layers
            whose rank would not be below ``min(m, n)`` and layers that are pairs already are left as they are.
        initial: ``"svd"``: ``(S_r^(1/2) V_r^T, U_r S_r^(1/2))``, whose product is the best approximation of rank r in
            the Frobenius and the spectral norm (Eckart & Young 1936). ``"random"``: Gaussian factors, scaled alike so
            that the product has the layer's own Frobenius norm.
        seed: Of the random factors.

    Returns:
        The copy; modules that are used in several places are replaced in all of them.

    Raises:
        InputError: A rank or name is out of range; a named layer's rank is not below ``min(m, n)``, or it is a pair;
            or a chosen layer cannot be replaced: it has groups, hooks, a parametrised or a shared weight, is of a
            subclass, or belongs to a torch module that reads its weight itself (as ``nn.MultiheadAttention`` does).

    >>> factorised(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), 2)[0]
    Sequential(
      (0): Linear(in_features=5, out_features=2, bias=False)
      (1): Linear(in_features=2, out_features=4, bias=True)
    )
    """
    if initial not in ("svd", "random"):
        raise InputError(f"initial: expected 'svd' or 'random'; got {initial!r}")
    names = list(rank) if isinstance(rank, Mapping) else layers
    if names is not layers and layers is not None:
        raise InputError("layers: expected None where rank names the layers; got both")
    copied = copy.deepcopy(model)
    chosen = chosen_layers(copied, names)
    ranks = {copied.get_submodule(name): r for name, r in rank.items()} if isinstance(rank, Mapping) else {}
    generator, pairs = torch.Generator().manual_seed(seed), dict[nn.Module, nn.Module]()
    for layer in chosen:
        r = _fitting(layer, ranks.get(layer.modules[0], rank), named=names is not None)
        if r is not None:
            module = _replaceable(copied, layer)
            matrix = module.weight.detach().flatten(1).double()
            factors = _best(matrix, r) if initial == "svd" else _drawn(matrix, r, generator)
            pairs[module] = _pair(module, *factors)
    return _replaced(copied, pairs)


def with_pairs(model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """A copy of a model with low-rank pairs at the given names, to be filled with a state dict.

    Args:
        model: As it was before it was factorised; left as it is.
        ranks: Rank by name, as :func:`rank_map` gives them; pairs that the model has by itself stay.

    Returns:
        The copy; until it is filled, its pairs hold random factors.

    Raises:
        InputError: As :func:`factorised`.
    """
    own = rank_map(model)
    missing = {name: r for name, r in ranks.items() if own.get(name) != r}
    return factorised(model, missing, initial="random") if missing else copy.deepcopy(model)


def rank_map(model: nn.Module) -> dict[str, int]:
    """The rank of every pair, by the name of its ``nn.Sequential`` of exactly two layers; {} if there is none.

    Raises:
        InputError: A weight holds NaN or infinite numbers.
    """
    return {name: _weight(pair[0]).shape[0] for name, pair in _pairs(model).items()}


def merged(model: nn.Module) -> nn.Module:
    """A copy of a model in which every pair of :func:`rank_map` is one layer again, its product.

    Args:
        model: Left as it is.

    Returns:
        The copy: the same function up to rounding, under the names that it had before it was factorised.

    Raises:
        InputError: A weight holds NaN or infinite numbers.
    """
    copied = copy.deepcopy(model)
    return _replaced(copied, {pair: _product(pair) for pair in _pairs(copied).values()})


def _fitting(layer: Chosen, rank: object, *, named: bool) -> int | None:
    """The layer's rank; None where it is to be left as it is."""
    if len(layer.modules) == 2:
        if named:
            raise InputError(f"layers: expected layers that are not yet low-rank pairs; got {layer.name!r}")
        return None
    side = min(_weight(layer.modules[0]).flatten(1).shape)
    if isinstance(rank, float) and 0 < rank < 1:
        rank = max(1, round(rank * side))
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise InputError(f"rank: expected a positive integer, or a share between 0 and 1; got {rank!r}")
    if rank < side:
        return rank
    if named:
        raise InputError(f"rank: expected less than {side}, the smaller side of layer {layer.name!r}; got {rank}")
    return None


def _replaceable(model: nn.Module, layer: Chosen) -> Map:
    module = layer.modules[0]
    reason = _obstacle(model, module)
    if reason is not None or not isinstance(module, Map):
        raise InputError(f"layers: expected layers that a low-rank pair can replace; layer {layer.name!r} {reason}")
    return module


def _obstacle(model: nn.Module, module: nn.Module) -> str | None:
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"is a {type(module).__name__}, not a plain Linear or Conv2d"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"has {module.groups} groups"
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks):
        return "has hooks"
    for other in model.modules():
        if other is not module and any(p is module.weight for p in other.parameters(recurse=False)):
            return "shares its weight with another module"
        reads = type(other).__module__.startswith("torch.nn.") and not isinstance(other, _CONTAINERS)
        if reads and any(child is module for child in other.children()):
            return f"is part of a {type(other).__name__}, which reads its weight"
    return None


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _pairs(model: nn.Module) -> dict[str, nn.Sequential]:
    second = {view.module: view.output for view in read_layers(model).views}
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Sequential and len(module) == 2 and second.get(module[0]) is module[1]
    }


def _replaced(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # named_children leaves out the second name of a shared module
            if child is not None and child in new:
                parent._modules[name] = new[child]
    return new.get(model, model)


def _best(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = S[:rank].sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def _drawn(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Both factors have singular values near one before they are scaled, as those of the SVD are balanced."""
    m, n = matrix.shape
    A = torch.randn(rank, n, generator=generator, dtype=torch.float64).to(matrix.device) / n**0.5
    B = torch.randn(m, rank, generator=generator, dtype=torch.float64).to(matrix.device) / m**0.5
    scale = (matrix.norm() / (B @ A).norm()).sqrt()
    return scale * A, scale * B


def _pair(module: Map, A: Tensor, B: Tensor) -> nn.Sequential:
    weight, rank = module.weight, len(A)
    place = {"device": weight.device, "dtype": weight.dtype}
    first = _shaped(module, rank)
    second: nn.Module
    if isinstance(module, nn.Linear):
        second = skip_init(nn.Linear, rank, len(B), bias=False, **place)
    else:
        second = skip_init(nn.Conv2d, rank, len(B), 1, bias=False, **place)
    for layer, factor in ((first, A), (second, B)):
        _fill(layer, factor).requires_grad_(weight.requires_grad)
    _set_bias(second, module.bias)
    return nn.Sequential(first, second).train(module.training)


def _product(pair: nn.Sequential) -> nn.Module:
    first, second = pair
    assert isinstance(first, Map)
    A, B = _weight(first), _weight(second)
    whole = _shaped(first, len(B))
    _fill(whole, B.flatten(1).double() @ A.flatten(1).double()).requires_grad_(A.requires_grad)
    bias: object = second.bias
    if first.bias is not None:  # of a model's own pair: a constant, which the second map takes along
        constant = B.flatten(1).double() @ first.bias.double()
        total = constant + bias.double() if isinstance(bias, Tensor) else constant
        bias = nn.Parameter(total.detach().to(A.dtype), first.bias.requires_grad)
    _set_bias(whole, bias)
    return whole.train(pair.training)


def _shaped(module: Map, outputs: int) -> nn.Module:
    """A map like the module, without bias, with another number of outputs; its weight is not initialised."""
    place = {"device": module.weight.device, "dtype": module.weight.dtype}
    if isinstance(module, nn.Linear):
        return skip_init(nn.Linear, module.in_features, outputs, bias=False, **place)
    return skip_init(
        nn.Conv2d,
        module.in_channels,
        outputs,
        module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        bias=False,
        padding_mode=module.padding_mode,
        **place,
    )


def _set_bias(module: nn.Module, bias: object) -> None:
    assert bias is None or isinstance(bias, nn.Parameter)
    module.register_parameter("bias", bias)


def _fill(module: nn.Module, matrix: Tensor) -> Tensor:
    weight = _weight(module)
    with torch.no_grad():
        weight.copy_(matrix.view(weight.shape))
    return weight


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
