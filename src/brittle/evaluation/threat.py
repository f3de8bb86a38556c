"""What the attacker may do: the threat, the named batteries of attacks, and what attacks are called."""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import FunctionType

from torch import Tensor

from brittle.attacks import ATTACKS, apgd, apgd_smoothed, apgd_targeted, square
from brittle.errors import InputError
from brittle.linear.norms import check_attack_norm
from brittle.results import NotMeasured, Setting

Attack = Callable[..., Tensor]
"""``attack(model, x, y, *, eps, p, ...) -> x_adv``; options are bound with ``functools.partial``."""

PRESETS = {
    "fast": "APGD with cross-entropy, then with the DLR loss (100 steps each), then 8 steps along smoothed gradients; "
    "where these come closer, 100 of them with each loss",
    "standard": "AutoAttack's composition with APGD along smoothed gradients in place of FAB: APGD with cross-entropy "
    "(100 steps), APGD towards the 9 likeliest other classes (100 steps each), along smoothed gradients with both "
    "losses (100 steps each), Square (5,000 queries)",
    "thorough": "APGD with cross-entropy and with the DLR loss (300 steps each), APGD towards the 20 likeliest other "
    "classes (200 steps each), along smoothed gradients with both losses (300 steps each), Square (10,000 queries)",
}
"""What each preset runs, cheapest first."""
ALIASES = {"autoattack": "standard"}
"""Other names of presets: AutoAttack's runs FAB where ``standard`` runs APGD along smoothed gradients."""
QUERIES = {"fast": 1000, "standard": 5000, "thorough": 10000}
"""Queries of Square on a network without gradients, by preset."""
TRIAL = 12
"""Steps of a full attack for one of the trial that tells where plain gradients mislead: 8 of 100, rounded down."""


@dataclass(frozen=True)
class Threat:
    """What the attacker may do, and how it is searched for.

    Attributes:
        attacks: The name of a preset (``fast``, ``standard``, also called ``autoattack``, or ``thorough``), one attack,
            or several that run in this order on the samples that are still right.
        p: Norm of the budgets: 2 or inf.
        restarts: Runs of every attack; run r draws from seed ``seed + r``.
        bounds: Smallest and largest admissible input value.
        seed: Seed of every random choice.
        steps: Steps of each of a preset's gradient attacks; its own by default.
        further: Attacks for those samples alone on which the last of ``attacks``, a trial, came clearly closer than all
            before it (:data:`brittle.evaluation.worst_case.CLEARLY`). A preset brings its own.

    Raises:
        InputError: An attribute is out of range.
    """

    attacks: str | Attack | Sequence[Attack] = "fast"
    p: float = math.inf
    restarts: int = 1
    bounds: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    steps: int | None = None
    further: tuple[Attack, ...] = ()

    def __post_init__(self) -> None:
        """Check the attributes."""
        check_attack_norm(self.p)
        if isinstance(self.attacks, str):
            object.__setattr__(self, "attacks", ALIASES.get(self.attacks, self.attacks))
            if self.attacks not in PRESETS:
                raise InputError(f"attacks: expected one of {', '.join(PRESETS)}, or attacks; got {self.attacks!r}")
        elif self.steps is not None:
            raise InputError("steps: expected None beside attacks, whose steps are options of their own; got a number")
        else:
            several = isinstance(self.attacks, Sequence)
            attacks = tuple(self.attacks) if several else (self.attacks,)  # type: ignore[arg-type]
            if not attacks or not all(callable(attack) for attack in attacks):
                raise InputError(f"attacks: expected an attack or a sequence of attacks; got {self.attacks!r}")
            object.__setattr__(self, "attacks", attacks)
        if self.restarts < 1:
            raise InputError(f"restarts: expected at least 1; got {self.restarts}")

    @property
    def battery(self) -> tuple[Attack, ...]:
        """The attacks one by one; only of a threat that names no preset any more (:func:`for_classes`)."""
        assert isinstance(self.attacks, tuple)
        return self.attacks

    def instead(self, attacks: Sequence[Attack]) -> Threat:
        """The same attacker with these attacks alone, run once."""
        return replace(self, attacks=tuple(attacks), steps=None, restarts=1, further=())

    @property
    def names(self) -> list[str]:
        """What the attacks are called: those of the battery, then the further ones."""
        return [attack_name(attack) for attack in (*self.battery, *self.further)]


def for_classes(threat: Threat, classes: int) -> tuple[Threat, tuple[NotMeasured, ...]]:
    """The threat with its preset's attacks one by one, and those that the number of classes leaves out.

    Args:
        threat: Returned as it is when it names no preset.
        classes: Classes of the network.
    """
    if not isinstance(threat.attacks, str):
        return threat, ()
    attacks, left_out = preset(threat.attacks, classes, threat.steps)
    further = further_attacks(threat.attacks, classes, threat.steps)
    missing = tuple(NotMeasured(name, why) for name, why in left_out)
    return replace(threat, attacks=attacks, steps=None, further=further), missing


def without_gradients(threat: Threat, named: str, twin: bool) -> tuple[Threat, tuple[NotMeasured, ...]]:
    """The attacks of a preset on a network that has no gradients, and what cannot be measured.

    Args:
        threat: The preset's attacks one by one.
        named: The preset's name.
        twin: Whether there is a copy in real numbers to search on; every example is judged by the network itself.
    """
    battery = threat.battery[:-1] if threat.further else threat.battery  # no trial: the copy's gradients are plain
    queries = tuple(attack for attack in battery if is_by_queries(attack))
    queries = queries or (partial(square, queries=QUERIES[named]),)
    if twin:
        on_copy = tuple(attack for attack in battery if not is_by_queries(attack))
        why = "the network has none: they were taken on a copy in real numbers, and its examples judged by the network"
        return replace(threat, attacks=on_copy + queries, further=()), (NotMeasured("gradients of the network", why),)
    why = "the network has no gradients, and no copy in real numbers could be made of it"
    left_out = [attack_name(attack) for attack in battery if not is_by_queries(attack)]
    return replace(threat, attacks=queries, further=()), tuple(NotMeasured(name, why) for name in left_out)


def preset(name: str, classes: int, steps: int | None = None) -> tuple[tuple[Attack, ...], tuple[tuple[str, str], ...]]:
    """The attacks of a preset that a network with that many classes admits.

    Args:
        name: ``fast``, ``standard`` or ``thorough``; see :data:`PRESETS`.
        classes: Classes of the network.
        steps: Steps of every gradient attack, in place of the preset's own.

    Returns:
        The attacks in the order in which they run, and ``(attack, reason)`` for those left out: the DLR loss needs 3
        classes, its targeted form 4.

    Raises:
        InputError: There is no preset of that name.
    """
    if name not in PRESETS:
        raise InputError(f"attacks: expected one of {', '.join(PRESETS)}, or attacks; got {name!r}")
    full, aimed, targets, queries = (300, 200, 20, 10000) if name == "thorough" else (100, 100, 9, 5000)
    if steps is not None:
        full = aimed = steps
    # Attack, what it is called, and the classes that its loss needs at least; cheapest first.
    cross_entropy = (partial(apgd, loss="ce", steps=full), "APGD with cross-entropy", 1)
    dlr = (partial(apgd, loss="dlr", steps=full), "APGD with the DLR loss", 3)
    targeted = (partial(apgd_targeted, steps=aimed, targets=targets), "APGD with the targeted DLR loss", 4)
    trial = (partial(apgd_smoothed, steps=max(1, full // TRIAL)), "APGD along smoothed gradients", 1)
    smoothed = (partial(apgd_smoothed, loss="ce", steps=full), "APGD along smoothed gradients", 1)
    smoothed_dlr = (partial(apgd_smoothed, loss="dlr", steps=full), "APGD along smoothed gradients of DLR", 3)
    search = (partial(square, queries=queries), "Square", 1)
    rows = {
        "fast": (cross_entropy, dlr, trial),
        "standard": (cross_entropy, targeted, smoothed, smoothed_dlr, search),
        "thorough": (cross_entropy, dlr, targeted, smoothed, smoothed_dlr, search),
    }[name]
    reason = "needs at least {} classes; the model has {}"
    return (
        tuple(attack for attack, _, least in rows if classes >= least),
        tuple((what, reason.format(least, classes)) for _, what, least in rows if classes < least),
    )


def further_attacks(name: str, classes: int, steps: int | None = None) -> tuple[Attack, ...]:
    """The attacks with which a preset goes on where plain gradients mislead: ``fast`` alone has any.

    Args:
        name: As :func:`preset`.
        classes: Classes of the network; the DLR loss needs 3.
        steps: As :func:`preset`.
    """
    if name != "fast":
        return ()
    losses = ("ce", "dlr") if classes >= 3 else ("ce",)
    return tuple(partial(apgd_smoothed, loss=loss, steps=steps or 100) for loss in losses)


def passes_of(threat: Threat) -> float:
    """About how many passes with gradient a sample costs that withstands all attacks; a query counts a third."""
    total = 0.0
    for attack in threat.battery:
        options = {q.name: q.default for q in inspect.signature(attack).parameters.values()}
        queries, steps, targets = (options.get(name) for name in ("queries", "steps", "targets"))
        if isinstance(queries, int):
            total += queries / 3
        else:
            total += (steps if isinstance(steps, int) else 1) * (targets if isinstance(targets, int) else 1)
    return total * threat.restarts


def unbind(attack: Attack) -> Attack:
    """The function behind the options that ``functools.partial`` bound."""
    return unbind(attack.func) if isinstance(attack, functools.partial) else attack


def is_by_queries(attack: Attack) -> bool:
    """Whether an attack asks for nothing but logits."""
    return unbind(attack) is square


def is_ours(attack: Attack) -> bool:
    """Whether an attack is one of this package's."""
    return any(unbind(attack) is ours for ours in ATTACKS.values())


def bound_options(attack: Attack) -> set[str]:
    """Names of the options that the caller bound with ``functools.partial``."""
    return set(attack.keywords) if isinstance(attack, functools.partial) else set()


def attack_name(attack: Attack) -> str:
    """``apgd``, or ``apgd(loss='dlr', steps=50)`` for an attack with bound options."""
    if isinstance(attack, functools.partial):
        shown = {name: f"{len(value)} inputs" if isinstance(value, Tensor) else repr(value)
                 for name, value in attack.keywords.items()}  # fmt: skip
        options = ", ".join(f"{name}={value}" for name, value in shown.items())
        return f"{attack_name(attack.func)}({options})"
    return getattr(attack, "__name__", type(attack).__name__)


def attack_settings(attack: Attack) -> Setting:
    """The options that an attack runs with and the caller did not set, as one line."""
    parameters = inspect.signature(attack).parameters.values()
    passed = {"eps", "p", "bounds", "seed", "ids", "batch_size", "progress", *bound_options(attack)}
    simple = [q for q in parameters if q.default is not q.empty and q.name not in passed]
    return ", ".join(f"{q.name}={getattr(q.default, '__name__', q.default)!r}" for q in simple)


def identity(attack: Attack) -> str:
    """A text that differs between attacks that may give different results.

    Raises:
        InputError: The attack is none of this package's and no plain function, or has options that are no plain
            values: then nothing tells it from others.
    """
    if isinstance(attack, functools.partial):
        options = [*enumerate(attack.args), *attack.keywords.items()]
        if not all(isinstance(value, bool | int | float | str | None) for _, value in options):
            raise InputError(f"resume: expected options that are plain values; got {attack_name(attack)}")
        return f"{identity(attack.func)} {options!r}"
    if any(attack is ours for ours in ATTACKS.values()):
        return f"{attack_name(attack)} {attack_settings(attack)}"
    if not isinstance(attack, FunctionType) or attack.__closure__ or attack.__name__ == "<lambda>":
        raise InputError(f"resume: expected attacks that can be told apart by name; got {attack_name(attack)}")
    code = hashlib.sha256(attack.__code__.co_code + repr(attack.__code__.co_consts).encode()).hexdigest()
    return f"{attack.__module__}.{attack.__qualname__} {attack.__defaults__} {attack.__kwdefaults__} {code}"
