"""Reruns: one notebook over a grid of parameter values, a folder each; interrupted anywhere, they go on from there."""

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
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from companion import pages, runs
from companion.runs import BadInput
from helpers.sweep import processes
from helpers.sweep.store import key_of

MOST_POINTS = 10_000
STARTING = 6.0  # seconds of a notebook that do not grow with its parameters: its kernel and its imports
_SCALES = ("seeds", "epochs", "num_train", "trials")  # a notebook's time is about proportional to each

# What reading a file raises that is not what was written here: cut off, edited, or of something else.
_NOT_OURS = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)

_ENDED = "its process ended with"

Grid = dict[str, list[object]]


@dataclass
class Point:
    """One notebook of a rerun: the values it was given from the grid, and how it went."""

    name: str
    values: dict[str, object]
    planned: runs.Planned
    key: str  # of all that its outcome depends on
    expected: float = 0.0  # seconds, with all cores to itself
    status: str = "waiting"  # then running; then ok, FAILED or stopped
    error: str = ""
    seconds: float = 0.0
    started: float = field(default=0.0, repr=False)


def parse_grids(texts: Sequence[str]) -> list[Grid]:
    """``["lr=0.01,0.1", "seed=0:5"]`` → one grid; a text without ``=`` is a YAML file of one grid or a list of grids.

    A value is YAML, ``a:b`` the whole numbers from a to b - 1. Raises BadInput.
    """
    grids: list[Grid] = [{}]
    for text in texts:
        name, equals, values = text.partition("=")
        if equals:
            if not name.isidentifier():
                raise BadInput(f"--grid {text!r}: {name!r} is not a parameter's name; expected name=value,value")
            more = [{name: _values(f"--grid {text!r}", values)}]
        else:
            more = _grids_of(Path(text))
        for one, other in itertools.product(grids, more):
            twice = set(one) & set(other)
            if twice:
                raise BadInput(f"--grid: {sorted(twice)[0]} is given twice; list its values in one")
        grids = [{**one, **other} for one, other in itertools.product(grids, more)]
    return grids


def _values(where: str, given: object) -> list[object]:
    """The values of one parameter: a list, or a range as text."""
    if isinstance(given, str):
        span = re.fullmatch(r"\s*(\d{1,9}):(\d{1,9})\s*", given)
        # One more than may be, so that a range that is too long is refused and not written out.
        given = (
            list(range(int(span[1]), int(span[2]))[: MOST_POINTS + 1]) if span else runs.value_of(where, f"[{given}]")
        )
    given = runs.numbers(given)
    if not isinstance(given, list) or not given:
        raise BadInput(f"{where}: expected values, such as 0.01,0.1 or [64, 256],[1024] or 0:5; got {given!r}")
    return given


def _grids_of(file: Path) -> list[Grid]:
    try:
        if file.exists() and not file.is_file():
            raise ValueError("not a file")  # a device may have no end
        found = runs.read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise BadInput(f"--grid {file}: {' '.join(reason.split())}; expected name=value,value or a YAML file") from None
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
    folder: Path = runs.NOTEBOOKS,
) -> list[Point]:
    """A point for each combination, every value checked; raises BadInput, starts nothing. Equal points are one."""
    number = sum(_product(len(values) for values in grid.values()) for grid in grids)
    if number > MOST_POINTS:
        raise BadInput(f"the grid has more than {MOST_POINTS:,} points; split it, or leave values out")
    points: dict[str, Point] = {}
    code, records = _code(), _records()
    for grid in grids:
        for combination in itertools.product(*grid.values()):
            values = dict(zip(grid, combination))
            (planned,) = runs.plan(profile, dataset, only=[notebook], given={**(given or {}), **values}, folder=folder)
            values = {name: planned.parameters[name] for name in values}
            complete = {**runs.parameters_of(planned.path), **planned.parameters}
            key = key_of({"notebook": _sha256(planned.path), "code": code, "parameters": complete})
            if key not in points:
                points[key] = Point(_name(values), values, planned, key, _expected(planned, records))
    times = collections.Counter(point.name for point in points.values())
    for point in points.values():
        if times[point.name] > 1:
            point.name += f"-{point.key[:8]}"
    return list(points.values())


def _product(numbers: Iterable[int]) -> int:
    total = 1
    for number in numbers:
        total *= number
    return total


def _name(values: Mapping[str, object]) -> str:
    """A folder's name that says the values; nothing in it leads elsewhere."""

    def text(value: object) -> str:
        if isinstance(value, list):
            return "-".join(text(one) for one in value)
        return re.sub(r"[^A-Za-z0-9.+-]", "_", f"{value:g}" if isinstance(value, float) else str(value))

    name = ",".join(f"{name}={text(value)}" for name, value in values.items()) or "as-it-is"
    return name if len(name) <= 100 else f"{name[:90]}-{key_of({'values': dict(values)})[:8]}"


def _code() -> str:
    """The checksum of the helpers: what they compute may differ from version to version."""
    files = sorted((Path(__file__).parents[1]).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


# How long it takes


def _records() -> list[tuple[str, dict[str, object], float]]:
    """(notebook, parameters, seconds × cores) of what has run here, and of the committed reference run."""
    found = []
    for file in [*runs.OUTPUTS.glob("runs/*/run.json"), runs.OUTPUTS / "reference/run.json"]:
        with contextlib.suppress(*_NOT_OURS):
            run = json.loads(file.read_text(encoding="utf-8"))
            for n in run["notebooks"]:
                scales = {name: float(value) for name, value in n["parameters"].items() if name in _SCALES}
                seconds = max(1.0, float(n["seconds"]) - STARTING) * float(run["cores"])
                if n["status"] == "ok" and all(1 <= x < 2**63 for x in scales.values()) and 0 < seconds < math.inf:
                    found.append((n["name"], scales, seconds))
    return found


def _expected(item: runs.Planned, records: Sequence[tuple[str, dict[str, object], float]]) -> float:
    """Seconds that a notebook takes, from the record that is nearest in scale; 0 where there is none."""
    own = runs.parameters_of(item.path)

    def scale(parameters: Mapping[str, object]) -> float:
        every = {**own, **parameters}
        return float(_product(every[name] for name in _SCALES if name in own))

    wanted = scale(item.parameters)
    ratios = [(wanted / scale(p), seconds) for name, p, seconds in records if name == item.name]
    if not ratios:
        return 0.0
    nearest = min(max(ratio, 1 / ratio) for ratio, _ in ratios)
    # What a store had already made some records short: the longest of the nearest is of one that it had not.
    longest = max(r * seconds for r, seconds in ratios if max(r, 1 / r) <= 1.01 * nearest)
    return STARTING + longest / (os.cpu_count() or 1)


def duration(seconds: float) -> str:
    """Seconds as a reader says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# The rerun


@dataclass(frozen=True)
class Request:
    """What a rerun was asked for: kept in its folder, so that ``--resume`` needs no more than the folder.

    ``jobs``: processes in all, by default one a core: as many notebooks side by side, and what is left over trains
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

    def points(self, dataset: str, folder: Path) -> list[Point]:
        return plan(self.notebook, self.grids, self.profile, dataset, given=self.given, folder=folder)


_KINDS = {"notebook": str, "grids": list, "profile": str, "dataset": str, "given": dict, "jobs": int | None,
          "cluster": str | None, "timeout": int | None}  # fmt: skip


def request_of(out: Path) -> Request:
    """What the rerun in ``out`` was asked for. Raises BadInput where there is none."""
    try:
        request = Request(**json.loads((out / "rerun.json").read_text(encoding="utf-8"))["request"])
        for name, kind in _KINDS.items():
            if not isinstance(getattr(request, name), kind):
                raise ValueError(f"{name} is {getattr(request, name)!r}")
        lists = [values for grid in request.grids for values in grid.values()]
        if not request.grids or not all(isinstance(values, list) and values for values in lists):
            raise ValueError(f"grids is {request.grids!r}")
        return request
    except _NOT_OURS as error:
        raise BadInput(f"{out} holds no rerun to resume ({type(error).__name__}: {error})") from None


def rerun(
    request: Request,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    dry: bool = False,
    folder: Path = runs.NOTEBOOKS,
    say: Callable[[str], None] = print,
) -> int:
    """Execute a notebook at every point of its grids; returns 0, or 1 where a point failed (the others still run).

    ``resume``: go on in ``out``; points that are finished there are not run again. ``dry``: say what would be run, and
    how long it takes. Raises BadInput, with nothing written, for what cannot be run.
    """
    real, note = runs.resolve(request.profile, request.dataset, lambda dataset: request.points(dataset, folder))
    points = request.points(real, folder)
    total = sum(point.expected for point in points)
    jobs = (os.cpu_count() or 1) if request.jobs is None else request.jobs
    side_by_side = max(1, min(len(points), jobs))
    for_each = max(1, jobs // side_by_side) if jobs > 0 else jobs
    environment = runs.environment_for(for_each, None if dry else request.cluster, request.timeout)
    if dry:
        say("\n".join(f"{point.name:<60} {duration(point.expected) if point.expected else '?':>8}" for point in points))
        measured = "from the nearest runs on record" if total else "nothing on record tells how long they take"
        what = f"{len(points)} × {points[0].planned.name}, {request.profile} on {real}"
        say(f"\n{what}: about {duration(total)} ({measured})" if total else f"\n{what}; {measured}")
        return 0
    out = Path(out) if out else runs.OUTPUTS / "reruns" / f"{time.strftime('%Y-%m-%d_%H%M%S')}-{points[0].planned.name}"
    if resume:
        request_of(out)
        out = out.absolute()
    else:
        out = runs.writable(out)
    about = {**runs.machine(), "note": note, "dataset": real, "request": asdict(request)}
    with _alone(out):
        return _run(points, out, environment, side_by_side, request.timeout, about, say)


@contextlib.contextmanager
def _alone(out: Path):
    """The folder is this process's: the system frees the lock when it ends, however it ends."""
    try:
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout:
        raise BadInput(f"another rerun is at work in {out}; `companion status {out}` shows how far it is") from None
    except PermissionError as error:
        raise BadInput(f"cannot write into {out}: {error.strerror}") from None


def _run(points, out, environment, side_by_side, timeout, about, say) -> int:
    for point in points:
        _read(point, out)
        point.status = "ok" if point.status == "ok" else "waiting"  # what has failed is tried again
    kept = sum(point.status == "ok" for point in points)
    item = points[0].planned
    about = {**about, "notebook": item.name, "title": runs.title_of(item.path), "profile": about["request"]["profile"]}
    about["points"] = [{"name": p.name, "values": p.values, "key": p.key, "expected": p.expected} for p in points]
    pages.write(out / "rerun.json", json.dumps(about, indent=1))
    say(f"{len(points)} × {item.name}, {side_by_side} side by side, into {out}")
    if about["note"]:
        say(about["note"])
    if kept:
        say(f"{kept} of them are finished there already")
    waiting = [point for point in points if point.status != "ok"]
    with Table(points, side_by_side, say) as table, concurrent.futures.ThreadPoolExecutor(side_by_side) as pool:
        calls = [pool.submit(_run_point, point, out, environment, timeout, table) for point in waiting]
        try:
            for call in concurrent.futures.as_completed(calls):
                call.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.end_children()
            for point in points:
                if point.status in ("waiting", "running") or point.error.startswith(_ENDED):
                    point.status, point.error = "stopped", ""
            finished = f"{sum(p.status == 'ok' for p in points)} of {len(points)} notebooks and every finished training"
            say(f"\nstopped: {finished} are kept. To go on:\ncompanion rerun --resume --out {shlex.quote(str(out))}")
            raise
        finally:
            collect(points, out, about)
    failed = [point for point in points if point.status != "ok"]
    say("\n".join(f"{point.name}: {point.status}: {point.error}" for point in failed))
    say(f"{len(points) - len(failed)} of {len(points)} ok. Open:\n{out / 'index.html'}")
    return 1 if failed else 0


def _run_point(point: Point, out: Path, environment: Mapping[str, str], timeout: int | None, table: Table) -> None:
    """One notebook, in a process of its own that ends with this one."""
    folder = out / "points" / point.name
    point.status, point.started = "running", time.monotonic()
    table.show()
    try:
        if folder.is_symlink() or out.resolve() not in folder.resolve().parents:
            raise OSError(f"{folder} leads out of {out}; remove it")
        folder.mkdir(parents=True, exist_ok=True)
        work = {"name": point.planned.name, "path": str(point.planned.path), "parameters": point.planned.parameters}
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            process = subprocess.run(
                [sys.executable, "-m", "companion.reruns", str(folder), str(timeout or 0), point.key],
                input=json.dumps(work), text=True, stdout=log, stderr=subprocess.STDOUT, check=False,
                env={**os.environ, **environment, "OMP_NUM_THREADS": environment["COMPANION_JOBS"]},
            )  # fmt: skip
        _read(point, out)
        if point.status == "running":
            point.status, point.error = "FAILED", f"{_ENDED} {process.returncode}; see {folder / 'log.txt'}"
    except OSError as error:
        point.status, point.error = "FAILED", f"{error.strerror or error}"
    point.seconds = point.seconds or time.monotonic() - point.started
    table.show(point)


def _read(point: Point, out: Path) -> None:
    """What an earlier execution of the very same content left, where it is whole."""
    folder = out / "points" / point.name
    record = _record_of(folder)
    found = _sha256(folder / f"{point.planned.name}.ipynb")
    whole = found and found == record.get("sha256")
    if record["key"] == point.key and (record["status"] == "FAILED" or (record["status"] == "ok" and whole)):
        point.status, point.error, point.seconds = record["status"], record["error"], record["seconds"]


def _record_of(folder: Path) -> dict[str, object]:
    """What the ``point.json`` of a point says; that it waits, where there is none that ``_work`` can have written."""
    with contextlib.suppress(*_NOT_OURS):
        record = json.loads((folder / "point.json").read_text(encoding="utf-8"))
        texts = all(isinstance(record[name], str) for name in ("key", "status", "error"))
        statuses = ("ok", "FAILED", "running", "stopped")
        if texts and record["status"] in statuses and math.isfinite(record["seconds"]):
            return record
    return {"key": "", "status": "waiting", "error": "", "seconds": 0.0}


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def _work(folder: Path, timeout: int, key: str) -> None:
    """What the process of a point does: standard input says which notebook, ``point.json`` then says how it went."""
    processes.end_with_parent()
    item = runs.Planned(**json.loads(sys.stdin.read()))
    item.path = Path(item.path)
    pages.write(folder / "point.json", json.dumps({"key": key, "status": "running", "error": "", "seconds": 0.0}))
    runs.execute(item, folder, timeout or None)
    record = {"key": key, "status": item.status, "error": item.error, "seconds": round(item.seconds, 1)}
    record["sha256"] = _sha256(folder / f"{item.name}.ipynb")
    pages.write(folder / "point.json", json.dumps(record))


# What is there


def status(out: Path) -> dict[str, object]:
    """The record of a rerun, with how each of its points stands. Raises BadInput for a folder that is none."""
    try:
        about = json.loads((out / "rerun.json").read_text(encoding="utf-8"))
        if not isinstance(about["notebook"], str) or not isinstance(about["points"], list):
            raise ValueError("rerun.json names no notebook and its points")
        about["at_work"] = _at_work(out)
        for point in about["points"]:
            record = _record_of(out / "points" / _inside(point["name"]))
            if record["key"] != point["key"]:
                record |= {"status": "waiting", "error": "", "seconds": 0.0}
            if record["status"] == "running" and not about["at_work"]:
                record["status"] = "stopped"
            point |= {name: record[name] for name in ("status", "error", "seconds")}
    except _NOT_OURS as error:
        raise BadInput(f"{out} holds no rerun ({type(error).__name__}: {error})") from None
    return about


def _at_work(out: Path) -> bool:
    with contextlib.suppress(OSError):  # a folder that may only be read: nobody is at work in it
        try:
            FileLock(out / ".lock").acquire(timeout=0).lock.release()
        except Timeout:
            return True
    return False


def _inside(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.,=+-]*", name):
        raise ValueError(f"{name!r} is not a point's name")
    return name


def collect(points: Sequence[Point], out: Path, about: Mapping[str, object]) -> None:
    """Write ``results.parquet``, ``claims.csv`` and the comparison page of all points that are done."""
    import io

    import pandas as pd

    from helpers.ledger import rules

    done, tables, ledgers = [point for point in points if point.status == "ok"], [], []
    for point in done:
        folder = out / "points" / point.name
        given = {f"grid_{name}": str(v) if isinstance(v, list) else v for name, v in point.values.items()}
        for file in sorted((folder / "tables").glob("*.parquet")):
            tables.append(pd.read_parquet(file).assign(point=point.name, table=file.stem, **given))
        for file in sorted((folder / "claims").glob("*.csv")):
            ledgers.append(rules.read(file).assign(point=point.name, **given))
    if tables:
        buffer = io.BytesIO()
        pd.concat(tables, ignore_index=True).to_parquet(buffer, index=False)
        pages.write(out / "results.parquet", buffer.getvalue())
    if ledgers:
        pages.write(out / "claims.csv", pd.concat(ledgers, ignore_index=True).to_csv(index=False))
    verdicts = {p: rules.summary(one).set_index("claim")["verdict"].to_dict() for p, one in _by_point(ledgers)}
    pages.write(out / "index.html", pages.render("compare.html.j2", about=about, **_laid_out(points, out, verdicts)))


def _by_point(ledgers):
    return [(one["point"].iloc[0], one) for one in ledgers]


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

    folder = out / "points" / point.name
    if point.status != "ok":
        return None
    found = {figure["name"]: figure for figure in pages.figures(folder, point.planned.name)}
    if not found:
        return None
    main = nbformat.read(point.planned.path, as_version=4).metadata.get("companion", {}).get("main_figure")
    figure = found.get(main) or next(iter(found.values()))
    return {**figure, "path": f"points/{point.name}/figures/{figure['name']}.png"}


class Table:
    """What runs, what is done and failed, and how long it will take: live in a terminal, else a line an event."""

    ROWS = 12

    def __init__(self, points: Sequence[Point], side_by_side: int, say: Callable[[str], None]):
        from rich.console import Console
        from rich.live import Live

        self.points, self.side_by_side, self.say = points, side_by_side, say
        self.live = None
        if Console().is_terminal:
            self.live = Live(get_renderable=self._render, refresh_per_second=2)

    def __enter__(self) -> Table:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        if self.live:
            self.live.stop()

    def show(self, ended: Point | None = None) -> None:
        """Something has changed: ``ended``, or something has begun."""
        if ended and not self.live:
            done = sum(p.status in ("ok", "FAILED") for p in self.points)
            error = f": {ended.error}" if ended.error else ""
            took = f"{ended.name}: {ended.status}, {duration(ended.seconds)}"
            self.say(f"[{done}/{len(self.points)}] {took}{error}{self.left()}")

    def left(self) -> str:
        """How long the rest takes: from what is on record, corrected by what this rerun's points have taken."""
        done = [p for p in self.points if p.status == "ok" and p.started]
        rest = [p for p in self.points if p.status in ("waiting", "running")]
        if not rest:
            return ""
        if done:
            per_second = sum(p.seconds for p in done) / max(sum(p.expected or 1.0 for p in done), 1e-9)
            seconds = per_second * sum(p.expected or 1.0 for p in rest) / self.side_by_side
        else:
            seconds = sum(p.expected for p in rest)
        return f"; about {duration(seconds)} left" if seconds else ""

    def _render(self):
        from rich import box
        from rich.markup import escape
        from rich.table import Table as Drawn

        counts = {s: sum(p.status == s for p in self.points) for s in ("ok", "running", "waiting", "FAILED")}
        drawn = Drawn(box=box.SIMPLE, caption=" · ".join(f"{n} {s}" for s, n in counts.items()) + self.left())
        for column in ("point", "status", "seconds", "expected"):
            drawn.add_column(column, justify="left" if column in ("point", "status") else "right")
        order = {"running": 0, "FAILED": 1, "waiting": 2, "ok": 3}
        shown = sorted(self.points, key=lambda p: order.get(p.status, 4))[: self.ROWS]
        for p in shown:
            seconds = time.monotonic() - p.started if p.status == "running" else p.seconds
            expected = duration(p.expected * self.side_by_side) if p.expected else "?"
            drawn.add_row(escape(p.name), p.status, duration(seconds) if seconds else "", expected)
        if len(shown) < len(self.points):
            drawn.add_row(f"… and {len(self.points) - len(shown)} more", "", "", "")
        return drawn


if __name__ == "__main__":
    _work(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
