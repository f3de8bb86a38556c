"""Tables of ``pruning.py`` as figures and differences: robust accuracy along the ladder, one method against another.

python benchmarks/ladders.py draw --table FILE.csv --out FIGURE.png
python benchmarks/ladders.py areas|pairs|contrasts --table FILE.csv
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t as student

METHODS = ("layerwise", "global", "k_term", "planner", "tp magnitude", "tp taylor")
CAUSES = (("k_term by filters", "layerwise by filters"), ("k_term folded", "layerwise folded"))
"""Pairs of methods that are tried for a cause alone."""
TESTED = 300
"""Test samples of a network."""


def read(table: Path) -> pd.DataFrame:
    """The rows, with the kind of network and its seed."""
    frame = pd.read_csv(table, keep_default_na=False, dtype={"left": str})
    parts = frame.network.str.rsplit("-", n=1)
    return frame.assign(kind=parts.str[0], seed=parts.str[-1])


def draw(table: Path, out: Path, repairs: Collection[str]) -> None:
    """Robust accuracy along the ladder, clean dotted, a panel for every kind of network and repair."""
    from matplotlib.figure import Figure

    frame = read(table)
    kinds = list(dict.fromkeys(frame.kind))
    repairs = [repair for repair in repairs if (frame.repair[frame.method != "dense"] == repair).any()]
    figure = Figure(figsize=(3.4 * len(kinds) + 0.6, 2.7 * len(repairs) + 0.6), layout="constrained")
    axes = figure.subplots(len(repairs), len(kinds), sharex=True, sharey=True, squeeze=False)
    for row, repair in zip(axes, repairs, strict=True):
        for ax, kind in zip(row, kinds, strict=True):
            part = frame[(frame.kind == kind) & (frame.repair == repair)]
            dense = frame[(frame.kind == kind) & (frame.method == "dense")]
            for i, method in enumerate(METHODS):
                steps = part[part.method == method].groupby("share")
                if not len(steps):
                    continue
                mean, removed = 100 * steps.robust.mean(), 100 * (1 - steps.robust.mean().index)
                error = 196 * (steps.robust.mean() * (1 - steps.robust.mean()) / TESTED / steps.size()) ** 0.5
                line = {"color": f"C{i}", "lw": 1.8 if method == "planner" else 1}
                ax.plot(removed, mean, marker="o", ms=3, label=method, zorder=3, **line)
                ax.fill_between(removed, mean - error, mean + error, color=f"C{i}", alpha=0.1, lw=0)
                ax.plot(removed, 100 * steps.clean.mean(), ls=":", color=f"C{i}", lw=0.9)
            ax.axhline(100 * dense.robust.mean(), color="0.5", lw=0.8, label="whole network")
            networks = dense.network.nunique()
            many = f"{networks} network{'s' * (networks > 1)}"
            ax.set_title(f"{kind.replace('-spread', ', spread control')}\n{TITLES[repair]}, {many}", fontsize=9)
            ax.grid(alpha=0.25)
    figure.supxlabel("MACs removed (%)", fontsize=10)
    figure.supylabel(
        f"accuracy (%): robust with 95 % intervals ({TESTED} samples a network), clean dotted", fontsize=10
    )
    lines = {line.get_label(): line for ax in axes.flat for line in ax.lines if line.get_label()[0] != "_"}
    figure.legend(lines.values(), lines, loc="outside upper center", ncols=len(lines), fontsize=9, frameon=False)
    figure.savefig(out, dpi=100)


TITLES = {"none": "as cut", "recalibrated": "norms again", "refitted": "refitted", "tuned": "refitted, 20 steps"}


def areas(table: Path) -> pd.DataFrame:
    """Mean clean and robust accuracy along the ladder (%), by kind of network, repair and method."""
    frame = read(table)
    frame = frame[frame.method != "dense"]
    found = frame.groupby(["kind", "repair", "method"]).agg(
        clean=("clean", "mean"), robust=("robust", "mean"), networks=("network", "nunique"), rows=("share", "size")
    )
    return found.assign(clean=(100 * found.clean).round(1), robust=(100 * found.robust).round(1))


def pairs(table: Path) -> pd.DataFrame:
    """Robust accuracy by one method less that by another (points): along the ladder, and shares beyond noise.

    The difference at a sample is averaged over the networks of a kind and over the shares; its 95 % interval is over
    the samples, which all networks share. ``ahead`` and ``behind``: shares at which that interval, of one share alone,
    lies above or below 0.
    """
    frame = read(table)
    bits = np.array([[digit == "1" for digit in f"{int(left, 16):0{TESTED}b}"] for left in frame.left], float)
    rows = []
    for (kind, repair), part in frame[frame.method != "dense"].groupby(["kind", "repair"]):
        rivals = [*(("planner", method) for method in METHODS if method != "planner"), ("k_term", "layerwise"), *CAUSES]
        for one, other in rivals:
            both = [part[part.method == method].set_index(["share", "network"]) for method in (one, other)]
            shared = both[0].index.intersection(both[1].index)
            if not len(shared):
                continue
            numbers = [
                pd.Series(part.index[part.method == m], both[k].index)[shared] for k, m in enumerate((one, other))
            ]
            difference = 100 * (bits[numbers[0]] - bits[numbers[1]])
            by_share = [
                difference[shared.get_level_values("share") == s] for s in sorted(set(shared.get_level_values(0)))
            ]
            intervals = [_interval(each.mean(0)) for each in by_share]
            mean, error = _interval(difference.mean(0))
            rows.append({
                "kind": kind, "repair": repair, "method": one, "against": other, "points": round(mean, 1),
                "interval": f"{mean - error:.1f} to {mean + error:.1f}", "shares": len(by_share),
                "ahead": sum(m > e for m, e in intervals), "behind": sum(-m > e for m, e in intervals),
            })  # fmt: skip
    return pd.DataFrame(rows)


def contrasts(table: Path) -> pd.DataFrame:
    """Compressible networks less baseline ones, and spread control less none: robust accuracy (points).

    At every method, repair and share the networks of a seed are compared, which differ in nothing else; the mean over
    seeds has Student's 95 % interval. ``strong``: at half of the MACs and less. ``whole``: the networks not cut.
    """
    frame = read(table)
    frame = frame.assign(robust=100 * frame.robust, strong=frame.share.astype(float) <= 0.5)
    keys = ["repair", "method", "share", "seed"]
    rows = []
    for one, other in (("compressible", "baseline"), ("baseline-spread", "baseline"),
                       ("compressible-spread", "compressible"), ("compressible-spread", "baseline")):  # fmt: skip
        both = frame[frame.kind == one].merge(frame[frame.kind == other], on=[*keys, "strong"])
        both = both.assign(difference=both.robust_x - both.robust_y)
        for (repair, method), part in both.groupby(["repair", "method"]):
            for words, some in (("all", part), ("strong", part[part.strong])):
                each = some.groupby("seed").difference.mean()
                if len(each) > 1:
                    error = student.ppf(0.975, len(each) - 1) * each.std() / len(each) ** 0.5
                    rows.append({
                        "kind": one, "against": other, "repair": repair, "method": method, "shares": words,
                        "points": round(each.mean(), 1), "half": round(error, 1), "seeds": len(each),
                    })  # fmt: skip
    return pd.DataFrame(rows)


def _interval(values: np.ndarray) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval."""
    return float(values.mean()), float(1.96 * values.std(ddof=1) / len(values) ** 0.5)


def main() -> None:
    """Read the command line and tell one thing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["draw", "areas", "pairs", "contrasts"])
    parser.add_argument("--table", type=Path, default=Path("pruning.csv"))
    parser.add_argument("--out", type=Path, default=Path("pruning.png"), help="file of the figure")
    parser.add_argument("--repairs", nargs="*", default=list(TITLES))
    options = parser.parse_args()
    if options.what == "draw":
        draw(options.table, options.out, options.repairs)
    else:
        print({"areas": areas, "pairs": pairs, "contrasts": contrasts}[options.what](options.table).to_string())


if __name__ == "__main__":
    main()
