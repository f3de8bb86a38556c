"""Search for unsound certificates: random tiny networks, every bound against the largest norm that can be found.

    python benchmarks/soundness.py --networks 10000 --seed 0

Families in turn: dense chains and branches, convolutions in one to three dimensions, residual blocks, dense nets,
bottlenecks, several paths over one image. For both norms, every argument's bound, every pair's margin and the certified
radii are compared with Jacobians at random inputs, under random slopes of the activations, and under slopes that climb
towards a violation. A violation is a bound that is smaller than what was found, by more than 1e-7 of it; a crash is
an exception out of the bounds. Prints violations and crashes as they come, and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from brittle.bounds.lipschitz.network import NetworkBound, network_bounds
from brittle.bounds.radius import certified_radii
from helpers.patterned import FAMILIES, Patterned, jacobian_at, margins_of, network, norm_of, search

TOLERANCE = 1 + 1e-7
NORMS = (2, math.inf)


def found_jacobians(model: nn.Module, shape: tuple[int, ...], p: float, seed: int, outputs: int) -> list[Tensor]:
    """At two inputs, under all slopes high, and on the way up from random slopes, of the norm and of one margin."""
    generator = torch.Generator().manual_seed(seed)
    points = [scale * torch.randn(shape, dtype=torch.float64, generator=generator) for scale in (0.3, 3.0)]
    found = [jacobian_at(model, x) for x in points]
    net = Patterned(model, shape, seed)
    found += search(net, p, 3)
    net.redraw("inside")
    found.append(net.jacobian())
    net.redraw("high")
    found += search(net, p, 2)
    if outputs > 1:
        i = seed % outputs
        found += search(net, p, 2, (i, (i + 1) % outputs))
    return found


def radii_violations(model: nn.Module, shape: tuple[int, ...], bound: NetworkBound, seed: int) -> int:
    """Inputs that flip within 0.9999 of their certified radius, along gradients of margins and random directions."""
    assert bound.margins is not None
    generator = torch.Generator().manual_seed(seed)
    flips = 0
    for x in torch.randn(2, *shape, dtype=torch.float64, generator=generator):
        with torch.no_grad():
            logits = model(x[None])
        label = logits.argmax(1)
        radius = float(certified_radii(logits, label, bound.margins)[0])
        if not 0 < radius < math.inf:
            continue
        J = jacobian_at(model, x)
        others = (J - J[label]).view(-1, *shape)
        steps = torch.cat([others, torch.randn(4, *shape, dtype=torch.float64, generator=generator)])
        steps = steps.sign() if math.isinf(bound.p) else steps
        length = steps.flatten(1).norm(bound.p, dim=1).clamp_min(1e-300).view(-1, *[1] * len(shape))
        with torch.no_grad():
            flips += int((model(x + 0.9999 * radius * steps / length).argmax(1) != label).sum())
    return flips


def audit(family: str, seed: int, totals: Counter[str], ratios: dict[str, list[float]]) -> None:
    """Every bound of one network."""
    model, shape = network(family, seed)
    try:
        bounds = network_bounds(model, NORMS, input_shape=shape)
    except Exception as error:  # whatever comes out of the bounds is what this looks for
        totals["crashes"] += 1
        print(f"crash: {family} {seed}: {type(error).__name__}: {error}", file=sys.stderr)
        return
    for p, bound in bounds.items():
        if bound.upper is None:
            totals["refused"] += 1
            continue
        outputs = 0 if bound.margins is None else len(bound.margins)
        found = found_jacobians(model, shape, p, seed, outputs)
        largest = max(norm_of(J, p)[0] for J in found)
        broken = [name for name, value in bound.arguments if largest > value * TOLERANCE]
        if bound.margins is not None and outputs > 1:
            table = torch.stack([margins_of(J, p) for J in found]).amax(0)
            broken += ["margins"] if bool((table > bound.margins * TOLERANCE + 1e-300).any()) else []
            broken += ["radii"] if radii_violations(model, shape, bound, seed) else []
            totals["margin tables"] += 1
        totals["bounds"] += len(bound.arguments)
        totals["violations"] += len(broken)
        for name in broken:
            print(f"violation: {family} {seed} p={p}: {name}", file=sys.stderr)
        if largest > 0:
            for name, value in (("product", dict(bound.arguments)["product of norms"]), ("best", bound.upper)):
                ratios.setdefault(f"{name}, p={p}", []).append(value / largest)


def spread(values: list[float]) -> dict[str, float]:
    """Median and 90 % quantile."""
    deciles = statistics.quantiles(values, n=10)
    return {"median": round(statistics.median(values), 3), "90%": round(deciles[8], 3), "least": round(min(values), 6)}


def main() -> None:
    """Audit as many networks as the command line says, families in turn, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    totals: Counter[str] = Counter(crashes=0, violations=0, refused=0)
    ratios: dict[str, list[float]] = {}
    started = time.perf_counter()
    families = list(FAMILIES)
    for n in range(options.networks):
        audit(families[n % len(families)], options.seed + n, totals, ratios)
    line: dict[str, Any] = {"networks": options.networks, "seed": options.seed, **totals}
    line |= {"bound / found": {name: spread(values) for name, values in ratios.items()}}
    print(json.dumps(line | {"seconds": round(time.perf_counter() - started)}))


if __name__ == "__main__":
    main()
