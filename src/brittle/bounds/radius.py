r"""Corollary 3.3: what a Lipschitz bound says about losses under attack, and the radii within which nothing flips.

Everything here starts from logits at the clean inputs and from upper bounds of how fast logit *differences* can move,
measured in one norm p on the inputs; so budgets and radii are in that norm and in input units. Formulas, proofs and the
correction of the printed corollary are on the theory page, section "Certified radii".

Logits are taken as the model's exact values up to ``8`` units in the last place of their own type (a relative ``2^-20``
in float32): every difference of two logits is moved by that much to the unfavourable side. A network whose forward
pass rounds worse than that (strong cancellation) should be run in float64 before its logits come here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from brittle.errors import InputError
from brittle.linear.norms import check_attack_norm, dual_exponent
from brittle.linear.spectrum import ROUNDING

ULPS = 8
"""Rounding that a logit may carry, in units of its type's ``eps``."""


def adversarial_loss_bound(logits: Tensor, labels: Tensor, lipschitz: Tensor, eps: float) -> Tensor:
    r"""Certified upper bound of every sample's cross-entropy under any perturbation of norm at most ``eps``.

    ``log sum_j exp(s_j - s_y + eps L_yj)``: the form of Corollary 3.3 for several classes, before it is made linear
    in ``eps``. Exact for a linear classifier of two classes.

    Args:
        logits: Clean logits ``(N, K)``, finite.
        labels: True classes ``(N,)``.
        lipschitz: ``(K, K)``, symmetric with zero diagonal: ``L_ij`` bounds the Lipschitz constant of ``s_i - s_j``
            from above; inf where nothing is known. See :func:`head_margins`.
        eps: Budget, at least 0, in input units.

    Returns:
        ``(N,)`` in nats, float64; inf where ``L`` is inf. At ``eps = 0`` the clean loss, up to rounding upwards.

    Raises:
        InputError: A shape does not fit, a label or ``eps`` is out of range, or a value is NaN.
    """
    gaps, bounds = _gaps_and_bounds(logits, labels, lipschitz)
    return _loss(gaps + _times(bounds, eps, "eps", finite=True))


def linear_loss_bound(logits: Tensor, labels: Tensor, lipschitz: Tensor, eps: float) -> Tensor:
    r"""Corollary 3.3 (Barsbey et al. 2025) for several classes: ``f(x) + eps max_j L_yj``, never below the sharp form.

    A certified upper bound of the cross-entropy, as :func:`adversarial_loss_bound`, with its arguments and errors.

    Returns:
        ``(N,)`` in nats, float64.
    """
    gaps, bounds = _gaps_and_bounds(logits, labels, lipschitz)
    reach = _times(bounds, eps, "eps", finite=True)
    return _loss(gaps) + (reach.amax(1) if reach.shape[1] else 0.0)


def binary_loss_bound(
    scores: Tensor, labels: Tensor, *, eps: float, lipschitz: float, head: Tensor, p: float
) -> Tensor:
    r"""Corollary 3.3 for two classes, sharp: ``log(1 + exp(-y s + eps L_p(Phi) ||theta||_{p*}))``.

    Certified upper bound of the logistic loss of ``s = <theta, Phi(x)> + b`` under any perturbation of norm at most
    ``eps``; at most the printed ``f(x) + eps L_p(Phi) ||theta||_{p*}``. Exact for ``Phi(x) = x``.

    Args:
        scores: Clean scores ``(N,)``, finite.
        labels: -1 or +1, ``(N,)``.
        eps: Budget in the norm p, at least 0, in input units.
        lipschitz: Upper bound of the features' Lipschitz constant ``L_p(Phi)``; may be inf.
        head: ``theta``, ``(h,)``.
        p: Norm of the budget: 2 or inf; ``theta`` is measured in the dual norm.

    Returns:
        ``(N,)`` in nats, float64.

    Raises:
        InputError: A shape does not fit, a label or number is out of range, or a value is NaN.
    """
    scores, rounding = _finite(scores, "scores", 1)
    if labels.shape != scores.shape or not bool(((labels == 1) | (labels == -1)).all()):
        raise InputError(f"labels: expected -1 or +1 for each of {len(scores)} scores; got {_describe(labels)}")
    theta, _ = _finite(head, "head", 1)
    dual_norm = head_margins(1.0, torch.stack([torch.zeros_like(theta), theta]), p)[0, 1]
    reach = _times(_times(dual_norm, lipschitz, "lipschitz"), eps, "eps", finite=True)
    return _loss((-labels.detach().to(scores) * scores + rounding * scores.abs() + reach)[:, None])


def head_margins(lipschitz_features: float, head: Tensor, p: float) -> Tensor:
    r"""Upper bounds of the Lipschitz constants of all logit differences: ``L_p(Phi) ||c_i - c_j||_{p*}``.

    By Hoelder's inequality for ``s = C Phi(x) + c``. Bounding the network that ends in the row ``c_i - c_j`` gives a
    matrix that is no larger.

    Args:
        lipschitz_features: Upper bound of ``||Phi(x) - Phi(x')||_p / ||x - x'||_p``; may be inf.
        head: ``C``, ``(K, h)``, finite.
        p: 2 or inf; rows are compared in the dual norm (l2 or l1).

    Returns:
        ``(K, K)``, float64, symmetric with zero diagonal; 0 for equal rows even where the features' bound is inf.

    Raises:
        InputError: ``p`` is another number, the features' bound is negative or NaN, or ``head`` no finite matrix.
    """
    check_attack_norm(p)
    C, _ = _finite(head, "head", 2)
    distances = torch.cdist(C, C, p=dual_exponent(p), compute_mode="donot_use_mm_for_euclid_dist")
    distances = torch.maximum(distances, distances.mT) * (1 + ROUNDING * max(C.shape[1], 1))
    return _times(distances, lipschitz_features, "lipschitz_features")


def certified_radii(logits: Tensor, labels: Tensor, lipschitz: Tensor) -> Tensor:
    r"""Certified radius of every sample: ``r = min_{j != y} (s_y - s_j) / L_yj``, a lower bound of the true distance.

    No perturbation of norm below r changes the prediction ``y``. Exact for a linear classifier. A margin of 0 gives
    0 whatever ``L`` is; a positive margin over ``L = 0`` gives inf, and over ``L = inf`` 0. Samples that are wrong
    without attack get 0; with one class every sample gets inf. Margins are lowered by the rounding of both logits.

    Args:
        logits: Clean logits ``(N, K)``, finite.
        labels: True classes ``(N,)``.
        lipschitz: ``(K, K)``, as for :func:`adversarial_loss_bound`.

    Returns:
        ``(N,)`` in input units, float64.

    Raises:
        InputError: A shape does not fit, a label is out of range, or a value is NaN.
    """
    gaps, bounds = _gaps_and_bounds(logits, labels, lipschitz)
    margins = (-gaps).clamp_min(0)
    radii = torch.where(margins > 0, margins / bounds, 0.0)
    return radii.amin(1) if radii.shape[1] else torch.full((len(radii),), math.inf, dtype=torch.float64)


def certified_accuracy(radii: Tensor, eps_values: Tensor | Sequence[float]) -> Tensor:
    """Share of samples that keep the right prediction under every perturbation of norm at most eps, at each eps.

    A lower bound of the true robust accuracy on these samples. Radii count strictly: a sample needs ``r > eps``, as
    at distance r itself the prediction may change. Never rises with eps.

    Args:
        radii: From :func:`certified_radii`, ``(N,)``.
        eps_values: Budgets ``(M,)``, at least 0, in input units and in the radii's norm.

    Returns:
        ``(M,)`` shares from 0 to 1, float64.

    Raises:
        InputError: There is no sample, or a radius or budget is negative or NaN.
    """
    if radii.ndim != 1 or len(radii) == 0 or not bool((radii >= 0).all()):
        raise InputError(f"radii: expected at least one radius (N,), none negative or NaN; got {_describe(radii)}")
    radii, budgets = radii.detach().double().cpu(), torch.as_tensor(eps_values, dtype=torch.float64).detach().cpu()
    if budgets.ndim != 1 or not bool((budgets >= 0).all()):
        raise InputError(f"eps_values: expected budgets (M,) of at least 0; got {eps_values}")
    return (radii > budgets[:, None]).double().mean(1)


def _gaps_and_bounds(logits: Tensor, labels: Tensor, lipschitz: Tensor) -> tuple[Tensor, Tensor]:
    """For all classes but the label ``s_j - s_y``, raised by the logits' rounding, and ``L_yj``; ``(N, K-1)``."""
    s, rounding = _finite(logits, "logits", 2)
    samples, classes = s.shape
    if lipschitz.shape != (classes, classes):
        raise InputError(f"lipschitz: expected shape ({classes}, {classes}); got {tuple(lipschitz.shape)}")
    L = lipschitz.detach().double().cpu()
    if not bool((L >= 0).all()):
        raise InputError(f"lipschitz: expected upper bounds of at least 0; got {float(L.min())}")
    if bool(L.diagonal().any()) or not torch.allclose(L, L.mT, rtol=1e-6, atol=0):
        raise InputError("lipschitz: expected a symmetric matrix with zero diagonal; got another")
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.shape != (samples,) or not whole:
        raise InputError(f"labels: expected integers of shape ({samples},); got {_describe(labels)}")
    y = labels.detach().long().cpu()
    if not bool(((y >= 0) & (y < classes)).all()):
        raise InputError(f"labels: expected classes from 0 to {classes - 1}; got {int(y.min())} to {int(y.max())}")
    label = s.gather(1, y[:, None])
    gaps = s - label + rounding * (s.abs() + label.abs())
    others = torch.arange(classes) != y[:, None]
    return gaps[others].view(samples, classes - 1), L[y][others].view(samples, classes - 1)


def _loss(gaps: Tensor) -> Tensor:
    """``log(1 + sum_j exp(gap_j))``, raised by the rounding of the sum."""
    return torch.logaddexp(gaps.logsumexp(1), torch.zeros((), dtype=torch.float64)) * (1 + ROUNDING)


def _times(bounds: Tensor, factor: float, name: str, *, finite: bool = False) -> Tensor:
    """Upper bounds times an upper bound or a budget, with 0 times inf = 0."""
    if not factor >= 0 or (finite and math.isinf(factor)):
        raise InputError(
            f"{name}: expected {'a finite number' if finite else 'an upper bound'} of at least 0; got {factor}"
        )
    return torch.where(bounds > 0, float(factor) * bounds, 0.0) if factor else torch.zeros_like(bounds)


def _finite(values: Tensor, name: str, axes: int) -> tuple[Tensor, float]:
    """The values in float64 on the CPU, and the relative error that numbers of their own type may carry."""
    if values.ndim != axes or values.is_complex() or (axes == 2 and not values.shape[1]):
        raise InputError(f"{name}: expected real numbers on {axes} axes, not empty; got {_describe(values)}")
    rounding = ULPS * torch.finfo(values.dtype if values.is_floating_point() else torch.float64).eps
    values = values.detach().double().cpu()
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"{name}: expected finite numbers; got NaN or infinite ones")
    return values, rounding


def _describe(values: Tensor) -> str:
    """Shape, type and extent, for an error."""
    extent = ""
    if values.numel() and not values.is_complex():
        extent = f" from {float(values.min()):g} to {float(values.max()):g}"
    return f"shape {tuple(values.shape)} of {values.dtype}{extent}"
