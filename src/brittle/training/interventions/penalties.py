"""Penalties of a model's weights: add a multiple to the training loss. Formulas: theory page, "Interventions".

Each is ``penalty(model, *, layers=None, ...) -> scalar``, differentiable with respect to the parameters. The model is
only read. ``layers`` is as in :func:`brittle.models.selection.chosen_layers`, which also says what raises
``InputError``. All values are in units of the weights, or have no unit where they do not change with the scale; they
come in the weights' type, but in float32 for half types.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from brittle.errors import InputError
from brittle.models.selection import Chosen, chosen_layers, factors, matrix
from brittle.training.interventions.binding import Intervention, weighted
from brittle.training.interventions.consecutive import composable, compose, in_single
from brittle.training.interventions.nuclear import RefreshedNuclearNorm, nuclear_norm_of

Layers = Sequence[str] | None


def group_lasso(model: nn.Module, *, layers: Layers = None) -> Tensor:
    """``sum_i ||w_i||_2`` over the rows (neurons, filters) of every chosen matrix; drives whole rows to zero.

    The gradient is ``w_i / ||w_i||_2``, and 0 for a zero row (Yuan & Lin 2006).
    """
    return _total(row_norms(W).sum() for W in _matrices(model, layers))


def scale_invariant_group_lasso(model: nn.Module, *, layers: Layers = None) -> Tensor:
    """``sum_i ||w_i||_2 / ||W||_F`` of every chosen matrix, from 1 to ``sqrt(m)`` each; drives rows apart.

    The gradient is orthogonal to W, so that a gradient step shrinks nothing, and 0 for a zero row. A zero matrix has
    value and gradient 0.
    """
    return _total(_ratio(norms.sum(), norms.norm()) for norms in map(row_norms, _matrices(model, layers)))


def nuclear_norm(model: nn.Module, *, layers: Layers = None) -> Tensor:
    """``sum_i sigma_i`` of every chosen matrix; drives singular values to zero.

    The gradient is ``U_r V_r^T`` over the numerical rank r. Exact at every call; see
    :class:`brittle.training.interventions.nuclear.RefreshedNuclearNorm` for large matrices.
    """
    return _total(nuclear_norm_of(W) for W in _matrices(model, layers))


def l1(model: nn.Module, *, layers: Layers = None) -> Tensor:
    """``sum_ij |W_ij|`` of every chosen matrix; drives single weights to zero. The gradient is the sign."""
    return _total(row_norms(W, 1).sum() for W in _matrices(model, layers))


def joint_l1(model: nn.Module, *, layers: Layers = None) -> Tensor:
    """``sum_ij |(W_{l+1} W_l)_ij|`` of every two consecutive chosen layers; drives weights that meet to zero.

    Consecutive are two chosen layers in one ``nn.Sequential`` (nested ones are read as one), with nothing between them
    but modules without parameters, whose product is defined: Linear after Linear, or an ``nn.Conv2d`` after an
    ``nn.Conv2d``, both of one group, with as many inputs of the second as outputs of the first, and, if the second's
    kernel is larger than 1 x 1, no pooling or other module between that moves or mixes positions. There the product is
    what the two layers compute together when the activation between them is the identity: of convolutions
    :func:`brittle.training.interventions.consecutive.composed_kernel`, away from the padding. Other neighbours add
    nothing, and outside a ``Sequential`` the order of computation is not known (joint penalty of Langenberg, Balda,
    Behboodi & Mathar 2019).

    Raises:
        InputError: No two chosen layers are consecutive.
    """
    pairs = composable(model, layers, kernels=True)
    return _total(row_norms(compose(*pair), 1).sum() for pair in pairs)


def interlayer_alignment(model: nn.Module, *, layers: Layers = None) -> Tensor:
    """``E ||W2 D W1||_F^2 / (||W2||_F ||W1||_F)^2`` of every two consecutive chosen matrices; turns them apart.

    D is a random pattern of a ReLU between them, each unit open with probability 1/2 by itself, so that the mean is
    ``(||W2 W1||_F^2 + sum_i ||column i of W2||_2^2 ||row i of W1||_2^2) / 4``. In [0, 1], whatever the scale, and 0
    for a zero matrix. Consecutive layers are those of :func:`joint_l1`, but a second kernel larger than 1 x 1 counts
    for none, as several of a unit's positions reach one output. Unlike the alignment that bounds a network it
    needs no decomposition and no search, and over Frobenius norms, which a constraint may hold, it cannot be lowered by
    raising operator norms.

    Raises:
        InputError: No two chosen layers are consecutive.
    """

    def share(first: Chosen, second: Chosen) -> Tensor:
        W1, W2 = in_single(matrix(first)), in_single(matrix(second))
        rows, columns = W1.square().sum(1), W2.square().sum(0)
        square = compose(first, second).square().sum()
        return _ratio((square + (columns * rows).sum()) / 4, columns.sum() * rows.sum())

    return _total(itertools.starmap(share, composable(model, layers, kernels=False)))


def spread_control(
    model: nn.Module, *, layers: Layers = None, share: float = 0.05, norm: int = 2, scale_free: bool = False
) -> Tensor:
    """The variance of the largest row norms of every chosen matrix; brings the dominant filters to one size.

    Population variance of the t largest norms, ``t = max(2, ceil(share m))``; which rows these are is held fixed when
    differentiating. A matrix of one row adds 0.

    Args:
        model: Any module; only read.
        layers: See the head of this page.
        share: Share of the m rows, in (0, 1].
        norm: 2 or 1, of the rows.
        scale_free: Whether to divide by the squared mean of the t norms; a zero matrix then adds 0.

    Returns:
        Scalar: in squared units of the weights, without unit when ``scale_free``.

    Raises:
        InputError: ``share`` or ``norm`` is none of these.
    """
    if not 0 < share <= 1:
        raise InputError(f"share: expected a number in (0, 1]; got {share}")
    if norm not in (1, 2):
        raise InputError(f"norm: expected 1 or 2; got {norm}")

    def variance(W: Tensor) -> Tensor:
        m = len(W)
        # The margin undoes the rounding of 0.07 * 100 = 7.000000000000001.
        t = min(m, max(2, math.ceil(share * m - 1e-9)))
        with torch.no_grad():
            top = row_norms(W, norm).topk(t, sorted=False).indices
        norms = row_norms(W.index_select(0, top), norm)
        mean = norms.mean()
        deviation = (norms - mean).square().mean()
        return _ratio(deviation, mean.square()) if scale_free else deviation

    return _total(map(variance, _matrices(model, layers)))


def condition(model: nn.Module, *, layers: Layers = None) -> Tensor:
    """``||S^T S - a^2 I||_F`` with ``a^2 = ||S||_F^2 / r``; draws the r singular values of every chosen layer together.

    S ``(r, r)`` is the core of a low-rank pair of rank r: its product without the orthonormal bases of its rows and
    columns; a matrix that is no pair counts as one of rank ``r = min(m, n)``. The value is ``sqrt(r)`` times the
    standard deviation of the squared singular values, 0 exactly at condition number 1; the gradient in S is
    ``2 S (S^T S - a^2 I)`` over the value, and 0 where that is 0 up to rounding (RobustDLRT: Schotthoefer, Yang &
    Schnake 2025, arXiv 2505.08022, Definition 1 and Proposition 1). No bases are computed: of a pair ``B A`` the
    product ``(B^T B)(A A^T)`` has the eigenvalues of ``S^T S``. In squared units of the weights, so it lowers the
    scale as well.
    """

    def deviation(layer: Chosen) -> Tensor:
        gram = _core_gram([W.to(torch.promote_types(W.dtype, torch.float32)) for W in factors(layer)])
        trace = gram.trace()
        centred = gram - trace / len(gram) * torch.eye(len(gram)).to(gram)
        square = (centred * centred.mT).sum()
        positive = square > (torch.finfo(gram.dtype).eps * trace).square()
        return torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)

    return _total(map(deviation, chosen_layers(model, layers)))


def _core_gram(weights: Sequence[Tensor]) -> Tensor:
    """``(r, r)`` with the squared singular values of a matrix's smaller side, or of a pair's core, as eigenvalues."""
    first, second = weights[0], weights[-1]
    with torch.autocast(first.device.type, enabled=False):
        if len(weights) == 2:
            return (second.mT @ second) @ (first @ first.mT)
        return first @ first.mT if first.shape[0] <= first.shape[1] else first.mT @ first


def row_norms(W: Tensor, norm: int = 2) -> Tensor:
    """l2 or l1 norms of a matrix's rows, in one pass; the gradient is that pass again, and 0 at a zero row.

    Args:
        W: ``(m, n)``, real.
        norm: 2 or 1.

    Returns:
        ``(m,)``, in units of W; in float32 for half types.

    >>> row_norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([5., 0.])
    """
    return _RowNorms.apply(W, norm)


class _RowNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, norm: int) -> Tensor:
        norms = torch.linalg.vector_norm(W, ord=norm, dim=1, dtype=torch.promote_types(W.dtype, torch.float32))
        ctx.save_for_backward(W, norms)
        ctx.norm = norm
        return norms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        W, norms = ctx.saved_tensors
        if ctx.norm == 1:
            return W.sign().mul_(gradient[:, None]), None
        # Rows whose squares underflow count as if they had the smallest norm that is computed well.
        factors = gradient / norms.clamp_min(torch.finfo(norms.dtype).tiny ** 0.5)
        return (W * factors[:, None]).to(W.dtype), None


def _matrices(model: nn.Module, layers: Layers) -> Iterator[Tensor]:
    return map(matrix, chosen_layers(model, layers))


def _total(values: Iterator[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum()


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``; 0 with gradient 0 where b is 0."""
    positive = b > 0
    return torch.where(positive, a / torch.where(positive, b, 1), 0)


PENALTIES: dict[str, Intervention[Tensor]] = {
    "group_lasso": weighted(group_lasso),
    "scale_invariant_group_lasso": weighted(scale_invariant_group_lasso),
    "nuclear_norm": weighted(nuclear_norm, reusing=RefreshedNuclearNorm),
    "l1": weighted(l1),
    "joint_l1": weighted(joint_l1),
    "interlayer_alignment": weighted(interlayer_alignment),
    "spread_control": weighted(spread_control),
    "condition": weighted(condition),
}
"""Every penalty by its name: ``PENALTIES[name](model, strength, layers=None, every=1)`` is to be called for what is
added to the loss."""
