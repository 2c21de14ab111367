"""Every notebook, found by its name: its form, its parameters under every profile, and a headless run."""

import ast
import re
import subprocess
import sys

import nbformat
import pandas as pd
import pytest
import yaml
from test_notebook_outputs import unseen

from companion import pages, parameters, run
from helpers import problems
from helpers.ledger import claims, rules

NAMES = sorted(parameters.notebooks())
DEFAULTS = {name: parameters.defaults(path) for name, path in parameters.notebooks().items()}
PROFILES = yaml.safe_load((parameters.NOTEBOOKS / "profiles.yml").read_text())

# Appended to a copy: moves every slider and menu through its values, as a reader would.
MOVE_EVERYTHING = """
from ipywidgets.widgets.widget import _instances
for control in list(_instances.values()):
    if hasattr(control, "options"):
        for label in [o[0] if isinstance(o, tuple) else o for o in control.options]:
            control.label = str(label)
    elif hasattr(control, "min") and hasattr(control, "value"):
        for value in (control.min, control.max):
            control.value = value
"""


def _read(name):
    return nbformat.read(parameters.notebooks()[name], as_version=4)


def _code(name):
    return [c for c in _read(name).cells if c.cell_type == "code"]


@pytest.mark.parametrize("name", NAMES)
def test_no_outputs_are_committed(name):
    assert all(not c.outputs and c.execution_count is None for c in _code(name))


@pytest.mark.parametrize("name", NAMES)
def test_it_reads_as_designed(name):
    notebook, code = _read(name), _code(name)
    assert notebook.cells[0].source.startswith("# ")
    assert 10 <= len(notebook.cells) <= 40
    written = [c.source for c in code if "parameters" not in c.metadata.get("tags", [])]
    assert max(len(source.splitlines()) for source in written) <= 20
    assert max(map(len, written)) <= 900
    assert sum(len(re.findall(r"^\s*def ", c.source, re.M)) for c in code) <= 2
    assert "What this cannot conclude" in notebook.cells[-1].source
    assert any("**Prediction.**" in c.source for c in notebook.cells)


@pytest.mark.parametrize("name", NAMES)
def test_the_parameters_cell_holds_literals_each_with_a_comment(name):
    (cell,) = [c for c in _code(name) if "parameters" in c.metadata.get("tags", [])]
    for line in cell.source.splitlines():
        assignment, comment = line.split("  # ")
        ast.literal_eval(assignment.split(" = ")[1])
        assert comment
    assert {"profile", "output_dir"} <= set(parameters.defaults(parameters.notebooks()[name]))


@pytest.mark.parametrize("dataset", ["mnist", "digits"])
@pytest.mark.parametrize("profile", [p for p in PROFILES if not p.startswith("on_")])
def test_every_profile_fits_the_notebooks(profile, dataset):
    planned = parameters.plan(profile, dataset)
    assert [p.name for p in planned] == NAMES
    for section in PROFILES.values():
        for name, values in section.items():
            known = {parameter for n in NAMES if name in ("every", n) for parameter in DEFAULTS[n]}
            assert set(values) <= known, (name, values)


def test_what_digits_change_is_laid_over_laptop_and_paper_but_not_over_quick():
    name = "06_learning_rate_scaling"
    for profile in ("quick", "laptop", "paper"):
        (planned,) = parameters.plan(profile, "digits", only=[name])
        section = PROFILES["quick" if profile == "quick" else "on_digits"][name]
        assert planned.parameters.items() >= section.items()


@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_it_runs_headlessly_and_every_slider_works(name, tmp_path):
    folder, out = tmp_path / "notebooks", tmp_path / "out"
    folder.mkdir()
    notebook = _read(name)
    notebook.cells.append(nbformat.v4.new_code_cell(MOVE_EVERYTHING))
    nbformat.write(notebook, folder / f"{name}.ipynb")
    (folder / "profiles.yml").write_text((parameters.NOTEBOOKS / "profiles.yml").read_text())
    assert run.run("quick", folder=folder, out=out) == 0
    figures = pages.figures(out, name)
    assert len(figures) == sum(len(re.findall(r"book\.(figure|lab)\(", c.source)) for c in _code(name))
    assert all(f["title"] != f["name"] and f["caption"] for f in figures)
    assert all((out / "figures" / f"{f['name']}.svg").exists() for f in figures)
    ledger = out / "claims" / f"{name}.csv"
    assert ledger.exists() == any("book.ledger()" in c.source for c in _code(name))
    if ledger.exists():
        table = pd.read_csv(ledger)
        assert set(table["verdict"]) <= set(rules.VERDICTS)
        assert table["ours"][table["verdict"] != rules.NOT_JUDGED].notna().all()
    assert unseen(nbformat.read(out / f"{name}.ipynb", as_version=4)) == []
    assert (out / f"{name}.html").exists()


def test_claims_of_the_ledger_are_all_judged_by_a_notebook():
    source = "\n".join(c.source for name in NAMES for c in _code(name))
    assert set(re.findall(r'judge\(\s*"([\w-]+)"', source)) == set(claims.CLAIMS)


@pytest.mark.slow
def test_plain_papermill_works_from_any_folder(tmp_path):
    notebook = parameters.notebooks()["00_start_here"]
    command = [sys.executable, "-m", "papermill", str(notebook), "out.ipynb", "-k", "python3"]
    command += ["-p", "lr", "0.05", "-p", "epochs", "2", "-p", "output_dir", "."]
    for last in (
        False,
        True,
    ):  # nbclient leaves one such execution in some hundreds without an end (see companion.executor)
        try:
            subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=150)
            break
        except subprocess.TimeoutExpired:
            if last:
                raise
    assert (tmp_path / "figures" / "00_start_here.png").exists()


@pytest.mark.slow
def test_a_notebook_runs_on_the_real_mnist(mnist_root, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_DATA", str(mnist_root))
    small = {"num_train": 2000, "epochs": 2, "more_epochs": 1, "early": 1, "seeds": 1}
    assert run.run("laptop", "auto", only=["05"], given=small, out=tmp_path / "out") == 0
    table = pd.read_csv(tmp_path / "out" / "claims.csv")
    assert not table["why"].fillna("").str.contains("another set-up").any()
    assert problems.load("mnist", num_train=2000, root=mnist_root).num_train == 2000
