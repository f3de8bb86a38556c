"""One perturbation for all inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from brittle.attacks.losses import Loss, loss_and_gradient, named_loss
from brittle.attacks.pool import check_count, check_length
from brittle.attacks.region import ascend, check_budget, inside
from brittle.data.checks import check_batch
from brittle.errors import InputError
from brittle.linear.norms import project_ball
from brittle.models.borrow import Model, device_of, frozen


def universal_perturbation(
    model: Model,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    eps: float,
    p: float = math.inf,
    epochs: int = 10,
    step_size: float | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    loss: str | Loss = "ce",
) -> Tensor:
    """One perturbation for all inputs, by projected ascent on the summed loss of ever new batches (FGSM type).

    For every batch ``u <- project(u + step sign(sum_i grad loss(x_i + u)))`` for p = inf, with ``g / ||g||_2`` in place
    of the sign for p = 2; inputs are clipped to ``bounds`` while fitting. Deterministic. Fit on one set of samples and
    judge on another.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``; left bit-equal.
        batches: Pairs of inputs ``(N, ...)`` and labels ``(N,)``; a sequence or a loader, run through ``epochs`` times.
        eps: Budget, at least 0, in input units.
        p: Norm of the budget: 2 or inf.
        epochs: Passes over the batches, at least 1.
        step_size: Length of a step in the norm p; ``eps / 4`` by default.
        bounds: Smallest and largest admissible input value.
        loss: ``"ce"``, ``"dlr"`` or a function.

    Returns:
        ``u``, shaped like one input, with ``||u||_p <= eps``.

    Raises:
        InputError: An argument is out of range, or there is no batch.
    """
    eps = float(check_budget(eps, p, 1))
    check_count(epochs, "epochs")
    length, device = eps / 4 if step_size is None else check_length(step_size), device_of(model)
    objective = named_loss(loss)
    u: Tensor | None = None
    with frozen(model):
        for _ in range(epochs):
            for x, y in batches:
                check_batch(x, y, bounds=bounds)
                x, y = x.to(device), y.to(device).long()
                u = torch.zeros_like(x[:1]) if u is None else u
                _, _, gradient = loss_and_gradient(
                    model, objective, inside(x + u, bounds), y, check=torch.ones_like(y, dtype=torch.bool)
                )
                u = ascend_universal(u, gradient.sum(0, keepdim=True), eps=eps, p=p, length=length)
    if u is None:
        raise InputError("batches: expected at least one pair of inputs and labels; got none")
    return u[0]


def ascend_universal(u: Tensor, gradient: Tensor, *, eps: float, p: float, length: float) -> Tensor:
    """One step of projected ascent.

    Args:
        u: Perturbation ``(1, ...)``.
        gradient: The samples' gradients, summed ``(1, ...)``; used up.
        eps: Budget.
        p: Its norm: 2 or inf.
        length: Of the step, in the norm p.

    Returns:
        ``(1, ...)``, within the budget.
    """
    step = torch.full((1,), length, dtype=u.dtype, device=u.device)
    return project_ball(ascend(u, gradient, step, p, torch.empty_like(u)), eps, p)
