"""Runs: notebooks executed without a browser, into one folder with figures, claims and a report."""

from __future__ import annotations

import html
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from companion import pages, parameters
from companion.parameters import BadInput, Planned
from helpers.sweep import processes

PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn", "papermill", "jupyterlab")
LOUD = "!" * 100


def run(
    profile: str = "laptop",
    dataset: str = "auto",
    *,
    only: Sequence[str] = (),
    given: Mapping[str, object] | None = None,
    jobs: int | None = None,
    cluster: str | None = None,
    timeout: int | None = None,
    out: str | Path | None = None,
    folder: Path = parameters.NOTEBOOKS,
    say=print,
) -> int:
    """Execute notebooks into a folder; returns 0, or 1 where one failed (the others still run).

    only, given: see ``parameters.plan``.
    jobs: processes that train side by side; one a core by default.
    cluster: address of a Dask scheduler on whose workers to train instead.
    timeout: seconds after which a cell fails.
    out: a new folder; by default one named after the time and the profile.

    Raises BadInput, with nothing written, for a request that cannot be run.
    """
    planned, real, note = parameters.on_dataset(
        profile, dataset, lambda name: parameters.plan(profile, name, only=only, given=given, folder=folder)
    )
    environment = environment_of(planned, jobs, cluster, timeout)
    out = new_folder(out, parameters.OUTPUTS / "runs" / f"{time.strftime('%Y-%m-%d_%H%M%S')}-{profile}")
    say(f"profile {profile} on {(given or {}).get('problem') or real}, {len(planned)} notebooks, into {out}")
    if note:
        say(f"\n{LOUD}\n{note}\n{LOUD}\n")
    about = {"profile": profile, "dataset": real, "dataset_note": note, "given": dict(given or {}), **machine()}
    started = time.perf_counter()
    try:
        for number, item in enumerate(planned, 1):
            say(f"\n[{number}/{len(planned)}] {item.name}")
            execute(item, out, environment, timeout)
            say(f"{item.name}: {item.status}, {item.seconds:.0f} s" + (f": {item.error}" if item.error else ""))
    except KeyboardInterrupt:
        say("\nFinished trainings are kept in the store: a run into a new folder trains only the rest.")
        raise
    finally:
        about["seconds"] = round(time.perf_counter() - started, 1)
        page = _finish(planned, out, about)
    ok = sum(item.status == "ok" for item in planned)
    say("\n" + "\n".join(f"{p.name:<24} {p.status:<7} {p.seconds:5.0f} s  {_verdicts(out, p.name)}" for p in planned))
    if note:
        say(f"\n{note}")
    say(f"\n{ok} of {len(planned)} notebooks ok in {about['seconds']:.0f} s. Open:\n{page}")
    return 0 if ok == len(planned) else 1


def environment_of(
    planned: Sequence[Planned], jobs: int | None, cluster: str | None, timeout: int | None
) -> dict[str, str]:
    """The environment variables of kernels: the one place that sets them. Raises BadInput.

    Kernels run in their output folder, so folders become absolute here.
    """
    for name, value in (("jobs", jobs), ("timeout", timeout)):
        if value is not None and value < 1:
            raise BadInput(f"{name} is {value}; expected at least 1")
    environment = {
        k: str(Path(v).absolute()) for k in ("COMPANION_STORE", "COMPANION_DATA") if (v := os.environ.get(k))
    }
    if jobs is not None:
        environment["COMPANION_JOBS"] = str(jobs)
    if cluster is not None:
        from helpers.sweep.cluster import ClusterError, device_type

        try:
            device_type(cluster)
        except ClusterError as error:
            raise BadInput(str(error)) from None
        environment["COMPANION_CLUSTER"] = cluster
    if any(item.parameters.get("problem") for item in planned):
        environment |= parameters.import_path()
    return environment


def machine() -> dict[str, object]:
    """The time and the machine, for a run's record."""
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores", "cores": os.cpu_count(),
        "python": platform.python_version(), "versions": {p: importlib.metadata.version(p) for p in PACKAGES},
    }  # fmt: skip


def new_folder(out: str | Path | None, default: Path) -> Path:
    """Make the folder ``out``, or a new one named like ``default``. Raises BadInput for one that cannot be used."""
    try:
        if out is None:  # two runs may begin within a second
            names = (default.with_name(f"{default.name}-{number}") for number in itertools.count(2))
            out = next(folder for folder in itertools.chain([default], names) if _made(folder))
        out = Path(out).absolute()
        if out.exists() and any(out.iterdir()):
            resume = f", or continue it: companion rerun --resume --out {out}" if (out / "rerun.json").exists() else ""
            raise BadInput(f"{out} is not empty; choose a new folder with --out{resume}")
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out
    except OSError as error:
        raise BadInput(f"cannot write into {out}: {error.strerror}; choose another folder with --out") from None


def _made(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def execute(
    item: Planned, out: Path, environment: Mapping[str, str], timeout: int | None = None, log: TextIO | None = None
) -> None:
    """Execute one notebook into ``out``, as .ipynb and .html; a partial copy is kept where it fails.

    environment: variables added to the kernel's.
    timeout: seconds that one cell may take.
    log: a file for what the kernel prints; by default it goes on through this process's own output.

    Raises only KeyboardInterrupt: ``item`` holds the outcome.
    """
    import nbformat
    import papermill
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    target, started = out / f"{item.name}.ipynb", time.perf_counter()
    # A run may be started from a cell of JupyterLab; nobody watches its notebooks (see live.in_browser).
    inherited = {name: value for name, value in os.environ.items() if name != "JPY_SESSION_NAME"}
    _register_engine()
    item.status, item.error = "FAILED", ""
    try:
        papermill.execute_notebook(
            str(item.path), str(target), {**item.parameters, "output_dir": str(out)}, kernel_name="python3",
            engine_name="companion", progress_bar=False, stdout_file=log or sys.stdout,
            stderr_file=log or sys.stderr, extra_arguments=["--log-level=CRITICAL"], execution_timeout=timeout,
            # Not papermill's own `cwd`: it would move the whole process, and other threads with it.
            kernel={"cwd": str(out), "env": {**inherited, **environment}, "stdout": log, "stderr": log},
        )  # fmt: skip
        item.status = "ok"
    except papermill.PapermillExecutionError as error:
        item.error = f"cell {error.exec_count}: {error.ename}: {error.evalue}".splitlines()[0]
    except KeyboardInterrupt:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it would complain about the ended kernel
        processes.end_children()
        item.status = "stopped"
        raise
    except Exception as error:  # a kernel that dies, a notebook that cannot be read: the others still run
        if processes.interrupted.is_set():  # in a thread: the interrupt ended the kernel
            item.status = "stopped"
            return
        item.error = f"{type(error).__name__}: {error}".splitlines()[0]
    item.seconds = time.perf_counter() - started
    try:
        notebook = nbformat.read(target, as_version=4)
        if item.status != "ok" and not item.error.startswith("cell"):
            item.error = f"cell {_stopped_at(notebook)}: {item.error}"
        problems = widget_errors(notebook)
        if problems and item.status == "ok":
            item.status, item.error = "FAILED", f"in a widget: {problems[0]}"
        # A progress bar rewrites its line; only its last state is kept.
        notebook, _ = CoalesceStreamsPreprocessor().preprocess(notebook, {})
        pages.write(target, nbformat.writes(notebook) + "\n")
        pages.write(target.with_suffix(".html"), pages.as_html(target))
        item.title = pages.title(notebook) or item.name
    except (OSError, ValueError) as error:  # none was written, or a full disk cut it off
        item.error = item.error or f"{target.name} could not be written: {getattr(error, 'strerror', None) or error}"
        item.status = "FAILED"


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
            names = ("stdout_file", "stderr_file", "extra_arguments", "resources")
            given = {name: options[name] for name in names if name in options}
            client = PapermillNotebookClient(nb_man, kernel_name=kernel_name, timeout=execution_timeout, **given)
            client.widget_registry = {"@jupyter-widgets/output": {"OutputModel": QuietOutput}}
            return client.execute(**kernel)

    papermill_engines.register("companion", Engine)


def _stopped_at(notebook) -> int:
    """The number of the code cell during which a run ended without an error of its own."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    begun = [n for n, cell in enumerate(code, 1) if cell.metadata.get("papermill", {}).get("start_time")]
    return begun[-1] if begun else 1


def widget_errors(notebook) -> list[str]:
    """Errors in widget callbacks and live labs: papermill reports none, they are in the notebook's widget state."""
    held = notebook.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    states = [model.get("state", {}) for model in held.values()]
    errors = [o for state in states for o in state.get("outputs", ()) if o.get("output_type") == "error"]
    shown = [re.search(r'class="companion-error".*?<b>(.*?)</b>', str(state.get("value")), re.S) for state in states]
    return [f"{e.get('ename')}: {e.get('evalue')}" for e in errors] + [html.unescape(s.group(1)) for s in shown if s]


def _finish(planned: list[Planned], out: Path, about: dict[str, object]) -> Path:
    """Write claims.csv, run.json and the report."""
    import pandas as pd

    from companion import report
    from helpers.ledger import rules

    tables = [rules.read(f) for f in sorted((out / "claims").glob("*.csv"))]
    if tables:
        pages.write(out / "claims.csv", pd.concat(tables, ignore_index=True).to_csv(index=False))
    about["notebooks"] = [
        {
            "name": p.name, "title": p.title, "status": p.status, "error": p.error, "seconds": round(p.seconds, 1),
            "parameters": p.parameters, **_provenance(out / "provenance" / f"{p.name}.json"),
        }
        for p in planned
    ]  # fmt: skip
    pages.write(out / "run.json", json.dumps(about, indent=1))
    return report.write(out)


def _verdicts(out: Path, notebook: str) -> str:
    from helpers.ledger import rules

    file = out / "claims" / f"{notebook}.csv"
    if not file.exists():
        return ""
    counts = rules.summary(rules.read(file))["verdict"].value_counts()
    return ", ".join(f"{n} {verdict}" for verdict, n in counts.items())


def _provenance(file: Path) -> dict[str, object]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
