"""Search for unsound certificates: random tiny networks, every bound against the worst that can be found.

    python benchmarks/soundness.py --networks 10000 --seed 0 --out FILE       # again: goes on where it stopped
    python benchmarks/soundness.py --summary FILE

Families in turn: dense chains and branches, convolutions in one to three dimensions, residual blocks, dense nets,
bottlenecks, several paths over one image.

Constants: for both norms, every argument's bound (every third time with steps of optimisation), every pair's margin and
the certified radii are compared with Jacobians at random inputs, under random slopes of activations, and under slopes
that climb towards a violation. A violation is a bound that is smaller than what was found, by more than 1e-7 of it.

Relaxations: the same network with activations that have one, in single or double precision. Proven radii, and margins
at random budgets with every effort, are compared with the least margins that descents in double precision find within
0.999999 of the budget. Here a violation is any margin below its bound, or any change of the prediction. Descents at
twice the radius say how strong they are.

A crash is an exception out of the bounds. Violations and crashes are printed as they come, and one line of JSON for
every hundred networks: several processes can share the work by their seeds.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
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
from brittle.bounds.relaxation.bisection import proven_radii
from brittle.bounds.relaxation.certify import Relaxation, margin_bounds, read_relaxation
from brittle.bounds.relaxation.margins import CROWN, Effort
from brittle.models.trace import NoRule
from helpers.patterned import FAMILIES, SLOPES, Patterned, jacobian_at, margins_of, network, norm_of, search

TOLERANCE = 1 + 1e-7
NORMS = (2, math.inf)
CHUNK = 100
"""Networks a line."""
SAMPLES = 4
"""Inputs of every network that relaxations certify."""
EFFORTS = (
    Effort(rounds=0), Effort(rounds=1, rows=2), Effort(), CROWN, Effort(rounds=3, rows=500, slope_steps=4),
    Effort(rounds=2, rows=500, flattened=True),
)  # fmt: skip
DESCENT_STEPS = 12


# --- what is found ------------------------------------------------------------------------------------------


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


# --- constants ----------------------------------------------------------------------------------------------


def check_constants(family: str, seed: int) -> Counter[str]:
    """Every global bound of one network, every third one with steps of optimisation."""
    model, shape = network(family, seed)
    totals: Counter[str] = Counter(networks=1)
    for p, bound in network_bounds(model, NORMS, input_shape=shape, steps=3 * (seed % 3 == 0)).items():
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
        totals["constants"] += len(bound.arguments)
        totals["violations"] += len(broken)
        for name in broken:
            print(f"violation: {family} {seed} p={p}: {name}", file=sys.stderr, flush=True)
    return totals


# --- relaxations --------------------------------------------------------------------------------------------


def relaxable(family: str, seed: int) -> tuple[nn.Module, tuple[int, ...]]:
    """The network with ReLU or LeakyReLU for other activations, zeros around images, and two outputs or more."""
    model, shape = network(family, seed)
    rng = random.Random(seed)
    for parent in list(model.modules()):
        for name, part in parent.named_children():
            if type(part) in SLOPES:
                setattr(parent, name, nn.LeakyReLU(0.1) if rng.random() < 0.2 else nn.ReLU())
            if isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                part.padding_mode = "zeros"
    with torch.no_grad():
        outputs = model(torch.zeros(1, *shape, dtype=torch.float64))
    if outputs.ndim == 2 and outputs.shape[1] > 1:
        return model, shape
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = nn.Linear(outputs.numel(), rng.randint(2, 4)).double()
    return nn.Sequential(model, nn.Flatten(), head).eval(), shape


def least_margins(model: nn.Module, x: Tensor, y: Tensor, eps: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Least ``s_y - s_j`` found within 0.999999 of the budgets, ``(N,)``: descents for every class, from three starts.

    The first step goes the whole way: it ends at the worst point where the network is linear. In l_2 the ball is whole.
    """
    with torch.no_grad():
        K = model(x[:1]).shape[1]
    others = torch.arange(K).expand(len(x), K)
    others = others[others != y[:, None]].view(len(x), K - 1)
    start = x.repeat_interleave(3 * (K - 1), 0)
    label, other = y.repeat_interleave(3 * (K - 1)), others.repeat_interleave(3, 1).flatten()
    reach = (0.999999 * eps).repeat_interleave(3 * (K - 1)).view(-1, *[1] * (x.ndim - 1))
    d = reach * torch.randn(start.shape, dtype=torch.float64, generator=generator)
    d = torch.where((torch.arange(len(d)) % 3 == 0).view(reach.shape), 0.0, d)
    least = torch.full((len(start),), math.inf, dtype=torch.float64)
    for step in range(DESCENT_STEPS + 1):
        d = into_ball(start, d, reach, p).requires_grad_()
        logits = model(start + d)
        margins = (logits.gather(1, label[:, None]) - logits.gather(1, other[:, None]))[:, 0]
        (gradient,) = torch.autograd.grad(margins.sum(), d)
        least = torch.minimum(least, margins.detach())
        length = reach * (2.0 if not step else 0.7 * 0.75**step)
        d = d.detach() - length * steepest(gradient, p)
    return least.view(len(x), -1).amin(1)


def steepest(gradient: Tensor, p: float) -> Tensor:
    """Of unit norm."""
    if math.isinf(p):
        return gradient.sign()
    return gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-300).view(-1, *[1] * (gradient.ndim - 1))


def into_ball(x: Tensor, d: Tensor, reach: Tensor, p: float) -> Tensor:
    """Steps within reach; for p = inf also within [0, 1]."""
    if math.isinf(p):
        return (x + torch.clamp(d, -reach, reach)).clamp(0, 1) - x
    length = d.flatten(1).norm(dim=1).view(reach.shape)
    return d * (reach / length.clamp_min(1e-300)).clamp_max(1.0)


def check_relaxations(family: str, seed: int) -> Counter[str]:
    """Proven radii and margins of one network in both norms."""
    exact, shape = relaxable(family, seed)
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(exact).float() if seed % 2 else exact
    exact = copy.deepcopy(model).double()  # the very same weights
    like = next(model.parameters())
    x = torch.rand(SAMPLES, *shape, dtype=torch.float64, generator=generator).to(like)
    with torch.no_grad():
        logits = exact(x.double())
    examples = torch.rand(16, *shape, dtype=torch.float64, generator=generator).to(like) if seed % 4 < 2 else None
    totals: Counter[str] = Counter()
    try:
        relaxation = read_relaxation(model, shape, examples=examples, groups=4)
    except NoRule:
        return Counter({"without relaxation": 1})
    for p in NORMS:
        broken = radii_broken(relaxation, exact, x, logits.argmax(1), p, seed, generator, totals)
        y = torch.where(torch.rand(SAMPLES, generator=generator) < 0.7, logits.argmax(1), logits.argmin(1))
        broken += margins_broken(relaxation, exact, x, y, p, generator, totals)
        totals["violations"] += len(broken)
        for name in broken:
            print(f"violation: {family} {seed} p={p}: {name}", file=sys.stderr, flush=True)
    return totals


def radii_broken(
    relaxation: Relaxation, exact: nn.Module, x: Tensor, y: Tensor, p: float, seed: int, generator: torch.Generator,
    totals: Counter[str],
) -> list[str]:  # fmt: skip
    """Changes of the prediction within proven radii; every network takes another effort."""
    effort = EFFORTS[seed // 4 % len(EFFORTS)]
    r = proven_radii(relaxation, x, y, p=p, effort=effort)
    some = (r > 0).nonzero()[:, 0]
    totals["radii"] += len(x)
    totals["radii above 0"] += len(some)
    if not len(some):
        return []
    twice = torch.cat([x[some], x[some]]).double(), torch.cat([y[some], y[some]]), torch.cat([r[some], 2 * r[some]])
    within, beyond = least_margins(exact, *twice, p, generator).chunk(2)
    totals["changed at twice the radius"] += int((beyond <= 0).sum())
    return [f"radius of sample {int(row)}, {effort}" for row in some[within <= 0]]


def margins_broken(
    relaxation: Relaxation, exact: nn.Module, x: Tensor, y: Tensor, p: float, generator: torch.Generator,
    totals: Counter[str],
) -> list[str]:  # fmt: skip
    """Margins below their bounds at random budgets, with every effort."""
    whole = 1.0 if math.isinf(p) else math.sqrt(x[0].numel())
    eps = whole * 10 ** (-3 * torch.rand(len(x), dtype=torch.float64, generator=generator))
    found = least_margins(exact, x.double(), y, eps, p, generator)
    broken = []
    for effort in EFFORTS:
        bounds = margin_bounds(relaxation, x, y, eps=eps, p=p, effort=effort).double()
        totals["margins"] += len(x)
        totals["margins above 0"] += int((bounds > 0).sum())
        broken += [f"margin of sample {int(row)}, {effort}" for row in (found < bounds).nonzero()[:, 0]]
    return broken


# --- many networks ------------------------------------------------------------------------------------------


def check(seed: int) -> Counter[str]:
    """Everything about one network; whatever comes out of the bounds as an exception counts as a crash."""
    families, totals = list(FAMILIES), Counter[str]()
    family = families[seed % len(families)]
    for part in (check_constants, check_relaxations):
        try:
            totals += part(family, seed)
        except Exception as error:
            totals["crashes"] += 1
            print(f"crash: {family} {seed}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return totals


def summary(path: Path) -> dict[str, Any]:
    """All lines of a file together."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    totals: Counter[str] = Counter(violations=0, crashes=0)
    for line in lines:
        totals.update({name: value for name, value in line.items() if name not in ("seed", "seconds")})
    return {**totals, "CPU seconds": round(sum(line["seconds"] for line in lines))}


def main() -> None:
    """Check as many networks as the command line says, from a seed on, and print one line of JSON a chunk."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first network; the others follow")
    parser.add_argument("--out", type=Path, help="file to append the lines to; chunks that it has are left out")
    parser.add_argument("--summary", type=Path, help="add up the lines of this file, and check nothing")
    options = parser.parse_args()
    if options.summary:
        print(json.dumps(summary(options.summary)))
        return
    torch.set_num_threads(1)
    done = set()
    if options.out and options.out.exists():
        done = {json.loads(line)["seed"] for line in options.out.read_text().splitlines()}
    end = options.seed + options.networks
    for first in range(options.seed, end, CHUNK):
        if first in done:
            continue
        started, totals = time.process_time(), Counter[str](violations=0, crashes=0)
        for seed in range(first, min(first + CHUNK, end)):
            totals.update(check(seed))
        line = json.dumps({"seed": first, **totals, "seconds": round(time.process_time() - started, 1)})
        print(line, flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
