"""What repair without labels gives back: small MNIST networks without the weakest channels of every layer.

    python benchmarks/certified.py networks --data-root DATA --cache CACHE     # train what the cache lacks
    python benchmarks/repair.py --data-root DATA --cache CACHE

A share of every layer's channels goes, those of the smallest row norms. Clean and robust accuracy in per cent (APGD,
l_inf) of the whole network, the cut one, and the cut one repaired in several ways with unlabelled training samples.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from certified import load
from torch import Tensor, nn

import brittle
from brittle.compression import channel_groups, kept_rows, recalibrated, refitted, remove_units, unit_scores
from brittle.compression.scores import row_l2

BUDGETS = {"fcn2x100": 0.03, "adv3x100": 0.1, "conv": 0.05, "advconv": 0.1, "resnet": 0.03}
"""Per network, chosen so that the whole one keeps most of its accuracy."""


def cut(network: nn.Module, share: float, x: Tensor) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network without that share of every layer's channels, and the outputs that stay."""
    groups = channel_groups(network, x)
    kept = {
        name: scores.topk(max(1, round((1 - share) * len(scores)))).indices.sort().values
        for name, scores in unit_scores(network, groups, row_l2).items()
    }
    return remove_units(network, groups, kept, x), kept_rows(network, groups.groups, kept)


def accuracies(network: nn.Module, x: Tensor, y: Tensor, eps: float) -> str:
    """``clean / robust`` in per cent."""
    with torch.no_grad():
        right = network(x).argmax(1) == y
        adversarial = brittle.apgd(network, x, y, eps=eps, steps=20)
        robust = right & (network(adversarial).argmax(1) == y)
    return f"{100 * float(right.float().mean()):.1f} / {100 * float(robust.float().mean()):.1f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--names", nargs="+", default=list(BUDGETS), choices=list(BUDGETS))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.25, 0.5, 0.75])
    parser.add_argument("--ridges", nargs="+", type=float, default=[0.001, 0.3, 3.0])
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--samples", type=int, default=500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seen = brittle.load_data("mnist", root=arguments.data_root, split="train", limit=arguments.calibration).inputs
    test = brittle.load_data("mnist", root=arguments.data_root, split="test", limit=arguments.samples)
    fits = [f"ridge {ridge:g}" for ridge in arguments.ridges]
    print(f"| net, l_inf budget, removed | cut | recalibrated | {' | '.join(fits)} | then recalibrated | s |")
    print("|" + "---|" * (len(fits) + 5))
    for name in arguments.names:
        network, eps = load(name, arguments.cache), BUDGETS[name]
        print(f"| {name}, {eps}, nothing | {accuracies(network, test.inputs, test.labels, eps)} |", flush=True)
        for share in arguments.shares:
            small, rows = cut(network, share, test.inputs[:64])
            tried = [small, recalibrated(small, seen)]
            started = time.process_time()
            tried += [refitted(small, network, seen, rows=rows, ridge=ridge) for ridge in arguments.ridges]
            took = (time.process_time() - started) / len(fits)
            tried.append(recalibrated(refitted(small, network, seen, rows=rows), seen))
            cells = [accuracies(one, test.inputs, test.labels, eps) for one in tried]
            print(f"| {name}, {eps}, {share:.0%} | {' | '.join(cells)} | {took:.1f} |", flush=True)


if __name__ == "__main__":
    main()
