"""Named batteries of attacks, whose worst case counts."""

from __future__ import annotations

from functools import partial

from brittle.attacks import apgd, apgd_targeted, square
from brittle.errors import InputError
from brittle.evaluation.worst_case import Attack

PRESETS = {
    "fast": "APGD with cross-entropy, then with the DLR loss; 100 steps each",
    "standard": "AutoAttack's composition without FAB: APGD with cross-entropy (100 steps), APGD towards the 9 "
    "likeliest other classes (100 steps each), Square (5,000 queries)",
    "thorough": "APGD with cross-entropy and with the DLR loss (300 steps each), APGD towards the 20 likeliest other "
    "classes (200 steps each), Square (10,000 queries)",
}
"""What each preset runs, cheapest first."""


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
        raise InputError(f"attack: expected one of {', '.join(PRESETS)}, or an attack; got {name!r}")
    full = {"fast": 100, "standard": 100, "thorough": 300}[name] if steps is None else steps
    aimed = {"fast": 100, "standard": 100, "thorough": 200}[name] if steps is None else steps
    chosen: list[Attack] = [partial(apgd, loss="ce", steps=full)]
    left_out: list[tuple[str, str]] = []
    if name != "standard":
        _add(chosen, left_out, partial(apgd, loss="dlr", steps=full), "APGD with the DLR loss", 3, classes)
    if name != "fast":
        targets = 9 if name == "standard" else 20
        aimed_at = partial(apgd_targeted, steps=aimed, targets=targets)
        _add(chosen, left_out, aimed_at, "APGD with the targeted DLR loss", 4, classes)
        chosen.append(partial(square, queries=5000 if name == "standard" else 10000))
    return tuple(chosen), tuple(left_out)


def _add(
    chosen: list[Attack], left_out: list[tuple[str, str]], attack: Attack, name: str, needed: int, classes: int
) -> None:
    if classes >= needed:
        chosen.append(attack)
    else:
        left_out.append((name, f"needs at least {needed} classes; the model has {classes}"))
