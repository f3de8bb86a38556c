"""Jobs of a grid, each done once: on this machine or on a Ray cluster, with a row kept for each."""

from brittle.sweeps.cluster import on_ray
from brittle.sweeps.job import Job, name_of, read_module
from brittle.sweeps.processes import on_processes
from brittle.sweeps.run import Executor, Failure, Outcome, run_sweep
from brittle.sweeps.status import SweepStatus, stores_below, sweep_status
from brittle.sweeps.store import Store

__all__ = [
    "Executor", "Failure", "Job", "Outcome", "Store", "SweepStatus", "name_of", "on_processes", "on_ray", "read_module",
    "run_sweep", "stores_below", "sweep_status",
]  # fmt: skip
