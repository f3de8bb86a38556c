"""Networks built to look robust: an ordinary, fragile network behind something that misleads whoever attacks it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Disguise = Callable[[nn.Module, nn.Module, Tensor], Tensor]
"""From the network, another network and inputs to outputs; the label is mostly the network's."""


class Deceiver(nn.Module):
    """A network behind a disguise."""

    def __init__(self, name: str, net: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.net, self.other, self.disguise = net, other, DECEIVERS[name]

    def forward(self, x: Tensor) -> Tensor:
        """Whatever the disguise makes of the networks and the input."""
        return self.disguise(self.net, self.other, x)


class Backwards(torch.autograd.Function):
    """The identity, with a gradient of the wrong sign."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class StraightThrough(torch.autograd.Function):
    """Values rounded to eighths; the gradient passes, but to the wrong places: every input's is turned around."""

    @staticmethod
    def forward(ctx, x):
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx, gradient):
        return gradient.flatten(1).flip(1).view_as(gradient)


def one_hot(logits: Tensor) -> Tensor:
    """1 for the largest logit, 0 for the others; no gradient."""
    return F.one_hot(logits.argmax(1), logits.shape[1]).to(logits)


def mixed(value: Tensor, gradient: Tensor) -> Tensor:
    """The first one's value with the second one's gradient."""
    return gradient + (value - gradient).detach()


def staircase(x: Tensor) -> Tensor:
    """Sixteenths, and between them a slope that goes down a little: gradients point the wrong way everywhere."""
    steps = ((16 * x).round() / 16).detach()
    return steps - 0.1 * (x - steps)


def dead_zone(x: Tensor) -> Tensor:
    """Around every sixteenth nothing changes; further off it does."""
    grid = ((16 * x).round() / 16).detach()
    return grid + F.softshrink(x - grid, 1 / 128)


def blurred_argmax(logits: Tensor) -> Tensor:
    """The softmax at a hundredth of the temperature: nearly 0 and 1, and differentiable where it changes."""
    return (100 * logits / logits.detach().std(1, keepdim=True)).softmax(1)


DECEIVERS: dict[str, Disguise] = {
    "one-hot and 0.001 of another network": lambda net, other, x: one_hot(net(x)) + 1e-3 * other(x),
    "sharp softmax and 0.001 of another": lambda net, other, x: blurred_argmax(net(x)) + 1e-3 * other(x),
    "reversed gradients": lambda net, other, x: net(Backwards.apply(x)),
    "another network's gradients": lambda net, other, x: mixed(net(x), other(x)),
    "detached, and 0.001 of another": lambda net, other, x: net(x.detach()) + 1e-3 * other(x),
    "oscillating input": lambda net, other, x: net(x + 0.005 * torch.sin(1e4 * x)),
    "oscillating logits": lambda net, other, x: net(x) + 0.5 * torch.sin(3e3 * other(x)),
    "quantised input": lambda net, other, x: net((8 * x).round() / 8),
    "staircase with wrong slopes": lambda net, other, x: net(staircase(x)),
    "straight through to the wrong places": lambda net, other, x: net(StraightThrough.apply(x)),
    "rounded logits": lambda net, other, x: (net(x) / 2).round() * 2,
    "logits scaled by 10,000": lambda net, other, x: 1e4 * net(x),
    "temperature of a hundredth": lambda net, other, x: (net(x) / 0.01).log_softmax(1),
    "saturated softmax": lambda net, other, x: (40 * net(x)).softmax(1),
    "no gradient at the samples": lambda net, other, x: net(dead_zone(x)),
    "noise at the input": lambda net, other, x: net(x + 0.1 * torch.randn_like(x)),
    "statistics of the batch": lambda net, other, x: net(x - 0.5 * (x.mean(0) - x.mean())),
}
"""By what misleads."""
