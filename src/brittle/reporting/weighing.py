"""Does compressibility explain why this network is fragile? Concentration, energy, growth and margin, weighed.

A concentrated layer enlarges some directions much. That makes a network fragile only if the attack goes there and
what tells the classes apart does not: robustness is margin over sensitivity, and both pass through the layer. Theory
page, section "Does compressibility explain it?".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from brittle.results import LayerResponse, LayerResult, NormResult
from brittle.results.wording import norm_name, number

CONCENTRATED = 1.5
"""How many times the norm of a random matrix of its shape and scale a layer's norm exceeds, from which on it counts as
concentrated. Random matrices fluctuate by a few hundredths, networks trained without structure reach 1.2."""
OFTENER = 1.5
"""How many times the energy of a random perturbation in some directions the attack's exceeds, beyond its 95 % interval,
from which on it is worth a word."""
GROWTH = 1.25
"""How many times more the attack grows than what tells the classes apart, from which on it is worth a word."""
FEWEST = 8
"""Fewest samples on which anything is said."""


@dataclass(frozen=True)
class Use:
    """What the attack makes of one layer's concentration.

    Attributes:
        layer: Qualified name.
        excess: Norm over that of a random matrix of the same shape and scale.
        k: Leading directions in which energies are counted, about a tenth of all.
        attack: Share of the attack's energy in them.
        random: Share of a random perturbation's energy in them.
        attack_step: Gain of the attack in the layer.
        class_step: Gain of what tells classes apart.
        growth: ``attack_step / class_step``; 1 where the layer enlarges both alike.
        error: Standard error of the logarithm of ``growth``.
        owed: How many times more the layer enlarges the attack than a random matrix of its shape and scale could at
            the most, and than what tells classes apart (the smaller of the two, at least 1): what the attack owes to
            the concentration. 1 where the layer is not concentrated or the growth lies within its 95 % interval of 1.
    """

    layer: str
    excess: float
    k: int
    attack: float
    random: float
    attack_step: float
    class_step: float
    growth: float
    error: float
    owed: float


def uses(norm: NormResult, layers: Sequence[LayerResult]) -> list[Use]:
    """What the attack in a norm makes of each layer's concentration, for the layers where all of it was measured."""
    of_random, of_class = ({r.layer: r for r in rs} for rs in (norm.random_responses, norm.class_responses))
    by_name = {layer.name: layer for layer in layers}
    found = []
    for attack in norm.responses:
        layer, random, way = by_name.get(attack.layer), of_random.get(attack.layer), of_class.get(attack.layer)
        if layer and random and way and attack.n >= FEWEST and way.n >= FEWEST:
            found += [use] if (use := _use(layer, attack, random, way)) else []
    return found


def _use(layer: LayerResult, attack: LayerResponse, random: LayerResponse, way: LayerResponse) -> Use | None:
    """What an attack owes to a layer's leading directions; None where that cannot be said."""
    excess = layer.excess(2)  # 0 where every weight is zero, or where scales leave the range of float64
    if not attack.step or not way.step or not random.energy or not excess:
        return None
    i, growth = _tenth(attack, layer), attack.step / way.step
    errors = [math.inf if r.step_error is None else r.step_error for r in (attack, way)]  # one sample has none
    error = math.hypot(*errors)
    unstructured = layer.filter_norm_2 / excess  # the norm of a random matrix of this shape and scale
    counts = excess >= CONCENTRATED and math.log(growth) > 1.96 * error
    owed = max(1.0, min(growth, attack.step / unstructured)) if counts else 1.0
    return Use(
        layer=layer.name,
        excess=excess,
        k=attack.k[i],
        attack=attack.energy[i],
        random=random.energy[min(i, len(random.energy) - 1)],
        attack_step=attack.step,
        class_step=way.step,
        growth=growth,
        error=error,
        owed=owed,
    )


def _tenth(response: LayerResponse, layer: LayerResult) -> int:
    """The place among a response's numbers of directions of the one nearest to a tenth of all."""
    return min(range(len(response.k)), key=lambda j: abs(response.k[j] - 0.1 * min(layer.shape)))


def exceeds_random(attack: LayerResponse, random: LayerResponse, place: int) -> bool:
    """Whether the attack has :data:`OFTENER` times the energy of a random perturbation in some leading directions,
    beyond the 95 % interval of the ratio.

    Args:
        attack: At a layer, with standard errors.
        random: At the same layer, with the same numbers of directions.
        place: Which of these.
    """
    shares = [response.energy[place] for response in (attack, random)]
    if min(shares) <= 0 or not attack.energy_error or not random.energy_error:
        return False
    errors = [response.energy_error[place] / response.energy[place] for response in (attack, random)]
    return math.log(shares[0] / shares[1]) - 1.96 * math.hypot(*errors) > math.log(OFTENER)


def total_owed(norm: NormResult, found: Sequence[Use]) -> float:
    """What the attack owes to concentration in all layers together: the product, and no more than it grows at all.

    The whole growth, from the input to the last layer that was followed, is the attack's gain over the gain of what
    tells classes apart; branches of a residual network add, so that the product alone would claim too much.
    """
    ends = [{r.layer: r.gain for r in rs if r.gain} for rs in (norm.responses, norm.class_responses)]
    shared = [name for name in ends[0] if name in ends[1]]
    whole = (ends[0][shared[-1]] or 1.0) / (ends[1][shared[-1]] or 1.0) if shared else math.inf
    return max(1.0, min(math.prod(use.owed for use in found), whole))


def explanation(norm: NormResult, layers: Sequence[LayerResult], *, fragile: bool) -> str | None:
    """Whether compressibility explains the network's fragility in a norm, in one sentence with its numbers.

    It does where the attack owes so much to concentrated layers that without it the median right answer, which is
    within the budget to first order, would not be; partly where it owes at least :data:`GROWTH` times its size; and
    not at all below.

    Args:
        norm: What was found in the norm that decided the verdict.
        layers: What was measured of each layer.
        fragile: Whether the attack broke enough to call the network anything but robust.

    Returns:
        None where too little was measured to say anything.
    """
    found, reach, eps = uses(norm, layers), norm.lipschitz.reach, norm.eps
    if not found or reach is None or not eps:
        return None
    budgets, owed, where = reach / eps, total_owed(norm, found), norm_name(norm.p)
    most = max(found, key=lambda use: (use.owed, use.excess))
    distance = f"to first order the median right answer lies {number(budgets)} budgets from a wrong one"
    start = f"Compressibility does not explain the fragility in {where}"
    random_matrix = "that of a random matrix of equal shape and scale"
    if most.excess < CONCENTRATED:
        start = start if fragile else f"Not fragile in {where}, and not compressible"
        flat = f"no layer is concentrated (the norm of “{most.layer}” is {most.excess:.1f} times {random_matrix})"
        return f"{start}: {flat}, and {distance}."
    concentrated = f"“{most.layer}” is concentrated (its norm is {most.excess:.1f} times {random_matrix})"
    if owed < GROWTH or not fragile:
        start, link = (start, "but") if fragile else (f"Compressible, but not fragile in {where}", "yet")
        much = f"{number(owed)} times as much as" if owed >= 1.005 else "no more than"
        return (
            f"{start}: {concentrated}, {link} beyond what random matrices do, such layers enlarge the attack {much}"
            f" what tells the classes apart; {distance}."
        )
    part = "" if budgets < 1 <= budgets * owed else " partly"
    return (
        f"Compressibility explains the fragility in {where}{part}: {concentrated}, takes up"
        f" {100 * most.attack:.0f} % of the attack's energy in its {most.k} leading directions"
        f" ({100 * most.random:.0f} % of a random perturbation's) and enlarges the attack {number(most.growth)} times"
        f" as much as what tells the classes apart; {distance}, and would lie {number(budgets * owed)} without what"
        " concentration adds."
    )
