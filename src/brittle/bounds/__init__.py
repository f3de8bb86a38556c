"""Bounds: Theorem 3.1 at a layer, alignment of pairs, Theorem 3.2 along chains, certificates of whole networks."""

from brittle.bounds.alignment import Alignment
from brittle.bounds.chain import ChainBounds, chain_bounds
from brittle.bounds.layer import layer_bound
from brittle.bounds.network import NetworkBound, lipschitz_upper_bound, network_bounds
from brittle.bounds.radius import adversarial_loss_bound, certified_accuracy, certified_radii

__all__ = [
    "Alignment",
    "ChainBounds",
    "NetworkBound",
    "adversarial_loss_bound",
    "certified_accuracy",
    "certified_radii",
    "chain_bounds",
    "layer_bound",
    "lipschitz_upper_bound",
    "network_bounds",
]
