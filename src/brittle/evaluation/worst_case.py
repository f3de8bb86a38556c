"""The worst case over attacks and restarts: run them, check every budget and verdict again, keep the worst.

Nothing that an attack claims is believed: what it returns is tested against the budget, the bounds and the model
once more, and only that counts.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from brittle.attacks.losses import margins
from brittle.attacks.region import check_budget
from brittle.data.checks import check_batch
from brittle.errors import InputError
from brittle.evaluation.execution import Execution
from brittle.evaluation.threat import Attack, Threat, bound_options, for_classes, is_by_queries, is_ours
from brittle.linear.norms import distances
from brittle.models.borrow import Model, frozen
from brittle.models.forward import Counted, in_parts, logits_of
from brittle.models.network import Network, borrowed
from brittle.progress import rising
from brittle.results.wording import norm_name

CLEARLY = 1.05
"""A trial came clearly closer where it lowered the margin by more than this times what the attacks before it did. On
networks that are not hardened 0 to 4 % of the survivors are such, on those hardened against l_inf up to all."""


@dataclass(frozen=True)
class WorstCase:
    """Samples under the worst of several attacks and restarts.

    Attributes:
        x: The inputs ``(N, ...)``, clipped to the bounds.
        x_adv: For every sample the accepted example of smallest margin; the input itself if none was accepted.
        y: Labels ``(N,)``.
        ids: Integers ``(N,)`` that name the samples, on the CPU.
        clean_logits: ``(N, classes)`` at the inputs.
        adversarial_logits: ``(N, classes)`` at ``x_adv``.
        attack: Which attack broke the sample, ``(N,)``, as ``Threat.names`` counts them; -1 for none.
        restart: In which restart, ``(N,)``; -1 for none.
        proven: Samples that were not attacked because a certificate covers the budget, ``(N,)``.
        misled: Samples that were attacked further ``(N,)``: a trial, or queries, came clearly closer than gradients.
        rejected: Examples that were outside the budget, the bounds or the finite numbers.
        forwards: Samples put through the network without gradient.
        backwards: Samples put through the network with a gradient.
    """

    x: Tensor
    x_adv: Tensor
    y: Tensor
    ids: Tensor
    clean_logits: Tensor
    adversarial_logits: Tensor
    attack: Tensor
    restart: Tensor
    proven: Tensor
    misled: Tensor
    rejected: int
    forwards: int = 0
    backwards: int = 0

    @staticmethod
    def joined(parts: Sequence[WorstCase]) -> WorstCase:
        """Several batches as one; a single one is returned as it is."""
        if len(parts) == 1:  # the usual case, and examples may take hundreds of megabytes
            return parts[0]
        counts = ("rejected", "forwards", "backwards")
        names = [f.name for f in dataclasses.fields(WorstCase) if f.name not in counts]
        joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return replace(parts[0], **joined, **{name: sum(getattr(part, name) for part in parts) for name in counts})

    def between(self, start: int, stop: int) -> WorstCase:
        """The samples number ``start`` to ``stop - 1``; what they cost is not known, and counts as nothing."""
        tensors: dict[str, Any] = {name: t[start:stop] for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **tensors, rejected=0, forwards=0, backwards=0)

    def to(self, device: torch.device | str) -> WorstCase:
        """The same with all tensors on that device."""
        tensors: dict[str, Any] = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **(tensors | {"ids": self.ids}))

    @property
    def clean_correct(self) -> Tensor:
        """``(N,)``: right without attack."""
        return correct(self.clean_logits, self.y)

    @property
    def robust_correct(self) -> Tensor:
        """``(N,)``: right without attack and under every attack."""
        return self.clean_correct & correct(self.adversarial_logits, self.y)


def worst_case(
    model: Model | Network,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    eps: float | Tensor,
    *,
    ids: Tensor | int = 0,
    proven: Tensor | None = None,
    execution: Execution = Execution(),
) -> WorstCase:
    """Attack samples and keep, for every one, the worst accepted example.

    This package's attacks search on the network's fast copy; every example is judged by the network itself, and a
    sample that only the copy took for broken is attacked again on the network. Other attacks get the network itself,
    and so do attacks by queries on a network without gradients.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``, left bit-equal; or one that is ready.
        x: Inputs ``(N, ...)`` within the threat's bounds.
        y: Labels ``(N,)``.
        threat: Attacks, norm, restarts, bounds and seed.
        eps: Budget, at least 0, in input units; one for all or one a sample ``(N,)``.
        ids: Integers ``(N,)`` that name the samples, or the first of consecutive ones.
        proven: Samples known to withstand everything within the budget ``(N,)``; not attacked.
        execution: Samples at once, and whom to tell how many verdicts stand (those half-way counted in part).

    Returns:
        The examples with all verdicts recomputed; tensors on the model's device.

    Raises:
        InputError: As :func:`brittle.evaluate`.
    """
    check_batch(x, y, bounds=threat.bounds)
    budgets = check_budget(eps, threat.p, len(x))
    with borrowed(model, x, threat.bounds) as network:
        ids = torch.arange(ids, ids + len(x)) if isinstance(ids, int) else ids
        state = _State.begin(network, x, y, ids, budgets, threat, execution)
        withstood = state.budgets == 0  # nothing to attack with
        withstood = withstood if proven is None else withstood | proven.to(network.device)
        battery, further = state.threat.battery, state.threat.further
        runs = list(itertools.product(range(threat.restarts), enumerate((*battery, *further))))
        tell, stage = rising(execution.progress), f"{norm_name(threat.p)} attack"
        for number, (restart, (index, attack)) in enumerate(runs):
            attacked = state.misled if index >= len(battery) else ~withstood
            pending = (state.standing() & attacked).nonzero()[:, 0]
            done = len(x) - len(pending) * (1 - number / len(runs))
            tell(stage, int(done), len(x))
            if len(pending) == 0:
                continue

            def advance(finished: int, done: float = done) -> None:
                tell(stage, int(done + finished / len(runs)), len(x))

            before = state.gain(pending)
            broken = state.attack_with(attack, restart, pending, advance)
            state.attack[broken], state.restart[broken] = index, restart
            if further and index == len(battery) - 1:
                state.misled[pending[state.gain(pending) > CLEARLY * before]] = True
        tell(stage, len(x), len(x))
        return state.outcome(withstood)


def go_on(
    model: Model | Network, worst: WorstCase, threat: Threat, eps: float, *, execution: Execution = Execution()
) -> WorstCase:
    """Run a threat's further attacks on all survivors that are not proven, and keep what is worse.

    Args:
        model: As :func:`worst_case`.
        worst: What the threat's other attacks have left.
        threat: Attacks one by one; at least one further one.
        eps: The budget.
        execution: Samples at once.

    Returns:
        The worst case of all attacks; these survivors count as ``misled``.
    """
    rows = (worst.robust_correct & ~worst.proven).nonzero()[:, 0]
    if len(rows) == 0:
        return worst
    x, y, ids = worst.x[rows], worst.y[rows], worst.ids[rows.cpu()]
    later = worst_case(model, x, y, threat.instead(threat.further), eps, ids=ids, execution=execution)
    names = ("x_adv", "adversarial_logits", "attack", "restart", "misled")
    merged: dict[str, Any] = {name: getattr(worst, name).clone() for name in names}
    closer = margins(later.adversarial_logits, y) < margins(worst.adversarial_logits[rows], y)
    closer |= ~later.robust_correct
    merged["misled"][rows] = True
    for name in names[:2]:
        merged[name][rows[closer]] = getattr(later, name)[closer]
    broken = rows[later.attack >= 0]
    merged["attack"][broken] = len(threat.battery) + later.attack[later.attack >= 0]
    merged["restart"][broken] = 0
    counts = {name: getattr(worst, name) + getattr(later, name) for name in ("rejected", "forwards", "backwards")}
    return replace(worst, **merged, **counts)


@dataclass
class _State:
    """The samples under attack, and the worst accepted examples so far.

    ``judge`` and ``searched`` count the passes of the network and of its fast copy.
    """

    network: Network
    judge: Counted
    searched: Counted
    x: Tensor
    y: Tensor
    ids: Tensor
    budgets: Tensor
    threat: Threat
    execution: Execution
    clean: Tensor
    x_adv: Tensor
    logits: Tensor
    attack: Tensor
    restart: Tensor
    attempted: Tensor
    misled: Tensor
    rejected: int = 0

    @staticmethod
    def begin(
        network: Network, x: Tensor, y: Tensor, ids: Tensor, budgets: Tensor, threat: Threat, execution: Execution
    ) -> _State:
        """Every sample as it is, judged without attack."""
        x, y = x.to(network.device).clamp(*threat.bounds), y.to(network.device).long()
        judge = Counted(network.model)
        clean = logits_of(judge, x, y, execution.batch_size)
        nobody = torch.full_like(y, -1)
        return _State(
            network=network,
            judge=judge,
            searched=Counted(network.fast),
            x=x,
            y=y,
            ids=ids,
            budgets=budgets.to(network.device),
            threat=for_classes(threat, clean.shape[1])[0],
            execution=execution,
            clean=clean,
            x_adv=x.clone(),
            logits=clean.clone(),
            attack=nobody,
            restart=nobody.clone(),
            attempted=torch.zeros_like(y, dtype=torch.bool),
            misled=torch.zeros_like(y, dtype=torch.bool),
        )

    def outcome(self, withstood: Tensor) -> WorstCase:
        """What the attacks have left; ``withstood`` are the samples that were not attacked."""
        return WorstCase(
            x=self.x,
            x_adv=self.x_adv,
            y=self.y,
            ids=self.ids,
            clean_logits=self.clean,
            adversarial_logits=self.logits,
            attack=self.attack,
            restart=self.restart,
            proven=withstood,
            misled=self.misled,
            rejected=self.rejected,
            forwards=self.judge.forwards + self.searched.forwards,
            backwards=self.judge.backwards + self.searched.backwards,
        )

    def standing(self) -> Tensor:
        """Samples ``(N,)`` that are right without attack and under every example so far."""
        return correct(self.clean, self.y) & correct(self.logits, self.y)

    def gain(self, rows: Tensor) -> Tensor:
        """By how much the attacks have lowered the margins of the samples ``rows``, ``(n,)``, at least 0."""
        y = self.y[rows]
        return (margins(self.clean[rows], y) - margins(self.logits[rows], y)).clamp_min(0)

    def attack_with(self, attack: Attack, restart: int, rows: Tensor, advance: Callable[[int], None]) -> Tensor:
        """Attack the samples ``rows``, keep the examples, and return the samples that broke."""
        ours, model = is_ours(attack), self.network.model
        # Attacks of others may look into a module; a plain callable is counted.
        target = self.searched if ours else model if isinstance(model, nn.Module) else self.judge
        if not self.network.gradients and is_by_queries(attack):  # they need no copy
            target = self.judge
        with frozen(model):  # an attack may leave the network in another mode
            candidate = self.examples(attack, target, restart, rows, advance)
        broken = self.keep(candidate, rows)
        if ours and self.network.gradients and self.searched.model is not model:
            doubtful = self.doubtful(candidate, rows)
            if len(doubtful):  # only the copy took them for broken: search on the network itself
                with frozen(model):
                    candidate = self.examples(attack, self.judge, restart, doubtful, lambda finished: None)
                broken = torch.cat([broken, self.keep(candidate, doubtful)])
        return broken

    def examples(
        self, attack: Attack, target: Model, restart: int, rows: Tensor, advance: Callable[[int], None]
    ) -> Tensor:
        """What the attack makes of the samples: all at once if it minds its batches itself, else in batches."""
        threat, batch_size = self.threat, self.execution.batch_size
        accepted = inspect.signature(attack).parameters.keys() - bound_options(attack)
        options: dict[str, Any] = {"bounds": threat.bounds, "seed": threat.seed + restart, "batch_size": batch_size}
        options["progress"] = lambda stage, done, total: advance(done)
        offered = {name: value for name, value in options.items() if name in accepted}
        parts: list[Tensor] = []
        for part in rows.split(len(rows) if "batch_size" in accepted else batch_size):
            x, y, budgets = self.x[part], self.y[part], self.budgets[part]
            eps = float(budgets[0]) if bool((budgets == budgets[0]).all()) else budgets
            named = {"ids": self.ids[part.cpu()]} if "ids" in accepted else {}
            candidate = attack(target, x, y, eps=eps, p=threat.p, **offered, **named)
            if not isinstance(candidate, Tensor) or candidate.shape != x.shape:
                came = tuple(candidate.shape) if isinstance(candidate, Tensor) else type(candidate).__name__
                raise InputError(f"attack: expected examples {tuple(x.shape)}; got {came}")
            parts.append(candidate.detach().to(x))
            advance(sum(map(len, parts)))
        return torch.cat(parts)

    def keep(self, candidate: Tensor, rows: Tensor) -> Tensor:
        """Keep the examples that hold the budget and lower the margin of the samples ``rows``; returns those broken."""
        accepted = admissible(candidate, self.x[rows], self.budgets[rows], self.threat.p, self.threat.bounds)
        self.rejected += int((~accepted).sum())
        rows, candidate = rows[accepted], candidate[accepted]
        if len(rows) == 0:
            return rows
        logits = unchecked_logits(self.judge, candidate, self.execution.batch_size)
        right = correct(logits, self.y[rows])
        smaller = margins(logits, self.y[rows]) < margins(self.logits[rows], self.y[rows])
        better = ~right | ~self.attempted[rows] | smaller
        self.x_adv[rows[better]], self.logits[rows[better]] = candidate[better], logits[better]
        self.attempted[rows] = True
        return rows[~right]

    def doubtful(self, candidate: Tensor, rows: Tensor) -> Tensor:
        """Samples that the network still judges right, though its fast copy does not."""
        standing = correct(self.logits[rows], self.y[rows]).nonzero()[:, 0]
        if len(standing) == 0:
            return rows[:0]
        logits = unchecked_logits(self.searched, candidate[standing], self.execution.batch_size)
        return rows[standing[~correct(logits, self.y[rows[standing]])]]


def unchecked_logits(model: Model, x: Tensor, batch_size: int) -> Tensor:
    """Logits that may be NaN or infinite: such an answer is not right."""
    with torch.no_grad():
        return in_parts(model, batch_size, x)


def admissible(x_adv: Tensor, x: Tensor, eps: float | Tensor, p: float, bounds: tuple[float, float]) -> Tensor:
    """``(N,)``: whether each example is finite, within the bounds and within the budget.

    The budget (one for all or one a sample) is met to one part in 10^6, plus the rounding of single precision at the
    bounds; norms are taken in float64.
    """
    slack = 2.0**-23 * max(abs(bounds[0]), abs(bounds[1])) if x_adv.dtype != torch.float64 else 0.0
    finite = torch.isfinite(x_adv).flatten(1).all(1)
    inside = ((x_adv >= bounds[0] - slack) & (x_adv <= bounds[1] + slack)).flatten(1).all(1)
    return finite & inside & (distances(x_adv, x, p) <= eps * (1 + 1e-6) + slack)


def correct(logits: Tensor, y: Tensor) -> Tensor:
    """``(N,)``: whether the prediction is the label; never where a logit is NaN or infinite."""
    return (logits.argmax(1) == y) & torch.isfinite(logits).all(1)
