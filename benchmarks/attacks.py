"""What robust accuracy costs: brittle.evaluate, pyautoattack, ART and torchattacks, and the passes alone.

    python benchmarks/attacks.py train --data-root DATA       # the networks, where they are missing
    python benchmarks/attacks.py speed --data-root DATA       # seconds and robust accuracy, tool by tool
    python benchmarks/attacks.py agreement --data-root DATA   # the same verdicts as pyautoattack?
    python benchmarks/attacks.py curve --data-root DATA       # ten budgets against one
    python benchmarks/attacks.py proofs --data-root DATA      # with certificates against the attacks alone

DATA holds ``MNIST/raw`` and a CIFAR-10 layout, or ``cifar10-jpeg/{train,test}/<class>/*.jpg``. The other tools are
optional (``pip install pyautoattack adversarial-robustness-toolbox torchattacks``). Every tool runs APGD on the
cross-entropy with equal steps, one random start and equal batches, in this one process and in turn; seconds are the
clock's, medians over ``--repeats``. A run during which other processes were busy is repeated and marked ``*`` if they
stayed so. "Bare" is the network alone: the passes that brittle made, in the same batches, each through the network or
through the copy of it that brittle had. On Linux set MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ to 4000000000,
which spares every tool page faults.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.metadata
import itertools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import brittle
from brittle.attacks.pool import random_start
from brittle.attacks.region import Region
from brittle.evaluation.curves import security_curve
from brittle.evaluation.execution import Execution
from brittle.evaluation.threat import Threat
from brittle.evaluation.worst_case import worst_case
from brittle.models.architectures.fcn import fcn
from brittle.models.architectures.resnet import BasicBlock, resnet18_cifar
from brittle.models.borrow import frozen
from brittle.models.fast_copy import copy_for_attacks
from brittle.models.normalize import Normalize

INF = math.inf
Passes = list[tuple[int, bool, nn.Module | None]]
"""Samples of every batch that a network saw, whether with gradient, and which network it was (if that is known)."""


# Networks


class SmallViT(nn.Module):
    """A vision transformer for 28 x 28 digits: patches of 7 x 7, three blocks of width 64, mean over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.places = nn.Conv2d(1, 64, 7, stride=7), nn.Parameter(0.02 * torch.randn(16, 64))
        block = functools.partial(nn.TransformerEncoderLayer, 64, 4, 128, dropout=0.0, activation="gelu")
        self.blocks = nn.Sequential(*(block(batch_first=True, norm_first=True) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, 1, 28, 28)`` to logits ``(N, 10)``."""
        tokens = self.patches(x).flatten(2).mT + self.places
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def small_resnet() -> nn.Module:
    """A residual network with batch normalisation and 9 convolutions, 16 to 64 channels."""
    stem = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    body = BasicBlock(16, 16, 1), BasicBlock(16, 32, 2), BasicBlock(32, 64, 2)
    scale = Normalize([0.49, 0.48, 0.45], [0.25, 0.24, 0.26])
    return nn.Sequential(scale, *stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


@dataclass(frozen=True)
class Net:
    """A network, how it is trained (``eps``: l_inf budget of adversarial training), where it is attacked."""

    title: str
    data: str
    build: Callable[[], nn.Module]
    budgets: Mapping[float, tuple[float, ...]]
    epochs: int
    rate: float
    images: int = 20_000
    eps: float = 0.0
    inner: int = 0
    start: str = ""


DIGITS, PHOTOS = {INF: (0.05, 0.1), 2.0: (0.5, 1.0)}, {INF: (1 / 255, 2 / 255), 2.0: (0.125, 0.25)}
NETS = {
    "fcn": Net("MNIST FCN", "mnist", fcn, DIGITS, 4, 1e-3),
    "fcn-adv": Net("MNIST FCN, adversarially trained", "mnist", fcn, DIGITS, 3, 2e-3, 60_000, 0.04, 7),
    "fcn-0.1": Net("MNIST FCN, trained at l_inf 0.1", "mnist", fcn, DIGITS, 2, 2e-3, 60_000, 0.1, 7),
    "fcn-100": Net(
        "MNIST FCN of width 100, trained at l_inf 0.1", "mnist", functools.partial(fcn, width=100),
        DIGITS, 2, 2e-3, 60_000, 0.1, 7,
    ),
    "cnn": Net("CIFAR residual net", "cifar10", small_resnet, PHOTOS, 12, 1e-2),
    "cnn-adv": Net(
        "CIFAR residual net, adversarially trained", "cifar10", small_resnet,
        {INF: (2 / 255, 4 / 255), 2.0: (0.25, 0.5)}, 5, 5e-3, 20_000, 4 / 255, 2, start="cnn",
    ),
    "vit": Net("MNIST ViT", "mnist", SmallViT, {INF: (0.025, 0.05), 2.0: (0.25, 0.5)}, 10, 2e-3),
    "vit-adv": Net("MNIST ViT, adversarially trained", "mnist", SmallViT, DIGITS, 8, 2e-3, 20_000, 0.1, 3),
    "resnet18": Net("CIFAR ResNet18", "cifar10", resnet18_cifar, PHOTOS, 10, 5e-3, 50_000),
}  # fmt: skip
SIX = ["fcn", "fcn-adv", "cnn", "cnn-adv", "vit", "vit-adv"]
SPEED = {
    "fcn": [(INF, 0.1), (2.0, 1.0)],
    "cnn": [(INF, 2 / 255), (2.0, 0.125)],
    "fcn-adv": [(INF, 0.1), (INF, 0.05)],
    "fcn-0.1": [(INF, 0.05)],
    "fcn-100": [(INF, 0.05)],
    "cnn-adv": [(INF, 4 / 255)],
    "vit": [(INF, 0.05)],
    "vit-adv": [(INF, 0.1)],
    "resnet18": [(INF, 2 / 255)],
}
"""Budgets of ``speed``."""
PROOFS = SPEED | {
    "fcn": [(INF, 0.1), (INF, 0.01), (2.0, 0.1)],
    "fcn-adv": [(INF, 0.05), (INF, 0.025), (2.0, 0.25)],
    "cnn": [(INF, 2 / 255), (INF, 0.5 / 255)],
}
"""Budgets of ``proofs``."""
SHARES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 3.0, 4.0)
"""The budgets of ``curve``, in units of a network's second one."""


def load(name: str, split: str, limit: int | None, arguments: argparse.Namespace) -> brittle.Data:
    """MNIST or CIFAR-10; the same samples under the same limit."""
    root = arguments.cifar_root if name == "cifar10" and arguments.cifar_root else arguments.data_root
    if name == "cifar10" and (root / "cifar10-jpeg").is_dir():
        name = f"folder:{(root / 'cifar10-jpeg' / split).resolve()}"
    return brittle.load_data(name, root=None if name.startswith("folder") else root, split=split, limit=limit)


def trained(name: str, arguments: argparse.Namespace) -> nn.Module:
    """The network from the cache, or trained now."""
    net, path = NETS[name], arguments.cache / f"{name}.safetensors"
    network = net.build()
    if not path.exists():
        print(f"training {name} ...", flush=True)
        started = time.perf_counter()
        arguments.cache.mkdir(parents=True, exist_ok=True)
        brittle.save_state(train(net, load(net.data, "train", net.images, arguments), arguments), path)
        print(f"{path} after {time.perf_counter() - started:.0f} s", flush=True)
    network.load_state_dict(brittle.read_state(path))
    return network.to(arguments.device).eval()


def train(net: Net, data: brittle.Data, arguments: argparse.Namespace) -> nn.Module:
    """Fit a network to images or, if it has a budget, to adversarial ones (Madry et al. 2018); shifts and flips."""
    start = trained(net.start, arguments).state_dict() if net.start else None
    torch.manual_seed(0)
    network = net.build()
    if start:
        network.load_state_dict(start)
    network = network.to(arguments.device).to(memory_format=torch.channels_last)
    batches = len(data.labels) // 128
    optimiser = torch.optim.AdamW(network.parameters(), net.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, net.rate, total_steps=net.epochs * batches)
    for _ in range(net.epochs):
        for rows in torch.randperm(len(data.labels))[: 128 * batches].split(128):
            x, y = data.inputs[rows].to(arguments.device), data.labels[rows].to(arguments.device)
            if net.data == "cifar10":
                x = x.flip(3) if torch.rand(()) < 0.5 else x
                x = x.roll(torch.randint(-2, 3, (2,)).tolist(), (2, 3)).contiguous(memory_format=torch.channels_last)
            x = hardened(network, x, y, net.eps, net.inner) if net.eps else x
            optimiser.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimiser.step()
            schedule.step()
    return network.eval()


def hardened(network: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int) -> Tensor:
    """PGD from a random start."""
    delta = torch.empty_like(x).uniform_(-eps, eps)
    for _ in range(steps):
        z = (x + delta).clamp(0, 1).requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(z), y), z)
        delta = (delta + 2 * eps / steps * gradient.sign()).clamp(-eps, eps)
    return (x + delta).clamp(0, 1).detach()


# Tools


@dataclass(frozen=True)
class Job:
    """What every tool is asked for."""

    net: str
    p: float
    eps: float
    steps: int
    batch: int
    seed: int
    certify: bool

    @property
    def budget(self) -> str:
        """``l_inf 2/255``."""
        fraction = 255 * self.eps
        whole = self.p == INF and abs(fraction - round(fraction)) < 1e-9
        return f"l_{self.p:g} " + (f"{round(fraction)}/255" if whole else f"{self.eps:g}")


@dataclass(frozen=True)
class Verdict:
    """Which samples ``(N,)`` are right under attack, how far the examples went, samples without and with gradient."""

    robust: Tensor
    largest: float
    passes: tuple[int, int] = (0, 0)

    @property
    def percent(self) -> float:
        """Robust accuracy."""
        return 100 * float(self.robust.float().mean())


Tool = Callable[[nn.Module, brittle.Data, Job], Verdict]


def ours(network: nn.Module, data: brittle.Data, job: Job) -> Verdict:
    """brittle.evaluate."""
    attack = functools.partial(brittle.apgd, loss="ce", steps=job.steps)
    result = brittle.evaluate(
        network,
        data,
        Threat(attack, p=job.p, seed=job.seed),
        eps=job.eps,
        honesty=False,
        execution=Execution(batch_size=job.batch, certify=job.certify),
    )
    robust = torch.tensor([s.clean_prediction == s.label and s.attack is None for s in result.samples])
    return Verdict(robust, result.largest_perturbation, (result.forwards, result.backwards))


def counting(tool: Callable[..., Verdict]) -> Callable[..., Verdict]:
    """A tool that notes how many samples it puts through the network."""

    def run(network: nn.Module, data: brittle.Data, job: Job, **options: bool) -> Verdict:
        passes, first = Passes(), next(module for module in network.modules() if not any(module.children()))
        hook = first.register_forward_pre_hook(lambda _, inputs: passes.append(one_pass(inputs[0])))
        try:
            return replace(tool(network, data, job, **options), passes=counts(passes))
        finally:
            hook.remove()

    return run


def one_pass(x: Tensor, network: nn.Module | None = None) -> tuple[int, bool, nn.Module | None]:
    """How many samples, whether with gradient, and through what."""
    return len(x), torch.is_grad_enabled() and x.requires_grad, network


def counts(passes: Passes) -> tuple[int, int]:
    """Samples that went through the network without and with gradient."""
    with_gradient = sum(n for n, gradient, _ in passes if gradient)
    return sum(n for n, _, _ in passes) - with_gradient, with_gradient


@counting
def pyautoattack(network: nn.Module, data: brittle.Data, job: Job, *, our_starts: bool = False) -> Verdict:
    """The official APGD on the clean-correct samples, batch by batch as its AutoAttack does."""
    from pyautoattack.autopgd_base import APGDAttack

    norm = "L2" if job.p == 2 else "Linf"
    attack = APGDAttack(network, n_iter=job.steps, norm=norm, eps=job.eps, loss="ce", device=data.inputs.device)
    torch.manual_seed(job.seed)
    examples = data.inputs.clone()
    for rows in right(network, data.inputs, data.labels, job).nonzero()[:, 0].split(job.batch):
        x, y = data.inputs[rows], data.labels[rows]
        attack.init_hyperparam(x)
        start = random_start(Region.of(x, job.eps, job.p, (0.0, 1.0)), job.seed, rows.tolist()) if our_starts else None
        examples[rows] = attack.attack_single_run(x, y, x_init=start)[-1].detach()
    return judged(network, data, examples, job)


@counting
def art(network: nn.Module, data: brittle.Data, job: Job) -> Verdict:
    """AutoProjectedGradientDescent; the first step is ``2 eps`` long, as in the other tools."""
    from art.attacks.evasion import AutoProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    np.random.seed(job.seed)  # noqa: NPY002 - the generator that ART draws from
    classifier = PyTorchClassifier(
        model=network, loss=nn.CrossEntropyLoss(), input_shape=tuple(data.inputs.shape[1:]), nb_classes=data.classes,
        clip_values=(0.0, 1.0), device_type="cpu" if data.inputs.device.type == "cpu" else "gpu",
    )  # fmt: skip
    attack = AutoProjectedGradientDescent(
        classifier, norm=np.inf if job.p == INF else 2, eps=job.eps, eps_step=2 * job.eps, max_iter=job.steps,
        nb_random_init=1, batch_size=job.batch, loss_type="cross_entropy", verbose=False,
    )  # fmt: skip
    examples = attack.generate(data.inputs.cpu().numpy(), data.labels.cpu().numpy())
    return judged(network, data, torch.from_numpy(examples).to(data.inputs), job)


@counting
def torchattacks(network: nn.Module, data: brittle.Data, job: Job) -> Verdict:
    """torchattacks.APGD, batch by batch."""
    from torchattacks import APGD

    norm = "L2" if job.p == 2 else "Linf"
    attack = APGD(network, norm=norm, eps=job.eps, steps=job.steps, n_restarts=1, seed=job.seed, loss="ce")
    batches = zip(data.inputs.split(job.batch), data.labels.split(job.batch), strict=True)
    return judged(network, data, torch.cat([attack(x, y).detach() for x, y in batches]), job)


TOOLS: dict[str, Tool] = {"pyautoattack": pyautoattack, "ART": art, "torchattacks": torchattacks}
PACKAGES = dict(zip(TOOLS, ("pyautoattack", "adversarial-robustness-toolbox", "torchattacks"), strict=True))


def right(network: nn.Module, x: Tensor, y: Tensor, job: Job) -> Tensor:
    """Which samples the network classifies correctly, ``(N,)``."""
    with torch.no_grad():
        return torch.cat([network(part).argmax(1) for part in x.split(job.batch)]) == y


def judged(network: nn.Module, data: brittle.Data, examples: Tensor, job: Job) -> Verdict:
    """The verdict on a tool's examples: the prediction, taken again, and the longest perturbation."""
    distance = torch.linalg.vector_norm((examples.double() - data.inputs.double()).flatten(1), job.p, dim=1)
    return Verdict(right(network, examples, data.labels, job).cpu(), float(distance.max()))


@contextmanager
def watching(shape: Sequence[int]) -> Iterator[Passes]:
    """Notes every pass of a whole network on inputs ``(N, *shape)``, from outside: no network knows of it."""
    passes, inside = Passes(), [0]

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Note the pass of a whole network: one that no other network runs inside of."""
        x = inputs[0] if inputs else None
        if not inside[0] and isinstance(x, Tensor) and x.shape[1:] == shape and any(module.children()):
            passes.append(one_pass(x, module))
        inside[0] += 1

    def leave(module: nn.Module, inputs: object, output: object) -> None:
        inside[0] -= 1

    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(enter).remove)
        stack.callback(register_module_forward_hook(leave, always_call=True).remove)
        yield passes


def bare(own: nn.Module, quick: Callable[[Tensor], Tensor], data: brittle.Data, passes: Passes) -> None:
    """Nothing but those passes, each through the network that it was made through: the user's, or the private copy."""
    with frozen(own):
        for n, gradient, seen in passes:
            x = data.inputs[:n].detach().requires_grad_(gradient)
            with torch.set_grad_enabled(gradient):
                logits = (own if seen is own else quick)(x)
                if gradient:
                    torch.autograd.grad(F.cross_entropy(logits, data.labels[:n], reduction="sum"), x)


# Clocks


@dataclass(frozen=True)
class Run:
    """Seconds by the clock, cores that this process kept busy, and cores that all others did (nan: not known)."""

    seconds: float
    own: float
    others: float


def clocks() -> tuple[float, float, float]:
    """Seconds: the clock's, this process's CPU time, and the whole machine's (from /proc/stat, so on Linux only)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    try:
        user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split()[1:9])
        machine = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
    except OSError:
        machine = math.nan
    return time.perf_counter(), time.process_time(), machine


def since(start: tuple[float, float, float]) -> Run:
    """What has passed since; two ticks of the machine's clock are forgiven."""
    wall, own, machine = (now - then for now, then in zip(clocks(), start, strict=True))
    return Run(wall, own / wall, (machine - own - 0.02) / wall)


def timed(function: Callable[[], Any], arguments: argparse.Namespace) -> tuple[Any, Run]:
    """Wait until the machine is quiet, run, repeat while others were busy; the result and the quietest run."""
    tries: list[tuple[Any, Run]] = []
    while len(tries) <= arguments.retries:
        patience = time.perf_counter() + arguments.patience
        while time.perf_counter() < patience:
            start = clocks()
            time.sleep(0.5)
            if not since(start).others > arguments.quiet:
                break
        start = clocks()
        tries.append((function(), since(start)))
        if not tries[-1][1].others > arguments.quiet:
            break
    return min(tries, key=lambda one: (one[1].others, one[1].seconds))


# Commands: each yields the rows of its table, and the same figures for the JSON

Row = tuple[dict[str, str], dict[str, Any]]
Budgets = Sequence[tuple[float, float]]
"""Pairs (p, eps)."""


def cases(
    arguments: argparse.Namespace, budgets: Callable[[str], Budgets]
) -> Iterator[tuple[dict[str, str], nn.Module, brittle.Data, Job]]:
    """The networks asked for, each with its test samples, at their budgets; and the first two cells of the row."""
    for name in arguments.nets:
        network, data = trained(name, arguments), load(NETS[name].data, "test", arguments.limit, arguments)
        x, y = data.inputs.to(arguments.device).contiguous(), data.labels.to(arguments.device)
        data = replace(data, inputs=x, labels=y)
        for p, eps in budgets(name):
            job = Job(name, p, eps, arguments.steps, arguments.batch, arguments.seed, arguments.certify)
            if p in arguments.norms:
                yield {"network": NETS[name].title, "budget": job.budget}, network, data, job


def speed(arguments: argparse.Namespace) -> Iterator[Row]:
    """Seconds and robust accuracy of every tool, in turn, and the bare passes."""
    tools = {name: TOOLS[name] for name, package in PACKAGES.items() if version(package)}
    for cells, network, data, job in cases(arguments, SPEED.__getitem__):
        few = replace(data, inputs=data.inputs[: job.batch], labels=data.labels[: job.batch])
        with watching(data.inputs.shape[1:]) as own:
            ours(network, data, job)
        calls: dict[str, Callable[[], Any]] = {"brittle": functools.partial(ours, network, data, job)}
        for name, tool in tools.items():
            model = copy.deepcopy(network)
            tool(model, few, replace(job, steps=3))  # whatever is done only once
            calls[name] = functools.partial(tool, model, data, job)
        calls["bare"] = functools.partial(bare, network, copy_for_attacks(network, data.inputs), data, own)
        runs: dict[str, list[Run]] = {name: [] for name in calls}
        verdicts: dict[str, Verdict] = {}
        for _, name in itertools.product(range(arguments.repeats), calls):
            verdict, run = timed(calls[name], arguments)
            runs[name].append(run)
            verdicts |= {name: verdict} if verdict else {}
        seconds = {name: statistics.median(run.seconds for run in these) for name, these in runs.items()}
        busy = {name: max(run.others for run in these) for name, these in runs.items()}
        clock = {name: f"{seconds[name]:.2f} s" + "*" * (busy[name] > arguments.quiet) for name in calls}
        for name in verdicts:
            reach = verdicts[name].largest / job.eps
            beyond = f" (examples up to {reach:.3f} eps)" if reach > 1.001 else ""
            times = f", {seconds[name] / seconds['brittle']:.1f} x" if name in tools else ""
            cells[f"{name}: robust, time"] = f"{verdicts[name].percent:.1f} %{beyond}, {clock[name]}{times}"
        used = {name: verdict.passes for name, verdict in verdicts.items()}
        cells["samples with gradient"] = "; ".join(f"{name} {gradient:,}" for name, (_, gradient) in used.items())
        cells["brittle / bare"] = f"{seconds['brittle'] / seconds['bare']:.2f} ({clock['bare']})"
        robust = {name: verdict.percent for name, verdict in verdicts.items()}
        record = {"seconds": seconds, "others_busy": busy, "robust": robust, "passes": used, "passes_seen": counts(own)}
        yield cells, asdict(job) | record | {"runs": {name: [asdict(run) for run in runs[name]] for name in calls}}


def agreement(arguments: argparse.Namespace) -> Iterator[Row]:
    """Robust accuracy beside pyautoattack's, from its own starts and from ours; passes beside the fewest possible."""
    for cells, network, data, job in cases(arguments, budgets_of):
        with watching(data.inputs.shape[1:]) as seen:
            mine = ours(network, data, job)
        theirs, answers = pyautoattack(network, data, job), list[Tensor]()
        hook = network.register_forward_hook(lambda _, x, logits, to=answers: to.append(logits.detach().argmax(1)))
        same = pyautoattack(network, data, job, our_starts=True)
        hook.remove()
        differ = (mine.robust != same.robust).nonzero()[:, 0].tolist()
        fewest = fewest_passes(answers, data.labels, job)
        cells |= {"brittle": f"{mine.percent:.1f} %", "pyautoattack": f"{theirs.percent:.1f} %"}
        cells |= {"difference (points)": f"{mine.percent - theirs.percent:+.1f}"}
        cells |= {"verdicts that differ, same starts": str(len(differ))}
        cells |= {"samples with gradient": f"{mine.passes[1]:,}", "fewest possible": f"{fewest:,}"}
        record = {"robust": mine.percent, "pyautoattack": theirs.percent, "differ": differ, "fewest": fewest}
        yield cells, asdict(job) | record | {"passes": mine.passes, "passes_seen": counts(seen)}


def budgets_of(net: str) -> Budgets:
    """Both budgets in both norms."""
    return [(p, eps) for p, several in NETS[net].budgets.items() for eps in several]


def fewest_passes(answers: list[Tensor], labels: Tensor, job: Job) -> int:
    """Points up to and with the first misclassified one, or all ``steps + 1``, summed over the samples attacked.

    From pyautoattack's predictions: the clean ones, every batch of right samples at its points, the final ones.
    """
    batches, points = -(-len(labels) // job.batch), job.steps + 1
    attacked = (torch.cat(answers[:batches]) == labels).nonzero()[:, 0]
    fewest = 0
    for number, rows in enumerate(attacked.split(job.batch)):
        start = batches + number * points
        wrong = torch.stack(answers[start : start + points]) != labels[rows]
        fewest += int(torch.where(wrong.any(0), wrong.int().argmax(0) + 1, points).sum())
    return fewest


def curve(arguments: argparse.Namespace) -> Iterator[Row]:
    """Ten budgets against the middle one, and against ten evaluations: samples with gradient, and seconds."""
    for cells, network, data, job in cases(arguments, lambda net: budgets_of(net)[1::2]):
        alone = [ours(network, data, replace(job, eps=share * job.eps)).passes[1] for share in SHARES]
        with watching(data.inputs.shape[1:]) as seen:
            robust = ladder(network, data, job)
        used, one = counts(seen)[1], alone[SHARES.index(1.0)]
        calls = [functools.partial(call, network, data, job) for call in (ours, ladder)]
        runs = [[timed(call, arguments)[1].seconds for call in calls] for _ in range(arguments.repeats)]
        seconds = [statistics.median(these) for these in zip(*runs, strict=True)]
        cells["robust at " + ", ".join(f"{share:g}" for share in SHARES)] = ", ".join(f"{r:.1f}" for r in robust)
        cells["samples with gradient: one; ten; ten by themselves"] = f"{one:,}; {used:,}; {sum(alone):,}"
        cells["seconds: one; ten"] = f"{seconds[0]:.2f}; {seconds[1]:.2f}"
        cells["ten / one, by samples and by seconds"] = f"{used / max(one, 1):.2f}; {seconds[1] / seconds[0]:.2f}"
        cells["ten / dearest of the ten by itself"] = f"{used / max(max(alone), 1):.2f}"
        # Who survives the smallest budget has withstood all steps at one budget at least.
        cells["fewest possible"] = f"{round(robust[0] / 100 * len(data.labels)) * (job.steps + 1):,}"
        yield cells, asdict(job) | {"robust": robust, "one": one, "ten": used, "alone": alone, "seconds": seconds}


def ladder(network: nn.Module, data: brittle.Data, job: Job) -> list[float]:
    """Robust accuracy at the ten budgets of ``curve``."""
    threat = Threat((functools.partial(brittle.apgd, loss="ce", steps=job.steps),), job.p, seed=job.seed)
    worst = worst_case(network, data.inputs, data.labels, threat, job.eps, execution=Execution(batch_size=job.batch))
    budgets = [share * job.eps for share in SHARES]
    found = security_curve(
        network, worst, threat, at=job.eps, budgets=budgets, execution=Execution(batch_size=job.batch)
    )
    return [100 * (rate.value or 0.0) for rate in found.robust]


def proofs(arguments: argparse.Namespace) -> Iterator[Row]:
    """CPU seconds with certificates against the attacks alone, in turn; for one attack and for the preset ``fast``."""
    attacks: dict[str, Any] = {
        "APGD": functools.partial(brittle.apgd, loss="ce", steps=arguments.steps),
        "PGD": functools.partial(brittle.pgd, steps=arguments.steps),
        "fast": "fast",
    }
    for cells, network, data, job in cases(arguments, PROOFS.__getitem__):
        for name, attack in attacks.items():
            seconds: dict[bool, list[float]] = {False: [], True: []}
            results: dict[bool, Any] = {}
            for _, certify in itertools.product(range(arguments.repeats), seconds):
                started = time.process_time()
                results[certify] = brittle.evaluate(
                    network,
                    data,
                    Threat(attack, p=job.p, seed=job.seed),
                    eps=job.eps,
                    execution=Execution(batch_size=job.batch, certify=certify),
                    honesty=False,
                )
                seconds[certify].append(time.process_time() - started)
            alone, proving = (min(seconds[certify]) for certify in (False, True))
            found = {
                "attack": name,
                "robust, without and with proofs": " and ".join(str(e.robust_correct) for e in results.values()),
                "proven": str(results[True].proven),
                "CPU s, without and with proofs": f"{alone:.2f} and {proving:.2f}",
                "with / without": f"{proving / alone:.2f}",
            }
            yield cells | found, asdict(job) | {"attack": name, "seconds": seconds, "proven": results[True].proven}


def train_all(arguments: argparse.Namespace) -> Iterator[Row]:
    """Train what is missing; accuracy of every network, clean and under 20 steps of PGD."""
    for cells, network, data, job in cases(arguments, lambda net: budgets_of(net)[:2]):
        attacked = hardened(network, data.inputs, data.labels, job.eps, 20)
        for title, x in (("clean", data.inputs), ("PGD", attacked)):
            cells[title] = f"{100 * float(right(network, x, data.labels, job).float().mean()):.1f} %"
        yield cells, asdict(job)


def version(package: str) -> str:
    """The version installed, or nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def report(rows: Iterator[Row], arguments: argparse.Namespace) -> None:
    """Print a Markdown table as its rows come, and write it, and the same figures as JSON, where they are wanted."""
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{torch.get_num_threads()} threads"
    heap = "set" if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ) else "as it comes"
    found = [f"{package} {version(package) or 'not installed, left out'}" for package in ("torch", *PACKAGES.values())]
    about = f"{arguments.limit} samples, {arguments.steps} steps, batches of {arguments.batch}, medians of "
    about += f"{arguments.repeats}; {platform.machine()}, {device}, malloc {heap}; {', '.join(found)}."
    lines, records = [about, ""], list[dict[str, Any]]()
    print(about, flush=True)
    for cells, record in rows:
        head = ["| " + " | ".join(cells) + " |", "|" + "---|" * len(cells)] if not records else []
        records.append(record)
        lines += [*head, "| " + " | ".join(cells.values()) + " |"]
        print("\n".join(["", *lines[-3:]] if head else lines[-1:]), flush=True)
        if arguments.out:
            arguments.out.write_text("\n".join(lines) + "\n")
        if arguments.json:
            arguments.json.write_text(json.dumps({"about": about, "rows": records}, indent=1) + "\n")


def main() -> None:
    """Run one of the five."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["train", "speed", "agreement", "curve", "proofs"])
    add = parser.add_argument
    add("--data-root", type=Path, required=True)
    add("--cifar-root", type=Path, help="where CIFAR-10 is, if elsewhere")
    add("--cache", type=Path, default=Path("benchmark-cache"), help="trained networks")
    add("--nets", nargs="+", choices=list(NETS), default=SIX)
    add("--norms", nargs="+", type=float, default=[2.0, INF])
    add("--limit", type=int, default=1000, help="test samples")
    add("--steps", type=int, default=100)
    add("--batch", type=int, default=128)
    add("--seed", type=int, default=0)
    add("--certify", action=argparse.BooleanOptionalAction, default=True, help="skip samples that are proven robust")
    add("--repeats", type=int, default=3)
    add("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--quiet", type=float, default=0.1, help="cores that other processes may keep busy")
    add("--retries", type=int, default=2, help="repeats of a disturbed run")
    add("--patience", type=float, default=60, help="seconds to wait for a quiet machine before a run")
    add("--out", type=Path, help="Markdown file")
    add("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    commands = {"train": train_all, "speed": speed, "agreement": agreement, "curve": curve, "proofs": proofs}
    run = commands[arguments.command]
    report(run(arguments), arguments)


if __name__ == "__main__":
    main()
