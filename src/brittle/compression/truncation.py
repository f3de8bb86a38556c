"""Ranks cut down: of every layer the output directions that matter most are kept, and the layer becomes a pair.

A layer of the matrix ``W`` (m x n) loses all but r orthonormal directions ``U_r`` of its outputs: ``U_r U_r^T W``,
which is the pair ``(U_r^T W, U_r)``. Without data the directions are the left singular vectors of ``W``; with inputs
they are the principal axes of what the layer yields on these. Formulas: theory page, "Pruning schedules".
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from brittle.compression.cost import SeparateCosts, Target, check_target
from brittle.compression.groups import TOLERANCE
from brittle.compression.removal import logit_gap
from brittle.compression.surgery import Map, make_pair, obstacle, replace_modules, replaceable_module
from brittle.errors import InputError, one_line
from brittle.models.borrow import frozen, unwrapped, zero_like
from brittle.models.macs import layer_macs
from brittle.models.selection import chosen_layers

RIDGE = 1e-3
"""How much of its inputs' mean square every layer is taken to get in all directions besides: the samples are few."""
CHUNK = 64
"""Samples that go through the network at once."""


@dataclass(frozen=True)
class Directions:
    """Orthonormal directions of a layer's outputs, the most important first; p = min(m, n).

    Attributes:
        scores: ``(p,)``, non-increasing: singular values, or the root mean square of the outputs along a direction.
        basis: ``(m, p)``, orthonormal columns.
    """

    scores: Tensor
    basis: Tensor


@dataclass(frozen=True)
class Spectra:
    """Directions of a network's layers.

    Attributes:
        layers: By the names of those whose rank can be cut, in the order of the modules.
        whole: Why others of the default cannot be cut, by their names.
    """

    layers: Mapping[str, Directions]
    whole: Mapping[str, str]

    def scores(self) -> dict[str, Tensor]:
        """What the allocations ask for: scores by layer."""
        return {name: directions.scores for name, directions in self.layers.items()}


def singular_directions(
    model: nn.Module, *, layers: Sequence[str] | None = None, inputs: Tensor | None = None
) -> Spectra:
    r"""Directions of the outputs of every chosen layer, in double precision.

    Without inputs: left singular vectors and singular values of ``W``, so that r of them leave the best approximation
    of rank r in the Frobenius and the spectral norm (Eckart & Young 1936). With inputs: eigenvectors, and roots of the
    eigenvalues, of ``E[y y^T] + d W W^T``, where ``y = W x`` is what the layer yields without its bias, averaged over
    samples and positions, and ``d = RIDGE * tr E[y y^T] / ||W||_F^2``. These leave the least mean square error of the
    outputs, up to d, and never a larger one than the singular vectors do (theory page, "Pruning schedules"; without d
    Zhang et al. 2016, arXiv 1505.06798; for language models SVD-LLM, arXiv 2403.07378).

    Args:
        model: Left as it is.
        layers: Names of the layers; by default those of :func:`brittle.models.selection.chosen_layers` that a pair can
            replace.
        inputs: Samples ``(N, ...)`` for the network; they need no labels.

    Raises:
        InputError: As :func:`brittle.compression.factorise.factorised` for a named layer; no layer is left; a weight or
            an output is not finite; or the network cannot run on the inputs.
    """
    model = unwrapped(model)
    chosen, modules, whole = chosen_layers(model, layers), dict[str, Map](), dict[str, str]()
    for layer in chosen:
        paired = "is a low-rank pair already" if len(layer.modules) == 2 else None
        reason = paired or obstacle(model, layer.modules[0])
        if reason is None:
            modules[layer.name] = replaceable_module(model, layer)
        elif layers is not None:
            raise InputError(f"layers: expected layers whose rank can be cut; layer {layer.name!r} {reason}")
        else:
            whole[layer.name] = reason
    if not modules:
        first = next(iter(whole.items()))
        raise InputError(f"model: expected layers whose rank can be cut; got none, as layer {first[0]!r} {first[1]}")
    moments = {} if inputs is None else _output_moments(model, modules, inputs)
    found = {name: _directions(name, _matrix(module), moments.get(name)) for name, module in modules.items()}
    return Spectra(found, whole)


def rank_costs(model: nn.Module, spectra: Spectra, x: Tensor, target: Target) -> SeparateCosts:
    """Cost of the whole network as a function of the ranks, exactly.

    A layer of rank r costs ``min(m n, r (m + n))`` parameters, and as many MACs at every position: where a pair would
    not be smaller, :func:`truncate` leaves the layer.

    Args:
        model: Left as it is.
        spectra: Of the network.
        x: Inputs ``(N, ...)``, of which the first is used.
        target: ``"parameters"`` or ``"macs"``, the latter as :func:`brittle.models.macs.layer_macs` counts them.

    Raises:
        InputError: The target is another, or the network cannot run on the inputs.
    """
    check_target(target, "parameters", "macs")
    model = unwrapped(model)
    macs = layer_macs(model, x) if target == "macs" else {}
    total = sum(macs.values()) if target == "macs" else sum(p.numel() for p in model.parameters())
    sizes = [_matrix(_map(model, name)).shape for name in spectra.layers]
    entries = np.array([m * n for m, n in sizes], dtype=float)
    whole = np.array([macs.get(name, 0) for name in spectra.layers], dtype=float) if target == "macs" else entries
    return SeparateCosts(
        names=tuple(spectra.layers),
        units=np.array([min(m, n) for m, n in sizes], dtype=np.int64),
        each=np.array([m + n for m, n in sizes]) * whole / entries,
        whole=whole,
        constant=float(total - whole.sum()),
    )


def truncate(model: nn.Module, spectra: Spectra, ranks: Mapping[str, int], x: Tensor) -> nn.Module:
    """The network with low-rank pairs in place of layers, checked against the network with the product matrices.

    A layer whose pair would not be smaller, ``r (m + n) >= m n``, stays as it is, with all of its rank.

    Args:
        model: Left as it is.
        spectra: Of the network.
        ranks: By name; layers that are not named stay as they are.
        x: Samples ``(N, ...)`` on which both must give the same logits up to ``TOLERANCE`` of the largest.

    Returns:
        The network in evaluation mode; its pairs stand at their layers' names, as those of
        :func:`brittle.compression.factorise.factorised`.

    Raises:
        InputError: A name or rank is out of range; or the two networks differ: layers that do are named.
    """
    model = unwrapped(model)
    factors = dict[str, tuple[Tensor, Tensor]]()
    for name, r in ranks.items():
        if name not in spectra.layers:
            raise InputError(f"ranks: expected names of {', '.join(map(repr, spectra.layers))}; got {name!r}")
        directions, W = spectra.layers[name], _matrix(_map(model, name))
        if not isinstance(r, int) or isinstance(r, bool) or not 1 <= r <= len(directions.scores):
            raise InputError(f"ranks: expected 1 to {len(directions.scores)} for layer {name!r}; got {r!r}")
        if r * sum(W.shape) < W.numel():
            factors[name] = _factors(W, directions.basis[:, :r])
    x = x.to(zero_like(model))
    small = _with_pairs(model, factors)
    if logit_gap(_with_products(model, factors), small, x) > TOLERANCE:
        alone = {name: {name: both} for name, both in factors.items()}
        gaps = {n: logit_gap(_with_products(model, one), _with_pairs(model, one), x) for n, one in alone.items()}
        guilty = [name for name, gap in gaps.items() if gap > TOLERANCE]
        raise InputError(
            f"model: expected a network that computes the same with a pair of layers as with their product; "
            f"layer {', '.join(map(repr, guilty)) or 'none alone'} does not; leave it out (layers=)"
        )
    return small.eval()


def _map(model: nn.Module, name: str) -> Map:
    module = model.get_submodule(name)
    assert isinstance(module, Map)
    return module


def _matrix(module: Map) -> Tensor:
    """``(m, n)``, in double precision."""
    return module.weight.detach().flatten(1).double()


def _output_moments(model: nn.Module, modules: Mapping[str, Map], inputs: Tensor) -> dict[str, Tensor]:
    """``E[y y^T]``, ``(m, m)``, of every layer's outputs without the bias; 0 of one that is not called."""
    if len(inputs) == 0:
        raise InputError("inputs: expected at least one sample; got none")
    sums = {m: torch.zeros(len(m.weight), len(m.weight)).double().to(m.weight.device) for m in modules.values()}
    rows = dict.fromkeys(modules.values(), 0)

    def add(module: Map, _: object, output: Tensor) -> None:
        outputs = output.detach().movedim(-3 if isinstance(module, nn.Conv2d) else -1, -1).double()
        if module.bias is not None:
            outputs = outputs - module.bias.detach().double()
        outputs = outputs.reshape(-1, len(module.weight))
        sums[module] += outputs.T @ outputs
        rows[module] += len(outputs)

    handles = [module.register_forward_hook(add) for module in modules.values()]
    try:
        with frozen(model), torch.no_grad():
            for chunk in inputs.split(CHUNK):
                model(chunk.to(zero_like(model)))
    except Exception as error:  # of the user's network: whatever it raises, these inputs do not suit it
        raise InputError(f"inputs: expected samples that the network can run on; got {one_line(error)}") from error
    finally:
        for handle in handles:
            handle.remove()
    return {name: sums[module] / max(rows[module], 1) for name, module in modules.items()}


def _directions(name: str, W: Tensor, moments: Tensor | None) -> Directions:
    """Of a matrix, and of the second moments of its outputs where there are inputs."""
    if not bool(W.isfinite().all()):
        raise InputError(f"model: expected finite weights; got others in layer {name!r}")
    side = min(W.shape)
    if moments is None:
        # the triangular factor of a wide matrix has its left singular vectors, and is small
        narrow = torch.linalg.qr(W.T, mode="r").R.T if W.shape[1] > 2 * W.shape[0] else W
        U, scores, _ = torch.linalg.svd(narrow, full_matrices=False)
        return Directions(scores, U)
    if not bool(moments.isfinite().all()):
        raise InputError(f"inputs: expected finite outputs of every layer; got others of layer {name!r}")
    gram = W @ W.T
    mean_square = moments.trace() / gram.trace()
    ridge = RIDGE * float(mean_square) if mean_square > 0 else 1.0  # nothing comes in: the singular vectors
    values, vectors = torch.linalg.eigh(moments + ridge * gram)
    return Directions(values.flip(0)[:side].clamp(min=0).sqrt(), vectors.flip(1)[:, :side].contiguous())


def _factors(W: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """``basis^T W`` and ``basis``, scaled so that both have the same norm along every direction."""
    along = basis.T @ W
    root = along.norm(dim=1).sqrt()
    root = torch.where(root > 0, root, 1)
    return along / root[:, None], basis * root


def _with_pairs(model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> nn.Module:
    copied = copy.deepcopy(model)
    return replace_modules(copied, {_map(copied, n): make_pair(_map(copied, n), *both) for n, both in factors.items()})


def _with_products(model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> nn.Module:
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, (A, B) in factors.items():
            weight = _map(copied, name).weight
            weight.copy_((B @ A).view(weight.shape))
    return copied
