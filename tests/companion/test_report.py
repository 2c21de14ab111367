"""The report: what is on the page comes from the run's own files, and leads to where it was computed."""

import json
import re
import shutil

import nbformat
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

from companion import cli, pages, parameters, publish, report
from helpers.ledger import claims, rules

pytestmark = pytest.mark.slow  # a run of two notebooks


@pytest.fixture
def copied(run_folder, tmp_path):
    return shutil.copytree(run_folder, tmp_path / "run")


def words(page: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def test_every_claim_links_to_the_cell_that_judges_it_and_names_data_and_command(run_folder):
    page = (run_folder / "index.html").read_text(encoding="utf-8")
    table = rules.read(run_folder / "claims.csv")
    for claim, parts in table.groupby("claim"):
        body = re.search(rf'<tbody class="claim[^>]* id="{claim}">(.*?)</tbody>', page, re.S).group(1)
        cell = re.search(r'href="#([^"]+)">the cell', body).group(1)
        (place,) = re.findall(rf'<div id="{cell}">(.*?)</details>', page, re.S)
        assert f'"{claim}"' in words(place).replace("&quot;", '"').replace("&#34;", '"')
        notebook = parts.notebook.iloc[0]
        assert f"companion run --profile quick --dataset digits --only {notebook[:2]} -p seed=1" in body
        for name in re.findall(r'href="tables/([^"]+)"', body):
            assert len(pd.read_parquet(run_folder / "tables" / name))
        for shown in rules.readable(parts)["ours [95 %]"]:
            assert shown in body


def test_the_command_on_the_page_makes_the_same_figures_again(run_folder, tmp_path):
    command = report.command(json.loads((run_folder / "run.json").read_text()), "05_batch_size_switching")
    arguments = [*command.split()[1:], "--out", str(tmp_path / "again")]
    assert CliRunner().invoke(cli.main, arguments).exit_code == 0
    once, again = (rules.read(f / "claims/05_batch_size_switching.csv") for f in (run_folder, tmp_path / "again"))
    pd.testing.assert_frame_equal(once, again)


def test_the_figures_in_the_sentences_are_the_ledgers(copied):
    table = rules.read(copied / "claims.csv")
    row = table[(table.claim == "sweep-accuracy") & (table.part == "64")].index[0]
    table.loc[row, ["ours", "low", "high"]] = [12.34, 12.0, 12.68]
    table.to_csv(copied / "claims.csv", index=False)
    assert "batch 64 ends at 12.34 ± 0.34 % test accuracy" in words(report.write(copied).read_text())


def test_a_sentence_concludes_only_where_its_claims_are_reproduced(copied):
    said = "what it lacks is training"
    assert said not in report.write(copied).read_text()
    table = rules.read(copied / "claims.csv")
    table["verdict"] = rules.REPRODUCED
    table.to_csv(copied / "claims.csv", index=False)
    assert said in report.write(copied).read_text()


def test_a_sentence_is_left_out_where_a_part_of_it_is_not_judged(copied):
    table = rules.read(copied / "claims.csv")
    before = words(report.write(copied).read_text())
    table.loc[(table.claim == "sweep-accuracy") & (table.part == "64"), "verdict"] = rules.NOT_JUDGED
    table.to_csv(copied / "claims.csv", index=False)
    said = "At equal passes and an equal learning rate, batch 64 ends at"
    assert said in before and said not in words(report.write(copied).read_text())


def test_every_sentence_is_of_claims_and_parts_that_exist():
    rows = [
        {"claim": c, "part": p.label, "ours": 1.0, "high": 1.1, "verdict": rules.REPRODUCED}
        for c, claim in claims.CLAIMS.items()
        for p in claim.parts.values()
    ]
    ledger = {c: {"verdict": rules.REPRODUCED} for c in claims.CLAIMS}
    said = report.sentences()
    for kind, number in (("answer", 6), ("findings", 7)):
        assert len(report.filled_in(said[kind], pd.DataFrame(rows), ledger)) == len(said[kind]) == number
    assert len(said["figures"]) == 3


def test_another_run_shows_the_reference_greyed_and_the_reference_does_not(copied, tmp_path):
    other = shutil.copytree(copied, tmp_path / "other")
    page = report.write(copied, reference=other).read_text()
    assert (
        page.count("<figcaption>The reference: ") == page.count('class="greyed reference"') == 2
        and page.count(">reference: ") >= 15
    )
    page = report.write(other, reference=other).read_text()
    assert 'class="greyed reference"' not in page and ">reference: " not in page


@pytest.mark.parametrize("held", ["", "{}", "claim,statement\nx,y\n"])
def test_a_reference_that_cannot_be_read_costs_a_run_nothing(held, copied, tmp_path):
    (tmp_path / "run.json").write_text(held)
    (tmp_path / "claims.csv").write_text(held)
    assert "The ledger" in report.write(copied, reference=tmp_path).read_text()


def test_chance_counts_what_is_decided():
    rows = []
    for mean, verdict in [(1.0, rules.REPRODUCED), (0.02, rules.REPRODUCED), (-1.0, rules.NOT_REPRODUCED)]:
        values = mean + np.array([-0.01, 0.0, 0.01])
        _, low, high = rules.interval(values)
        rows.append({"counts": True, "verdict": verdict, "ours": mean, "low": low, "high": high, "n": 3, "above": 0.0,
                     "below": np.inf})  # fmt: skip
    rows += [rows[0] | {"counts": False}, rows[0] | {"verdict": rules.INCONCLUSIVE}]
    found = report.chance(pd.DataFrame(rows))
    assert found == {"decided": 3, "expected": pytest.approx(0.075), "survive": 3}


def test_what_inference_adds_to_a_part():
    row = {"ours": 98.0, "high": 98.0 + 4.303 * 0.1 / np.sqrt(3), "n": 3, "measured": claims.ACCURACY, "exact": True,
           "counts": True, "why": "", "above": 97.6, "below": 98.2, "published": "97.9"}  # fmt: skip
    found = report.figures_of(row, "mnist")
    assert found["images"] == "0.27"
    assert found["place"] == "above 23.9% of ours"
    for other in ({"why": "another set-up: …"}, {"published": "97.9 − 97.8"}, {"exact": False}):
        assert report.figures_of(row | other, "mnist")["place"] == ""


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path):
    (tmp_path / "run.json").write_text("[]")
    result = CliRunner().invoke(cli.main, ["report", str(tmp_path)])
    assert result.exit_code == 2 and "is not the folder of a run" in result.output and "Traceback" not in result.output
    (tmp_path / "run.json").write_text('{"notebooks": [], "profile": "x", "seconds": 1}')
    (tmp_path / "claims.csv").write_text("claim\nx\n")
    result = CliRunner().invoke(cli.main, ["report", str(tmp_path)])
    assert result.exit_code == 2 and "lacks the columns" in result.output


def test_a_run_that_names_files_elsewhere_is_refused(copied):
    run = json.loads((copied / "run.json").read_text())
    run["notebooks"][0]["name"] = "../secret"
    (copied / "run.json").write_text(json.dumps(run))
    result = CliRunner().invoke(cli.main, ["report", str(copied)])
    assert result.exit_code == 2 and "a notebook's name that is none" in result.output


def test_a_ledger_that_no_run_wrote_gives_one_line(copied):
    before = (copied / "index.html").read_bytes()
    table = pd.read_csv(copied / "claims.csv", dtype=str).assign(n="x")
    table.to_csv(copied / "claims.csv", index=False)
    result = CliRunner().invoke(cli.main, ["report", str(copied)])
    assert result.exit_code == 2 and (copied / "index.html").read_bytes() == before


def test_an_export_is_small_and_is_a_run_itself(run_folder, tmp_path):
    publish.reference(run_folder, tmp_path / "kept", limit=40_000)
    for file in (tmp_path / "kept/figures").iterdir():
        assert file.stat().st_size <= 40_000
        if file.suffix == ".png":
            with Image.open(file) as image, Image.open(run_folder / "figures" / file.name) as original:
                assert image.info["Title"] == original.info["Title"]
    page = report.write(tmp_path / "kept", tmp_path / "page.html").read_text()
    assert "02_three_axes" not in page or "data:image/png" in page
    assert not list((tmp_path / "kept").glob("*.ipynb"))


def test_a_reference_is_exported_in_parts(run_folder, tmp_path):
    parts = {}
    for number, keep in (("02", "02_mnist_sweep"), ("05", "05_batch_size_switching")):
        parts[number] = shutil.copytree(run_folder, tmp_path / number)
        run = json.loads((parts[number] / "run.json").read_text())
        run["notebooks"] = [one for one in run["notebooks"] if one["name"] == keep]
        (parts[number] / "run.json").write_text(json.dumps(run))
        table = rules.read(run_folder / "claims.csv")
        table[table.notebook == keep].to_csv(parts[number] / "claims.csv", index=False)
    for number in ("05", "02", "05"):
        publish.reference(parts[number], tmp_path / "kept")
    whole, kept = (json.loads((f / "run.json").read_text()) for f in (run_folder, tmp_path / "kept"))
    assert [n["name"] for n in kept["notebooks"]] == [n["name"] for n in whole["notebooks"]]
    assert kept["seconds"] == pytest.approx(sum(n["seconds"] for n in whole["notebooks"]), abs=0.1)
    pd.testing.assert_frame_equal(rules.read(run_folder / "claims.csv"), rules.read(tmp_path / "kept/claims.csv"))


def test_the_summary_names_what_each_notebook_was_run_on():
    small, large = {"seeds": 3, "num_train": 6000, "lr": 0.1}, {"seeds": 5, "num_train": 60_000, "epochs": 30}
    of = {"02_a": ("mnist", large), "03_b": ("mnist", large), "07_c": ("mnist", small), "01_d": ("", {})}
    notebooks = [{"name": name, "dataset": dataset, "parameters": p} for name, (dataset, p) in of.items()]
    assert publish.scales({"notebooks": notebooks, "machine": "two cores"}) == (
        "(Notebooks 02, 03: mnist, 60,000 images, 30 epochs, 5 seeds; 07: mnist, 6,000 images, 3 seeds; 01: no data. "
        "On two cores.)"
    )


def test_the_readme_holds_the_summary_of_the_committed_reference():
    text = (parameters.PROJECT / "README.md").read_text(encoding="utf-8")
    assert publish.readme(text, report.REFERENCE) == text
    with pytest.raises(ValueError, match="no place for the summary"):
        publish.readme("no marks", report.REFERENCE)


def test_the_committed_reference_is_whole_and_small():
    run = json.loads((report.REFERENCE / "run.json").read_text(encoding="utf-8"))
    table = rules.read(report.REFERENCE / "claims.csv")
    assert set(table.claim) == set(claims.CLAIMS)
    assert set(table.notebook) <= {n["name"] for n in run["notebooks"]} <= set(parameters.notebooks())
    for claim_id, parts in table.groupby("claim"):
        for row in parts.to_dict("records"):
            (part,) = [p for p in claims.CLAIMS[claim_id].parts.values() if p.label == row["part"]]
            assert (row["above"], row["below"], row["rule"]) == (part.low, part.high, part.rule)
    files = [f for f in report.REFERENCE.rglob("*") if f.is_file() and f.name != "index.html"]  # not committed
    assert all(
        f.stat().st_size <= 150_000 for f in files if f.suffix in (".png", ".svg") and f.parent.name == "figures"
    )
    assert sum(f.stat().st_size for f in files) < 16e6


def test_what_a_notebook_shows_keeps_its_place_on_the_page(tmp_path):
    bad = "</div></div><!-- <script>alert(1)</script><p onclick='x()'>text <b>bold <table><tr><td>1"
    notebook = nbformat.v4.new_notebook()
    output = nbformat.v4.new_output("display_data", data={"text/html": bad})
    notebook.cells = [
        nbformat.v4.new_markdown_cell(f"# The title\n\n{bad}"),
        nbformat.v4.new_code_cell("1", outputs=[output]),
        nbformat.v4.new_markdown_cell("the end, `a < b & c`"),
    ]
    nbformat.write(notebook, tmp_path / "01_own.ipynb")
    html, sources, *_ = pages.cells(tmp_path / "01_own.ipynb", [])
    assert "The title" not in html and "<script" not in html and "onclick=" not in html.replace("onclick='x()'&gt;", "")
    assert html.count("<div") == html.count("</div>") and html.count("<b>") == html.count("</b>")
    assert "<code>a &lt; b &amp; c</code>" in html
    assert len(sources) == 3 and all(f'id="{cell}"' in html for cell in sources)
