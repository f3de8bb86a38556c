"""How an evaluation is carried out: nothing here changes a verdict, apart from rounding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from brittle.errors import InputError
from brittle.progress import Progress


@dataclass(frozen=True)
class Execution:
    """How the work is carried out; verdicts do not depend on it, apart from rounding.

    Attributes:
        batch_size: Samples at once; halved when memory runs out.
        certify: Prove samples robust: those proven at the budget are left out of the attacks, as long as that saves
            time, and an audit searches for certified radii; without it no relaxation is tried.
        proof_passes: Passes of the network that an audit's certified radii may cost, for each sample of the data (at
            least a few seconds' worth on a small network). Radii of more samples are searched for, and harder, the more
            there are; a quarter of what the preset ``fast`` costs a survivor by default. inf: of all samples.
        compiled: Attack a compiled copy of the network (``torch.compile``); for long runs on a GPU.
        devices: Devices that share the work, each with a copy of the network; none: the network's own.
        ray_workers: Tasks at once on a Ray cluster (extra ``cluster``); 0 for none.
        resume: A folder that keeps what is done; the same call resumes where it stopped. All machines of a cluster have
            to see it.
        progress: Called as the work goes on.

    Raises:
        InputError: A number is out of range, devices are no sequence, or they and Ray workers are asked for at once.
    """

    batch_size: int = 256
    certify: bool = True
    proof_passes: float = 60.0
    compiled: bool = False
    devices: tuple[str, ...] = ()
    ray_workers: int = 0
    resume: str | Path | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Check the numbers and the names."""
        if self.batch_size < 1:
            raise InputError(f"batch_size: expected at least 1; got {self.batch_size}")
        if not self.proof_passes >= 0:
            raise InputError(f"proof_passes: expected a number of at least 0; got {self.proof_passes}")
        if isinstance(self.devices, str):
            raise InputError(f"devices: expected names of devices, as ({self.devices!r},); got {self.devices!r}")
        if self.ray_workers < 0 or (self.ray_workers and self.devices):
            raise InputError(f"ray_workers: expected at least 0, and 0 with devices; got {self.ray_workers}")

    @property
    def in_pieces(self) -> bool:
        """Whether the data are cut into small pieces, to be shared or kept."""
        return bool(self.devices) or self.ray_workers > 0 or self.resume is not None
