"""The worst case over attacks and restarts: run them, check every budget and verdict again, keep the worst.

Nothing that an attack claims is believed: what it returns is tested against the budget, the bounds and the model
once more, and only that counts.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from brittle.attacks import ATTACKS
from brittle.attacks.losses import margins
from brittle.attacks.region import check_budget
from brittle.data.checks import check_batch
from brittle.errors import InputError
from brittle.linear.norms import check_attack_norm, distances
from brittle.models.borrow import Model, device_of, frozen
from brittle.models.fast_copy import copy_for_attacks
from brittle.models.forward import Counted, in_parts, logits_of

Attack = Callable[..., Tensor]
"""``attack(model, x, y, *, eps, p, ...) -> x_adv``; options are bound with ``functools.partial``."""
Tell = Callable[[float], None]
"""Progress: called with the number of samples whose verdict stands, those half-way counted in part."""


@dataclass(frozen=True)
class Threat:
    """What the attacker may do, and how it is searched for.

    Attributes:
        attacks: Run in this order on the samples that are still right.
        p: Norm of the budgets: 2 or inf.
        restarts: Runs of every attack; run r draws from seed ``seed + r``.
        bounds: Smallest and largest admissible input value.
        seed: Seed of the random starts.

    Raises:
        InputError: An attribute is out of range.
    """

    attacks: tuple[Attack, ...]
    p: float = math.inf
    restarts: int = 1
    bounds: tuple[float, float] = (0.0, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        check_attack_norm(self.p)
        if callable(self.attacks):
            raise InputError(f"attacks: expected a sequence of attacks; got one, {self.attacks!r}: write (attack,)")
        if not self.attacks or not all(callable(attack) for attack in self.attacks):
            raise InputError(f"attack: expected an attack or a sequence of attacks; got {self.attacks!r}")
        if self.restarts < 1:
            raise InputError(f"restarts: expected at least 1; got {self.restarts}")


@dataclass(frozen=True)
class WorstCase:
    """Samples under the worst of several attacks and restarts.

    Attributes:
        x: The inputs ``(N, ...)``, clipped to the bounds.
        x_adv: For every sample the accepted example of smallest margin; the input itself if none was accepted.
        y: Labels ``(N,)``.
        clean_logits: ``(N, classes)`` at the inputs.
        adversarial_logits: ``(N, classes)`` at ``x_adv``.
        attack: Which attack broke the sample, ``(N,)``; -1 for none.
        restart: In which restart, ``(N,)``; -1 for none.
        proven: Samples that were not attacked because a certificate covers the budget, ``(N,)``.
        rejected: Examples that were outside the budget, the bounds or the finite numbers.
        forwards: Samples put through the network without gradient.
        backwards: Samples put through the network with a gradient.
    """

    x: Tensor
    x_adv: Tensor
    y: Tensor
    clean_logits: Tensor
    adversarial_logits: Tensor
    attack: Tensor
    restart: Tensor
    proven: Tensor
    rejected: int
    forwards: int = 0
    backwards: int = 0

    @staticmethod
    def joined(parts: Sequence[WorstCase]) -> WorstCase:
        """Several batches as one."""
        counts = ("rejected", "forwards", "backwards")
        names = [f.name for f in dataclasses.fields(WorstCase) if f.name not in counts]
        joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return replace(parts[0], **joined, **{name: sum(getattr(part, name) for part in parts) for name in counts})

    @property
    def clean_correct(self) -> Tensor:
        """``(N,)``: right without attack."""
        return correct(self.clean_logits, self.y)

    @property
    def robust_correct(self) -> Tensor:
        """``(N,)``: right without attack and under every attack."""
        return self.clean_correct & correct(self.adversarial_logits, self.y)


def worst_case(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    eps: float | Tensor,
    *,
    first: int = 0,
    ids: Tensor | None = None,
    batch_size: int = 256,
    proven: Tensor | None = None,
    quick: Model | None = None,
    tell: Tell | None = None,
) -> WorstCase:
    """Attack samples and keep, for every one, the worst accepted example.

    The attacks of :data:`brittle.attacks.ATTACKS` run on a private copy on which passes cost less; every example is
    judged by the network itself, and a sample that only the copy took for broken is attacked again on the network.
    Others get the network itself.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``; left bit-equal.
        x: Inputs ``(N, ...)`` within the threat's bounds.
        y: Labels ``(N,)``.
        threat: Attacks, norm, restarts, bounds and seed.
        eps: Budget, at least 0, in input units; one for all or one a sample ``(N,)``.
        first: Id of the first sample; the others follow.
        ids: Integers ``(N,)`` that name the samples, in place of ``first``.
        batch_size: Samples at once.
        proven: Samples known to withstand everything within the budget ``(N,)``; not attacked.
        quick: The private copy, where the caller has one already.
        tell: Called as samples are done.

    Returns:
        The examples with all verdicts recomputed; tensors on the model's device.

    Raises:
        InputError: As :func:`brittle.evaluate`.
    """
    check_batch(x, y, bounds=threat.bounds)
    device = device_of(model)
    budgets = check_budget(eps, threat.p, len(x)).to(device)
    x, y = x.to(device).clamp(*threat.bounds), y.to(device).long()
    ids = torch.arange(first, first + len(x)) if ids is None else ids
    tell = _rising(tell)
    with frozen(model):
        judge = Counted(model)
        clean = logits_of(judge, x, y, batch_size)
        searched = Counted(copy_for_attacks(model, x) if quick is None else quick)
        sure = budgets == 0  # nothing to attack with
        sure = sure if proven is None else sure | proven.to(device)
        state = _State.begin(model, x, y, clean, budgets, threat, batch_size)
        stages = list(itertools.product(range(threat.restarts), enumerate(threat.attacks)))
        for number, (restart, (index, attack)) in enumerate(stages):
            pending = (correct(clean, y) & correct(state.logits, y) & ~sure).nonzero()[:, 0]
            tell(_done(len(x), len(pending), number, len(stages), 0))
            if len(pending) == 0:
                break
            own = _is_own(attack)
            network = searched if own else judge if not isinstance(model, torch.nn.Module) else model
            within = functools.partial(_done, len(x), len(pending), number, len(stages))
            here = functools.partial(_tell_within, tell, within)
            with frozen(model):  # an attack may leave the network in another mode
                candidate = _attacked(attack, network, x, y, ids, pending, budgets, threat, restart, batch_size, here)
            broken = state.keep(judge, candidate, pending)
            if own and searched.model is not model:
                unsure = state.doubtful(searched, candidate, pending)
                if len(unsure):
                    candidate = _attacked(
                        attack, judge, x, y, ids, unsure, budgets, threat, restart, batch_size, lambda done: None
                    )
                    broken = torch.cat([broken, state.keep(judge, candidate, unsure)])
            state.attack[broken], state.restart[broken] = index, restart
        tell(len(x))
    forwards, backwards = judge.forwards + searched.forwards, judge.backwards + searched.backwards
    return WorstCase(
        x, state.x_adv, y, clean, state.logits, state.attack, state.restart, sure, state.rejected, forwards, backwards
    )


def _done(total: int, pending: int, stage: int, stages: int, finished: float) -> float:
    """Samples whose verdict stands, each pending one counted by the share of its stages that are over."""
    return total - pending + pending * stage / stages + finished / stages


def _rising(tell: Tell | None) -> Tell:
    """Progress that speaks only when another whole sample is done."""
    told = -1

    def heard(done: float) -> None:
        nonlocal told
        if tell is not None and int(done) > told:
            told = int(done)
            tell(done)

    return heard


def _tell_within(tell: Tell, within: Callable[[float], float], done: float) -> None:
    tell(within(done))


def _is_own(attack: Attack) -> bool:
    return any(unbind(attack) is own for own in ATTACKS.values())


def unbind(attack: Attack) -> Attack:
    """The function behind the options that ``functools.partial`` bound."""
    return unbind(attack.func) if isinstance(attack, functools.partial) else attack


def _attacked(
    attack: Attack,
    network: Model,
    x: Tensor,
    y: Tensor,
    ids: Tensor,
    rows: Tensor,
    budgets: Tensor,
    threat: Threat,
    restart: int,
    batch_size: int,
    tell: Tell,
) -> Tensor:
    """What the attack makes of the samples ``rows``: all at once if it minds its batches itself, else in batches."""
    names = inspect.signature(attack).parameters.keys() - bound_options(attack)
    options = {
        "bounds": threat.bounds,
        "seed": threat.seed + restart,
        "batch_size": batch_size,
        "progress": lambda stage, done, total: tell(done),
    }
    offered = {name: value for name, value in options.items() if name in names}
    width = len(rows) if "batch_size" in names else batch_size
    parts = []
    for part in rows.split(width):
        one = bool((budgets[part] == budgets[part][0]).all())
        eps = float(budgets[part][0]) if one else budgets[part]
        named = {"ids": ids[part.cpu()]} if "ids" in names else {}
        candidate = attack(network, x[part], y[part], eps=eps, p=threat.p, **offered, **named)
        if not isinstance(candidate, Tensor) or candidate.shape != x[part].shape:
            found = tuple(candidate.shape) if isinstance(candidate, Tensor) else type(candidate).__name__
            raise InputError(f"attack: expected examples {tuple(x[part].shape)}; got {found}")
        parts.append(candidate.detach().to(x))
        tell(sum(map(len, parts)))
    return torch.cat(parts)


@dataclass
class _State:
    """The worst accepted examples so far."""

    model: Model
    x: Tensor
    y: Tensor
    budgets: Tensor
    threat: Threat
    batch_size: int
    x_adv: Tensor
    logits: Tensor
    attack: Tensor
    restart: Tensor
    attempted: Tensor
    rejected: int = 0

    @staticmethod
    def begin(
        model: Model, x: Tensor, y: Tensor, clean: Tensor, budgets: Tensor, threat: Threat, batch_size: int
    ) -> _State:
        none, attempted = torch.full_like(y, -1), torch.zeros_like(y, dtype=torch.bool)
        return _State(model, x, y, budgets, threat, batch_size, x.clone(), clean.clone(), none, none.clone(), attempted)

    def keep(self, judge: Model, candidate: Tensor, rows: Tensor) -> Tensor:
        """Keep the examples that hold the budget and lower the margin of the samples ``rows``; returns those broken."""
        accepted = admissible(candidate, self.x[rows], self.budgets[rows], self.threat.p, self.threat.bounds)
        self.rejected += int((~accepted).sum())
        rows, candidate = rows[accepted], candidate[accepted]
        if len(rows) == 0:
            return rows
        with frozen(self.model):  # whatever mode the attack left it in
            logits = _unchecked_logits(judge, candidate, self.batch_size)
        right = correct(logits, self.y[rows])
        smaller = margins(logits, self.y[rows]) < margins(self.logits[rows], self.y[rows])
        better = ~right | ~self.attempted[rows] | smaller
        self.x_adv[rows[better]], self.logits[rows[better]] = candidate[better], logits[better]
        self.attempted[rows] = True
        return rows[~right]

    def doubtful(self, quick: Model, candidate: Tensor, rows: Tensor) -> Tensor:
        """Samples that the network still judges right, though the private copy does not."""
        standing = correct(self.logits[rows], self.y[rows]).nonzero()[:, 0]
        if len(standing) == 0:
            return rows[:0]
        logits = _unchecked_logits(quick, candidate[standing], self.batch_size)
        return rows[standing[~correct(logits, self.y[rows[standing]])]]


def _unchecked_logits(model: Model, x: Tensor, batch_size: int) -> Tensor:
    """Logits that may be NaN or infinite: such an answer is not right."""
    with torch.no_grad():
        return in_parts(model, batch_size, x)


def passes_of(threat: Threat) -> float:
    """About how many passes with gradient a sample costs that withstands all attacks; a query counts a third."""
    total = 0.0
    for attack in threat.attacks:
        options = {q.name: q.default for q in inspect.signature(attack).parameters.values()}
        queries, steps, targets = (options.get(name) for name in ("queries", "steps", "targets"))
        if isinstance(queries, int):
            total += queries / 3
        else:
            total += (steps if isinstance(steps, int) else 1) * (targets if isinstance(targets, int) else 1)
    return total * threat.restarts


def admissible(x_adv: Tensor, x: Tensor, eps: float | Tensor, p: float, bounds: tuple[float, float]) -> Tensor:
    """``(N,)``: whether each example is finite, within the bounds and within the budget.

    The budget (one for all or one a sample) is met to one part in 10^6, plus the rounding of single precision at the
    bounds; norms are taken in float64.
    """
    slack = 2.0**-23 * max(abs(bounds[0]), abs(bounds[1])) if x_adv.dtype != torch.float64 else 0.0
    finite = torch.isfinite(x_adv).flatten(1).all(1)
    inside = ((x_adv >= bounds[0] - slack) & (x_adv <= bounds[1] + slack)).flatten(1).all(1)
    return finite & inside & (distances(x_adv, x, p) <= eps * (1 + 1e-6) + slack)


def bound_options(attack: Attack) -> set[str]:
    """Names of the options that the caller bound with ``functools.partial``."""
    return set(attack.keywords) if isinstance(attack, functools.partial) else set()


def correct(logits: Tensor, y: Tensor) -> Tensor:
    """``(N,)``: whether the prediction is the label; never where a logit is NaN or infinite."""
    return (logits.argmax(1) == y) & torch.isfinite(logits).all(1)
