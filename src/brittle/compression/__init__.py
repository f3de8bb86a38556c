"""Weights made smaller. Knows no attack and no training."""

from brittle.compression.factorise import factorised, merged

__all__ = ["factorised", "merged"]
