"""By how much of what separates the classes a network decides: pairs of samples, and the layers between them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

MEDIAN_NORMAL = 0.6744897501960817
"""Median magnitude of a standard normal number."""


@dataclass(frozen=True)
class FeaturePair:
    """A sample that is right, the nearest sample of another class, and what the network makes of the way between them.

    Attributes:
        index: Position of the sample in the data.
        partner: Position of the nearest sample of another class.
        label: Class of the sample.
        other: Class of the partner.
        distance: ``||x' - x||_2`` in input units, exact; half of it is the radius up to which the minimum-distance
            rule, which answers with the class of the nearest sample, keeps its answer at x.
        cosine: ``|cos|`` between the gradient at x of the margin ``s_label - s_other`` and ``x' - x``: the share of the
            way by which the network decides, to first order; None where the gradient is zero.
        followed: Whether the sample was attacked, and the pair followed through the layers.
        radius: Length of the shortest perturbation found that the network answers otherwise, in l2: an upper bound of
            the network's radius at x. None where none was searched for, or none found.
    """

    index: int
    partner: int
    label: int
    other: int
    distance: float
    cosine: float | None
    followed: bool = False
    radius: float | None = None

    @property
    def ratio(self) -> float | None:
        """The attacked radius over that of the minimum-distance rule: an upper bound of the network's own ratio."""
        return None if self.radius is None else 2 * self.radius / self.distance


@dataclass(frozen=True)
class FeatureLayer:
    """How much of the way to another class a representation still shows; medians over pairs.

    Attributes:
        layer: Qualified name of the layer, or of the block of layers, whose output the representation is; all of the
            network passes through it.
        width: Numbers in the representation of one sample.
        cosine: ``|cos|`` between ``x' - x`` and the gradient ``J^T (z - z')``: the share by which the rule would decide
            that takes the nearer of the two in this representation; 1 at the input itself. None where the two have the
            same representation.
        kept: Share of the length of ``x' - x`` in the row space of the Jacobian J of the representation: what is not
            lost altogether. None where J is too large to be taken.
        strong: The same for the right singular directions alone that hold 99 % of the squared singular values.
        rank: Singular values of J above rounding.
        directions: Singular directions that ``strong`` counts.
    """

    layer: str
    width: int
    cosine: float | None
    kept: float | None = None
    strong: float | None = None
    rank: int | None = None
    directions: int | None = None


@dataclass(frozen=True)
class FeatureCompression:
    """By how much of what separates the classes a network decides: the result of :func:`brittle.feature_compression`.

    Attributes:
        inputs: Numbers in one input.
        samples: Samples among which the nearest one of another class was looked for.
        pairs: Samples that are right with their partners, spread evenly over the data.
        layers: One a layer or block through which all of the network passes, in the order in which they run.
        jacobians: Pairs, of those that were followed, at which Jacobians were taken.
        interpolant: Median of the cosines phi that a linear classifier with a bias through all the samples has at most,
            over the same pairs; 0 where there is no such classifier. None where there are more samples than numbers in
            an input, or too many to say.
    """

    inputs: int
    samples: int
    pairs: tuple[FeaturePair, ...]
    layers: tuple[FeatureLayer, ...] = ()
    jacobians: int = 0
    interpolant: float | None = None

    @property
    def cosine(self) -> float | None:
        """Median of the pairs' cosines; None where there is none."""
        return _median(pair.cosine for pair in self.pairs)

    @property
    def ratio(self) -> float | None:
        """Median of the attacked pairs' ratios, an upper bound of the network's own; None where there is none."""
        return _median(pair.ratio for pair in self.pairs)

    @property
    def followed(self) -> FeatureCompression:
        """The same for the pairs that were attacked and followed through the layers, those that ``layers`` tell of."""
        return replace(self, pairs=tuple(pair for pair in self.pairs if pair.followed))

    @property
    def distance(self) -> float | None:
        """Median of the pairs' distances; None where there is no pair."""
        return _median(pair.distance for pair in self.pairs)

    @property
    def chance(self) -> float:
        """The cosine that a random direction has, in the median; by its limit for many dimensions."""
        return min(1.0, MEDIAN_NORMAL / math.sqrt(self.inputs))

    @property
    def by_classes(self) -> dict[tuple[int, int], FeatureCompression]:
        """The same for the pairs of each two classes, whichever of them is the sample's, the most frequent first."""
        classes: dict[tuple[int, int], list[FeaturePair]] = {}
        for pair in self.pairs:
            classes.setdefault((min(pair.label, pair.other), max(pair.label, pair.other)), []).append(pair)
        frequent = sorted(classes.items(), key=lambda entry: -len(entry[1]))
        return {both: FeatureCompression(self.inputs, self.samples, tuple(pairs)) for both, pairs in frequent}


def _median(values: Iterable[float | None]) -> float | None:
    known: Sequence[float] = [value for value in values if value is not None]
    return median(known) if known else None
