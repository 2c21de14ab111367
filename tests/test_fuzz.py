"""Random parameters, grids, profile files, store files and records: a result or one line, never a traceback."""

import contextlib
import datetime
import json
import shutil
import signal
import warnings

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from companion import cli, reruns, runs
from helpers.sweep.store import Store

# Cases of each test; 3,500 in all.
PARAMETERS, GRIDS, GRID_FILES, PROFILES, STORES, RECORDS, HISTORIES = 1000, 600, 500, 500, 400, 300, 200


def cases(number):
    """That many, other ones at each run; a failure prints what repeats it."""
    return settings(
        max_examples=number, deadline=None, database=None, print_blob=True, derandomize=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


class Hangs(BaseException):
    """Not an Exception, so that nothing takes it for bad input."""


@contextlib.contextmanager
def at_most(seconds):
    def stop(*_):
        raise Hangs(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tree(folder):
    """Every file below a folder with its bytes, every folder with None; locks are no content."""
    found = (f for f in sorted(folder.rglob("*")) if f.name != ".lock")
    return {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else None for f in found}


def companion(*arguments):
    """Whether the command had a result; else that it said so in one line, with 2."""
    with at_most(20):
        result = CliRunner().invoke(cli.main, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code == 0:
        assert result.stderr == ""
        return True
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("companion: "), result.stderr
    assert result.stdout == ""
    return False


FRAME = pd.DataFrame({"seed": [0, 1], "test_loss": [0.25, np.nan], "label": ["a", "b"]})
ARRAYS = {"2/weight": np.arange(6, dtype=np.float32).reshape(2, 3), "step": np.array([7])}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A store with three entries, a folder of runs, and an empty folder to stand in: all watched."""
    store = Store()
    store.put({"of": 0}, FRAME, ARRAYS)
    store.put({"of": 1}, FRAME)
    store.put({"of": 2}, FRAME, {"step": ARRAYS["step"]})
    for folder in ("outputs", "here"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(runs, "OUTPUTS", tmp_path / "outputs")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


# Text and values; what breaks a reader of YAML: numbers, dates and tags out of range, aliases, depth, odd characters.

BOMB = ["&a [1,1,1,1,1,1,1,1,1]", *(f"&{y} [{','.join(['*' + x] * 9)}]" for x, y in zip("abcdefgh", "bcdefghi"))]
NASTY = [
    "", " ", "~", ".inf", "-.inf", ".nan", "nan", "inf", "1e999", "1e-3", "0", "-1", "true", "1_000", "0x" + "f" * 5000,
    "9" * 5000, "1" + "0" * 400, "-" + "9" * 30, "1:2:3", "1.5:2:3" * 90, "2001-99-99", "2001-01-01",
    "0001-01-01T00:00:00+23:59", "2001-01-01T00:00:00+99:99", '"\\ud800"', '"\\0"', "\0", "\ud800", "\x1b[31m",
    "\u2028", "!!int ''", "!!float ''", "!!bool x", "!!timestamp x", "!!binary x", "!!set {a}", "!!omap [a]", "!x 1",
    "!!pairs [a: 1]", "!!python/object/apply:os.system ['touch hacked']", "!!python/name:os.system",
    "!!python/tuple [1]", "&a [*a]", "&a {a: *a}", "*a", f"[{', '.join(BOMB)}]", "[" * 3000, "[" * 200 + "]" * 200,
    "{" * 500, "? [a]\n: b", "? {a: b}\n: c", "<<: 1", "{<<: 1}", "{<<: [1]}", "%YAML 9.9", "---\n---\n", "- - -",
    "&", "*", "|", ">", "@", "`", "%", "'", '"', "a: b: c", "../../x", "/etc/passwd", "..", "$(touch hacked)", "0:5",
    "5:0", "0:10001", "0:999999999", "1,2", "[1],[2]", "[64, 256]",
]  # fmt: skip

leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-5, 70_000), st.integers(-(10**400), 10**400), st.floats(),
    st.floats(1e-4, 1), st.text(max_size=8), st.dates(), st.datetimes(), st.binary(max_size=4),
    st.sampled_from(["auto", "digits", "mnist", "shen_mlp", "../../x", "0:3"]),
    st.lists(st.integers(1, 300), max_size=4),
)  # fmt: skip
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
jsons = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 99) | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def written(value):
    """As YAML in one line, where YAML can write it."""
    try:
        return (
            yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
            .removesuffix("\n...\n")
            .strip()
        )
    except (yaml.YAMLError, ValueError):
        return repr(value)


texts = st.one_of(values.map(written), st.text(max_size=20), st.sampled_from(NASTY))
NOTEBOOKS = {name: list(runs.parameters_of(path)) for name, path in runs.notebooks().items()}


def one_of_the_notebooks(data):
    """A notebook, and names of parameters: most of them its own."""
    notebook = data.draw(st.sampled_from(list(NOTEBOOKS)))
    return notebook, st.sampled_from(
        NOTEBOOKS[notebook] * 5 + ["", "x", "lr ", "é", "class", "--out", "a.b", "output_dir"]
    )


# The tests


@cases(PARAMETERS)
@given(data=st.data())
def test_any_parameter_is_planned_or_refused_in_one_line(world, data):
    notebook, names = one_of_the_notebooks(data)
    pairs = data.draw(st.lists(st.tuples(names, texts).map("=".join) | texts, min_size=1, max_size=3))
    before = tree(world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "writable", lambda out: exit(0))  # planned: what follows would run it
        given = [argument for pair in pairs for argument in ("-p", pair)]
        planned = companion("run", "--profile", "quick", "--dataset", "digits", "--only", notebook, *given)
    if planned:  # what was accepted is what the notebook's own defaults are
        (item,) = runs.plan("quick", "digits", only=[notebook], given=runs.parse_given(pairs))
        own = runs.parameters_of(item.path)
        assert {n: type(v) for n, v in item.parameters.items()} == {n: type(own[n]) for n in item.parameters}
        json.dumps(item.parameters, allow_nan=False)
    assert tree(world) == before


@cases(GRIDS)
@given(data=st.data())
def test_any_grid_is_planned_or_refused_in_one_line(world, data):
    notebook, names = one_of_the_notebooks(data)
    several = st.lists(texts, min_size=1, max_size=3).map(",".join)
    grids = data.draw(st.lists(st.tuples(names, several).map("=".join) | texts, min_size=1, max_size=3))
    given = [argument for grid in grids for argument in ("--grid", grid)]
    before = tree(world)
    if companion("rerun", notebook, "--profile", "quick", *given, "--dry-run"):
        points = reruns.plan(notebook, reruns.parse_grids(grids), "quick", "digits")
        assert_names_stay_inside(points, world / "outputs")
    assert tree(world) == before


def assert_names_stay_inside(points, folder):
    names = [point.name for point in points]
    assert len(set(names)) == len(names)
    for name in names:
        assert reruns._inside(name) == name and len(name) < 120
        assert (folder / name).resolve().parent == folder.resolve()


@cases(GRID_FILES)
@given(data=st.data())
def test_any_grid_file_is_planned_or_refused_in_one_line(world, data):
    notebook, names = one_of_the_notebooks(data)
    grid = st.dictionaries(names, st.lists(values, max_size=3) | texts, max_size=3)
    content = data.draw(st.one_of(
        (grid | st.lists(grid, max_size=3)).map(lambda g: written(g).encode("utf-8", "replace")),
        st.tuples(names, texts).map(lambda pair: ": ".join(pair).encode("utf-8", "replace")),
        st.sampled_from(NASTY).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.binary(max_size=40),
    ))  # fmt: skip
    (world / "grid.yml").write_bytes(content)
    before = tree(world)
    if companion("rerun", notebook, "--profile", "quick", "--grid", world / "grid.yml", "--dry-run"):
        points = reruns.plan(notebook, reruns.parse_grids([str(world / "grid.yml")]), "quick", "digits")
        assert_names_stay_inside(points, world / "outputs")
    assert tree(world) == before


OWN = {"dataset": "auto", "lr": 0.1, "batch_sizes": [8], "lrs": [0.1], "seeds": 3, "model": "mlp", "flag": True,
       "nothing": None, "output_dir": "."}  # fmt: skip


def small_notebooks(folder):
    folder.mkdir()
    for name in ("01_a", "02_b"):
        code = "\n".join(f"{parameter} = {value!r}" for parameter, value in OWN.items())
        cell = nbformat.v4.new_code_cell(code, metadata={"tags": ["parameters"]})
        kernel = {"name": "python3", "display_name": "", "language": "python"}
        notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel})
        nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder


@cases(PROFILES)
@given(data=st.data())
def test_any_profile_file_is_planned_or_refused(world, data):
    folder = world / "notebooks"
    if not folder.exists():
        small_notebooks(folder)
    section = st.dictionaries(st.sampled_from([*OWN, "x"]), values, max_size=3) | values
    notebook = st.sampled_from(["every", "01_a", "02_b", "x"])
    profile = st.dictionaries(notebook, section, max_size=3) | values
    content = data.draw(st.one_of(
        st.dictionaries(st.sampled_from(["quick", "laptop", "on_digits"]), profile, min_size=1, max_size=3)
        .map(lambda p: written(p).encode("utf-8", "replace")),
        texts.map(lambda text: f"quick: {{every: {{lr: {text}}}}}".encode("utf-8", "replace")),
        st.sampled_from(NASTY).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.binary(max_size=40),
    ))  # fmt: skip
    (folder / "profiles.yml").write_bytes(content)
    before = tree(world)
    for profile in ("quick", "laptop"):
        try:
            with at_most(20):
                planned = runs.plan(profile, "digits", folder=folder)
        except runs.BadInput:
            continue
        else:
            for item in planned:
                assert {n: type(v) for n, v in item.parameters.items()} == {n: type(OWN[n]) for n in item.parameters}
    assert tree(world) == before


def mutated(data, content):
    """Bytes of a file, changed somewhere, cut off, or other ones altogether."""
    kind = data.draw(st.sampled_from(["a byte", "cut", "longer", "others", "nothing"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if kind == "a byte":
        other = (content[at] + data.draw(st.integers(1, 255))) % 256
        return content[:at] + bytes([other]) + content[at + 1 :]
    if kind == "others":
        return data.draw(st.binary(max_size=50) | jsons.map(lambda j: json.dumps(j).encode()) | st.just(b"[" * 99_999))
    return {"cut": content[:at], "longer": content + b"x", "nothing": b""}[kind]


FILE_NAMES = ["frame.parquet", "arrays.npz", "../x", "/etc/passwd", "entry.json"]


@cases(STORES)
@given(data=st.data())
def test_a_store_gives_what_was_put_or_nothing_whatever_becomes_of_its_files(world, data):
    # The store of the autouse fixture is the original; each case has a copy.
    folder = world / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(Store().folder, folder)
    store = Store(folder)
    keys = sorted(entry.parent.name for entry in folder.glob("*/entry.json"))
    contents = {key: json.loads((folder / key / "entry.json").read_text())["content"] for key in keys}
    key = data.draw(st.sampled_from(keys))
    before = tree(folder)
    had = store.arrays(key)
    files = sorted(file.name for file in (folder / key).iterdir())
    name, record = data.draw(st.sampled_from(files)), json.loads((folder / key / "entry.json").read_text())
    file = folder / key / name
    what = data.draw(st.sampled_from(["bytes", "bytes", "a field", "removed", "another's"]))
    if what == "bytes":
        file.write_bytes(mutated(data, file.read_bytes()))
    elif what == "a field":
        field = data.draw(st.sampled_from(sorted(record)))
        sums = st.dictionaries(st.sampled_from(FILE_NAMES), st.sampled_from(list(record["sha256"].values())))
        names = st.lists(st.sampled_from([*ARRAYS, "other", 5, None]))
        record[field] = data.draw({"sha256": sums, "arrays": names}.get(field, jsons) | jsons)
        (folder / key / "entry.json").write_text(json.dumps(record))
    elif what == "removed":
        file.unlink()
    else:
        other = data.draw(st.sampled_from([k for k in keys if k != key]))
        shutil.copy(folder / other / "frame.parquet", file)
    wanted = data.draw(st.lists(st.sampled_from([*ARRAYS, "other"]), unique=True))
    with warnings.catch_warnings(record=True) as said, at_most(20):
        warnings.simplefilter("always")
        if store.has(key):
            pd.testing.assert_frame_equal(store.frame(key), FRAME, check_exact=True)
            arrays = store.arrays(key)
            assert set(arrays) <= set(had)
            for one, array in arrays.items():
                np.testing.assert_array_equal(array, had[one])
            assert not store.has(key, wanted) or set(wanted) <= set(arrays)
            assert said == []
        else:
            assert [str(w.message).startswith("damaged result set aside") for w in said] == [True]
            assert len(list((folder / "damaged").iterdir())) == 1
            for read in (store.frame, store.arrays):
                with pytest.raises(KeyError, match=key):
                    read(key)
    others = {path: content for path, content in before.items() if not path.startswith(key)}
    after = tree(folder)
    assert {path: after.get(path) for path in others} == others
    assert store.put(contents[key], FRAME, had) == key
    assert store.has(key, had)
    assert {path: tree(folder).get(path) for path in before} == before


RECORD = {
    "request": {"notebook": "00", "grids": [{"lr": [0.1, 0.2]}], "profile": "quick", "dataset": "auto",
                "given": {"seed": 1}, "jobs": 1, "cluster": None, "timeout": None},
    "notebook": "00_start_here", "at_work": False,
    "points": [{"name": "lr=0.1", "values": {"lr": 0.1}, "key": "k", "expected": 1.0}],
}  # fmt: skip
POINT = {"key": "k", "status": "ok", "error": "", "seconds": 1.0, "sha256": "0"}
broken = st.sampled_from(
    [b"", b"[" * 99_999, b"{", b"\xff", b"[]", b"null", b'{"request": {"cluster": "x"}, "points": []}']
)


def altered(data, record):
    """JSON in which one value, however deep, is another."""
    if data.draw(st.integers(0, 9)) == 0:
        return data.draw(broken)
    record = json.loads(json.dumps(record))
    inner = record
    while True:
        place = data.draw(st.sampled_from(list(inner) if isinstance(inner, dict) else list(range(len(inner)))))
        if not isinstance(inner[place], dict | list) or not inner[place] or data.draw(st.booleans()):
            break
        inner = inner[place]
    if isinstance(inner, dict) and data.draw(st.integers(0, 4)) == 0:
        del inner[place]
    else:
        inner[place] = data.draw(jsons)
    return json.dumps(record).encode()


@cases(RECORDS)
@given(data=st.data())
def test_a_rerun_whose_records_are_altered_is_read_or_refused_in_one_line(world, data):
    folder = world / "rerun"
    (folder / "points/lr=0.1").mkdir(parents=True, exist_ok=True)
    (folder / "rerun.json").write_bytes(
        altered(data, RECORD) if data.draw(st.booleans()) else json.dumps(RECORD).encode()
    )
    (folder / "points/lr=0.1/point.json").write_bytes(altered(data, POINT))
    before = tree(world)
    if companion("status", folder):
        assert all(
            p["status"] in ("ok", "FAILED", "running", "stopped", "waiting") for p in reruns.status(folder)["points"]
        )
    companion("rerun", "--resume", "--out", folder, "--dry-run")
    planned = runs.plan("quick", "digits", only=["00"])[0]
    point = reruns.Point("lr=0.1", {"lr": 0.1}, planned, "k")
    reruns._read(point, folder)
    assert point.status in ("waiting", "FAILED") and f"{point.seconds:.0f}" and isinstance(point.error, str)
    assert tree(world) == before


RUN = {"cores": 2, "notebooks": [{"name": "00_start_here", "status": "ok", "seconds": 20.0,
                                  "parameters": {"seeds": 2, "epochs": 5, "num_train": 600, "lr": 0.1}}]}  # fmt: skip


@cases(HISTORIES)
@given(data=st.data())
def test_altered_records_of_earlier_runs_stop_no_rerun(world, data):
    folder = world / "outputs/runs/earlier"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_bytes(altered(data, RUN))
    before = tree(world)
    assert companion("rerun", "00", "--profile", "quick", "--grid", "lr=0.1,0.2", "--dry-run")
    assert tree(world) == before


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_text_that_has_broken_other_readers_is_a_value_or_one_line(world, text):
    folder = small_notebooks(world / "notebooks")
    raw = text.encode("utf-8", "surrogatepass")
    (world / "grid.yml").write_bytes(b"lr: " + raw)
    (world / "grids.yml").write_bytes(raw)
    for profiles in (b"quick: " + raw, b"quick: {every: " + raw + b"}", b"quick: {every: {lr: " + raw + b"}}"):
        (folder / "profiles.yml").write_bytes(profiles)
        with contextlib.suppress(runs.BadInput), at_most(20):
            runs.plan("quick", "digits", folder=folder)
    before = tree(world)
    for option in (
        ["-p", f"lr={text}"], ["-p", f"batch_sizes=[{text}]"], ["-p", text], ["--grid", f"lr={text}"],
        ["--grid", f"batch_sizes={text}"], ["--grid", text], ["--grid", world / "grid.yml"],
        ["--grid", world / "grids.yml"],
    ):  # fmt: skip
        companion("rerun", "00", "--profile", "quick", "--dry-run", *option)
    assert tree(world) == before


def test_the_cases_are_as_many_as_promised():
    assert PARAMETERS >= 700 and GRIDS + GRID_FILES >= 600 and PROFILES >= 400 and STORES >= 300
    assert RECORDS + HISTORIES >= 200
    assert PARAMETERS + GRIDS + GRID_FILES + PROFILES + STORES + RECORDS + HISTORIES >= 2000


def test_a_date_is_no_value_of_any_notebook():
    with pytest.raises(runs.BadInput, match="expected float"):
        runs.plan("quick", "digits", only=["00"], given={"lr": datetime.date(2001, 1, 1)})
