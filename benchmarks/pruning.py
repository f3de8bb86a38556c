"""Figure 8 of the paper and beyond: twelve adversarially trained networks, pruned along a ladder, attacked the same.

    python benchmarks/pruning.py networks --data-root DATA --out DIR        # hours; again: goes on where it stopped
    python benchmarks/pruning.py ladder --data-root DATA --out DIR --table FILE.csv        # likewise
    python benchmarks/pruning.py draw --table FILE.csv --out FILE.png
    python benchmarks/pruning.py resnet20 --weights FILE.safetensors --data-root DATA --table FILE.csv

ResNet18-cifar of base width 16 on CIFAR-10, l_inf 8/255: baseline and compressible (scale-invariant group lasso), each
with and without spread control, three seeds. Every network is cut to nine shares of its MACs: layerwise, globally, by
one k-term error, by the planner, and by torch-pruning's own pruner with magnitude and Taylor importance. Every
compressed network as it is, with batch norms measured again, and with its layers refitted; all three without labels.
Robust accuracy is what APGD on cross-entropy and the targeted DLR loss leave. ``resnet20``: the same for a network that
a third party trained without attacks, within 1/255, at 75, 50 and 25 % of its MACs.
"""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import brittle
from brittle import Adversary, Recipe, Threat, apgd, apgd_targeted
from brittle.compression.allocation import ALLOCATIONS, cut, keep_best
from brittle.compression.cost import ChannelCosts, channel_costs
from brittle.compression.groups import ChannelGroups, channel_groups, remove_units, unit_scores
from brittle.compression.planner import Calibration, cross_entropy, plan
from brittle.compression.recalibration import recalibrated
from brittle.compression.refit import kept_rows, refitted
from brittle.compression.scores import row_l2
from brittle.training.runs import RunRequest, train_run
from helpers.resnet20 import resnet20

EPS = 8 / 255
ALPHA, SPREAD = 0.01, 0.1
EPOCHS, SEEDS = 10, (0, 1, 2)
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Of the MACs, that are kept."""
CALIBRATION, JUDGED, TESTED = 256, 256, 300
"""Samples: to plan and to repair on, to judge plans on (both of the training set), and to test on."""
METHODS = ("layerwise", "global", "k_term", "planner", "tp magnitude", "tp taylor")
REPAIRS = ("none", "recalibrated", "refitted")


def conditions() -> Iterator[tuple[str, float, float, int]]:
    """Name, strength of the group lasso and of the spread control, seed."""
    for seed in SEEDS:
        for kind, alpha in (("baseline", 0.0), ("compressible", ALPHA)):
            for suffix, spread in (("", 0.0), ("-spread", SPREAD)):
                yield f"{kind}{suffix}-{seed}", alpha, spread, seed


def train_networks(data_root: Path, out: Path, only: list[str]) -> None:
    """Train what is missing: one step of 1.25 eps from a random start (Wong et al. 2020), every sample attacked."""
    data = brittle.load_data("cifar10", split="train", root=data_root)
    for name, alpha, spread, seed in conditions():
        if (out / name / "weights.safetensors").is_file() or (only and name not in only):
            continue
        penalties = {"scale_invariant_group_lasso": alpha, "spread_control": spread}
        recipe = Recipe(
            epochs=EPOCHS, optimizer="sgd", lr=0.1, weight_decay=5e-4, schedule="cosine", crop=4, flip=True,
            penalties={key: value for key, value in penalties.items() if value},
            adversary=Adversary(EPS, steps=1, step_size=1.25 * EPS, ratio=1.0),
            validation=0.05, select="last", precision="bf16-mixed", measure_every=EPOCHS, seed=seed,
        )  # fmt: skip
        request = RunRequest(data_root=data_root, arch="resnet18-cifar", arguments={"width": 16}, recipe=recipe)
        started = time.process_time()
        train_run(request, data, out / name)
        print(f"{name}: {time.process_time() - started:.0f} CPU seconds", flush=True)


def judge(x: Tensor, y: Tensor, eps: float) -> Callable[[nn.Module], float]:
    """Robust accuracy under five steps of APGD; a tenth of the clean accuracy decides between equals."""

    def robust(network: nn.Module) -> float:
        with torch.no_grad():
            right = network(x).argmax(1) == y
            if not right.any():
                return 0.0
            attacked = apgd(network, x[right], y[right], eps=eps, steps=5)
            left = network(attacked).argmax(1) == y[right]
        return float((left.sum() + 0.1 * right.sum()) / len(x))

    return robust


def torch_pruning_network(
    model: nn.Module, groups: ChannelGroups, x: Tensor, y: Tensor, importance: str, budget: float
) -> nn.Module:
    """torch-pruning's own global pruner, its ratio bisected until the MACs are met; it leaves whole what we do."""
    import torch_pruning

    def pruned(ratio: float) -> nn.Module:
        copied = copy.deepcopy(model).train(mode=False)
        of = torch_pruning.importance
        measure = of.GroupMagnitudeImportance(p=2) if importance == "tp magnitude" else of.GroupTaylorImportance()
        whole = [copied.get_submodule(name) for name in groups.whole]
        pruner = torch_pruning.pruner.BasePruner(
            copied, x[:1], importance=measure, global_pruning=True, pruning_ratio=ratio, max_pruning_ratio=1.0,
            ignored_layers=whole,
        )  # fmt: skip
        if importance == "tp taylor":
            cross_entropy(copied(x), y).mean().backward()
        pruner.step()
        for parameter in copied.parameters():
            parameter.grad = None
        return copied.eval()

    def macs(network: nn.Module) -> float:
        return channel_costs(network, [], x, "macs").total()

    low, high = 0.0, 0.99
    best = model
    for _ in range(9):
        middle = (low + high) / 2
        network = pruned(middle)
        if abs(macs(network) - budget) < abs(macs(best) - budget):
            best = network
        low, high = (middle, high) if macs(network) > budget else (low, middle)
    return best


def plans_of(
    method: str,
    model: nn.Module,
    groups: ChannelGroups,
    costs: ChannelCosts,
    calibration: Calibration,
    judged: Calibration,
    shares: Sequence[float],
    eps: float,
) -> list[tuple[dict[str, Tensor], str]]:
    """Kept units at every share of the MACs, and which of the planner's candidates it was."""
    budgets = [share * costs.total() for share in shares]
    if method == "planner":
        plans = plan(model, groups, costs, budgets, calibration, judge(judged.x, judged.y, eps))
        return [(found.kept, found.candidate) for found in plans]
    scores = unit_scores(model, groups, row_l2)
    orders = {"k_term": functools.partial(ALLOCATIONS["k_term"], q=2.0)}  # type: ignore[call-arg]
    priorities = orders.get(method, ALLOCATIONS[method])(scores)
    return [(keep_best(scores, cut(priorities, costs.without, budget).counts), "") for budget in budgets]


def measure(network: nn.Module, data: brittle.Data, eps: float) -> dict[str, float]:
    """Clean and robust accuracy."""
    threat = Threat((functools.partial(apgd, steps=20), functools.partial(apgd_targeted, steps=20, targets=3)))
    found = brittle.evaluate(network, data, threat, eps=eps, honesty=False)
    robust = found.robust_accuracy
    low, high = robust.interval or (0.0, 1.0)
    return {"clean": found.clean_accuracy.value or 0.0, "robust": robust.value or 0.0, "low": low, "high": high}


def climb(
    networks: Iterable[tuple[str, nn.Module]],
    data_root: Path,
    table: Path,
    methods: list[str],
    shares: Sequence[float],
    eps: float,
) -> None:
    """Append a row for every network, method, share and repair that the table lacks."""
    train = brittle.load_data("cifar10", split="train", root=data_root, limit=CALIBRATION + JUDGED)
    test = brittle.load_data("cifar10", root=data_root, limit=TESTED)
    x, y = train.inputs[:CALIBRATION], train.labels[:CALIBRATION]
    held = Calibration(train.inputs[CALIBRATION:], train.labels[CALIBRATION:], train.inputs[CALIBRATION:])
    done = set[tuple[str, str, float, str]]()
    if table.is_file():
        frame = pd.read_csv(table, keep_default_na=False)
        done = {(r.network, r.method, round(float(r.share), 3), r.repair) for r in frame.itertuples()}
    for name, model in networks:
        started = time.process_time()
        calibration = Calibration(x, y, apgd(model, x, y, eps=eps, steps=10))
        attack = time.process_time() - started
        groups = channel_groups(model, x)
        costs = channel_costs(model, groups.groups, x, "macs")
        if (name, "dense", 1.0, "none") not in done:
            _append(
                table, {"network": name, "method": "dense", "share": 1, "repair": "none", **measure(model, test, eps)}
            )
        for method in methods:
            missing = [(s, r) for s in shares for r in _repairs(method) if (name, method, s, r) not in done]
            if not missing:
                continue
            started = time.process_time()
            own = method.startswith("tp ")
            plans = [] if own else plans_of(method, model, groups, costs, calibration, held, shares, eps)
            planning = time.process_time() - started
            for i, share in enumerate(shares):
                if own:
                    small = torch_pruning_network(model, groups, *calibration.both, method, share * costs.total())
                else:
                    small = remove_units(model, groups, plans[i][0], x[:16])
                for repair in (r for s, r in missing if s == share):
                    started = time.process_time()
                    network = small
                    if repair == "recalibrated":
                        network = recalibrated(small, calibration.both[0])
                    elif repair == "refitted":
                        rows = kept_rows(model, groups.groups, plans[i][0])
                        network = refitted(small, model, calibration.both[0], rows=rows)
                    repairing = time.process_time() - started
                    row = {
                        "network": name, "method": method, "share": share, "repair": repair,
                        **measure(network, test, eps),
                        "macs": channel_costs(small, [], x, "macs").total() / costs.total(),
                        "parameters": sum(p.numel() for p in small.parameters()),
                        "candidate": "" if own else plans[i][1],
                        "planning": round(planning, 1), "attack": round(attack, 1), "repairing": round(repairing, 1),
                    }  # fmt: skip
                    _append(table, row)


def trained(out: Path, only: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """The networks that are trained already."""
    for name, *_ in conditions():
        if (out / name / "weights.safetensors").is_file() and (not only or name in only):
            yield name, brittle.load_run(out / name)[0]


def published(weights: Path) -> nn.Module:
    """The ResNet20 of a third party, its normalisation inside."""
    network = resnet20()
    brittle.fill(network, brittle.read_state(weights))
    statistics = brittle.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return nn.Sequential(statistics, network).eval()


def _repairs(method: str) -> tuple[str, ...]:
    """torch-pruning's networks do not say which rows they kept, which a refit needs."""
    return REPAIRS[:2] if method.startswith("tp ") else REPAIRS


COLUMNS = (
    "network", "method", "share", "repair", "clean", "robust", "low", "high", "macs", "parameters", "candidate",
    "planning", "attack", "repairing",
)  # fmt: skip


def _append(table: Path, row: dict[str, object]) -> None:
    """One whole line at a time, so that an interruption leaves whole rows."""
    new = not table.is_file()
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if new:
            writer.writeheader()
        writer.writerow({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
    print(*row.values(), flush=True)


def draw(table: Path, out: Path) -> None:
    """Clean and robust accuracy along the ladder, a panel for every kind of network and repair."""
    from matplotlib.figure import Figure

    frame = pd.read_csv(table, keep_default_na=False)
    frame["kind"] = frame.network.str.rsplit("-", n=1).str[0]
    kinds = list(dict.fromkeys(frame.kind))
    figure = Figure(figsize=(4 * len(kinds), 9), layout="constrained")
    axes = figure.subplots(len(REPAIRS), len(kinds), sharex=True, sharey=True, squeeze=False)
    for row, repair in zip(axes, REPAIRS, strict=True):
        for ax, kind in zip(row, kinds, strict=True):
            part = frame[(frame.kind == kind) & (frame.repair == repair)]
            dense = frame[(frame.kind == kind) & (frame.method == "dense")]
            for i, method in enumerate(METHODS):
                mine = part[part.method == method].groupby("share")[["clean", "robust"]].mean()
                if len(mine):
                    ax.plot(1 - mine.index, 100 * mine.robust, marker="o", ms=3, color=f"C{i}", label=method)
                    ax.plot(1 - mine.index, 100 * mine.clean, ls=":", color=f"C{i}", lw=1)
            ax.axhline(100 * dense.robust.mean(), color="0.6", lw=0.8)
            ax.set_title(f"{kind}, {repair}", fontsize=9)
    axes[-1, 0].set_xlabel("share of the MACs removed")
    axes[0, 0].set_ylabel("accuracy (%): robust, dotted clean")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(out, dpi=130)


def areas(table: Path) -> pd.DataFrame:
    """Mean robust accuracy along the ladder, by kind of network, repair and method: seeds' mean and standard error."""
    frame = pd.read_csv(table, keep_default_na=False)
    frame["kind"] = frame.network.str.rsplit("-", n=1).str[0]
    frame = frame[frame.method != "dense"]
    each = frame.groupby(["kind", "repair", "method", "network"]).robust.mean()
    found = each.groupby(["kind", "repair", "method"]).agg(["mean", "count", "std"])
    found["error"] = found["std"] / np.sqrt(found["count"])
    return (100 * found[["mean", "error"]]).round(1).assign(networks=found["count"])


def main() -> None:
    """Read the command line and run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["networks", "ladder", "resnet20", "draw", "areas"])
    parser.add_argument("--data-root", type=Path, default=Path(os.environ.get("BRITTLE_DATA", "data")))
    parser.add_argument("--out", type=Path, default=Path("pruning"))
    parser.add_argument("--table", type=Path, default=Path("pruning.csv"))
    parser.add_argument("--weights", type=Path, help="of the ResNet20")
    parser.add_argument("--only", nargs="*", default=[], help="networks")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # torch-pruning's, of parameters outside of modules
    if options.part == "networks":
        train_networks(options.data_root, options.out, options.only)
    elif options.part == "ladder":
        climb(trained(options.out, options.only), options.data_root, options.table, options.methods, SHARES, EPS)
    elif options.part == "resnet20":
        network = published(options.weights)
        climb([("resnet20", network)], options.data_root, options.table, options.methods, (0.75, 0.5, 0.25), 1 / 255)
    elif options.part == "draw":
        draw(options.table, options.out)
    else:
        print(areas(options.table).to_string())


if __name__ == "__main__":
    main()
