"""Clean and robust accuracy: run attacks, check every budget and verdict again, count.

Nothing that an attack claims is believed: what it returns is tested against the budget, the bounds and the model
once more, and only that counts.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from brittle.attacks import apgd
from brittle.attacks.losses import check_logits
from brittle.data import Data as Labelled
from brittle.errors import InputError
from brittle.frozen import Model, device_of, frozen
from brittle.inputs import check_batch
from brittle.norms import check_attack_norm, lp_norm
from brittle.results import Evaluation, Rate, SampleResult, SecurityCurve, Setting

Attack = Callable[..., Tensor]
"""``attack(model, x, y, *, eps, p, ...) -> x_adv``; options are bound with ``functools.partial``."""
Data = Labelled | tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]
"""A :class:`brittle.data.Data`, a pair of tensors, any iterable of batches ``(x, y)`` (a DataLoader), or a Dataset."""
Progress = Callable[[int, int | None], None]
"""Called with the samples done and, where it is known, their total."""


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
        rejected: Examples that were outside the budget, the bounds or the finite numbers.
    """

    x: Tensor
    x_adv: Tensor
    y: Tensor
    clean_logits: Tensor
    adversarial_logits: Tensor
    attack: Tensor
    restart: Tensor
    rejected: int

    @staticmethod
    def joined(parts: Sequence[WorstCase]) -> WorstCase:
        """Several batches as one."""
        names = [f.name for f in dataclasses.fields(WorstCase) if f.name != "rejected"]
        tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return WorstCase(**tensors, rejected=sum(part.rejected for part in parts))

    @property
    def clean_correct(self) -> Tensor:
        """``(N,)``: right without attack."""
        return _correct(self.clean_logits, self.y)

    @property
    def robust_correct(self) -> Tensor:
        """``(N,)``: right without attack and under every attack."""
        return self.clean_correct & _correct(self.adversarial_logits, self.y)


def evaluate(
    model: Model,
    data: Data,
    *,
    attack: Attack | Sequence[Attack] = apgd,
    eps: float,
    p: float = math.inf,
    restarts: int = 1,
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 256,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Clean and robust accuracy under the worst case over attacks and restarts.

    Samples that are wrong without attack are not attacked, samples that broke are not attacked again. Every example
    is re-checked: ``||x_adv - x||_p <= eps (1 + 1e-6)`` (and float rounding at the bounds), values within the
    bounds and finite, prediction recomputed; an example that fails is rejected and counted, never credited.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``; left bit-equal. Evaluated in eval mode.
        data: A :class:`brittle.data.Data`, ``(inputs, labels)`` tensors, an iterable of batches ``(x, y)``, or a
            Dataset; inputs within ``bounds``.
        attack: One attack or several; anything called ``(model, x, y, *, eps, p)``. ``bounds``, ``seed`` and ``ids``
            are passed to attacks that have them. Options are bound with ``functools.partial`` and recorded.
        eps: Budget, at least 0, in input units.
        p: Norm of the budget: 2 or inf.
        restarts: Runs of every attack, each with a new seed.
        bounds: Smallest and largest admissible input value.
        batch_size: Samples at once (tensors and Datasets; other iterables come in their own batches).
        seed: Seed of the random starts; the result does not depend on ``batch_size``, apart from rounding.
        progress: Called after each batch.

    Returns:
        Counts, what was run, and per-sample results. Robust accuracy is an upper estimate of the true one.

    Raises:
        InputError: An argument is out of range, the data hold NaN, values outside the bounds, or labels that the
            model does not have; the message names the argument, what was expected and what came.
    """
    threat = Threat((attack,) if callable(attack) else tuple(attack), float(p), restarts, bounds, seed)
    samples: list[SampleResult] = []
    rejected = 0
    with frozen(model):
        for x, y, total in batches_of(data, batch_size):
            worst = worst_case(model, x, y, threat, eps, first=len(samples))
            rejected += worst.rejected
            samples += sample_results(worst, threat, first=len(samples))
            if progress is not None:
                progress(len(samples), total)
    if not samples:
        raise InputError("data: expected at least one sample; got none")
    return summarise(samples, rejected, threat, eps)


def worst_case(
    model: Model, x: Tensor, y: Tensor, threat: Threat, eps: float, *, first: int = 0, ids: Tensor | None = None
) -> WorstCase:
    """Attack one batch and keep, for every sample, the worst accepted example.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``; left bit-equal.
        x: Inputs ``(N, ...)`` within the threat's bounds.
        y: Labels ``(N,)``.
        threat: Attacks, norm, restarts, bounds and seed.
        eps: Budget, at least 0, in input units.
        first: Id of the first sample; the others follow.
        ids: Integers ``(N,)`` that name the samples, in place of ``first``.

    Returns:
        The examples with all verdicts recomputed; tensors on the model's device.

    Raises:
        InputError: As :func:`evaluate`.
    """
    check_batch(x, y, bounds=threat.bounds)
    if not 0 <= eps < math.inf:
        raise InputError(f"eps: expected a finite number of at least 0; got {eps}")
    device = device_of(model)
    x, y = x.to(device).clamp(*threat.bounds), y.to(device).long()
    ids = torch.arange(first, first + len(x)) if ids is None else ids
    with frozen(model):
        clean = logits_of(model, x, y)
        none = torch.full_like(y, -1)
        state = _State(x.clone(), clean.clone(), none, none.clone(), none.bool() & False)
        for restart, (number, attack) in itertools.product(range(threat.restarts), enumerate(threat.attacks)):
            pending = (_correct(clean, y) & _correct(state.logits, y)).nonzero()[:, 0]
            if len(pending) == 0:
                break
            run = _call(attack, bounds=threat.bounds, seed=threat.seed + restart, ids=ids[pending.cpu()])
            candidate = run(model, x[pending], y[pending], eps=eps, p=threat.p)
            accepted = state.accepted(candidate, x, pending, eps, threat)
            broken = state.take(model, candidate[accepted], y, pending[accepted])
            state.attack[broken], state.restart[broken] = number, restart
    return WorstCase(x, state.x_adv, y, clean, state.logits, state.attack, state.restart, state.rejected)


@dataclass
class _State:
    """The worst accepted examples so far."""

    x_adv: Tensor
    logits: Tensor
    attack: Tensor
    restart: Tensor
    attempted: Tensor
    rejected: int = 0

    def accepted(self, candidate: Tensor, x: Tensor, pending: Tensor, eps: float, threat: Threat) -> Tensor:
        """Which of an attack's examples for the ``pending`` samples keep the budget; the others are counted."""
        if not isinstance(candidate, Tensor) or candidate.shape != x[pending].shape:
            found = tuple(candidate.shape) if isinstance(candidate, Tensor) else type(candidate).__name__
            raise InputError(f"attack: expected examples {tuple(x[pending].shape)}; got {found}")
        accepted = admissible(candidate, x[pending], eps, threat.p, threat.bounds)
        self.rejected += int((~accepted).sum())
        return accepted

    def take(self, model: Model, candidate: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """Keep the examples that lower the margin of the samples ``rows``; returns the samples they break."""
        if len(rows) == 0:
            return rows
        candidate = candidate.detach().to(self.x_adv)
        with frozen(model), torch.no_grad():  # whatever mode the attack left it in
            logits = model(candidate)
        right = _correct(logits, y[rows])
        untouched = ~self.attempted[rows]
        keep = ~right | untouched | (margins(logits, y[rows]) < margins(self.logits[rows], y[rows]))
        self.x_adv[rows[keep]], self.logits[rows[keep]] = candidate[keep], logits[keep]
        self.attempted[rows] = True
        return rows[~right]


def admissible(x_adv: Tensor, x: Tensor, eps: float, p: float, bounds: tuple[float, float]) -> Tensor:
    """``(N,)``: whether each example is finite, within the bounds and within the budget.

    The budget is met to one part in 10^6, plus the rounding of single precision at the bounds; distances are taken
    in float64.
    """
    slack = 2.0**-23 * max(abs(bounds[0]), abs(bounds[1])) if x_adv.dtype != torch.float64 else 0.0
    finite = torch.isfinite(x_adv).flatten(1).all(1)
    inside = ((x_adv >= bounds[0] - slack) & (x_adv <= bounds[1] + slack)).flatten(1).all(1)
    return finite & inside & (lp_norm(x_adv.double() - x.double(), p) <= eps * (1 + 1e-6) + slack)


def sample_results(worst: WorstCase, threat: Threat, *, first: int = 0) -> list[SampleResult]:
    """One :class:`~brittle.results.SampleResult` a sample, numbered from ``first``."""
    names = [attack_name(attack) for attack in threat.attacks]
    columns = {
        "label": worst.y,
        "clean_prediction": worst.clean_logits.argmax(1),
        "adversarial_prediction": worst.adversarial_logits.argmax(1),
        "clean_margin": margins(worst.clean_logits, worst.y),
        "adversarial_margin": margins(worst.adversarial_logits, worst.y),
        "distance": lp_norm(worst.x_adv.double() - worst.x.double(), threat.p),
        "attack": worst.attack,
        "restart": worst.restart,
    }
    results = []
    for index, values in enumerate(zip(*(column.tolist() for column in columns.values()), strict=True), first):
        row = dict(zip(columns, values, strict=True))
        row["attack"] = names[row["attack"]] if row["attack"] >= 0 else None
        row["restart"] = row["restart"] if row["restart"] >= 0 else None
        results.append(SampleResult(index, **row))
    return results


def summarise(samples: Sequence[SampleResult], rejected: int, threat: Threat, eps: float) -> Evaluation:
    """Count per-sample results into an :class:`~brittle.results.Evaluation`."""
    right = [s.clean_prediction == s.label for s in samples]
    return Evaluation(
        attacks=tuple(attack_name(attack) for attack in threat.attacks),
        p=float(threat.p),
        eps=float(eps),
        bounds=(float(threat.bounds[0]), float(threat.bounds[1])),
        restarts=threat.restarts,
        seed=threat.seed,
        settings={attack_name(attack): _defaults(attack) for attack in threat.attacks},
        n=len(samples),
        clean_correct=sum(right),
        robust_correct=sum(ok and s.attack is None for ok, s in zip(right, samples, strict=True)),
        rejected=rejected,
        largest_perturbation=max(s.distance for s in samples),
        samples=tuple(samples),
    )


def security_curve(
    model: Model,
    worst: WorstCase,
    threat: Threat,
    *,
    at: float,
    budgets: Sequence[float],
    batch_size: int = 256,
    progress: Progress | None = None,
) -> SecurityCurve:
    """Robust accuracy over several budgets, from one evaluation and a few attacks more.

    What is known is used: a sample broken at one budget is broken at every larger one, one that survives counts as
    surviving every smaller one. So only the broken samples are attacked at smaller budgets and only the survivors
    at larger ones, and the curve cannot rise.

    Args:
        model: Network; left bit-equal.
        worst: The worst case at the budget ``at``.
        threat: The one it was found under.
        at: That budget.
        budgets: Further budgets; the curve holds them and ``at``.
        batch_size: Samples at once.
        progress: Called with the budgets done and their number.

    Returns:
        Budgets in rising order with the robust accuracy at each.
    """
    robust = {at: worst.robust_correct}
    smaller = sorted((eps for eps in set(budgets) if eps < at), reverse=True)
    larger = sorted(eps for eps in set(budgets) if eps > at)
    for chain, falling in ((smaller, True), (larger, False)):
        current = robust[at]
        for eps in chain:
            rows = (worst.clean_correct & ~current if falling else current).nonzero()[:, 0]
            current = current.clone()
            for part in rows.split(batch_size) if len(rows) else ():
                attacked = worst_case(model, worst.x[part], worst.y[part], threat, eps, ids=part.cpu())
                current[part] = attacked.robust_correct
            robust[eps] = current
            if progress is not None:
                progress(len(robust) - 1, len(smaller) + len(larger))
    points = sorted(robust)
    rates = tuple(Rate(int(robust[eps].sum()), len(worst.y)) for eps in points)
    return SecurityCurve(float(threat.p), tuple(float(eps) for eps in points), rates)


def logits_of(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """Logits ``(N, classes)`` without gradient, checked against the labels.

    Raises:
        InputError: The model fails on this input, or its output is not a finite tensor that covers the labels.
    """
    try:
        with torch.no_grad():
            logits = model(x)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"data: the model cannot run on inputs of shape {tuple(x.shape[1:])}: {reason}") from error
    check_logits(logits, x, y)
    assert isinstance(logits, Tensor)
    return logits.detach()


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """``s_y - max_{j != y} s_j`` of every sample, ``(N,)`` in logit units; with one class, ``s_y``."""
    own = logits.gather(1, y[:, None])[:, 0]
    if logits.shape[1] == 1:
        return own
    return own - logits.scatter(1, y[:, None], -math.inf).amax(1)


def batches_of(data: Data, batch_size: int) -> Iterator[tuple[Tensor, Tensor, int | None]]:
    """Batches ``(x, y, total)`` of whatever form the data come in; the total is None when it is unknown."""
    if batch_size < 1:
        raise InputError(f"batch_size: expected at least 1; got {batch_size}")
    if isinstance(data, Labelled):
        data = data.inputs, data.labels
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        x, y = data
        assert isinstance(x, Tensor)
        assert isinstance(y, Tensor)
        if len(x) != len(y):
            raise InputError(f"data: expected as many labels as inputs; got {len(x)} inputs and {len(y)} labels")
        for start in range(0, len(x), batch_size):
            yield x[start : start + batch_size], y[start : start + batch_size], len(x)
        return
    if isinstance(data, Dataset):
        data = DataLoader(data, batch_size=batch_size)
    size = getattr(getattr(data, "dataset", None), "__len__", None)
    for batch in data:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise InputError(f"data: expected batches (inputs, labels); got {type(batch).__name__}")
        yield batch[0], torch.as_tensor(batch[1]), size() if callable(size) else None


def attack_name(attack: Attack) -> str:
    """``apgd``, or ``apgd(loss='dlr', steps=50)`` for an attack with bound options."""
    if isinstance(attack, functools.partial):
        options = ", ".join(f"{name}={value!r}" for name, value in attack.keywords.items())
        return f"{attack_name(attack.func)}({options})"
    return getattr(attack, "__name__", type(attack).__name__)


def _defaults(attack: Attack) -> Setting:
    """The options that an attack runs with and the caller did not set, as one line."""
    parameters = inspect.signature(attack).parameters.values()
    passed = {"eps", "p", "bounds", "seed", "ids", *_bound(attack)}
    simple = [q for q in parameters if q.default is not q.empty and q.name not in passed]
    return ", ".join(f"{q.name}={getattr(q.default, '__name__', q.default)!r}" for q in simple)


def _call(attack: Attack, **offered: object) -> Attack:
    """The attack with those of the offered arguments bound that it has and that the caller did not bind."""
    names = inspect.signature(attack).parameters.keys() - _bound(attack)
    return functools.partial(attack, **{name: value for name, value in offered.items() if name in names})


def _bound(attack: Attack) -> set[str]:
    """Names of the options that the caller bound."""
    return set(attack.keywords) if isinstance(attack, functools.partial) else set()


def _correct(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.argmax(1) == y) & torch.isfinite(logits).all(1)
