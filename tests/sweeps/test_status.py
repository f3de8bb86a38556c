"""How far a sweep is can be told from its store, while it runs and afterwards."""

import pytest

from brittle.errors import InputError
from brittle.sweeps import Store, run_sweep, stores_below, sweep_status
from brittle.sweeps.work import Done
from helpers.grids import grid, in_this_process


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "out"))


def test_jobs_are_done_running_failed_or_waiting(store, tmp_path):
    jobs = grid(tmp_path / "effects")
    seen = []

    def peeking(tasks):
        """Two jobs land, one fails, two are in hand and one waits."""
        given = [next(tasks) for _ in range(5)]
        for task in given[:2]:
            yield Done(task, row={"sum": 0}, seconds=3.0)
        yield Done(given[2], error="ValueError: no", trace="")
        seen.append(sweep_status(store))
        for task in given[3:]:
            yield Done(task, row={"sum": 0}, seconds=3.0)
        yield from (Done(task, row={"sum": 0}, seconds=3.0) for task in tasks)

    run_sweep(jobs, store, peeking)
    (status,) = seen
    assert (status.done, status.waiting, status.drivers) == (2, 1, 1)
    assert status.running == tuple(dict(job.settings) for job in jobs[3:5])
    assert status.failed == (({"a": 1, "b": 0}, "ValueError: no"),)
    assert status.seconds_left == pytest.approx(3.0 * (1 + 2 / 2) / 2)  # those in hand are halfway, by and large
    status = sweep_status(store)
    assert (status.done, status.running, status.failed, status.waiting, status.drivers) == (6, (), (), 0, 0)
    assert status.seconds_left is None


def test_jobs_in_hand_of_a_driver_that_is_gone_wait(store, tmp_path):
    jobs = grid(tmp_path / "effects")

    def interrupted(tasks):
        yield Done(next(tasks), row={"sum": 0}, seconds=1.0)
        next(tasks)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(jobs, store, interrupted)
    status = sweep_status(store)
    assert (status.done, status.running, status.failed, status.waiting, status.drivers) == (1, (), (), 5, 0)
    assert len(run_sweep(jobs, store, in_this_process).done) == 5


def test_the_jobs_are_those_that_were_asked_for_last(store, tmp_path):
    jobs = grid(tmp_path / "effects")
    run_sweep(jobs, store, in_this_process)
    run_sweep(jobs[:2], store, in_this_process)
    assert sweep_status(store).done == 2


def test_stores_are_found_in_a_folder_and_below(tmp_path):
    jobs = grid(tmp_path / "effects", 1, 1)
    for name in ("out/b", "out/a"):
        run_sweep(jobs, Store(str(tmp_path / name)), in_this_process)
    assert [store.url for store in stores_below(str(tmp_path / "out"))] == [str(tmp_path / f"out/{n}") for n in "ab"]
    assert [store.url for store in stores_below(str(tmp_path / "out/a"))] == [str(tmp_path / "out/a")]


@pytest.mark.parametrize("ask", [lambda url: sweep_status(Store(url)), stores_below])
@pytest.mark.parametrize("place", ["nowhere", "."])
def test_a_folder_without_a_sweep_is_refused(tmp_path, ask, place):
    with pytest.raises(InputError, match=r"^sweep: expected the folder of a sweep; got "):
        ask(str(tmp_path / place))


def test_a_store_of_no_known_kind_is_refused():
    with pytest.raises(InputError, match=r"^store: expected a folder or a URL; got 'nosuch://x': "):
        Store("nosuch://x").names("")
