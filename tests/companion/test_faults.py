"""Faults, really done, some at random moments by a printed seed: nothing is lost, nothing is half-written."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import nbformat
import pandas as pd
import psutil
import pytest

from companion import grid
from helpers import sweep
from helpers.sweep import jobs
from helpers.sweep.store import Store, StoreError, key_of

pytestmark = pytest.mark.slow
COMPANION = [sys.executable, "-c", "from companion.cli import main; main(prog_name='companion')"]

# Small, and long enough to be hit in the middle: 6 trainings of about a third of a second each.
TRAINING = """
from helpers import sweep
settings = sweep.grid(dict(dataset="digits", model="small_mlp", epochs=20, lr=lr), batch_size=[4, 5, 6])
frame = sweep.run(settings, range(seed, seed + 2), jobs=workers)
"""
TRAINED = {"dataset": "digits", "model": "small_mlp", "epochs": 20}
PARAMETERS = 'lr = 0.1\nseed = 0\nworkers = 2\nprofile = "none"\noutput_dir = "."\n'


def notebook(folder, name, *cells):
    kernel = {"name": "python3", "display_name": "", "language": "python"}
    made = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    made.cells = [
        nbformat.v4.new_markdown_cell(f"# {name}"),
        nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        *(nbformat.v4.new_code_cell(cell) for cell in cells),
    ]
    nbformat.write(made, folder / f"{name}.ipynb")


KEEP = "from pathlib import Path\n(Path(output_dir) / 'tables').mkdir()\n"
KEEP += "frame.drop(columns='seconds').astype({'betas': str}).to_parquet(Path(output_dir) / 'tables/01_frame.parquet')"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder of notebooks in which ``companion`` finds 01_trains and 02_fine, and writes what it leaves."""
    folder = tmp_path / "project" / "notebooks"
    folder.mkdir(parents=True)
    (folder / "profiles.yml").write_text("quick: {}\nlaptop: {}\n")
    notebook(folder, "01_trains", TRAINING, KEEP)
    notebook(folder, "02_fine", "print(lr)")
    code = "from companion import cli, grid, run\nfrom pathlib import Path\n"
    code += f"folder = Path({str(folder)!r})\n"
    code += "run.run.__kwdefaults__['folder'] = grid.rerun.__kwdefaults__['folder'] = folder\n"
    code += "cli.main(prog_name='companion')"
    monkeypatch.setattr(sys.modules[__name__], "COMPANION", [sys.executable, "-c", code])
    monkeypatch.setenv("COMPANION_JOBS", "2")
    monkeypatch.setattr(jobs, "_WORTH_WORKERS", 0.0)
    return folder


@pytest.fixture(params=[0.5, *(pytest.param(None, marks=pytest.mark.soak, id=f"random{k}") for k in range(4))])
def moment(request):
    """Seconds into the work at which the fault happens; a random one by a seed that is printed and can be set."""
    if request.param:
        return request.param
    seed = int(os.environ.get("COMPANION_FAULT_SEED", random.randrange(10**6)))
    print(f"COMPANION_FAULT_SEED={seed}")
    return random.Random(seed).uniform(0.1, 3.0)


def start(*arguments, **options):
    return subprocess.Popen(
        [*COMPANION, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def companion(*arguments, code=0, **options):
    """Run the command to its end, within five minutes; what it said."""
    with start(*arguments, **options) as process:
        said, _ = process.communicate(timeout=300)
    assert process.returncode == code, said
    assert "Traceback" not in said, said
    return said


def kernels(process):
    """The processes of a runner that run a kernel."""
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
        return [p for p in below if _command(p, "ipykernel_launcher")]
    return []


def workers(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return [p for p in psutil.Process(process.pid).children(recursive=True) if _command(p, "loky")]
    return []


def _command(process, word):
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return any(word in part for part in process.cmdline())
    return False


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def entries(folder):
    """The entries of a store, and when each was written: what is done twice is newer."""
    return {key: (folder / key).stat().st_mtime_ns for key in Store(folder).all_keys()}


def assert_whole(folder):
    """Every entry is there whole, no claim is held, and nothing is half-written that ``clean`` would not find."""
    store = Store(folder)
    for key in store.all_keys():
        assert store.has(key) and len(store.frame(key))
    assert not (folder / "damaged").exists()
    for claim in (folder / ".claims").glob("*"):
        lock = store.claim(claim.name)
        assert lock is not None, "a stale lock"
        lock.release()


def stopping_time():
    """The 5 s that stopping may take, on a machine that others keep busy in proportion more."""
    return 5 * max(1.0, psutil.getloadavg()[0] / psutil.cpu_count())


def all_ended(below):
    _, alive = psutil.wait_procs(below, timeout=10)
    return not alive


def test_kill_9_of_the_runner(project, tmp_path, store_folder, moment):
    out = tmp_path / "out"
    runner = start("rerun", "01", "--grid", "lr=0.1", "--profile", "quick", "--dataset", "digits", "--out", out)
    until(lambda: kernels(runner))
    time.sleep(moment)
    below = psutil.Process(runner.pid).children(recursive=True)
    runner.kill()
    runner.communicate()
    assert all_ended(below)
    before = entries(store_folder)
    said = companion("rerun", "--resume", "--out", out)
    assert "1 of 1 ok" in said
    assert {key: time for key, time in entries(store_folder).items() if key in before} == before
    assert_whole(store_folder)
    assert_results_equal_serial(out, tmp_path)


def assert_results_equal_serial(out, tmp_path):
    results = pd.read_parquet(out / "results.parquet")
    for lr, one in results.groupby("grid_lr"):
        grid = sweep.grid({**TRAINED, "lr": lr}, batch_size=[4, 5, 6])
        alone = sweep.run(grid, 2, jobs=1, store=Store(tmp_path / "alone")).drop(columns="seconds")
        columns = ["seed", "batch_size", "steps", "test_accuracy", "train_loss", "weight_norm"]
        pd.testing.assert_frame_equal(one[columns].reset_index(drop=True), alone[columns])


def test_kill_9_of_a_kernel(project, tmp_path, store_folder, moment):
    out = tmp_path / "out"
    points = ["--grid", "lr=0.1,0.2", "-p", "workers=1"]
    runner = start("rerun", "01", *points, "--profile", "quick", "--dataset", "digits", "--out", out)
    until(lambda: store_folder.exists() and entries(store_folder))
    time.sleep(moment / 3)
    struck = kernels(runner)
    if struck:
        struck[0].kill()
    said, _ = runner.communicate(timeout=300)
    assert runner.returncode == (1 if struck else 0) and "Traceback" not in said, said
    if struck:
        assert "1 of 2 ok" in said and "DeadKernelError" in said
    before = entries(store_folder)
    assert "2 of 2 ok" in companion("rerun", "--resume", "--out", out)
    assert {key: time for key, time in entries(store_folder).items() if key in before} == before
    assert_whole(store_folder)
    assert_results_equal_serial(out, tmp_path)


def test_kill_9_of_a_worker(project, tmp_path, store_folder, moment):
    out = tmp_path / "out"
    runner = start("rerun", "01", "--grid", "lr=0.1", "--profile", "quick", "--dataset", "digits", "--out", out)
    until(lambda: workers(runner))
    time.sleep(moment / 3)
    struck = workers(runner)
    if struck:
        struck[-1].kill()
    said, _ = runner.communicate(timeout=300)
    assert "Traceback" not in said, said
    before = entries(store_folder)
    assert "1 of 1 ok" in companion("rerun", "--resume", "--out", out)
    assert {key: time for key, time in entries(store_folder).items() if key in before} == before
    assert_whole(store_folder)
    assert_results_equal_serial(out, tmp_path)


SOAK = [pytest.param(name, marks=pytest.mark.soak) for name in ("SIGTERM", "SIGHUP")]  # handled as SIGINT is


@pytest.mark.parametrize("name", ["SIGINT", *SOAK])
def test_ctrl_c_a_termination_and_a_closed_terminal_stop_it_within_5_seconds(
    name, project, tmp_path, store_folder, moment
):
    number = getattr(signal, name)
    out = tmp_path / "out"
    points = ["--grid", "lr=0.1", "-p", "workers=1"]
    runner = start("rerun", "01", *points, "--profile", "quick", "--dataset", "digits", "--out", out)
    until(lambda: kernels(runner))
    time.sleep(moment)
    below = psutil.Process(runner.pid).children(recursive=True)
    started = time.monotonic()
    runner.send_signal(number)
    said, _ = runner.communicate(timeout=60)
    assert time.monotonic() - started < stopping_time()
    assert runner.returncode == 130 and "Traceback" not in said, said
    assert all_ended(below)
    command = re.search(r"^companion (rerun --resume --out .+)$", said, re.MULTILINE)[1]
    assert "kept" in said and "1 of 1 ok" in companion(*command.split())
    assert_whole(store_folder)


def test_ctrl_c_of_a_run_stops_within_5_seconds_too(project, tmp_path, store_folder, moment):
    out = tmp_path / "out"
    runner = start("run", "--profile", "quick", "--dataset", "digits", "--out", out)
    until(lambda: kernels(runner))
    time.sleep(moment)
    below = psutil.Process(runner.pid).children(recursive=True)
    started = time.monotonic()
    runner.send_signal(signal.SIGINT)
    said, _ = runner.communicate(timeout=60)
    assert time.monotonic() - started < stopping_time()
    assert runner.returncode == 130 and "every finished training are kept" in said and "Traceback" not in said, said
    assert all_ended(below)
    record = json.loads((out / "run.json").read_text())
    assert record["notebooks"][0]["status"] in ("stopped", "ok") and (out / "index.html").exists()
    assert_whole(store_folder)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few megabytes; the test is skipped where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


SETTINGS = {"dataset": "digits", "model": "small_mlp", "epochs": 1, "lr": 0.1}


def fill(folder):
    with contextlib.suppress(OSError), (folder / "ballast").open("wb") as stream:
        while True:
            stream.write(b"x" * 4096)
            stream.flush()


def test_a_full_disk_under_the_store(small_disk, project, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_STORE", str(small_disk / "store"))
    first = sweep.run([SETTINGS], 1)
    before = entries(small_disk / "store")
    fill(small_disk)
    with pytest.raises(StoreError, match="No space left on device; earlier results are intact; make room"):
        sweep.run([SETTINGS | {"lr": 0.2}], 1, snapshots=[1])
    said = companion(
        "run", "--only", "01", "--profile", "quick", "--dataset", "digits", "--out", tmp_path / "out", code=1
    )
    assert "No space left on device; earlier results are intact" in said
    assert entries(small_disk / "store") == before
    assert list((small_disk / "store").glob(".new-*")) == []
    pd.testing.assert_frame_equal(sweep.run([SETTINGS], 1), first)
    (small_disk / "ballast").unlink()
    sweep.run([SETTINGS | {"lr": 0.2}], 1, snapshots=[1])
    assert_whole(small_disk / "store")


def test_a_full_disk_under_the_output(small_disk, project):
    out = small_disk / "out"
    out.mkdir()
    fill(small_disk)
    said = companion("rerun", "02", "--grid", "lr=0.1,0.2", "--profile", "quick", "--out", out, code=1)
    assert "No space left on device" in said and len(said.strip().splitlines()) < 12
    (small_disk / "ballast").unlink()
    for left in out.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    assert "2 of 2 ok" in companion("rerun", "02", "--grid", "lr=0.1,0.2", "--profile", "quick", "--out", out)


def test_a_store_that_turns_read_only(small_disk, project, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_STORE", str(small_disk / "store"))
    first = sweep.run([SETTINGS], 1)
    before = entries(small_disk / "store")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    pd.testing.assert_frame_equal(sweep.run([SETTINGS], 1), first)
    with pytest.raises(StoreError, match="Read-only file system; earlier results are intact; make room"):
        sweep.run([SETTINGS | {"lr": 0.2}], 1)
    said = companion("run", "--only", "02", "--profile", "quick", "--out", small_disk / "out", code=2)
    assert "cannot write into" in said and "Read-only" in said
    said = companion(
        "run", "--only", "01", "--profile", "quick", "--dataset", "digits", "--out", tmp_path / "out", code=1
    )
    assert "Read-only file system; earlier results are intact" in said
    assert entries(small_disk / "store") == before


def truncated(content):
    return content[: len(content) // 2]


def emptied(content):
    return b""


def flipped(content):
    place = random.Random(len(content)).randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("damage", [truncated, emptied, flipped])
@pytest.mark.parametrize("file", ["frame.parquet", "arrays.npz", "entry.json"])
def test_a_damaged_result_file(store_folder, file, damage):
    first = sweep.run([SETTINGS], 2, snapshots=[1])
    key = first["run"].iloc[0]
    path = store_folder / key / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=rf"damaged result set aside in .*{key}.*; it is computed again"):
        again = sweep.run([SETTINGS], 2, snapshots=[1])
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), first.drop(columns="seconds"))
    assert [one.name.split("-")[0] for one in (store_folder / "damaged").iterdir()] == [key]
    assert Store().has(key, ["1/weights/head.weight"])


def test_two_runners_share_one_store(project, tmp_path, store_folder):
    arguments = ["--profile", "quick", "--dataset", "digits", "-p", "workers=1"]
    both = [start("run", "--only", "01", *arguments, "--out", tmp_path / name) for name in ("one", "two")]
    said = [runner.communicate(timeout=300)[0] for runner in both]
    assert [runner.returncode for runner in both] == [0, 0], said
    assert len(entries(store_folder)) == 6
    tables = [pd.read_parquet(tmp_path / name / "tables/01_frame.parquet") for name in ("one", "two")]
    pd.testing.assert_frame_equal(*tables)
    assert_whole(store_folder)


def sweep_of(number, folder):
    """Six jobs: three that all processes want, three of this process's own; how many of them it computed itself."""
    store, computed = Store(folder), []
    real = store.put
    store.put = lambda content, *rest: computed.append(key_of(content)) or real(content, *rest)
    rates = [0.1, 0.2, 0.3, *(1 + number + k / 10 for k in range(3))]
    frame = sweep.run(sweep.grid({**SETTINGS, "dataset": "blobs"}, lr=rates), 1, jobs=1, store=store)
    return computed, frame.drop(columns="seconds")


def test_ten_processes_on_one_store(tmp_path, store_folder):
    context = get_context("forkserver")  # which imports once for all
    context.set_forkserver_preload(["helpers.sweep.trainings"])
    with ProcessPoolExecutor(10, mp_context=context) as pool:
        found = list(pool.map(sweep_of, range(10), [store_folder] * 10))
    written = [key for computed, _ in found for key in computed]
    assert len(written) == len(set(written)) == 33
    assert sorted(entries(store_folder)) == sorted(written)
    for number, (_, frame) in enumerate(found):
        pd.testing.assert_frame_equal(frame, sweep_of(number, tmp_path / "alone")[1])
    assert_whole(store_folder)


def test_notebooks_that_fail_leave_the_others_and_name_their_cell(project, tmp_path):
    notebook(project, "03_dies", "print('begun')", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    notebook(project, "04_raises", "print('begun')", "raise MemoryError('20 GB')")
    notebook(project, "05_hangs", "print('begun')", "import time\ntime.sleep(600)")
    out = tmp_path / "out"
    said = companion("run", "--only", "02,03,04,05", "--profile", "quick", "--timeout", 3, "--out", out, code=1)
    assert "1 of 4 ok" in said
    record = {n["name"]: n for n in json.loads((out / "run.json").read_text())["notebooks"]}
    assert record["02_fine"]["status"] == "ok"
    assert re.match(r"cell 4: DeadKernelError", record["03_dies"]["error"]), record
    assert re.match(r"cell 4: MemoryError: 20 GB", record["04_raises"]["error"]), record
    assert re.match(r"cell 4: CellTimeoutError", record["05_hangs"]["error"]), record
    for name in ("03_dies", "04_raises", "05_hangs"):
        kept = nbformat.read(out / f"{name}.ipynb", as_version=4)
        assert "begun\n" in [o.get("text") for c in kept.cells for o in c.get("outputs", ())]
        assert (out / f"{name}.html").exists()


def test_divergence_is_a_result(tmp_path):
    out = tmp_path / "out"
    request = grid.Request("02", [{"lr": [0.01, 1e3]}], "quick", given={"seeds": 1})
    said = []
    assert grid.rerun(request, out=out, say=said.append) == 0, said
    results = pd.read_parquet(out / "results.parquet")
    assert (results[results.lr == 1e3].groupby("batch_size").diverged_at.max() >= 0).all()
    assert not (results[results.lr == 0.01].diverged_at >= 0).any()
    assert (out / "points/lr=1000/figures/02_three_axes.png").stat().st_size > 10_000
    kept = nbformat.read(out / "points/lr=1000/02_mnist_sweep.ipynb", as_version=4)
    complaints = [o for c in kept.cells for o in c.get("outputs", ()) if o.get("name") == "stderr"]
    assert complaints == []
