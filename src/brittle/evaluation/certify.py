"""What is proven of samples: that no attack within a budget can succeed, and how far such proofs reach.

Proofs have two uses. In an evaluation they save attacks, so they are tried only as long as they cost less than they
save (:func:`prove_while_it_pays`). In an audit the radii that they reach are a result of their own, whatever the
attacks cost (:func:`measure_radii`). What certificates cost is estimated in passes of the network from the sizes of
its layers, never by the clock: results depend on no machine's speed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from brittle.attacks import fgsm
from brittle.attacks.losses import margins
from brittle.attacks.region import check_budget
from brittle.bounds.graph.rules import Conv, TransposedConv
from brittle.bounds.relaxation.bisection import proven_radii
from brittle.bounds.relaxation.certify import Relaxation, margin_bounds, read_relaxation
from brittle.bounds.relaxation.flattened import dense_chain
from brittle.bounds.relaxation.grouped import targets
from brittle.bounds.relaxation.margins import CROWN, USUAL, Effort
from brittle.bounds.relaxation.windows import entries_read, windows_to
from brittle.data.checks import check_batch
from brittle.errors import InputError
from brittle.evaluation.threat import Threat
from brittle.linear.norms import thin
from brittle.models.borrow import Model, device_of, frozen
from brittle.models.forward import logits_of
from brittle.models.network import Network
from brittle.models.trace import NoRule

RADII_EFFORTS = (CROWN, Effort(rounds=2, rows=128), USUAL)
"""How hard radii are searched for: the first effort that pays for ``ENOUGH_RADII``, or the last."""
CHEAP = Effort(rounds=0, rows=1)
"""Bounds that cost a few passes."""
BATCHED = Effort(rounds=1, rows=256, flattened=True)
"""Bounds of dense networks for one product of matrices a sample: nearly as many proofs as CROWN."""
MOST_LOST = 0.01
"""What trying certificates may cost in vain, as a share of the attack alone; for each of the efforts."""
MOST_PAID = 0.75
"""What one certificate may cost, as a share of what it saves: dearer ones save little even where nearly all succeed."""
FEWEST_TRIED = 4
"""Samples that are tried together at least; where fewer could be paid for, none is."""
PEEKED = 32
"""Samples on which one step of an attack tells how many may withstand it, and from which an audit learns what proofs
save, at most."""
MOST_GROUPS = 48
"""Groups of samples that share slopes, at most."""
ENTRY_WORK = 30
"""Multiplications that take about as long as what is done with one entry of a hidden result."""
BASE_ROWS = {False: 18, True: 40}
"""What clean values and intervals cost, without and with ranges from groups, in rows of CROWN: measured."""
ROW_COST, CONV_ROW_COST, FLATTENED_ROW_COST = 1.4, 6.0, 0.55
"""What a multiplication costs where entries are bounded again, in those of a pass: measured, dense, convolutions, and
dense by flat lines."""
PLACE_COST = 6.0
"""What it costs to cut out the windows of the entries at one place, in entries bounded again: measured."""
TRIALS_OF_A_RADIUS = 6.0
"""Certificates that the search of a radius costs (4 to 6 on dense networks, 3 to 10 on convolutional ones)."""
RADIUS_PRECISION = 0.1
"""Where a radius lies between two budgets, it is known to such a share; at the budgets of a curve it is exact."""
LEAST_WORK_FOR_RADII = 1.5e11
"""Multiplications for radii that few samples of a small network are allowed in any case: a few seconds."""
PASSES_SAVED = 200.0
"""Passes that a sample proven at the budget saves in any audit: those of the preset ``fast``."""
FEWEST_RADII = 4
"""Samples whose radii are searched for at least; where fewer could be paid for, none is."""
ENOUGH_RADII = 16
"""Radii of so many samples are worth more than sharper ones of fewer."""


def proven_robust(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    p: float = math.inf,
    bounds: tuple[float, float] = (0.0, 1.0),
    passes: float = math.inf,
) -> Tensor:
    """Which samples no perturbation within the budget can break (lower bound: others may be robust, too).

    By linear relaxation of the network around every sample (theory page, section "Relaxations"). Where ``passes``
    says what an attack would cost, certificates are tried as long as they save more than they cost.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``; left bit-equal.
        x: Inputs ``(N, ...)`` within ``bounds``.
        y: Labels ``(N,)``.
        eps: Budget, at least 0, in input units.
        p: Norm of the budget: 2 or inf.
        bounds: Smallest and largest admissible input value.
        passes: Passes of the network that a sample costs which withstands the attacks; inf: prove all that can be.

    Returns:
        ``(N,)``, on the model's device; all False where no sound rule covers the network.

    Raises:
        InputError: An argument is out of range.
    """
    check_budget(eps, p, 1)
    if not len(x):
        return torch.zeros(0, dtype=torch.bool, device=device_of(model))
    check_batch(x, y, bounds=bounds)
    threat = Threat(p=p, bounds=bounds)
    with frozen(model):
        (proofs,) = read_proofs(Network(model, model), x, y, [(threat, eps)], passes)
        x, y = x.to(device_of(model)).clamp(*bounds), y.to(device_of(model))
        if proofs.relaxation is None:
            return torch.zeros(len(x), dtype=torch.bool, device=x.device)
        if math.isinf(passes):
            return margin_bounds(proofs.relaxation, x, y, eps=eps, p=p, bounds=bounds, effort=CROWN) > 0
        return prove_while_it_pays(proofs, x, y, threat, eps, passes)[0]


@dataclass(frozen=True)
class Proofs:
    """A network read for the certificates of one threat and budget, once for all samples.

    Attributes:
        relaxation: The network's relaxation; None where none is tried.
        untried: Why none is.
        left: Share of a few samples that withstand one step of an attack: more cannot be proven.
        measured: Share of the samples whose radii are searched for.
        effort: How hard.
    """

    relaxation: Relaxation | None
    untried: str | None = None
    left: float = 1.0
    measured: float = 0.0
    effort: Effort = CROWN

    def chosen(self, first: int, count: int) -> Tensor:
        """Which of the samples numbered from ``first`` have their radii searched for ``(count,)``.

        They are spread evenly over any stretch of the data, however it is cut.
        """
        return _spread(count, first) < self.measured


def _spread(count: int, first: int = 0) -> Tensor:
    """Multiples of the golden section, modulo 1: any stretch of them lies evenly between 0 and 1."""
    return torch.arange(first, first + count, dtype=torch.float64) * ((math.sqrt(5) - 1) / 2) % 1


def read_proofs(
    network: Network,
    x: Tensor,
    y: Tensor,
    cases: Sequence[tuple[Threat, float]],
    passes: float,
    radii_of: int | None = None,
    proof_passes: float = 0.0,
) -> tuple[Proofs, ...]:
    """Read a network for certificates, where these can be had and may pay.

    Args:
        network: The network, borrowed; its trace is read where it has one.
        x: Typical inputs ``(N, ...)``.
        y: Their labels ``(N,)``.
        cases: Threats (norm and bounds) and budgets.
        passes: As :func:`proven_robust`.
        radii_of: Number of all samples, where their radii are wanted for their own sake; None: they are not.
        proof_passes: Passes that radii may cost, for each of these samples.
    """
    model = network.model
    if not isinstance(model, nn.Module):
        return (Proofs(None, "the network is a plain function, whose layers cannot be read"),) * len(cases)
    x, y = x.to(network.device), y.to(network.device)

    @functools.cache
    def read(bounds: tuple[float, float], groups: int) -> Relaxation:
        examples = x.clamp(*bounds) if groups else None
        return read_relaxation(model, x.shape[1:], examples=examples, groups=max(groups, 1), traced=network.traced)

    def proofs_of(threat: Threat, eps: float) -> Proofs:
        """What can be proven at a budget, as far as it saves time or radii are wanted."""
        plain, inputs = read(threat.bounds, 0), x.clamp(*threat.bounds)
        peeked = PEEKED if math.isinf(passes) else int(min(PEEKED, MOST_LOST * passes * len(x) / 4))
        left = _left_by_one_step(model, thin(inputs, PEEKED)[:peeked], thin(y, PEEKED)[:peeked], threat, eps)
        paid = MOST_LOST * left * passes * len(x)
        if radii_of is None and paid < FEWEST_TRIED * price(plain, CHEAP):
            return Proofs(None, "they would not save time", left)
        # What radii are worth does not depend on the attacks: all report the same.
        paid = paid / 2 if radii_of is None else proof_passes / 5 * len(x)
        groups = _groups_for(plain, paid, len(x))
        relaxation = read(threat.bounds, groups)
        # Raises NoRule where an operation is not covered.
        margin_bounds(relaxation, inputs[:1], y[:1], eps=eps, p=threat.p, bounds=threat.bounds, effort=CHEAP)
        if radii_of is None:
            return Proofs(relaxation, None, left)
        return _choose_radii(Proofs(relaxation, None, left), inputs, y, threat, eps, radii_of, proof_passes)

    proofs: list[Proofs] = []
    for threat, eps in cases:
        try:
            proofs.append(proofs_of(threat, eps))
        except (NoRule, InputError) as reason:  # of an input that is unfit the evaluation itself will speak
            proofs.append(Proofs(None, str(reason)))
    return tuple(proofs)


def _groups_for(relaxation: Relaxation, passes: float, count: int) -> int:
    """Groups of ``count`` samples that may be composed for so many passes."""
    one = price_of_a_group(relaxation)
    return 0 if math.isinf(one) else int(min(MOST_GROUPS, max(4, count // 8), passes / one))


def _left_by_one_step(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, eps: float) -> float:
    """Share of the samples that withstand one step of an attack; 1 of none."""
    if not len(x):
        return 1.0
    logits_of(model, x, y)  # refuses what is no network for these samples
    stepped = fgsm(model, x, y, eps=eps, p=threat.p, bounds=threat.bounds)
    return float((margins(logits_of(model, stepped, y), y) > 0).double().mean())


def _choose_radii(
    proofs: Proofs, x: Tensor, y: Tensor, threat: Threat, eps: float, total: int, proof_passes: float
) -> Proofs:
    """The proofs with the share of the data whose radii are searched for, and how hard.

    All are where proofs save what they cost, else as many as is allowed. Both are counted against the same preset,
    whatever attacks are run: all report the same.
    """
    relaxation = proofs.relaxation
    assert relaxation is not None
    allowed = max(proof_passes * total, LEAST_WORK_FOR_RADII / (2 * sum(_work(relaxation))))
    enough = min(total, ENOUGH_RADII) * TRIALS_OF_A_RADIUS
    effort = next((e for e in RADII_EFFORTS if enough * price(relaxation, e) <= allowed), USUAL)
    one = price(relaxation, effort)
    few, proven = slice(int(min(PEEKED, allowed / (4 * one)))), 0.0
    if len(x[few]):
        held = margin_bounds(relaxation, x[few], y[few], eps=eps, p=threat.p, bounds=threat.bounds, effort=effort) > 0
        proven = float(held.double().mean())
    net = TRIALS_OF_A_RADIUS * one - proven * PASSES_SAVED
    share = 1.0 if net * total <= allowed else allowed / net / total
    if share * total < min(total, FEWEST_RADII):
        costs = f"one radius costs about {net:,.0f} passes of the network"
        reason = f"{costs}, and all together may cost {allowed:,.0f} (proof_passes)"
        return replace(proofs, relaxation=None, untried=reason)
    return replace(proofs, measured=share, effort=effort)


def price(relaxation: Relaxation, effort: Effort) -> float:
    """About how many passes with gradient one certificate costs, from the sizes of the layers."""
    work, network = _work(relaxation), relaxation.network
    rows = BASE_ROWS[relaxation.groups is not None] + (effort.rounds + 1) * (relaxation.classes - 1)
    convs = [isinstance(op.rule, Conv | TransposedConv) for op in network.ops]
    dear = [w * (CONV_ROW_COST if conv else ROW_COST) for w, conv in zip(work, convs, strict=True)]
    flat = [w * FLATTENED_ROW_COST for w in work]
    again = 0.0
    for target in targets(network):
        channels, *image = network.shape(target)
        windows = windows_to(network, network.ops[target].inputs[0])
        each = flat if effort.flattened and dense_chain(network, target) else dear
        one = sum(each[n] * entries / network.size(n) for n, entries in entries_read(network, windows).items())
        places = min(effort.rows, math.prod(image)) if any(windows.values()) else 0
        again += one * (min(effort.rows, channels * math.prod(image)) + PLACE_COST * places)
    return (rows * sum(work) + effort.rounds * again) / (2 * sum(work))


def price_of_a_group(relaxation: Relaxation) -> float:
    """The same for composing one group's matrices; inf where there is nothing to compose."""
    work, network = _work(relaxation), relaxation.network
    return 2.5 * sum(network.size(n) * sum(work[:n]) for n in targets(network)) / (2 * sum(work)) or math.inf


def _work(relaxation: Relaxation) -> list[float]:
    """Multiplications that one sample costs in every operation, forwards."""
    network = relaxation.network
    terms = [network.maps[n].terms if n in network.maps else 0 for n in range(len(network.ops))]
    return [float(network.size(n) * (ENTRY_WORK + count)) for n, count in enumerate(terms)]


def measure_radii(
    proofs: Proofs, x: Tensor, y: Tensor, threat: Threat, floor: Tensor, budgets: Sequence[float]
) -> Tensor:
    """Certified radii ``(N,)`` by relaxation, float64, at least ``floor`` (lower bounds of the true distances).

    Every budget of a curve below which a radius comes to lie closely is tried itself, so that curves count all that is
    proven at them.

    Args:
        proofs: With a relaxation.
        x: Inputs ``(N, ...)`` within the bounds, on the network's device.
        y: Labels ``(N,)``.
        threat: Norm and bounds.
        floor: Radii known otherwise ``(N,)``.
        budgets: Those of the curve.
    """
    assert proofs.relaxation is not None
    relaxation, p, bounds, effort = proofs.relaxation, threat.p, threat.bounds, proofs.effort
    radii = proven_radii(relaxation, x, y, p=p, bounds=bounds, floor=floor, precision=RADIUS_PRECISION, effort=effort)
    for eps in sorted(budgets):
        near = ((radii <= eps) & (radii > eps / (1 + 2 * RADIUS_PRECISION))).nonzero()[:, 0]
        if len(near):
            held = margin_bounds(relaxation, x[near], y[near], eps=eps, p=p, bounds=bounds, effort=effort) > 0
            radii[near[held]] = math.nextafter(eps, math.inf)
    return radii


def prove_while_it_pays(
    proofs: Proofs, x: Tensor, y: Tensor, threat: Threat, eps: float, passes: float
) -> tuple[Tensor, Tensor]:
    """Which samples are proven robust at the budget, and on which it was tried, both ``(N,)``; cheapest bounds first.

    Samples are tried in blocks, those likeliest to be proven first, and no more once a few blocks have cost more than
    they save. So little is lost where nothing can be proven (``MOST_LOST`` for each effort), by estimate. Efforts that
    cost nearly as much as they can save (``MOST_PAID``) are left out.

    Args:
        proofs: With a relaxation.
        x: Inputs ``(N, ...)`` within the bounds, on the network's device.
        y: Labels ``(N,)``.
        threat: Norm and bounds.
        eps: Budget.
        passes: Passes that a proof saves: those of a sample that withstands the attacks.
    """
    assert proofs.relaxation is not None
    promise = _spread(len(x)).to(x.device)
    proven, tried = torch.zeros(len(x), dtype=torch.bool, device=x.device), promise.new_zeros(len(x), dtype=torch.bool)
    allowed = MOST_LOST * proofs.left * passes * len(x)
    network = proofs.relaxation.network
    dense = all(dense_chain(network, target) for target in targets(network))
    for effort in (CHEAP, BATCHED, USUAL, CROWN) if dense else (CHEAP, USUAL, CROWN):
        one, credit = price(proofs.relaxation, effort), allowed
        if one > MOST_PAID * passes:
            continue
        waiting = promise.argsort(descending=True)
        waiting = waiting[~proven[waiting] & promise[waiting].isfinite()]
        while len(waiting) and (size := min(len(waiting), int(credit / one), 256)) >= min(len(waiting), FEWEST_TRIED):
            rows, waiting = waiting[:size], waiting[size:]
            bounds = margin_bounds(
                proofs.relaxation, x[rows], y[rows], eps=eps, p=threat.p, bounds=threat.bounds, effort=effort
            )
            proven[rows], tried[rows], promise[rows] = bounds > 0, True, bounds.double()
            credit = min(allowed, credit - one * size + passes * float((bounds > 0).sum()))
    return proven, tried
