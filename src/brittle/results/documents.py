"""What is saved: an audit, and the result of an attack, as frozen dataclasses that JSON gives back exactly.

Nothing here needs torch or a model, so a report can be drawn again from its JSON on any machine. A quantity that
could not be measured soundly is ``None`` and is listed by name under :attr:`Audit.not_measured`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from brittle.errors import InputError
from brittle.results.attacks import (
    CertifiedCurve,
    Evaluation,
    Flag,
    FragileSample,
    LayerResponse,
    SecurityCurve,
    UniversalResult,
    read_samples,
    samples_frame,
)
from brittle.results.checks import LARGEST, NORMS, Rule, check, rules_of
from brittle.results.examples import Pictures
from brittle.results.features import FeatureCompression
from brittle.results.layers import LayerResult, LipschitzResult, layers_frame
from brittle.results.rate import NotMeasured, Rate, Setting
from brittle.results.showing import Plotted
from brittle.results.wording import budget_in_units
from brittle.storage import codec
from brittle.storage.files import write_text

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 2
"""Of an audit's JSON. Version 1 kept a list a kind of result, each over all norms; it is still read."""
MOST_BYTES = 2**28
"""Of an audit's JSON; that of a network of thousands of layers takes a tenth."""
PICTURES = ".npz"
"""Ending of the file beside an audit's JSON that holds its pictures."""
ATTACK_SCHEMA_VERSION = 1
"""Of the JSON of an :class:`AttackResult`."""


@dataclass(frozen=True)
class Verdict:
    """The audit in plain words.

    Attributes:
        level: ``robust``, ``weakened``, ``fragile`` or ``broken`` by the share of clean accuracy that survives the
            standard budgets (at least 90 %, 50 %, 10 %, less); in place of one of the first two ``too few samples``
            where fewer than 100 are right without attack, ``unclear`` where it would rest on attacks that an honesty
            flag puts in doubt; ``no better than guessing`` where the clean accuracy is not above chance; or
            ``not attacked``.
        headline: One sentence.
        findings: What was found and why, most important first.
        decided_by: The norm that decided the level; None where none did.
    """

    level: str
    headline: str
    findings: tuple[str, ...]
    decided_by: float | None = None


@dataclass(frozen=True)
class Normalisation:
    """How a network normalises its inputs before anything else: ``(x - mean) / std``, channel by channel.

    Attributes:
        mean: In units of the input; () where no normalisation is known.
        std: Likewise.
        source: Where the numbers are from; ``""`` where only the module itself is known.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    source: str = ""

    @property
    def line(self) -> str:
        """One clause: ``normalised inside the network by mean 0.5 and std 0.25 (--mean, --std)``."""
        if not self.mean:
            return "fed as they are: no normalisation is known"
        mean, std = (", ".join(f"{value:.3g}" for value in values) for values in (self.mean, self.std))
        return f"normalised inside the network by mean {mean} and std {std}{f' ({self.source})' if self.source else ''}"


def how_fed(normalisation: Normalisation | None, evaluations: Sequence[Evaluation]) -> str:
    """One sentence: what the inputs were, how they were normalised, and the budgets in all units that are known.

    Args:
        normalisation: None where nothing is known of it, as in an older file.
        evaluations: What was attacked, one a norm, at least one.
    """
    (low, high), std = evaluations[0].bounds, () if normalisation is None else normalisation.std
    fed = f", {normalisation.line}" if normalisation is not None else ""
    budgets = "; ".join(budget_in_units(e.p, e.eps, e.bounds, std) for e in evaluations)
    return f"Inputs in [{low:g}, {high:g}]{fed}. Budgets: {budgets}."


@dataclass(frozen=True)
class Signature:
    """What makes two audits comparable.

    Attributes:
        versions: Package name to version.
        device: Where the model was evaluated.
        seed: Seed of every random choice.
        settings: All settings of the audit.
        weights: SHA-256 over names, shapes, types and bytes of the state dict; ``""`` of a function that has none.
        data: SHA-256 over the inputs and labels; None without data.
    """

    versions: dict[str, str]
    device: str
    seed: int
    settings: dict[str, Setting]
    weights: str
    data: str | None

    @property
    def line(self) -> str:
        """One line to print beside any number of the audit."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        parts = [f"{name} {version}" for name, version in self.versions.items()]
        parts += [self.device, f"seed {self.seed}", f"weights {self.weights[:12] or 'none'}"]
        parts += [f"data {self.data[:12] if self.data else 'none'}"]
        return " | ".join([*parts, f"signature {hashlib.sha256(text.encode()).hexdigest()[:12]}"])


def read_document(path: Path, name: str) -> bytes:
    """The content of a file of JSON.

    Args:
        path: The file.
        name: What to call the document in an error.

    Raises:
        InputError: There is no regular file, or one of more than 256 MB.
    """
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        got = f"{path.stat().st_size} bytes in" if path.is_file() else "no file at"
        raise InputError(f"{name}: expected a file of at most {MOST_BYTES} bytes; got {got} {path}")
    return path.read_bytes()


class Saved:
    """What audits, results of attacks, comparisons and frontiers have in common: JSON in a file."""

    def to_json(self) -> str:
        """The result as JSON (infinities as strings, without the per-sample results)."""
        return codec.to_json(self)

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_json` to ``path``, whole or not at all."""
        write_text(Path(path), self.to_json())


@dataclass(frozen=True)
class AttackResult(Saved):
    """Robust accuracy of one network under a preset's attacks: the result of ``brittle attack``.

    Attributes:
        model: What the network is called.
        evaluations: One a norm.
        not_measured: Attacks that the network does not admit, with the reason.
        signature: What makes two results comparable.
        schema_version: Of the JSON.
        seconds: How long it took.
        normalisation: How the network normalises its inputs; None in an older file.
    """

    model: str
    evaluations: tuple[Evaluation, ...]
    not_measured: tuple[NotMeasured, ...]
    signature: Signature
    schema_version: int = ATTACK_SCHEMA_VERSION
    seconds: float = field(default=0.0, compare=False)
    normalisation: Normalisation | None = None

    @property
    def how_fed(self) -> str:
        """One sentence: the inputs, their normalisation, and the budgets in all units."""
        return how_fed(self.normalisation, self.evaluations)

    def samples_frame(self) -> pd.DataFrame:
        """All per-sample results, one row a sample and budget."""
        return samples_frame(self.evaluations)

    @staticmethod
    def from_json(text: str | bytes) -> AttackResult:
        """The inverse of :meth:`to_json`.

        Raises:
            InputError: The text is not JSON, not such a result of this schema version, or holds values that no attack
                could have found.
        """
        result = codec.from_json(text, {ATTACK_SCHEMA_VERSION: AttackResult}, "attack")
        check(result, "attack")
        return result


@dataclass(frozen=True)
class NormResult:
    """Everything that an audit finds in one norm.

    Attributes:
        p: The norm: 2 or inf.
        eps: The standard budget, in input units; None without data.
        lipschitz: The network's sensitivity, from both sides.
        evaluation: Clean and robust accuracy at ``eps``; None without data.
        curve: Robust accuracy over a range of budgets; None without data.
        certified: Certified accuracy over a range of budgets; None without data or without a certified bound.
        responses: What the attack's perturbation does at each layer, in the order of the layers.
        random_responses: What a random perturbation of equal size does at each layer (random signs, p = inf, or a
            random direction, p = 2).
        class_responses: What the way to a sample of another class does at each layer: what tells the classes apart.
        most_fragile: The samples, right without attack, that the shortest perturbations found change, ten at most,
            shortest first; those that none was found for follow by their margin under attack. None in older files.
        universal: Universal perturbations within ``eps``, the one that fools most first.
        flags: The checks of whether the robust accuracy in this norm can be trusted.
    """

    p: float
    eps: float | None
    lipschitz: LipschitzResult
    evaluation: Evaluation | None = None
    curve: SecurityCurve | None = None
    certified: CertifiedCurve | None = None
    responses: tuple[LayerResponse, ...] = ()
    universal: tuple[UniversalResult, ...] = ()
    flags: tuple[Flag, ...] = ()
    random_responses: tuple[LayerResponse, ...] = ()
    class_responses: tuple[LayerResponse, ...] = ()
    most_fragile: tuple[FragileSample, ...] = ()

    @property
    def proven(self) -> Rate | None:
        """The certified accuracy at the standard budget; None without a certificate.

        Of the samples whose radii were searched for, or of all samples where more of them needed no attack.
        """
        e, curve = self.evaluation, self.certified
        if e is None or (curve is None and not e.proven):
            return None
        of_all, searched = Rate(e.proven, e.n), Rate(0, 0) if curve is None else curve.at(e.eps)
        return of_all if (of_all.value or 0.0) > (searched.value or 0.0) or not searched.n else searched

    @property
    def undecided(self) -> Rate | None:
        """Samples that withstood the attack at the standard budget without being proven robust, of those that
        :attr:`proven` counts; None without a certificate.
        """
        e, curve, proven = self.evaluation, self.certified, self.proven
        if e is None or proven is None:
            return None
        if curve is not None and proven == curve.at(e.eps):
            return curve.undecided(e)
        return Rate(e.robust_correct - e.proven, e.n)

    @property
    def best_universal(self) -> UniversalResult | None:
        """The universal perturbation that fools most, of all kinds that were tried; None where none was."""
        return max(self.universal, key=lambda result: result.fooled.hits, default=None)


@rules_of.register
def _(result: Normalisation) -> Iterable[Rule]:
    same = len(result.mean) == len(result.std) and all(value > 0 for value in result.std)
    yield same, "as many means as standard deviations, these above 0", (result.mean, result.std)


@rules_of.register
def _(verdict: Verdict) -> Iterable[Rule]:
    yield verdict.decided_by in (None, *NORMS), "decided_by of 2, inf or null", verdict.decided_by


@rules_of.register
def _(result: NormResult) -> Iterable[Rule]:
    yield result.p in NORMS, "p of 2 or inf", result.p
    parts = (result.lipschitz, result.evaluation, result.curve, result.certified, *result.responses, *result.universal)
    norms = [part.p for part in parts if part is not None] + [flag.p for flag in result.flags if flag.p is not None]
    yield set(norms) == {result.p}, f"every part in the norm {result.p:g}", norms
    eps = result.evaluation.eps if result.evaluation else None
    yield result.eps == eps, f"eps of the evaluation, {eps}", result.eps


@dataclass(frozen=True, repr=False)
class Audit(Saved, Plotted):
    """The result of :func:`brittle.audit`.

    Attributes:
        model: What the network is called.
        verdict: The audit in plain words.
        norms: What was found in each norm, in the order in which the norms were given.
        layers: One result a weight matrix, in the order of the model.
        not_measured: What could not be measured soundly, with the reason.
        signature: What makes two audits comparable.
        parameters: Parameters of the whole model.
        flags: The checks that belong to no norm: whether any robust accuracy of this network can be trusted.
        schema_version: Of the JSON.
        seconds: How long it took.
        features: By how much of what separates the classes the network decides; None where it was not measured, and in
            older files.
        normalisation: How the network normalises its inputs; None in an older file.
        source: How the network and the data were named, by option of the command line, for commands to copy; empty
            where that is not known. Left out of comparisons.
        pictures: What can be looked at where inputs are images: kept out of the JSON and of comparisons, and saved
            beside it. None of other inputs, without data, and where no such file is there.
    """

    model: str
    verdict: Verdict
    norms: tuple[NormResult, ...]
    layers: tuple[LayerResult, ...]
    not_measured: tuple[NotMeasured, ...]
    signature: Signature
    parameters: int
    flags: tuple[Flag, ...] = ()
    schema_version: int = SCHEMA_VERSION
    seconds: float = field(default=0.0, compare=False)
    features: FeatureCompression | None = None
    normalisation: Normalisation | None = None
    source: dict[str, Setting] = field(default_factory=dict, compare=False)
    pictures: Pictures | None = field(default=None, compare=False, metadata={"json": False})

    @property
    def how_fed(self) -> str:
        """One sentence: the inputs, their normalisation, and the budgets in all units; ``""`` without data."""
        evaluations = [norm.evaluation for norm in self.norms if norm.evaluation]
        return how_fed(self.normalisation, evaluations) if evaluations else ""

    def __repr__(self) -> str:
        return f"<Audit of {self.model}: {self.verdict.level}. {self.verdict.headline}>"

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_json` to ``path``, whole or not at all, and the pictures, if any, beside it as ``.npz``."""
        if self.pictures is not None:
            self.pictures.save(Path(path).with_suffix(PICTURES), self.signature.line)
        super().save(path)

    def norm(self, p: float) -> NormResult:
        """What was found in the norm ``p``.

        Raises:
            InputError: The audit did not ask for this norm.
        """
        for result in self.norms:
            if result.p == p:
                return result
        norms = " or ".join(f"{result.p:g}" for result in self.norms) or "no norm"
        raise InputError(f"p: expected {norms}, in which the audit was made; got {p}")

    @property
    def clean_accuracy(self) -> Rate | None:
        """Accuracy without attack; None without data."""
        return next((norm.evaluation.clean_accuracy for norm in self.norms if norm.evaluation), None)

    def to_frame(self) -> pd.DataFrame:
        """The layer table: one row a layer, with flat column names that say norm, fraction and side."""
        return layers_frame(self.layers)

    def samples_frame(self) -> pd.DataFrame:
        """All per-sample results at the standard budgets, one row a sample and budget."""
        return samples_frame([norm.evaluation for norm in self.norms if norm.evaluation])

    @staticmethod
    def from_json(text: str | bytes) -> Audit:
        """The inverse of :meth:`to_json`: ``Audit.from_json(a.to_json()) == a``; version 1 is read as well.

        Raises:
            InputError: The text is not JSON, not an audit of a schema version up to this one, or holds values that no
                audit could have found.
        """
        kinds: dict[int, type[Audit | _AuditVersion1]] = {1: _AuditVersion1, SCHEMA_VERSION: Audit}
        found = codec.from_json(text, kinds, "audit")
        audit = found if isinstance(found, Audit) else found.by_norm()
        check(audit, "audit")
        return audit

    @staticmethod
    def load(path: str | Path, samples: str | Path | None = None) -> Audit:
        """Read an audit that :meth:`save` wrote, with its pictures where they lie beside it.

        Args:
            path: The JSON.
            samples: The ``samples.parquet`` of the same audit, whose per-sample results are put back; None for none.

        Raises:
            InputError: As :meth:`from_json`, or there is no regular file, or one of more than 256 MB; or the samples
                are not those of the audit.
        """
        audit = Audit.from_json(read_document(Path(path), "audit")).with_pictures(Path(path))
        return audit if samples is None else audit.with_samples(read_samples(Path(samples)))

    def with_pictures(self, path: Path) -> Audit:
        """The audit with the pictures that lie beside its JSON at ``path``; as it is where those are not its own."""
        found = Pictures.read(path.with_suffix(PICTURES), self.signature.line)
        return self if found is None else dataclasses.replace(self, pictures=found)

    def with_samples(self, frame: pd.DataFrame) -> Audit:
        """The audit with the per-sample results of :meth:`samples_frame` put back.

        Raises:
            InputError: They are not those of the audit.
        """

        def filled(norm: NormResult) -> NormResult:
            evaluation = norm.evaluation and norm.evaluation.with_samples(frame)
            return dataclasses.replace(norm, evaluation=evaluation)

        return dataclasses.replace(self, norms=tuple(map(filled, self.norms)))


@rules_of.register
def _(audit: Audit) -> Iterable[Rule]:
    norms = [norm.p for norm in audit.norms]
    yield 0 < len(norms) == len(set(norms)), "results in one norm at least, and in each once", norms
    names = [layer.name for layer in audit.layers]
    yield len(set(names)) == len(names), "layers of different names", names
    yield audit.pictures is None, "no pictures in a file of JSON", "some"
    yield audit.parameters >= 0, "parameters of at least 0", audit.parameters
    yield 0 <= audit.seconds < LARGEST, "seconds of at least 0", audit.seconds


@dataclass(frozen=True)
class _AuditVersion1:
    """An audit as schema version 1 had it: a list for each kind of result, whose entries name their norm."""

    model: str
    verdict: Verdict
    evaluations: tuple[Evaluation, ...]
    curves: tuple[SecurityCurve, ...]
    layers: tuple[LayerResult, ...]
    lipschitz: tuple[LipschitzResult, ...]
    responses: tuple[LayerResponse, ...]
    universal: tuple[UniversalResult, ...]
    not_measured: tuple[NotMeasured, ...]
    signature: Signature
    parameters: int
    certified: tuple[CertifiedCurve, ...] = ()
    flags: tuple[Flag, ...] = ()
    schema_version: int = 1
    seconds: float = 0.0

    def by_norm(self) -> Audit:
        """The same audit in today's form; every audit has a Lipschitz result in each of its norms."""
        return Audit(
            model=self.model,
            verdict=self.verdict,
            norms=tuple(self._norm(lipschitz) for lipschitz in self.lipschitz),
            layers=self.layers,
            not_measured=self.not_measured,
            signature=self.signature,
            parameters=self.parameters,
            flags=tuple(flag for flag in self.flags if flag.p is None),
            seconds=self.seconds,
        )

    def _norm(self, lipschitz: LipschitzResult) -> NormResult:
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
