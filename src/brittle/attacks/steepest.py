"""Steepest ascent on the loss with steps of fixed length: FGSM and projected gradient descent."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from brittle.attacks.losses import Loss, loss_and_gradient, named_loss
from brittle.attacks.packing import State, run
from brittle.attacks.pool import Pool, check_count, check_length
from brittle.attacks.region import Region, ascend, check_budget, inside
from brittle.data.checks import check_batch
from brittle.models.borrow import Model, frozen
from brittle.models.forward import in_parts
from brittle.progress import Progress


def fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    p: float = math.inf,
    bounds: tuple[float, float] = (0.0, 1.0),
    loss: str | Loss = "ce",
    batch_size: int | None = None,
) -> Tensor:
    """Fast gradient sign method (Goodfellow et al. 2015): one full step along the gradient of the loss.

    p = inf: ``x + eps sign(g)``; p = 2: ``x + eps g / ||g||_2``; then clipped to ``bounds``.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``; left bit-equal.
        x: Inputs ``(N, ...)`` within ``bounds``.
        y: True labels ``(N,)``.
        eps: Budget, at least 0, in input units; one for all or one a sample ``(N,)``.
        p: Norm of the budget: 2 or inf.
        bounds: Smallest and largest admissible input value.
        loss: ``"ce"``, ``"dlr"`` or a function.
        batch_size: Most samples at once; all by default.

    Returns:
        ``x_adv``, like ``x``.

    Raises:
        InputError: An argument is out of range; it names the argument, what was expected and what came.
    """
    check_batch(x, y, bounds=bounds)
    check_count(batch_size, "batch_size")
    budgets, objective = check_budget(eps, p, len(x)).to(x.device), named_loss(loss)

    def step(x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        region, every = Region.of(x, eps, p, bounds), torch.ones_like(y, dtype=torch.bool)
        _, _, gradient = loss_and_gradient(model, objective, inside(region.x, bounds), y, check=every)
        return region.tighten(region.project(ascend(region.x, gradient, region.eps, p, torch.empty_like(gradient))))

    with frozen(model):
        return in_parts(step, batch_size, x, y.long(), budgets)


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    p: float = math.inf,
    steps: int = 40,
    step_size: float | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    loss: str | Loss = "ce",
    random_start: bool = True,
    seed: int = 0,
    ids: Tensor | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Projected gradient descent (Madry et al. 2018): ascent steps of fixed length, projected onto the budget.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``; left bit-equal.
        x: Inputs ``(N, ...)`` within ``bounds``.
        y: True labels ``(N,)``.
        eps: Budget, at least 0, in input units; one for all or one a sample ``(N,)``.
        p: Norm of the budget: 2 or inf.
        steps: Gradient steps, at least 1.
        step_size: Length of a step in the norm p; ``2.5 eps / steps`` by default.
        bounds: Smallest and largest admissible input value.
        loss: ``"ce"``, ``"dlr"`` or a function.
        random_start: Whether to start from a random point of the budget instead of from x.
        seed: Seed of the random starts.
        ids: Integers ``(N,)`` that name the samples (their positions by default); a sample's start depends on
            ``seed`` and its id alone.
        batch_size: Most samples at once (all by default); broken ones leave, and waiting ones take their place.
        progress: Called with ``("pgd", samples done, their number)``.

    Returns:
        ``x_adv``, like ``x``: the first misclassified point met, or else the point of largest loss.

    Raises:
        InputError: An argument is out of range; it names the argument, what was expected and what came.
    """
    check_batch(x, y, bounds=bounds)
    check_count(steps, "steps")
    check_count(batch_size, "batch_size")
    pool = Pool.of(x, y, eps, p, bounds, seed if random_start else None, ids)
    lengths = pool.eps * (2.5 / steps) if step_size is None else torch.full_like(pool.eps, check_length(step_size))
    search = _Ascent(model, named_loss(loss), pool, steps, lengths.to(pool.x))
    with frozen(model):
        run(search, len(x), batch_size, x.device, progress)
    return pool.examples()


class _Ascent:
    """Steps of fixed length, as a packed search."""

    name = "pgd"

    def __init__(self, model: Model, loss: Loss, pool: Pool, steps: int, lengths: Tensor) -> None:
        self.model, self.loss, self.pool, self.steps, self.lengths = model, loss, pool, steps, lengths

    def begin(self, rows: Tensor) -> State:
        state = self.pool.begin(rows)
        losses = torch.full_like(state["eps"], -math.inf)
        return state | {
            "best": state["x"].clone(),
            "best_loss": losses,
            "length": self.lengths[rows],
            "step": torch.zeros(len(rows), dtype=torch.int64),
        }

    def measure(self, state: State) -> tuple[Tensor, Tensor, Tensor]:
        return self.pool.look(self.model, self.loss, state)

    def advance(self, state: State, measured: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        losses, wrong, gradient = measured
        x = state["x"]
        improved = ((losses > state["best_loss"]) | wrong).nonzero()[:, 0]
        state["best"][improved], state["best_loss"][improved] = x[improved], losses[improved]
        done = wrong.cpu() | (state["step"] == self.steps)
        ascend(x, gradient, state["length"], self.pool.p, x)
        # A done sample's next point is never looked at: its best one is what finish() keeps.
        self.pool.project_(x, state)
        state["step"] += 1
        return done

    def finish(self, rows: Tensor, state: State, done: Tensor) -> None:
        self.pool.finish(rows, state["best"][done])
