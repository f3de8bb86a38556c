"""Sweeps whose rows are kept, or whose jobs are done, elsewhere: an object store, a Ray cluster of two nodes."""

import re
import sys
import threading
from functools import partial

import pytest

from brittle.errors import InputError
from brittle.sweeps import Store, on_ray, run_sweep, sweep_status
from helpers import grids
from helpers.grids import calls, gone, grid, in_this_process
from helpers.processes import wait_until


@pytest.fixture
def object_store(monkeypatch):
    server = pytest.importorskip("moto.server", reason="moto, a server that speaks S3, is not installed")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    serving = server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    serving.start()
    host, port = serving.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield Store("s3://bucket/sweeps/one")
    s3fs.S3FileSystem.clear_instance_cache()
    serving.stop()


def test_an_object_store_keeps_rows_and_tells_drivers_apart(object_store, tmp_path):
    effects = tmp_path / "effects"
    jobs = grid(effects, 2, 2)
    (effects / "fail-1-0").touch()
    inner = []

    def beside(tasks):
        """The first job is in hand here when another driver begins."""
        first = next(tasks)
        inner.append(run_sweep(jobs[1:], object_store, in_this_process))
        yield from in_this_process(iter([first]))
        yield from in_this_process(tasks)

    outer = run_sweep(jobs, object_store, beside)
    assert [job.key for job in inner[0].done] == [jobs[1].key, jobs[3].key]
    assert outer.done == (jobs[0],)
    assert [failure.error for failure in outer.failed] == ["ValueError: cannot add 1 and 0"]
    assert not object_store.create(f"jobs/{jobs[0].key}/row.json", {})
    assert list(object_store.table(jobs)["sum"]) == [0, 1, 2]
    assert [len(calls(effects, job)) for job in (jobs[0], jobs[1], jobs[3])] == [1, 1, 1]
    status = sweep_status(object_store)  # of the driver that began last: all jobs but the first
    assert (status.done, status.running, status.waiting, status.drivers) == (2, (), 0, 0)
    assert status.failed == (({"a": 1, "b": 0}, "ValueError: cannot add 1 and 0"),)


@pytest.fixture
def cluster():
    pytest.importorskip("ray", reason="Ray, the extra cluster, is not installed")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
def test_a_ray_node_and_a_ray_worker_that_are_killed_cost_their_jobs_one_try(cluster, tmp_path):
    effects, store = tmp_path / "effects", Store(str(tmp_path / "out"))
    second = cluster.add_node(num_cpus=1)
    jobs = grid(effects, 3, 2, f"{grids.__file__}:add")  # the file travels with the job
    for name in ("hold-0-0", "hold-0-1", "kill-1-1", "fail-2-0"):
        (effects / name).touch()

    def kill_the_node():
        wait_until(lambda: calls(effects, jobs[0]) and calls(effects, jobs[1]), 120)  # one on each node
        cluster.remove_node(second, allow_graceful=False)
        workers = [calls(effects, job)[0] for job in jobs[:2]]
        wait_until(lambda: any(gone(worker) for worker in workers), 60)
        for name in ("hold-0-0", "hold-0-1"):
            (effects / name).unlink()

    killer = threading.Thread(target=kill_the_node)
    killer.start()
    outcome = run_sweep(jobs, store, partial(on_ray, address=cluster.address))
    killer.join()
    assert {job.key for job in outcome.done} == {job.key for job in jobs} - {jobs[4].key}
    assert [failure.error for failure in outcome.failed] == ["ValueError: cannot add 2 and 0"]
    counts = [len(calls(effects, job)) for job in jobs]
    assert sorted(counts[:2]) == [1, 2]
    assert counts[2:] == [1, 2, 2, 1]
    lost = [job for job, count in zip(jobs[:2], counts[:2], strict=True) if count == 2]
    for job in (*lost, jobs[3]):
        (error,) = store.read([f"jobs/{job.key}/error-1.json"]).values()
        assert re.match("worker: .*(died|dead|unavailable)", error["error"])
    again = run_sweep(jobs[:4], store, partial(on_ray, address=cluster.address))
    assert (again.done, len(again.skipped)) == ((), 4)


def test_a_cluster_that_is_not_there_is_named(tmp_path):
    pytest.importorskip("ray", reason="Ray, the extra cluster, is not installed")
    with pytest.raises(InputError, match=r"^ray: expected the address of a cluster; got auto: "):
        run_sweep(grid(tmp_path / "effects"), Store(str(tmp_path / "out")), partial(on_ray, address="auto"))


@pytest.mark.parametrize("asked", [{"workers": 0}, {"cpus": 0.0}, {"cpus": -1.0}, {"gpus": float("nan")}])
def test_workers_of_nothing_are_refused(asked, tmp_path):
    pytest.importorskip("ray", reason="Ray, the extra cluster, is not installed")
    with pytest.raises(InputError, match=r"^ray: expected workers of some CPUs or GPUs, at least one; got "):
        run_sweep(grid(tmp_path / "effects"), Store(str(tmp_path / "out")), partial(on_ray, **asked))


def test_ray_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"^ray: .*brittle\[cluster\]"):
        run_sweep(grid(tmp_path / "effects"), Store(str(tmp_path / "out")), on_ray)
