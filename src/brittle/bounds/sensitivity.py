"""How strongly the logits react to the input: lower bounds of the Lipschitz constant, at data points and beyond."""

from __future__ import annotations

import copy
import math
from contextlib import suppress

import torch
from torch import Tensor, nn

from brittle.errors import InputError
from brittle.linear.norms import check_attack_norm, dual_exponent, lp_norm, per_sample
from brittle.linear.spectrum import largest_singular_value, power_iteration
from brittle.models.borrow import Model, device_of, frozen
from brittle.models.forward import output_of

MOST_CLASSES = 10
"""Rows of the Jacobian taken at each input: the classes of largest logits."""
POWER_STEPS = 20
"""Products with the transposed Jacobian in the power iteration over all rows, where there are more."""
LAST_DISTANCE = 1 / 40
"""Distance of the last pair of points over that of the first."""
STEP_LENGTH = 0.3
"""How far the pair moves in a step, over the distance of its two points."""
LOGIT_ROUNDING = 2.0**-40
"""Relative error granted to float64 logits before their difference counts: 2^13 unit roundoffs."""
NORM_ROUNDING = 2.0**6
"""Rounding errors of the precision in which the model ran by which the largest number found is lowered."""
GRADIENT_ROUNDING = 2.0**13
"""Rounding errors of the largest entry below which sums of gradients count as 0."""


def jacobian_norms(model: Model, x: Tensor, p: float) -> Tensor:
    """Local operator norm ``||J(x)||_{p->p}`` of the logits' Jacobian at every input.

    With at most ten classes the local norm is exact. With more it is a lower bound: for p = inf from the rows of the
    ten largest logits, for p = 2 the larger of those rows' norm and a power iteration over all rows (a model that
    cannot be differentiated twice keeps the former). Either way the value is a lower bound of the global Lipschitz
    constant, up to the rounding of the model's own precision (and the measure-zero inputs that lie exactly on a kink).

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``; left bit-equal.
        x: Inputs ``(N, ...)``.
        p: 2 (largest singular value) or inf (largest row l1 norm).

    Returns:
        ``(N,)``, in logit units per input unit; entries of the Jacobian that overflow count as 0.
    """
    check_attack_norm(p)
    with frozen(model), torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = model(x)
        top, J = _largest_rows(logits, x)
        if math.isinf(p):
            return J.abs().sum(2).amax(1)
        norms = largest_singular_value(J.double())[0].to(x.dtype)
        if logits.shape[1] <= MOST_CLASSES:
            return norms
        strongest = torch.linalg.eigh(_gram(J).double()).eigenvectors[:, :, -1].to(logits.dtype)
        start = torch.zeros_like(logits).scatter(1, top, strongest) + _random_unit(logits[0], 2, seed=0)
        return torch.maximum(norms, _norm_over_all_rows(logits, x, start))


def largest_ratio(
    model: Model,
    x: Tensor,
    p: float,
    *,
    eps: float,
    steps: int = 50,
    restarts: int = 1,
    seed: int = 0,
    bounds: tuple[float, float] | None = None,
) -> Tensor:
    r"""Lower bound of the Lipschitz constant by an ascent from every input, mostly far above the local norms there.

    Pairs of points ``c + h v / 2, c - h v / 2`` climb the ratio ``||f(a) - f(b)||_p / ||a - b||_p``. With u the vector
    that attains the norm of the logits' difference, and ``g+, g-`` the gradients of ``<u, f>`` at the two points,
    every step turns v to the steepest direction of ``g+ + g-`` and moves c along that of ``g+ - g-``. The distance h
    falls geometrically from ``eps`` to ``eps / 40``: a piecewise linear network has no gradient of its Jacobian, but a
    pair sees every kink between its points. The best of all ratios, of the gradients' norms on the way (each is one of
    ``J^T u``), and of the Jacobian norms at the input and at the best point counts. For piecewise linear and smooth
    networks alike this bounds the global constant from below; nothing bounds the gap to it. Gradients are believed: a
    model that replaces its own (straight-through rounding) has no such bound.

    A module is run as a private copy in float64, and differences are lowered by a relative ``2^-40`` of the logits,
    so that rounding cannot pass for sensitivity. The result is lowered by 64 rounding errors: it stays below a
    certified bound even where both are the constant itself, as in a linear network. A plain callable, or a module that
    runs in its own precision only, is taken as it is; unless its logits are float64, only gradients count. The kinks'
    convention of :func:`jacobian_norms` holds here too. Deterministic, and independent of the batch up to rounding.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``; left bit-equal.
        x: Inputs ``(N, ...)``, finite.
        p: 2 or inf, the norm on both sides.
        eps: First distance of the two points in the norm p, above 0, in input units. For inputs in [0, 1] a quarter to
            a half does well for p = inf, one to two for p = 2.
        steps: Steps of every ascent, at least 1; two gradients each.
        restarts: Ascents from every input, at least 1: the first along the local norm's direction at x itself, the
            others along the next ones, from points that lie ``eps`` away from x.
        seed: Of the directions away from x, the same for all inputs.
        bounds: Smallest and largest input value, which no point leaves; None for no limits, as the global
            constant has none.

    Returns:
        ``(N,)``, float64, in logit units per input unit; but for that rounding never below the Jacobian norm at x.

    Raises:
        InputError: An argument is out of range; it names the argument, what was expected and what came.
    """
    check_attack_norm(p)
    _check_search(x, eps, steps, restarts, bounds)
    with frozen(model):
        model, x, roundoff = _in_double(model, x.detach().to(device_of(model)))
        box = (-math.inf, math.inf) if bounds is None else bounds
        x = x.clamp(*box)
        largest = jacobian_norms(model, x, p).double()
        for restart in range(restarts):
            aside = _random_unit(x[0], p, seed + restart)
            start = (x + eps * aside).clamp(*box) if restart else x
            v = _direction(model, start, p, restart)
            v = torch.where(per_sample(v.flatten(1).any(1), v), v, aside)
            largest = torch.maximum(largest, _climb(model, start, v, p, eps, steps, box))
    return largest * (1 - NORM_ROUNDING * roundoff)


def _climb(model: Model, c: Tensor, v: Tensor, p: float, eps: float, steps: int, box: tuple[float, float]) -> Tensor:
    """The largest ratio, gradient norm or last Jacobian norm of an ascent from centres c and directions v, ``(N,)``."""
    largest = gain = torch.zeros(len(c), dtype=torch.float64, device=c.device)
    best = c
    for step in range(steps):
        h = eps * LAST_DISTANCE ** (step / max(steps - 1, 1))
        ends = torch.cat([c + h / 2 * v, c - h / 2 * v]).clamp(*box)
        ratio, gradients = _ratio_and_gradients(model, ends, p)
        largest = torch.maximum(largest, ratio)
        for end, gradient in zip(ends.chunk(2), gradients, strict=True):
            norm = lp_norm(gradient, dual_exponent(p)).double()
            better = (norm > gain) & torch.isfinite(norm)
            gain, best = torch.where(better, norm, gain), torch.where(per_sample(better, end), end, best)
        # Entries of a sum or difference that are rounding count as 0: they would become full steps to anywhere.
        a, b = gradients
        noise = GRADIENT_ROUNDING * torch.finfo(a.dtype).eps * (a.abs() + b.abs()).flatten(1).amax(1)
        turned, moved = (_steepest(torch.where(g.abs() > per_sample(noise, g), g, 0), p) for g in (a + b, a - b))
        v = torch.where(per_sample(turned.flatten(1).any(1), v), turned, v)
        c = (c + STEP_LENGTH * h * moved).clamp(*box)
    return torch.maximum(torch.maximum(largest, gain), jacobian_norms(model, best, p).double())


def _ratio_and_gradients(model: Model, ends: Tensor, p: float) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Of pairs ``(2N, ...)``: certain ratios ``(N,)`` (0 for logits that are not float64), and ``J^T u`` at both ends.

    ``u`` has dual norm 1 and ``<u, f(a) - f(b)> = ||f(a) - f(b)||_p``, so that neither gradient's dual norm exceeds
    the Jacobian's norm at its end.
    """
    with torch.enable_grad():
        ends = ends.detach().requires_grad_()
        logits = model(ends)
        at, other = logits.detach().chunk(2)
        difference = at - other
        if math.isinf(p):
            largest = difference.abs().argmax(1, keepdim=True)
            u = torch.zeros_like(difference).scatter(1, largest, difference.gather(1, largest).sign())
        else:
            u = _steepest(difference, 2)
        (gradient,) = torch.autograd.grad(logits, ends, torch.cat([u, u]))
    near, far = gradient.chunk(2)
    rise = lp_norm(difference, p) - LOGIT_ROUNDING * (lp_norm(at, p) + lp_norm(other, p))
    a, b = ends.detach().chunk(2)
    ratio = rise.clamp_min(0) / lp_norm(a - b, p)
    certain = torch.isfinite(ratio) & (logits.dtype == torch.float64)
    return torch.where(certain, ratio, 0).double(), (near, far)


def _direction(model: Model, x: Tensor, p: float, number: int) -> Tensor:
    """The input direction of unit norm to which the logits' Jacobian at x reacts most, or next to most; 0 for none."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        _, J = _largest_rows(model(x), x)
    number %= J.shape[1]
    if math.isinf(p):
        row = J.abs().sum(2).argsort(1, descending=True)[:, number]
        return J[torch.arange(len(J)), row].sign().view_as(x)
    u = torch.linalg.eigh(_gram(J)).eigenvectors[:, :, -1 - number]
    return _steepest((u[:, None] @ J).view_as(x), p)


def _largest_rows(logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Classes of the largest logits ``(N, rows)``, and the Jacobian's rows of these ``(N, rows, n)``, 0 on overflow."""
    top = logits.topk(min(MOST_CLASSES, logits.shape[1]), dim=1).indices
    chosen = logits.gather(1, top).sum(0)
    rows = []
    for sums in chosen:
        row = torch.autograd.grad(sums, x, retain_graph=True, allow_unused=True)[0] if sums.requires_grad else None
        if row is None:
            raise InputError("model: expected logits that depend on the input through differentiable operations")
        rows.append(row.flatten(1))
    J = torch.stack(rows, dim=1)
    return top, torch.where(torch.isfinite(J), J, 0)


def _gram(J: Tensor) -> Tensor:
    """``J J^T`` up to a factor, which keeps squares within the range of floating point."""
    largest = J.abs().amax((1, 2), keepdim=True)
    J = J / torch.where(largest > 0, largest, 1)
    return J @ J.mT


def _norm_over_all_rows(logits: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """``||J^T u|| / ||u||`` of what the power iteration on ``J J^T`` makes of u, ``(N,)``: at most ``||J||_2``.

    ``J g`` is the derivative of ``<J^T w, g>`` in w; u stays as it is where the model cannot be differentiated twice.
    """
    w = torch.zeros_like(logits, requires_grad=True)

    def pull(u: Tensor) -> Tensor:
        return torch.autograd.grad(logits, x, u, retain_graph=True)[0]

    try:
        (pulled,) = torch.autograd.grad(logits, x, w, create_graph=True)
        _, u = power_iteration(
            lambda u: torch.autograd.grad(pulled, w, pull(u), retain_graph=True)[0], u, POWER_STEPS - 1
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        pass  # no second derivatives
    return lp_norm(pull(_steepest(u, 2)), 2)


def _steepest(gradient: Tensor, p: float) -> Tensor:
    """Direction of steepest ascent per unit of the norm, 0 where the gradient is."""
    if math.isinf(p):
        return gradient.sign()
    return gradient / per_sample(lp_norm(gradient, 2).clamp_min(torch.finfo(gradient.dtype).tiny), gradient)


def _random_unit(like: Tensor, p: float, seed: int) -> Tensor:
    """One vector of norm 1, shaped like ``like``, from a generator of its own."""
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return _steepest(noise[None], p)[0].to(like)


def _in_double(model: Model, x: Tensor) -> tuple[Model, Tensor, float]:
    """A copy of the (frozen) model that runs in float64, x in float64, and the largest relative error of an operation.

    Model and x come back as they are where no copy does.
    """
    with torch.no_grad():
        logits = output_of(model, x[:1], "x")
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.shape[1]:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"model: expected logits (N, classes); got {got}")
    with suppress(RuntimeError, TypeError):
        if isinstance(model, nn.Module):
            precise = copy.deepcopy(model).double()
            with torch.no_grad():
                logits = precise(x[:1].double())
            model, x = precise, x.double()
    return model, x, max(torch.finfo(logits.dtype).eps, torch.finfo(x.dtype).eps) / 2


def _check_search(x: Tensor, eps: float, steps: int, restarts: int, bounds: tuple[float, float] | None) -> None:
    if not x.is_floating_point() or x.ndim < 2 or x.numel() == 0 or not bool(torch.isfinite(x).all()):
        raise InputError(f"x: expected finite floating inputs (N, ...); got shape {tuple(x.shape)} of {x.dtype}")
    if not 0 < eps < math.inf:
        raise InputError(f"eps: expected a finite number above 0; got {eps}")
    for name, count in (("steps", steps), ("restarts", restarts)):
        if count < 1:
            raise InputError(f"{name}: expected at least 1; got {count}")
    if bounds is None:
        return
    if not -math.inf < bounds[0] < bounds[1] < math.inf:
        raise InputError(f"bounds: expected (low, high) with low < high, both finite; got {bounds}")
    low, high = (float(v) for v in x.aminmax())
    if low < bounds[0] - 1e-6 or high > bounds[1] + 1e-6:
        raise InputError(f"x: expected values from {bounds[0]:g} to {bounds[1]:g}; got {low:g} to {high:g}")
