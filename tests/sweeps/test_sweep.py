"""Every job is done once, whatever dies; what failed is listed, and the rest goes on."""

from functools import partial

import pytest

from brittle.errors import InputError
from brittle.sweeps import Store, on_processes, run_sweep
from helpers.grids import calls, gone, grid, in_this_process

two = partial(on_processes, workers=2)
PLACES = ["folder", "memory"]


@pytest.fixture(params=PLACES)
def store(request, tmp_path):
    return Store(str(tmp_path / "out") if request.param == "folder" else f"memory://{tmp_path.name}")


def test_jobs_are_done_once_and_their_rows_make_a_table(store, tmp_path):
    jobs = grid(tmp_path / "effects")
    told = []
    outcome = run_sweep(jobs, store, in_this_process, progress=lambda *parts: told.append(parts))
    assert (outcome.done, outcome.skipped, outcome.failed) == (tuple(jobs), (), ())
    again = run_sweep([*reversed(jobs), jobs[0]], store, in_this_process)
    assert (again.done, again.skipped) == ((), tuple(reversed(jobs)))
    assert all(len(calls(tmp_path / "effects", job)) == 1 for job in jobs)
    table = store.table(jobs)
    assert list(table.columns) == ["a", "b", "sum", "seconds", "key"]
    assert (table["sum"] == table["a"] + table["b"]).all()
    assert list(table["key"]) == [job.key for job in jobs]
    assert told[0] == ("jobs", 0, 6)
    assert told[-1] == ("jobs", 6, 6)


def test_a_table_is_of_the_jobs_that_are_asked_for_or_of_all(store, tmp_path):
    jobs = grid(tmp_path / "effects")
    run_sweep(jobs[:4], store, in_this_process)
    assert list(store.table(jobs[3:])["key"]) == [jobs[3].key]
    assert set(store.table()["key"]) == {job.key for job in jobs[:4]}


def test_a_job_that_fails_is_listed_and_the_rest_is_done(store, tmp_path):
    effects = tmp_path / "effects"
    jobs = grid(effects)
    (effects / "fail-1-0").touch()
    outcome = run_sweep(jobs, store, in_this_process, retries=2)
    (failure,) = outcome.failed
    assert failure.job == jobs[2]
    assert failure.error == "ValueError: cannot add 1 and 0"
    assert "in add" in failure.trace
    assert len(outcome.done) == 5
    assert len(calls(effects, jobs[2])) == 3
    (effects / "fail-1-0").unlink()
    again = run_sweep(jobs, store, in_this_process, retries=0)
    assert (again.done, len(again.skipped), again.failed) == ((jobs[2],), 5, ())


def test_a_worker_that_is_killed_costs_its_job_one_try(tmp_path):
    effects, store = tmp_path / "effects", Store(str(tmp_path / "out"))
    jobs = grid(effects)
    (effects / "kill-1-1").touch()
    outcome = run_sweep(jobs, store, two)
    assert {job.key for job in outcome.done} == {job.key for job in jobs}
    assert [len(calls(effects, job)) for job in jobs] == [1, 1, 1, 2, 1, 1]
    (error,) = store.read([f"jobs/{jobs[3].key}/error-1.json"]).values()
    assert error["error"] == "worker: killed by SIGKILL in the midst of the job"


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning", "error::ResourceWarning")
def test_workers_are_gone_when_a_sweep_ends_or_is_interrupted(tmp_path):
    effects = tmp_path / "effects"
    jobs = grid(effects)
    (effects / "hold-2-1").touch()

    def interrupt(stage, done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(jobs, Store(str(tmp_path / "out")), two, progress=interrupt)
    assert all(gone(worker) for job in jobs for worker in calls(effects, job))
    (effects / "hold-2-1").unlink()
    assert len(run_sweep(jobs, Store(str(tmp_path / "out")), two).done) == 1
    assert all(gone(worker) for job in jobs for worker in calls(effects, job))


def test_nothing_is_started_where_all_has_landed(store, tmp_path):
    jobs = grid(tmp_path / "effects", 1, 1)
    run_sweep(jobs, store, in_this_process)

    def costly(tasks):
        pytest.fail("asked for workers")
        yield from in_this_process(tasks)

    assert run_sweep(jobs, store, costly).skipped == tuple(jobs)


def test_retries_below_zero_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"^retries: expected at least 0; got -1$"):
        run_sweep([], Store(str(tmp_path)), retries=-1)
