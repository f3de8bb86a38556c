"""Single weights set to zero by their magnitude: the baseline of compression.

Nothing gets faster by it, and no file smaller: the network keeps all its sizes, and counts by its non-zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from brittle.compression.cost import SeparateCosts
from brittle.errors import InputError
from brittle.models.borrow import unwrapped
from brittle.models.selection import chosen_layers


def weight_scores(model: nn.Module, *, layers: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Magnitudes of all single weights, by layer: what the allocations ask for.

    Args:
        model: Only read.
        layers: Names of the layers; by default every Linear and every convolution that is not transposed, the first
            and the last included, as is usual for single weights. Biases and batch norms are never among them.

    Returns:
        ``(entries,)`` by the name of the layer; a weight that several layers share stands at the first of them.

    Raises:
        InputError: As :func:`brittle.models.selection.chosen_layers`; or a weight is computed from others
            (parametrised), or is not finite.
    """
    model = unwrapped(model)
    if layers is None:
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        layers = [name for name, module in model.named_modules() if isinstance(module, kinds)]
        if not layers:
            raise InputError(f"model: expected Linear or convolution modules; got none in {type(model).__name__}")
    acting = {module for layer in chosen_layers(model, layers) for module in layer.modules}
    scores, seen = dict[str, Tensor](), set[int]()
    for name, module in model.named_modules():
        if module in acting:
            weight = module._parameters.get("weight")
            if weight is None:
                raise InputError(f"layers: expected weights that are parameters; layer {name!r} computes its own")
            if not bool(weight.isfinite().all()):
                raise InputError(f"model: expected finite weights; got others in layer {name!r}")
            if id(weight) not in seen:
                seen.add(id(weight))
                scores[name] = weight.detach().abs().flatten().cpu()
    return scores


def weight_costs(model: nn.Module, scores: Mapping[str, Tensor]) -> SeparateCosts:
    """Parameters of the whole network as a function of the single weights that are kept: those that are not zero.

    Biases and batch norms count in full, so that a ratio means the same here as for channels and ranks. There are no
    MACs: products with zeros are computed like others.

    Args:
        model: Only read.
        scores: Of :func:`weight_scores`.
    """
    units = np.array([len(magnitudes) for magnitudes in scores.values()], dtype=np.int64)
    total = sum(p.numel() for p in unwrapped(model).parameters())
    return SeparateCosts(tuple(scores), units, np.ones(len(units)), units.astype(float), float(total - units.sum()))


def with_zeros(model: nn.Module, kept: Mapping[str, Tensor]) -> nn.Module:
    """A copy in which all single weights but the kept ones are zero.

    Args:
        model: Left as it is.
        kept: Indices of what stays in the flattened weight, by layer; layers that are not named stay as they are.

    Raises:
        InputError: A name is no layer with a weight, or an index is out of range.
    """
    copied = copy.deepcopy(unwrapped(model))
    modules = dict(copied.named_modules())
    with torch.no_grad():
        for name, indices in kept.items():
            weight = modules[name]._parameters.get("weight") if name in modules else None
            if weight is None:
                raise InputError(f"kept: expected names of layers with a weight; got {name!r}")
            if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < weight.numel():
                raise InputError(f"kept: expected indices below {weight.numel()} for layer {name!r}; got others")
            goes = torch.ones(weight.numel(), dtype=torch.bool)
            goes[indices] = False
            weight.masked_fill_(goes.view(weight.shape).to(weight.device), 0)
    return copied
