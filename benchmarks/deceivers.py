"""Networks that are built to look robust, and honest ones: which raise a flag.

    python benchmarks/deceivers.py deceivers --data-root DATA   # caught of those that deceive the attacks
    python benchmarks/deceivers.py honest --data-root DATA      # false alarms
    python benchmarks/deceivers.py cost --data-root DATA        # passes of the checks beside those of the attack

DATA holds ``MNIST/raw``. A deceiver (``tests/helpers/deceivers.py``) hides an ordinary network, two hidden layers of
100, trained for three epochs on MNIST, some behind an untrained one. It deceives where the preset's robust accuracy is more than ten points above
that of the network that it hides, and is caught where a flag of that norm, or of no norm, is raised.
"""

from __future__ import annotations

import argparse
import math
import sys
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


def measure(model: nn.Module, x: Tensor, y: Tensor, p: float, eps: float) -> tuple[WorstCase, tuple[Flag, ...]]:
    """The worst case under the preset ``fast``, and the flags of it."""
    threat = for_classes(brittle.Threat("fast", p), 10)[0]
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


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["deceivers", "honest", "cost"])
    parser.add_argument("--data-root", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = [brittle.load_data("mnist", root=args.data_root, split=split) for split in ("train", "test")]
    train, test = ((part.inputs, part.labels) for part in data)
    {"deceivers": deceivers}[args.what](train, test)


if __name__ == "__main__":
    main()
