"""Certified Lipschitz bounds of whole networks."""
