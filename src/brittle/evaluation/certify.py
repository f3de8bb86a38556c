"""Which samples need no attack, because it is proven that none can succeed."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from brittle.attacks import fgsm
from brittle.attacks.losses import margins
from brittle.attacks.region import check_budget
from brittle.bounds.relaxation.certify import Relaxation, margin_bounds, read_relaxation
from brittle.bounds.relaxation.margins import Effort
from brittle.data.checks import check_batch
from brittle.errors import InputError
from brittle.evaluation.threat import Threat
from brittle.linear.norms import thin
from brittle.models.borrow import Model, device_of, frozen
from brittle.models.forward import logits_of
from brittle.models.network import Network
from brittle.models.trace import NoRule

TRIAL_SAMPLES = 32
"""Samples on which certificates are tried before all are."""
PASSES_OF_A_CERTIFICATE = 50.0
"""Passes of the network that cost about as much as one sample's certificate (46 on a dense network, measured)."""
LEAST_HOPE = 1.5
"""Certificates are tried where what one step of an attack leaves could save so many times their cost."""
PASSES_THAT_PAY_FOR_SHARPNESS = 500.0
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
    threat = Threat(p=p, bounds=bounds)
    with frozen(model):
        relaxation = worthwhile_relaxations(Network(model, model), x, y, [(threat, eps)], passes)[0]
        if relaxation is None:
            return torch.zeros(len(x), dtype=torch.bool, device=device_of(model))
        return prove(relaxation, x, y, threat, eps, passes)


def worthwhile_relaxations(
    network: Network, x: Tensor, y: Tensor, cases: Sequence[tuple[Threat, float]], passes: float
) -> tuple[Relaxation | None, ...]:
    """The network's relaxation for every threat and budget where certificates save time; None where they do not.

    One step of an attack tells what certificates could save at most; then they are tried on a few samples spread over
    all. The network is read once for all cases.

    Args:
        network: The network, borrowed; its trace is read where it has one.
        x: Typical inputs ``(N, ...)``.
        y: Their labels ``(N,)``.
        cases: Threats and budgets.
        passes: As :func:`proven_robust`.
    """
    model = network.model
    if not isinstance(model, nn.Module) or len(x) == 0:
        return (None,) * len(cases)
    x, y = x.to(network.device), y.to(network.device)

    @functools.cache
    def read(bounds: tuple[float, float]) -> Relaxation:
        groups = min(48, max(4, len(x) // (60 if passes < PASSES_THAT_PAY_FOR_SHARPNESS else 8)))
        return read_relaxation(model, x.shape[1:], examples=x.clamp(*bounds), groups=groups, traced=network.traced)

    def worthwhile(threat: Threat, eps: float) -> Relaxation | None:
        tried, labels = thin(x, TRIAL_SAMPLES).clamp(*threat.bounds), thin(y, TRIAL_SAMPLES)
        logits_of(model, tried, labels)  # refuses what is no network for these samples
        stepped = fgsm(model, tried, labels, eps=eps, p=threat.p, bounds=threat.bounds)
        left = (margins(logits_of(model, stepped, labels), labels) > 0).double().mean()
        if float(left) * passes < LEAST_HOPE * PASSES_OF_A_CERTIFICATE:
            return None
        relaxation = read(threat.bounds)
        proven = prove(relaxation, tried, labels, threat, eps, passes)
        return None if float(proven.double().mean()) * passes < PASSES_OF_A_CERTIFICATE else relaxation

    relaxations: list[Relaxation | None] = []
    for threat, eps in cases:
        try:
            relaxations.append(read(threat.bounds) if math.isinf(passes) else worthwhile(threat, eps))
        except (NoRule, InputError):  # no sound rule, or an input that the evaluation itself will refuse
            relaxations.append(None)
    return tuple(relaxations)


def prove(relaxation: Relaxation, x: Tensor, y: Tensor, threat: Threat, eps: float, passes: float) -> Tensor:
    """Which samples a network's relaxation proves robust at the budget ``(N,)``; on the network's device.

    Args:
        relaxation: What the network was read into.
        x: Inputs ``(N, ...)``.
        y: Labels ``(N,)``.
        threat: Norm and bounds.
        eps: Budget.
        passes: As :func:`proven_robust`; many pay for sharper certificates.
    """
    device = device_of(relaxation.model)
    x, y = x.to(device).clamp(*threat.bounds), y.to(device)
    sharp = passes >= PASSES_THAT_PAY_FOR_SHARPNESS and relaxation.groups is not None
    effort = Effort(rows=128 if sharp else 32)
    return margin_bounds(relaxation, x, y, eps=eps, p=threat.p, bounds=threat.bounds, effort=effort) > 0
