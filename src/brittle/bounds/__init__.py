"""Bounds: Theorem 3.1 at a layer, alignment of pairs, Theorem 3.2 along chains, certificates of whole networks."""

from brittle.bounds.chain import ChainBounds, chain_bounds
from brittle.bounds.layer import layer_bound
from brittle.bounds.layer_table import measure_layer
from brittle.bounds.lipschitz.network import NetworkBound, lipschitz_upper_bound, network_bounds
from brittle.bounds.pairs.dense import Alignment, alignment
from brittle.bounds.radius import adversarial_loss_bound, certified_accuracy, certified_radii
from brittle.bounds.sensitivity import jacobian_norms, largest_ratio

__all__ = [
    "Alignment",
    "ChainBounds",
    "NetworkBound",
    "adversarial_loss_bound",
    "alignment",
    "certified_accuracy",
    "certified_radii",
    "chain_bounds",
    "jacobian_norms",
    "largest_ratio",
    "layer_bound",
    "lipschitz_upper_bound",
    "measure_layer",
    "network_bounds",
]
