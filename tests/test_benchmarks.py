"""The benchmarks run, in smoke sizes; no time is asserted anywhere."""

import json
import re
import subprocess
import sys

import joblib
import pytest
import torch

from benchmarks import baselines, report, timing
from benchmarks.__main__ import main
from benchmarks.rows import ROWS, Bench

SMOKE = Bench(pairs=2, smoke=True)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Tests run side by side: threads that wait for each other would take them many times as long."""
    before = torch.get_num_threads()
    monkeypatch.setattr(joblib, "cpu_count", lambda: 1)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def line(values, **options):
    return timing.Line("a-row", "a case", "a baseline", values, **options)


# Rows


@pytest.mark.parametrize("name", ["walk", "per-example", "own-module"])
def test_row(name):
    if name == "per-example":
        pytest.importorskip("backpack")
    for found in ROWS[name](SMOKE):
        assert found.row == name and found.case and found.against and found.target > 0
        assert len(found.values) in (1, SMOKE.pairs)
        if found.theirs:
            assert len(found.ours) == len(found.theirs) == SMOKE.pairs
            quotients = [found.ours, found.theirs] if found.at_least else [found.theirs, found.ours]
            if found.unit == "×":
                assert found.values == pytest.approx([b / a for a, b in zip(*quotients)])


@pytest.mark.slow
def test_the_command_writes_a_table_a_json_and_a_figure(tmp_path, capsys):
    assert main(["--smoke", "--pairs", "1", "--rows", "mnist-epoch,frozen", "--out", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "new/benchmarks.json").read_text())
    assert [one["row"] for one in written["lines"]] == ["mnist-epoch", "mnist-epoch", "frozen"]
    assert written["machine"]["cores"] >= 1 and written["machine"]["versions"]["torch"]
    assert written["bench"] == {"pairs": 1, "smoke": True} and not written["skipped"] and not written["failed"]
    assert (tmp_path / "new/benchmarks.md").read_text().strip() in printed and "mean nothing" in printed
    assert (tmp_path / "new/figures/sweep_seconds.png").stat().st_size > 10_000


# Wrong results


def test_a_wrong_result_fails_the_row(monkeypatch):
    monkeypatch.setattr(baselines, "walk_port", lambda *arguments: [[1.0, 2.0]])
    with pytest.raises(timing.Mismatch, match="differ"):
        ROWS["walk"](SMOKE)


@pytest.mark.slow
def test_a_failed_row_is_named_and_the_exit_code_is_1(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(baselines, "minibatch_norms", lambda *arguments: [1.0] * 4)
    assert main(["--smoke", "--pairs", "1", "--rows", "frozen,cost-growth", "--out", str(tmp_path / "new")]) == 1
    assert "FAILED frozen: Mismatch" in capsys.readouterr().out
    written = json.loads((tmp_path / "new/benchmarks.json").read_text())
    assert list(written["failed"]) == ["frozen"] and {one["row"] for one in written["lines"]} == {"cost-growth"}


def test_a_row_is_skipped_with_its_reason_where_it_cannot_run(tmp_path, capsys, monkeypatch):
    def absent(bench):
        raise ModuleNotFoundError("No module named 'keras'", name="keras")

    def without_images(bench):
        raise timing.Skipped("MNIST is not here")

    monkeypatch.setitem(ROWS, "walk", absent)
    monkeypatch.setitem(ROWS, "seeds", without_images)
    assert main(["--smoke", "--rows", "walk,seeds", "--out", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    assert "SKIPPED walk: needs keras" in printed and "SKIPPED seeds: MNIST is not here" in printed


# Bad input


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rows", "walks"], "unknown row 'walks'"),
        (["--pairs", "0"], "--pairs is 0"),
        (["--pairs", "many"], "many"),
        (["--fast"], "--fast"),
        (["--out", "."], "is there already"),
        (["--out", "Makefile/new"], "--out: "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, complaint, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert complaint in said.err and said.err.count("\n") == 1 and not said.out


# The parts


def test_sides_take_turns_after_an_unmeasured_round_of_each():
    turns = []
    sides = {name: lambda name=name: lambda: turns.append(name) or len(turns) for name in "AB"}
    seconds, checked = timing.interleave("title", sides, 3, lambda results: f"{results['B'] - results['A']} apart")
    assert turns == list("AB" * 4) and checked == "1 apart"
    assert {name: len(each) for name, each in seconds.items()} == {"A": 3, "B": 3}


def test_a_ratio_is_of_scaled_seconds_and_says_so(monkeypatch):
    seconds = {"ours": [1.0, 2.0], "theirs": [3.0, 4.0]}
    monkeypatch.setattr(timing, "interleave", lambda *arguments: (seconds, "equal"))
    scaled = {"theirs": (10, "1 of 10 trials")}
    (found,) = timing.compare("row", "case", seconds, {"theirs": 25}, 2, None, "a note", scaled)
    assert found.values == [30.0, 20.0] and found.median == 25 and found.reached
    assert found.against == "theirs; scaled from 1 of 10 trials" and found.note == "a note; equal"


@pytest.mark.parametrize(
    ("values", "options", "reached"),
    [
        ([4.9], {"target": 5}, False),
        ([1.2], {"target": 1.15, "at_least": False}, False),
        ([1.1], {"target": 1.15, "at_least": False}, True),
        ([1.1], {"target": 1.0, "at_least": False, "error": 0.06}, True),
    ],
)
def test_reached(values, options, reached):
    assert line(values, **options).reached == reached


def test_same_takes_no_nan_and_no_more_than_it_allows():
    assert "allowed" in timing.same("norms", [1.0, 2.0], [1.0, 2.001], within=1e-3, relative=True)
    for wrong in (2.1, float("nan")):
        with pytest.raises(timing.Mismatch, match="norms"):
            timing.same("norms", [1.0, 2.0], [1.0, wrong], within=1e-3, relative=True)


def test_the_table_is_markdown_with_a_cell_for_each_column():
    table = report.table(
        [
            line([2.0, 3.0, 1.5], target=5, ours=[1.0] * 3, theirs=[2.0] * 3, limit=8.0),
            line([80.0], target=90, unit="%"),
        ]
    )
    first, dashes, *body = table.splitlines()
    assert len({len(row) for row in (first, dashes, *body)}) == 1
    assert all(row.count("|") == first.count("|") for row in body)
    assert re.search(r"\| 2× +\| 1\.5× … 3× +\| ≥ 5× +\| no +\| 8× +\|$", body[0]) and "80 %" in body[1]


# A fact about start-up, not a time


def test_help_does_not_import_torch():
    code = "import sys; from companion.cli import main; main(['--help'], standalone_mode=False)"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
