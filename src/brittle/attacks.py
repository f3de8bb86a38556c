r"""Adversarial attacks as plain functions: ``attack(model, x, y, *, eps, p, ...) -> x_adv``.

Every attack keeps ``||x_adv - x||_p <= eps`` and the declared input bounds, freezes the parameters, leaves the model
bit-equal and draws from generators of its own: the random start of a sample depends on the seed and the sample's id,
never on the batch it happens to share. Inputs are in the units of ``bounds`` (normalisation belongs into the
model), outputs are logits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from brittle.errors import InputError
from brittle.frozen import Model, device_of, frozen
from brittle.inputs import check_batch
from brittle.norms import check_attack_norm, lp_norm, per_sample, project_ball

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits ``(N, classes)`` and labels ``(N,)`` to one loss a sample ``(N,)``; attacks maximise it."""


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of every sample, ``(N,)``."""
    return F.cross_entropy(logits, y, reduction="none")


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    r"""Difference of logits ratio, ``-(s_y - max_{j != y} s_j) / (s_(1) - s_(3))`` (Croce & Hein 2020, eq. 6).

    Unlike cross-entropy it does not change when the logits are scaled or shifted.

    Args:
        logits: ``(N, classes)`` with at least 3 classes; ``s_(i)`` is the i-th largest.
        y: Labels ``(N,)``.

    Returns:
        ``(N,)``; positive exactly where the prediction is wrong.

    Raises:
        InputError: Fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise InputError(f"loss: dlr needs at least 3 classes; got {logits.shape[1]}")
    ordered = logits.sort(dim=1).values
    own = logits.gather(1, y[:, None])[:, 0]
    other = torch.where(ordered[:, -1] == own, ordered[:, -2], ordered[:, -1])
    return -(own - other) / (ordered[:, -1] - ordered[:, -3] + 1e-12)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "dlr": dlr}


def fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    p: float = math.inf,
    bounds: tuple[float, float] = (0.0, 1.0),
    loss: str | Loss = "ce",
) -> Tensor:
    """Fast gradient sign method (Goodfellow et al. 2015): one full step along the gradient of the loss.

    p = inf: ``x + eps sign(g)``; p = 2: ``x + eps g / ||g||_2``; then clipped to ``bounds``.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``; left bit-equal.
        x: Inputs ``(N, ...)`` within ``bounds``.
        y: True labels ``(N,)``.
        eps: Budget, at least 0, in input units.
        p: Norm of the budget: 2 or inf.
        bounds: Smallest and largest admissible input value.
        loss: ``"ce"``, ``"dlr"`` or a function.

    Returns:
        ``x_adv``, like ``x``.

    Raises:
        InputError: An argument is out of range; it names the argument, what was expected and what came.
    """
    check_batch(x, y, bounds=bounds)
    y = y.long()
    ball = _Ball.of(x, eps, p, bounds)
    with frozen(model):
        _, _, gradient = _loss_and_gradient(model, _loss(loss), ball.x, y, first=True)
        return ball.tightened(ball.project(ball.x + ball.eps * ball.steepest(gradient)))


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    p: float = math.inf,
    steps: int = 40,
    step_size: float | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    loss: str | Loss = "ce",
    random_start: bool = True,
    seed: int = 0,
    ids: Tensor | None = None,
) -> Tensor:
    """Projected gradient descent (Madry et al. 2018): ascent steps of fixed length, projected onto the budget.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``; left bit-equal.
        x: Inputs ``(N, ...)`` within ``bounds``.
        y: True labels ``(N,)``.
        eps: Budget, at least 0, in input units.
        p: Norm of the budget: 2 or inf.
        steps: Gradient steps, at least 1.
        step_size: Length of a step in the norm p; ``2.5 eps / steps`` by default.
        bounds: Smallest and largest admissible input value.
        loss: ``"ce"``, ``"dlr"`` or a function.
        random_start: Whether to start from a random point of the budget instead of from x.
        seed: Seed of the random starts.
        ids: Integers ``(N,)`` that name the samples (their positions by default); a sample's start depends on
            ``seed`` and its id alone.

    Returns:
        ``x_adv``, like ``x``: the first misclassified point met, or else the point of largest loss.

    Raises:
        InputError: An argument is out of range; it names the argument, what was expected and what came.
    """
    check_batch(x, y, bounds=bounds)
    _check_steps(steps)
    y = y.long()
    ball = _Ball.of(x, eps, p, bounds)
    length = 2.5 * eps / steps if step_size is None else _check_length(step_size)
    with frozen(model):
        x_adv = ball.project(_start(ball, seed, ids)) if random_start else ball.x
        track = _Track.begin(x_adv)
        for step in range(steps + 1):
            values, wrong, gradient = _loss_and_gradient(model, _loss(loss), x_adv, y, first=step == 0)
            track.note(x_adv, values, wrong)
            if bool(track.broken.all()):
                break
            x_adv = ball.project(x_adv + length * ball.steepest(gradient))
        return ball.tightened(track.result())


def apgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    p: float = math.inf,
    steps: int = 100,
    loss: str | Loss = "ce",
    rho: float = 0.75,
    bounds: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    ids: Tensor | None = None,
) -> Tensor:
    """Auto-PGD (Croce & Hein 2020): PGD with momentum whose step length is halved per sample when progress stalls.

    Starts at a random point of the budget's sphere with step length ``2 eps``. At checkpoints (0.22, then ever
    closer, at least 0.06 of the steps apart) a sample's step is halved and it returns to its best point when fewer
    than ``rho`` of the steps since the last checkpoint raised the loss, or when neither its step nor its best loss
    has changed. Agrees with the authors' implementation from equal starts; ends early when all samples are broken.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``; left bit-equal.
        x: Inputs ``(N, ...)`` within ``bounds``.
        y: True labels ``(N,)``.
        eps: Budget, at least 0, in input units.
        p: Norm of the budget: 2 or inf.
        steps: Gradient steps, at least 1.
        loss: ``"ce"``, ``"dlr"`` or a function.
        rho: Share of rising steps below which the step is halved.
        bounds: Smallest and largest admissible input value.
        seed: Seed of the random starts.
        ids: Integers ``(N,)`` that name the samples (their positions by default).

    Returns:
        ``x_adv``, like ``x``: the first misclassified point met, or else the point of largest loss.

    Raises:
        InputError: An argument is out of range; it names the argument, what was expected and what came.
    """
    check_batch(x, y, bounds=bounds)
    _check_steps(steps)
    if not 0 <= rho <= 1:
        raise InputError(f"rho: expected a share from 0 to 1; got {rho}")
    y = y.long()
    ball = _Ball.of(x, eps, p, bounds)
    with frozen(model):
        return ball.tightened(_apgd_run(model, ball, y, _loss(loss), steps, rho, _start(ball, seed, ids)))


def _apgd_run(model: Model, ball: _Ball, y: Tensor, loss: Loss, steps: int, rho: float, start: Tensor) -> Tensor:
    x_adv = ball.project(start)
    previous = x_adv
    values, wrong, gradient = _loss_and_gradient(model, loss, x_adv, y, first=True)
    track = _Track.begin(x_adv)
    track.note(x_adv, values, wrong)
    best_gradient = gradient
    length = torch.full_like(values, 2 * ball.eps)
    halving = _Halving.begin(values, steps, rho)
    for step in range(steps):
        if bool(track.broken.all()):
            break
        momentum, previous = x_adv - previous, x_adv
        ascended = ball.project(x_adv + per_sample(length, x_adv) * ball.steepest(gradient))
        a = 0.75 if step else 1.0
        x_adv = ball.project(x_adv + a * (ascended - x_adv) + (1 - a) * momentum)
        values, wrong, gradient = _loss_and_gradient(model, loss, x_adv, y)
        improved = track.note(x_adv, values, wrong)
        best_gradient = torch.where(per_sample(improved, x_adv), gradient, best_gradient)
        halved = halving.after_step(values, track.best_loss)
        if halved is not None:
            length = torch.where(halved, length / 2, length)
            back = per_sample(halved, x_adv)
            x_adv, gradient = torch.where(back, track.best, x_adv), torch.where(back, best_gradient, gradient)
    return track.result()


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
    _check_budget(eps, p)
    _check_steps(epochs, "epochs")
    length, device = eps / 4 if step_size is None else _check_length(step_size), device_of(model)
    u: Tensor | None = None
    with frozen(model):
        for _ in range(epochs):
            for x, y in batches:
                check_batch(x, y, bounds=bounds)
                x, y = x.to(device), y.to(device).long()
                u = torch.zeros_like(x[:1]) if u is None else u
                _, _, gradient = _loss_and_gradient(model, _loss(loss), (x + u).clamp(*bounds), y, first=True)
                direction = _steepest(gradient.sum(0, keepdim=True), p)
                u = project_ball(u + length * direction, eps, p)
    if u is None:
        raise InputError("batches: expected at least one pair of inputs and labels; got none")
    return u[0]


@dataclass(frozen=True)
class _Ball:
    """The admissible inputs around x: within the budget and within the bounds."""

    x: Tensor
    eps: float
    p: float
    bounds: tuple[float, float]
    low: Tensor
    high: Tensor

    @staticmethod
    def of(x: Tensor, eps: float, p: float, bounds: tuple[float, float]) -> _Ball:
        _check_budget(eps, p)
        x = x.detach().clamp(*bounds)
        if p == 2:
            return _Ball(x, eps, p, bounds, x, x)
        # The box is rounded inwards, so that x_adv - x never exceeds eps by a rounding error.
        low, high = (x.double() - eps).clamp_min(bounds[0]), (x.double() + eps).clamp_max(bounds[1])
        low_rounded, high_rounded = low.to(x.dtype), high.to(x.dtype)
        up, down = torch.full_like(x, math.inf), torch.full_like(x, -math.inf)
        low_rounded = torch.where(low_rounded.double() < low, torch.nextafter(low_rounded, up), low_rounded)
        high_rounded = torch.where(high_rounded.double() > high, torch.nextafter(high_rounded, down), high_rounded)
        return _Ball(x, eps, p, bounds, low_rounded, high_rounded)

    def steepest(self, gradient: Tensor) -> Tensor:
        return _steepest(gradient, self.p)

    def project(self, x_adv: Tensor) -> Tensor:
        """Onto the budget, then onto the bounds (which brings no point further from x)."""
        if self.p != 2:
            return torch.maximum(torch.minimum(x_adv, self.high), self.low)
        return (self.x + project_ball(x_adv - self.x, self.eps, 2)).clamp(*self.bounds)

    def tightened(self, x_adv: Tensor) -> Tensor:
        """Shrink the perturbations that float32 rounding left more than a part in 10^6 over the budget (p = 2)."""
        if self.p != 2:
            return x_adv
        delta = x_adv.double() - self.x.double()
        length = lp_norm(delta, 2)
        over = length > self.eps * (1 + 5e-7)
        if not bool(over.any()):
            return x_adv
        delta = delta * per_sample(self.eps / length.clamp_min(1e-300), delta)
        shrunk = (self.x.double() + delta).to(x_adv.dtype)
        beyond = (shrunk.double() - self.x.double()).abs() > delta.abs()  # rounded away from x
        shrunk = torch.where(beyond, torch.nextafter(shrunk, self.x), shrunk)
        return torch.where(per_sample(over, x_adv), shrunk, x_adv)


@dataclass
class _Track:
    """Per sample: the point of largest loss and the first misclassified point, whatever its neighbours do."""

    best: Tensor
    adversarial: Tensor
    best_loss: Tensor
    broken: Tensor

    @staticmethod
    def begin(x: Tensor) -> _Track:
        losses = torch.full((len(x),), -math.inf, dtype=x.dtype, device=x.device)
        return _Track(x, x, losses, torch.zeros(len(x), dtype=torch.bool, device=x.device))

    def note(self, x: Tensor, losses: Tensor, wrong: Tensor) -> Tensor:
        """Take in one point a sample; returns where the loss improved."""
        improved = losses > self.best_loss
        self.best = torch.where(per_sample(improved, x), x, self.best)
        self.best_loss = torch.where(improved, losses, self.best_loss)
        self.adversarial = torch.where(per_sample(wrong & ~self.broken, x), x, self.adversarial)
        self.broken = self.broken | wrong
        return improved

    def result(self) -> Tensor:
        return torch.where(per_sample(self.broken, self.best), self.adversarial, self.best)


@dataclass
class _Halving:
    """Auto-PGD's checkpoints and the two conditions under which a sample's step is halved."""

    interval: int
    shrink: int
    smallest: int
    rho: float
    since: int
    rising: Tensor
    last_loss: Tensor
    best_at_check: Tensor
    halved_at_check: Tensor

    @staticmethod
    def begin(losses: Tensor, steps: int, rho: float) -> _Halving:
        # The authors' implementation compares the first step's loss with 0, not with the starting point's.
        zero, all_true = torch.zeros_like(losses), torch.ones_like(losses, dtype=torch.bool)
        first, shrink, smallest = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
        return _Halving(first, shrink, smallest, rho, 0, zero, zero, losses, all_true)

    def after_step(self, losses: Tensor, best: Tensor) -> Tensor | None:
        """At a checkpoint, which samples halve their step ``(N,)``; otherwise None."""
        self.rising = self.rising + (losses > self.last_loss)
        self.last_loss = losses
        self.since += 1
        if self.since < self.interval:
            return None
        stalled = ~self.halved_at_check & (self.best_at_check >= best)
        halved = (self.rising <= self.rho * self.interval) | stalled
        self.halved_at_check, self.best_at_check = halved, best
        self.rising, self.since = torch.zeros_like(losses), 0
        self.interval = max(self.interval - self.shrink, self.smallest)
        return halved


def _loss_and_gradient(
    model: Model, loss: Loss, x: Tensor, y: Tensor, *, first: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-sample loss, whether the prediction is wrong, and the loss's gradient in x."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = model(x)
        if first:
            check_logits(logits, x, y)
        values = loss(logits, y)
        if not values.requires_grad:
            raise InputError("model: expected logits that depend on the input through differentiable operations")
        (gradient,) = torch.autograd.grad(values.sum(), x)
    return values.detach(), logits.detach().argmax(1) != y, gradient


def check_logits(logits: object, x: Tensor, y: Tensor) -> None:
    """Raise InputError unless ``logits`` is a finite ``(N, classes)`` tensor that covers the labels."""
    if not isinstance(logits, Tensor):
        raise InputError(f"model: expected a tensor of logits (N, classes); got {type(logits).__name__}")
    if logits.ndim != 2 or len(logits) != len(x):
        raise InputError(f"model: expected logits of shape ({len(x)}, classes); got {tuple(logits.shape)}")
    if not torch.isfinite(logits).all():
        bad = int((~torch.isfinite(logits).all(1)).sum())
        raise InputError(f"model: expected finite logits; got NaN or infinite ones for {bad} of {len(x)} samples")
    if len(y) and (int(y.min()) < 0 or int(y.max()) >= logits.shape[1]):
        found = f"{int(y.min())} to {int(y.max())}"
        raise InputError(f"y: expected labels from 0 to {logits.shape[1] - 1}, the model's classes; got {found}")


def _steepest(gradient: Tensor, p: float) -> Tensor:
    """Direction of steepest ascent per unit of the norm: the sign (inf) or the normalised gradient (2)."""
    return gradient / (per_sample(lp_norm(gradient, 2), gradient) + 1e-12) if p == 2 else gradient.sign()


def _start(ball: _Ball, seed: int, ids: Tensor | None) -> Tensor:
    """A random point a sample on the budget's sphere, drawn by a generator seeded with (seed, id)."""
    names: Sequence[int] = range(len(ball.x)) if ids is None else [int(i) for i in ids]
    if len(names) != len(ball.x):
        raise InputError(f"ids: expected {len(ball.x)} of them, one a sample; got {len(names)}")
    draw = torch.rand if ball.p != 2 else torch.randn
    noise = torch.empty(ball.x.shape, dtype=torch.float32)
    for row, name in zip(noise, names, strict=True):
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        row.copy_(draw(row.shape, generator=generator))
    noise = noise if ball.p == 2 else 2 * noise - 1
    noise = noise / (per_sample(lp_norm(noise, ball.p), noise) + 1e-12)
    return ball.x + ball.eps * noise.to(ball.x)


def _loss(loss: str | Loss) -> Loss:
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise InputError(f"loss: expected one of {', '.join(LOSSES)} or a function; got {loss!r}")
    return LOSSES[loss]


def _check_budget(eps: float, p: float) -> None:
    check_attack_norm(p)
    if not 0 <= eps < math.inf:
        raise InputError(f"eps: expected a finite number of at least 0; got {eps}")


def _check_length(step_size: float) -> float:
    if not 0 < step_size < math.inf:
        raise InputError(f"step_size: expected a finite number above 0; got {step_size}")
    return step_size


def _check_steps(steps: int, name: str = "steps") -> None:
    if steps < 1:
        raise InputError(f"{name}: expected at least 1; got {steps}")


ATTACKS: dict[str, Callable[..., Tensor]] = {"fgsm": fgsm, "pgd": pgd, "apgd": apgd}
