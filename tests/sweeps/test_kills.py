"""Nothing is lost and nothing that landed is done again, whichever process is killed and however many share."""

import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from subprocess import PIPE

import pytest

from brittle.sweeps import Store, run_sweep
from brittle.sweeps.drivers import Watch, machine, process
from brittle.sweeps.work import Done
from helpers.grids import calls, gone, grid, in_this_process
from helpers.kills import at_every_operation
from helpers.processes import finish, group_lives, start, wait_until

DRIVE = """
import sys
from functools import partial
from pathlib import Path
from brittle.sweeps import Store, on_processes, run_sweep
from helpers.grids import grid
outcome = run_sweep(grid(Path(sys.argv[1])), Store(sys.argv[2]), partial(on_processes, workers=int(sys.argv[3])))
print(len(outcome.done), len(outcome.skipped), len(outcome.failed))
"""
TEXT = {"stdout": PIPE, "stderr": PIPE, "text": True}


@pytest.fixture(autouse=True)
def look_again_at_once(monkeypatch):
    monkeypatch.setattr("brittle.sweeps.run.LOOK_AGAIN", 0.0)


@pytest.fixture
def effects(tmp_path):
    return tmp_path / "effects"


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "out"))


@pytest.fixture(params=["folder", "memory"])
def any_store(request, tmp_path):
    return Store(str(tmp_path / "out") if request.param == "folder" else f"memory://{tmp_path.name}")


def landed(store):
    return sum(state.landed for state in store.states().values())


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_is_killed_loses_the_job_in_hand_alone(effects, store, blow):
    jobs = grid(effects)
    (effects / "hold-1-1").touch()
    with start("-c", DRIVE, effects, store.url, 2, **TEXT) as driver:
        wait_until(lambda: calls(effects, jobs[3]) and landed(store) == 5, 120, driver)
        driver.send_signal(blow)
        finish(driver, 60)
        wait_until(lambda: gone(calls(effects, jobs[3])[0]), 60)  # its worker, in the midst of the job
        assert blow == signal.SIGKILL or not group_lives(driver)
    (effects / "hold-1-1").unlink()
    outcome = run_sweep(jobs, store, in_this_process)
    assert (outcome.done, len(outcome.skipped), outcome.failed) == ((jobs[3],), 5, ())
    assert [len(calls(effects, job)) for job in jobs] == [1, 1, 1, 2, 1, 1]


def test_two_drivers_share_the_jobs_and_do_none_twice(effects, store):
    jobs = grid(effects)
    holds = [effects / "hold-0-0", effects / "hold-0-1"]
    for hold in holds:
        hold.touch()
    with (
        start("-c", DRIVE, effects, store.url, 1, **TEXT) as one,
        start("-c", DRIVE, effects, store.url, 1, **TEXT) as two,
    ):
        wait_until(lambda: calls(effects, jobs[0]) and calls(effects, jobs[1]), 120, one)
        for hold in holds:
            hold.unlink()
        counts = [[int(count) for count in finish(driver, 120).stdout.split()] for driver in (one, two)]
    assert all(done >= 1 and done + skipped == 6 and not failed for done, skipped, failed in counts)
    assert counts[0][0] + counts[1][0] == 6
    assert [len(calls(effects, job)) for job in jobs] == [1] * 6


def test_many_drivers_of_one_process_do_none_twice(effects, any_store):
    jobs = grid(effects, 4, 4)
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda _: run_sweep(jobs, any_store, in_this_process), range(4)))
    assert sum(len(outcome.done) for outcome in outcomes) == 16
    assert all(len(outcome.done) + len(outcome.skipped) == 16 for outcome in outcomes)
    assert [len(calls(effects, job)) for job in jobs] == [1] * 16


def test_of_many_that_create_a_file_one_is_told_so(any_store):
    barrier = threading.Barrier(8)

    def create(number):
        barrier.wait()
        return [any_store.create(f"jobs/{name}/try-1.json", {"driver": number}) for name in range(20)]

    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(create, range(8)))
    for name in range(20):
        (winner,) = [number for number in range(8) if created[number][name]]
        (document,) = any_store.read([f"jobs/{name}/try-1.json"]).values()
        assert document == {"driver": winner}


def test_a_driver_elsewhere_is_gone_once_it_gives_no_sign(store, monkeypatch):
    monkeypatch.setattr("brittle.sweeps.drivers.STALE", 0.0)
    watch = Watch(store)
    sign = {"over": False, "machine": "elsewhere", "process": "1 1"}
    for beats in (1, 2):
        store.put("drivers/far/beat.json", sign | {"beats": beats})
        assert watch.lives("far")
    assert not watch.lives("far")
    store.put("drivers/far/beat.json", sign | {"beats": 3})
    assert watch.lives("far")
    store.put("drivers/far/beat.json", sign | {"beats": 4, "over": True})
    assert not watch.lives("far")


@pytest.mark.skipif(not machine(), reason="the system does not tell one machine from another")
def test_a_driver_of_this_machine_lives_as_long_as_its_process(store):
    sign = {"beats": 1, "over": False, "machine": machine()}
    with start("-c", "input()", stdin=PIPE) as child:
        number, begun = process(child.pid).split()
        store.put("drivers/near/beat.json", sign | {"process": f"{number} {begun}"})
        store.put("drivers/before/beat.json", sign | {"process": f"{number} {int(begun) - 1}"})
        assert Watch(store).lives("near")
        assert not Watch(store).lives("before")  # numbers of processes are given again
        child.kill()
        wait_until(lambda: not Watch(store).lives("near"), 60)


@pytest.mark.parametrize("text", ['{"driver": "far"}', '{"dri'], ids=["of a driver that is gone", "torn"])
def test_what_a_driver_elsewhere_left_is_taken_over(effects, store, monkeypatch, text):
    monkeypatch.setattr("brittle.sweeps.drivers.STALE", 0.0)
    (job,) = grid(effects, 1, 1)
    assert store.folder is not None
    (store.folder / "jobs" / job.key).mkdir(parents=True)
    (store.folder / "jobs" / job.key / "try-1.json").write_text(text)
    assert run_sweep([job], store, in_this_process).done == (job,)
    assert store.exists(f"jobs/{job.key}/try-2.json")


def test_what_landed_is_not_replaced_by_a_driver_that_was_taken_to_be_gone(effects, any_store):
    (job,) = grid(effects, 1, 1)
    row = {"key": job.key, "settings": {}, "row": {"sum": "another's"}, "seconds": 1.0}

    def lapped(tasks):
        task = next(tasks)
        any_store.put(f"jobs/{job.key}/row.json", row)
        yield Done(task, row={"sum": 0})

    outcome = run_sweep([job], any_store, lapped)
    assert (outcome.done, outcome.skipped) == ((), (job,))
    assert any_store.documents([job]) == [row]


def test_a_kill_at_any_file_operation_leaves_every_row_whole_or_absent(effects, store, monkeypatch):
    monkeypatch.setattr("brittle.sweeps.drivers.STALE", 0.0)
    monkeypatch.setattr("brittle.sweeps.drivers.machine", lambda: "")  # for the process that is killed is this one
    jobs = grid(effects, 1, 3)
    for _ in at_every_operation(lambda: run_sweep(jobs, store, in_this_process)):
        assert store.folder is not None
        for path in store.folder.glob("jobs/*/row.json"):
            assert json.loads(path.read_text())["row"]["sum"] in (0, 1, 2)
    assert list(store.table(jobs)["sum"]) == [0, 1, 2]
