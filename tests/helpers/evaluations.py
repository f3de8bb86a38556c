"""What tests of evaluations share: attacks that take notes, networks that are easy to break, and data in all forms."""

from __future__ import annotations

import copy
import dataclasses
import functools

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from brittle.attacks import apgd
from brittle.auditing import audit
from brittle.evaluation import Execution, Threat, evaluate

THREAT = {"p", "restarts", "bounds", "seed", "steps"}


def evaluate_with(model, data, attack=apgd, *, eps, **options):
    """Evaluate, without checks, under options of the threat and of the execution alike, so that tests can vary one."""
    threat = Threat(attack, **{name: value for name, value in options.items() if name in THREAT})
    execution = Execution(**{name: value for name, value in options.items() if name not in THREAT})
    return evaluate(model, data, threat, eps=eps, honesty=False, execution=execution)


def audit_with(model, data=None, attacks="fast", **options):
    """Audit under options of the threat, of the execution and of the audit itself alike."""
    threat = Threat(attacks, **{name: options.pop(name) for name in THREAT - {"p"} if name in options})
    fields = [field.name for field in dataclasses.fields(Execution) if field.name in options]
    execution = Execution(**{name: options.pop(name) for name in fields})
    return audit(model, data, threat, execution=execution, **options)


quick_apgd = functools.partial(apgd, steps=6)
SEEN: list[int] = []
"""Ids that :func:`noted` was asked to attack."""


def noted(model, x, y, *, eps, p, ids, seed=0, strength=1.0):
    """APGD that takes notes."""
    SEEN.extend(ids.tolist())
    return apgd(model, x, y, eps=strength * eps, p=p, steps=5, seed=seed, ids=ids)


def everything(e):
    """All of a result but what it cost."""
    return e.samples, e.n, e.clean_correct, e.robust_correct, e.rejected, e.largest_perturbation, e.proven, e.settings


def whole(e):
    """All of a result."""
    return e, e.samples


def hooked(net):
    """The network with a hook that does nothing: such a network is never traced."""
    net = copy.deepcopy(net)
    net.register_forward_hook(lambda module, inputs, output: None)
    return net


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def push(model, x, y, *, eps, p):
    """An honest attack with a certain success on `anything_moves`."""
    return (x + 0.5 * eps).clamp(0, 1)


def anything_moves(x):
    """Class 0 while every value is 0.5; any change makes it class 1."""
    moved = (x - 0.5).flatten(1).abs().amax(1)
    return torch.stack([torch.full_like(moved, 1e-9), 1e3 * moved], dim=1)


GREY = torch.full((8, 1, 2, 2), 0.5), torch.zeros(8, dtype=torch.long)


class Anything(nn.Module):
    """Class 0 until something moves by more than 0.05."""

    def forward(self, x):
        """``(N, ...)`` to ``(N, 2)``."""
        moved = (x - 0.5).flatten(1).abs().amax(1)
        return torch.stack([torch.full_like(moved, 0.05), moved], dim=1)


class Samples(Dataset):
    """A map-style dataset of samples with labels as plain numbers."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        """How many."""
        return len(self.y)

    def __getitem__(self, i):
        """One sample."""
        return self.x[i], int(self.y[i])


class Stream(IterableDataset):
    """A dataset without a length."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        """One sample after the other."""
        return ((x, int(y)) for x, y in zip(self.x, self.y, strict=True))
