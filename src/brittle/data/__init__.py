"""Labelled inputs: loaded, checked, and read in batches."""

from brittle.data.load import Data, load_data

__all__ = ["Data", "load_data"]
