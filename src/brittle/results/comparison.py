"""Networks side by side: their audits, which samples each loses and wins, and which layers are the same in all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from brittle.errors import InputError
from brittle.results.attacks import Evaluation, SampleResult
from brittle.results.checks import LARGEST, NORMS, Rule, check, counts, rules_of
from brittle.results.compression import CompressionRecipe
from brittle.results.documents import Audit, NormResult, Saved, read_document
from brittle.results.layers import FRACTIONS, LayerResult, layers_frame
from brittle.results.methods import Argument
from brittle.results.rate import NotMeasured, Rate
from brittle.results.showing import Plotted
from brittle.results.size import Latency, NetworkSize
from brittle.storage import codec

if TYPE_CHECKING:
    import pandas as pd

COMPARISON_SCHEMA_VERSION = 1
"""Of a comparison's JSON."""
SIGNIFICANT = 0.05
"""Level of the paired (McNemar) tests: below it a difference counts as clear."""
KINDS = ("clean", "robust", "certified")
"""What a sample's verdict may be about: right without attack, under attack, or proven right within the budget."""
PAIR = "low-rank pair"
"""In the kind of a layer that is two factors."""
HEAD = FRACTIONS.index(0.10)
"""Of a layer's rows and singular values, the share that a network's structure is summed up by."""


def mcnemar(lost: int, won: int) -> float:
    """Two-sided exact McNemar test: the p-value of "both networks are right equally often", from paired verdicts.

    Only the samples on which the two differ count; under the hypothesis each is a fair coin (McNemar 1947), so that p
    is twice the share of the ``2^(lost + won)`` outcomes in which the rarer side comes up ``min(lost, won)`` times or
    less, and 1 at most. Counted in integers.

    Args:
        lost: Samples that the first network alone has right.
        won: Samples that the second alone has right.

    >>> mcnemar(6, 0), mcnemar(3, 3), mcnemar(0, 0)
    (0.03125, 1.0, 1.0)
    """
    outcomes, tail = 1, 1
    for k in range(min(lost, won)):
        outcomes = outcomes * (lost + won - k) // (k + 1)
        tail += outcomes
    return min(1.0, 2 * tail / 2 ** (lost + won))


@dataclass(frozen=True)
class Paired:
    """One network's verdicts against the first network's, sample by sample.

    Attributes:
        kind: Of :data:`KINDS`.
        p: Norm of the budget; None without attack.
        eps: Budget, in input units; None without attack.
        n: Samples with a verdict on both networks.
        lost: Numbers of the samples that the first network has right and this one has not, rising.
        won: Numbers of the samples that this one has right and the first one has not, rising.
    """

    kind: str
    p: float | None
    eps: float | None
    n: int
    lost: tuple[int, ...]
    won: tuple[int, ...]

    @property
    def p_value(self) -> float:
        """Of the two-sided exact McNemar test; differences of several networks and norms are not corrected for."""
        return mcnemar(len(self.lost), len(self.won))

    @property
    def clear(self) -> bool:
        """Whether the difference is beyond chance at the level :data:`SIGNIFICANT`."""
        return self.p_value < SIGNIFICANT

    @property
    def points(self) -> float:
        """Accuracy minus the first network's over these samples, in percentage points."""
        return 100 * (len(self.won) - len(self.lost)) / self.n if self.n else 0.0


@dataclass(frozen=True)
class ComparedNetwork:
    """One of the networks.

    Attributes:
        name: What it is called among the others.
        audit: Its audit.
        size: Parameters, multiply-accumulates and bytes; None for an audit that was read from a file.
        paired: Its verdicts against the first network's; none for the first, and where samples were not kept.
    """

    name: str
    audit: Audit
    size: NetworkSize | None = None
    paired: tuple[Paired, ...] = ()

    @property
    def clean(self) -> Rate | None:
        """Accuracy without attack; None without data."""
        return self.audit.clean_accuracy

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """The evaluations at the standard budgets, one a norm; none without data."""
        return tuple(norm.evaluation for norm in self.audit.norms if norm.evaluation)

    @property
    def spectral_head(self) -> float | None:
        """Share of the singular values' sum in their largest tenth, mean over hidden layers; None without layers."""
        return self._head(lambda layer: layer.spectral_error)

    @property
    def row_head(self) -> float | None:
        """Share of the row l1 norms' sum in the largest tenth of the rows, likewise."""
        return self._head(lambda layer: layer.row_error)

    def _head(self, errors: Callable[[LayerResult], tuple[float, ...]]) -> float | None:
        hidden = self.audit.layers[:-1] or self.audit.layers
        return 1 - sum(errors(layer)[HEAD] for layer in hidden) / len(hidden) if hidden else None

    def robust(self, p: float) -> Rate | None:
        """Robust accuracy at the standard budget of the norm p, an upper estimate; None without data."""
        evaluation = self.audit.norm(p).evaluation
        return evaluation.robust_accuracy if evaluation else None

    def product(self, p: float) -> float | None:
        """Product of operator norms: the upper bound of the Lipschitz constant that Theorem 3.1 speaks of."""
        lipschitz = self.audit.norm(p).lipschitz
        return lipschitz.upper if lipschitz.product is None else lipschitz.product

    def upper(self, p: float) -> float | None:
        """Certified upper bound of the network's Lipschitz constant, the least of all arguments."""
        return self.audit.norm(p).lipschitz.upper

    def lower(self, p: float) -> float | None:
        """Largest sensitivity found, on data and by ascent: a lower bound of the same constant."""
        return self.audit.norm(p).lipschitz.lower

    @property
    def median_margin(self) -> float | None:
        """Median margin over the samples that are right without attack, in logit units: an estimate."""
        return next((e.median_margin for e in self.evaluations), None)

    def reach(self, p: float) -> float | None:
        """Margin over sensitivity, the median over samples that are right without attack: to first order the distance
        to the nearest wrong answer, an estimate.
        """
        return self.audit.norm(p).lipschitz.reach

    def alignment(self, p: float) -> float | None:
        """What the alignments of neighbouring layers leave of the product of norms, at most 1: Theorem 3.2 with exact
        norms, the disjoint pairs (inf) or all pairs (2); an upper bound. None where that argument does not apply.
        """
        arguments = dict(self.audit.norm(p).lipschitz.arguments)
        aligned = arguments.get(Argument.DISJOINT_PAIRS if math.isinf(p) else Argument.ALL_PAIRS)
        product = arguments.get(Argument.PRODUCT)
        return aligned / product if aligned is not None and product and product < math.inf else None

    def test(self, kind: str, p: float | None = None) -> Paired | None:
        """Its verdicts of a kind against the first network's; None where there are none."""
        return next((paired for paired in self.paired if (paired.kind, paired.p) == (kind, p)), None)


@dataclass(frozen=True)
class LayerRow:
    """One layer in all networks.

    Attributes:
        name: As the first network that has it calls it.
        layers: One a network, in their order; None where a network has no such layer.
    """

    name: str
    layers: tuple[LayerResult | None, ...]


@dataclass(frozen=True, repr=False)
class Comparison(Saved, Plotted):
    """The result of :func:`brittle.compare`: networks that were audited alike, on the same samples.

    Attributes:
        networks: In the order given; the first is the one that the others are compared with.
        latency: Times of a pass, one row a network and batch size; none where they were not taken.
        title: What the page is called.
        about: How the networks came about and what to keep in mind, a paragraph each.
        not_measured: What of the comparison could not be measured, with the reason; what one network lacks stands in
            its audit.
        compression: How the second network was made of the first; None where it was not.
        schema_version: Of the JSON.
        seconds: How long it took.
    """

    networks: tuple[ComparedNetwork, ...]
    latency: tuple[Latency, ...] = ()
    title: str = "Networks side by side"
    about: tuple[str, ...] = ()
    not_measured: tuple[NotMeasured, ...] = ()
    compression: CompressionRecipe | None = None
    schema_version: int = COMPARISON_SCHEMA_VERSION
    seconds: float = field(default=0.0, compare=False)

    def __repr__(self) -> str:
        names = ", ".join(network.name for network in self.others)
        return f"<Comparison: {names} beside {self.first.name}>"

    @property
    def first(self) -> ComparedNetwork:
        """The network that the others are compared with."""
        return self.networks[0]

    @property
    def others(self) -> tuple[ComparedNetwork, ...]:
        """All networks but the first."""
        return self.networks[1:]

    @property
    def norms(self) -> tuple[float, ...]:
        """The norms in which all networks were audited."""
        return tuple(norm.p for norm in self.first.audit.norms)

    @property
    def layers(self) -> tuple[LayerRow, ...]:
        """Layers of the same name side by side, in the order of the first network; then those that it lacks.

        A low-rank pair ``1.0`` stands for the layer ``1``. Where a network shares no name with the first, a prefix that
        all names of a network have is left out: ``model.1`` is then ``1``.
        """
        first, count = self.first.audit.layers, len(self.networks)
        rows: dict[str, list[LayerResult | None]] = {}
        for place, network in enumerate(self.networks):
            layers = network.audit.layers
            for name, layer in zip(_names_as_in(first, layers), layers, strict=True):
                rows.setdefault(name, [None] * count)[place] = layer
        return tuple(LayerRow(name, tuple(layers)) for name, layers in rows.items())

    def to_frame(self) -> pd.DataFrame:
        """The layer tables of all networks: one row a layer and network, whose names stand in ``network``."""
        import pandas as pd

        frames = [layers_frame(network.audit.layers).assign(network=network.name) for network in self.networks]
        return pd.concat(frames, ignore_index=True)

    def samples_frame(self) -> pd.DataFrame:
        """The per-sample results of all networks, whose names stand in ``network``; no rows without data."""
        import pandas as pd

        frames = [network.audit.samples_frame().assign(network=network.name) for network in self.networks]
        return pd.concat(frames, ignore_index=True)

    @staticmethod
    def from_json(text: str | bytes) -> Comparison:
        """The inverse of :meth:`to_json`: ``Comparison.from_json(c.to_json()) == c``.

        Raises:
            InputError: The text is not JSON, not a comparison of this schema version, or holds values that no
                comparison could have found.
        """
        comparison = codec.from_json(text, {COMPARISON_SCHEMA_VERSION: Comparison}, "comparison")
        check(comparison, "comparison")
        return comparison

    @staticmethod
    def load(path: str | Path) -> Comparison:
        """Read a comparison that :meth:`save` wrote.

        Raises:
            InputError: As :meth:`from_json`, or there is no regular file, or one of more than 256 MB.
        """
        return Comparison.from_json(read_document(Path(path), "comparison"))


def paired_verdicts(first: Sequence[NormResult], other: Sequence[NormResult]) -> tuple[Paired, ...]:
    """The verdicts of two networks, sample by sample: clean, then robust and certified in every norm.

    Robust is a sample that is right without attack and that no attack broke; certified one that is right and proven so
    within the budget, over the samples on which proofs were searched for in both. Nothing is paired where results do
    not hold their samples (files keep them apart).

    Args:
        first: What was found of the network that the other is compared with, norm by norm.
        other: Of the same data, norms and budgets.
    """
    found: list[Paired] = []
    for ours, theirs in zip(first, other, strict=True):
        if not (ours.evaluation and ours.evaluation.samples and theirs.evaluation and theirs.evaluation.samples):
            continue
        pair, p, eps = (ours, theirs), ours.p, ours.evaluation.eps
        if not found:
            found.append(_pair("clean", None, None, *(_verdicts(norm, "clean") for norm in pair)))
        found.append(_pair("robust", p, eps, *(_verdicts(norm, "robust") for norm in pair)))
        if ours.certified and theirs.certified:
            found.append(_pair("certified", p, eps, *(_verdicts(norm, "certified") for norm in pair)))
    return tuple(found)


def _verdicts(norm: NormResult, kind: str) -> dict[int, bool]:
    """Whether each sample's verdict is the good one, by its number."""
    assert norm.evaluation is not None
    samples, eps = norm.evaluation.samples, norm.evaluation.eps
    if kind == "certified":
        searched = [sample for sample in samples if sample.measured]
        samples = tuple(searched or (sample for sample in samples if sample.certified_radius is not None))
    holds: dict[str, Callable[[SampleResult], bool]] = {
        "clean": lambda sample: True,
        "robust": lambda sample: sample.attack is None,
        "certified": lambda sample: sample.proven or (sample.certified_radius or 0.0) > eps,
    }
    return {s.index: s.clean_prediction == s.label and holds[kind](s) for s in samples}


def _pair(kind: str, p: float | None, eps: float | None, first: dict[int, bool], other: dict[int, bool]) -> Paired:
    both = sorted(first.keys() & other.keys())
    lost = tuple(index for index in both if first[index] and not other[index])
    won = tuple(index for index in both if other[index] and not first[index])
    return Paired(kind, p, eps, len(both), lost, won)


def _names_as_in(first: Sequence[LayerResult], layers: Sequence[LayerResult]) -> list[str]:
    """The names of some layers, those of the first network's where they are the same but for a common prefix."""
    names, theirs = _plain_names(layers), _plain_names(first)
    if set(names) & set(theirs):
        return names
    full = dict(zip(_without_prefix(theirs), theirs, strict=True))
    return [full.get(short, name) for short, name in zip(_without_prefix(names), names, strict=True)]


def _plain_names(layers: Sequence[LayerResult]) -> list[str]:
    """Names of layers; a low-rank pair, which is read at its first factor, has that of the layer that it stands for."""
    own = {layer.name for layer in layers}
    whole = [layer.name.removesuffix(".0") if PAIR in layer.kind else layer.name for layer in layers]
    return [layer.name if name in own else name for layer, name in zip(layers, whole, strict=True)]


def _without_prefix(names: Sequence[str]) -> list[str]:
    """Dotted names without the parts at the start that all share; the last part always stays."""
    parts = [name.split(".") for name in names]
    while parts and all(len(rest) > 1 for rest in parts) and len({rest[0] for rest in parts}) == 1:
        parts = [rest[1:] for rest in parts]
    return [".".join(rest) for rest in parts]


def check_alike(named: Sequence[tuple[str, Audit]]) -> None:
    """Raise where audits cannot stand side by side: of other data, norms or budgets than the first.

    Raises:
        InputError: The first audit that differs, with what it differs in.
    """
    for holds, expected, got in _alike(named):
        if not holds:
            raise InputError(f"networks: expected {expected}; got {got}")


def _alike(named: Sequence[tuple[str, Audit]]) -> Iterable[Rule]:
    """What must be the same in all audits."""
    for name, audit in named[1:]:
        for (what, first), other in zip(_conditions(named[0][1]).items(), _conditions(audit).values(), strict=True):
            yield first == other, f"audits with the same {what}", f"{first} ({named[0][0]}) and {other} ({name})"


def _conditions(audit: Audit) -> dict[str, str]:
    """What an audit was made on."""
    return {
        "data": (audit.signature.data or "none")[:12],
        "norms": ", ".join(f"{norm.p:g}" for norm in audit.norms),
        "budgets": ", ".join(f"{norm.eps:g}" for norm in audit.norms if norm.eps is not None),
    }


@rules_of.register
def _(paired: Paired) -> Iterable[Rule]:
    yield paired.kind in KINDS, f"kind of {' or '.join(KINDS)}", paired.kind
    budget = (paired.p, paired.eps)
    clean = paired.kind == "clean"
    yield (budget == (None, None)) == clean, "p and eps, but of clean verdicts", budget
    yield paired.p in (None, *NORMS), "p of 2 or inf", paired.p
    yield paired.eps is None or 0 < paired.eps < math.inf, "a finite eps above 0", paired.eps
    yield counts(paired, "n")
    for name, numbers in (("lost", paired.lost), ("won", paired.won)):
        yield list(numbers) == sorted(set(numbers)), f"rising numbers of samples as {name}", numbers
        yield min(numbers, default=0) >= 0, f"numbers of at least 0 as {name}", numbers
    both = set(paired.lost) & set(paired.won)
    yield not both, "samples that are either lost or won", sorted(both)
    yield len(paired.lost) + len(paired.won) <= paired.n, f"at most {paired.n} samples lost and won", paired.n


@rules_of.register
def _(network: ComparedNetwork) -> Iterable[Rule]:
    tests = [(paired.kind, paired.p) for paired in network.paired]
    yield len(set(tests)) == len(tests), "verdicts of each kind and norm once", tests
    norms = {norm.p: norm.eps for norm in network.audit.norms}
    for paired in network.paired:
        yield paired.p is None or norms.get(paired.p) == paired.eps, "the budgets of the audit", (paired.p, paired.eps)


@rules_of.register
def _(comparison: Comparison) -> Iterable[Rule]:
    names = [network.name for network in comparison.networks]
    yield 0 < len(names) == len(set(names)), "networks of different names, one at least", names
    yield not comparison.first.paired, "no verdicts of the first network against itself", len(comparison.first.paired)
    yield from _alike([(network.name, network.audit) for network in comparison.networks])
    timed = {row.network for row in comparison.latency}
    yield timed <= set(names), "times of these networks", sorted(timed)
    yield 0 <= comparison.seconds < LARGEST, "seconds of at least 0", comparison.seconds
