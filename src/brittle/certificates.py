"""Which samples need no attack, because it is proven that none can succeed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from brittle.attacks import fgsm
from brittle.attacks.losses import margins
from brittle.bounds.relaxation import margin_bounds, read_relaxation
from brittle.bounds.tracing import NoRule
from brittle.errors import InputError
from brittle.frozen import Model, device_of, frozen
from brittle.passes import logits_of

TRIED = 32
"""Samples on which certificates are tried before all are."""
COST = 50.0
"""Passes of the network that cost about as much as one sample's certificate (46 on a dense network, measured)."""
HOPE = 1.5
"""Certificates are tried where what one step of an attack leaves could save so many times their cost."""


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
    """
    device = device_of(model)
    none = torch.zeros(len(x), dtype=torch.bool, device=device)
    if not isinstance(model, nn.Module) or len(x) == 0:
        return none
    x, y = x.to(device).clamp(*bounds), y.to(device)
    some = torch.linspace(0, len(x) - 1, min(TRIED, len(x)), device=device).round().long()
    try:
        if math.isfinite(passes):
            with frozen(model):
                stepped = fgsm(model, x[some], y[some], eps=eps, p=p, bounds=bounds)
                left = (margins(logits_of(model, stepped, y[some]), y[some]) > 0).double().mean()
            if float(left) * passes < HOPE * COST:
                return none
        groups = min(48, max(4, len(x) // 60))
        relaxation = read_relaxation(model, x.shape[1:], examples=x, groups=groups)
        if math.isfinite(passes):
            share = (margin_bounds(relaxation, x[some], y[some], eps=eps, p=p, bounds=bounds) > 0).double().mean()
            if float(share) * passes < COST:
                return none
        return margin_bounds(relaxation, x, y, eps=eps, p=p, bounds=bounds) > 0
    except (NoRule, InputError):  # what is wrong with the model or the data, the evaluation itself will say
        return none
