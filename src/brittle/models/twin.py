"""A network with gradients beside one that has none: quantised layers in real numbers, rounded as theirs are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from brittle.models.borrow import Model, copy_unshared
from brittle.models.quantised import has_own_arithmetic, is_fused, stored_weight, torch_ao_classes

PROBES = 4
"""Samples on which a twin has to run."""


def has_gradients(model: Model, x: Tensor) -> bool:
    """Whether a network's logits can be differentiated in its input; a network that cannot run at all counts as one.

    Args:
        model: The network, borrowed.
        x: Inputs ``(N, ...)`` on its device, at least one; the first is put through.
    """
    x = x[:1].detach().clone()
    try:
        with torch.no_grad():
            model(x)
    except Exception:  # the caller's own passes will say what is wrong with the model
        return True
    try:
        with torch.enable_grad():
            x.requires_grad_()
            torch.autograd.grad(model(x).sum(), x)
    except (RuntimeError, TypeError, AttributeError):  # of no gradient, or of no tensor
        return False
    return True


def differentiable_twin(model: Model, x: Tensor) -> nn.Module | None:
    """A copy of a quantised network in real numbers, or None where none can be made.

    Weights are what the stored ones stand for; results are rounded as the network rounds them, with the gradient of
    the identity within their range. Read are the modules of ``torch.ao.nn.quantized`` (eager mode, static and
    dynamic) and linear layers whose weight is a quantised tensor of its own type. The twin is the network only up to
    rounding: an example that it yields has to be judged by the network.

    Args:
        model: The network, borrowed; left bit-equal.
        x: Inputs ``(N, ...)`` on its device; a few serve to try the twin.
    """
    if not isinstance(model, nn.Module):
        return None
    try:
        twin = _in_real_numbers(copy_unshared(model, model), {}).eval().requires_grad_(False)
        with torch.no_grad():
            same = twin(x[:PROBES]).shape == model(x[:PROBES]).shape
    except Exception:  # copying and running it run the user's code, which may raise anything
        return None
    return twin if same and has_gradients(twin, x) else None


class Rounded(nn.Module):
    """Rounds to the numbers that a quantised tensor of this scale can hold."""

    def __init__(self, scale: Any, zero_point: Any, dtype: torch.dtype = torch.quint8) -> None:
        super().__init__()
        self.scale, self.zero_point = float(scale), int(zero_point)
        self.least = 0 if dtype == torch.quint8 else -128

    def forward(self, x: Tensor) -> Tensor:
        """The nearest of 256 numbers; its gradient is that of the identity within their range, and 0 outside."""
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, self.least, self.least + 255)


class Functional(nn.Module):
    """What ``QFunctional`` does, in real numbers."""

    def __init__(self, rounded: Rounded) -> None:
        super().__init__()
        self.rounded = rounded

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum."""
        result: Tensor = self.rounded(x + y)
        return result

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        """The rectified sum."""
        result: Tensor = self.rounded(torch.relu(x + y))
        return result

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        """The product."""
        result: Tensor = self.rounded(x * y)
        return result

    def cat(self, parts: list[Tensor], dim: int = 0) -> Tensor:
        """The parts side by side."""
        result: Tensor = self.rounded(torch.cat(parts, dim))
        return result

    def add_scalar(self, x: Tensor, y: float) -> Tensor:
        """The sum with a number, which changes the scale instead of rounding."""
        return x + y

    def mul_scalar(self, x: Tensor, y: float) -> Tensor:
        """The product with a number, which changes the scale instead of rounding."""
        return x * y


def _in_real_numbers(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """The module with everything quantised in it replaced, in place.

    Raises:
        NotImplementedError: Some of it has no counterpart.
    """
    if module not in made:
        made[module] = module
        own = torch_ao_classes(module) or ({"Linear"} if has_own_arithmetic(getattr(module, "weight", None)) else set())
        if own or type(module).__module__.startswith("torch.ao."):
            kind = next((kind for kind in COUNTERPARTS if kind in own), None)
            if kind is None:
                raise NotImplementedError(type(module).__name__)
            made[module] = COUNTERPARTS[kind](module)
        else:
            for name, child in module.named_children():
                setattr(module, name, _in_real_numbers(child, made))
    return made[module]


def _rounded(module: Any, *before: nn.Module) -> nn.Module:
    """Modules in a row, and the rounding of what they yield; a dynamically quantised module does not round it."""
    static = type(module).__module__.find(".dynamic") < 0 and hasattr(module, "zero_point")
    return nn.Sequential(*before, *([Rounded(module.scale, module.zero_point)] if static else []))


def _linear(module: Any) -> nn.Module:
    weight = stored_weight(module)[0].detach()
    kind = type(module).__name__.removesuffix("ReLU")
    if is_fused(module) and kind != "Linear":
        raise NotImplementedError(type(module).__name__)
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    return _rounded(module, _filled(layer, weight, module), *_activation(module))


def _convolution(module: Any) -> nn.Module:
    if is_fused(module) and "ReLU" not in type(module).__name__:
        raise NotImplementedError(type(module).__name__)
    weight = stored_weight(module)[0].detach()
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[weight.ndim - 3]
    layer: nn.Module = kind(
        module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding, module.dilation,
        module.groups, padding_mode=module.padding_mode,
    )  # fmt: skip
    return _rounded(module, _filled(layer, weight, module), *_activation(module))


def _filled(layer: Any, weight: Tensor, module: Any) -> nn.Module:
    """The layer with the weight, and with the bias of a module."""
    bias = module.bias() if callable(module.bias) else module.bias
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias.detach().to(weight))
    result: nn.Module = layer
    return result


def _activation(module: nn.Module) -> list[nn.Module]:
    return [nn.ReLU()] if is_fused(module) else []


COUNTERPARTS: Mapping[str, Callable[[Any], nn.Module]] = {
    "Quantize": lambda module: Rounded(module.scale, module.zero_point, module.dtype),
    "DeQuantize": lambda module: nn.Identity(),
    "Linear": _linear,
    **dict.fromkeys(("Conv1d", "Conv2d", "Conv3d"), _convolution),
    "QFunctional": lambda module: Functional(Rounded(module.scale, module.zero_point)),
    "ReLU6": lambda module: nn.ReLU6(),
    "Dropout": lambda module: nn.Identity(),
    "Hardswish": lambda module: _rounded(module, nn.Hardswish()),
    "LeakyReLU": lambda module: _rounded(module, nn.LeakyReLU(module.negative_slope)),
    "ELU": lambda module: _rounded(module, nn.ELU(module.alpha)),
}
"""From the name of a class of torch.ao to the same in real numbers."""
