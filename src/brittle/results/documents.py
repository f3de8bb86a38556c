"""What an audit finds, as frozen dataclasses: counts are stored, rates derived, and JSON round-trips exactly.

Nothing here needs torch or a model, so a report can be drawn again from its JSON on any machine. A quantity that
could not be measured soundly is ``None`` and is listed by name under :attr:`Audit.not_measured`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brittle.errors import InputError
from brittle.results.wording import budget, norm_name
from brittle.storage import codec
from brittle.storage.files import write_text

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 2
"""Of an audit's JSON. Version 1 kept a list a kind of result, each over all norms; it is still read."""
ATTACK_SCHEMA_VERSION = 1
"""Of the JSON of an :class:`AttackResult`."""
FRACTIONS = (0.05, 0.10, 0.25, 0.50)
"""Fractions of the rows or singular values kept, at which every layer is described."""

Setting = str | int | float | bool | None | tuple[str | int | float, ...]


@dataclass(frozen=True)
class Rate:
    """A proportion, stored as counts: ``hits`` of ``n``."""

    hits: int
    n: int

    @property
    def value(self) -> float | None:
        """``hits / n``, in [0, 1]; None when nothing was counted."""
        return self.hits / self.n if self.n else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % interval for the underlying probability (samples taken as independent draws)."""
        if not self.n:
            return None
        z, n, p = 1.959963984540054, self.n, self.hits / self.n
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, min(centre - half, p)), min(1.0, max(centre + half, p))

    @property
    def percent(self) -> str:
        """The rate with one decimal; ``0.0 %`` and ``100.0 %`` are printed only when exactly true.

        >>> Rate(9_999, 10_000).percent, Rate(3, 3).percent, Rate(0, 0).percent
        ('99.9 %', '100.0 %', 'not measured')
        """
        if not self.n:
            return "not measured"
        tenths = round(1000 * self.hits / self.n)
        if self.hits and not tenths:
            tenths = 1
        if self.hits < self.n and tenths == 1000:
            tenths = 999
        return f"{tenths / 10:.1f} %"

    def __str__(self) -> str:
        """``97.7 % (352 of 360; 95 % interval 95.6 to 98.9)``."""
        if (interval := self.interval) is None:
            return self.percent
        low, high = interval
        return f"{self.percent} ({self.hits} of {self.n}; 95 % interval {100 * low:.1f} to {100 * high:.1f})"


@dataclass(frozen=True)
class NormBounds:
    """Bounds on an operator norm ``||A||_{p->p}``: ``lower <= ||A|| <= upper``.

    Attributes:
        p: The norm on both sides: 1, 2 or inf.
        lower: Certified lower bound.
        upper: Certified upper bound; equal to ``lower`` when the norm is exact.
        method: What attained the upper bound (``exact``, ``torus``, ``polyphase``, ``coarse grid``,
            ``filter matrix``, ``schur``, ``interior filter``).
    """

    p: float
    lower: float
    upper: float
    method: str

    @property
    def exact(self) -> bool:
        """Whether the two bounds coincide, that is, whether the norm is known exactly."""
        return self.lower == self.upper


@dataclass(frozen=True)
class LayerBound:
    """Theorem 3.1 at one layer: an operator norm bounded by (structure factor) x (scale).

    The structure factors depend on the compressibility alone and are unchanged when the matrix is scaled; multiply
    by :attr:`scale` for a bound. ``lower <= norm / scale <= sharp <= linear <= paper``.

    Attributes:
        p: inf for row (neuron) compressibility, 2 for spectral compressibility.
        k: Rows, or singular values, kept.
        k_term_error: Of the vector of row l1 norms (p = inf) or singular values (p = 2), at ``k`` with q = 1.
        spread: beta = 1 - (k-th / largest).
        k_row: Entries kept within each row (p = inf only).
        row_k_term_error: Largest within-row error at ``k_row`` with q = 2 (p = inf only).
        scale: The Frobenius norm.
        norm: Exact norm of the matrix: largest row sum of magnitudes, or largest singular value.
        lower: Structure factor of the lower bound (iv).
        sharp: Structure factor of the sharp upper bound (i).
        linear: Structure factor of the linear upper bound (ii).
        paper: Structure factor of the upper bound in the paper's form (iii), for m x n matrices; inf at spread 1.
    """

    p: float
    k: int
    k_term_error: float
    spread: float
    k_row: int | None
    row_k_term_error: float | None
    scale: float
    norm: float
    lower: float
    sharp: float
    linear: float
    paper: float


@dataclass(frozen=True)
class LayerResult:
    """Everything that is measured of one layer's matrix; needs weights only.

    Attributes:
        name: Qualified name in the model.
        kind: Type of the module, with what makes its matrix special (groups, low-rank pair, part of a fused qkv).
        shape: ``(m, n)`` of the matrix: rows are output neurons or filters.
        parameters: Weight entries stored (of both factors for a low-rank pair).
        row_error: k-term errors (q = 1) of the row l1 norms with the fractions :data:`FRACTIONS` of rows kept.
        spectral_error: The same of the singular values.
        row_spread: Spread of the row l1 norms at the same fractions.
        spectral_spread: The same of the singular values.
        row_norms: The row l1 norms, largest first (at most :data:`PROFILE_POINTS`, evenly thinned).
        singular_values: The singular values, largest first (thinned alike).
        spectrum: Number of singular values: min(m, n), or the sum of it over the groups of a convolution.
        rank: Singular values above 1e-10 of the largest.
        stable_rank: ``||W||_F^2 / ||W||_2^2``.
        nuclear_spectral_ratio: ``||W||_* / ||W||_2``.
        nuclear_frobenius_ratio: ``(||W||_* / ||W||_F)^2``.
        effective_rank: Exponential of the entropy of the normalised singular values (Roy & Vetterli 2007).
        effective_sparsity: ``(sum |W_ij| / ||W||_F)^2``, between 1 and the number of non-zeros.
        frobenius: ``||W||_F``.
        filter_norm_inf: Largest row l1 norm of the matrix (for convolutions: not the operator norm).
        filter_norm_2: Largest singular value of the matrix (for convolutions: not the operator norm).
        operator_norms: Bounds on the true operator norms, one for each p.
        bounds: Theorem 3.1, for each p and each of :data:`FRACTIONS`.
        input_size: Spatial size of the input on which a convolution's operator is taken; None: unknown or dense.
        degenerate: Whether every weight is zero.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    parameters: int
    row_error: tuple[float, ...]
    spectral_error: tuple[float, ...]
    row_spread: tuple[float, ...]
    spectral_spread: tuple[float, ...]
    row_norms: tuple[float, ...]
    singular_values: tuple[float, ...]
    spectrum: int
    rank: int
    stable_rank: float
    nuclear_spectral_ratio: float
    nuclear_frobenius_ratio: float
    effective_rank: float
    effective_sparsity: float
    frobenius: float
    filter_norm_inf: float
    filter_norm_2: float
    operator_norms: tuple[NormBounds, ...]
    bounds: tuple[LayerBound, ...]
    input_size: tuple[int, ...] | None
    degenerate: bool

    def concentration(self, p: float) -> float:
        """How many times the norm exceeds that of a flat matrix of the same shape and Frobenius norm.

        A flat matrix has equal singular values (p = 2: norm ``||W||_F / sqrt(spectrum)``, so the factor is at least
        1) or entries of one magnitude (p = inf: norm ``||W||_F sqrt(n / m)``; the factor is below 1 where rows are
        sparse and equally large). Exact for the matrix; 0 stands for the zero matrix.
        """
        m, n = self.shape
        if self.degenerate:
            return 0.0
        if p == 2:
            return self.filter_norm_2 * math.sqrt(self.spectrum) / self.frobenius
        return self.filter_norm_inf * math.sqrt(m / n) / self.frobenius

    def operator_norm(self, p: float) -> NormBounds | None:
        """The bounds for the norm ``p``; None when it was not measured."""
        return next((norm for norm in self.operator_norms if norm.p == p), None)

    def bound(self, p: float, fraction: float) -> LayerBound:
        """Theorem 3.1 for the norm ``p`` with the ``fraction`` (one of :data:`FRACTIONS`) kept."""
        return [bound for bound in self.bounds if bound.p == p][FRACTIONS.index(fraction)]


PROFILE_POINTS = 128
"""Most points kept of a layer's row-norm or singular-value profile."""


@dataclass(frozen=True)
class SampleResult:
    """One sample under attack; the verdict is recomputed from the stored adversarial example.

    Attributes:
        index: Position in the data.
        label: True class.
        clean_prediction: Class predicted without attack.
        adversarial_prediction: Class predicted on the worst example found (the clean one when none was needed).
        clean_margin: ``s_y - max_{j != y} s_j`` in logit units, without attack.
        adversarial_margin: The same on the worst example found.
        distance: ``||x_adv - x||_p`` in input units, measured on the stored example.
        attack: Name of the attack that broke it; None if it was wrong to begin with or survived.
        restart: Restart (from 0) in which it broke; None likewise.
        certified_radius: Lower bound of the distance to the nearest adversarial example, in input units: 0 for samples
            that are wrong without attack; None when no sound rule covers the network.
        proven: Not attacked, because it is proven that no perturbation within the budget breaks it.
    """

    index: int
    label: int
    clean_prediction: int
    adversarial_prediction: int
    clean_margin: float
    adversarial_margin: float
    distance: float
    attack: str | None
    restart: int | None
    certified_radius: float | None = None
    proven: bool = False


@dataclass(frozen=True)
class Evaluation:
    """Clean and robust accuracy of one model at one budget, and what was run to find it.

    Robust accuracy is an upper estimate of the true one: the attack may have missed an adversarial example, it
    cannot have invented one, since every budget and verdict was checked again on the stored example.

    Attributes:
        attacks: Names of the attacks, in the order they were run; the worst case over them counts.
        p: Norm of the budget: 2 or inf.
        eps: Budget ``||x_adv - x||_p <= eps`` in input units.
        bounds: Smallest and largest admissible input value.
        restarts: Random restarts of each attack; the worst case counts.
        seed: Seed of the random starts, which depend on the sample's index and not on the batch.
        settings: The attacks' own settings.
        n: Samples.
        clean_correct: Samples right without attack.
        robust_correct: Samples right without attack and under every attack.
        rejected: Examples that an attack returned outside the budget, the bounds or the finite numbers; not counted.
        largest_perturbation: Largest ``||x_adv - x||_p`` among the accepted examples.
        proven: Samples that were not attacked because they are proven robust at the budget.
        forwards: Samples put through the network without gradient, re-checks included.
        backwards: Samples put through the network with a gradient: what the attacks cost.
        samples: Per-sample results, kept out of the JSON (they go to Parquet) and of comparisons.
    """

    attacks: tuple[str, ...]
    p: float
    eps: float
    bounds: tuple[float, float]
    restarts: int
    seed: int
    settings: dict[str, Setting]
    n: int
    clean_correct: int
    robust_correct: int
    rejected: int
    largest_perturbation: float
    proven: int = 0
    forwards: int = 0
    backwards: int = 0
    samples: tuple[SampleResult, ...] = field(default=(), compare=False, repr=False, metadata={"json": False})

    @property
    def clean_accuracy(self) -> Rate:
        """Right without attack, over all samples."""
        return Rate(self.clean_correct, self.n)

    @property
    def robust_accuracy(self) -> Rate:
        """Right under the worst attack, over all samples."""
        return Rate(self.robust_correct, self.n)

    @property
    def fooling_rate(self) -> Rate:
        """Predictions changed by the attack, over the samples that were right without it."""
        return Rate(self.clean_correct - self.robust_correct, self.clean_correct)

    @property
    def summary(self) -> str:
        """One line: budget, clean and robust accuracy, and how many samples are proven robust."""
        proven = f"; {self.proven} proven robust" if self.proven else ""
        accuracies = f"clean {self.clean_accuracy}, robust {self.robust_accuracy}"
        return f"{norm_name(self.p)} {budget(self.eps)}: {accuracies}{proven}"

    def to_frame(self) -> pd.DataFrame:
        """The per-sample results, one row a sample."""
        import pandas as pd

        names = [f.name for f in dataclasses.fields(SampleResult)]
        frame = pd.DataFrame([[getattr(s, n) for n in names] for s in self.samples], columns=names)
        frame["certified_radius"] = frame["certified_radius"].astype("Float64")
        frame["attack"], frame["restart"] = frame["attack"].astype("string"), frame["restart"].astype("Int64")
        return frame.assign(p=self.p, eps=self.eps)


@dataclass(frozen=True)
class SecurityCurve:
    """Robust accuracy over a range of budgets (upper estimates; non-increasing in eps by construction)."""

    p: float
    eps: tuple[float, ...]
    robust: tuple[Rate, ...]


@dataclass(frozen=True)
class CertifiedCurve:
    """Certified accuracy over a range of budgets: a lower bound of the true robust accuracy, which the
    :class:`SecurityCurve` bounds from above; non-increasing in eps.

    Attributes:
        p: Norm of the budgets.
        eps: Budgets, rising: those at which the certificates of samples run out, and those of the security curve.
        certified: Samples right without attack whose certified radius exceeds the budget, at each of them.
        median_radius: Median certified radius over the samples that are right without attack; None if there are none.
    """

    p: float
    eps: tuple[float, ...]
    certified: tuple[Rate, ...]
    median_radius: float | None

    def at(self, eps: float) -> Rate:
        """Certified accuracy at a budget, or at the next larger one that was counted (then from below)."""
        for point, rate in zip(self.eps, self.certified, strict=True):
            if point >= eps:
                return rate
        return Rate(0, self.certified[-1].n)

    def undecided(self, evaluation: Evaluation) -> Rate:
        """Samples that withstood the attack of an evaluation of the same data without being proven robust."""
        return Rate(evaluation.robust_correct - self.at(evaluation.eps).hits, evaluation.n)


@dataclass(frozen=True)
class LipschitzResult:
    """Sensitivity of the logits to the input, ``sup ||s(x) - s(y)||_p / ||x - y||_p``, from both sides.

    Attributes:
        p: The norm on both sides.
        upper: Certified global upper bound, the least of ``arguments``; None when no sound rule covers the network.
        method: Name of the argument that attained ``upper``.
        unavailable: The module that forbids an upper bound and why; None when there is one.
        lower: Largest ratio or Jacobian norm found, on data and by ascent from the samples of largest Jacobian norm
            (a lower bound of the global constant); None without data.
        median_lower: Median over the samples of the norm of the logits' Jacobian.
        n: Samples at which the Jacobian was taken.
        largest_on_data: Largest of these Jacobian norms.
        arguments: Name and value of every argument that was tried; each value is a certified upper bound.
    """

    p: float
    upper: float | None
    method: str
    unavailable: str | None
    lower: float | None
    median_lower: float | None
    n: int
    largest_on_data: float | None = None
    arguments: tuple[tuple[str, float], ...] = ()

    @property
    def tightness(self) -> float | None:
        """``upper / lower``: how far the certificate may be from the truth."""
        return self.upper / self.lower if self.upper is not None and self.lower else None


@dataclass(frozen=True)
class LayerResponse:
    """What the attack's perturbation does at one layer, over the samples that were attacked.

    Attributes:
        layer: Qualified name.
        p: Norm of the attack's budget.
        k: Numbers of leading right singular directions.
        energy: Mean share of the perturbation's squared l2 norm, at the layer's input, that lies in those k
            directions (convolutions: over the patches that the filters see).
        isotropic: The share ``k / n`` that a perturbation without preferred direction would have.
        amplification: Median of ``||z_adv - z||_2 / ||z||_2`` at the layer's output.
        gain: Median of ``||z_adv - z||_2 / ||x_adv - x||_2`` at the layer's output.
        n: Samples counted in amplification and gain (energy: those whose perturbation arrives at the layer).
        excluded: Samples left out because the perturbation or the clean output was zero.
    """

    layer: str
    p: float
    k: tuple[int, ...]
    energy: tuple[float, ...]
    isotropic: tuple[float, ...]
    amplification: float | None
    gain: float | None
    n: int
    excluded: int


@dataclass(frozen=True)
class UniversalResult:
    """One perturbation for all inputs, chosen on one part of the data and judged on the other.

    Attributes:
        p: Norm of the budget.
        eps: Budget.
        kind: ``fitted`` to data by ascent, or ``data-free``: a direction read from the weights.
        direction: How it was found; for a data-free one its sign, the direction and the layer.
        fitted_on: Samples it was fitted on, or on which the sign of a data-free one was chosen.
        fooled: Predictions changed on the held-out samples that were right without it.
        random_fooled: The same for each of several random perturbations of equal size (random signs, or random
            directions).
        robust: Held-out samples right under the universal perturbation.
    """

    p: float
    eps: float
    kind: str
    direction: str
    fitted_on: int
    fooled: Rate
    random_fooled: tuple[Rate, ...]
    robust: Rate

    @property
    def random_mean(self) -> Rate:
        """The random perturbations' rate on average: counts added up, so that only the value has a meaning."""
        return Rate(sum(rate.hits for rate in self.random_fooled), sum(rate.n for rate in self.random_fooled))

    @property
    def random_range(self) -> tuple[Rate, Rate]:
        """The least and the largest rate of the random perturbations."""
        rates = sorted(self.random_fooled, key=lambda rate: rate.hits)
        return rates[0], rates[-1]


@dataclass(frozen=True)
class NotMeasured:
    """Something that was not measured, by name, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Flag:
    """One check of whether robust accuracies can be trusted, and the number that raised it or did not.

    Attributes:
        name: What was looked for.
        raised: Whether it was found: the robust accuracies it concerns must not be trusted.
        finding: What was measured, with its number.
        meaning: Why this matters, in one line.
        p: Norm of the budget whose robust accuracy it concerns; None: every norm.
    """

    name: str
    raised: bool
    finding: str
    meaning: str
    p: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The audit in plain words.

    Attributes:
        level: ``robust``, ``weakened``, ``fragile`` or ``broken`` by the share of clean accuracy that survives the
            standard budgets (at least 90 %, 50 %, 10 %, less); ``unclear`` where one of the first two would rest on
            attacks that an honesty flag puts in doubt; or ``not attacked``.
        headline: One sentence.
        findings: What was found and why, most important first.
    """

    level: str
    headline: str
    findings: tuple[str, ...]


@dataclass(frozen=True)
class Signature:
    """What makes two audits comparable.

    Attributes:
        versions: Package name to version.
        device: Where the model was evaluated.
        seed: Seed of every random choice.
        settings: All settings of the audit.
        weights: SHA-256 over names, shapes, types and bytes of the state dict.
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
        parts += [self.device, f"seed {self.seed}", f"weights {self.weights[:12]}"]
        parts += [f"data {self.data[:12] if self.data else 'none'}"]
        return " | ".join([*parts, f"signature {hashlib.sha256(text.encode()).hexdigest()[:12]}"])


@dataclass(frozen=True)
class AttackResult:
    """Robust accuracy of one network under a preset's attacks: the result of ``brittle attack``.

    Attributes:
        model: What the network is called.
        evaluations: One a norm.
        not_measured: Attacks that the network does not admit, with the reason.
        signature: What makes two results comparable.
        schema_version: Of the JSON.
        seconds: How long it took.
    """

    model: str
    evaluations: tuple[Evaluation, ...]
    not_measured: tuple[NotMeasured, ...]
    signature: Signature
    schema_version: int = ATTACK_SCHEMA_VERSION
    seconds: float = field(default=0.0, compare=False)

    def samples_frame(self) -> pd.DataFrame:
        """All per-sample results, one row a sample and budget."""
        return _samples_frame(self.evaluations)

    def to_json(self) -> str:
        """The result as JSON (infinities as strings, without the per-sample results)."""
        return codec.to_json(self)

    @staticmethod
    def from_json(text: str | bytes) -> AttackResult:
        """The inverse of :meth:`to_json`.

        Raises:
            InputError: The text is not JSON, or not such a result of this schema version.
        """
        return codec.from_json(text, {ATTACK_SCHEMA_VERSION: AttackResult}, "attack")

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_json` to ``path``, whole or not at all."""
        write_text(Path(path), self.to_json())


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
        universal: Universal perturbations within ``eps``.
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


@dataclass(frozen=True)
class Audit:
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
        import pandas as pd

        return pd.DataFrame([_layer_row(layer) for layer in self.layers])

    def samples_frame(self) -> pd.DataFrame:
        """All per-sample results at the standard budgets, one row a sample and budget."""
        return _samples_frame([norm.evaluation for norm in self.norms if norm.evaluation])

    def to_json(self) -> str:
        """The audit as JSON (infinities as strings, without the per-sample results)."""
        return codec.to_json(self)

    @staticmethod
    def from_json(text: str | bytes) -> Audit:
        """The inverse of :meth:`to_json`: ``Audit.from_json(a.to_json()) == a``; version 1 is read as well.

        Raises:
            InputError: The text is not JSON, or not an audit of a schema version up to this one.
        """
        kinds: dict[int, type[Audit | _AuditVersion1]] = {1: _AuditVersion1, SCHEMA_VERSION: Audit}
        audit = codec.from_json(text, kinds, "audit")
        return audit if isinstance(audit, Audit) else audit.by_norm()

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_json` to ``path``, whole or not at all."""
        write_text(Path(path), self.to_json())

    @staticmethod
    def load(path: str | Path) -> Audit:
        """Read an audit that :meth:`save` wrote."""
        return Audit.from_json(Path(path).read_bytes())


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


def _samples_frame(evaluations: Sequence[Evaluation]) -> pd.DataFrame:
    import pandas as pd

    frames = [evaluation.to_frame() for evaluation in evaluations]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _layer_row(layer: LayerResult) -> dict[str, Any]:
    row: dict[str, Any] = {
        f.name: getattr(layer, f.name) for f in dataclasses.fields(layer) if f.type in ("str", "int", "float", "bool")
    }
    row |= {"rows": layer.shape[0], "columns": layer.shape[1]}
    for vector in ("row_error", "spectral_error", "row_spread", "spectral_spread"):
        for fraction, value in zip(FRACTIONS, getattr(layer, vector), strict=True):
            row[f"{vector}_{fraction:.0%}".replace("%", "pct")] = value
    for norm in layer.operator_norms:
        row |= {f"operator_norm_{norm.p:g}_lower": norm.lower, f"operator_norm_{norm.p:g}_upper": norm.upper}
        row[f"operator_norm_{norm.p:g}_method"] = norm.method
        row[f"concentration_{norm.p:g}"] = layer.concentration(norm.p)
    for p in sorted({bound.p for bound in layer.bounds}):
        bound = layer.bound(p, 0.10)
        for side in ("lower", "sharp", "linear", "paper"):
            row[f"structure_{p:g}_{side}_10pct"] = getattr(bound, side)
    return row
