"""Largest singular values and vectors of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from brittle.linear.compressibility import RANK_TOLERANCE

_LARGE = 1024  # from here on the Gram matrix is decomposed instead of the matrix


def top_right_singular_vectors(W: Tensor, k: int) -> Tensor:
    """Orthonormal right singular vectors of the k largest singular values, fewer if the rank is smaller.

    Args:
        W: Matrix ``(m, n)``.
        k: At most min(m, n).

    Returns:
        ``(n, min(k, rank))`` in float64, the direction of largest gain first. Singular values up to 1e-10 of the
        largest do not count for the rank (1e-7 where both sides exceed 1024).
    """
    W = W.double()
    if min(W.shape) > _LARGE:
        return _from_gram_matrix(W, k)
    if W.shape[0] < W.shape[1]:  # W = R^T Q^T; the small factor has the same singular values
        Q, R = torch.linalg.qr(W.mT)
        _, sigma, Vh = torch.linalg.svd(R.mT)
        V = Q @ Vh.mT
    else:
        _, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
        V = Vh.mT
    return V[:, :k][:, sigma[:k] > RANK_TOLERANCE * sigma[0]]


def _from_gram_matrix(W: Tensor, k: int) -> Tensor:
    """The same of a large matrix, many times sooner; directions of gain below 1e-7 of the largest are left out."""
    wide = W.shape[0] < W.shape[1]
    squares, vectors = torch.linalg.eigh(W @ W.mT if wide else W.mT @ W)
    squares, vectors = squares.flip(0)[:k], vectors.flip(1)[:, :k]
    vectors = vectors[:, squares > 1e-14 * squares[0]]
    return torch.linalg.qr(W.mT @ vectors).Q if wide else vectors
