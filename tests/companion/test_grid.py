"""Reruns: grids, the folders of their points, what is done again and what is not, and how it is shown."""

import json
import re
import shutil
import sys

import nbformat
import pandas as pd
import pytest
from click.testing import CliRunner

from companion import cli, executor, grid, parameters
from companion.grid import Request

FRAME = """
import pandas as pd
from pathlib import Path
tables = Path(output_dir) / "tables"
tables.mkdir()
pd.DataFrame({"lr": [lr], "x": [seed]}).to_parquet(tables / "01_t.parquet")
"""
FIGURES = "from helpers import plots\nimport matplotlib.pyplot as plt\nfor name in ('01_a', '01_b'):\n"
FIGURES += "    plots.save(plt.subplots()[1], name, output_dir, f'of {lr}')\n    plt.close()"


def _write(folder, name, *cells):
    made = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    )
    parameters = 'lr = 0.1\nseed = 0\nsizes = [1, 2]\nseeds = 3\nprofile = "none"\noutput_dir = "."\n'
    made.cells = [
        nbformat.v4.new_markdown_cell("# A finding"),
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        *(nbformat.v4.new_code_cell(cell) for cell in cells),
    ]
    made.metadata["companion"] = {"main_figure": "01_b"}
    nbformat.write(made, folder / f"{name}.ipynb")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "profiles.yml").write_text("quick: {}\nlaptop: {}\n")
    _write(folder, "01_grid", FRAME, FIGURES, "if lr > 1:\n    raise ValueError('too large')")
    return folder


@pytest.mark.parametrize(("texts", "grids"), [
    ([], [{}]),
    (["lr=0.01,0.1"], [{"lr": [0.01, 0.1]}]),
    (["lr=1e-3"], [{"lr": [0.001]}]),
    (["sizes=[64,256],[1024]"], [{"sizes": [[64, 256], [1024]]}]),
    (["seed=0:3"], [{"seed": [0, 1, 2]}]),
    (["dataset=mnist,digits"], [{"dataset": ["mnist", "digits"]}]),
    (["lr=0.1", "seed=5:7"], [{"lr": [0.1], "seed": [5, 6]}]),
])  # fmt: skip
def test_grids_as_they_are_written_on_the_command_line(texts, grids):
    assert grid.parse_grids(texts) == grids


def test_a_yaml_file_holds_a_grid_or_several(tmp_path):
    file = tmp_path / "grids.yml"
    file.write_text("- {lr: [0.01, 1e-1], seed: '0:2'}\n- {lr: [1.0], seed: [7]}\n")
    assert grid.parse_grids([str(file), "seeds=1"]) == [
        {"lr": [0.01, 0.1], "seed": [0, 1], "seeds": [1]}, {"lr": [1.0], "seed": [7], "seeds": [1]},
    ]  # fmt: skip


@pytest.mark.parametrize(("texts", "message"), [
    (["lr="], "expected values"),
    (["=1"], "is not a parameter's name"),
    (["lr=0.1", "lr=0.2"], "lr is given twice"),
    (["seed=3:3"], "expected values"),
    (["seed=0:999999999"], "more than 10,000 points"),
    (["seed=0:200", "lr=" + ",".join(f"0.{k}" for k in range(1, 90))], "more than 10,000 points"),
    (["nope=1"], "unknown parameter 'nope'"),
    (["lr=fast"], "expected float"),
    (["lr=0.1,-1"], "expected above 0"),
    (["seed=-1"], "seed is -1; expected at least 0"),
    (["/nowhere/grids.yml"], "No such file"),
    (["output_dir=a,b"], "output_dir is set by --out"),
])  # fmt: skip
def test_what_is_no_grid_is_refused_in_one_line_and_nothing_is_written(texts, message, tmp_path):
    out = tmp_path / "out"
    grids = [word for text in texts for word in ("--grid", text)]
    result = CliRunner().invoke(cli.main, ["rerun", "02", "--profile", "quick", "--out", str(out), *grids])
    assert result.exit_code == 2 and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and result.stdout == ""
    assert not out.exists()


def test_equal_points_are_one_and_names_say_the_values(folder):
    points = grid.plan("01", [{"lr": [0.1, 0.10, 1e-4], "sizes": [[1, 2]]}, {"lr": [0.1]}], "quick", "x", folder=folder)
    assert [p.label for p in points] == ["lr=0.1,sizes=1-2", "lr=0.0001,sizes=1-2"]


def test_names_that_would_be_the_same_are_told_apart(folder):
    points = grid.plan("01", [{"lr": [0.1234567, 0.12345671]}], "quick", "x", folder=folder)
    assert len({p.label for p in points}) == 2 and all(p.label.startswith("lr=0.123457-") for p in points)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A rerun of four points, of which two fail; and what it said."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "profiles.yml").write_text("quick: {}\n")
    _write(folder, "01_grid", FRAME, FIGURES, "if lr > 1:\n    raise ValueError('too large')")
    out, said = tmp_path_factory.mktemp("runs") / "out", []
    request = Request("01", [{"lr": [0.5, 2.0], "seed": [0, 1]}], "quick", jobs=2)
    assert grid.rerun(request, out=out, folder=folder, say=said.append) == 1
    return folder, out, "\n".join(said)


@pytest.mark.slow
def test_a_failing_point_leaves_the_others_and_is_named_with_its_cell(done):
    _, out, said = done
    assert "2 of 4 ok" in said
    assert len(re.findall(r"^\[\d/4, .*\] lr=2,seed=1: FAILED, \d+ s: cell 5: ValueError: too large$", said, re.M)) == 1
    assert (out / "points/lr=2,seed=1/01_grid.ipynb").exists()


@pytest.mark.slow
def test_results_are_one_tidy_table_with_the_grid_beside_the_notebooks_own_columns(done):
    results = pd.read_parquet(done[1] / "results.parquet")
    assert results[["lr", "x", "point", "table", "grid_lr", "grid_seed"]].to_dict("records") == [
        {"lr": 0.5, "x": s, "point": f"lr=0.5,seed={s}", "table": "01_t", "grid_lr": 0.5, "grid_seed": s}
        for s in (0, 1)
    ]


@pytest.mark.slow
def test_resuming_runs_what_failed_and_nothing_else(done):
    folder, out, _ = done
    before = {f: f.stat().st_mtime_ns for f in out.glob("points/*/01_grid.ipynb")}
    said = []
    assert grid.rerun(grid.record(out)["request"], out=out, resume=True, folder=folder, say=said.append) == 1
    again = {f.parent.name for f, time in before.items() if f.stat().st_mtime_ns != time}
    assert again == {"lr=2,seed=0", "lr=2,seed=1"} and "2 of them are finished there already" in "\n".join(said)


@pytest.mark.slow
def test_a_damaged_copy_and_a_changed_notebook_are_run_again_without_what_they_left(done, tmp_path):
    folder, out, _ = done
    folder, out = shutil.copytree(folder, tmp_path / "folder"), shutil.copytree(out, tmp_path / "out")
    one = {f.parent.name: f for f in out.glob("points/*/01_grid.ipynb")}["lr=0.5,seed=0"]
    one.write_bytes(one.read_bytes().replace(b"A finding", b"A findinG"))
    said = []
    grid.rerun(grid.record(out)["request"], out=out, resume=True, folder=folder, say=said.append)
    assert "1 of them are finished there already" in "\n".join(said) and b"A finding" in one.read_bytes()
    _write(folder, "01_grid", FIGURES.replace("'01_a', '01_b'", "'01_c',"), "raise ValueError('other')")
    said.clear()
    assert grid.rerun(grid.record(out)["request"], out=out, resume=True, folder=folder, say=said.append) == 1
    assert "0 of 4 ok" in "\n".join(said) and not (out / "results.parquet").exists()
    assert [f.name for f in sorted((one.parent / "figures").glob("*.png"))] == ["01_c.png"]
    assert not (one.parent / "tables").exists()


@pytest.mark.slow
def test_all_points_execute_the_notebook_as_it_was(folder, tmp_path):
    _write(folder, "01_grid", f"open({str(folder / '01_grid.ipynb')!r}, 'w').write('edited')\nprint(lr)")
    request = Request("01", [{"lr": [0.1, 0.2, 0.3]}], "quick", jobs=1)
    assert grid.rerun(request, out=tmp_path / "out", folder=folder, say=str) == 0


@pytest.mark.slow
def test_tables_that_differ_in_type_are_put_together_as_text(folder, tmp_path):
    more = "for name, value in (('01_a', 1), ('01_b', 'one')):\n"
    more += "    pd.DataFrame({'size': [value]}).to_parquet(tables / f'{name}.parquet')"
    _write(folder, "01_grid", FRAME, more)
    assert grid.rerun(Request("01", [{"lr": [0.1]}], "quick"), out=tmp_path / "out", folder=folder, say=str) == 0
    assert pd.read_parquet(tmp_path / "out" / "results.parquet")["size"].dropna().tolist() == ["1", "one"]


@pytest.mark.slow
def test_a_resumed_rerun_keeps_its_dataset_and_takes_only_what_may_change(done):
    _, out, _ = done
    assert json.loads((out / "rerun.json").read_text())["request"]["dataset"] == "digits"
    for more in (["01"], ["--grid", "lr=1"], ["-p", "lr=1"], ["--profile", "quick"], ["--dataset", "digits"]):
        result = CliRunner().invoke(cli.main, ["rerun", *more, "--resume", "--out", str(out)])
        assert result.exit_code == 2 and "only --jobs, --cluster and --timeout may change" in result.stderr


@pytest.mark.slow
def test_status_shows_every_point_and_the_command_that_goes_on(done):
    result = CliRunner().invoke(cli.main, ["status", str(done[1])])
    assert result.exit_code == 0
    assert "lr=0.5,seed=0" in result.output and "01_grid: 2 ok, 2 FAILED" in result.output
    assert f"To go on: companion rerun --resume --out {done[1]}" in result.output


@pytest.mark.slow
def test_a_second_rerun_into_a_folder_at_work_is_refused(done):
    folder, out, _ = done
    with executor.alone(out):
        assert grid.status(out)["at_work"]
        with pytest.raises(parameters.BadInput, match="another run is at work"):
            grid.rerun(grid.record(out)["request"], out=out, resume=True, folder=folder)
    assert not grid.status(out)["at_work"]


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 1600])
@pytest.mark.slow
def test_the_page_lays_the_main_figures_over_the_grid(done, browser, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    problems = []
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.goto((done[1] / "index.html").as_uri())
    table = page.locator("table.grid")
    assert [h for h in table.locator("thead th").all_inner_texts() if h] == ["seed = 0", "seed = 1"]
    assert table.locator("tbody th").all_inner_texts() == ["lr = 0.5", "lr = 2.0"]
    images = table.locator("img")
    assert images.count() == 2
    for image in images.all():
        image.scroll_into_view_if_needed()
    page.wait_for_function("[...document.images].every(i => i.complete && i.naturalWidth > 300)")
    assert all("01_b.png" in source for source in images.evaluate_all("all => all.map(i => i.src)"))
    assert table.locator("tbody tr").nth(1).inner_text().count("too large") == 2
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert problems == []


def test_a_dry_run_lists_the_points_and_writes_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(parameters, "OUTPUTS", tmp_path / "outputs")
    said = []
    assert grid.rerun(Request("01", [{"seeds": [3, 6]}], "quick"), dry=True, folder=folder, say=said.append) == 0
    assert "\n".join(said).split("\n") == ["seeds=3", "seeds=6", "", "2 × 01_grid, quick on digits"]
    assert not (tmp_path / "outputs").exists()


def test_clean_says_what_can_go_and_removes_it_only_when_told(store_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(parameters, "OUTPUTS", tmp_path / "outputs")
    from helpers.sweep.store import Store

    kept = Store().put({"numerics": 10**6}, pd.DataFrame({"x": [1]}))
    from helpers.engine import training

    monkeypatch.setattr(training, "NUMERICS", 10**6)
    old = Store().put({"numerics": 1}, pd.DataFrame({"x": [1]}))
    of_old = Store().put({"protocol": "walk", "of": {"numerics": 1}}, pd.DataFrame({"x": [1]}))
    (store_folder / "damaged" / "x").mkdir(parents=True)
    (store_folder / "damaged" / "x" / "frame.parquet").write_bytes(b"x" * 2_000_000)
    (store_folder / ".new-abc").mkdir()
    held = Store().claim("0" * 24)
    Store().claim("1" * 24).release()
    said = CliRunner().invoke(cli.main, ["clean"]).output
    assert "2.0 MB can be deleted" in said and "set aside as damaged" in said and said.count("of older numerics") == 2
    assert ".new-abc" not in said  # its writer may be at work
    assert "1" * 24 in said and "0" * 24 not in said
    assert sorted(Store().all_keys()) == sorted([kept, old, of_old])
    assert "2.0 MB deleted" in CliRunner().invoke(cli.main, ["clean", "--yes"]).output
    assert Store().all_keys() == [kept] and not (store_folder / "damaged" / "x").exists()
    assert "nothing to delete" in CliRunner().invoke(cli.main, ["clean"]).output
    held.release()


@pytest.mark.slow
def test_a_notebook_is_executed_by_the_python_that_reruns_it(done):
    record = json.loads((done[1] / "rerun.json").read_text())
    assert record["python"] == sys.version.split()[0] and record["request"]["jobs"] == 2


def test_a_point_counts_the_module_of_a_problem_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parameters, "examples_of", lambda problem: 1_200)
    keys = []
    for text in ("problem = 1", "problem = 1", "problem = 2"):
        (tmp_path / "my_module.py").write_text(text)
        (point,) = grid.plan("05", [{}], "quick", "digits", given={"problem": "my_module:problem"})
        keys.append(point.key)
    assert keys[0] == keys[1] != keys[2]
