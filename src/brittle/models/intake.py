"""Networks as they are given, made one from inputs to logits: whatever they are called by and answer with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from brittle.errors import InputError
from brittle.models.borrow import Model, device_of, unwrapped
from brittle.models.forward import output_of


class Logits(nn.Module):
    """A network whose answers hold logits, as one from inputs to logits.

    Attributes:
        network: What is called; its answer is read by :func:`logits_in`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs ``(N, ...)`` to logits ``(N, classes)``."""
        logits: Tensor = logits_in(self.network(x))
        return logits


class CalledForLogits:
    """The same of a plain callable, whose answer may be an array of NumPy as well.

    Attributes:
        function: What is called.
    """

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        self.function = function

    def __call__(self, x: Tensor) -> Tensor:
        """Map inputs ``(N, ...)`` to logits ``(N, classes)``, on the device of the inputs."""
        answer = logits_in(self.function(x))
        logits: Tensor = torch.as_tensor(answer).to(x.device) if isinstance(answer, np.ndarray) else answer
        return logits


class OneBatchSize(nn.Module):
    """A network that takes batches of one size alone, as one for batches of any: padded with zeros, and cut.

    Attributes:
        network: From ``(size, ...)`` to logits, by itself or inside its answer.
        size: Samples that it takes at once.
    """

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        self.network, self.size = network, size

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs ``(N, ...)`` to logits ``(N, classes)``."""
        missing = -len(x) % self.size
        whole = F.pad(x, (0, 0) * (x.ndim - 1) + (0, missing))
        return torch.cat([logits_in(self.network(part)) for part in whole.split(self.size)])[: len(x)]


def logits_in(answer: Any) -> Any:
    """The logits that a network's answer holds, or the answer itself where none are found.

    They are the entry ``logits`` of a dictionary, the attribute ``logits`` of an object (both of Hugging Face's
    transformers), or the first tensor of a tuple or list.

    >>> logits_in({"loss": None, "logits": torch.ones(1, 2)})
    tensor([[1., 1.]])
    """
    if isinstance(answer, Mapping):
        return answer.get("logits", answer)
    if isinstance(answer, tuple | list) and not hasattr(answer, "logits"):
        return next((part for part in answer if isinstance(part, Tensor | fx.Proxy)), answer)
    return getattr(answer, "logits", answer)


def open_network(model: object) -> Model:
    """The network that is inside of what was given, before anything is known of its inputs.

    Of ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile`` it is the network that they wrap; of a
    program of ``torch.export`` the module that it describes, which shares its weights, for batches of any size.

    Raises:
        InputError: Nothing in it can be called.
    """
    if type(model).__name__ == "ExportedProgram":  # torch.export takes a while to import
        model = model.module()  # type: ignore[attr-defined]
    if isinstance(model, fx.GraphModule) and {"train", "eval"} <= {*vars(model)}:
        model = _of_program(model)
    if not callable(model):
        raise InputError(f"model: expected a network, or a function from inputs to logits; got {type(model).__name__}")
    return unwrapped(model)


def with_logits(model: Model, x: Tensor) -> tuple[Model, str]:
    """The network as one that answers with logits, and where in its answers they are; ``""`` for the answer itself.

    Args:
        model: The network, borrowed.
        x: Inputs ``(N, ...)``; the first is put through.

    Raises:
        InputError: The model cannot run on it.
    """
    with torch.no_grad():
        answer = output_of(model, x[:1].to(device_of(model)))
    logits = logits_in(answer)
    if isinstance(answer, Tensor) or not isinstance(logits, Tensor | np.ndarray):
        return model, ""  # what cannot be read is refused, in our words, by whoever asks for logits
    kind = type(answer).__name__
    found = f"in the {kind}" if isinstance(answer, tuple | list) else f"{kind}.logits"
    if logits is answer:
        found = "an array"
    if not isinstance(model, nn.Module):
        return CalledForLogits(model), found
    wrapped = Logits(model)
    wrapped.training = model.training
    return wrapped, found


def name_of(model: object) -> str:
    """What to call a network that was given no name: a function's own, else its class's."""
    inner = unwrapped(model)
    return getattr(inner, "__name__", None) or type(inner).__name__


def _of_program(module: fx.GraphModule) -> nn.Module:
    """The module of an exported program with modes like any other's, and for batches of any size."""
    module = copy.copy(module)  # it refuses to change modes, of which an exported graph has none
    for method in ("train", "eval"):
        vars(module).pop(method, None)
    first = next((node for node in module.graph.nodes if node.op == "placeholder"), None)
    shape = getattr(first.meta.get("val"), "shape", ()) if first is not None else ()
    return OneBatchSize(module, shape[0]) if shape and type(shape[0]) is int else module
