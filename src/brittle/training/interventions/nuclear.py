"""The nuclear norm of a matrix: exact, and a lower bound that reuses the polar factor for some steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from brittle.errors import InputError
from brittle.models.selection import Chosen, chosen_layers, matrix
from brittle.training.interventions.binding import Drift

RANK_TOLERANCE = 1e-6
"""Singular values up to this share of the largest count as zero in single precision or less: the rounding of such a
matrix's entries moves singular values by about a tenth of this, and the Gram matrix in float64 resolves it."""


def nuclear_norm_of(W: Tensor) -> Tensor:
    """``||W||_* = sum_i sigma_i`` of one matrix.

    The gradient is the polar factor ``U_r V_r^T`` over the numerical rank r, a subgradient also at rank deficiency;
    that of a zero matrix is 0. See :func:`polar_factor`, also for the precision.

    Args:
        W: ``(m, n)``, real.

    Returns:
        Scalar, in units of W; in float32 for half types.

    Raises:
        InputError: W is not finite.

    >>> nuclear_norm_of(torch.diag(torch.tensor([2.0, -1.0])))
    tensor(3.)
    """
    return _NuclearNorm.apply(W)


def polar_factor(W: Tensor) -> tuple[Tensor, Tensor]:
    """The nuclear norm of a matrix, and ``P = U_r V_r^T`` over the numerical rank r: ``<P, W> = ||W||_*``.

    In float64 from the singular value decomposition, r counting singular values above ``max(m, n)`` units of rounding
    of the largest. Otherwise from the eigenvectors of the Gram matrix of the smaller side in float64, several times
    quicker, with r as in :data:`RANK_TOLERANCE`. Squaring halves the digits, so single precision is what float64
    leaves: the square of the smallest singular value kept is 1e-12 of the largest's, far above the rounding 1e-16.

    Args:
        W: ``(m, n)``, real.

    Returns:
        The norm, a scalar, and P ``(m, n)``; both in W's type, but float32 for half types.

    Raises:
        InputError: W is not finite.
    """
    if W.dtype == torch.float64:
        _check_finite(W)
        U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
        kept = sigma > max(W.shape) * torch.finfo(W.dtype).eps * sigma[0]
        return torch.where(kept, sigma, 0).sum(), (U * kept) @ Vh
    A = (W if W.shape[0] <= W.shape[1] else W.mT).double()  # the smaller side first: the Gram matrix is the smaller
    gram = A @ A.mT
    _check_finite(gram.diagonal())  # squares of single precision do not overflow
    squares, U = torch.linalg.eigh(gram)
    kept = squares > RANK_TOLERANCE**2 * squares[-1]
    sigma = torch.where(kept, squares, 1).sqrt()  # 1 where nothing is kept, so that nothing is divided by 0
    P = ((U * (kept / sigma)) @ U.mT @ A).float()
    return torch.where(kept, sigma, 0).sum().float(), P if W.shape[0] <= W.shape[1] else P.mT


def _check_finite(values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise InputError("W: expected finite numbers; got NaN or infinite ones")


class _NuclearNorm(torch.autograd.Function):
    """``||W||_*`` with the polar factor, of :func:`polar_factor`, as its gradient."""

    @staticmethod
    def forward(ctx: Any, W: Tensor) -> Tensor:
        value, P = polar_factor(W)
        ctx.save_for_backward(P)
        ctx.dtype = W.dtype
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (gradient * ctx.saved_tensors[0]).to(ctx.dtype)


class RefreshedNuclearNorm:
    """The nuclear norm of the chosen layers, exact at every ``refresh``-th call and a lower bound in between.

    Keeps ``P = U_r V_r^T`` of every layer's matrix W and yields ``<P, W>``, whose gradient is P. Nuclear and spectral
    norm are dual, ``||W||_* = max {<P, W>: ||P||_2 <= 1}``, so that the value never exceeds the nuclear norm (up to
    rounding) and equals it when P is new. Every call counts, and P is renewed on the first and then on every
    ``refresh``-th: a pass over the weights is all that the other calls cost.

    The bound is linear in W and has no lower end: once W has moved on, it pulls along directions that are no longer W's
    own, and pushes small singular values through zero and up again. Strong penalties and the large first steps of Adam
    make it useless within tens of calls, and can raise the nuclear norm; read ``drift``, and lower ``refresh``
    until its ``value`` is a few per cent.

    Attributes:
        drift: How good the factors were that the last renewal replaced; None before the first such.

    >>> penalty, model = RefreshedNuclearNorm(10, layers=["0"]), nn.Sequential(nn.Linear(2, 2, bias=False))
    >>> _ = nn.init.eye_(model[0].weight)
    >>> penalty(model)
    tensor(2., grad_fn=<SumBackward0>)
    """

    def __init__(self, refresh: int, *, layers: Sequence[str] | None = None) -> None:
        """Choose the layers as :func:`brittle.models.selection.chosen_layers`, and the calls that one P serves.

        Raises:
            InputError: ``refresh`` is not a positive integer.
        """
        if not isinstance(refresh, int) or refresh < 1:
            raise InputError(f"refresh: expected a positive number of calls; got {refresh!r}")
        self.refresh, self.layers = refresh, layers
        self.drift: Drift | None = None
        self._calls = 0
        self._factors: dict[str, Tensor] = {}

    def __call__(self, model: nn.Module) -> Tensor:
        """``sum <P, W>`` over the chosen layers: a scalar, in units of the weights.

        Raises:
            InputError: The layers cannot be chosen, or are not those of the calls before.
        """
        chosen = chosen_layers(model, self.layers)
        if self._calls % self.refresh == 0:
            self._renew(chosen)
        values = [torch.dot(self._factor(layer, W).flatten(), W.flatten()) for layer, W in _matrices(chosen)]
        self._calls += 1
        return torch.stack(values).sum()

    @torch.no_grad()
    def _renew(self, chosen: Sequence[Chosen]) -> None:
        sums: list[Tensor] = []  # of each layer, to be read in one go: every read of a GPU waits for it
        for layer, W in _matrices(chosen):
            value, new = polar_factor(W)
            if self._calls:
                old = self._factor(layer, W)
                parts = [(old - new).square().sum(), new.square().sum(), torch.dot(old.flatten(), W.flatten()), value]
                sums.append(torch.stack([part.double() for part in parts]))
            self._factors[layer.name] = new.contiguous()
        if sums:
            error, size, bound, exact = torch.stack(sums).sum(0).tolist()
            ratios = ((error / size) ** 0.5, (exact - bound) / exact) if size > 0 else (0.0, 0.0)
            self.drift = Drift(ratios[0], ratios[1], self.refresh)

    def _factor(self, layer: Chosen, W: Tensor) -> Tensor:
        P = self._factors.get(layer.name)
        if P is None or P.shape != W.shape:
            raise InputError(
                f"model: expected the layers of the calls before; {layer.name!r} with shape {tuple(W.shape)} is new"
            )
        if P.device != W.device or P.dtype != W.dtype:
            P = self._factors[layer.name] = P.to(W)
        return P

    def state_dict(self) -> dict[str, Tensor]:
        """All that a later call depends on: the number of calls, the drift, and every layer's P, as tensors.

        Returns:
            ``calls`` (an integer), ``drift`` (three numbers, when there is one), and a ``factor.NAME`` a layer.
        """
        state = {f"factor.{name}": P for name, P in self._factors.items()}
        if self.drift is not None:
            state["drift"] = torch.tensor(
                [self.drift.gradient, self.drift.value, self.drift.steps], dtype=torch.float64
            )
        return state | {"calls": torch.tensor(self._calls)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where :meth:`state_dict` was taken, bit for bit.

        Raises:
            InputError: ``state`` is not such a state.
        """
        unknown = [key for key in state if key not in ("calls", "drift") and not key.startswith("factor.")]
        if unknown or "calls" not in state:
            raise InputError(f"state: expected calls, drift and factor.NAME; got {sorted(state)}")
        self._calls = int(state["calls"])
        self._factors = {key.removeprefix("factor."): P for key, P in state.items() if key.startswith("factor.")}
        self.drift = None
        if "drift" in state:
            gradient, value, steps = state["drift"].tolist()
            self.drift = Drift(gradient, value, int(steps))


def _matrices(chosen: Sequence[Chosen]) -> list[tuple[Chosen, Tensor]]:
    """The layers' matrices, in single precision at least."""
    matrices = ((layer, matrix(layer)) for layer in chosen)
    return [(layer, W if W.dtype == torch.float64 else W.float()) for layer, W in matrices]
