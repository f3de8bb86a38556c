"""What a network costs: numbers kept, multiplications, bytes, time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NetworkSize:
    """What a network holds and computes.

    Attributes:
        parameters: Numbers that are trained; one that several modules share counts once.
        macs: Multiply-accumulates that its layers take for one sample; None where they were not counted.
        bytes: Of all tensors of its state, as a file of weights holds them; names and shapes come on top.
    """

    parameters: int
    macs: int | None
    bytes: int


@dataclass(frozen=True)
class Latency:
    """How long one pass over a batch took on one machine: an estimate, good for comparisons within one run.

    Attributes:
        network: Its name among those that were measured together.
        batch_size: Samples a pass.
        median: Milliseconds; half of the passes took no longer.
        p90: Milliseconds; nine tenths of the passes took no longer.
        rounds: Passes that were timed.
        device: The processor or accelerator, by name.
        threads: CPU threads that PyTorch used.
        processor: Median of the processor time of a pass in milliseconds, over all threads, which does not count the
            work of other programs. None on an accelerator.
    """

    network: str
    batch_size: int
    median: float
    p90: float
    rounds: int
    device: str
    threads: int
    processor: float | None = None
