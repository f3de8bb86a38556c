"""Input normalisation as a layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from brittle.errors import InputError
from brittle.models.borrow import zero_like
from brittle.results import Normalisation


class Normalize(nn.Module):
    r"""Per-channel normalisation as the first layer, so that attacks see inputs in [0, 1].

    .. math:: y_{n,c,\dots} = (x_{n,c,\dots} - \mathrm{mean}_c) / \mathrm{std}_c

    Attributes:
        mean: Buffer ``(C,)``, in units of the input.
        std: Buffer ``(C,)``, in units of the input, positive.
        source: Where the numbers are from, in words; ``""`` for a caller's own.

    >>> Normalize([0.5], [0.25])(torch.tensor([[1.0]]))
    tensor([[2.]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], source: str = "") -> None:
        """Take one mean and one standard deviation per channel, and where they are from.

        Raises:
            InputError: They differ in number, there is none, one is not finite, or a ``std`` is not positive.
        """
        super().__init__()
        if len(mean) != len(std) or len(mean) == 0:
            raise InputError(f"mean, std: expected one number per channel each; got {len(mean)} and {len(std)}")
        self.channels, self.source = len(mean), source
        self.register_buffer("mean", torch.tensor([float(v) for v in mean]))
        self.register_buffer("std", torch.tensor([float(v) for v in std]))
        if not (self.mean.isfinite().all() and self.std.isfinite().all() and (self.std > 0).all()):
            raise InputError(f"mean, std: expected finite numbers, std above 0; got {list(mean)} and {list(std)}")

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` of shape ``(N, C, ...)``; raises RuntimeError for another number of channels."""
        last = torch.unflatten(x.movedim(1, -1), -1, (self.channels,))  # refuses to broadcast one channel to C
        return torch.movedim((last - self.mean) / self.std, -1, 1)


def normalised(network: nn.Module, mean: Sequence[float], std: Sequence[float], source: str = "") -> nn.Module:
    """The network behind a :class:`Normalize` of its type: modules ``normalize`` and ``model``."""
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std, source).to(zero_like(network)), model=network))


def normalisations_of(model: object) -> list[Normalisation]:
    """The normalisations that a network begins with, in their order; more than one is probably a mistake.

    Read is what stands first in sequences of modules and has numbers ``mean`` and ``std``, one a channel, as the
    modules of torchvision, RobustBench and Brittle do, if it then computes ``(x - mean) / std`` of a few numbers.

    Args:
        model: A network; of a plain callable nothing is known.
    """
    if not isinstance(model, nn.Sequential):
        own = _read_statistics(model)
        return [] if own is None else [own]
    found: list[Normalisation] = []
    for module in model:
        found += (inner := normalisations_of(module))
        if not inner or isinstance(module, nn.Sequential):
            break
    return found


def _read_statistics(module: object) -> Normalisation | None:
    """The mean and the standard deviation by which a module normalises; None where it does something else."""
    if not (isinstance(module, nn.Module) and hasattr(module, "mean") and hasattr(module, "std")):
        return None
    try:
        mean, std = (torch.as_tensor(value).detach().flatten() for value in (module.mean, module.std))
        expected = Normalize(mean.tolist(), std.tolist()).to(mean)
        x = torch.linspace(0, 1, 4 * expected.channels).view(1, -1, 2, 2).to(mean)
        with torch.no_grad():
            torch.testing.assert_close(module(x), expected(x))
    except Exception:  # whatever a module of anyone's does with names that mean something else to it
        return None
    source = getattr(module, "source", "")
    return Normalisation(tuple(mean.tolist()), tuple(std.tolist()), source if isinstance(source, str) else "")
