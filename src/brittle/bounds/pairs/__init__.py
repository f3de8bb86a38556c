"""Bounds of two layers with an activation between them."""
