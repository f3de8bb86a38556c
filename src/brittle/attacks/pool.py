"""The samples of one attack, and checks of what all attacks are given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.attacks.losses import Loss, loss_and_gradient
from brittle.attacks.packing import State
from brittle.attacks.region import Region, check_budget, inside, project_
from brittle.errors import InputError
from brittle.models.borrow import Model
from brittle.random_streams import seed_of


@dataclass(frozen=True)
class Pool:
    """The samples of one attack, and where their results go.

    Attributes:
        x: Inputs ``(N, ...)``, clipped to the bounds.
        y: Labels ``(N,)``.
        eps: Budgets ``(N,)``, in float64.
        p: Norm of the budgets.
        bounds: Smallest and largest admissible input value.
        seed: Seed of the random starts; None to start at x.
        names: The samples' ids.
        x_adv: Results ``(N, ...)``.
    """

    x: Tensor
    y: Tensor
    eps: Tensor
    p: float
    bounds: tuple[float, float]
    seed: int | None
    names: Sequence[int]
    x_adv: Tensor

    @staticmethod
    def of(
        x: Tensor,
        y: Tensor,
        eps: float | Tensor,
        p: float,
        bounds: tuple[float, float],
        seed: int | None,
        ids: Tensor | None,
    ) -> Pool:
        """Checked and clipped samples; results not yet set.

        Raises:
            InputError: A budget, the norm or the number of ids is wrong.
        """
        budgets = check_budget(eps, p, len(x)).to(x.device)
        x = x.detach().clamp(*bounds)
        return Pool(x, y.long(), budgets, p, bounds, seed, sample_ids(ids, len(x)), torch.empty_like(x))

    def begin(self, rows: Tensor) -> State:
        """What every search needs of these samples: region (``clean`` or ``low``, ``high``; ``eps``), labels, start."""
        region = Region.of(self.x[rows], self.eps[rows], self.p, self.bounds)
        names = [self.names[row] for row in rows.tolist()]
        start = region.x.clone() if self.seed is None else random_start(region, self.seed, names)
        state = {"x": start, "y": self.y[rows], "eps": region.eps}
        if region.low is not None and region.high is not None:
            return state | {"low": region.low, "high": region.high}
        return state | {"clean": region.x}

    def look(self, model: Model, loss: Loss, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """One pass with gradient at the slots' points; the logits of fresh ones are checked."""
        return loss_and_gradient(model, loss, inside(state["x"], self.bounds), state["y"], check=state["step"] == 0)

    def project_(self, z: Tensor, state: State) -> Tensor:
        """Project in place onto the slots' regions."""
        clean = state.get("clean", z)
        return project_(z, clean, state["eps"], state.get("low"), state.get("high"), self.bounds)

    def finish(self, rows: Tensor, x_adv: Tensor) -> None:
        """Keep the examples of the samples ``rows``."""
        self.x_adv[rows] = x_adv

    def examples(self) -> Tensor:
        """All results ``(N, ...)``, within their budgets also after rounding."""
        if self.p != 2:  # the box cannot be left
            return self.x_adv
        return Region.of(self.x, self.eps, self.p, self.bounds).tighten(self.x_adv)


def check_length(step_size: float) -> float:
    """A finite step length above 0, or InputError."""
    if not 0 < step_size < math.inf:
        raise InputError(f"step_size: expected a finite number above 0; got {step_size}")
    return step_size


def check_count(count: int | None, name: str) -> None:
    """Raise InputError unless the count is at least 1, or None (no limit)."""
    if count is not None and count < 1:
        raise InputError(f"{name}: expected at least 1; got {count}")


def random_start(region: Region, seed: int, names: Sequence[int]) -> Tensor:
    """A random point of every sample's budget sphere, projected onto the bounds.

    p = inf: uniform noise scaled to largest magnitude eps; p = 2: a uniform direction (as Croce & Hein 2020).

    Args:
        region: The samples and their budgets.
        seed: Seed of the draw.
        names: One id a sample; a sample's start depends on ``seed`` and its id alone.

    Returns:
        ``(N, ...)``, like ``region.x``.
    """
    noise = torch.empty(region.x.shape, dtype=torch.float32)
    source = torch.Generator()
    for row, name in zip(noise.unbind(), names, strict=True):
        source.manual_seed(seed_of(seed, name))
        if math.isinf(region.p):
            row.uniform_(generator=source)
        else:
            row.normal_(generator=source)
    if math.isinf(region.p):
        noise.mul_(2).sub_(1)
    return region.start(noise.to(region.x))


def sample_ids(ids: Tensor | None, n: int) -> list[int]:
    """The samples' ids; their positions when none are given.

    Raises:
        InputError: There are not n of them.
    """
    names = list(range(n)) if ids is None else [int(i) for i in ids]
    if len(names) != n:
        raise InputError(f"ids: expected {n} of them, one a sample; got {len(names)}")
    return names
