"""The experiments of the papers, by name."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from brittle.errors import InputError
from brittle.experiments.experiment import Experiment

EXPERIMENTS = (
    "fig2",
    "fig3",
    "fig4",
    "fig5_fcn",
    "fig5_conv",
    "normalisation",
    "fig6_vit",
    "fig6_clip",
    "fig7_adversarial",
    "fig7_universal",
    "fig7_transfer",
    "appendix_networks",
    "tug_of_war",
    "emergent",
    "emergent_conv",
    "unstructured",
    "mitigations",
    "fig8",
    "fig8_spectral",
    "leaderboard",
    "universal_training",
    "exponential_points",
    "gaussian_centres",
    "effective_ranks",
    "low_rank_fooling",
    "reconciliation",
    "feature_mnist",
    "feature_photographs",
    "feature_training",
)
"""Files of this package that define an ``EXPERIMENT``."""
CORES = 2
"""On which expected times are told."""
BYTES = 12_288
"""That a finished job takes on disk, in three small files."""
PAGE = 2_000_000
"""That a table, a figure and the page take at most."""


def named_experiments(names: Sequence[str]) -> list[Experiment]:
    """The experiments of these names; ``all`` stands for every one.

    Raises:
        InputError: There is no experiment of a name, or no name.
    """
    names = list(EXPERIMENTS) if "all" in names else list(dict.fromkeys(names))
    unknown = [name for name in names if name not in EXPERIMENTS]
    if unknown or not names:
        raise InputError(f"name: expected all or some of {', '.join(EXPERIMENTS)}; got {', '.join(unknown) or 'none'}")
    return [importlib.import_module(f"brittle.experiments.{name}").EXPERIMENT for name in names]


def overview(experiments: Sequence[Experiment]) -> tuple[str, ...]:
    """Of every experiment its claims, and for each scale jobs, expected time and disk, and the data that it needs."""
    lines = []
    for experiment in experiments:
        lines.append(f"{experiment.name}: {experiment.title} ({experiment.source})")
        for scale in experiment.grids:
            jobs, data = len(experiment.settings(scale)), experiment.data(scale)
            lines.append(
                f"  {scale}: {jobs} jobs, {_expected(experiment, scale, jobs)}, {(jobs * BYTES + PAGE) / 1e6:.1f} MB, "
                f"{'data ' + ', '.join(data) if data else 'no files of data'}"
            )
        for claim in experiment.claims:
            side = "at least" if claim.direction > 0 else "at most"
            lines.append(f"  - {claim.sentence} [{claim.place}; {side} {claim.threshold:g}]")
    return tuple(lines)


def _expected(experiment: Experiment, scale: str, jobs: int) -> str:
    if scale not in experiment.seconds:
        return "time not measured"
    minutes = experiment.seconds[scale] * jobs / CORES / 60
    return f"about {max(1, round(minutes))} min on {CORES} cores"
