"""Adversarial directions: where a perturbation's energy goes at each layer, and how it grows on its way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from brittle.attacks.losses import loss_and_gradient, margins
from brittle.linear.convolution import apply
from brittle.linear.norms import dual_exponent, lp_norm
from brittle.linear.spectrum import top_right_singular_vectors
from brittle.models.activations import watch_calls
from brittle.models.borrow import Model, device_of, frozen
from brittle.models.layers import LayerView
from brittle.results import FRACTIONS, LayerResponse


def energy_shares(V: Tensor, view: LayerView, perturbation: Tensor) -> Tensor:
    r"""Cumulative energy of a perturbation in a layer's leading right singular directions.

    ``E_k = sum_{i <= k} <v_i, a>^2 / ||a||^2``; for a convolution both sums run over all patches ``a`` that the filters
    see, and V holds directions of the filter matrix.

    Args:
        V: Directions ``(n, K)``.
        view: The layer, dense or an ungrouped convolution.
        perturbation: Change of the layer's input, ``(N, ..., n)`` or ``(N, in, *size)``.

    Returns:
        ``(N, K)``; NaN where the perturbation is zero.
    """
    V = V.to(perturbation)
    if view.geometry is None:
        flat = perturbation.flatten(1, -2) if perturbation.ndim > 2 else perturbation[:, None]
        squares = (flat @ V).square().sum(1)
    else:
        kernel = V.mT.reshape(-1, *view.weight.shape[1:])
        squares = apply(kernel, view.geometry, perturbation).square().flatten(2).sum(2)
    return squares.cumsum(1) / energy_read(view, perturbation)[:, None]


def energy_read(view: LayerView, perturbation: Tensor) -> Tensor:
    """Squared l_2 norm of all that a layer's matrix is multiplied with: of the perturbation ``(N, ...)`` where the
    layer is dense, of all patches that the filters see where it is a convolution without groups. ``(N,)``.
    """
    if view.geometry is None:
        return perturbation.flatten(1).square().sum(1)
    ones = torch.ones(1, *view.weight.shape[1:], dtype=perturbation.dtype, device=perturbation.device)
    return apply(ones, view.geometry, perturbation.square()).flatten(1).sum(1)


def other_class(y: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of samples of different classes: rows, and for each the row of its partner, ``(M,)`` both.

    Sorted by class, samples and their partners are as far apart as the most frequent class is large. Rows whose
    partner is of the same class all the same (one class holds most samples) are left out.

    Args:
        y: Classes ``(N,)``, integers of at least 0.
    """
    order = y.argsort(stable=True)
    partner = torch.empty_like(order)
    partner[order] = order.roll(-int(y.bincount().max()) if len(y) else 0)
    rows = (y[partner] != y).nonzero()[:, 0]
    return rows, partner[rows]


@dataclass
class _Collected:
    """Per-sample numbers of one layer, batch after batch."""

    view: LayerView
    V: Tensor | None
    shares: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    relative: list[Tensor] = field(default_factory=list)
    gain: list[Tensor] = field(default_factory=list)

    def add(self, clean: tuple[Tensor, Tensor], adversarial: tuple[Tensor, Tensor], length: Tensor) -> None:
        change = lp_norm(adversarial[1] - clean[1], 2)
        if self.V is not None:
            self.shares.append(energy_shares(self.V, self.view, adversarial[0] - clean[0]).cpu())
            self.steps.append((change / energy_read(self.view, adversarial[0] - clean[0]).sqrt()).cpu())
        self.relative.append((change / lp_norm(clean[1], 2)).cpu())
        self.gain.append((change / length).cpu())

    def result(self, p: float, unchanged: int) -> LayerResponse:
        """Means and medians over the samples where every ratio exists."""
        relative, gain = torch.cat(self.relative), torch.cat(self.gain)
        valid = torch.isfinite(relative) & torch.isfinite(gain)
        k, energy, isotropic, errors = self._energy(torch.cat(self.shares) if self.shares else None)
        n, (step, step_error) = int(valid.sum()), self._step()
        return LayerResponse(
            layer=self.view.name,
            p=float(p),
            k=k,
            energy=energy,
            isotropic=isotropic,
            amplification=float(relative[valid].median()) if n else None,
            gain=float(gain[valid].median()) if n else None,
            n=n,
            excluded=len(valid) - n + unchanged,
            energy_error=errors,
            step=step,
            step_error=step_error,
        )

    def _step(self) -> tuple[float | None, float | None]:
        """Geometric mean of the layer's own gain, and the standard error of its logarithm."""
        logarithms = torch.cat(self.steps).double().log() if self.steps else torch.empty(0)
        logarithms = logarithms[torch.isfinite(logarithms)]  # the perturbation arrives, and comes out
        if not len(logarithms):
            return None, None
        error = float(logarithms.std()) / math.sqrt(len(logarithms)) if len(logarithms) > 1 else None
        return math.exp(float(logarithms.mean())), error

    def _energy(
        self, shares: Tensor | None
    ) -> tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
        """Numbers of directions, mean shares in them, what an isotropic perturbation has, and standard errors."""
        shares = None if shares is None else shares[torch.isfinite(shares).all(1)]
        if shares is None or not len(shares) or not shares.shape[1]:  # none right, or a matrix of zeros
            return (), (), (), ()
        m, n = self.view.matrix.shape
        ranks = {1, *(max(1, -(-int(f * 100) * min(m, n) // 100)) for f in FRACTIONS)}
        k = tuple(sorted({min(rank, shares.shape[1]) for rank in ranks}))
        means = shares.double().mean(0)
        errors: tuple[float, ...] = ()  # one sample has none
        if len(shares) > 1:
            errors = tuple(float(shares[:, i - 1].double().std()) / math.sqrt(len(shares)) for i in k)
        return k, tuple(float(means[i - 1]) for i in k), tuple(i / n for i in k), errors


def layer_responses(
    model: Model,
    views: Sequence[LayerView],
    x: Tensor,
    x_adv: Tensor,
    *,
    p: float,
    directions: Mapping[str, Tensor] | None = None,
    batch_size: int = 64,
) -> tuple[list[LayerResponse], list[str]]:
    """What perturbations do at every layer: energy in its leading directions, amplification and gain.

    Args:
        model: The network; left bit-equal.
        views: Its layers, from :func:`brittle.models.layers.read_layers`.
        x: Inputs ``(N, ...)``.
        x_adv: The same inputs under attack.
        p: Norm of the attack's budget, recorded in the result.
        directions: What :func:`leading_directions` returned for the views; computed when left out.
        batch_size: Samples at once.

    Returns:
        One response a layer, in the layers' order, and the names of the layers that never ran as modules.
    """
    changed = (x_adv != x).flatten(1).any(1)
    unchanged = int((~changed).sum())
    whole = [view for view in views if view.output is not None]
    if unchanged == len(x):
        return [LayerResponse(v.name, float(p), (), (), (), None, None, 0, unchanged) for v in whole], []
    x, x_adv = x[changed], x_adv[changed]
    by_layer = leading_directions(whole) if directions is None else directions
    device = device_of(model)
    collected = [_Collected(v, by_layer[v.name].to(device) if v.name in by_layer else None) for v in whole]
    ran: set[str] = set()
    with frozen(model), torch.no_grad():
        for part in torch.arange(len(x), device=x.device).split(batch_size):
            clean, adversarial = _record(model, whole, x[part]), _record(model, whole, x_adv[part])
            length = lp_norm(x_adv[part] - x[part], 2)
            for entry in collected:
                if entry.view.name in clean and entry.view.name in adversarial:
                    ran.add(entry.view.name)
                    entry.add(clean[entry.view.name], adversarial[entry.view.name], length)
    results = [entry.result(p, unchanged) for entry in collected if entry.view.name in ran]
    return results, [view.name for view in whole if view.name not in ran]


def first_order_distances(model: Model, x: Tensor, y: Tensor, p: float, batch_size: int = 64) -> Tensor:
    r"""To first order, the distance to the nearest wrong answer: ``m(x) / ||grad m(x)||_q``, ``(N,)``.

    m is the margin ``s_y - max_{j != y} s_j`` and q dual to p. Exact for a linear classifier of two classes;
    otherwise an estimate and no bound. 0 where the margin is not positive, and else infinite
    where its gradient is zero. Arguments as :func:`margins_and_slopes`.
    """
    margin, slope = margins_and_slopes(model, x, y, p, batch_size)
    return torch.where(margin > 0, margin / slope, 0.0)


def margins_and_slopes(model: Model, x: Tensor, y: Tensor, p: float, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """The margin ``m = s_y - max_{j != y} s_j`` at every input, and its slope ``||grad m||_q`` with q dual to p.

    Args:
        model: Network to logits; left bit-equal.
        x: Inputs ``(N, ...)``.
        y: Labels ``(N,)``.
        p: Norm in which inputs move: 2 or inf.
        batch_size: Samples at once.

    Returns:
        ``(N,)`` both, on the CPU: logit units, and logit units per input unit.
    """
    found, slopes = [torch.empty(0, dtype=x.dtype)], [torch.empty(0, dtype=x.dtype)]
    with frozen(model):
        for start in range(0, len(x), batch_size):
            part = slice(start, start + batch_size)
            margin, _, gradient = loss_and_gradient(model, margins, x[part], y[part])
            found.append(margin.cpu())
            slopes.append(lp_norm(gradient, dual_exponent(p)).cpu())
    return torch.cat(found), torch.cat(slopes)


def leading_directions(views: Sequence[LayerView]) -> dict[str, Tensor]:
    """The right singular vectors of the larger half of every layer's singular values, by the layer's name.

    Args:
        views: Layers; those whose directions do not act on one input (grouped convolutions, parts of a fused
            module, convolutions that are not understood) are left out.

    Returns:
        ``(n, K)`` in float64 each, K at most half the number of singular values, rounded up, and the rank.
    """
    return {
        view.name: top_right_singular_vectors(view.matrix, max(1, -(-min(view.matrix.shape) // 2)))
        for view in views
        if view.output is not None and view.groups == 1 and (view.geometry is not None or not view.convolution)
    }


def _record(model: Model, views: Sequence[LayerView], x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of every layer during one forward pass, each layer's first call."""
    inputs: dict[nn.Module, Tensor] = {}
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, read: Tensor | None, output: Tensor | None) -> None:
        if read is not None and module not in inputs:
            inputs[module] = read.clone()  # what follows may work in place
        if output is not None and module not in outputs:
            outputs[module] = output.clone()

    with watch_calls((module for view in views for module in (view.module, view.output) if module is not None), keep):
        model(x)
    return {
        view.name: (inputs[view.module], outputs[view.output])
        for view in views
        if view.module in inputs and view.output is not None and view.output in outputs
    }
