"""Networks that are built to look robust, and honest ones: which raise a flag.

    python benchmarks/deceivers.py deceivers --data-root DATA            # caught of those that deceive the attacks
    python benchmarks/deceivers.py honest --data-root DATA --zoo ZOO     # false alarms
    python benchmarks/deceivers.py cost --data-root DATA                 # passes of the checks beside the attack's

DATA holds ``MNIST/raw``. A deceiver (``tests/helpers/deceivers.py``) hides an ordinary network, two hidden layers of
100, trained for three epochs on MNIST, some behind an untrained one. It deceives where the preset's robust accuracy
is more than ten points above that of the network that it hides, and is caught where a flag of that norm, or of no norm,
is raised. Honest networks are trained here, and read from ZOO where ``certified.py networks --cache ZOO`` and
``hardened.py train --zoo ZOO`` left some.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import brittle
from brittle.evaluation.curves import security_curve
from brittle.evaluation.honesty import honesty_flags
from brittle.evaluation.threat import for_classes
from brittle.evaluation.worst_case import WorstCase, worst_case
from brittle.models.network import Network
from brittle.results import Flag
from brittle.results.wording import norm_name
from helpers.deceivers import DECEIVERS, Deceiver

BUDGETS = {math.inf: 0.1, 2.0: 1.5}
"""Within them the hidden network keeps next to nothing."""
SIZES = (40, 256)


def trained(net: nn.Module, x: Tensor, y: Tensor, epochs: int = 3) -> nn.Module:
    """The network after a few epochs of Adam with a falling rate."""
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
    plan = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, epochs * (len(x) // 256))
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(256):
            if len(rows) == 256:
                optimiser.zero_grad()
                F.cross_entropy(net(x[rows]), y[rows]).backward()
                optimiser.step()
                plan.step()
    return net.eval()


def fcn(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """A dense network from 784 inputs to 10 logits."""
    sizes = (784, *widths)
    hidden = [layer for a, b in zip(sizes, widths, strict=False) for layer in (nn.Linear(a, b), activation())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], 10))


def measure(
    model: nn.Module, x: Tensor, y: Tensor, p: float, eps: float, steps: int | None = None
) -> tuple[WorstCase, tuple[Flag, ...]]:
    """The worst case under the preset ``fast``, and the flags of it."""
    threat = for_classes(brittle.Threat("fast", p, steps=steps), 10)[0]
    worst = worst_case(model, x, y, threat, eps)
    curve = security_curve(model, worst, threat, at=eps, budgets=[share * eps for share in (0.25, 0.5, 1.5, 2.0)])
    return worst, honesty_flags(model, worst, threat, eps, curve=curve)[0]


def deceivers(data: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> None:
    """One line a deceiver, norm and number of samples."""
    torch.manual_seed(0)
    net, other = trained(fcn(100, 100), *data), fcn(60)
    for p, eps in BUDGETS.items():
        for n in SIZES:
            x, y = (part[:n] for part in test)
            truth = int(measure(net, x, y, p, eps)[0].robust_correct.sum()) / n
            tried = caught = 0
            for name in DECEIVERS:
                worst, flags = measure(Deceiver(name, net, other), x, y, p, eps)
                robust = int(worst.robust_correct.sum()) / n
                raised = [flag.name for flag in flags if flag.raised]
                deceived = robust > truth + 0.1
                tried, caught = tried + deceived, caught + (deceived and bool(raised))
                state = "seen through" if not deceived else "caught" if raised else "MISSED"
                print(
                    f"{norm_name(p)} {eps:g}, {n}: {name}: {100 * robust:.0f} % (truth {100 * truth:.0f}): {state}: "
                    f"{', '.join(raised)}",
                    flush=True,
                )
            print(f"{norm_name(p)} {eps:g}, {n}: {caught} of {tried} caught", flush=True)


class Conv(nn.Sequential):
    """Two convolutions, with batch norms, and two dense layers."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        convolutions = (
            layer
            for a, b in ((1, 16), (16, 32))
            for layer in (nn.Conv2d(a, b, 4, stride=2, padding=1), nn.BatchNorm2d(b), activation())
        )
        super().__init__(*convolutions, nn.Flatten(), nn.Linear(32 * 49, 64), activation(), nn.Linear(64, 10))


def honest_networks(data: tuple[Tensor, Tensor], zoo: Path, named: str) -> Iterator[tuple[str, nn.Module]]:
    """Networks with ordinary gradients whose names hold ``named``: trained here, then those of the zoo."""
    import certified
    import hardened

    import attacks

    small = tuple(part[:10_000] for part in data)
    makers: dict[str, Callable[[], nn.Module]] = {
        f"FCN, {kind.__name__}": partial(lambda kind: trained(fcn(100, 100, activation=kind), *data, epochs=2), kind)
        for kind in (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh)
    }
    for kind in (nn.ReLU, nn.GELU):
        makers[f"conv, batch norm, {kind.__name__}"] = partial(lambda kind: trained(Conv(kind), *small, epochs=2), kind)
    makers["ViT"] = lambda: trained(attacks.SmallViT(), *small, epochs=4)
    makers |= {
        name: partial(certified.load, name, zoo)
        for name in certified.SUBJECTS
        if (zoo / f"{name}.safetensors").is_file()
    }
    makers |= {name: partial(hardened.load, name, zoo) for name in hardened.HARDENED if (zoo / f"{name}.pt").is_file()}
    for name, make in makers.items():
        if named in name:
            torch.manual_seed(0)
            yield name, make()


def honest(data: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], zoo: Path, steps: int | None, named: str) -> None:
    """One line a network, and how many raised a flag."""
    tried, alarmed = 0, list[str]()
    for name, net in honest_networks(data, zoo, named):
        for n, budgets in itertools.product(SIZES, ({math.inf: 0.1, 2.0: 1.0}, {math.inf: 0.02, 2.0: 0.2})):
            x, y = (part[:n] for part in test)
            for p, eps in budgets.items():
                worst, flags = measure(net.eval(), x, y, p, eps, steps)
                raised = [flag for flag in flags if flag.raised]
                robust, proven = int(worst.robust_correct.sum()), int(worst.proven.sum())
                case = f"{name}, {norm_name(p)} {eps:g}, {n} samples: {robust} robust, {proven} proven"
                tried, alarmed = tried + 1, alarmed + [f"{case}: {flag.name}: {flag.finding}" for flag in raised]
                print(case, *(f"{flag.name}: {flag.finding}" for flag in raised), sep=": ", flush=True)
    print(f"{tried} cases, {len(alarmed)} flags raised", *alarmed, sep="\n")


def cost(data: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> None:
    """Passes with gradient (a forward pass is a third) of attack and checks, on 1,000 and on 40 samples."""
    torch.manual_seed(0)
    net = trained(fcn(100, 100), *data)
    for n, (p, eps) in itertools.product((1000, 40), ((math.inf, 0.1), (math.inf, 0.01), (2.0, 1.5), (2.0, 0.1))):
        x, y = (part[:n] for part in test)
        threat = for_classes(brittle.Threat("fast", p), 10)[0]
        started = time.process_time()
        worst = worst_case(net, x, y, threat, eps)
        between = time.process_time()
        counted = Counting(net)
        honesty_flags(Network(counted, counted), worst, threat, eps)
        attack, checks = worst.backwards + worst.forwards / 3, counted.backwards + counted.forwards / 3
        seconds = between - started, time.process_time() - between
        print(
            f"{norm_name(p)} {eps:g}, {n} samples: {attack:.0f} passes, {seconds[0]:.2f} s; checks {checks:.0f},"
            f" {100 * checks / attack:.1f} %, {seconds[1]:.2f} s",
            flush=True,
        )


class Counting(nn.Module):
    """A network that counts the samples put through it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.forwards, self.backwards = net, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        """The network's logits."""
        if torch.is_grad_enabled() and x.requires_grad:
            self.backwards += len(x)
        else:
            self.forwards += len(x)
        return self.net(x)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["deceivers", "honest", "cost"])
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--zoo", type=Path, default=Path("zoo"))
    parser.add_argument("--steps", type=int, help="Of the preset's attacks; its own by default.")
    parser.add_argument("--named", default="", help="Honest networks whose names hold this.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = [brittle.load_data("mnist", root=args.data_root, split=split) for split in ("train", "test")]
    train, test = ((part.inputs, part.labels) for part in data)
    if args.what == "honest":
        honest(train, test, args.zoo, args.steps, args.named)
    else:
        {"deceivers": deceivers, "cost": cost}[args.what](train, test)


if __name__ == "__main__":
    main()
