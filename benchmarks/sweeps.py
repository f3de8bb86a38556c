"""What a job costs beside its work: 100 short jobs on processes of this machine and on Ray, with as many workers.

    python benchmarks/sweeps.py

A job sleeps, so that nothing but what surrounds it is measured, whatever else the machine does. Beside the seconds for
all of them stands what each cost beyond the sleep, and apart from it the start: until the first job is done.
Last, what it takes to find that all is done.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

from brittle.sweeps import Executor, Job, Store, on_processes, on_ray, run_sweep


def nap(*, number: int, seconds: float) -> dict[str, object]:
    """A job that takes that long and needs no CPU."""
    time.sleep(seconds)
    return {"number": number}


def measure(executor: Executor, jobs: int, seconds: float, workers: int) -> str:
    """Start, whole time, overhead a job, and the time of a sweep that has nothing to do."""
    told: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        grid = [Job(f"{Path(__file__)}:nap", {"number": number, "seconds": seconds}) for number in range(jobs)]
        begun = time.perf_counter()
        outcome = run_sweep(
            grid,
            Store(folder),
            partial(executor, workers=workers),
            progress=lambda _, done, __: told.append((time.perf_counter(), done)),
        )
        assert len(outcome.done) == jobs
        ended = time.perf_counter()
        assert len(run_sweep(grid, Store(folder)).skipped) == jobs
        again = time.perf_counter() - ended
    first, last = next(at for at, done in told if done), told[-1][0]
    # After the first job is done, its worker and the others have all the rest to do.
    overhead = (last - first) * workers / (jobs - 1) - seconds
    return f"{first - begun:10.2f} {last - begun:10.2f} {1000 * overhead:20.1f} {again:10.2f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=0.1)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    print(f"{'':10} {'start (s)':>10} {'all (s)':>10} {'overhead (ms a job)':>20} {'again (s)':>10}")
    for name, executor in (("processes", on_processes), ("ray", on_ray)):
        print(f"{name:10} {measure(executor, arguments.jobs, arguments.seconds, arguments.workers)}", flush=True)


if __name__ == "__main__":
    main()
