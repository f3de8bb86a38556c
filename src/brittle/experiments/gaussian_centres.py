"""Gaussian centres, each a class of its own: the laws of linear interpolants against simulation, and ReLU networks.

With as many centres as dimensions the least-norm linear interpolant keeps a radius of O(1) while half the distance
between centres grows as the root of the dimension (theory page, "Feature compression"). Whether networks that have far
more weights than they need do the same is the question of the second part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from brittle.experiments.claims import Claim, chosen_rows, over_seeds, slope
from brittle.experiments.experiment import Axes, Experiment
from brittle.experiments.plots import draw_means, look
from brittle.experiments.point_networks import (
    Box,
    attacked_radii,
    chain,
    cosines,
    interpolate,
    margin_gradients,
    nearest_partners,
)
from brittle.linear.minimum_distance import (
    interpolant_cosine_by_qr,
    interpolant_cosines,
    interpolant_radii,
    nearest_of_another_class,
)
from brittle.random_streams import generator
from brittle.reporting.drawing import legend, log_scale
from brittle.results import Statistic


def run(
    *, d: int, share: float, hidden: int, seed: int, draws: int = 0, width: int = 0, steps: int = 0
) -> dict[str, Any]:
    """Draw Gaussian centres, and ask a linear interpolant or a trained network what it keeps of their distances.

    Args:
        d: Dimension.
        share: Number of centres over d.
        hidden: Hidden layers of the network with ReLU that is trained; 0: no network, the laws of linear interpolants.
        seed: Of centres, weights and attacks.
        draws: Of the laws: sets of centres, of each of which one pair counts.
        width: Of a network: neurons of a hidden layer.
        steps: Of a network: steps of the optimiser, at least.

    Returns:
        ``centres``, their number, and what :func:`simulate` or :func:`interpolating_network` returns.
    """
    centres = max(2, round(share * d))
    part = (
        interpolating_network(d, centres, hidden, width, steps, seed) if hidden else simulate(d, centres, draws, seed)
    )
    return {"centres": centres, **part}


def simulate(d: int, centres: int, draws: int, seed: int) -> dict[str, float]:
    """One pair of each of many sets of centres: the exact radius of the linear interpolant, and phi.

    Returns:
        Medians over the draws of ``radius``, of ``optimal``, half the distance of the pair, and of ``phi``, their
        ratio; the mean ``phi_squared``. Means of what the laws say is uniform between 0 and 1: ``level_phi``, the
        distribution function Beta((d - N + 1)/2, (N - 1)/2) at phi squared, and ``level_radius``, that of chi squared
        with d - N + 1 degrees of freedom at twice the radius squared.
    """
    from scipy.stats import beta, chi2

    numbers = generator(seed, d * 10**6 + centres)
    optimal, phi = torch.zeros(draws, dtype=torch.float64), torch.zeros(draws, dtype=torch.float64)
    for draw in range(draws):
        points = torch.randn(centres, d, generator=numbers, dtype=torch.float64)
        phi[draw] = interpolant_cosine_by_qr(points, centres - 2, centres - 1)
        optimal[draw] = (points[-1] - points[-2]).norm() / 2
    radius, free = phi * optimal, d - centres + 1
    return {
        "radius": float(radius.median()),
        "optimal": float(optimal.median()),
        "phi": float(phi.median()),
        "phi_squared": float(phi.square().mean()),
        "level_phi": float(beta.cdf(phi.square().numpy(), free / 2, (centres - 1) / 2).mean()),
        "level_radius": float(chi2.cdf(2 * radius.square().numpy(), free).mean()),
    }


def interpolating_network(d: int, centres: int, hidden: int, width: int, steps: int, seed: int) -> dict[str, float]:
    """A network with ReLU that gives every centre the score 1 for its own class and 0 for all others.

    Each centre is paired with the nearest other one.

    Returns:
        Medians over the centres: ``cosine``, ``|cos|`` between the gradient of the pair's margin and its direction;
        ``phi``, the same of the least-norm linear interpolant; ``kept``, the attacked radius (any other class; an upper
        bound) over half the distance of the pair; ``linear_kept``, the same of the linear interpolant, exact.
        ``residual``, the largest distance of a margin from 1; ``accuracy``, the share of centres that are right.
    """
    points = torch.randn(centres, d, generator=generator(seed, d * 10**6 + centres), dtype=torch.float64)
    labels, box = torch.arange(centres), Box.of(points)
    start = box.behind(chain((d, *[width] * hidden, centres), relu=True, seed=seed))
    network = interpolate(start, box.inputs, torch.eye(centres), steps=steps, seed=seed)
    nearest, apart = nearest_of_another_class(points, labels, points, labels)
    margins, gradients = margin_gradients(network, box.inputs, labels, nearest)
    partners = nearest_partners(points, labels, centres)
    largest = float(apart.max()) / box.unit
    radii = attacked_radii(network, box.inputs, labels, partners, largest=largest, seed=seed) * box.unit
    linear_radii = interpolant_radii(points).nan_to_num(nan=math.inf).amin(1)
    return {
        "cosine": float(cosines(gradients, points - points[nearest]).median()),
        "phi": float(interpolant_cosines(points)[labels, nearest].median()),
        "kept": float((radii / (apart / 2)).median()),
        "linear_kept": float((linear_radii / (apart / 2)).median()),
        "residual": float((margins - 1).abs().max()),
        "accuracy": float((radii > 0).double().mean()),
    }


def draw(table: pd.DataFrame) -> Figure:
    """Phi squared over N/d with its law; radii over d at N = d; what networks keep over N/d."""
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    figure.set_label("Gaussian centres: laws of linear interpolants, and networks")
    laws, radii, kept = figure.subplots(1, 3)
    linear, networks = table[table.hidden == 0], table[table.hidden > 0]
    for series, d in enumerate(sorted(linear.d.unique())[-3:]):
        draw_means(laws, linear[linear.d == d], "share", "phi_squared", series=series)
    laws.plot([0, 1], [1, 0], color="grey", linewidth=0.6)
    laws.set(title="Linear: φ², law 1 − N/d", xlabel="Centres over dimension, N/d", ylabel="Mean φ²")
    full = linear[linear.share == 1]
    for series, name in enumerate(("radius", "optimal")):
        draw_means(radii, full, "d", name, series=series)
    log_scale(radii, full.d)
    radii.set_yscale("log")
    radii.set(title="Linear, N = d", xlabel="Dimension d", ylabel="Median radius")
    radii.legend([Line2D([], [], **look(i)) for i in range(2)], ["interpolant", "half distance"], fontsize=7)
    for series, name in enumerate(KEPT):
        draw_means(kept, networks, "share", name, series=series)
    kept.set(title="Networks with ReLU", xlabel="Centres over dimension, N/d", ylim=(0, None))
    for axis in (laws, radii, kept):
        axis.grid(visible=True)
    legend(figure, [Line2D([], [], **look(series)) for series in range(len(KEPT))], list(KEPT.values()))
    return figure


KEPT = {
    "cosine": "|cos θ|, networks",
    "phi": "φ, linear",
    "kept": "radius over half distance, networks",
    "linear_kept": "the same, linear",
}
"""Columns of networks, in words."""


def farthest_from_law(level: Callable[[pd.DataFrame], tuple[float, float]]) -> Callable[[pd.DataFrame], Statistic]:
    """The largest distance of a mean from its law over all d and N, in standard errors of the law.

    Args:
        level: From rows of one d and N to the distance of their mean from the law's, and the law's deviation for one
            draw.

    Returns:
        A statistic; its interval is 1.96 to both sides.
    """

    def statistic(table: pd.DataFrame) -> Statistic:
        rows = table[table.hidden == 0]
        if rows.empty:
            return Statistic(None, None, None, 0, "there are no such rows")
        errors = []
        for _, group in rows.groupby(["d", "centres"]):
            distance, deviation = level(group)
            errors.append(abs(distance) * math.sqrt(float(group.draws.sum())) / deviation)
        return Statistic(max(errors), max(0.0, max(errors) - 1.96), max(errors) + 1.96, rows.seed.nunique())

    return statistic


def uniform(column: str) -> Callable[[pd.DataFrame], tuple[float, float]]:
    """Of a level between 0 and 1: the distance of its mean from 1/2, and the deviation of one draw."""
    return lambda rows: (float(rows[column].mean()) - 0.5, 1 / math.sqrt(12))


def mean_phi_squared(rows: pd.DataFrame) -> tuple[float, float]:
    """The distance of the mean of phi squared from (d - N + 1)/d, and the deviation of one draw of that Beta law."""
    d, centres = int(rows.d.iloc[0]), int(rows.centres.iloc[0])
    mean = (d - centres + 1) / d
    return float(rows.phi_squared.mean()) - mean, math.sqrt(mean * (1 - mean) / (d / 2 + 1))


def growth(column: str) -> Callable[[pd.DataFrame], float]:
    """Slope of the logarithm of a column over log d, for :func:`over_seeds`."""
    return lambda rows: slope("y", "x")(pd.DataFrame({"y": np.log(rows[column]), "x": np.log(rows.d)}))


def beyond_linear(column: str, linear: str) -> Callable[[pd.DataFrame], Statistic]:
    """What networks keep at N = d less what the linear interpolant keeps, mean over networks."""

    def statistic(table: pd.DataFrame) -> Statistic:
        networks = table[(table.hidden > 0) & (table.share == 1)]
        return over_seeds(lambda rows: float((rows[column] - rows[linear]).mean()))(networks)

    return statistic


def networks_shrink(table: pd.DataFrame) -> Statistic:
    """Slope of the logarithm of what networks keep of the half distance over log d, at N = d."""
    return over_seeds(growth("kept"))(chosen_rows(table[table.hidden > 0], {"share": 1}))


LAW = "theory page, of Gaussian points; arXiv 2406.16200, Theorem 1"
FULL = {"hidden": 0, "share": 1}
CLAIMS = (
    Claim(
        "The radius of the linear interpolant has the law that theory gives.",
        LAW,
        farthest_from_law(uniform("level_radius")),
        at_most=4.0,
        null=8.0,
        measure="Largest distance over d and N of the mean level of χ² from 1/2, in standard errors",
    ),
    Claim(
        "What it keeps of the half distance has the law that theory gives.",
        LAW,
        farthest_from_law(uniform("level_phi")),
        at_most=4.0,
        null=8.0,
        measure="Largest distance over d and N of the mean level of the Beta law from 1/2, in standard errors",
    ),
    Claim(
        "φ² has the mean (d − N + 1)/d.",
        LAW,
        farthest_from_law(mean_phi_squared),
        at_most=4.0,
        null=8.0,
        measure="Largest distance over d and N of the mean of φ² from it, in standard errors",
    ),
    Claim(
        "With as many centres as dimensions the radius of the interpolant is O(1).",
        "arXiv 2406.16200, Theorem 1",
        over_seeds(growth("radius"), FULL),
        at_most=0.15,
        null=0.5,
        measure="Slope over log d of the log of the median radius at N = d; null is √d",
    ),
    Claim(
        "Half the distance between centres is O(√d).",
        "arXiv 2406.16200, Theorem 1",
        over_seeds(growth("optimal"), FULL),
        at_least=0.45,
        measure="Slope over log d of the log of half the distance of a pair at N = d",
    ),
    Claim(
        "With half as many centres as dimensions nothing collapses.",
        "theory page, of Gaussian points",
        over_seeds(lambda rows: float(rows.phi.mean()), {"hidden": 0, "share": 0.5}),
        at_least=0.6,
        measure="Median φ at N = d/2, mean over d (the law: 0.71)",
    ),
    Claim(
        "Networks with ReLU through N = d centres keep as little of the direction between them as linear ones.",
        "arXiv 2406.16200, of multi-layer networks",
        beyond_linear("cosine", "phi"),
        at_most=0.1,
        null=0.2,
        measure="Median |cos θ| of networks less φ at N = d, mean over networks",
    ),
    Claim(
        "Their radii fall as far below half the distance as those of linear ones.",
        "arXiv 2406.16200, of multi-layer networks",
        beyond_linear("kept", "linear_kept"),
        at_most=0.1,
        null=0.2,
        measure="Median attacked radius over half the distance at N = d, networks less linear interpolants",
    ),
    Claim(
        "What they keep of half the distance falls as 1/√d.",
        "arXiv 2406.16200, of multi-layer networks",
        networks_shrink,
        at_most=-0.3,
        measure="Slope over log d of the log of the attacked radius over half the distance, at N = d",
    ),
)
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def _grids(seeds: int, draws: dict[int, int], networks: Axes) -> list[Axes]:
    """The laws, for each dimension as many draws as given, and networks."""
    seed = tuple(range(seeds))
    laws: list[Axes] = [
        {"d": d, "share": SHARES, "hidden": 0, "draws": count, "seed": seed} for d, count in draws.items()
    ]
    return [*laws, {**networks, "seed": tuple(range(min(seeds, 5)))}]


EXPERIMENT = Experiment(
    name="gaussian_centres",
    title="Gaussian centres: laws of linear interpolants, and networks with ReLU",
    source="Gao et al., arXiv 2406.16200, Theorems 1 and 4",
    run=run,
    figure=draw,
    grids={
        "smoke": _grids(1, {8: 20, 16: 20}, {"d": 6, "share": (0.5, 1.0), "hidden": 1, "width": 20, "steps": 100}),
        "small": _grids(
            8,
            {64: 200, 256: 60, 1024: 20, 4096: 4},
            {"d": (20, 40, 80), "share": (0.25, 0.5, 1.0), "hidden": (1, 2), "width": 200, "steps": 3000},
        ),
        "paper": _grids(
            20,
            {64: 1000, 256: 300, 1024: 50, 4096: 10},
            {"d": (20, 40, 80, 160), "share": SHARES, "hidden": (1, 2, 3), "width": 1000, "steps": 20_000},
        ),
    },
    claims=CLAIMS,
    seconds={"smoke": 1, "small": 6},
    about=(
        "N centres from a standard normal law in R^d, each its own class. A linear interpolant gives a centre the "
        "score 1 for its class and 0 for all others; the one of least norm has the largest radius. Of every set one "
        "pair counts, so that draws are independent; what it keeps is computed by one QR factorisation in float64.",
        "Networks with ReLU and one or two hidden layers of 200 are trained until their differences of logits are "
        "those scores at every centre, by distillation from the nearest-centre rule. They are attacked in ℓ₂ by "
        "APGD, on the cross-entropy and towards each of the nearest nine, without bounds of the inputs, an upper bound "
        "of the radius; each centre is paired with the nearest other one.",
    ),
)
