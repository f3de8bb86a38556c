"""Auto-PGD along smoothed gradients: for networks whose own gradients lead to the wrong place, or nowhere.

A network hardened against l_inf is nearly affine within its budget; the steep pieces lie beyond, where a few pixels
have moved far. Its gradients are neither zero nor small, yet they know one piece only, and ascent ends at that piece's
best point. The gradient at a point shaken by noise has crossed into other pieces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.attacks.auto_pgd import Schedule, untargeted
from brittle.attacks.losses import Loss, loss_and_gradient
from brittle.attacks.packing import State
from brittle.attacks.pool import Pool, check_count
from brittle.attacks.region import inside
from brittle.data.checks import check_batch
from brittle.errors import InputError
from brittle.linear.norms import per_sample
from brittle.models.borrow import Model
from brittle.models.forward import check_logits
from brittle.progress import Progress
from brittle.random_streams import generator

DRAWS = 32
"""Draws of noise; step k takes number k modulo this, the same for all samples."""
LAST_NOISE = 0.1
"""What is left of the noise in the last step."""


def apgd_smoothed(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    p: float = math.inf,
    steps: int = 100,
    loss: str | Loss = "ce",
    noise: float = 0.5,
    rho: float = 0.75,
    bounds: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    ids: Tensor | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    r"""Auto-PGD that follows the loss's gradient at ``x_k + s_k n`` instead of ``x_k``, n standard normal.

    The expected step is along the gradient of the smoothed loss ``E f(x + s n)``, which is there also where f is flat,
    a staircase, or made of pieces that hide each other (Wu et al. 2018; Athalye et al. 2018). The noise falls
    geometrically, ``s_k = (high - low) noise 0.1^(k / steps)``, so that the last steps are about f itself. Noisy points
    are clipped to the bounds. Points, losses and verdicts are those without noise; a step is one pass with gradient
    and one without. The noise depends on the seed and the step, and is the same for all samples.

    Other arguments are those of :func:`brittle.attacks.apgd`.

    Args:
        noise: Standard deviation in the first step, as a share of the range of ``bounds``; above 0.
        seed: Seed of the random starts and of the noise.
        progress: Called with ``("apgd_smoothed", samples done, their number)``.

    Returns:
        ``x_adv``, like ``x``, as :func:`brittle.attacks.apgd`.

    Raises:
        InputError: An argument is out of range; it names the argument, what was expected and what came.
    """
    check_batch(x, y, bounds=bounds)
    check_count(steps, "steps")
    if not 0 < noise < math.inf:
        raise InputError(f"noise: expected a finite number above 0; got {noise}")
    pool, schedule = Pool.of(x, y, eps, p, bounds, seed, ids), Schedule.of(steps, rho)
    look = _Shaken.of(pool, steps, noise * (bounds[1] - bounds[0]), seed).measure
    return untargeted("apgd_smoothed", model, pool, loss, schedule, look=look, batch_size=batch_size, progress=progress)


@dataclass(frozen=True)
class _Shaken:
    """Losses at points and gradients beside them.

    Attributes:
        draws: Standard normal noise ``(draws, ...)``.
        lengths: Standard deviation at every step, ``(steps + 1,)``.
        bounds: Smallest and largest admissible input value.
    """

    draws: Tensor
    lengths: Tensor
    bounds: tuple[float, float]

    @staticmethod
    def of(pool: Pool, steps: int, first: float, seed: int) -> _Shaken:
        """Noise for the samples of a pool; the same numbers for every number of steps."""
        shape = (min(DRAWS, steps + 1), *pool.x.shape[1:])
        draws = torch.stack([torch.randn(shape[1:], generator=generator(seed, k)) for k in range(shape[0])])
        lengths = first * LAST_NOISE ** (torch.arange(steps + 1, dtype=torch.float64) / steps)
        return _Shaken(draws.to(pool.x), lengths.to(pool.x), pool.bounds)

    def measure(self, model: Model, loss: Loss, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and whether the prediction is wrong at the slots' points, and the gradient at shaken ones."""
        x, y, step = state["x"], state["y"], state["step"].to(state["x"].device)
        with torch.no_grad():
            logits = model(x)
            if bool((step == 0).any()):
                check_logits(logits, x, y)
            values = loss(logits, y).to(x.dtype)
        noise = self.draws[step % len(self.draws)] * per_sample(self.lengths[step], x)
        gradient = loss_and_gradient(model, loss, inside(x + noise, self.bounds), y)[2]
        return values, logits.argmax(1) != y, gradient
