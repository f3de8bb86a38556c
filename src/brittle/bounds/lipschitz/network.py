r"""Certified upper bounds of a whole network's Lipschitz constant, from several arguments over its graph.

The module is traced (``torch.fx``) and read as a list of operations with sound rules. Each argument bounds the
constant by itself; the least is reported with the name of the argument that attained it. An operation without a sound
rule makes the whole bound unavailable, and its name is returned instead. Rules and proofs: theory page, section
"Networks".
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from torch import Tensor, nn

from brittle.bounds.graph.read import read_graph
from brittle.bounds.lipschitz.arguments import Arguments, dense_chain_inputs
from brittle.bounds.lipschitz.product import stretching_factors
from brittle.errors import InputError
from brittle.linear.norms import check_attack_norm
from brittle.models.borrow import check_usable, frozen
from brittle.models.layers import read_layers
from brittle.models.trace import NoRule, Trace, check_finite_weights
from brittle.results.methods import Argument


@dataclass(frozen=True)
class NetworkBound:
    """An upper bound of ``sup ||f(x) - f(y)||_p / ||x - y||_p`` over all inputs, or why there is none.

    Attributes:
        p: The norm on both sides: 2 or inf.
        upper: The least certified upper bound; None when some operation has no sound rule.
        unavailable: That operation's name and the reason; None when there is a bound.
        factors: Name and factor of every operation that stretches or shrinks, in the order of execution: together
            with sums and concatenations they make up the product of norms. Operations that were merged (a batch
            norm folded, two dense layers in a row) stand under one name.
        arguments: Name and value of every argument's bound; each is a certified upper bound by itself.
        margins: ``(K, K)``, upper bounds of the Lipschitz constants of ``s_i - s_j`` for outputs s, from the input's
            l_p norm to the real line; None without a bound or for outputs that are no vector.
    """

    p: float
    upper: float | None
    unavailable: str | None
    factors: tuple[tuple[str, float], ...]
    arguments: tuple[tuple[str, float], ...] = ()
    margins: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def attained_by(self) -> str | None:
        """Name of the argument with the least bound; of equal ones the first."""
        return min(self.arguments, key=lambda named: named[1])[0] if self.arguments else None


def lipschitz_upper_bound(
    model: nn.Module, p: float, *, input_shape: Sequence[int] | None = None, steps: int = 0
) -> NetworkBound:
    r"""Certified upper bound of a network's Lipschitz constant from input to output, in evaluation mode.

    The least of these arguments, as far as each applies:

    ===========================  ======================================================================================
    ``product of norms``         ``prod_l ||W_l||_p`` with true operator norms; sums add, concatenations take the
                                 maximum (p = inf) or the root of the sum of squares (p = 2)
    ``multipliers`` (2)          one recursion of Gram matrices over the graph, activations by diagonal multipliers
                                 (for p = inf: its diagonal, with the input's coordinates weighted)
    ``pairs of convolutions``    (2) the product of norms, strided convolutions bounded together with those before them
    ``chain``, ``path`` (inf)    absolute weights passed through the network; paths counted
    ``cross norm``               from the other norm: ``Lip_inf <= sqrt(inputs) Lip_2``, ``Lip_2 <= sqrt(K) Lip_inf``
    those of ``chain_bounds``    for plain chains of dense layers: Theorem 3.2 in all its forms, and stronger ones
    ===========================  ======================================================================================

    Args:
        model: Any module that ``torch.fx`` can trace; only read.
        p: 2 or inf.
        input_shape: Shape of one input without the batch axis. Without it only the product of norms is used
            (convolutions are then bounded for images of any size), unless the network is a plain dense chain.
        steps: Steps of optimisation of the multipliers, each about two or three recursions long; 0 for closed forms.
            More are never worse, for the constant or for any margin.

    Returns:
        The bound, or the name of the operation for which there is no sound rule: attention, layer norm, batch norm
        or dropout in training mode, and everything unknown. Never a guess.

    Raises:
        InputError: ``p`` is neither 2 nor inf, ``steps`` is negative, or the model cannot run on ``input_shape``.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0, 1.0], [-1.0, -1.0]])), net[2].weight.data.fill_(1.0)
    >>> bound = lipschitz_upper_bound(net, 2)
    >>> round(dict(bound.arguments)["product of norms"], 4), round(bound.upper, 4), bound.attained_by
    (2.8284, 1.4142, 'path')
    """
    p = check_attack_norm(p)
    return network_bounds(model, (p,), input_shape=input_shape, steps=steps)[p]


def network_bounds(
    model: nn.Module,
    norms: Sequence[float],
    *,
    input_shape: Sequence[int] | None = None,
    steps: int = 0,
    traced: Trace | NoRule | None = None,
) -> dict[float, NetworkBound]:
    """:func:`lipschitz_upper_bound` in several norms, with the work that they share done once.

    Args:
        model: As :func:`lipschitz_upper_bound`.
        norms: The norms: 2, inf or both.
        input_shape: As :func:`lipschitz_upper_bound`; None with a trace at hand: the trace's.
        steps: As :func:`lipschitz_upper_bound`.
        traced: The network's trace (:func:`brittle.models.trace.trace`), or the error that tracing raised; None: it is
            traced here.

    Raises:
        InputError: As :func:`lipschitz_upper_bound`, or ``traced`` belongs to another model or shape.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    if steps < 0:
        raise InputError(f"steps: expected a number of at least 0; got {steps}")
    check_usable(model)
    training = frozenset(module for module in model.modules() if module.training)
    with frozen(model):
        check_finite_weights(model)
        try:
            ops = read_graph(model, input_shape, training, traced)
        except NoRule as error:
            return {p: NetworkBound(p, None, _reason(model, error), ()) for p in norms}
        if not ops:  # the output is constant
            return {p: NetworkBound(p, 0.0, None, (), ((Argument.PRODUCT, 0.0),)) for p in norms}
        if ops[0].shape is None and (inputs := dense_chain_inputs(ops)):
            with suppress(InputError, NoRule):  # a flattening that a vector does not fit
                ops = read_graph(model, (inputs,), training)
        arguments = Arguments(ops, steps)
        return {p: _best_bound(model, arguments, p) for p in norms}


def _reason(model: nn.Module, error: NoRule) -> str:
    """Why there is no bound: attention, where there is some, as no other rule would help."""
    heads = next((view.name for view in read_layers(model).views if view.heads), None)
    forbids = "attention has no global bound, as its scores multiply what it reads with itself"
    return str(error) if heads is None else f"{heads}: {forbids}"


def _best_bound(model: nn.Module, arguments: Arguments, p: float) -> NetworkBound:
    """The least of all arguments' bounds in one norm, or why there is none."""
    try:
        bounds = arguments.upper_bounds(p)
    except NoRule as error:
        return NetworkBound(p, None, _reason(model, error), ())
    factors = stretching_factors(arguments.ops, arguments.factors(p))
    upper = min(bounds.values())
    return NetworkBound(p, upper, None, factors, tuple(bounds.items()), arguments.margins(p, upper))
