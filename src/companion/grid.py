"""Reruns: one notebook over a grid of parameter values, a folder for each point; a stopped rerun can be resumed."""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import math
import re
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from companion import executor, pages, parameters
from companion.parameters import BadInput, Planned
from helpers.sweep.store import key_of

MOST_POINTS = 10_000

# Errors of reading a record that is cut off, edited, or of another kind.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)

Grid = dict[str, list[object]]


def parse_grids(texts: Sequence[str]) -> list[Grid]:
    """``["lr=0.01,0.1", "seed=0:5"]`` as one grid; text without ``=`` names a YAML file of a grid or a list of grids.

    A value is YAML; ``a:b`` stands for the whole numbers from a to b - 1. Raises BadInput.
    """
    grids: list[Grid] = [{}]
    for text in texts:
        name, equals, values = text.partition("=")
        if equals and not name.isidentifier():
            raise BadInput(f"--grid {text!r}: {name!r} is not a parameter's name; expected name=value,value")
        more = [{name: _values(f"--grid {text!r}", values)}] if equals else _grids_of(Path(text))
        for one, other in itertools.product(grids, more):
            if twice := set(one) & set(other):
                raise BadInput(f"--grid: {sorted(twice)[0]} is given twice; list its values in one")
        grids = [{**one, **other} for one, other in itertools.product(grids, more)]
    return grids


def _values(where: str, given: object) -> list[object]:
    """The values of one parameter: a list, or its text."""
    if isinstance(given, str):
        span = re.fullmatch(r"\s*(\d{1,9}):(\d{1,9})\s*", given)
        # One more than the limit, so that a range that is too long is refused.
        given = (
            list(range(int(span[1]), int(span[2]))[: MOST_POINTS + 1])
            if span
            else parameters.value_of(where, f"[{given}]")
        )
    if not isinstance(given, list) or not given:
        raise BadInput(f"{where}: expected values, such as 0.01,0.1 or [64, 256],[1024] or 0:5; got {given!r}")
    return parameters.numbers(given)


def _grids_of(file: Path) -> list[Grid]:
    try:
        found = parameters.read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"--grid {file}: {reason}; expected name=value,value or a YAML file") from None
    grids = found if isinstance(found, list) else [found]
    if not grids or not all(isinstance(g, dict) and g and all(isinstance(n, str) for n in g) for g in grids):
        raise BadInput(
            f"--grid {file}: expected a mapping of parameters to lists of values, or a list of such mappings"
        )
    return [{name: _values(f"--grid {file}: {name}", values) for name, values in one.items()} for one in grids]


def plan(
    notebook: str,
    grids: Sequence[Grid],
    profile: str,
    dataset: str,
    *,
    given: Mapping[str, object] | None = None,
    folder: Path = parameters.NOTEBOOKS,
) -> list[Planned]:
    """A point for each combination of values, all checked; equal points are one. Raises BadInput; starts nothing."""
    if sum(math.prod(len(values) for values in grid.values()) for grid in grids) > MOST_POINTS:
        raise BadInput(f"the grid has more than {MOST_POINTS:,} points; split it, or leave values out")
    points: dict[str, Planned] = {}
    code, sha256 = _code(), functools.cache(_sha256)
    for grid in grids:
        for combination in itertools.product(*grid.values()):
            values = dict(zip(grid, combination))
            (point,) = parameters.plan(
                profile, dataset, only=[notebook], given={**(given or {}), **values}, folder=folder
            )
            point.values = {name: point.parameters[name] for name in values}
            complete = {**parameters.defaults(point.path), **point.parameters}
            own = Path(str(complete.get("problem", "")).partition(":")[0].replace(".", "/") + ".py")
            point.key = key_of({"notebook": sha256(point.path), "code": code + sha256(own), "parameters": complete})
            point.label = _name(point.values)
            points.setdefault(point.key, point)
    times = collections.Counter(point.label for point in points.values())
    for point in points.values():
        if times[point.label] > 1:
            point.label += f"-{point.key[:8]}"
    return list(points.values())


def _name(values: Mapping[str, object]) -> str:
    """A folder name that shows the values and cannot lead to another folder."""

    def text(value: object) -> str:
        if isinstance(value, list):
            return "-".join(text(one) for one in value)
        return re.sub(r"[^A-Za-z0-9.+-]", "_", f"{value:g}" if isinstance(value, float) else str(value))

    name = ",".join(f"{name}={text(value)}" for name, value in values.items()) or "as-it-is"
    return name if len(name) <= 100 else f"{name[:90]}-{key_of({'values': dict(values)})[:8]}"


def _code() -> str:
    """The checksum of the packages: another version may compute other results."""
    files = sorted((Path(__file__).parents[1]).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


# The rerun


@dataclass(frozen=True)
class Request:
    """The arguments of a rerun, kept in its folder so that ``--resume`` needs no more than the folder.

    jobs: processes in all, by default one a core. As many notebooks run side by side, and what is left over trains
    within each.
    """

    notebook: str
    grids: Sequence[Grid] = ({},)
    profile: str = "laptop"
    dataset: str = "auto"
    given: Mapping[str, object] = field(default_factory=dict)
    jobs: int | None = None
    cluster: str | None = None
    timeout: int | None = None


def rerun(
    request: Request,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    dry: bool = False,
    folder: Path = parameters.NOTEBOOKS,
    say: Callable[[str], None] = print,
) -> int:
    """Execute a notebook at every point of its grids; returns 0, or 1 where a point failed (the others still run).

    resume: continue in ``out``; points that are finished there are not executed again.
    dry: only list the points.

    Raises BadInput, with nothing written, for a request that cannot be run.
    """
    import nbformat

    points, real, note = parameters.on_dataset(
        request.profile,
        request.dataset,
        lambda name: plan(request.notebook, request.grids, request.profile, name, given=request.given, folder=folder),
    )
    source = points[0].path
    environment = executor.environment_of(points, request.jobs, None if dry else request.cluster, request.timeout)
    if dry:
        say("\n".join(point.label for point in points))
        say(f"\n{len(points)} × {source.stem}, {request.profile} on {real}")
        return 0
    if resume:
        out = Path(out).absolute()
        note = note or record(out)["note"]
    else:
        out = executor.new_folder(out, "reruns", source.stem)
    about = {
        # A rerun goes on with the dataset it began with, also where "auto" would choose another by then.
        **executor.machine(), "note": note, "dataset": real, "request": asdict(replace(request, dataset=real)),
        "notebook": source.stem, "profile": request.profile,
        "points": [{"name": p.label, "values": p.values, "key": p.key} for p in points],
    }  # fmt: skip
    with executor.alone(out):
        # All points execute one copy, so that the notebook may be edited meanwhile.
        copy = pages.write(out / source.name, source.read_bytes())
        notebook = nbformat.read(copy, as_version=4)
        about["title"] = pages.title(notebook)
        about["main_figure"] = notebook.metadata.get("companion", {}).get("main_figure", "")
        pages.write(out / "rerun.json", json.dumps(about, indent=1))
        for point in points:
            point.path, point.folder = copy, out / "points" / point.label
            found = _record_of(point.key, point.folder)
            if found["status"] == "ok" and found["sha256"] == _sha256(point.folder / f"{point.name}.ipynb"):
                point.status, point.seconds = "ok", found["seconds"]
        say(f"{len(points)} × {source.stem}, {request.profile} on {real}")
        return executor.execute(
            points, out, environment, note=note, timeout=request.timeout, record=_record, say=say,
            finish=lambda seconds: collect(points, out, about),
            go_on=f"To go on:\ncompanion rerun --resume --out {shlex.quote(str(out))}",
        )  # fmt: skip


def _record(point: Planned) -> None:
    """Write ``point.json``, into a folder that is emptied of an earlier execution when the point begins."""
    if point.status == "running":
        shutil.rmtree(point.folder, ignore_errors=True)
    outcome = {"key": point.key, "status": point.status, "error": point.error, "seconds": round(point.seconds, 1)}
    outcome["sha256"] = _sha256(point.folder / f"{point.name}.ipynb")
    pages.write(point.folder / "point.json", json.dumps(outcome))


_WAITING = {"key": "", "status": "waiting", "error": "", "seconds": 0.0, "sha256": ""}


def _record_of(key: str, folder: Path) -> dict[str, object]:
    """The record of the point with this key; a waiting one where there is none."""
    with contextlib.suppress(*_UNREADABLE):
        found = json.loads((folder / "point.json").read_text(encoding="utf-8"))
        if found["key"] == key:
            return {**_WAITING, **found}
    return _WAITING


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


# Status and results


def record(out: Path) -> dict[str, object]:
    """The record of the rerun in ``out``, its request included. Raises BadInput for a folder without one."""
    try:
        about = json.loads((out / "rerun.json").read_text(encoding="utf-8"))
        return {**about, "request": Request(**about["request"]), "points": list(about["points"])}
    except _UNREADABLE as error:
        raise BadInput(f"{out} holds no rerun ({type(error).__name__}: {error})") from None


def status(out: Path) -> dict[str, object]:
    """The record of a rerun, with the present status of each point. Raises BadInput for a folder without one."""
    about = record(out)
    try:
        with executor.alone(out):
            about["at_work"] = False
    except BadInput:
        about["at_work"] = True
    for point in about["points"]:
        point |= _record_of(point["key"], out / "points" / point["name"])
        if point["status"] == "running" and not about["at_work"]:
            point["status"] = "stopped"
    return about


def collect(points: Sequence[Planned], out: Path, about: Mapping[str, object]) -> Path:
    """Write ``results.parquet``, ``claims.csv`` and the comparison page of all finished points; returns the page."""
    import pandas as pd

    from helpers.ledger import rules

    tables, ledgers, verdicts = [], [], {}
    for point in (point for point in points if point.status == "ok"):
        given = {f"grid_{name}": str(v) if isinstance(v, list) else v for name, v in point.values.items()}
        for file in sorted((point.folder / "tables").glob("*.parquet")):
            tables.append(pd.read_parquet(file).assign(point=point.label, table=file.stem, **given))
        for file in sorted((point.folder / "claims").glob("*.csv")):
            ledgers.append(rules.read(file).assign(point=point.label, **given))
            verdicts[point.label] = rules.summary(ledgers[-1]).set_index("claim")["verdict"].to_dict()
    page = pages.render("compare.html.j2", about=about, **_laid_out(points, verdicts, about["main_figure"]))
    pages.write(out / "index.html", page)
    for name in ("results.parquet", "claims.csv"):
        (out / name).unlink(missing_ok=True)  # of an earlier execution
    if tables:
        results = pd.concat(tables, ignore_index=True)
        mixed = [column for column in results if results[column].dtype == object]  # say, numbers and text
        results[mixed] = results[mixed].map(str).where(results[mixed].notna())
        results.to_parquet(out / "results.parquet", index=False)
    if ledgers:
        pd.concat(ledgers, ignore_index=True).to_csv(out / "claims.csv", index=False)
    return out / "index.html"


def _laid_out(points: Sequence[Planned], verdicts: Mapping[str, Mapping[str, str]], main: str) -> dict[str, object]:
    """The points as sections of a table: the last varied parameter across, the one before it down."""
    names = list(dict.fromkeys(name for point in points for name in point.values))
    varied = [n for n in names if len({str(p.values.get(n)) for p in points}) > 1] or names[:1]
    across, down, rest = varied[-1:], varied[-2:-1], varied[:-2]

    def say(point: Planned, chosen: Sequence[str]) -> str:
        return ", ".join(f"{name} = {point.values.get(name, '–')}" for name in chosen)

    sections: dict[str, dict[str, dict[str, dict[str, object]]]] = {}
    for point in points:
        figures = pages.figures(point.folder, point.name) if point.status == "ok" else []
        figure = next((one for one in figures if one["name"] == main), next(iter(figures), None))
        rows = sections.setdefault(say(point, rest), {})
        rows.setdefault(say(point, down), {})[say(point, across)] = {"point": point, "figure": figure}
    claimed = sorted({claim for one in verdicts.values() for claim in one})
    return {"sections": sections, "columns": list(dict.fromkeys(say(p, across) for p in points)), "claims": claimed,
            "points": points, "verdicts": verdicts, "fixed": [n for n in names if n not in varied]}  # fmt: skip
