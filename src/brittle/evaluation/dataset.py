"""Clean and robust accuracy of a data set of any size: streamed in chunks, spread over devices, resumable, counted."""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from brittle.attacks import apgd
from brittle.attacks.losses import margins
from brittle.attacks.region import check_budget
from brittle.bounds.relaxation.certify import Relaxation
from brittle.data.batches import DataLike, chunks_of
from brittle.data.checks import check_batch
from brittle.errors import InputError
from brittle.evaluation.certify import covered, worthwhile_relaxation
from brittle.evaluation.naming import attack_name, attack_settings
from brittle.evaluation.parts import Kept, Part
from brittle.evaluation.presets import preset
from brittle.evaluation.worst_case import Attack, Threat, WorstCase, passes_of, worst_case
from brittle.linear.norms import distances
from brittle.models.borrow import Model, device_of, frozen
from brittle.models.fast_copy import copy_for_attacks
from brittle.models.forward import logits_of
from brittle.models.workers import on_devices, on_ray
from brittle.results import Evaluation, SampleResult

Progress = Callable[[int, int | None], None]
"""Called with the samples done and, where it is known, their total."""
CHUNK_BYTES = 2**28
"""Bytes of inputs that are attacked as one pool, at most (and at least one batch)."""
CHUNK_SAMPLES = 8192
"""Samples that are attacked as one pool, at most."""


def evaluate(
    model: Model,
    data: DataLike,
    *,
    attack: str | Attack | Sequence[Attack] = apgd,
    eps: float,
    p: float = math.inf,
    restarts: int = 1,
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 256,
    seed: int = 0,
    certify: bool = True,
    compiled: bool = False,
    devices: Sequence[str] = (),
    ray_workers: int = 0,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Clean and robust accuracy under the worst case over attacks and restarts.

    Samples that are wrong without attack are not attacked, nor are samples that broke, nor those that a certificate
    covers (relaxations, theory page; tried on a few samples first and left off where they prove little). A sample
    leaves the batch when it breaks, and a waiting one takes its place; attacks of this package run on a private copy
    with batch norms folded. None of this changes a verdict, apart from rounding. Every example is re-checked on the
    model itself: ``||x_adv - x||_p <= eps (1 + 1e-6)`` (and float rounding at the bounds), values within the bounds
    and finite, prediction recomputed; an example that fails is rejected and counted, never credited.

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``; left bit-equal. Evaluated in eval mode.
        data: A :class:`brittle.data.Data`, ``(inputs, labels)`` tensors, an iterable of batches ``(x, y)`` (streamed,
            never held whole), or a Dataset; inputs within ``bounds``.
        attack: The name of a preset (``fast``, ``standard``, ``thorough``), one attack or several; anything called
            ``(model, x, y, *, eps, p)``. ``bounds``, ``seed``, ``ids`` and ``batch_size`` are passed to attacks that
            have them. Options are bound with ``functools.partial`` and recorded.
        eps: Budget, at least 0, in input units.
        p: Norm of the budget: 2 or inf.
        restarts: Runs of every attack, each with a new seed.
        bounds: Smallest and largest admissible input value.
        batch_size: Samples at once; halved when memory runs out.
        seed: Seed of the random starts; verdicts do not depend on ``batch_size``, apart from rounding.
        certify: Whether samples that are proven robust at the budget are left out of the attacks.
        compiled: Whether attacks run on a compiled copy (``torch.compile``); for long runs on a GPU.
        devices: Devices that share the work, each with a copy of the model; empty: the model's own. Verdicts do not
            depend on them, apart from rounding (which samples certificates are tried on does, and so ``proven``).
        ray_workers: Tasks at once on a Ray cluster; 0 for none. The extra ``cluster``.
        resume: A folder that keeps what is done; running the same call again goes on where it stopped.
        progress: Called as samples are done.

    Returns:
        Counts, what was run, and per-sample results. Robust accuracy is an upper estimate of the true one.

    Raises:
        InputError: An argument is out of range, the data hold NaN, values outside the bounds, or labels that the
            model does not have; the message names the argument, what was expected and what came.
    """
    if ray_workers < 0 or (ray_workers and devices):
        raise InputError(f"ray_workers: expected at least 0, and 0 with devices; got {ray_workers}")
    spread = bool(devices) or ray_workers > 0 or resume is not None
    chunks = _numbered(data, batch_size, small=spread)
    first = next(chunks, None)
    if first is None:
        raise InputError("data: expected at least one sample; got none")
    check_batch(first.x[:1], first.y[:1], bounds=bounds)
    check_budget(eps, p, 1)
    attacks = chosen_attacks(attack, model, first.x, first.y)
    threat = Threat(attacks, float(p), restarts, bounds, seed)
    plan = _Plan(threat, eps, batch_size, certify, compiled)
    keep = None if resume is None else Kept.of(model, Path(resume), plan.settings, threat.attacks, first.x, first.y)
    board = _Board(progress, first.total)
    prepare = functools.partial(_prepared, plan=plan, x=first.x, y=first.y)
    work = functools.partial(_part, plan=plan, keep=keep)
    tasks = itertools.chain([first], chunks)
    if ray_workers:
        results = on_ray(prepare, functools.partial(work, board=None), tasks, model, ray_workers)
    else:
        results = on_devices(prepare, functools.partial(work, board=board), tasks, model, list(devices))
    parts: list[Part] = []
    for part in results:
        parts.append(part)
        board.note(part.first, len(part.samples))
    return summarise(parts, threat, eps)


def chosen_attacks(attack: str | Attack | Sequence[Attack], model: Model, x: Tensor, y: Tensor) -> tuple[Attack, ...]:
    """The attacks that a preset's name, one attack or several stand for.

    Args:
        attack: As :func:`evaluate`.
        model: The network, asked for its number of classes when a preset is named.
        x: At least one input.
        y: Its label.
    """
    if not isinstance(attack, str):
        return (attack,) if callable(attack) else tuple(attack)
    return preset(attack, class_count(model, x, y))[0]


def class_count(model: Model, x: Tensor, y: Tensor) -> int:
    """The number of classes of a network, from its logits for one input."""
    device = device_of(model)
    with frozen(model):
        return logits_of(model, x[:1].to(device), y[:1].to(device)).shape[1]


@dataclass(frozen=True)
class Chunk:
    """Samples that are attacked as one pool.

    Attributes:
        first: Number of the first one.
        x: Inputs ``(N, ...)``.
        y: Labels ``(N,)``.
        total: Samples of the data set, where known.
    """

    first: int
    x: Tensor
    y: Tensor
    total: int | None


def _numbered(data: DataLike, batch_size: int, small: bool) -> Iterator[Chunk]:
    """Chunks with the number of their first sample; a few batches each where they are spread or kept."""
    if batch_size < 1:
        raise InputError(f"batch_size: expected at least 1; got {batch_size}")
    first = 0
    for x, y, total in chunks_of(data, 4 * batch_size if small else CHUNK_SAMPLES, batch_size, CHUNK_BYTES):
        yield Chunk(first, x, y, total)
        first += len(x)


@dataclass(frozen=True)
class _Plan:
    """What is done with every chunk."""

    threat: Threat
    eps: float
    batch_size: int
    certify: bool
    compiled: bool

    @property
    def settings(self) -> list[str]:
        """Everything but the attacks that results depend on."""
        threat = self.threat
        return [str(v) for v in (threat.p, threat.restarts, *threat.bounds, threat.seed, self.eps, self.certify)]


@dataclass(frozen=True)
class _Worker:
    """A network with what was made of it once."""

    model: Model
    quick: Model
    relaxation: Relaxation | None


def _prepared(model: Model, *, plan: _Plan, x: Tensor, y: Tensor) -> _Worker:
    """The private copy, and the relaxation where certificates are worth their cost."""
    threat, relaxation = plan.threat, None
    if plan.certify:
        passes = passes_of(threat)
        relaxation = worthwhile_relaxation(model, x, y, eps=plan.eps, p=threat.p, bounds=threat.bounds, passes=passes)
    quick = copy_for_attacks(model, x.to(device_of(model)).clamp(*threat.bounds), compiled=plan.compiled)
    return _Worker(model, quick, relaxation)


def _part(worker: _Worker, chunk: Chunk, *, plan: _Plan, keep: Kept | None, board: _Board | None) -> Part:
    """Results of one chunk, from the folder or by attacking it."""
    kept = keep.read(chunk) if keep is not None else None
    if kept is not None:
        return kept
    threat, eps = plan.threat, plan.eps
    proven = None
    if worker.relaxation is not None:
        classes = worker.relaxation.classes
        check_batch(chunk.x, chunk.y, bounds=threat.bounds, classes=classes)
        proven = covered(
            worker.relaxation, chunk.x, chunk.y, eps=eps, p=threat.p, bounds=threat.bounds, passes=passes_of(threat)
        )
    worst = worst_case(
        worker.model,
        chunk.x,
        chunk.y,
        threat,
        eps,
        first=chunk.first,
        batch_size=plan.batch_size,
        proven=proven,
        quick=worker.quick,
        tell=None if board is None else functools.partial(board.note, chunk.first),
    )
    part = part_of(worst, threat, first=chunk.first)
    if keep is not None:
        keep.write(chunk, part)
    return part


class _Board:
    """Adds up the progress of chunks that run side by side."""

    def __init__(self, progress: Progress | None, total: int | None) -> None:
        self.progress, self.total, self.lock = progress, total, threading.Lock()
        self.done: dict[int, float] = {}
        self.told = 0

    def note(self, first: int, done: float) -> None:
        """The chunk that begins at sample ``first`` has come that far."""
        if self.progress is not None:
            with self.lock:
                self.done[first] = done
                now = int(sum(self.done.values()))
                if now > self.told:
                    self.told = now
                    self.progress(now, self.total)


def part_of(worst: WorstCase, threat: Threat, *, first: int = 0) -> Part:
    """The results of samples numbered from ``first``."""
    samples = tuple(sample_results(worst, threat, first=first))
    return Part(first, samples, worst.rejected, worst.forwards, worst.backwards)


def sample_results(worst: WorstCase, threat: Threat, *, first: int = 0) -> list[SampleResult]:
    """One :class:`~brittle.results.SampleResult` a sample, numbered from ``first``."""
    names = [attack_name(attack) for attack in threat.attacks]
    columns = (
        worst.y,
        worst.clean_logits.argmax(1),
        worst.adversarial_logits.argmax(1),
        margins(worst.clean_logits, worst.y),
        margins(worst.adversarial_logits, worst.y).nan_to_num(nan=-math.inf),
        distances(worst.x_adv, worst.x, threat.p),
        worst.attack,
        worst.restart,
        worst.proven & worst.clean_correct,
    )
    return [
        SampleResult(
            index=index,
            label=label,
            clean_prediction=clean,
            adversarial_prediction=adversarial,
            clean_margin=clean_margin,
            adversarial_margin=margin,
            distance=distance,
            attack=names[attack] if attack >= 0 else None,
            restart=restart if restart >= 0 else None,
            proven=proven,
        )
        for index, (label, clean, adversarial, clean_margin, margin, distance, attack, restart, proven) in enumerate(
            zip(*map(Tensor.tolist, columns), strict=True), first
        )
    ]


def summarise(parts: Sequence[Part], threat: Threat, eps: float) -> Evaluation:
    """Count per-sample results into an :class:`~brittle.results.Evaluation`."""
    samples = [sample for part in parts for sample in part.samples]
    right = [s.clean_prediction == s.label for s in samples]
    return Evaluation(
        attacks=tuple(attack_name(attack) for attack in threat.attacks),
        p=float(threat.p),
        eps=float(eps),
        bounds=(float(threat.bounds[0]), float(threat.bounds[1])),
        restarts=threat.restarts,
        seed=threat.seed,
        settings={attack_name(attack): attack_settings(attack) for attack in threat.attacks},
        n=len(samples),
        clean_correct=sum(right),
        robust_correct=sum(ok and s.attack is None for ok, s in zip(right, samples, strict=True)),
        rejected=sum(part.rejected for part in parts),
        largest_perturbation=max(s.distance for s in samples),
        samples=tuple(samples),
        proven=sum(s.proven for s in samples),
        forwards=sum(part.forwards for part in parts),
        backwards=sum(part.backwards for part in parts),
    )
