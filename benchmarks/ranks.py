"""Rank cuts and what keeps them robust: no training, a short one, and the same with the published rivals' control.

    python benchmarks/ranks.py --weights FILE.safetensors --data-root DATA --out DIR --table FILE.csv

Layers of the networks of ``pruning.py`` (the ResNet20 of a third party within 1/255; adversarially trained ResNet18 of
width 16 within 8/255) become low-rank pairs at 75, 50 and 25 % of the multiply-accumulates, by the k-term allocation of
the directions of their outputs, or of their weights' singular values, and their layers are refitted. Behind that
follow 20 steps on attacked samples: plain; with orthonormal first factors and a capped condition number (CondLR,
Savostianova et al. 2023); with the penalty on the condition number of the cores (RobustDLRT, Schotthoefer et al. 2025).
Attacks, samples and columns are those of ``pruning.py``; ``condition`` is the largest condition number of a pair.
"""

from __future__ import annotations

import argparse
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from ladders import TESTED, read
from pruning import CALIBRATION, EPS, JUDGED, TUNED, measure, published, trained, tuning
from torch import nn

import brittle
from brittle.compression.factorise import merged, rank_map
from brittle.delivery import Compression
from brittle.delivery.mending import mended
from brittle.delivery.removers import rank_remover
from brittle.delivery.samples import Basis
from brittle.models.layers import read_layers

SHARES = (0.75, 0.5, 0.25)
"""Of the multiply-accumulates, that are kept."""
ROUTES: dict[str, dict[str, Any]] = {
    "trained": {},
    "CondLR": {"constraints": {"orthonormal": 2, "condition_cap": 2.0}},
    "RobustDLRT": {"penalties": {"condition": 0.1}},
}
"""What is added to the short training."""


def condition(network: nn.Module) -> float:
    """Largest condition number of a pair's product."""
    worst = 1.0
    ranks = rank_map(network)
    whole = read_layers(merged(network))
    for view in whole.views:
        if view.name in ranks:
            sigma = torch.linalg.svdvals(view.matrix.detach().double())
            worst = max(worst, float(sigma[0] / sigma[ranks[view.name] - 1]))
    return worst


def cuts(
    model: nn.Module, train: brittle.Data, eps: float, missing: set[tuple[str, float]]
) -> Iterator[tuple[str, float, nn.Module]]:
    """Score, share and the refitted network of low rank."""
    x, y = train.inputs[: CALIBRATION + JUDGED], train.labels[: CALIBRATION + JUDGED]
    basis = Basis(x, y, math.inf, eps)
    for score in sorted({score for score, _ in missing}):
        asked = Compression(target="macs", remove="ranks", score=score)
        remove = rank_remover(model, basis, asked)
        for share in sorted({share for s, share in missing if s == score}, reverse=True):
            removed = remove(1 - share)
            yield score, share, mended(removed.network, model, x, removed.rows, asked)


def main() -> None:
    """Read the command line and append the rows that the table lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=Path(os.environ.get("BRITTLE_DATA", "data")))
    parser.add_argument("--out", type=Path, default=Path("pruning"), help="folder of the networks")
    parser.add_argument("--table", type=Path, default=Path("ranks.csv"))
    parser.add_argument("--weights", type=Path, help="of the ResNet20")
    parser.add_argument("--only", nargs="*", default=["baseline-0", "baseline-1", "baseline-2"], help="networks")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    train = brittle.load_data("cifar10", split="train", root=options.data_root, limit=TUNED)
    test = brittle.load_data("cifar10", root=options.data_root, limit=TESTED)
    networks = [(name, model, EPS) for name, model in trained(options.out, options.only)] if options.only else []
    if options.weights:
        networks.append(("resnet20-0", published(options.weights), 1 / 255))
    for name, model, eps in networks:
        frame = read(options.table) if options.table.is_file() else pd.DataFrame(columns=["network", "method", "share"])
        done = {(r.method, float(r.share)) for r in frame[frame.network == name].itertuples()}
        if ("dense", 1.0) not in done:
            append(options.table, {"network": name, "method": "dense", "share": 1.0, **measure(model, test, eps)})
        missing = {(s, share) for s in ("outputs", "singular_values") for share in SHARES} - done
        for score, share, network in cuts(model, train, eps, missing):
            rows = [{"repair": "refitted", "condition": condition(network), **measure(network, test, eps)}]
            for route, added in ROUTES.items():
                recipe = replace(tuning(train, eps), **added)
                shaped = brittle.train(network, train, recipe).model
                rows.append({"repair": route, "condition": condition(shaped), **measure(shaped, test, eps)})
            for row in rows:
                append(options.table, {"network": name, "method": score, "share": share, **row})


COLUMNS = ("network", "method", "share", "repair", "clean", "robust", "low", "high", "condition", "left")


def append(table: Path, row: dict[str, object]) -> None:
    """One line, whole."""
    frame = pd.DataFrame([row], columns=list(COLUMNS)).round(6)
    frame.to_csv(table, mode="a", header=not table.is_file(), index=False)
    print(*(row.get(column, "") for column in COLUMNS[:-1]), flush=True)


if __name__ == "__main__":
    main()
