"""Attacks on networks that were trained to be certifiably robust, where gradients are known to mislead.

    python benchmarks/hardened.py train --data-root DATA --zoo ZOO      # the networks that are missing
    python benchmarks/hardened.py compare --data-root DATA --zoo ZOO    # batteries beside a long Square

Interval bound propagation (Gowal et al. 2018): the loss is ``k CE(f(x)) + (1 - k) CE(worst logits of the box)``, the
budget grows from 0 to its end and k falls from 1 to 0.5 during the first 60 % of the steps. DATA holds
``MNIST/raw``. The networks are small enough for one core: 1 to 5 minutes each. ``compare`` also wants the networks of
``benchmarks/certified.py`` in ZOO.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from pathlib import Path

import certified
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import brittle

HARDENED = {
    "ibp_mlp_0.1": ("mlp", 0.1, 16),
    "ibp_conv_0.2": ("conv", 0.2, 8),
    "ibp_conv_0.3": ("conv", 0.3, 10),
    "ibp_mlp_0.2": ("mlp", 0.2, 20),
    "ibp_conv_0.1": ("conv", 0.1, 6),
}
"""File name: architecture, l_inf budget at the end of the training, epochs."""
CASES = [
    ("ibp_conv_0.2", 2, 2.0), ("ibp_conv_0.3", 2, 1.0), ("ibp_conv_0.3", 2, 2.0), ("ibp_mlp_0.1", 2, 2.0),
    ("ibp_conv_0.2", 2, 1.0), ("ibp_conv_0.1", 2, 2.0), ("ibp_mlp_0.2", 2, 1.0),
    ("ibp_conv_0.2", math.inf, 0.1), ("ibp_conv_0.3", math.inf, 0.3), ("ibp_mlp_0.1", math.inf, 0.1),
    ("fcn2x100", 2, 0.5), ("fcn2x100", math.inf, 0.03), ("adv3x100", 2, 1.0), ("adv3x100", math.inf, 0.1),
    ("conv", 2, 1.0), ("conv", math.inf, 0.05), ("advconv", 2, 1.5), ("advconv", math.inf, 0.1),
]  # fmt: skip
"""Network, norm and budget."""


def build(kind: str) -> nn.Sequential:
    """A dense network with two hidden layers of 256, or two convolutions and two dense layers, for MNIST."""
    if kind == "mlp":
        dense = nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
        return nn.Sequential(nn.Flatten(), *dense)
    convolutions = nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 4, stride=2), nn.ReLU()
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(1152, 100), nn.ReLU(), nn.Linear(100, 10))


def interval(model: nn.Sequential, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of the logits over the boxes from ``low`` to ``high``."""
    for layer in model:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            middle, radius = (high + low) / 2, (high - low) / 2
            middle = layer(middle)
            if isinstance(layer, nn.Linear):
                radius = F.linear(radius, layer.weight.abs())
            else:
                radius = F.conv2d(radius, layer.weight.abs(), None, layer.stride, layer.padding)
            low, high = middle - radius, middle + radius
        else:
            low, high = layer(low), layer(high)
    return low, high


def worst_logits(model: nn.Sequential, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Lower bound of the label's logit and upper bounds of all others, over the l_inf ball and the bounds."""
    low, high = interval(model, (x - eps).clamp(0, 1), (x + eps).clamp(0, 1))
    return torch.where(F.one_hot(y, 10).bool(), low, high)


def train(kind: str, eps: float, epochs: int, x: Tensor, y: Tensor) -> nn.Sequential:
    """Train by interval bound propagation."""
    torch.manual_seed(0)
    model, batch = build(kind), 256
    steps = epochs * (len(x) // batch)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.3)
    step = 0
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(batch)[: len(x) // batch]:
            grown = min(1.0, step / (0.6 * steps))
            share, budget = 1 - 0.5 * grown, eps * grown
            loss = share * F.cross_entropy(model(x[rows]), y[rows])
            loss = loss + (1 - share) * F.cross_entropy(worst_logits(model, x[rows], y[rows], budget), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            step += 1
    return model.eval()


def mnist(root: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images ``(N, 1, 28, 28)`` in [0, 1] and labels of the part ``train`` or ``test``."""
    data = brittle.load_data("mnist", root=root, split="test" if part == "t10k" else part)
    return data.inputs, data.labels


def load(name: str, zoo: Path) -> nn.Sequential:
    """A trained network."""
    model = build(HARDENED[name][0])
    model.load_state_dict(torch.load(zoo / f"{name}.pt", weights_only=True))
    return model.eval()


def train_missing(root: Path, zoo: Path) -> None:
    """Train and keep what is missing, and print accuracies: clean, and proven by intervals."""
    x, y = mnist(root, "train")
    x_test, y_test = mnist(root, "t10k")
    for name, (kind, eps, epochs) in HARDENED.items():
        path = zoo / f"{name}.pt"
        if path.is_file():
            continue
        started = time.perf_counter()
        model = train(kind, eps, epochs, x, y)
        torch.save(model.state_dict(), path)
        with torch.no_grad():
            clean = float((model(x_test).argmax(1) == y_test).double().mean())
            proven = [
                float((worst_logits(model, x_test, y_test, budget).argmax(1) == y_test).double().mean())
                for budget in (0.1, eps)
            ]
        took = time.perf_counter() - started
        print(
            f"{name}: clean {clean:.4f}, proven at 0.1 {proven[0]:.4f}, at {eps} {proven[1]:.4f}, {took:.0f} s",
            flush=True,
        )


def compare(root: Path, zoo: Path, samples: int, names: list[str]) -> None:
    """Robust samples under plain gradients, ``fast``, ``standard`` and a long Square, with passes and seconds."""
    x, y = (part[:samples] for part in mnist(root, "test"))
    plain = [partial(brittle.apgd, loss=loss) for loss in ("ce", "dlr")]
    long = partial(brittle.square, queries=20_000)
    print("network | norm | eps | plain | fast | standard | long Square | of standard's survivors it breaks")
    for name, p, eps in CASES:
        if name not in names:
            continue
        model = load(name, zoo) if name in HARDENED else certified.load(name, zoo)
        found = {}
        for label, attacks in (("plain", plain), ("fast", "fast"), ("standard", "standard"), ("queries", long)):
            if label in ("standard", "queries") and name not in HARDENED:
                continue
            started = time.perf_counter()
            threat = brittle.Threat(attacks, p=p)
            found[label] = brittle.evaluate(
                model, (x, y), threat, eps=eps, honesty=False, execution=brittle.Execution(certify=False)
            )
            e = found[label]
            seconds = time.perf_counter() - started
            passes = f"{e.backwards} passes with gradient, {e.forwards} without"
            print(f"  {label}: {e.robust_correct} of {e.clean_correct}, {e.misled} further; {passes}, {seconds:.1f} s")
        robust = [str(e.robust_correct) for e in found.values()]
        if "queries" in found:
            pairs = zip(found["standard"].samples, found["queries"].samples, strict=True)
            robust.append(str(sum(s.adversarial_margin > 0 >= q.adversarial_margin for s, q in pairs)))
        print(" | ".join([name, f"{p:g}", f"{eps:g}", *robust]), flush=True)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["train", "compare"])
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--names", nargs="+", default=[*dict.fromkeys(case[0] for case in CASES)])
    arguments = parser.parse_args()
    if arguments.what == "train":
        train_missing(arguments.data_root, arguments.zoo)
    else:
        compare(arguments.data_root, arguments.zoo, arguments.samples, arguments.names)


if __name__ == "__main__":
    main()
