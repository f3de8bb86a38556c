"""Networks side by side in plain words: sentences composed from the numbers, with every number in them measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from brittle.reporting.compression import TARGETS
from brittle.reporting.verdict import doubts
from brittle.results import ComparedNetwork, Comparison, Paired, warnings_of
from brittle.results.wording import budget, norm_name, number

MINUS = "\N{MINUS SIGN}"


def comparison_lines(comparison: Comparison) -> tuple[str, ...]:
    """What the networks show: a line on all, a line on each, then what makes them hard to compare."""
    first, others = comparison.first, comparison.others
    return (
        headline(comparison),
        _line_on_first(first),
        *(_line_beside(network, first) for network in others),
        *(f"Warning: {warning}" for warning in warnings(comparison)),
    )


def headline(comparison: Comparison) -> str:
    """How the others stand beside the first, in a sentence."""
    first, others = comparison.first, comparison.others
    names = others[0].name if len(others) == 1 else _all(len(others))
    beside = f"{names} beside {first.name}"
    if (recipe := comparison.compression) is not None:
        share = recipe.asked.ratio if recipe.share is None else recipe.share
        beside = f"{names}, with {100 * (1 - share):.1f} % of the {TARGETS[recipe.asked.target]}"
    if first.clean is None:
        return f"{beside}, compared by their weights alone: no data were given, so nothing was attacked."
    clean = [100 * (network.clean.value or 0) for network in comparison.networks if network.clean]
    accuracy = f"clean accuracy from {min(clean):.1f} to {max(clean):.1f} %"
    if not any(network.paired for network in others):
        return f"{beside}: {accuracy}; their samples are not at hand, so differences are not tested."
    fragile, sturdy = (sum(_differs(network, sign) for network in others) for sign in (-1, 1))
    if len(others) == 1:
        verdicts: dict[str, list[str]] = {}
        for test in others[0].paired:
            if test.kind == "robust" and test.p is not None:
                verdicts.setdefault(f"{'clearly ' * test.clear}{direction(test)}", []).append(norm_name(test.p))
        said = [f"{verdict} in {' and '.join(norms)}" for verdict, norms in verdicts.items()]
        return f"{beside}: {clean[1]:.1f} instead of {clean[0]:.1f} % right without attack; {', '.join(said)}."
    counted = {0: "none", len(others): "all" if len(others) > 2 else "both"}.get(fragile, str(fragile))
    how_many = f"{counted} of them {'is' if fragile < 2 else 'are'}"
    also = f", {sturdy} clearly more robust" if sturdy else ""
    return f"{beside}: {accuracy}; {how_many} clearly more fragile{also}."


NUMERALS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def _all(count: int) -> str:
    """All of several networks, as a row is called that speaks of them together."""
    return "Both" if count == 2 else f"All {NUMERALS[count] if count < len(NUMERALS) else count}"


def _differs(network: ComparedNetwork, sign: int) -> bool:
    """Whether it is clearly worse (-1) or better (1) under attack in some norm."""
    return any(test.kind == "robust" and test.clear and sign * test.points > 0 for test in network.paired)


def _line_on_first(first: ComparedNetwork) -> str:
    """The accuracies of the network that the others are compared with."""
    if first.clean is None:
        return f"{first.name}: {len(first.audit.layers)} layers, {first.audit.parameters:,} parameters."
    robust = " and ".join(
        f"{e.robust_accuracy.percent} within {norm_name(e.p)} {budget(e.eps)}" for e in first.evaluations
    )
    return f"{first.name}: {first.clean.percent} right without attack, {robust} under the worst attack."


def _line_beside(network: ComparedNetwork, first: ComparedNetwork) -> str:
    """How accuracies, size, structure and sensitivity of a network differ from those of the first, a sentence each."""
    parts = [part for words in (_accuracies, _structure, _sensitivity, _margins) if (part := words(network, first))]
    return f"{network.name}: {'. '.join(parts) or 'nothing that could be compared was measured'}."


def _accuracies(network: ComparedNetwork, first: ComparedNetwork) -> str:
    said, clean = [], network.test("clean")
    if network.clean is not None and first.clean is not None:
        verdict = f", clearly {'lower' if clean.points < 0 else 'higher'}" if clean is not None and clean.clear else ""
        change = points(network.clean.value, first.clean.value)
        said.append(f"{network.clean.percent} right without attack ({change}{verdict})")
    robust = []
    for e in network.evaluations:
        verdict, before = direction(network.test("robust", e.p)), first.robust(e.p)
        change = points(e.robust_accuracy.value, before.value if before else None)
        robust.append(f"{verdict} in {norm_name(e.p)} ({e.robust_accuracy.percent}, {change})")
    return "; ".join([*said, *([" and ".join(robust)] if robust else [])])


def _structure(network: ComparedNetwork, first: ComparedNetwork) -> str:
    """Size, and of rows and singular values those that differ more from the first network's.

    Of smaller layers these are not told: a tenth of few is one, and holds more.
    """
    said = []
    if first.audit.parameters and network.audit.parameters != first.audit.parameters:
        said.append(f"it has {number(network.audit.parameters / first.audit.parameters)} times the parameters")
    heads = (
        (network.spectral_head, first.spectral_head, "singular values"),
        (network.row_head, first.row_head, "rows"),
    )
    known = [(share, before, what) for share, before, what in heads if share is not None and before]
    if known and _shapes(network) == _shapes(first):
        share, before, what = max(known, key=lambda head: head[0] / head[1])
        held = f"holds {100 * share:.0f} % of their sum instead of {100 * before:.0f} %"
        said.append(f"the largest tenth of its {what} {held}")
    return _sentence(" and ".join(said))


def _shapes(network: ComparedNetwork) -> list[tuple[int, ...]]:
    return [layer.shape for layer in network.audit.layers]


def _sensitivity(network: ComparedNetwork, first: ComparedNetwork) -> str:
    """Product of norms, certified bound and largest sensitivity found, as multiples of the first network's."""
    sides: tuple[tuple[str, Callable[[ComparedNetwork, float], float | None]], ...] = (
        ("products of norms are", ComparedNetwork.product),
        ("certified bounds", ComparedNetwork.upper),
        ("the largest sensitivity found", ComparedNetwork.lower),
    )
    found: list[str] = []
    for what, side in sides:
        norms = [norm.p for norm in first.audit.norms]
        ratios = [(p, times(side(network, p), side(first, p))) for p in norms]
        said = [f"{number(ratio)} ({norm_name(p)})" for p, ratio in ratios if ratio is not None]
        if said:
            found.append(f"{what} {' and '.join(said)} times{'' if found else f' those of {first.name}'}")
    return _sentence(", ".join(found))


def _margins(network: ComparedNetwork, first: ComparedNetwork) -> str:
    """Median margin, and margin over sensitivity, as multiples of the first network's: what closes the argument where a
    network that is less sensitive is more fragile all the same.
    """
    margin = times(network.median_margin, first.median_margin)
    reaches = [(norm.p, times(network.reach(norm.p), first.reach(norm.p))) for norm in first.audit.norms]
    said = [f"{number(ratio)} ({norm_name(p)})" for p, ratio in reaches if ratio is not None]
    if margin is None or not said:
        return ""
    return (
        f"Its median margin is {number(margin)} times as large, its margin over sensitivity {' and '.join(said)} times"
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def direction(test: Paired | None) -> str:
    """What a paired test says of the network's robustness beside the first's."""
    if test is None:
        return "not tested"
    return ("more fragile" if test.points < 0 else "more robust") if test.clear else "not clearly different"


def points(value: float | None, before: float | None) -> str:
    """The difference of two accuracies, in percentage points.

    >>> points(0.9, 0.925), points(0.5, 0.5), points(None, 0.5)
    ('−2.5 points', '+0.0 points', 'no difference measured')
    """
    if value is None or before is None:
        return "no difference measured"
    return f"{100 * value - 100 * before:+.1f} points".replace("-", MINUS)


def times(value: float | None, before: float | None) -> float | None:
    """The ratio of two measurements; None where one is missing, or the first is zero or infinite."""
    if value is None or not before or before == float("inf"):
        return None
    return value / before


def warnings(comparison: Comparison) -> Iterator[str]:
    """What speaks against comparing these numbers: mistakes in what was given, doubtful attacks, other settings."""
    networks = comparison.networks
    warned: dict[str, list[str]] = {}
    for network in networks:
        for warning in warnings_of(network.evaluations):
            warned.setdefault(warning, []).append(network.name)
    for warning, names in warned.items():
        yield warning if len(names) == len(networks) else f"{', '.join(names)}: {warning}"
    for network in networks:
        for p, raised in doubts(network.audit.norms, network.audit.flags).items():
            if raised:
                checks = ", ".join(dict.fromkeys(flag.name for flag in raised))
                yield f"the robust accuracy of {network.name} in {norm_name(p)} must not be trusted ({checks})."
    for network in comparison.others:
        yield from _other_settings(comparison.first, network)


def _other_settings(first: ComparedNetwork, other: ComparedNetwork) -> Iterator[str]:
    """What the audits of two networks were made with differently; attacks may have gone further on one alone."""
    ours, theirs = first.audit.signature, other.audit.signature
    before, after = (
        {"seed": signature.seed, "device": signature.device}
        | {name: value for name, value in signature.settings.items() if name != "attacks"}
        | {f"version of {name}": version for name, version in signature.versions.items()}
        for signature in (ours, theirs)
    )
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if names:
        differ = ", ".join(f"{name} ({before.get(name)} and {after.get(name)})" for name in names)
        yield f"{first.name} and {other.name} were audited with different {differ}."
    attacks = [{attack for e in network.evaluations for attack in e.attacks} for network in (first, other)]
    for network, more in ((first, attacks[0] - attacks[1]), (other, attacks[1] - attacks[0])):
        if more:
            rival = other if network is first else first
            yield f"{network.name} was attacked with {', '.join(sorted(more))} as well, {rival.name} was not."
