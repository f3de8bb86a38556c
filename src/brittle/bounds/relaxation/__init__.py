"""Certificates of single samples by linear relaxation."""
