"""How strongly the logits react to the input at given data points: lower bounds of the Lipschitz constant."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from brittle.frozen import Model, frozen
from brittle.norms import check_attack_norm

MOST_CLASSES = 10
"""Rows of the Jacobian taken at each input: the classes of largest logits."""


def jacobian_norms(model: Model, x: Tensor, p: float) -> Tensor:
    """Local operator norm ``||J(x)||_{p->p}`` of the logits' Jacobian at every input.

    With at most ten classes the local norm is exact; with more only the rows of the ten largest logits are taken,
    which can but lower it. Either way the value is a lower bound of the global Lipschitz constant, up to the
    rounding of the model's own precision (and the measure-zero inputs that lie exactly on a kink).

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``; left bit-equal.
        x: Inputs ``(N, ...)``.
        p: 2 (largest singular value) or inf (largest row l1 norm).

    Returns:
        ``(N,)``, in logit units per input unit.
    """
    check_attack_norm(p)
    with frozen(model), torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = model(x)
        top = logits.topk(min(MOST_CLASSES, logits.shape[1]), dim=1).indices
        chosen = logits.gather(1, top).sum(0)
        rows = [torch.autograd.grad(s, x, retain_graph=True)[0].flatten(1) for s in chosen]
    J = torch.stack(rows, dim=1)
    if math.isinf(p):
        return J.abs().sum(2).amax(1)
    return torch.linalg.eigvalsh((J @ J.mT).double())[:, -1].clamp_min(0).sqrt().to(x.dtype)
