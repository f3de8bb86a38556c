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
"""Of the patches that a convolution reads, in double precision."""


def refitted(
    compact: nn.Module,
    original: nn.Module,
    inputs: Tensor,
    *,
    rows: Mapping[str, Tensor] | None = None,
    layers: Sequence[str] | None = None,
    ridge: float = 0.3,
    batch_size: int = 128,
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
        inputs: ``(N, ...)``, of the kind that the network will meet.
        rows: Outputs of the original that a layer still has, rising, by name: :func:`kept_rows`. All where not named.
        layers: Names in the compressed network. By default every ``nn.Linear`` and ``nn.Conv2d`` of one group with a
            weight of its own that has a counterpart, runs once, and has at most ``LARGEST_FIT`` weights a row.
        ridge: Above 0, without unit: how much the fit is drawn to the weights that are there.
        batch_size: Inputs at once.

    Returns:
        The copy; zeros among its weights do not stay zeros. It takes two passes a layer, up to that layer.

    Raises:
        InputError: A value is out of range, a named layer cannot be fitted, outputs do not correspond, or a network
            cannot run on the inputs.
    """
    if len(inputs) == 0 or batch_size < 1 or not 0 < ridge < math.inf:
        got = f"{len(inputs)}, {batch_size} and {ridge}"
        raise InputError(f"inputs, batch_size, ridge: expected at least 1, 1, and a number above 0; got {got}")
    rows, repaired = rows or {}, copy.deepcopy(compact)
    with frozen(original), frozen(repaired), torch.no_grad():
        for fit in _fits(repaired, original, inputs, layers):
            equations = _Equations.of(fit.layer)
            for part in inputs.split(batch_size):
                _, target = _seen_at(fit.source, original, part)
                read, output = _seen_at(fit.layer, repaired, part)
                equations.add(read, _missing(target, output, rows.get(fit.source_name), fit))
            equations.solve(ridge, fit.name)
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


def _seen_at(layer: nn.Module, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer reads and what it yields when the model runs on ``x``."""
    seen = list[tuple[Tensor, Tensor]]()

    def look(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((args[0], output))
        raise _Reached

    with layer.register_forward_hook(look), suppress(_Reached):
        output_of(model, x.to(device_of(model)), "inputs")
    if not seen:
        raise InputError("original: expected a network that runs the same layers as the compressed one; got another")
    return seen[0]


def _missing(target: Tensor, output: Tensor, kept: Tensor | None, fit: _Fit) -> Tensor:
    """What a layer's outputs lack of those of the uncompressed one."""
    axis = 1 if isinstance(fit.layer, nn.Conv2d) else target.ndim - 1
    if kept is not None:
        target = target.index_select(axis, kept.to(target.device))
    if target.shape != output.shape:
        raise InputError(
            f"rows: expected the outputs of {fit.source_name!r} that {fit.name!r} still has; got "
            f"{tuple(target.shape[1:])} for {tuple(output.shape[1:])}"
        )
    return target.to(output.device) - output


@dataclass
class _Equations:
    """The normal equations of a layer's fit, summed up in double precision over what it reads, ``(T, n)``.

    Attributes:
        layer: The layer; its matrix is ``(m, n)``.
        origin: ``(n,)``, subtracted from what a layer with bias reads: about its mean, for near it no digits are lost.
        gram: ``(n, n)``: what it reads, times itself.
        cross: ``(m, n)``: what its outputs lack, times what it reads.
        read: ``(n,)``, the sum of what it reads.
        lacking: ``(m,)``, the sum of what its outputs lack.
        count: T.
    """

    layer: Map
    origin: Tensor
    gram: Tensor
    cross: Tensor
    read: Tensor
    lacking: Tensor
    count: int = 0

    @staticmethod
    def of(layer: Map) -> _Equations:
        W = layer.weight.flatten(1).double()
        (m, n), zeros = W.shape, W.new_zeros
        return _Equations(layer, zeros(n), zeros(n, n), zeros(m, n), zeros(n), zeros(m))

    def add(self, read: Tensor, missing: Tensor) -> None:
        """Take in a batch of what the layer reads, and of what its outputs lack."""
        m, n = self.cross.shape
        at_once = max(1, ENTRIES_AT_ONCE // (n * missing[0].numel() // m))
        for x, e in zip(read.split(at_once), missing.split(at_once), strict=True):
            X = _patches(self.layer, x).double()
            E = (e.movedim(1, -1) if isinstance(self.layer, nn.Conv2d) else e).reshape(-1, m).double()
            if self.count == 0 and self.layer.bias is not None:
                self.origin = X.mean(0)
            X = X - self.origin
            self.gram += X.mT @ X
            self.cross += E.mT @ X
            self.read += X.sum(0)
            self.lacking += E.sum(0)
            self.count += len(X)

    def solve(self, ridge: float, name: str) -> None:
        """Change the layer's weight and bias."""
        mean = self.read / self.count if self.layer.bias is not None else torch.zeros_like(self.read)
        C = self.gram - self.count * torch.outer(mean, mean)
        D = self.cross - torch.outer(self.lacking, mean)
        if not bool(torch.isfinite(D).all() and torch.isfinite(C).all()):
            raise InputError(f"inputs: expected finite values; got others at layer {name!r}")
        strength, change = ridge * C.trace() / len(C), torch.zeros_like(D)
        if strength > 0 and bool(D.any()):
            factor, failed = torch.linalg.cholesky_ex(C + strength * torch.eye(len(C)).to(C))
            if failed:
                raise InputError(f"ridge: expected a larger number for layer {name!r}; got {ridge}")
            change = torch.cholesky_solve(D.mT, factor).mT
        self.layer.weight.add_(change.view_as(self.layer.weight))
        if self.layer.bias is not None:
            self.layer.bias.add_(self.lacking / self.count - change @ (self.origin + mean))


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
