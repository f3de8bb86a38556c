"""Borrowing a model: whatever happens inside, it is given back bit-equal."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
Model = nn.Module | Callable[[Tensor], Tensor]
"""A network: inputs ``(N, ...)`` to logits ``(N, classes)``."""


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Evaluation mode without parameter gradients inside the block; everything as it was after it.

    Restored are every submodule's mode, every parameter's ``requires_grad``, every buffer's values, and the global
    random state of the CPU and of the model's device. ``.grad`` is not touched. A plain callable is left alone, apart
    from the random state.
    """
    with ExitStack() as stack:
        device = device_of(model)
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        if isinstance(model, nn.Module):
            stack.callback(_remember(model))
            model.eval()
            for parameter in model.parameters():
                parameter.requires_grad = False
        yield


def device_of(model: Model) -> torch.device:
    """Where the model's first parameter or buffer lives; the CPU for a plain callable."""
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    return tensors[0].device if tensors else torch.device("cpu")


def zero_like(model: nn.Module) -> Tensor:
    """A scalar zero in the type and on the device of the model's first floating parameter, else floating buffer."""
    tensors = (*model.parameters(), *model.buffers())
    numbers = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.zeros(()))
    return torch.zeros((), dtype=numbers.dtype, device=numbers.device)


def copy_unshared(module: M, model: nn.Module) -> M:
    """A deep copy of the network, or of its graph, which may be changed.

    Args:
        module: What is copied.
        model: The network whose tensors the copy must not share.

    Raises:
        ValueError: It shares some: a module may say itself how it is copied.
        Exception: Whatever else the module's own copying raises.
    """
    result = copy.deepcopy(module)
    tensors = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    if result is module or tensors & {id(tensor) for tensor in (*result.parameters(), *result.buffers())}:
        raise ValueError("the copy shares tensors with the network")
    return result


def _remember(model: nn.Module) -> Callable[[], None]:
    """What puts the modes, the parameters' ``requires_grad`` and the buffers back to what they are now."""
    modes = [(module, getattr(module, "training", False)) for module in model.modules()]  # frozen TorchScript has none
    grads = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]

    def restore() -> None:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in grads:
            parameter.requires_grad = requires_grad
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer  # forward may have put another tensor there
                buffer.copy_(before)

    return restore
