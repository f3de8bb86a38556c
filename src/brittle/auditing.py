"""The main job: one call that says how compressible and how fragile a network is, and why."""

from __future__ import annotations

import functools
import hashlib
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version

import torch
from torch import Tensor, nn

from brittle import __version__
from brittle.attacks import apgd, universal_perturbation
from brittle.bounds.network import NetworkBound, network_bounds
from brittle.bounds.radius import certified_radii
from brittle.data import OTHER_BUDGETS, Data
from brittle.directions import layer_responses, leading_directions
from brittle.errors import InputError
from brittle.evaluation import (
    Attack,
    Threat,
    WorstCase,
    batches_of,
    logits_of,
    margins,
    sample_results,
    security_curve,
    summarise,
    worst_case,
)
from brittle.evaluation import Data as Samples
from brittle.frozen import device_of, frozen
from brittle.inputs import check_batch
from brittle.layers import LayerView, read_layers
from brittle.measure import input_sizes, measure_layer
from brittle.norms import check_attack_norm, lp_norm
from brittle.results import (
    Audit,
    CertifiedCurve,
    Evaluation,
    LayerResponse,
    LayerResult,
    LipschitzResult,
    NotMeasured,
    Rate,
    SecurityCurve,
    Setting,
    Signature,
    UniversalResult,
)
from brittle.sensitivity import jacobian_norms, largest_ratio
from brittle.verdict import judge
from brittle.wording import norm_name

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
    data: Samples | None = None,
    *,
    p: float | Sequence[float] = (math.inf, 2.0),
    eps: float | Mapping[float, float] | None = None,
    attacks: Sequence[Attack] | None = None,
    steps: int = 100,
    restarts: int = 1,
    bounds: tuple[float, float] = (0.0, 1.0),
    input_shape: Sequence[int] | None = None,
    tighten: int = 0,
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
    perturbations against random ones. What cannot be measured soundly is listed by name under ``not_measured``.

    Args:
        model: Any network from inputs ``(N, ...)`` to logits ``(N, classes)``; left bit-equal; judged in eval mode.
        data: A :class:`brittle.data.Data`, ``(inputs, labels)``, an iterable of batches, a Dataset, or None. All of it
            is held in memory and attacked; take a subset first if it is large.
        p: Norms of the budgets and bounds: inf, 2 or both.
        eps: Budget for every norm, in input units; by default the data set's own, else 8/255 (inf) and 0.5 (2).
        attacks: Attacks whose worst case counts; by default APGD with cross-entropy, then with the DLR loss
            (where the model has at least 3 classes).
        steps: Steps of each of the default attacks.
        restarts: Runs of every attack.
        bounds: Smallest and largest admissible input value.
        input_shape: Shape of one input without the batch axis, for sharper bounds on convolutions without data.
        tighten: Steps of optimisation of the certified bounds; 0 for closed forms. Each takes about as long as the
            closed forms.
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
    budgets = _budgets(eps, norms, data)
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
        run = _Run(model, samples, layers, leading_directions(layers), batch_size, tell)
        chosen, left_out = _default_attacks(attacks, model, samples[0], samples[1], steps)
        missing += left_out
        for q in norms:
            run.at_budget(Threat(tuple(chosen), q, restarts, bounds, seed), budgets[q], certificates[q].margins, found)
            if certificates[q].margins is None:
                why = certificates[q].unavailable or "the output is no vector of logits"
                missing.append(NotMeasured(f"certified {norm_name(q)} accuracy", why))
        if not found.universal:
            missing.append(NotMeasured("universal perturbations", "needs two samples: one to fit on, one to judge by"))
        missing += [NotMeasured(f"directions at {layer}", "the layer never ran as a module") for layer in found.silent]
    settings = _settings(budgets, found, restarts, bounds, shape, tighten)
    result = Audit(
        model=name or type(model).__name__,
        verdict=judge(found.evaluations, results, lipschitz, found.responses, found.universal, found.certified),
        evaluations=tuple(found.evaluations),
        curves=tuple(found.curves),
        layers=tuple(results),
        lipschitz=tuple(lipschitz),
        responses=tuple(found.responses),
        universal=tuple(found.universal),
        not_measured=tuple(missing),
        signature=_signature(model, samples, seed, settings),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        certified=tuple(found.certified),
    )
    return replace(result, seconds=time.perf_counter() - started)


def _settings(
    budgets: Mapping[float, float],
    found: _Found,
    restarts: int,
    bounds: tuple[float, float],
    shape: tuple[int, ...] | None,
    tighten: int,
) -> dict[str, Setting]:
    return {
        "p": tuple(f"{q:g}" for q in budgets),
        "eps": tuple(budgets.values()),
        "attacks": found.evaluations[0].attacks if found.evaluations else (),
        "restarts": restarts,
        "bounds": tuple(float(b) for b in bounds),
        "input_shape": shape,
        "tighten": tighten,
    }


_NEED_DATA = (
    "clean and robust accuracy",
    "security curve",
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


@dataclass(frozen=True)
class _Run:
    """The data-bound parts at one budget after the other."""

    model: nn.Module
    samples: tuple[Tensor, Tensor]
    layers: Sequence[LayerView]
    directions: Mapping[str, Tensor]
    batch_size: int
    tell: Stage

    def at_budget(self, threat: Threat, eps: float, lipschitz: Tensor | None, found: _Found) -> None:
        """Attack within one budget, then the curves around it, the directions and the universal perturbation."""
        label = norm_name(threat.p)
        worst = self._attacked(threat, eps, label)
        results = sample_results(worst, threat)
        radii = None if lipschitz is None else certified_radii(worst.clean_logits, worst.y, lipschitz)
        if radii is not None:
            results = [replace(r, certified_radius=radius) for r, radius in zip(results, radii.tolist(), strict=True)]
            budgets = [share * eps for share in (*CURVE, 1.0)]
            found.certified.append(certified_curve(radii, worst.clean_correct, threat.p, budgets))
        found.evaluations.append(summarise(results, worst.rejected, threat, eps))
        found.curves.append(
            security_curve(
                self.model,
                worst,
                threat,
                at=eps,
                budgets=[share * eps for share in CURVE],
                batch_size=self.batch_size,
                progress=lambda done, total: self.tell(f"{label} curve", done, total),
            )
        )
        rows = worst.clean_correct.nonzero()[:RESPONSE_SAMPLES, 0]
        x, x_adv = worst.x[rows], worst.x_adv[rows]
        responses, silent = layer_responses(self.model, self.layers, x, x_adv, p=threat.p, directions=self.directions)
        found.responses += responses
        found.silent = silent
        self.tell(f"{label} directions", 1, 1)
        found.universal += universal_result(
            self.model, self.samples, p=threat.p, eps=eps, bounds=threat.bounds, seed=threat.seed
        )
        self.tell(f"{label} universal", 1, 1)

    def _attacked(self, threat: Threat, eps: float, label: str) -> WorstCase:
        parts: list[WorstCase] = []
        x, y = self.samples
        for start in range(0, len(x), self.batch_size):
            rows = slice(start, start + self.batch_size)
            parts.append(worst_case(self.model, x[rows], y[rows], threat, eps, first=start))
            self.tell(f"{label} attack", min(rows.stop, len(x)), len(x))
        return WorstCase.joined(parts)


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


def universal_result(
    model: nn.Module,
    samples: tuple[Tensor, Tensor],
    *,
    p: float,
    eps: float,
    bounds: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
) -> list[UniversalResult]:
    """A universal perturbation fitted on a random half of the samples and judged on the other half.

    Args:
        model: The network; left bit-equal.
        samples: Inputs ``(N, ...)`` and labels ``(N,)``.
        p: Norm of the budget.
        eps: Budget, in input units.
        bounds: Smallest and largest admissible input value.
        seed: Seed of the split and of the random control.

    Returns:
        One result; none when there are fewer than two samples.
    """
    x, y = (part.to(device_of(model)) for part in samples)
    if len(x) < 2:
        return []
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator).to(x.device)
    fit, held = order[: len(x) // 2], order[len(x) // 2 :]
    batches = [(x[part], y[part]) for part in fit.split(64)]
    u = universal_perturbation(model, batches, eps=eps, p=p, bounds=bounds)
    noise = torch.randn(x[:1].shape, generator=generator).to(u)
    control = eps * (noise.sign() if math.isinf(p) else noise / lp_norm(noise, 2))[0]
    with frozen(model):
        clean, under, random = (
            torch.cat([_right(model, (x[part] + v).clamp(*bounds), y[part]) for part in held.split(256)])
            for v in (torch.zeros_like(u), u, control)
        )
    n = int(clean.sum())
    return [
        UniversalResult(
            p=float(p),
            eps=float(eps),
            fitted_on=len(fit),
            fooled=Rate(int((clean & ~under).sum()), n),
            random_fooled=Rate(int((clean & ~random).sum()), n),
            robust=Rate(int(under.sum()), len(held)),
        )
    ]


def _right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return margins(logits_of(model, x, y), y) > 0


def _gathered(data: Samples, bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
    parts = [(x, y) for x, y, _ in batches_of(data, 1024)]
    if not parts:
        raise InputError("data: expected at least one sample; got none")
    x, y = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    check_batch(x, y, bounds=bounds)
    return x, y


def _budgets(
    eps: float | Mapping[float, float] | None, norms: Sequence[float], data: Samples | None
) -> dict[float, float]:
    standard = data.budgets if isinstance(data, Data) else OTHER_BUDGETS
    given = dict(eps) if isinstance(eps, Mapping) else {} if eps is None else dict.fromkeys(norms, eps)
    if unknown := [q for q in given if q not in norms]:
        raise InputError(f"eps: expected budgets for p in {norms}; got one for {unknown[0]!r}")
    budgets = {q: float(given.get(q, standard.get(q, OTHER_BUDGETS[q]))) for q in norms}
    for q, budget in budgets.items():
        if not 0 < budget < math.inf:
            raise InputError(f"eps: expected a finite number above 0 for l_{q:g}; got {budget}")
    return budgets


def _default_attacks(
    attacks: Sequence[Attack] | None, model: nn.Module, x: Tensor, y: Tensor, steps: int
) -> tuple[list[Attack], list[NotMeasured]]:
    if attacks is not None:
        if not attacks:
            raise InputError("attacks: expected at least one; got none")
        return list(attacks), []
    ce, dlr = (functools.partial(apgd, loss=loss, steps=steps) for loss in ("ce", "dlr"))
    with frozen(model):
        classes = logits_of(model, x[:1].to(device_of(model)), y[:1].to(device_of(model))).shape[1]
    if classes < 3:
        return [ce], [NotMeasured("APGD with the DLR loss", f"needs at least 3 classes; the model has {classes}")]
    return [ce, dlr], []


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


def _signature(
    model: nn.Module, samples: tuple[Tensor, Tensor] | None, seed: int, settings: dict[str, Setting]
) -> Signature:
    weights = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    device = device_of(model)
    return Signature(
        versions={
            "brittle": __version__,
            "python": platform.python_version(),
            "torch": version("torch"),
            "numpy": version("numpy"),
        },
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        seed=seed,
        settings=settings,
        weights=_digest(weights),
        data=None if samples is None else _digest({"inputs": samples[0], "labels": samples[1]}),
    )


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
