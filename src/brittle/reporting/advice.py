"""What would help, by rule from what was measured: each line a command to copy."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from brittle.reporting.verdict import ENOUGH, doubts
from brittle.reporting.weighing import CONCENTRATED
from brittle.results import Audit, LayerResult, NormResult, Setting
from brittle.results.wording import norm_name

OPEN = 0.1
"""Share of the samples undecided between proof and attack from which on better bounds are suggested."""
BREAKABLE = ("weakened", "fragile", "broken")
"""Levels at which a network has something to gain from training against attacks."""
DATA_OPTIONS = {"data": "--data", "data_root": "--data-root", "image_size": "--image-size"}
NETWORK_OPTIONS = {"arch": "--arch", "arch_arg": "--arch-arg", "mean": "--mean", "std": "--std"}
"""Options by the names under which :attr:`brittle.results.Audit.source` has their values."""
JUDGED_ON = {"split": "--split", "limit": "--limit"}
"""Likewise, of an audit alone."""


@dataclass(frozen=True)
class Advice:
    """One thing that would help.

    Attributes:
        reason: Why, from what was measured, and what it would do.
        command: What to type; words in capitals stand for what the audit does not know.
    """

    reason: str
    command: str


def advice(audit: Audit) -> tuple[Advice, ...]:
    """What would help, the most pressing first.

    A raised flag asks for more attacks, few samples for more of them, a wide gap between proof and attack for better
    bounds, a network that breaks for adversarial fine-tuning, a concentrated layer for a cap on what is concentrated.
    None of it is promised to work: each is what has a reason in the numbers.
    """
    return (*_attack_harder(audit), *_more_samples(audit), *_train(audit), *_tighten(audit))


def _attack_harder(audit: Audit) -> Iterator[Advice]:
    raised = doubts(audit.norms, audit.flags)
    if any(raised.values()):
        names = " and ".join(norm_name(p) for p, flags in raised.items() if flags)
        yield Advice(
            f"The attacks in {names} are in doubt. Stronger ones, queries among them, tell how much of the robust"
            " accuracy is left.",
            _audit_command(audit, "thorough", ("--preset", "thorough")),
        )


def _more_samples(audit: Audit) -> Iterator[Advice]:
    first = next((norm.evaluation for norm in audit.norms if norm.evaluation), None)
    if first is not None and 0 < first.clean_correct < ENOUGH:
        share = first.clean_correct / first.n
        samples = math.ceil(1.2 * ENOUGH / share / 50) * 50
        yield Advice(
            f"Only {first.clean_correct} samples are right without attack: {samples} make a verdict possible, where the"
            " data have so many.",
            _audit_command(audit, "more", ("--limit", str(samples))),
        )


def _tighten(audit: Audit) -> Iterator[Advice]:
    wide = [norm for norm in audit.norms if norm.lipschitz.upper is not None and _is_open(norm)]
    if wide and not audit.signature.settings.get("tighten"):
        gaps = " and ".join(
            f"{100 * (norm.undecided.value or 0.0):.0f} % of the samples in {norm_name(norm.p)}"
            for norm in wide
            if norm.undecided
        )
        yield Advice(
            f"Between proof and attack {gaps} are undecided. Optimised bounds prove more, and take some times as long.",
            _audit_command(audit, "tightened", ("--tighten", "20")),
        )


def _is_open(norm: NormResult) -> bool:
    return norm.undecided is not None and (norm.undecided.value or 0.0) >= OPEN


def _train(audit: Audit) -> Iterator[Advice]:
    """Fine-tuning, for networks that the training command reads."""
    if str(audit.source.get("model", "")).startswith("hf:"):
        return
    deciding = next((norm for norm in audit.norms if norm.p == audit.verdict.decided_by and norm.eps), None)
    if audit.verdict.level in BREAKABLE and deciding is not None and deciding.eps is not None:
        yield Advice(
            f"Attacks in {norm_name(deciding.p)} turn right answers wrong. Training goes on against attacks of that"
            " budget: it costs some accuracy without attack, and some times as long as plain training.",
            _train_command(audit, "hardened", ("--adversarial", f"{deciding.p:g}={deciding.eps:.4g}")),
        )
    if audit.verdict.level != "robust":
        yield from _spread(audit)


def _spread(audit: Audit) -> Iterator[Advice]:
    """What takes the weight off a few directions or rows, where a layer is concentrated."""
    live = [layer for layer in audit.layers[:-1] or audit.layers if not layer.degenerate and min(layer.shape) > 1]
    for p in (2.0, math.inf) if live else ():
        layer = max(live, key=lambda candidate: candidate.excess(p))
        if layer.excess(p) >= CONCENTRATED:
            what = "directions" if p == 2 else "rows"
            times = f"{layer.excess(p):.1f} times the norm of a random matrix of its shape and scale"
            yield Advice(
                f"“{layer.name}” has its weight in few {what} ({times}). {_means(p, layer)}",
                _train_command(audit, "spread" if p == 2 else "even", _spreading(p, layer)),
            )


def _means(p: float, layer: LayerResult) -> str:
    if p != 2:
        return "A penalty on the spread of its largest rows evens them out."
    if "low-rank pair" in layer.kind:
        return "A cap on the condition number of its factors spreads it over the rank that is left."
    return "A cap on the singular values holds them at twice those of such a matrix."


def _spreading(p: float, layer: LayerResult) -> tuple[str, ...]:
    if p != 2:
        return ("--penalty", "spread_control=0.1")
    if "low-rank pair" in layer.kind:
        return ("--constraint", "orthonormal=2", "--constraint", "condition_cap=2")
    return ("--constraint", f"spectral_cap={2 * layer.filter_norm_2 / layer.excess(2):.3g}")


def _audit_command(audit: Audit, out: str, more: Sequence[str]) -> str:
    """The audit once more, with other options."""
    source, chosen = audit.source, {option for option in more if option.startswith("--")}
    kept = {key: option for key, option in JUDGED_ON.items() if option not in chosen}
    words = ["brittle", "audit", str(source.get("model", "MODEL")), *_network_words(source)]
    words += [
        *_words(source, DATA_OPTIONS | kept),
        *(() if source.get("data") or "model" in source else ("--data", "DATA")),
    ]
    return shlex.join([*words, *more, "-o", f"audit-{out}"])


def _train_command(audit: Audit, out: str, more: Sequence[str]) -> str:
    """Fine-tuning from the network's weights."""
    source = audit.source
    words = ["brittle", "train", "--fine-tune", str(source.get("model", "MODEL")), *_network_words(source)]
    words += _words(source, {"data": "--data"}) or ["--data", "DATA"]
    words += _words(source, {key: option for key, option in DATA_OPTIONS.items() if key != "data"})
    if source.get("arch") and not source.get("mean"):  # a file that was judged as it is, without normalisation
        shape = audit.signature.settings.get("input_shape")
        channels = int(shape[0]) if isinstance(shape, tuple) and len(shape) == 3 else 1
        words += ["--mean", ",".join(["0"] * channels), "--std", ",".join(["1"] * channels)]
    return shlex.join([*words, *more, "--epochs", "10", "-o", out])


def _network_words(source: dict[str, Setting]) -> list[str]:
    """The options that say how the network is built; a folder of a run knows its own."""
    return _words(source, NETWORK_OPTIONS) if "model" in source else ["--arch", "ARCH"]


def _words(source: dict[str, Setting], options: dict[str, str]) -> list[str]:
    """Options with their values, as far as the audit knows them; one with several values is given several times."""
    words = []
    for key, option in options.items():
        value = source.get(key)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        for entry in values:
            words += [option, str(entry)]
    return words
