"""The page of a reproduction: figure beside claim beside statistic beside verdict, one experiment after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup
from matplotlib.figure import Figure

from brittle.reporting.drawing import svg
from brittle.reporting.page import environment
from brittle.results import ClaimResult, ClaimVerdict, Reproduction
from brittle.results.wording import all_printable

LOOKS = {
    ClaimVerdict.REPRODUCED: "robust",
    ClaimVerdict.NOT_REPRODUCED: "weakened",
    ClaimVerdict.OPPOSITE: "broken",
    ClaimVerdict.NOT_TESTABLE: "unknown",
}
"""Colours of the verdicts, by the style's names."""


def reproduction_html(reproduction: Reproduction, figures: Mapping[str, Figure]) -> str:
    """The page as HTML without references to anything outside it; the same results give the same text.

    Args:
        reproduction: Experiments with their claims.
        figures: By the experiment's name; those without rows have none.
    """
    drawn = {name: Markup(svg(figure)) for name, figure in figures.items()}
    return (
        environment()
        .get_template("reproduction.html.j2")
        .render(
            reproduction=all_printable(reproduction),
            lines=reproduction_lines(reproduction),
            figures=drawn,
            looks=LOOKS,
        )
    )


def reproduction_lines(reproduction: Reproduction) -> tuple[str, ...]:
    """What came of the claims, in plain words: their number by verdict, then each experiment."""
    claims = [claim for experiment in reproduction.experiments for claim in experiment.claims]
    lines = [f"{len(claims)} claims: {_counted(claims)}."]
    for experiment in reproduction.experiments:
        failed = f"; {len(experiment.failed)} jobs failed" if experiment.failed else ""
        jobs = f"{experiment.rows} of {experiment.jobs} jobs{failed}"
        lines.append(f"{experiment.name} ({experiment.scale}, {jobs}): {_counted(experiment.claims)}.")
        if experiment.checks:
            apart = [check.column for check in experiment.checks if not check.agrees]
            said = f"all {len(experiment.checks)} columns agree" if not apart else f"apart in {', '.join(apart)}"
            lines.append(f"{experiment.name} against the stored table: {said}.")
    return tuple(lines)


def _counted(claims: Sequence[ClaimResult]) -> str:
    """How many claims have each verdict."""
    given = [claim.verdict for claim in claims]
    told = (f"{given.count(verdict)} {verdict}" for verdict in ClaimVerdict if verdict in given)
    return ", ".join(told) or "nothing to judge"
