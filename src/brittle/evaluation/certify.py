"""Which samples need no attack, because it is proven that none can succeed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from brittle.attacks import fgsm
from brittle.attacks.losses import margins
from brittle.attacks.region import check_budget
from brittle.bounds.relaxation.certify import Relaxation, margin_bounds, read_relaxation
from brittle.data.checks import check_batch
from brittle.errors import InputError
from brittle.models.borrow import Model, device_of, frozen
from brittle.models.forward import logits_of
from brittle.models.trace import NoRule

TRIED = 32
"""Samples on which certificates are tried before all are."""
COST = 50.0
"""Passes of the network that cost about as much as one sample's certificate (46 on a dense network, measured)."""
HOPE = 1.5
"""Certificates are tried where what one step of an attack leaves could save so many times their cost."""

DEAR = 500.0
"""Passes of a sample from which on dense networks get sharper certificates, at about twice their cost."""


def proven_robust(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    p: float = math.inf,
    bounds: tuple[float, float] = (0.0, 1.0),
    passes: float = math.inf,
) -> Tensor:
    """Which samples no perturbation within the budget can break (lower bound: others may be robust, too).

    By linear relaxation of the network around every sample (theory page, section "Relaxations"). Where ``passes``
    says what an attack would cost, certificates are tried on a few samples spread over all, and left off where they
    prove too little to save time.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``; left bit-equal.
        x: Inputs ``(N, ...)`` within ``bounds``.
        y: Labels ``(N,)``.
        eps: Budget, at least 0, in input units.
        p: Norm of the budget: 2 or inf.
        bounds: Smallest and largest admissible input value.
        passes: Passes of the network that a sample costs which withstands the attacks; inf: prove all that can be.

    Returns:
        ``(N,)``, on the model's device; all False where no sound rule covers the network.

    Raises:
        InputError: An argument is out of range.
    """
    if len(x):
        check_batch(x, y, bounds=bounds)
    check_budget(eps, p, 1)
    relaxation = worthwhile_relaxation(model, x, y, eps=eps, p=p, bounds=bounds, passes=passes)
    if relaxation is None:
        return torch.zeros(len(x), dtype=torch.bool, device=device_of(model))
    return covered(relaxation, x, y, eps=eps, p=p, bounds=bounds, passes=passes)


def worthwhile_relaxation(
    model: Model, x: Tensor, y: Tensor, *, eps: float, p: float, bounds: tuple[float, float], passes: float
) -> Relaxation | None:
    """The network read for certificates; None where no sound rule covers it or they would not save time.

    Args:
        model: As :func:`proven_robust`.
        x: Typical inputs ``(N, ...)``; some of them serve to try certificates.
        y: Their labels ``(N,)``.
        eps: As :func:`proven_robust`.
        p: As :func:`proven_robust`.
        bounds: As :func:`proven_robust`.
        passes: As :func:`proven_robust`.
    """
    if not isinstance(model, nn.Module) or len(x) == 0:
        return None
    device = device_of(model)
    try:
        x, y = x.to(device).clamp(*bounds), y.to(device)
        some = torch.linspace(0, len(x) - 1, min(TRIED, len(x)), device=device).round().long()
        if math.isfinite(passes):
            with frozen(model):
                logits_of(model, x[some], y[some])
                stepped = fgsm(model, x[some], y[some], eps=eps, p=p, bounds=bounds)
                left = (margins(logits_of(model, stepped, y[some]), y[some]) > 0).double().mean()
            if float(left) * passes < HOPE * COST:
                return None
        groups = min(48, max(4, len(x) // (60 if passes < DEAR else 8)))
        relaxation = read_relaxation(model, x.shape[1:], examples=x, groups=groups)
        if math.isfinite(passes):
            tried = covered(relaxation, x[some], y[some], eps=eps, p=p, bounds=bounds, passes=passes)
            if float(tried.double().mean()) * passes < COST:
                return None
        return relaxation
    except (NoRule, InputError):  # no sound rule, or an input that the evaluation itself will refuse
        return None


def covered(
    relaxation: Relaxation,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    p: float,
    bounds: tuple[float, float],
    passes: float = math.inf,
) -> Tensor:
    """Which samples a network's relaxation proves robust at the budget ``(N,)``; on the network's device."""
    device = device_of(relaxation.model)
    x, y = x.to(device).clamp(*bounds), y.to(device)
    rows = 128 if passes >= DEAR and relaxation.groups is not None else 32
    return margin_bounds(relaxation, x, y, eps=eps, p=p, bounds=bounds, rows=rows) > 0
