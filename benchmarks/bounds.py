"""What the certified bounds cost and how tight they are: alignment, fully connected networks on MNIST, ResNet18.

    python benchmarks/bounds.py alignment                     # seconds a pair and norm, at widths 2048 and 4096
    python benchmarks/bounds.py table --data-root DATA        # product / Theorem 3.2 / best certified / largest found
    python benchmarks/bounds.py steps --data-root DATA        # what steps of optimisation gain, and cost
    python benchmarks/bounds.py resnet                        # both certificates of a ResNet18 at 32 x 32

The networks of ``table`` are trained once and kept in ``--cache``; those of ``steps`` are of ``certified.py networks``.
Seconds are of this machine: one core's time for ``alignment`` and ``steps``, else the clock's.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from certified import SUBJECTS, load
from torch import Tensor, nn

import brittle
from brittle.models.build import fcn, resnet18_cifar
from brittle.training.interventions.penalties import row_norms

KINDS = ("dense", "low-rank", "row-sparse")
INF = math.inf


def clocked(function: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> tuple[Any, float]:
    """A result and the seconds it took."""
    started = clock()
    result = function()
    return result, clock() - started


def pair(kind: str, n: int) -> tuple[Tensor, Tensor]:
    """Two square matrices of one kind."""
    generator = torch.Generator().manual_seed(0)
    W2, W1 = torch.randn(2, n, n, generator=generator, dtype=torch.float64)
    if kind == "power-law rows":
        scale = torch.arange(1.0, n + 1, dtype=torch.float64)[:, None] ** -1
        return W2 * scale, W1 * scale
    if kind == "rank 20 + noise":
        factors = torch.randn(4, n, 20, generator=generator, dtype=torch.float64)
        return factors[0] @ factors[1].mT + W2, factors[2] @ factors[3].mT + W1
    return W2, W1


def alignment(arguments: argparse.Namespace) -> None:
    """Upper and lower alignment bounds and their time, one pair and norm at a time, on one core."""
    torch.set_num_threads(1)
    print(f"{'width':>6} {'kind':>16} {'norm':>5} {'lower':>9} {'upper':>9} {'argument':>16} {'seconds':>8}")
    for n in arguments.widths:
        for kind in ("gaussian", "power-law rows", "rank 20 + noise"):
            W2, W1 = pair(kind, n)
            for p in (INF, 2.0):
                a, seconds = clocked(lambda W2=W2, W1=W1, p=p: brittle.alignment(W2, W1, p), time.process_time)
                line = f"{n:>6} {kind:>16} {p:>5} {a.lower:>9.5f} {a.upper:>9.5f} {a.argument:>16} {seconds:>8.1f}"
                print(line, flush=True)


def trained(kind: str, width: int, depth: int, data: brittle.Data, cache: Path) -> nn.Module:
    """A fully connected ReLU network without biases on MNIST, from the cache or trained now."""
    network, path = fcn(784, width, depth, 10), cache / f"{kind}-{width}-{depth}.safetensors"
    if not path.exists():
        weights = _fit(kind, width, depth, data)
        network.load_state_dict(dict(zip(network.state_dict(), weights, strict=True)))
        brittle.save_state(network, path)
    network.load_state_dict(brittle.read_state(path))
    return network.eval()


def _fit(kind: str, width: int, depth: int, data: brittle.Data, epochs: int = 4) -> list[Tensor]:
    """The matrices of a fully connected network trained on the data; low-rank ones are trained as two factors."""
    torch.manual_seed(0)
    sizes, rank = [784, *[width] * (depth - 1), 10], 32 if width < 1000 else 64
    layers: list[list[Tensor]] = []
    for n, m in itertools.pairwise(sizes):
        if kind == "low-rank" and m != 10:
            layers.append([torch.randn(m, rank) * rank**-0.5, torch.randn(rank, n) * (2 / n) ** 0.5])
        else:
            layers.append([torch.randn(m, n) * (2 / n) ** 0.5])
    parameters = [W.requires_grad_() for factors in layers for W in factors]
    optimiser = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.01)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.inputs)).split(256):
            x = data.inputs[rows].flatten(1)
            for place, factors in enumerate(layers):
                for W in reversed(factors):
                    x = x @ W.mT
                x = x if place == depth - 1 else x.relu()
            loss = F.cross_entropy(x, data.labels[rows])
            if kind == "row-sparse":
                loss = loss + 2e-3 * sum(row_norms(W).sum() for (W,) in layers[:-1])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return [(factors[0] @ factors[1] if len(factors) == 2 else factors[0]).detach() for factors in layers]


def table(arguments: argparse.Namespace) -> None:
    """Certified bounds of trained networks beside the largest sensitivity found."""
    arguments.cache.mkdir(parents=True, exist_ok=True)
    train = brittle.load_data("mnist", root=arguments.data_root, split="train")
    test = brittle.load_data("mnist", root=arguments.data_root, split="test")
    head = ("network", "accuracy", "norm", "product", "paper", "sharp", "exact", "best", "argument", "found")
    print("| " + " | ".join([*head, "product / best", "best / found", "seconds"]) + " |")
    print("|" + "---|" * (len(head) + 3))
    for width in arguments.widths:
        for depth in arguments.depths:
            for kind in arguments.kinds:
                network = trained(kind, width, depth, train, arguments.cache)
                with torch.no_grad():
                    accuracy = float((network(test.inputs).argmax(1) == test.labels).float().mean())
                steps = arguments.steps if width < 1000 else arguments.steps // 4
                bounds, seconds = clocked(
                    lambda network=network, steps=steps: brittle.network_bounds(
                        network, (2.0, INF), input_shape=(1, 28, 28), steps=steps
                    )
                )
                for p, bound in bounds.items():
                    print(
                        _row(f"{kind} {width} x {depth}", accuracy, bound, found(network, test, p), seconds), flush=True
                    )


def found(network: nn.Module, data: brittle.Data, p: float) -> float:
    """The largest local norm found: at 500 test images, and by ascent from the 32 best of them."""
    x = data.inputs[:500]
    local = brittle.jacobian_norms(network, x, p)
    start = x[local.topk(32).indices]
    reach = 0.25 if math.isinf(p) else 2.8
    best = brittle.largest_ratio(network, start, p, eps=reach, steps=60, restarts=3)
    return max(float(local.max()), float(best.max()))


def _row(name: str, accuracy: float, bound: Any, largest: float, seconds: float) -> str:
    """A line of the table: the values of the arguments, and how far the bound is above what was found."""
    values = dict(bound.arguments)
    exact = values.get("exact norms, all pairs", values.get("exact norms, disjoint pairs", math.nan))
    numbers = [values["product of norms"], values["paper form"], values["sharp form"], exact, bound.upper]
    cells = [name, f"{100 * accuracy:.1f}", f"{bound.p:g}", *(f"{v:.4g}" for v in numbers), bound.attained_by]
    ratios = [f"{values['product of norms'] / bound.upper:.2f}", f"{bound.upper / largest:.2f}"]
    return "| " + " | ".join([*cells, f"{largest:.4g}", *ratios, f"{seconds:.0f}"]) + " |"


def steps(arguments: argparse.Namespace) -> None:
    """Both norms' bounds and mean margins after several numbers of steps, beside the largest sensitivity found."""
    torch.set_num_threads(1)
    test = brittle.load_data("mnist", root=arguments.data_root, split="test")
    print(
        "| network | norm | product | steps | bound | mean margin | argument | found | seconds |\n" + "|---" * 9 + "|"
    )
    for name in arguments.names:
        network = load(name, arguments.cache)
        for p in (2.0, INF):
            largest = found(network, test, p)
            for number in arguments.steps:
                bound, seconds = clocked(
                    lambda network=network, p=p, number=number: brittle.lipschitz_upper_bound(
                        network, p, input_shape=(1, 28, 28), steps=number
                    ),
                    time.process_time,
                )
                margin = float(bound.margins.sum() / bound.margins.count_nonzero())
                numbers = [f"{dict(bound.arguments)['product of norms']:.4g}", number, f"{bound.upper:.5g}"]
                cells = [
                    name,
                    f"{p:g}",
                    *numbers,
                    f"{margin:.5g}",
                    bound.attained_by,
                    f"{largest:.4g}",
                    f"{seconds:.2f}",
                ]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def resnet(arguments: argparse.Namespace) -> None:
    """Both certificates of an untrained ResNet18 in CIFAR form."""
    torch.manual_seed(0)
    network = resnet18_cifar(width=arguments.base).eval()
    bounds, seconds = clocked(lambda: brittle.network_bounds(network, (2.0, INF), input_shape=(3, 32, 32)))
    for p, bound in bounds.items():
        values = ", ".join(f"{name} {value:.4g}" for name, value in bound.arguments)
        print(f"l_{p:g}: {bound.upper:.4g} ({bound.attained_by}); {values}")
    print(f"both norms: {seconds:.1f} s")


def main() -> None:
    """Run one of the four."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("alignment")
    command.add_argument("--widths", type=int, nargs="+", default=[2048, 4096])
    command.set_defaults(run=alignment)
    command = commands.add_parser("table")
    command.add_argument("--data-root", type=Path, required=True)
    command.add_argument("--cache", type=Path, default=Path("benchmarks/cache"))
    command.add_argument("--widths", type=int, nargs="+", default=[400, 2000])
    command.add_argument("--depths", type=int, nargs="+", default=[3, 5])
    command.add_argument("--kinds", nargs="+", default=list(KINDS))
    command.add_argument("--steps", type=int, default=60)
    command.set_defaults(run=table)
    command = commands.add_parser("steps")
    command.add_argument("--data-root", type=Path, required=True)
    command.add_argument("--cache", type=Path, default=Path("benchmarks/cache"))
    command.add_argument("--names", nargs="+", default=list(SUBJECTS))
    command.add_argument("--steps", type=int, nargs="+", default=[0, 50])
    command.set_defaults(run=steps)
    command = commands.add_parser("resnet")
    command.add_argument("--base", type=int, default=64)
    command.set_defaults(run=resnet)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
