"""Bounds: Theorem 3.1 at one layer, and Lipschitz bounds of whole networks."""

from brittle.bounds.layer import layer_bound
from brittle.bounds.network import lipschitz_upper_bound

__all__ = ["layer_bound", "lipschitz_upper_bound"]
