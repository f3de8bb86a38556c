"""Input normalisation as a layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from brittle.errors import InputError
from brittle.models.borrow import zero_like


class Normalize(nn.Module):
    r"""Per-channel normalisation as the first layer, so that attacks see inputs in [0, 1].

    .. math:: y_{n,c,\dots} = (x_{n,c,\dots} - \mathrm{mean}_c) / \mathrm{std}_c

    Attributes:
        mean: Buffer ``(C,)``, in units of the input.
        std: Buffer ``(C,)``, in units of the input, positive.

    >>> Normalize([0.5], [0.25])(torch.tensor([[1.0]]))
    tensor([[2.]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take one mean and one standard deviation per channel.

        Raises:
            InputError: They differ in number, there is none, one is not finite, or a ``std`` is not positive.
        """
        super().__init__()
        if len(mean) != len(std) or len(mean) == 0:
            raise InputError(f"mean, std: expected one number per channel each; got {len(mean)} and {len(std)}")
        self.channels = len(mean)
        self.register_buffer("mean", torch.tensor([float(v) for v in mean]))
        self.register_buffer("std", torch.tensor([float(v) for v in std]))
        if not (self.mean.isfinite().all() and self.std.isfinite().all() and (self.std > 0).all()):
            raise InputError(f"mean, std: expected finite numbers, std above 0; got {list(mean)} and {list(std)}")

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` of shape ``(N, C, ...)``; raises RuntimeError for another number of channels."""
        last = torch.unflatten(x.movedim(1, -1), -1, (self.channels,))  # refuses to broadcast one channel to C
        return torch.movedim((last - self.mean) / self.std, -1, 1)


def normalised(network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """The network behind a :class:`Normalize` of its type: modules ``normalize`` and ``model``."""
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std).to(zero_like(network)), model=network))
