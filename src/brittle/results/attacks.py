"""What attacks achieve: on samples, at one budget and over many, in the layers, and with one perturbation for all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from brittle.errors import InputError, first_line
from brittle.results.examples import Examples
from brittle.results.rate import Rate, Setting
from brittle.results.showing import Shown
from brittle.results.wording import budget, norm_name

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Flag:
    """One check of whether robust accuracies can be trusted, and the number that raised it or did not.

    Attributes:
        name: What was looked for.
        raised: Whether it was found: the robust accuracies it concerns must not be trusted.
        finding: What was measured, with its number.
        meaning: Why this matters, in one line.
        p: Norm of the budget whose robust accuracy it concerns; None: every norm.
    """

    name: str
    raised: bool
    finding: str
    meaning: str
    p: float | None = None


@dataclass(frozen=True)
class SampleResult:
    """One sample under attack; the verdict is recomputed from the stored adversarial example.

    Attributes:
        index: Position in the data.
        label: True class.
        clean_prediction: Class predicted without attack.
        adversarial_prediction: Class predicted on the worst example found (the clean one when none was needed).
        clean_margin: ``s_y - max_{j != y} s_j`` in logit units, without attack.
        adversarial_margin: The same on the worst example found.
        distance: ``||x_adv - x||_p`` in input units, measured on the stored example.
        attack: Name of the attack that broke it; None if it was wrong to begin with or survived.
        restart: Restart (from 0) in which it broke; None likewise.
        certified_radius: Lower bound of the distance to the nearest adversarial example, in input units: 0 for samples
            that are wrong without attack; None when no sound rule covers the network.
        proven: Not attacked, because it is proven that no perturbation within the budget breaks it.
        measured: Whether relaxations searched for the certified radius; where not, it follows from a global bound or
            from a proof at the budget alone.
    """

    index: int
    label: int
    clean_prediction: int
    adversarial_prediction: int
    clean_margin: float
    adversarial_margin: float
    distance: float
    attack: str | None
    restart: int | None
    certified_radius: float | None = None
    proven: bool = False
    measured: bool = False


@dataclass(frozen=True)
class ClassAccuracy:
    """Accuracy on the samples of one class.

    Attributes:
        label: The class.
        clean: Right without attack, of all samples of the class.
        robust: Right without attack and under every attack, of the same: an upper estimate.
    """

    label: int
    clean: Rate
    robust: Rate


@dataclass(frozen=True)
class FragileSample:
    """A sample that is right without attack, and how little it takes to change that.

    Attributes:
        index: Position in the data.
        label: True class.
        prediction: Class predicted on the shortest perturbation found; the label where none was.
        margin: ``s_y - max_{j != y} s_j`` in logit units, without attack.
        distance: Norm of the shortest perturbation found that changes the prediction, in input units: an upper bound of
            the distance to the nearest one. None where none was found within the budget.
    """

    index: int
    label: int
    prediction: int
    margin: float
    distance: float | None


@dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """Clean and robust accuracy of one model at one budget, and what was run to find it.

    Robust accuracy is an upper estimate of the true one: the attack may have missed an adversarial example, it
    cannot have invented one, since every budget and verdict was checked again on the stored example.

    Attributes:
        attacks: Names of the attacks, in the order they were run; the worst case over them counts.
        p: Norm of the budget: 2 or inf.
        eps: Budget ``||x_adv - x||_p <= eps`` in input units.
        bounds: Smallest and largest admissible input value.
        restarts: Random restarts of each attack; the worst case counts.
        seed: Seed of the random starts, which depend on the sample's index and not on the batch.
        settings: The attacks' own settings.
        n: Samples.
        clean_correct: Samples right without attack.
        robust_correct: Samples right without attack and under every attack.
        rejected: Examples that an attack returned outside the budget, the bounds or the finite numbers; not counted.
        largest_perturbation: Largest ``||x_adv - x||_p`` among the accepted examples.
        proven: Samples that were not attacked because they are proven robust at the budget.
        tried: Samples on which a relaxation was tried; None: not known (an older file).
        untried: Why relaxations were tried on none; None where they were.
        forwards: Samples put through the network without gradient, re-checks included.
        backwards: Samples put through the network with a gradient: what the attacks cost.
        misled: Samples that further attacks went on with, because plain gradients were found to mislead there.
        chance: Accuracy of answers that ignore the input: one over the number of classes, or the agreement that
            shuffled answers would have with the labels, whichever is larger. None in results of older versions.
        warnings: What is probably not meant as it was given, a sentence each: labels, budget, normalisation, inputs.
        flags: The checks of whether the robust accuracy can be trusted; none in an audit, whose norms have them.
        classes: Accuracy by class, of the classes that have samples; none in results of older versions.
        median_margin: Median of ``s_y - max_{j != y} s_j`` over the samples that are right without attack, in logit
            units: an estimate from these samples. None where there are none, and in results of older versions.
        samples: Per-sample results, kept out of the JSON (they go to Parquet) and of comparisons.
        examples: Inputs and adversarial examples where they were asked for, kept out of the JSON and of comparisons.
    """

    attacks: tuple[str, ...]
    p: float
    eps: float
    bounds: tuple[float, float]
    restarts: int
    seed: int
    settings: dict[str, Setting]
    n: int
    clean_correct: int
    robust_correct: int
    rejected: int
    largest_perturbation: float
    proven: int = 0
    forwards: int = 0
    backwards: int = 0
    misled: int = 0
    tried: int | None = None
    untried: str | None = None
    chance: float | None = None
    warnings: tuple[str, ...] = ()
    flags: tuple[Flag, ...] = ()
    classes: tuple[ClassAccuracy, ...] = ()
    median_margin: float | None = None
    samples: tuple[SampleResult, ...] = field(default=(), compare=False, repr=False, metadata={"json": False})
    examples: Examples | None = field(default=None, compare=False, repr=False, metadata={"json": False})

    @property
    def clean_accuracy(self) -> Rate:
        """Right without attack, over all samples."""
        return Rate(self.clean_correct, self.n)

    @property
    def robust_accuracy(self) -> Rate:
        """Right under the worst attack, over all samples."""
        return Rate(self.robust_correct, self.n)

    @property
    def fooling_rate(self) -> Rate:
        """Predictions changed by the attack, over the samples that were right without it."""
        return Rate(self.clean_correct - self.robust_correct, self.clean_correct)

    @property
    def summary(self) -> str:
        """One line: budget, clean and robust accuracy, and how many samples are proven robust or attacked further."""
        proven = f"; {self.proven} proven robust" if self.proven else ""
        misled = f"; {self.misled} attacked further, since gradients mislead" if self.misled else ""
        accuracies = f"clean {self.clean_accuracy}, robust {self.robust_accuracy}"
        return f"{norm_name(self.p)} {budget(self.eps)}: {accuracies}{proven}{misled}"

    def __repr__(self) -> str:
        return f"<Evaluation of {self.n} samples, {self.summary}>"

    @property
    def doubts(self) -> tuple[str, ...]:
        """What speaks against the robust accuracy, a sentence each: raised flags, unless proof and attack meet within a
        point, and fewer than 100 right samples.
        """
        found = []
        if self.robust_correct - self.proven > 0.01 * self.n:
            raised = (flag for flag in self.flags if flag.raised)
            found = [f"Do not trust the robust accuracy ({flag.name}). {flag.finding}" for flag in raised]
        if self.clean_correct < 100:
            found.append(f"Only {self.clean_correct} samples are right without attack: too few for a verdict (100).")
        return tuple(found)

    def to_frame(self) -> pd.DataFrame:
        """The per-sample results, one row a sample."""
        import pandas as pd

        names = [f.name for f in dataclasses.fields(SampleResult)]
        frame = pd.DataFrame([[getattr(s, n) for n in names] for s in self.samples], columns=names)
        frame["certified_radius"] = frame["certified_radius"].astype("Float64")
        frame["attack"], frame["restart"] = frame["attack"].astype("string"), frame["restart"].astype("Int64")
        return frame.assign(p=self.p, eps=self.eps)

    def with_samples(self, frame: pd.DataFrame) -> Evaluation:
        """The evaluation with the per-sample results of :meth:`to_frame` put back; rows of other norms are passed over.

        Raises:
            InputError: They are not those of the evaluation: other columns, budgets, numbers or counts.
        """
        names = [f.name for f in dataclasses.fields(SampleResult)]
        if missing := {"p", *names} - {*frame.columns}:
            raise InputError(f"samples: expected the columns of an audit's samples; got none of {sorted(missing)}")
        try:
            rows = frame[frame["p"].astype(float) == self.p][names]
            rows = rows.astype(dict.fromkeys(("index", "label", "clean_prediction"), "int64")).astype(object)
        except (TypeError, ValueError) as error:
            raise InputError(f"samples: expected numbers as an audit has them; got {first_line(error)}") from None
        rows = rows.where(rows.notna(), None)
        samples = tuple(SampleResult(*row) for row in rows.itertuples(index=False, name=None))
        right = [sample for sample in samples if sample.clean_prediction == sample.label]
        counts = (len({s.index for s in samples}), len(right), sum(sample.attack is None for sample in right))
        if len(samples) != self.n or counts != (self.n, self.clean_correct, self.robust_correct):
            expected = f"{self.n} samples, {self.clean_correct} right, {self.robust_correct} under attack"
            raise InputError(f"samples: expected those of the audit in {norm_name(self.p)}, {expected}; got {counts}")
        return dataclasses.replace(self, samples=samples)


@dataclass(frozen=True)
class SecurityCurve:
    """Robust accuracy over a range of budgets (upper estimates; non-increasing in eps by construction).

    Attributes:
        p: Norm of the budgets: 2 or inf.
        eps: Budgets in input units, rising.
        robust: Samples that are right under every perturbation that was found within each budget.
    """

    p: float
    eps: tuple[float, ...]
    robust: tuple[Rate, ...]

    @property
    def n(self) -> int:
        """Samples that were counted."""
        return max((rate.n for rate in self.robust), default=0)


@dataclass(frozen=True)
class CertifiedCurve:
    """Certified accuracy over a range of budgets: a lower bound of the true robust accuracy, which the
    :class:`SecurityCurve` bounds from above; non-increasing in eps.

    Attributes:
        p: Norm of the budgets.
        eps: Budgets, rising: those at which the certificates of samples run out, and those of the security curve.
        certified: Samples right without attack whose certified radius exceeds the budget, at each of them; of those
            whose radii relaxations searched for, or of all where that was tried on none.
        median_radius: Median certified radius over the counted samples that are right without attack; None if there
            are none.
        measured: Samples whose radii relaxations searched for; None: not known (an older file).
        untried: Why there are none, so that radii follow from a global bound alone; None where there are.
        withstood: Counted samples that withstood the attacks at the standard budget; None in an older file, which
            counts all.
    """

    p: float
    eps: tuple[float, ...]
    certified: tuple[Rate, ...]
    median_radius: float | None
    measured: int | None = None
    untried: str | None = None
    withstood: Rate | None = None

    @property
    def n(self) -> int:
        """Samples that were counted."""
        return max((rate.n for rate in self.certified), default=0)

    def at(self, eps: float) -> Rate:
        """Certified accuracy at a budget, or at the next larger one that was counted (then from below)."""
        for point, rate in zip(self.eps, self.certified, strict=True):
            if point >= eps:
                return rate
        return Rate(0, self.n)

    def undecided(self, evaluation: Evaluation) -> Rate:
        """Counted samples that withstood the attack of an evaluation of the same data without being proven robust."""
        withstood = self.withstood or evaluation.robust_accuracy
        return Rate(withstood.hits - self.at(evaluation.eps).hits, withstood.n)


@dataclass(frozen=True)
class LayerResponse:
    """What the attack's perturbation does at one layer, over the samples that were attacked.

    Attributes:
        layer: Qualified name.
        p: Norm of the attack's budget.
        k: Numbers of leading right singular directions.
        energy: Mean share of the perturbation's squared l2 norm, at the layer's input, that lies in those k
            directions (convolutions: over the patches that the filters see).
        isotropic: The share ``k / n`` that a perturbation without preferred direction would have.
        amplification: Median of ``||z_adv - z||_2 / ||z||_2`` at the layer's output.
        gain: Median of ``||z_adv - z||_2 / ||x_adv - x||_2`` at the layer's output.
        n: Samples counted in amplification and gain (energy: those whose perturbation arrives at the layer).
        excluded: Samples left out because the perturbation or the clean output was zero.
        energy_error: Standard error of each mean in ``energy``; empty for one sample, and in results of older versions.
        step: Geometric mean of the layer's own gain ``||W a||_2 / ||a||_2``, a the change of what its matrix reads
            (for a convolution, of all patches together): at most ``||W||_2``. None where it has no energy.
        step_error: Standard error of the logarithm of ``step``; None for one sample.
    """

    layer: str
    p: float
    k: tuple[int, ...]
    energy: tuple[float, ...]
    isotropic: tuple[float, ...]
    amplification: float | None
    gain: float | None
    n: int
    excluded: int
    energy_error: tuple[float, ...] = ()
    step: float | None = None
    step_error: float | None = None


@dataclass(frozen=True)
class UniversalResult:
    """One perturbation for all inputs, chosen on one part of the data and judged on the other.

    Attributes:
        p: Norm of the budget.
        eps: Budget.
        kind: One of :class:`~brittle.results.methods.UniversalKind`.
        direction: How it was found; for a data-free one its sign, the direction and the layer.
        fitted_on: Samples it was fitted on, or on which the sign of a data-free one was chosen.
        fooled: Predictions changed on the held-out samples that were right without it.
        random_fooled: The same for each of several random perturbations of equal size (random signs, or random
            directions).
        robust: Held-out samples right under the universal perturbation.
    """

    p: float
    eps: float
    kind: str
    direction: str
    fitted_on: int
    fooled: Rate
    random_fooled: tuple[Rate, ...]
    robust: Rate

    @property
    def random_mean(self) -> Rate:
        """The random perturbations' rate on average: counts added up, so that only the value has a meaning."""
        return Rate(sum(rate.hits for rate in self.random_fooled), sum(rate.n for rate in self.random_fooled))

    @property
    def random_range(self) -> tuple[Rate, Rate]:
        """The least and the largest rate of the random perturbations."""
        rates = sorted(self.random_fooled, key=lambda rate: rate.hits)
        return rates[0], rates[-1]


def warnings_of(evaluations: Sequence[Evaluation]) -> tuple[str, ...]:
    """The warnings of several evaluations, each once."""
    return tuple(dict.fromkeys(warning for evaluation in evaluations for warning in evaluation.warnings))


def read_samples(path: Path) -> pd.DataFrame:
    """The per-sample results of a ``samples.parquet``.

    Raises:
        InputError: There is no such file, or it is no Parquet.
    """
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise InputError(f"samples: expected a Parquet file of an audit; got {path}: {first_line(error)}") from None


def samples_frame(evaluations: Sequence[Evaluation]) -> pd.DataFrame:
    """All per-sample results, one row a sample and budget."""
    import pandas as pd

    frames = [evaluation.to_frame() for evaluation in evaluations]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
