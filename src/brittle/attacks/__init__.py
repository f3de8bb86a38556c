r"""Adversarial attacks as plain functions: ``attack(model, x, y, *, eps, p, ...) -> x_adv``.

Every attack keeps ``||x_adv - x||_p <= eps`` and the declared input bounds, freezes the parameters, leaves the model
bit-equal and draws from generators of its own: the random numbers of a sample depend on the seed and the sample's id,
never on the batch it happens to share. Inputs are in the units of ``bounds`` (normalisation belongs into the
model), outputs are logits.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from brittle.attacks.auto_pgd import apgd, apgd_targeted
from brittle.attacks.losses import LOSSES, Loss, cross_entropy, dlr, targeted_dlr
from brittle.attacks.smoothed import apgd_smoothed
from brittle.attacks.square_search import square
from brittle.attacks.steepest import fgsm, pgd
from brittle.attacks.universal import universal_perturbation

ATTACKS: dict[str, Callable[..., Tensor]] = {
    "fgsm": fgsm,
    "pgd": pgd,
    "apgd": apgd,
    "apgd_targeted": apgd_targeted,
    "apgd_smoothed": apgd_smoothed,
    "square": square,
}

__all__ = [
    "ATTACKS",
    "LOSSES",
    "Loss",
    "apgd",
    "apgd_smoothed",
    "apgd_targeted",
    "cross_entropy",
    "dlr",
    "fgsm",
    "pgd",
    "square",
    "targeted_dlr",
    "universal_perturbation",
]
