"""Auto-PGD (Croce & Hein 2020), untargeted and targeted, as a packed search."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from brittle.attacks.ball import ascended
from brittle.attacks.halving import Schedule, counts_of, first_counts
from brittle.attacks.losses import Loss, loss_and_gradient, named_loss, targeted_dlr
from brittle.attacks.packing import State, Tell, run
from brittle.attacks.pool import Pool, check_steps, checked_width
from brittle.data.checks import check_batch
from brittle.errors import InputError
from brittle.linear.norms import per_sample
from brittle.models.borrow import Model, frozen
from brittle.models.forward import check_logits, in_parts, widest

MOMENTUM = 0.75
"""Share of the projected step in every point after the first; the rest continues the step before."""


def apgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    p: float = math.inf,
    steps: int = 100,
    loss: str | Loss = "ce",
    rho: float = 0.75,
    random_start: bool = True,
    bounds: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    ids: Tensor | None = None,
    batch_size: int | None = None,
    progress: Tell | None = None,
) -> Tensor:
    """Auto-PGD (Croce & Hein 2020): PGD with momentum whose step length is halved per sample when progress stalls.

    Starts at a random point of the budget's sphere with step length ``2 eps``. At checkpoints (0.22, then ever
    closer, at least 0.06 of the steps apart) a sample's step is halved and it returns to its best point when at most
    ``rho`` of the steps since the last checkpoint raised the loss, or when neither its step nor its best loss
    has changed. Agrees with the authors' implementation from equal starts; a sample is done once it is broken.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``; left bit-equal.
        x: Inputs ``(N, ...)`` within ``bounds``.
        y: True labels ``(N,)``.
        eps: Budget, at least 0, in input units; one for all or one a sample ``(N,)``.
        p: Norm of the budget: 2 or inf.
        steps: Gradient steps, at least 1.
        loss: ``"ce"``, ``"dlr"`` or a function.
        rho: Share of rising steps up to which the step is halved.
        random_start: Whether to start from a random point of the budget instead of from x.
        bounds: Smallest and largest admissible input value.
        seed: Seed of the random starts.
        ids: Integers ``(N,)`` that name the samples (their positions by default).
        batch_size: Most samples at once (all by default); broken ones leave, and waiting ones take their place.
        progress: Called with the number of samples that are done.

    Returns:
        ``x_adv``, like ``x``: the first misclassified point met, or else the point of largest loss.

    Raises:
        InputError: An argument is out of range; it names the argument, what was expected and what came.
    """
    check_batch(x, y, bounds=bounds)
    check_steps(steps)
    _check_share(rho)
    pool = Pool.of(x, y, eps, p, bounds, seed if random_start else None, ids)
    objective = named_loss(loss)
    with frozen(model):
        search = _Apgd(model, pool, lambda logits, labels, _: objective(logits, labels), None, Schedule.of(steps, rho))
        run(search, len(x), widest(checked_width(batch_size), len(x)), x.device, progress)
    return pool.examples()


def apgd_targeted(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    p: float = math.inf,
    steps: int = 100,
    targets: int = 9,
    rho: float = 0.75,
    bounds: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    ids: Tensor | None = None,
    batch_size: int | None = None,
    progress: Tell | None = None,
) -> Tensor:
    """Auto-PGD on the targeted DLR loss, towards one likely class after the other (Croce & Hein 2020).

    The targets of a sample are the classes other than its label in falling order of the clean logits. A sample that
    one of them breaks is not attacked again.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)`` with at least 4 classes; left bit-equal.
        x: Inputs ``(N, ...)`` within ``bounds``.
        y: True labels ``(N,)``.
        eps: Budget, at least 0, in input units; one for all or one a sample ``(N,)``.
        p: Norm of the budget: 2 or inf.
        steps: Gradient steps towards each target, at least 1.
        targets: Most targets of a sample; fewer when there are fewer classes.
        rho: As :func:`apgd`.
        bounds: Smallest and largest admissible input value.
        seed: Seed of the random starts; the run towards target t draws from ``(seed, t)``.
        ids: Integers ``(N,)`` that name the samples (their positions by default).
        batch_size: Most samples at once (all by default).
        progress: Called with the number of samples that are done.

    Returns:
        ``x_adv``, like ``x``: the first misclassified point met, or else the last target's point of largest loss.

    Raises:
        InputError: An argument is out of range; it names the argument, what was expected and what came.
    """
    check_batch(x, y, bounds=bounds)
    check_steps(steps)
    check_steps(targets, "targets")
    _check_share(rho)
    width = widest(checked_width(batch_size), len(x))
    pool = Pool.of(x, y, eps, p, bounds, seed, ids)
    x_adv = pool.x.clone()
    schedule = Schedule.of(steps, rho)
    with frozen(model):
        order = in_parts(lambda x, y: _others(model, x, y), width, pool.x, pool.y)
        rows = torch.arange(len(x), device=x.device)
        for number in range(min(targets, order.shape[1])):
            names = torch.tensor([pool.names[row] for row in rows.tolist()])
            part = Pool.of(pool.x[rows], pool.y[rows], pool.eps[rows], p, bounds, seed + 1_000_003 * number, names)
            search = _Apgd(model, part, targeted_dlr, order[rows, number], schedule)
            gone = len(x) - len(rows)
            last = number + 1 == min(targets, order.shape[1])
            run(search, len(rows), width, x.device, _later(progress, gone) if last else None)
            x_adv[rows] = part.examples()
            rows = rows[~search.broken]
            if progress is not None:
                progress(len(x) - len(rows) if not last else len(x))
            if len(rows) == 0:
                break
    return x_adv


class _Apgd:
    """One run of Auto-PGD as a packed search; ``broken`` ``(N,)`` says which samples of the pool it broke."""

    def __init__(
        self,
        model: Model,
        pool: Pool,
        loss: Callable[[Tensor, Tensor, Tensor], Tensor],
        target: Tensor | None,
        schedule: Schedule,
    ) -> None:
        self.model, self.pool, self.loss, self.schedule = model, pool, loss, schedule
        self.target = pool.y if target is None else target
        self.broken = torch.zeros(len(pool.x), dtype=torch.bool, device=pool.x.device)

    def begin(self, rows: Tensor) -> State:
        """First states of the pool's ``rows`` ``(n,)``: points ``(n, ...)``, and what is counted (on the CPU)."""
        state = self.pool.begin(rows)
        x = state["x"]
        return state | {
            "target": self.target[rows],
            "previous": x.clone(),
            "best": x.clone(),
            "best_gradient": torch.zeros_like(x),
            "counts": first_counts(state["eps"]),
        }

    def measure(self, state: State) -> tuple[Tensor, Tensor, Tensor]:
        target, fresh = state["target"], torch.from_numpy(counts_of(state["counts"])["step"] == 0)
        return loss_and_gradient(
            self.model, lambda logits, y: self.loss(logits, y, target), state["x"], state["y"], check=fresh
        )

    def advance(self, state: State, measured: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Take in what was measured and move on; broken samples and those out of steps are done ``(n,)``."""
        losses, wrong, gradient = measured
        x, counts = state["x"], counts_of(state["counts"])
        followed = self.schedule.follow(counts, losses.double().cpu().numpy(), wrong.cpu().numpy())
        share, length = torch.from_numpy(np.stack((followed.improved, counts["length"]))).to(x)
        better = per_sample(share, x)  # 0 or 1: lerp_ is exact there, and the quickest choice
        state["best"].lerp_(x, better)
        state["best_gradient"].lerp_(gradient, better)
        if followed.back.any():
            rows = torch.from_numpy(followed.back.nonzero()[0]).to(x.device)
            x.index_copy_(0, rows, state["best"].index_select(0, rows))
            gradient.index_copy_(0, rows, state["best_gradient"].index_select(0, rows))
        self._move(state, gradient, length, torch.from_numpy(followed.fresh.nonzero()[0]).to(x.device))
        return torch.from_numpy(followed.done)

    def _move(self, state: State, gradient: Tensor, length: Tensor, fresh: Tensor) -> None:
        """The next points, in the gradient's memory: a projected step, mixed with the step before.

        Projects ``x + m (z - x) + (1 - m) (x - previous)``, z the projected step and m the :data:`MOMENTUM`; the
        ``fresh`` samples have no step before and go to z.
        """
        x = state["x"]
        z = self.pool.project_(ascended(x, gradient, length, self.pool.p, gradient), state)
        first = z[fresh] if len(fresh) else None
        before = state["previous"].lerp_(x, 2)  # 2 x - previous: with m z and 1 - m of this the sum is the above
        self.pool.project_(torch.lerp(before, z, MOMENTUM, out=z), state)
        if first is not None:
            z[fresh] = first
        state["x"], state["previous"] = z, x

    def finish(self, rows: Tensor, state: State, done: Tensor) -> None:
        wrong = torch.from_numpy(counts_of(state["counts"])["wrong"] == 1).to(done.device)[done]
        self.broken[rows] = wrong
        # The point that was just measured is "previous" now.
        self.pool.finish(rows, torch.where(per_sample(wrong, state["x"]), state["previous"][done], state["best"][done]))


def _others(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """The classes other than the label, ``(N, classes - 1)``, in falling order of the logits."""
    with torch.no_grad():
        logits = model(x)
    check_logits(logits, x, y)
    if logits.shape[1] < 4:
        raise InputError(f"loss: targeted dlr needs at least 4 classes; got {logits.shape[1]}")
    return logits.scatter(1, y[:, None], -math.inf).argsort(dim=1, descending=True)[:, :-1]


def _later(progress: Tell | None, gone: int) -> Tell | None:
    return None if progress is None else lambda done: progress(gone + done)


def _check_share(rho: float) -> None:
    if not 0 <= rho <= 1:
        raise InputError(f"rho: expected a share from 0 to 1; got {rho}")
