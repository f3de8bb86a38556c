"""Readers of the data sets' standard on-disk layouts, one layout a file; :func:`brittle.load_data` calls them.

Each takes where the files lie and which examples are wanted, and returns them as stored, unscaled.
"""
