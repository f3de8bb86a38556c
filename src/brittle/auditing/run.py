"""The main job: one call that says how compressible and how fragile a network is, and why."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from brittle.auditing.directions import layer_responses, leading_directions
from brittle.bounds.layer_table import input_sizes, measure_layer
from brittle.bounds.lipschitz.network import NetworkBound, network_bounds
from brittle.bounds.radius import certified_radii
from brittle.bounds.sensitivity import jacobian_norms, largest_ratio
from brittle.data.batches import DataLike, batches_of, budgets_by_norm
from brittle.data.checks import check_batch
from brittle.errors import InputError
from brittle.evaluation.certify import proven_robust
from brittle.evaluation.curves import security_curve
from brittle.evaluation.dataset import class_count, part_of, summarise
from brittle.evaluation.honesty import honesty_flags
from brittle.evaluation.presets import preset
from brittle.evaluation.signature import signature_of
from brittle.evaluation.universal_check import judge_universal
from brittle.evaluation.worst_case import Attack, Threat, WorstCase, passes_of, worst_case
from brittle.linear.norms import check_attack_norm
from brittle.models.borrow import device_of, frozen
from brittle.models.forward import logits_of
from brittle.models.layers import LayerView, read_layers
from brittle.models.quantised import count_parameters
from brittle.reporting.verdict import judge
from brittle.results import (
    DATA_FREE,
    Audit,
    CertifiedCurve,
    Evaluation,
    Flag,
    LayerResponse,
    LayerResult,
    LipschitzResult,
    NormResult,
    NotMeasured,
    Rate,
    SecurityCurve,
    Setting,
    UniversalResult,
)
from brittle.results.wording import norm_name

CURVE = (0.25, 0.5, 1.5, 2.0)
"""Multiples of the standard budget at which the security curve is measured besides the budget itself."""
RESPONSE_SAMPLES = 256
"""Most samples whose perturbations are followed through the layers, and at which Jacobians are taken."""
SEARCHED, SEARCH_STEPS = 16, 15
"""Most samples from which larger local norms are sought by ascent (fewer for large networks), and steps of each."""
CERTIFIED_POINTS = 64
"""Budgets of the certified curve at which certificates run out, at most."""
Stage = Callable[[str, int, int | None], None]
"""Progress: called with the name of the stage, the steps done and, where it is known, their total."""


def audit(
    model: nn.Module,
    data: DataLike | None = None,
    *,
    p: float | Sequence[float] = (math.inf, 2.0),
    eps: float | Mapping[float, float] | None = None,
    attacks: str | Sequence[Attack] | None = None,
    steps: int | None = None,
    restarts: int = 1,
    bounds: tuple[float, float] = (0.0, 1.0),
    input_shape: Sequence[int] | None = None,
    tighten: int = 0,
    honesty: bool = True,
    batch_size: int = 256,
    seed: int = 0,
    name: str | None = None,
    progress: Stage | None = None,
) -> Audit:
    """Measure how compressible and how fragile a trained network is, and why.

    Without data only the weights are read: the layer table (k-term errors, spread, ranks, operator norms and
    Theorem 3.1 with their sides) and the certified Lipschitz bounds. With data also clean and robust accuracy at
    the standard budgets and over a range of budgets, certified radii and the certified accuracy that they imply, the
    largest local gradient norms, the adversarial directions, the amplification layer by layer, and universal
    perturbations against random ones. Checks say whether the robust accuracies can be trusted (``flags``). What cannot
    be measured soundly is listed by name under ``not_measured``.

    Args:
        model: Any network from inputs ``(N, ...)`` to logits ``(N, classes)``; left bit-equal; judged in eval mode.
        data: A :class:`brittle.data.Data`, ``(inputs, labels)``, an iterable of batches, a Dataset, or None. All of it
            is held in memory and attacked; take a subset first if it is large.
        p: Norms of the budgets and bounds: inf, 2 or both.
        eps: Budget for every norm, in input units; by default the data set's own, else 8/255 (inf) and 0.5 (2).
        attacks: Attacks whose worst case counts, or the name of a preset (``fast``, ``standard``, ``thorough``); by
            default ``fast``: APGD with cross-entropy, then with the DLR loss (where there are at least 3 classes).
        steps: Steps of each of a preset's gradient attacks; its own by default.
        restarts: Runs of every attack.
        bounds: Smallest and largest admissible input value.
        input_shape: Shape of one input without the batch axis, for sharper bounds on convolutions without data.
        tighten: Steps of optimisation of the certified bounds; 0 for closed forms. Each takes about as long as the
            closed forms.
        honesty: Whether to check if the robust accuracies can be trusted (:func:`brittle.evaluation.honesty_flags`).
        batch_size: Samples at once.
        seed: Seed of every random choice.
        name: What to call the model; its class name by default.
        progress: Called as the audit goes on.

    Returns:
        Everything that was found, as one frozen dataclass.

    Raises:
        InputError: An argument, the model's weights or the data cannot be used; the message says what was expected.
    """
    started = time.perf_counter()
    norms = tuple(check_attack_norm(q) for q in (p if isinstance(p, Sequence) else (p,)))
    if not norms:
        raise InputError("p: expected at least one of inf and 2; got none")
    if tighten < 0:
        raise InputError(f"tighten: expected a number of steps of at least 0; got {tighten}")
    if batch_size < 1:
        raise InputError(f"batch_size: expected at least 1; got {batch_size}")
    budgets = budgets_by_norm(eps, norms, data)
    tell = progress or (lambda stage, done, total: None)
    samples = None if data is None else _gathered(data, bounds)
    shape = tuple(samples[0].shape[1:]) if samples else (None if input_shape is None else tuple(input_shape))
    layers, unread = read_layers(model)
    origin = "input_shape" if samples is None else "data"
    sizes = input_sizes(model, layers, shape, argument=origin) if shape else {}
    results = _measured(layers, sizes, norms, tell)
    missing = [*unread, *_unmeasured_norms(results, layers, norms)]
    tell("bounds", 0, 1)
    with frozen(model):
        certificates = network_bounds(model, norms, input_shape=shape, steps=tighten)
    lipschitz = [_lipschitz(model, certificates[q], samples, bounds, seed) for q in norms]
    missing += [NotMeasured(f"certified {norm_name(q.p)} bound", q.unavailable) for q in lipschitz if q.unavailable]
    tell("bounds", 1, 1)
    found = _Found()
    if samples is None:
        missing += [NotMeasured(what, "no data given") for what in _NEED_DATA]
    else:
        run = _Run(model, samples, layers, leading_directions(layers), batch_size, tell, honesty)
        chosen, left_out = _chosen_attacks(attacks, model, samples[0], samples[1], steps)
        missing += left_out
        for q in norms:
            run.at_budget(Threat(chosen, q, restarts, bounds, seed), budgets[q], certificates[q].margins, found)
            if certificates[q].margins is None:
                why = certificates[q].unavailable or "the output is no vector of logits"
                missing.append(NotMeasured(f"certified {norm_name(q)} accuracy", why))
        if not found.universal:
            missing.append(NotMeasured("universal perturbations", "needs two samples: one to fit on, one to judge by"))
        elif all(result.kind != DATA_FREE for result in found.universal):
            why = "the first layer is no affine function of the input, or a constant"
            missing.append(NotMeasured("data-free universal perturbations", why))
        missing += [NotMeasured(f"directions at {layer}", "the layer never ran as a module") for layer in found.silent]
        missing += found.unchecked if honesty else [NotMeasured("honesty flags", "switched off")]
    norm_results = tuple(found.of_norm(result) for result in lipschitz)
    settings = _settings(budgets, found, restarts, bounds, shape, tighten, honesty)
    result = Audit(
        model=name or type(model).__name__,
        verdict=judge(norm_results, results, flags := tuple(flag for flag in found.flags if flag.p is None)),
        norms=norm_results,
        layers=tuple(results),
        not_measured=tuple(missing),
        signature=signature_of(model, samples, seed, settings),
        parameters=count_parameters(model),
        flags=flags,
    )
    return replace(result, seconds=time.perf_counter() - started)


def _settings(
    budgets: Mapping[float, float],
    found: _Found,
    restarts: int,
    bounds: tuple[float, float],
    shape: tuple[int, ...] | None,
    tighten: int,
    honesty: bool,
) -> dict[str, Setting]:
    return {
        "p": tuple(f"{q:g}" for q in budgets),
        "eps": tuple(budgets.values()),
        "attacks": found.evaluations[0].attacks if found.evaluations else (),
        "restarts": restarts,
        "bounds": tuple(float(b) for b in bounds),
        "input_shape": shape,
        "tighten": tighten,
        "honesty": honesty,
    }


_NEED_DATA = (
    "clean and robust accuracy",
    "security curve",
    "honesty flags",
    "certified radii and accuracy",
    "local gradient norms",
    "adversarial directions and amplification",
    "universal perturbations",
)


class _Found:
    """What the data-bound parts have found so far."""

    def __init__(self) -> None:
        self.evaluations: list[Evaluation] = []
        self.curves: list[SecurityCurve] = []
        self.certified: list[CertifiedCurve] = []
        self.responses: list[LayerResponse] = []
        self.universal: list[UniversalResult] = []
        self.silent: list[str] = []
        self.flags: list[Flag] = []
        self.unchecked: list[NotMeasured] = []

    def of_norm(self, lipschitz: LipschitzResult) -> NormResult:
        """What belongs to the norm of a Lipschitz result."""
        p = lipschitz.p
        evaluation = next((entry for entry in self.evaluations if entry.p == p), None)
        return NormResult(
            p=p,
            eps=evaluation.eps if evaluation else None,
            lipschitz=lipschitz,
            evaluation=evaluation,
            curve=next((entry for entry in self.curves if entry.p == p), None),
            certified=next((entry for entry in self.certified if entry.p == p), None),
            responses=tuple(entry for entry in self.responses if entry.p == p),
            universal=tuple(entry for entry in self.universal if entry.p == p),
            flags=tuple(entry for entry in self.flags if entry.p == p),
        )


@dataclass(frozen=True)
class _Run:
    """The data-bound parts at one budget after the other."""

    model: nn.Module
    samples: tuple[Tensor, Tensor]
    layers: Sequence[LayerView]
    directions: Mapping[str, Tensor]
    batch_size: int
    tell: Stage
    honesty: bool

    def at_budget(self, threat: Threat, eps: float, lipschitz: Tensor | None, found: _Found) -> None:
        """Attack within one budget, then the curves around it, the directions and the universal perturbation."""
        label = norm_name(threat.p)
        worst, radii = self._attacked(threat, eps, lipschitz)
        part = part_of(worst, threat)
        if radii is not None:
            pairs = zip(part.samples, radii.tolist(), strict=True)
            part = replace(part, samples=tuple(replace(sample, certified_radius=radius) for sample, radius in pairs))
            budgets = [share * eps for share in (*CURVE, 1.0)]
            found.certified.append(certified_curve(radii, worst.clean_correct, threat.p, budgets))
        found.evaluations.append(summarise([part], threat, eps))
        found.curves.append(
            security_curve(
                self.model,
                worst,
                threat,
                at=eps,
                budgets=[share * eps for share in CURVE],
                radii=radii,
                batch_size=self.batch_size,
                progress=lambda done, total: self.tell(f"{label} curve", done, total),
            )
        )
        if self.honesty:
            flags, unchecked = honesty_flags(
                self.model,
                worst.x,
                worst.y,
                threat,
                eps,
                worst=worst,
                curve=found.curves[-1],
                of_model=len(found.curves) == 1,
                batch_size=self.batch_size,
            )
            found.flags += flags
            found.unchecked += unchecked
            self.tell(f"{label} honesty", 1, 1)
        rows = worst.clean_correct.nonzero()[:RESPONSE_SAMPLES, 0]
        x, x_adv = worst.x[rows], self._perturbed(worst, rows, threat, eps)
        responses, silent = layer_responses(self.model, self.layers, x, x_adv, p=threat.p, directions=self.directions)
        found.responses += responses
        found.silent += [layer for layer in silent if layer not in found.silent]
        self.tell(f"{label} directions", 1, 1)
        found.universal += judge_universal(
            self.model, self.samples, p=threat.p, eps=eps, bounds=threat.bounds, seed=threat.seed
        )
        self.tell(f"{label} universal", 1, 1)

    def _attacked(self, threat: Threat, eps: float, lipschitz: Tensor | None) -> tuple[WorstCase, Tensor | None]:
        """The worst case over samples that no certificate covers, and the certified radii of all."""
        x, y, label = *self.samples, norm_name(threat.p)
        device = device_of(self.model)
        proven = proven_robust(self.model, x, y, eps=eps, p=threat.p, bounds=threat.bounds, passes=passes_of(threat))
        radii = None
        if lipschitz is not None:
            with frozen(self.model):
                logits = logits_of(self.model, x.to(device).clamp(*threat.bounds), y.to(device), self.batch_size)
            radii = certified_radii(logits, y.to(device), lipschitz)
            just_above = math.nextafter(eps, math.inf)
            radii = torch.where(proven.to(radii.device), radii.clamp_min(just_above), radii)
            proven = proven | (radii > eps).to(proven.device)
        worst = worst_case(
            self.model,
            x,
            y,
            threat,
            eps,
            batch_size=self.batch_size,
            proven=proven,
            tell=lambda done: self.tell(f"{label} attack", int(done), len(x)),
        )
        return worst, radii

    def _perturbed(self, worst: WorstCase, rows: Tensor, threat: Threat, eps: float) -> Tensor:
        """Examples for the samples ``rows``; those that were left out, being proven robust, are attacked now."""
        x_adv, left_out = worst.x_adv[rows], worst.proven[rows].nonzero()[:, 0]
        if len(left_out):
            samples, first = rows[left_out], replace(threat, attacks=threat.attacks[:1], restarts=1)
            attacked = worst_case(
                self.model,
                worst.x[samples],
                worst.y[samples],
                first,
                eps,
                ids=samples.cpu(),
                batch_size=self.batch_size,
            )
            x_adv[left_out] = attacked.x_adv
        return x_adv


def certified_curve(radii: Tensor, correct: Tensor, p: float, budgets: Sequence[float]) -> CertifiedCurve:
    """Count certificates over budgets: the given ones, and up to 64 at which certificates run out.

    Args:
        radii: Certified radii ``(N,)`` in input units.
        correct: Which samples are right without attack ``(N,)``.
        p: Norm of the radii.
        budgets: Budgets to count at in any case.
    """
    right = radii[correct.cpu()]
    ends = right[(right > 0) & right.isfinite()].sort().values
    if len(ends) > CERTIFIED_POINTS:
        ends = ends[torch.linspace(0, len(ends) - 1, CERTIFIED_POINTS).round().long()]
    points = sorted({0.0, *budgets, *ends.tolist()})
    rates = tuple(Rate(int((right > point).sum()), len(radii)) for point in points)
    median = float(right.median()) if len(right) else None
    return CertifiedCurve(float(p), tuple(points), rates, median)


def _gathered(data: DataLike, bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
    parts = [(x, y) for x, y, _ in batches_of(data, 1024)]
    if not parts:
        raise InputError("data: expected at least one sample; got none")
    x, y = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    check_batch(x, y, bounds=bounds)
    return x, y


def _chosen_attacks(
    attacks: str | Sequence[Attack] | None, model: nn.Module, x: Tensor, y: Tensor, steps: int | None
) -> tuple[tuple[Attack, ...], list[NotMeasured]]:
    if attacks is not None and not isinstance(attacks, str):
        if not attacks:
            raise InputError("attacks: expected at least one; got none")
        return tuple(attacks), []
    chosen, left_out = preset(attacks or "fast", class_count(model, x, y), steps)
    return chosen, [NotMeasured(name, reason) for name, reason in left_out]


def _measured(
    layers: Sequence[LayerView], sizes: Mapping[str, tuple[int, ...]], norms: Sequence[float], tell: Stage
) -> list[LayerResult]:
    results = []
    for view in layers:
        results.append(measure_layer(view, norms, sizes.get(view.name)))
        tell("layers", len(results), len(layers))
    return results


def _unmeasured_norms(
    results: Sequence[LayerResult], layers: Sequence[LayerView], norms: Sequence[float]
) -> list[NotMeasured]:
    missing = []
    for view, result in zip(layers, results, strict=True):
        if view.convolution and view.geometry is None:
            reason = f"{type(view.module).__name__} has a forward of its own that is not understood"
        else:
            reason = "padding that repeats pixels is bounded only for a known input size"
        absent = [q for q in norms if result.operator_norm(q) is None]
        missing += [NotMeasured(f"{norm_name(q)} operator norm of {view.name}", reason) for q in absent]
    return missing


def _lipschitz(
    model: nn.Module,
    bound: NetworkBound,
    samples: tuple[Tensor, Tensor] | None,
    bounds: tuple[float, float],
    seed: int,
) -> LipschitzResult:
    local, found = None, None
    if samples is not None:
        local = _local_norms(model, bound.p, samples[0], samples[1], bounds)
        found = _largest_found(model, bound.p, samples[0], local, bounds, seed)
    return LipschitzResult(
        p=bound.p,
        upper=bound.upper,
        method=bound.attained_by or "",
        unavailable=bound.unavailable,
        lower=found,
        median_lower=None if local is None else float(local.median()),
        n=0 if local is None else len(local),
        largest_on_data=None if local is None else float(local.max()),
        arguments=bound.arguments,
    )


def _largest_found(
    model: nn.Module, p: float, x: Tensor, local: Tensor, bounds: tuple[float, float], seed: int
) -> float:
    """The largest ratio found by ascent from the samples with the largest local norms; never below these."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    starts = min(len(local), max(2, min(SEARCHED, int(4e7 / max(1, weights)))))
    top = local.topk(min(starts, len(local))).indices
    start = x[: len(local)][top].to(device_of(model)).clamp(*bounds)
    reach = (bounds[1] - bounds[0]) * (0.25 if math.isinf(p) else 0.1 * math.sqrt(x[0].numel()))
    found = largest_ratio(model, start, p, eps=reach, steps=SEARCH_STEPS, seed=seed)
    return max(float(local.max()), float(found.max()))


def _local_norms(model: nn.Module, p: float, x: Tensor, y: Tensor, bounds: tuple[float, float]) -> Tensor:
    device = device_of(model)
    x, y = x[:RESPONSE_SAMPLES].to(device).clamp(*bounds), y[:RESPONSE_SAMPLES].to(device)
    with frozen(model):
        logits_of(model, x[:1], y[:1])
        return torch.cat([jacobian_norms(model, part, p).cpu() for part in x.split(32)])
