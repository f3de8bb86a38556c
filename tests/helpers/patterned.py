"""Random tiny networks of every family, and their Jacobians under any slopes that the activations may take.

Nothing here reads the bounds' own graph: a network is run by ``torch.fx`` with every activation replaced by a product
with a mask, every max pooling by a choice of one entry a window, and constants left out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

SLOPES: dict[type[nn.Module], tuple[float, float]] = {
    nn.ReLU: (0.0, 1.0),
    nn.Tanh: (0.0, 1.0),
    nn.Sigmoid: (0.0, 0.25),
    nn.LeakyReLU: (0.1, 1.0),
    nn.GELU: (-0.1289, 1.1289),
    nn.SiLU: (-0.0998, 1.0998),
    nn.Hardswish: (-0.5, 1.5),
}
"""Attained slopes (rounded inwards) of the activations that the random networks use."""

_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_MAX_POOL = (None, F.max_pool1d, F.max_pool2d, F.max_pool3d)
_CONVOLVE: tuple[Any, ...] = (None, F.conv1d, F.conv2d, F.conv3d)
Form = Callable[[Any, Tensor], Tensor]


class Apply(nn.Module):
    """A module whose forward is ``function(self, x)``."""

    def __init__(self, function: Form, **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Slopes(nn.Module):
    """The linear map ``mask * x`` in an activation's place, for tests that write a pattern into a copy."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return self.mask * x


class Patterned(fx.Interpreter):
    """A network without constants, every activation's slopes given by ``masks``, every max pooling's choice too."""

    def __init__(self, model: nn.Module, shape: Sequence[int], seed: int) -> None:
        super().__init__(fx.symbolic_trace(model))
        self.shape, self.rng = tuple(shape), torch.Generator().manual_seed(seed)
        self.masks: dict[str, Tensor] = {}
        self.limits: dict[str, tuple[float, float]] = {}
        self.read: dict[str, Tensor] = {}
        self.drawn, self.seen = "corners", False
        self.redraw("corners")

    def redraw(self, how: str) -> None:
        """New slopes: ``corners``, ``inside``, all ``high`` or all ``low``; max pooling chooses at random."""
        self.masks, self.drawn = {}, how
        with torch.no_grad():
            self.run(torch.zeros(1, *self.shape, dtype=torch.float64))

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module, x = self.fetch_attr(target), args[0]
        name = self.current.name
        if type(module) in SLOPES:
            if name not in self.masks:
                self.limits[name] = SLOPES[type(module)]
                self.masks[name] = self.draw(x.shape, *self.limits[name])
            return self.masks[name] * x
        if isinstance(module, _POOLS):
            return self.pool(module, name, x)
        if isinstance(module, nn.Linear):
            return F.linear(x, module.weight)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return module._conv_forward(x, module.weight, None)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            scale = module.weight / (module.running_var + module.eps).sqrt()
            return x * scale.view(1, -1, *[1] * (x.ndim - 2))
        return module(x)  # poolings, flattenings, masks: linear

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        return super().run_node(n)

    def draw(self, shape: Sequence[int], low: float, high: float) -> Tensor:
        share = torch.rand(1, *shape[1:], generator=self.rng, dtype=torch.float64)
        if self.drawn == "corners":
            share = share.round()
        elif self.drawn in ("high", "low"):
            share = torch.full_like(share, float(self.drawn == "high"))
        return low + (high - low) * share

    def pool(self, module: Any, name: str, x: Tensor) -> Tensor:
        """One entry of every window."""
        if name not in self.masks:
            self.masks[name] = window_maxima(module, torch.randn(x[:1].shape, generator=self.rng, dtype=torch.float64))
        self.read[name] = x
        index = self.masks[name]
        flat = x.flatten(2).gather(2, index.flatten(2).expand(len(x), -1, -1))
        return flat.view(len(x), *index.shape[1:])

    def jacobian(self) -> Tensor:
        """Outputs by inputs, under the present slopes."""
        n = math.prod(self.shape)
        with torch.no_grad():
            return self.run(torch.eye(n, dtype=torch.float64).view(n, *self.shape)).flatten(1).mT

    def ascend(self, u: Tensor, v: Tensor) -> None:
        """Move all slopes to the corners that raise ``u^T J v``, one activation at a time: it never falls."""
        for name in list(self.masks):
            pooled = name in self.limits
            mask = self.masks[name]
            if pooled:
                self.masks[name] = mask.clone().requires_grad_()
            with torch.enable_grad():
                x = v.view(1, *self.shape).clone().requires_grad_()
                value = self.run(x).flatten() @ u
                source = self.masks[name] if pooled else self.read[name]
                (slope,) = torch.autograd.grad(value, source, allow_unused=True) if value.requires_grad else (None,)
            self.masks[name] = mask
            if slope is None:
                continue
            if pooled:
                low, high = self.limits[name]
                self.masks[name] = torch.where(slope > 0, high, torch.where(slope < 0, low, mask))
        self.choose_windows(u, v)

    def choose_windows(self, u: Tensor, v: Tensor) -> None:
        """In every window of every max pooling, the entry that raises ``u^T J v`` most."""
        modules = {n.name: self.fetch_attr(str(n.target)) for n in self.module.graph.nodes if n.op == "call_module"}
        for name in [name for name in self.masks if name not in self.limits]:
            outputs: dict[str, Tensor] = {}
            kept = self.pool

            def watched(module: Any, at: str, x: Tensor, kept: Any = kept, outputs: Any = outputs) -> Tensor:
                outputs[at] = kept(module, at, x)
                return outputs[at]

            self.pool = watched  # type: ignore[method-assign]
            with torch.enable_grad():
                x = v.view(1, *self.shape).clone().requires_grad_()
                (gain,) = torch.autograd.grad(self.run(x).flatten() @ u, outputs[name])
            del self.pool
            a = self.read[name].detach()
            best, least = window_maxima(modules[name], a), window_maxima(modules[name], -a)
            self.masks[name] = torch.where(gain > 0, best, least)


def window_maxima(module: Any, x: Tensor) -> Tensor:
    """Flat index (over the spatial axes) of the largest entry of every window."""
    axes = x.ndim - 2
    options = {k: getattr(module, k) for k in ("kernel_size", "stride", "padding", "dilation", "ceil_mode")}
    return _MAX_POOL[axes](x.detach(), **options, return_indices=True)[1]


# --- the largest norm found ---------------------------------------------------------------------------------


def norm_of(J: Tensor, p: float) -> tuple[float, Tensor, Tensor]:
    """``||J||_p`` with ``u, v`` such that ``u^T J v`` is that norm: singular vectors, or a row and its signs."""
    if p == 2:
        U, s, Vh = torch.linalg.svd(J, full_matrices=False)
        return float(s[0]), U[:, 0], Vh[0]
    sums = J.abs().sum(1)
    row = torch.zeros_like(sums)
    row[sums.argmax()] = 1.0
    return float(sums.max()), row, J[sums.argmax()].sign()


def margins_of(J: Tensor, p: float) -> Tensor:
    """``(K, K)``: dual norms of the differences of rows."""
    return torch.linalg.vector_norm(J[:, None] - J, ord=2 if p == 2 else 1, dim=2)


def search(net: Patterned, p: float, sweeps: int, pair: tuple[int, int] | None = None) -> list[Tensor]:
    """Jacobians on the way up from the present slopes, towards the largest norm (or difference of two rows)."""
    found = [net.jacobian()]
    for _ in range(sweeps):
        J = found[-1]
        if pair is None:
            value, u, v = norm_of(J, p)
        else:
            u = torch.zeros(len(J), dtype=torch.float64)
            u[pair[0]], u[pair[1]] = 1.0, -1.0
            row = J.mT @ u
            v = row / row.norm().clamp_min(1e-300) if p == 2 else row.sign()
            value = float(row @ v)
        net.ascend(u, v)
        found.append(net.jacobian())
        after = norm_of(found[-1], p)[0] if pair is None else float(margins_of(found[-1], p)[pair])
        if after <= value * (1 + 1e-9):
            break
    return found


def jacobian_at(model: nn.Module, x: Tensor) -> Tensor:
    """Outputs by inputs, at one input without its batch axis."""
    J = torch.autograd.functional.jacobian(lambda z: model(z[None])[0], x)
    return J.reshape(-1, x.numel())


# --- random networks ----------------------------------------------------------------------------------------


def randomise(model: nn.Module, rng: random.Random) -> nn.Module:
    """In float64 and evaluation mode, with random weights of one of several kinds and random running statistics."""
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        W = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        kind = rng.randrange(6)
        if name.endswith("running_var"):
            W = 0.1 + W.abs()
        elif kind == 0:
            W = W * (torch.rand(W.shape, generator=generator) < 0.4)
        elif kind == 1:
            W = W.sign()
        elif kind == 2:
            W = W**3
        elif kind == 3 and W.ndim > 1:  # near rank one
            W = W.flatten(1).mean(0).view(1, *W.shape[1:]) * W.flatten(1).mean(1).view(-1, *[1] * (W.ndim - 1)) + W / 20
        elif kind == 4:
            W = W.abs()
        tensor.data = W if W.ndim < 2 else W / max(1, W[0].numel()) ** 0.5
    return model.double().eval()


def activation(rng: random.Random) -> nn.Module:
    """ReLU mostly."""
    kind = rng.choice([nn.ReLU] * 6 + list(SLOPES))
    return nn.LeakyReLU(0.1) if kind is nn.LeakyReLU else kind()


def _conv(rng: random.Random, axes: int, inputs: int, outputs: int, **fixed: Any) -> nn.Module:
    kind = (None, nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes]
    kernel = fixed.get("kernel_size", rng.choice([1, 2, 3, 3]))
    chosen = {
        "kernel_size": kernel,
        "padding": rng.choice([0, kernel // 2, kernel // 2, kernel - 1, 1]),
        "stride": rng.choice([1, 1, 1, 2]),
        "dilation": rng.choice([1, 1, 1, 2]),
        "groups": rng.choice([1, 1, math.gcd(inputs, outputs)]),
        "padding_mode": rng.choice(["zeros"] * 12 + ["circular"]),
    } | fixed
    if chosen["padding_mode"] == "circular":
        chosen["padding"] = min(int(chosen["padding"]), 1)
    assert kind is not None
    return kind(inputs, outputs, **chosen)


def _same(rng: random.Random, inputs: int, outputs: int, **options: Any) -> nn.Module:
    kernel = rng.choice([1, 3, 3])
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def _norm(rng: random.Random, width: int, axes: int) -> nn.Module:
    kind = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes]
    return kind(width) if rng.random() < 0.4 else nn.Identity()


def _head(rng: random.Random, features: int) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(features, rng.randint(1, 4))]


def dense(rng: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    """A chain of dense layers."""
    widths = [rng.randint(1, 6) for _ in range(rng.randint(2, 5))]
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), _norm(rng, b, 0), activation(rng)]
    layers += [nn.Linear(widths[-1], rng.randint(1, 4))]
    if rng.random() < 0.2:
        layers = [nn.Flatten(), *layers]
        return nn.Sequential(*layers), (1, widths[0], 1)
    return nn.Sequential(*layers), (widths[0],)


def dense_branches(rng: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    """Sums, differences, concatenations and multiples of dense layers, with shortcuts."""
    n, h = rng.randint(1, 5), rng.randint(1, 5)
    forms: list[Form] = [
        lambda s, x: s.d(s.act(s.a(x)) + s.b(x)),
        lambda s, x: s.d(s.a(x) - s.act(s.c(s.act(s.b(x))))),
        lambda s, x: s.e(torch.cat([s.act(s.a(x)), s.b(x)], 1)),
        lambda s, x: s.d(s.act(s.c(y := s.act(s.a(x))) + y) - 2 * y),
        lambda s, x: s.d(s.c(s.act(s.c(s.act(s.a(x))))) / 3),
        lambda s, x: s.d(s.act(torch.add(s.a(x), s.b(x))) + s.a(x)),
        lambda s, x: torch.cat([s.d(s.act(s.a(x))), s.f(x)], dim=1),
        lambda s, x: s.a(x.flatten(1)) + s.act(s.b(torch.flatten(x, 1))),
        lambda s, x: s.act(y := s.a(x)) - s.act(-1 * y),
    ]
    parts = {"a": nn.Linear(n, h), "b": nn.Linear(n, h), "c": nn.Linear(h, h), "act": activation(rng)}
    parts |= {"d": nn.Linear(h, rng.randint(1, 4)), "e": nn.Linear(2 * h, 3), "f": nn.Linear(n, 2)}
    return Apply(rng.choice(forms), **parts), (n,)


def convolutions(rng: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    """Convolutions in one, two or three dimensions, with pooling, and a head."""
    axes = rng.choice([1, 2, 2, 2, 3])
    n, width = {1: 8, 2: 5, 3: 3}[axes], rng.randint(1, 3)
    shape = (width, *(rng.randint(n - 1, n + 1) for _ in range(axes)))
    layers: list[nn.Module] = []
    for _ in range(rng.randint(1, 3)):
        after = rng.randint(1, 3) if rng.random() < 0.6 else width
        layers += [_conv(rng, axes, width, after), _norm(rng, after, axes)]
        layers += [activation(rng)] if rng.random() < 0.85 else []
        layers += [_pooling(rng, axes)] if rng.random() < 0.25 else []
        width = after
    pools = (None, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
    if rng.random() < 0.6:
        layers.append(pools[axes](rng.choice([1, 1, 2])))  # type: ignore[misc]
    return _with_head(rng, nn.Sequential(*layers), shape)


def _pooling(rng: random.Random, axes: int) -> nn.Module:
    maximal, average = _POOLS[axes - 1], (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[axes - 1]
    kernel, stride = rng.choice([2, 2, 3]), rng.choice([1, 2, 2])
    padding = rng.choice([0, kernel // 2])
    return rng.choice([maximal, average])(kernel, stride, padding)


def _with_head(rng: random.Random, body: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
    """With a flattening and a dense layer (nine times in ten); raises where the shapes do not fit."""
    with torch.no_grad():
        features = body.eval()(torch.zeros(1, *shape))[0].numel()
    if features == 0 or features > 150:
        raise RuntimeError("no such network")
    return (body if rng.random() < 0.1 else nn.Sequential(body, *_head(rng, features))), shape


def residual(rng: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    """Blocks with identity, strided 1x1, pooled or padded shortcuts, with or without an activation after the sum."""
    width, n = rng.randint(1, 2), rng.randint(3, 6)
    blocks: list[nn.Module] = [_same(rng, width, width), activation(rng)] if rng.random() < 0.5 else []
    before = width
    for _ in range(rng.randint(1, 2)):
        after, stride = rng.choice([(before, 1), (before, 1), (rng.randint(1, 3), 2), (rng.randint(1, 3), 1)])
        first = nn.Conv2d(before, after, 3, stride=stride, padding=1)
        parts: dict[str, nn.Module] = {
            "a": first, "m": _norm(rng, after, 2), "act": activation(rng),
            "b": _same(rng, after, after), "n": _norm(rng, after, 2),
        }  # fmt: skip
        if (before, stride) == (after, 1):
            parts["short"] = nn.Identity()
        else:
            kernel, padding = rng.choice([(1, 0), (1, 0), (3, 1), (2, 1 - n % 2 if stride == 2 else 0)])
            if kernel == 2 and stride == 1:
                kernel, padding = 1, 0
            parts["short"] = nn.Conv2d(before, after, kernel, stride=stride, padding=padding)
        bare: Form = lambda s, x: s.n(s.b(s.act(s.m(s.a(x))))) + s.short(x)  # noqa: E731
        forms: list[Form] = [
            bare,
            lambda s, x: s.act(s.n(s.b(s.act(s.m(s.a(x))))) + s.short(x)),
            lambda s, x: s.act(s.short(x) - s.n(s.b(s.act(s.m(s.a(x)))))),
        ]
        if (before, stride) == (after, 1):
            forms.append(lambda s, x: x + s.b(s.act(s.a(s.act(s.m(x))))))  # activation first
        blocks.append(Apply(rng.choice(forms), **parts))
        n, before = -(-n // stride), after
    blocks += [nn.AdaptiveAvgPool2d(1)] if rng.random() < 0.7 else []
    return _with_head(rng, nn.Sequential(*blocks), (width, *[rng.randint(3, 6)] * 2))


def dense_net(rng: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    """Concatenations of all earlier results, with a transition."""
    width, grown = rng.randint(1, 2), rng.randint(1, 2)
    parts: dict[str, nn.Module] = {
        "a": _same(rng, width, grown), "n": _norm(rng, width + grown, 2), "b": _same(rng, width + grown, grown),
        "act": activation(rng), "t": nn.Conv2d(width + 2 * grown, 2, 1),
        "pool": rng.choice([nn.AvgPool2d(2), nn.MaxPool2d(2), nn.Identity()]),
    }  # fmt: skip
    forms: list[Form] = [
        lambda s, x: s.pool(s.t(s.act(torch.cat([y := torch.cat([x, s.a(s.act(x))], 1), s.b(s.act(s.n(y)))], 1)))),
        lambda s, x: s.pool(s.act(s.t(torch.cat([y := torch.cat([x, s.act(s.a(x))], 1), s.act(s.b(y))], 1)))),
    ]
    body: list[nn.Module] = [Apply(rng.choice(forms), **parts)]
    body += [nn.AdaptiveAvgPool2d(1)] if rng.random() < 0.6 else []
    return _with_head(rng, nn.Sequential(*body), (width, *[rng.randint(2, 5)] * 2))


def bottlenecks(rng: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    """Inverted residual blocks: 1x1, depthwise, 1x1, no activation after the sum."""
    width, wide = rng.randint(1, 2), rng.randint(2, 3)
    blocks: list[nn.Module] = []
    for _ in range(rng.randint(1, 2)):
        stride, kernel = rng.choice([1, 1, 2]), rng.choice([3, 5])
        act = activation(rng)
        layers = [
            nn.Conv2d(width, wide, 1), _norm(rng, wide, 2), act,
            nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide), _norm(rng, wide, 2), act,
            nn.Conv2d(wide, width, 1), _norm(rng, width, 2),
        ]  # fmt: skip
        inner = nn.Sequential(*layers)
        blocks.append(Apply(lambda s, x: x + s.inner(x), inner=inner) if stride == 1 else inner)
    blocks += [nn.AdaptiveAvgPool2d(1)] if rng.random() < 0.6 else []
    return _with_head(rng, nn.Sequential(*blocks), (width, *[rng.randint(3, 5)] * 2))


def branches(rng: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    """Several paths over an image: inception-like, differences, networks used twice, shortcuts around pooling."""
    width, n = rng.randint(1, 2), rng.randint(3, 5)
    parts: dict[str, nn.Module] = {
        "a": _same(rng, width, width), "b": _same(rng, width, width), "c": nn.Conv2d(width, width, 1),
        "act": activation(rng), "pool": rng.choice([nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1)]),
        "down": rng.choice([nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Conv2d(width, width, 2, 2)]),
        "wide": nn.Conv2d(width, width, 3, padding=2), "rim": nn.Conv2d(width, width, 1, padding=1),
        "mean": nn.AdaptiveAvgPool2d(1), "gap": nn.Linear(width, 3), "flat": nn.Linear(width * n * n, 3),
        "start": nn.Flatten(),
    }  # fmt: skip
    forms: list[Form] = [
        lambda s, x: torch.cat([s.a(x), s.c(s.pool(x)), s.b(s.act(s.c(x)))], 1),
        lambda s, x: s.a(s.act(s.a(s.act(s.a(x))))),
        lambda s, x: s.act(s.a(x)) - s.act(s.b(x)),
        lambda s, x: s.down(s.act(s.a(x))) + s.down(x),
        lambda s, x: s.down(s.act(s.a(x))) + s.down(s.b(x)),
        lambda s, x: s.b(s.act(y := s.a(x))) + s.c(y) + x,
        lambda s, x: s.c(s.act(s.b(s.pool(y := s.act(s.a(x)))) + y)) - y,
        lambda s, x: s.rim(s.a(x)) + s.wide(x),
        lambda s, x: s.act(s.rim(s.act(s.a(x)))) + s.wide(s.b(x)),
        lambda s, x: s.gap(s.mean(s.act(s.a(x))).flatten(1)) + s.flat(torch.flatten(x, 1)),
        lambda s, x: s.flat(s.start(x)) + s.gap(torch.flatten(s.mean(s.act(s.a(x))), 1)),
        lambda s, x: s.mean(s.act(s.a(x)) + 3 * s.b(x)) - s.mean(x),
        lambda s, x: s.act(s.b(x) + s.c(s.act(x))).mean([2, 3]),
        lambda s, x: s.c(s.act(x).view(x.size(0), width, n, n)) + s.act(x),
    ]
    return _with_head(rng, Apply(rng.choice(forms), **parts), (width, n, n))


FAMILIES: dict[str, Callable[[random.Random], tuple[nn.Module, tuple[int, ...]]]] = {
    "dense": dense,
    "dense branches": dense_branches,
    "convolutions": convolutions,
    "residual": residual,
    "dense net": dense_net,
    "bottlenecks": bottlenecks,
    "branches": branches,
}


def network(family: str, seed: int) -> tuple[nn.Module, tuple[int, ...]]:
    """A network of a family and the shape of its input, from a seed."""
    rng = random.Random(seed)
    while True:
        with torch.random.fork_rng():
            try:
                model, shape = FAMILIES[family](rng)
                model = randomise(model, rng)
                with torch.no_grad():
                    model(torch.zeros(1, *shape, dtype=torch.float64))
                return model, shape
            except (RuntimeError, ValueError):  # an image too small for a kernel: draw again
                continue
