"""The k-term allocation by brute force: every threshold on the one error, tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from brittle.linear import k_term_error


def best_threshold(
    scores: Mapping[str, Tensor], budget: float, cost: Callable[[dict[str, int]], float], q: float
) -> dict[str, int]:
    """Units kept by group at the threshold whose cost is closest to the budget, the larger cost among equals."""
    best = None
    errors = {name: [float(k_term_error(s, k, q)) for k in range(len(s) + 1)] for name, s in scores.items()}
    for threshold in sorted({e for curve in errors.values() for e in curve}):
        counts = {n: max(1, next(k for k, e in enumerate(curve) if e <= threshold)) for n, curve in errors.items()}
        found = (abs(cost(counts) - budget), -cost(counts))
        if best is None or found < best[0]:
            best = (found, counts)
    assert best is not None
    return best[1]
