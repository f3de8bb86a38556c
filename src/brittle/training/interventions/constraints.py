"""What is done to the weights after every optimiser step, in place: parameters and optimiser state keep their identity.

Every function is a row of :data:`CONSTRAINTS`, ``constraint(model, value, *, layers=None, every=1)``: it checks its
value, chooses the layers, and returns what is to be called after every step, which acts on the parameters that these
layers hold then. Where a property is kept it is kept at every call; ``every`` is read by the shrinkages alone.

The layers are those of :func:`brittle.models.selection.chosen_layers`, and their matrices: a weight ``(out, in)``, of a
convolution the filter matrix ``(out, in * kh * kw)`` (not the operator on images), of a low-rank pair the product of
its factors. Each is deterministic, so processes that hold equal weights still do afterwards. Weights that are not
finite are left as they are. Formulas: theory page, "Interventions".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from brittle.errors import InputError
from brittle.models.selection import Chosen, chosen_layers
from brittle.training.interventions.binding import Intervention
from brittle.training.interventions.proximal import Shrinkage, weight_parameter

Layers = Sequence[str] | None


def frobenius_normalisation(
    model: nn.Module, value: float | None = None, *, layers: Layers = None, every: int = 1
) -> Callable[[], None]:
    """Keep the Frobenius norm of every chosen layer, ``W <- c W / ||W||_F``, so that only its structure can change.

    A matrix of zeros is left, and the factors of a pair share the change.

    Args:
        model: The model whose parameters the result acts on; make it anew when modules are replaced.
        value: c of every layer, in units of the weights; None: each layer's norm as it is now.
        layers: As on this page.
        every: As on this page.

    Returns:
        To be called after every step. It costs one read of the weights and one multiplication; of a pair of rank r
        also ``r^2 (m + n)`` operations in float64.

    Raises:
        InputError: ``value`` is not positive and finite; without one, a layer is zero; or a weight is parametrised.
    """
    chosen = _choose(model, layers)
    if value is None:
        with torch.no_grad():
            constants = [float(_frobenius_norm(_weights(layer))) for layer in chosen]
        for layer, norm in zip(chosen, constants, strict=True):
            if not 0 < norm < math.inf:
                raise InputError(
                    "constant: expected a number, or layers whose norm is positive and finite; "
                    f"got None, and norm {norm} of layer {layer.name!r}"
                )
    else:
        constants = [_check_positive("constant", value)] * len(chosen)

    @torch.no_grad()
    def normalise() -> None:
        for layer, constant in zip(chosen, constants, strict=True):
            weights = _weights(layer)
            norm = _frobenius_norm(weights)
            scale = torch.where(norm > 0, constant / norm, 1) ** (1 / len(weights))
            for weight in weights:
                weight.mul_(scale)

    return normalise


def spectral_cap(model: nn.Module, value: float, *, layers: Layers = None, every: int = 1) -> Callable[[], None]:
    """Clip the singular values of every chosen matrix at a cap: the nearest matrix in the spectral-norm ball.

    Exact, by the eigenvectors of the Gram matrix of the smaller side in float64, where neither the Frobenius norm nor
    ``sqrt(||W||_1 ||W||_inf)`` nor a Cholesky decomposition of ``cap^2 I - Gram`` shows that nothing is to be done.
    Of a pair, each factor takes half of the change in every singular direction.

    Args:
        model: As in :func:`frobenius_normalisation`.
        value: The cap: largest singular value allowed, positive, in units of the weights. Afterwards the norm is at
            most ``cap (1 + t)`` with ``t = 4 sqrt(m + n)`` units of rounding of the weights' type, and a weight that
            satisfies this keeps its bits. A pair's factors are rounded each by itself: there t grows by
            ``||A||_2 ||B||_2 / cap``.
        layers: As on this page.
        every: As on this page.

    Raises:
        InputError: ``value`` is not positive and finite, or a weight is parametrised.
    """
    cap, chosen = _check_positive("cap", value), _choose(model, layers)

    def clip(sigma: Tensor, rounding: float) -> Tensor:
        return sigma if sigma[0] <= cap * (1 + rounding) else sigma.clamp_max(cap)

    @torch.no_grad()
    def cap_norms() -> None:
        for layer in chosen:
            weights = _weights(layer)
            if len(weights) == 1:
                W = weights[0].flatten(1)
                weights[0].copy_(_clip_matrix(W, cap * (1 + _rounding(W)), cap).view_as(weights[0]))
            else:
                _change_singular_values(weights, clip)

    return cap_norms


def condition_cap(model: nn.Module, value: float, *, layers: Layers = None, every: int = 1) -> Callable[[], None]:
    """Hold the condition number of every pair's product, ``sigma_1 / sigma_r``, at most at a limit.

    The singular values are clipped into ``[s, s * limit]``, with the s that changes them least in the sum of squares;
    this is the nearest product of rank r with that condition number (CondLR of Savostianova, Zangrando, Ceruti &
    Tudisco 2023, with the best instead of a fixed s). Each factor takes half of the change in every singular
    direction; if a singular value is lifted by more than a millionfold, the factors are set to the balanced pair
    ``(S^(1/2) V^T, U S^(1/2))``. A product of zeros is left.

    Args:
        model: As in :func:`frobenius_normalisation`; layers that are no pairs are left.
        value: The limit, at least 1. It is met up to ``1 + 4 sqrt(m + n) limit`` units of rounding of the weights'
            type, times ``||A||_2 ||B||_2 / ||BA||_2``; pairs within ``1 + 4 sqrt(m + n)`` units keep their bits.
        layers: Names of pairs; by default as on this page.
        every: As on this page.

    Raises:
        InputError: ``value`` is below 1 or not finite, a named layer is no pair, there is no pair, or a weight is
            parametrised.
    """
    limit, pairs = _check_positive("limit", value), _choose_pairs(model, layers)
    if limit < 1:
        raise InputError(f"limit: expected a condition number of at least 1; got {value!r}")

    def condition(sigma: Tensor, rounding: float) -> Tensor:
        if sigma[0] <= limit * (1 + rounding) * sigma[-1]:
            return sigma
        floor = nearest_floor(sigma, limit)
        return sigma.clamp(floor, limit * floor)

    @torch.no_grad()
    def cap_conditions() -> None:
        for pair in pairs:
            _change_singular_values(_weights(pair), condition)

    return cap_conditions


def orthonormal_factors(
    model: nn.Module, value: float = 2, *, layers: Layers = None, every: int = 1
) -> Callable[[], None]:
    """Pull the first factor A of every pair towards orthonormal rows, and let the second keep the product.

    Newton-Schulz steps ``A <- (3 I - A A^T) A / 2`` take every singular value from s to ``s (3 - s^2) / 2``: the
    distance E of ``A A^T`` from I falls to ``(3 E^2 + E^3) / 4`` at each. With T the product of their left factors,
    B becomes ``B T^(-1)``: ``BA`` stays as it is, up to the rounding of the new factors. If a singular value of A may
    exceed ``sqrt(2)`` (by the largest row sum b of ``|A A^T|``), A is first divided by ``sqrt(b)``. The rows are
    orthonormal after enough calls unless A has not full rank; the approximately orthonormal factors of Savostianova,
    Zangrando, Ceruti & Tudisco (2023).

    Args:
        model: As in :func:`frobenius_normalisation`; layers that are no pairs are left.
        value: Newton-Schulz steps at every call, a whole number of at least 1.
        layers: Names of pairs; by default as on this page.
        every: As on this page.

    Raises:
        InputError: ``value`` is no positive integer, a named layer is no pair, there is no pair, or a weight is
            parametrised.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 1 or not float(value).is_integer():
        raise InputError(f"steps: expected a positive integer; got {value!r}")
    steps, pairs = int(value), _choose_pairs(model, layers)

    @torch.no_grad()
    def orthonormalise() -> None:
        for pair in pairs:
            first, second = _weights(pair)
            A, B = first.flatten(1).double(), second.flatten(1).double()
            T = newton_schulz(A @ A.mT, steps)
            first.copy_((T @ A).view_as(first))
            second.copy_(torch.linalg.solve(T, B, left=False).view_as(second))

    return orthonormalise


def newton_schulz(gram: Tensor, steps: int) -> Tensor:
    """T ``(r, r)`` with T A the result of Newton-Schulz steps from A ``(r, n)``, scaled if need be; gram is A A^T."""
    identity = torch.eye(len(gram)).to(gram)
    bound = gram.abs().sum(1).max()
    squared = torch.where(bound > 2, bound, 1)
    gram, T = gram / squared, identity / squared.sqrt()
    for _ in range(steps):
        step = (3 * identity - gram) / 2
        gram, T = step @ gram @ step, step @ T
    return T


def nearest_floor(sigma: Tensor, limit: float) -> Tensor:
    """The s at which clipping ``sigma`` into ``[s, s * limit]`` changes it least in the sum of squares.

    The sum is convex and piecewise quadratic in s, with breakpoints ``sigma`` and ``sigma / limit``: its derivative
    is found at all of them, and s is the minimum of the quadratic between the two where the sign changes.

    Args:
        sigma: ``(r,)``, at least 0, not all 0, in any order.
        limit: At least 1.

    Returns:
        Scalar; any of the minima when nothing has to be changed.

    >>> nearest_floor(torch.tensor([10.0, 1.0]), 2.0)
    tensor(4.2000)
    """
    points = torch.cat([sigma, sigma / limit]).sort().values
    below = (points[:, None] - sigma).clamp_min(0).sum(1)
    above = (sigma - limit * points[:, None]).clamp_min(0).sum(1)
    start = points[(below <= limit * above).sum().clamp_min(1) - 1]
    low, high = (sigma <= start).to(sigma), (sigma / limit > start).to(sigma)
    total, count = (sigma * (low + limit * high)).sum(), (low + limit**2 * high).sum()
    return torch.where(count > 0, total / count.clamp_min(1), start)


def _clip_matrix(W: Tensor, allowed: float, cap: float) -> Tensor:
    """The nearest matrix to W whose singular values are at most ``cap``; W itself if they are at most ``allowed``."""
    M = W.double()
    sums = M.abs()
    upper = torch.minimum(M.norm(), (sums.sum(0).max() * sums.sum(1).max()).sqrt())
    if not allowed < upper < math.inf:
        return W
    M = M if W.shape[0] >= W.shape[1] else M.mT
    gram = M.mT @ M
    # It exists exactly when allowed^2 I - Gram is positive definite, and is far cheaper than eigenvectors.
    if not torch.linalg.cholesky_ex(allowed**2 * torch.eye(len(gram)).to(gram) - gram).info:
        return W
    squares, V = torch.linalg.eigh(gram)
    over = squares > cap**2
    V = V[:, over]
    M = M - M @ V * (1 - cap / squares[over].sqrt()) @ V.mT
    return (M if W.shape[0] >= W.shape[1] else M.mT).to(W.dtype)


def _change_singular_values(pair: tuple[Tensor, ...], change: Callable[[Tensor, float], Tensor]) -> None:
    """Give a pair's product other singular values, descending as before; bits stay where none changes.

    ``change`` maps the singular values, and a bound of how far rounding moved them relatively, to the new ones.
    """
    first, second = pair
    A, B = first.flatten(1).double(), second.flatten(1).double()
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        return
    (Q, R), (P, L) = torch.linalg.qr(A.mT), torch.linalg.qr(B)
    U, old, Vh = torch.linalg.svd(L @ R.mT)
    new = change(old, _rounding(first, second))
    if torch.equal(new, old):
        return
    left, right = U.mT @ L, R.mT @ Vh.mT  # left @ right = diag(old)
    if (new > 1e6 * old).any():  # so large a factor would lift rounding errors: start from balanced factors
        left = right = new.sqrt().diag()
    else:
        factor = torch.where(old > 0, new / old, 1).sqrt()
        left, right = factor[:, None] * left, right * factor
    first.copy_((right @ Vh @ Q.mT).view_as(first))
    second.copy_((P @ U @ left).view_as(second))


def _frobenius_norm(weights: tuple[Tensor, ...]) -> Tensor:
    """Frobenius norm in float64 of a matrix, or of the product of a first and a second factor."""
    if len(weights) == 1:
        W = weights[0].flatten(1)
        rows = torch.linalg.vector_norm(W, dim=1, dtype=torch.promote_types(W.dtype, torch.float32))
        return torch.linalg.vector_norm(rows, dtype=torch.float64)  # by rows: one long sum in float32 is off by 1e-4
    A, B = (weight.flatten(1).double() for weight in weights)
    inner, outer = A @ A.mT, B.mT @ B
    square = (inner * outer).sum()  # ||BA||_F^2 = trace(A A^T B^T B)
    noise = 1e-14 * inner.trace() * outer.trace()  # what rounding leaves of a product of zeros
    return torch.where(square > noise, square, 0).sqrt()


def _rounding(*weights: Tensor) -> float:
    """A bound of the relative change of a spectral norm when these weights are rounded to their type."""
    sides = weights[0].flatten(1).shape[1] + weights[-1].shape[0]
    return 4 * torch.finfo(weights[0].dtype).eps * math.sqrt(sides)


def _weights(layer: Chosen) -> tuple[Tensor, ...]:
    """The weight of a layer as it is now, or the two factors of a pair."""
    return tuple(weight_parameter(module, layer.name) for module in layer.modules)


def _choose(model: nn.Module, layers: Layers) -> list[Chosen]:
    """The chosen layers; their weights are parameters."""
    chosen = chosen_layers(model, layers)
    for layer in chosen:
        _weights(layer)
    return chosen


def _choose_pairs(model: nn.Module, layers: Layers) -> list[Chosen]:
    """The low-rank pairs among the chosen layers; all of the layers that are named have to be pairs."""
    chosen = _choose(model, layers)
    pairs = [layer for layer in chosen if len(layer.modules) == 2]
    if not pairs or (layers is not None and len(pairs) < len(chosen)):
        whole = ", ".join(layer.name for layer in chosen if layer not in pairs)
        raise InputError(
            f"layers: expected low-rank pairs, as brittle.training.factorised makes; got {whole or 'none'}"
        )
    return pairs


def _check_positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"{name}: expected a positive, finite number; got {value!r}")
    return float(value)


CONSTRAINTS: dict[str, Intervention[None]] = {
    "frobenius": frobenius_normalisation,
    "spectral_cap": spectral_cap,
    "orthonormal": orthonormal_factors,
    "condition_cap": condition_cap,
    "row_shrinkage": partial(Shrinkage, singular=False),
    "singular_shrinkage": partial(Shrinkage, singular=True),
}
"""Every constraint by its name: ``CONSTRAINTS[name](model, value, layers=None, every=1)`` is to be called after every
step of the optimiser. The value is the constant (None: each layer's norm at that moment), the cap, the number of
Newton-Schulz steps, the largest condition number, the shrinkage a step."""
