"""Jobs of a grid, each done once: on this machine or on a Ray cluster, with a row kept for each."""

from brittle.sweeps.job import Job, name_of, read_module
from brittle.sweeps.processes import on_processes
from brittle.sweeps.run import Failure, Outcome, run_sweep
from brittle.sweeps.store import Store

__all__ = ["Failure", "Job", "Outcome", "Store", "name_of", "on_processes", "read_module", "run_sweep"]
