"""Universal perturbations: candidates read from the weights, and what one change does to held-out inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from brittle.attacks import universal_perturbation
from brittle.attacks.losses import margins
from brittle.attacks.pool import check_count
from brittle.attacks.region import check_budget
from brittle.data.checks import check_batch
from brittle.errors import InputError
from brittle.linear.norms import lp_norm
from brittle.linear.spectrum import power_iteration, top_right_singular_vectors
from brittle.models.activations import watch_calls
from brittle.models.borrow import Model, device_of, frozen, zero_like
from brittle.models.forward import logits_of, output_of
from brittle.models.layers import read_layers
from brittle.results import Rate, UniversalResult
from brittle.results.attacks import DATA_FREE, FITTED

FIT_BATCH, JUDGE_BATCH = 64, 256
"""Samples at once while a perturbation is fitted, and while it is judged."""
_ROWS = 256  # of a dense layer's matrix, read at once


@dataclass(frozen=True, eq=False)
class Candidate:
    """A universal perturbation that was read from the weights.

    Attributes:
        name: Sign, direction and layer.
        u: Perturbation, shaped like one input, in input units.
        exact: Whether no perturbation of this budget moves the layer's output further in the norm p (up to rounding);
            otherwise the direction is an estimate (p = 2) or a heuristic (p = inf).
    """

    name: str
    u: Tensor
    exact: bool


def data_free_perturbations(
    model: Model,
    shape: Sequence[int],
    *,
    eps: float,
    p: float = math.inf,
    bounds: tuple[float, float] = (0.0, 1.0),
    steps: int = 50,
    seed: int = 0,
) -> tuple[Candidate, ...]:
    r"""Universal perturbations that the weights of the first layer suggest, without data.

    Let A be the linear part of the map from the input to the output of the first layer that reads it; an input
    normalisation or any other affine operation before the layer is folded into A. With both signs:

    - a dense layer, p = inf: ``eps sign(a_i)``, a_i the row of A of largest l_1 norm. Exact:
      ``||A u||_inf = eps ||A||_inf``;
    - a dense layer, p = 2: ``eps v_1``, the first right singular vector of A. Exact: ``||A u||_2 = eps ||A||_2``;
    - any other layer (convolutions, layers on tokens), p = 2: ``eps v_1`` of A as an operator on the whole input, by
      power iteration, an estimate: its gain is a lower bound of ``||A||_2``;
    - any other layer, p = inf: ``eps sign(v_1)`` of the same, a heuristic: a row of A sees one patch of the input only.

    To move the first layer furthest is not to change most predictions: :func:`judge_universal` counts those. Source:
    theory page, section "Adversarial directions".

    Args:
        model: Network from ``(N, *shape)``; left bit-equal. A plain callable has no layers to read.
        shape: Shape of one input.
        eps: Budget, at least 0, in input units.
        p: Norm of the budget: 2 or inf.
        bounds: Smallest and largest admissible input value; what comes before the layer has to be affine between.
        steps: Power iterations, at least 1.
        seed: Of the points at which the map is read, and of the iteration's start.

    Returns:
        A direction with both signs, in the type of the model's parameters, ``||u||_p <= eps``; empty where the first
        layer is no affine function of the input, where its map is zero, and where there is no layer.

    Raises:
        InputError: An argument is out of range, or the model cannot run on the shape.
    """
    check_budget(eps, p, 1)
    check_count(steps, "steps")
    if not -math.inf < bounds[0] < bounds[1] < math.inf:
        raise InputError(f"bounds: expected (low, high) with low < high, both finite; got {bounds}")
    if not all(isinstance(side, int) and side > 0 for side in shape):
        raise InputError(f"shape: expected positive whole numbers, the shape of one input; got {tuple(shape)}")
    if not isinstance(model, nn.Module):
        return ()
    generator = torch.Generator().manual_seed(seed)
    with frozen(model), torch.enable_grad():
        names = _outputs(model)
        first = _first_layer(model, names, _points(model, shape, bounds, generator))
        if first is None:
            return ()
        layer, x, y = first
        if not _affine(y):
            return ()
        if dense := y.ndim == 2:
            A = _matrix(model, layer, x[:1], y.shape[1])
            row = int(A.abs().sum(1).argmax())
            what = f"sign of row {row} of" if p != 2 else "first right singular vector of"
            v = A[row] if p != 2 else _first_singular_vector(A)
        else:
            what = "leading direction of" if p == 2 else "sign of the leading direction of"
            v = _power_iteration(x, y, steps, generator)
    if not v.any():
        return ()
    v = v.double().cpu()
    unit = v / v.norm() if p == 2 else v.sign()
    u = (eps * unit).view(*shape).to(x)
    where = f"{what} “{names[layer]}”" + ("" if dense else " (estimate)" if p == 2 else " (heuristic)")
    return tuple(Candidate(f"{sign} {where}", factor * u, dense) for sign, factor in (("+", 1), ("−", -1)))


def _outputs(model: nn.Module) -> dict[nn.Module, str]:
    """The modules that yield the layers' outputs, with the layers' names (three parts of one matrix count as one)."""
    names: dict[nn.Module, str] = {}
    for view in read_layers(model).views:
        if view.output is not None:
            names[view.output] = view.name
        elif isinstance(view.module, nn.Linear):
            names.setdefault(view.module, view.name.rpartition(".")[0])
    return names


def _points(model: nn.Module, shape: Sequence[int], bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Two random inputs within the bounds and the point halfway between, ``(3, *shape)``."""
    a, b = bounds[0] + (bounds[1] - bounds[0]) * torch.rand(2, *shape, generator=generator, dtype=torch.float64)
    return torch.stack([a, b, (a + b) / 2]).to(zero_like(model))


def _first_layer(
    model: nn.Module, layers: Mapping[nn.Module, str] | Sequence[nn.Module], x: Tensor
) -> tuple[nn.Module, Tensor, Tensor] | None:
    """The first of the layers to yield a function of the input, the input as a leaf, and the layer's output there."""
    outputs: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, _: Tensor | None, output: Tensor | None) -> None:
        if not outputs and output is not None and output.requires_grad:
            outputs.append((module, output.clone()))  # what follows may work in place

    x = x.detach().requires_grad_()
    with watch_calls(layers, note):
        output_of(model, x, "shape")
    if not outputs or len(outputs[0][1]) != len(x):
        return None
    layer, output = outputs[0]
    return layer, x, output


def _affine(y: Tensor) -> bool:
    """Whether the last of three outputs lies halfway between the others, up to what rounding can do."""
    a, b, middle = y.detach().double()
    off, apart = ((a + b) / 2 - middle).abs().max(), (a - b).abs().max()
    return bool(off <= max(1e-3, 8 * torch.finfo(y.dtype).eps) * apart)


def _matrix(model: nn.Module, layer: nn.Module, x: Tensor, rows: int) -> Tensor:
    """The map's matrix ``(rows, n)`` in float64 on the CPU: gradients of every entry of the output."""
    parts = []
    for part in torch.eye(rows, dtype=x.dtype, device=x.device).split(_ROWS):
        found = _first_layer(model, [layer], x.detach().expand(len(part), *x.shape[1:]))
        assert found is not None
        parts.append(torch.autograd.grad(found[2], found[1], part)[0].flatten(1).double().cpu())
    return torch.cat(parts)


def _first_singular_vector(A: Tensor) -> Tensor:
    """``(n,)``, its largest entry positive; zero for a zero matrix."""
    if not A.any():
        return torch.zeros_like(A[0])
    v = top_right_singular_vectors(A, 1)[:, 0]
    return v * v[v.abs().argmax()].sign()


def _power_iteration(x: Tensor, y: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """The direction ``(n,)`` that ``A^T A`` leads to from a random start; zero when A maps it to zero.

    ``A v`` is the derivative of ``<A^T w, v>`` in w; all but the first sample stand still.
    """
    start = torch.zeros_like(x)
    start[0] = torch.randn(x.shape[1:], generator=generator, dtype=torch.float64).to(x)
    w = torch.zeros_like(y, requires_grad=True)
    (pulled,) = torch.autograd.grad(y, x, w, create_graph=True)

    def there_and_back(v: Tensor) -> Tensor:
        (image,) = torch.autograd.grad(pulled, w, v, retain_graph=True)
        return torch.autograd.grad(y, x, image, retain_graph=True)[0]

    gains, v = power_iteration(there_and_back, start, steps)
    return (v[0] if gains[0] > 0 else torch.zeros_like(v[0])).flatten()


def judge_universal(
    model: Model,
    samples: tuple[Tensor, Tensor],
    *,
    p: float,
    eps: float,
    bounds: tuple[float, float] = (0.0, 1.0),
    draws: int = 5,
    seed: int = 0,
) -> list[UniversalResult]:
    """Universal perturbations chosen on a random half of the samples and judged on the other, beside random ones.

    One is fitted by :func:`brittle.universal_perturbation`; another is the candidate of
    :func:`data_free_perturbations` that leaves the fewest right answers on the fitting half, where only its sign is
    chosen. Inputs are clipped to the bounds under every perturbation. The control has the same size: random signs
    (p = inf), or a random direction (p = 2).

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``; left bit-equal.
        samples: Inputs ``(N, ...)`` and labels ``(N,)``.
        p: Norm of the budget: 2 or inf.
        eps: Budget, at least 0, in input units.
        bounds: Smallest and largest admissible input value.
        draws: Random perturbations, at least 1.
        seed: Of the split, the candidates and the random perturbations.

    Returns:
        A ``fitted`` and, where the weights suggest one, a ``data-free`` result: measured on these samples, estimates.
        None at all when there are fewer than two samples.

    Raises:
        InputError: An argument is out of range, or the model or the samples cannot be used.
    """
    check_budget(eps, p, 1)
    check_count(draws, "draws")
    check_batch(*samples, bounds=bounds)
    x, y = samples[0].to(device_of(model)), samples[1].to(device_of(model)).long()
    if len(x) < 2:
        return []
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator).to(x.device)
    fit, held = order[: len(x) // 2], order[len(x) // 2 :]

    def right(rows: Tensor, u: Tensor) -> Tensor:
        logits = logits_of(model, (x[rows] + u.to(x)).clamp(*bounds), y[rows], JUDGE_BATCH)
        return margins(logits, y[rows]) > 0

    with frozen(model):
        clean = right(held, torch.zeros_like(x[0]))
        batches = [(x[part], y[part]) for part in fit.split(FIT_BATCH)]
        fitted = universal_perturbation(model, batches, eps=eps, p=p, bounds=bounds)
        chosen = [(FITTED, "projected ascent", fitted)]
        free = data_free_perturbations(model, x.shape[1:], eps=eps, p=p, bounds=bounds, seed=seed)
        if free:
            best = min(free, key=lambda candidate: int(right(fit, candidate.u).sum()))
            chosen.append((DATA_FREE, best.name, best.u))
        controls = [right(held, _random(x[:1], eps, p, generator)) for _ in range(draws)]
        under = [right(held, u) for _, _, u in chosen]
    n = int(clean.sum())
    return [
        UniversalResult(
            p=float(p),
            eps=float(eps),
            kind=kind,
            direction=name,
            fitted_on=len(fit),
            fooled=Rate(int((clean & ~survives).sum()), n),
            random_fooled=tuple(Rate(int((clean & ~control).sum()), n) for control in controls),
            robust=Rate(int(survives.sum()), len(held)),
        )
        for (kind, name, _), survives in zip(chosen, under, strict=True)
    ]


def _random(like: Tensor, eps: float, p: float, generator: torch.Generator) -> Tensor:
    """A random perturbation of one input of norm eps; ``like`` is a batch of one."""
    noise = torch.randn(like.shape, generator=generator).to(like)
    return eps * (noise.sign() if math.isinf(p) else noise / lp_norm(noise, 2))[0]
