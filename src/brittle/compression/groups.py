"""Which channels of a network can only go together: torch-pruning's dependency graph, read into units.

A residual sum ties the channels of all its branches, a flattening ties a channel to all its positions, a grouped
convolution ties channels of all its groups. What can be removed is a *unit*: a channel with all that is tied to it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from brittle.compression.heads import attention_heads
from brittle.compression.removal import (
    Convolution,
    Kept,
    Side,
    Transposed,
    compact,
    counts_heads,
    difference,
    expanded,
    is_depthwise,
    masked,
)
from brittle.errors import InputError, one_line
from brittle.models.borrow import unwrapped

Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
TOLERANCE = 1e-4
"""By how much a compact network's logits may differ from the masked one's, relative to the largest logit."""


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are tied to one another: units of which each can be removed or stay.

    Attributes:
        name: Of the first layer, in the order of the modules, that yields the channels.
        units: How many there are.
        sides: Every module that yields, normalises or reads the channels.
        producers: Names of the Linear and convolution modules that yield them, depthwise ones left out.
        norms: Names of the batch norms of the channels.
    """

    name: str
    units: int
    sides: tuple[Side, ...]
    producers: tuple[str, ...]
    norms: tuple[str, ...]


@dataclass(frozen=True)
class ChannelGroups:
    """All groups of a network.

    Attributes:
        groups: Those whose units can be removed, in the order of the modules.
        whole: Why the units of others cannot, by the name of the group's first layer.
    """

    groups: tuple[ChannelGroup, ...]
    whole: Mapping[str, str]

    def everything(self) -> dict[str, Tensor]:
        """All units of all groups, as what is kept."""
        return {group.name: torch.arange(group.units) for group in self.groups}


def channel_groups(model: nn.Module, x: Tensor, *, keep: Sequence[str] = ()) -> ChannelGroups:
    """Find the units of a network, and which of them can be removed.

    Removed can be what is read as a whole by convolutions, Linear layers, batch norms and depthwise convolutions, and
    whole heads of attention (:func:`brittle.compression.heads.attention_heads`). Left whole are channels that are
    normalised together (LayerNorm, GroupNorm), heads of ``nn.MultiheadAttention``, logits, and whatever makes a network
    without them compute something else than the network with zeros in their place: that is tried out on ``x``.

    Args:
        model: Left as it is.
        x: Inputs ``(N, ...)``; the first two are used.
        keep: Names of layers whose channels stay whole.

    Raises:
        InputError: A name in ``keep`` is no layer; the dependencies cannot be followed; or nothing can be removed.
    """
    model = copy.deepcopy(unwrapped(model)).eval()
    device = next(model.parameters()).device
    x = x[:2].to(device)
    names = {module: name for name, module in model.named_modules()}
    if unknown := [name for name in keep if name not in names.values()]:
        raise InputError(f"keep: expected names of the model's modules; got {', '.join(map(repr, unknown))}")
    order = {name: i for i, name in enumerate(names.values())}
    groups, whole = list[ChannelGroup](), dict[str, str]()
    taken = set[tuple[str, bool]]()
    for heads in attention_heads(model):
        reason = _obstacle(model, heads.sides, keep)
        if reason:
            whole[heads.producers[0]] = reason
        else:
            groups.append(ChannelGroup(heads.producers[0], heads.heads, heads.sides, heads.producers, ()))
        taken |= {(side.module, side.out) for side in heads.sides}
    for sides in _tied_channels(model, names, x):
        producers = sorted((s.module for s in sides if _produces(model, s)), key=order.__getitem__)
        if not producers or any((side.module, side.out) in taken for side in sides):
            continue
        reason = _obstacle(model, sides, keep)
        group = None if reason else _make_group(model, sides, producers)
        if group is None:
            whole[producers[0]] = reason or "its channels do not correspond one to one with those that they meet"
        else:
            groups.append(group)
    for group in _changing(model, groups, x):
        whole[group.name] = "removing its channels changes more than zeros in their place would"
        groups.remove(group)
    if not groups:
        raise InputError(
            f"model: expected a network with channels that can be removed; got {type(model).__name__}, where none can"
            + "".join(f"; {name}: {reason}" for name, reason in list(whole.items())[:3])
        )
    return ChannelGroups(tuple(sorted(groups, key=lambda g: order[g.name])), whole)


def unit_scores(
    model: nn.Module, groups: ChannelGroups, score: Callable[[Tensor], Tensor], *, of: str = "weight"
) -> dict[str, Tensor]:
    """Score of every unit: the mean of its channels' scores over all layers that yield it.

    Args:
        model: Only read.
        groups: Of the network.
        score: From a weight ``(out, ...)`` to one score a row ``(out,)``; higher is kept.
        of: ``"weight"`` of the layers that yield the channels, or ``"norm"``: of their batch norms (then of the
            layers where a group has none).

    Returns:
        ``(units,)`` by group name, in double precision.

    Raises:
        InputError: A score has another shape, or is not finite.
    """
    scores = {}
    for group in groups.groups:
        layers = group.norms if of == "norm" and group.norms else group.producers
        by_module = {side.module: side for side in group.sides if side.out}
        parts = []
        for name in layers:
            weight = model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            rows = score(weight.detach())
            if rows.shape != weight.shape[:1]:
                got = f"{tuple(rows.shape)} for {tuple(weight.shape)}"
                raise InputError(f"score: expected one number a row of the weight; got shape {got}")
            if not bool(rows.isfinite().all()):
                raise InputError(f"score: expected finite numbers; got others in layer {name!r}")
            parts.append(rows.double().cpu()[by_module[name].channels].mean(1))
        scores[group.name] = torch.stack(parts).mean(0)
    return scores


def unit_energies(model: nn.Module, groups: ChannelGroups) -> dict[str, Tensor]:
    """Energy of every unit in all that it goes through, relative to the mean of its group: ``(units,)`` by group name.

    The mean of the squared norms of its rows in the layers that yield it, of the columns that read it, and of its
    scales in batch norms, so that one threshold can rank all groups: the group magnitude of torch-pruning (Fang et al.
    2023, "DepGraph", with p = 2). Columns of grouped convolutions, which several units share, are left out.

    Args:
        model: Only read.
        groups: Of the network.
    """
    energies = {}
    for group in groups.groups:
        parts = [rows[side.channels].sum(1) for side in group.sides if len(rows := _energies(model, side))]
        energy = torch.stack(parts).mean(0)
        energies[group.name] = energy / energy.mean().clamp(min=torch.finfo(energy.dtype).tiny)
    return energies


def _energies(model: nn.Module, side: Side) -> Tensor:
    """Squared norm of what belongs to every channel: a row, a column or a scale; empty where a module has none."""
    module = model.get_submodule(side.module)
    weight = getattr(module, "weight", None)
    shared = not side.out and getattr(module, "groups", 1) > 1
    if shared or isinstance(module, nn.PReLU) or not isinstance(weight, Tensor):
        return torch.empty(0)
    second = weight.ndim > 1 and side.out == (isinstance(module, Transposed) and not is_depthwise(module))
    w = weight.detach().double().cpu()
    return (w.transpose(0, 1) if second else w).reshape(w.shape[1] if second else len(w), -1).square().sum(1)


def remove_units(model: nn.Module, groups: ChannelGroups, kept: Kept, x: Tensor) -> nn.Module:
    """The network without the units that are not kept, checked against the network with zeros in their place.

    Args:
        model: Left as it is.
        groups: Of the network.
        kept: Units that stay, by group name; groups that are not named stay whole.
        x: Samples ``(N, ...)`` on which both must give the same logits up to ``TOLERANCE`` of the largest.

    Returns:
        The compact network, in evaluation mode.

    Raises:
        InputError: They differ; the layers whose removal makes the difference are named.
    """
    if difference(model, groups.groups, kept, x) > TOLERANCE:
        guilty = [g.name for g in groups.groups if g.name in kept and difference(model, [g], kept, x) > TOLERANCE]
        raise InputError(
            f"model: expected a network that computes the same without the channels as with zeros in their place; "
            f"layer {', '.join(map(repr, guilty)) or 'none alone'} does not; keep it whole (keep=, --keep)"
        )
    return compact(model, groups.groups, kept).eval()


def mask_units(model: nn.Module, groups: ChannelGroups, kept: Kept, small: nn.Module | None = None) -> nn.Module:
    """The network with zeros in place of the units that are not kept: every size as before, and the same function.

    Args:
        model: Left as it is.
        groups: Of the network.
        kept: Units that stay, by group name.
        small: The network of :func:`remove_units` after a repair or a training: what is not zero is then its own.
    """
    return masked(model, groups.groups, kept) if small is None else expanded(small, model, groups.groups, kept)


# --- reading torch-pruning ----------------------------------------------------------------------------------------


def _tied_channels(model: nn.Module, names: Mapping[nn.Module, str], x: Tensor) -> list[list[Side]]:
    """Every group of torch-pruning, as the modules that it goes through, with a row of channels for each channel."""
    import torch_pruning  # takes a second

    for parameter in model.parameters():  # the graph is read off the gradients' functions
        parameter.requires_grad_(parameter.is_floating_point())
    graph = torch_pruning.DependencyGraph()
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of parameters outside of modules, which stay whole
            graph.build_dependency(model, example_inputs=x, verbose=False)
        found = list(graph.get_all_groups())
    except Exception as error:  # torch-pruning raises what comes
        raise InputError(
            f"model: expected a network whose channels can be followed; torch-pruning fails on "
            f"{type(model).__name__}: {one_line(error)}"
        ) from error
    finally:
        for parameter in model.parameters():
            parameter.grad = None
    groups = []
    for group in found:
        sides = dict[tuple[str, bool], dict[int, list[int]]]()
        for item in group:
            module = item.dep.target.module
            if isinstance(module, nn.Parameter):
                name: str | None = next((n for n, p in model.named_parameters() if p is module), "a parameter")
            else:
                name = names.get(module)
            if name is None:
                continue  # an operation without weights
            rows = sides.setdefault((name, graph.is_out_channel_pruning_fn(item.dep.handler)), {})
            for channel, root in zip(item.idxs, item.root_idxs, strict=True):
                channels = rows.setdefault(int(root), [])
                if int(channel) not in channels:
                    channels.append(int(channel))
        units = len(group[0].idxs)
        groups.append([Side(n, out, _table(rows, units)) for (n, out), rows in sides.items()])
    return groups


def _table(rows: Mapping[int, list[int]], units: int) -> Tensor:
    """``(units, c)``; ``(0, 0)`` where units have different numbers of channels."""
    if len(rows) != units or len({len(channels) for channels in rows.values()}) != 1:
        return torch.empty(0, 0, dtype=torch.long)
    return torch.tensor([sorted(rows[unit]) for unit in range(units)])


def _produces(model: nn.Module, side: Side) -> bool:
    module = _module(model, side.module)
    return side.out and isinstance(module, nn.Linear | Convolution) and not is_depthwise(module)


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:  # a parameter
        return None


def _size(module: nn.Module, out: bool) -> int:
    """Channels of a module's outputs or inputs."""
    if isinstance(module, nn.Linear):
        return module.out_features if out else module.in_features
    if isinstance(module, Convolution):
        return module.out_channels if out else module.in_channels
    size = module.num_parameters if isinstance(module, nn.PReLU) else module.num_features
    assert isinstance(size, int)
    return size


def _obstacle(model: nn.Module, sides: Sequence[Side], keep: Sequence[str]) -> str | None:
    """Why the channels of a group stay whole; None where nothing is known to be in the way."""
    if not any(not side.out for side in sides):
        return "nothing in the network reads its channels: they are its output"
    owners = dict[int, int]()
    for owner in model.modules():
        for parameter in owner.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for side in sides:
        module = _module(model, side.module)
        if any(side.module == name or side.module.startswith(f"{name}.") for name in keep):
            return f"{side.module} is to be kept"
        if module is not None and counts_heads(module):
            continue
        if not isinstance(module, nn.Linear | Convolution | Norm | nn.PReLU):
            kind = "a parameter outside of such modules" if module is None else f"a {type(module).__name__}"
            return f"its channels pass through {side.module}, {kind}, which takes them together"
        if isinstance(module, Transposed) and module.groups > 1 and not is_depthwise(module):
            return f"{side.module} is a transposed convolution of {module.groups} groups"
        if is_parametrized(module) or any(owners[id(p)] > 1 for p in module.parameters(recurse=False)):
            return f"the weight of {side.module} is parametrised or shared"
        if not side.channels.numel() or int(side.channels.max()) >= _size(module, side.out):
            return f"its channels do not correspond one to one with those of {side.module}"
    return None


def _make_group(model: nn.Module, sides: Sequence[Side], producers: Sequence[str]) -> ChannelGroup | None:
    """The group, with one unit of every group of a grouped convolution; None where channels do not fit."""
    met = [model.get_submodule(side.module) for side in sides]
    for side, module in zip(sides, met, strict=True):
        complete = side.channels.unique().numel() == _size(module, side.out)
        if side.out and isinstance(module, nn.Linear | Convolution) and not complete:
            return None
    tied = {m.groups for m in met if isinstance(m, Convolution) and m.groups > 1 and not is_depthwise(m)}
    units = len(sides[0].channels)
    if len(tied) > 1 or any(units % g for g in tied):
        return None
    if tied:  # the same place in every group of the convolution
        units //= max(tied)
        sides = [Side(s.module, s.out, torch.cat(list(s.channels.split(units)), dim=1)) for s in sides]
    norms = [s.module for s in sides if isinstance(model.get_submodule(s.module), Norm)]
    return ChannelGroup(producers[0], units, tuple(sides), tuple(producers), tuple(norms))


def _changing(model: nn.Module, groups: Sequence[ChannelGroup], x: Tensor) -> list[ChannelGroup]:
    """Groups that a network cannot do without half of: halves of the list are tried until every culprit is alone."""
    halves = {group.name: torch.arange(0, group.units, 2) for group in groups}
    if not groups or difference(model, groups, halves, x) <= TOLERANCE:
        return []
    if len(groups) == 1:
        return list(groups)
    middle = len(groups) // 2
    return [*_changing(model, groups[:middle], x), *_changing(model, groups[middle:], x)]
