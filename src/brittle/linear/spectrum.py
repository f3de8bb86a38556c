"""Largest singular values and vectors: computed, iterated, and raised until an upper bound is one.

How far each computed number is raised, and why that is enough, is on the theory page, section "Rounding of norms".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from brittle.linear.compressibility import RANK_TOLERANCE

UNIT_ROUNDOFF = 2.0**-53
"""Largest relative error of one operation in float64."""

ROUNDING = 1e-12
"""Relative margin per entry of a matrix's longer side by which its computed norm is raised to an upper bound."""

WALK_ROUNDING = 1e-9
"""Relative margin by which numbers are raised that were carried through all operations of a network."""

GRAM_VECTORS_FROM = 1024
"""Shorter side above which singular vectors are taken from the Gram matrix: less exact, several times sooner."""


def raised(value: float, side: int = 1) -> float:
    """A computed norm, or a product of at most thousands of certified numbers, as an upper bound: a relative 1e-12 up.

    Args:
        value: What was computed in float64, at least 0.
        side: Longer side of the matrix whose norm it is; each entry of it adds 1e-12.
    """
    return value * (1 + ROUNDING * side)


def largest_singular_value(A: Tensor) -> tuple[Tensor, Tensor]:
    """The spectral norm of every matrix, from the Gram matrix on its shorter side, and a certified upper bound of it.

    The Gram matrix loses no digit of the *largest* singular value. Entries are divided by the largest one first, so
    that no square leaves the range of floating point.

    Args:
        A: ``(..., m, n)`` in double precision, real or complex, finite.

    Returns:
        ``(value, upper)``, each ``(...,)``, in units of A: exact up to rounding, and raised by a relative
        ``1e-12 max(m, n)``.
    """
    m, n = A.shape[-2:]
    largest = A.abs().amax((-2, -1))
    A = A / torch.where(largest > 0, largest, 1)[..., None, None]
    if min(m, n) == 1:
        value = torch.linalg.vector_norm(A, dim=(-2, -1))
    else:
        gram = A.mH @ A if n <= m else A @ A.mH
        value = torch.linalg.eigvalsh(gram)[..., -1].clamp_min(0).sqrt()
    value = largest * value
    return value, value * (1 + ROUNDING * max(m, n))


def largest_norm(A: Tensor, least: float = 0.0) -> float:
    """The largest spectral norm of several matrices, or ``least`` where that is larger; exact up to rounding.

    Of most matrices it is only shown that their norm is no larger than ``least``, which takes a small part of the time:
    ``(1 + margin) least^2 I - A^H A`` has a Cholesky decomposition, computed in floating point, only if it is positive
    semidefinite up to rounding far below the margin of 1e-12 min(m, n) (theory page, "Rounding of norms").

    Args:
        A: ``(F, m, n)`` in double precision, real or complex, finite; F at least 1.
        least: A norm that is known, at least 0.
    """
    m, n = A.shape[-2:]
    scale = least or float(A.abs().amax())
    if scale == 0:
        return 0.0
    A = A / scale
    gram = A.mH @ A if n <= m else A @ A.mH
    if least:
        gap = -gram
        gap.diagonal(dim1=-2, dim2=-1).add_(1 + ROUNDING * min(m, n))
        gram = gram[torch.linalg.cholesky_ex(gap).info != 0]
    if not len(gram):
        return least
    return max(least, scale * float(torch.linalg.eigvalsh(gram)[:, -1].amax().clamp_min(0).sqrt()))


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
    wide = W.shape[0] < W.shape[1]
    if min(W.shape) > GRAM_VECTORS_FROM:
        squares, vectors = torch.linalg.eigh(W @ W.mT if wide else W.mT @ W)
        squares, vectors = squares.flip(0)[:k], vectors.flip(1)[:, :k]
        vectors = vectors[:, squares > 1e-14 * squares[0]]  # below the root of this, a gain is rounding
        return torch.linalg.qr(W.mT @ vectors).Q if wide else vectors
    if wide:  # W = R^T Q^T; the small factor has the same singular values
        Q, R = torch.linalg.qr(W.mT)
        _, sigma, Vh = torch.linalg.svd(R.mT)
        V = Q @ Vh.mT
    else:
        _, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
        V = Vh.mT
    return V[:, :k][:, sigma[:k] > RANK_TOLERANCE * sigma[0]]


def power_iteration(apply: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Largest eigenvalue of a positive semidefinite map for every sample of a batch: an estimate from below.

    Args:
        apply: The map, from ``(N, ...)`` to the same shape; all axes but the first are one vector.
        start: Where to begin, ``(N, ...)``, of any length.
        steps: Applications of the map, at least 1.

    Returns:
        ``||M v|| / ||v||`` ``(N,)`` for the vector v before the last application, never above the largest eigenvalue
        but for rounding; and the vectors after it, of norm 1 (where the map gave zero, those before it).
    """
    axes = tuple(range(1, start.ndim))
    v = before = image = start
    for _ in range(steps):
        before, image = v, apply(v)
        length = torch.linalg.vector_norm(image, dim=axes, keepdim=True)
        v = torch.where(length > 0, image / length, before)
    lengths = [torch.linalg.vector_norm(x.flatten(1), dim=1) for x in (image, before)]
    return lengths[0] / lengths[1].clamp_min(torch.finfo(lengths[1].dtype).tiny), v


def ritz(apply: Callable[[Tensor], Tensor], X: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Largest eigenvalues of a Hermitian matrix from a block Krylov space: lower estimates, exact in small sizes.

    Args:
        apply: The matrix's product with ``(..., n, k)``.
        X: Block to start from, ``(..., n, p)``; earlier eigenvectors make a good one.
        rounds: Blocks in the space.

    Returns:
        Values ``(..., q)``, largest first, and orthonormal vectors ``(..., n, q)``, ``q = min(n, p)``.
    """
    n, p = X.shape[-2:]
    if n <= p * rounds:  # the space is everything
        basis = torch.eye(n, dtype=X.dtype).expand(*X.shape[:-2], n, n)
        images = apply(basis)
    else:
        block = torch.linalg.qr(X).Q
        basis, images = block, apply(block)
        for _ in range(rounds - 1):
            block = images[..., -p:]
            for _ in range(2):  # once is not orthogonal enough when little is left of the block
                block = torch.linalg.qr(block - basis @ (basis.mH @ block)).Q
            basis, images = torch.cat([basis, block], -1), torch.cat([images, apply(block)], -1)
    small = basis.mH @ images
    values, vectors = torch.linalg.eigh((small + small.mH) / 2)
    q = min(n, p)
    return values[..., -q:].flip(-1), basis @ vectors[..., -q:].flip(-1)
