"""The executor: notebooks side by side, the longest first, each in a kernel of its own and with a log of its own."""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import functools
import html
import importlib.metadata
import itertools
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from filelock import FileLock, Timeout

from companion import pages, parameters
from companion.parameters import BadInput, Planned
from helpers.sweep import processes

PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn", "papermill", "jupyterlab")
LOUD = "!" * 100


def environment_of(
    planned: Sequence[Planned], jobs: int | None, cluster: str | None, timeout: int | None
) -> dict[str, str]:
    """The environment variables of kernels: the one place that sets them. Raises BadInput.

    Kernels run in their output folder, so folders become absolute here.
    """
    for name, value in (("jobs", jobs), ("timeout", timeout)):
        if value is not None and value < 1:
            raise BadInput(f"{name} is {value}; expected at least 1")
    found = {k: str(Path(os.environ[k]).absolute()) for k in ("COMPANION_STORE", "COMPANION_DATA") if os.environ.get(k)}
    if jobs is not None:
        found["COMPANION_JOBS"] = str(jobs)
    if cluster is not None:
        from helpers.sweep.cluster import ClusterError, device_type

        try:
            device_type(cluster)
        except ClusterError as error:
            raise BadInput(str(error)) from None
        found["COMPANION_CLUSTER"] = cluster
    return found | (parameters.import_path() if any(item.parameters.get("problem") for item in planned) else {})


def machine() -> dict[str, object]:
    """The time and the machine, for the record of a run."""
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores", "cores": os.cpu_count(),
        "python": platform.python_version(), "versions": {p: importlib.metadata.version(p) for p in PACKAGES},
    }  # fmt: skip


def new_folder(out: str | Path | None, kind: str, name: str) -> Path:
    """Make the folder ``out``, or one of that kind named after the time. Raises BadInput where it cannot be used."""
    default = parameters.OUTPUTS / kind / f"{time.strftime('%Y-%m-%d_%H%M%S')}-{name}"
    if default.exists():  # another run began within the same second
        default = default.with_name(f"{default.name}-{os.getpid()}")
    out = Path(out or default).absolute()
    try:
        if out.exists() and any(out.iterdir()):
            resume = f", or continue it: companion rerun --resume --out {out}" if (out / "rerun.json").exists() else ""
            raise BadInput(f"{out} is not empty; choose a new folder with --out{resume}")
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out
    except OSError as error:
        raise BadInput(f"cannot write into {out}: {error.strerror}; choose another folder with --out") from None


@contextlib.contextmanager
def alone(out: Path):
    """Hold the folder for this process: the system frees the lock when the process ends, however it ends."""
    try:
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout:
        raise BadInput(f"another run is at work in {out}; choose another folder, or wait for its end") from None


def execute(
    items: Sequence[Planned],
    out: Path,
    environment: Mapping[str, str],
    *,
    note: str = "",
    timeout: int | None = None,
    record: Callable[[Planned], None] = lambda item: None,
    finish: Callable[[float], Path],
    go_on: str,
    say: Callable[[str], None],
) -> int:
    """Execute notebooks side by side, the longest first; returns 0, or 1 where one failed (the others still run).

    items: each is executed into its ``folder`` and gets the outcome; one that is "ok" already is left alone.
    environment: variables of the kernels. Of its ``COMPANION_JOBS`` processes, by default one a core or GPU, as many as
        there are notebooks execute one each, and what is left over trains within each (more, when fewer are left).
    note: said before and after.
    timeout: seconds that one cell may take.
    record: called when an item has begun, and when it has ended.
    finish: called with the seconds that it took, however it ends; returns the page of the results.
    go_on: how to go on after an interrupt.
    """
    import joblib
    from rich.console import Console
    from rich.live import Live

    from helpers.problems import pick_device

    waiting = sorted((item for item in items if item.status != "ok"), key=lambda item: -item.minutes)
    jobs = int(environment.get("COMPANION_JOBS", joblib.cpu_count() if pick_device().type == "cpu" else 1))
    side_by_side = max(1, min(len(waiting), jobs))
    say(f"{len(items)} to execute, {side_by_side} side by side, into {out}")
    if note:
        say(f"\n{LOUD}\n{note}\n{LOUD}\n")
    if len(waiting) < len(items):
        say(f"{len(items) - len(waiting)} of them are finished there already")
    progress, console, alone = _Progress(items), Console(), len(items) == 1
    live = Live(progress, console=console, refresh_per_second=1, transient=True)
    processes.interrupted.clear()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="companion-") as temporary,
            live if console.is_terminal and not alone else contextlib.nullcontext(),
            concurrent.futures.ThreadPoolExecutor(side_by_side) as pool,
        ):
            # Kernels read it before each sweep, for what others leave free.
            share = pages.write(Path(temporary) / "jobs", str(jobs // side_by_side))
            own = {"COMPANION_JOBS": str(share), "OMP_NUM_THREADS": str(jobs // side_by_side)}
            environment = {**environment, **own}
            calls = [pool.submit(_one, item, environment, timeout, alone, record, say) for item in waiting]
            try:
                for left, call in zip(itertools.count(len(calls) - 1, -1), concurrent.futures.as_completed(calls)):
                    say(f"{progress} {call.result()}")
                    pages.write(share, str(jobs // max(1, min(side_by_side, left))))
            except BaseException:
                processes.interrupted.set()
                pool.shutdown(wait=False, cancel_futures=True)
                begun = [call for call in calls if not call.cancelled()]
                while concurrent.futures.wait(begun, timeout=0.2).not_done:  # one may just have started its kernel
                    processes.end_children()
                raise
    except KeyboardInterrupt:
        say(f"\nstopped: {progress.ok} of {len(items)} notebooks and every finished training are kept. {go_on}")
        raise
    finally:
        page = finish(progress.seconds)
    say(f"{note}\n{progress.ok} of {len(items)} ok in {progress.seconds:.0f} s. Open:\n{page}")
    return 0 if progress.ok == len(items) else 1


class _Progress:
    """How many have ended, and how long the rest takes; with those at work, the line below all others in a terminal."""

    def __init__(self, items: Sequence[Planned]):
        self.items, self.started = items, time.perf_counter()
        self.before = self._weight("ok")

    @property
    def ok(self) -> int:
        return sum(item.status == "ok" for item in self.items)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def _weight(self, *statuses: str) -> float:
        return sum(item.minutes or 1.0 for item in self.items if item.status in statuses)

    def __str__(self) -> str:
        done = self._weight("ok", "FAILED") - self.before
        left = self.seconds * self._weight("waiting", "running") / done if done else 0.0
        ended = sum(item.status in ("ok", "FAILED") for item in self.items)
        times = [datetime.timedelta(seconds=round(s)) for s in (self.seconds, left)]
        return f"[{ended}/{len(self.items)}, {times[0]}" + f", about {times[1]} left" * (left > 0) + "]"

    def __rich__(self):
        from rich.text import Text

        at_work = ", ".join(item.label for item in self.items if item.status == "running")
        return Text(f"{self} {at_work}", no_wrap=True, overflow="ellipsis")


def _one(item: Planned, environment: Mapping[str, str], timeout: int | None, alone: bool, record, say) -> str:
    """Execute one notebook into its folder, as .ipynb and .html, a partial copy where it fails; returns the outcome.

    alone: whether this process prints what its cells print; the prints of several would be jumbled.
    """
    from helpers.ledger import rules

    item.status, item.error, started = "running", "", time.perf_counter()
    say(f"{item.label}: started")
    try:
        record(item)
        with (item.folder / f"{item.name}.log").open("w", encoding="utf-8") as log:
            item.status, item.error = _through_papermill(item, environment, timeout, log, sys.stdout if alone else log)
        item.seconds = time.perf_counter() - started
        if item.status != "stopped":
            _complete(item)
        record(item)
    except OSError as error:
        item.status, item.error = "FAILED", f"{error.strerror or error}"
    judged = item.folder / "claims" / f"{item.name}.csv"
    verdicts = list(rules.summary(rules.read(judged))["verdict"]) if judged.exists() else []
    counted = ", ".join(f"{verdicts.count(v)} {v}" for v in rules.VERDICTS if v in verdicts)
    return f"{item.label}: {item.status}, {item.seconds:.0f} s: {item.error or counted}".removesuffix(": ")


def _through_papermill(
    item: Planned, environment: Mapping[str, str], timeout: int | None, log: TextIO, shown: TextIO
) -> tuple[str, str]:
    """Execute a notebook; returns its status and error. Cells print to ``shown``, the kernel's processes to ``log``."""
    import papermill

    # A run may be started from a cell of JupyterLab; nobody watches its notebooks (see live.in_browser).
    inherited = {name: value for name, value in os.environ.items() if name != "JPY_SESSION_NAME"}
    # As its last act the kernel leaves without taking torch apart, which would take it a second and a half.
    leave = "--IPKernelApp.exec_lines=import atexit, os; atexit.register(os._exit, 0)"
    given = {**item.parameters, "output_dir": str(item.folder)}
    _register_engine()
    try:
        papermill.execute_notebook(
            str(item.path), str(item.folder / f"{item.name}.ipynb"), given, kernel_name="python3",
            engine_name="companion", progress_bar=False, stdout_file=shown, stderr_file=shown,
            extra_arguments=["--log-level=CRITICAL", leave], execution_timeout=timeout,
            # Not papermill's own `cwd`: it would move the whole process, and other threads with it.
            kernel={"cwd": str(item.folder), "env": {**inherited, **environment}, "stdout": log, "stderr": log},
        )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        return "FAILED", f"cell {error.exec_count}: {error.ename}: {error.evalue}".splitlines()[0]
    except Exception as error:  # a kernel that dies, a notebook that cannot be read: the others still run
        stopped = processes.interrupted.is_set()
        return ("stopped", "") if stopped else ("FAILED", f"{type(error).__name__}: {error}".splitlines()[0])
    return "ok", ""


def _complete(item: Planned) -> None:
    """Look for what papermill does not report, and write the executed notebook as .html too."""
    import nbformat
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    target = item.folder / f"{item.name}.ipynb"
    try:
        notebook = nbformat.read(target, as_version=4)
        if item.status != "ok" and not item.error.startswith("cell"):  # its last cell that began
            code = [cell.metadata.get("papermill", {}) for cell in notebook.cells if cell.cell_type == "code"]
            item.error = f"cell {max(1, sum(bool(one.get('start_time')) for one in code))}: {item.error}"
        if item.status == "ok" and (problems := widget_errors(notebook)):
            item.status, item.error = "FAILED", f"in a widget: {problems[0]}"
        # A progress bar rewrites its line; only its last state is kept.
        notebook, _ = CoalesceStreamsPreprocessor().preprocess(notebook, {})
        pages.write(target, nbformat.writes(notebook) + "\n")
        pages.write(target.with_suffix(".html"), pages.as_html(target))
        item.title = pages.title(notebook) or item.name
    except (OSError, ValueError) as error:  # none was written, or a full disk cut it off
        item.error = item.error or f"{target.name} could not be written: {getattr(error, 'strerror', None) or error}"
        item.status = "FAILED"


@functools.cache
def _register_engine() -> None:
    """Register papermill's engine "companion": its kernels get an environment, and no echo of Output widgets.

    nbclient sends an Output widget's state back to the kernel while its cell still runs; about one in 300 such cells
    then never ends (nbclient 0.11, ipykernel 7.4). Nobody reads the echo: the widget state comes from nbclient itself.
    """
    from nbclient.output_widget import OutputWidget
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import NBClientEngine, papermill_engines

    class QuietOutput(OutputWidget):
        def sync_state(self) -> None:
            pass

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, *, kernel, execution_timeout=None, **options):
            given = {name: options[name] for name in ("stdout_file", "stderr_file", "extra_arguments")}
            client = PapermillNotebookClient(nb_man, kernel_name=kernel_name, timeout=execution_timeout, **given)
            client.widget_registry = {"@jupyter-widgets/output": {"OutputModel": QuietOutput}}
            return client.execute(**kernel)

    papermill_engines.register("companion", Engine)


def widget_errors(notebook) -> list[str]:
    """Errors in widget callbacks and live labs: papermill reports none, they are in the notebook's widget state."""
    held = notebook.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    states = [model.get("state", {}) for model in held.values()]
    errors = [o for state in states for o in state.get("outputs", ()) if o.get("output_type") == "error"]
    shown = [re.search(r'class="companion-error".*?<b>(.*?)</b>', str(state.get("value")), re.S) for state in states]
    return [f"{e.get('ename')}: {e.get('evalue')}" for e in errors] + [html.unescape(s.group(1)) for s in shown if s]
