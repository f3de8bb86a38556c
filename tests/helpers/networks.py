"""Tiny seeded networks and data, and a check that a borrowed network comes back exactly as it was."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import brittle

P = ParamSpec("P")
Made = TypeVar("Made", nn.Module, tuple[Tensor, Tensor])
_SHARED: list[tuple[str, tuple[Tensor, ...], tuple[Tensor, ...]]] = []

torch.set_num_threads(1)  # threads only slow networks this small down, and reorder sums


def generator(seed: int) -> torch.Generator:
    """A generator of its own, so that no test depends on another."""
    return torch.Generator().manual_seed(seed)


def uniform(seed: int, *shape: int, low: float = 0.0, high: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values between ``low`` and ``high``."""
    return low + (high - low) * torch.rand(*shape, generator=generator(seed), dtype=dtype)


def shared(make: Callable[P, Made]) -> Callable[P, Made]:
    """Make it once for each set of arguments; ``conftest.py`` fails a test that changes what many tests share."""

    @functools.cache
    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> Made:
        found = make(*args, **kwargs)
        tensors = tuple(found.state_dict().values() if isinstance(found, nn.Module) else found)
        _SHARED.append((f"{make.__name__}{args or '()'}", tensors, tuple(tensor.clone() for tensor in tensors)))
        return found

    return made


def repaired() -> list[str]:
    """Names of what tests share and one of them changed; it is as it was again."""
    changed = []
    for name, tensors, copies in _SHARED:
        if not all(torch.equal(tensor, kept) for tensor, kept in zip(tensors, copies, strict=True)):
            changed.append(name)
            for tensor, kept in zip(tensors, copies, strict=True):
                tensor.copy_(kept)
    return changed


@shared
def digits(split: str = "test", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs ``(N, 1, 8, 8)`` and labels."""
    data = brittle.load_data("digits", split=split)
    return data.inputs.to(dtype), data.labels


def few(n: int = 60, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The first n test digits."""
    x, y = digits("test", dtype)
    return x[:n], y[:n]


class Logistic(nn.Module):
    """Logits ``(-z / 2, z / 2)`` with ``z = <theta, x> + bias``: the binary linear classifier of the theory."""

    def __init__(self, n: int = 12, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.randn(n, generator=generator(n), dtype=torch.float64).to(dtype))
        self.bias = nn.Parameter(-self.theta.detach().sum() / 2)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, ...)`` to ``(N, 2)``."""
        z = x.flatten(1) @ self.theta + self.bias
        return torch.stack([-z / 2, z / 2], dim=1)


@shared
def linear(classes: int = 5, n: int = 12, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A linear classifier of several classes."""
    net = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(n, classes)))
    return net.to(dtype).eval()


def seeded(make, seed: int = 0) -> nn.Module:
    """A network with seeded weights; the global random state stays as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def _trained(net: nn.Module, steps: int) -> nn.Module:
    x, y = digits("train")
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for _ in range(steps):
            rows = torch.randint(len(x), (128,))
            optimiser.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimiser.step()
    net.zero_grad(set_to_none=True)
    return net.eval()


@shared
def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two hidden layers, trained on the digits for less than a second."""
    net = seeded(
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10)
        )
    )
    return copy.deepcopy(_trained(net, 200)).to(dtype)


@functools.cache
def _conv() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(96, 10),
    )
    return _trained(net, 60)


def convnet(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Convolutions with batch norm and dropout, a fresh copy in evaluation mode."""
    return copy.deepcopy(seeded(_conv)).to(dtype)


def narrow_resnet18(classes: int = 10) -> nn.Module:
    """Torchvision's ResNet-18, every layer of it, with an eighth of the channels: its bounds take seconds."""
    from torchvision.models.resnet import BasicBlock, resnet18

    def make() -> nn.Module:
        net = resnet18(num_classes=classes)
        net.conv1, net.bn1, net.inplanes = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), 8
        for stage, stride in enumerate((1, 2, 2, 2)):
            setattr(net, f"layer{stage + 1}", net._make_layer(BasicBlock, 8 * 2**stage, 2, stride))
        net.fc = nn.Linear(64, classes)
        return net

    return seeded(make)


def untidy() -> nn.Module:
    """The convolutional network as a user may leave it: mixed modes, mixed ``requires_grad``, some gradients."""
    net = convnet()
    net.train()
    net[5].eval()
    net[6].eval()
    net[4].weight.requires_grad_(False)
    net[8].bias.grad = torch.full_like(net[8].bias, 3.0)
    net[0].weight.grad = torch.zeros_like(net[0].weight)
    return net


def right(net, x: Tensor, y: Tensor) -> Tensor:
    """Which predictions are right."""
    with torch.no_grad():
        return net(x).argmax(1) == y


def distance(x_adv: Tensor, x: Tensor, p: float) -> np.ndarray:
    """Per-sample distance, taken in float64 in numpy."""
    return np.linalg.norm((x_adv.double() - x.double()).flatten(1).numpy(), ord=p, axis=1)


def accuracy(net, x: Tensor, y: Tensor) -> float:
    """Share of right predictions."""
    with torch.no_grad():
        return float((net(x).argmax(1) == y).float().mean())


def _bytes(tensor: Tensor | None) -> object:
    if tensor is None:
        return None
    return id(tensor), tensor.dtype, tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _everything(net: object) -> dict[str, object]:
    found: dict[str, object] = {
        "torch random state": torch.get_rng_state().numpy().tobytes(),
        "numpy random state": repr(np.random.get_state()),  # noqa: NPY002 - the global state is what is watched
        "python random state": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "gradients enabled": torch.is_grad_enabled(),
    }
    if isinstance(net, nn.Module):
        for name, module in net.named_modules():
            found[f"mode of {name}"] = module.training
            found[f"hooks of {name}"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
            for kind, owned in (("parameter", module._parameters), ("buffer", module._buffers)):
                for key, tensor in owned.items():
                    found[f"{kind} {name}.{key}"] = _bytes(tensor)
        for name, parameter in net.named_parameters():
            found[f"requires_grad of {name}"] = parameter.requires_grad
            found[f"grad of {name}"] = _bytes(parameter.grad)
    return found


@contextmanager
def untouched(net: object) -> Iterator[None]:
    """Fail unless the network and all global state are, bit by bit, what they were; also after an exception."""
    before = _everything(net)
    try:
        yield
    finally:
        after = _everything(net)
        assert [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)] == []
