"""Least-squares repair: what a layer still reads is weighed anew, so that its outputs come near those before the cut.

Formulas: theory page, "Repair without labels".
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brittle.compression.removal import Kept, Units, lost_channels
from brittle.compression.surgery import Map, obstacle
from brittle.errors import InputError
from brittle.linear.conv_geometry import ConvGeometry
from brittle.models.borrow import device_of, frozen
from brittle.models.forward import output_of

LARGEST_FIT = 8192
"""Most weights of one row that are fitted: the normal equations have the square of that many entries."""
ENTRIES_AT_ONCE = 2**24
"""Of the patches that a convolution reads."""
OUTPUTS_AT_ONCE = 2**28
"""Entries of the uncompressed layers' outputs that are held together, about: a gigabyte in single precision."""
SINGLE = 0.1
"""Least ridge at which the products of a network in single precision are taken in it: they are off by some 10^-7 of C,
which is at most ``n / ridge`` times what the ridge adds to it, and so by a hundredth of that."""


def refitted(
    compact: nn.Module,
    original: nn.Module,
    inputs: Tensor,
    *,
    rows: Mapping[str, Tensor] | None = None,
    layers: Sequence[str] | None = None,
    ridge: float = 0.3,
) -> nn.Module:
    r"""A copy of a compressed network, its layers fitted to the outputs of the uncompressed one; no labels.

    Layer by layer in the order of computation, weight W and bias become the V and c that minimise

        ``sum_t ||y_t - V x_t - c||^2 + lambda ||V - W||_F^2``,  ``lambda = ridge tr(C) / n``.

    t runs over inputs and positions, y are the uncompressed layer's outputs, x ``(n,)`` what the layer reads in the
    network as it is repaired so far, so that errors do not add up, and C is ``sum_t (x_t - mean)(x_t - mean)^T``. A
    layer without bias gets none: c is 0 and C not centred. Solved in closed form in double precision. On these inputs
    no fit raises a layer's squared error, up to the rounding of its weights, and where the removed inputs were affine
    (without bias: linear) functions of those that stay, the error vanishes with the ridge.

    Args:
        compact: The compressed network: modules of the original under their names, of fewer outputs or inputs; left
            bit-equal. Where a layer became a low-rank pair, the second factor is fitted to the layer's outputs.
        original: The uncompressed network; left bit-equal.
        inputs: ``(N, ...)``, of the kind that the network will meet. They go through the networks together: memory is
            taken for what the largest layer yields of all of them.
        rows: Outputs of the original that a layer still has, rising, by name: :func:`kept_rows`. All where not named.
        layers: Names in the compressed network. By default every ``nn.Linear`` and ``nn.Conv2d`` of one group with a
            weight of its own that has a counterpart, runs once, and has at most ``LARGEST_FIT`` weights a row.
        ridge: Above 0, without unit: how much the fit is drawn to the weights that are there.

    Returns:
        The copy; zeros among its weights do not stay zeros. It takes one pass of each network: every layer is fitted
        when its turn has come, and hands on what it yields by then.

    Raises:
        InputError: A value is out of range, a named layer cannot be fitted, outputs do not correspond, or a network
            cannot run on the inputs.
    """
    if len(inputs) == 0 or not 0 < ridge < math.inf:
        raise InputError(f"inputs, ridge: expected at least 1, and a number above 0; got {len(inputs)} and {ridge}")
    repaired = copy.deepcopy(compact)
    with frozen(original), frozen(repaired), torch.no_grad(), ExitStack() as hooks:
        fits = list(_fits(repaired, original, inputs[:2], layers))
        targets = _Targets(original, inputs, fits, rows or {})

        def fit_in_turn(fit: _Fit, args: Sequence[Tensor]) -> None:
            read = args[0]
            missing = _missing(targets.take(fit), fit.layer.forward(read), fit)
            _solve(fit, read, missing, ridge)

        for fit in fits:
            turn = lambda _, args, options, fit=fit: fit_in_turn(fit, (*args, *options.values()))  # noqa: E731
            hooks.enter_context(fit.layer.register_forward_pre_hook(turn, with_kwargs=True))
        if fits:
            repaired(inputs.to(device_of(repaired)))
    return repaired


def kept_rows(model: nn.Module, groups: Sequence[Units], kept: Kept) -> dict[str, Tensor]:
    """The outputs that stay, rising, by the name of every Linear and Conv2d that loses some.

    Args:
        model: The uncompressed network; only read.
        groups: Its groups of units.
        kept: Units that stay, by group name.
    """
    rows = {}
    for (name, out), lost in lost_channels(groups, kept).items():
        module = model.get_submodule(name)
        if out and isinstance(module, Map):
            stays = torch.ones(len(module.weight), dtype=torch.bool)
            stays[lost] = False
            rows[name] = stays.nonzero().flatten()
    return rows


@dataclass(frozen=True)
class _Fit:
    """A layer of the compressed network, and the layer of the original whose outputs it is to have."""

    name: str
    layer: Map
    source_name: str
    source: Map


def _fits(compact: nn.Module, original: nn.Module, x: Tensor, layers: Sequence[str] | None) -> Iterator[_Fit]:
    """The layers to fit, in the order in which they run on ``x``."""
    maps, sources = (
        {name: module for name, module in model.named_modules() if isinstance(module, Map)}
        for model in (compact, original)
    )
    calls = _calls(compact, maps, x)
    if layers is not None and (isinstance(layers, str) or set(layers) - set(calls)):
        raise InputError(f"layers: expected names of Linear and Conv2d layers that run; got {layers!r}")
    for name in dict.fromkeys(calls):
        if layers is not None and name not in layers:
            continue
        layer, source_name = maps[name], _counterpart(name, sources)
        reason = obstacle(compact, layer)
        if source_name is None:
            reason = "has no counterpart in the uncompressed network"
        elif calls.count(name) > 1:
            reason = "runs more than once"
        elif layer.weight[0].numel() > LARGEST_FIT:
            reason = f"has {layer.weight[0].numel()} weights a row, more than {LARGEST_FIT}"
        if reason is None and source_name is not None:
            yield _Fit(name, layer, source_name, sources[source_name])
        elif layers is not None:
            raise InputError(f"layers: expected layers that can be fitted; layer {name!r} {reason}")


def _calls(model: nn.Module, maps: Mapping[str, nn.Module], x: Tensor) -> list[str]:
    """Names of layers as they run."""
    calls = list[str]()
    with ExitStack() as hooks:
        for name, module in maps.items():
            hooks.enter_context(module.register_forward_pre_hook(lambda *_, name=name: calls.append(name)))
        output_of(model, x.to(device_of(model)), "inputs")
    return calls


def _counterpart(name: str, sources: Mapping[str, nn.Module]) -> str | None:
    """The layer of the original with that name; of the second factor of a pair, the layer that the pair replaces."""
    whole, _, last = name.rpartition(".")
    return name if name in sources else whole if last == "1" and whole in sources else None


class _Reached(BaseException):
    """Ends a forward pass whose rest is of no interest; no ``except Exception`` of a network's own stops it."""


class _Targets:
    """What the uncompressed layers yield, seen as the fits need it: a pass yields as many as may be held together.

    Args:
        original: The uncompressed network.
        inputs: ``(N, ...)``.
        fits: Of the layers, in their order.
        rows: Outputs that a layer still has, by the name of the uncompressed one.
    """

    def __init__(self, original: nn.Module, inputs: Tensor, fits: Sequence[_Fit], rows: Mapping[str, Tensor]) -> None:
        self._original, self._inputs, self._rows = original, inputs.to(device_of(original)), rows
        self._unseen = {fit.source_name: fit.source for fit in fits}
        self._seen = dict[str, Tensor]()

    def take(self, fit: _Fit) -> Tensor:
        """What a layer of the compressed network is to yield; asked for once."""
        while fit.source_name not in self._seen:
            before = len(self._seen)
            with ExitStack() as hooks, suppress(_Reached):
                for name, source in self._unseen.items():
                    look = lambda _, args, output, name=name: self._keep(name, output)  # noqa: E731
                    hooks.enter_context(source.register_forward_hook(look))
                output_of(self._original, self._inputs, "inputs")
            self._unseen = {name: source for name, source in self._unseen.items() if name not in self._seen}
            if len(self._seen) == before:
                raise InputError(
                    "original: expected a network that runs the same layers as the compressed one; got another"
                )
        return self._seen.pop(fit.source_name)

    def _keep(self, name: str, output: Tensor) -> None:
        """Keep the rows that are still there of what a layer yields, and end the pass where that is enough."""
        if name in self._seen:
            return
        rows = self._rows.get(name)
        axis = 1 if isinstance(self._unseen[name], nn.Conv2d) else output.ndim - 1
        copied = output.clone() if rows is None else output.index_select(axis, rows.to(output.device))
        self._seen[name] = copied  # a copy, for what reads the output may change it in place
        enough = sum(tensor.numel() for tensor in self._seen.values()) >= OUTPUTS_AT_ONCE
        if enough or len(self._unseen.keys() - self._seen.keys()) == 0:
            raise _Reached


def _missing(target: Tensor, output: Tensor, fit: _Fit) -> Tensor:
    """What a layer's outputs lack of those of the uncompressed one."""
    if target.shape != output.shape:
        raise InputError(
            f"rows: expected the outputs of {fit.source_name!r} that {fit.name!r} still has; got "
            f"{tuple(target.shape[1:])} for {tuple(output.shape[1:])}"
        )
    return target.to(output.device) - output


def _solve(fit: _Fit, read: Tensor, missing: Tensor, ridge: float) -> None:
    """Change a layer's weight and bias so that it yields more of what is missing of its outputs."""
    layer = fit.layer
    m, n = len(layer.weight), layer.weight[0].numel()
    few = missing.numel() // m < n
    change, mean, lacking = (_by_samples if few else _by_weights)(layer, read, missing, ridge)
    if not bool(torch.isfinite(change).all() and torch.isfinite(lacking).all()):
        raise InputError(
            f"inputs: expected finite values at layer {fit.name!r}, and a ridge that rounding leaves; got others"
        )
    layer.weight.add_(change.view_as(layer.weight))
    if layer.bias is not None:
        layer.bias.add_(lacking - change @ mean)


Solution = tuple[Tensor, Tensor, Tensor]
"""The change of a matrix ``(m, n)``, and the means of what it reads ``(n,)`` and of what its outputs lack ``(m,)``."""


def _by_weights(layer: Map, read: Tensor, missing: Tensor, ridge: float) -> Solution:
    """From the normal equations of the weights of a row, ``(n, n)``, summed up part by part."""
    m, n = len(layer.weight), layer.weight[0].numel()
    single = ridge >= SINGLE and layer.weight.dtype == torch.float32
    zeros, own = layer.weight.new_zeros, torch.float32 if single else torch.double
    gram, cross = zeros(n, n, dtype=torch.double), zeros(m, n, dtype=torch.double)
    reads, lacks = zeros(n, dtype=torch.double), zeros(m, dtype=torch.double)
    origin, count = zeros(n, dtype=own), 0
    for x, e in _parts(layer, read, missing):
        X, E = x.to(own), e.to(own)
        if count == 0 and layer.bias is not None:
            origin = X.mean(0)  # about the mean, for near it no digits are lost
        X = X - origin
        gram += X.mT @ X
        cross += E.mT @ X
        reads += X.sum(0)
        lacks += E.sum(0)
        count += len(X)
    mean = reads / count if layer.bias is not None else zeros(n, dtype=torch.double)
    C, D = gram - count * torch.outer(mean, mean), cross - torch.outer(lacks, mean)
    strength = ridge * C.trace() / n
    change = _divided(C, D, strength) if strength != 0 and bool(D.any()) else torch.zeros_like(D)
    return change, origin.double() + mean, lacks / count


def _by_samples(layer: Map, read: Tensor, missing: Tensor, ridge: float) -> Solution:
    """From the equations of the T samples and positions, ``(T, T)``, where they are fewer than the weights of a row.

    ``D (C + lambda I)^-1 = E^T (X X^T + lambda I)^-1 X`` for ``C = X^T X`` and ``D = E^T X``.
    """
    X, E = (torch.cat(parts).double() for parts in zip(*_parts(layer, read, missing), strict=True))
    mean, lacking = X.mean(0), E.mean(0)
    if layer.bias is not None:
        X, E = X - mean, E - lacking
    strength = ridge * X.square().sum() / X.shape[1]
    nothing = strength == 0 or not bool(E.any())
    change = E.new_zeros(E.shape[1], X.shape[1]) if nothing else _divided(X @ X.mT, E.mT, strength) @ X
    return change, mean, lacking


def _divided(C: Tensor, D: Tensor, strength: Tensor) -> Tensor:
    """``D (C + strength I)^-1``; not numbers where rounding has made C no square."""
    factor, failed = torch.linalg.cholesky_ex(C + strength * torch.eye(len(C)).to(C))
    return D * math.nan if failed else torch.cholesky_solve(D.mT, factor).mT


def _parts(layer: Map, read: Tensor, missing: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What the layer multiplies its matrix with, ``(t, n)``, and what its outputs lack, ``(t, m)``, part by part."""
    m, n = len(layer.weight), layer.weight[0].numel()
    at_once = max(1, ENTRIES_AT_ONCE // (n * missing[0].numel() // m))
    for x, e in zip(read.split(at_once), missing.split(at_once), strict=True):
        yield _patches(layer, x), (e.movedim(1, -1) if isinstance(layer, nn.Conv2d) else e).reshape(-1, m)


def _patches(layer: Map, x: Tensor) -> Tensor:
    """What a layer multiplies its matrix with, ``(T, n)``."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, layer.in_features)
    geometry = ConvGeometry.of(layer)
    (top, bottom), (left, right) = geometry.padding
    mode = "constant" if geometry.mode == "zeros" else geometry.mode
    padded = F.pad(x, [left, right, top, bottom], mode=mode)
    columns = F.unfold(padded, layer.kernel_size, geometry.dilation, stride=geometry.stride)
    return columns.transpose(1, 2).flatten(0, 1)
