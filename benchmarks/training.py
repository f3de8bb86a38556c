"""What interventions cost: ratios to a plain training step, all measured in one run, in turn.

    python benchmarks/training.py steps                     # every intervention, three networks
    python benchmarks/training.py epoch --data-root DATA    # an MNIST epoch against its bare steps

Each round takes every variant once, so that a machine whose speed drifts slows all of them; ratios are medians over
the rounds of (variant / plain of the same round).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import brittle
from brittle.data.load import load_data
from brittle.models.build import fcn, resnet18_cifar
from brittle.training import train
from brittle.training.interventions.constraints import CONSTRAINTS
from brittle.training.interventions.penalties import PENALTIES
from brittle.training.recipe import Recipe

Step = Callable[[], None]
STRENGTH = 1e-4
EPOCHS = 2


def networks(device: str) -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """The networks and one batch each."""
    draw = torch.Generator().manual_seed(0)
    sizes = {"FCN 3072-2000x4-10, batch 100": (fcn(3072, 2000, 5), 100)}
    sizes |= {f"ResNet18-cifar, width {w}, batch 128": (resnet18_cifar(width=w), 128) for w in (16, 64)}
    return {
        name: (
            network.to(device),
            torch.rand(n, 3, 32, 32, generator=draw).to(device),
            torch.randint(10, (n,), generator=draw).to(device),
        )
        for name, (network, n) in sizes.items()
    }


def steps(network: nn.Module, x: Tensor, y: Tensor, refresh: int) -> dict[str, Step]:
    """One closure a variant, each with its own copy of the network and its own AdamW."""

    def step(
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        penalty: Callable[[], Tensor] | None,
        constraint: Callable[[], object] | None,
    ) -> None:
        """One step of training with a penalty on the loss and a constraint after it."""
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(network(x), y)
        if penalty is not None:
            loss = loss + penalty()
        loss.backward()
        optimizer.step()
        if constraint is not None:
            constraint()

    def variant(
        penalty: Callable[[nn.Module], Callable[[], Tensor]] | None = None,
        constraint: Callable[[nn.Module], Callable[[], object]] | None = None,
    ) -> Step:
        own = copy.deepcopy(network)
        optimizer = torch.optim.AdamW(own.parameters(), 1e-3, weight_decay=0.01, fused=True)
        bound = [None if intervention is None else intervention(own) for intervention in (penalty, constraint)]
        return partial(step, own, optimizer, *bound)

    found = {"plain": variant()}
    found |= {
        name: variant(lambda own, bind=bind: bind(own, STRENGTH))
        for name, bind in PENALTIES.items()
        if name != "joint_l1"
    }
    if not any(isinstance(module, nn.Conv2d) for module in network.modules()):  # there the exact one is cheap
        found[f"nuclear_norm, refreshed every {refresh} steps"] = variant(
            lambda own: PENALTIES["nuclear_norm"](own, STRENGTH, every=refresh)
        )
    found["frobenius"] = variant(constraint=lambda own: CONSTRAINTS["frobenius"](own, None))
    return found


def timed(step: Step, device: str) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_steps(arguments: argparse.Namespace) -> list[str]:
    """The table of ratios."""
    columns: dict[str, Mapping[str, float]] = {}
    for name, (network, x, y) in networks(arguments.device).items():
        if arguments.nets and not any(wanted in name for wanted in arguments.nets):
            continue
        variants = steps(network, x, y, arguments.refresh)
        for step in variants.values():
            step()  # warms up
        plain = statistics.median(timed(variants["plain"], arguments.device) for _ in range(3))
        ratios: dict[str, list[float]] = {variant: [] for variant in variants}
        rounds, seconds = max(6, min(arguments.rounds, round(20 / plain))), list[float]()
        for number in range(rounds):
            for variant, step in variants.items():
                refreshed = "refreshed" in variant
                if refreshed or (variant == "nuclear_norm" and name.startswith("FCN")):
                    if number % (rounds // 3):
                        continue  # far too slow for more than three times
                else:
                    step()  # the weights of the variant before are in the caches
                times = arguments.refresh if refreshed else 1  # a whole period
                taken = sum(timed(step, arguments.device) for _ in range(times)) / times
                if variant == "plain":
                    seconds.append(taken)
                ratios[variant].append(taken / seconds[-1])
        columns[name] = {variant: statistics.median(these) for variant, these in ratios.items()}
        columns[name] = {**columns[name], "plain, seconds": statistics.median(seconds)}
        print(f"{name}: measured", flush=True)
    rows = [row for row in next(iter(columns.values())) if row != "plain"]
    lines = [f"| time of a step, plain = 1 | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    cells = {row: [f"{column[row]:.2f}" if row in column else "–" for column in columns.values()] for row in rows}
    return lines + [f"| {row} | {' | '.join(cells[row])} |" for row in rows]


def measure_epoch(arguments: argparse.Namespace) -> list[str]:
    """An epoch of :func:`brittle.training.train` against the bare steps of the same batches."""
    data = load_data("mnist", root=arguments.data_root, split="train")
    network = fcn()
    recipe = Recipe(epochs=EPOCHS, validation=0.0, measure_every=0)

    def ours() -> None:
        train(network, data, recipe)

    def bare() -> None:
        own = copy.deepcopy(network)
        optimizer = torch.optim.AdamW(own.parameters(), 1e-3, weight_decay=0.01, fused=True)
        batches = list(zip(data.inputs.split(128), data.labels.split(128), strict=True))
        for x, y in batches * EPOCHS:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(own(x), y).backward()
            optimizer.step()

    ratios, seconds = [], []
    for _ in range(arguments.repeats):
        a, b = timed(ours, "cpu"), timed(bare, "cpu")
        ratios.append(a / b)
        seconds.append((a, b))
    a, b = (statistics.median(s) for s in zip(*seconds, strict=True))
    ratio = statistics.median(ratios)
    return [f"Two MNIST epochs, FCN of width 400, batch 128: {a:.2f} s, bare {b:.2f} s, ratio {ratio:.2f}"]


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["steps", "epoch"])
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--nets", nargs="*", help="parts of the names of the networks")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=60, help="most steps of a variant that are timed")
    parser.add_argument("--refresh", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, brittle {brittle.__version__}, {arguments.threads} threads, {arguments.device}")
    print("\n".join(measure_steps(arguments) if arguments.command == "steps" else measure_epoch(arguments)))


if __name__ == "__main__":
    main()
