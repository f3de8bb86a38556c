"""How large a network is: parameters, bytes, and the multiply-accumulates that its layers take for one sample.

Of a linear layer, every entry of the output is a sum of as many products as a row of its matrix has entries; of a
transposed convolution, every entry of the input goes into as many. The rest of a network takes few and is left out:
biases, normalisation, activations, pooling, the products of queries, keys and values in attention, and whatever
``forward`` multiplies by functions in place of modules.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from brittle.errors import InputError, one_line
from brittle.models.borrow import frozen, unwrapped, zero_like
from brittle.results.size import NetworkSize
from brittle.storage.digest import tensors_in

BY_OUTPUT = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
BY_INPUT = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def network_size(model: nn.Module, x: Tensor | None = None) -> NetworkSize:
    """Parameters, multiply-accumulates and bytes of a network.

    Args:
        model: Left bit-equal.
        x: Samples ``(N, ...)``, at least one, for the multiply-accumulates; None leaves them out.

    Raises:
        InputError: As :func:`layer_macs`.
    """
    return NetworkSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=None if x is None else sum(layer_macs(model, x).values()),
        bytes=sum(tensor.numel() * tensor.element_size() for _, tensor in tensors_in(model.state_dict())),
    )


def layer_macs(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Multiply-accumulates of every linear layer for one sample; exact, see the top of this file for what counts.

    Counted are Linear, convolutions and transposed convolutions of one to three axes, with their subclasses, and the
    four projections of ``nn.MultiheadAttention``. A layer that is called several times counts as often.

    Args:
        model: Left bit-equal; run once.
        x: Samples ``(N, ...)``, at least one, of which the first is used.

    Returns:
        Numbers by the layer's name, in the order of the first calls; a layer that was not called is not there.

    Raises:
        InputError: There is no sample, or the network cannot run on it.
    """
    if len(x) == 0:
        raise InputError("x: expected at least one sample; got none")
    counts: dict[str, int] = {}
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.enter_context(torch.no_grad())
        for name, module in unwrapped(model).named_modules():
            if isinstance(module, (*BY_OUTPUT, *BY_INPUT, nn.MultiheadAttention)):

                def count(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                    counts[name] = counts.get(name, 0) + _macs(module, (*args, *kwargs.values()), output)

                handle = module.register_forward_hook(count, with_kwargs=True)
                stack.callback(handle.remove)
        try:
            model(x[:1].to(zero_like(model)))
        except Exception as error:  # of the user's network: whatever it raises, this input does not suit it
            raise InputError(f"x: expected samples that the network can run on; got {one_line(error)}") from error
    return counts


def _macs(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> int:
    """Multiply-accumulates of one call."""
    if isinstance(module, BY_OUTPUT):
        return output.numel() * module.weight[0].numel()
    if isinstance(module, BY_INPUT):
        return inputs[0].numel() * module.weight[0].numel()
    query, key, value = (tensor.numel() for tensor in inputs[:3])  # tokens times the width of each
    assert isinstance(module, nn.MultiheadAttention)
    return module.embed_dim * (2 * query + key + value)  # the last projection takes tokens as wide as the queries
