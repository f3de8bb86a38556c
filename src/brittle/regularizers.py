"""Penalties of one weight matrix; add a multiple to the training loss. Formulas: theory page, "Interventions"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def group_lasso(W: Tensor) -> Tensor:
    """``sum_i ||w_i||_2`` over the rows (neurons, filters) of a matrix ``(m, n)``; drives whole rows to zero.

    Differentiable; the gradient of a zero row is 0.

    >>> group_lasso(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor(5.)
    """
    squares = W.square().sum(1)
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0).sum()


def nuclear_norm(W: Tensor) -> Tensor:
    """``sum_i sigma_i`` of a matrix ``(m, n)``; drives singular values to zero.

    The gradient is the polar factor ``U_r V_r^T`` over the numerical rank r, a subgradient also at rank deficiency.
    It is found from the Gram matrix of the smaller side in float64.

    >>> nuclear_norm(torch.diag(torch.tensor([2.0, -1.0])))
    tensor(3.)
    """
    return _NuclearNorm.apply(W)


class _NuclearNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor) -> Tensor:
        wide = W.shape[0] < W.shape[1]
        A = (W.mT if wide else W).double()
        squares, V = torch.linalg.eigh(A.mT @ A)
        kept = squares > 1e-12 * squares[-1].clamp_min(1e-300)  # below, sigma is noise of the Gram matrix
        sigma, V = squares[kept].sqrt(), V[:, kept]
        polar = (A @ V / sigma) @ V.mT
        ctx.save_for_backward((polar.mT if wide else polar).to(W.dtype))
        return sigma.sum().to(W.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (polar,) = ctx.saved_tensors
        return grads[0] * polar
