"""Compressed networks of many ratios and allocations on the same samples: what robustness each size leaves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brittle.results.attacks import Evaluation
from brittle.results.checks import LARGEST, Rule, check, rules_of
from brittle.results.comparison import Paired
from brittle.results.compression import CompressionRequest
from brittle.results.documents import NormResult, Saved, Signature, read_document
from brittle.results.methods import Argument
from brittle.results.rate import Rate
from brittle.results.size import NetworkSize
from brittle.storage import codec

if TYPE_CHECKING:
    import pandas as pd

FRONTIER_SCHEMA_VERSION = 1
"""Of a frontier's JSON."""


@dataclass(frozen=True)
class FrontierRow:
    """One network.

    Attributes:
        allocate: How much went where; ``none`` for the uncompressed network.
        ratio: Share of the target that was to go.
        share: Share that went; None where the ratio cannot be met.
        size: Parameters, multiply-accumulates and bytes; None likewise.
        norms: Accuracies at the standard budget and the certified bound of the sensitivity; none likewise.
        paired: Verdicts against the uncompressed network's, sample by sample.
        candidate: Which of the planner's candidates it is; None where no planner chose.
        warnings: What should be known of it, a sentence each; why the ratio cannot be met.
        seconds: That planning, repair, fine-tuning and measuring took, by these names.
    """

    allocate: str
    ratio: float
    share: float | None = None
    size: NetworkSize | None = None
    norms: tuple[NormResult, ...] = ()
    paired: tuple[Paired, ...] = ()
    candidate: str | None = None
    warnings: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict, compare=False)

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """Accuracies, one a norm."""
        return tuple(norm.evaluation for norm in self.norms if norm.evaluation)

    @property
    def clean(self) -> Rate | None:
        """Accuracy without attack."""
        return self.evaluations[0].clean_accuracy if self.evaluations else None

    @property
    def weakest(self) -> float | None:
        """The least robust accuracy of all norms, an upper estimate; None where there is none."""
        return min((e.robust_accuracy.value or 0.0 for e in self.evaluations), default=None)

    def robust(self, p: float) -> Rate | None:
        """Robust accuracy in a norm, an upper estimate."""
        return next((e.robust_accuracy for e in self.evaluations if e.p == p), None)

    def test(self, kind: str, p: float | None = None) -> Paired | None:
        """Verdicts of a kind against the uncompressed network's."""
        return next((paired for paired in self.paired if (paired.kind, paired.p) == (kind, p)), None)

    def cells(self) -> dict[str, Any]:
        """The row as numbers by the names of the table's columns."""
        found: dict[str, Any] = {"allocate": self.allocate, "candidate": self.candidate}
        found |= {"ratio": self.ratio, "share": self.share}
        size = self.size
        found |= {name: getattr(size, name) if size else None for name in ("parameters", "macs", "bytes")}
        found |= _rate("clean", self.clean) | _test("clean", self.test("clean"))
        for norm in self.norms:
            p, bound, proven = norm.p, norm.lipschitz, norm.proven
            arguments = dict(bound.arguments)
            aligned = arguments.get(Argument.DISJOINT_PAIRS if math.isinf(p) else Argument.ALL_PAIRS)
            found |= _rate(f"robust_{p:g}", self.robust(p)) | _test(f"robust_{p:g}", self.test("robust", p))
            found |= {f"eps_{p:g}": norm.eps, f"proven_{p:g}": proven.value if proven else None}
            bounds = {"product": bound.product, "aligned_product": aligned, "lipschitz": bound.upper}
            found |= {f"{name}_{p:g}": value for name, value in bounds.items()}
        found |= {f"{name.replace('-', '_')}_seconds": value for name, value in self.seconds.items()}
        return found | {"warnings": "; ".join(self.warnings)}


@dataclass(frozen=True)
class Frontier(Saved):
    """The result of :func:`brittle.frontier`: networks of several ratios and allocations, beside the uncompressed one.

    Attributes:
        model: What the network is called.
        asked: What was asked, whatever the ratio and the allocation.
        repair: What was done after every removal, a step each.
        base: The uncompressed network.
        rows: The others, in the order in which they were made.
        min_robust: Floor under the robust accuracy in every norm; None for none.
        signature: What makes two frontiers comparable.
        schema_version: Of the JSON.
    """

    model: str
    asked: CompressionRequest
    repair: tuple[str, ...]
    base: FrontierRow
    rows: tuple[FrontierRow, ...]
    min_robust: float | None
    signature: Signature
    schema_version: int = FRONTIER_SCHEMA_VERSION

    @property
    def norms(self) -> tuple[float, ...]:
        """Norms of the attacks."""
        return tuple(norm.p for norm in self.base.norms)

    @property
    def allocations(self) -> tuple[str, ...]:
        """Allocations, in the order of their first networks."""
        return tuple(dict.fromkeys(row.allocate for row in self.rows))

    @property
    def smallest(self) -> FrontierRow | None:
        """The network of the largest ratio, of those whose robust accuracy is at the floor or above in every norm, as
        counted; of one ratio the most robust. None where there is none, or no floor.
        """
        above = [row for row in self.rows if self.holds(row)]
        return max(above, key=lambda row: (row.ratio, row.weakest or 0.0), default=None)

    def holds(self, row: FrontierRow) -> bool:
        """Whether a network is at the floor or above."""
        return self.min_robust is not None and row.weakest is not None and row.weakest >= self.min_robust

    def area(self, allocate: str, p: float) -> float | None:
        """Mean robust accuracy of an allocation over the ratios at which every allocation has a network."""
        met = [
            {row.ratio for row in self.rows if row.allocate == name and row.evaluations} for name in self.allocations
        ]
        common = set.intersection(*met) if met else set()
        rates = [row.robust(p) for row in self.rows if row.allocate == allocate and row.ratio in common]
        values = [rate.value or 0.0 for rate in rates if rate is not None]
        return sum(values) / len(values) if values else None

    def to_frame(self) -> pd.DataFrame:
        """The table: one row a network, the uncompressed one first."""
        import pandas as pd

        return pd.DataFrame([row.cells() for row in (self.base, *self.rows)])

    @staticmethod
    def from_json(text: str | bytes) -> Frontier:
        """The inverse of :meth:`to_json`.

        Raises:
            InputError: The text is not JSON, not a frontier of this schema version, or holds values that cannot be.
        """
        frontier = codec.from_json(text, {FRONTIER_SCHEMA_VERSION: Frontier}, "frontier")
        check(frontier, "frontier")
        return frontier

    @staticmethod
    def load(path: str | Path) -> Frontier:
        """Read a frontier that :meth:`save` wrote.

        Raises:
            InputError: As :meth:`from_json`, or there is no regular file, or one of more than 256 MB.
        """
        return Frontier.from_json(read_document(Path(path), "frontier"))


def _rate(name: str, rate: Rate | None) -> dict[str, float | None]:
    low, high = rate.interval if rate and rate.interval else (None, None)
    return {name: rate.value if rate else None, f"{name}_low": low, f"{name}_high": high}


def _test(name: str, test: Paired | None) -> dict[str, float | None]:
    numbers = (len(test.lost), len(test.won), test.p_value) if test else (None, None, None)
    return dict(zip((f"{name}_lost", f"{name}_won", f"{name}_p_value"), numbers, strict=True))


@rules_of.register
def _(row: FrontierRow) -> Iterable[Rule]:
    yield 0 <= row.ratio < 1, "a ratio of at least 0 and below 1", row.ratio
    yield row.share is None or row.share <= 1, "a share of at most 1", row.share
    norms = [norm.p for norm in row.norms]
    yield len(set(norms)) == len(norms), "one result a norm", norms
    yield all(0 <= time < LARGEST for time in row.seconds.values()), "seconds of at least 0, below 2^63", row.seconds


@rules_of.register
def _(frontier: Frontier) -> Iterable[Rule]:
    yield frontier.min_robust is None or 0 <= frontier.min_robust <= 1, "a floor from 0 to 1", frontier.min_robust
    judged = [norm.p for norm in frontier.base.norms if norm.evaluation and norm.evaluation.n]
    yield [*frontier.norms] == judged != [], "an uncompressed network that was attacked in every norm", judged
    made = [(row.allocate, row.ratio) for row in frontier.rows]
    yield len(set(made)) == len(made), "one network an allocation and ratio", made
