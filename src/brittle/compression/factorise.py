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

from brittle.compression.surgery import Map, make_pair, map_like, replace_modules, replaceable_module
from brittle.errors import InputError
from brittle.models.layers import read_layers
from brittle.models.selection import Chosen, chosen_layers, matrix


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
        r = _layer_rank(layer, ranks.get(layer.modules[0], rank), named=names is not None)
        if r is not None:
            module = replaceable_module(copied, layer)
            W = module.weight.detach().flatten(1).double()
            factors = _best_factors(W, r) if initial == "svd" else _random_factors(W, r, generator)
            pairs[module] = make_pair(module, *factors)
    return replace_modules(copied, pairs)


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
    there = rank_map(model)
    missing = {name: r for name, r in ranks.items() if there.get(name) != r}
    return factorised(model, missing, initial="random") if missing else copy.deepcopy(model)


def rank_map(model: nn.Module) -> dict[str, int]:
    """The rank of every pair, by the name of its ``nn.Sequential`` of exactly two layers; {} if there is none.

    Raises:
        InputError: A weight holds NaN or infinite numbers.
    """
    return {name: len(first.weight) for name, (_, first, _) in _find_pairs(model).items()}


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
    return replace_modules(
        copied, {pair: _merge(*maps).train(pair.training) for pair, *maps in _find_pairs(copied).values()}
    )


def _layer_rank(layer: Chosen, rank: object, *, named: bool) -> int | None:
    """The layer's rank; None where it is to be left as it is."""
    if len(layer.modules) == 2:
        if named:
            raise InputError(f"layers: expected layers that are not yet low-rank pairs; got {layer.name!r}")
        return None
    with torch.no_grad():
        side = min(matrix(layer).shape)
    if isinstance(rank, float) and 0 < rank < 1:
        rank = max(1, round(rank * side))
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise InputError(f"rank: expected a positive integer, or a share between 0 and 1; got {rank!r}")
    if rank < side:
        return rank
    if named:
        raise InputError(f"rank: expected less than {side}, the smaller side of layer {layer.name!r}; got {rank}")
    return None


def _find_pairs(model: nn.Module) -> dict[str, tuple[nn.Sequential, Map, Map]]:
    """Every ``nn.Sequential`` of exactly the two layers of a pair, with these, by name."""
    seconds = {view.module: view.output for view in read_layers(model).views}
    pairs = {}
    for name, module in model.named_modules():
        if type(module) is nn.Sequential and len(module) == 2 and seconds.get(module[0]) is module[1]:
            first, second = module
            assert isinstance(first, Map)
            assert isinstance(second, Map)
            pairs[name] = module, first, second
    return pairs


def _best_factors(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = S[:rank].sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def _random_factors(W: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    m, n = W.shape
    # Both have singular values near one before they are scaled alike, as the factors of the SVD are balanced.
    A = torch.randn(rank, n, generator=generator, dtype=torch.float64).to(W.device) / n**0.5
    B = torch.randn(m, rank, generator=generator, dtype=torch.float64).to(W.device) / m**0.5
    scale = (W.norm() / (B @ A).norm()).sqrt()
    return scale * A, scale * B


def _merge(first: Map, second: Map) -> Map:
    """One map, the product of the two."""
    B = second.weight.flatten(1).double()
    whole = map_like(first, B @ first.weight.flatten(1).double())
    whole.bias = second.bias
    if first.bias is not None:  # of a model's own pair: a constant, which the second map takes along
        constant = B @ first.bias.double()
        total = constant if second.bias is None else constant + second.bias.double()
        whole.bias = nn.Parameter(total.detach().to(first.weight.dtype), first.bias.requires_grad)
    return whole
