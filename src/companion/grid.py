"""Reruns: one notebook over a grid of parameter values, a folder for each point; a stopped rerun can be resumed."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from filelock import FileLock, Timeout

from companion import pages, parameters, run
from companion.parameters import BadInput, Planned
from helpers.sweep.store import key_of

MOST_POINTS = 10_000

# Errors of reading a record that is cut off, edited, or of another kind.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)

Grid = dict[str, list[object]]


@dataclass
class Point:
    """One execution of a rerun: its values from the grid, and the notebook planned with them."""

    name: str
    values: dict[str, object]
    planned: Planned
    key: str  # identifies everything its outcome depends on


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
) -> list[Point]:
    """A point for each combination of values, all checked; equal points are one. Raises BadInput; starts nothing."""
    if sum(math.prod(len(values) for values in grid.values()) for grid in grids) > MOST_POINTS:
        raise BadInput(f"the grid has more than {MOST_POINTS:,} points; split it, or leave values out")
    points: dict[str, Point] = {}
    code = _code()
    for grid in grids:
        for combination in itertools.product(*grid.values()):
            values = dict(zip(grid, combination))
            (planned,) = parameters.plan(
                profile, dataset, only=[notebook], given={**(given or {}), **values}, folder=folder
            )
            values = {name: planned.parameters[name] for name in values}
            complete = {**parameters.defaults(planned.path), **planned.parameters}
            own = Path(str(complete.get("problem", "")).partition(":")[0].replace(".", "/") + ".py")
            key = key_of({"notebook": _sha256(planned.path), "code": code + _sha256(own), "parameters": complete})
            points.setdefault(key, Point(_name(values), values, planned, key))
    times = collections.Counter(point.name for point in points.values())
    for point in points.values():
        if times[point.name] > 1:
            point.name += f"-{point.key[:8]}"
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
    points, real, note = parameters.on_dataset(
        request.profile,
        request.dataset,
        lambda name: plan(request.notebook, request.grids, request.profile, name, given=request.given, folder=folder),
    )
    planned = [point.planned for point in points]
    jobs = (os.cpu_count() or 1) if request.jobs is None else request.jobs
    side_by_side = max(1, min(len(points), jobs))
    for_each = max(1, jobs // side_by_side) if jobs > 0 else jobs
    environment = run.environment_of(planned, for_each, None if dry else request.cluster, request.timeout)
    if dry:
        say("\n".join(point.name for point in points))
        say(f"\n{len(points)} × {planned[0].name}, {request.profile} on {real}")
        return 0
    if resume:
        out = Path(out).absolute()
        note = note or record(out)["note"]
    else:
        default = f"{time.strftime('%Y-%m-%d_%H%M%S')}-{planned[0].name}"
        out = run.new_folder(out, parameters.OUTPUTS / "reruns" / default)
    # A rerun goes on with the dataset it began with, also where "auto" would choose another by then.
    about = {**run.machine(), "note": note, "dataset": real, "request": asdict(replace(request, dataset=real))}
    with _alone(out):
        return _run(points, out, environment, side_by_side, request.timeout, about, say)


@contextlib.contextmanager
def _alone(out: Path):
    """Hold the folder for this process: the system frees the lock when the process ends, however it ends."""
    try:
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout:
        raise BadInput(f"another rerun is at work in {out}; `companion status {out}` shows its progress") from None


def _run(points, out, environment, side_by_side, timeout, about, say) -> int:
    import nbformat

    items = [point.planned for point in points]
    for point in points:
        found = _record_of(point.key, out / "points" / point.name)
        executed = out / "points" / point.name / f"{point.planned.name}.ipynb"
        if found["status"] == "ok" and found["sha256"] == _sha256(executed):
            point.planned.status, point.planned.seconds = "ok", found["seconds"]
    title = pages.title(nbformat.read(items[0].path, as_version=4))
    about = {**about, "notebook": items[0].name, "title": title, "profile": about["request"]["profile"]}
    about["points"] = [{"name": p.name, "values": p.values, "key": p.key} for p in points]
    # All points execute one copy, so that the notebook may be edited meanwhile.
    copy = pages.write(out / items[0].path.name, items[0].path.read_bytes())
    pages.write(out / "rerun.json", json.dumps(about, indent=1))
    say(f"{len(points)} × {items[0].name}, {side_by_side} side by side, into {out}")
    if about["note"]:
        say(about["note"])
    waiting = [point for point in points if point.planned.status != "ok"]
    if len(waiting) < len(points):
        say(f"{len(points) - len(waiting)} of them are finished there already")
    try:
        with _progress(items, say) as ended, concurrent.futures.ThreadPoolExecutor(side_by_side) as pool:
            calls = [pool.submit(_execute, point, copy, out, environment, timeout) for point in waiting]
            try:
                for call in concurrent.futures.as_completed(calls):
                    ended(call.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except BaseException:
        ok = sum(item.status == "ok" for item in items)
        kept = f"{ok} of {len(points)} notebooks and every finished training are kept"
        say(f"\nstopped: {kept}. To go on:\ncompanion rerun --resume --out {shlex.quote(str(out))}")
        raise
    finally:
        collect(points, out, about)
    ok = sum(item.status == "ok" for item in items)
    say(f"{ok} of {len(points)} ok. Open:\n{out / 'index.html'}")
    return 0 if ok == len(points) else 1


def _execute(point: Point, notebook: Path, out: Path, environment: Mapping[str, str], timeout: int | None) -> Point:
    """Execute one point in its folder, emptied of an earlier execution; ``point.json`` records the outcome."""
    folder, item = out / "points" / point.name, point.planned
    item.path, item.status = notebook, "running"
    try:
        shutil.rmtree(folder, ignore_errors=True)
        pages.write(folder / "point.json", json.dumps({**_WAITING, "key": point.key, "status": "running"}))
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            threads = {"OMP_NUM_THREADS": environment["COMPANION_JOBS"]}
            run.execute(item, folder, {**environment, **threads}, timeout, log)
        outcome = {"key": point.key, "status": item.status, "error": item.error, "seconds": round(item.seconds, 1)}
        outcome["sha256"] = _sha256(folder / f"{item.name}.ipynb")
        pages.write(folder / "point.json", json.dumps(outcome))
    except OSError as error:
        item.status, item.error = "FAILED", f"{error.strerror or error}"
    return point


@contextlib.contextmanager
def _progress(items: Sequence[Planned], say: Callable[[str], None]):
    """A function that reports an ended point: in a line, and in a terminal above a bar with the time left."""
    from rich import progress
    from rich.console import Console

    console = Console()
    columns = (progress.MofNCompleteColumn(), progress.BarColumn(), progress.TimeElapsedColumn(),
               progress.TextColumn("left"), progress.TimeRemainingColumn())  # fmt: skip
    with progress.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(items), completed=sum(item.status == "ok" for item in items))

        def ended(point: Point) -> None:
            bar.advance(task)
            item = point.planned
            line = f"[{bar.tasks[0].completed}/{len(items)}] {point.name}: {item.status}, {item.seconds:.0f} s"
            line += f": {item.error}" if item.error else ""
            console.print(line, markup=False, highlight=False) if console.is_terminal else say(line)

        yield ended


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
        with _alone(out):
            about["at_work"] = False
    except BadInput:
        about["at_work"] = True
    for point in about["points"]:
        point |= _record_of(point["key"], out / "points" / point["name"])
        if point["status"] == "running" and not about["at_work"]:
            point["status"] = "stopped"
    return about


def collect(points: Sequence[Point], out: Path, about: Mapping[str, object]) -> None:
    """Write ``results.parquet``, ``claims.csv`` and the comparison page of all finished points."""
    import pandas as pd

    from helpers.ledger import rules

    tables, ledgers, verdicts = [], [], {}
    for point in (point for point in points if point.planned.status == "ok"):
        folder = out / "points" / point.name
        given = {f"grid_{name}": str(v) if isinstance(v, list) else v for name, v in point.values.items()}
        for file in sorted((folder / "tables").glob("*.parquet")):
            tables.append(pd.read_parquet(file).assign(point=point.name, table=file.stem, **given))
        for file in sorted((folder / "claims").glob("*.csv")):
            ledgers.append(rules.read(file).assign(point=point.name, **given))
            verdicts[point.name] = rules.summary(ledgers[-1]).set_index("claim")["verdict"].to_dict()
    pages.write(out / "index.html", pages.render("compare.html.j2", about=about, **_laid_out(points, out, verdicts)))
    for name in ("results.parquet", "claims.csv"):
        (out / name).unlink(missing_ok=True)  # of an earlier execution
    if tables:
        results = pd.concat(tables, ignore_index=True)
        mixed = [column for column in results if results[column].dtype == object]  # say, numbers and text
        results[mixed] = results[mixed].map(str).where(results[mixed].notna())
        results.to_parquet(out / "results.parquet", index=False)
    if ledgers:
        pd.concat(ledgers, ignore_index=True).to_csv(out / "claims.csv", index=False)


def _laid_out(points: Sequence[Point], out: Path, verdicts: Mapping[str, Mapping[str, str]]) -> dict[str, object]:
    """The points as sections of a table: the last varied parameter across, the one before it down."""
    names = list(dict.fromkeys(name for point in points for name in point.values))
    varied = [n for n in names if len({str(p.values.get(n)) for p in points}) > 1] or names[:1]
    across, down, rest = varied[-1:], varied[-2:-1], varied[:-2]

    def say(point: Point, chosen: Sequence[str]) -> str:
        return ", ".join(f"{name} = {point.values.get(name, '–')}" for name in chosen)

    sections: dict[str, dict[str, dict[str, dict[str, object]]]] = {}
    for point in points:
        cell = {"point": point, "figure": _main_figure(point, out), "verdicts": verdicts.get(point.name, {})}
        rows = sections.setdefault(say(point, rest), {})
        rows.setdefault(say(point, down), {})[say(point, across)] = cell
    claimed = sorted({claim for one in verdicts.values() for claim in one})
    return {"sections": sections, "columns": list(dict.fromkeys(say(p, across) for p in points)), "claims": claimed,
            "points": points, "verdicts": verdicts, "fixed": [n for n in names if n not in varied]}  # fmt: skip


def _main_figure(point: Point, out: Path) -> dict[str, str] | None:
    """The figure that the notebook's metadata names as its main one, else its first; by its path from the page."""
    import nbformat

    figures = pages.figures(out / "points" / point.name, point.planned.name) if point.planned.status == "ok" else []
    if not figures:
        return None
    main = nbformat.read(point.planned.path, as_version=4).metadata.get("companion", {}).get("main_figure")
    figure = next((one for one in figures if one["name"] == main), figures[0])
    return {**figure, "path": f"points/{point.name}/figures/{figure['name']}.png"}
