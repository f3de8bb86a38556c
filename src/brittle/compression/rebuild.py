"""A network made again from what is written down of it: an architecture's name, ranks of pairs, sizes of modules."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import Protocol

import torch
from torch import Tensor, nn

from brittle.compression.factorise import with_pairs
from brittle.compression.sizes import Size, Sizes, changed_sizes, resized
from brittle.errors import InputError
from brittle.models.build import build_model
from brittle.models.checkpoints import fill
from brittle.models.normalize import normalised

MOST_SHRUNK, LEAST_ALLOWED = 1000, 2**20
"""An architecture may have so many times the numbers of the weights' file, or so many: none is compressed further."""


class Blueprint(Protocol):
    """What a network is built from, as :class:`brittle.results.compression.CompressionRecipe` describes it."""

    @property
    def arch(self) -> str | None:
        """Its name."""

    @property
    def arguments(self) -> Mapping[str, object]:
        """Of the architecture."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Of the ``Normalize`` before it; () for none."""

    @property
    def std(self) -> tuple[float, ...]:
        """Likewise."""

    @property
    def ranks(self) -> Mapping[str, int]:
        """Of its low-rank pairs, by name."""

    @property
    def sizes(self) -> Sizes:
        """Of the modules that have others than the architecture's."""


def rebuilt(blueprint: Blueprint, *, seed: int = 0, most: int | None = None) -> nn.Module:
    """The network of a blueprint: built, behind its ``Normalize``, pairs put in, modules resized; not yet filled.

    Args:
        blueprint: What to build.
        seed: Of the initial weights.
        most: As :func:`brittle.build_model` takes it.

    Raises:
        InputError: As :func:`brittle.build_model`, or statistics, ranks or sizes that do not fit.
    """
    network = _built(blueprint, seed, most)
    if blueprint.ranks:
        network = with_pairs(network, blueprint.ranks)
    return resized(network, blueprint.sizes) if blueprint.sizes else network


def refilled(blueprint: Blueprint, state: Mapping[str, Tensor]) -> nn.Module:
    """The network of a blueprint with its weights, in their floating type.

    Args:
        blueprint: What to build.
        state: Tensors by name. An architecture of more than ``MOST_SHRUNK`` times their numbers is refused before
            memory is taken for it.

    Raises:
        InputError: As :func:`rebuilt`, or weights that do not fit.
    """
    numbers = sum(tensor.numel() for tensor in state.values())
    network = rebuilt(blueprint, most=max(LEAST_ALLOWED, MOST_SHRUNK * numbers))
    types = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(types) == 1:
        network = network.to(types.pop())
    fill(network, state)
    return network


def _built(blueprint: Blueprint, seed: int = 0, most: int | None = None) -> nn.Module:
    """The architecture itself, behind its ``Normalize``."""
    if blueprint.arch is None:
        raise InputError(
            "arch: expected the name of an architecture, or module:function that builds the network as it was before "
            "it was compressed; got none, and without it no folder of it can be opened again"
        )
    network = build_model(blueprint.arch, blueprint.arguments, seed=seed, most=most)
    if blueprint.mean or blueprint.std:
        return normalised(network, blueprint.mean, blueprint.std, "as its folder says")
    return network


def ranks_and_sizes(model: nn.Module, blueprint: Blueprint) -> tuple[dict[str, int], dict[str, dict[str, Size]]]:
    """What a network differs in from its architecture: the ranks of its pairs, then the sizes of its modules.

    Args:
        model: Only read.
        blueprint: Its architecture; its own ranks and sizes are not looked at.

    Raises:
        InputError: The network is not the architecture with other ranks and sizes.
    """
    like = _built(blueprint)
    there = dict(model.named_modules())
    ranks = {}
    for name, module in like.named_modules():
        pair = there.get(name)
        if isinstance(module, nn.Linear | nn.Conv2d) and type(pair) is nn.Sequential and len(pair) == 2:
            weight = pair[0].weight
            assert isinstance(weight, Tensor)
            ranks[name] = len(weight)
    return ranks, changed_sizes(model, with_pairs(like, ranks) if ranks else like)


def check_rebuilt(model: nn.Module, blueprint: Blueprint) -> None:
    """Raise unless the blueprint gives the network again: every module, attribute and tensor but the weights' values.

    Raises:
        InputError: It does not; the message names the first module at fault.
    """
    state = model.state_dict()
    again = refilled(blueprint, state)
    for one, other in zip_longest(model.named_modules(), again.named_modules(), fillvalue=("nothing", None)):
        facts, expected = _facts(one), _facts(other)
        if wrong := [key for key in expected if facts.get(key) != expected[key]]:
            raise InputError(
                f"model: expected {blueprint.arch} with other sizes or low-rank pairs, or it cannot be built again; "
                f"got another module {one[0]!r}: {wrong[0]} {facts.get(wrong[0])!s:.80}, not {expected[wrong[0]]!s:.80}"
            )
    filled = again.state_dict()
    if wrong := [key for key in state if state[key].dtype != filled[key].dtype]:
        raise InputError(f"model: expected weights of one floating type; got {state[wrong[0]].dtype} as {wrong[0]!r}")
    for (name, buffer), other_buffer in zip(model.named_buffers(), again.buffers(), strict=True):
        if buffer.shape != other_buffer.shape or not torch.equal(buffer.cpu(), other_buffer):
            raise InputError(f"model: expected buffers that are saved or the architecture's own; got another {name!r}")


def _facts(named: tuple[str, nn.Module | None]) -> dict[str, object]:
    """Whatever decides what a module computes, apart from its tensors; not where a normalisation's numbers are from."""
    name, module = named
    if module is None:
        return {"name": name}
    plain = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str | tuple) and key not in ("training", "source")
    }
    hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
    return {"name": name, "type": type(module).__qualname__, "hooks": hooks, **plain}
