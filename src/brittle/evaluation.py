"""Clean and robust accuracy of a data set of any size: streamed in chunks, spread over devices, resumable, counted."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from brittle import codec
from brittle.attacks import apgd
from brittle.attacks.losses import margins
from brittle.certificates import proven_robust
from brittle.digest import digest
from brittle.errors import InputError
from brittle.files import write_text
from brittle.frozen import Model, device_of, frozen
from brittle.norms import distances
from brittle.passes import logits_of
from brittle.presets import preset
from brittle.private import private_copy
from brittle.results import Evaluation, SampleResult, Setting
from brittle.samples import Data, chunks_of
from brittle.spread import on_devices, on_ray
from brittle.worst import Attack, Threat, WorstCase, bound_options, passes_of, worst_case

Progress = Callable[[int, int | None], None]
"""Called with the samples done and, where it is known, their total."""
CHUNK_BYTES = 2**28
"""Bytes of inputs that are attacked as one pool, at most (and at least one batch)."""
CHUNK_SAMPLES = 8192
"""Samples that are attacked as one pool, at most."""


def evaluate(
    model: Model,
    data: Data,
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
        seed: Seed of the random starts; the result does not depend on ``batch_size``, apart from rounding.
        certify: Whether samples that are proven robust at the budget are left out of the attacks.
        compiled: Whether attacks run on a compiled copy (``torch.compile``); for long runs on a GPU.
        devices: Devices that share the work, each with a copy of the model; empty: the model's own. The result does
            not depend on them, apart from rounding.
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
    attacks = chosen_attacks(attack, model, first.x, first.y)
    threat = Threat(attacks, float(p), restarts, bounds, seed)
    keep = None if resume is None else _Kept.of(model, Path(resume), threat, eps, certify)
    board = _Board(progress, first.total)
    work = functools.partial(
        _part, threat=threat, eps=eps, batch_size=batch_size, certify=certify, keep=keep, compiled=compiled
    )
    parts: list[Part] = []
    tasks = _chain(first, chunks)
    if ray_workers:
        results = on_ray(functools.partial(work, board=None), tasks, model, ray_workers)
    else:
        shared = not devices and isinstance(model, nn.Module)
        quick = None
        if shared:
            quick = private_copy(model, first.x.to(device_of(model)).clamp(*bounds), compiled=compiled)
        results = on_devices(functools.partial(work, board=board, quick=quick), tasks, model, list(devices))
    for part in results:
        parts.append(part)
        board.note(parts[-1].first, len(part.samples))
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
class _Chunk:
    first: int
    x: Tensor
    y: Tensor
    total: int | None


def _numbered(data: Data, batch_size: int, small: bool) -> Iterator[_Chunk]:
    """Chunks with the number of their first sample; a few batches each where they are spread or kept."""
    if batch_size < 1:
        raise InputError(f"batch_size: expected at least 1; got {batch_size}")
    size, first = 4 * batch_size if small else CHUNK_SAMPLES, 0
    for x, y, total in chunks_of(data, size):
        bytes_each = x[0].numel() * x.element_size() if isinstance(x, Tensor) and len(x) else 1
        width = len(x) if small else max(batch_size, CHUNK_BYTES // max(1, bytes_each))
        for start in range(0, len(x), max(1, width)):
            yield _Chunk(first + start, x[start : start + width], y[start : start + width], total)
        first += len(x)


def _chain(first: _Chunk, rest: Iterator[_Chunk]) -> Iterator[_Chunk]:
    yield first
    yield from rest


@dataclass(frozen=True)
class Part:
    """What one chunk of samples gave.

    Attributes:
        first: Number of its first sample.
        samples: Per-sample results.
        rejected: Examples that were not admissible.
        forwards: Samples put through the network without gradient.
        backwards: Samples put through the network with a gradient.
        schema_version: Of the file that keeps it.
    """

    first: int
    samples: tuple[SampleResult, ...]
    rejected: int
    forwards: int
    backwards: int
    schema_version: int = 1


@dataclass(frozen=True)
class _Kept:
    """A folder with one file a chunk, named by a fingerprint of everything that its content depends on."""

    folder: Path
    settings: str

    @staticmethod
    def of(model: Model, folder: Path, threat: Threat, eps: float, certify: bool) -> _Kept:
        if not isinstance(model, nn.Module):
            kind = type(model).__name__
            raise InputError(f"resume: expected an nn.Module, whose weights can be told from others; got {kind}")
        if folder.exists() and not folder.is_dir():
            raise InputError(f"resume: expected a folder; {folder} is a file")
        weights = digest({name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)})
        attacks = [f"{_home(attack)} {attack_name(attack)} {_defaults(attack)}" for attack in threat.attacks]
        numbers = [threat.p, threat.restarts, list(threat.bounds), threat.seed, eps, certify]
        return _Kept(folder, json.dumps([str(model), weights, attacks, *map(str, numbers)]))

    def path(self, chunk: _Chunk) -> Path:
        """Where the results of a chunk lie."""
        data = digest({"x": chunk.x, "y": chunk.y})
        name = hashlib.sha256(f"{self.settings} {chunk.first} {data}".encode()).hexdigest()[:24]
        return self.folder / f"samples-{chunk.first:08d}-{name}.json"

    def read(self, chunk: _Chunk) -> Part | None:
        """The kept results of a chunk; None when there are none that can be read."""
        path = self.path(chunk)
        if not path.is_file():
            return None
        try:
            return codec.from_json(path.read_bytes(), Part, "resume", 1)
        except InputError:
            return None

    def write(self, chunk: _Chunk, part: Part) -> None:
        """Keep the results of a chunk, whole or not at all."""
        write_text(self.path(chunk), codec.to_json(part))


def _part(
    model: Model,
    chunk: _Chunk,
    *,
    threat: Threat,
    eps: float,
    batch_size: int,
    certify: bool,
    keep: _Kept | None,
    board: _Board | None,
    compiled: bool,
    quick: Model | None = None,
) -> Part:
    """Results of one chunk, from the folder or by attacking it."""
    kept = keep.read(chunk) if keep is not None else None
    if kept is not None:
        return kept
    tell = None if board is None else functools.partial(board.note, chunk.first)
    if quick is None and compiled:
        quick = private_copy(model, chunk.x.to(device_of(model)).clamp(*threat.bounds), compiled=True)
    proven = None
    if certify:
        proven = proven_robust(
            model, chunk.x, chunk.y, eps=eps, p=threat.p, bounds=threat.bounds, passes=passes_of(threat)
        )
    worst = worst_case(
        model,
        chunk.x,
        chunk.y,
        threat,
        eps,
        first=chunk.first,
        batch_size=batch_size,
        proven=proven,
        quick=quick,
        tell=tell,
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
    columns = {
        "label": worst.y,
        "clean_prediction": worst.clean_logits.argmax(1),
        "adversarial_prediction": worst.adversarial_logits.argmax(1),
        "clean_margin": margins(worst.clean_logits, worst.y),
        "adversarial_margin": margins(worst.adversarial_logits, worst.y),
        "distance": distances(worst.x_adv, worst.x, threat.p),
        "attack": worst.attack,
        "restart": worst.restart,
        "proven": worst.proven & worst.clean_correct,
    }
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*map(Tensor.tolist, columns.values()), strict=True)]
    for row in rows:
        row["attack"] = names[row["attack"]] if row["attack"] >= 0 else None
        row["restart"] = row["restart"] if row["restart"] >= 0 else None
    return [SampleResult(index, **row) for index, row in enumerate(rows, first)]


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
        settings={attack_name(attack): _defaults(attack) for attack in threat.attacks},
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


def attack_name(attack: Attack) -> str:
    """``apgd``, or ``apgd(loss='dlr', steps=50)`` for an attack with bound options."""
    if isinstance(attack, functools.partial):
        options = ", ".join(f"{name}={value!r}" for name, value in attack.keywords.items())
        return f"{attack_name(attack.func)}({options})"
    return getattr(attack, "__name__", type(attack).__name__)


def _home(attack: Attack) -> str:
    """The module that an attack comes from."""
    return _home(attack.func) if isinstance(attack, functools.partial) else str(getattr(attack, "__module__", ""))


def _defaults(attack: Attack) -> Setting:
    """The options that an attack runs with and the caller did not set, as one line."""
    parameters = inspect.signature(attack).parameters.values()
    passed = {"eps", "p", "bounds", "seed", "ids", "batch_size", "progress", *bound_options(attack)}
    simple = [q for q in parameters if q.default is not q.empty and q.name not in passed]
    return ", ".join(f"{q.name}={getattr(q.default, '__name__', q.default)!r}" for q in simple)
