"""Adversarial training: PGD inside the training step, each sample its own perturbation or one for all."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from brittle.attacks.losses import cross_entropy, loss_and_gradient
from brittle.attacks.region import Region, ascend
from brittle.attacks.universal import ascend_universal
from brittle.models.borrow import frozen
from brittle.random_streams import uniform
from brittle.training.recipe import Adversary
from brittle.training.streams import attack_block


def perturb(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    adversary: Adversary,
    keys: Tensor,
    epoch: int = 0,
    *,
    precision: str = "32-true",
) -> Tensor:
    """The inputs after all steps of PGD on the cross-entropy, from a random point of the budget (Madry et al. 2018).

    Unlike an attack that measures robustness, no sample stops early and the last point is taken, not the worst one.
    The model is attacked in evaluation mode (as the paper) and left bit-equal.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``.
        x: Inputs ``(N, ...)`` in [0, 1].
        y: Labels ``(N,)``.
        adversary: Budget, norm, steps.
        keys: ``(N,)`` int64, one random number stream a sample; the start depends on it and the epoch alone.
        epoch: Counts the attacks on a sample.
        precision: ``"bf16-mixed"``: the network's passes in bfloat16, the loss and the steps in full precision; any
            other: all in the network's own, for gradients in float16 would vanish without scaling.

    Returns:
        ``(N, ...)`` within the budget and within [0, 1].
    """
    region = Region.of(x, adversary.eps, adversary.p, (0.0, 1.0))
    z = region.start(_draw_noise(x, adversary.p, keys, epoch))
    length = torch.full_like(region.eps, adversary.length)
    passes = _in_bfloat16(model) if precision == "bf16-mixed" else model
    with frozen(model):
        for _ in range(adversary.count):
            _, _, gradient = loss_and_gradient(passes, cross_entropy, z, y)
            z = region.project(ascend(z, gradient, length, adversary.p, gradient))
    return z


def _in_bfloat16(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The network's passes in bfloat16, its logits in single precision."""

    def passes(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            logits: Tensor = model(x)
        return logits.float()

    return passes


def perturb_first(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    adversary: Adversary,
    keys: Tensor,
    epoch: int,
    count: int,
    *,
    precision: str = "32-true",
) -> Tensor:
    """The batch with its first ``count`` inputs attacked, as :func:`perturb`: its order is random already."""
    if count == 0:
        return x
    attacked = perturb(model, x[:count], y[:count], adversary, keys[:count], epoch, precision=precision)
    return attacked if count == len(x) else torch.cat([attacked, x[count:]])


def ascend_shared(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    u: Tensor,
    adversary: Adversary,
    *,
    total: Callable[[Tensor], Tensor],
    precision: str = "32-true",
) -> Tensor:
    """The perturbation that all samples share after its steps up the summed cross-entropy of a batch.

    As universal adversarial training has it (Shafahi et al. 2020): ``u <- project(u + length sign(g))``, g the sum of
    the gradients at the perturbed samples, ``g / ||g||_2`` in place of the sign for p = 2. The model is attacked in
    evaluation mode and left bit-equal.

    Args:
        model: As :func:`perturb`.
        x: This process's share of the batch ``(N, ...)``; N may be 0.
        y: Labels ``(N,)``.
        u: Perturbation so far ``(1, ...)``.
        adversary: Budget, norm, steps.
        total: Sum over all processes, so that they share one perturbation.
        precision: As :func:`perturb`.

    Returns:
        ``(1, ...)``, within the budget up to rounding.
    """
    passes = _in_bfloat16(model) if precision == "bf16-mixed" else model
    with frozen(model):
        for _ in range(adversary.count):
            gradient = torch.zeros_like(u)
            if len(x):
                _, _, each = loss_and_gradient(passes, cross_entropy, add_shared(x, u, adversary), y)
                gradient += each.sum(0, keepdim=True)
            u = ascend_universal(u, total(gradient), eps=adversary.eps, p=adversary.p, length=adversary.length)
    return u


def add_shared(x: Tensor, u: Tensor, adversary: Adversary) -> Tensor:
    """The samples ``(N, ...)`` with one perturbation ``(1, ...)``, within the budget and within [0, 1]."""
    region = Region.of(x, adversary.eps, adversary.p, (0.0, 1.0))
    return region.project(region.x + u)


def _draw_noise(x: Tensor, p: float, keys: Tensor, epoch: int) -> Tensor:
    """Uniform signs and sizes for p = inf; for p = 2 normal numbers (Box & Muller 1958), a uniform direction."""
    block = torch.full_like(keys, attack_block(epoch))
    size = x[0].numel()
    if math.isinf(p):
        return (2 * uniform(keys, block, size) - 1).to(x.dtype).view_as(x)
    radius, angle = uniform(keys, block, 2 * size).chunk(2, dim=1)
    normal = (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * angle)
    return normal.to(x.dtype).view_as(x)
