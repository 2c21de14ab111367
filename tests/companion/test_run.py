"""What a run refuses, what it does with a notebook that fails, and what it leaves behind."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from click.testing import CliRunner

from companion import cli, executor, pages, parameters, run
from helpers.problems import DataError, builtin

COMPANION = [sys.executable, "-c", "from companion.cli import main; main()"]


PARAMETERS = 'output_dir = "."\nlr = 0.1\nseeds = 3\n'


def _notebook(folder: Path, name: str, *cells: str, **about: object) -> None:
    kernel = {"name": "python3", "display_name": "", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel, "companion": about})
    notebook.cells = [
        nbformat.v4.new_markdown_cell(f"# {name} <script>alert(1)</script>"),
        nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        *(nbformat.v4.new_code_cell(cell) for cell in cells),
    ]
    nbformat.write(notebook, folder / f"{name}.ipynb")


@pytest.fixture
def folder(tmp_path):
    """Three notebooks: one whose second cell raises, one whose widget's callback does, one that is fine."""
    (tmp_path / "profiles.yml").write_text("quick: {every: {seeds: 2}}\nlaptop: {}\non_digits: {}\n")
    _notebook(tmp_path, "01_raises", "print('before')", "1 / 0", "print('after')")
    _notebook(tmp_path, "02_widget", "import ipywidgets\nipywidgets.interact(lambda x: {}[x], x=(0, 3));")
    _notebook(tmp_path, "03_fine", "print(f'seeds={seeds} lr={lr}')")
    return tmp_path


@pytest.mark.slow
def test_a_failing_notebook_is_kept_up_to_its_cell_and_the_others_still_run(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run.run("quick", folder=folder, out=out) == 1
    said = capsys.readouterr().out
    assert "1 of 3 ok" in said and str(out / "index.html") in said
    record = {n["name"]: n for n in json.loads((out / "run.json").read_text())["notebooks"]}
    assert "ZeroDivisionError" in record["01_raises"]["error"]
    assert "KeyError" in record["02_widget"]["error"] and "widget" in record["02_widget"]["error"]
    assert record["03_fine"]["status"] == "ok"
    partial = nbformat.read(out / "01_raises.ipynb", as_version=4)
    outputs = [o.get("text", "") for c in partial.cells if c.cell_type == "code" for o in c.outputs]
    assert "before\n" in outputs and "after\n" not in outputs
    assert "ZeroDivisionError" in (out / "index.html").read_text()


MEETS = """import time
from pathlib import Path
print('I am', {me!r})
Path({me!r}).touch()
end = time.monotonic() + 60
while not Path({other!r}).exists():
    assert time.monotonic() < end, 'the other did not run at the same time'
    time.sleep(0.1)"""

ALONE = """import os, time
end = time.monotonic() + 60
while open(os.environ['COMPANION_JOBS']).read() != '2':
    assert time.monotonic() < end, 'it has one core, and the other is free'
    time.sleep(0.1)
print('it has both')"""


@pytest.mark.slow
def test_notebooks_go_side_by_side_the_longest_first_each_with_its_log(tmp_path):
    (tmp_path / "profiles.yml").write_text("quick: {}\n")
    _notebook(tmp_path, "01_short", MEETS.format(me="one", other="two"), minutes=1)
    _notebook(tmp_path, "02_last", ALONE)
    _notebook(tmp_path, "03_long", MEETS.format(me="two", other="one"), minutes=2)
    said, out = [], tmp_path / "out"
    assert run.run("quick", jobs=2, folder=tmp_path, out=out, say=said.append) == 0
    *first, last = [line for line in said if line.endswith("started")]
    assert set(first) == {"03_long: started", "01_short: started"} and last == "02_last: started"
    assert [n["name"] for n in json.loads((out / "run.json").read_text())["notebooks"]] == [
        "01_short", "02_last", "03_long"
    ]  # fmt: skip
    assert [(out / f"{name}.log").read_text() for name in ("01_short", "02_last", "03_long")] == [
        "I am one\n", "it has both\n", "I am two\n"
    ]  # fmt: skip
    assert re.fullmatch(r"\[3/3, 0:00:\d\d\] 02_last: ok, \d+ s", next(s for s in said if s.startswith("[3/3")))
    assert not any("I am" in line for line in said)


@pytest.mark.slow
def test_profile_and_given_parameters_reach_the_notebook(folder, tmp_path):
    out = tmp_path / "out"
    assert run.run("quick", only=["03"], given={"lr": 1}, folder=folder, out=out) == 0
    executed = nbformat.read(out / "03_fine.ipynb", as_version=4)
    assert "seeds=2 lr=1.0\n" in [o.text for c in executed.cells if c.cell_type == "code" for o in c.outputs]


@pytest.mark.slow
def test_text_from_notebooks_is_escaped_on_the_index_page(folder, tmp_path):
    run.run("quick", only=["03"], folder=folder, out=tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


@pytest.mark.slow
def test_a_kernel_that_dies_fails_its_notebook_alone(folder, tmp_path):
    _notebook(folder, "04_dies", "import os\nos._exit(3)")
    _notebook(folder, "05_fine", "print('here')")
    assert run.run("quick", only=["04", "05"], folder=folder, out=tmp_path / "out") == 1
    record = {n["name"]: n for n in json.loads((tmp_path / "out" / "run.json").read_text())["notebooks"]}
    assert record["04_dies"]["status"] == "FAILED" and "Dead" in record["04_dies"]["error"]
    assert record["05_fine"]["status"] == "ok"


BAD = [
    (["--only", "99"], "unknown notebook '99'"),
    (["--profile", "huge"], "unknown profile 'huge'"),
    (["--profile", "on_digits"], "unknown profile 'on_digits'"),
    (["--dataset", "cifar"], "dataset is 'cifar'; expected one of: auto, mnist"),
    (["-p", "nonsense=1"], "unknown parameter 'nonsense'"),
    (["-p", "lr"], "is not name=value"),
    (["-p", "lr=[1"], "is not a value"),
    (["-p", "lr=fast"], "expected float"),
    (["-p", "lr=true"], "expected float"),
    (["-p", "seeds=2.5"], "expected int"),
    (["-p", "batch_sizes=64"], "expected a list"),
    (["-p", "batch_sizes=[64, x]"], "expected int"),
    (["-p", "batch_sizes=[0, 64]"], "batch_sizes is [0, 64]; expected at least 1 and at most 600 (num_train)"),
    (["-p", "batch_sizes=[64, 100000]"], "expected at least 1 and at most 600 (num_train)"),
    (["-p", "batch_sizes=[]"], "batch_sizes is []; expected at least one value"),
    (["-p", "batch_sizes=[8, 8]"], "expected different values"),
    (["-p", "lr=0"], "lr is 0.0; expected above 0"),
    (["-p", "lr=.inf"], "expected a finite number"),
    (["-p", "seeds=0"], "seeds is 0; expected at least 1"),
    (["-p", "seeds=" + "9" * 30], "more than 64 bits"),
    (["-p", "num_train=70000"], "num_train is 70000; expected at least 10 and at most 1297 (dataset_size)"),
    (["-p", "output_dir=x"], "output_dir is set by --out"),
    (["-p", "lr=!!int ''"], "is not a value"),
    (["--jobs", "0"], "jobs is 0; expected at least 1"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line_and_exit_2_with_nothing_written(arguments, message, tmp_path):
    out = tmp_path / "out"
    profile = [] if "--profile" in arguments else ["--profile", "quick"]
    result = CliRunner().invoke(cli.main, ["run", *profile, "--out", str(out), *arguments])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""
    assert not out.exists()


def test_an_output_folder_with_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "claims.csv").write_text("precious")
    with pytest.raises(parameters.BadInput, match=r"is not empty; choose a new folder with --out$"):
        run.run("quick", only=["00"], out=tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["claims.csv"]


@pytest.mark.parametrize("where", ["file/below", "/proc/companion"])
def test_an_output_folder_that_cannot_be_written_is_refused(where, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(parameters.BadInput, match="cannot write into"):
        run.run("quick", only=["00"], out=tmp_path / where)


def test_a_damaged_data_file_is_refused_by_its_name(tmp_path, monkeypatch):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in builtin._MNIST_MD5:
        (raw / name).write_bytes(b"damaged")
    monkeypatch.setenv("COMPANION_DATA", str(tmp_path))
    with pytest.raises(parameters.BadInput, match="train-images-idx3-ubyte"):
        run.run("laptop", only=["05"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_without_mnist_and_network_digits_stand_in_and_it_is_said_loudly(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COMPANION_DATA", str(tmp_path / "empty"))

    def download(*_):
        raise DataError("no network")

    monkeypatch.setattr(builtin, "download", download)
    small = {"epochs": 2, "more_epochs": 1, "early": 1, "seeds": 1}
    assert run.run("laptop", only=["05"], given=small, out=tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert said.count("MNIST IS NOT HERE") == 2
    assert "MNIST IS NOT HERE" in (tmp_path / "out" / "index.html").read_text()
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["dataset"] == "digits"
    figures = pages.figures(tmp_path / "out", "05_batch_size_switching")
    assert figures and all("not MNIST" in f["caption"] for f in figures)


def test_the_command_answers_without_importing_torch():
    code = "import sys, companion.cli, companion.run, companion.grid; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    shown = subprocess.run([*COMPANION, "run", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "--profile" in shown.stdout


def test_ctrl_c_ends_with_130_and_says_what_is_kept(monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", stop)
    result = CliRunner().invoke(cli.main, ["run"])
    assert result.exit_code == 130 and result.stderr == "companion: stopped\n"


LAB = """from helpers import Lab, problems
lab = Lab(problems.named("blobs", "brownlee_mlp"), batch_size=8, small=True)
lab"""


@pytest.mark.slow
def test_a_live_lab_plays_by_itself_in_a_run_and_leaves_text_where_it_stood(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "the notebook from which the run was started")
    _notebook(folder, "04_lab", LAB, "lab.rehearse({400: 64}, until=1000)\nprint(lab.session.runs[0].training.steps)")
    out = tmp_path / "out"
    assert run.run("quick", only=["04"], folder=folder, out=out) == 0
    printed = [
        o.get("text") for c in nbformat.read(out / "04_lab.ipynb", as_version=4).cells for o in c.get("outputs", ())
    ]
    assert "60\n" in printed  # 50 steps of 8, then 100 examples of the first epoch in 2, and 500 of the second in 8
    assert "Live controls stand here" in (out / "04_lab.html").read_text()


@pytest.mark.slow
def test_what_fails_in_a_live_lab_fails_the_run(folder, tmp_path):
    breaks = "lab.session.runs[0].training.step = lambda: {}['steps']"
    _notebook(folder, "04_rehearsal", LAB, breaks, "lab.rehearse({}, until=1000)")
    _notebook(folder, "05_played", LAB, breaks, "lab.play.click()", "import time; time.sleep(2)")
    out = tmp_path / "out"
    assert run.run("quick", only=["04", "05"], folder=folder, out=out) == 1
    record = {n["name"]: n for n in json.loads((out / "run.json").read_text())["notebooks"]}
    assert record["04_rehearsal"]["error"] == "cell 5: KeyError: 'steps'"
    assert record["05_played"]["error"] == "in a widget: Training stopped: KeyError: 'steps'"


def test_runs_that_begin_in_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(parameters, "OUTPUTS", tmp_path)
    monkeypatch.setattr(executor.time, "strftime", lambda _: "now")
    found = [executor.new_folder(None, "runs", "quick") for _ in range(2)]
    assert [folder.name for folder in found] == ["now-quick", f"now-quick-{os.getpid()}"]
    assert all(folder.is_dir() for folder in found)


def test_relative_folders_of_data_and_store_stay_where_the_user_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMPANION_STORE", "mine")
    monkeypatch.delenv("COMPANION_DATA", raising=False)
    assert executor.environment_of([], 2, None, None) == {
        "COMPANION_STORE": str(tmp_path / "mine"),
        "COMPANION_JOBS": "2",
    }


@pytest.mark.slow
def test_a_kernel_gets_the_environment_of_its_run_and_this_process_keeps_its_own(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("COMPANION_JOBS", raising=False)
    _notebook(folder, "04_asks", "import os\nprint(open(os.environ['COMPANION_JOBS']).read())")
    out = tmp_path / "out"
    assert run.run("quick", only=["04"], jobs=3, folder=folder, out=out) == 0
    assert '"3\\n"' in (out / "04_asks.ipynb").read_text() and "COMPANION_JOBS" not in os.environ


def test_a_reader_that_leaves_is_no_failure():
    with subprocess.Popen([*COMPANION, "status"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 0
