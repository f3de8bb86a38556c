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
from brittle.results.methods import UniversalKind

FIT_BATCH, JUDGE_BATCH = 64, 256
"""Samples at once while a perturbation is fitted, and while it is judged."""
MATRIX_ROWS = 256
"""Rows of a dense layer's matrix that are read at once."""


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
    generator, (low, high) = torch.Generator().manual_seed(seed), bounds
    a, b = low + (high - low) * torch.rand(2, *shape, generator=generator, dtype=torch.float64)
    with frozen(model), torch.enable_grad():
        names = _name_outputs(model)
        # An affine map takes the point halfway between two others to the point halfway between their images.
        first = _first_layer(model, names, torch.stack([a, b, (a + b) / 2]).to(zero_like(model)))
        if first is None or not _is_halfway(first[2]):
            return ()
        layer, x, y = first
        if is_dense := y.ndim == 2:
            v, what = _dense_direction(model, layer, x[:1], y.shape[1], p)
        else:
            v, what = _operator_direction(x, y, p, steps, generator)
    if not v.any():
        return ()
    v = v.double().cpu()
    u = (eps * (v / v.norm() if p == 2 else v.sign())).view(*shape).to(x)
    name = what.format(f"“{names[layer]}”")
    return tuple(Candidate(f"{sign} {name}", factor * u, is_dense) for sign, factor in (("+", 1), ("−", -1)))


def _name_outputs(model: nn.Module) -> dict[nn.Module, str]:
    """The modules that yield the layers' outputs, with the layers' names (three parts of one matrix count as one)."""
    names: dict[nn.Module, str] = {}
    for view in read_layers(model).views:
        if view.output is not None:
            names[view.output] = view.name
        elif isinstance(view.module, nn.Linear):
            names.setdefault(view.module, view.name.rpartition(".")[0])
    return names


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


def _is_halfway(y: Tensor) -> bool:
    """Whether the last of three outputs lies halfway between the others, up to what rounding can do."""
    a, b, middle = y.detach().double()
    off, apart = ((a + b) / 2 - middle).abs().max(), (a - b).abs().max()
    return bool(off <= max(1e-3, 8 * torch.finfo(y.dtype).eps) * apart)


def _dense_direction(model: nn.Module, layer: nn.Module, x: Tensor, rows: int, p: float) -> tuple[Tensor, str]:
    """The perturbation ``(n,)`` that a dense layer's map moves furthest, up to its size, and what it is of it."""
    parts = []  # of the map's matrix (rows, n), in float64 on the CPU: the gradients of every entry of the output
    for part in torch.eye(rows, dtype=x.dtype, device=x.device).split(MATRIX_ROWS):
        again = _first_layer(model, [layer], x.detach().expand(len(part), *x.shape[1:]))
        assert again is not None  # it was the first layer before
        parts.append(torch.autograd.grad(again[2], again[1], part)[0].flatten(1).double().cpu())
    A = torch.cat(parts)
    if p != 2:
        row = int(A.abs().sum(1).argmax())
        return A[row], f"sign of row {row} of {{}}"
    vectors = top_right_singular_vectors(A, 1)
    v = vectors[:, 0] if vectors.shape[1] else torch.zeros_like(A[0])  # a zero matrix has none
    # The vector is determined up to its sign: so that the candidates do not hang on rounding.
    return v * v[v.abs().argmax()].sign(), "first right singular vector of {}"


def _operator_direction(x: Tensor, y: Tensor, p: float, steps: int, generator: torch.Generator) -> tuple[Tensor, str]:
    """The direction ``(n,)`` that ``A^T A`` leads to from a random start, zero when A maps it to zero, and its name.

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
    name = "leading direction of {} (estimate)" if p == 2 else "sign of the leading direction of {} (heuristic)"
    return (v[0] if gains[0] > 0 else torch.zeros_like(v[0])).flatten(), name


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
    """The results of :func:`judged_perturbations`, which has the arguments, without the perturbations themselves."""
    judged = judged_perturbations(model, samples, p=p, eps=eps, bounds=bounds, draws=draws, seed=seed)
    return [result for result, _ in judged]


def judged_perturbations(
    model: Model,
    samples: tuple[Tensor, Tensor],
    *,
    p: float,
    eps: float,
    bounds: tuple[float, float] = (0.0, 1.0),
    draws: int = 5,
    seed: int = 0,
) -> list[tuple[UniversalResult, Tensor]]:
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
        A ``fitted`` and, where the weights suggest one, a ``data-free`` result with its perturbation, shaped like one
        input; the one that fools more samples first: measured on these samples, estimates. None at all when there are
        fewer than two samples.

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
    fitting, judging = order[: len(x) // 2], order[len(x) // 2 :]

    def is_right(rows: Tensor, u: Tensor) -> Tensor:
        logits = logits_of(model, (x[rows] + u.to(x)).clamp(*bounds), y[rows], JUDGE_BATCH)
        return margins(logits, y[rows]) > 0

    with frozen(model):
        clean = is_right(judging, torch.zeros_like(x[0]))
        batches = [(x[part], y[part]) for part in fitting.split(FIT_BATCH)]
        u = universal_perturbation(model, batches, eps=eps, p=p, bounds=bounds)
        judged = [(UniversalKind.FITTED, "projected ascent", u)]
        if candidates := data_free_perturbations(model, x.shape[1:], eps=eps, p=p, bounds=bounds, seed=seed):
            best = min(candidates, key=lambda candidate: int(is_right(fitting, candidate.u).sum()))
            judged.append((UniversalKind.DATA_FREE, best.name, best.u))
        noise = [torch.randn(x[:1].shape, generator=generator, dtype=torch.float32).to(x) for _ in range(draws)]
        random = [eps * (part.sign() if math.isinf(p) else part / lp_norm(part, 2))[0] for part in noise]
        controls = [is_right(judging, u) for u in random]
        rights = [is_right(judging, u) for _, _, u in judged]
    n = int(clean.sum())
    results = [
        UniversalResult(
            p=float(p),
            eps=float(eps),
            kind=kind,
            direction=name,
            fitted_on=len(fitting),
            fooled=Rate(int((clean & ~still_right).sum()), n),
            random_fooled=tuple(Rate(int((clean & ~control).sum()), n) for control in controls),
            robust=Rate(int(still_right.sum()), len(judging)),
        )
        for (kind, name, _), still_right in zip(judged, rights, strict=True)
    ]
    found = [(result, u) for result, (_, _, u) in zip(results, judged, strict=True)]
    return sorted(found, key=lambda pair: -pair[0].fooled.hits)
