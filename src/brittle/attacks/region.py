"""The admissible inputs around each sample: within its budget and within the bounds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.errors import InputError
from brittle.linear.norms import check_attack_norm, lp_norm, per_sample


@dataclass(frozen=True)
class Region:
    """The points within ``||x_adv - x||_p <= eps`` and the bounds, one budget a sample.

    Attributes:
        x: The samples ``(N, ...)``, clipped to the bounds.
        eps: Budgets ``(N,)``, in input units.
        p: Norm of the budgets: 2 or inf.
        bounds: Smallest and largest admissible input value.
        low: Smallest admissible values ``(N, ...)`` for p = inf; None for p = 2.
        high: Largest, likewise.
    """

    x: Tensor
    eps: Tensor
    p: float
    bounds: tuple[float, float]
    low: Tensor | None
    high: Tensor | None

    @staticmethod
    def of(x: Tensor, eps: float | Tensor, p: float, bounds: tuple[float, float]) -> Region:
        """The regions around ``x``; ``eps`` is one budget for all or one a sample ``(N,)``.

        For p = inf the box is rounded inwards, so that ``x_adv - x`` never exceeds eps by a rounding error.

        Raises:
            InputError: A budget is negative or not finite, or p is another norm.
        """
        budgets = check_budget(eps, p, len(x)).to(x.device)
        x, rounded = x.detach().clamp(*bounds), budgets.to(x.dtype)
        if p == 2:
            return Region(x, rounded, p, bounds, None, None)
        # Budgets rounded down, then the sums moved one step inwards: x_adv - x never exceeds eps by a rounding error.
        down = torch.where(rounded.double() > budgets, torch.nextafter(rounded, torch.zeros_like(rounded)), rounded)
        wide = per_sample(down, x)
        low, high = torch.nextafter(x - wide, x), torch.nextafter(x + wide, x)
        return Region(x, rounded, p, bounds, low.clamp_min_(bounds[0]), high.clamp_max_(bounds[1]))

    def project(self, x_adv: Tensor) -> Tensor:
        """Onto the budget, then onto the bounds (which brings no point further from x)."""
        return project_(x_adv.clone(), self.x, self.eps, self.low, self.high, self.bounds)

    def start(self, noise: Tensor) -> Tensor:
        """The point of the budget's sphere in the direction of ``noise`` ``(N, ...)``, projected onto the bounds."""
        length = per_sample(self.eps / (lp_norm(noise, self.p) + 1e-12), self.x)
        return self.project(self.x + length * noise)

    def tighten(self, x_adv: Tensor) -> Tensor:
        """Shrink the perturbations that float32 rounding left more than a part in 10^6 over the budget (p = 2)."""
        if self.p != 2:
            return x_adv
        delta, eps = x_adv.double() - self.x.double(), self.eps.double()
        length = lp_norm(delta, 2)
        over = length > eps * (1 + 5e-7)
        if not bool(over.any()):
            return x_adv
        delta = delta * per_sample(eps / length.clamp_min(1e-300), delta)
        shrunk = (self.x.double() + delta).to(x_adv.dtype)
        beyond = (shrunk.double() - self.x.double()).abs() > delta.abs()  # rounded away from x
        shrunk = torch.where(beyond, torch.nextafter(shrunk, self.x), shrunk)
        return torch.where(per_sample(over, x_adv), shrunk, x_adv)


def project_(
    z: Tensor, x: Tensor, eps: Tensor, low: Tensor | None, high: Tensor | None, bounds: tuple[float, float]
) -> Tensor:
    """Project ``z`` in place onto the regions that :class:`Region` describes with the same names; returns it."""
    if low is not None and high is not None:
        return torch.clamp(z, low, high, out=z)
    z.sub_(x)
    shrink = eps / lp_norm(z, 2).clamp_min(torch.finfo(z.dtype).tiny).maximum(eps)
    return torch.addcmul(x, z, per_sample(shrink, z), out=z).clamp_(*bounds)


def inside(x: Tensor, bounds: tuple[float, float]) -> Tensor:
    """The nearest points a rounding step inside of the bounds, at which gradients are taken.

    The derivative of ``clamp`` (as of PyTorch 2.14) is zero exactly at its bounds: on a model that clips its input,
    every black or white pixel would stay as it is.
    """
    low, high = bounds
    step = torch.finfo(x.dtype).eps * max(abs(low), abs(high))
    return x.clamp(low + step, high - step)


def ascend(x: Tensor, gradient: Tensor, length: Tensor, p: float, out: Tensor) -> Tensor:
    """``x`` and a step of ``length`` ``(N,)`` along the steepest ascent; uses ``gradient`` up and fills ``out``."""
    if p == 2:
        return torch.addcmul(x, gradient, per_sample(length / (lp_norm(gradient, 2) + 1e-12), x), out=out)
    return torch.addcmul(x, gradient.sign_(), per_sample(length, x), out=out)


def check_budget(eps: float | Tensor, p: float, n: int) -> Tensor:
    """Budgets ``(n,)`` in float64.

    Raises:
        InputError: p is neither 2 nor inf, a budget is negative or not finite, or there are not n of them.
    """
    check_attack_norm(p)
    budgets = torch.as_tensor(eps, dtype=torch.float64)
    if budgets.ndim and budgets.shape != (n,):
        raise InputError(f"eps: expected one budget or {n}, one a sample; got shape {tuple(budgets.shape)}")
    is_good = (budgets >= 0) & budgets.isfinite()
    if not bool(is_good.all()):
        raise InputError(f"eps: expected a finite number of at least 0; got {float(budgets[~is_good].flatten()[0])}")
    return budgets.expand(n)
