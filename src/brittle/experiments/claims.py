"""What a claim about networks is judged by."""

from __future__ import annotations

from collections.abc import Sequence

from scipy.stats import binomtest


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Two-sided exact McNemar test: the p-value of "both are right equally often", from paired verdicts.

    Only the samples on which the two differ count; under the hypothesis each is a fair coin (McNemar 1947).

    >>> mcnemar([True] * 6, [False] * 6)
    0.03125
    """
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
