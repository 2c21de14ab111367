"""A real Dask scheduler and two real workers, as processes on this machine: every result, equal to the serial ones."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from torch import nn

from companion import executor, grid
from companion.parameters import BadInput
from helpers import Dataset, Net, Problem, sweep
from helpers.sweep import cluster
from helpers.sweep import settings as of_runs
from helpers.sweep.store import Store

distributed = pytest.importorskip("distributed", reason="the extra 'cluster' is not installed")
pytestmark = pytest.mark.slow
DASK = [str(Path(sys.executable).parent / "dask")]
SETTINGS = sweep.grid({"dataset": "digits", "model": "small_mlp", "epochs": 20, "lr": 0.1}, batch_size=[4, 5, 6, 7])


def _end(process):
    below = [*psutil.Process(process.pid).children(recursive=True), process]
    for one in below:
        one.kill()
    process.wait()


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory):
    """The address of a running scheduler."""
    log = tmp_path_factory.mktemp("scheduler") / "log"
    arguments = ["scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    with log.open("w") as stream:
        process = subprocess.Popen([*DASK, *arguments], stdout=stream, stderr=stream)
    end, found = time.monotonic() + 60, None
    while found is None:
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)
        found = re.search(r"Scheduler at:\s+(tcp://127\.0\.0\.1:\d+)", log.read_text())
    yield found[1]
    _end(process)


def start_worker(address, folder, threads=1):
    environment = {**os.environ, "COMPANION_DATA": str(folder / "data")}
    environment.pop("COMPANION_CLUSTER", None)
    return subprocess.Popen(
        [*DASK, "worker", address, "--nworkers", "1", "--nthreads", str(threads), "--no-dashboard", "--local-directory",
         str(folder)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture
def workers(scheduler, tmp_path_factory, monkeypatch):
    """Two workers, which know nothing of this process's store and data."""
    started = [start_worker(scheduler, tmp_path_factory.mktemp(f"worker{i}")) for i in range(2)]
    client = distributed.Client(scheduler, set_as_default=False)
    client.wait_for_workers(2, timeout=60)
    client.close()
    monkeypatch.setenv("COMPANION_CLUSTER", scheduler)
    yield started
    for process in started:
        if process.poll() is None:
            _end(process)
    end = time.monotonic() + 30
    with distributed.Client(scheduler, set_as_default=False) as client:
        while client.scheduler_info()["workers"] and time.monotonic() < end:
            time.sleep(0.1)
    for cached in (cluster.connect, cluster.device_type, cluster._provide):
        cached.cache_clear()


def serial(tmp_path, monkeypatch, settings=SETTINGS, seeds=3):
    with monkeypatch.context() as patch:
        patch.delenv("COMPANION_CLUSTER")
        return sweep.run(settings, seeds, jobs=1, store=Store(tmp_path / "serial")).drop(columns="seconds")


def test_a_sweep_on_two_workers_equals_the_serial_one(workers, tmp_path, monkeypatch):
    settings = [{**one, "epochs": 2} for one in SETTINGS]
    far = sweep.run(settings, 3).drop(columns="seconds")
    pd.testing.assert_frame_equal(far, serial(tmp_path, monkeypatch, settings))


def test_a_problem_of_ones_own_trains_on_workers_that_lack_its_code(workers, tmp_path, monkeypatch):
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 2)

        def forward(self, x):
            return nn.functional.dropout(self.layer(x), 0.2, self.training)

    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    problem = Problem(Dataset.of(x, (x.sum(1) > 0).long(), device="cpu"), Net(Mine))
    settings = sweep.grid({"problem": problem, "batch_size": 10, "epochs": 2}, lr=[0.1, 0.2])
    far = sweep.run(settings, 2).drop(columns="seconds")
    pd.testing.assert_frame_equal(far, serial(tmp_path, monkeypatch, settings, 2))


def test_a_worker_killed_in_the_middle_costs_no_result(workers, tmp_path, monkeypatch, store_folder):
    killed = threading.Event()

    def kill_one():
        while len(Store().all_keys()) < 3:  # in the middle: some are done, some are under way
            time.sleep(0.02)
        _end(workers[0])  # with its nanny, which would start another
        killed.set()

    threading.Thread(target=kill_one, daemon=True).start()
    far = sweep.run(SETTINGS, 3).drop(columns="seconds")
    assert killed.wait(10)
    pd.testing.assert_frame_equal(far, serial(tmp_path, monkeypatch))
    assert len(Store().all_keys()) == 12


def test_a_rerun_on_a_cluster_equals_the_serial_one(workers, scheduler, tmp_path, monkeypatch):
    def moves():
        with distributed.Client(scheduler, set_as_default=False) as client:
            return client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.transition_counter)

    before = moves()
    request = grid.Request("00", [{"lr": [0.05, 0.1]}], "quick", given={"seeds": 1, "epochs": 2}, cluster=scheduler)
    assert grid.rerun(request, out=tmp_path / "far") == 0
    assert moves() > before  # it was the workers that trained
    monkeypatch.delenv("COMPANION_CLUSTER")
    monkeypatch.setenv("COMPANION_STORE", str(tmp_path / "another"))
    near = grid.Request("00", [{"lr": [0.05, 0.1]}], "quick", given={"seeds": 1, "epochs": 2})
    assert grid.rerun(near, out=tmp_path / "near") == 0
    tables = [pd.read_parquet(tmp_path / name / "results.parquet").drop(columns="seconds") for name in ("far", "near")]
    pd.testing.assert_frame_equal(*tables)


def test_workers_get_the_dataset_from_the_runner(workers, mnist_root, tmp_path, monkeypatch):
    settings = [{"dataset": "mnist", "num_train": 200, "model": "small_mlp", "epochs": 1, "lr": 0.1}]
    far = sweep.run(settings, 2).drop(columns="seconds")
    pd.testing.assert_frame_equal(far, serial(tmp_path, monkeypatch, settings, 2))


def test_workers_with_several_threads_are_refused(scheduler, tmp_path):
    process = start_worker(scheduler, tmp_path, threads=2)
    try:
        with pytest.raises(cluster.ClusterError, match=r"workers with \[2\] threads; .*--nthreads 1"):
            cluster.connect(scheduler)
    finally:
        _end(process)


def test_another_version_of_the_numerics_is_refused(workers, monkeypatch):
    monkeypatch.setattr(of_runs, "NUMERICS", of_runs.NUMERICS + 1)
    with pytest.raises(RuntimeError, match=r"this worker has .* where the runner expects .*; install the same on both"):
        sweep.run(SETTINGS[:1], 1)


@pytest.mark.parametrize(("address", "message"), [
    ("tcp://127.0.0.1:9", "no Dask scheduler answers at 'tcp://127.0.0.1:9'"),
    ("garbage://x", "is not a scheduler's address"),
    ("", "is not a scheduler's address"),
    ("; rm -rf /", "is not a scheduler's address"),
])  # fmt: skip
def test_an_address_without_a_scheduler_is_refused_in_one_line(address, message, monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 1.0)
    with pytest.raises(BadInput, match=re.escape(message)) as raised:
        executor.environment_of([], 1, address, None)
    assert len(str(raised.value).splitlines()) == 1
