"""The random numbers of a training: every use has a stream of the recipe's seed, and no two share one.

Streams of generators are told apart by a number (:func:`brittle.random_streams.generator`); the numbers of one sample
(:func:`brittle.random_streams.uniform`) by the block of its own stream.
"""

from __future__ import annotations

SAMPLE_KEYS = 2
"""Draws every training sample's own stream."""
VALIDATION_SPLIT = 3
"""Draws which samples are held out."""
VALIDATION_KEYS = 4
"""Draws every validation sample's own stream."""


def order_stream(epoch: int) -> int:
    """Draws the order of the samples in an epoch (from 0)."""
    return (epoch << 8) + 1


def step_stream(epoch: int, step: int) -> int:
    """Seeds what a step of an epoch draws, as dropout; both from 0."""
    return (1 << 40) + (epoch << 24) + step


def augmentation_block(epoch: int) -> int:
    """Of a sample's own stream: its crop and flip in an epoch."""
    return epoch << 3


def attack_block(epoch: int) -> int:
    """Of a sample's own stream: where its attack starts in an epoch."""
    return (epoch << 3) + 7
