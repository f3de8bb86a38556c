"""What a plan costs, part by part: a full-width ResNet18 for CIFAR by default, planned to half of its MACs.

    python benchmarks/planning.py --data-root DATA                       # as brittle compress plans it
    python benchmarks/planning.py --data-root DATA --quick               # without the calibration attack

The network is untrained and the labels are what it says, within a budget so small that an attack breaks few samples: no
pass is saved by samples that are broken, as most are in a network that is worth nothing. Wall clock and CPU seconds; on
a machine that does other things as well, only the latter mean something. The first of the tables' parts is left out of
the sum: it takes as long as the attack takes on any of the network's users.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import brittle
from brittle.delivery import Compression, filters, plan_removal

PARTS = ("apgd", "channel_groups", "candidates", "remove_units", "mended")
"""Functions of the planner's module that are timed; all else is ``judge`` or left over."""
Seconds = dict[str, tuple[float, float]]
"""Wall clock and CPU, by part."""


def timed(seconds: Seconds, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose calls are added up; what it calls of the others counts for these."""

    def call(*arguments: Any, **options: Any) -> Any:
        started, inside = (time.perf_counter(), time.process_time()), total(seconds)
        result = function(*arguments, **options)
        spent = time.perf_counter() - started[0], time.process_time() - started[1]
        others = total(seconds)
        before = seconds.get(name, (0.0, 0.0))
        own = [b + s - (o - i) for b, s, o, i in zip(before, spent, others, inside, strict=True)]
        seconds[name] = own[0], own[1]
        return result

    return call


def total(seconds: Seconds) -> tuple[float, float]:
    """Wall clock and CPU of all parts."""
    return sum(wall for wall, _ in seconds.values()), sum(cpu for _, cpu in seconds.values())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--calibration", type=int, default=256)
    parser.add_argument("--eps", type=float, default=1e-5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="plan on samples that are not attacked")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    network = brittle.build_model("resnet18-cifar", {"width": arguments.width}).eval()
    data, training = (
        brittle.load_data("cifar10", root=arguments.data_root, split=split, limit=arguments.calibration)
        for split in ("test", "train")
    )
    with torch.no_grad():
        training = replace(training, labels=network(training.inputs).argmax(1))
    seconds: Seconds = {}
    attack, judge_of = filters.apgd, filters.judge_of
    calls = iter(["attack"])

    def attacked(model: Any, x: Any, *given: Any, **options: Any) -> Any:
        if next(calls, "judge") == "judge":
            return attack(model, x, *given, **options)
        return x if arguments.quick else timed(seconds, "calibration attack", attack)(model, x, *given, **options)

    filters.apgd = attacked  # type: ignore[assignment]
    filters.judge_of = lambda *given: timed(seconds, "judge", judge_of(*given))  # type: ignore[assignment]
    for name in PARTS[1:]:
        if hasattr(filters, name):
            setattr(filters, name, timed(seconds, name, getattr(filters, name)))
    started = time.perf_counter(), time.process_time()
    asked = Compression(ratio=arguments.ratio, target="macs", calibration=arguments.calibration)
    plan = plan_removal(network, data, asked, training=training, p=float("inf"), eps=arguments.eps)
    whole = time.perf_counter() - started[0], time.process_time() - started[1]
    rest = [w - t for w, t in zip(whole, total(seconds), strict=True)]
    attack_took = seconds.pop("calibration attack", (0.0, 0.0))
    print(f"{plan.removed.candidate}: {100 * plan.removed.share:.1f} % of the MACs went; {arguments.threads} threads")
    print("| part | wall, s | CPU, s |\n|---|---|---|")
    for name, (wall, cpu) in (*seconds.items(), ("all else", rest)):
        print(f"| {name} | {wall:.1f} | {cpu:.1f} |")
    wall, cpu = (w - a for w, a in zip(whole, attack_took, strict=True))
    print(f"| all but the calibration attack | {wall:.1f} | {cpu:.1f} |")
    print(f"| the calibration attack | {attack_took[0]:.1f} | {attack_took[1]:.1f} |")


if __name__ == "__main__":
    main()
