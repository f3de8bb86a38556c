"""Proportions as counts, and what stands for a quantity that was not measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

Setting = str | int | float | bool | None | tuple[str | int | float, ...]
"""What a setting of an attack or of an audit may be."""


@dataclass(frozen=True)
class Rate:
    """A proportion, stored as counts: ``hits`` of ``n``.

    Attributes:
        hits: How many were counted.
        n: Of how many.
    """

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

    def exceeds(self, share: float) -> bool:
        """Whether it is above the share beyond chance: the lower end of the 95 % interval is."""
        return self.interval is not None and self.interval[0] > share

    @property
    def counts(self) -> str:
        """``352 of 360``."""
        return f"{self.hits} of {self.n}"

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
        return f"{self.percent} ({self.counts}; 95 % interval {100 * low:.1f} to {100 * high:.1f})"


@dataclass(frozen=True)
class NotMeasured:
    """Something that was not measured, by name, and why.

    Attributes:
        name: What it is called.
        reason: Why there is no number of it.
    """

    name: str
    reason: str
