"""Does every intervention move its own statistic? One network on MNIST, trained plainly and with each of them.

    python benchmarks/interventions.py --data-root DATA --out DIR

The network is the FCN 784-400-400-10 behind its normalisation. What an intervention does by its definition gives its
statistic a direction or a target. It has moved when it went there for every chosen layer and every seed; an
intervention is affordable when its mean clean accuracy on the test split is at most two points below that of the plain
network. Structure is measured without unit, so that shrinking the weights moves none of it.
Strengths, rank, schedule and the small steps of SGD were chosen by a search on seed 0 that looked at the same test
split and the same statistics: the table shows that such settings exist, and does not compare interventions.
Prints the table and writes DIR/interventions.json and DIR/training.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn

import brittle
from brittle.data.load import Data, load_data
from brittle.evaluation.threat import Threat
from brittle.linear.compressibility import effective_sparsity, k_term_error, singular_values
from brittle.models.build import build_model
from brittle.models.normalize import normalised
from brittle.models.selection import chosen_layers, matrix
from brittle.reporting.drawing import INK, SERIES, legend, log_scale, styled
from brittle.results.wording import number
from brittle.training import Adversary, Interventions, Recipe, RefreshedNuclearNorm, factorised, spread_control, train

TOLERANCE = 1e-4
"""Relative distance from a constraint's target that rounding may leave."""
LOSS = 2.0
"""Points of clean accuracy that an intervention may cost."""
RANK, CONSTANT, CAP, CONDITION = 40, 10.0, 1.0, 2.0
EPS = {math.inf: 0.1, 2.0: 1.0}
LEAST = 0.05
"""Smaller ratios are drawn as an arrow at this one."""
ATTACKED = 500
"""Test samples that are attacked."""


@dataclass(frozen=True)
class Statistic:
    """What an intervention is to move.

    Attributes:
        name: In a few words.
        of: From a trained network to one number a chosen layer, or one in all.
        goal: ``falls``, ``rises``, ``=`` or ``≤``.
        target: What it is to be equal to, or at most.
    """

    name: str
    of: Callable[[nn.Module, Data], list[float]]
    goal: str
    target: float = math.nan

    @property
    def words(self) -> str:
        """The prediction."""
        return {"falls": "↓", "rises": "↑"}.get(self.goal, f"{self.goal} {self.target:g}")

    def moved(self, before: float, after: float) -> bool:
        """Whether the prediction holds; a target that held before proves nothing."""
        if self.goal in ("falls", "rises"):
            return after < before if self.goal == "falls" else after > before
        return self.holds(after) and not self.holds(before)

    def holds(self, value: float) -> bool:
        """Whether the target is met."""
        room = TOLERANCE * self.target
        return abs(value - self.target) <= room if self.goal == "=" else value <= self.target + room


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        name: The intervention.
        strength: In words.
        statistics: Its own.
        recipe: Where it differs from the plain one.
        penalty: A penalty that no name in a recipe stands for, made anew for every training, with its strength.
        rank: Of low-rank factors, drawn at random; None for full matrices.
        against: Which case it is compared with.
    """

    name: str
    strength: str = ""
    statistics: tuple[Statistic, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    penalty: tuple[Callable[[], Callable[[nn.Module], Tensor]], float] | None = None
    rank: int | None = None
    against: str = "plain"


def by_layer(of: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Data], list[float]]:
    """A statistic of every chosen layer's matrix, in float64."""
    return lambda model, data: [float(of(W)) for W in matrices(model)]


def matrices(model: nn.Module) -> list[Tensor]:
    """The chosen layers' matrices."""
    return [matrix(layer).detach().double() for layer in chosen_layers(model)]


def row_error(W: Tensor) -> Tensor:
    """k-term error of the l1 row norms, the largest tenth kept."""
    return k_term_error(brittle.row_norms(W), len(W) // 10)


def spectral_error(W: Tensor) -> Tensor:
    """k-term error of the singular values, the largest tenth kept."""
    return k_term_error(singular_values(W), min(W.shape) // 10)


def entry_share(W: Tensor) -> Tensor:
    """``(||W||_1 / ||W||_F)^2`` over the number of entries: 1 when all have one size, near 0 when few are large."""
    return effective_sparsity(W.flatten()) / W.numel()


def relative_variance(W: Tensor) -> Tensor:
    """Variance over squared mean of the largest 5 % of the l2 row norms."""
    top: Tensor = W.norm(dim=1).topk(math.ceil(0.05 * len(W))).values
    return top.var(correction=0) / top.mean().square()


def condition(W: Tensor) -> Tensor:
    """``sigma_1 / sigma_r`` with r the number of singular values that are not rounding."""
    sigma = singular_values(W)
    return sigma[0] / sigma[rank(W) - 1]


def rank(W: Tensor) -> int:
    """Singular values above a millionth of the largest: a product of float32 factors is exact to 1e-7 or so."""
    sigma = singular_values(W)
    return int((sigma > 1e-6 * sigma[0]).sum())


def joint_share(model: nn.Module, data: Data) -> list[float]:
    """:func:`entry_share` of the product of the two hidden layers' matrices."""
    first, second = matrices(model)
    return [float(entry_share(second @ first))]


def distance_from_orthonormal(model: nn.Module, data: Data) -> list[float]:
    """``max(sigma_1(A), 1 / sigma_r(A))`` of every pair's first factor: 1 when its rows are orthonormal, else more."""
    factors = [layer.modules[0].get_parameter("weight").detach().double() for layer in chosen_layers(model)]
    return [float(torch.maximum(sigma[0], 1 / sigma[-1])) for sigma in map(singular_values, factors)]


def robust_accuracy(p: float) -> Callable[[nn.Module, Data], list[float]]:
    """Accuracy in per cent within the budget under the preset ``fast``, on the first attacked test samples."""

    def measured(model: nn.Module, data: Data) -> list[float]:
        found = brittle.evaluate(model, data.take(ATTACKED), Threat("fast", p=p), eps=EPS[p], honesty=False)
        return [100 * found.robust_correct / found.n]

    return measured


ROWS = Statistic("row 10 % error", by_layer(row_error), "falls")
SPECTRUM = Statistic("spectral 10 % error", by_layer(spectral_error), "falls")
RHO = Statistic("ρ = Σ‖wᵢ‖₂ / ‖W‖F", by_layer(lambda W: effective_sparsity(W.norm(dim=1)).sqrt()), "falls")
ENTRIES = Statistic("(‖W‖₁ / ‖W‖F)² / entries", by_layer(entry_share), "falls")
JOINT = Statistic("(‖W₂W₁‖₁ / ‖W₂W₁‖F)² / entries", joint_share, "falls")
SPREAD = Statistic("top 5 % norms, var / mean²", by_layer(relative_variance), "falls")
RANKS = Statistic("rank", by_layer(lambda W: torch.tensor(rank(W))), "=", RANK)
FROBENIUS = Statistic("‖W‖F", by_layer(torch.linalg.matrix_norm), "=", CONSTANT)
SPECTRAL = Statistic("σ₁", by_layer(lambda W: singular_values(W)[0]), "≤", CAP)
CONDITIONS = Statistic("σ₁ / σᵣ", by_layer(condition), "≤", CONDITION)
ORTHONORMAL = Statistic("max(σ₁(A), 1/σᵣ(A))", distance_from_orthonormal, "=", 1.0)


def penalised(name: str, strength: float, statistic: Statistic) -> Case:
    """A penalty of the package by its name."""
    return Case(name, f"{strength:g}".replace("e-0", "e-"), (statistic,), {"penalties": {name: strength}})


def attacked(p: float, name: str) -> Case:
    """Adversarial training at the budget that is measured."""
    adversary = Adversary(EPS[p], p, steps=10, ratio=0.5)
    statistic = Statistic(f"accuracy under {name} attack, %", robust_accuracy(p), "rises")
    return Case(f"adversarial, {name}", f"eps {EPS[p]:g}", (statistic,), {"adversary": adversary})


SGD = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "batch_size": 16}
REFRESH = 20
CASES = (
    Case("plain"),
    Case("SGD, small steps", "lr 0.05, batch 16", recipe={**SGD, "lr": 0.05}),
    penalised("group_lasso", 3e-3, ROWS),
    penalised("scale_invariant_group_lasso", 4e-2, RHO),
    penalised("nuclear_norm", 4e-3, SPECTRUM),
    Case(
        "nuclear_norm, refreshed", f"0.004, every {REFRESH} steps", (SPECTRUM,),
        penalty=(lambda: RefreshedNuclearNorm(REFRESH), 4e-3),
    ),
    penalised("l1", 1e-4, ENTRIES),
    penalised("joint_l1", 3e-5, JOINT),
    penalised("spread_control", 0.1, SPREAD),
    Case("spread_control, scale-free", "0.1", (SPREAD,), penalty=(lambda: scale_free, 0.1)),
    Case("low-rank factors", f"rank {RANK}", (RANKS,), rank=RANK),
    Case(
        "orthonormal + condition_cap", f"2 steps, limit {CONDITION:g}", (ORTHONORMAL, CONDITIONS),
        {"constraints": {"condition_cap": CONDITION, "orthonormal": 2}}, rank=RANK, against="low-rank factors",
    ),
    Case("frobenius", f"{CONSTANT:g}", (FROBENIUS,), {"constraints": {"frobenius": CONSTANT}}),
    Case("spectral_cap", f"{CAP:g}", (SPECTRAL,), {"constraints": {"spectral_cap": CAP}}),
    attacked(math.inf, "ℓ∞"),
    attacked(2.0, "ℓ₂"),
    Case(
        "SGD, large steps", "lr 0.3, batch 16", (ROWS, SPECTRUM),
        {**SGD, "lr": 0.3}, against="SGD, small steps",
    ),
)  # fmt: skip


def scale_free(model: nn.Module) -> Tensor:
    """Spread control that the scale of the weights does not change."""
    return spread_control(model, scale_free=True)


@dataclass(frozen=True)
class Trained:
    """A trained network.

    Attributes:
        model: In evaluation mode.
        accuracy: Clean, on the whole test split, in per cent.
        seconds: Of its training.
        drift: How far a refreshed penalty's gradient had moved within its last period, relatively; None for others.
    """

    model: nn.Module
    accuracy: float
    seconds: float
    drift: float | None


@dataclass(frozen=True)
class Row:
    """One statistic of one intervention.

    Attributes:
        case: The intervention.
        strength: In words.
        statistic: Its name.
        prediction: Where it was to go.
        against: What it is compared with.
        before: Values there, one list a seed, one number a layer.
        after: Values with the intervention, likewise.
        moved: Whether all of them went where they were to go.
        accuracy: Clean accuracy in per cent, one a seed.
        cost: Points of accuracy that the plain network of the same seed has more, one a seed.
        scale: ``||W||_F`` over that of the network it is compared with, geometric mean of layers and seeds.
        drift: As in :class:`Trained`, one a seed.
        seconds: Of the training, one a seed.
    """

    case: str
    strength: str
    statistic: str
    prediction: str
    against: str
    before: list[list[float]]
    after: list[list[float]]
    moved: bool
    accuracy: list[float]
    cost: list[float]
    scale: float
    drift: list[float | None]
    seconds: list[float]

    @property
    def affordable(self) -> bool:
        """Whether the mean accuracy is within the limit."""
        return statistics.mean(self.cost) <= LOSS

    @property
    def ratios(self) -> list[float]:
        """After over before, of every seed and layer."""
        return [b / a for one, two in zip(self.before, self.after, strict=True) for a, b in zip(one, two, strict=True)]


def trained(case: Case, data: Data, test: Data, epochs: int, seed: int) -> Trained:
    """A network trained as the case says; its seed decides the initial weights and the order of the samples."""
    model = normalised(build_model("fcn", seed=seed), [0.1307], [0.3081])
    if case.rank is not None:
        model = factorised(model, case.rank, initial="random", seed=seed)
    common = {"epochs": epochs, "schedule": "cosine", "seed": seed}
    alone = {"validation": 0.0, "select": "last", "measure_every": 0}
    penalties = [] if case.penalty is None else [(case.penalty[0](), case.penalty[1])]
    start = time.perf_counter()
    recipe = Recipe(**{**common, **alone, **case.recipe})
    found = train(model, data, recipe, interventions=Interventions(penalties=penalties)).model
    seconds = time.perf_counter() - start
    drifts = [p.drift.gradient for p, _ in penalties if isinstance(p, RefreshedNuclearNorm) and p.drift is not None]
    with torch.no_grad():
        right = (found(test.inputs).argmax(1) == test.labels).double().mean()
    return Trained(found, 100 * float(right), seconds, drifts[0] if drifts else None)


def rows_of(case: Case, networks: Mapping[str, Sequence[Trained]], test: Data) -> list[Row]:
    """One row a statistic; ``networks`` holds one network a seed of every case so far."""
    plain, with_it, without = networks["plain"], networks[case.name], networks[case.against]
    scales = [FROBENIUS.of(b.model, test)[i] / size for a, b in zip(without, with_it, strict=True)
              for i, size in enumerate(FROBENIUS.of(a.model, test))]  # fmt: skip
    rows = []
    for statistic in case.statistics:
        before, after = ([statistic.of(found.model, test) for found in side] for side in (without, with_it))
        pairs = [pair for one, two in zip(before, after, strict=True) for pair in zip(one, two, strict=True)]
        rows.append(
            Row(
                case=case.name,
                strength=case.strength,
                statistic=statistic.name,
                prediction=statistic.words,
                against=case.against,
                before=before,
                after=after,
                moved=all(statistic.moved(a, b) for a, b in pairs),
                accuracy=[found.accuracy for found in with_it],
                cost=[a.accuracy - b.accuracy for a, b in zip(plain, with_it, strict=True)],
                scale=statistics.geometric_mean(scales),
                drift=[found.drift for found in with_it],
                seconds=[found.seconds for found in with_it],
            )
        )
    return rows


def mean(values: Sequence[Sequence[float]]) -> float:
    """Over seeds and layers."""
    return statistics.mean(value for seed in values for value in seed)


def change(row: Row) -> str:
    """Both values, means over layers and seeds."""
    return " → ".join(f"{v:.0f}" if v.is_integer() else number(v) for v in (mean(row.before), mean(row.after)))


def table(rows: Sequence[Row], plain: Sequence[float]) -> list[str]:
    """The table, in Markdown."""
    heads = ["intervention", "strength", "clean accuracy, %", "its statistic", "without → with", "predicted", "moved"]
    lines = [f"| {' | '.join(heads)} | ‖W‖F, times |", "|---" * (len(heads) + 1) + "|"]
    lines.append(f"| plain | | {statistics.mean(plain):.2f} |" + " |" * 5)
    for row in rows:
        accuracy = f"{statistics.mean(row.accuracy):.2f}" + ("" if row.affordable else " (too low)")
        statistic = row.statistic + ("" if row.against == "plain" else f", against {row.against}")
        cells = [row.case, row.strength, accuracy, statistic, change(row), row.prediction]
        lines.append(f"| {' | '.join(cells)} | {'yes' if row.moved else 'NO'} | {row.scale:.2f} |")
    return lines


@styled
def picture(rows: Sequence[Row], plain: Sequence[float]) -> Figure:
    """Every statistic relative to the network without the intervention, and the clean accuracy."""
    figure = Figure(figsize=(8.6, 1.2 + 0.36 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2.6, 1))
    for axis in (left, right):
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.spines.left.set_visible(False)
        axis.tick_params(axis="y", length=0, labelleft=False)
        axis.set_yticks(range(len(rows)))
        axis.grid(visible=True)
    draw_statistics(left, rows)
    draw_accuracies(right, rows, statistics.mean(plain))
    keys = [look(True), look(True) | {"marker": "<"}, look(False), look(True) | {"markersize": 3, "alpha": 0.5}]
    words = ["went where predicted", "so far that it leaves the axis", "did not, or costs too much", "layers and seeds"]
    legend(figure, [Line2D([], [], **key) for key in keys], words)
    return figure


def draw_statistics(axis: Axes, rows: Sequence[Row]) -> None:
    """Ratios on a logarithmic axis, names and statistics at the left, values at the right."""
    axis.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    for y, row in enumerate(rows):
        middle = mean(row.after) / mean(row.before)
        shape = look(row.moved) | ({} if middle >= LEAST else {"marker": "<"})
        axis.plot([1, max(middle, LEAST)], [y, y], color=shape["color"], linewidth=1.4, alpha=0.7)
        single = [ratio for ratio in row.ratios if ratio >= LEAST]
        axis.plot(single, [y] * len(single), **{**shape, "marker": "o", "markersize": 3, "alpha": 0.5})
        axis.plot([max(middle, LEAST)], [y], **shape)
    log_scale(axis, [1.0, *(max(ratio, LEAST) for row in rows for ratio in row.ratios)])
    at = axis.get_yaxis_transform()
    for y, row in enumerate(rows):
        name = f"{row.case.replace('_', ' ')}: {row.strength}"
        aim = f"{row.statistic}  {row.prediction}" + ("" if row.against == "plain" else f"  (against {row.against})")
        axis.text(-0.02, y - 0.04, name, transform=at, ha="right", va="bottom", fontsize=8.5)
        axis.text(-0.02, y + 0.02, aim, transform=at, ha="right", va="top", fontsize=7.5, alpha=0.8)
        axis.text(1.02, y, change(row), transform=at, va="center", fontsize=8)
    axis.set_title("Its own statistic, times that without it")
    axis.set_xlabel("log scale")
    axis.text(1.02, -0.75, "without → with", transform=at, va="bottom", fontsize=8, alpha=0.8)


def draw_accuracies(axis: Axes, rows: Sequence[Row], plain: float) -> None:
    """Clean accuracies, the plain network's, and the limit below it."""
    axis.axvline(plain, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axis.axvspan(plain - LOSS, plain, color=INK, alpha=0.06, linewidth=0)
    for y, row in enumerate(rows):
        axis.plot(row.accuracy, [y] * len(row.accuracy), **{**look(row.affordable), "markersize": 3, "alpha": 0.5})
        axis.plot([statistics.mean(row.accuracy)], [y], **look(row.affordable))
    axis.set_title("Clean accuracy, %")
    axis.set_xlabel(f"dashed: plain, shaded: −{LOSS:g}", loc="right")


def look(good: bool) -> dict[str, Any]:
    """A filled circle, or a cross of another colour."""
    shape = {"marker": "o", "markersize": 5.5, "markeredgewidth": 0} if good else {"marker": "X", "markersize": 7}
    return {**shape, "color": SERIES[0 if good else 1], "linestyle": "none"}


def main() -> None:
    """Read the arguments, train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--limit", type=int, default=20_000, help="training samples")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", help="parts of the names of the interventions")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("."))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = load_data("mnist", root=arguments.data_root, split="train", limit=arguments.limit)
    test = load_data("mnist", root=arguments.data_root)
    wanted = [case for case in CASES if case.statistics and named(case, arguments.only)]
    needed = {"plain", *(case.name for case in wanted), *(case.against for case in wanted)}
    networks: dict[str, list[Trained]] = {}
    rows: list[Row] = []
    for case in (case for case in CASES if case.name in needed):
        networks[case.name] = [trained(case, data, test, arguments.epochs, seed) for seed in arguments.seeds]
        rows += rows_of(case, networks, test) if case in wanted else []
        print(
            f"{case.name}: {[f'{found.accuracy:.2f} %, {found.seconds:.0f} s' for found in networks[case.name]]}",
            flush=True,
        )
    plain = [found.accuracy for found in networks["plain"]]
    print("\n".join(table(rows, plain)))
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = {
        "samples": len(data.labels),
        "epochs": arguments.epochs,
        "seeds": arguments.seeds,
        "torch": torch.__version__,
    }
    found = {"settings": settings, "plain": plain, "rows": [dataclasses.asdict(row) for row in rows]}
    (arguments.out / "interventions.json").write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    picture(rows, plain).savefig(arguments.out / "training.png", dpi=200, facecolor="white")


def named(case: Case, parts: Sequence[str] | None) -> bool:
    """Whether a case is asked for."""
    return parts is None or any(part in case.name for part in parts)


if __name__ == "__main__":
    main()
