"""The main job: one call that says how compressible and how fragile a network is, and why."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from brittle.auditing.directions import layer_responses, leading_directions, margins_and_slopes, other_class
from brittle.auditing.pictures import Sketches, direction_sketches, join_pictures, most_fragile, sample_sketches
from brittle.bounds.layer_table import input_sizes, measure_layer
from brittle.bounds.lipschitz.network import NetworkBound, network_bounds
from brittle.bounds.sensitivity import jacobian_norms, largest_ratio
from brittle.data.batches import DataLike, budgets_by_norm
from brittle.data.load import Data
from brittle.errors import InputError
from brittle.evaluation.accuracy import check_examples, check_norms, choose_attacks, how_read
from brittle.evaluation.continued import go_on_with_queries
from brittle.evaluation.curves import certified_curve
from brittle.evaluation.execution import Execution
from brittle.evaluation.features import feature_compression
from brittle.evaluation.honesty import honesty_flags
from brittle.evaluation.likely_mistakes import Tally, glance_at, with_warnings
from brittle.evaluation.parts import Chunk, Part
from brittle.evaluation.run import Case, Plan, examples_of, read_chunks, run_parts, summarise
from brittle.evaluation.signature import StreamDigest, signature_of
from brittle.evaluation.threat import Threat
from brittle.evaluation.universal_check import judged_perturbations
from brittle.evaluation.worst_case import WorstCase, worst_case
from brittle.linear.norms import lp_norm, per_sample
from brittle.models.borrow import Model, frozen
from brittle.models.forward import logits_of
from brittle.models.intake import name_of, open_network, with_logits
from brittle.models.layers import LayerView, read_layers, read_state_layers
from brittle.models.network import Network, make_ready, trace_or_reason
from brittle.models.normalize import normalisations_of
from brittle.models.quantised import count_parameters
from brittle.models.trace import NoRule, Trace
from brittle.progress import Progress, silent
from brittle.reporting.verdict import judge
from brittle.results import (
    Audit,
    FeatureCompression,
    Flag,
    LayerResponse,
    LayerResult,
    LipschitzResult,
    Normalisation,
    NormResult,
    NotMeasured,
    Pictures,
    Rate,
    SecurityCurve,
    Setting,
    UniversalResult,
)
from brittle.results.methods import UniversalKind
from brittle.results.wording import norm_name

CURVE = (0.25, 0.5, 1.5, 2.0)
"""Multiples of the standard budget at which the security curve is measured besides the budget itself."""
EXAMPLE_BYTES = 2**28
"""Bytes of inputs from the start of the data whose examples are looked at more closely: honesty, directions and
universal perturbations. The attacks and the curves see all data, of any size."""
RESPONSE_SAMPLES = 256
"""Most samples whose perturbations are followed through the layers, and at which Jacobians are taken."""
FEATURE_STEPS = 20
"""Steps of the attacks in search of the radii that are set against the minimum-distance rule's: they have whole
distances to go, not a budget, and every example is drawn back."""
ASCENTS, ASCENT_STEPS = 16, 15
"""Most samples from which larger local norms are sought by ascent (fewer for large networks), and steps of each."""
ASCENT_WEIGHTS = 4e7
"""Most parameters times ascents."""
JACOBIANS_AT_ONCE = 32
"""Samples whose Jacobians are held at once."""
NO_WEIGHTS = "a function shows neither its weights nor what it computes: pass the torch.nn.Module instead"
"""Why layers and bounds are not measured of plain callables."""
NO_GRAPH = "weights alone do not say how layers follow one another: name the architecture, or pass the network"
"""Why there is no bound of weights by name."""
NO_GRADIENTS = "the network cannot be differentiated"
"""Why some of it is not measured of quantised networks, scripted ones without gradients and the like."""
QUERIES_ALONE = Flag(
    "attacked by queries alone",
    True,
    "The network has no gradients, and no copy in real numbers could be made of it.",
    "Attacks that follow gradients usually break many more samples.",
)
"""Raised where nothing but the network's answers could be asked for."""
NEED_DATA = (
    "clean and robust accuracy",
    "security curve",
    "honesty flags",
    "certified radii and accuracy",
    "local gradient norms",
    "adversarial directions and amplification",
    "universal perturbations",
    "feature compression",
)
"""What is not measured without data."""


def audit(
    model: Model | Mapping[str, Tensor],
    data: DataLike | None = None,
    threat: Threat = Threat("fast"),
    *,
    p: float | Sequence[float] = (math.inf, 2.0),
    eps: float | Mapping[float, float] | None = None,
    input_shape: Sequence[int] | None = None,
    tighten: int = 0,
    honesty: bool = True,
    examples: int = 0,
    name: str | None = None,
    source: Mapping[str, Setting] | None = None,
    execution: Execution = Execution(),
) -> Audit:
    """Measure how compressible and how fragile a trained network is, and why.

    Without data only the weights are read: the layer table (k-term errors, spread, ranks, operator norms and
    Theorem 3.1 with their sides) and the certified Lipschitz bounds. With data also clean and robust accuracy at
    the standard budgets and over a range of budgets, certified radii and the certified accuracy that they imply, the
    largest local gradient norms, the adversarial directions, the amplification layer by layer, universal perturbations
    against random ones, and by how much of what separates the classes the network decides
    (:func:`brittle.feature_compression`). Checks say whether the robust accuracies can be trusted (``flags``). What
    cannot be measured soundly is listed by name under ``not_measured``.

    Args:
        model: Any network from inputs ``(N, ...)`` to logits ``(N, classes)``; left bit-equal; judged in eval mode. A
            module, a function, a program of ``torch.export``; logits may lie in its answer (:func:`brittle.evaluate`).
            Without data also weights by name, a state dict, of which the shapes tell the layers.
        data: As :func:`brittle.evaluate`, or None. Read once and streamed; the checks that need examples look at those
            of the first 256 MB.
        threat: What the attacker may do; ``p`` takes the place of its norm. By default the preset ``fast``: APGD with
            cross-entropy, with the DLR loss (where there are at least 3 classes), and along smoothed gradients.
        p: Norms of the budgets and bounds: inf, 2 or both.
        eps: Budget for every norm, in input units; by default the data set's own, else 8/255 (inf) and 0.5 (2).
        input_shape: Shape of one input without the batch axis, for sharper bounds on convolutions without data.
        tighten: Steps of optimisation of the certified bounds; 0 for closed forms. Each takes about as long as the
            closed forms.
        honesty: Whether to check if the robust accuracies can be trusted (:func:`brittle.evaluation.honesty_flags`).
        examples: For how many samples, from the start of the data, the evaluations hold the adversarial examples
            (``audit.norm(p).evaluation.examples``, arrays of numpy, which no JSON holds); of the first 256 MB at most.
        name: What to call the model; its class name by default.
        source: How the network and the data are named on the command line, for the commands that the report suggests.
        execution: How the work is carried out: samples at once, devices, a folder to resume from, progress.

    Returns:
        Everything that was found, as one frozen dataclass.

    Raises:
        InputError: An argument, the model's weights or the data cannot be used; the message says what was expected.
    """
    started = time.perf_counter()
    budgets = budgets_by_norm(eps, check_norms(p), data)
    if tighten < 0:
        raise InputError(f"tighten: expected a number of steps of at least 0; got {tighten}")
    check_examples(examples)
    progress = execution.progress or silent
    if isinstance(model, Mapping):
        if data is not None:
            raise InputError("data: expected none beside weights by name, which cannot be run; got some")
        return _audit_weights(model, tuple(budgets), name or "weights", threat.seed, progress)
    given = open_network(model)
    views, unread = read_layers(given) if isinstance(given, nn.Module) else ([], [NotMeasured("layers", NO_WEIGHTS)])
    with frozen(given):
        first, chunks = (None, None) if data is None else read_chunks(data, execution, threat.bounds)
        shape = tuple(first.x.shape[1:]) if first else None if input_shape is None else tuple(input_shape)
        origin = "input_shape" if first is None else "data"
        model, found = (given, "") if first is None else with_logits(given, first.x)
        weights = _read_weights(model, views, shape, origin, tuple(budgets), tighten, progress)
        certificates, missing = weights.certificates, [*unread, *weights.missing]
        flags: tuple[Flag, ...] = ()
        features, pictures = None, None
        if first is None or chunks is None:
            norms = [NormResult(q, None, lipschitz_result(certificates[q])) for q in budgets]
            missing += [NotMeasured(what, "no data given") for what in NEED_DATA]
            fingerprint = None
        else:
            battery, left_out = choose_attacks(threat, model, first)
            network = make_ready(model, first.x, threat.bounds, compiled=execution.compiled, traced=weights.traced)
            glance, tally = glance_at(model, first.x, data, execution.batch_size), Tally()
            read = StreamDigest(first.total)
            closer = _Closer(model, network, views, leading_directions(views), honesty, execution, examples)
            norms, flags, features, pictures, unmeasured = _attack_and_look(
                closer, _cases(battery, budgets, certificates), certificates, first, read.over(tally.over(chunks))
            )
            norms = [
                replace(norm, evaluation=with_warnings(norm.evaluation, tally, glance)) if norm.evaluation else norm
                for norm in norms
            ]
            missing += [*left_out, *unmeasured]
            fingerprint = read.hexdigest()
        settings: dict[str, Setting] = {
            "p": tuple(f"{q:g}" for q in budgets),
            "eps": tuple(budgets.values()),
            "attacks": norms[0].evaluation.attacks if norms[0].evaluation else (),
            "preset": threat.attacks if isinstance(threat.attacks, str) else None,
            "steps": threat.steps,
            "restarts": threat.restarts,
            "bounds": tuple(float(b) for b in threat.bounds),
            "input_shape": shape,
            "tighten": tighten,
            "honesty": honesty,
            **({} if first is None else how_read(found, first)),
        }
        signature = signature_of(given, fingerprint, threat.seed, settings)
        normalisation = next(iter(normalisations_of(given)), Normalisation())
    return Audit(
        model=name or name_of(given),
        verdict=judge(norms, weights.layers, flags, features),
        norms=tuple(norms),
        layers=tuple(weights.layers),
        not_measured=tuple(missing),
        signature=signature,
        parameters=count_parameters(given) if isinstance(given, nn.Module) else 0,
        flags=flags,
        seconds=time.perf_counter() - started,
        features=features,
        source=dict(source) if source is not None else {"data": data.name} if isinstance(data, Data) else {},
        pictures=pictures,
        normalisation=normalisation,
    )


def _audit_weights(
    state: Mapping[str, Tensor], norms: tuple[float, ...], name: str, seed: int, progress: Progress
) -> Audit:
    """What weights tell without the network that they belong to."""
    started = time.perf_counter()
    views, unread = read_state_layers(state)
    layers, missing = _measure_layers(views, norms, {}, progress)
    results = [NormResult(q, None, lipschitz_result(NetworkBound(q, None, NO_GRAPH, ()))) for q in norms]
    missing = [
        *unread,
        *missing,
        *(NotMeasured(f"certified {norm_name(q)} bound", NO_GRAPH) for q in norms),
        *(NotMeasured(what, "no data given") for what in NEED_DATA),
    ]
    settings: dict[str, Setting] = {"p": tuple(f"{q:g}" for q in norms), "layers": "told by the shapes of weights"}
    return Audit(
        model=name,
        verdict=judge(results, layers),
        norms=tuple(results),
        layers=tuple(layers),
        not_measured=tuple(missing),
        signature=signature_of(state, None, seed, settings),
        parameters=sum(view.parameters for view in views),
        seconds=time.perf_counter() - started,
        normalisation=Normalisation(),
    )


@dataclass(frozen=True)
class _Weights:
    """What the weights alone tell, and what they do not."""

    layers: list[LayerResult]
    traced: Trace | NoRule | None
    certificates: dict[float, NetworkBound]
    missing: list[NotMeasured]


def _read_weights(
    model: Model,
    views: Sequence[LayerView],
    shape: tuple[int, ...] | None,
    argument: str,
    norms: tuple[float, ...],
    steps: int,
    progress: Progress,
) -> _Weights:
    """The layer table, and the bounds of the network with the trace that they are read from."""
    if not isinstance(model, nn.Module):
        bounds = {q: NetworkBound(q, None, NO_WEIGHTS, ()) for q in norms}
        return _Weights([], None, bounds, [NotMeasured(f"certified {norm_name(q)} bound", NO_WEIGHTS) for q in norms])
    sizes = input_sizes(model, views, shape, argument=argument) if shape else {}
    layers, missing = _measure_layers(views, norms, sizes, progress)
    progress("bounds", 0, 1)
    traced = trace_or_reason(model, shape)
    certificates = network_bounds(model, norms, input_shape=shape, steps=steps, traced=traced)
    progress("bounds", 1, 1)
    for q, bound in certificates.items():
        if bound.unavailable:
            missing.append(NotMeasured(f"certified {norm_name(q)} bound", bound.unavailable))
    return _Weights(layers, traced, certificates, missing)


def _measure_layers(
    views: Sequence[LayerView], norms: tuple[float, ...], sizes: Mapping[str, tuple[int, ...]], progress: Progress
) -> tuple[list[LayerResult], list[NotMeasured]]:
    """The layer table, and what it has to leave out."""
    layers, missing = list[LayerResult](), list[NotMeasured]()
    for view in views:
        layers.append(measure_layer(view, norms, sizes.get(view.name)))
        progress("layers", len(layers), len(views))
        if type(view.module) is nn.Module:
            reason = "stride and padding of a convolution are not among its weights"
        elif view.convolution and view.geometry is None:
            reason = f"{type(view.module).__name__} has a forward of its own that is not understood"
        else:
            reason = "padding that repeats pixels is bounded only for a known input size"
        absent = [q for q in norms if layers[-1].operator_norm(q) is None]
        missing += [NotMeasured(f"{norm_name(q)} operator norm of {view.name}", reason) for q in absent]
    return layers, missing


def _cases(
    battery: Threat, budgets: Mapping[float, float], certificates: Mapping[float, NetworkBound]
) -> tuple[Case, ...]:
    """What is attacked in every norm: the budget, those of the curve, and radii beside them."""
    return tuple(
        Case(replace(battery, p=q), eps, tuple(share * eps for share in CURVE), certificates[q].margins, radii=True)
        for q, eps in budgets.items()
    )


def _attack_and_look(
    closer: _Closer,
    cases: tuple[Case, ...],
    certificates: Mapping[float, NetworkBound],
    first: Chunk,
    chunks: Iterator[Chunk],
) -> tuple[list[NormResult], tuple[Flag, ...], FeatureCompression | None, Pictures | None, list[NotMeasured]]:
    """Attack all data, read once for all norms, then look closer at the first examples, norm by norm."""
    most = max(1, EXAMPLE_BYTES // max(1, first.x[0].numel() * first.x.element_size()))
    plan = Plan(cases, closer.execution, most)
    by_case = list(zip(*run_parts(closer.network, plan, first, chunks), strict=True))
    looks: list[_Look] = []
    for case in cases:
        outcomes = by_case.pop(0)
        parts = [outcome.part for outcome in outcomes]
        worst = WorstCase.joined([outcome.worst for outcome in outcomes if outcome.worst is not None])
        del outcomes  # hundreds of megabytes a norm: the pieces go when they are joined, and all before the next norm
        looks.append(closer.look(case, parts, worst, certificates[case.threat.p], of_model=not looks))
        del worst
    first_layer = direction_sketches(closer.views, closer.directions, tuple(first.x.shape[1:]))
    pictures = join_pictures([look.sketches for look in looks], first_layer, cases[0].threat.bounds)
    missing = _unavailable(looks, certificates, closer)
    return [look.norm for look in looks], looks[0].flags, looks[0].features, pictures, missing


@dataclass(frozen=True)
class _Look:
    """What one norm showed, and what it could not show."""

    norm: NormResult
    flags: tuple[Flag, ...]
    silent_layers: tuple[str, ...]
    unchecked: tuple[NotMeasured, ...]
    features: FeatureCompression | None
    sketches: Sketches | None


@dataclass(frozen=True)
class _Closer:
    """A closer look at the examples: whether they can be trusted, where their energy goes, what they share."""

    model: Model
    network: Network
    views: Sequence[LayerView]
    directions: Mapping[str, Tensor]
    honesty: bool
    execution: Execution
    handed_out: int = 0

    def look(self, case: Case, parts: Sequence[Part], worst: WorstCase, bound: NetworkBound, of_model: bool) -> _Look:
        """Everything about one norm.

        Args:
            case: Threat and budget.
            parts: What the attacks gave, over all data.
            worst: The examples for the samples from the start of the data.
            bound: The certified Lipschitz bound.
            of_model: Whether to make the checks that belong to no norm, too.
        """
        threat, eps, label = case.threat, case.eps, norm_name(case.threat.p)
        progress = self.execution.progress or silent
        worst = worst.to(self.network.device)
        evaluation, curve = summarise(parts, threat, eps), add_curves(case, parts)
        flags: tuple[Flag, ...] = ()
        unchecked: tuple[NotMeasured, ...] = ()
        if self.honesty:
            flags, unchecked = honesty_flags(
                self.network, worst, threat, eps, curve=curve, of_model=of_model, execution=self.execution
            )
            case, parts, worst = go_on_with_queries(self.network, case, parts, worst, flags, execution=self.execution)
            threat, evaluation, curve = case.threat, summarise(parts, case.threat, eps), add_curves(case, parts)
            progress(f"{label} honesty", 1, 1)
        if of_model and not self.network.gradients and self.network.fast is self.network.model:
            flags = (*flags, QUERIES_ALONE)
        responses, silent_layers = self.responses(worst, threat, eps)
        progress(f"{label} directions", 1, 1)
        universal: Sequence[tuple[UniversalResult, Tensor]] = ()
        lipschitz = lipschitz_result(bound)
        if self.network.gradients:
            universal = judged_perturbations(
                self.model, (worst.x, worst.y), p=threat.p, eps=eps, bounds=threat.bounds, seed=threat.seed
            )
            lipschitz = _add_local_norms(lipschitz, self.model, worst, threat)
        progress(f"{label} universal", 1, 1)
        norm = NormResult(
            p=threat.p,
            eps=eps,
            lipschitz=lipschitz,
            evaluation=replace(evaluation, examples=examples_of(worst, self.handed_out)),
            curve=curve,
            certified=certified_curve(evaluation, [*curve.eps]),
            universal=tuple(result for result, _ in universal),
            most_fragile=most_fragile(self.network, worst, threat.p, self.execution),
            flags=tuple(flag for flag in flags if flag.p is not None),
            **responses,
        )
        features = self.features(worst, threat) if of_model and self.network.gradients else None
        return _Look(
            norm,
            tuple(flag for flag in flags if flag.p is None),
            tuple(silent_layers),
            unchecked,
            features,
            sample_sketches(worst, threat.p, universal[0][1] if universal else None),
        )

    def features(self, worst: WorstCase, threat: Threat) -> FeatureCompression | None:
        """By how much of what separates the classes the network decides; None where no sample has a partner."""
        (self.execution.progress or silent)("features", 0, 1)
        attacks = Threat("fast", p=2.0, bounds=threat.bounds, seed=threat.seed, steps=FEATURE_STEPS)
        execution = Execution(batch_size=self.execution.batch_size)
        features = feature_compression(self.network, (worst.x, worst.y), attacks, execution=execution)
        (self.execution.progress or silent)("features", 1, 1)
        return features if features.pairs else None

    def responses(
        self, worst: WorstCase, threat: Threat, eps: float
    ) -> tuple[dict[str, tuple[LayerResponse, ...]], list[str]]:
        """What the attack, a random perturbation and the way to another class do at each layer, by the fields of
        :class:`~brittle.results.NormResult`; and the layers that never ran as modules.
        """
        rows = worst.clean_correct.nonzero()[:RESPONSE_SAMPLES, 0]
        x, (here, there) = worst.x[rows], other_class(worst.y[rows])
        ends = {
            "responses": (x, self.examples(worst, rows, threat, eps)),
            "random_responses": (x, perturbed_at_random(x, eps, threat)),
            "class_responses": (x[here], x[there]),
        }
        look = partial(layer_responses, self.model, self.views, p=threat.p, directions=self.directions)
        found = {name: look(*pair) for name, pair in ends.items()}
        return {name: tuple(of_layers) for name, (of_layers, _) in found.items()}, found["responses"][1]

    def examples(self, worst: WorstCase, rows: Tensor, threat: Threat, eps: float) -> Tensor:
        """Examples for the samples ``rows``; those that were left out, being proven robust, are attacked now."""
        x_adv, left_out = worst.x_adv[rows], worst.proven[rows].nonzero()[:, 0]
        if len(left_out):
            samples, first_attack = rows[left_out], threat.instead(threat.battery[:1])
            x, y, ids = worst.x[samples], worst.y[samples], worst.ids[samples.cpu()]
            quiet = replace(self.execution, progress=None)
            x_adv[left_out] = worst_case(self.network, x, y, first_attack, eps, ids=ids, execution=quiet).x_adv
        return x_adv


def perturbed_at_random(x: Tensor, eps: float, threat: Threat) -> Tensor:
    """The inputs with random signs (p = inf) or in a random direction (p = 2), as far as the attacker may go."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(threat.seed), dtype=torch.float32).to(x)
    unit = noise.sign() if math.isinf(threat.p) else noise / per_sample(lp_norm(noise, 2), noise)
    return (x + eps * unit).clamp(*threat.bounds)


def add_curves(case: Case, parts: Sequence[Part]) -> SecurityCurve:
    """The security curve over all chunks: at every budget the survivors add up."""
    points = tuple(sorted({float(case.eps), *map(float, case.curve)}))
    n = sum(len(part.samples) for part in parts)
    counts = [sum(hits) for hits in zip(*(part.survivors for part in parts), strict=True)]
    return SecurityCurve(float(case.threat.p), points, tuple(Rate(hits, n) for hits in counts))


def _unavailable(
    looks: Sequence[_Look], certificates: Mapping[float, NetworkBound], closer: _Closer
) -> list[NotMeasured]:
    """What could not be measured although there are data, with the reasons."""
    missing = []
    for norm in (look.norm for look in looks):
        untried = norm.evaluation.untried if norm.evaluation else None
        if norm.certified is None:
            reason = certificates[norm.p].unavailable or "the output is no vector of logits"
            missing.append(NotMeasured(f"certified {norm_name(norm.p)} accuracy", reason))
        if untried:
            missing.append(NotMeasured(f"{norm_name(norm.p)} proofs sample by sample", untried))
    universal = [result for look in looks for result in look.norm.universal]
    if not closer.network.gradients:
        missing += [NotMeasured(what, NO_GRADIENTS) for what in ("local gradient norms", "universal perturbations")]
    elif not universal:
        missing.append(NotMeasured("universal perturbations", "needs two samples: one to fit on, one to judge by"))
    elif all(result.kind != UniversalKind.DATA_FREE for result in universal):
        why = "the first layer is no affine function of the input, or a constant"
        missing.append(NotMeasured("data-free universal perturbations", why))
    if looks[0].features is None:
        reason = (
            "no sample that is right has one of another class beside it" if closer.network.gradients else NO_GRADIENTS
        )
        missing.append(NotMeasured("feature compression", reason))
    silent_layers = dict.fromkeys(layer for look in looks for layer in look.silent_layers)
    missing += [NotMeasured(f"directions at {layer}", "the layer never ran as a module") for layer in silent_layers]
    unchecked = [check for look in looks for check in look.unchecked]
    return missing + (unchecked if closer.honesty else [NotMeasured("honesty flags", "switched off")])


def lipschitz_result(bound: NetworkBound) -> LipschitzResult:
    """A network's bound from above as it is kept, without anything from below."""
    return LipschitzResult(
        p=bound.p,
        upper=bound.upper,
        method=bound.attained_by or "",
        unavailable=bound.unavailable,
        lower=None,
        median_lower=None,
        n=0,
        arguments=bound.arguments,
    )


def _add_local_norms(result: LipschitzResult, model: Model, worst: WorstCase, threat: Threat) -> LipschitzResult:
    """The same with the largest local norms and ratios that samples, and ascent from them, show from below."""
    x, (low, high) = worst.x[:RESPONSE_SAMPLES], threat.bounds
    logits_of(model, x[:1], worst.y[:1])  # refuses in our words what Jacobians cannot be taken of
    right = worst.clean_correct.nonzero()[:RESPONSE_SAMPLES, 0]
    margin, slope = margins_and_slopes(model, worst.x[right], worst.y[right], result.p)
    first_order = torch.where(margin > 0, margin / slope, 0.0)
    local = torch.cat([jacobian_norms(model, some, result.p).cpu() for some in x.split(JACOBIANS_AT_ONCE)])
    weights = sum(parameter.numel() for parameter in model.parameters()) if isinstance(model, nn.Module) else 0
    ascents = max(2, min(ASCENTS, int(ASCENT_WEIGHTS / max(1, weights))))
    start = x[local.topk(min(ascents, len(local))).indices.to(x.device)]
    reach = (high - low) * (0.25 if math.isinf(result.p) else 0.1 * math.sqrt(x[0].numel()))
    ratios = largest_ratio(model, start, result.p, eps=reach, steps=ASCENT_STEPS, seed=threat.seed)
    lower = float(ratios.max())  # in float64 and rounded down, where the local norms have the model's own precision
    return replace(
        result,
        lower=lower,
        median_lower=min(float(local.median()), lower),
        n=len(local),
        largest_on_data=min(float(local.max()), lower),
        reach=float(first_order.median()) if len(first_order) else None,
        slope=float(slope.median()) if len(slope) else None,
    )
