"""Whether what a file says can be: values that no audit could have found are refused, wherever they stand.

A document of the right form may still hold more hits than samples, budgets that fall or lists of unequal length.
Looked at are promises of the dataclasses that whoever reads them builds on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from functools import singledispatch
from itertools import pairwise

from brittle.errors import InputError
from brittle.results.attacks import (
    CertifiedCurve,
    Evaluation,
    FragileSample,
    LayerResponse,
    SecurityCurve,
    UniversalResult,
)
from brittle.results.compression import REMOVALS, TARGETS, CompressionRecipe, CompressionRequest, GroupCut
from brittle.results.features import FeatureCompression, FeatureLayer, FeaturePair
from brittle.results.layers import FRACTIONS, LayerBound, LayerResult, LipschitzResult, NormBounds
from brittle.results.methods import UniversalKind
from brittle.results.rate import Rate
from brittle.results.size import Latency, NetworkSize

NORMS = (2.0, math.inf)
LARGEST = 2**63
Rule = tuple[bool, str, object]
"""Whether it holds, what was expected, and what came."""


def check(value: object, where: str) -> None:
    """Raise where a result, or any part of it, cannot have been found.

    Args:
        value: A result, or a part of one.
        where: What to call it in an error; names of fields and places in lists are added.

    Raises:
        InputError: The first rule that does not hold.
    """
    if isinstance(value, float | int):
        if abs(value) >= LARGEST if isinstance(value, int) else math.isnan(value):
            raise InputError(f"{where}: expected a number below 2^63; got {value!r:.80}")
    elif isinstance(value, str) and any("\ud800" <= sign <= "\udfff" for sign in value):
        raise InputError(f"{where}: expected text; got half of a character in {value!r:.80}")
    for name, part in _parts(value):
        check(part, f"{where}.{name}")
    for holds, expected, got in rules_of(value):
        if not holds:
            raise InputError(f"{where}: expected {expected}; got {got!s:.80}")


def _parts(value: object) -> Iterable[tuple[object, object]]:
    """The parts of a value with their names, the keys of a dict among them."""
    if dataclasses.is_dataclass(value):
        kept = (field.name for field in dataclasses.fields(value) if field.metadata.get("json", True))
        return [(name, getattr(value, name)) for name in kept]
    if isinstance(value, dict):
        return [*(("key", key) for key in value), *value.items()]
    return enumerate(value) if isinstance(value, tuple) else ()


@singledispatch
def rules_of(value: object) -> Iterable[Rule]:
    """What must hold of a result by itself; numbers that are not NaN, and its parts, are looked at elsewhere."""
    return ()


def counts(value: object, *names: str) -> Rule:
    """These fields are numbers of something."""
    found = {name: getattr(value, name) for name in names}
    return min(found.values()) >= 0, f"counts of at least 0 as {', '.join(names)}", tuple(found.values())


def sizes(value: object, *names: str) -> Rule:
    """These fields, or all that is in them, are None or at least 0."""
    found = {name: getattr(value, name) for name in names}
    numbers = [entry for part in found.values() for entry in (part if isinstance(part, tuple) else (part,))]
    holds = all(number is None or number >= 0 for number in numbers)
    return holds, f"numbers of at least 0 as {', '.join(names)}", tuple(found.values())


def finite(value: object, *names: str) -> Rule:
    """These fields, or all that is in them, are finite and at least 0."""
    holds, _, found = sizes(value, *names)
    numbers = [entry for name in names for entry in _entries(getattr(value, name))]
    return holds and max(numbers, default=0) < math.inf, f"finite numbers of at least 0 as {', '.join(names)}", found


def _entries(part: object) -> Sequence[float]:
    return part if isinstance(part, tuple) else (part,) if isinstance(part, int | float) else ()


def rising(eps: Sequence[float]) -> bool:
    """Whether budgets are at least 0, each larger than the one before."""
    return all(before < after for before, after in pairwise((-1e-300, *eps)))


@rules_of.register
def _(rate: Rate) -> Iterable[Rule]:
    yield 0 <= rate.hits <= rate.n, "hits from 0 to n", f"{rate.hits} of {rate.n}"


@rules_of.register
def _(result: Evaluation) -> Iterable[Rule]:
    yield result.p in NORMS, "p of 2 or inf", result.p
    yield 0 < result.eps < math.inf, "a finite eps above 0", result.eps
    yield -math.inf < result.bounds[0] < result.bounds[1] < math.inf, "bounds (low, high), both finite", result.bounds
    yield counts(result, "rejected", "misled", "restarts", "forwards", "backwards")
    found = (result.proven, result.robust_correct, result.clean_correct, result.n)
    yield [*found] == sorted((0, *found))[1:], "0 <= proven <= robust_correct <= clean_correct <= n", found
    yield finite(result, "largest_perturbation")
    yield result.chance is None or 0 <= result.chance <= 1, "a chance from 0 to 1", result.chance
    yield result.examples is None, "no examples in a file", "some"
    if result.classes:
        counted = tuple(
            sum(getattr(rate, part) for rate in rates)
            for part, rates in (
                ("n", [entry.clean for entry in result.classes]),
                ("hits", [entry.clean for entry in result.classes]),
                ("hits", [entry.robust for entry in result.classes]),
            )
        )
        totals = (result.n, result.clean_correct, result.robust_correct)
        yield counted == totals, f"classes that add up to {totals}", counted


@rules_of.register
def _(sample: FragileSample) -> Iterable[Rule]:
    yield counts(sample, "index", "label", "prediction")
    yield sizes(sample, "distance")


@rules_of.register
def _(curve: SecurityCurve) -> Iterable[Rule]:
    yield curve.p in NORMS, "p of 2 or inf", curve.p
    yield rising(curve.eps) and max(curve.eps, default=0) < math.inf, "budgets that rise, all finite", curve.eps
    yield len(curve.eps) == len(curve.robust), "one rate for each budget", (len(curve.eps), len(curve.robust))


@rules_of.register
def _(curve: CertifiedCurve) -> Iterable[Rule]:
    yield curve.p in NORMS, "p of 2 or inf", curve.p
    yield rising(curve.eps), "budgets that rise", curve.eps
    yield len(curve.eps) == len(curve.certified), "one rate for each budget", (len(curve.eps), len(curve.certified))
    yield sizes(curve, "median_radius")


@rules_of.register
def _(response: LayerResponse) -> Iterable[Rule]:
    lengths = [len(part) for part in (response.k, response.energy, response.isotropic)]
    yield response.p in NORMS, "p of 2 or inf", response.p
    yield len(set(lengths)) == 1, "as many k as energy and isotropic", lengths
    errors = len(response.energy_error)
    yield errors in (0, lengths[1]), "as many energy_error as energy, or none", errors
    yield counts(response, "n", "excluded")
    yield finite(response, "k", "energy", "isotropic")
    known = all(error >= 0 for error in response.energy_error)
    yield known, "energy_error of at least 0, infinite for a single sample", response.energy_error
    yield sizes(response, "amplification", "gain", "step", "step_error")


@rules_of.register
def _(result: UniversalResult) -> Iterable[Rule]:
    yield result.p in NORMS, "p of 2 or inf", result.p
    yield 0 < result.eps < math.inf, "a finite eps above 0", result.eps
    yield result.kind in [*UniversalKind], f"kind of {' or '.join(UniversalKind)}", result.kind
    yield counts(result, "fitted_on")
    samples = [rate.n for rate in result.random_fooled]
    yield {result.fooled.n} == {*samples}, f"random_fooled of the same {result.fooled.n} samples", samples


@rules_of.register
def _(norm: NormBounds) -> Iterable[Rule]:
    yield norm.p in (1.0, *NORMS), "p of 1, 2 or inf", norm.p
    yield 0 <= norm.lower <= norm.upper, "0 <= lower <= upper", (norm.lower, norm.upper)


@rules_of.register
def _(bound: LayerBound) -> Iterable[Rule]:
    yield bound.p in NORMS, "p of 2 or inf", bound.p
    yield finite(bound, "k", "scale", "norm", "k_term_error", "spread")
    yield sizes(bound, "k_row", "row_k_term_error", "lower", "sharp", "linear", "paper")


@rules_of.register
def _(layer: LayerResult) -> Iterable[Rule]:
    yield min(layer.shape) > 0, "a shape (m, n) of at least 1", layer.shape
    yield counts(layer, "parameters", "spectrum", "rank")
    errors = "row_error", "spectral_error", "row_spread", "spectral_spread"
    lengths = [len(getattr(layer, name)) for name in errors]
    yield set(lengths) == {len(FRACTIONS)}, f"{len(FRACTIONS)} numbers each as {', '.join(errors)}", lengths
    heads = len(layer.head_norms)
    expected = len(FRACTIONS) if heads else 0
    yield len(layer.head_error) == expected, f"{expected} numbers as head_error of {heads} heads", layer.head_error
    profiles = "row_norms", "singular_values"
    largest = [max(getattr(layer, name), default=0.0) for name in profiles]
    starts = [[*getattr(layer, name), 0.0][0] for name in profiles]
    yield starts == largest, f"the largest number first as {' and '.join(profiles)}", starts
    yield layer.degenerate or min(largest) > 0, f"numbers above 0 as {' and '.join(profiles)}, or degenerate", largest
    yield finite(
        layer, *errors, *profiles, "head_norms", "head_error", "stable_rank", "nuclear_spectral_ratio",
        "nuclear_frobenius_ratio", "effective_rank", "effective_sparsity", "frobenius", "filter_norm_inf",
        "filter_norm_2",
    )  # fmt: skip
    yield layer.degenerate or layer.frobenius > 0, "a Frobenius norm above 0, or degenerate", layer.frobenius
    norms = [norm.p for norm in layer.operator_norms]
    yield len(set(norms)) == len(norms), "one operator norm for each p", norms
    norms = [bound.p for bound in layer.bounds]
    yield all(norms.count(p) == len(FRACTIONS) for p in norms), f"{len(FRACTIONS)} bounds for each p", norms
    yield min(layer.input_size or (1,)) > 0, "input_size of at least 1", layer.input_size


@rules_of.register
def _(result: LipschitzResult) -> Iterable[Rule]:
    yield result.p in NORMS, "p of 2 or inf", result.p
    yield counts(result, "n")
    yield sizes(result, "upper", "lower", "median_lower", "largest_on_data", "reach", "slope")
    yield min((value for _, value in result.arguments), default=0) >= 0, "arguments of at least 0", result.arguments


@rules_of.register
def _(pair: FeaturePair) -> Iterable[Rule]:
    yield counts(pair, "index", "partner", "label", "other")
    yield pair.label != pair.other, "two classes", pair.label
    yield 0 < pair.distance < math.inf, "a finite distance above 0", pair.distance
    yield _share(pair.cosine), "a cosine from 0 to 1", pair.cosine
    yield finite(pair, "radius")
    yield pair.followed or pair.radius is None, "a radius of pairs that were followed alone", pair.radius


@rules_of.register
def _(layer: FeatureLayer) -> Iterable[Rule]:
    yield layer.width > 0, "a width of at least 1", layer.width
    shares = layer.cosine, layer.kept, layer.strong
    yield all(map(_share, shares)), "cosine, kept and strong from 0 to 1", shares
    yield sizes(layer, "rank", "directions")


@rules_of.register
def _(features: FeatureCompression) -> Iterable[Rule]:
    yield min(features.inputs, features.samples) > 0, "inputs and samples of at least 1", features.inputs
    followed = len(features.followed.pairs)
    yield 0 <= features.jacobians <= followed, "jacobians from 0 to the pairs that were followed", features.jacobians
    yield _share(features.interpolant), "an interpolant from 0 to 1", features.interpolant


def _share(value: float | None) -> bool:
    return value is None or 0 <= value <= 1


@rules_of.register
def _(size: NetworkSize) -> Iterable[Rule]:
    yield sizes(size, "parameters", "macs", "bytes")


@rules_of.register
def _(row: Latency) -> Iterable[Rule]:
    yield min(row.batch_size, row.rounds, row.threads) > 0, "batch_size, rounds and threads of at least 1", row
    yield 0 <= row.median <= row.p90 < math.inf, "0 <= median <= p90, both finite", (row.median, row.p90)
    yield sizes(row, "processor")


@rules_of.register
def _(asked: CompressionRequest) -> Iterable[Rule]:
    yield 0 <= asked.ratio <= 1, "a ratio from 0 to 1", asked.ratio
    yield asked.remove in REMOVALS, f"remove of {', '.join(REMOVALS)}", asked.remove
    yield asked.target in TARGETS, f"a target of {', '.join(TARGETS)}", asked.target


@rules_of.register
def _(group: GroupCut) -> Iterable[Rule]:
    yield 0 <= group.after <= group.before > 0, "0 <= after <= before, and 1 before", (group.after, group.before)
    named = [index for index in group.removed if 0 <= index < group.before]
    falls = any(one >= other for one, other in pairwise(group.removed))
    yield named == [*group.removed] and not falls, "removed units that rise from 0 to before - 1", group.removed
    gone = group.before - group.after
    yield not group.removed or len(group.removed) == gone, f"{gone} removed units, or none named", len(group.removed)


@rules_of.register
def _(recipe: CompressionRecipe) -> Iterable[Rule]:
    yield recipe.classes > 0, "classes of at least 1", recipe.classes
    yield min(recipe.input_shape, default=1) > 0, "an input_shape of at least 1 each", recipe.input_shape
    yield 0 <= recipe.zeros <= 1, "a share of zeros from 0 to 1", recipe.zeros
    yield recipe.share is None or recipe.share <= 1, "a share of at most 1", recipe.share
    yield (
        all(0 <= time < LARGEST for time in recipe.seconds.values()),
        "seconds of at least 0, below 2^63",
        recipe.seconds,
    )
