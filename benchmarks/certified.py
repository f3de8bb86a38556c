"""Certified accuracy of small MNIST networks: how much is proven, beside an independent CROWN, and what it costs.

    python benchmarks/certified.py networks --data-root DATA --cache CACHE     # train what the cache lacks
    python benchmarks/certified.py table --data-root DATA --cache CACHE        # certified accuracy at three budgets

Every network is trained once and kept in ``--cache`` as NAME.safetensors; :func:`load` reads one back. The
``lip_*`` networks are held near spectral norms of 1: substitutes for the published networks of SDP-CROWN (Chiu and
Zhang 2025), whose weights they have not.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import brittle
from brittle.bounds.radius import certified_radii
from brittle.bounds.relaxation.certify import margin_bounds, read_relaxation
from brittle.bounds.relaxation.margins import CROWN, USUAL, Effort
from helpers.dense_crown import crown_margins, unrolled

INF = math.inf
EFFORTS = {"usual": USUAL, "CROWN": CROWN, "alpha": Effort(CROWN.rounds, CROWN.rows, slope_steps=10)}


def dense(*widths: int) -> nn.Sequential:
    """Flattened images through linear layers with ReLU between."""
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in zip((784, *widths), (*widths, 10), strict=True):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutional() -> nn.Sequential:
    """Two convolutions of stride 2 with 16 and 32 channels, and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 49, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip


class Block(nn.Module):
    """Two convolutions with batch norm, and a shortcut around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.c2, self.n2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """``relu(x + branch(x))``."""
        return F.relu(x + self.n2(self.c2(F.relu(self.n1(self.c1(x))))))


def residual() -> nn.Sequential:
    """Two blocks of 8 channels at half of the resolution."""
    stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(*stem, Block(8), Block(8), nn.Flatten(), nn.Linear(8 * 196, 10))


@dataclass(frozen=True)
class Subject:
    """A network of the table: how it is made, and the budgets at which certificates are counted.

    Attributes:
        make: Its architecture.
        linf: Budgets in l_inf.
        l2: Budgets in l_2.
        epochs: Passes over the training data.
        adversary: Norm and budget of the examples that it is trained on (5 steps of PGD); None: clean ones.
        lipschitz: Whether every layer's spectral norm is held near 1.
    """

    make: Callable[[], nn.Sequential]
    linf: tuple[float, float, float]
    l2: tuple[float, float, float]
    epochs: int = 4
    adversary: tuple[float, float] | None = None
    lipschitz: bool = False


SUBJECTS = {
    "fcn2x100": Subject(lambda: dense(100, 100), (0.01, 0.02, 0.04), (0.1, 0.2, 0.4)),
    "adv3x100": Subject(lambda: dense(100, 100, 100), (0.03, 0.06, 0.1), (0.3, 0.6, 1.0), adversary=(INF, 0.1)),
    "fcn3x400": Subject(lambda: dense(400, 400, 400), (0.01, 0.02, 0.04), (0.1, 0.2, 0.4)),
    "conv": Subject(convolutional, (0.01, 0.02, 0.04), (0.1, 0.2, 0.4), epochs=3),
    "resnet": Subject(residual, (0.005, 0.01, 0.02), (0.05, 0.1, 0.2), epochs=3),
    "l2adv3x100": Subject(lambda: dense(100, 100, 100), (0.03, 0.06, 0.1), (0.3, 0.6, 1.0), adversary=(2, 1.5)),
    "lip_mlp": Subject(lambda: dense(256, 256), (0.01, 0.03, 0.06), (0.3, 0.6, 1.0), lipschitz=True),
    "lip_conv": Subject(convolutional, (0.01, 0.03, 0.06), (0.1, 0.3, 0.6), epochs=3, lipschitz=True),
    "advconv": Subject(convolutional, (0.03, 0.06, 0.1), (0.3, 0.6, 1.0), epochs=3, adversary=(INF, 0.1)),
}


def load(name: str, cache: Path) -> nn.Sequential:
    """A trained network of the table in evaluation mode."""
    network = SUBJECTS[name].make()
    network.load_state_dict(brittle.read_state(cache / f"{name}.safetensors"))
    return network.eval()


def networks(arguments: argparse.Namespace) -> None:
    """Train what the cache lacks."""
    arguments.cache.mkdir(parents=True, exist_ok=True)
    train, test = (brittle.load_data("mnist", root=arguments.data_root, split=split) for split in ("train", "test"))
    for name in arguments.names:
        path, started = arguments.cache / f"{name}.safetensors", time.perf_counter()
        if not path.exists():
            brittle.save_state(fitted(SUBJECTS[name], train.inputs, train.labels), path)
        with torch.no_grad():
            accuracy = float((load(name, arguments.cache)(test.inputs).argmax(1) == test.labels).float().mean())
        print(f"{name:>10}: clean accuracy {100 * accuracy:.1f} %, {time.perf_counter() - started:.0f} s", flush=True)


def table(arguments: argparse.Namespace) -> None:
    """Certified accuracy in per cent, and milliseconds of one thread a sample, beside an independent CROWN's."""
    torch.set_num_threads(1)
    data = brittle.load_data("mnist", root=arguments.data_root, split="test")
    x, y = data.inputs[: arguments.samples], data.labels[: arguments.samples]
    print(f"| net | norm, budget | global | {' | '.join(EFFORTS)} | independent CROWN | survive PGD |")
    print("|" + "---|" * (len(EFFORTS) + 5))
    for name in arguments.names:
        network, subject = load(name, arguments.cache), SUBJECTS[name]
        steps = unrolled(network, tuple(x.shape[1:]))
        relaxation = read_relaxation(network, x.shape[1:], examples=data.inputs[-500:], groups=37)
        bounds = brittle.network_bounds(network, (2.0, INF), input_shape=tuple(x.shape[1:]))
        with torch.no_grad():
            logits = network(x)
        for p, budgets in ((INF, subject.linf), (2.0, subject.l2)):
            radii = certified_radii(logits, y, bounds[p].margins)
            for eps in budgets:
                options = {"eps": eps, "p": p}
                cells = [f"{100 * float((radii >= eps).double().mean()):.1f}"]
                for effort in EFFORTS.values():
                    cells.append(proven(partial(margin_bounds, relaxation, x, y, **options, effort=effort)))
                cells.append(proven(partial(crown_margins, steps, x, y, **options)) if arguments.crown else "")
                with torch.no_grad():
                    survive = network(brittle.pgd(network, x, y, **options, steps=40)).argmax(1) == y
                print(f"| {name} | {p:g}, {eps} | {' | '.join(cells)} | {100 * float(survive.double().mean()):.1f} |")


def proven(margins: Callable[[], Tensor]) -> str:
    """Share of positive margins and the time they took a sample."""
    started = time.process_time()
    bounds = margins()
    spent = time.process_time() - started
    return f"{100 * float((bounds > 0).double().mean()):.1f} ({1000 * spent / len(bounds):.1f})"


def fitted(subject: Subject, inputs: Tensor, labels: Tensor) -> nn.Sequential:
    """Adam at 2e-3, decayed to zero, in batches of 256."""
    torch.manual_seed(0)
    network = subject.make()
    optimiser = torch.optim.Adam(network.parameters(), 2e-3)
    total = subject.epochs * math.ceil(len(inputs) / 256)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / total)
    directions: dict[str, Tensor] = {}
    for _ in range(subject.epochs):
        for rows in torch.randperm(len(inputs)).split(256):
            x, y = inputs[rows], labels[rows]
            if subject.adversary is not None:
                x = attacked(network, x, y, *subject.adversary)
            logits = network(x)
            if subject.lipschitz:  # small logits: a large temperature asks for large margins
                loss = F.cross_entropy(16 * logits, y) + 10 * excess_norms(network, inputs.shape[1:], directions)
            else:
                loss = F.cross_entropy(logits, y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return network.eval()


def attacked(network: nn.Module, x: Tensor, y: Tensor, p: float, eps: float) -> Tensor:
    """Five steps of projected gradient ascent of the cross-entropy from a random start."""
    d = torch.empty_like(x).uniform_(-eps, eps) if p == INF else torch.zeros_like(x)
    for _ in range(5):
        d.requires_grad_(True)
        (g,) = torch.autograd.grad(F.cross_entropy(network(x + d), y, reduction="sum"), d)
        d = d.detach()
        if p == INF:
            d = (d + 0.5 * eps * g.sign()).clamp(-eps, eps)
        else:
            d = d + 0.5 * eps * F.normalize(g.flatten(1)).view_as(g)
            d = d * (eps / d.flatten(1).norm(dim=1).clamp_min(eps)).view(-1, 1, 1, 1)
        d = (x + d).clamp(0, 1) - x
    return x + d


def excess_norms(network: nn.Sequential, shape: torch.Size, directions: dict[str, Tensor]) -> Tensor:
    """``sum max(||A|| - 1, 0)`` over the layers' spectral norms, each by one more step of a power iteration."""
    total, sample = torch.zeros(()), torch.zeros(1, *shape)
    for name, layer in network.named_children():
        with torch.no_grad():
            after = layer(sample)
        if isinstance(layer, nn.Linear | nn.Conv2d):

            def linear(v: Tensor, layer: nn.Module = layer, zero: Tensor = sample) -> Tensor:
                return layer(v) - layer(torch.zeros_like(zero))

            v = directions.setdefault(name, torch.randn_like(sample)).requires_grad_(True)
            (v,) = torch.autograd.grad(linear(v).square().sum(), v)
            directions[name] = (v / v.norm()).detach()
            total = total + (linear(directions[name]).norm() - 1).clamp_min(0)
        sample = after
    return total


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("networks")
    command.add_argument("--data-root", type=Path, required=True)
    command.set_defaults(run=networks)
    command = commands.add_parser("table")
    command.add_argument("--data-root", type=Path, required=True)
    command.add_argument("--samples", type=int, default=20)
    command.add_argument("--no-crown", dest="crown", action="store_false", help="leave out the slow independent one")
    command.set_defaults(run=table)
    for command in commands.choices.values():
        command.add_argument("--cache", type=Path, default=Path("benchmarks/cache"))
        command.add_argument("--names", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
