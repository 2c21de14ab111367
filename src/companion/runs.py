"""Runs: notebooks executed headlessly by papermill, into one folder with figures, claims and an index page."""

from __future__ import annotations

import ast
import contextlib
import functools
import html
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import yaml

from companion import pages
from helpers.sweep import processes

PROJECT = Path(__file__).resolve().parents[2]
NOTEBOOKS = PROJECT / "notebooks"
OUTPUTS = PROJECT / "outputs"
PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn", "papermill", "jupyterlab")


class BadInput(ValueError):
    """What the user asked for cannot be run; the message is one line that says what was expected."""


@dataclass
class Planned:
    """One notebook of a run: what it is called with, and, once it has run, how that went."""

    name: str
    path: Path
    parameters: dict[str, object]
    status: str = "not run"
    error: str = ""
    seconds: float = 0.0
    title: str = field(default="")

    @property
    def ok(self) -> bool:
        return self.status == "ok"


def notebooks(folder: Path = NOTEBOOKS) -> dict[str, Path]:
    """The notebooks by name, in reading order. Raises BadInput where there are none."""
    found = {path.stem: path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    if not found:
        raise BadInput(f"no notebooks in {folder}; run from a checkout, installed by pip install -e .")
    return found


def parameters_of(path: Path) -> dict[str, object]:
    """A notebook's own parameters with their defaults, read from its parameters cell. Raises BadInput without one."""
    return dict(_parameters_of(path, path.stat().st_mtime_ns))


@functools.lru_cache(maxsize=64)
def _parameters_of(path: Path, changed: int) -> dict[str, object]:
    from papermill import inspect_notebook

    try:
        return {name: ast.literal_eval(p["default"]) for name, p in inspect_notebook(str(path)).items()}
    except (ValueError, SyntaxError, KeyError, AttributeError) as error:
        raise BadInput(f"{path.name}: its parameters cell cannot be read ({error}); it holds literals only") from None


def plan(
    profile: str,
    dataset: str,
    *,
    only: Sequence[str] = (),
    given: Mapping[str, object] | None = None,
    folder: Path = NOTEBOOKS,
) -> list[Planned]:
    """What a run would execute, every parameter checked against the notebooks' own; raises BadInput, starts nothing.

    ``dataset`` goes to the notebooks whose own default is ``"auto"``. ``only``: names or numbers.
    """
    found = notebooks(folder)
    chosen = [name for name in found if not only or any(name == o or name.split("_")[0] == o for o in only)]
    for o in only:
        if not any(name == o or name.split("_")[0] == o for name in found):
            raise BadInput(f"unknown notebook {o!r}; choose from: {', '.join(found)}")
    profiles = _profiles(folder / "profiles.yml")
    if profile not in profiles or profile.startswith("on_"):
        raise BadInput(f"unknown profile {profile!r}; choose from: {', '.join(p for p in profiles if p[:3] != 'on_')}")
    planned, unused = [], set(given or {})
    for name in sorted(unused & {"output_dir", "profile"}):
        raise BadInput(f"{name} is set by --{'out' if name == 'output_dir' else name}, and not as a parameter")
    for name in chosen:
        own = parameters_of(found[name])
        values = dict(profiles[profile].get("every", {})) | profiles[profile].get(name, {})
        if own.get("dataset") == "auto":
            values["dataset"] = dataset
            if profile != "quick":  # which is written for digits as it is
                values |= profiles.get(f"on_{dataset}", {}).get(name, {})
        values = {k: v for k, v in values.items() if k in own} | {k: v for k, v in (given or {}).items() if k in own}
        unused -= set(values)
        values["profile"] = profile
        values = {k: _typed(name, k, v, own[k]) for k, v in values.items() if k in own}
        _check_values(name, own | values)
        planned.append(Planned(name, found[name], values))
    if unused:
        known = sorted({p for name in chosen for p in parameters_of(found[name])})
        raise BadInput(f"unknown parameter {sorted(unused)[0]!r}; these notebooks take: {', '.join(known)}")
    return planned


def _profiles(file: Path) -> dict[str, dict[str, dict[str, object]]]:
    """The profiles file, once its form is sure. Raises BadInput."""
    try:
        profiles = _read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: {' '.join(str(error).split())}") from None

    def is_mapping(value: object) -> bool:
        return isinstance(value, dict) and all(isinstance(name, str) for name in value)

    if not is_mapping(profiles) or not all(is_mapping(sections) for sections in profiles.values()):
        raise BadInput(f"{file}: expected a mapping profile: {{notebook: {{parameter: value}}}}")
    for profile, sections in profiles.items():
        for name, values in sections.items():
            if not is_mapping(values):
                raise BadInput(f"{file}: {profile}: {name} is {values!r}; expected a mapping of parameters to values")
    return profiles


def _typed(notebook: str, name: str, value: object, default: object) -> object:
    """``value`` as the type of the notebook's default, or BadInput."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise BadInput(f"{notebook}: {name} is a number of more than 64 bits")
    if isinstance(value, float) and not math.isfinite(value) and isinstance(default, float):
        raise BadInput(f"{notebook}: {name} is {value}; expected a finite number" + " above 0" * _is_lr(name))
    if isinstance(value, str) and value.encode("utf-8", "replace").decode() != value:
        raise BadInput(f"{notebook}: {name} is {value!r}; expected text that UTF-8 can hold")
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, list) and isinstance(value, list):
        return [_typed(notebook, name, v, default[0]) if default else v for v in value]
    if type(value) is type(default):
        return value
    wanted = f"a list like {default}" if isinstance(default, list) else f"{type(default).__name__}, like {default!r}"
    raise BadInput(f"{notebook}: {name} is {value!r}; expected {wanted}")


def _check_values(notebook: str, values: Mapping[str, object]) -> None:
    """Refuse what training would refuse, by the names parameters have throughout, before anything starts."""
    from helpers.engine import training
    from helpers.problems import data

    dataset = values.get("dataset", "blobs")
    if dataset not in data.TRAIN_SIZES and dataset != "auto":
        raise BadInput(f"{notebook}: unknown dataset {dataset!r}; choose from: auto, {', '.join(data.TRAIN_SIZES)}")
    whole = data.TRAIN_SIZES.get(dataset, data.TRAIN_SIZES["mnist"])
    num_train = values.get("num_train", whole)
    try:
        if not 10 <= num_train <= whole:
            raise ValueError(f"num_train is {num_train}; expected 10 to {whole} (the training set of {dataset})")
        for name, value in values.items():
            for v in value if isinstance(value, list) else [value]:
                if re.search(r"batch_sizes?$", name):
                    own = re.sub(r"batch_sizes?$", "draw_size" if name.startswith("walk_") else "num_train", name)
                    limit = values.get(own.removeprefix("walk_"), num_train)  # a walk splits a draw
                    training.check_batch_size(v, limit)
                elif _is_lr(name):
                    training.check_lr(v)
                elif name in ("seeds", "epochs", "trials", "draw_size") and v < 1:
                    raise ValueError(f"{name} is {v}; expected at least 1")
                elif name == "seed" and v < 0:
                    raise ValueError(f"seed is {v}; expected 0 or more")
            if isinstance(value, list) and not value:
                raise ValueError(f"{name} is empty; expected at least one value")
    except ValueError as error:
        raise BadInput(f"{notebook}: {error}") from None


def _is_lr(name: str) -> bool:
    return re.search(r"(^|_)lrs?($|_)", name) is not None


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
    folder: Path = NOTEBOOKS,
    say=print,
) -> int:
    """Execute notebooks into a folder; returns 0, or 1 where one failed (the others still run).

    Raises BadInput, with nothing written, for anything that cannot be run: see ``plan``; a damaged data file; a folder
    that holds files already or cannot be written.
    """
    real, note = resolve(
        profile, dataset, lambda dataset: plan(profile, dataset, only=only, given=given, folder=folder)
    )
    planned = plan(profile, real, only=only, given=given, folder=folder)
    environment = environment_for(jobs, cluster, timeout)
    out = writable(Path(out) if out else OUTPUTS / "runs" / f"{time.strftime('%Y-%m-%d_%H%M%S')}-{profile}")
    say(f"profile {profile} on {real}, {len(planned)} notebooks, into {out}")
    if note:
        say("\n".join(["", "!" * 100, note, "!" * 100, ""]))
    about = {"profile": profile, "dataset": real, "dataset_note": note, "given": dict(given or {}), **machine()}
    started = time.perf_counter()
    try:
        for number, item in enumerate(planned, 1):
            say(f"\n[{number}/{len(planned)}] {item.name}")
            with mock.patch.dict(os.environ, environment):
                execute(item, out, timeout)
            say(f"{item.name}: {item.status}, {item.seconds:.0f} s" + (f": {item.error}" if item.error else ""))
    finally:
        about["seconds"] = round(time.perf_counter() - started, 1)
        page = _finish(planned, out, about)
    say("\n" + "\n".join(f"{p.name:<24} {p.status:<7} {p.seconds:5.0f} s  {_verdicts(out, p.name)}" for p in planned))
    if note:
        say(f"\n{note}")
    say(f"\n{sum(p.ok for p in planned)} of {len(planned)} notebooks ok in {about['seconds']:.0f} s. Open:\n{page}")
    return 0 if all(p.ok for p in planned) else 1


def resolve(profile: str, dataset: str, check=lambda dataset: None) -> tuple[str, str]:
    """The dataset a run is of, and why where it is a stand-in; BadInput for files that are missing or damaged.

    ``check`` is called before any file is looked for, which may take a download.
    """
    if dataset == "auto" and profile == "quick":
        dataset = "digits"  # the tests' profile: it asks for no network
    check(dataset)
    from helpers.problems import data

    try:
        return data.resolve(dataset)
    except (data.DataError, ValueError) as error:
        raise BadInput(str(error)) from None


def environment_for(jobs: int | None, cluster: str | None, timeout: int | None) -> dict[str, str]:
    """The environment variables of a run's kernels; BadInput for what they cannot be, or a cluster that is not."""
    for name, value in (("jobs", jobs), ("timeout", timeout)):
        if value is not None and value < 1:
            raise BadInput(f"{name} is {value}; expected at least 1")
    environment = {"COMPANION_JOBS": str(jobs)} if jobs is not None else {}
    if cluster is not None:
        from helpers.sweep.cluster import ClusterError, device_type

        try:
            device_type(cluster)
        except ClusterError as error:
            raise BadInput(str(error)) from None
        environment["COMPANION_CLUSTER"] = cluster
    return environment


def machine() -> dict[str, object]:
    """When and on what: for a run's record."""
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores", "cores": os.cpu_count(),
        "python": platform.python_version(), "versions": {p: importlib.metadata.version(p) for p in PACKAGES},
    }  # fmt: skip


def writable(out: Path) -> Path:
    """The folder, made; BadInput where it holds files or cannot be written."""
    out = out.absolute()
    try:
        if out.exists() and not out.is_dir():
            raise BadInput(f"{out} is not a folder; choose another with --out")
        if out.exists() and any(out.iterdir()):
            raise BadInput(f"{out} holds files already; choose a new folder, or remove it")
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out
    except OSError as error:
        raise BadInput(f"cannot write into {out}: {error.strerror}; choose another folder with --out") from None


def execute(item: Planned, out: Path, timeout: int | None = None) -> None:
    """Run one notebook into ``out``, as .ipynb and .html; its progress streams through, its partial copy stays.

    ``timeout``: seconds that one cell may take. Only KeyboardInterrupt is raised: ``item`` says how it went.
    """
    import nbformat
    import papermill
    from nbclient.output_widget import OutputWidget
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    target, started = out / f"{item.name}.ipynb", time.perf_counter()
    parameters = {**item.parameters, "output_dir": str(out)}
    # nbclient tells the kernel what an Output widget shows while its cell still runs; about one in 300 such cells then
    # never ends (nbclient 0.11, ipykernel 7.4). Nobody reads it there: the widget state comes from nbclient's own copy.
    quiet = mock.patch.object(OutputWidget, "sync_state", return_value=None)
    # A run that was started from a cell of JupyterLab: nobody watches its notebooks (see live.in_browser).
    unwatched = mock.patch.dict(os.environ)
    item.status, item.error = "FAILED", ""
    try:
        with quiet, unwatched:
            os.environ.pop("JPY_SESSION_NAME", None)
            papermill.execute_notebook(
                str(item.path), str(target), parameters, kernel_name="python3", cwd=str(out), progress_bar=False,
                stdout_file=sys.stdout, stderr_file=sys.stderr, extra_arguments=["--log-level=CRITICAL"],
                execution_timeout=timeout,
            )  # fmt: skip
        item.status = "ok"
    except papermill.PapermillExecutionError as error:
        item.error = f"cell {error.exec_count}: {error.ename}: {error.evalue}".splitlines()[0]
    except KeyboardInterrupt:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # which would go on about a kernel that we end
        processes.end_children()
        item.status = "stopped"
        raise
    except Exception as error:  # a kernel that dies, a notebook that cannot be read: the others still run
        item.error = f"{type(error).__name__}: {error}".splitlines()[0]
    item.seconds = time.perf_counter() - started
    try:
        notebook = nbformat.read(target, as_version=4)
        if not item.ok and not item.error.startswith("cell"):
            item.error = f"cell {_stopped_at(notebook)}: {item.error}"
        problems = widget_errors(notebook)
        if problems and item.ok:
            item.status, item.error = "FAILED", f"in a widget: {problems[0]}"
        # A progress bar rewrites its line; only what it ended on is kept.
        notebook, _ = CoalesceStreamsPreprocessor().preprocess(notebook, {})
        pages.write(target, nbformat.writes(notebook) + "\n")
        pages.write(target.with_suffix(".html"), pages.as_html(target))
        item.title = _title(notebook) or item.name
    except (OSError, ValueError) as error:  # none was written, or a full disk cut it off
        item.error = item.error or f"{target.name} could not be written: {getattr(error, 'strerror', None) or error}"
        item.status = "FAILED"


def _stopped_at(notebook) -> int:
    """The number, as its prompt would show it, of the cell during which a run ended without an error of its own."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    begun = [n for n, cell in enumerate(code, 1) if cell.metadata.get("papermill", {}).get("start_time")]
    return begun[-1] if begun else 1


def widget_errors(notebook) -> list[str]:
    """Errors in a widget's callback or a live lab: papermill reports none, they lie in the notebook's widget state."""
    held = notebook.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    states = [model.get("state", {}) for model in held.values()]
    errors = [o for state in states for o in state.get("outputs", ()) if o.get("output_type") == "error"]
    shown = [re.search(r'class="companion-error".*?<b>(.*?)</b>', str(state.get("value")), re.S) for state in states]
    return [f"{e.get('ename')}: {e.get('evalue')}" for e in errors] + [html.unescape(s.group(1)) for s in shown if s]


def title_of(path: Path) -> str:
    """The finding that a notebook states in its title."""
    import nbformat

    return _title(nbformat.read(path, as_version=4))


def _title(notebook) -> str:
    heading = re.search(r"^# +(.+)$", "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown"), re.M)
    return heading.group(1) if heading else ""


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
            "parameters": p.parameters, **_provenance_of(out, p.name),
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


def _provenance_of(out: Path, notebook: str) -> dict[str, object]:
    file = out / "provenance" / f"{notebook}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def provenance(notebook: str, dataset, profile: str, output_dir: str | Path) -> str:
    """The line a notebook prints of itself: versions, device, profile, dataset; also written for ``run.json``."""
    facts = {"device": str(dataset.device), "dataset": dataset.name, "fingerprint": dataset.fingerprint}
    file = Path(output_dir) / "provenance" / f"{notebook}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(facts), encoding="utf-8")
    versions = " · ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "torchvision", "numpy"))
    loud = "" if dataset.name in ("mnist", "blobs") else " · NOT MNIST: verdicts on MNIST are inconclusive here"
    where = f"Python {platform.python_version()} · {versions} · {dataset.device} · profile {profile}"
    return f"{where} · {dataset.description}{loud}"


def parse_given(pairs: Sequence[str]) -> dict[str, object]:
    """``["lr=0.05", "batch_sizes=[8, 16]"]`` → values, read as YAML. Raises BadInput for what is not name=value."""
    given = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise BadInput(f"-p {pair!r} is not name=value")
        if name in ("output_dir", "profile"):
            raise BadInput(f"-p {pair!r}: {name} is set by --{'out' if name == 'output_dir' else name}")
        given[name] = value_of(f"-p {pair!r}", text)
    return given


def value_of(where: str, text: str) -> object:
    """A value that was written as YAML. Raises BadInput."""
    try:
        return numbers(read_yaml(text))
    except ValueError:
        raise BadInput(f"{where}: {text!r} is not a value") from None


@functools.lru_cache(maxsize=64)
def _read_yaml(text: str) -> object:
    return read_yaml(text)


def read_yaml(text: str) -> object:
    """What YAML says. Raises ValueError for all that it cannot say, and for aliases.

    A few lines of aliases stand for more values than there is memory, and for lists that hold themselves; reading
    lists within lists takes the square of their depth.
    """
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > 50:
                raise ValueError("an alias (*name); write its values out" if depth <= 50 else "lists within 50 lists")
        value = yaml.safe_load(text)
        repr(value)  # ValueError for a number of more digits than Python prints
        return value
    # A tag that does not fit its value ends in any of the others: !!int "", !!bool x, !!timestamp x.
    except (yaml.YAMLError, RecursionError, LookupError, AttributeError, ArithmeticError, TypeError) as error:
        raise ValueError(f"{error}" if isinstance(error, yaml.YAMLError) else f"not YAML ({error!r})") from None


def numbers(value: object) -> object:
    """The value, with text such as ``1e-3``, which YAML does not take for a number, as one."""
    if isinstance(value, list):
        return [numbers(one) for one in value]
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def keep(frame, name: str, output_dir: str | Path) -> None:
    """Write a notebook's tidy table as ``tables/<name>.parquet``; what Parquet has no type for becomes text."""
    import io

    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"table {name!r}; expected letters, digits, - and _, for it names a file")
    plain = frame.reset_index(drop=True)
    for column in plain.select_dtypes(object):
        plain[column] = plain[column].map(str).where(plain[column].notna())
    buffer = io.BytesIO()
    plain.to_parquet(buffer, index=False)
    pages.write(Path(output_dir) / "tables" / f"{name}.parquet", buffer.getvalue())
