"""Runs: notebooks executed headlessly by papermill, into one folder with figures, claims and an index page."""

from __future__ import annotations

import ast
import base64
import contextlib
import html
import importlib.metadata
import json
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

PROJECT = Path(__file__).resolve().parents[2]
NOTEBOOKS = PROJECT / "notebooks"
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
    """A notebook's own parameters with their defaults, read from its parameters cell."""
    from papermill import inspect_notebook

    return {name: ast.literal_eval(p["default"]) for name, p in inspect_notebook(str(path)).items()}


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
    profiles = yaml.safe_load((folder / "profiles.yml").read_text(encoding="utf-8"))
    if profile not in profiles or profile.startswith("on_"):
        raise BadInput(f"unknown profile {profile!r}; choose from: {', '.join(p for p in profiles if p[:3] != 'on_')}")
    planned, unused = [], set(given or {})
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


def _typed(notebook: str, name: str, value: object, default: object) -> object:
    """``value`` as the type of the notebook's default, or BadInput."""
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
    from helpers import data, training

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
                elif re.search(r"(^|_)lrs?($|_)", name):
                    training.check_lr(v)
                elif name in ("seeds", "epochs", "trials", "draw_size") and v < 1:
                    raise ValueError(f"{name} is {v}; expected at least 1")
            if isinstance(value, list) and not value:
                raise ValueError(f"{name} is empty; expected at least one value")
    except ValueError as error:
        raise BadInput(f"{notebook}: {error}") from None


def run(
    profile: str = "laptop",
    dataset: str = "auto",
    *,
    only: Sequence[str] = (),
    given: Mapping[str, object] | None = None,
    jobs: int | None = None,
    out: str | Path | None = None,
    folder: Path = NOTEBOOKS,
    say=print,
) -> int:
    """Execute notebooks into a folder; returns 0, or 1 where one failed (the others still run).

    Raises BadInput, with nothing written, for anything that cannot be run: see ``plan``; a damaged data file; a folder
    that holds files already or cannot be written.
    """
    if dataset == "auto" and profile == "quick":
        dataset = "digits"  # the tests' profile: it asks for no network
    plan(profile, dataset, only=only, given=given, folder=folder)
    if jobs is not None and jobs < 1:
        raise BadInput(f"jobs is {jobs}; expected at least 1")
    from helpers import data

    try:
        real, note = data.resolve(dataset)
    except (data.DataError, ValueError) as error:
        raise BadInput(str(error)) from None
    planned = plan(profile, real, only=only, given=given, folder=folder)
    out = _writable(
        Path(out) if out else PROJECT / "outputs" / "runs" / f"{time.strftime('%Y-%m-%d_%H%M%S')}-{profile}"
    )
    if jobs is not None:
        os.environ["COMPANION_JOBS"] = str(jobs)
    say(f"profile {profile} on {real}, {len(planned)} notebooks, into {out}")
    if note:
        say("\n".join(["", "!" * 100, note, "!" * 100, ""]))
    about = {
        "profile": profile, "dataset": real, "dataset_note": note, "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores",
        "python": platform.python_version(), "versions": {p: importlib.metadata.version(p) for p in PACKAGES},
    }  # fmt: skip
    started = time.perf_counter()
    try:
        for number, item in enumerate(planned, 1):
            say(f"\n[{number}/{len(planned)}] {item.name}")
            _execute(item, out)
            say(f"{item.name}: {item.status}, {item.seconds:.0f} s" + (f": {item.error}" if item.error else ""))
    finally:
        about["seconds"] = round(time.perf_counter() - started, 1)
        page = _finish(planned, out, about)
    say("\n" + "\n".join(f"{p.name:<24} {p.status:<7} {p.seconds:5.0f} s  {_verdicts(out, p.name)}" for p in planned))
    if note:
        say(f"\n{note}")
    say(f"\n{sum(p.ok for p in planned)} of {len(planned)} notebooks ok in {about['seconds']:.0f} s. Open:\n{page}")
    return 0 if all(p.ok for p in planned) else 1


def _writable(out: Path) -> Path:
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} holds files already; choose a new folder, or remove it")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out
    except OSError as error:
        raise BadInput(f"cannot write into {out}: {error.strerror}; choose another folder with --out") from None


def _execute(item: Planned, out: Path) -> None:
    """Run one notebook; its progress streams through, its partial copy stays where it fails."""
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
    try:
        with quiet, unwatched:
            os.environ.pop("JPY_SESSION_NAME", None)
            papermill.execute_notebook(
                str(item.path), str(target), parameters, kernel_name="python3", cwd=str(out), progress_bar=False,
                stdout_file=sys.stdout, stderr_file=sys.stderr, extra_arguments=["--log-level=ERROR"],
            )  # fmt: skip
        item.status = "ok"
    except papermill.PapermillExecutionError as error:
        item.status, item.error = "FAILED", f"cell {error.exec_count}: {error.ename}: {error.evalue}".splitlines()[0]
    except Exception as error:  # a kernel that dies, a notebook that cannot be read: the others still run
        item.status, item.error = "FAILED", f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        item.seconds = time.perf_counter() - started
    if target.exists():
        notebook = nbformat.read(target, as_version=4)
        problems = widget_errors(notebook)
        if problems and item.ok:
            item.status, item.error = "FAILED", f"in a widget: {problems[0]}"
        # A progress bar rewrites its line; only what it ended on is kept.
        notebook, _ = CoalesceStreamsPreprocessor().preprocess(notebook, {})
        nbformat.write(notebook, target)
        item.title = _title(notebook) or item.name


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
    """Write claims.csv, run.json, each notebook as HTML, and the index page."""
    import pandas as pd

    from helpers import claims

    tables = [claims.read(f) for f in sorted((out / "claims").glob("*.csv"))]
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    if len(table):
        table.to_csv(out / "claims.csv", index=False)
    about["notebooks"] = [
        {
            "name": p.name, "status": p.status, "error": p.error, "seconds": round(p.seconds, 1),
            "parameters": p.parameters, **_provenance_of(out, p.name),
        }
        for p in planned
    ]  # fmt: skip
    (out / "run.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    for p in planned:
        if (out / f"{p.name}.ipynb").exists():
            (out / f"{p.name}.html").write_text(_as_html(out / f"{p.name}.ipynb"), encoding="utf-8")
    verdicts = claims.summary(table).to_dict("records") if len(table) else []
    parts = claims.readable(table).to_dict("records") if len(table) else []
    for i, part in enumerate(parts):
        part["first"] = i == 0 or parts[i - 1]["claim"] != part["claim"]
    page = out / "index.html"
    page.write_text(_template().render(
        run=about, claims=verdicts, parts=parts, provenance=json.dumps(about, indent=1),
        counts={v: sum(c["verdict"] == v for c in verdicts) for v in claims.VERDICTS},
        notebooks=[vars(p) | {"figures": _figures(out, p.name)} for p in planned],
    ), encoding="utf-8")  # fmt: skip
    return page


def _template():
    import jinja2

    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (Path(__file__).parent / "index.html.j2").read_text(encoding="utf-8")
    )


def _figures(out: Path, notebook: str) -> list[dict[str, str]]:
    from PIL import Image

    figures = []
    for file in sorted((out / "figures").glob(f"{notebook.split('_')[0]}_*.png"), key=lambda f: f.stat().st_mtime_ns):
        with Image.open(file) as image:
            text = image.info
        encoded = base64.b64encode(file.read_bytes()).decode()
        figures.append({"name": file.stem, "base64": encoded, "title": text.get("Title", file.stem),
                        "caption": text.get("Description", "")})  # fmt: skip
    return figures


def _as_html(path: Path) -> str:
    import jinja2
    import nbformat
    from nbconvert import HTMLExporter

    notebook = nbformat.read(path, as_version=4)
    for output in (o for cell in notebook.cells for o in cell.get("outputs", ()) if "text/html" in o.get("data", {})):
        output.data.pop("application/vnd.jupyter.widget-view+json", None)  # a page without scripts shows its text
    # nbconvert's own page, less the scripts it would ask other hosts for: it opens without a network.
    blocks = ("html_head_js", "html_head_js_mathjax", "html_head_js_mermaidjs", "jupyter_widgets")
    page = "{% extends 'lab/index.html.j2' %}" + "".join(f"{{% block {b} %}}{{% endblock %}}" for b in blocks)
    exporter = HTMLExporter(
        template_file="offline.html.j2", extra_loaders=[jinja2.DictLoader({"offline.html.j2": page})],
        exclude_input_prompt=True, exclude_output_prompt=True, embed_images=True,
    )  # fmt: skip
    return exporter.from_notebook_node(notebook, {"metadata": {"name": path.stem}})[0]


def _verdicts(out: Path, notebook: str) -> str:
    from helpers import claims

    file = out / "claims" / f"{notebook}.csv"
    if not file.exists():
        return ""
    counts = claims.summary(claims.read(file))["verdict"].value_counts()
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
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise BadInput(f"-p {pair!r}: {text!r} is not a value") from None
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)  # YAML reads 1e-3 as text
        given[name] = value
    return given
