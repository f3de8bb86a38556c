"""Radii that relaxations prove, sample by sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from brittle.bounds.relaxation.certify import Relaxation, margin_bounds
from brittle.bounds.relaxation.margins import USUAL, Effort
from brittle.errors import InputError

LEAST_SHARE = 2.0**-14
"""Smallest budget that is tried, as a share of the largest."""


def proven_radii(
    relaxation: Relaxation,
    x: Tensor,
    y: Tensor,
    *,
    p: float,
    bounds: tuple[float, float] = (0.0, 1.0),
    floor: Tensor | None = None,
    precision: float = 0.02,
    effort: Effort = USUAL,
) -> Tensor:
    r"""Lower bounds of the distances to the nearest adversarial inputs, from :func:`margin_bounds` by bisection.

    A radius is returned only if the margins were proven positive at that very budget, or if it is the floor. The search
    knows no budget of an attacker: it covers everything up to the largest distance within the bounds.

    Args:
        relaxation: From :func:`brittle.bounds.relaxation.certify.read_relaxation`.
        x: Inputs ``(N, *input_shape)`` within ``bounds``.
        y: Labels ``(N,)``.
        p: Norm of the radii: 2 or inf.
        bounds: Smallest and largest admissible input value.
        floor: Radii that are proven otherwise ``(N,)``, such as those of a global constant; None: zeros.
        precision: The search of a sample ends when what failed is at most so much larger, relatively, than what held.
        effort: How hard each budget is tried.

    Returns:
        ``(N,)``, float64, in input units, on the model's device; at least ``floor``, and 0 where nothing is proven. A
        sample's radius does not depend on the others, apart from rounding within the allowance.

    Raises:
        InputError: An argument is out of range; it names the argument, what was expected and what came.
    """
    if not 0 < precision < math.inf:
        raise InputError(f"precision: expected a finite number above 0; got {precision}")
    if floor is not None and (floor.shape != (len(x),) or not bool((floor >= 0).all())):
        raise InputError(f"floor: expected numbers of at least 0, one for each of {len(x)} samples; got {floor}")

    def holds(at: Tensor, rows: Tensor) -> Tensor:
        return margin_bounds(relaxation, x[rows], y[rows], eps=at, p=p, bounds=bounds, effort=effort) > 0

    every = torch.arange(len(x), device=x.device)
    right = holds(x.new_zeros(len(x), dtype=torch.float64), every)
    proven = torch.zeros_like(right, dtype=torch.float64) if floor is None else floor.to(right.device).double()
    whole = (bounds[1] - bounds[0]) * (1.0 if p == math.inf else math.sqrt(x[0].numel()))
    low, high = proven.clamp_min(LEAST_SHARE * whole), torch.full_like(proven, whole)
    while True:
        todo = (right & (high > (1 + precision) * low)).nonzero()[:, 0]
        if not len(todo):
            return proven
        trial = (low[todo] * high[todo]).sqrt()
        held = holds(trial, todo.to(x.device))
        proven[todo] = torch.where(held, trial, proven[todo])
        low[todo], high[todo] = torch.where(held, trial, low[todo]), torch.where(held, high[todo], trial)
