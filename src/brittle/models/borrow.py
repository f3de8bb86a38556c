"""Borrowing a model: whatever happens inside, it is given back bit-equal."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from brittle.errors import InputError
from brittle.linear.conv_geometry import has_hooks

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")
Model = nn.Module | Callable[[Tensor], Tensor]
"""A network: inputs ``(N, ...)`` to logits ``(N, classes)``."""


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Evaluation mode without parameter gradients inside the block; everything as it was after it.

    Restored are every submodule's mode, every parameter's ``requires_grad``, every buffer with its values, and the
    global random state of the CPU and of the model's device. ``.grad`` is not touched. A plain callable is left alone,
    apart from the random state. A caller's ``torch.inference_mode`` does not hold inside the block.

    Raises:
        InputError: The model's modules lie too deep in one another for Python to visit them, or its weights were made
            under ``torch.inference_mode``.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        if isinstance(model, nn.Module):
            check_usable(model)
        device = device_of(model)
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        if isinstance(model, nn.Module):
            stack.callback(_remember(model))
            model.eval()
            for parameter in model.parameters():
                parameter.requires_grad = False
        yield


def unwrapped(model: T) -> T:
    """The network inside ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile``, which compute the same.

    Anything else is returned as it is, and so is a wrapper with forward hooks, which may change what it yields.
    """
    while isinstance(model, nn.Module) and not has_hooks(model):
        compiled = type(model).__module__.startswith("torch._dynamo.")  # not imported for its type: it takes seconds
        if not compiled and not isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            break
        model = model._modules["_orig_mod" if compiled else "module"]  # type: ignore[assignment]
    return model


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


def check_usable(model: nn.Module) -> None:
    """Refuse what cannot be lent out and given back.

    Raises:
        InputError: As :func:`frozen`.
    """
    try:
        initialised = {name: value for name, value in model.named_parameters() if not nn.parameter.is_lazy(value)}
        made_so = [name for name, parameter in initialised.items() if parameter.is_inference()]
        model.apply(lambda module: None)  # as deep as ``eval`` has to go
    except RecursionError:
        raise InputError("model: expected modules that Python can visit; got too many in one another") from None
    if made_so:
        raise InputError(
            f"model: expected weights that can have gradients; got {made_so[0]!r}, made under torch.inference_mode; "
            "pass copy.deepcopy(model), made outside of it"
        )


def _remember(model: nn.Module) -> Callable[[], None]:
    """What puts the modes, the parameters' ``requires_grad`` and the buffers back to what they are now."""
    modes = [(module, getattr(module, "training", False)) for module in model.modules()]  # frozen TorchScript has none
    grads = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [(module, dict(module._buffers.items())) for module in model.modules()]
    values = [(buffer, buffer.detach().clone()) for _, own in buffers for buffer in own.values() if buffer is not None]

    def restore() -> None:
        """Put back what was remembered."""
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in grads:
            parameter.requires_grad = requires_grad
        for module, own in buffers:  # forward may have put other tensors there
            for name in {name for name, _ in module._buffers.items()} - own.keys():
                delattr(module, name)
            for name, buffer in own.items():
                module._buffers[name] = buffer
        for buffer, before in values:
            with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                if buffer.shape != before.shape:  # resized
                    buffer.data = before
                else:
                    buffer.copy_(before)

    return restore
