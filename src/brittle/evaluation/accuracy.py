"""Clean and robust accuracy of a data set of any size: at one budget, or at the standard ones."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from brittle.attacks import apgd
from brittle.attacks.region import check_budget
from brittle.data.batches import DataLike, budgets_by_norm
from brittle.errors import InputError
from brittle.evaluation.continued import go_on_with_queries
from brittle.evaluation.execution import Execution
from brittle.evaluation.honesty.doors import checked_samples, first_of, flags_of_cases, split_off
from brittle.evaluation.likely_mistakes import Tally, glance_at, with_warnings
from brittle.evaluation.parts import Chunk
from brittle.evaluation.run import Case, Plan, examples_of, read_chunks, run_parts, summarise
from brittle.evaluation.signature import StreamDigest, signature_of
from brittle.evaluation.threat import Threat, for_classes, without_gradients
from brittle.linear.norms import check_attack_norm
from brittle.models.borrow import Model, device_of, frozen
from brittle.models.forward import logits_of
from brittle.models.intake import name_of, open_network, with_logits
from brittle.models.network import SAMPLES, make_ready
from brittle.models.twin import differentiable_twin, has_gradients
from brittle.results import AttackResult, Evaluation, Normalisation, NotMeasured, Setting


def evaluate(
    model: Model,
    data: DataLike,
    threat: Threat = Threat(apgd),
    *,
    eps: float,
    honesty: bool = True,
    examples: int = 0,
    execution: Execution = Execution(),
) -> Evaluation:
    """Clean and robust accuracy under the worst case over attacks and restarts.

    Samples that are wrong without attack are not attacked, nor are samples that broke, nor those that a certificate
    covers (relaxations, theory page; tried on a few samples first and left off where they prove little). A sample
    leaves the batch when it breaks, and a waiting one takes its place; attacks of this package run on a private copy
    with batch norms folded. None of this changes a verdict, apart from rounding. Every example is re-checked on the
    model itself: ``||x_adv - x||_p <= eps (1 + 1e-6)`` (and float rounding at the bounds), values within the bounds
    and finite, prediction recomputed; an example that fails is rejected and counted, never credited.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``; left bit-equal. Evaluated in eval mode. Any module,
            function or program of ``torch.export``; logits may lie in its answer (of transformers, or a tuple).
        data: A :class:`brittle.data.Data`, ``(inputs, labels)`` tensors or arrays of NumPy, an iterable of batches
            ``(x, y)`` (streamed, never held whole), or a Dataset; batches may be dictionaries, as ``pixel_values``
            and ``labels``. Inputs lie within the threat's bounds.
        threat: What the attacker may do. Attacks are called ``(model, x, y, *, eps, p)``; ``bounds``, ``seed``,
            ``ids``, ``batch_size`` and ``progress`` are passed to attacks that have them. Options are bound with
            ``functools.partial`` and recorded.
        eps: Budget, at least 0, in input units.
        honesty: Whether to check if the robust accuracy can be trusted (:func:`brittle.evaluation.honesty_flags`), on
            the first 1,024 samples; costs at most about 20,000 passes, which are not counted with the attack's. If
            these are all and queries break what the attacks left, the evaluation goes on with them.
        examples: For how many samples, from the start of the data, the result holds the adversarial examples
            (``evaluation.examples``, arrays of numpy on the CPU, which no JSON holds); 0 for none.
        execution: How the work is carried out; verdicts do not depend on it, apart from rounding (which samples
            certificates are tried on does, and so ``proven``).

    Returns:
        Counts, what was run, and per-sample results. Robust accuracy is an upper estimate of the true one.

    Raises:
        InputError: An argument is out of range, the data hold NaN, values outside the bounds, or labels that the
            model does not have; the message names the argument, what was expected and what came.
    """
    check_budget(eps, threat.p, 1)
    check_examples(examples)
    model = open_network(model)
    with frozen(model):
        first, chunks = read_chunks(data, execution, threat.bounds)
        model = with_logits(model, first.x)[0]
        threat = choose_attacks(threat, model, first)[0]
        glance, tally = glance_at(model, first.x, data, execution.batch_size), Tally()
        cases = (Case(threat, eps),)
        (evaluation,), _ = _measured(
            model, cases, execution, first, tally.over(chunks), honesty=honesty, examples=examples
        )
        return with_warnings(evaluation, tally, glance)


def attack(
    model: Model,
    data: DataLike,
    threat: Threat = Threat("standard"),
    *,
    p: float | Sequence[float] = (math.inf, 2.0),
    eps: float | Mapping[float, float] | None = None,
    name: str | None = None,
    honesty: bool = True,
    execution: Execution = Execution(),
) -> AttackResult:
    """Robust accuracy of a network at the standard budgets, for one norm after the other.

    Args:
        model: As :func:`brittle.evaluate`.
        data: As :func:`brittle.evaluate`; a stream is read once for all norms.
        threat: What the attacker may do; ``p`` takes the place of its norm.
        p: Norms of the budgets: inf, 2 or both.
        eps: Budget for every norm, in input units; by default the data set's own, else 8/255 (inf) and 0.5 (2).
        name: What to call the model; its class name by default.
        honesty: As :func:`brittle.evaluate`.
        execution: How the work is carried out.

    Returns:
        One evaluation a norm; robust accuracies are upper estimates.

    Raises:
        InputError: An argument is out of range; it names the argument, what was expected and what came.
    """
    started = time.perf_counter()
    budgets = budgets_by_norm(eps, check_norms(p), data)
    given = open_network(model)
    with frozen(given):
        first, chunks = read_chunks(data, execution, threat.bounds)
        model, found = with_logits(given, first.x)
        battery, left_out = choose_attacks(threat, model, first)
        cases = tuple(Case(replace(battery, p=q), budget) for q, budget in budgets.items())
        glance, tally = glance_at(model, first.x, data, execution.batch_size), Tally()
        read = StreamDigest(first.total)
        chunks = read.over(tally.over(chunks))
        evaluations, unchecked = _measured(model, cases, execution, first, chunks, honesty=honesty)
        signature = signature_of(
            given,
            read.hexdigest(),
            threat.seed,
            {
                "preset": threat.attacks if isinstance(threat.attacks, str) else None,
                "certify": execution.certify,
                "honesty": honesty,
                "restarts": threat.restarts,
                "bounds": tuple(map(float, threat.bounds)),
                "steps": threat.steps,
                "p": tuple(f"{q:g}" for q in budgets),
                "eps": tuple(budgets.values()),
                **how_read(found, first),
            },
        )
    return AttackResult(
        model=name or name_of(given),
        evaluations=tuple(with_warnings(evaluation, tally, glance) for evaluation in evaluations),
        not_measured=(*left_out, *unchecked),
        signature=signature,
        seconds=time.perf_counter() - started,
        normalisation=next(iter(glance.normalisations), Normalisation()),
    )


def how_read(found: str, first: Chunk) -> dict[str, Setting]:
    """What to say of networks and data that come in other forms than tensors: where logits and samples were found.

    Args:
        found: As :func:`brittle.models.intake.with_logits` says it.
        first: The first chunk.
    """
    return {name: text for name, text in (("logits", found), ("batches", first.form)) if text}


def _measured(
    model: Model,
    cases: tuple[Case, ...],
    execution: Execution,
    first: Chunk,
    chunks: Iterator[Chunk],
    *,
    honesty: bool,
    examples: int = 0,
) -> tuple[list[Evaluation], tuple[NotMeasured, ...]]:
    """The evaluation of every case over all chunks, with its flags, and the checks that could not be made."""
    bounds = cases[0].threat.bounds
    network = make_ready(model, first.x, bounds, compiled=execution.compiled)
    most = checked_samples(first.x) if honesty else 0
    wanted = max(most, examples)
    parts, kept = split_off(run_parts(network, Plan(cases, execution, wanted), first, chunks), wanted)
    checked = [first_of(worst, most) if len(worst.y) > most else worst for worst in kept]
    flags, missing = flags_of_cases(network, cases, checked, execution) if honesty else ([() for _ in cases], ())
    evaluations = []
    for number, (case, of_case, own) in enumerate(zip(cases, parts, flags, strict=True)):
        worst = kept[number].to(network.device) if kept else None
        if honesty and worst is not None and len(checked[number].y) == sum(len(part.samples) for part in of_case):
            case, of_case, worst = go_on_with_queries(network, case, of_case, worst, own, execution=execution)
        handed = None if worst is None else examples_of(worst, examples)
        evaluations.append(replace(summarise(of_case, case.threat, case.eps), flags=own, examples=handed))
    return evaluations, missing


def choose_attacks(threat: Threat, model: Model, samples: Chunk) -> tuple[Threat, tuple[NotMeasured, ...]]:
    """The threat with its attacks one by one, and what a preset leaves out, for the network's number of
    classes or because it has no gradients.

    Args:
        threat: Names a preset, or holds attacks and is returned as it is.
        model: The network, borrowed; asked for its logits for one sample when a preset is named.
        samples: At least one.
    """
    if not isinstance(threat.attacks, str):
        return threat, ()
    x = samples.x[:SAMPLES].to(device_of(model)).clamp(*threat.bounds)
    logits = logits_of(model, x[:1], samples.y[:1].to(x.device))
    chosen, left_out = for_classes(threat, logits.shape[1])
    if has_gradients(model, x):
        return chosen, left_out
    chosen, missing = without_gradients(chosen, threat.attacks, differentiable_twin(model, x) is not None)
    return chosen, left_out + missing


def check_examples(examples: int) -> None:
    """Raise where the number of adversarial examples to hand out is none.

    Raises:
        InputError: It is no whole number of at least 0.
    """
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 0:
        raise InputError(f"examples: expected a number of samples of at least 0; got {examples!r}")


def check_norms(p: float | Sequence[float]) -> tuple[float, ...]:
    """The norms of the budgets, at least one.

    Raises:
        InputError: There is none, or one is neither inf nor 2.
    """
    norms = tuple(check_attack_norm(q) for q in (p if isinstance(p, Sequence) else (p,)))
    if not norms:
        raise InputError("p: expected at least one of inf and 2; got none")
    return norms
