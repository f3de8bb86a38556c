"""Proximal steps: penalties taken by shrinking the weights after the optimiser's step, to exact zeros.

A penalty in the loss pulls rows or singular values towards zero and never quite there; the proximal operator of the
same penalty sets the small ones to zero. Both are applied with ``amount``, in units of the weights, for every step of
the optimiser; after gradient descent with rate lr on a loss, ``amount = lr * strength`` is proximal gradient descent on
the loss plus strength times the penalty (theory page, section "Interventions").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from brittle.errors import InputError
from brittle.models.selection import chosen_layers


def shrink_rows(W: Tensor, amount: float) -> Tensor:
    """``w_i max(0, 1 - amount / ||w_i||_2)`` for every row of ``(m, n)``: the proximal operator of the group lasso.

    >>> shrink_rows(torch.tensor([[3.0, 4.0], [0.6, 0.8]]), 1.0)
    tensor([[2.4000, 3.2000],
            [0.0000, 0.0000]])
    """
    norms = torch.linalg.vector_norm(W, dim=1, keepdim=True)
    return W * torch.where(norms > amount, 1 - amount / norms, 0)


def shrink_singular_values(W: Tensor, amount: float) -> Tensor:
    """``U max(0, Sigma - amount) V^T`` of ``(m, n)``: the proximal operator of the nuclear norm.

    By the Gram matrix of the smaller side in float64. What falls below ``amount`` is zero up to the rounding of W's
    type.

    >>> shrink_singular_values(torch.diag(torch.tensor([2.0, -0.5])), 1.0)
    tensor([[1., 0.],
            [0., 0.]])
    """
    wide = W.shape[0] < W.shape[1]
    A = (W.mT if wide else W).double()
    squares, V = torch.linalg.eigh(A.mT @ A)
    sigma = squares.clamp_min(0).sqrt()
    factors = torch.where(sigma > amount, 1 - amount / sigma, 0)
    kept = factors > 0
    shrunk = (A @ (V[:, kept] * factors[kept])) @ V[:, kept].mT
    return (shrunk.mT if wide else shrunk).to(W.dtype)


class Shrinkage:
    """Shrinks the rows or the singular values of the chosen layers, every ``every`` calls by ``every * amount``.

    Low-rank pairs are left alone: their rank is bounded already, and their rows are products.

    Attributes:
        calls: How often it was called.
    """

    def __init__(
        self,
        model: nn.Module,
        value: float,
        *,
        singular: bool,
        layers: Sequence[str] | None = None,
        every: int = 1,
    ) -> None:
        """Bind to the modules of a model.

        Args:
            model: Its chosen modules' weights are changed in place at every due call.
            value: The amount: a call's share of the shrinkage, at least 0, in units of the weights.
            singular: Whether singular values are shrunk, or rows.
            layers: As :func:`brittle.models.selection.chosen_layers`.
            every: Calls between two changes; the decomposition of a large matrix costs many steps.

        Raises:
            InputError: An argument is out of range, or no chosen layer is a single matrix that is a parameter.
        """
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise InputError(f"amount: expected a finite number of at least 0; got {value!r}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise InputError(f"every: expected a positive integer; got {every!r}")
        self.chosen = [layer for layer in chosen_layers(model, layers) if len(layer.modules) == 1]
        if not self.chosen:
            raise InputError("layers: expected a layer that is no low-rank pair; got none")
        for layer in self.chosen:
            weight_parameter(layer.modules[0], layer.name)
        self.amount, self.every, self.calls = float(value), every, 0
        self.shrink = shrink_singular_values if singular else shrink_rows

    @torch.no_grad()
    def __call__(self) -> None:
        """Count, and shrink when it is time."""
        self.calls += 1
        if self.calls % self.every or self.amount == 0:
            return
        for layer in self.chosen:
            weight = weight_parameter(layer.modules[0], layer.name)
            weight.copy_(self.shrink(weight.flatten(1), self.every * self.amount).view_as(weight))

    def state_dict(self) -> dict[str, Tensor]:
        """The number of calls, as a tensor."""
        return {"calls": torch.tensor(self.calls)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            InputError: ``state`` is not such a state.
        """
        if set(state) != {"calls"} or state["calls"].numel() != 1:
            raise InputError(f"state: expected the number of calls; got {sorted(state)}")
        self.calls = int(state["calls"])


def weight_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """The weight of a layer's module, which can be changed in place.

    Raises:
        InputError: It is computed from other parameters; ``name`` is the layer's.
    """
    weight = module._parameters.get("weight")
    if weight is None:
        raise InputError(f"layers: expected weights that are parameters; layer {name!r} has a computed one")
    return weight
