"""Data of any size under one or several threats: streamed in chunks, shared by devices, kept, and counted.

Every chunk is attacked under all threats before the next one is asked for, so that a stream is read once.
"""

from __future__ import annotations

import itertools
import math
import statistics
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brittle.attacks.losses import margins
from brittle.bounds.radius import certified_radii
from brittle.data.batches import DataLike, chunks_of
from brittle.data.checks import check_batch
from brittle.errors import InputError
from brittle.evaluation.certify import Proofs, measure_radii, prove_while_it_pays, read_proofs
from brittle.evaluation.curves import security_curve
from brittle.evaluation.execution import Execution
from brittle.evaluation.parts import Chunk, Kept, Outcome, Part, fingerprint, make_folder
from brittle.evaluation.threat import Threat, attack_name, attack_settings, passes_of
from brittle.evaluation.worst_case import WorstCase, worst_case
from brittle.linear.norms import distances
from brittle.models.borrow import Model
from brittle.models.forward import logits_of
from brittle.models.network import Network, make_ready
from brittle.models.workers import on_devices, on_ray
from brittle.progress import DONE_BEFORE, Progress, rising
from brittle.results import ClassAccuracy, Evaluation, Examples, Rate, SampleResult
from brittle.results.wording import norm_name
from brittle.storage.digest import digest

CHUNK_BYTES = 2**28
"""Bytes of inputs that are attacked as one pool, at most (and at least one batch)."""
CHUNK_SAMPLES = 8192
"""Samples that are attacked as one pool, at most."""
BATCHES_OF_A_PIECE = 4
"""Batches of a chunk where the work is shared or kept."""


@dataclass(frozen=True)
class Case:
    """What is asked about every sample at one budget.

    Attributes:
        threat: What the attacker may do, attacks one by one.
        eps: The budget, in input units.
        curve: Budgets of a security curve besides ``eps``; none for no curve.
        lipschitz: Certified Lipschitz constants of the margins ``(K, K)``, for certified radii; None for none.
        radii: Whether certified radii are wanted for their own sake, whatever the attacks cost.
    """

    threat: Threat
    eps: float
    curve: tuple[float, ...] = ()
    lipschitz: Tensor | None = None
    radii: bool = False

    @property
    def settings(self) -> list[str]:
        """Everything but the attacks that results depend on."""
        threat = self.threat
        plain = [threat.p, threat.restarts, *threat.bounds, threat.seed, self.eps]
        more = [] if self.lipschitz is None else [digest({"lipschitz": self.lipschitz})]
        return [str(value) for value in (*plain, *self.curve, *more, *(["radii"] if self.radii else []))]


@dataclass(frozen=True)
class Plan:
    """What is done with every chunk; goes to every worker.

    Attributes:
        cases: What is asked.
        execution: How it is done.
        examples: Samples from the start of the data whose examples are wanted, at least.
    """

    cases: tuple[Case, ...]
    execution: Execution
    examples: int = 0


@dataclass(frozen=True)
class Worker:
    """A network with what was made of it once: ready, and read for the certificates of every case."""

    network: Network
    proofs: tuple[Proofs, ...]


def read_chunks(data: DataLike, execution: Execution, bounds: tuple[float, float]) -> tuple[Chunk, Iterator[Chunk]]:
    """The first chunk, one sample of it checked, and all chunks, which are read as they are taken.

    Args:
        data: Labelled samples.
        execution: Where the work is shared or kept, a chunk is a few of its batches.
        bounds: Smallest and largest admissible input value.

    Raises:
        InputError: There is no sample, or the first one cannot be used.
    """
    size = BATCHES_OF_A_PIECE * execution.batch_size if execution.in_pieces else CHUNK_SAMPLES
    forms: list[str] = []

    def number() -> Iterator[Chunk]:
        start = 0
        for x, y, total in chunks_of(data, size, execution.batch_size, CHUNK_BYTES, forms.append):
            # What was read under inference mode could not take part in a gradient.
            x, y = (tensor.clone() if tensor.is_inference() else tensor for tensor in (x, y))
            yield Chunk(start, x, y, total)
            start += len(x)

    chunks = number()
    first = next(chunks, None)
    if first is None:
        raise InputError("data: expected at least one sample; got none")
    first = replace(first, form=" ".join(forms))
    check_batch(first.x[:1], first.y[:1], bounds=bounds)
    return first, itertools.chain([first], chunks)


def run_parts(
    model: Model | Network, plan: Plan, first: Chunk, chunks: Iterator[Chunk]
) -> Iterator[tuple[Outcome, ...]]:
    """What every chunk gave, one outcome a case, in the order of the chunks.

    Args:
        model: The network, borrowed, or made ready as well.
        plan: What to do.
        first: The first chunk, by which workers are prepared.
        chunks: All chunks, the first one included; taken as they are needed.

    Raises:
        InputError: As :func:`brittle.evaluate`.
    """
    execution, network = plan.execution, model.model if isinstance(model, Network) else model
    parts = None if first.total is None else math.ceil(first.total / len(first.x)) * len(plan.cases)
    board, kept = Board(execution.progress, first.total, parts), _folders(network, plan, first)
    # Whom to tell stays here: it need not pickle, and what a task on a cluster tells does not come back.
    plan = replace(plan, execution=replace(execution, progress=None))
    equip = partial(_equip, plan=plan, first=first)
    work = partial(_attack_chunk, plan=plan, kept=kept, board=None if execution.ray_workers else board)
    if execution.ray_workers:
        results = on_ray(equip, work, chunks, network, execution.ray_workers)
    elif execution.devices:
        results = on_devices(equip, work, chunks, network, execution.devices)
    else:
        results = map(partial(work, equip(model)), chunks)
    for outcomes in results:
        for case, outcome in zip(plan.cases, outcomes, strict=True):
            part = outcome.part  # from a folder or a cluster it comes without a word
            board.of_chunk(part.first)(f"{norm_name(case.threat.p)} attack", len(part.samples), None)
        yield outcomes


def _folders(model: Model, plan: Plan, first: Chunk) -> tuple[Kept, ...] | None:
    """The folder for every case, by fingerprints; None when nothing is kept."""
    execution = plan.execution
    if execution.resume is None:
        return None
    folder = make_folder(Path(execution.resume))
    return tuple(
        Kept(
            folder,
            fingerprint(
                model,
                (*case.threat.battery, *case.threat.further),
                [*case.settings, str(execution.certify), str(execution.proof_passes)],
                first.x,
                first.y,
            ),
            plan.examples,
        )
        for case in plan.cases
    )


def _equip(model: Model | Network, plan: Plan, first: Chunk) -> Worker:
    """Make the network ready, if it is not, and read it for certificates."""
    threat, network = plan.cases[0].threat, model
    if not isinstance(network, Network):
        network = make_ready(network, first.x, threat.bounds, compiled=plan.execution.compiled)
    if not plan.execution.certify:
        return Worker(network, (Proofs(None, "they were switched off"),) * len(plan.cases))
    radii_of = (first.total or len(first.x)) if plan.cases[0].radii else None
    pairs, spent = [(case.threat, case.eps) for case in plan.cases], plan.execution.proof_passes
    return Worker(network, read_proofs(network, first.x, first.y, pairs, passes_of(threat), radii_of, spent))


def _attack_chunk(
    worker: Worker, chunk: Chunk, *, plan: Plan, kept: tuple[Kept, ...] | None, board: Board | None = None
) -> tuple[Outcome, ...]:
    """Results of one chunk for every case, from the folder or by attacking it."""
    outcomes = []
    for number, case in enumerate(plan.cases):
        folder = None if kept is None else kept[number]
        outcome = None if folder is None else folder.read(chunk, case.threat.bounds)
        if board is not None:
            board.of_part(outcome is not None)
        if outcome is None:
            execution = replace(plan.execution, progress=None if board is None else board.of_chunk(chunk.first))
            examples = chunk.first < plan.examples
            outcome = _measure(worker.network, chunk, case, worker.proofs[number], execution, examples)
            if folder is not None:
                folder.write(chunk, outcome)
        outcomes.append(outcome)
    return tuple(outcomes)


def _measure(
    network: Network, chunk: Chunk, case: Case, proofs: Proofs, execution: Execution, examples: bool
) -> Outcome:
    """Prove what can be proven, attack the rest, and follow every sample over the budgets of the curve."""
    threat, x, y = case.threat, chunk.x, chunk.y
    certified = _certify(network, chunk, case, proofs, execution)
    worst = worst_case(network, x, y, threat, case.eps, ids=chunk.first, proven=certified.proven, execution=execution)
    survivors: tuple[int, ...] = ()
    if case.curve:
        curve = security_curve(
            network, worst, threat, at=case.eps, budgets=case.curve, radii=certified.radii, execution=execution
        )
        survivors = tuple(rate.hits for rate in curve.robust)
    samples = sample_results(worst, threat, chunk.first, certified.radii, certified.measured)
    part = Part(
        chunk.first,
        samples,
        worst.rejected,
        worst.forwards,
        worst.backwards,
        survivors,
        misled=int(worst.misled.sum()),
        tried=int(certified.tried.sum()),
        untried=proofs.untried,
    )
    return Outcome(part, worst.to("cpu") if examples else None)


@dataclass(frozen=True)
class _Certified:
    """What is proven of a chunk's samples, all ``(N,)``.

    Attributes:
        radii: Certified radii; None where neither a global bound nor a relaxation covers the network.
        proven: Whether the budget is proven.
        measured: Whether the radius was searched for by relaxations.
        tried: Whether a relaxation was tried at all.
    """

    radii: Tensor | None
    proven: Tensor
    measured: Tensor
    tried: Tensor


def _certify(network: Network, chunk: Chunk, case: Case, proofs: Proofs, execution: Execution) -> _Certified:
    """Radii from the global bound, those of some samples by relaxation, and proofs at the budget where they pay."""
    threat, nobody = case.threat, torch.zeros(len(chunk.x), dtype=torch.bool, device=network.device)
    if proofs.relaxation is None and case.lipschitz is None:
        return _Certified(None, nobody, nobody, nobody)
    check_batch(chunk.x, chunk.y, bounds=threat.bounds)
    x, y = chunk.x.to(network.device).clamp(*threat.bounds), chunk.y.to(network.device)
    logits = logits_of(network.model, x, y, execution.batch_size)
    right, radii = margins(logits, y) > 0, torch.zeros(len(x), dtype=torch.float64, device=network.device)
    if case.lipschitz is not None:
        radii = certified_radii(logits, y, case.lipschitz).to(radii)
    measured, tried = nobody.clone(), nobody.clone()
    if proofs.relaxation is not None:
        measured |= proofs.chosen(chunk.first, len(x)).to(measured)
        rows = (measured & right).nonzero()[:, 0]
        if len(rows):
            radii[rows] = measure_radii(proofs, x[rows], y[rows], threat, radii[rows], (case.eps, *case.curve))
        rows = (right & ~measured & (radii <= case.eps)).nonzero()[:, 0]
        proven, asked = prove_while_it_pays(proofs, x[rows], y[rows], threat, case.eps, passes_of(threat))
        radii[rows[proven]] = math.nextafter(case.eps, math.inf)
        tried[rows] = asked
        tried |= measured
    return _Certified(radii if case.radii else None, radii > case.eps, measured, tried)


class Board:
    """Adds up the progress of chunks that run side by side, stage by stage."""

    def __init__(self, progress: Progress | None, total: int | None, parts: int | None = None) -> None:
        """Tell ``progress``; ``total`` is the number of all samples, ``parts`` that of all parts, where known."""
        self.tell, self.total, self.parts, self.lock = rising(progress), total, parts, threading.Lock()
        self.kept, self.begun = 0, False
        self.done: dict[str, dict[int, int]] = {}

    def of_part(self, kept: bool) -> None:
        """Count a part that an earlier run has kept; before the first that is attacked, tell how many they were."""
        with self.lock:
            if not kept and not self.begun and self.kept:
                self.tell(f"parts{DONE_BEFORE}", self.kept, self.parts)
            self.kept, self.begun = self.kept + kept, self.begun or not kept

    def of_chunk(self, first: int) -> Progress:
        """The progress of the chunk that begins at sample ``first``."""

        def tell(stage: str, done: int, total: int | None) -> None:
            with self.lock:
                chunks = self.done.setdefault(stage, {})
                chunks[first] = done
                self.tell(stage, sum(chunks.values()), self.total)

        return tell


def sample_results(
    worst: WorstCase,
    threat: Threat,
    first: int = 0,
    radii: Tensor | None = None,
    measured: Tensor | None = None,
) -> tuple[SampleResult, ...]:
    """One :class:`~brittle.results.SampleResult` a sample, numbered from ``first``.

    Args:
        worst: The samples under attack.
        threat: What they were attacked by.
        first: Number of the first sample.
        radii: Certified radii ``(N,)``, where known.
        measured: Which of them relaxations searched for ``(N,)``.
    """
    names = threat.names
    finite = worst.adversarial_logits.isfinite().all(1)
    columns = {
        "label": worst.y,
        "clean_prediction": worst.clean_logits.argmax(1),
        "adversarial_prediction": worst.adversarial_logits.argmax(1),
        "clean_margin": margins(worst.clean_logits, worst.y),
        # An answer that is not finite is never right, whatever its infinities are.
        "adversarial_margin": margins(worst.adversarial_logits, worst.y).where(finite, -math.inf),
        "distance": distances(worst.x_adv, worst.x, threat.p),
        "proven": worst.proven & worst.clean_correct,
        "measured": torch.zeros_like(worst.proven) if measured is None else measured,
    }
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*map(Tensor.tolist, columns.values()), strict=True)]
    attacks, restarts = worst.attack.tolist(), worst.restart.tolist()
    certified: Sequence[float | None] = [None] * len(rows) if radii is None else radii.tolist()
    return tuple(
        SampleResult(
            index=first + number,
            attack=names[attacks[number]] if attacks[number] >= 0 else None,
            restart=restarts[number] if restarts[number] >= 0 else None,
            certified_radius=certified[number],
            **row,
        )
        for number, row in enumerate(rows)
    )


def summarise(parts: Sequence[Part], threat: Threat, eps: float) -> Evaluation:
    """Count per-sample results into an :class:`~brittle.results.Evaluation`."""
    samples = [sample for part in parts for sample in part.samples]
    right = [sample.clean_prediction == sample.label for sample in samples]
    misled = sum(part.misled for part in parts)
    attacks = (*threat.battery, *threat.further) if misled else threat.battery
    return Evaluation(
        attacks=tuple(map(attack_name, attacks)),
        p=float(threat.p),
        eps=float(eps),
        bounds=(float(threat.bounds[0]), float(threat.bounds[1])),
        restarts=threat.restarts,
        seed=threat.seed,
        settings={attack_name(attack): attack_settings(attack) for attack in attacks},
        n=len(samples),
        clean_correct=sum(right),
        robust_correct=sum(ok and s.attack is None for ok, s in zip(right, samples, strict=True)),
        rejected=sum(part.rejected for part in parts),
        largest_perturbation=max(sample.distance for sample in samples),
        samples=tuple(samples),
        proven=sum(sample.proven for sample in samples),
        forwards=sum(part.forwards for part in parts),
        backwards=sum(part.backwards for part in parts),
        misled=misled,
        tried=sum(part.tried for part in parts),
        untried=next((part.untried for part in parts if part.untried), None),
        classes=_by_class(samples),
        median_margin=_median_margin(samples),
    )


def _by_class(samples: Sequence[SampleResult]) -> tuple[ClassAccuracy, ...]:
    """Clean and robust accuracy on the samples of each class, classes rising."""
    counted: dict[int, list[int]] = {}
    for sample in samples:
        count, right = counted.setdefault(sample.label, [0, 0, 0]), sample.clean_prediction == sample.label
        for place, hit in enumerate((True, right, right and sample.attack is None)):
            count[place] += hit
    return tuple(
        ClassAccuracy(label, Rate(right, n), Rate(robust, n)) for label, (n, right, robust) in sorted(counted.items())
    )


def _median_margin(samples: Sequence[SampleResult]) -> float | None:
    """Median margin of the samples that are right without attack; None where none is."""
    known = [sample.clean_margin for sample in samples if sample.clean_prediction == sample.label]
    return float(statistics.median(known)) if known else None


def examples_of(worst: WorstCase, most: int) -> Examples | None:
    """The first samples and their examples as arrays; None for none.

    Args:
        worst: Samples under attack, from the start of the data.
        most: How many, at most.
    """
    if not most:
        return None
    kept = worst.between(0, most)
    return Examples(
        index=kept.ids.numpy(),
        x=_as_array(kept.x),
        x_adv=_as_array(kept.x_adv),
        label=_as_array(kept.y),
        clean_prediction=_as_array(kept.clean_logits.argmax(1)),
        adversarial_prediction=_as_array(kept.adversarial_logits.argmax(1)),
    )


def _as_array(tensor: Tensor) -> Any:
    """A tensor's values, in an array of their own; types that numpy lacks become float32."""
    tensor = tensor.detach().cpu().clone()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
