"""Warnings: labels, budget, normalisation or inputs that were probably not meant as they were given.

Each is one sentence with what to do about it. What is impossible is an error elsewhere; what is said here may be meant.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from brittle.data.load import MEAN_STD, Data
from brittle.evaluation.parts import Chunk
from brittle.models.activations import watch_calls
from brittle.models.borrow import Model, device_of
from brittle.models.forward import in_parts, output_of
from brittle.models.normalize import Normalize, normalisations_of
from brittle.results import Evaluation, Normalisation, Rate, SampleResult, mcnemar
from brittle.results.wording import budget, norm_name, number

LOOKED_AT = 64
"""Most samples put through the network to compare them with its first batch norm."""
UNLIKELY = 0.01
"""Largest chance, were all classes equally frequent, at which classes without a sample are taken for left out."""
HARDLY_BETTER = 0.1
"""Share of what guessing gets wrong, below which the clean accuracy is hardly better than guessing."""
OTHER_VARIANCE = 4.0
"""How many times the variance of a batch norm's input may exceed, or fall short of, the one that it stored. Samples
of the training distribution stay within a few tenths; a forgotten normalisation of images changes it by 10 or more."""
NORMALISED = 1024
"""Most samples put through the network once more, normalised."""
CLEAR_RISE = 0.01
"""Rise of the clean accuracy by a normalisation, as a share of the samples, from which on it is worth a sentence."""
TINY_RANGE = 0.05
"""Share of the bounds that inputs use at least, if the bounds are theirs."""


class Tally:
    """Which values and labels data hold that are read once, chunk by chunk."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.low, self.high, self.values, self.labels = math.inf, -math.inf, 0, Counter[int]()

    def over(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """The chunks, looked at on their way."""
        for chunk in chunks:
            if chunk.x.numel():
                low, high = (float(side) for side in chunk.x.detach().aminmax())
                self.low, self.high = min(self.low, low), max(self.high, high)
                self.values = chunk.x[0].numel()
            self.labels.update(chunk.y.tolist())
            yield chunk


@dataclass(frozen=True)
class Rival:
    """The answers that a network would give to the first samples if they were normalised.

    Attributes:
        name: The data set whose usual constants were taken.
        answers: Predictions, in the order of the data.
    """

    name: str
    answers: tuple[int, ...]


@dataclass(frozen=True)
class Glance:
    """What a few samples show of a network.

    Attributes:
        normalisations: What the network begins with (:func:`brittle.models.normalize.normalisations_of`).
        rival: None where the network normalises its inputs, or the data have no usual constants.
        classes: Number of logits; 0 where the output is no matrix.
        batch_norm: Name of the first batch norm that the samples meet; None where there is none.
        variance: Median over its channels of the samples' variance over the stored one.
    """

    classes: int
    batch_norm: str | None = None
    variance: float = 1.0
    normalisations: tuple[Normalisation, ...] = ()
    rival: Rival | None = None


def glance_at(model: Model, x: Tensor, data: object = None, batch_size: int | None = None) -> Glance:
    """Put at most :data:`LOOKED_AT` samples through a borrowed network, and more of them normalised.

    Args:
        model: The network.
        x: Inputs ``(N, ...)``, the first of the data.
        data: The data; a known set has usual constants, by which up to :data:`NORMALISED` samples are normalised if
            the network does not do so itself.
        batch_size: Samples at once; all by default.

    Raises:
        InputError: The model cannot run on them.
    """
    normalisations = tuple(normalisations_of(model))
    rival = None if normalisations else _answer_normalised(model, x[:NORMALISED], data, batch_size)
    x = x[:LOOKED_AT].to(device_of(model))
    norms: dict[nn.Module, str] = {}
    if isinstance(model, nn.Module):
        norms = {m: name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    seen: list[tuple[str, float]] = []

    def note(module: nn.Module, read: Tensor | None, _: Tensor | None) -> None:
        stored = module.running_var
        if seen or read is None or not isinstance(stored, Tensor) or read.ndim < 2 or len(read) < LOOKED_AT // 2:
            return
        channels = read.detach().movedim(1, 0).flatten(1)
        if bool((stored > 0).all()):
            seen.append((norms[module], float((channels.double().var(1) / stored.double()).median())))

    with torch.no_grad(), watch_calls(norms, note):
        logits = output_of(model, x)
    classes = logits.shape[1] if isinstance(logits, Tensor) and logits.ndim == 2 else 0
    batch_norm, variance = seen[0] if seen else (None, 1.0)
    return Glance(classes, batch_norm, variance, normalisations, rival)


def _answer_normalised(model: Model, x: Tensor, data: object, batch_size: int | None) -> Rival | None:
    """The network's answers to the samples, normalised by the usual constants of their data set, if it has any."""
    name = data.name if isinstance(data, Data) else ""
    constants = MEAN_STD.get(name)
    if constants is None or x.ndim < 3 or x.shape[1] != len(constants[0]):
        return None
    normalise = Normalize(*constants).to(x)

    def answer(x: Tensor) -> Tensor:
        logits = output_of(model, normalise(x).to(device_of(model)))
        return logits.argmax(1).cpu() if isinstance(logits, Tensor) and logits.ndim == 2 else torch.full((len(x),), -1)

    with torch.no_grad():
        return Rival(name, tuple(in_parts(answer, batch_size, x).tolist()))


def with_warnings(evaluation: Evaluation, tally: Tally, glance: Glance) -> Evaluation:
    """The evaluation with the accuracy of guessing, and with what is probably a mistake.

    Args:
        evaluation: With its per-sample results.
        tally: Of the same data.
        glance: At the same network.
    """
    evaluation = replace(evaluation, chance=accuracy_of_guessing(evaluation, glance.classes))
    return replace(evaluation, warnings=tuple(filter(None, (seek(evaluation, tally, glance) for seek in MISTAKES))))


def accuracy_of_guessing(evaluation: Evaluation, classes: int) -> float | None:
    """What answers that ignore the input reach: 1 / classes, or the agreement ``sum_k P(label k) P(answer k)`` of
    shuffled answers with the labels, if that is larger; None where the number of classes is unknown.

    A network that always names one class never exceeds it, however frequent the class is.
    """
    if not classes:
        return None
    n, samples = evaluation.n, evaluation.samples
    labels = Counter(sample.label for sample in samples)
    answers = Counter(sample.clean_prediction for sample in samples)
    shuffled = sum(labels[k] * answers[k] for k in labels) / n**2
    return max(1 / classes, shuffled)


def missing_classes(evaluation: Evaluation, tally: Tally, glance: Glance) -> str | None:
    """Labels that leave out classes.

    Among n labels drawn evenly from K classes, at most d are named with a chance of at most ``C(K, d) (d / K)^n``
    (one of the C(K, d) sets of classes holds all labels).
    """
    classes, n = glance.classes, sum(tally.labels.values())
    absent = sorted(set(range(classes)) - tally.labels.keys())
    named = classes - len(absent)
    if not absent or not named:
        return None
    sets = math.lgamma(classes + 1) - math.lgamma(named + 1) - math.lgamma(len(absent) + 1)
    if sets + n * math.log(named / classes) > math.log(UNLIKELY):
        return None
    which = ", ".join(map(str, absent[:3])) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
    return (
        f"No sample is labelled {which}, though the network tells {classes} classes apart: a class that is missing"
        " from a folder shifts the labels of all after it, so restore it; and of sorted samples take some of every"
        " class."
    )


def overlarge_budget(evaluation: Evaluation, tally: Tally, glance: Glance) -> str | None:
    """A budget within which every input can be moved to the middle of the bounds, where all are the same."""
    (low, high), eps, p = evaluation.bounds, evaluation.eps, evaluation.p
    reach = (high - low) / 2 * (1 if math.isinf(p) else math.sqrt(tally.values))
    if eps < reach or not tally.values:
        return None
    smaller = eps / 255
    remedy = "choose a smaller one"
    if high - low <= 1 < eps:
        remedy = f"if it was meant in grey levels, divide it by 255 (--eps {p:g}={smaller:.3g})"
    return (
        f"Within the {norm_name(p)} budget {budget(eps)} every input in [{low:g}, {high:g}] can be turned into one and"
        f" the same, which no network withstands: {remedy}."
    )


def hardly_better(evaluation: Evaluation, tally: Tally, glance: Glance) -> str | None:
    """A clean accuracy at chance, or so near to it that something is probably mixed up."""
    clean, chance = evaluation.clean_accuracy, evaluation.chance
    if chance is None or clean.interval is None or chance >= 1:
        return None
    if clean.exceeds(chance) and clean.interval[1] > chance + HARDLY_BETTER * (1 - chance):
        return None
    return (
        f"Only {clean.percent} are right without attack, where answers that ignore the input reach"
        f" {100 * chance:.1f} %: check that inputs are normalised as in training (--mean, --std;"
        " brittle.Normalize) and that labels are numbered in the order of the network's classes."
    )


def foreign_inputs(evaluation: Evaluation, tally: Tally, glance: Glance) -> str | None:
    """Inputs unlike those on which the first batch norm took its statistics."""
    if 1 / OTHER_VARIANCE <= glance.variance <= OTHER_VARIANCE or not math.isfinite(glance.variance):
        return None
    return (
        f"At “{glance.batch_norm}”, the first batch norm, the inputs vary {number(glance.variance)} times as much as"
        " those of the training: normalise them as in training (--mean, --std; brittle.Normalize)."
    )


def unnormalised(evaluation: Evaluation, tally: Tally, glance: Glance) -> str | None:
    """A network that answers clearly better when its inputs are normalised: by a point or more, and more than chance.

    Both accuracies are of the same samples, so that McNemar's exact test compares them.
    """
    if glance.rival is None:
        return None
    pairs = list(zip(evaluation.samples, glance.rival.answers, strict=False))
    lost = sum(sample.clean_prediction == sample.label != answer for sample, answer in pairs)
    won = sum(sample.clean_prediction != sample.label == answer for sample, answer in pairs)
    if won - lost < CLEAR_RISE * len(pairs) or mcnemar(lost, won) >= UNLIKELY:
        return None
    plain, better = (Rate(hits, len(pairs)) for hits in _right(pairs))
    return (
        f"With inputs normalised by the usual constants of {glance.rival.name}, {better.percent} are right instead of"
        f" {plain.percent}: the network was probably trained on normalised inputs, so give it them"
        " (--normalise dataset, or --mean and --std; brittle.Normalize)."
    )


def _right(pairs: Sequence[tuple[SampleResult, int]]) -> tuple[int, int]:
    """How many samples the network answers rightly, as they are and normalised."""
    plain = sum(sample.clean_prediction == sample.label for sample, _ in pairs)
    return plain, sum(answer == sample.label for sample, answer in pairs)


def normalised_twice(evaluation: Evaluation, tally: Tally, glance: Glance) -> str | None:
    """A network behind a normalisation that begins with one of its own."""
    if len(glance.normalisations) < 2:
        return None
    return (
        "The inputs are normalised twice, since the network begins with a normalisation of its own: leave the outer"
        " one out (--normalise none, or no --mean and --std)."
    )


def narrow_inputs(evaluation: Evaluation, tally: Tally, glance: Glance) -> str | None:
    """Inputs that use next to nothing of the bounds."""
    (low, high), used = evaluation.bounds, tally.high - tally.low
    if not 0 <= used <= TINY_RANGE * (high - low):
        return None
    return (
        f"All inputs lie between {tally.low:.3g} and {tally.high:.3g}, {100 * used / (high - low):.2g} % of the bounds"
        f" [{low:g}, {high:g}] in which the attacks search: check that they were not divided by 255 twice, or give"
        " the bounds of their own units."
    )


MISTAKES: tuple[Callable[[Evaluation, Tally, Glance], str | None], ...] = (
    overlarge_budget,
    normalised_twice,
    unnormalised,
    hardly_better,
    foreign_inputs,
    missing_classes,
    narrow_inputs,
)
"""What is looked for, the gravest first."""
