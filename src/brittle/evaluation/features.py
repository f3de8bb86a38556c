"""Feature compression: by how much of what separates a sample from the nearest of another class a network decides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median, median_low

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from brittle.attacks.losses import loss_and_gradient
from brittle.attacks.pool import check_count
from brittle.data.batches import DataLike
from brittle.data.checks import check_batch
from brittle.errors import InputError
from brittle.evaluation.curves import minimal_distances
from brittle.evaluation.execution import Execution
from brittle.evaluation.run import read_chunks
from brittle.evaluation.threat import Threat
from brittle.evaluation.worst_case import correct
from brittle.linear.minimum_distance import interpolant_cosines, nearest_of_another_class
from brittle.linear.norms import thin
from brittle.models.activations import watch_calls
from brittle.models.borrow import Model
from brittle.models.forward import logits_of
from brittle.models.layers import read_layers
from brittle.models.network import Network, borrowed
from brittle.results import FeatureCompression, FeatureLayer, FeaturePair

PRECISION = 0.05
"""Share by which an attacked radius may exceed the largest budget that its sample survived."""
AT_ONCE = 16
"""Pairs at once: what every layer yields is held for all of them."""
JACOBIANS = 8
"""Pairs at which the Jacobians of layers are taken, a backward pass for every number that a layer yields."""
MOST_ROWS, MOST_ENTRIES = 512, 2**21
"""Numbers that such a layer yields at most, and entries of its Jacobian."""
ENERGY = 0.99
"""Share of a Jacobian's squared singular values in the directions that count as strong."""
INTERPOLANT_WORK = 2**32
"""Samples squared times numbers in an input, up to which the linear interpolant is asked for: a few seconds."""


def feature_compression(
    model: Model | Network,
    data: DataLike,
    threat: Threat = Threat("fast"),
    *,
    pairs: int = 256,
    attacked: int = 32,
    execution: Execution = Execution(),
) -> FeatureCompression:
    r"""By how much of what separates a sample from the nearest one of another class a network decides.

    With x a sample that is right, x' the nearest of the given samples of another class, and f the margin between
    their two classes:

    - ``|cos|`` between ``grad f(x)`` and ``x' - x``, for every pair: of a linear classifier it is the share of the
      minimum-distance rule's radius, ``||x' - x|| / 2``, that the classifier keeps; of any other network that share to
      first order, and no bound;
    - the length of the shortest perturbation found by attack that the network itself answers otherwise, an upper bound
      of its radius, for some of the pairs;
    - layer by layer, with z an output that all of the network passes through (of a layer, or of a block with layers in
      it) and J its Jacobian at x: ``|cos|`` between ``x' - x`` and ``J^T (z - z')``, which is the first share of the
      rule that takes the nearer of the two in this representation; and where J is small enough, the share of ``x' - x``
      in its row space, which is at least the network's ``|cos|`` and falls from layer to layer;
    - the share phi that a linear classifier through all samples keeps at most, from the samples alone.

    Theory page, section "Feature compression"; after Gao et al. (arXiv 2406.16200).

    Args:
        model: Network from ``(N, ...)`` to logits ``(N, classes)``, left bit-equal; or one that is ready.
        data: Labelled samples, as in :func:`brittle.evaluate`; all are held in memory, and partners come from all.
        threat: How radii are searched for; its norm is not read, since distances are l2.
        pairs: Samples looked at, spread evenly over the data; those that are right have a pair.
        attacked: Pairs, spread evenly over these, that are attacked and followed through the layers.
        execution: Samples at once, and whom to tell.

    Returns:
        All pairs and layers. No pair where no sample that was looked at is right, or all samples are of one class.

    Raises:
        InputError: An argument is out of range, data or model cannot be used, or the network has no gradients.
    """
    check_count(pairs, "pairs")
    check_count(attacked, "attacked")
    first, chunks = read_chunks(data, execution, threat.bounds)
    read = list(chunks)
    x, y = torch.cat([chunk.x for chunk in read]), torch.cat([chunk.y for chunk in read])
    check_batch(x, y, bounds=threat.bounds)
    with borrowed(model, first.x, threat.bounds) as network:
        if not network.gradients:
            raise InputError("model: expected a network that can be differentiated; got one without gradients")
        chosen = _pair_up(network, x, y, pairs, execution)
        inputs = x[0].numel()
        if not len(chosen.index):
            return FeatureCompression(inputs, len(x), ())
        cosines = torch.cat([_margin_cosines(network.model, part) for part in chosen.split(AT_ONCE)])
        followed = thin(torch.arange(len(cosines)), attacked)
        radii = _radii(network, chosen.at(followed), replace(threat, p=2.0), execution)
        layers = _follow(network.model, chosen.at(followed)) if isinstance(network.model, nn.Module) else ()
        return FeatureCompression(
            inputs=inputs,
            samples=len(x),
            pairs=chosen.results(cosines, dict(zip(followed.tolist(), radii, strict=True))),
            layers=layers,
            jacobians=min(JACOBIANS, len(followed)),
            interpolant=_interpolant(x, chosen),
        )


@dataclass(frozen=True)
class _Pairs:
    """Samples ``x`` that are right, with the nearest sample ``partner`` of another class; n of each."""

    index: Tensor
    nearest: Tensor
    x: Tensor
    partner: Tensor
    y: Tensor
    other: Tensor
    distance: Tensor

    @property
    def way(self) -> Tensor:
        """``x' - x``, ``(n, inputs)`` in float64."""
        return (self.partner.double() - self.x.double()).flatten(1)

    def at(self, rows: Tensor) -> _Pairs:
        """Some of the pairs."""
        return _Pairs(**{name: value[rows.to(value.device)] for name, value in vars(self).items()})

    def split(self, size: int) -> list[_Pairs]:
        """The pairs, a few at once."""
        return [self.at(rows) for rows in torch.arange(len(self.index)).split(size)]

    def results(self, cosines: Tensor, radii: dict[int, float | None]) -> tuple[FeaturePair, ...]:
        """The pairs as they are kept; ``radii`` by their number."""
        columns = (self.index, self.nearest, self.y, self.other, self.distance, cosines)
        rows = enumerate(zip(*(column.tolist() for column in columns), strict=True))
        return tuple(
            FeaturePair(
                index,
                near,
                label,
                other,
                distance,
                None if math.isnan(cosine) else cosine,
                row in radii,
                radii.get(row),
            )
            for row, (index, near, label, other, distance, cosine) in rows
        )


def _pair_up(network: Network, x: Tensor, y: Tensor, most: int, execution: Execution) -> _Pairs:
    """Samples that are right, of ``most`` that are spread evenly over all, and the nearest one of another class."""
    index = thin(torch.arange(len(x), device=x.device), most)
    logits = logits_of(network.model, x[index].to(network.device), y[index].to(network.device), execution.batch_size)
    index = index[correct(logits, y[index].to(network.device)).to(index.device)]
    if not len(index) or not bool((y != y[0]).any()):
        index, nearest, distance = index[:0], index[:0], torch.empty(0, dtype=torch.float64)
    else:
        nearest, distance = nearest_of_another_class(x[index].flatten(1), y[index], x.flatten(1), y)
    apart = distance > 0  # the same input under two labels has no way from one to the other
    index, nearest, distance = index[apart], nearest[apart], distance[apart]
    ours, theirs = x[index].to(network.device), x[nearest].to(network.device)
    label, other = (y[rows].long().to(network.device) for rows in (index, nearest))
    return _Pairs(index, nearest, ours, theirs, label, other, distance)


def _margin_cosines(model: Model, pairs: _Pairs) -> Tensor:
    """``|cos|`` between the gradient of each pair's margin and the way to its partner, ``(n,)``; NaN without one."""

    def margin(logits: Tensor, y: Tensor) -> Tensor:
        if int(pairs.other.max()) >= logits.shape[1]:
            got = f"{int(pairs.other.max())} for {logits.shape[1]} logits"
            raise InputError(f"data: expected labels below the number of logits; got {got}")
        return (logits.gather(1, y[:, None]) - logits.gather(1, pairs.other[:, None]))[:, 0]

    _, _, gradient = loss_and_gradient(model, margin, pairs.x, pairs.y)
    return _cosines(gradient, pairs.way)


def _cosines(gradient: Tensor, way: Tensor) -> Tensor:
    """``|cos|`` of two vectors each, ``(n,)`` in float64 on the CPU; NaN where one is zero."""
    gradient = gradient.double().flatten(1)
    lengths = torch.linalg.vector_norm(gradient, dim=1) * torch.linalg.vector_norm(way, dim=1)
    return ((gradient * way).sum(1).abs() / lengths).clamp_max(1).cpu()


def _radii(network: Network, pairs: _Pairs, threat: Threat, execution: Execution) -> list[float | None]:
    """Lengths of the shortest perturbations found that the network answers otherwise; the partner may be one."""
    largest = float(pairs.distance.max())
    attack = minimal_distances(
        network, pairs.x, pairs.y, threat, largest=largest, precision=PRECISION, execution=execution
    )
    other = ~correct(logits_of(network.model, pairs.partner, pairs.other, execution.batch_size), pairs.y)
    reached = torch.where(other.cpu(), pairs.distance.cpu(), torch.inf)
    shortest = torch.minimum(attack.distance.cpu(), reached)
    return [None if radius == torch.inf else radius for radius in shortest.tolist()]


def _follow(model: nn.Module, pairs: _Pairs) -> tuple[FeatureLayer, ...]:
    """What the representations show of the pairs that all of the network passes through."""
    modules = _passages(model, pairs.x[:1])
    cosines: dict[str, list[Tensor]] = {name: [] for name in modules.values()}
    for part in pairs.split(AT_ONCE):
        with torch.no_grad():
            theirs = _representations(model, modules, part.partner)
        x, ours = _differentiable(model, modules, part.x)
        for name, z in ours.items():
            (gradient,) = torch.autograd.grad(z, x, z.detach() - theirs[name], retain_graph=True)
            cosines[name].append(_cosines(gradient, part.way))
    few = pairs.at(thin(torch.arange(len(pairs.index)), JACOBIANS))
    x, ours = _differentiable(model, modules, few.x)
    return tuple(
        FeatureLayer(name, z.numel() // len(x), _median(torch.cat(cosines[name])), *_row_spaces(z, x, few.way))
        for name, z in ours.items()
    )


def _passages(model: nn.Module, x: Tensor) -> dict[nn.Module, str]:
    """Modules with layers in them whose output every way from the input to the logits passes, in the order they run.

    Of modules that yield the same, as a sequence and its last part do, it is the inmost one.
    """
    layers = {view.output: view.name for view in read_layers(model).views if view.output is not None}
    outer = {name[:end] for name in layers.values() for end, sign in enumerate(name) if sign == "."}
    names = {module: name for name, module in model.named_modules() if name in outer} | layers
    nodes: dict[Node, nn.Module] = {}

    def note(module: nn.Module, _: Tensor | None, output: Tensor | None) -> None:
        if output is not None and output.grad_fn is not None and module not in nodes.values():
            nodes.setdefault(output.grad_fn, module)

    with torch.enable_grad(), watch_calls(names, note):
        x = x.detach().requires_grad_()
        end = model(x).grad_fn
        start = x.view_as(x).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    return {module: names[module] for node, module in nodes.items() if not _is_reached(start, end, node)}


def _is_reached(start: Node | None, end: Node | None, without: Node) -> bool:
    """Whether a way leads from one node of the autograd graph to another that does not pass a third."""
    seen, waiting = {without, None}, [end]
    while waiting:
        node = waiting.pop()
        if node is start and node is not without:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return False


def _differentiable(model: nn.Module, modules: Mapping[nn.Module, str], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The samples as a leaf, and the representations as functions of them."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return x, _representations(model, modules, x)


def _representations(model: nn.Module, modules: Mapping[nn.Module, str], x: Tensor) -> dict[str, Tensor]:
    """What every module yields, in its first call, by its name and in the order of the modules."""
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _: Tensor | None, output: Tensor | None) -> None:
        if output is not None and module not in outputs:
            outputs[module] = output.clone()  # what follows may work in place

    with watch_calls(modules, keep):
        model(x)
    return {name: outputs[module] for module, name in modules.items()}


def _row_spaces(z: Tensor, x: Tensor, ways: Tensor) -> tuple[float | None, float | None, int | None, int | None]:
    """Medians over the samples of :func:`_row_space`, from a backward pass for every row; None of a large Jacobian."""
    width, inputs = z.numel() // len(x), x[0].numel()
    if len(z) != len(x) or width > MOST_ROWS or width * inputs > MOST_ENTRIES:
        return None, None, None, None
    sums = z.flatten(1).sum(0)
    rows = [torch.autograd.grad(entry, x, retain_graph=True)[0].flatten(1) for entry in sums]
    jacobians = torch.stack(rows, dim=1)
    if not jacobians.isfinite().all():
        return None, None, None, None
    measured = [_row_space(J, way) for J, way in zip(jacobians, ways, strict=True)]
    kept, strong, rank, directions = zip(*measured, strict=True)
    return median(kept), median(strong), median_low(rank), median_low(directions)


def _row_space(J: Tensor, u: Tensor) -> tuple[float, float, int, int]:
    """Shares of the length of ``u`` in the row space of J and in its strong directions; how many directions each has.

    From ``J J^T = Q L Q^T``: the right singular directions are ``v_i = J^T q_i / sqrt(L_i)``. No share depends on J's
    scale, which is taken out as squares of it may leave the range of numbers.
    """
    roundoff = max(J.shape) * torch.finfo(J.dtype).eps
    J = J.double()
    J = J / J.abs().max().clamp_min(torch.finfo(J.dtype).tiny)
    squares, Q = torch.linalg.eigh(J @ J.mT)
    squares, Q = squares.flip(0).clamp_min(0), Q.flip(1)
    rank = int((squares > max(roundoff, 1e-7) ** 2 * squares[0]).sum())
    if not rank:
        return 0.0, 0.0, 0, 0
    energy = (Q[:, :rank].mT @ (J @ u)).square() / squares[:rank] / u.square().sum()
    strong = int((squares.cumsum(0) < ENERGY * squares.sum()).sum()) + 1
    kept = energy.cumsum(0).clamp_max(1).sqrt()
    return float(kept[-1]), float(kept[min(strong, rank) - 1]), rank, min(strong, rank)


def _interpolant(x: Tensor, pairs: _Pairs) -> float | None:
    """Median over the pairs of the cosine phi of the linear interpolant of all samples, where it is asked for."""
    n, inputs = len(x), x[0].numel()
    if n > inputs or n * n * inputs > INTERPOLANT_WORK:
        return None
    return _median(interpolant_cosines(x.flatten(1), bias=True)[pairs.index, pairs.nearest])


def _median(values: Tensor) -> float | None:
    """The median of what is no NaN."""
    known = values[~values.isnan()]
    return median(known.tolist()) if len(known) else None
