"""From a ratio to a smaller network: what can go is read off once, then taken out at any ratio."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from brittle.compression import (
    RandomScores,
    keep_best,
    rank_costs,
    singular_directions,
    truncate,
    weight_costs,
    weight_scores,
    with_zeros,
)
from brittle.compression.factorise import rank_map
from brittle.delivery.filters import filter_remover
from brittle.delivery.removed import CHECKED, Removed, Remover, counts_at, priorities_of, target_of
from brittle.delivery.request import Compression
from brittle.delivery.samples import Basis
from brittle.errors import InputError
from brittle.results import GroupCut


def rank_remover(model: nn.Module, basis: Basis, asked: Compression) -> Remover:
    """Directions of the layers' outputs: layers become low-rank pairs where these are smaller.

    Args:
        model: Left as it is.
        basis: Of its samples, the score ``outputs`` looks at all, the comparison with the product of the pairs at the
            first.
        asked: What is asked; a latency is read as macs.

    Raises:
        InputError: As :func:`brittle.compression.singular_directions`.
    """
    inputs = basis.x
    spectra = singular_directions(model, inputs=inputs if asked.score_name == "outputs" else None)
    known = {name for name, _ in model.named_modules()}
    if unknown := [name for name in asked.keep if name not in known]:
        raise InputError(f"keep: expected names of the model's modules; got {', '.join(map(repr, unknown))}")
    left = {n: d for n, d in spectra.layers.items() if not any(n == k or n.startswith(f"{k}.") for k in asked.keep)}
    spectra = replace(spectra, layers=left)
    costs = rank_costs(model, spectra, inputs, target_of(asked))
    priorities = priorities_of(spectra.scores(), asked)

    def remove(ratio: float) -> Removed:
        ranks = counts_at(ratio, priorities, costs.without, asked)
        network = truncate(model, spectra, ranks, inputs[:CHECKED])
        pairs = rank_map(network)
        cuts = [GroupCut(name, len(left[name].scores), pairs.get(name, len(left[name].scores))) for name in left]
        return Removed(network, tuple(cuts), 1 - costs.total(ranks) / costs.total(), whole=spectra.whole)

    return remove


def weight_remover(model: nn.Module, basis: Basis, asked: Compression) -> Remover:
    """Single weights, set to zero.

    Args:
        model: Left as it is.
        basis: Not looked at.
        asked: What is asked.

    Raises:
        InputError: As :func:`brittle.compression.weight_scores`.
    """
    scores = {name: score for name, score in weight_scores(model).items() if name not in asked.keep}
    if asked.allocation == "random":
        draw = RandomScores(asked.seed)
        scores = {name: draw(score) for name, score in scores.items()}
    costs = weight_costs(model, scores)
    priorities = priorities_of(scores, asked)

    def remove(ratio: float) -> Removed:
        counts = counts_at(ratio, priorities, costs.without, asked)
        network = with_zeros(model, keep_best(scores, counts))
        cuts = tuple(GroupCut(name, len(scores[name]), count) for name, count in counts.items())
        return Removed(network.eval(), cuts, 1 - costs.total(counts) / costs.total(), masked=copy.deepcopy)

    return remove


REMOVERS: Mapping[str, Callable[[nn.Module, Basis, Compression], Remover]] = {
    "filters": filter_remover,
    "ranks": rank_remover,
    "weights": weight_remover,
}
"""What can be removed, by name."""
