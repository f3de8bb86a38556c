r"""Certificates of single samples: lower bounds of all margins within a budget, by linear relaxation.

Cheapest first: intervals through the layers, ranges from slopes shared by groups of samples, then CROWN from the
margins back to the input; the entries whose relaxation costs most are bounded again where that can decide (Zhang et al.
2018; Xu et al. 2020). Proofs: theory page, section "Relaxations".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from brittle.bounds.graph.read import overwritten_by, read_operations
from brittle.bounds.graph.rules import Op, Sum
from brittle.bounds.relaxation.grouped import Groups, group
from brittle.bounds.relaxation.interval import Ball, Network
from brittle.bounds.relaxation.linear_maps import as_map
from brittle.bounds.relaxation.margins import USUAL, Effort, least_margins
from brittle.data.checks import check_batch
from brittle.errors import InputError
from brittle.linear.norms import check_attack_norm
from brittle.models.borrow import frozen, zero_like
from brittle.models.trace import NoRule, Trace, check_finite_weights, trace_unless_given

MOST_VALUES = 2**26
"""Clean values of all operations that are kept in memory: so many samples are taken together."""


@dataclass(frozen=True, eq=False)
class Relaxation:
    """A network read once, for any number of certificates; it holds copies of the weights.

    Attributes:
        model: The network, which computes the clean values.
        graph: Its trace.
        network: The operations with their linear maps.
        overwritten: Names of the nodes whose results later nodes write over.
        groups: Slopes shared by groups of samples; None where there were no examples or the network is too large.
    """

    model: nn.Module
    graph: fx.GraphModule
    network: Network
    overwritten: frozenset[str]
    groups: Groups | None

    @property
    def classes(self) -> int:
        """Number of logits."""
        return self.network.shape(len(self.network.ops) - 1)[0]


def read_relaxation(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    examples: Tensor | None = None,
    groups: int = 32,
    traced: Trace | NoRule | None = None,
) -> Relaxation:
    """Read a network and prepare what its certificates share.

    Covered are dense layers, convolutions padded with zeros, also transposed, batch norm in evaluation mode,
    ``Normalize``, ReLU and LeakyReLU (slopes from 0 to 1), max and average pooling, upsampling, padding, slices, sums,
    concatenations and rearrangements.

    Args:
        model: Any module that ``torch.fx`` can trace, from ``(N, *input_shape)`` to logits ``(N, K)``; read in
            evaluation mode, left bit-equal. If its weights change later, read it again.
        input_shape: Shape of one input without the batch axis.
        examples: Typical inputs ``(M, *input_shape)``; dense networks get tighter bounds for little more. They
            influence only how tight bounds are, never whether they hold.
        groups: Largest number of groups that the examples are sorted into; worth about a twentieth of the samples.
        traced: The network's trace (:func:`brittle.models.trace.trace`), or the error that tracing raised; None: it is
            traced here.

    Returns:
        What :func:`margin_bounds` needs, on the model's device and in its type.

    Raises:
        NoRule: Some operation has no linear relaxation; with its name and the reason.
        InputError: ``model`` is no module, cannot run on ``input_shape``, does not return at least two logits, has
            weights that are not finite, or the examples or ``traced`` do not fit.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    if groups < 1:
        raise InputError(f"groups: expected at least 1; got {groups}")
    like = zero_like(model)
    with frozen(model), _plain_arithmetic(like):
        check_finite_weights(model)
        trace = trace_unless_given(model, input_shape, traced)
        ops = read_operations(trace)
        if len(ops) < 2:
            raise NoRule("forward: the output does not depend on the input through any operation")
        network, overwritten = _as_maps(ops, trace.graph, like)
        shape = network.shape(len(ops) - 1)
        if len(shape) != 1 or shape[0] < 2:
            raise InputError(f"model: expected at least two logits (N, K); got (N, {', '.join(map(str, shape))})")
        relaxation = Relaxation(model, trace.graph, network, overwritten, None)
        if examples is None:
            return relaxation
        _check_shape(relaxation, examples, "examples")
        values = clean_values(relaxation, examples[:2000].to(like))
        inputs = {number: values[network.ops[number].inputs[0]] for number in network.slopes()}
        return replace(relaxation, groups=group(network, inputs, groups))


def margin_bounds(
    relaxation: Relaxation,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    p: float,
    bounds: tuple[float, float] = (0.0, 1.0),
    effort: Effort = USUAL,
) -> Tensor:
    r"""Certified lower bound of ``min_{j != y} s_y - s_j`` over all inputs within the budget.

    Positive: no attack within the budget can succeed. Not positive: nothing is known. A class that a cheap bound
    excludes keeps that bound; apart from that, the bound is exact, up to rounding, where no unit can change its side
    (and no overlapping max pooling stands in between).

    The bound holds for every point that :func:`brittle.evaluate` would accept, also those beyond the budget or the
    bounds by single-precision rounding, and for the logits **as floating point computes them**: every operation may
    round, at the clean input and at the attacked one, by ``gamma_n`` times the magnitudes of its summands (Higham
    2002), in whatever order they are added, and these errors pass through the relaxation like perturbations. Not
    covered are convolution algorithms that do not add plain products (Winograd, FFT); their errors are usually far
    below this allowance.

    Args:
        relaxation: From :func:`read_relaxation`.
        x: Inputs ``(N, *input_shape)`` within ``bounds``.
        y: Labels ``(N,)``.
        eps: Budget, at least 0, in input units: one for all samples, or one for each ``(N,)``.
        p: Norm of the budget: 2 or inf. In l_2 the bounds are not used: the ball is taken whole.
        bounds: Smallest and largest admissible input value.
        effort: How hard it is tried.

    Returns:
        ``(N,)`` in units of the logits, of the model's type; -inf where arithmetic overflowed. A sample's bound
        does not depend on the others, apart from rounding within the allowance.

    Raises:
        InputError: An argument is out of range; it names the argument, what was expected and what came.
    """
    check_batch(x, y, bounds=bounds, classes=relaxation.classes)
    _check_shape(relaxation, x, "x")
    p = check_attack_norm(p)
    eps = _budgets(eps, len(x))
    like = zero_like(relaxation.model)
    with frozen(relaxation.model), _plain_arithmetic(like):
        x, y, eps = x.detach().to(like).clamp(*bounds), y.to(like.device).long(), eps.to(like.device)
        network = relaxation.network
        size = sum(network.size(n) for n in range(len(network.ops)))
        margins = []
        for part in torch.arange(len(x), device=like.device).split(max(1, MOST_VALUES // size)):
            values, ball = clean_values(relaxation, x[part]), Ball.around(x[part], eps[part], p, bounds)
            margins.append(least_margins(network, relaxation.groups, values, ball, y[part], effort, relaxation.model))
        return torch.cat(margins)


def clean_values(relaxation: Relaxation, x: Tensor) -> dict[int, Tensor]:
    """What the network itself computes for every operation, by number, in evaluation mode."""
    numbers = {op.node: number for number, op in enumerate(relaxation.network.ops)}
    values: dict[int, Tensor] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.name in numbers:
                values[numbers[n.name]] = result.clone() if n.name in relaxation.overwritten else result
            return result

    Keep(relaxation.graph).run(x)
    return values


def _as_maps(ops: tuple[Op, ...], graph: fx.GraphModule, like: Tensor) -> tuple[Network, frozenset[str]]:
    """The operations with the maps of the linear ones, and the nodes whose results are overwritten later."""
    nodes = {node.name: node for node in graph.graph.nodes}
    maps = {}
    for number, op in enumerate(ops):
        node, before = nodes[op.node], ops[op.inputs[0]] if op.inputs else op
        assert before.shape is not None
        if isinstance(op.rule, Sum) and any(ops[source].shape != op.shape for source in op.inputs):
            raise NoRule(f"{op.name}: no linear relaxation for a sum of results of different shapes")
        called = graph.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        linear = as_map(op.rule, op, before.shape, called, like)
        if linear is not None:
            maps[number] = linear
    overwritten = {written.name for node in nodes.values() for written in overwritten_by(node, graph)}
    return Network(ops, maps), frozenset(overwritten)


@contextmanager
def _plain_arithmetic(like: Tensor) -> Iterator[None]:
    """No gradients, and every operation in the type of its inputs."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        yield


def _budgets(eps: float | Tensor, count: int) -> Tensor:
    """One budget for each sample ``(N,)``.

    Raises:
        InputError: One is negative or not finite, or there are not as many as samples.
    """
    each = torch.as_tensor(eps, dtype=None if isinstance(eps, Tensor) else torch.float64).detach()
    if each.shape not in ((), (count,)):
        raise InputError(f"eps: expected one number, or one for each of {count} samples; got {tuple(each.shape)}")
    if not bool((each.isfinite() & (each >= 0)).all()):
        raise InputError(f"eps: expected finite numbers of at least 0; got {each.tolist()}")
    return each.expand(count)


def _check_shape(relaxation: Relaxation, x: Tensor, name: str) -> None:
    expected = relaxation.network.shape(0)
    if not isinstance(x, Tensor) or tuple(x.shape[1:]) != expected or not len(x):
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"{name}: expected inputs (N, {', '.join(map(str, expected))}); got {got}")
