"""Auto-PGD (Croce & Hein 2020), untargeted and targeted, as a packed search.

:class:`Schedule` holds the rule by which a sample's step is halved (their Algorithm 1), :class:`AutoPgd` the steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from brittle.attacks.losses import Loss, named_loss, targeted_dlr
from brittle.attacks.packing import State, run
from brittle.attacks.pool import Pool, check_count
from brittle.attacks.region import ascend
from brittle.data.checks import check_batch
from brittle.errors import InputError
from brittle.linear.norms import per_sample
from brittle.models.borrow import Model, frozen
from brittle.models.forward import check_logits, in_parts
from brittle.progress import Progress

Look = Callable[[Model, Loss, State], tuple[Tensor, Tensor, Tensor]]
"""Network, loss and state to losses ``(n,)``, whether predictions are wrong ``(n,)`` and gradients ``(n, ...)``."""
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
    progress: Progress | None = None,
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
        progress: Called with ``("apgd", samples done, their number)``.

    Returns:
        ``x_adv``, like ``x``: the first misclassified point met, or else the point of largest loss.

    Raises:
        InputError: An argument is out of range; it names the argument, what was expected and what came.
    """
    check_batch(x, y, bounds=bounds)
    check_count(steps, "steps")
    pool, schedule = Pool.of(x, y, eps, p, bounds, seed if random_start else None, ids), Schedule.of(steps, rho)
    return untargeted("apgd", model, pool, loss, schedule, batch_size=batch_size, progress=progress)


def untargeted(
    name: str,
    model: Model,
    pool: Pool,
    loss: str | Loss,
    schedule: Schedule,
    *,
    look: Look | None = None,
    batch_size: int | None,
    progress: Progress | None,
) -> Tensor:
    """The examples of a pool, away from its labels: what :func:`apgd` and ``apgd_smoothed`` share.

    Args:
        name: Of the attack, for ``progress``.
        model: As :func:`apgd`.
        pool: The checked samples.
        loss: ``"ce"``, ``"dlr"`` or a function.
        schedule: The rule that halves steps.
        look: As :class:`AutoPgd`.
        batch_size: As :func:`apgd`.
        progress: Called with ``(name, samples done, their number)``.

    Raises:
        InputError: ``batch_size`` or the loss's name is wrong.
    """
    check_count(batch_size, "batch_size")
    objective = named_loss(loss)
    search = AutoPgd(name, model, pool, lambda logits, y, _: objective(logits, y), pool.y, schedule, look)
    with frozen(model):
        run(search, len(pool.x), batch_size, pool.x.device, progress)
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
    progress: Progress | None = None,
) -> Tensor:
    """Auto-PGD on the targeted DLR loss, towards one likely class after the other (Croce & Hein 2020).

    The targets of a sample are the classes other than its label in falling order of the clean logits. A sample that
    one of them breaks is not attacked again.

    Other arguments are those of :func:`apgd`, for at least 4 classes.

    Args:
        steps: Gradient steps towards each target, at least 1.
        targets: Most targets of a sample; fewer when there are fewer classes.
        seed: Seed of the random starts; the run towards target t draws from ``(seed, t)``.
        progress: Called with ``("apgd_targeted", samples done, their number)``.

    Returns:
        ``x_adv``, like ``x``: the first misclassified point met, or else the last target's point of largest loss.

    Raises:
        InputError: An argument is out of range; it names the argument, what was expected and what came.
    """
    check_batch(x, y, bounds=bounds)
    check_count(steps, "steps")
    check_count(targets, "targets")
    check_count(batch_size, "batch_size")
    pool, schedule = Pool.of(x, y, eps, p, bounds, seed, ids), Schedule.of(steps, rho)
    x_adv, total = pool.x.clone(), len(x)
    with frozen(model):
        order = in_parts(functools.partial(_other_classes, model), batch_size, pool.x, pool.y)[:, :targets]
        rows = torch.arange(total, device=x.device)  # not broken yet
        for number, target in enumerate(order.unbind(1)):
            names = torch.tensor([pool.names[row] for row in rows.tolist()])
            part = Pool.of(pool.x[rows], pool.y[rows], pool.eps[rows], p, bounds, seed + 1_000_003 * number, names)
            search = AutoPgd("apgd_targeted", model, part, targeted_dlr, target[rows], schedule)
            # Only the last target settles the samples that it leaves.
            is_last, broken_before = number + 1 == order.shape[1], total - len(rows)
            run(search, len(rows), batch_size, x.device, _counting_from(broken_before, progress) if is_last else None)
            x_adv[rows] = part.examples()
            rows = rows[~search.broken]
            if progress is not None:
                progress("apgd_targeted", total if is_last else total - len(rows), total)
            if len(rows) == 0:
                break
    return x_adv


def _other_classes(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """The classes other than the label, ``(N, classes - 1)``, in falling order of the logits."""
    with torch.no_grad():
        logits = model(x)
    check_logits(logits, x, y)
    if logits.shape[1] < 4:
        raise InputError(f"loss: targeted dlr needs at least 4 classes; got {logits.shape[1]}")
    return logits.scatter(1, y[:, None], -math.inf).argsort(dim=1, descending=True)[:, :-1]


def _counting_from(before: int, progress: Progress | None) -> Progress | None:
    """Progress of a run on the samples that are left when ``before`` others are done."""
    return progress and (lambda stage, done, left: progress(stage, before + done, before + (left or 0)))


@dataclass(frozen=True)
class Schedule:
    """At which steps Auto-PGD may halve a sample's step, and which rule decides.

    Attributes:
        is_checkpoint: ``(steps + 1,)``, bool: whether there is a checkpoint after that many steps.
        rises_needed: ``(steps + 1,)``, float32: at a checkpoint, rho times the steps since the last one.
    """

    is_checkpoint: Tensor
    rises_needed: Tensor

    @staticmethod
    def of(steps: int, rho: float) -> Schedule:
        """Checkpoints at 0.22 of the steps, then 0.03 closer each time, at least 0.06 apart (section 3.2 there).

        Raises:
            InputError: rho is no share.
        """
        if not 0 <= rho <= 1:
            raise InputError(f"rho: expected a share from 0 to 1; got {rho}")
        gap, shrink, smallest = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
        gaps, at = torch.zeros(steps + 1, dtype=torch.float64), gap
        while at <= steps:
            gaps[at] = gap
            gap = max(gap - shrink, smallest)
            at += gap
        # In single precision k / n * n is k again: k of n rising losses are at most a share k / n.
        return Schedule(gaps > 0, (rho * gaps).float())

    @property
    def steps(self) -> int:
        """Gradient steps of a sample that is not broken."""
        return len(self.is_checkpoint) - 1

    def begin(self, eps: Tensor) -> State:
        """Counters of samples with budgets ``eps`` ``(n,)``, on the CPU: no loss seen, step length ``2 eps``."""
        # Counters are kept on the CPU: tiny tensors cost least there.
        eps = eps.cpu()
        return {
            "step": torch.zeros(len(eps), dtype=torch.int64),
            "length": 2 * eps,
            "best_loss": torch.full_like(eps, -math.inf),
            "last_loss": torch.full_like(eps, math.inf),
            "rises": torch.zeros(len(eps), dtype=torch.int64),
            "best_at_check": torch.full_like(eps, -math.inf),
            "halved_at_check": torch.ones(len(eps), dtype=torch.bool),  # there is no check before the first
        }

    def follow(self, state: State, losses: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
        r"""Count one step's losses f_k and halve the step lengths eta of samples that make no progress.

        At a checkpoint w_j a sample halves eta and returns to its best point when

        1. at most ``rho (w_j - w_{j-1})`` of the losses since ``w_{j-1}`` rose, ``f_k > f_{k-1}``, or
        2. neither eta was halved at ``w_{j-1}`` nor the best loss has risen since

        (Croce & Hein 2020, Algorithm 1 and conditions 1 and 2 of section 3.2; "at most" as their implementation has
        it, "less than" there).

        Args:
            state: The counters of :meth:`begin`, replaced by those after the step.
            losses: At the points just measured, ``(n,)``, on the CPU.
            wrong: Whether those are misclassified, which makes them the best of their samples, likewise.

        Returns:
            Which of the points are the best of their samples so far, and which samples halve their steps, ``(n,)``.
        """
        k = state["step"]
        improved = wrong | (losses > state["best_loss"])
        best = torch.where(improved, losses, state["best_loss"])
        rises = state["rises"] + (losses > state["last_loss"])
        at_check = halved = self.is_checkpoint[k]
        if at_check.any():
            few_rises = rises <= self.rises_needed[k]
            unchanged = (state["best_at_check"] == best) & ~state["halved_at_check"]
            halved = at_check & (few_rises | unchanged)
            state["length"] = torch.where(halved, state["length"] / 2, state["length"])
            state["best_at_check"] = torch.where(at_check, best, state["best_at_check"])
            state["halved_at_check"] = torch.where(at_check, halved, state["halved_at_check"])
            rises = torch.where(at_check, 0, rises)
        state["best_loss"], state["rises"], state["step"] = best, rises, k + 1
        state["last_loss"] = torch.where(k == 0, 0, losses)  # the authors' implementation has 0 for the start's loss
        return improved, halved


class AutoPgd:
    """One run of Auto-PGD as a packed search; ``broken`` ``(N,)`` says which samples of the pool it broke.

    ``look`` measures loss, verdict and gradient at the points; by default by one pass.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        pool: Pool,
        loss: Callable[[Tensor, Tensor, Tensor], Tensor],
        target: Tensor,
        schedule: Schedule,
        look: Look | None = None,
    ) -> None:
        self.name, self.model, self.pool, self.loss, self.target = name, model, pool, loss, target
        self.schedule, self.broken = schedule, torch.zeros_like(pool.y, dtype=torch.bool)
        self.look = look or pool.look

    def begin(self, rows: Tensor) -> State:
        """Points ``(n, ...)`` and counters of the pool's ``rows`` ``(n,)``."""
        state = self.pool.begin(rows)
        x = state["x"]
        points = {"previous": x.clone(), "best": x.clone(), "best_gradient": torch.zeros_like(x)}
        return state | points | self.schedule.begin(state["eps"]) | {"target": self.target[rows], "wrong": rows < 0}

    def measure(self, state: State) -> tuple[Tensor, Tensor, Tensor]:
        return self.look(self.model, lambda logits, y: self.loss(logits, y, state["target"]), state)

    def advance(self, state: State, measured: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Take in what was measured and move on; broken samples and those out of steps are done ``(n,)``."""
        losses, state["wrong"], gradient = measured
        x, k, wrong = state["x"], state["step"], state["wrong"].cpu()
        improved, halved = self.schedule.follow(state, losses.cpu(), wrong)
        share = per_sample(improved.to(x), x)  # 0 or 1: lerp_ is exact there, and the quickest choice
        state["best"].lerp_(x, share)
        state["best_gradient"].lerp_(gradient, share)
        if halved.any():
            rows = halved.nonzero()[:, 0].to(x.device)
            x[rows], gradient[rows] = state["best"][rows], state["best_gradient"][rows]
        self._move(state, gradient, (k == 0).nonzero()[:, 0].to(x.device))
        return wrong | (k == self.schedule.steps)

    def _move(self, state: State, gradient: Tensor, fresh: Tensor) -> None:
        """The next points, in the gradient's memory: a projected step, mixed with the step before.

        Projects ``x + m (z - x) + (1 - m) (x - previous)``, z the projected step and m the :data:`MOMENTUM`; the
        ``fresh`` samples have no step before and go to z.
        """
        x, length = state["x"], state["length"].to(gradient)
        z = self.pool.project_(ascend(x, gradient, length, self.pool.p, gradient), state)
        first = z[fresh] if len(fresh) else None
        before = state["previous"].lerp_(x, 2)  # 2 x - previous: with m z and 1 - m of this the sum is the above
        self.pool.project_(torch.lerp(before, z, MOMENTUM, out=z), state)
        if first is not None:
            z[fresh] = first
        state["x"], state["previous"] = z, x

    def finish(self, rows: Tensor, state: State, done: Tensor) -> None:
        self.broken[rows] = state["wrong"][done]
        self.pool.finish(rows, state["best"][done])
